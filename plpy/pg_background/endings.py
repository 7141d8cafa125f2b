"""Waits for the ends of several workers at once: one poll over all that tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from . import messages
from .control import Control
from .deadlock import Watch
from .job import State
from .server import READABLE, Server
from .worker import Worker


class Handle(NamedTuple):
    """Names a worker."""

    pid: int
    cookie: int


class Ending(Protocol):
    """The end of one worker."""

    def has_come(self) -> bool:
        """Take in what has arrived; whether the work has ended."""

    def awaited(self) -> tuple[int, int]:
        """What to poll for news: descriptor and events."""

    def forget(self) -> None:
        """It is not waited for any more."""


class OwnEnding:
    """The end of a worker that this session tracks."""

    def __init__(self, control: Control, worker: Worker) -> None:
        self._control = control
        self._worker = worker

    def has_come(self) -> bool:
        """Read all that the worker has said: it must not wait for a reader while it is waited for."""
        self._worker.advance()
        return self._worker.ended

    def awaited(self) -> tuple[int, int]:
        """The worker's socket, or the supervisor's."""
        return _line(self._control) if self._worker.read_elsewhere else self._worker.awaited()

    def forget(self) -> None:
        """Nothing is kept for it."""


class OtherEnding:
    """The end of a worker of another session, or of one that was let go: the supervisor tells of it."""

    def __init__(self, control: Control, handle: Handle, row: dict[str, Any]) -> None:
        self._control = control
        self._ended: bool = row["state"] != State.RUNNING.value
        self._question = None if self._ended else control.question(messages.WAIT, *handle)

    def has_come(self) -> bool:
        """Whether the supervisor has told of it."""
        if not self._ended and self._question is not None:
            self._ended = self._control.is_answered(self._question)
        return self._ended

    def awaited(self) -> tuple[int, int]:
        """The supervisor's socket."""
        return _line(self._control)

    def forget(self) -> None:
        """Take the question back."""
        if self._question is not None:
            self._control.forget(self._question)


def _line(control: Control) -> tuple[int, int]:
    """To be polled for news from the supervisor, which is replaced first where it has gone."""
    control.ensure()
    assert control.descriptor is not None
    return (control.descriptor, READABLE)


def wait_for_any(
    server: Server, control: Control, endings: dict[Handle, Ending], deadline: float | None
) -> Handle | None:
    """One that has come; None at the deadline, or if there are none. 40P01, without one, where none ever will."""
    with Watch(server, control, *(handle.pid for handle in endings)) as watch:
        while endings:
            running, awaited = _running(control, list(endings.values()))
            if len(running) < len(endings):
                return next(handle for handle, ending in endings.items() if ending not in running)
            if deadline is None:
                watch.wait_for(awaited)
            elif not server.wait_for(awaited, deadline):
                break
    return None


def wait_for_all(server: Server, control: Control, endings: dict[Handle, Ending], deadline: float | None) -> None:
    """Wait until all have come, or the deadline has. 40P01, without one, where one never will."""
    for handle, ending in endings.items():
        with Watch(server, control, handle.pid) as watch:
            while True:
                running, awaited = _running(control, list(endings.values()))
                if ending not in running:
                    break
                if deadline is None:
                    watch.wait_for(awaited)
                elif not server.wait_for(awaited, deadline):
                    return


def _running(control: Control, endings: Sequence[Ending]) -> tuple[list[Ending], list[tuple[int, int]]]:
    """Those that have not come, and what to poll for them: one supervisor knows of all that it is asked."""
    while True:
        before = control.connections
        running = [ending for ending in endings if not ending.has_come()]
        awaited = [ending.awaited() for ending in running]
        if control.connections == before:
            return running, awaited
