"""The sessions that jobs run in: kept ones, new ones, and one that is begun ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from . import messages, wire
from .control import Control
from .errors import TOO_MANY_CONNECTIONS, BackgroundError
from .inheritance import Inheritance
from .loopback import Loopback
from .pool import Pool
from .server import Server
from .session import WorkerSession
from .settings import Configuration

if TYPE_CHECKING:
    from .registry import Registry
    from .worker import Worker

# A launch that waits for a connection of the server has no event to wait for: others' sessions give it back.
_SLOT_RETRY_S = 0.05
_CLEAN_UP_S = 0.05
_LEFT_BY_SPARES = 10  # connections
_IN_A_ROW_S = 0.25  # a session that is started so soon after another is not the last one


class Sessions:
    """Finds or starts a session for a job, and takes it back."""

    def __init__(self, server: Server, control: Control, loopback: Callable[[], Loopback], registry: Registry) -> None:
        self._server = server
        self._control = control
        self._loopback = loopback
        self._registry = registry
        self._inheritance = Inheritance(server)
        self._pool = Pool()
        self._being_cleaned: dict[int, WorkerSession] = {}  # until the supervisor tells, by the key of the job before
        self._spare: WorkerSession | None = None  # begun ahead
        self._pool_size = 0  # at the latest launch
        self._new_at = 0.0  # of time.monotonic(): the latest new one

    # --- for a job ---

    def expect(self, configuration: Configuration) -> None:
        """A launch with this configuration has begun: so many sessions are kept from now on."""
        if configuration.pool_size < self._pool_size:
            for session in self._pool.drop_beyond(configuration.pool_size):
                self.end(session)
        self._pool_size = configuration.pool_size

    def ready(self, configuration: Configuration) -> WorkerSession | None:
        """As get, where a session needs nothing: it is clean, and has these settings.

        The one that was used last is still in the processor's caches, and those that are not needed come to their
        pool_idle_timeout. While it is being cleaned, the one that has been idle longest takes its place.
        """
        idle = self._pool.idle
        if not idle or configuration.pool_size != self._pool_size:
            return None
        if self._needs_nothing(idle[-1], configuration):
            return idle.pop()
        return idle.popleft() if len(idle) > 1 and self._needs_nothing(idle[0], configuration) else None

    def _needs_nothing(self, session: WorkerSession, configuration: Configuration) -> bool:
        return (
            session.role_oid == self._server.caller()
            and session.guc_state == configuration.guc_state
            and session.pid not in self._registry.workers
            and not session.is_superuser
            and session.cleaning.is_as_proven()
        )

    def get(self, configuration: Configuration, deadline: float) -> WorkerSession:
        """A session of the caller's role, with the caller's settings: a kept one, or a new one.

        53300 where the server has no connection left at the deadline (of time.monotonic()).
        """
        role_oid, guc_state = self._server.caller(), configuration.guc_state
        if configuration.pool_size:
            while True:
                session = self._kept(role_oid, configuration)
                if session is None:
                    break
                if self._is_ready(session):
                    return self._renew(session, guc_state)
        return self._new(role_oid, guc_state, deadline, configuration)

    def prove(self, configuration: Configuration) -> list[str]:
        """Start one of the caller's, as a launch would, and end it: its current and its session user."""
        session = self._new(self._server.caller(), configuration.guc_state, time.monotonic())
        self.end(session)
        return session.users[:2]

    def can_serve(self, session: WorkerSession, configuration: Configuration) -> bool:
        """Whether a session is the caller's, and can take these settings on."""
        if session.role_oid != self._server.caller() or not session.is_still_its_role:
            return False
        state = configuration.guc_state
        return session.guc_state == state or self._inheritance.fits(state, session.inherited)

    def adopt_settings(self, session: WorkerSession, configuration: Configuration) -> bytes:
        """Note that the session has these settings when the returned query has been run."""
        session.guc_state = configuration.guc_state
        return session.adopt(self._inheritance.again(configuration.guc_state, session.inherited))

    # --- kept ones ---

    def has_room(self) -> bool:
        """Whether one more can be kept, beside those that will be when the supervisor has read what they say."""
        return self._kept_count() < self._pool_size

    def _kept_count(self) -> int:
        return len(self._pool.idle) + len(self._registry.elsewhere) + len(self._being_cleaned)

    def _count(self) -> int:
        """How many there are that the pool might come to keep: also those that are read here, and one begun ahead."""
        read_here = sum(not worker.job.submitted for worker in self._registry.workers.values())
        return read_here + self._kept_count() + (self._spare is not None)

    def _kept(self, role_oid: int, configuration: Configuration) -> WorkerSession | None:
        """A kept session whose pid no tracked worker has; if need be, an ended submitted worker is let go for it."""
        guc_state = configuration.guc_state
        session = self._pool.take(role_oid, guc_state, self._inheritance, self._registry.workers)
        if session is None and self._pool.idle and self._count() >= configuration.pool_size:
            session = self._pool.take(role_oid, guc_state, self._inheritance, ())
            if session is not None:
                self._registry.forget_ended(session.pid)
        if session is None and self._wait_for_clean_up(role_oid):
            return self._kept(role_oid, configuration)
        return session

    def _wait_for_clean_up(self, role_oid: int) -> bool:
        """Whether another session has been cleaned meanwhile: that takes less time than to start a new one."""
        if not any(session.role_oid == role_oid for session in self._being_cleaned.values()):
            return False
        before, deadline = len(self._pool.idle), time.monotonic() + _CLEAN_UP_S
        while len(self._pool.idle) <= before:
            descriptor = self._control.descriptor
            if descriptor is None or not self._server.wait_for_one(descriptor, deadline):
                return False
            self._control.hear()
        return True

    def _is_ready(self, session: WorkerSession) -> bool:
        """Whether a kept session was cleaned well; otherwise it has been ended."""
        ready = False
        try:
            ready = session.is_still_its_role and session.cleaning.finish()
        finally:
            if not ready:
                self.end(session)
        return ready

    def _renew(self, session: WorkerSession, guc_state: bytes) -> WorkerSession:
        if session.guc_state != guc_state:
            try:
                session.inherit(self._inheritance.again(guc_state, session.inherited))
                session.guc_state = guc_state
            except BaseException:
                self.end(session)
                raise
        return session

    # --- new ones ---

    def _new(
        self, role_oid: int, guc_state: bytes, deadline: float, configuration: Configuration | None = None
    ) -> WorkerSession:
        """A session that no job has used. configuration: under which sessions may be begun ahead."""
        if time.monotonic() - self._new_at > _IN_A_ROW_S:
            configuration = None
        while True:
            spare = self._take_spare(role_oid, guc_state)
            try:
                session = self._finished(spare or self._begun(role_oid, guc_state), configuration)
            except BackgroundError as error:
                if spare is not None:  # its role has changed, say, or it was idle for too long
                    configuration = None
                elif not self.wait_for_connection(error, deadline):
                    raise
            else:
                self._new_at = time.monotonic()
                if self._may_have_pid(session):
                    return session
                session.close()

    def _finished(self, session: WorkerSession, configuration: Configuration | None) -> WorkerSession:
        try:
            self._begin_spare(session, configuration)
            session.finish(self._inheritance.hidden_settings)
        except BaseException:
            session.close()
            raise
        return session

    def wait_for_connection(self, error: BackgroundError, deadline: float) -> bool:
        """A while, where the error was that the server has no connection left; False for others, and at the deadline.

        What this session keeps is given up. The supervisor that it has had started is kept, by connecting to it.
        """
        if error.report.sqlstate != TOO_MANY_CONNECTIONS:
            return False
        self.drop_idle()
        if time.monotonic() >= deadline:
            return False
        self._control.settle_start()
        self._server.wait_for((), min(deadline, time.monotonic() + _SLOT_RETRY_S))
        return True

    def _begun(self, role_oid: int, guc_state: bytes, idle_timeout_ms: int | None = None) -> WorkerSession:
        return WorkerSession.start(
            self._server, self._loopback(), self._inheritance, role_oid, guc_state, idle_timeout_ms
        )

    def _begin_spare(self, session: WorkerSession, configuration: Configuration | None) -> None:
        """Where one session is started after another, begin the next while Python starts in this one.

        It takes a place in the pool, and is none of it before finish() has proved whose it is.
        """
        if configuration is None or not session.is_switched or not self._may_begin_spare(configuration):
            return
        with suppress(BackgroundError, OSError):  # one that is wanted says why
            self._spare = self._begun(session.role_oid, session.guc_state, configuration.pool_idle_timeout_ms)

    def _may_begin_spare(self, configuration: Configuration) -> bool:
        """Whether another session, beside the one that is being started, can be of use and harms nobody."""
        is_useful = (
            self._count() + 2 <= configuration.pool_size
            and len(self._registry.workers) + 2 <= configuration.max_workers
        )
        return (
            is_useful
            and self._server.has_free_slots(_LEFT_BY_SPARES)
            and not self._server.query(
                "SELECT FROM pg_catalog.pg_roles r, pg_catalog.pg_database d"
                " WHERE r.oid OPERATOR(pg_catalog.=) $1"
                " AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
                " AND (r.rolconnlimit OPERATOR(pg_catalog.>=) 0 OR d.datconnlimit OPERATOR(pg_catalog.>=) 0)",
                ["pg_catalog.oid"],
                [self._server.caller()],
            )
        )

    def _take_spare(self, role_oid: int, guc_state: bytes) -> WorkerSession | None:
        """The session that was begun ahead, if it is for this role and these settings; any other is ended."""
        spare, self._spare = self._spare, None
        if spare is not None and (spare.role_oid, spare.guc_state) != (role_oid, guc_state):
            self.end(spare)
            return None
        return spare

    def _may_have_pid(self, session: WorkerSession) -> bool:
        """Whether a new session can run a worker: the operating system uses pids again.

        False where that is the pid of a worker whose backend has died, and whose error nobody has read.
        """
        worker = self._registry.workers.get(session.pid)
        if worker is not None and not worker.job.submitted:
            return False
        self._registry.forget_ended(session.pid)
        return True

    # --- after a job ---

    def take_back(self, worker: Worker) -> None:
        """Clean a session whose job was read to its end, and keep it, or end it."""
        session = worker.session
        if not worker.is_reusable or not self._has_room_for(session):
            self.end(session)
            return
        try:
            worker.begin_clean_up()
        except (OSError, BackgroundError):
            # Its backend has died since the job's end, which is nothing to the job.
            self.end(session)
        except BaseException:  # a cancel
            self.end(session)
            raise
        else:
            self._keep(session)

    def _keep(self, session: WorkerSession) -> None:
        """For the next job; one that has ended itself meanwhile is closed."""
        self._pool.put(session)
        ended = self._pool.drop_ended()
        if ended is not None:
            self.end(ended)

    def await_clean_up(self, key: int, session: WorkerSession) -> None:
        """The supervisor has seen the end of this job, and will tell of the clean-up that follows it."""
        self._being_cleaned[key] = session

    def on_cleaned(self, key: int, answer: Sequence[str | None], reports: wire.Reports) -> None:
        """What the supervisor has read behind a job's end; reports: what has become of settings."""
        session = self._being_cleaned.pop(key, None)
        if session is not None:
            self.put_back(session, reports, clean=session.cleaning.is_clean(answer))

    def put_back(self, session: WorkerSession, reports: wire.Reports, *, clean: bool) -> None:
        """Keep a session for the next job, or end it."""
        if clean and self._has_room_for(session) and session.resynchronize(reports):
            self._keep(session)
        else:
            self.end(session)

    def _has_room_for(self, session: WorkerSession) -> bool:
        """Whether the pool can keep one more session; one of another role makes room."""
        if self._pool.has_room(self._pool_size):
            return True
        other = self._pool.take_of_another_role(session.role_oid) if self._pool_size else None
        if other is not None:
            self.end(other)
        return self._pool.has_room(self._pool_size)

    # --- ends ---

    def end(self, session: WorkerSession) -> None:
        """End a session; the supervisor has no part in it any more."""
        session.close()
        if session.known_to_supervisor:
            self._control.leave_word([messages.CLOSED, session.pid])

    def end_idle(self, pid: int) -> None:
        """A signal may be on its way to this process: where it is kept, it must not meet the next job."""
        session = self._pool.remove(pid)
        if session is not None:
            self.end(session)

    def drop_idle(self) -> None:
        """End all that wait for a job."""
        for session in self._pool.drop_beyond(0):
            self.end(session)
        spare, self._spare = self._spare, None
        if spare is not None:
            self.end(spare)

    def forget_supervisor(self) -> None:
        """Another one begins: it knows none of these, and what its predecessor was reading was read by nobody."""
        for session in self._pool.idle:
            session.known_to_supervisor = 0
        for session in self._being_cleaned.values():
            session.close()
        self._being_cleaned.clear()
