"""The supervisor: one backend for each database that sees every worker to its end and tells all sessions about it.

It is the only writer of the unlogged table. It holds a duplicate of every worker's socket: of workers whose session
waits or works it only looks at what has arrived; the output of submitted, detached and orphaned workers it reads and
throws away, so that they never block. Everything it knows it keeps in memory; the table is written in batches.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
import socket
import time
from collections import deque
from typing import Any, Callable

from . import messages, wire
from .after_commit import AfterCommit, take_packet
from .answers import Answers
from .ledger import Ledger
from .outcomes import (
    LOST,
    canceled_before,
    lost_connection,
    never_ran,
    timestamp,
)
from .questions import Questions
from .reports import Reports
from .sockets import Sockets
from .store import ENDS, KEY, Row, Store
from .supervised import Channel, Job, Link

_TICK_S = 0.05  # jobs that were not over by then are watched; signals are repeated
_SLICE_S = 0.1  # interrupts are handled at least so often
_FIRST_LINK_S = 2.0
# Who reads the view may have a snapshot of the table that is older than the last rows written: that a job without a
# backend still has a supervisor tells the reader that it is not lost.
_LINGER_S = 0.25
_IDLE_S = 60.0  # with nothing to do it ends after this
_BLOCKED_S = 0.07  # a worker that waits for its reader does not heed a cancel, only its termination
_PRUNE_S = 60.0
# A busy one makes room after this, or so many rows: its statistics reach autovacuum only at its end.
_SUCCESSION_S, _SUCCESSION_ROWS = 600.0, 50_000
_LOST_S = 0.2  # rows of a predecessor are looked after so often
_MAX_EVENTS = 1 << 16
_REMEMBERED = 2000  # finished jobs that questions find in memory
_NO_MESSAGE_OF_OURS = (
    messages.ProtocolError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
)
# What sessions tell of launched jobs.
_NEEDS_NO_ANSWER = frozenset((messages.JOB, messages.FINISHED))


class Supervisor:
    """The event loop and what it knows."""

    def __init__(
        self,
        store: Store,
        listener: socket.socket,
        path: str,
        lock_fd: int,
        digest: str,
        handle_interrupts: Callable[[], bool],
        in_transaction: Callable[[int], bool],
        log: Callable[[str], object],
    ) -> None:
        self._ledger = Ledger(store, path, self._make_room)
        self._listener: socket.socket | None = listener
        self._lock_fd = lock_fd
        self._path = path
        self._digest = digest
        self._handle_interrupts = handle_interrupts
        self._in_transaction = in_transaction  # by the pid of a backend
        self._log = log
        self._jobs: dict[int, Job] = {}  # by key
        self._finished: deque[int] = deque()
        self._sockets = Sockets(self._close_link)
        self._reports = Reports(self._sockets, self._ledger, self._receive, self._close_link)
        self._questions = Questions(self._sockets, self._ledger, self._reports, self._jobs, self._finished)
        self._after_commit = AfterCommit(self._sockets, self._ledger, self._end, self._add_deadline)
        self._answers = Answers(self._sockets, self._ledger, self._after_commit, self._receive, self._end)
        self._deadlines: list[tuple[float, int]] = []
        now = time.monotonic()
        self._tick_at = now
        self._prune_at = now + _PRUNE_S
        self._lost_at = now
        self._idle_since = now
        self._deaf = False  # the listener is not polled: no descriptor was left for a connection
        self._born = now
        self._has_had_no_link = True
        self._unwatched: set[int] = set()  # keys of jobs that are watched from the next tick on
        self._handlers: dict[str, Callable[..., None]] = {
            messages.HELLO: self._on_hello,
            messages.JOB: self._on_job,
            messages.DEFER: self._on_defer,
            messages.FINISHED: self._on_finished,
            messages.DETACH: self._on_detach,
            messages.CLOSED: self._on_closed,
            messages.WRITING: self._on_writing,
            messages.MOVED_ON: self._on_moved_on,
            messages.FIND: self._questions.on_find,
            messages.WAIT: self._questions.on_wait,
            messages.FORGET: self._questions.on_forget,
            messages.WAITS_FOR: self._questions.on_waits_for,
            messages.CANCEL: self._on_cancel,
            messages.AM_I_WORKER: self._questions.on_am_i_worker,
            messages.PROGRESS: lambda link, *report: self._reports.note(link.pid, *report),
            messages.RECORD: self._on_record,
        }
        self._sockets.epoll.register(listener.fileno(), select.EPOLLIN)

    # --- the loop ---

    def run(self) -> None:
        """Serve until there is nothing left to do, or until the server wants this backend to end."""
        self._ledger.inherit()
        self._sweep_markers()
        parent = os.getppid()
        while self._is_wanted():
            if os.getppid() != parent:
                return  # the postmaster is gone, and so is everybody else
            self._serve(self._sockets.epoll.poll(self._poll_timeout(), _MAX_EVENTS))
            now = time.monotonic()
            self._answers.read_ready()
            self._reports.hear_unheard()
            self._answer_questions()
            self._fire_deadlines(now)
            if now >= self._tick_at:
                self._tick(now)
            if self._sockets.resting and now >= self._sockets.wake_at:
                self._sockets.end_rest(now)
            self._ledger.flush_if_due(now)
            if self._is_done(now) and not self._sockets.epoll.poll(0):
                break
        self._answers.end_drained()
        self._ledger.flush()
        self._retire()
        self._ledger.finish()

    def _is_wanted(self) -> bool:
        """False when this backend must end.

        Before that its sessions go to a successor, with all their workers but those whose jobs wait for a commit:
        nobody else has these. The server's shutdown ends such workers too, and so does not wait for them.
        """
        if self._handle_interrupts():
            return True
        self._make_room()
        if self._sessions():
            self._answers.end_drained()
            self._part_from_sessions()
        return self._after_commit.is_waited_for()

    def _poll_timeout(self) -> float:
        if self._sockets.ready or self._questions.are_asked or self._reports.is_behind:
            return 0
        now = time.monotonic()
        wake_at = now + _SLICE_S
        wake_at = self._ledger.next_flush(wake_at)
        if self._unwatched:
            wake_at = min(wake_at, self._tick_at)
        if self._sockets.resting:
            wake_at = min(wake_at, self._sockets.wake_at)
        if self._deadlines:
            wake_at = min(wake_at, self._deadlines[0][0])
        return max(0.0, wake_at - now)

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Control messages first: what they tell about a worker must be known before its socket is read.

        And those of sessions before those of workers: a job is announced before it can report progress.
        """
        reporting = []
        for descriptor, event in events:
            link = self._sockets.links.get(descriptor)
            if link is not None and link.reports:
                reporting.append(link)
            elif link is not None:
                if event & select.EPOLLOUT:
                    self._sockets.send_outbox(link)
                if event & ~select.EPOLLOUT:
                    self._receive(link)
                    self._sockets.rest(link)
            elif self._listener is not None and descriptor == self._listener.fileno():
                self._accept()
        for link in reporting:
            self._reports.hear(link)
            self._sockets.resting.append(link)
        for descriptor, _ in events:
            channel = self._sockets.channel_of_fd.get(descriptor)
            if channel is not None:
                self._sockets.ready.append(channel)

    def _tick(self, now: float) -> None:
        self._tick_at = now + _TICK_S
        for key in self._unwatched:
            job = self._jobs.get(key)
            channel = self._sockets.channels.get(job.row["pid"]) if job is not None and job.running else None
            if channel is not None and channel.job is job:
                self._sockets.watch(channel)
        self._unwatched.clear()
        for channel in list(self._sockets.channels.values()):
            job = channel.job
            if job is not None and job.running and (job.canceled or job.timed_out):
                self._stop(job, now)
            if channel.farewell_due:
                self._sockets.say_farewell(channel)
        if self._deaf and self._listener is not None:
            self._deaf = False
            self._sockets.epoll.register(self._listener.fileno(), select.EPOLLIN)
        if now >= self._lost_at:
            self._lost_at = now + _LOST_S
            self._questions.ask_again()
            if self._ledger.inherited:
                jobs = [(pid, channel.job) for pid, channel in self._sockets.channels.items()]
                self._ledger.look_after_inherited((pid, job.row[KEY]) for pid, job in jobs if job is not None)
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_S
            self._prune()
        due = now - self._born > _SUCCESSION_S or self._ledger.written > _SUCCESSION_ROWS
        if due and self._sockets.links and not self._after_commit.is_waited_for():
            self._make_room()

    def _is_done(self, now: float) -> bool:
        if any(channel.works for channel in self._sockets.channels.values()):
            self._idle_since = now
            return False
        if not self._sockets.links and now - self._born < _FIRST_LINK_S and self._has_had_no_link:
            return False  # who started it is busy with its first worker
        if not self._sockets.links and now < self._ledger.written_at + _LINGER_S:
            return False
        if not self._sockets.links:
            return self._ledger.may_be_left
        if not self._ledger.is_clean or (self._listener is not None and now - self._idle_since <= _IDLE_S):
            return False  # without a listener, a successor serves whoever asks next
        self._part_from_sessions()
        return self._ledger.is_clean

    def _sessions(self) -> list[Link]:
        return [link for link in self._sockets.links.values() if not link.reports]

    def _part_from_sessions(self) -> None:
        """Close their links, so that each turns to a successor; what was under way is still heard."""
        links = self._sessions()
        for link in links:
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_RD)
        for link in links:
            self._receive(link, parting=True)
        self._ledger.flush()  # what the successor is told of next must find it written
        for link in links:
            link.moved_on = True
            self._close_link(link)

    # --- control connections ---

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            # No descriptor left: the next tick tries again, when workers may have ended.
            self._sockets.epoll.unregister(self._listener.fileno())
            self._deaf = True
            return
        self._has_had_no_link = False
        self._sockets.add_link(connection)

    def _receive(self, link: Link, *, parting: bool = False) -> None:
        """Take all messages of a link; garbage or its end closes it."""
        while not link.closed:
            try:
                received = messages.receive(link.connection)
            except BlockingIOError:
                return
            except messages.DescriptorsLostError:
                self._sockets.send(link, [messages.NO_DESCRIPTOR])
                self._close_link(link)
                return
            except (OSError, messages.ProtocolError):
                self._close_link(link)
                return
            if received is None:
                if not parting:
                    self._close_link(link)
                return
            self._dispatch(link, received)

    def _dispatch(self, link: Link, received: messages.Received) -> None:
        kind, *arguments = received.message
        descriptors = list(received.descriptors)
        link.may_rest = kind in _NEEDS_NO_ANSWER
        self._idle_since = time.monotonic()
        try:
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise messages.ProtocolError(f"unknown kind {kind!r}")
            if kind in (messages.JOB, messages.DEFER):
                handler(link, descriptors, *arguments)
            else:
                handler(link, *arguments)
        except _NO_MESSAGE_OF_OURS as error:
            # Whoever sent it gets no further hearing.
            self._log(f"pg_background: no message was expected like that from process {link.pid}: {error!r}")
            self._close_link(link)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _close_link(self, link: Link) -> None:
        """A session has gone: its idle workers end, its running ones are read to their ends."""
        if link.closed:
            return
        link.closed = True
        for request in list(link.waiting):
            self._questions.on_forget(link, request)
        self._sockets.remove_link(link)
        self._reports.remove(link)
        for pid in list(link.channels):
            channel = self._sockets.channels.get(pid)
            if channel is None or channel.link is not link:
                continue
            job = channel.job
            if channel.queue is not None and channel.queue.is_busy:
                channel.link = None
            elif link.moved_on:
                self._forget(channel)
            elif job is None or not job.running:
                self._sockets.close_channel(channel)
            elif channel.writing:
                self._end(job, never_ran())
                self._sockets.close_channel(channel)
            else:
                channel.link = None
                if not channel.drains:
                    self._sockets.drain(channel)
                    self._sockets.terminate_after_job(channel)

    def _forget(self, channel: Channel) -> None:
        """Another supervisor has this worker: nothing more is to be written about it here."""
        job = channel.job
        if job is not None and job.running:
            self._jobs.pop(job.row[KEY], None)
            self._ledger.forget(job.row[KEY])
        self._sockets.close_channel(channel)

    def _on_hello(self, link: Link, digest: str) -> None:
        if digest == self._digest and self._listener is not None:
            self._sockets.send(link, [messages.WELCOME])
            return
        self._make_room()
        self._sockets.send(link, [messages.OTHER_RUNTIME])
        self._close_link(link)

    def _on_moved_on(self, link: Link) -> None:
        """The session waits for the end of this link: only then does its new supervisor touch the workers."""
        self._ledger.flush()
        link.moved_on = True
        self._close_link(link)

    # --- jobs ---

    def _on_job(
        self,
        link: Link,
        descriptors: list[int],
        announcement: list[Any],
        started_ns: int,
        tags_of_commit: int | None,
        extras: dict[str, Any],
    ) -> None:
        row = self._announced_row(link, announcement)
        pid, key = int(row["pid"]), int(row[KEY])
        if extras.get("again"):
            row = self._row_so_far(dict(row, consumed=extras["consumed"]))
        if self._has_already(link, pid, key):
            return
        if descriptors:
            self._sockets.adopt(link, pid, row["process_start"], descriptors.pop(0))
        channel = self._sockets.channels.get(pid)
        job = Job(row, started_ns, tags_of_commit, extras)
        if channel is None:
            self._refuse(link, job)
            return
        if not job.running:
            self._keep_ended(channel, link, job, read_here=bool(extras.get("unknown_position")))
            return
        self._jobs[key] = job
        channel.previous, channel.job = channel.job, job
        channel.writing = bool(extras.get("writing"))
        channel.answer = wire.Answer()
        channel.answers_left = 1 + job.groups_after
        channel.unclean = False
        self._ledger.note(row)
        timeout_ms = extras.get("timeout_ms", 0)
        if timeout_ms:
            self._add_deadline(job, timeout_ms)
        channel.reads = row["submitted"]
        channel.queue = None
        link.may_rest = not channel.reads
        if extras.get("unknown_position"):
            self._sockets.drain(channel)
            self._sockets.terminate_after_job(channel)
        elif channel.reads:
            self._sockets.watch(channel)
        else:
            self._unwatched.add(key)

    @staticmethod
    def _announced_row(link: Link, announcement: list[Any]) -> Row:
        row = messages.Announcement(*announcement).row()
        row["launcher_pid"], row["launcher_start"] = link.pid, link.process_start
        return row

    def _on_defer(self, link: Link, descriptors: list[int], announcement: list[Any], extras: dict[str, Any]) -> None:
        packet = take_packet(descriptors, extras)
        row = self._announced_row(link, announcement)
        pid = int(row["pid"])
        if descriptors:
            self._sockets.adopt(link, pid, row["process_start"], descriptors.pop(0))
        channel, job = self._sockets.channels.get(pid), Job(row, extras["started_ns"], None, extras)
        if channel is None:
            self._refuse(link, job)
            return
        self._jobs[int(row[KEY])] = job
        self._after_commit.defer(channel, job, packet, extras)

    def _refuse(self, link: Link, job: Job) -> None:
        """A job in a connection that was given up here: what its session has sent behind this must be heard."""
        changes = lost_connection(job)
        self._jobs[job.row[KEY]] = job
        self._sockets.send(link, [messages.ENDED, job.row["pid"], job.row[KEY], changes, []])
        self._end(job, changes)

    def _keep_ended(self, channel: Channel, link: Link, job: Job, *, read_here: bool) -> None:
        """A job that is handed over again, whose end is known; a session that reads it itself keeps the connection."""
        if read_here:
            self._tell_end(link, job.row, [])
            self._sockets.close_channel(channel)
        else:
            channel.job = job

    def _has_already(self, link: Link, pid: int, key: int) -> bool:
        """Whether this job's stream is being read here: its session has only come back over another link."""
        channel = self._sockets.channels.get(pid)
        if channel is None or channel.job is None or channel.job.row[KEY] != key or not channel.job.running:
            return False
        if channel.link is not None:
            channel.link.channels.discard(pid)
        channel.link = link
        link.channels.add(pid)
        return True

    def _row_so_far(self, row: Row) -> Row:
        """A job that is handed over again: its progress, or its end, may be known already."""
        self._ledger.inherited.pop(row[KEY], None)
        job = self._jobs.get(row[KEY])
        known = job.row if job is not None else self._ledger.ask(lambda store: store.find_key(row[KEY]))
        if known is None:
            return row
        if known["state"] != "running" and known["sqlstate"] != LOST:  # not lost after all
            return dict(known)
        return dict(row, progress_pct=known.get("progress_pct"), progress_msg=known.get("progress_msg"))

    def _tell_end(self, link: Link, row: Row, clean_up: list[str | None] | None) -> None:
        """A submitted or detached job that ended before its session could hear of it."""
        changes = {name: value for name, value in row.items() if name in ENDS and value is not None}
        self._sockets.send(link, [messages.ENDED, row["pid"], row[KEY], changes, clean_up])

    def _on_writing(self, _: Link, pid: int, writing: bool) -> None:
        channel = self._sockets.channels.get(pid)
        if channel is not None:
            channel.writing = writing
            if channel.farewell_due:
                self._sockets.say_farewell(channel)

    def _on_finished(self, _: Link, key: int, changes: Row, at_ns: int) -> None:
        job = self._jobs.get(key)
        if job is None:
            self._ledger.record_end(key, changes)
            return
        channel = self._sockets.channels.get(job.row["pid"])
        if channel is not None and channel.job is job and not channel.reads:
            self._sockets.unwatch(channel)
        self._end(job, changes, at_ns / 1e9)

    def _on_detach(self, link: Link, pid: int, clean_ups: int) -> None:
        channel = self._sockets.channels.get(pid)
        if channel is None or channel.link is not link:
            return  # its backend has gone, of which the session has been told
        job = channel.job
        if channel.drains:
            return  # handed over again as a detached one
        if job is None:
            self._sockets.close_channel(channel)
        elif clean_ups:
            self._read_with_clean_up(channel, link, job, clean_ups)
        elif job.running:
            self._sockets.drain(channel)
            self._sockets.terminate_after_job(channel)
        else:
            self._tell_end(link, job.row, [])  # seen here before the session looked
            self._sockets.close_channel(channel)

    def _read_with_clean_up(self, channel: Channel, link: Link, job: Job, clean_ups: int) -> None:
        """Of this worker's output its session has read nothing, and nothing but the clean-up follows it."""
        if not job.running:
            self._tell_end(link, job.row, None)  # seen here before the session looked
        job.groups_after = clean_ups
        channel.reads = True
        channel.answers_left = 1 + clean_ups
        self._sockets.watch(channel)
        self._sockets.ready.append(channel)

    def _on_closed(self, link: Link, pid: int) -> None:
        channel = self._sockets.channels.get(pid)
        if channel is not None and channel.link is link and not channel.drains:
            if channel.job is not None and channel.job.running:
                self._end(channel.job, lost_connection(channel.job))  # announced, but it could not be sent
            self._sockets.close_channel(channel)

    def _end(self, job: Job, changes: Row, at: float | None = None) -> None:
        """A job has ended, with this outcome; a second report of the same end changes little."""
        first = job.running
        if first:
            self._reports.hear_before_end(job.row["pid"], at)
        if not first and (job.row.get("sqlstate") == LOST or changes.get("state") == "stopped"):
            job.row.update(dict.fromkeys(ENDS))  # its session knows better
        job.row.update(changes)
        if job.row.get("finished_at") is None:
            job.row["finished_at"] = timestamp()
        self._ledger.note(job.row)
        if not first:
            return
        for link, request in job.waiters:
            link.waiting.pop(request, None)
            self._sockets.send(link, [messages.REPLY, request, job.row])
        job.waiters.clear()
        self._finished.append(job.row[KEY])
        while len(self._finished) > _REMEMBERED:
            self._jobs.pop(self._finished.popleft(), None)

    # --- cancel, timeouts ---

    def _on_cancel(self, link: Link, request: int, pid: int, cookie: int, grace_ms: int | None) -> None:
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
                self._end(job, canceled_before())
        self._sockets.send(link, [messages.REPLY, request, job is not None])

    def _answer_questions(self) -> None:
        """After all that was sent before a question, by whomever, is known: a launch, or an end."""
        if not self._questions.are_asked:
            return
        for link in list(self._sockets.links.values()):
            if link.reports:
                self._reports.hear(link)
            else:
                self._receive(link)
        self._questions.answer()

    def _add_deadline(self, job: Job, timeout_ms: int) -> None:
        """A job that has been sent is to end by then."""
        heapq.heappush(self._deadlines, (job.started + timeout_ms / 1000, job.row[KEY]))

    def _fire_deadlines(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self._jobs.get(heapq.heappop(self._deadlines)[1])
            if job is None or not job.running:
                continue
            job.timed_out = True
            job.kill_at = now + _BLOCKED_S
            self._stop(job, now)

    def _stop(self, job: Job, now: float) -> None:
        """Signal a job's backend, as often as it takes; never one that works on the session's next job by now."""
        channel = self._sockets.channels.get(job.row["pid"])
        if channel is None or channel.job is not job:
            return
        if channel.link is not None:
            self._receive(channel.link)
        if not job.running or channel.job is not job or self._sockets.channels.get(channel.pid) is not channel:
            return
        self._unwatched.add(job.row[KEY])
        overdue = job.kill_at is not None and now >= job.kill_at
        if not overdue:
            channel.process.send(signal.SIGINT)
        elif self._in_transaction(channel.pid):
            # Else it has committed, and waits for the reader of its last rows.
            channel.process.send(signal.SIGTERM)

    # --- the table ---

    def _on_record(self, link: Link, row: Row) -> None:
        """A predecessor's row; or a session's, of a job that ended while there was no supervisor to tell."""
        row = {"launcher_pid": link.pid, "launcher_start": link.process_start, **row}
        job = self._jobs.get(row[KEY])
        if job is None:
            self._ledger.note({**(self._ledger.known_row(row[KEY]) or {}), **row})
            return
        self._ledger.inherited.pop(row[KEY], None)
        if row["state"] != "running":
            self._end(job, row)
        elif job.row.get("progress_pct") is None:
            job.row.update(progress_pct=row.get("progress_pct"), progress_msg=row.get("progress_msg"))
            self._ledger.note(job.row)

    def _prune(self) -> None:
        self._deadlines = [entry for entry in self._deadlines if entry[1] in self._jobs]
        heapq.heapify(self._deadlines)
        self._ledger.ask(lambda store: store.prune())
        self._sweep_markers()

    def _sweep_markers(self) -> None:
        """Where no job waits for a commit, here or with a predecessor, those whose markers are left were lost.

        A job is handed over before its transaction has committed, and so before others see its marker.
        """
        if not self._after_commit.is_waited_for() and self._ledger.is_alone():
            self._ledger.ask(lambda store: store.sweep_markers())

    # --- the end ---

    def _make_room(self) -> None:
        """Let a successor start; go on with the workers that are here until their sessions hand them over."""
        if self._listener is None:
            return
        if not self._deaf:
            self._sockets.epoll.unregister(self._listener.fileno())
        self._retire()
        for link in list(self._sockets.links.values()):
            self._sockets.send(link, [messages.MOVED])

    def _retire(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener.close()
        self._listener = None
        os.close(self._lock_fd)
