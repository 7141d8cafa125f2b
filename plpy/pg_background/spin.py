"""Waits for what comes in a moment, without sleeping.

To sleep and be woken takes tens of microseconds on a virtual machine, and leaves the caches cold: as much as a small
job. How long it pays to stay awake is learned from how the last waits went, as PostgreSQL does for its spinlocks
(s_lock.c).
"""

from __future__ import annotations

import time
from os import sched_yield
from typing import Callable

_LONGEST_NS = 300_000  # longer than a small job with its commit takes
_MOST_SLEEPS = 1024


class Spin:
    """Looks again and again, while nobody else wants the processor.

    Of waits in vain in a row, the second has the next one sleep at once, the third the next two, and so on to 1,024;
    a wait that was not in vain halves that.
    """

    def __init__(self) -> None:
        self._sleeps_left = 0
        self._sleeps = 0  # after the next one in vain

    def until(self, has_come: Callable[[], bool]) -> bool:
        """Whether it has come, within 300 us; False, before that, where it has not paid of late."""
        if self._sleeps_left:
            self._sleeps_left -= 1
            return False
        end_ns = time.monotonic_ns() + _LONGEST_NS
        while not has_come():
            sched_yield()
            if time.monotonic_ns() > end_ns:
                self._sleeps_left = self._sleeps
                self._sleeps = min(max(2 * self._sleeps, 1), _MOST_SLEEPS)
                return False
        self._sleeps //= 2
        return True
