"""Whoever waits for a small answer stays awake for a moment: never where there is nothing to wait for, or no time."""

from __future__ import annotations

import time

import pytest

from tests.background import Handle, detach, launch, result, run, wait
from tests.clusters import Session, sqlstate

_RUNTIME = 'server = next(runtime._server for key, runtime in GD.items() if key[1] == "calls")'
# How long a wait for something that never comes takes, while an interrupt is to be handled.
_WHEN_INTERRUPTED = f"""
CREATE FUNCTION wait_when_interrupted(sleeps int) RETURNS float8 LANGUAGE plpython3u AS $$
import socket, time
{_RUNTIME}
server._spin._sleeps_left = sleeps
left, right = socket.socketpair()
with left, right:
    started = time.monotonic()
    server._interrupt_pending.value = 1
    server.is_readable_soon(left.fileno())
    return time.monotonic() - started
$$;
GRANT EXECUTE ON FUNCTION wait_when_interrupted TO PUBLIC;
"""
_IN_VAIN = f"""
CREATE FUNCTION waits_in_vain() RETURNS int LANGUAGE plpython3u AS $$
{_RUNTIME}
return server._spin._sleeps
$$;
GRANT EXECUTE ON FUNCTION waits_in_vain TO PUBLIC;
"""


@pytest.mark.parametrize(
    ("query", "columns"),
    [("INSERT INTO log VALUES (1)", "tag text"), ("SELECT n FROM log LIMIT 1", "n int"), ("SELECT 1", "n int")],
)
def test_the_result_of_a_job_that_has_ended_comes_at_once(alice: Session, query: str, columns: str) -> None:
    alice.execute("CREATE TABLE log AS SELECT 1 AS n")

    def seconds() -> float:
        handle = launch(alice, query)
        wait(alice, handle)
        started = time.monotonic()
        assert result(alice, handle, columns)
        return time.monotonic() - started

    assert min(seconds() for _ in range(10)) < 0.01


def test_run_query_with_a_timeout_takes_no_longer_than_without(alice: Session) -> None:
    query = "SELECT * FROM pg_background_run_query_v2('SELECT count(*) FROM pg_namespace', {}) AS (n bigint)"

    def seconds(arguments: str) -> float:
        started = time.monotonic()
        assert alice.rows(query.format(arguments))
        return time.monotonic() - started

    assert min(seconds("timeout_ms => 60000") for _ in range(10)) < 0.01


def test_an_interrupt_ends_a_wait_for_a_small_answer(alice: Session, conn: Session) -> None:
    conn.execute(_WHEN_INTERRUPTED)
    run(alice, "SELECT 1", "n int")
    for sleeps in (0, 1):
        call = f"SELECT wait_when_interrupted({sleeps})"
        assert min(alice.value(call) for _ in range(5)) < 0.01, sleeps


def test_a_look_does_not_stay_awake(alice: Session, conn: Session) -> None:
    conn.execute(_IN_VAIN)
    handle: Handle = launch(alice, "SELECT pg_sleep(30)")
    before = alice.value("SELECT waits_in_vain()")
    for timeout_ms in (0, 1, 5):
        for _ in range(10):
            assert not alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, %s)", (*handle, timeout_ms))
    assert alice.value("SELECT waits_in_vain()") == before
    alice.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    wait(alice, handle)
    with sqlstate("57014"):
        result(alice, handle, "nothing text")


def test_a_long_job_is_waited_for_to_its_end(alice: Session) -> None:
    for _ in range(3):
        handle = launch(alice, "SELECT pg_sleep(0.05)")
        wait(alice, handle)
        detach(alice, handle)
        assert run(alice, "SELECT 2 FROM pg_sleep(0.05)", "n int") == [(2,)]
