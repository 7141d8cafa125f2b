"""Waiting for workers, what interrupts a wait and what it costs, and what pg_background_list_v2 shows meanwhile."""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.background import LIST_COLUMNS, Handle, detach, is_waiting, launch, listed, result, run, wait
from tests.clusters import EXTENSIONS, Cluster, Session, sqlstate, wait_until
from tests.supervision import cpu_seconds

REACTION_SECONDS = 0.2
CPU_SHARE = 0.01

WAITS = {
    "wait": "SELECT pg_background_wait_v2({pid}, {cookie})",
    "wait_timeout": "SELECT pg_background_wait_v2_timeout({pid}, {cookie}, 60000)",
    "result": "SELECT * FROM pg_background_result_v2({pid}, {cookie}) AS r(x text)",
}


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Threads in which calls can block."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def held(alice: Session, connect: Callable[..., Session]) -> Iterator[Handle]:
    """A worker of alice's that runs until the test's end."""
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(77)")
    handle = launch(alice, "SELECT pg_advisory_xact_lock_shared(77)")
    wait_until(lambda: is_waiting(holder, handle, "advisory"))
    yield handle
    holder.execute("SELECT pg_terminate_backend(%s, 5000)", (handle.pid,))
    if not alice.closed and any(worker.pid == handle.pid for worker in listed(alice)):
        detach(alice, handle)


def _is_active(conn: Session, pid: int) -> bool:
    found = conn.rows("SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'active'", (pid,))
    return bool(found)


def _start(
    pool: concurrent.futures.ThreadPoolExecutor, conn: Session, session: Session, call: str
) -> concurrent.futures.Future[Any]:
    """Begins a call in a thread and returns once the server works on it."""
    pending = pool.submit(session.execute, call)
    wait_until(lambda: _is_active(conn, session.pid), what="the waiting call")
    return pending


def _seconds_until_error(pending: concurrent.futures.Future[Any], code: str) -> float:
    start = time.monotonic()
    with sqlstate(code):
        pending.result(timeout=10)
    return time.monotonic() - start


# --- ends and timeouts ----------------------------------------------------------------------------


def test_wait_returns_after_the_end_any_number_of_times(alice: Session) -> None:
    run(alice, "SELECT 1", "n int")
    handle = launch(alice, "SELECT pg_sleep(0.2)")
    start = time.monotonic()
    wait(alice, handle)
    assert time.monotonic() - start > 0.15
    for _ in range(3):
        wait(alice, handle)
        assert alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", handle) is True
    assert listed(alice)[0].state == "stopped"
    detach(alice, handle)


def test_wait_does_not_raise_the_workers_error(alice: Session) -> None:
    handle = launch(alice, "SELECT 1/0")
    wait(alice, handle)
    assert alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, 1000)", handle) is True
    with sqlstate("22012"):
        result(alice, handle, "n int")


def test_wait_sees_what_the_worker_committed(alice: Session) -> None:
    alice.execute("CREATE TABLE seen (n int)")
    for n in range(20):
        handle = launch(alice, f"INSERT INTO seen VALUES ({n})")
        wait(alice, handle)
        assert alice.value("SELECT count(*) FROM seen") == n + 1
        detach(alice, handle)


def test_wait_for_a_worker_that_says_more_than_its_queue_holds(alice: Session) -> None:
    handle = launch(alice, "SELECT repeat('x', 1000) FROM generate_series(1, 10000) g", 64)
    wait(alice, handle)
    assert alice.value("SELECT count(*) FROM pg_background_result_v2(%s, %s) AS r(t text)", handle) == 10000


def test_timeout_returns_false_near_its_limit(alice: Session, held: Handle) -> None:
    late = []
    for timeout_ms in (1, 50, 130):
        for _ in range(3):
            start = time.monotonic()
            call = "SELECT pg_background_wait_v2_timeout(%s, %s, %s)"
            assert alice.value(call, (*held, timeout_ms)) is False
            late.append(time.monotonic() - start - timeout_ms / 1000)
    assert min(late) > -0.001
    assert statistics.median(late) < 0.03


@pytest.mark.parametrize("timeout_ms", [0, -1, -(2**31)])
def test_timeout_of_zero_or_less_only_looks(alice: Session, held: Handle, timeout_ms: int) -> None:
    start = time.monotonic()
    assert alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, %s)", (*held, timeout_ms)) is False
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("timeout_ms", [60_000, 86_400_000, 2**31 - 1])
def test_timeout_returns_true_as_soon_as_the_work_has_ended(alice: Session, timeout_ms: int) -> None:
    handle = launch(alice, "SELECT pg_sleep(0.1)")
    start = time.monotonic()
    assert alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, %s)", (*handle, timeout_ms)) is True
    assert time.monotonic() - start < 5
    detach(alice, handle)


