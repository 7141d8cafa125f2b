"""Worker sessions between two jobs, kept by the session that launched them for jobs of the same role."""

from __future__ import annotations

from collections import deque
from collections.abc import Container

from .inheritance import Inheritance
from .server import Server
from .session import WorkerSession


class Pool:
    """Idle sessions, the one that was given back first at the front: its clean-up is done for certain, by now."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.idle: deque[WorkerSession] = deque()

    def has_room(self, size: int) -> bool:
        """Whether another session may be kept."""
        return len(self.idle) < size

    def put(self, session: WorkerSession) -> None:
        """Keep a session whose clean-up has been sent."""
        self.idle.append(session)

    def take(
        self, role_oid: int, guc_state: bytes, inheritance: Inheritance, taken_pids: Container[int]
    ) -> WorkerSession | None:
        """A session of the role that can take these settings on; the caller finishes its clean-up.

        taken_pids: a worker is known by its pid as long as it is tracked, so that no other may have the same.
        """
        fitting: WorkerSession | None = None
        for session in self.idle:
            if session.role_oid != role_oid or session.pid in taken_pids:
                continue
            if session.guc_state == guc_state:
                fitting = session
                break
            if fitting is None and inheritance.fits(guc_state, session.inherited):
                fitting = session
        if fitting is not None:
            self.idle.remove(fitting)
        return fitting

    def take_of_another_role(self, role_oid: int) -> WorkerSession | None:
        """The session that has been idle longest among those of other roles; the caller ends it."""
        for session in self.idle:
            if session.role_oid != role_oid:
                self.idle.remove(session)
                return session
        return None

    def remove(self, pid: int) -> WorkerSession | None:
        """Give the session with this pid up, if it is here; the caller ends it."""
        for session in self.idle:
            if session.pid == pid:
                self.idle.remove(session)
                return session
        return None

    def drop_beyond(self, size: int) -> list[WorkerSession]:
        """Give up all but so many, those first that have been idle longest; the caller ends them."""
        return [self.idle.popleft() for _ in range(len(self.idle) - size)]
