"""Cancels and timeouts: how the supervisor has the server stop a job."""

from __future__ import annotations

import signal
import time
from typing import Callable

from . import messages
from .jobs import Jobs
from .outcomes import canceled_before
from .questions import Questions
from .sockets import Sockets
from .store import KEY
from .supervised import Job, Link

_BLOCKED_S = 0.07  # a worker that waits for its reader does not heed a cancel, only its termination


class Stops:
    """Signals backends, as often as it takes."""

    def __init__(
        self,
        sockets: Sockets,
        jobs: Jobs,
        questions: Questions,
        receive: Callable[[Link], None],
        in_transaction: Callable[[int], bool],
    ) -> None:
        self._sockets = sockets
        self._jobs = jobs
        self._questions = questions
        self._receive = receive
        self._in_transaction = in_transaction  # by the pid of a backend

    def on_cancel(self, link: Link, request: int, pid: int, cookie: int, grace_ms: int | None) -> None:
        """A session wants a job stopped; after the grace its backend is terminated."""
        self._questions.ask(lambda: self._cancel(link, request, self._questions.find(pid, cookie), grace_ms))

    def _cancel(self, link: Link, request: int, job: Job | None, grace_ms: int | None) -> None:
        if job is not None and job.running:
            job.canceled = True
            if grace_ms is not None:
                job.kill_at = time.monotonic() + grace_ms / 1000
            channel = self._sockets.channels.get(job.row["pid"])
            if channel is not None and channel.link is not None:
                self._sockets.send(channel.link, [messages.CANCELING, channel.pid, job.row[KEY], job.kill_at])
            self._stop(job, time.monotonic())
            if job.running and channel is not None and channel.waiting_job(job.row["cookie"]) is job:
                self._jobs.end(job, canceled_before())
        self._sockets.send(link, [messages.REPLY, request, job is not None])

    def fire_deadlines(self, now: float) -> None:
        """Stop what has run for too long."""
        for job in self._jobs.overdue(now):
            job.timed_out = True
            job.kill_at = now + _BLOCKED_S
            self._stop(job, now)

    def repeat(self, now: float) -> None:
        """A backend may have been where it heeds no signal."""
        for channel in list(self._sockets.channels.values()):
            job = channel.job
            if job is not None and job.running and (job.canceled or job.timed_out):
                self._stop(job, now)

    def _stop(self, job: Job, now: float) -> None:
        """Signal a job's backend; never one that works on the session's next job by now."""
        channel = self._sockets.channels.get(job.row["pid"])
        if channel is None or channel.job is not job:
            return
        if channel.link is not None:
            self._receive(channel.link)
        if not job.running or channel.job is not job or self._sockets.channels.get(channel.pid) is not channel:
            return
        self._jobs.unwatched.add(job.row[KEY])
        overdue = job.kill_at is not None and now >= job.kill_at
        if not overdue:
            channel.process.send(signal.SIGINT)
        elif self._in_transaction(channel.pid):
            # Else it has committed, and waits for the reader of its last rows.
            channel.process.send(signal.SIGTERM)
