"""Workers reach their ends, and are accounted for, whatever becomes of the session that launched them."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from tests.background import Handle, detach, is_gone, launch, listed, wait
from tests.clusters import Cluster, Role, Session, wait_until
from tests.supervision import descriptors, supervisor_pid

# Both say more than any buffer on the way holds.
_CHATTY = (
    "DO $$BEGIN FOR i IN 1..300 LOOP RAISE NOTICE '% %', i, repeat('n', 200); END LOOP; END$$;"
    " SELECT i, repeat('r', 500) FROM generate_series(1, 400) i;"
    " INSERT INTO done VALUES ({number})"
)
_ROWS_LAST = (
    "INSERT INTO done VALUES ({number});"
    " DO $$BEGIN FOR i IN 1..50 LOOP RAISE NOTICE '%', repeat('n', 200); END LOOP; END$$;"
    " SELECT i, repeat('r', 500) FROM generate_series(1, 1000) i"
)
_LAUNCHERS, _JOBS_EACH, _LAUNCHERS_AT_ONCE = 30, 10, 3
_WAYS = ("exit", "terminate", "disconnect", "cancel a wait", "cancel a result")


@pytest.fixture
def owner(role: Callable[..., Role], connect: Callable[..., Session]) -> Role:
    """A role with a table in which its jobs leave their numbers."""
    owner = role("owner", schema=True)
    connect(owner).execute("CREATE TABLE done (number int)")
    return owner


@pytest.fixture
def watcher(connect: Callable[..., Session], owner: Role) -> Session:
    """A session of the owner's that stays."""
    return connect(owner)


def submit(session: Session, query: str) -> Handle:
    """Fire and forget."""
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def outcome(session: Session, handle: Handle) -> Any:
    """State, command tag, row count and SQLSTATE of a worker that has ended; None before."""
    rows = session.rows(
        "SELECT state, command_tag, row_count, sqlstate FROM pg_background_activity"
        " WHERE pid = %s AND cookie = %s AND state <> 'running'",
        handle,
    )
    return rows[0] if rows else None


def ended(session: Session, handle: Handle) -> Any:
    """The same, awaited."""
    return wait_until(lambda: outcome(session, handle), timeout=60, what="an outcome")


def disconnect(session: Session) -> None:
    """Ends a connection without a word to the server."""
    with socket.socket(fileno=os.dup(session.fileno())) as raw:
        raw.shutdown(socket.SHUT_RDWR)
    session.close()


# --- one job --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["exit", "terminate", "disconnect"])
@pytest.mark.parametrize("kind", ["launched", "read in part", "detached", "submitted"])
@pytest.mark.parametrize("job", [_CHATTY, _ROWS_LAST], ids=["chatty", "rows last"])
def test_a_worker_survives_its_launcher(
    watcher: Session, conn: Session, connect: Callable[..., Session], owner: Role, job: str, kind: str, way: str
) -> None:
    launcher = connect(owner)
    query = job.format(number=1)
    handle = submit(launcher, query) if kind == "submitted" else launch(launcher, query)
    if kind == "detached":
        detach(launcher, handle)
    if kind == "read in part":
        time.sleep(0.02)
        assert listed(launcher)[0].pid == handle.pid  # reads up to queue_size
    if way == "terminate":
        conn.execute("SELECT pg_terminate_backend(%s, 10000)", (launcher.pid,))
    if way == "disconnect":
        disconnect(launcher)
    launcher.close()
    expected = ("stopped", "INSERT 0 1", 1, None) if job is _CHATTY else ("stopped", "SELECT 1000", 1000, None)
    assert ended(watcher, handle) == expected
    assert watcher.rows("SELECT number FROM done") == [(1,)]


def test_the_error_of_an_orphan_is_recorded(watcher: Session, connect: Callable[..., Session], owner: Role) -> None:
    launcher = connect(owner)
    handles = [
        launch(launcher, "SELECT pg_sleep(0.2); SELECT 1/0"),
        submit(launcher, "SELECT pg_sleep(0.2); SELECT 1/0"),
    ]
    launcher.close()
    for handle in handles:
        assert ended(watcher, handle) == ("error", None, None, "22012")
    messages = watcher.rows("SELECT DISTINCT error_message FROM pg_background_activity")
    assert messages == [("division by zero",)]


@pytest.mark.parametrize("kind", ["launched", "submitted"])
def test_the_termination_of_an_orphan_is_recorded(
    watcher: Session, conn: Session, connect: Callable[..., Session], owner: Role, kind: str
) -> None:
    launcher = connect(owner)
    handle = (launch if kind == "launched" else submit)(launcher, "SELECT pg_sleep(60)")
    launcher.close()
    conn.execute("SELECT pg_terminate_backend(%s, 10000)", (handle.pid,))
    assert ended(watcher, handle) == ("error", None, None, "57P01")


def test_a_submitted_job_never_blocks_on_its_output(watcher: Session) -> None:
    """The session lives, and reads nothing."""
    wide = "SELECT i, repeat('x', 200) FROM generate_series(1, 300000) i"
    handle = submit(watcher, f"{wide}; INSERT INTO done VALUES (1)")
    assert ended(watcher, handle) == ("stopped", "INSERT 0 1", 1, None)
    assert watcher.rows("SELECT number FROM done") == [(1,)]


