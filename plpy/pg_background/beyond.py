"""What goes beyond version 1.8: labels, parameters, one-call runs, waits for any of many, typed rows, self-check.

Each method of Beyond stands behind the internal function of its name; calls.py tells what their replies mean.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from . import lexer, messages
from .calls import MAX_GRACE_MS, MAX_TIMEOUT_MS, TERMINATION_S, clamp, tags_of
from .endings import Ending, Handle, OtherEnding, OwnEnding, wait_for_all, wait_for_any
from .errors import (
    INVALID_PARAMETER_VALUE,
    NULL_VALUE_NOT_ALLOWED,
    SYNTAX_ERROR,
    BackgroundError,
    as_json,
    background_error,
)
from .job import PREVIEW_CHARACTERS, Parameters, State
from .row_types import RowTypes
from .worker import Worker

if TYPE_CHECKING:
    from .calls import Runtime
    from .registry import Registry, Released
    from .server import Server
    from .settings import Configurations

_MAX_LABEL_CHARACTERS = 1000
_MAX_PARAMETERS = 65535  # the protocol counts them in 16 bits
# How long a worker that has reached the timeout of its run may take to roll back before its backend is terminated.
_STOP_GRACE_MS = 1000
_SIGNAL_S = 2.0  # how long to wait for the supervisor to send one

Row = dict[str, Any]  # what is known of a worker: store.COLUMNS, and what _outcome_of() derives


class Beyond:
    """The calls that version 1.8 does not have."""

    def __init__(self, runtime: Runtime, server: Server, registry: Registry, configurations: Configurations) -> None:
        self._runtime = runtime
        self._server = server
        self._registry = registry
        self._configurations = configurations
        self._row_types = RowTypes(server, registry.type_names)
        self._runs: dict[str, Worker] = {}  # of run_query, until they are read

    # --- starting ---

    def start(
        self,
        sql: str | None,
        queue_size: int | None,
        label: str | None,
        params: list[str | None] | None,
        submitted: bool,
    ) -> str:
        """A handle, as the text of a pg_background_handle."""
        worker = self._runtime.launch_job(
            _given(sql),
            queue_size or 0,
            submitted=submitted,
            label=_checked_label(label),
            parameters=self._parameters(params),
        )
        return f"({worker.pid},{worker.cookie})"

    def defer(
        self, sql: str | None, queue_size: int | None, label: str | None, params: list[str | None] | None, marker: str
    ) -> str:
        """A handle; the job waits for the commit of the transaction that has left the marker."""
        from .on_commit import OnCommit

        if self._registry.on_commit is None:
            self._registry.on_commit = OnCommit(self._server, self._registry)
        configuration = self._configurations.now()
        job = self._runtime.job(
            _given(sql), queue_size or 0, configuration, submitted=True, label=_checked_label(label)
        )
        parameters = self._parameters(params)
        if parameters is not None:
            job = job.bound(self._server, parameters)
        pid, cookie = self._registry.on_commit.defer(job, configuration, marker)
        return f"({pid},{cookie})"

    def _parameters(self, params: Sequence[str | None] | None) -> Parameters | None:
        """The values as bytes of the database's encoding. 22023 for an array of several dimensions."""
        if params is None:
            return None
        _require_one_dimension(params, "the parameters of a background worker")
        if len(params) > _MAX_PARAMETERS:
            raise background_error(
                INVALID_PARAMETER_VALUE,
                f"a background worker cannot have {len(params)} parameters",
                hint=f"Up to {_MAX_PARAMETERS} are possible; pass an array or JSON as one of them.",
            )
        if self._server.encoding in ("UTF8", "SQL_ASCII"):
            return [None if value is None else value.encode() for value in params]
        converted = self._server.query(
            "SELECT ARRAY(SELECT pg_catalog.convert_to(p.value, pg_catalog.getdatabaseencoding())"
            " FROM pg_catalog.unnest($1) WITH ORDINALITY AS p(value, place) ORDER BY p.place) AS bytes",
            ["pg_catalog.text[]"],
            [list(params)],
        )
        return list(converted[0]["bytes"])

    # --- one-call runs ---

    def run(
        self,
        sql: str | None,
        queue_size: int | None,
        timeout_ms: int | None,
        label: str | None,
        params: list[str | None] | None,
    ) -> str:
        """Launch, wait, release: a JSON object of type pg_background_run_result."""
        deadline = _deadline(timeout_ms)
        worker = self._runtime.launch_job(
            _given(sql),
            queue_size or 0,
            label=_checked_label(label),
            parameters=self._parameters(params),
            discards=True,
        )
        try:
            timed_out = not worker.wait(deadline)
            if timed_out:
                self._stop(worker, timeout_ms)
            worker.note_plain()  # its rows are none of anybody's
            row = _outcome_of(_row_of(worker))
        except BaseException:
            self._abandon(worker)
            raise
        self._registry.release(worker)
        return as_json({**row, "timed_out": timed_out, "elapsed_ms": worker.elapsed_ms})

    def run_query(
        self,
        run: str,
        sql: str | None,
        queue_size: int | None,
        timeout_ms: int | None,
        label: str | None,
        col_def: str | None,
    ) -> str:
        """Launch, and wait if there is a timeout: "pid,cookie" of a worker that is to be read at once.

        run: names it to abandon(), as a cancel can come before this answer has arrived.
        """
        self._runs = {name: old for name, old in self._runs.items() if self._registry.tracked(old.pid) is old}
        if col_def is not None:
            self._check_column_list(col_def)
        deadline = _deadline(timeout_ms)
        worker = self._runtime.launch_job(_given(sql), queue_size or 0, label=_checked_label(label))
        self._runs[run] = worker
        if deadline is not None and not worker.wait(deadline):
            self._stop(worker, timeout_ms)
        return f"{worker.pid},{worker.cookie}"

    def abandon(self, run: str) -> str:
        """Cancel the worker of a run_query that has failed half-way, and let it go, if it still is there."""
        worker = self._runs.pop(run, None)
        if worker is not None and self._registry.tracked(worker.pid) is worker:
            self._abandon(worker)
        return ""

    def _check_column_list(self, col_def: str) -> None:
        """42601 unless the text stays inside of the parentheses that it is put into."""
        standard_strings = self._server.setting("standard_conforming_strings") == "on"
        if not lexer.is_balanced(col_def, standard_strings):
            raise background_error(
                SYNTAX_ERROR,
                "the column list is none",
                detail=f'It is "{col_def[:PREVIEW_CHARACTERS]}".',
                hint='Give names and types as in "id int, name text".',
            )

    def _stop(self, worker: Worker, timeout_ms: int | None) -> None:
        """Cancel a worker whose timeout is over, and wait until it has rolled back."""
        worker.stop_message = f"canceling background worker due to its timeout of {timeout_ms} ms"
        worker.cancel(_STOP_GRACE_MS)
        self._registry.control.ask(messages.CANCEL, worker.pid, worker.cookie, _STOP_GRACE_MS)
        worker.wait(time.monotonic() + _STOP_GRACE_MS / 1000 + TERMINATION_S)

    def _abandon(self, worker: Worker) -> None:
        """Cancel a worker without waiting for its end, and let it go.

        Only when the signal has been sent: the error that is on its way may release the lock that the worker waits for.
        """
        deadline = time.monotonic() + _SIGNAL_S
        try:
            if not worker.ended:
                worker.cancel(_STOP_GRACE_MS)
                with suppress(TimeoutError, BackgroundError):
                    self._registry.control.ask(
                        messages.CANCEL,
                        worker.pid,
                        worker.cookie,
                        _STOP_GRACE_MS,
                        wait_for=lambda awaited: self._runtime.wait_until(deadline, awaited),
                    )
        finally:
            self._registry.release(worker)

    # --- rows without a column list ---

    def open_as(self, pid: int | None, cookie: int | None, row_type: int | None) -> str:
        """As open_result, with the columns of a row type, or, if that is None, one column of JSON objects."""
        if pid is None or cookie is None:
            raise background_error(NULL_VALUE_NOT_ALLOWED, "the handle of a background worker must not be null")
        worker = self._runtime.opened(pid, cookie)
        tags = tags_of(worker)
        if tags:
            return "+" + tags
        query = self._runtime.rows_query(worker)
        marks = "+." if query.startswith(".") else "+"
        query = query.removeprefix(".")
        columns = worker.columns or ()
        if row_type is None:
            return marks + self._row_types.query_of_json(columns, query)
        return marks + self._row_types.query_of(columns, query, row_type)

    # --- what became of a worker ---

    def told(self, what: str, pid: int, cookie: int) -> str:
        """What is known of a worker: a JSON object of type pg_background_<what>, or "=" and its SQL."""
        tell = {
            "outcome": self._outcome,
            "result_info": self._result_info,
            "error_info": self._error_info,
            "full_sql": self._full_sql,
            "progress": self._progress,
        }.get(what)
        if tell is None:
            raise background_error(INVALID_PARAMETER_VALUE, f'nothing is told of "{what}"')
        return tell(Handle(pid, cookie))

    def _outcome(self, handle: Handle) -> str:
        """An empty object where nothing is known, or is to be told."""
        try:
            return as_json(_outcome_of(self._row(handle)))
        except BackgroundError:
            return "{}"

    def _result_info(self, handle: Handle) -> str:
        row = self._row(handle)
        return as_json({**_outcome_of(row), "started_at": row["launched_at"]})

    def _error_info(self, handle: Handle) -> str:
        return as_json({name.replace("error_", "", 1): value for name, value in self._row(handle).items()})

    def _progress(self, handle: Handle) -> str:
        """An empty object where nothing is known, or is to be told."""
        try:
            return as_json(self._runtime.row_elsewhere(*handle))
        except BackgroundError:
            return "{}"

    def _full_sql(self, handle: Handle) -> str:
        worker = self._runtime.tracked(*handle)
        if worker is not None:
            return "=" + worker.job.sql
        row = self._runtime.row_elsewhere(*handle)
        released = self._released(handle)
        kept = released.sql if released is not None else None
        return "=" + (kept or str(row["sql_preview"]))

    def _row(self, handle: Handle) -> Row:
        """What is known of a worker, here or elsewhere. 42704, 55000, 42501."""
        worker = self._runtime.tracked(*handle)
        if worker is not None:
            self._registry.refresh(worker)
            return _row_of(worker)
        row = self._runtime.row_elsewhere(*handle)
        released = self._released(handle)
        if released is not None and released.consumed:
            row["consumed"] = True
        return row

    def _released(self, handle: Handle) -> Released | None:
        """What this session still knows of a worker that it has let go: the latest, as those of version 1 share one."""
        return next((old for old in reversed(self._registry.released) if (old.pid, old.cookie) == handle), None)

    # --- many workers ---

    def wait_any(self, handles: list[Row | None], timeout_ms: int | None) -> str:
        """The handle of one that has ended; empty at the timeout, or if there are none."""
        deadline = _deadline(timeout_ms)
        endings = self._endings(_given_handles(handles))
        try:
            first = wait_for_any(self._server, self._registry.control, endings, deadline)
        finally:
            _forget(endings.values())
        return f"({first.pid},{first.cookie})" if first is not None else ""

    def drain(self, handles: list[Row | None], timeout_ms: int | None) -> str:
        """Wait for all and let them go: a JSON array of objects of type pg_background_outcome."""
        deadline = _deadline(timeout_ms)
        wanted = _given_handles(handles)
        endings = self._endings(wanted)
        try:
            wait_for_all(self._server, self._registry.control, endings, deadline)
        finally:
            _forget(endings.values())
        outcomes = {handle: _outcome_of(self._row(handle)) for handle in endings}
        for handle in endings:
            worker = self._runtime.tracked(*handle)
            if worker is not None:
                self._registry.release(worker)
        return as_json([outcomes[handle] for handle in wanted])

    def _endings(self, handles: Iterable[Handle]) -> dict[Handle, Ending]:
        """By handle. 42704, 55000, 42501, and then nothing has been asked."""
        endings: dict[Handle, Ending] = {}
        for handle in handles:
            worker = self._runtime.tracked(*handle)
            if worker is not None:
                endings[handle] = OwnEnding(self._registry.control, worker)
            else:
                endings[handle] = OtherEnding(self._registry.control, handle, self._runtime.row_elsewhere(*handle))
        return endings

    def take(self, how: str) -> str:
        """Cancel all, detach all, or purge: how many it took."""
        workers = self._managed()
        if how == "cancel_all":
            return str(self._cancel([worker for worker in workers if not worker.ended], None))
        if how == "purge":
            workers = [worker for worker in workers if worker.ended]
        for worker in workers:
            self._registry.release(worker)
        return str(len(workers))

    def cancel_by_label(self, pattern: str, grace_ms: int) -> str:
        """How many it took; a grace of 0 terminates none."""
        running = [worker for worker in self._managed() if not worker.ended and worker.job.label is not None]
        matches = self._server.query(
            "SELECT l.label OPERATOR(pg_catalog.~~) $2 AS yes"
            " FROM pg_catalog.unnest($1) WITH ORDINALITY AS l(label, place) ORDER BY l.place",
            ["pg_catalog.text[]", "pg_catalog.text"],
            [[worker.job.label for worker in running], pattern],
        )
        chosen = [worker for worker, match in zip(running, matches) if match["yes"]]
        return str(self._cancel(chosen, clamp(grace_ms, MAX_GRACE_MS) or None))

    def _cancel(self, workers: Sequence[Worker], grace_ms: int | None) -> int:
        for worker in workers:
            worker.cancel(grace_ms)
            self._registry.control.ask(messages.CANCEL, worker.pid, worker.cookie, grace_ms)
        if grace_ms is not None:
            deadline = time.monotonic() + grace_ms / 1000 + TERMINATION_S
            for worker in workers:
                worker.wait(deadline)
                self._registry.count_end(worker)
        return len(workers)

    # --- self-check ---

    def check(self) -> str:
        """A JSON array of rows of pg_background_check()."""
        from .selfcheck import SelfCheck

        checks = SelfCheck(self._server, self._registry, self._configurations, self._runtime.report_of)
        return as_json([finding._asdict() for finding in checks.findings()])

    def _managed(self) -> list[Worker]:
        """The tracked workers that the caller may manage, each up to date."""
        return [worker for worker in self._registry.all() if self._registry.may_manage(worker.role_oid)]


