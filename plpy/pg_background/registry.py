"""The workers that this session tracks: the truth about them, whatever becomes of its transactions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from . import messages
from .control import Control
from .errors import (
    CONFIGURATION_LIMIT_EXCEEDED,
    INSUFFICIENT_PRIVILEGE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    UNDEFINED_OBJECT,
    BackgroundError,
    background_error,
)
from .job import Job, State
from .loopback import Loopback
from .results import TypeNames, TypeStyles
from .server import Server
from .session import WorkerSession
from .sessions import Sessions
from .settings import Configuration
from .starter import Starter
from .worker import Worker

if TYPE_CHECKING:
    from .bootstrap import Module
    from .on_commit import OnCommit

_REMEMBERED, _REMEMBERED_HANDLES = 200, 10_000
_KEPT_SQL_CHARACTERS = 50_000


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
        loopback = cache(lambda: Loopback(server))
        self.control = Control(server, Starter(server, loopback, digest, read_module))
        self.control.listener = self
        self.sessions = Sessions(server, self.control, loopback, self)
        self.workers: dict[int, Worker] = {}  # tracked, by pid
        self.elsewhere: dict[int, Worker] = {}  # read by the supervisor, by key, until it tells their end
        self.released: deque[Released] = deque(maxlen=_REMEMBERED)
        self._let_go_unasked: dict[tuple[int, int], int] = {}  # roles of submitted workers, by handle
        self.on_commit: OnCommit | None = None  # once there were jobs that wait for a commit
        self._start_counting()

    def _start_counting(self) -> None:
        self.counts = dict.fromkeys(State, 0)
        self.launched = 0
        self._elapsed_ms = 0.0

    # --- starting ---

    def launch(self, job: Job, configuration: Configuration, *, v1: bool = False) -> Worker:
        """Start a worker as the caller; it is tracked once its SQL has been sent.

        53400 at max_workers, 53300 where the server has no connection left, each after launch_timeout.
        """
        session: WorkerSession | None = None
        if self.on_commit is None and len(self.workers) < configuration.max_workers and self.control.is_quiet:
            session = self.sessions.ready(configuration)  # most launches need no more
        if session is None:
            session = self.session(configuration, configuration.launch_deadline())
        worker = Worker(self.server, self._styles, self.control, session, job, configuration, v1=v1)
        try:
            if job.submitted:
                self.elsewhere[worker.key] = worker
            worker.start()
        except BaseException:
            self.elsewhere.pop(worker.key, None)
            self.sessions.end(session)
            raise
        self.workers[worker.pid] = worker
        self.launched += 1
        return worker

    def session(self, configuration: Configuration, deadline: float) -> WorkerSession:
        """A session for jobs, which take a place of max_workers; a supervisor serves it. Errors as of launch."""
        self.sessions.expect(configuration)
        self.control.hear()
        self._make_room(configuration, deadline)
        self.when_connected(self.control.prepare, deadline)  # it starts while the worker's session does
        try:
            session = self.sessions.get(configuration, deadline)
        except BaseException:
            self.control.leave_start()
            raise
        try:
            self.when_connected(self.control.ensure, deadline)
        except BaseException:
            self.sessions.end(session)
            raise
        return session

    def when_connected(self, connect: Callable[[], None], deadline: float) -> None:
        """Connect to a supervisor; one that has to be started waits until the server has a connection left for it."""
        while True:
            try:
                return connect()
            except BackgroundError as error:
                if not self.sessions.wait_for_connection(error, deadline):
                    raise

    def _make_room(self, configuration: Configuration, deadline: float) -> None:
        """Let ended submitted workers go when their room is needed; then wait until one more has ended.

        Each session whose jobs wait for a commit takes a place as well.
        """
        while len(self.workers) + self._after_commit_count() >= configuration.max_workers:
            done = self._ended_submitted()
            if done is not None:
                self.release(done, unasked=True)
            elif not self._wait_for_an_end(deadline):
                hint = "Read the results of finished workers, detach some, or raise pg_background.max_workers."
                if any(worker.job.submitted for worker in self.workers.values()):
                    hint += " With pg_background.launch_timeout, a launch waits until a submitted one has ended."
                raise background_error(
                    CONFIGURATION_LIMIT_EXCEEDED,
                    f"this session tracks {len(self.workers) + self._after_commit_count()} background workers already",
                    detail=f"pg_background.max_workers is {configuration.max_workers}.",
                    hint=hint,
                )

    def _wait_for_an_end(self, deadline: float) -> bool:
        """Wait until a submitted worker or a job after a commit has ended; False at the deadline, or if none can."""
        after_commit = self._after_commit_count()
        while after_commit or any(worker.job.submitted for worker in self.workers.values()):
            self.when_connected(self.control.hear_or_replace, deadline)
            if self._ended_submitted() is not None or self._after_commit_count() < after_commit:
                return True
            descriptor = self.control.descriptor
            assert descriptor is not None
            if not self.server.wait_for_one(descriptor, deadline):
                break
        return False

    def _after_commit_count(self) -> int:
        return len(self.on_commit) if self.on_commit is not None else 0

    def _ended_submitted(self) -> Worker | None:
        """A submitted worker that has ended, as far as was heard."""
        return next((worker for worker in self.workers.values() if worker.job.submitted and worker.ended), None)

    def forget_ended(self, pid: int) -> None:
        """Let the ended worker go, if there is one, whose pid another job is to have."""
        worker = self.workers.get(pid)
        if worker is not None:
            self.release(worker, unasked=True)

    # --- finding ---

    def all(self) -> Iterator[Worker]:
        """The tracked workers, oldest first, each with its state brought up to date."""
        if self.elsewhere:
            self.control.replace_if_gone()
        self.control.hear()
        for worker in list(self.workers.values()):
            self.refresh(worker)
            yield worker

    def refresh(self, worker: Worker) -> None:
        """Bring a worker's state up to date, and count its end."""
        worker.look()
        self.count_end(worker)

    def tracked(self, pid: int) -> Worker | None:
        """The tracked worker with this pid."""
        return self.workers.get(pid)

    def find(self, pid: int, cookie: int | None) -> Worker:
        """The tracked worker with this handle; cookie None: by pid alone.

        42704: not tracked. 55000: tracked, but with another cookie. 42501: of a role the caller is no member of.
        """
        worker = self.workers.get(pid)
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
        worker = self.workers.get(pid)
        if worker is not None and worker.cookie == cookie and worker.role_oid == self.server.caller():
            return worker
        try:
            return self.find(pid, cookie)
        except BackgroundError as error:
            if error.report.sqlstate != OBJECT_NOT_IN_PREREQUISITE_STATE:
                raise
            raise background_error(
                UNDEFINED_OBJECT,
                f"cookie {cookie} does not match that of the background worker with PID {pid}",
                hint="The results of an earlier worker with that PID are gone. A handle that is expanded as in"
                " (pg_background_launch_v2(...)).* launches twice: call it in FROM.",
            ) from error

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

    def release(self, worker: Worker, *, unasked: bool = False, at_once: bool = False) -> None:
        """Stop tracking a worker. If it still runs, it goes on to its end, which the supervisor sees.

        at_once: where no query can be run, and nothing be waited for.
        """
        ended = worker.state is not State.RUNNING
        may_be_cleaned = not ended and not at_once and self.sessions.has_room()
        clean_up = worker.clean_up_behind() if may_be_cleaned else None
        if ended and not worker.counted:
            self.count_end(worker)
        self.workers.pop(worker.pid, None)
        sql = worker.job.sql if len(worker.job.sql) <= _KEPT_SQL_CHARACTERS else None
        if unasked:
            self._let_go_unasked[worker.pid, worker.cookie] = worker.role_oid
            while len(self._let_go_unasked) > _REMEMBERED_HANDLES:
                del self._let_go_unasked[next(iter(self._let_go_unasked))]
        self.released.append(Released(worker.pid, worker.cookie, worker.consumed, sql))
        worker.backlog.clear()
        if not ended:
            self.elsewhere[worker.key] = worker
            if at_once:
                worker.abandon()
            else:
                worker.detach(clean_up)
        elif not worker.job.submitted:
            self.sessions.take_back(worker)

    def begin_anew(self) -> None:
        """Let all workers go, without waiting, and forget them; idle sessions are kept."""
        for worker in list(self.workers.values()):
            self.release(worker, at_once=True)
        for worker in self.elsewhere.values():
            worker.counted = True
        if self.on_commit is not None:
            self.on_commit.begin_anew()
        self.released.clear()
        self._let_go_unasked.clear()
        self._start_counting()

    def retire(self) -> None:
        """Let all workers go on to their ends; another runtime takes over."""
        if self.on_commit is not None:
            self.on_commit.leave_behind()
        for worker in list(self.workers.values()):
            self.release(worker)
        self.sessions.drop_idle()
        self.control.close()

    # --- news from the supervisor ---

    def on_ended(self, ended: messages.Ended) -> None:
        """A job that the supervisor reads has ended, or its session was cleaned for reuse."""
        if self.on_commit is not None and self.on_commit.take(ended):
            return
        clean_up = ended.clean_up
        worker = self.elsewhere.pop(ended.key, None)
        if worker is not None and ended.changes is not None:
            worker.on_ended(ended.changes)
            self.count_end(worker)
            self.sessions.await_clean_up(ended.key, worker.session)
            if worker.signaled:
                clean_up = []
        if clean_up is not None:
            self.sessions.on_cleaned(ended.key, clean_up, ended.reports)

    def on_canceling(self, pid: int, key: int, terminate_at: float | None) -> None:
        """Another session has asked a worker to stop. If it has ended, the signal must not meet the next job."""
        for worker in (self.workers.get(pid), self.elsewhere.get(key)):
            if worker is not None and worker.key == key:
                worker.on_canceling(terminate_at)
        self.sessions.end_idle(pid)

    def hand_over_again(self) -> None:
        """Tell a new supervisor of every running job, with its socket."""
        if self.on_commit is not None:
            self.on_commit.leave_behind()
        self.sessions.forget_supervisor()
        for worker in [*self.workers.values(), *self.elsewhere.values()]:
            worker.session.known_to_supervisor = 0
        running = [*self.elsewhere.values(), *(w for w in self.workers.values() if not w.read_elsewhere)]
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
