"""What is to be run in a worker session, and the states that it goes through."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional

from . import messages, wire
from .lexer import Script
from .past_libpq import AT_ONCE_BYTES

if TYPE_CHECKING:
    from .server import Server
    from .session import WorkerSession
    from .settings import Configuration

PREVIEW_CHARACTERS = 120


def new_key() -> int:
    """63 random bits of the operating system, never 0: names a job, and is its cookie."""
    return (int.from_bytes(os.urandom(8), "big") >> 1) or 1


class State(enum.Enum):
    """A worker's state as `pg_background_list_v2` shows it."""

    RUNNING = "running"
    STOPPED = "stopped"
    CANCELED = "canceled"
    ERROR = "error"


# The values of $1, $2 and so on, as text in the database's encoding; None is NULL.
Parameters = Sequence[Optional[bytes]]


class Seen:
    """What was seen of a job when it was run before."""

    plain = False  # its answer was small, and its rows, if any, the same under all settings
    surprising = False  # it was plain, and then was not small: libpq would have read that faster


class Job(NamedTuple):
    """What is to be run, and how; make() makes it."""

    sql: str
    script: Script
    queue_size: int
    submitted: bool
    label: str | None
    parameters: Parameters | None  # then the extended protocol runs it: a single statement
    discards: bool  # nobody will read its rows
    packet: bytes | None  # the messages that run it; None where they are so long that they are made when they are sent
    told: str  # what the supervisor is told of it, whoever runs it
    seen: Seen
    statements: int  # their number; the extended protocol takes one

    @classmethod
    def make(
        cls,
        server: Server,
        sql: str,
        script: Script,
        queue_size: int,
        *,
        submitted: bool = False,
        label: str | None = None,
        discards: bool = False,
    ) -> Job:
        """A job without parameters, that may be run any number of times."""
        told = messages.told_of_job(label, submitted, queue_size, sql[:PREVIEW_CHARACTERS])
        job = cls(sql, script, queue_size, submitted, label, None, discards, None, told, Seen(), script.statements)
        return job._encoded_if_short(server)

    def bound(self, server: Server, parameters: Parameters) -> Job:
        """The same job with these parameters."""
        return self._replace(parameters=parameters, packet=None, statements=1)._encoded_if_short(server)

    def _encoded_if_short(self, server: Server) -> Job:
        if len(self.sql) > AT_ONCE_BYTES:
            return self
        packet = self.encoded(server)
        return self._replace(packet=packet) if len(packet) <= AT_ONCE_BYTES else self

    def encoded(self, server: Server) -> bytes:
        """The messages that run it, for a session whose answer libpq does not read."""
        if self.packet is not None:
            return self.packet
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