def test_a_job_whose_sql_was_not_sent_whole_does_not_run(
    watcher: Session, conn: Session, connect: Callable[..., Session], owner: Role
) -> None:
    """Its backend is stopped meanwhile, so that it cannot read all of the SQL."""
    launcher = connect(owner)
    wait(launcher, submit(launcher, "SELECT 1"))
    handle = launch(launcher, "SELECT pg_backend_pid()")
    wait(launcher, handle)
    launcher.execute("SELECT * FROM pg_background_result_v2(%s, %s) AS r(pid int)", handle)
    long = "INSERT INTO done VALUES (1) /*" + "x" * 10_000_000 + "*/"
    os.kill(handle.pid, 19)
    try:
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(lambda: submit(launcher, long))
            time.sleep(0.3)
            conn.execute("SELECT pg_terminate_backend(%s, 10000)", (launcher.pid,))
            with pytest.raises(psycopg.Error):
                sending.result(10)
    finally:
        os.kill(handle.pid, 18)
    wait_until(lambda: is_gone(conn, handle.pid))
    assert watcher.rows("SELECT FROM done") == []
    states = "SELECT count(*) FROM pg_background_activity WHERE state = 'running'"
    wait_until(lambda: watcher.value(states) == 0, what="no row that says running")


# --- 300 jobs -------------------------------------------------------------------------------------


class Launchers:
    """Sessions that launch, submit and detach, and come to their ends at random moments."""

    def __init__(self, connect: Callable[..., Session], owner: Role, admin: Session) -> None:
        self._connect, self._owner, self._admin = connect, owner, admin
        self._admin_lock = threading.Lock()
        self.handles: list[Handle] = []

    def run(self, number: int) -> None:
        """One launcher's life."""
        chance = random.Random(number)
        session = self._connect(self._owner)
        handles = [self._start(session, chance, number * _JOBS_EACH + job) for job in range(_JOBS_EACH)]
        time.sleep(chance.random() * 0.05)
        self._end(session, _WAYS[number % len(_WAYS)], chance)
        self.handles += handles

    def _start(self, session: Session, chance: random.Random, number: int) -> Handle:
        query = chance.choice((_CHATTY, _ROWS_LAST)).format(number=number)
        kind = chance.choice(("launch", "submit", "detach", "look"))
        handle = submit(session, query) if kind == "submit" else launch(session, query)
        if kind == "detach":
            detach(session, handle)
        if kind == "look":
            listed(session)
        return handle

    def _end(self, session: Session, way: str, chance: random.Random) -> None:
        if way == "terminate":
            with self._admin_lock:
                self._admin.execute("SELECT pg_terminate_backend(%s, 10000)", (session.pid,))
        elif way == "disconnect":
            disconnect(session)
        elif way != "exit":
            self._cancel_in_call(session, way, chance)
        session.close()

    def _cancel_in_call(self, session: Session, way: str, chance: random.Random) -> None:
        tracked = [Handle(worker.pid, worker.cookie) for worker in listed(session)]
        timer = threading.Timer(chance.random() * 0.05, session.cancel)
        timer.start()
        columns = " AS r(i int, t text)" if way == "cancel a result" else ""
        function = "result_v2" if way == "cancel a result" else "wait_v2"
        for handle in tracked:
            with suppress(psycopg.Error):
                session.execute(f"SELECT count(*) FROM pg_background_{function}(%s, %s){columns}", handle)
        timer.join()


def test_300_chatty_jobs_survive_300_of_300(
    watcher: Session,
    conn: Session,
    connect: Callable[..., Session],
    owner: Role,
    cluster: Cluster,
    current_database: str,
) -> None:
    wait(watcher, submit(watcher, "SELECT 1"))
    watcher.execute("SET pg_background.pool_size = 0")
    supervisor = supervisor_pid(conn)
    wait_until(lambda: not cluster.workers(current_database) or True)
    before = descriptors(supervisor)
    launchers = Launchers(connect, owner, conn)
    with ThreadPoolExecutor(_LAUNCHERS_AT_ONCE) as pool:
        list(pool.map(launchers.run, range(_LAUNCHERS)))
    total = _LAUNCHERS * _JOBS_EACH
    assert len(launchers.handles) == total
    finished = "SELECT count(*) FROM pg_background_activity WHERE finished_at IS NOT NULL"
    wait_until(lambda: watcher.value(finished) == total + 1, timeout=60, what="all outcomes")
    assert watcher.rows("SELECT state, sqlstate, count(*) FROM pg_background_activity GROUP BY 1, 2") == [
        ("stopped", None, total + 1)
    ]
    tags = watcher.rows("SELECT DISTINCT command_tag FROM pg_background_activity ORDER BY 1")
    assert tags == [("INSERT 0 1",), ("SELECT 1",), ("SELECT 1000",)]
    assert watcher.rows("SELECT count(*), count(DISTINCT number) FROM done") == [(total, total)]
    assert supervisor_pid(conn) == supervisor
    wait_until(lambda: descriptors(supervisor) <= before, what=f"no more than {before} descriptors")


def test_the_end_of_a_job_that_was_looked_at_is_not_lost_with_its_launcher(
    watcher: Session, conn: Session, connect: Callable[..., Session], owner: Role
) -> None:
    """Looking reads some of the rows ahead; the end of the answer may have come with them."""
    launcher = connect(owner)
    launcher.execute("SET pg_background.max_workers = 40")
    handles = [
        launch(launcher, f"SELECT repeat('x', 500) FROM generate_series(1, {count})") for count in range(110, 142)
    ]
    idle = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s) AND state = 'idle'"
    pids = [handle.pid for handle in handles]
    wait_until(lambda: conn.value(idle, (pids,)) == len(handles), what="the ends of all")
    listed(launcher)
    launcher.close()
    assert {ended(watcher, handle)[0] for handle in handles} == {"stopped"}
