"""The workers that this session tracks: the truth about them, whatever becomes of its transactions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from . import messages
from .control import Control
from .errors import (
    CONFIGURATION_LIMIT_EXCEEDED,
    INSUFFICIENT_PRIVILEGE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    TOO_MANY_CONNECTIONS,
    UNDEFINED_OBJECT,
    BackgroundError,
    background_error,
)
from .inheritance import Inheritance
from .loopback import Loopback
from .pool import Pool
from .results import TypeNames, TypeStyles
from .server import Server
from .session import WorkerSession
from .settings import Configuration
from .worker import Job, State, Worker

if TYPE_CHECKING:
    from .bootstrap import Module
    from .on_commit import OnCommit

_REMEMBERED, _REMEMBERED_HANDLES = 200, 10_000
_KEPT_SQL_CHARACTERS = 50_000
# A launch that waits for a connection of the server has no event to wait for: others' sessions give it back.
_SLOT_RETRY_S = 0.05
_CLEAN_UP_S = 0.05
_WAITS_FOR_ANOTHER = 50
_LEFT_BY_SPARES = 10  # connections
_IN_A_ROW_S = 0.25  # a session that is started so soon after another is not the last one


class Released(NamedTuple):
    """What this session still knows of a worker that it has let go, and the supervisor does not."""

    pid: int
    cookie: int
    consumed: bool
    sql: str | None  # None: too long to be kept


class Registry:
    """Starts workers, finds them by handle, and lets them go."""

    def __init__(self, server: Server, digest: str, read_module: Callable[[str], Module]) -> None:
        self.server = server
        self.type_names = TypeNames(server)
        self._styles = TypeStyles(server)
        self._inheritance = Inheritance(server)
        self._loopback: Loopback | None = None
        self.control = Control(server, self._loopback_of_session, digest, read_module)
        self.control.listener = self
        self._pool = Pool(server)
        self._configuration: Configuration | None = None  # of the latest launch
        self._waits_for_clean_up = 0
        self._spare: WorkerSession | None = None  # begun ahead
        self._new_session_at = 0.0  # of time.monotonic(): the latest
        self._workers: dict[int, Worker] = {}  # tracked, by pid
        self._elsewhere: dict[int, Worker] = {}  # read by the supervisor, by key, until it tells their end
        self._cleaned_elsewhere: dict[int, WorkerSession] = {}  # the same, until it tells that they are clean
        self.released: deque[Released] = deque(maxlen=_REMEMBERED)
        self._let_go_unasked: dict[tuple[int, int], int] = {}  # roles of submitted workers, by handle
        self.on_commit: OnCommit | None = None  # once there were jobs that wait for a commit
        self.counts = dict.fromkeys(State, 0)
        self.launched = 0
        self._elapsed_ms = 0.0

    # --- starting ---

    def launch(self, job: Job, configuration: Configuration, *, v1: bool = False) -> Worker:
        """Start a worker as the caller; it is tracked once its SQL has been sent.

        53400 at max_workers, 53300 where the server has no connection left, each after launch_timeout.
        """
        self._configuration = configuration
        deadline = time.monotonic() + configuration.launch_timeout_ms / 1000
        if self._elsewhere or self._cleaned_elsewhere:
            self.control.hear()
        if len(self._workers) >= configuration.max_workers:
            self._wait_for_room(configuration.max_workers, deadline)
        self.control.prepare()  # it starts while the worker's session does
        try:
            session = self._session(configuration, deadline)
        except BaseException:
            self.control.leave_start()
            raise
        worker = Worker(self.server, self._styles, self.control, session, job, configuration, v1=v1)
        try:
            if job.submitted:
                self._elsewhere[worker.key] = worker
            worker.start()
        except BaseException:
            self._elsewhere.pop(worker.key, None)
            self._end_session(session)
            raise
        self._workers[worker.pid] = worker
        self.launched += 1
        return worker

    def _wait_for_room(self, max_workers: int, deadline: float) -> None:
        """Let ended submitted workers go when their room is needed; then wait until one more has ended."""
        while len(self._workers) >= max_workers:
            done = self._ended_submitted()
            if done is not None:
                self.release(done, unasked=True)
            elif not self._wait_for_an_end(deadline):
                raise background_error(
                    CONFIGURATION_LIMIT_EXCEEDED,
                    f"this session tracks {len(self._workers)} background workers already",
                    detail=f"pg_background.max_workers is {max_workers}.",
                    hint="Read the results of finished workers, detach some, raise pg_background.max_workers,"
                    " or set pg_background.launch_timeout to wait.",
                )

    def _wait_for_an_end(self, deadline: float) -> bool:
        """Wait until a submitted worker has ended; False at the deadline, or if there is none."""
        while any(worker.job.submitted for worker in self._workers.values()):
            self.control.hear_or_replace()
            if self._ended_submitted() is not None:
                return True
            descriptor = self.control.descriptor
            assert descriptor is not None
            if not self.server.wait_for_one(descriptor, deadline):
                break
        return False

    def _ended_submitted(self) -> Worker | None:
        """A submitted worker that has ended, as far as was heard."""
        return next((worker for worker in self._workers.values() if worker.job.submitted and worker.ended), None)

    def _session(self, configuration: Configuration, deadline: float) -> WorkerSession:
        """A session of the caller's role, with the caller's settings: a kept one, or a new one."""
        role_oid, guc_state = self.server.caller(), configuration.guc_state
        if configuration.pool_size:
            while True:
                session = self._kept_session(role_oid, configuration)
                if session is None or self._wants_another(session, configuration):
                    break
                if self._is_ready(session):
                    return self._renew(session, guc_state)
        return self._new_session(role_oid, guc_state, deadline, configuration)

    def _wants_another(self, session: WorkerSession, configuration: Configuration) -> bool:
        """Whether to start a second session for jobs in turn: while one is cleaned, the other runs.

        True for a session that keeps its launcher waiting for its clean-up, once in so many times; it goes back.
        """
        if configuration.pool_size <= len(self._pool.idle) + 1 or session.is_clean_up_done:
            return False
        self._waits_for_clean_up += 1
        if self._waits_for_clean_up % _WAITS_FOR_ANOTHER:
            return False
        self._pool.put(session)
        return True

    def _is_ready(self, session: WorkerSession) -> bool:
        """Whether a kept session was cleaned well; otherwise it has been ended."""
        ready = False
        try:
            ready = session.is_still_its_role and session.finish_clean_up()
        finally:
            if not ready:
                self._end_session(session)
        return ready

    def _kept_session(self, role_oid: int, configuration: Configuration) -> WorkerSession | None:
        """A kept session whose pid no tracked worker has; if need be, an ended submitted worker is let go for it."""
        guc_state = configuration.guc_state
        session = self._pool.take(role_oid, guc_state, self._inheritance, self._workers)
        if session is None and self._pool.idle and self._session_count() >= configuration.pool_size:
            session = self._pool.take(role_oid, guc_state, self._inheritance, ())
            if session is not None:
                self._forget_ended_with_pid(session.pid)
        if session is None and self._wait_for_clean_up(role_oid):
            return self._kept_session(role_oid, configuration)
        return session

    def _wait_for_clean_up(self, role_oid: int) -> bool:
        """Whether another session has been cleaned meanwhile: that takes less time than to start a new one."""
        if not any(session.role_oid == role_oid for session in self._cleaned_elsewhere.values()):
            return False
        before, deadline = len(self._pool.idle), time.monotonic() + _CLEAN_UP_S
        while len(self._pool.idle) <= before:
            descriptor = self.control.descriptor
            if descriptor is None or not self.server.wait_for_one(descriptor, deadline):
                return False
            self.control.hear()
        return True

    def _kept_count(self) -> int:
        """How many sessions are kept, or will be when the supervisor has read what they say."""
        return len(self._pool.idle) + len(self._elsewhere) + len(self._cleaned_elsewhere)

    def _session_count(self) -> int:
        """How many there are that the pool might come to keep: also those that are read here, and one begun ahead."""
        read_here = sum(not worker.job.submitted for worker in self._workers.values())
        return read_here + self._kept_count() + (self._spare is not None)

    def _renew(self, session: WorkerSession, guc_state: bytes) -> WorkerSession:
        if session.guc_state != guc_state:
            try:
                session.inherit(self._inheritance.again(guc_state, session.inherited))
                session.guc_state = guc_state
            except BaseException:
                self._end_session(session)
                raise
        return session

    def session_apart(self, configuration: Configuration) -> WorkerSession:
        """A session for jobs that are not tracked, which takes a place of max_workers all the same."""
        self._configuration = configuration
        deadline = time.monotonic() + configuration.launch_timeout_ms / 1000
        room = configuration.max_workers - (len(self.on_commit) if self.on_commit is not None else 0)
        if len(self._workers) >= room:
            self._wait_for_room(room, deadline)
        return self._session(configuration, deadline)

    def can_serve(self, session: WorkerSession, configuration: Configuration) -> bool:
        """Whether a session is the caller's, and can take these settings on."""
        if session.role_oid != self.server.caller() or not session.is_still_its_role:
            return False
        state = configuration.guc_state
        return session.guc_state == state or self._inheritance.fits(state, session.inherited)

    def adopt_settings(self, session: WorkerSession, configuration: Configuration) -> bytes:
        """Note that the session has these settings when the returned query has been run."""
        session.guc_state = configuration.guc_state
        return session.adopt(self._inheritance.again(configuration.guc_state, session.inherited))

    def prove_session(self, configuration: Configuration) -> list[str]:
        """Start a worker session of the caller's, as a launch would, and end it: its current and its session user."""
        session = self._new_session(self.server.caller(), configuration.guc_state, time.monotonic())
        self._end_session(session)
        return session.users[:2]

    def _new_session(
        self, role_oid: int, guc_state: bytes, deadline: float, configuration: Configuration | None = None
    ) -> WorkerSession:
        """A session that no job has used. configuration: under which sessions may be begun ahead."""
        if time.monotonic() - self._new_session_at > _IN_A_ROW_S:
            configuration = None
        while True:
            spare = self._take_spare(role_oid, guc_state)
            try:
                session = spare or self._begun(role_oid, guc_state)
                try:
                    self._begin_spare(session, configuration)
                    session.finish(self._inheritance.hidden_settings)
                except BaseException:
                    session.close()
                    raise
            except BackgroundError as error:
                if spare is not None:  # its role has changed, say, or it was idle for too long
                    configuration = None
                    continue
                if error.report.sqlstate != TOO_MANY_CONNECTIONS:
                    raise
                self._drop_idle_sessions()
                if time.monotonic() >= deadline:
                    raise
                self.server.wait_for((), min(deadline, time.monotonic() + _SLOT_RETRY_S))
            else:
                self._new_session_at = time.monotonic()
                if self._may_have_pid(session):
                    return session
                session.close()

    def _begun(self, role_oid: int, guc_state: bytes, idle_timeout_ms: int | None = None) -> WorkerSession:
        loopback = self._loopback_of_session()
        return WorkerSession.start(self.server, loopback, self._inheritance, role_oid, guc_state, idle_timeout_ms)

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
            self._session_count() + 2 <= configuration.pool_size and len(self._workers) + 2 <= configuration.max_workers
        )
        return (
            is_useful
            and self.server.has_free_slots(_LEFT_BY_SPARES)
            and not self.server.query(
                "SELECT FROM pg_catalog.pg_roles r, pg_catalog.pg_database d"
                " WHERE r.oid OPERATOR(pg_catalog.=) $1"
                " AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
                " AND (r.rolconnlimit OPERATOR(pg_catalog.>=) 0 OR d.datconnlimit OPERATOR(pg_catalog.>=) 0)",
                ["pg_catalog.oid"],
                [self.server.caller()],
            )
        )

    def _take_spare(self, role_oid: int, guc_state: bytes) -> WorkerSession | None:
        """The session that was begun ahead, if it is for this role and these settings; any other is ended."""
        spare, self._spare = self._spare, None
        if spare is not None and (spare.role_oid, spare.guc_state) != (role_oid, guc_state):
            self._end_session(spare)
            return None
        return spare

    def _drop_idle_sessions(self) -> None:
        for session in self._pool.drop_all():
            self._end_session(session)
        spare, self._spare = self._spare, None
        if spare is not None:
            self._end_session(spare)

    def _forget_ended_with_pid(self, pid: int) -> None:
        """A session that has the pid of an ended submitted worker is to run another job."""
        worker = self._workers.get(pid)
        if worker is not None:
            self.release(worker, unasked=True)

    def _may_have_pid(self, session: WorkerSession) -> bool:
        """Whether a new session can run a worker: the operating system uses pids again.

        False where that is the pid of a worker whose backend has died, and whose error nobody has read.
        """
        worker = self._workers.get(session.pid)
        if worker is not None and not worker.job.submitted:
            return False
        self._forget_ended_with_pid(session.pid)
        return True

    def _loopback_of_session(self) -> Loopback:
        if self._loopback is None:
            self._loopback = Loopback(self.server)
        return self._loopback

    # --- finding ---

    def all(self) -> Iterator[Worker]:
        """The tracked workers, oldest first, each with its state brought up to date."""
        self.control.hear()
        for worker in list(self._workers.values()):
            self.refresh(worker)
            yield worker

    def refresh(self, worker: Worker) -> None:
        """Bring a worker's state up to date, and count its end."""
        worker.look()
        self.count_end(worker)

    def tracked(self, pid: int) -> Worker | None:
        """The tracked worker with this pid."""
        return self._workers.get(pid)

    def find(self, pid: int, cookie: int | None) -> Worker:
        """The tracked worker with this handle; cookie None: by pid alone.

        42704: not tracked. 55000: tracked, but with another cookie. 42501: of a role the caller is no member of.
        """
        worker = self._workers.get(pid)
        if worker is None:
            raise not_tracked(pid)
        if cookie is not None and cookie != worker.cookie:
            raise background_error(
                OBJECT_NOT_IN_PREREQUISITE_STATE,
                f"cookie {cookie} does not match that of the background worker with PID {pid}",
                hint="The handle is of an earlier worker, whose pid this one has now.",
            )
        if self.server.caller() != worker.role_oid:
            self.require_membership(worker.role_oid, pid)
        return worker

    def find_for_result(self, pid: int, cookie: int | None) -> Worker:
        """As find, but another cookie is 42704 too: those results are gone."""
        try:
            return self.find(pid, cookie)
        except BackgroundError as error:
            if error.report.sqlstate != OBJECT_NOT_IN_PREREQUISITE_STATE:
                raise
            raise not_tracked(pid) from error

    def require_membership(self, role_oid: int, pid: int) -> None:
        """42501 unless the caller is a member of the role."""
        if not self.may_manage(role_oid):
            raise background_error(
                INSUFFICIENT_PRIVILEGE,
                f"permission denied for the background worker with PID {pid}",
                hint="Only members of the role that launched it may manage it.",
            )

    def may_manage(self, role_oid: int) -> bool:
        """Whether the caller is that role, or a member of it."""
        if self.server.caller() == role_oid:
            return True
        return bool(
            self.server.query(
                "SELECT pg_catalog.pg_has_role(CURRENT_USER, $1, 'MEMBER') AS member", ["pg_catalog.oid"], [role_oid]
            )[0]["member"]
        )

    # --- letting go ---

    def detach(self, pid: int, cookie: int | None) -> None:
        """Stop tracking a worker; one that was let go unasked meanwhile is no stranger. 42704, 55000, 42501."""
        role_oid = self._let_go_unasked.get((pid, cookie or 0))
        if role_oid is None:
            self.release(self.find(pid, cookie))
        else:
            self.require_membership(role_oid, pid)
            del self._let_go_unasked[pid, cookie or 0]

    def release(self, worker: Worker, *, unasked: bool = False) -> None:
        """Stop tracking a worker. If it still runs, it goes on to its end, which the supervisor sees."""
        has_room = not worker.ended and self._kept_count() < worker.configuration.pool_size
        clean_up = worker.clean_up_behind() if has_room else b""
        self.count_end(worker)
        self._workers.pop(worker.pid, None)
        sql = worker.job.sql if len(worker.job.sql) <= _KEPT_SQL_CHARACTERS else None
        if unasked:
            self._let_go_unasked[worker.pid, worker.cookie] = worker.role_oid
            while len(self._let_go_unasked) > _REMEMBERED_HANDLES:
                del self._let_go_unasked[next(iter(self._let_go_unasked))]
        self.released.append(Released(worker.pid, worker.cookie, worker.consumed, sql))
        worker.backlog.clear()
        if not worker.ended:
            self._elsewhere[worker.key] = worker
            worker.detach(clean_up)
        elif not worker.job.submitted:
            self._keep_or_end(worker)

    def _keep_or_end(self, worker: Worker) -> None:
        """Give a session back whose job was read to its end."""
        session = worker.session
        if worker.is_reusable and self._has_room_for(session, worker.configuration.pool_size):
            try:
                session.send_clean_up(worker.configuration.pool_idle_timeout_ms)
            except (OSError, BackgroundError):
                # Its backend has died since the job's end, which is nothing to the job.
                self._end_session(session)
            except BaseException:  # a cancel
                self._end_session(session)
                raise
            else:
                self._pool.put(session)
        else:
            self._end_session(session)

    def _end_session(self, session: WorkerSession) -> None:
        session.close()
        if session.known_to_supervisor:
            self.control.tell_if_connected([messages.CLOSED, session.pid])

    def retire(self) -> None:
        """Let all workers go on to their ends; another runtime takes over."""
        if self.on_commit is not None:
            self.on_commit.leave_behind()
        for worker in list(self._workers.values()):
            self.release(worker)
        self._drop_idle_sessions()
        self.control.close()

    # --- news from the supervisor ---

    def on_ended(self, pid: int, key: int, changes: dict[str, Any] | None, clean_up: list[str] | None) -> None:
        """A job that the supervisor reads has ended, or its session was cleaned for reuse."""
        if self.on_commit is not None and self.on_commit.take(pid, key, changes, clean_up):
            return
        worker = self._elsewhere.pop(key, None)
        if worker is not None and changes is not None:
            worker.on_ended(changes)
            self.count_end(worker)
            self._cleaned_elsewhere[key] = worker.session
            if worker.signaled:
                clean_up = []
        if clean_up is None:
            return
        session = self._cleaned_elsewhere.pop(key, None)
        if session is None:
            return
        self.put_back(session, clean=session.is_clean(clean_up))

    def put_back(self, session: WorkerSession, *, clean: bool) -> None:
        """Keep a session for the next job, or end it."""
        size = 0 if self._configuration is None else self._configuration.pool_size
        if clean and self._has_room_for(session, size) and session.resynchronize():
            self._pool.put(session)
        else:
            self._end_session(session)

    def _has_room_for(self, session: WorkerSession, size: int) -> bool:
        """Whether the pool can keep one more session; one of another role makes room."""
        if self._pool.has_room(size):
            return True
        other = self._pool.take_of_another_role(session.role_oid) if size else None
        if other is not None:
            self._end_session(other)
        return self._pool.has_room(size)

    def on_canceling(self, pid: int, key: int, terminate_at: float | None) -> None:
        """Another session has asked a worker to stop. If it has ended, the signal must not meet the next job."""
        for worker in (self._workers.get(pid), self._elsewhere.get(key)):
            if worker is not None and worker.key == key:
                worker.on_canceling(terminate_at)
        session = self._pool.remove(pid)
        if session is not None:
            self._end_session(session)

    def hand_over_again(self) -> None:
        """Tell a new supervisor of every running job, with its socket."""
        if self.on_commit is not None:
            self.on_commit.leave_behind()
        sessions = [worker.session for worker in [*self._workers.values(), *self._elsewhere.values()]]
        for session in [*sessions, *self._pool.idle]:
            session.known_to_supervisor = 0
        for session in self._cleaned_elsewhere.values():
            session.close()  # its clean-up was read by nobody
        self._cleaned_elsewhere.clear()
        running = [*self._elsewhere.values(), *(w for w in self._workers.values() if not w.read_elsewhere)]
        for worker in running:
            if worker.announced and not worker.ended:
                worker.tell_supervisor(again=True)

    # --- counting ---

    def count_end(self, worker: Worker) -> None:
        """Count an ended worker, once."""
        if worker.ended and not worker.counted:
            worker.counted = True
            self.counts[worker.state] += 1
            self._elapsed_ms += worker.elapsed_ms

    def average_ms(self) -> float:
        """Mean time that the ended workers ran, in milliseconds; 0 when there are none."""
        ended = sum(self.counts.values())
        return self._elapsed_ms / ended if ended else 0.0


def not_tracked(pid: int) -> BackgroundError:
    """42704: no such worker in this session."""
    return background_error(
        UNDEFINED_OBJECT,
        f"this session tracks no background worker with PID {pid}",
        hint="Its result was read, it was detached, or another session launched it. See pg_background_list_v2().",
    )
