"""Names a process for good: pids come back, a pid with its start time does not."""

from __future__ import annotations

import os

_START_FIELD = 19  # of /proc/PID/stat, counted from behind the command's name: starttime


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[_START_FIELD])
    except (OSError, IndexError, ValueError):
        return None


def open_pidfd(pid: int) -> int | None:
    """A descriptor of the process itself, so that a signal cannot reach another one; None before Linux 5.3."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
