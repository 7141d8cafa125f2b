"""pg_background.worker_timeout: the whole SQL string of a worker, whatever it does and whoever is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.background import Handle, detach, launch, listed, result, run, wait
from tests.clusters import Session, sqlstate, wait_until

Connect = Callable[..., Session]

TIMEOUT_MS = 400
_NAMED = r"pg_background\.worker_timeout"


@pytest.fixture
def hasty(alice: Session) -> Session:
    """Alice's session with a worker_timeout and a table `log`; its first launch is behind it."""
    alice.execute("CREATE TABLE log (n int)")
    run(alice, "SELECT 'ready'")
    alice.execute(f"SET pg_background.worker_timeout = {TIMEOUT_MS}")
    return alice


def submit(session: Session, query: str) -> Handle:
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def outcome(session: Session, handle: Handle) -> Any:
    """State, SQLSTATE, message and how long it ran, in seconds, as every session sees it; waits for it."""
    query = (
        "SELECT state, sqlstate, error_message, extract(epoch FROM elapsed)::float8 FROM pg_background_activity"
        " WHERE pid = %s AND cookie = %s AND state <> 'running'"
    )
    return wait_until(lambda: session.rows(query, handle))[0]


def is_timed_out(seen: Any, margin_s: float = 0.3) -> None:
    state, code, message, elapsed = seen
    assert (state, code) == ("error", "57014"), seen
    assert "pg_background.worker_timeout" in message
    assert TIMEOUT_MS / 1000 <= elapsed < TIMEOUT_MS / 1000 + margin_s, seen


# Much less than the timeout each, much more together.
MANY_STATEMENTS = "INSERT INTO log VALUES (1); " + "SELECT pg_sleep(0.05); " * 100
ENDLESS_OUTPUT = "INSERT INTO log VALUES (1); SELECT repeat('x', 1000) FROM generate_series(1, 100000000)"
DEAF = """DO $$ BEGIN
    LOOP
        BEGIN
            PERFORM pg_sleep(60);
        EXCEPTION WHEN query_canceled THEN NULL;
        END;
    END LOOP;
END $$"""


@pytest.mark.parametrize("query", ["SELECT pg_sleep(60)", MANY_STATEMENTS], ids=["one", "many statements"])
def test_whole_string_ends_at_the_timeout(hasty: Session, query: str) -> None:
    started = time.monotonic()
    handle = launch(hasty, query)
    wait(hasty, handle)
    elapsed = time.monotonic() - started
    assert TIMEOUT_MS / 1000 <= elapsed < TIMEOUT_MS / 1000 + 0.3
    worker = listed(hasty)[0]
    assert worker.state == "error"
    assert "worker_timeout" in (worker.last_error or "")
    is_timed_out(outcome(hasty, handle))
    with sqlstate("57014", match=_NAMED):
        result(hasty, handle)
    assert hasty.value("SELECT count(*) FROM log") == 0
    assert hasty.rows("SELECT workers_failed, workers_canceled FROM pg_background_stats_v2()") == [(1, 0)]


def test_result_that_is_being_read_ends_at_the_timeout(hasty: Session) -> None:
    handle = launch(hasty, "SELECT 'row' FROM generate_series(1, 100) g, pg_sleep(0.02 + g * 0)")
    with sqlstate("57014", match=_NAMED):
        result(hasty, handle)


