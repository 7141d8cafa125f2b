"""What the supervisor keeps of each session, job and worker."""

from __future__ import annotations

import enum
import os
import socket
from collections import deque
from collections.abc import Mapping
from typing import Any, Callable

from . import messages, wire
from .deferral import Queue
from .process import Process, process_start
from .store import Row

WINDOW_BYTES = 1 << 16  # of a worker's output that is looked at


class Heard(enum.Enum):
    """What a connection holds behind the messages that were read."""

    NOTHING = enum.auto()  # that had come before
    END = enum.auto()
    GARBAGE = enum.auto()
    WITHOUT_DESCRIPTORS = enum.auto()  # a message that had more of them than this process may open


class Link:
    """The control connection of a session, or of a worker that reports its progress."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid = messages.peer_pid(connection)
        self.process_start = process_start(self.pid)
        self.inbox: deque[messages.Received] = deque()  # messages that have been read, but not looked at
        self.outbox: deque[list[Any]] = deque()
        self.channels: set[int] = set()  # pids of workers
        self.closed = False
        self.may_rest = False
        self.is_awaited = False  # other sessions wait for ends that it is to tell of
        self.moved_on = False  # to another supervisor, with all workers
        self.lives_on = False  # only the connection ends
        self.reports = False  # a worker's, for its progress
        self.packets: list[bytes] = []  # reports that have not been looked at
        self.waiting: dict[int, Job | None] = {}  # by request: whose end the session is to be told
        self.waits_for: int | None = None  # pid of the worker whose end the session waits for

    def read_messages(self, give_way: Callable[[], None]) -> Heard:
        """Put what lies there into the inbox, not what comes meanwhile; what was heard behind that.

        give_way: called between two messages.
        """
        try:
            left = messages.bytes_unread(self.connection)
            while True:
                received = messages.receive(self.connection)
                if received is None:
                    return Heard.END
                self.inbox.append(received)
                left -= received.size
                if left <= 0:
                    return Heard.NOTHING
                give_way()
        except BlockingIOError:
            return Heard.NOTHING
        except messages.DescriptorsLostError:
            return Heard.WITHOUT_DESCRIPTORS
        except (OSError, messages.ProtocolError):
            return Heard.GARBAGE

    def drop_unheard(self) -> None:
        """Nobody will look at what is left in the inbox."""
        for received in self.inbox:
            for descriptor in received.descriptors:
                os.close(descriptor)
        self.inbox.clear()


class Job:
    """One job: its row, and who waits for its end."""

    def __init__(self, row: Row, started_ns: int, tags_of_commit: int | None, extras: Mapping[str, Any]) -> None:
        self.row = row
        self.started = started_ns / 1e9  # time.monotonic() of the session, before it sent the job
        self.tags_after = 1 if extras.get("probe") else 0
        self.tags_of_commit = tags_of_commit
        self.groups_after = int(extras.get("clean_ups", 0))
        self.waiters: list[tuple[Link, int]] = []
        self.canceled = bool(extras.get("canceled"))
        self.timed_out = False
        self.kill_at: float | None = extras.get("terminate_at")  # of time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return bool(self.row["state"] == "running")


class Channel:
    """A duplicate of a worker's socket."""

    def __init__(self, pid: int, start: int | None, connection: socket.socket, link: Link | None) -> None:
        self.pid = pid
        self.connection = connection
        self.link = link
        self.process = Process(pid, start)
        self.job: Job | None = None
        self.previous: Job | None = None
        self.watched = False  # by epoll
        self.reads = False  # a submitted job, or a detached one that another may follow: read message by message
        self.drains = False  # nobody else reads it any more: read to the end of the connection
        self.queue: Queue[Job] | None = None  # jobs that wait for a commit
        self.writing = False  # the session has not sent the whole job yet
        self.farewell_due = False  # the end of the connection is to be queued behind the job
        self.answer = wire.Answer()
        self.answers_left = 0
        self.unclean = False  # an answer to the clean-up was an error
        self.reports: dict[str, str | None] = {}  # what has become of settings, as the job's answers say
        self.skip = 0
        self.window = WINDOW_BYTES
        self.tail = b""

    def begin(self, job: Job) -> None:
        """The next answer is this job's, and those of its clean-up follow."""
        self.previous, self.job = self.job, job
        self.answer, self.answers_left, self.unclean = wire.Answer(), 1 + job.groups_after, False

    def take_answer(self) -> wire.Answer:
        """The answer that has come whole; another one begins."""
        answer, self.answer = self.answer, wire.Answer()
        self.reports.update(answer.reports)
        return answer

    def waiting_job(self, cookie: int) -> Job | None:
        """The job with this cookie, if it waits here for a commit."""
        jobs = [item.job for item in self.queue.unstarted()] if self.queue is not None else []
        return next((job for job in jobs if job.row["cookie"] == cookie), None)

    @property
    def is_read_here(self) -> bool:
        """Whether something is still to come that nobody else will read."""
        reads = self.reads and self.job is not None and self.job.running
        return self.drains or reads or (self.queue is not None and self.queue.is_busy)

    @property
    def works(self) -> bool:
        """Whether something is still to come."""
        return self.is_read_here or (self.job is not None and self.job.running)

    @property
    def is_between_jobs(self) -> bool:
        """Whether all of a submitted job has been read.

        An answer that lies there by now is the next job's, of which its session may not have told yet. A channel that
        is in line twice, for arrivals in quick succession, must not lose it.
        """
        return self.reads and not self.drains and self.link is not None and not self.answers_left
