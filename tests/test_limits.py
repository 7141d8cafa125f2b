"""Limits: workers of a session, connections of the server, file descriptors; and 200 workers at once."""

from __future__ import annotations

import contextlib
import fcntl
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.background import Handle, detach, launch, listed, result, run, wait
from tests.clusters import Cluster, Session, sqlstate, wait_until
from tests.supervision import control_path, cpu_seconds, supervisor_pids, terminate_supervisor

Connect = Callable[..., Session]


def submit(session: Session, query: str) -> Handle:
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def launch_many(session: Session, handles: list[Handle]) -> None:
    """Adds to the handles until a launch fails, or there are 40."""
    while len(handles) < 40:
        handles.append(launch(session, "SELECT 'x' FROM pg_sleep(0.2)"))


# --- max_workers ----------------------------------------------------------------------------------


def test_max_workers_bounds_the_tracked_workers(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 2")
    first, second = launch(alice, "SELECT 'a'"), launch(alice, "SELECT 'b'")
    wait(alice, first)
    wait(alice, second)
    for call in ("launch_v2", "submit_v2", "launch"):
        with sqlstate("53400", match=r"pg_background\.max_workers is 2"):
            alice.execute(f"SELECT pg_background_{call}('SELECT 1')")
    assert [worker.pid for worker in listed(alice)] == [first.pid, second.pid]
    assert alice.value("SELECT workers_launched FROM pg_background_stats_v2()") == 2
    assert result(alice, first) == [("a",)]
    assert run(alice, "SELECT 'c'") == [("c",)]


def test_ended_submitted_workers_make_room(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 2")
    handles = []
    for _ in range(6):
        handles.append(submit(alice, "SELECT 1"))
        wait(alice, handles[-1])
    assert len(listed(alice)) <= 2
    for handle in handles:  # those that made room have not become strangers
        wait(alice, handle)
        detach(alice, handle)
        with pytest.raises(psycopg.Error, match=r"tracks no background worker|does not match"):
            detach(alice, handle)
    assert alice.value("SELECT workers_completed FROM pg_background_stats_v2()") == 6


def test_many_submitted_workers_that_made_room_can_be_detached(alice: Session) -> None:
    for setting in ("max_workers = 4", "pool_size = 4", "launch_timeout = '20s'"):
        alice.execute(f"SET pg_background.{setting}")
    submits = "SELECT pg_background_submit_v2('SELECT 1') AS h FROM generate_series(1, 400)"
    for handle in alice.rows(f"SELECT (h).pid, (h).cookie FROM ({submits}) AS s"):
        detach(alice, Handle(*handle))


def test_lower_limit_is_for_new_workers_only(alice: Session) -> None:
    handles = [launch(alice, "SELECT 'x'") for _ in range(3)]
    alice.execute("SET pg_background.max_workers = 1")
    with sqlstate("53400"):
        launch(alice, "SELECT 'y'")
    assert [result(alice, handle) for handle in handles] == [[("x",)]] * 3


def test_launch_timeout_waits_for_a_submitted_worker_to_end(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 1; SET pg_background.launch_timeout = '10s'")
    submit(alice, "SELECT pg_sleep(0.4)")
    started = time.monotonic()
    used = cpu_seconds(alice.pid)
    handle = launch(alice, "SELECT 'next'")
    assert 0.3 < time.monotonic() - started < 2
    assert cpu_seconds(alice.pid) - used < 0.1
    assert result(alice, handle) == [("next",)]


def test_launch_timeout_is_the_longest_wait(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 1; SET pg_background.launch_timeout = '300ms'")
    handle = submit(alice, "SELECT pg_sleep(60)")
    started = time.monotonic()
    with sqlstate("53400"):
        launch(alice, "SELECT 1")
    assert 0.3 <= time.monotonic() - started < 0.6
    alice.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)


def test_launch_that_waits_can_be_canceled(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 1; SET pg_background.launch_timeout = '1min'")
    handle = submit(alice, "SELECT pg_sleep(60)")
    alice.execute("SET statement_timeout = '200ms'")
    started = time.monotonic()
    with sqlstate("57014"):
        launch(alice, "SELECT 1")
    assert time.monotonic() - started < 0.6
    alice.execute("SET statement_timeout = 0")
    alice.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)


# --- connections of the server --------------------------------------------------------------------

_FULL = {"max_connections": "16", "superuser_reserved_connections": "3", "autovacuum": "off"}


@pytest.fixture
def small(start_cluster: Callable[..., Cluster]) -> Iterator[tuple[Cluster, Session]]:
    """A server with 13 connections for everybody, and an ordinary role's session in it, its supervisor running."""
    cluster = start_cluster("trust", _FULL)
    dbname = cluster.create_database()
    with cluster.connect(dbname) as admin:
        admin.execute("CREATE ROLE ordinary LOGIN; GRANT pgbackground_role TO ordinary")
    with cluster.connect(dbname, "ordinary") as session:
        session.execute("SET pg_background.pool_size = 0")
        run(session, "SELECT 'ready'")
        wait_until(lambda: cluster.workers(dbname) == [])
        session.execute("RESET pg_background.pool_size")
        yield cluster, session


@pytest.mark.local_server
def test_full_server_is_53300_and_reserved_connections_stay_free(small: tuple[Cluster, Session]) -> None:
    cluster, session = small
    handles: list[Handle] = []
    with sqlstate("53300") as raised:
        launch_many(session, handles)
    assert "pg_background.launch_timeout" in (raised.diag.message_hint or "")
    assert len(handles) == 13 - 2  # without this session and the supervisor
    reserved = [cluster.connect() for _ in range(3)]
    for admin in reserved:
        admin.close()
    assert [result(session, handle) for handle in handles] == [[("x",)]] * len(handles)
    assert run(session, "SELECT 'again'") == [("again",)]


def connect_when_free(cluster: Cluster, dbname: str) -> Session:
    """Connect once the server has a slot: a backend leaves pg_stat_activity a moment before it gives up its own."""
    found: list[Session] = []

    def connected() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            found.append(cluster.connect(dbname, "ordinary"))
        return bool(found)

    wait_until(connected)
    return found[0]


@pytest.mark.local_server
def test_a_launch_that_waits_for_a_connection_lets_others_start_the_supervisor(small: tuple[Cluster, Session]) -> None:
    cluster, session = small
    dbname = session.info.dbname
    others = [cluster.connect(dbname, "ordinary") for _ in range(10)]
    with cluster.connect(dbname) as admin, ThreadPoolExecutor(1) as pool:
        path = control_path(cluster, admin)
        terminate_supervisor(admin)
        wait_until(lambda: not path.exists())
        others[0].execute("SET pg_background.launch_timeout = '20s'")
        launched = pool.submit(launch, others[0], "SELECT 'late'")  # a supervisor has the last connection
        wait_until(lambda: supervisor_pids(admin))
        wait_until(lambda: is_free(path.with_name(path.name + ".start")), what="the right to start one")
        assert not launched.done()
        others.pop().close()
        assert result(others[0], launched.result()) == [("late",)]
    for other in others:
        other.close()


@pytest.mark.local_server
@pytest.mark.parametrize("had_one", [False, True])
@pytest.mark.parametrize("call", ["launch_v2", "submit_v2", "submit_on_commit_v2"])
def test_launch_timeout_waits_for_the_supervisors_connection_as_well(
    small: tuple[Cluster, Session], call: str, had_one: bool
) -> None:
    cluster, session = small
    dbname = session.info.dbname
    others = [cluster.connect(dbname, "ordinary")]
    if had_one:
        others[0].execute("SET pg_background.pool_size = 0")
        run(others[0], "SELECT 'ready'")
        wait_until(lambda: cluster.workers(dbname) == [])
    others += [connect_when_free(cluster, dbname) for _ in range(9)]
    with cluster.connect(dbname) as admin, ThreadPoolExecutor(1) as pool:
        path = control_path(cluster, admin)
        terminate_supervisor(admin)
        wait_until(lambda: not path.exists())
        others.append(connect_when_free(cluster, dbname))
        query = f"SELECT pid, cookie FROM pg_background_{call}('SELECT 1')"
        with sqlstate("53300"):
            others[0].execute(query)
        others[0].execute("SET pg_background.launch_timeout = '20s'")
        launched = pool.submit(others[0].rows, query)
        with pytest.raises(TimeoutError):
            launched.result(0.5)
        for _ in range(2):
            others.pop().close()
        wait(others[0], Handle(*launched.result()[0]))
    for other in others:
        other.close()


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of this file."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.local_server
def test_launch_timeout_waits_for_a_connection_without_polling_hard(small: tuple[Cluster, Session]) -> None:
    cluster, session = small
    dbname = session.info.dbname
    session.execute("SET pg_background.pool_size = 0; SET pg_background.launch_timeout = '10s'")
    others = [cluster.connect(dbname, "ordinary") for _ in range(11)]
    with cluster.connect() as admin:
        fatal = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        assert admin.value(fatal) == 14
    timer = threading.Timer(0.7, others[0].close)
    used, started = cpu_seconds(session.pid), time.monotonic()
    timer.start()
    handle = launch(session, "SELECT 'late'")
    assert 0.6 < time.monotonic() - started < 2
    assert cpu_seconds(session.pid) - used < 0.15
    assert result(session, handle) == [("late",)]
    session.execute("SET pg_background.launch_timeout = '300ms'")
    others[0] = connect_when_free(cluster, dbname)
    started = time.monotonic()
    with sqlstate("53300"):
        launch(session, "SELECT 1")
    assert 0.3 <= time.monotonic() - started < 1
    for other in others:
        other.close()


def test_connection_limit_of_the_role_is_53300(alice: Session, conn: Session) -> None:
    conn.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT 2").format(sql.Identifier(alice.info.user)))
    first = launch(alice, "SELECT 'x' FROM pg_sleep(0.2)")
    with sqlstate("53300"):
        for _ in range(3):
            launch(alice, "SELECT 1 FROM pg_sleep(0.2)")
    conn.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT -1").format(sql.Identifier(alice.info.user)))
    assert result(alice, first) == [("x",)]


# --- file descriptors -----------------------------------------------------------------------------


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.local_server
def test_out_of_descriptors_is_53000_and_leaks_nothing(alice: Session, cluster: Cluster) -> None:
    alice.execute("SET pg_background.max_workers = 1000; SET pg_background.pool_size = 0")
    run(alice, "SELECT 'ready'")
    before = descriptors(alice.pid)
    soft, hard = resource.prlimit(alice.pid, resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path(f"/proc/{alice.pid}/fd").iterdir())
    resource.prlimit(alice.pid, resource.RLIMIT_NOFILE, (highest + 8, hard))
    handles: list[Handle] = []
    with sqlstate("53000") as raised:
        launch_many(alice, handles)
    assert "open files" in (raised.diag.message_hint or "")
    assert 1 <= len(handles) <= 20
    full = descriptors(alice.pid)
    for _ in range(5):
        with sqlstate("53000"):
            launch(alice, "SELECT 1")
    assert descriptors(alice.pid) == full
    assert [worker.pid for worker in listed(alice)] == [handle.pid for handle in handles]
    resource.prlimit(alice.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert [result(alice, handle) for handle in handles] == [[("x",)]] * len(handles)
    assert run(alice, "SELECT 'again'") == [("again",)]
    assert descriptors(alice.pid) <= before + 1
    wait_until(lambda: cluster.workers(alice.info.dbname) == [])


# --- many workers at once -------------------------------------------------------------------------


@pytest.mark.local_server
def test_two_hundred_workers_at_once(start_cluster: Callable[..., Cluster]) -> None:
    """All are there, each with its own result, and a call's cost grows no faster than their number."""
    cluster = start_cluster("trust", {"max_connections": "230"})
    with cluster.connect(cluster.create_database()) as session:
        session.execute("SET pg_background.max_workers = 200")
        costs = {}
        handles: list[Handle] = []
        for number in range(200):
            handles.append(
                launch(
                    session,
                    f"SELECT '{number}' FROM pg_advisory_xact_lock_shared(1)" if number % 2 else f"SELECT '{number}'",
                )
            )
            if len(handles) in (25, 200):
                costs[len(handles)] = _costs(session)
        with sqlstate("53400"):
            launch(session, "SELECT 1")
        for handle in handles:
            wait(session, handle)
        assert [worker.pid for worker in listed(session)] == [handle.pid for handle in handles]
        assert {worker.state for worker in listed(session)} == {"stopped"}
        assert session.rows(
            "SELECT workers_launched, workers_completed, workers_active FROM pg_background_stats_v2()"
        ) == [(200, 200, 0)]
        assert [result(session, handle)[0][0] for handle in handles] == [str(number) for number in range(200)]
        print(f"seconds for list and stats: {costs}")
        # Eight times as many workers: eight times the cost, with something to spare; a quadratic one grows 64 times.
        assert costs[200] < 24 * costs[25]
        for handle in handles[:3]:
            with sqlstate("42704"):
                detach(session, handle)


def _costs(session: Session) -> float:
    """The least of some runs, in seconds."""

    def once() -> float:
        started = time.perf_counter()
        session.rows("SELECT count(*) FROM pg_background_list")
        session.rows("SELECT * FROM pg_background_stats_v2()")
        return time.perf_counter() - started

    return min(once() for _ in range(20))


def test_a_submit_that_waits_for_room_misses_no_end(alice: Session) -> None:
    """It waited for news after it had heard that there was room, and gave up at launch_timeout."""
    alice.execute("SET pg_background.max_workers = 1; SET pg_background.launch_timeout = '2s'")
    alice.execute("DO $$ BEGIN FOR i IN 1..1500 LOOP PERFORM pg_background_submit_v2('SELECT 1'); END LOOP; END $$")
