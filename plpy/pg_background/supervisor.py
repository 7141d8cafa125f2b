"""The supervisor: one backend for each database that sees every worker to its end and tells all sessions about it.

It is the only writer of the unlogged table. It holds a duplicate of every worker's socket: of workers whose session
waits or works it only looks at what has arrived; the output of submitted, detached and orphaned workers it reads and
throws away, so that they never block. Everything it knows it keeps in memory; the table is written in batches.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import select
import signal
import socket
import time
from collections import deque
from typing import Any, Callable

from . import messages, wire
from .deferral import Deferred, Queue, packet_from
from .ledger import Ledger
from .outcomes import (
    LOST,
    canceled_before,
    drained_answer,
    lost_connection,
    never_ran,
    outcome_of,
    rolled_back,
    timestamp,
)
from .store import ENDS, KEY, Row, Store
from .supervised import WINDOW_BYTES, Channel, Job, Link

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
# A worker that a young supervisor has not heard of: its session may not have come over yet, or its row not be written.
_HAND_OVER_S = 2.0
_LATE_ROW_S = 0.5  # a job that is not known is looked for so long, while a predecessor may send its row
_LOST_S = 0.2  # rows of a predecessor are looked after so often
_MAX_EVENTS = 1 << 16
# Reports of workers, and what sessions tell of launched jobs, are read so often: to wake this process for each would
# cost the sender more than to send it.
_REST_S = 0.002
_REPORTS_AT_ONCE = 1000
_MAX_WINDOW_BYTES = 1 << 24
_TAIL_BYTES = 1 << 17
_REMEMBERED = 2000  # finished jobs that questions find in memory
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
        self._epoll = select.epoll()
        self._links: dict[int, Link] = {}
        self._channels: dict[int, Channel] = {}  # by the worker's pid
        self._channel_of_fd: dict[int, Channel] = {}
        self._ready: deque[Channel] = deque()
        self._jobs: dict[int, Job] = {}  # by key
        self._finished: deque[int] = deque()
        self._reporters: dict[int, Link] = {}  # by pid
        self._unheard: set[Link] = set()  # those whose reports came before it was known of which job
        self._resting: list[Link] = []  # those that are not polled for a moment
        self._wake_at = 0.0  # when they are again
        self._questions: list[Callable[[], None]] = []
        self._asked_too_early: list[Callable[[], None]] = []  # they are asked again
        self._deadlines: list[tuple[float, int]] = []
        now = time.monotonic()
        self._tick_at = now
        self._prune_at = now + _PRUNE_S
        self._lost_at = now
        self._idle_since = now
        self._deaf = False  # the listener is not polled: no descriptor was left for a connection
        self._born = now
        self._has_had_no_link = True
        self._alone = False  # no predecessor is left that could send what it cannot write
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
            messages.FIND: self._on_find,
            messages.WAIT: self._on_wait,
            messages.FORGET: self._on_forget,
            messages.WAITS_FOR: self._on_waits_for,
            messages.CANCEL: self._on_cancel,
            messages.AM_I_WORKER: self._on_am_i_worker,
            messages.PROGRESS: self._on_progress,
            messages.RECORD: self._on_record,
        }
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    # --- the loop ---

    def run(self) -> None:
        """Serve until there is nothing left to do, or until the server wants this backend to end."""
        self._ledger.inherit()
        self._sweep_markers()
        parent = os.getppid()
        while self._is_wanted():
            if os.getppid() != parent:
                return  # the postmaster is gone, and so is everybody else
            self._serve(self._epoll.poll(self._poll_timeout(), _MAX_EVENTS))
            now = time.monotonic()
            self._read_ready_channels()
            while self._unheard:
                self._hear_reports(self._unheard.pop())
            self._answer_questions()
            self._fire_deadlines(now)
            if now >= self._tick_at:
                self._tick(now)
            if self._resting and now >= self._wake_at:
                self._end_rest(now)
            self._ledger.flush_if_due(now)
            if self._is_done(now) and not self._epoll.poll(0):
                break
        self._end_drained()
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
            self._end_drained()
            self._ledger.flush()  # a successor asks the table what has become of a job
            self._part_from_sessions()
        return self._waits_for_commits()

    def _waits_for_commits(self) -> bool:
        """Whether jobs wait for a commit, of which the next one must find this process: they keep their order."""
        return any(channel.queue is not None and channel.queue.is_busy for channel in self._channels.values())

    def _poll_timeout(self) -> float:
        if self._ready or self._questions or self._unheard:
            return 0
        now = time.monotonic()
        wake_at = now + _SLICE_S
        wake_at = self._ledger.next_flush(wake_at)
        if self._unwatched:
            wake_at = min(wake_at, self._tick_at)
        if self._resting:
            wake_at = min(wake_at, self._wake_at)
        if self._deadlines:
            wake_at = min(wake_at, self._deadlines[0][0])
        return max(0.0, wake_at - now)

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Control messages first: what they tell about a worker must be known before its socket is read.

        And those of sessions before those of workers: a job is announced before it can report progress.
        """
        reporting = []
        for descriptor, event in events:
            link = self._links.get(descriptor)
            if link is not None and link.reports:
                reporting.append(link)
            elif link is not None:
                if event & select.EPOLLOUT:
                    self._send_outbox(link)
                if event & ~select.EPOLLOUT:
                    self._receive(link)
                    self._rest(link)
            elif self._listener is not None and descriptor == self._listener.fileno():
                self._accept()
        for link in reporting:
            self._hear_reports(link)
            self._resting.append(link)
        for descriptor, _ in events:
            channel = self._channel_of_fd.get(descriptor)
            if channel is not None:
                self._ready.append(channel)

    def _rest(self, link: Link) -> None:
        """Leave a session alone for a moment that has told of launched jobs only, which wait for no answer."""
        if link.may_rest and not link.closed and not link.outbox:
            self._epoll.modify(link.connection.fileno(), 0)
            self._resting.append(link)
        link.may_rest = False

    def _end_rest(self, now: float) -> None:
        """Reporters are heard once, then rest until the next time."""
        self._wake_at = now + _REST_S
        for link in self._resting:
            if not link.closed:
                once = select.EPOLLONESHOT if link.reports else 0
                self._epoll.modify(link.connection.fileno(), select.EPOLLIN | once)
        self._resting.clear()

    def _hear_reports(self, link: Link, until: float | None = None) -> None:
        """Of several reports of one job the last one counts.

        until: when the current job had ended; what was reported later is for a job that is to be announced first.
        """
        packets, gone = messages.receive_all(link.connection, _REPORTS_AT_ONCE)
        link.packets += packets
        channel = self._channels.get(link.pid)
        if until is None and channel is not None and channel.link is not None:
            self._receive(channel.link)  # a job was announced before it could report
            channel = self._channels.get(link.pid)
        packets, link.packets = link.packets, []
        border = until
        if border is None:
            border = channel.job.started if channel is not None and channel.job is not None else 0.0
        try:
            reports = [json.loads(packet) for packet in (packets[:1] + packets[-1:])]
            if reports and (reports[0][3] < border) != (reports[-1][3] < border):
                reports = [json.loads(packet) for packet in packets]
            for kind, *arguments in reports:
                if kind != messages.PROGRESS:
                    raise messages.ProtocolError(kind)
                if until is None or arguments[2] <= until:
                    self._note_progress(link.pid, *arguments)
            if until is not None and reports and reports[-1][3] > until:
                link.packets = [packet for packet in packets if json.loads(packet)[3] > until]
                self._unheard.add(link)
        except (messages.ProtocolError, TypeError, ValueError, IndexError, RecursionError):
            gone = True
        if gone:
            self._close_link(link)

    def _tick(self, now: float) -> None:
        self._tick_at = now + _TICK_S
        for key in self._unwatched:
            job = self._jobs.get(key)
            channel = self._channels.get(job.row["pid"]) if job is not None and job.running else None
            if channel is not None and channel.job is job:
                self._watch(channel)
        self._unwatched.clear()
        for channel in list(self._channels.values()):
            job = channel.job
            if job is not None and job.running and (job.canceled or job.timed_out):
                self._stop(job, now)
            if channel.farewell_due:
                self._say_farewell(channel)
        if self._deaf and self._listener is not None:
            self._deaf = False
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        if now >= self._lost_at:
            self._lost_at = now + _LOST_S
            self._questions += self._asked_too_early
            self._asked_too_early.clear()
            if self._ledger.inherited:
                jobs = [(pid, channel.job) for pid, channel in self._channels.items()]
                self._ledger.look_after_inherited((pid, job.row[KEY]) for pid, job in jobs if job is not None)
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_S
            self._prune()
        due = now - self._born > _SUCCESSION_S or self._ledger.written > _SUCCESSION_ROWS
        if due and self._links and not self._waits_for_commits():
            self._make_room()

    def _is_done(self, now: float) -> bool:
        if any(channel.works for channel in self._channels.values()):
            self._idle_since = now
            return False
        if not self._links and now - self._born < _FIRST_LINK_S and self._has_had_no_link:
            return False  # who started it is busy with its first worker
        if not self._links and now < self._ledger.written_at + _LINGER_S:
            return False
        if not self._links:
            return self._ledger.may_be_left
        if not self._ledger.is_clean or (self._listener is not None and now - self._idle_since <= _IDLE_S):
            return False  # without a listener, a successor serves whoever asks next
        self._part_from_sessions()
        return self._ledger.is_clean

    def _sessions(self) -> list[Link]:
        return [link for link in self._links.values() if not link.reports]

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
            self._epoll.unregister(self._listener.fileno())
            self._deaf = True
            return
        connection.setblocking(False)
        self._has_had_no_link = False
        self._links[connection.fileno()] = Link(connection)
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _receive(self, link: Link, *, parting: bool = False) -> None:
        """Take all messages of a link; garbage or its end closes it."""
        while not link.closed:
            try:
                received = messages.receive(link.connection)
            except BlockingIOError:
                return
            except messages.DescriptorsLostError:
                self._send(link, [messages.NO_DESCRIPTOR])
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
        except (messages.ProtocolError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            # No message of ours: whoever sent it gets no further hearing.
            self._log(f"pg_background: no message was expected like that from process {link.pid}: {error!r}")
            self._close_link(link)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _send(self, link: Link, message: list[Any]) -> None:
        if link.closed:
            return
        link.outbox.append(message)
        self._send_outbox(link)

    def _send_outbox(self, link: Link) -> None:
        try:
            while link.outbox:
                messages.send(link.connection, link.outbox[0])
                link.outbox.popleft()
        except BlockingIOError:
            self._epoll.modify(link.connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except OSError:
            self._close_link(link)
        else:
            self._epoll.modify(link.connection.fileno(), select.EPOLLIN)

    def _close_link(self, link: Link) -> None:
        """A session has gone: its idle workers end, its running ones are read to their ends."""
        if link.closed:
            return
        link.closed = True
        for request in list(link.waiting):
            self._on_forget(link, request)
        descriptor = link.connection.fileno()
        self._epoll.unregister(descriptor)
        del self._links[descriptor]
        if self._reporters.get(link.pid) is link:
            del self._reporters[link.pid]
        link.connection.close()
        for pid in list(link.channels):
            channel = self._channels.get(pid)
            if channel is None or channel.link is not link:
                continue
            job = channel.job
            if channel.queue is not None and channel.queue.is_busy:
                channel.link = None
            elif link.moved_on:
                self._forget(channel)
            elif job is None or not job.running:
                self._close_channel(channel)
            elif channel.writing:
                self._end(job, never_ran())
                self._close_channel(channel)
            else:
                channel.link = None
                if not channel.drains:
                    self._drain(channel)
                    self._terminate_after_job(channel)

    def _forget(self, channel: Channel) -> None:
        """Another supervisor has this worker: nothing more is to be written about it here."""
        job = channel.job
        if job is not None and job.running:
            self._jobs.pop(job.row[KEY], None)
            self._ledger.forget(job.row[KEY])
        self._close_channel(channel)

    def _on_hello(self, link: Link, digest: str) -> None:
        if digest == self._digest and self._listener is not None:
            self._send(link, [messages.WELCOME])
            return
        self._make_room()
        self._send(link, [messages.OTHER_RUNTIME])
        self._close_link(link)

    def _on_moved_on(self, link: Link) -> None:
        """The session waits for the end of this link: only then does its new supervisor touch the workers."""
        self._ledger.flush()
        link.moved_on = True
        self._close_link(link)

    # --- jobs ---

    def _on_job(self, link: Link, descriptors: list[int], row: Row, extras: dict[str, Any]) -> None:
        row = dict(row, launcher_pid=link.pid, launcher_start=link.process_start)
        pid, key = int(row["pid"]), int(row[KEY])
        if extras.get("again"):
            row = self._row_so_far(row)
        if self._has_already(link, pid, key):
            return
        if descriptors:
            self._adopt(link, pid, row["process_start"], descriptors.pop(0))
        channel = self._channels.get(pid)
        job = Job(row, extras)
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
            heapq.heappush(self._deadlines, (job.started + timeout_ms / 1000, key))
        channel.reads = row["submitted"]
        channel.queue = None
        link.may_rest = not channel.reads
        if extras.get("unknown_position"):
            self._drain(channel)
            self._terminate_after_job(channel)
        elif channel.reads:
            self._watch(channel)
        else:
            self._unwatched.add(key)

    def _refuse(self, link: Link, job: Job) -> None:
        """A job in a connection that was given up here: what its session has sent behind this must be heard."""
        changes = lost_connection(job)
        self._jobs[job.row[KEY]] = job
        self._send(link, [messages.ENDED, job.row["pid"], job.row[KEY], changes, []])
        self._end(job, changes)

    def _keep_ended(self, channel: Channel, link: Link, job: Job, *, read_here: bool) -> None:
        """A job that is handed over again, whose end is known; a session that reads it itself keeps the connection."""
        if read_here:
            self._tell_end(link, job.row, [])
            self._close_channel(channel)
        else:
            channel.job = job

    def _has_already(self, link: Link, pid: int, key: int) -> bool:
        """Whether this job's stream is being read here: its session has only come back over another link."""
        channel = self._channels.get(pid)
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
        self._send(link, [messages.ENDED, row["pid"], row[KEY], changes, clean_up])

    def _adopt(self, link: Link, pid: int, start: int | None, descriptor: int) -> None:
        old = self._channels.get(pid)
        if old is not None:
            self._close_channel(old)
        connection = socket.socket(fileno=descriptor)
        self._channels[pid] = channel = Channel(pid, start, connection, link)
        self._channel_of_fd[connection.fileno()] = channel
        link.channels.add(pid)

    def _watch(self, channel: Channel) -> None:
        """Be told of each arrival once; what lies unread for the session must not wake us again."""
        events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
        if channel.queue is not None and channel.queue.outgoing:
            events |= select.EPOLLOUT
        if channel.watched:
            self._epoll.modify(channel.connection.fileno(), events)
        else:
            self._epoll.register(channel.connection.fileno(), events)
            channel.watched = True

    def _unwatch(self, channel: Channel) -> None:
        if channel.watched:
            self._epoll.unregister(channel.connection.fileno())
            channel.watched = False

    def _drain(self, channel: Channel) -> None:
        channel.drains = True
        self._watch(channel)
        self._ready.append(channel)

    def _terminate_after_job(self, channel: Channel) -> None:
        """Queue the end of the connection behind the job."""
        channel.farewell_due = True
        self._say_farewell(channel)

    def _say_farewell(self, channel: Channel) -> None:
        """The next tick tries again where the job itself has not been sent whole, or has not been read."""
        if channel.writing:
            return
        try:
            channel.connection.send(wire.TERMINATE, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            pass  # the worker has gone: reading finds that out
        channel.farewell_due = False

    def _on_writing(self, _: Link, pid: int, writing: bool) -> None:
        channel = self._channels.get(pid)
        if channel is not None:
            channel.writing = writing
            if channel.farewell_due:
                self._say_farewell(channel)

    def _on_finished(self, _: Link, key: int, changes: Row, at: float) -> None:
        job = self._jobs.get(key)
        if job is None:
            self._ledger.record_end(key, changes)
            return
        channel = self._channels.get(job.row["pid"])
        if channel is not None and channel.job is job and not channel.reads:
            self._unwatch(channel)
        self._end(job, changes, at)

    def _on_detach(self, link: Link, pid: int, clean_ups: int) -> None:
        channel = self._channels.get(pid)
        if channel is None or channel.link is not link:
            return  # its backend has gone, of which the session has been told
        job = channel.job
        if channel.drains:
            return  # handed over again as a detached one
        if job is None:
            self._close_channel(channel)
        elif clean_ups:
            self._read_with_clean_up(channel, link, job, clean_ups)
        elif job.running:
            self._drain(channel)
            self._terminate_after_job(channel)
        else:
            self._tell_end(link, job.row, [])  # seen here before the session looked
            self._close_channel(channel)

    def _read_with_clean_up(self, channel: Channel, link: Link, job: Job, clean_ups: int) -> None:
        """Of this worker's output its session has read nothing, and nothing but the clean-up follows it."""
        if not job.running:
            self._tell_end(link, job.row, None)  # seen here before the session looked
        job.groups_after = clean_ups
        channel.reads = True
        channel.answers_left = 1 + clean_ups
        self._watch(channel)
        self._ready.append(channel)

    def _on_closed(self, link: Link, pid: int) -> None:
        channel = self._channels.get(pid)
        if channel is not None and channel.link is link and not channel.drains:
            if channel.job is not None and channel.job.running:
                self._end(channel.job, lost_connection(channel.job))  # announced, but it could not be sent
            self._close_channel(channel)

    def _close_channel(self, channel: Channel) -> None:
        self._unwatch(channel)
        self._channels.pop(channel.pid, None)
        self._channel_of_fd.pop(channel.connection.fileno(), None)
        if channel.link is not None:
            channel.link.channels.discard(channel.pid)
        channel.connection.close()
        channel.process.close()

    def _end(self, job: Job, changes: Row, at: float | None = None) -> None:
        """A job has ended, with this outcome; a second report of the same end changes little."""
        first = job.running
        reporter = self._reporters.get(job.row["pid"])
        if first and reporter is not None:
            self._hear_reports(reporter, time.monotonic() if at is None else at)
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
            self._send(link, [messages.REPLY, request, job.row])
        job.waiters.clear()
        self._finished.append(job.row[KEY])
        while len(self._finished) > _REMEMBERED:
            self._jobs.pop(self._finished.popleft(), None)

    # --- worker sockets ---

    def _read_ready_channels(self) -> None:
        for _ in range(len(self._ready)):
            channel = self._ready.popleft()
            if self._channels.get(channel.pid) is not channel or channel.is_between_jobs:
                continue
            if channel.drains:
                again = self._read_to_the_end(channel)
            elif channel.reads:
                again = self._read_answers(channel)
            else:
                again = self._peek(channel)
            if again:
                self._ready.append(channel)

    def _peek(self, channel: Channel) -> bool:
        """See whether a job has ended whose session has not looked yet."""
        job = channel.job
        if job is None or not job.running:
            return False
        looked_at = time.monotonic()
        window = wire.receive_from(channel.connection, _TAIL_BYTES * 2, wire.PEEK)
        if window is None:
            return False
        if channel.link is not None:
            self._receive(
                channel.link
            )  # its session may have read that job's answer, sent the next job, or detached it
            if channel.job is not job or not job.running or channel.reads or channel.drains:
                return False
        ended = window.endswith(wire.READY_FOR_QUERY) or wire.hung_up(channel.connection)
        answer = wire.last_answer(window, 0, job.tags_after, job.tags_of_commit) if ended else None
        if answer is not None:
            self._end(job, self._outcome_of(job, answer), looked_at)
        elif wire.hung_up(channel.connection):
            self._end(job, lost_connection(job))
        return False

    def _read_answers(self, channel: Channel) -> bool:
        """Read a submitted job's answer, and those of the clean-up queued behind it."""
        self._send_outgoing(channel)
        if channel.skip:
            thrown = wire.receive_from(channel.connection, min(channel.skip, _MAX_WINDOW_BYTES), 0)
            if not thrown:
                return self._lost(channel, thrown)
            channel.skip -= len(thrown)
            return True
        window = wire.receive_from(channel.connection, channel.window, wire.PEEK)
        if not window:
            return self._lost(channel, window)
        position = wire.parse(window, channel.answer)
        complete, is_outcome = channel.answer.complete, self._is_outcome(channel)
        if complete and is_outcome:
            self._answered(channel)  # told before it is taken: were this process to end here, it would be lost
        if position.consumed:
            wire.receive_from(channel.connection, position.consumed, 0)
            channel.window = WINDOW_BYTES
        channel.skip = position.skip
        if complete and not is_outcome:
            self._answered(channel)  # taken before it is told: its session sees whether something lies unread
        if not position.consumed and len(window) == channel.window and channel.window < _MAX_WINDOW_BYTES:
            channel.window *= 2
            return True
        if not position.consumed and not position.skip and wire.has_no_more(channel.connection, len(window)):
            # The last word of a backend that was terminated: no end of its answer follows.
            return self._lost(channel, b"")
        return bool(position.consumed) and channel.answers_left > 0

    @staticmethod
    def _is_outcome(channel: Channel) -> bool:
        """Whether the group that is being read is a job's answer: no verdict on it, nor its clean-up's."""
        if channel.queue is not None and channel.queue.asked is not None:
            return False
        return channel.job is not None and channel.answers_left == channel.job.groups_after + 1

    def _answered(self, channel: Channel) -> None:
        """A group is complete."""
        answer, channel.answer = channel.answer, wire.Answer()
        if channel.queue is not None and channel.queue.asked is not None:
            self._judge(channel, channel.queue, channel.queue.asked, answer)
            return
        channel.answers_left -= 1
        job, link = channel.job, channel.link
        assert job is not None
        if channel.answers_left == job.groups_after:
            if job.running:
                self._tell_ended(channel, job, self._outcome_of(job, answer), None)
            return
        channel.unclean = channel.unclean or answer.error is not None
        if channel.answers_left:
            return
        row = [] if channel.unclean or answer.row is None else self._texts(answer.row)
        if link is not None:
            self._unwatch(channel)
            self._send(link, [messages.ENDED, channel.pid, job.row[KEY], None, row])
        if channel.queue is not None:
            channel.queue.runs = False
            if row[: len(channel.queue.users)] == channel.queue.users:
                self._ask_next(channel, channel.queue)
            else:
                self._give_up(channel, channel.queue)

    def _tell_ended(self, channel: Channel, job: Job, changes: Row, clean_up: list[str | None] | None) -> None:
        """The worker's own session first: what others do upon the end must find it informed."""
        if channel.link is not None:
            self._send(channel.link, [messages.ENDED, channel.pid, job.row[KEY], changes, clean_up])
        self._end(job, changes)

    def _lost(self, channel: Channel, received: bytes | None) -> bool:
        """Nothing to read: not yet (b"" stands for the end of the connection)."""
        if received is None:
            return False
        job = channel.job
        if job is not None and job.running:
            answer = channel.answer
            changes = self._outcome_of(job, answer) if answer.error else lost_connection(job)
            self._tell_ended(channel, job, changes, [])
        elif job is not None and channel.link is not None and channel.answers_left:
            self._send(channel.link, [messages.ENDED, channel.pid, job.row[KEY], None, []])  # in its clean-up
        if channel.queue is not None:
            for item in channel.queue.unstarted():
                self._end_unsent(channel, item.job, lost_connection(item.job))
        self._close_channel(channel)
        return False

    # --- jobs that wait for a commit ---

    def _on_defer(self, link: Link, descriptors: list[int], row: Row, extras: dict[str, Any]) -> None:
        """The last descriptor is the packet's file."""
        file = descriptors.pop()
        try:
            packet = packet_from(file, extras)
        finally:
            os.close(file)
        row = dict(row, launcher_pid=link.pid, launcher_start=link.process_start)
        pid = int(row["pid"])
        if descriptors:
            self._adopt(link, pid, row["process_start"], descriptors.pop(0))
        channel, job = self._channels.get(pid), Job(row, extras)
        if channel is None:
            self._refuse(link, job)
            return
        channel.reads = True
        queue = channel.queue = channel.queue or Queue()
        queue.users = list(extras["users"])
        self._jobs[int(row[KEY])] = job
        self._ledger.note(row)
        idle = not queue.is_busy
        queue.waiting.append(Deferred(job, packet, int(extras["timeout_ms"])))
        if idle:
            self._ask_next(channel, queue)

    def _ask_next(self, channel: Channel, queue: Queue[Job]) -> None:
        """Send the guard of the next job; after the last one a session without a launcher ends."""
        if queue.waiting:
            queue.asked = queue.waiting.popleft()
            queue.answers_left, queue.has_committed, queue.error = queue.asked.packet.guard_answers, False, None
            channel.answer, channel.answers_left = wire.Answer(), 1
            self._write(channel, queue, queue.asked.packet.guard)
        elif channel.link is None:
            self._terminate_after_job(channel)

    def _give_up(self, channel: Channel, queue: Queue[Job]) -> None:
        """An earlier job has left the session in a state that could not be undone: nothing more may run in it."""
        message = "the session of an earlier job of the same transaction could not be cleaned for this one"
        for item in queue.unstarted():
            changes = {"state": "error", "sqlstate": "55000", "error_message": message, "finished_at": timestamp()}
            self._end_unsent(channel, item.job, changes)
        self._close_channel(channel)

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
            self._start_deferred(channel, queue, item)
            return
        if queue.error is not None:
            self._end_unsent(channel, item.job, self._outcome_of(item.job, queue.error))
            self._give_up(channel, queue)
            return
        self._end_unsent(channel, item.job, rolled_back())
        self._ask_next(channel, queue)

    def _start_deferred(self, channel: Channel, queue: Queue[Job], item: Deferred[Job]) -> None:
        job = item.job
        job.started = time.monotonic()
        job.row["launched_at"] = timestamp()
        self._ledger.note(job.row)
        channel.previous, channel.job = channel.job, job
        channel.answer, channel.answers_left, channel.unclean = wire.Answer(), 1 + job.groups_after, False
        if item.timeout_ms:
            heapq.heappush(self._deadlines, (job.started + item.timeout_ms / 1000, job.row[KEY]))
        queue.runs = True
        self._write(channel, queue, item.packet.job)

    def _end_unsent(self, channel: Channel, job: Job, changes: Row) -> None:
        """A job has ended without having been sent; if it was cancelled, that is known already."""
        if channel.link is not None:
            self._send(channel.link, [messages.ENDED, channel.pid, job.row[KEY], changes, messages.NOT_RUN])
        if job.running:
            self._end(job, changes)

    def _write(self, channel: Channel, queue: Queue[Job], packet: bytes) -> None:
        queue.outgoing += packet
        self._send_outgoing(channel)
        self._watch(channel)

    def _send_outgoing(self, channel: Channel) -> None:
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

    def _waiting_job(self, channel: Channel, cookie: int) -> Job | None:
        queue = channel.queue
        jobs = [item.job for item in queue.unstarted()] if queue is not None else []
        return next((job for job in jobs if job.row["cookie"] == cookie), None)

    def _read_to_the_end(self, channel: Channel) -> bool:
        """Throw a stream away whose place in a message nobody knows; its last bytes tell the outcome."""
        received = wire.receive_from(channel.connection, WINDOW_BYTES, 0)
        if received is None:
            return False
        if received:
            channel.tail = (channel.tail + received)[-_TAIL_BYTES:]
            return True
        job = channel.job
        if job is not None and job.running:
            answer = drained_answer(channel, job)
            changes = self._outcome_of(job, answer) if answer is not None else lost_connection(job)
            self._tell_ended(channel, job, changes, [])
        self._close_channel(channel)
        return False

    def _end_drained(self) -> None:
        """Note the ends that were read off already: a successor finds the rest of these streams only."""
        for channel in self._channels.values():
            job = channel.job
            if job is not None and job.running and channel.drains:
                answer = drained_answer(channel, job)
                if answer is not None:
                    self._end(job, self._outcome_of(job, answer))

    def _outcome_of(self, job: Job, answer: wire.Answer) -> Row:
        return outcome_of(job, answer, self._ledger.decode)

    def _texts(self, row: bytes) -> list[str | None]:
        return [None if value is None else self._ledger.decode(value) for value in wire.row_values(row)]

    # --- cancel, timeouts ---

    def _on_cancel(self, link: Link, request: int, pid: int, cookie: int, grace_ms: int | None) -> None:
        self._questions.append(lambda: self._cancel(link, request, self._find(pid, cookie), grace_ms))

    def _cancel(self, link: Link, request: int, job: Job | None, grace_ms: int | None) -> None:
        if job is not None and job.running:
            job.canceled = True
            if grace_ms is not None:
                job.kill_at = time.monotonic() + grace_ms / 1000
            channel = self._channels.get(job.row["pid"])
            if channel is not None and channel.link is not None:
                self._send(channel.link, [messages.CANCELING, channel.pid, job.row[KEY], job.kill_at])
            self._stop(job, time.monotonic())
            if job.running and channel is not None and self._waiting_job(channel, job.row["cookie"]) is job:
                self._end(job, canceled_before())
        self._send(link, [messages.REPLY, request, job is not None])

    def _answer_questions(self) -> None:
        """After all that was sent before a question, by whomever, is known: a launch, or an end."""
        if not self._questions:
            return
        for link in list(self._links.values()):
            if link.reports:
                self._hear_reports(link)
            else:
                self._receive(link)
        questions, self._questions = self._questions, []
        for answer in questions:
            answer()

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
        channel = self._channels.get(job.row["pid"])
        if channel is None or channel.job is not job:
            return
        if channel.link is not None:
            self._receive(channel.link)
        if not job.running or channel.job is not job or self._channels.get(channel.pid) is not channel:
            return
        self._unwatched.add(job.row[KEY])
        overdue = job.kill_at is not None and now >= job.kill_at
        if not overdue:
            channel.process.send(signal.SIGINT)
        elif self._in_transaction(channel.pid):
            # Else it has committed, and waits for the reader of its last rows.
            channel.process.send(signal.SIGTERM)

    # --- questions ---

    def _find(self, pid: int, cookie: int) -> Job | None:
        channel = self._channels.get(pid)
        if channel is not None and channel.job is not None and channel.job.row["cookie"] == cookie:
            return channel.job
        waiting = self._waiting_job(channel, cookie) if channel is not None else None
        if waiting is not None:
            return waiting
        for key in reversed(self._finished):
            job = self._jobs.get(key)
            if job is not None and job.row["pid"] == pid and job.row["cookie"] == cookie:
                return job
        return None

    def _on_find(self, link: Link, request: int, pid: int, cookie: int) -> None:
        until = time.monotonic() + _LATE_ROW_S
        self._questions.append(lambda: self._reply_with_row(link, request, pid, cookie, until))

    def _reply_with_row(self, link: Link, request: int, pid: int, cookie: int, until: float) -> None:
        row = self._row(pid, cookie)
        if row is None and self._may_hear_more(until):
            self._asked_too_early.append(lambda: self._reply_with_row(link, request, pid, cookie, until))
            return
        self._send(link, [messages.REPLY, request, row])

    def _may_hear_more(self, until: float) -> bool:
        """Whether a predecessor may send a row that it cannot write; also once after its end, as it may lie unread."""
        if self._alone or time.monotonic() > until:
            return False
        self._alone = self._ledger.is_alone()
        return True

    def _row(self, pid: int, cookie: int) -> Row | None:
        """What is known of a handle: from memory, or from the table when it ended long ago."""
        job = self._find(pid, cookie)
        return job.row if job is not None else self._ledger.ask(lambda store: store.find(pid, cookie))

    def _on_wait(self, link: Link, request: int, pid: int, cookie: int) -> None:
        link.waiting[request] = None
        until = time.monotonic() + _LATE_ROW_S
        self._questions.append(lambda: self._wait(link, request, pid, cookie, until))

    def _wait(self, link: Link, request: int, pid: int, cookie: int, until: float) -> None:
        if request not in link.waiting:
            return  # given up meanwhile
        job = self._find(pid, cookie)
        if job is not None and job.running:
            job.waiters.append((link, request))
            link.waiting[request] = job
        else:
            row = self._row(pid, cookie)
            if row["state"] == "running" if row is not None else self._may_hear_more(until):
                # A predecessor sees it to its end, and writes that down.
                self._asked_too_early.append(lambda: self._wait(link, request, pid, cookie, until))
                return
            del link.waiting[request]
            self._send(link, [messages.REPLY, request, row])

    def _on_forget(self, link: Link, request: int) -> None:
        job = link.waiting.pop(request, None)
        if job is not None:
            job.waiters.remove((link, request))

    def _on_waits_for(self, link: Link, request: int | None, pid: int | None) -> None:
        link.waits_for = pid
        if request is not None:
            pairs = [[other.pid, other.waits_for] for other in self._links.values() if other.waits_for is not None]
            self._send(link, [messages.REPLY, request, pairs])

    def _on_am_i_worker(self, link: Link, request: int) -> None:
        until = time.monotonic() + _HAND_OVER_S
        self._questions.append(lambda: self._tell_worker(link, request, until))

    def _tell_worker(self, link: Link, request: int, until: float) -> None:
        """Whether it is one. A supervisor that has, or has just had, a predecessor is not sure at once."""
        channel = self._channels.get(link.pid)
        known = channel is not None and channel.job is not None
        known = known or self._ledger.inherited_row(link.pid) is not None or self._ledger.was_written(link.pid)
        now = time.monotonic()
        if not known and now < until and (now < self._born + _HAND_OVER_S or not self._ledger.is_alone()):
            self._asked_too_early.append(lambda: self._tell_worker(link, request, until))
            return
        link.reports = known
        self._send(link, [messages.REPLY, request, link.reports])
        if link.reports and not link.closed:
            self._reporters[link.pid] = link
            self._resting.append(link)

    def _on_progress(self, link: Link, percent: int, text: str | None, at: float) -> None:
        self._note_progress(link.pid, percent, text, at)

    def _note_progress(self, pid: int, percent: int, text: str | None, at: float) -> None:
        """A report may be read after the end of its job, even after the start of the next: `at` tells whose it is."""
        channel = self._channels.get(pid)
        job = channel.job if channel is not None else None
        if channel is not None and job is not None and at < job.started:
            job = channel.previous
        row = job.row if job is not None else self._ledger.inherited_row(pid)
        if row is not None:
            row.update(progress_pct=percent, progress_msg=text)
            self._ledger.note(row)

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
        if not self._waits_for_commits() and self._ledger.is_alone():
            self._ledger.ask(lambda store: store.sweep_markers())

    # --- the end ---

    def _make_room(self) -> None:
        """Let a successor start; go on with the workers that are here until their sessions hand them over."""
        if self._listener is None:
            return
        if not self._deaf:
            self._epoll.unregister(self._listener.fileno())
        self._retire()
        for link in list(self._links.values()):
            self._send(link, [messages.MOVED])

    def _retire(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener.close()
        self._listener = None
        os.close(self._lock_fd)
