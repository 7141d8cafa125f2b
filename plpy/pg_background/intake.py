"""What a worker says through libpq, taken in: its rows, notices, command tags and errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import output_settings
from .backlog import Backlog, Item
from .errors import FEATURE_NOT_SUPPORTED, BackgroundError, Report, report_of_system_call
from .job import Job, State
from .results import Column, TypeStyles, encode_rows
from .server import Server
from .session import WorkerSession, report_of

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

# What a wait keeps in memory of a worker's unread output, beyond its queue_size, before it goes to a file.
_KEPT_BYTES = 4 * 1024 * 1024

# psycopg.pq.ExecStatus, as integers: looking an enum up costs more than the comparison.
_EMPTY_QUERY, _COMMAND_OK, _TUPLES_OK, _COPY_OUT, _COPY_IN = 0, 1, 2, 3, 4
_COPY_BOTH, _SINGLE_TUPLE, _TUPLES_CHUNK = 8, 9, 12


class Intake(ABC):
    """Takes in what one job says, to its end; what then is to be done is the worker's part."""

    # Worker sets these: an __init__ here would be one more call for each job.
    session: WorkerSession
    job: Job
    pid: int
    backlog: Backlog
    _server: Server
    _styles: TypeStyles
    _tags: list[bytes]

    # What most jobs never change.
    state = State.RUNNING
    error: Report | None = None
    unreadable: Report | None = None  # why its rows cannot be returned, however well it went
    columns: tuple[Column, ...] | None = None
    _keeps = True  # what it says, for its reader
    _touched = False  # of its output something was read
    _statements = 1
    _chunk_tag = b""
    _tags_seen = 0  # the probe's too
    _untaken: PGresult | None = None  # while it was taken in, a query of this session failed: it was cancelled, say
    _ended_settings: Mapping[str, str] | None = None

    @abstractmethod
    def _end(self) -> None:
        """Nothing more follows: set the state."""

    @property
    def ended(self) -> bool:
        """Whether the job has reached its end, as far as was read."""
        return self.state is not State.RUNNING

    @property
    def problem(self) -> Report | None:
        """What its reader is to be told: its own error, or why its rows cannot be returned."""
        return self.error or self.unreadable

    @property
    def command_tags(self) -> str | None:
        """Those of a job that has ended well and returned no rows, one a line."""
        if self.state is not State.STOPPED or self.columns is not None:
            return None
        return "\n".join(map(self._server.decode, self._tags))

    def pump(self, limit: int, *, arrived: bool = False) -> None:
        """Take in what has arrived, without waiting, while less than `limit` bytes lie unread.

        What libpq has read is taken in to its end: nobody else would find it, were this session to end.
        arrived: whether something has, for certain.
        """
        connection = self.session.connection
        if self._untaken is not None and self.state is State.RUNNING:
            self._take(self._untaken)
            self._untaken = None
        while self.state is State.RUNNING:
            if connection.is_busy():
                if self.backlog.bytes_in_memory >= limit:
                    return
                if not (arrived or self._server.is_readable(connection.socket)):
                    return
                arrived = False
                self._consume()
                continue
            result = connection.get_result()
            if result is None:
                self._end()
                continue
            try:
                self._take(result)
            except BaseException:
                self._untaken = result  # libpq has given it away
                raise

    def _consume(self) -> None:
        self._touched = True
        try:
            self.session.connection.consume_input()
        except Exception as error:
            report = self.session.loss(error)
            if report is None:
                raise
            self._fail(report)
            self._end()

    def _take(self, result: PGresult) -> None:
        status = result.status
        if status in (_TUPLES_CHUNK, _SINGLE_TUPLE):
            self._take_rows(result)
            self._chunk_tag = result.command_status or b""
        elif status in (_TUPLES_OK, _COMMAND_OK, _EMPTY_QUERY):
            if status == _TUPLES_OK:
                self._take_rows(result)
            self._tags_seen += status != _EMPTY_QUERY
            if status != _EMPTY_QUERY and len(self._tags) < self._statements:
                # libpq gives the tag to the last chunk, if that was not full, and the end of the rows has none.
                self._tags.append(result.command_status or self._chunk_tag)
                self._chunk_tag = b""
        elif status in (_COPY_OUT, _COPY_IN, _COPY_BOTH):
            self._refuse_copy()
        else:
            self._fail(report_of(result, self._server, self.pid))

    def _take_rows(self, result: PGresult) -> None:
        """Rows count when they are those of the last statement; the probe's come after it."""
        position = len(self._tags)
        if self.job.discards:
            return
        if position == self._statements - 1:
            if self.columns is None:
                self.columns = self._columns_of(result)
            if result.ntuples and self.problem is None:
                try:
                    for rows in encode_rows(result, self.columns):
                        self._keep(rows)
                except BackgroundError as error:
                    self.unreadable = error.report
        elif position == self._statements and self._statements > 1 and result.ntuples:
            self._ended_settings = output_settings.settings_of(self._server, result)

    def _columns_of(self, result: PGresult) -> tuple[Column, ...]:
        try:
            return self._styles.columns(result)
        except BackgroundError as error:
            self.unreadable = error.report
            return ()

    def _refuse_copy(self) -> None:
        """COPY with the client that the lexer could not see coming: end it, and the session with it."""
        self._fail(
            Report(
                FEATURE_NOT_SUPPORTED,
                "a background worker cannot COPY to or from the client",
                hint="COPY to or from a file or program, or use INSERT and SELECT.",
                worker_pid=self.pid,
            )
        )
        self.session.connection.finish()
        self._end()

    def _take_notice(self, result: PGresult) -> None:
        report = report_of(result, self._server, self.pid)
        if report.severity != "FATAL":  # the end of its session after its own is nothing to who reads its rows
            self._keep(report)

    def _keep(self, item: Item) -> None:
        """For who reads the result. Where there is no room for it the job goes on, and the reader gets an error."""
        if not self._keeps:
            return
        try:
            self.backlog.append(item, max(self.job.queue_size, _KEPT_BYTES))
        except OSError as error:
            self.unreadable, self._keeps = self.unreadable or report_of_system_call(error), False

    def _fail(self, report: Report) -> None:
        if self.error is None:
            self.error = report

    def _check_encoding(self) -> None:
        try:
            output_settings.refuse_encoding(self.columns or (), self.session, self._ended_settings or {})
        except BackgroundError as error:
            self.unreadable = error.report
