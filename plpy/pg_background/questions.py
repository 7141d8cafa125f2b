"""What sessions and workers ask the supervisor, and wait for."""

from __future__ import annotations

import time
from typing import Callable

from . import messages
from .jobs import Jobs
from .ledger import Ledger
from .reports import Reports
from .sockets import Sockets
from .store import Row
from .supervised import Job, Link

_LATE_ROW_S = 0.5  # a job that is not known is looked for so long, while a predecessor may send its row
# A worker that a young supervisor has not heard of: its session may not have come over yet, or its row not be written.
_HAND_OVER_S = 2.0


class Questions:
    """Answers after all that was sent before a question, by whomever, is known."""

    def __init__(self, sockets: Sockets, ledger: Ledger, reports: Reports, jobs: Jobs) -> None:
        self._sockets = sockets
        self._ledger = ledger
        self._reports = reports
        self._jobs = jobs
        self._asked: list[Callable[[], None]] = []
        self._asked_too_early: list[Callable[[], None]] = []  # they are asked again
        self._alone = False  # no predecessor is left that could send what it cannot write
        self._born = time.monotonic()

    @property
    def are_asked(self) -> bool:
        """Whether there is something to answer."""
        return bool(self._asked)

    def ask(self, question: Callable[[], None]) -> None:
        """Have a question answered when all that was sent before it is known."""
        self._asked.append(question)

    def ask_again(self) -> None:
        """Those that could not be answered yet."""
        self._asked += self._asked_too_early
        self._asked_too_early.clear()

    def answer(self) -> None:
        """Answer all; who calls has taken in what was sent before."""
        asked, self._asked = self._asked, []
        for question in asked:
            question()

    def find(self, pid: int, cookie: int) -> Job | None:
        """The job with this handle, as far as it is in memory."""
        channel = self._sockets.channels.get(pid)
        if channel is not None and channel.job is not None and channel.job.row["cookie"] == cookie:
            return channel.job
        waiting = channel.waiting_job(cookie) if channel is not None else None
        if waiting is not None:
            return waiting
        for key in reversed(self._jobs.finished):
            job = self._jobs.by_key.get(key)
            if job is not None and job.row["pid"] == pid and job.row["cookie"] == cookie:
                return job
        return None

    # --- what has become of a job ---

    def on_find(self, link: Link, request: int, pid: int, cookie: int) -> None:
        """FIND."""
        until = time.monotonic() + _LATE_ROW_S
        self.ask(lambda: self._reply_with_row(link, request, pid, cookie, until))

    def _reply_with_row(self, link: Link, request: int, pid: int, cookie: int, until: float) -> None:
        row = self._row(pid, cookie)
        if row is None and self._may_hear_more(until):
            self._asked_too_early.append(lambda: self._reply_with_row(link, request, pid, cookie, until))
            return
        self._sockets.send(link, [messages.REPLY, request, row])

    def _may_hear_more(self, until: float) -> bool:
        """Whether a row may still be found: that of a predecessor which cannot write it, or behind somebody's lock.

        Also once after the predecessor's end, as what it has sent may lie unread.
        """
        if self._ledger.is_locked:
            return True
        if self._alone or time.monotonic() > until:
            return False
        self._alone = self._ledger.is_alone()
        return True

    def _row(self, pid: int, cookie: int) -> Row | None:
        """What is known of a handle: from memory, or from the table when it ended long ago."""
        job = self.find(pid, cookie)
        return job.row if job is not None else self._ledger.ask(lambda store: store.find(pid, cookie))

    # --- its end ---

    def on_wait(self, link: Link, request: int, pid: int, cookie: int) -> None:
        """WAIT."""
        link.waiting[request] = None
        until = time.monotonic() + _LATE_ROW_S
        self.ask(lambda: self._wait(link, request, pid, cookie, until))

    def _wait(self, link: Link, request: int, pid: int, cookie: int, until: float) -> None:
        if request not in link.waiting:
            return  # given up meanwhile
        job = self.find(pid, cookie)
        if job is not None and job.running:
            job.waiters.append((link, request))
            channel = self._sockets.channels.get(job.row["pid"])
            if channel is not None and channel.link is not None:
                channel.link.is_awaited = True
            link.waiting[request] = job
        else:
            row = self._row(pid, cookie)
            if row["state"] == "running" if row is not None else self._may_hear_more(until):
                # A predecessor sees it to its end, and writes that down.
                self._asked_too_early.append(lambda: self._wait(link, request, pid, cookie, until))
                return
            del link.waiting[request]
            self._sockets.send(link, [messages.REPLY, request, row])

    def on_forget(self, link: Link, request: int) -> None:
        """FORGET: nobody waits any more."""
        job = link.waiting.pop(request, None)
        if job is not None:
            job.waiters.remove((link, request))

    def on_waits_for(self, link: Link, request: int | None, pid: int | None) -> None:
        """WAITS_FOR."""
        link.waits_for = pid
        if request is not None:
            links = self._sockets.links.values()
            pairs = [[other.pid, other.waits_for] for other in links if other.waits_for is not None]
            self._sockets.send(link, [messages.REPLY, request, pairs])

    # --- whether a process is a worker ---

    def on_am_i_worker(self, link: Link, request: int) -> None:
        """AM_I_WORKER."""
        until = time.monotonic() + _HAND_OVER_S
        self.ask(lambda: self._tell_worker(link, request, until))

    def _tell_worker(self, link: Link, request: int, until: float) -> None:
        """Whether it is one. A supervisor that has, or has just had, a predecessor is not sure at once."""
        channel = self._sockets.channels.get(link.pid)
        known = channel is not None and channel.job is not None
        known = known or self._ledger.inherited_row(link.pid) is not None or self._ledger.was_written(link.pid)
        now = time.monotonic()
        if not known and now < until and (now < self._born + _HAND_OVER_S or not self._ledger.is_alone()):
            self._asked_too_early.append(lambda: self._tell_worker(link, request, until))
            return
        link.reports = known
        self._sockets.send(link, [messages.REPLY, request, link.reports])
        if link.reports and not link.closed:
            self._reports.add(link)