@pytest.mark.parametrize("query", [ENDLESS_OUTPUT, DEAF], ids=["blocked on its reader", "swallows cancels"])
@pytest.mark.parametrize("way", ["idle", "detached", "submitted", "gone", "waiting"])
def test_it_ends_whether_the_launcher_is_there_or_not(
    hasty: Session, conn: Session, connect: Connect, query: str, way: str
) -> None:
    launcher = hasty
    if way == "gone":
        launcher = connect(hasty.info.user, parameters={"password": hasty.info.password})
        run(launcher, "SELECT 'ready'")
        launcher.execute(f"SET pg_background.worker_timeout = {TIMEOUT_MS}")
    handle = submit(launcher, query) if way == "submitted" else launch(launcher, query)
    if way == "detached":
        detach(launcher, handle)
    elif way == "gone":
        launcher.close()
    elif way == "waiting":
        wait(launcher, handle)
    is_timed_out(outcome(conn, handle), 1.0)
    working = "SELECT FROM pg_stat_activity WHERE pid = %s AND state <> 'idle'"
    wait_until(lambda: not conn.rows(working, (handle.pid,)))
    if way in ("idle", "waiting"):
        with sqlstate("57014", match=_NAMED):
            result(launcher, handle)
    assert conn.value(f'SELECT count(*) FROM "{hasty.info.user}".log') == 0
    if way != "gone":
        query = "SELECT workers_failed FROM pg_background_stats_v2()"
        wait_until(lambda: hasty.value(query) == 1)


def test_work_that_is_done_is_not_ended_while_it_waits_for_its_reader(hasty: Session) -> None:
    """The rows of a committed job are there for as long as its session likes."""
    handle = launch(hasty, "INSERT INTO log VALUES (1); SELECT repeat('x', 1000) FROM generate_series(1, 50)")
    time.sleep(TIMEOUT_MS / 1000 + 0.2)
    assert len(result(hasty, handle)) == 50
    assert hasty.value("SELECT count(*) FROM log") == 1


def test_shorter_statement_timeout_comes_first(hasty: Session) -> None:
    hasty.execute("SET statement_timeout = '150ms'")
    handle = launch(hasty, "SELECT pg_sleep(60)")
    hasty.execute("SET statement_timeout = 0")
    with sqlstate("57014", match="statement timeout"):
        result(hasty, handle)


def test_without_it_the_inherited_statement_timeout_holds(hasty: Session) -> None:
    hasty.execute("SET pg_background.worker_timeout = 0")
    hasty.execute("SET statement_timeout = '150ms'")
    handle = launch(hasty, "SELECT pg_sleep(60)")
    hasty.execute("SET statement_timeout = 0")
    with sqlstate("57014", match="statement timeout"):
        result(hasty, handle)


def test_it_is_the_launchs_setting_that_counts(hasty: Session) -> None:
    """Later changes are for later workers, and the job itself cannot change it."""
    handle = launch(hasty, "SET pg_background.worker_timeout = 0; SELECT pg_sleep(60)")
    hasty.execute("SET pg_background.worker_timeout = '1h'")
    patient = launch(hasty, f"SELECT 'patient' FROM pg_sleep({TIMEOUT_MS / 1000 + 0.2})")
    with sqlstate("57014", match=_NAMED):
        result(hasty, handle)
    assert result(hasty, patient) == [("patient",)]


def test_timed_out_session_is_not_reused(hasty: Session) -> None:
    handle = launch(hasty, "SELECT pg_sleep(60)")
    wait(hasty, handle)
    detach(hasty, handle)
    next_one = launch(hasty, "SELECT 'next'")
    assert next_one.pid != handle.pid
    assert result(hasty, next_one) == [("next",)]


def test_timeouts_of_ended_jobs_do_not_meet_the_next_one(hasty: Session) -> None:
    """The session's next job starts when most of the first one's time is over."""
    first = launch(hasty, f"SELECT 'first' FROM pg_sleep({TIMEOUT_MS / 1000 - 0.15})")
    assert result(hasty, first) == [("first",)]
    second = launch(hasty, f"SELECT 'second' FROM pg_sleep({TIMEOUT_MS / 1000 - 0.15})")
    assert second.pid == first.pid
    assert result(hasty, second) == [("second",)]


def test_new_supervisor_keeps_the_deadline(hasty: Session, conn: Session) -> None:
    started = time.monotonic()
    hasty.execute("SET pg_background.worker_timeout = '1500ms'")
    handle = launch(hasty, "SELECT pg_sleep(60)")
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
    old = conn.value(query, ("pg_background supervisor",))
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (old,))
    run(hasty, "SELECT 'x'")  # finds the supervisor gone, and starts another
    with sqlstate("57014", match=_NAMED):
        result(hasty, handle)
    assert 1.5 <= time.monotonic() - started < 2.0
