"""What is to be run in a worker session, and the states that it goes through."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional

from . import messages, wire

if TYPE_CHECKING:
    from .server import Server
    from .session import WorkerSession
    from .settings import Configuration

KEY_BITS = 63
PREVIEW_CHARACTERS = 120


class State(enum.Enum):
    """A worker's state as `pg_background_list_v2` shows it."""

    RUNNING = "running"
    STOPPED = "stopped"
    CANCELED = "canceled"
    ERROR = "error"


# The values of $1, $2 and so on, as text in the database's encoding; None is NULL.
Parameters = Sequence[Optional[bytes]]


class Job(NamedTuple):
    """What is to be run, and how."""

    sql: str
    queue_size: int
    submitted: bool = False
    label: str | None = None
    parameters: Parameters | None = None  # then the extended protocol runs it: a single statement
    discards: bool = False  # nobody will read its rows

    def packet(self, server: Server) -> bytes:
        """The messages that run it, for a session whose answer libpq does not read."""
        sql = server.encode(self.sql)
        if self.parameters is None:
            return wire.query_message(sql)
        return wire.bound_query_messages(sql, self.parameters, describe=not self.submitted)

    def announced(
        self, key: int, cookie: int, session: WorkerSession, configuration: Configuration, launched_us: int
    ) -> messages.Announcement:
        """What the supervisor is told of it."""
        return messages.Announcement(
            key,
            session.pid,
            cookie,
            session.role_oid,
            self.label,
            self.submitted,
            self.queue_size,
            self.sql[:PREVIEW_CHARACTERS],
            launched_us,
            session.process_start,
            configuration.history_ms,
        )