def test_wait_wakes_soon_after_the_end(alice: Session) -> None:
    alice.execute("CREATE TABLE ends (at timestamptz)")
    lags = []
    for _ in range(9):
        handle = launch(alice, "SELECT pg_sleep(0.02); INSERT INTO ends VALUES (clock_timestamp())")
        wait(alice, handle)
        lags.append(alice.value("SELECT clock_timestamp() - max(at) FROM ends"))
        detach(alice, handle)
    assert statistics.median(lags) < timedelta(milliseconds=30)


# --- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WAITS)
def test_cancel_ends_a_wait_at_once_and_the_worker_goes_on(
    alice: Session, conn: Session, pool: concurrent.futures.ThreadPoolExecutor, held: Handle, kind: str
) -> None:
    reactions = []
    for _ in range(5):
        pending = _start(pool, conn, alice, WAITS[kind].format(**held._asdict()))
        conn.execute("SELECT pg_cancel_backend(%s)", (alice.pid,))
        reactions.append(_seconds_until_error(pending, "57014"))
    assert statistics.median(reactions) < REACTION_SECONDS
    assert _is_active(conn, held.pid)
    assert [worker.state for worker in listed(alice)] == ["running"]


@pytest.mark.parametrize("kind", WAITS)
def test_statement_timeout_ends_a_wait_in_time(alice: Session, held: Handle, kind: str) -> None:
    late = []
    for _ in range(5):
        alice.execute("SET statement_timeout = 100")
        start = time.monotonic()
        with sqlstate("57014", match="statement timeout"):
            alice.execute(WAITS[kind].format(**held._asdict()))
        late.append(time.monotonic() - start - 0.1)
        alice.execute("RESET statement_timeout")
    assert min(late) > -0.005
    assert statistics.median(late) < REACTION_SECONDS


@pytest.mark.parametrize("kind", WAITS)
def test_terminate_ends_a_waiting_session_at_once(
    alice: Session, conn: Session, pool: concurrent.futures.ThreadPoolExecutor, held: Handle, kind: str
) -> None:
    pending = _start(pool, conn, alice, WAITS[kind].format(**held._asdict()))
    start = time.monotonic()
    conn.execute("SELECT pg_terminate_backend(%s)", (alice.pid,))
    with pytest.raises(psycopg.errors.AdminShutdown) as raised:
        pending.result(timeout=10)
    assert time.monotonic() - start < 1
    assert "Traceback" not in f"{raised.value}{raised.value.diag.context}"
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: conn.value(gone, (alice.pid,)), what="the session's end")


@pytest.mark.parametrize("kind", WAITS)
def test_fast_shutdown_does_not_wait_for_a_waiting_session(
    start_cluster: Callable[..., Cluster], pool: concurrent.futures.ThreadPoolExecutor, kind: str
) -> None:
    own = start_cluster()
    with own.connect() as session, own.connect() as watcher:
        for extension in EXTENSIONS:
            session.execute(f"CREATE EXTENSION {extension}")
        handle = launch(session, "SELECT pg_sleep(60)")
        pending = _start(pool, watcher, session, WAITS[kind].format(**handle._asdict()))
        start = time.monotonic()
        own.stop("fast")
        assert time.monotonic() - start < 3
        with suppress(psycopg.OperationalError):  # the worker may have been the first to go, which ends the wait
            pending.result(timeout=5)


def test_lost_client_does_not_keep_a_wait_going_for_ever(
    connect: Callable[..., Session], conn: Session, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    session = connect(client_connection_check_interval="100ms")
    handle = launch(session, "SELECT pg_sleep(60)")
    pid = session.pid
    pending = _start(pool, conn, session, WAITS["wait"].format(**handle._asdict()))
    session.pgconn.finish()
    with pytest.raises((psycopg.Error, OSError, ValueError)):
        pending.result(timeout=10)
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: conn.value(gone, (pid,)), what="the session's end")
    conn.execute("SELECT pg_terminate_backend(%s)", (handle.pid,))


