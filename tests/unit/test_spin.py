"""How long a wait stays awake, and when it does not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background import spin
from pg_background.spin import Spin


class Looks:
    """Answers each look; counts them."""

    def __init__(self, comes_at: int | None) -> None:
        self.count = 0
        self._comes_at = comes_at

    def __call__(self) -> bool:
        self.count += 1
        return self._comes_at is not None and self.count >= self._comes_at


def wait(spin_: Spin, comes_at: int | None) -> tuple[bool, int]:
    """Whether it came, and how often was looked."""
    looks = Looks(comes_at)
    return spin_.until(looks), looks.count


def test_it_looks_until_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_LONGEST_NS", 60 * 10**9)  # a busy machine may take longer for three looks
    assert wait(Spin(), 3) == (True, 3)


def test_what_has_come_already_is_seen_by_the_first_look() -> None:
    assert wait(Spin(), 1) == (True, 1)


def test_a_wait_in_vain_ends_in_time() -> None:
    started = time.monotonic()
    came, looks = wait(Spin(), None)
    assert not came
    assert looks > 0
    assert time.monotonic() - started >= spin._LONGEST_NS / 1e9


def sleeps_after(spin_: Spin) -> int:
    """How many of the next waits do not look."""
    count = 0
    while wait(spin_, 1) == (False, 0):
        count += 1
    return count


def test_each_wait_in_vain_has_twice_as_many_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_LONGEST_NS", 0)
    waits = Spin()
    asleep: list[int] = []
    for _ in range(14):
        while (found := wait(waits, None)) == (False, 0):
            asleep[-1] += 1
        assert found[1] >= 1
        asleep.append(0)
    assert asleep[:-1] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024]


def test_waits_that_pay_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_LONGEST_NS", 0)
    waits = Spin()
    for _ in range(4):
        while wait(waits, None) == (False, 0):
            pass
    assert sleeps_after(waits) == 4  # and the wait behind them pays
    wait(waits, None)
    assert sleeps_after(waits) == 4, "it would have been twice as many"


@given(st.lists(st.booleans(), max_size=300))
def test_it_never_sleeps_for_more_than_so_many_waits(history: list[bool]) -> None:
    waits = Spin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spin, "_LONGEST_NS", 0)
        for comes in history:
            wait(waits, 1 if comes else None)
        assert sleeps_after(waits) <= spin._MOST_SLEEPS
