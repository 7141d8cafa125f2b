"""Jobs that wait for a commit: the supervisor has them guarded, judges, and starts or ends them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from . import messages, wire
from .deferral import Deferred, Packet, Queue, packet_from
from .jobs import Jobs, announced_row
from .ledger import Ledger
from .outcomes import outcome_of, rolled_back, timestamp
from .sockets import Sockets
from .store import KEY, Row
from .supervised import Channel, Job, Link


class AfterCommit:
    """What is to be done next in the sessions that serve such jobs."""

    def __init__(self, sockets: Sockets, ledger: Ledger, jobs: Jobs) -> None:
        self._sockets = sockets
        self._ledger = ledger
        self._jobs = jobs

    def is_waited_for(self) -> bool:
        """Whether jobs wait for a commit, of which the next one must find this process: they keep their order."""
        channels = self._sockets.channels.values()
        return any(channel.queue is not None and channel.queue.is_busy for channel in channels)

    def on_defer(self, link: Link, descriptors: list[int], announcement: list[Any], extras: dict[str, Any]) -> None:
        """A session hands a job over; its packet is in the file whose descriptor is the last one."""
        packet = _packet_in(descriptors.pop(), extras)
        row = announced_row(link, messages.Announcement(*announcement))
        channel = self._jobs.channel_for(link, row, descriptors)
        job = Job(row, extras["started_ns"], None, extras)
        if channel is None:
            self._jobs.refuse(link, job)
            return
        self._jobs.by_key[int(row[KEY])] = job
        channel.reads = True
        if channel.queue is None:
            channel.reports = {}
        queue = channel.queue = channel.queue or Queue()
        queue.proof = list(extras["proof"])
        self._ledger.note(row)
        idle = not queue.is_busy
        queue.waiting.append(Deferred(job, packet, int(extras["timeout_ms"])))
        if idle:
            self._ask_next(channel, queue)

    def take_answer(self, channel: Channel, answer: wire.Answer) -> bool:
        """One of a guard's answers; False where no guard was sent."""
        queue = channel.queue
        if queue is None or queue.asked is None:
            return False
        self._judge(channel, queue, queue.asked, answer)
        return True

    def take_clean_up(self, channel: Channel, row: list[str | None]) -> None:
        """A job and its clean-up are over; row: the clean-up's last one."""
        queue = channel.queue
        if queue is None:
            return
        queue.runs = False
        if row[: len(queue.proof)] == queue.proof:
            self._ask_next(channel, queue)
        else:
            self._give_up(channel, queue)

    def end_unsent(self, channel: Channel, job: Job, changes: Row) -> None:
        """A job has ended without having been sent; if it was cancelled, that is known already."""
        if channel.link is not None:
            ended = messages.Ended(channel.pid, job.row[KEY], changes, messages.NOT_RUN, channel.reports)
            self._sockets.send(channel.link, ended.message())
        if job.running:
            self._jobs.end(job, changes)

    def send_outgoing(self, channel: Channel) -> None:
        """As much as fits; an event tells when more does."""
        queue = channel.queue
        if queue is None:
            return
        try:
            while queue.outgoing:
                sent = channel.connection.send(queue.outgoing, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                queue.outgoing = queue.outgoing[sent:]
        except BlockingIOError:
            pass  # later
        except OSError:
            queue.outgoing = b""  # the worker has gone: reading finds that out

    def _ask_next(self, channel: Channel, queue: Queue[Job]) -> None:
        """Send the guard of the next job; after the last one a session without a launcher ends."""
        if queue.waiting:
            queue.asked = queue.waiting.popleft()
            queue.answers_left, queue.has_committed, queue.error = queue.asked.packet.guard_answers, False, None
            channel.answer, channel.answers_left = wire.Answer(), 1
            self._write(channel, queue, queue.asked.packet.guard)
        elif channel.link is None:
            self._sockets.terminate_after_job(channel)

    def _give_up(self, channel: Channel, queue: Queue[Job]) -> None:
        """An earlier job has left the session in a state that could not be undone: nothing more may run in it."""
        message = "the session of an earlier job of the same transaction could not be cleaned for this one"
        for item in queue.unstarted():
            changes = {"state": "error", "sqlstate": "55000", "error_message": message, "finished_at": timestamp()}
            self.end_unsent(channel, item.job, changes)
        self._sockets.close_channel(channel)

    def _judge(self, channel: Channel, queue: Queue[Job], item: Deferred[Job], answer: wire.Answer) -> None:
        """One of the guard's answers has come; the first one's row is the verdict."""
        if queue.answers_left == item.packet.guard_answers and answer.row is not None:
            queue.has_committed = wire.row_values(answer.row) == [b"t"]
        if answer.error is not None and queue.error is None:
            queue.error = answer
        queue.answers_left -= 1
        if queue.answers_left:
            return
        queue.asked = None
        if queue.has_committed and queue.error is None and item.job.running:
            self._start(channel, queue, item)
            return
        if queue.error is not None:
            self.end_unsent(channel, item.job, outcome_of(item.job, queue.error, self._ledger.decode))
            self._give_up(channel, queue)
            return
        self.end_unsent(channel, item.job, rolled_back())
        self._ask_next(channel, queue)

    def _start(self, channel: Channel, queue: Queue[Job], item: Deferred[Job]) -> None:
        job = item.job
        job.started = time.monotonic()
        job.row["launched_at"] = timestamp()
        self._ledger.note(job.row)
        channel.begin(job)
        if item.timeout_ms:
            self._jobs.add_deadline(job, item.timeout_ms)
        queue.runs = True
        self._write(channel, queue, item.packet.job)

    def _write(self, channel: Channel, queue: Queue[Job], packet: bytes) -> None:
        queue.outgoing += packet
        self.send_outgoing(channel)
        self._sockets.watch(channel)


def _packet_in(file: int, extras: Mapping[str, Any]) -> Packet:
    try:
        return packet_from(file, extras)
    finally:
        os.close(file)
