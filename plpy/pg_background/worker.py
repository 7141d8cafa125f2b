"""A worker: one job, running in a worker session. dispatch.py sends it, intake.py takes in what it says."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from . import libpq_feed, messages, output_settings, wire
from .backlog import Item
from .deadlock import Watch
from .dispatch import Dispatch
from .errors import (
    ADMIN_SHUTDOWN,
    CONNECTION_FAILURE,
    QUERY_CANCELED,
    Report,
    report_of_system_call,
)
from .job import State
from .messages import TERMINATED, TIMED_OUT
from .server import READABLE

_NO_LIMIT = 1 << 62
_IDLE = 0  # TransactionStatus.IDLE
_MOMENT_S = 0.01  # to give the processor away may take a few milliseconds
_INTERRUPTED = (QUERY_CANCELED, ADMIN_SHUTDOWN, CONNECTION_FAILURE)


class Worker(Dispatch):
    """A job in a worker session, from the moment its SQL was sent.

    `key` is random and names the job everywhere; the cookie is the same, but 0 for a worker of version 1.
    """

    # What most jobs never change stands in the classes: to set it for each would take a tenth of a launch's time.
    counted = False
    stop_message: str | None = None  # why, where the server does not know it
    changes: Mapping[str, Any] = {}  # what its end has changed in its row
    elapsed_ms = 0.0
    dependence = output_settings.Dependence(())
    reader_before: Mapping[str, str] = {}

    @property
    def launched_at(self) -> datetime:
        """When, in UTC."""
        return messages.moment(self._launched_us)

    @property
    def read_elsewhere(self) -> bool:
        """Whether the supervisor reads this worker's socket, and tells us of its end."""
        return self.job.submitted or self.detached

    def look(self) -> None:
        """Bring the state up to date without reading more than queue_size ahead."""
        if self.read_elsewhere:
            self._control.hear()
        else:
            self.pump(_NO_LIMIT if self.cancel_requested else self.job.queue_size)

    def wait(self, deadline: float | None) -> bool:
        """Wait until the job has ended; False at the deadline. Unread output is kept, if need be in a file."""
        self.advance()
        has_time = deadline is None or deadline - time.monotonic() > _MOMENT_S
        may_spin = self._direct and not self.ended and has_time
        if may_spin and self._server.spin_until_readable(self.session.connection.socket):
            self.advance()
        if deadline is None and not self.ended:
            self._wait_without_limit()
        while not self.ended:
            if not self._server.wait_for(self.awaited_with_control(), deadline):
                return False
            self.advance()
        return True

    def _wait_without_limit(self) -> None:
        """40P01 where the job would never end, because it waits for this session."""
        with self._watch() as watch:
            while not self.ended:
                watch.wait_for(self.awaited_with_control())
                self.advance()

    def _watch(self) -> Watch:
        return Watch(self._server, self._control, self.pid)

    def advance(self) -> None:
        """Take in all that there is."""
        if self.read_elsewhere:
            self._control.hear_or_replace()
            return
        self.pump(_NO_LIMIT)
        if not self.ended:
            self._control.replace_if_gone()

    def awaited(self) -> tuple[int, int]:
        """What to poll for news of this worker."""
        if self.read_elsewhere:
            descriptor = self._control.descriptor
            assert descriptor is not None
            return (descriptor, READABLE)
        return (self.session.connection.socket, READABLE)

    def awaited_with_control(self) -> tuple[tuple[int, int], ...]:
        """The same, and the news that the supervisor has gone: somebody must see to the workers meanwhile."""
        descriptor = self._control.descriptor
        if self.read_elsewhere or descriptor is None:
            return (self.awaited(),)
        return (self.awaited(), (descriptor, READABLE))

    def wait_for_rows(self) -> None:
        """Wait until the result's columns are known or the job has ended."""
        if self._direct and not self.ended and self._server.is_readable_soon(self.session.connection.socket):
            self._pump_directly(self.job.queue_size)
        if self.ended:
            return
        arrived = False
        with self._watch() as watch:
            while True:
                self.pump(max(self.job.queue_size, self.backlog.bytes_in_memory + 1), arrived=arrived)
                if self.columns is not None or self.ended:
                    return
                arrived = watch.wait_for((self.awaited(),))

    def next_item(self) -> Item | None:
        """The next batch of rows or notice, waiting for it; None at the end."""
        with self._watch() as watch:
            while True:
                item = self.backlog.popleft()
                if item is not None or self.ended:
                    return item
                self.pump(1)
                if not self.backlog and not self.ended:
                    watch.wait_for((self.awaited(),))

    def written_under(self) -> Mapping[str, str]:
        """The output settings of the rows; with several statements they are known at the end only."""
        names_objects = "search_path" in self.dependence.settings
        if self._clean_ups and self.dependence.settings:
            self.job.seen.plain = False
        if names_objects and self._clean_ups:
            output_settings.refuse_unreported(self.dependence)
        if names_objects or (self.dependence.settings and self._statements > 1):
            self.wait(None)
        written = self._ended_settings or self.started_settings
        if names_objects and self.state is State.STOPPED:
            same_role = self._server.caller() == self.role_oid
            return output_settings.with_schemas(
                self._server, self.session, self.dependence, written, same_role=same_role
            )
        return written

    @property
    def is_reusable(self) -> bool:
        """Whether the session can run another job: its connection lives, and no signal is on its way to it."""
        timed = self.configuration.worker_timeout_ms > 0 and self.state is State.ERROR
        is_idle = self.session.connection.transaction_status == _IDLE
        return self._usable and not self.signaled and not timed and is_idle

    def check_output_settings(self) -> None:
        """0A000 when a lone statement has changed settings on which its rows depend; once it has ended."""
        if self.state is State.STOPPED and self.dependence.settings and self._statements == 1:
            if self._clean_ups:
                ended = output_settings.reported(self.dependence, self.started_settings, self._reports)
            else:
                ended = output_settings.after_end(self._server, self.session, self.dependence)
            output_settings.refuse_changed(self.dependence, self.started_settings, ended)

    def on_ended(self, changes: Mapping[str, Any]) -> None:
        """The supervisor has seen the end of a submitted or detached job."""
        if changes["state"] != State.STOPPED.value and self.error is None:
            self.error = Report.from_row(changes, self.pid)
        self.changes = changes
        self._set_ended(State(changes["state"]))

    def _end_with(self, tag: str) -> None:
        ended_ns = time.monotonic_ns()
        rows = wire.row_count(tag)
        self.elapsed_ms = (ended_ns - self._started_ns) / 1e6
        self.state = State.STOPPED
        self.changes = {"state": State.STOPPED.value, "command_tag": tag, "row_count": rows}
        packet = messages.finished_packet(self.key, tag, rows, ended_ns)
        if self._announced_on != self._control.connections or not self._control.tell_at_once(packet, self.session):
            self._report_end(ended_ns)

    def _end(self) -> None:
        """The job is over: commit or rollback has happened. The supervisor need not find out by itself."""
        if self.ended:
            return
        if self.error is not None and self.error.sqlstate in _INTERRUPTED:
            self._control.hear()  # of a cancel that another session asked for
            self.error = self._explained(self.error)
        if self._reports and not self._clean_ups and not libpq_feed.has_heard(self.session.connection, self._reports):
            self._usable, self.unreadable = False, report_of_system_call(OSError(errno.EMFILE, ""))
        stopped = self.error is None
        if stopped and self.columns and self.unreadable is None:
            self._check_encoding()
        self._set_ended(State.STOPPED if stopped else State.CANCELED if self._was_canceled() else State.ERROR)
        self.changes = self._changes()
        self._report_end(time.monotonic_ns())

    def _report_end(self, ended_ns: int) -> None:
        finished = [messages.FINISHED, self.key, self.changes, ended_ns]
        self._control.report_end(finished, self._announced_on, self._ended_row)

    def _ended_row(self) -> dict[str, Any]:
        ended_at = self.launched_at + timedelta(milliseconds=self.elapsed_ms)
        row = {**self._announcement().row(), **self.changes}
        return {**row, "consumed": self.consumed, "finished_at": ended_at.isoformat()}

    def _set_ended(self, state: State) -> None:
        self.elapsed_ms = (time.monotonic_ns() - self._started_ns) / 1e6
        self.state = state

    def _changes(self) -> dict[str, Any]:
        """What the end changes in the job's row."""
        report = self.error
        if report is None:
            tag = self._server.decode(self._tags[-1]) if self._tags else ""
            return {"state": State.STOPPED.value, "command_tag": tag, "row_count": wire.row_count(tag)}
        return {"state": self.state.value, **report.in_row()}

    def _explained(self, report: Report) -> Report | None:
        """What stopped the job, of which the server knows no more than that somebody did; None: it had committed.

        A signal that arrives during the commit can become an error after it, where the server logs durations.
        """
        if self._tags_of_commit is not None and self._tags_seen >= self._tags_of_commit:
            return None
        if self.stop_message is not None:
            return replace(report, message=self.stop_message)
        now = time.monotonic()
        timed_out = (now * 1e9 - self._started_ns) / 1e6 >= self.configuration.worker_timeout_ms > 0
        if timed_out and not self.cancel_requested:
            return replace(report, sqlstate=QUERY_CANCELED, message=TIMED_OUT, hint=None, detail=None)
        if report.sqlstate == CONNECTION_FAILURE and self._terminate_at is not None and now >= self._terminate_at:
            return replace(report, sqlstate=ADMIN_SHUTDOWN, message=TERMINATED, hint=None, detail=None)
        return report

    def cancel(self, grace_ms: int | None) -> None:
        """Note that this session has the supervisor stop it, and terminate it after the grace."""
        self.on_canceling(None if grace_ms is None else time.monotonic() + grace_ms / 1000)

    def on_canceling(self, terminate_at: float | None) -> None:
        """The supervisor sends, or has sent, signals; the last one at that time.monotonic()."""
        self.cancel_requested = self.signaled = True
        if terminate_at is not None:
            self._terminate_at = terminate_at

    def _was_canceled(self) -> bool:
        """Whether our cancel ended it: 57014, or 57P01 after the grace."""
        ends = (QUERY_CANCELED, ADMIN_SHUTDOWN)
        return self.cancel_requested and self.error is not None and self.error.sqlstate in ends
