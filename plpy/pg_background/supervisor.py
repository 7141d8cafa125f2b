"""The supervisor: one backend for each database that sees every worker to its end and tells all sessions about it.

It is the only writer of the unlogged table. It holds a duplicate of every worker's socket: of workers whose session
waits or works it only looks at what has arrived; the output of submitted, detached and orphaned workers it reads and
throws away, so that they never block. Everything it knows it keeps in memory; the table is written in batches.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Callable

from . import messages
from .after_commit import AfterCommit
from .answers import Answers
from .jobs import Jobs
from .ledger import Ledger
from .outcomes import never_ran
from .questions import Questions
from .reports import Reports
from .sockets import Sockets
from .stops import Stops
from .store import KEY, Store
from .supervised import Heard, Link

_TICK_S = 0.05  # jobs that were not over by then are watched; signals are repeated
_SLICE_S = 0.1  # interrupts are handled at least so often
_GIVES_WAY_S = 0.005  # in each turn: deadlines and others' questions wait for its end
_FIRST_LINK_S = 2.0
# Who reads the view may have a snapshot of the table that is older than the last rows written: that a job without a
# backend still has a supervisor tells the reader that it is not lost.
_LINGER_S = 0.25
_IDLE_S = 60.0  # with nothing to do it ends after this
_PRUNE_S = 60.0
# A busy one makes room after this, or so many rows: its statistics reach autovacuum only at its end.
_SUCCESSION_S, _SUCCESSION_ROWS = 600.0, 50_000
_LOST_S = 0.2  # rows of a predecessor are looked after so often
_MAX_EVENTS = 1 << 16
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
        handle_interrupts: Callable[[], int],
        in_transaction: Callable[[int], bool],
        log: Callable[[str], object],
    ) -> None:
        self._ledger = Ledger(store, path, self._make_room)
        self._listener: socket.socket | None = listener
        self._lock_fd = lock_fd
        self._path = path
        self._digest = digest
        self._handle_interrupts = handle_interrupts
        self._log = log
        self._sockets = Sockets(self._close_link)
        self._reports = Reports(self._sockets, self._ledger, self._receive, self._close_link)
        self._jobs = Jobs(self._sockets, self._ledger, self._reports)
        self._questions = Questions(self._sockets, self._ledger, self._reports, self._jobs)
        self._stops = Stops(self._sockets, self._jobs, self._questions, self._receive, in_transaction)
        self._after_commit = AfterCommit(self._sockets, self._ledger, self._jobs)
        self._answers = Answers(self._sockets, self._ledger, self._jobs, self._after_commit, self._receive)
        now = time.monotonic()
        self._tick_at = now
        self._prune_at = now + _PRUNE_S
        self._lost_at = now
        self._idle_since = now
        self._deaf = False  # the listener is not polled: no descriptor was left for a connection
        self._born = now
        self._gives_way_until = now
        self._has_had_no_link = True
        self._handlers: dict[str, Callable[..., None]] = {
            messages.HELLO: self._on_hello,
            messages.JOB: self._jobs.on_job,
            messages.DEFER: self._after_commit.on_defer,
            messages.FINISHED: self._jobs.on_finished,
            messages.DETACH: self._jobs.on_detach,
            messages.CLOSED: self._jobs.on_closed,
            messages.WRITING: self._jobs.on_writing,
            messages.MOVED_ON: self._on_moved_on,
            messages.FIND: self._questions.on_find,
            messages.WAIT: self._questions.on_wait,
            messages.FORGET: self._questions.on_forget,
            messages.WAITS_FOR: self._questions.on_waits_for,
            messages.CANCEL: self._stops.on_cancel,
            messages.AM_I_WORKER: self._questions.on_am_i_worker,
            messages.PROGRESS: lambda link, *report: self._reports.note(link.pid, *report),
            messages.RECORD: self._jobs.on_record,
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
            events = self._sockets.epoll.poll(self._poll_timeout(), _MAX_EVENTS)
            self._gives_way_until = time.monotonic() + _GIVES_WAY_S
            self._serve(events)
            now = time.monotonic()
            self._answers.read_ready()
            self._reports.hear_unheard()
            self._answer_questions()
            self._stops.fire_deadlines(now)
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
        self._ledger.finish(lambda: self._handle_interrupts() < 2)

    def _is_wanted(self) -> bool:
        """False when this backend must end.

        Terminated once, it makes room, parts from the sessions of which it reads nothing, and reads the others' jobs
        to their ends, unless they take them to a successor first. Terminated again, it parts from all, and stays only
        for jobs that wait for a commit: nobody else has these. The server's shutdown ends all workers, and so waits
        for none of this.
        """
        terminations = self._handle_interrupts()
        if not terminations:
            return True
        self._make_room()
        again = terminations > 1
        leaving = [link for link in self._sessions() if again or not self._is_read_here(link.channels)]
        if again:
            self._answers.end_drained()
        if leaving:
            self._part_from(leaving)
        return self._after_commit.is_waited_for() if again else self._is_read_here(self._sockets.channels)

    def _is_read_here(self, pids: Iterable[int]) -> bool:
        """Whether this backend is to see the ends of jobs of these workers."""
        channels = map(self._sockets.channels.get, pids)
        return any(channel is not None and channel.is_read_here for channel in channels)

    def _poll_timeout(self) -> float:
        if self._sockets.ready or self._questions.are_asked or self._reports.is_behind:
            return 0
        now = time.monotonic()
        wake_at = now + _SLICE_S
        wake_at = self._ledger.next_flush(wake_at)
        if self._jobs.unwatched:
            wake_at = min(wake_at, self._tick_at)
        if self._sockets.resting:
            wake_at = min(wake_at, self._sockets.wake_at)
        wake_at = self._jobs.next_deadline(wake_at)
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
            self._sockets.rest_reporter(link)
        for descriptor, _ in events:
            channel = self._sockets.channel_of_fd.get(descriptor)
            if channel is not None:
                self._sockets.ready.append(channel)

    def _tick(self, now: float) -> None:
        self._tick_at = now + _TICK_S
        self._jobs.watch_unwatched()
        self._stops.repeat(now)
        for channel in list(self._sockets.channels.values()):
            if channel.farewell_due:
                self._sockets.say_farewell(channel)
        if self._deaf and self._listener is not None:
            self._deaf = False
            self._sockets.epoll.register(self._listener.fileno(), select.EPOLLIN)
        if now >= self._lost_at:
            self._lost_at = now + _LOST_S
            self._questions.ask_again()
            if not self._ledger.has_inherited:
                self._ledger.inherit(self._jobs.by_key)
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
        self._part_from(self._sessions())
        return self._ledger.is_clean

    def _sessions(self) -> list[Link]:
        return [link for link in self._sockets.links.values() if not link.reports]

    def _part_from(self, links: Sequence[Link]) -> None:
        """Close their links, so that each turns to a successor; what was under way is still heard."""
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
        """Take all messages of a link that have come by now; garbage or its end closes it."""
        heard = Heard.NOTHING if link.closed else link.read_messages(self._give_way)
        while link.inbox:
            self._dispatch(link, link.inbox.popleft())
            self._give_way()
        if heard is Heard.WITHOUT_DESCRIPTORS:
            self._sockets.send(link, [messages.NO_DESCRIPTOR])
            link.lives_on = True
        if heard in (Heard.WITHOUT_DESCRIPTORS, Heard.GARBAGE) or (heard is Heard.END and not parting):
            self._close_link(link)

    def _give_way(self) -> None:
        """Let sessions at work, and their workers, have the processor, unless the next turn would have to wait."""
        if time.monotonic() < self._gives_way_until:
            os.sched_yield()

    def _dispatch(self, link: Link, received: messages.Received) -> None:
        kind, *arguments = received.message
        descriptors = list(received.descriptors)
        link.may_rest = kind in _NEEDS_NO_ANSWER
        self._idle_since = time.monotonic()
        try:
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise messages.ProtocolError(f"unknown kind {kind!r}")
            if kind == messages.JOB and link.inbox and not descriptors:
                following = link.inbox[0].message
                if self._jobs.took_whole(link, following, *arguments):
                    link.inbox.popleft()
                    return
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
        """A session has gone: its idle workers end, its running ones are read to their ends.

        One that lives on reads what it has launched, and hands that over again.
        """
        if link.closed:
            return
        link.closed = True
        link.drop_unheard()
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
            elif link.moved_on or (link.lives_on and not channel.reads and not channel.drains):
                self._jobs.forget(channel)
            elif job is None or not job.running:
                self._sockets.close_channel(channel)
            elif channel.writing:
                self._jobs.end(job, never_ran())
                self._sockets.close_channel(channel)
            else:
                channel.link = None
                if not channel.drains:
                    self._sockets.drain(channel)
                    self._sockets.terminate_after_job(channel)

    def _on_hello(self, link: Link, digest: str) -> None:
        if digest == self._digest and self._listener is not None:
            self._sockets.send(link, [messages.WELCOME])
            return
        self._make_room()
        self._sockets.send(link, [messages.OTHER_RUNTIME])
        self._close_link(link)

    def _on_moved_on(self, link: Link) -> None:
        """The session waits for the end of this link: only then does its new supervisor touch the workers."""
        self._answers.end_drained()
        self._ledger.flush()
        link.moved_on = True
        self._close_link(link)

    # --- questions ---

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

    # --- the table ---

    def _prune(self) -> None:
        self._jobs.prune_deadlines()
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