def _row_of(worker: Worker) -> Row:
    """What this session knows of a worker that it tracks, as the supervisor would tell it."""
    ended_at = (worker.launched_at + timedelta(milliseconds=worker.elapsed_ms)).isoformat() if worker.ended else None
    return {
        "pid": worker.pid,
        "cookie": worker.cookie,
        "label": worker.job.label,
        "launched_at": worker.launched_at.isoformat(),
        "finished_at": ended_at,
        "consumed": worker.consumed,
        **worker.changes,
        "state": worker.state.value,
    }


def _outcome_of(row: Mapping[str, Any]) -> Row:
    """A row with what follows from its state: an end by a cancel is an error too."""
    state = row["state"]
    ended = state != State.RUNNING.value
    return {**row, "completed": ended, "has_error": ended and state != State.STOPPED.value}


def _deadline(timeout_ms: int | None) -> float | None:
    """When a wait is over, by time.monotonic(); 0, and what is less, means never."""
    if timeout_ms is None or timeout_ms <= 0:
        return None
    return time.monotonic() + clamp(timeout_ms, MAX_TIMEOUT_MS) / 1000


def _require_one_dimension(array: Iterable[object], what: str) -> None:
    """22023 for an array of several dimensions, which comes as lists in a list."""
    if any(isinstance(element, list) for element in array):
        raise background_error(INVALID_PARAMETER_VALUE, f"{what} must be an array of one dimension")


def _given_handles(handles: Sequence[Row | None]) -> list[Handle]:
    """Those that are not null. 22023 for an array of several dimensions."""
    _require_one_dimension(handles, "the handles of background workers")
    return [
        Handle(handle["pid"], handle["cookie"])
        for handle in handles
        if handle is not None and handle["pid"] is not None and handle["cookie"] is not None
    ]


def _forget(endings: Iterable[Ending]) -> None:
    for ending in endings:
        ending.forget()


def _given(sql: str | None) -> str:
    """22004 for a NULL."""
    if sql is None:
        raise background_error(NULL_VALUE_NOT_ALLOWED, "the SQL of a background worker must not be null")
    return sql


def _checked_label(label: str | None) -> str | None:
    """22023 for one that is no label but a text."""
    if label is not None and len(label) > _MAX_LABEL_CHARACTERS:
        raise background_error(
            INVALID_PARAMETER_VALUE,
            f"a label of {len(label)} characters is too long",
            hint=f"Up to {_MAX_LABEL_CHARACTERS} characters are possible.",
        )
    return label
