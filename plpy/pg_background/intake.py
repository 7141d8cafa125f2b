"""What a worker says, taken in: its rows, notices, command tags and errors.

A job is sent past libpq, and a small answer is read past it too, which takes a fraction of the time. Where the answer
is not small, libpq takes over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from . import output_settings, wire
from .backlog import NOTHING, Backlog, Item, Rows
from .errors import (
    FEATURE_NOT_SUPPORTED,
    BackgroundError,
    Report,
    backend_died,
    report_of_system_call,
)
from .job import Job, State
from .past_libpq import read_what_is_there
from .results import Column, TypeStyles, encode_rows, encode_values, fields_of
from .server import Server
from .session import WorkerSession, report_of, report_of_message

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

# What a wait keeps in memory of a worker's unread output, beyond its queue_size, before it goes to a file.
_KEPT_BYTES = 4 * 1024 * 1024

# psycopg.pq.ExecStatus, as integers: looking an enum up costs more than the comparison.
_EMPTY_QUERY, _COMMAND_OK, _TUPLES_OK, _COPY_OUT, _COPY_IN = 0, 1, 2, 3, 4
_COPY_BOTH, _SINGLE_TUPLE, _TUPLES_CHUNK = 8, 9, 12

# Kinds of messages: what a small answer may consist of; those that tell nothing here; COPY with the client.
_SMALL = frozenset((b"C", b"Z", b"T", b"D", b"E", b"N", b"I", b"1", b"2", b"n"))
_COPY = (b"G", b"H", b"W")
_IDLE = b"I"
_MESSAGE_HEADER_BYTES = 5


def _is_row(message: tuple[bytes, bytes]) -> bool:
    return message[0] == b"D"


class Intake(ABC):
    """Takes in what one job says, to its end; what then is to be done is the worker's part."""

    # Worker sets these: an __init__ here would be one more call for each job.
    session: WorkerSession
    job: Job
    pid: int
    _server: Server
    _styles: TypeStyles
    _tags: list[bytes]

    # What most jobs never change.
    state = State.RUNNING
    backlog = NOTHING
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
    _direct = False  # libpq knows nothing of the job
    _clean_ups = 0  # answers that follow the job's
    _unread = b""  # of what was read past libpq: an answer's start, or at the end what follows it
    _keeps_rows = True  # those of the first statement, where it has become several
    _parts: list[bytes]  # of a long message, where some is
    _missing = 0  # bytes of it
    _stays_direct = False
    _retakes = False  # while it was taken in, a query of this session failed
    _at_end = False  # nothing more will come
    _reports: wire.Reports = wire.NO_REPORTS  # what has become of settings, as was read past libpq
    _usable = True  # nothing has shown that the session is not

    @abstractmethod
    def _let_libpq_take_over(self, received: bytes) -> bool:
        """Have libpq read the answer, which starts with what was received; whether it does."""

    @abstractmethod
    def _end_with(self, tag: str) -> None:
        """As _end, where this command tag is the whole answer, with a shorter way to tell of it."""

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
        if self._direct:
            self._pump_directly(limit)
            if self._direct:
                return
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

    def _pump_directly(self, limit: int) -> None:
        while self._direct and self.state is State.RUNNING and self.backlog.bytes_in_memory < limit:
            if not self._retakes:
                received = read_what_is_there(self.session.connection)
                if received is None:
                    return
                self._touched = True
                self._at_end = not received
                if self._missing:
                    received = self._with_parts(received)
                    if received is None:
                        continue
                self._retakes = True
                self._unread += received
            lone = wire.lone_tag(self._unread)
            if lone is None or self._reports or self.error is not None:
                self._take_directly()
            else:
                tag = lone.group(1)
                self._tags.append(tag)
                self._tags_seen = 1
                self._unread = self._unread[lone.end() :]
                self._end_with(tag.decode("ascii"))
            self._retakes = False

    def _with_parts(self, received: bytes) -> bytes | None:
        """All that was received since a long message began; None while more of it is to come."""
        self._parts.append(received)
        self._missing = max(0, self._missing - len(received))
        if self._missing and not self._at_end:
            return None
        parts, self._parts, self._missing = self._parts, [], 0
        return b"".join(parts)

    def _take_directly(self) -> None:
        """Take the messages that are there; their answer is a small one, or one that a clean-up's follow.

        All others are left to libpq, unless no descriptor is left for that.
        """
        try:
            messages, end, missing = wire.whole_messages(self._unread)
        except ValueError as error:
            self._break_off(backend_died(self.pid, str(error)))
            return
        kinds = [kind for kind, _ in messages]
        is_alone = end == len(self._unread) or self._clean_ups > 0
        is_small = is_alone and kinds[-1:] == [b"Z"] and _SMALL.issuperset(kinds)
        if not is_small and self._clean_ups and b"D" in kinds:
            self.job.seen.plain, self.job.seen.surprising = False, True
        # It may read more than this answer, but nothing must follow that; after an error, nothing does that matters.
        is_for_libpq = not (is_small or self._clean_ups or b"E" in kinds or self._stays_direct)
        if is_for_libpq and self._let_libpq_take_over(self._unread):
            self._direct, self._unread = False, b""
            return
        self._stays_direct = True  # libpq would not know what the first messages said
        self._missing, self._parts = missing, []
        for are_rows, group in groupby(messages, _is_row):
            if are_rows:
                self._take_rows_directly([body for _, body in group])
                continue
            for kind, body in group:
                self._take_message(kind, body)
        if self._at_end and not self.ended:
            self._break_off(backend_died(self.pid))

    def _take_rows_directly(self, bodies: list[bytes]) -> None:
        if self.columns and self.problem is None and self._keeps_rows and not self.job.discards:
            self._keep_rows([encode_values([wire.row_values(body) for body in bodies], self.columns)])
        self._unread = self._unread[sum(map(len, bodies)) + _MESSAGE_HEADER_BYTES * len(bodies) :]

    def _take_message(self, kind: bytes, body: bytes) -> None:
        """Where that fails, it is taken again: no message is taken by half."""
        if kind == b"C":
            self._tags_seen += 1
            self._tags.append(body.rstrip(b"\0"))
        elif kind == b"T":
            if self.columns is None:
                self.columns = self._columns_of(wire.row_description(body))
            else:
                self._keeps_rows = False  # a rule has made more than one statement of the job's
        elif kind == b"E":
            self._fail(report_of_message(body, self._server, self.pid))
        elif kind == b"N":
            self._take_report(report_of_message(body, self._server, self.pid))
        elif kind == b"S":
            self._reports = {**self._reports, **wire.report(body)}
        elif kind in _COPY:
            self._refuse_copy()
        elif kind == b"Z":
            self._usable = self._usable and body == _IDLE
            self._end()
        self._unread = self._unread[_MESSAGE_HEADER_BYTES + len(body) :]

    def _break_off(self, report: Report) -> None:
        """The job's answer does not come to its end."""
        self._usable = False
        self._fail(report)
        self._end()

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
                self.columns = self._columns_of(fields_of(result))
            if result.ntuples and self.problem is None:
                self._keep_rows(encode_rows(result, self.columns))
        elif position == self._statements and self._statements > 1 and result.ntuples:
            self._ended_settings = output_settings.settings_of(self._server, result)

    def _keep_rows(self, batches: Iterable[Rows]) -> None:
        try:
            for rows in batches:
                self._keep(rows)
        except BackgroundError as error:
            self.unreadable = error.report

    def _columns_of(self, fields: Sequence[wire.Field]) -> tuple[Column, ...]:
        try:
            return self._styles.columns(fields)
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
        self._take_report(report_of(result, self._server, self.pid))

    def _take_report(self, report: Report) -> None:
        if report.severity != "FATAL":  # the end of its session after its own is nothing to who reads its rows
            self._keep(report)

    def _keep(self, item: Item) -> None:
        """For who reads the result. Where there is no room for it the job goes on, and the reader gets an error."""
        if not self._keeps:
            return
        if self.backlog is NOTHING:
            self.backlog = Backlog()
        try:
            self.backlog.append(item, max(self.job.queue_size, _KEPT_BYTES))
        except OSError as error:
            self.unreadable, self._keeps = self.unreadable or report_of_system_call(error), False

    def _fail(self, report: Report) -> None:
        if self.error is None:
            self.error = report

    def _check_encoding(self) -> None:
        try:
            output_settings.refuse_encoding(self.columns or (), self.session, self._ended_settings or self._reports)
        except BackgroundError as error:
            self.unreadable = error.report
