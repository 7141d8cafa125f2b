"""The supervisor's queue of jobs that wait for the end of a transaction, one for each worker session that serves it.

Before each job its guard is sent, a query that waits for the transaction and tells whether that has committed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

Job = TypeVar("Job")


class Packet(NamedTuple):
    """What is sent to the worker session for a job."""

    guard: bytes
    guard_answers: int  # groups; the row of the first one is the verdict
    job: bytes  # and the clean-up behind it


class Deferred(Generic[Job]):
    """A job that waits."""

    def __init__(self, job: Job, packet: Packet, timeout_ms: int) -> None:
        self.job = job
        self.packet = packet
        self.timeout_ms = timeout_ms


class Queue(Generic[Job]):
    """The jobs of one worker session, in the order of their submission."""

    def __init__(self) -> None:
        self.waiting: deque[Deferred[Job]] = deque()
        self.asked: Deferred[Job] | None = None  # whose guard has been sent
        self.answers_left = 0  # of that guard
        self.has_committed = False
        self.error: Any = None  # an answer of the guard that is an error
        self.proof: list[str] = []  # what the clean-up's last answer must start with
        self.runs = False  # a job, or the clean-up behind it
        self.outgoing = b""  # what did not fit into the socket

    @property
    def is_busy(self) -> bool:
        """Whether the session has something to do."""
        return self.runs or self.asked is not None or bool(self.waiting)

    def unstarted(self) -> Iterator[Deferred[Job]]:
        """The jobs that have not been sent."""
        if self.asked is not None:
            yield self.asked
        yield from self.waiting


def packet_from(descriptor: int, extras: Mapping[str, Any]) -> Packet:
    """The packet that a session has put into a file in memory."""
    size = os.fstat(descriptor).st_size
    content = b""
    while len(content) < size:
        content += os.pread(descriptor, size - len(content), len(content))
    length = int(extras["guard_bytes"])
    return Packet(content[:length], int(extras["guard_answers"]), content[length:])
