"""Names a process for good: pids come back, a pid with its start time does not."""

from __future__ import annotations

import os
import signal

_START_FIELD = 19  # of /proc/PID/stat, counted from behind the command's name: starttime


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is gone. OSError without a descriptor left."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[_START_FIELD])
    except (FileNotFoundError, ProcessLookupError, IndexError, ValueError):
        return None


class Process:
    """A process to send signals to: they reach it, or nobody."""

    def __init__(self, pid: int, start: int | None) -> None:
        self._pid = pid
        self._start = start
        self._pidfd = open_pidfd(pid)
        if self._pidfd is not None and not self._is_same():
            self.close()

    def _is_same(self) -> bool:
        """Whether the pid is not another process's by now, as far as can be told."""
        try:
            return self._start is not None and process_start(self._pid) == self._start
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process is still there."""
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif self._is_same():
                os.kill(self._pid, number)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """Give the descriptor back."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def open_pidfd(pid: int) -> int | None:
    """A descriptor of the process itself, so that a signal cannot reach another one; None before Linux 5.3."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