@pytest.mark.local_server
@pytest.mark.parametrize("kind", WAITS)
def test_waiting_costs_next_to_nothing(
    alice: Session, conn: Session, pool: concurrent.futures.ThreadPoolExecutor, held: Handle, kind: str
) -> None:
    pending = _start(pool, conn, alice, WAITS[kind].format(**held._asdict()))
    before, start = cpu_seconds(alice.pid), time.monotonic()
    concurrent.futures.wait([pending], timeout=2)
    share = (cpu_seconds(alice.pid) - before) / (time.monotonic() - start)
    conn.execute("SELECT pg_cancel_backend(%s)", (alice.pid,))
    with sqlstate("57014"):
        pending.result(timeout=10)
    assert share < CPU_SHARE


# --- the list -------------------------------------------------------------------------------------


def test_list_has_the_columns_of_the_contract(alice: Session) -> None:
    handle = launch(alice, "SELECT 1", 12345)
    row = alice.rows(
        f"SELECT l.*, now() - launched_at, CURRENT_USER::regrole::oid FROM pg_background_list_v2() AS l({LIST_COLUMNS})"
    )[0]
    assert row[:2] == handle
    assert timedelta(0) <= row[9] < timedelta(seconds=30)
    assert row[3] == row[10]
    assert row[4] == 12345
    assert row[5] in ("running", "stopped")
    assert row[6:9] == ("SELECT 1", None, False)
    result(alice, handle, "n int")
    assert listed(alice) == []


def test_default_queue_size_shows_in_the_list(alice: Session) -> None:
    handles = [launch(alice, "SELECT 1")]
    alice.execute("SET pg_background.default_queue_size = '1MB'")
    handles.append(launch(alice, "SELECT 1"))
    assert [worker.queue_size for worker in listed(alice)] == [65536, 1048576]
    for handle in handles:
        detach(alice, handle)


def test_states_from_running_to_each_end(alice: Session, conn: Session, held: Handle) -> None:
    assert [worker.state for worker in listed(alice)] == ["running"]
    good, bad = launch(alice, "SELECT 1"), launch(alice, "SELECT 1/0")
    wait_until(
        lambda: [worker.state for worker in listed(alice)] == ["running", "stopped", "error"],
        what="the ends, seen without a wait",
    )
    assert [worker.last_error for worker in listed(alice)] == [None, None, "division by zero"]
    conn.execute("SELECT pg_cancel_backend(%s)", (held.pid,))
    wait(alice, held)
    first = listed(alice)[0]
    # What this extension did not cancel is an error.
    assert first.state == "error"
    assert "canceling statement" in str(first.last_error)
    for handle in (good, bad):
        detach(alice, handle)


def test_list_shows_the_end_of_a_worker_with_unread_rows(alice: Session) -> None:
    handle = launch(alice, "SELECT g FROM generate_series(1, 100) g")
    wait_until(lambda: listed(alice)[0].state == "stopped", what="the end in the list")
    assert len(result(alice, handle, "n int")) == 100


def test_long_texts_are_cut_on_characters(alice: Session) -> None:
    character = "\U0001d11e"
    query = f"DO $$ BEGIN RAISE '%', repeat('{character}', 600); END $$ -- " + character * 200
    handle = launch(alice, query)
    wait(alice, handle)
    (worker,) = listed(alice)
    assert worker.sql_preview == query[:120]
    assert worker.last_error == character * 512
    with sqlstate("P0001") as raised:
        result(alice, handle)
    assert raised.diag.message_primary == character * 600


def test_short_texts_are_not_cut(alice: Session) -> None:
    query = "SELECT '" + "\u00e9" * 111 + "'"
    assert len(query) == 120
    handle = launch(alice, query)
    assert listed(alice)[0].sql_preview == query
    detach(alice, handle)


def test_stats_count_each_end_once(alice: Session) -> None:
    for query in ("SELECT 1", "SELECT 1/0", "SELECT pg_sleep(0.05)"):
        handle = launch(alice, query)
        for _ in range(3):
            wait(alice, handle)
            listed(alice)
        detach(alice, handle)
    running = launch(alice, "SELECT pg_sleep(0.5)")
    row = alice.rows(
        "SELECT workers_launched, workers_completed, workers_failed, workers_canceled, workers_active,"
        " avg_execution_ms, max_workers FROM pg_background_stats_v2()"
    )[0]
    assert row[:5] == (4, 2, 1, 0, 1)
    assert 10 < row[5] < 5000
    assert row[6] == 16
    wait(alice, running)
    assert alice.value("SELECT workers_active FROM pg_background_stats_v2()") == 0
    detach(alice, running)


def test_stats_are_this_sessions(alice: Session, conn: Session) -> None:
    run(alice, "SELECT 1", "n int")
    assert conn.value("SELECT workers_launched FROM pg_background_stats_v2()") == 0
