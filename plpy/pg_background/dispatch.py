"""Sends a job: to its worker session, and word of it to the supervisor; and lets go of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from . import libpq_feed, messages, output_settings
from .cleaning import CleanUp
from .control import Control
from .errors import BackgroundError
from .intake import Intake
from .job import Job, State, new_key
from .results import TypeStyles
from .server import Server
from .session import SURELY_WRITTEN_BYTES, WorkerSession
from .settings import Configuration

_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 32, 256
_TYPICAL_ROW_BYTES = 256


class Dispatch(Intake):
    """A job that is sent; what then becomes of it is the worker's part."""

    consumed = False
    announced = False  # the supervisor knows of it
    _announced_on = 0  # which connection to a supervisor that was
    detached = False
    signaled = False  # a cancel may still be on its way: the session is not reused
    cancel_requested = False
    started_settings: Mapping[str, str] = {}
    _terminate_at: float | None = None  # the end of a cancel's grace, of time.monotonic()
    _writing = False  # the job has been sent in part

    def __init__(
        self,
        server: Server,
        styles: TypeStyles,
        control: Control,
        session: WorkerSession,
        job: Job,
        configuration: Configuration,
        *,
        v1: bool,
    ) -> None:
        self._server = server
        self._styles = styles
        self._control = control
        self.session = session
        self.job = job
        self.configuration = configuration
        self.pid = session.pid
        self.key = new_key()
        self.cookie = 0 if v1 else self.key
        self.role_oid = session.role_oid
        self._tags = []
        self._launched_us = time.time_ns() // 1000
        self._started_ns = time.monotonic_ns()

    def start(self) -> None:
        """Send the job, and tell the supervisor."""
        job = self.job
        self._statements = job.statements
        if job.submitted:
            self._submit()
            return
        self.started_settings = self.configuration.output
        if job.packet is None or self._statements > 1:
            self._launch_through_libpq()
        else:
            self._launch_directly(job.packet)

    def _launch_directly(self, packet: bytes) -> None:
        """With its clean-up right behind it, where nothing is asked of the session in between."""
        self._direct = True
        job = self.job
        # Nothing will be asked of its session between its answer and the clean-up, as far as can be known.
        if (job.script.returns_no_rows or job.seen.plain) and self.configuration.pool_size:
            clean_up = self.session.cleaning.clean_up(self.configuration.pool_idle_timeout_ms)
            if len(packet) + len(clean_up.packet) <= SURELY_WRITTEN_BYTES:  # the rest would wait for the job's end
                self._clean_ups = clean_up.answers
                packet += clean_up.packet
        # First, so that no progress of this job can reach the supervisor before it knows of the job.
        self._announce()
        self.session.write(packet, self._tell_writing)

    def _announce(self) -> None:
        """As tell_supervisor, with fewer steps where nothing is out of the ordinary."""
        session, configuration, control = self.session, self.configuration, self._control
        packet = messages.job_packet(
            self.key,
            self.pid,
            self.cookie,
            self.role_oid,
            self.job.told,
            self._launched_us,
            session.process_start,
            configuration.history_ms,
            self._started_ns,
            self._tags_of_commit,
            self._clean_ups,
        )
        if not configuration.worker_timeout_ms and control.tell_at_once(packet, session):
            self.announced, self._announced_on = True, control.connections
        else:
            self.tell_supervisor()

    def _launch_through_libpq(self) -> None:
        """Several statements get one more, which tells the output settings that they end with."""
        connection = self.session.connection
        connection.notice_handler = self._take_notice
        encoded = self._server.encode(self.job.sql)
        self.tell_supervisor()
        try:
            if self.job.parameters is not None:
                connection.send_query_params(encoded, self.job.parameters)
            else:
                connection.send_query(encoded + b"\n;" + output_settings.PROBE if self._probes else encoded)
            connection.set_chunked_rows_mode(self._chunk_rows)
            self.session.flush(self._tell_writing)
        except Exception as error:
            report = self.session.loss(error)
            if report is None:
                raise
            raise BackgroundError(report) from error
        self._touched |= len(encoded) + sum(map(len, filter(None, self.job.parameters or ()))) > SURELY_WRITTEN_BYTES

    def note_plain(self) -> None:
        """The answer, which has been read to its end, would have been the same under all settings; not if it failed."""
        if self._direct and self.state is State.STOPPED and self.problem is None:
            self.job.seen.plain = not self.job.seen.surprising

    def _let_libpq_take_over(self, received: bytes) -> bool:
        connection = self.session.connection
        connection.notice_handler = self._take_notice

        def ask() -> None:
            if self.job.parameters is None:
                connection.send_query(b"")
            else:
                connection.send_query_params(b"", None)
            connection.set_chunked_rows_mode(self._chunk_rows)
            connection.flush()

        return libpq_feed.has_taken_over(connection, ask, received)

    @property
    def _chunk_rows(self) -> int:
        rows = self.job.queue_size // _TYPICAL_ROW_BYTES
        return max(_MIN_CHUNK_ROWS, min(_MAX_CHUNK_ROWS, rows))

    def _submit(self) -> None:
        """The supervisor reads from the first byte on: the job's answer, and that of the clean-up behind it."""
        clean_up = self.session.cleaning.clean_up(self.configuration.pool_idle_timeout_ms)
        self._clean_ups = clean_up.answers
        self._announce()
        self.session.write(self.job.encoded(self._server) + clean_up.packet, self._tell_writing)

    def _tell_writing(self, writing: bool) -> None:
        """Were this session to end now, the supervisor would have to do the same with half a job's worker."""
        self._writing, self._touched = writing, True  # libpq reads where it cannot write
        self._control.tell([messages.WRITING, self.pid, writing])

    def clean_up_behind(self) -> CleanUp | None:
        """What would make its session fit for another job, if that can be queued behind this one, or is there already.

        Nothing must have been read, so that the stream is at the start of this job's answer, or sent in part.
        """
        if self.ended or self.job.submitted or self._touched or self._writing or self.signaled:
            return None
        clean_up = self.session.cleaning.clean_up(self.configuration.pool_idle_timeout_ms)
        return clean_up if self._clean_ups or self.session.has_room_for(clean_up) else None

    def detach(self, clean_up: CleanUp | None) -> None:
        """Leave the rest to the supervisor, as a submitted job's; after this clean-up another job may follow."""
        self.detached = True
        if self.job.submitted:
            return
        queued = self._clean_ups
        if clean_up is not None:  # first, so that another supervisor that is told of the job by this knows of it
            self._clean_ups = clean_up.answers
        try:
            self._control.tell([messages.DETACH, self.pid, clean_up.answers if clean_up is not None else 0])
        except BaseException:  # a cancel
            self._clean_ups = queued
            self.abandon()
            raise
        if clean_up is not None and not queued:
            with suppress(BackgroundError):  # the backend has died: the supervisor sees that too
                self.session.queue_clean_up(clean_up, libpq_waits=not self._direct)

    def abandon(self) -> None:
        """As detach, where nothing may be waited for, and no query run."""
        self.detached = True
        self._control.leave_word([messages.DETACH, self.pid, 0])

    def begin_clean_up(self) -> None:
        """Have the session cleaned, now that the job has ended, where that is not under way. 08006, OSError."""
        if self._clean_ups:
            self.session.cleaning.expect(self._clean_ups, self._unread, self._reports)
        else:
            self.session.cleaning.send(self.configuration.pool_idle_timeout_ms)

    def tell_supervisor(self, *, again: bool = False) -> None:
        """Announce the job; the worker's socket goes with it if this supervisor has not got it yet.

        again: another supervisor had it before, and may have read some of the answer.
        """
        session = self.session
        extras: dict[str, Any] = {"probe": True} if self._probes else {}
        if self._clean_ups:
            extras["clean_ups"] = self._clean_ups
        if self.configuration.worker_timeout_ms:
            extras["timeout_ms"] = self.configuration.worker_timeout_ms
        if again:
            extras.update(
                again=True,
                consumed=self.consumed,
                writing=self._writing,
                canceled=self.cancel_requested,
                terminate_at=self._terminate_at,
                unknown_position=self.job.submitted or self.detached,
            )
        self._control.tell(
            [messages.JOB, self._announcement(), self._started_ns, self._tags_of_commit, extras], session
        )
        self.announced = True
        self._announced_on = self._control.connections

    def _announcement(self) -> messages.Announcement:
        return self.job.announced(self.key, self.cookie, self.session, self.configuration, self._launched_us)

    @property
    def _probes(self) -> bool:
        """Whether a statement of ours follows the job's, to tell the output settings that it ends with."""
        return self._statements > 1 and not self.job.submitted

    @property
    def _tags_of_commit(self) -> int | None:
        """With so many command tags the job has committed; None where its commit follows them."""
        return None if self.job.parameters is not None else self._statements + self._probes
