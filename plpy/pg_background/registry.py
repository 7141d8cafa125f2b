"""The workers that this session tracks: the truth about them, whatever becomes of its transactions."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Optional

from .errors import (
    CONFIGURATION_LIMIT_EXCEEDED,
    INSUFFICIENT_PRIVILEGE,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    UNDEFINED_OBJECT,
    BackgroundError,
    background_error,
)
from .inheritance import Inheritance
from .loopback import Loopback
from .results import TypeNames, TypeStyles
from .server import Server
from .session import WorkerSession
from .worker import Job, State, Worker

_COOKIE_BITS = 63


class Registry:
    """Starts workers, finds them by handle, and lets them go."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.type_names = TypeNames(server)
        self._styles = TypeStyles(server)
        self._inheritance = Inheritance(server)
        self._loopback: Optional[Loopback] = None
        self._workers: dict[int, Worker] = {}
        self.counts = dict.fromkeys(State, 0)
        self.launched = 0
        self._elapsed_ms = 0.0
        self._counted: set[int] = set()

    def launch(self, job: Job, max_workers: int, *, with_cookie: bool = True) -> Worker:
        """Start a worker as the caller; it is tracked once its SQL has been sent. 53400 at max_workers."""
        self._require_room(max_workers)
        if self._loopback is None:
            self._loopback = Loopback(self.server)
        role_oid = self.server.caller()
        session = WorkerSession.start(self.server, self._loopback, self._inheritance, role_oid)
        worker = Worker(self.server, self._styles, session, job, _random_cookie() if with_cookie else 0)
        try:
            worker.start()
        except BaseException:
            worker.close()
            raise
        self._workers[worker.pid] = worker
        self.launched += 1
        return worker

    def _require_room(self, max_workers: int) -> None:
        if len(self._workers) < max_workers:
            return
        for worker in [w for w in self.all() if w.job.submitted and w.ended]:
            self.release(worker)
        if len(self._workers) >= max_workers:
            raise background_error(
                CONFIGURATION_LIMIT_EXCEEDED,
                f"this session tracks {len(self._workers)} background workers already",
                detail=f"pg_background.max_workers is {max_workers}.",
                hint="Read the results of finished workers, detach some, or raise pg_background.max_workers.",
            )

    def all(self) -> Iterator[Worker]:
        """The tracked workers, oldest first, each with its state brought up to date."""
        for worker in list(self._workers.values()):
            self.refresh(worker)
            yield worker

    def refresh(self, worker: Worker) -> None:
        """Bring a worker's state up to date, and count its end."""
        worker.look()
        self.count_end(worker)

    def find(self, pid: int, cookie: Optional[int]) -> Worker:
        """The tracked worker with this handle; cookie None: by pid alone.

        42704: not tracked. 55000: tracked, but with another cookie. 42501: of a role the caller is no member of.
        """
        worker = self._workers.get(pid)
        if worker is None:
            raise _not_tracked(pid)
        if cookie is not None and cookie != worker.cookie:
            raise background_error(
                OBJECT_NOT_IN_PREREQUISITE_STATE,
                f"cookie {cookie} does not match that of the background worker with PID {pid}",
                hint="The handle is of an earlier worker, whose pid this one has now.",
            )
        if not self.may_manage(worker.role_oid):
            raise background_error(
                INSUFFICIENT_PRIVILEGE,
                f"permission denied for the background worker with PID {pid}",
                hint="Only members of the role that launched it may manage it.",
            )
        return worker

    def find_for_result(self, pid: int, cookie: Optional[int]) -> Worker:
        """As find, but another cookie is 42704 too: those results are gone."""
        try:
            return self.find(pid, cookie)
        except BackgroundError as error:
            if error.report.sqlstate != OBJECT_NOT_IN_PREREQUISITE_STATE:
                raise
            raise _not_tracked(pid) from error

    def may_manage(self, role_oid: int) -> bool:
        """Whether the caller is that role, or a member of it."""
        if self.server.caller() == role_oid:
            return True
        return bool(
            self.server.query(
                "SELECT pg_catalog.pg_has_role(CURRENT_USER, $1, 'MEMBER') AS member", ["pg_catalog.oid"], [role_oid]
            )[0]["member"]
        )

    def release(self, worker: Worker) -> None:
        """Stop tracking a worker; if it still runs, it goes on to its end."""
        self.count_end(worker)
        self._workers.pop(worker.pid, None)
        self._counted.discard(worker.cookie or worker.pid)
        worker.close()

    def count_end(self, worker: Worker) -> None:
        """Count an ended worker, once."""
        key = worker.cookie or worker.pid
        if worker.ended and key not in self._counted:
            self._counted.add(key)
            self.counts[worker.state] += 1
            self._elapsed_ms += worker.elapsed_ms

    def average_ms(self) -> float:
        """Mean time that the ended workers ran, in milliseconds; 0 when there are none."""
        ended = sum(self.counts.values())
        return self._elapsed_ms / ended if ended else 0.0


def _random_cookie() -> int:
    return secrets.randbits(_COOKIE_BITS) or 1


def _not_tracked(pid: int) -> BackgroundError:
    return background_error(
        UNDEFINED_OBJECT,
        f"this session tracks no background worker with PID {pid}",
        hint="Its result was read, it was detached, or another session launched it."
        " See pg_background_list_v2().",
    )
