"""What the SQL functions call: each method of Runtime stands behind the internal function of its name.

A method returns text: its value, or "!" and an error report as JSON. `_pg_background_checked` raises the latter from
PL/pgSQL, so that no traceback of Python's shows; see docs/architecture.md, "Errors".
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from . import lexer, messages, output_settings, settings
from .backlog import Rows
from .deadlock import Watch
from .errors import (
    FEATURE_NOT_SUPPORTED,
    UNDEFINED_OBJECT,
    BackgroundError,
    Report,
    as_json,
    background_error,
    report_of_system_call,
)
from .job import PREVIEW_CHARACTERS, Job, Parameters, State
from .registry import Registry
from .results import INT4, INT8, TEXT, rows_query, streamed, texts_of, written_out
from .server import Server
from .worker import Worker

if TYPE_CHECKING:
    from .beyond import Beyond
    from .bootstrap import Module

_LAST_ERROR_CHARACTERS = 512
_REMEMBERED_JOBS, _REMEMBERED_CHARACTERS = 100, 10_000
MAX_TIMEOUT_MS = 86_400_000
MAX_GRACE_MS = 3_600_000
_QUICK_S = 0.01
# Types whose arrays have a query of their own, with a kept plan, in the functions that return rows.
_MARKS = {INT4: "4", INT8: "8", TEXT: "t"}
TERMINATION_S = 5.0  # how long a call waits for a backend that it has terminated

Method = TypeVar("Method", bound=Callable[..., str])


def reply(method: Method) -> Method:
    """Turn what a method of Runtime raises for the user into its reply."""

    @functools.wraps(method)
    def replying(self: Runtime, *arguments: Any) -> str:
        try:
            return method(self, *arguments)
        except Exception as error:  # noqa: BLE001 - report_of raises what is none of the user's business again
            return "!" + self.report_of(error).to_json()

    return replying  # type: ignore[return-value]


class Runtime:
    """The extension in one session."""

    def __init__(self, plpy: Any, memory: dict[str, Any], digest: str, read_module: Callable[[str], Module]) -> None:
        self._server = Server(plpy)
        settings.define(self._server, memory)
        self._registry = Registry(self._server, digest, read_module)
        self._configurations = settings.Configurations(self._server, output_settings.NAMES, output_settings.inherited)
        self._jobs: dict[tuple[Any, ...], Job] = {}  # of late, under this configuration
        self._jobs_configuration: settings.Configuration | None = None
        self._reading: dict[int, Reading] = {}
        self._reader_settings = output_settings.ReaderSettings(self._server)

    def retire(self) -> None:
        """Let all workers go on to their ends; another runtime takes over."""
        self._registry.retire()

    def begin_anew(self) -> None:
        """This session is a worker's, and its job has ended: the next one is to see nothing of what it launched."""
        self._reading.clear()
        self._registry.begin_anew()

    @reply
    def further(self, call: str, *arguments: Any) -> str:
        """A call that version 1.8 does not have: the method of Beyond with that name."""
        answer: str = getattr(self._beyond, call)(*arguments)
        return answer

    @functools.cached_property
    def _beyond(self) -> Beyond:
        """Compiled when one of its calls is first made."""
        from .beyond import Beyond

        return Beyond(self, self._server, self._registry, self._configurations)

    def report_of(self, error: Exception) -> Report:
        """The report for an exception that the user is to see; re-raises what is a defect of ours."""
        if isinstance(error, BackgroundError):
            return error.report
        report = self._server.report_of(error)
        if report is not None:
            return report
        if isinstance(error, OSError):
            return report_of_system_call(error)
        raise error

    # --- starting ---

    @reply
    def launch(self, sql: str, queue_size: int) -> str:
        """A handle, as the text of a pg_background_handle."""
        worker = self.launch_job(sql, queue_size)
        return f"({worker.pid},{worker.cookie})"

    @reply
    def launch_v1(self, sql: str, queue_size: int) -> str:
        """A pid."""
        return str(self.launch_job(sql, queue_size, v1=True).pid)

    @reply
    def submit(self, sql: str, queue_size: int) -> str:
        """A handle; the output is thrown away."""
        worker = self.launch_job(sql, queue_size, submitted=True)
        return f"({worker.pid},{worker.cookie})"

    def launch_job(
        self,
        sql: str,
        queue_size: int,
        *,
        v1: bool = False,
        submitted: bool = False,
        label: str | None = None,
        parameters: Parameters | None = None,
        discards: bool = False,
    ) -> Worker:
        """Start a worker, unless its SQL holds what no worker can run (0A000)."""
        configuration = self._configurations.now()
        known = (sql, queue_size, submitted, label, discards)
        job = self._jobs.get(known)
        if job is None or configuration is not self._jobs_configuration:
            job = self.job(sql, queue_size, configuration, submitted=submitted, label=label, discards=discards)
            if len(sql) <= _REMEMBERED_CHARACTERS:
                self._remember(known, job, configuration)
        if parameters is not None:
            job = job.bound(self._server, parameters)
        return self._registry.launch(job, configuration, v1=v1)

    def _remember(self, known: tuple[Any, ...], job: Job, configuration: settings.Configuration) -> None:
        """It may be launched again: then its SQL need not be looked at."""
        if configuration is not self._jobs_configuration or len(self._jobs) >= _REMEMBERED_JOBS:
            self._jobs.clear()
        self._jobs[known], self._jobs_configuration = job, configuration

    def job(
        self,
        sql: str,
        queue_size: int,
        configuration: settings.Configuration,
        *,
        submitted: bool = False,
        label: str | None = None,
        discards: bool = False,
    ) -> Job:
        """A job, without parameters. 0A000 for what no worker can run, 22023 for a queue_size out of range."""
        queue_bytes = configuration.queue_bytes(queue_size)
        script = lexer.script(sql, configuration.standard_strings)
        if script.forbidden is not None:
            raise background_error(
                FEATURE_NOT_SUPPORTED,
                f"a background worker cannot run {script.forbidden}",
                detail="Its SQL runs as one implicit transaction, without a client of its own.",
                hint="Launch one worker for each transaction; COPY to or from a file or program instead.",
            )
        return Job.make(self._server, sql, script, queue_bytes, submitted=submitted, label=label, discards=discards)

    # --- reading ---

    @reply
    def open_result(self, pid: int, cookie: int | None) -> str:
        """Wait for the first rows; the query that delivers them, which calls `batches`, before close_result.

        A "." before it: it calls `taken`, and needs no close_result. In its place, where the caller calls `taken`: "="
        and a text, "*" and command tags, one a line, or a mark of _MARKS and an array of that type.
        A "+" before all that: it took a while, in which the extension may have moved to another schema.
        """
        quick_until = time.monotonic() + _QUICK_S
        worker = self.opened(pid, cookie)
        reply = tags_of(worker) or self._plain_column(worker) or self.rows_query(worker)
        return reply if time.monotonic() < quick_until else "+" + reply

    def opened(self, pid: int, cookie: int | None) -> Worker:
        """The worker, when its columns are known or it has ended."""
        worker = self._registry.find_for_result(pid, cookie)
        if worker.job.submitted:
            raise background_error(
                FEATURE_NOT_SUPPORTED,
                f"the background worker with PID {pid} was submitted, it keeps no results",
                hint="Use pg_background_launch_v2 where results are wanted.",
            )
        if worker.consumed:
            raise background_error(
                UNDEFINED_OBJECT, f"the results of the background worker with PID {pid} are being read"
            )
        worker.wait_for_rows()
        unreadable = worker.problem is not None and not (worker.columns and worker.backlog)
        if unreadable:
            worker.wait(None)
        if worker.ended and unreadable:
            self._finish(worker)
            assert worker.problem is not None
            raise BackgroundError(worker.problem)
        return worker

    def _plain_column(self, worker: Worker) -> str:
        """The mark and the array of a small result of one column of a type that is met often; empty for any other."""
        columns = worker.columns or ()
        mark = _MARKS.get(columns[0].type_oid) if len(columns) == 1 else None
        rows = self._whole_rows(worker) if mark is not None else None
        texts = texts_of(rows, self._server.encoding) if rows is not None else None
        # What stands for NULL in an array depends on a setting.
        return f"{mark}{texts[0]}" if texts is not None and "NULL" not in texts[0] else ""

    def rows_query(self, worker: Worker) -> str:
        """The query of open_result, for any columns. Types of the job's own making show only after its commit."""
        columns = worker.columns or ()
        names = self._registry.type_names.of(columns)
        if names is None:
            worker.wait(None)
            names = self._registry.type_names.of(columns)
        if names is None:
            raise background_error(
                UNDEFINED_OBJECT,
                f"a type in the result of the background worker with PID {worker.pid} does not exist any more",
            )
        worker.dependence = self._reader_settings.dependence(columns)
        written = worker.written_under()
        wanted = output_settings.wanted_by_reader(worker.dependence, written)
        if not worker.dependence.settings and self._reader_settings.hold(wanted):
            rows = self._whole_rows(worker)
            whole = written_out(rows, self._server.encoding) if rows is not None else None
            if whole is not None:
                taken = (
                    f"FROM {{schema}}._pg_background_checked({{schema}}._pg_background_taken({worker.pid})) AS taken"
                )
                return "." + rows_query(columns, names, whole, taken)
        worker.reader_before = self._reader_settings.take_on(wanted)
        batches = f"{{schema}}._pg_background_batches({worker.pid})"
        literals, source = streamed(batches, columns, self._server.encoding)
        return rows_query(columns, names, literals, source, zoned=output_settings.reads_zones(columns, written))

    def _whole_rows(self, worker: Worker) -> Rows | None:
        """The rows of a result that is there to its end, in one batch; None for any other."""
        if worker.state is not State.STOPPED or worker.problem is not None:
            return None
        return worker.backlog.only_rows()

    def batches(self, pid: int) -> Iterator[list[bytes]]:
        """The rows of an opened result, a batch at a time, each a literal for every column."""
        worker = self._registry.find(pid, None)
        worker.consumed = True
        reading = self._reading[pid] = Reading(worker)
        try:
            yield from self._relayed_batches(reading)
            self._let_go(reading)
        finally:
            if not reading.finished:  # the statement that reads was cancelled, or has failed
                self._reading.pop(pid, None)
                self._registry.release(worker, at_once=True)

    def _relayed_batches(self, reading: Reading) -> Iterator[list[bytes]]:
        """Errors, a cancel among them, are kept for close_result: raised in here, they would show a traceback."""
        worker = reading.worker
        try:
            while True:
                item = worker.next_item()
                if item is None:
                    break
                if isinstance(item, Rows):
                    yield list(item.columns)
                else:
                    self._server.relay(item)
            worker.check_output_settings()
            reading.error = worker.problem
            reading.finished = True
        except GeneratorExit:
            raise
        except Exception as error:  # noqa: BLE001 - as in reply
            reading.error = self.report_of(error)
            reading.finished = True

    def _let_go(self, reading: Reading) -> None:
        """Not left to close_result: a cancel between the last rows and that call would leave a worker nobody reads."""
        try:
            self._registry.release(reading.worker)
        except Exception as error:  # noqa: BLE001 - as in reply
            reading.error = reading.error or self.report_of(error)

    @reply
    def close_result(self, pid: int) -> str:
        """End the reading of a worker's rows; its error, if it had one."""
        reading = self._reading.pop(pid, None)
        if reading is None:
            raise background_error(UNDEFINED_OBJECT, f"no result of PID {pid} is being read")
        try:
            self._registry.require_membership(reading.worker.role_oid, pid)
        finally:
            self._reader_settings.put_back(reading.worker.reader_before)
        if reading.error is not None:
            raise BackgroundError(reading.error)
        return ""

    @reply
    def taken(self, pid: int) -> str:
        """Let an opened worker go whose result the caller has got whole."""
        self._finish(self._registry.find(pid, None))
        return ""

    def _finish(self, worker: Worker) -> None:
        """Relay what a worker has said beside its rows, and let it go."""
        worker.consumed = True
        if worker.job.script.names_no_table and not worker.dependence.settings:
            worker.note_plain()
        try:
            while worker.backlog:
                item = worker.backlog.popleft()
                if isinstance(item, Report):
                    self._server.relay(item)
        finally:  # to relay is to let a cancel through
            self._registry.release(worker)

    # --- waiting and letting go ---

    @reply
    def wait(self, pid: int, cookie: int | None, timeout_ms: int | None) -> str:
        """ "true" when the work has ended, "false" at the timeout."""
        deadline = None if timeout_ms is None else time.monotonic() + clamp(timeout_ms, MAX_TIMEOUT_MS) / 1000
        worker = self.tracked(pid, cookie)
        if worker is None:
            return self._wait_elsewhere(pid, cookie or 0, deadline)
        ended = worker.wait(deadline)
        self._registry.count_end(worker)
        return "true" if ended else "false"

    def tracked(self, pid: int, cookie: int | None) -> Worker | None:
        """The worker if this session tracks it; None if it is another's, or was let go.

        The pid of one that was let go may be that of a later worker by now: 55000 only where nobody knows the handle.
        """
        worker = self._registry.tracked(pid)
        if worker is None:
            return None
        if cookie in (None, worker.cookie) or self._registry.control.ask(messages.FIND, pid, cookie) is None:
            return self._registry.find(pid, cookie)
        return None

    def row_elsewhere(self, pid: int, cookie: int) -> dict[str, Any]:
        """The row of a worker of another session, or a detached one. 42704, 42501."""
        row = self._registry.control.ask(messages.FIND, pid, cookie)
        if row is None:
            raise background_error(
                UNDEFINED_OBJECT,
                f"there is no background worker with PID {pid} and cookie {cookie} in this database",
                hint="It may have ended longer ago than pg_background.history, or the server was restarted."
                " See pg_background_activity.",
            )
        self._registry.require_membership(int(row["role_oid"]), pid)
        return dict(row)

    def _wait_elsewhere(self, pid: int, cookie: int, deadline: float | None) -> str:
        """As wait, for a worker of another session, or a detached one: the supervisor tells of its end."""
        control = self._registry.control
        if self.row_elsewhere(pid, cookie)["state"] != State.RUNNING.value:
            return "true"
        if deadline is not None and time.monotonic() >= deadline:
            return "false"
        if deadline is None:
            with Watch(self._server, control, pid) as watch:
                control.ask(messages.WAIT, pid, cookie, wait_for=watch.wait_for)
            return "true"
        try:
            control.ask(messages.WAIT, pid, cookie, wait_for=lambda awaited: self.wait_until(deadline, awaited))
        except TimeoutError:
            return "false"
        return "true"

    def wait_until(self, deadline: float, awaited: Sequence[tuple[int, int]]) -> None:
        """TimeoutError at the deadline."""
        if not self._server.wait_for(awaited, deadline):
            raise TimeoutError

    @reply
    def cancel(self, pid: int, cookie: int, grace_ms: int | None) -> str:
        """Ask a worker to stop; with a grace, wait so long for its end, and then for that of its backend."""
        grace = None if grace_ms is None else clamp(grace_ms, MAX_GRACE_MS)
        worker = self.tracked(pid, cookie)
        if worker is not None:
            self._registry.refresh(worker)
            if worker.ended:
                return ""
            worker.cancel(grace)
        elif self.row_elsewhere(pid, cookie)["state"] != State.RUNNING.value:
            return ""
        self._registry.control.ask(messages.CANCEL, pid, cookie, grace)
        if grace is not None:
            deadline = time.monotonic() + grace / 1000 + TERMINATION_S
            if worker is not None:
                worker.wait(deadline)
                self._registry.count_end(worker)
            else:
                self._wait_elsewhere(pid, cookie, deadline)
        return ""

    @reply
    def detach(self, pid: int, cookie: int | None) -> str:
        """Stop tracking; the worker goes on."""
        self._registry.detach(pid, cookie)
        return ""

    # --- observing ---

    @reply
    def list_workers(self) -> str:
        """A JSON array of the tracked workers that the caller may manage."""
        rows = [
            {
                "pid": worker.pid,
                "cookie": worker.cookie,
                "launched_at": worker.launched_at.isoformat(),
                "user_id": worker.role_oid,
                "queue_size": worker.job.queue_size,
                "state": worker.state.value,
                "sql_preview": worker.job.sql[:PREVIEW_CHARACTERS],
                "last_error": worker.error.message[:_LAST_ERROR_CHARACTERS] if worker.error and worker.ended else None,
                "consumed": worker.consumed,
                "label": worker.job.label,
            }
            for worker in self._registry.all()
            if self._registry.may_manage(worker.role_oid)
        ]
        return as_json(rows)

    @reply
    def stats(self) -> str:
        """A JSON object with this session's counts."""
        registry = self._registry
        active = sum(1 for worker in registry.all() if not worker.ended)
        return as_json(
            {
                "workers_launched": registry.launched,
                "workers_completed": registry.counts[State.STOPPED],
                "workers_failed": registry.counts[State.ERROR],
                "workers_canceled": registry.counts[State.CANCELED],
                "workers_active": active,
                "avg_execution_ms": registry.average_ms(),
                "max_workers": settings.value(self._server, settings.MAX_WORKERS),
            }
        )


class Reading:
    """A result that is being read."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.error: Report | None = None
        self.finished = False


def tags_of(worker: Worker) -> str:
    """The command tags of a worker that has none but these to return, behind a mark; empty for any other."""
    tags = worker.command_tags
    return "" if tags is None else ("=" if tags and "\n" not in tags else "*") + tags


def clamp(timeout_ms: int, high: int) -> int:
    """Between 0 and the highest value that is allowed."""
    return max(0, min(high, timeout_ms))
