"""Worker sessions between two jobs, kept by the session that launched them for jobs of the same role."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container

from .inheritance import Inheritance
from .session import WorkerSession


class Pool:
    """Idle sessions, the one that was given back first at the front."""

    def __init__(self) -> None:
        self.idle: deque[WorkerSession] = deque()

    def has_room(self, size: int) -> bool:
        """Whether another session may be kept."""
        return len(self.idle) < size

    def put(self, session: WorkerSession) -> None:
        """Keep a session whose clean-up has been sent."""
        session.idle_since = time.monotonic()
        self.idle.append(session)

    def take(
        self, role_oid: int, guc_state: bytes, inheritance: Inheritance, taken_pids: Container[int]
    ) -> WorkerSession | None:
        """A session of the role that can take these settings on; the caller finishes its clean-up.

        The one that was used last, so that those that are not needed come to their end; one that has these settings
        goes first, and one that has been cleaned. taken_pids: a worker is known by its pid as long as it is tracked,
        so that no other may have the same.
        """
        its_own = [session for session in self.idle if session.role_oid == role_oid and session.pid not in taken_pids]
        alike = [session for session in its_own if session.guc_state == guc_state]
        fitting = alike or [session for session in its_own if inheritance.fits(guc_state, session.inherited)]
        if not fitting:
            return None
        chosen = next((session for session in reversed(fitting) if session.cleaning.is_done), fitting[0])
        self.idle.remove(chosen)
        return chosen

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

    def drop_ended(self) -> WorkerSession | None:
        """Give up the one that has been idle longest, if it has ended itself for that; the caller closes it."""
        if not self.idle:
            return None
        timeout_ms = self.idle[0].cleaning.idle_timeout_ms
        has_ended = 0 < timeout_ms < (time.monotonic() - self.idle[0].idle_since) * 1000
        return self.idle.popleft() if has_ended else None

    def drop_beyond(self, size: int) -> list[WorkerSession]:
        """Give up all but so many, those first that have been idle longest; the caller ends them."""
        return [self.idle.popleft() for _ in range(len(self.idle) - size)]
