"""A session's line to the supervisor: tells it of every worker, and hears of their ends."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from . import messages
from .errors import INSUFFICIENT_RESOURCES, INTERNAL_ERROR, BackgroundError, background_error
from .server import READABLE, WRITABLE, Server
from .session import WorkerSession
from .starter import APPLICATION_NAME, Start, Starter

_START_TIMEOUT_S = 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.002, 0.05
_MAX_UNTOLD = 1000

WaitFor = Callable[[Sequence[tuple[int, int]]], object]


class Listener(Protocol):
    """Who a session's news is for."""

    def on_ended(self, ended: messages.Ended) -> None:
        """A submitted or detached job has ended, or its connection was cleaned for reuse."""

    def on_canceling(self, pid: int, key: int, terminate_at: float | None) -> None:
        """Another session has asked a worker to stop."""

    def hand_over_again(self) -> None:
        """A new supervisor knows nothing yet: tell it of every worker."""


class SessionLeftError(Exception):
    """The worker session that a message speaks of was left to the supervisor before this one."""


class Question:
    """A question to the supervisor whose answer is waited for beside other things."""

    def __init__(self, request: int, message: list[Any]) -> None:
        self.request = request
        self.message = message
        self.asked: socket.socket | None = None


class Control:
    """The control connection of this session."""

    def __init__(self, server: Server, starter: Starter) -> None:
        self._server = server
        self._starter = starter
        self._socket: socket.socket | None = None
        self._requests = 0
        self._replies: dict[int, Any] = {}
        self._awaited: set[int] = set()  # requests
        self._moved = False
        self._starting: Start | None = None
        self.connections = 0  # to a supervisor, so far
        self._untold: deque[list[Any]] = deque(maxlen=_MAX_UNTOLD)  # ends of jobs
        self._words: deque[list[Any]] = deque()  # that did not fit in this connection
        self.listener: Listener | None = None

    @property
    def descriptor(self) -> int | None:
        """What to poll for news; None where there is no connection."""
        return None if self._socket is None else self._socket.fileno()

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing to hear, and nothing that should have been told."""
        if self._socket is None or self._moved or self._untold or self._words:
            return False
        return not self._server.is_readable(self._socket.fileno())

    @property
    def supervisor_pid(self) -> int:
        """The process at the other end, once ensure() has returned."""
        assert self._socket is not None
        return messages.peer_pid(self._socket)

    def ensure(self) -> None:
        """Connect to the database's supervisor, which this starts where there is none."""
        if self._socket is not None and not self._moved:
            return
        connection = self._connection()
        self.leave_start()  # one that listens by now need not be waited for
        old, self._socket, self._moved = self._socket, connection, False
        self._words.clear()
        self.connections += 1
        try:
            if old is not None:
                self._leave(old)
            if self.listener is not None:
                self.listener.hand_over_again()
            self._try_to_send_late()
        except BaseException:
            self._drop()  # the next call does it all again
            raise

    def prepare(self) -> None:
        """Have a supervisor started where there is none, without waiting for it: ensure() does that."""
        if self._socket is None and self._starting is None and not os.path.exists(self._starter.path):
            self._starting = self._starter.begin()

    def settle_start(self) -> None:
        """Connect to the supervisor whose start prepare() has begun: it would leave, and others could start none."""
        if self._starting is not None:
            with suppress(BackgroundError):  # ensure() tells of it when it is needed
                self.ensure()

    def _connection(self) -> socket.socket:
        """One to a supervisor that serves; where there is none, this session starts it, or waits for who does.

        Whoever waits looks ever more rarely: many at once would keep the new one from the processor.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        pause = _FIRST_RETRY_S
        while True:
            connection = self._connect()
            if connection is None and self._start(deadline):
                connection = self._connect()
            if connection is not None:
                return connection
            if time.monotonic() > deadline:
                raise background_error(
                    INTERNAL_ERROR,
                    "the supervisor of background workers does not answer",
                    hint="See the server log. Its backend shows as "
                    f"'{APPLICATION_NAME}' in pg_stat_activity; pg_terminate_backend() makes room for another.",
                )
            self._server.wait_for((), min(deadline, time.monotonic() + pause))
            pause = min(2 * pause, _LAST_RETRY_S)

    def tell(self, message: list[Any], about: WorkerSession | None = None, *files: int) -> None:
        """Send a message. A supervisor that is gone is replaced first, and told of everything else.

        about: the session that it speaks of, whose socket goes with it if this supervisor has not got it yet.
        files: descriptors that go with it, behind that.
        """
        while True:
            self.ensure()
            if about is not None and about.closed:
                raise SessionLeftError
            assert self._socket is not None
            unknown = about is not None and about.known_to_supervisor != self.connections
            try:
                self._send_late()
                sockets = (about.connection.socket,) if about is not None and unknown else ()
                messages.send(self._socket, message, *sockets, *files)
            except BlockingIOError:
                self._server.wait_for(((self._socket.fileno(), WRITABLE | READABLE),), None)
                self.hear()
            except OSError:
                self.hear()  # what it still had to say
                self._drop()
            else:
                if about is not None:
                    about.known_to_supervisor = self.connections
                return

    def tell_at_once(self, packet: bytes, about: WorkerSession) -> bool:
        """Send a message that is a packet already; False where that takes more than sending it: tell() does all."""
        connection = self._socket
        is_behind = self._moved or self._untold or self._words
        if connection is None or is_behind or about.closed or about.known_to_supervisor != self.connections:
            return False
        try:
            connection.send(packet, messages.NO_SIGNAL)
        except OSError:
            return False
        return True

    def report_end(self, message: list[Any], announced_on: int, row: Callable[[], dict[str, Any]]) -> None:
        """Tell of a job's end. Where no supervisor can be had, or a cancel comes first, the next call tells it.

        announced_on: the connection over which the job was announced. A later supervisor gets the row: it may not
        have heard of that job.
        """
        try:
            self.tell(message)
            if self.connections != announced_on:
                self.tell([messages.RECORD, row()])
        except BaseException as error:
            self._untold.append([messages.RECORD, row()])
            if not isinstance(error, BackgroundError):
                raise  # a cancel
            self._drop()

    def leave_word(self, message: list[Any]) -> None:
        """Send what only a supervisor that is there needs to know, without waiting: what does not fit goes later."""
        if self._socket is not None:
            self._words.append(message)
            self._try_to_send_late()

    def _try_to_send_late(self) -> None:
        try:
            self._send_late()
        except ConnectionError:
            self._words.clear()  # the other end has gone, which who hears next will find; it had more to say
        except OSError:
            pass  # it does not fit: before the next message

    def _send_late(self) -> None:
        """What could not be sent before, while it fits. BlockingIOError, OSError."""
        for messages_left in (self._untold, self._words):
            while messages_left and self._socket is not None:
                messages.send(self._socket, messages_left[0])
                messages_left.popleft()

    def ask(self, kind: str, *arguments: Any, wait_for: WaitFor | None = None) -> Any:
        """Send a question and wait for its answer.

        wait_for: waits until a descriptor is ready, or raises what ends the wait; by default it has no limit.
        """
        question = self.question(kind, *arguments)
        try:
            while not self.is_answered(question):
                assert self._socket is not None
                awaited = ((self._socket.fileno(), READABLE),)
                if wait_for is None:
                    self._server.wait_for(awaited, None)
                else:
                    wait_for(awaited)
            return self._replies[question.request]
        finally:
            self.forget(question)

    def question(self, kind: str, *arguments: Any) -> Question:
        """A question that is_answered() puts; forget() ends it."""
        self._requests += 1
        self._awaited.add(self._requests)
        return Question(self._requests, [kind, self._requests, *arguments])

    def is_answered(self, question: Question) -> bool:
        """Whether the answer has come. Puts the question, and once more to a supervisor that has taken over."""
        while question.request not in self._replies:
            self.ensure()
            if self._socket is not question.asked:
                self.tell(question.message)
                question.asked = self._socket
            self.hear()
            if self._socket is question.asked:
                break
        return question.request in self._replies

    def forget(self, question: Question) -> None:
        """No answer is wanted any more."""
        self._awaited.discard(question.request)
        if question.request in self._replies:
            del self._replies[question.request]
        elif question.asked is not None:
            self.leave_word([messages.FORGET, question.request])

    def hear(self) -> None:
        """Take in all news that has come, without waiting."""
        self._try_to_send_late()
        while self._socket is not None:
            try:
                received = messages.receive(self._socket)
            except BlockingIOError:
                return
            except (OSError, messages.ProtocolError):
                received = None
            if received is None:
                self._drop()
                return
            self._take(received.message)

    def hear_or_replace(self) -> None:
        """As hear; where the supervisor has gone, another is found, which does its work."""
        self.hear()
        if self._socket is None or self._moved:
            self.ensure()

    def replace_if_gone(self) -> None:
        """As hear_or_replace, for a wait that can go on without a supervisor."""
        if self._socket is None or self._server.is_readable(self._socket.fileno()):
            with suppress(BackgroundError):
                self.hear_or_replace()

    def close(self) -> None:
        """Leave the supervisor."""
        self._drop()
        self.leave_start()

    def leave_start(self) -> None:
        """Nothing came of the launch that had a supervisor started: let others start one."""
        if self._starting is not None:
            self._starting.close()
            self._starting = None

    def _take(self, message: list[Any]) -> None:
        kind, *arguments = message
        if kind == messages.ENDED and self.listener is not None:
            self.listener.on_ended(messages.Ended(*arguments))
        elif kind == messages.CANCELING and self.listener is not None:
            self.listener.on_canceling(*arguments)
        elif kind == messages.REPLY and arguments[0] in self._awaited:
            self._replies[arguments[0]] = arguments[1]
        elif kind == messages.MOVED:
            self._moved = True
        elif kind == messages.NO_DESCRIPTOR:
            self._drop()
            raise background_error(
                INSUFFICIENT_RESOURCES,
                "the supervisor of background workers is out of file descriptors",
                hint="Release workers, or raise the server's limit on open files (ulimit -n, LimitNOFILE).",
            )

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._words.clear()

    def _leave(self, old: socket.socket) -> None:
        """Make a supervisor that made room let go of this session's workers; hear what it still had to say.

        Only then may its successor read their sockets.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        with old:
            if self._say(old, [messages.MOVED_ON], deadline):
                while self._server.wait_for(((old.fileno(), READABLE),), deadline):
                    try:
                        received = messages.receive(old)
                    except (OSError, messages.ProtocolError):
                        return
                    if received is None:
                        return
                    self._take(received.message)

    def _say(self, connection: socket.socket, message: list[Any], deadline: float) -> bool:
        """Whether the message could be sent."""
        while True:
            try:
                messages.send(connection, message)
            except BlockingIOError:
                if not self._server.wait_for(((connection.fileno(), WRITABLE),), deadline):
                    return False
            except OSError:
                return True  # what it said before it went is still there to hear
            else:
                return True

    def _connect(self) -> socket.socket | None:
        """A connection on which the supervisor has said welcome; None where there is none for us."""
        connection = messages.control_socket()
        try:
            connection.setblocking(False)
            connection.connect(self._starter.path)
            messages.send(connection, [messages.HELLO, self._starter.digest])
            deadline = time.monotonic() + _START_TIMEOUT_S
            self._server.wait_for(((connection.fileno(), READABLE),), deadline)
            received = messages.receive(connection)
        except (OSError, messages.ProtocolError):
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        if received is None or received.message[0] != messages.WELCOME:
            connection.close()
            return None
        return connection

    def _start(self, deadline: float) -> bool:
        """Whether a supervisor that this session has started listens; False where another session was faster."""
        start, self._starting = self._starting or self._starter.begin(), None
        return start is not None and self._starter.finish(start, deadline)
