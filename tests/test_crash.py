"""Workers, supervisors and whole servers that disappear: what is told is true, and nothing is tracked for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psycopg
import pytest

from tests.background import Handle, detach, launch, listed, result, run, wait
from tests.clusters import Cluster, Session, sqlstate, wait_until

SLEEP = "SELECT pg_sleep(60)"


def submit(session: Session, query: str) -> Handle:
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def terminate(admin: Session, handle: Handle) -> None:
    """Terminates the backend of a worker that works."""
    wait_until(lambda: admin.rows("SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'active'", (handle.pid,)))
    admin.execute("SELECT pg_terminate_backend(%s, 5000)", (handle.pid,))


def counts(session: Session) -> list[int]:
    """Completed, failed, canceled, active."""
    columns = "workers_completed, workers_failed, workers_canceled, workers_active"
    return list(session.rows(f"SELECT {columns} FROM pg_background_stats_v2()")[0])


@pytest.mark.parametrize("way", ["launched", "detached", "submitted"])
def test_terminated_worker_is_an_error_everywhere(alice: Session, conn: Session, way: str) -> None:
    handle = submit(alice, SLEEP) if way == "submitted" else launch(alice, SLEEP)
    if way == "detached":
        detach(alice, handle)
    terminate(conn, handle)
    wait(alice, handle)
    wait(conn, handle)
    query = "SELECT state, sqlstate FROM pg_background_activity WHERE cookie = %s AND state <> 'running'"
    assert wait_until(lambda: conn.rows(query, (handle.cookie,))) == [("error", "57P01")]
    wait_until(lambda: counts(alice) == [0, 1, 0, 0])
    if way == "launched":
        with sqlstate("57P01", match=str(handle.pid)):
            result(alice, handle)
    assert run(alice, "SELECT 'next'") == [("next",)]


def test_termination_ends_a_result_half_way(alice: Session, conn: Session) -> None:
    handle = launch(alice, "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)")
    terminate(conn, handle)
    with pytest.raises(psycopg.Error) as raised:
        result(alice, handle)
    assert raised.value.sqlstate in ("57P01", "08006")
    assert listed(alice) == []
    assert counts(alice) == [0, 1, 0, 0]


@pytest.fixture
def own(start_cluster: Callable[..., Cluster]) -> tuple[Cluster, str]:
    """A server of this test's own, and the name of a database in it."""
    cluster = start_cluster("trust", {"restart_after_crash": "on"})
    return cluster, cluster.create_database()


def reconnect(cluster: Cluster, dbname: str) -> Session:
    """A connection once the server lets clients in again."""

    def attempt() -> Session | None:
        try:
            return cluster.connect(dbname)
        except psycopg.OperationalError:
            return None

    session = wait_until(attempt, timeout=30, what="the server's recovery")
    assert session is not None
    return session


def check_fresh(session: Session) -> None:
    """Nothing of what was before shows, and everything works."""
    assert listed(session) == []
    assert session.rows("SELECT pid FROM pg_background_activity") == []
    assert session.value("SELECT workers_launched FROM pg_background_stats_v2()") == 0
    session.execute("INSERT INTO log VALUES (100)")
    assert run(session, "SELECT n::text FROM log") == [("100",)]
    handle = submit(session, "INSERT INTO log VALUES (101)")
    wait(session, handle)
    assert session.value("SELECT count(*) FROM log") == 2
    query = "SELECT state FROM pg_background_activity WHERE cookie = %s AND state <> 'running'"
    assert wait_until(lambda: session.rows(query, (handle.cookie,))) == [("stopped",)]


@pytest.mark.local_server
@pytest.mark.crashes_server
@pytest.mark.parametrize("victim", ["worker", "supervisor", "launcher"])
def test_crash_of_a_backend_restarts_the_server_and_leaves_nothing(own: tuple[Cluster, str], victim: str) -> None:
    cluster, dbname = own
    session = cluster.connect(dbname)
    session.execute("CREATE TABLE log (n int)")
    handles = [launch(session, f"INSERT INTO log VALUES (1); {SLEEP}"), submit(session, SLEEP), launch(session, SLEEP)]
    detach(session, handles[2])
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background supervisor' AND datname = %s"
    supervisor = session.value(query, (dbname,))
    pids = {"worker": handles[0].pid, "supervisor": supervisor, "launcher": session.pid}
    os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(psycopg.OperationalError):
        session.execute("SELECT pg_sleep(30)")
    with reconnect(cluster, dbname) as again:
        for pid in [*pids.values(), *(handle.pid for handle in handles)]:
            assert not again.rows("SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'active'", (pid,)) or (
                pid == again.pid
            )
        check_fresh(again)
        for handle in handles:
            with sqlstate("42704"):
                again.execute("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", handle)


@pytest.mark.local_server
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_does_not_wait_for_workers_and_leaves_nothing(own: tuple[Cluster, str], mode: str) -> None:
    cluster, dbname = own
    session = cluster.connect(dbname)
    session.execute("CREATE TABLE log (n int)")
    launch(session, f"INSERT INTO log VALUES (1); {SLEEP}")
    submit(session, SLEEP)
    detach(session, launch(session, SLEEP))
    started = time.monotonic()
    cluster.restart(mode)
    assert time.monotonic() - started < 10
    with pytest.raises(psycopg.OperationalError):
        session.execute("SELECT 1")
    with cluster.connect(dbname) as again:
        if mode == "fast":  # an orderly end is seen: the rows tell what became of the work
            seen = again.rows("SELECT DISTINCT state FROM pg_background_activity")
            assert seen in ([], [("error",)])
            again.execute("INSERT INTO log VALUES (100)")
            assert run(again, "SELECT n::text FROM log") == [("100",)]
            states = "SELECT count(*) FROM pg_background_activity WHERE state = 'running'"
            wait_until(lambda: again.value(states) == 0)
        else:
            check_fresh(again)
