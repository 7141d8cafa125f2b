"""The supervisor's descriptors: control connections of sessions, and duplicates of their workers' sockets."""

from __future__ import annotations

import select
import socket
from collections import deque
from typing import Any, Callable

from . import messages, wire
from .supervised import Channel, Link

# Reports of workers, and what sessions tell of launched jobs, are read so often: to wake this process for each would
# cost the sender more than to send it. A worker that reports all the time must not fill its line meanwhile.
_REPORTER_RESTS_S, _SESSION_RESTS_S = 0.002, 0.01


class Sockets:
    """What is polled, and for what."""

    def __init__(self, on_lost: Callable[[Link], None]) -> None:
        self._on_lost = on_lost  # a session has gone
        self.epoll = select.epoll()
        self.links: dict[int, Link] = {}  # by descriptor
        self.channels: dict[int, Channel] = {}  # by the worker's pid
        self.channel_of_fd: dict[int, Channel] = {}
        self.ready: deque[Channel] = deque()  # something may have arrived
        self.resting: list[Link] = []  # those that are not polled for a moment
        self._woken_at = 0.0  # when they were polled last, of time.monotonic()
        self._rest_s = _SESSION_RESTS_S

    # --- links ---

    def add_link(self, connection: socket.socket) -> None:
        """A session, or a worker that is to report, has connected."""
        connection.setblocking(False)
        self.links[connection.fileno()] = Link(connection)
        self.epoll.register(connection.fileno(), select.EPOLLIN)

    def remove_link(self, link: Link) -> None:
        """Close the connection."""
        descriptor = link.connection.fileno()
        self.epoll.unregister(descriptor)
        del self.links[descriptor]
        link.connection.close()

    def send(self, link: Link, message: list[Any]) -> None:
        """Send a message, or queue it behind those that did not fit."""
        if link.closed:
            return
        link.outbox.append(message)
        self.send_outbox(link)

    def send_outbox(self, link: Link) -> None:
        """As much as fits; an event tells when more does."""
        try:
            while link.outbox:
                messages.send(link.connection, link.outbox[0])
                link.outbox.popleft()
        except BlockingIOError:
            self.epoll.modify(link.connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except OSError:
            self._on_lost(link)
        else:
            self.epoll.modify(link.connection.fileno(), select.EPOLLIN)

    def rest(self, link: Link) -> None:
        """Leave a session alone for a moment that has told of launched jobs only, which wait for no answer."""
        if link.may_rest and not (link.closed or link.outbox or link.is_awaited):
            self.epoll.modify(link.connection.fileno(), 0)
            self.resting.append(link)
        link.may_rest = False

    def rest_reporter(self, link: Link) -> None:
        """The same, for a worker that was just heard, and with it all others that rest."""
        self._rest_s = _REPORTER_RESTS_S
        self.resting.append(link)

    @property
    def wake_at(self) -> float:
        """When those that rest are polled again, of time.monotonic()."""
        return self._woken_at + self._rest_s

    def end_rest(self, now: float) -> None:
        """Reporters are heard once, then rest until the next time."""
        self._woken_at, self._rest_s = now, _SESSION_RESTS_S
        for link in self.resting:
            if not link.closed:
                once = select.EPOLLONESHOT if link.reports else 0
                self.epoll.modify(link.connection.fileno(), select.EPOLLIN | once)
        self.resting.clear()

    # --- channels ---

    def adopt(self, link: Link, pid: int, start: int | None, descriptor: int) -> None:
        """A session hands over the socket of its worker with this pid and start of process."""
        old = self.channels.get(pid)
        if old is not None:
            self.close_channel(old)
        connection = socket.socket(fileno=descriptor)
        self.channels[pid] = channel = Channel(pid, start, connection, link)
        self.channel_of_fd[connection.fileno()] = channel
        link.channels.add(pid)

    def close_channel(self, channel: Channel) -> None:
        """Leave a worker's socket to its session, or end the connection if that has gone."""
        self.unwatch(channel)
        self.channels.pop(channel.pid, None)
        self.channel_of_fd.pop(channel.connection.fileno(), None)
        if channel.link is not None:
            channel.link.channels.discard(channel.pid)
        channel.connection.close()
        channel.process.close()

    def watch(self, channel: Channel) -> None:
        """Be told of each arrival once; what lies unread for the session must not wake us again."""
        events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
        if channel.queue is not None and channel.queue.outgoing:
            events |= select.EPOLLOUT
        if channel.watched:
            self.epoll.modify(channel.connection.fileno(), events)
        else:
            self.epoll.register(channel.connection.fileno(), events)
            channel.watched = True

    def unwatch(self, channel: Channel) -> None:
        """Its session reads it."""
        if channel.watched:
            self.epoll.unregister(channel.connection.fileno())
            channel.watched = False

    def drain(self, channel: Channel) -> None:
        """Nobody else reads it any more."""
        channel.drains = True
        self.watch(channel)
        self.ready.append(channel)

    def terminate_after_job(self, channel: Channel) -> None:
        """Queue the end of the connection behind the job."""
        channel.farewell_due = True
        self.say_farewell(channel)

    def say_farewell(self, channel: Channel) -> None:
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
