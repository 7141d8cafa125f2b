"""Cancel: at any moment, from any session, never another job, and nothing that was reported canceled has committed."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from tests.background import Handle, detach, is_gone, is_waiting, launch, listed, result, run, wait
from tests.clusters import Cluster, Session, sqlstate, wait_until

Connect = Callable[..., Session]

CANCELS = int(os.environ.get("PG_BACKGROUND_CANCELS", "100"))  # at random moments

SLEEP = "SELECT pg_sleep(60)"
# Catches every cancel, so that only the termination ends it.
DEAF = """DO $$ BEGIN
    LOOP
        BEGIN
            PERFORM pg_sleep(60);
        EXCEPTION WHEN query_canceled THEN NULL;
        END;
    END LOOP;
END $$"""
GENERATE = "INSERT INTO log SELECT 1; SELECT repeat('x', 1000) FROM generate_series(1, 20000)"


def submit(session: Session, query: str) -> Handle:
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def cancel(session: Session, handle: Handle) -> None:
    session.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)


def cancel_grace(session: Session, handle: Handle, grace_ms: int) -> None:
    session.execute("SELECT pg_background_cancel_v2_grace(%s, %s, %s)", (*handle, grace_ms))


def ends_within(session: Session, handle: Handle, timeout_ms: int) -> bool:
    return bool(session.value("SELECT pg_background_wait_v2_timeout(%s, %s, %s)", (*handle, timeout_ms)))


def state(session: Session, handle: Handle) -> str:
    return next(worker.state for worker in listed(session) if worker.pid == handle.pid)


def seen_state(session: Session, handle: Handle) -> Any:
    """What every session sees, once the supervisor has written it."""
    query = (
        "SELECT state, sqlstate, error_message FROM pg_background_activity"
        " WHERE pid = %s AND cookie = %s AND state <> 'running'"
    )
    seen, *error = wait_until(lambda: session.rows(query, handle))[0]
    print("outcome:", seen, *error)
    return seen


def stats(session: Session) -> dict[str, Any]:
    columns = "launched, completed, failed, canceled, active"
    query = (
        "SELECT workers_launched, workers_completed, workers_failed, workers_canceled, workers_active"
        " FROM pg_background_stats_v2()"
    )
    return dict(zip(columns.split(", "), session.rows(query)[0]))


@pytest.fixture
def log(alice: Session) -> str:
    alice.execute("CREATE TABLE log (n int)")
    return "log"


# --- what a cancel does ---------------------------------------------------------------------------


def test_running_worker_is_canceled_and_stays_tracked(alice: Session) -> None:
    handle = launch(alice, SLEEP)
    cancel(alice, handle)
    assert ends_within(alice, handle, 1000)
    assert state(alice, handle) == "canceled"
    assert seen_state(alice, handle) == "canceled"
    assert stats(alice) == {"launched": 1, "completed": 0, "failed": 0, "canceled": 1, "active": 0}
    with sqlstate("57014"):
        result(alice, handle)
    assert listed(alice) == []
    assert stats(alice)["canceled"] == 1


def test_statements_of_a_canceled_worker_do_not_commit(alice: Session, log: str) -> None:
    handle = launch(alice, "INSERT INTO log VALUES (1); SELECT pg_sleep(60); INSERT INTO log VALUES (2)")
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    cancel(alice, handle)
    wait(alice, handle)
    assert state(alice, handle) == "canceled"
    assert alice.value("SELECT count(*) FROM log") == 0


def test_cancel_of_an_ended_worker_changes_nothing(alice: Session, log: str) -> None:
    done, failed = launch(alice, "SELECT 'rows'"), launch(alice, "SELECT 1/0")
    wait(alice, done)
    wait(alice, failed)
    for handle in (done, failed):
        cancel(alice, handle)
        cancel_grace(alice, handle, 0)
    assert (state(alice, done), state(alice, failed)) == ("stopped", "error")
    assert result(alice, done) == [("rows",)]
    assert stats(alice) == {"launched": 2, "completed": 1, "failed": 1, "canceled": 0, "active": 0}


def test_repeated_cancels_count_once(alice: Session) -> None:
    handle = launch(alice, SLEEP)
    for _ in range(5):
        cancel(alice, handle)
    wait(alice, handle)
    cancel(alice, handle)
    assert stats(alice)["canceled"] == 1


def test_foreign_cancel_is_an_error_and_not_canceled(alice: Session, conn: Session) -> None:
    handle = launch(alice, SLEEP)
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    conn.execute("SELECT pg_cancel_backend(%s)", (handle.pid,))
    wait(alice, handle)
    assert state(alice, handle) == "error"
    assert stats(alice)["failed"] == 1


def test_canceled_worker_is_not_reused(alice: Session) -> None:
    handle = launch(alice, SLEEP)
    cancel(alice, handle)
    wait(alice, handle)
    detach(alice, handle)
    assert launch(alice, "SELECT 1").pid != handle.pid


def test_lost_signal_is_repeated(alice: Session) -> None:
    """A worker that swallows the first cancels ends by a later one."""
    handle = launch(
        alice,
        """DO $$ BEGIN
            FOR i IN 1..3 LOOP
                BEGIN
                    PERFORM pg_sleep(60);
                EXCEPTION WHEN query_canceled THEN NULL;
                END;
            END LOOP;
        END $$; SELECT pg_sleep(60)""",
    )
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    cancel(alice, handle)
    assert ends_within(alice, handle, 2000)
    assert state(alice, handle) == "canceled"


# --- the grace ------------------------------------------------------------------------------------


def test_deaf_worker_is_terminated_after_its_grace(alice: Session, conn: Session) -> None:
    handle = launch(alice, DEAF)
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    started = time.monotonic()
    cancel_grace(alice, handle, 300)
    assert 0.3 <= time.monotonic() - started < 1.5
    assert state(alice, handle) == "canceled"
    assert seen_state(alice, handle) == "canceled"
    wait_until(lambda: is_gone(conn, handle.pid))
    with sqlstate("57P01"):
        result(alice, handle)
    assert run(alice, "SELECT 'next'") == [("next",)]


def test_obedient_worker_ends_long_before_its_grace(alice: Session) -> None:
    handle = launch(alice, SLEEP)
    started = time.monotonic()
    cancel_grace(alice, handle, 60_000)
    assert time.monotonic() - started < 2
    assert state(alice, handle) == "canceled"
    with sqlstate("57014"):
        result(alice, handle)


@pytest.mark.parametrize("grace_ms", [-5, 0])
def test_grace_of_zero_or_less_terminates_at_once(alice: Session, grace_ms: int) -> None:
    handle = launch(alice, DEAF)
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    started = time.monotonic()
    cancel_grace(alice, handle, grace_ms)
    assert time.monotonic() - started < 1
    assert state(alice, handle) == "canceled"


def test_grace_is_clamped_not_refused(alice: Session) -> None:
    handle = launch(alice, SLEEP)
    cancel_grace(alice, handle, 2**31 - 1)
    assert state(alice, handle) == "canceled"


def test_call_that_waits_for_the_grace_can_be_canceled(alice: Session) -> None:
    handle = launch(alice, DEAF)
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    alice.execute("SET statement_timeout = '200ms'")
    with sqlstate("57014"):
        cancel_grace(alice, handle, 1000)
    alice.execute("SET statement_timeout = 0")
    assert ends_within(alice, handle, 3000)  # the supervisor goes on by itself
    assert state(alice, handle) == "canceled"


# --- workers that wait for their reader -----------------------------------------------------------


def test_worker_that_waits_for_its_reader_is_canceled(alice: Session, log: str) -> None:
    handle = launch(alice, GENERATE, 8192)
    wait_until(lambda: is_waiting(alice, handle, "ClientWrite"))
    cancel(alice, handle)
    assert ends_within(alice, handle, 2000)
    if state(alice, handle) == "canceled":
        assert alice.value("SELECT count(*) FROM log") == 0


def test_worker_that_waits_for_its_reader_is_terminated_by_another_session(
    alice: Session, conn: Session, log: str
) -> None:
    handle = launch(alice, GENERATE, 8192)
    wait_until(lambda: is_waiting(alice, handle, "ClientWrite"))
    cancel_grace(conn, handle, 100)
    assert seen_state(conn, handle) == "canceled"
    assert state(alice, handle) == "canceled"
    assert stats(alice)["canceled"] == 1
    assert alice.value("SELECT count(*) FROM log") == 0


def test_rows_of_a_worker_that_was_faster_than_its_cancel_are_all_there(
    alice: Session, conn: Session, log: str
) -> None:
    """Committed, but its last rows wait for the reader: neither a cancel nor its grace ends it."""
    alice.execute(
        "CREATE FUNCTION rows_of(n int) RETURNS SETOF text LANGUAGE sql AS"
        " $$ SELECT repeat('x', 1000) FROM generate_series(1, n) $$"
    )
    blocked = None
    for rows in range(150, 600, 2):  # the size of socket buffers is the kernel's affair
        handle = launch(alice, f"SELECT rows_of({rows})", 8192)
        if alice.value("SELECT pg_sleep(0.02) IS NULL") or not is_waiting(alice, handle, "ClientWrite"):
            detach(alice, handle)
            continue
        query = "SELECT count(*) FROM pg_locks WHERE pid = %s AND locktype = 'virtualxid'"
        if alice.value(query, (handle.pid,)) == 0:
            blocked = handle
            break
        detach(alice, handle)
    if blocked is None:
        pytest.skip("no number of rows made a worker wait with its last ones")
    conn.execute("SET statement_timeout = '300ms'")
    with suppress(psycopg.errors.QueryCanceled):
        cancel_grace(conn, blocked, 100)
    assert len(result(alice, blocked)) == rows
    assert stats(alice)["canceled"] == 0


# --- around the commit ----------------------------------------------------------------------------


@pytest.mark.local_server
def test_cancel_during_the_commit_is_no_cancel(start_cluster: Callable[..., Cluster]) -> None:
    """A server that logs durations makes of a signal in the commit an error after it."""
    settings = {"log_min_duration_statement": "0", "commit_delay": "100000", "commit_siblings": "0", "fsync": "on"}
    cluster = start_cluster("trust", settings)
    with cluster.connect(cluster.create_database()) as session:
        session.execute("CREATE TABLE log (n int)")
        run(session, "SELECT 'ready'")
        queries = ("INSERT INTO log VALUES ({})", "SELECT 1; INSERT INTO log VALUES ({})")
        for number, (call, query) in enumerate(itertools.product((launch, submit), queries)):
            handle = call(session, query.format(number))
            time.sleep(0.03)
            cancel(session, handle)
            wait(session, handle)
            assert session.value("SELECT count(*) FROM log WHERE n = %s", (number,)) == 1, "canceled too early"
            assert (state(session, handle), seen_state(session, handle)) == ("stopped", "stopped")
            if call is launch:
                assert result(session, handle)[-1] == ("INSERT 0 1",)


def test_random_cancels_leave_nothing_half_done(alice: Session, conn: Session, log: str) -> None:
    """What was reported canceled has not committed, what was reported stopped has, and all end soon."""
    offsets = random.Random(5)
    query = (
        "INSERT INTO log VALUES ({0}); SELECT pg_sleep(0.005); UPDATE log SET n = n WHERE n = {0}; SELECT pg_sleep({1})"
    )
    alice.execute("SET pg_background.max_workers = 100")
    handles: list[Handle] = []
    while len(handles) < CANCELS:
        batch: list[Any] = []
        for _ in range(50):
            start = offsets.choice((launch, submit))
            number = len(handles) + len(batch)
            handle = start(alice, query.format(number, offsets.choice((0, 0.005, 0.01))))
            time.sleep(offsets.uniform(0, 0.02))
            cancel(offsets.choice((alice, conn)), handle)
            batch.append((start, handle))
        deadline = time.monotonic() + 1
        for _, handle in batch:
            assert ends_within(alice, handle, max(0, int((deadline - time.monotonic()) * 1000)))
        for start, handle in batch:
            if start is launch:
                detach(alice, handle)
            handles.append(handle)
    wait_until(lambda: "running" not in dict(alice.rows("SELECT state, 1 FROM pg_background_activity")))
    seen = dict(alice.rows("SELECT cookie, state FROM pg_background_activity"))
    states = [seen[handle.cookie] for handle in handles]
    assert set(states) <= {"canceled", "stopped"}
    assert "canceled" in states
    committed = {n for (n,) in alice.rows("SELECT n FROM log")}
    assert committed == {number for number, ended in enumerate(states) if ended == "stopped"}
    counts = stats(alice)
    assert (counts["completed"], counts["canceled"]) == (states.count("stopped"), states.count("canceled"))


def test_cancel_never_meets_the_next_job(alice: Session, conn: Session) -> None:
    """Another session cancels each job about when it ends and its session is reused for the next one."""
    jobs: list[Handle] = []
    over = threading.Event()

    def cancel_the_latest() -> None:
        canceled = None
        while not over.is_set():
            if jobs and jobs[-1] is not canceled:
                canceled = jobs[-1]
                time.sleep(random.uniform(0, 0.004))
                cancel(conn, canceled)

    canceling = threading.Thread(target=cancel_the_latest)
    canceling.start()
    try:
        for _ in range(80):
            handle = launch(alice, "SELECT 'x' FROM pg_sleep(0.002)")
            jobs.append(handle)
            wait(alice, handle)
            assert state(alice, handle) in ("stopped", "canceled")
            detach(alice, handle)
            # Not known to the other session: nobody cancels this one.
            assert run(alice, "SELECT 'mine' FROM pg_sleep(0.003)") == [("mine",)]
    finally:
        over.set()
        canceling.join()


# --- from other sessions --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["launched", "detached", "submitted"])
def test_any_session_that_may_manage_it_can_cancel(alice: Session, conn: Session, way: str) -> None:
    handle = submit(alice, SLEEP) if way == "submitted" else launch(alice, SLEEP)
    if way == "detached":
        detach(alice, handle)
    cancel(conn, handle)
    assert ends_within(conn, handle, 1000)
    assert seen_state(conn, handle) == "canceled"
    wait_until(lambda: stats(alice)["canceled"] == 1)
    if way != "detached":
        assert state(alice, handle) == "canceled"


def test_handle_stays_good_after_its_session_has_gone(connect: Connect, conn: Session) -> None:
    launcher = connect()
    handle = launch(launcher, SLEEP)
    launcher.close()
    assert not ends_within(conn, handle, 0)
    cancel_grace(conn, handle, 5000)
    assert ends_within(conn, handle, 0)
    assert seen_state(conn, handle) == "canceled"


def test_only_members_of_its_role_may_cancel(
    alice: Session, connect: Connect, role: Callable[..., Any], conn: Session
) -> None:
    bob = connect(role("bob"))
    handle = launch(alice, SLEEP)
    for call in ("cancel_v2(%s, %s)", "cancel_v2_grace(%s, %s, 0)", "wait_v2(%s, %s)", "wait_v2_timeout(%s, %s, 0)"):
        with sqlstate("42501"):
            bob.execute(f"SELECT pg_background_{call}", handle)
    assert state(alice, handle) == "running"
    conn.execute(f'GRANT "{alice.info.user}" TO "{bob.info.user}"')
    cancel(bob, handle)
    assert ends_within(bob, handle, 1000)


def test_unknown_and_wrong_handles(alice: Session, conn: Session) -> None:
    handle = launch(alice, SLEEP)
    wrong = Handle(handle.pid, handle.cookie ^ 1)
    for call in ("cancel_v2(%s, %s)", "cancel_v2_grace(%s, %s, 0)"):
        with sqlstate("55000"):
            alice.execute(f"SELECT pg_background_{call}", wrong)
        with sqlstate("42704"):
            conn.execute(f"SELECT pg_background_{call}", wrong)
    assert state(alice, handle) == "running"
    cancel(alice, handle)


def test_polls_of_another_session_leave_nothing_behind(alice: Session, conn: Session) -> None:
    handle = launch(alice, SLEEP)
    for _ in range(50):
        assert not ends_within(conn, handle, 0)
    assert not ends_within(conn, handle, 50)
    cancel(conn, handle)
    wait(conn, handle)
    assert ends_within(conn, handle, 0)


def test_new_supervisor_goes_on_with_a_cancel(alice: Session, conn: Session) -> None:
    handle = launch(alice, DEAF)
    wait_until(lambda: is_waiting(alice, handle, "PgSleep"))
    alice.execute("SET statement_timeout = '100ms'")
    with sqlstate("57014"):
        cancel_grace(alice, handle, 1500)
    alice.execute("SET statement_timeout = 0")
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
    old = conn.value(query, ("pg_background supervisor",))
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (old,))
    listed(alice)
    run(alice, "SELECT 'x'")  # finds the supervisor gone
    assert ends_within(alice, handle, 4000)
    assert state(alice, handle) == "canceled"


@pytest.mark.parametrize("way", ["detached", "submitted"])
def test_own_cancel_counts_after_the_worker_was_let_go(alice: Session, way: str) -> None:
    handle = submit(alice, SLEEP) if way == "submitted" else launch(alice, SLEEP)
    detach(alice, handle)
    cancel(alice, handle)
    wait(alice, handle)
    assert seen_state(alice, handle) == "canceled"
    assert stats(alice)["canceled"] == 1
