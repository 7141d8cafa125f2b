"""The supervisor: one for each database, there when it is needed, gone when it is not, replaced when it dies."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pg_background import messages, wire
from pg_background.process import process_start

from tests.background import Handle, detach, is_idle, is_waiting, launch, listed, result, run, wait
from tests.clusters import Cluster, Role, Session, server_log, server_log_size, sqlstate, wait_until
from tests.supervision import (
    control_path,
    cpu_seconds,
    descriptors,
    stopped,
    supervisor_pid,
    supervisor_pids,
    terminate_supervisor,
)
from tests.test_survival import ended, submit

LOAD_SECONDS = 60 if os.environ.get("PG_BACKGROUND_LONG") else 3
_EVERY_TIMEOUT_MS = 50


@pytest.fixture
def busy(fresh_database: str, alice: Session) -> Iterator[Handle]:
    """A worker that runs until the end of the test."""
    handle = launch(alice, "SELECT pg_sleep(60)")
    yield handle
    if not alice.closed:
        with suppress(psycopg.Error):
            alice.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 0)", handle)


@contextmanager
def stranger(path: Path) -> Iterator[socket.socket]:
    """A connection to a control socket that speaks for itself; by a relative path, as that may be long."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        folder = os.open(path.parent, os.O_PATH)
        try:
            connection.connect(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        connection.settimeout(10)
        yield connection


def hears_the_end(connection: socket.socket) -> bool:
    """Whether the supervisor has closed the connection."""
    try:
        return connection.recv(100_000) == b""
    except ConnectionResetError:
        return True


# --- who it is ------------------------------------------------------------------------------------


def test_it_is_an_unprivileged_role_without_way_back(busy: Handle, conn: Session) -> None:
    seen = conn.rows(
        "SELECT usename, application_name, backend_type FROM pg_stat_activity WHERE pid = %s",
        (supervisor_pid(conn),),
    )
    assert seen == [("pgbackground_supervisor", "pg_background supervisor", "client backend")]


def test_it_holds_no_snapshot_and_no_lock_under_load(busy: Handle, alice: Session, conn: Session) -> None:
    """Sampled between its transactions: while it writes, it has a snapshot for less than a millisecond."""
    pid = supervisor_pid(conn)
    sample = (
        "SELECT backend_xmin IS NULL, backend_xid IS NULL,"
        " NOT EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.locktype = 'relation')"
        " FROM pg_stat_activity a WHERE pid = %s"
    )
    seen: Counter[tuple[bool, ...]] = Counter()
    stop = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < stop:
        submit(alice, "SELECT 1")
        seen[conn.rows(sample, (pid,))[0]] += 1
        oldest = conn.value("SELECT age(backend_xmin) FROM pg_stat_activity WHERE pid = %s", (pid,))
        assert oldest is None or oldest < 10
    assert seen[True, True, True] > 0.8 * seen.total(), seen


def test_timeouts_for_everybody_do_not_end_it(start_cluster: Callable[..., Cluster]) -> None:
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"]
    own = start_cluster()
    with own.connect() as admin:
        if admin.info.server_version >= 170000:
            names.append("transaction_timeout")
    database = own.create_database()
    with own.connect(database) as admin:
        for name in names:
            for where in (f"DATABASE {database}", f"ROLE {admin.info.user}", "ROLE pgbackground_supervisor", "SYSTEM"):
                admin.execute(f"ALTER {where} SET {name} = {_EVERY_TIMEOUT_MS}")
        admin.execute("SELECT pg_reload_conf()")
    with own.connect(database, options=" ".join(f"-c {name}=0" for name in names)) as session:
        handle = submit(session, "SELECT pg_sleep(0.5)")
        pid = supervisor_pid(session)
        time.sleep(6 * _EVERY_TIMEOUT_MS / 1000)
        assert ended(session, handle)[0] == "stopped"
        wait(session, submit(session, "SELECT 1"))
        assert supervisor_pid(session) == pid


# --- when it is there -----------------------------------------------------------------------------


def test_twenty_sessions_at_once_start_one(fresh_database: str, connect: Callable[..., Session], conn: Session) -> None:
    sessions = [connect() for _ in range(20)]
    barrier = threading.Barrier(len(sessions))
    seen: set[int] = set()
    running = True

    def start(session: Session) -> int:
        barrier.wait()
        return len(run(session, "SELECT 1", "n int"))

    def look() -> None:
        while running:
            pids = supervisor_pids(conn)
            seen.update(pid for pid in pids if conn.value(_SERVES, (pid,)))

    looking = threading.Thread(target=look)
    looking.start()
    with ThreadPoolExecutor(len(sessions)) as pool:
        assert list(pool.map(start, sessions)) == [1] * len(sessions)
    running = False
    looking.join()
    assert len(supervisor_pids(conn)) == 1
    assert len(seen | {supervisor_pid(conn)}) == 1, seen


_SERVES = "SELECT count(*) > 0 FROM pg_stat_activity WHERE pid = %s AND usename = 'pgbackground_supervisor'"


@pytest.mark.local_server
def test_whoever_waits_for_one_leaves_the_processor_to_it(
    cluster: Cluster, fresh_database: str, alice: Session, conn: Session
) -> None:
    path = control_path(cluster, conn)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with ThreadPoolExecutor(1) as pool, path.with_name(path.name + ".start").open("wb") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        ran = pool.submit(run, alice, "SELECT 'late'")
        wait_until(lambda: cluster.workers(fresh_database))
        used = [cpu_seconds(alice.pid) for _ in measured(seconds=3)]
        print(f"{used[-1] - used[1]:.4f} s of processor time in 2 s")
        assert used[-1] - used[1] < 0.05  # some 40 looks take 0.01 s; 900 would take 0.1
        assert not ran.done()
        fcntl.flock(another, fcntl.LOCK_UN)
        assert ran.result() == [("late",)]


def measured(seconds: int) -> Iterator[float]:
    """The time at the beginning, and after each second."""
    for _ in range(seconds):
        yield time.monotonic()
        time.sleep(1)
    yield time.monotonic()


def test_it_leaves_with_the_last_session(fresh_database: str, alice: Session, conn: Session) -> None:
    run(alice, "SELECT 1", "n int")
    pid = supervisor_pid(conn)
    alice.close()
    wait_until(lambda: not supervisor_pids(conn), timeout=5, what="its end")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="the end of its process")


def test_it_stays_for_a_worker_without_session(fresh_database: str, alice: Session, conn: Session) -> None:
    detach(alice, launch(alice, "SELECT pg_sleep(1)"))
    pid = supervisor_pid(conn)
    alice.close()
    time.sleep(0.3)
    assert supervisor_pid(conn) == pid
    wait_until(lambda: not supervisor_pids(conn), timeout=5, what="its end")


def test_database_can_be_dropped_at_once(cluster: Cluster) -> None:
    database = cluster.create_database()
    with cluster.connect(database) as session:
        for _ in range(5):
            submit(session, "SELECT 1")
    started = time.monotonic()
    cluster.drop_database(database)
    assert time.monotonic() - started < 5


@pytest.mark.local_server
def test_its_end_leaves_no_word_in_the_log_and_no_file(
    cluster: Cluster, fresh_database: str, alice: Session, conn: Session
) -> None:
    from tests.clusters import server_log, server_log_size

    size = server_log_size(cluster)
    run(alice, "SELECT 1", "n int")
    path = control_path(cluster, conn)
    assert path.is_socket()
    pid = supervisor_pid(conn)
    alice.close()
    wait_until(lambda: not supervisor_pids(conn), what="its end")
    assert not path.exists()
    assert not [line for line in server_log(cluster, size).splitlines() if f"[{pid}]" in line]


# --- what may come over its socket ----------------------------------------------------------------


@pytest.mark.local_server
@pytest.mark.parametrize(
    "packet",
    [
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[null]",
        b'["job"]',
        b'["job",[],0,null,{}]',
        b'["job",{"pid":"x","key":[]},0,null,{}]',
        b'["job",["x",[],{},1,2,3,4,5,6,7,8],0,null,{}]',
        b'["job",[1,2,3,4,5,6,7,8,1e300,9,10],0,null,{}]',
        b'["job",[1,2,3,4,5,6,7,8,9,10,11],"x",null,{}]',
        b'["finished",1]',
        b'["finished","x",5]',
        b'["wait",1,2]',
        b'["progress",{},[],"x"]',
        b'["cancel",1,1,"x","y"]',
        b'["detach",99]',
        b'["record",{"key":5,"pid":1,"state":"stopped","label":"\\u0000\\ud800"}]',
        b'["welcome"]',
        b'["job",' + b"[" * 60_000,
    ],
)
def test_garbage_harms_nobody(cluster: Cluster, busy: Handle, alice: Session, conn: Session, packet: bytes) -> None:
    pid = supervisor_pid(conn)
    before = descriptors(pid)
    with stranger(control_path(cluster, conn)) as connection:
        connection.send(packet)
        run(alice, "SELECT 1", "n int")
    handle = submit(alice, "SELECT 5")
    assert ended(alice, handle)[:2] == ("stopped", "SELECT 1")
    assert supervisor_pid(conn) == pid
    wait_until(lambda: descriptors(pid) <= before + 4, what="no descriptor left over")


@pytest.mark.local_server
def test_a_row_that_cannot_be_written_keeps_no_other_from_it(
    cluster: Cluster, busy: Handle, alice: Session, conn: Session
) -> None:
    with stranger(control_path(cluster, conn)) as connection:
        for key in range(1, 50):
            connection.send(b'["record",{"key":%d,"pid":"none","state":"stopped"}]' % key)
        handle = submit(alice, "SELECT 5")
        assert ended(alice, handle)[:2] == ("stopped", "SELECT 1")


def test_texts_longer_than_a_message_are_cut(busy: Handle, alice: Session) -> None:
    error = "DO $$BEGIN RAISE EXCEPTION '%', repeat('é', 1000000) USING DETAIL = repeat('d', 1000000); END$$"
    for start in (launch, submit):
        handle = start(alice, error)
        wait(alice, handle)
        assert ended(alice, handle) == ("error", None, None, "P0001")
        detach(alice, handle)
    texts = alice.rows("SELECT DISTINCT left(error_message, 3) FROM pg_background_activity WHERE state = 'error'")
    assert texts == [("ééé",)]


def test_a_session_that_hears_no_news_stops_nobody(
    busy: Handle, connect: Callable[..., Session], conn: Session
) -> None:
    deaf = connect(**{"pg_background.max_workers": 1000, "pg_background.pool_size": 50})
    deaf.execute("SET pg_background.launch_timeout = '60s'")
    handles = [
        Handle(*row)
        for row in deaf.rows(
            "SELECT (h).* FROM (SELECT pg_background_submit_v2('SELECT pg_sleep(0.5)') h FROM generate_series(1, 40)) s"
        )
    ]
    other = connect()
    for handle in handles:
        assert ended(other, handle)[0] == "stopped"
    wait(deaf, handles[0])
    assert {worker.state for worker in listed(deaf)} == {"stopped"}


@pytest.mark.local_server
def test_it_goes_on_without_descriptors(
    busy: Handle, alice: Session, conn: Session, connect: Callable[..., Session]
) -> None:
    import resource

    pid = supervisor_pid(conn)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert before[0] == before[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid), before[1]))
    late = connect()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: run(late, "SELECT 5", "n int"))
        time.sleep(0.5)
        assert not waiting.done()
        usage = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert waiting.result(20) == [(5,)]
    assert (int(usage[11]) + int(usage[12])) / os.sysconf("SC_CLK_TCK") < 10  # it did not spin
    assert supervisor_pid(conn) == pid


@pytest.mark.local_server
def test_a_worker_it_has_no_descriptor_for_is_an_error(busy: Handle, alice: Session, conn: Session) -> None:
    import resource

    read_later = launch(alice, "SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
    # A question is answered when all is known that was sent before it: that worker's socket has been taken by then.
    conn.execute("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", read_later)
    pid = supervisor_pid(conn)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid), before[1]))
    handle = launch(alice, "SELECT pg_sleep(0.2)")
    with sqlstate("53000", "file descriptors"):
        for _ in range(100):
            submit(alice, "SELECT 1")
            time.sleep(0.01)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    wait(alice, handle)
    assert run(alice, "SELECT 5", "n int") == [(5,)]
    assert len(result(alice, read_later)) == 5000


def announce(link: socket.socket, number: int, *sockets: int) -> None:
    """Tells the supervisor of a submitted job as its session would; this process stands for the worker."""
    pid, launched_us = os.getpid(), 1_800_000_000_000_000
    announcement = messages.Announcement(
        number, pid, number, 10, None, True, 65536, "SELECT", launched_us, process_start(pid), 1000
    )
    messages.send(link, [messages.JOB, announcement, 0, 1, {"clean_ups": 2}], *sockets)


def answer(tag: str) -> bytes:
    """CommandComplete and ReadyForQuery."""
    body = tag.encode() + b"\0"
    return b"C" + struct.pack("!I", len(body) + 4) + body + wire.READY_FOR_QUERY


def spin(seconds: float) -> None:
    """Passes less time than a sleep would take."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.local_server
def test_an_answer_stays_in_the_socket_until_its_job_is_announced(
    cluster: Cluster, busy: Handle, conn: Session
) -> None:
    """It was read at times, and lost, where the clean-up before it had come in pieces."""
    jobs = 500
    chance = random.Random(4)
    worker, duplicate = socket.socketpair()
    with worker, duplicate, stranger(control_path(cluster, conn)) as link:
        worker.sendall(answer("INSERT 0 1"))
        for number in range(1, jobs):
            announce(link, number, *([duplicate.fileno()] if number == 1 else []))
            for tag in ("DISCARD ALL", "SELECT 1", f"INSERT 0 {number + 1}"):
                worker.sendall(answer(tag))
                spin(chance.random() * 0.0003)
            ended = messages.receive(link)
            assert ended is not None
            assert (ended.message[2], ended.message[3]["command_tag"]) == (number, f"INSERT 0 {number}")
            if ended.message[4] is None:  # otherwise the clean-up came with it
                cleaned = messages.receive(link)
                assert cleaned is not None
                assert cleaned.message[2:] == [number, None, [], {}]
            else:
                assert ended.message[4] == []


# --- when it dies ---------------------------------------------------------------------------------


def test_the_outcome_of_a_launched_job_is_recorded_though_it_died(busy: Handle, alice: Session, conn: Session) -> None:
    handle = launch(alice, "SELECT pg_sleep(0.5)")
    terminate_supervisor(conn)
    wait(alice, handle)
    assert ended(alice, handle) == ("stopped", "SELECT 1", 1, None)
    assert listed(alice)[-1].state == "stopped"


def test_an_end_that_a_cancel_kept_from_it_is_told_by_the_next_call(
    fresh_database: str, cluster: Cluster, alice: Session, conn: Session
) -> None:
    """Until then no supervisor can be had: the lock of whoever starts one is held here."""
    handle = launch(alice, "SELECT pg_sleep(0.3)")
    terminate_supervisor(conn)
    with Path(f"{control_path(cluster, conn)}.start").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wait_until(
            lambda: is_idle(conn, handle.pid),
            what="the end of the job",
        )
        alice.execute("SET statement_timeout = '300ms'")
        with sqlstate("57014"):
            wait(alice, handle)
        alice.execute("RESET statement_timeout")
    run(alice, "SELECT 1", "n int")
    assert ended(conn, handle) == ("stopped", "SELECT 1", 1, None)


@pytest.mark.parametrize("kind", ["submitted", "detached"])
def test_a_job_it_reads_goes_on_after_its_death(busy: Handle, alice: Session, conn: Session, kind: str) -> None:
    query = "SELECT i, repeat('x', 500) FROM generate_series(1, 3000) i, pg_sleep(0.0002); SELECT pg_sleep(0.5)"
    handle = submit(alice, query) if kind == "submitted" else launch(alice, query)
    if kind == "detached":
        detach(alice, handle)
    time.sleep(0.1)
    terminate_supervisor(conn)
    alice.execute("SELECT pg_background_wait_v2(%s, %s)", handle)
    assert ended(alice, handle) == ("stopped", "SELECT 1", 1, None)


@pytest.mark.parametrize("launcher", ["idle", "gone"])
@pytest.mark.parametrize("kind", ["submitted", "detached"])
def test_terminated_once_it_sees_to_their_ends_what_nobody_else_reads(
    connect: Callable[..., Session], alice: Session, conn: Session, kind: str, launcher: str
) -> None:
    session = connect(Role(alice.info.user, "secret of alice"))
    query = "SELECT i, repeat('x', 500) FROM generate_series(1, 3000) i; SELECT pg_sleep(1)"
    handle = submit(session, query) if kind == "submitted" else launch(session, query)
    if kind == "detached":
        detach(session, handle)
    terminated = supervisor_pid(conn)
    if launcher == "gone":
        session.close()
    conn.execute("SELECT pg_terminate_backend(%s)", (terminated,))
    assert run(alice, "SELECT 'by its successor'") == [("by its successor",)]
    assert terminated in supervisor_pids(conn)
    wait(alice, handle)
    assert ended(alice, handle) == ("stopped", "SELECT 1", 1, None)
    wait_until(lambda: terminated not in supervisor_pids(conn), what="its end")
    assert run(alice if launcher == "gone" else session, "SELECT 'again'") == [("again",)]


def test_terminated_once_it_leaves_when_their_session_takes_them_along(alice: Session, conn: Session) -> None:
    handle = submit(alice, "SELECT pg_sleep(60)")
    terminated = supervisor_pid(conn)
    conn.execute("SELECT pg_terminate_backend(%s)", (terminated,))
    wait_until(lambda: listed(alice) and terminated not in supervisor_pids(conn), what="its end")
    alice.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    wait(alice, handle)
    assert ended(alice, handle) == ("canceled", None, None, "57014")


def test_terminated_once_it_ends_at_once_where_sessions_read_their_jobs_themselves(busy: Handle, conn: Session) -> None:
    assert conn.value("SELECT pg_terminate_backend(%s, 5000)", (supervisor_pid(conn),)) is True


def test_terminated_once_it_still_ends_what_runs_for_too_long(
    connect: Callable[..., Session], alice: Session, conn: Session
) -> None:
    session = connect(Role(alice.info.user, "secret of alice"))
    session.execute("SET pg_background.worker_timeout = '1s'")
    handle = submit(session, "SELECT pg_sleep(60)")
    conn.execute("SELECT pg_terminate_backend(%s)", (supervisor_pid(conn),))
    wait(alice, handle)
    assert ended(alice, handle) == ("error", None, None, "57014")


@pytest.mark.parametrize("table", ["free", "locked"])
def test_rows_of_jobs_that_nobody_knows_any_more_do_not_run_for_ever(
    fresh_database: str, conn: Session, connect: Callable[..., Session], table: str
) -> None:
    launcher, watcher = connect(), connect()
    handle = launch(launcher, "SELECT pg_sleep(60)")
    other = launch(watcher, "SELECT pg_sleep(60)")
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (launcher.pid,))
    terminate_supervisor(conn)
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (handle.pid,))
    assert ended(watcher, handle) == ("error", None, None, "08006")
    assert listed(watcher)[0].state == "running"
    with conn.transaction():
        if table == "locked":
            conn.execute("LOCK TABLE _pg_background_worker")
        wait(watcher, launch(watcher, "SELECT 1"))  # finds the next supervisor, which writes it down
    stored = "SELECT state, sqlstate, finished_at IS NOT NULL FROM _pg_background_worker WHERE key = %s"
    wait_until(lambda: conn.rows(stored, (handle.cookie,)) == [("error", "08006", True)], what="its end in the table")
    watcher.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 0)", other)


class Submitters:
    """Sessions that submit jobs while the supervisor is terminated again and again."""

    def __init__(self, sessions: list[Session], jobs_each: int) -> None:
        self.sessions, self.jobs_each = sessions, jobs_each
        self.handles: dict[int, Handle] = {}
        self.refused: Counter[str] = Counter()

    def run(self, position: int) -> None:
        session = self.sessions[position]
        for job in range(self.jobs_each):
            number = position * self.jobs_each + job
            try:
                self.handles[number] = submit(session, f"INSERT INTO done VALUES ({number})")
            except psycopg.Error as error:
                self.refused[f"{error.sqlstate} {error}"[:300]] += 1


def test_ends_of_launched_jobs_are_recorded_while_supervisors_end(
    alice: Session, conn: Session, connect: Callable[..., Session]
) -> None:
    """However a launch, an end and the change from one supervisor to the next meet."""
    alice.execute("CREATE TABLE log (n int)")
    sessions = [connect(Role(alice.info.user, alice.info.password)) for _ in range(4)]
    cookies: list[int] = []

    def launch_many(session: Session) -> None:
        for n in range(100):
            handle = launch(session, f"INSERT INTO log VALUES ({n})")
            assert result(session, handle) == [("INSERT 0 1",)]
            cookies.append(handle.cookie)

    with ThreadPoolExecutor(len(sessions)) as pool:
        runs = [pool.submit(launch_many, session) for session in sessions]
        for _ in range(8):
            for pid in supervisor_pids(conn):
                conn.execute("SELECT pg_terminate_backend(%s)", (pid,))
            wait_for(runs, timeout=0.3)
        for each in runs:
            each.result()
    query = (
        "SELECT c FROM unnest(%s::int8[]) c WHERE NOT EXISTS"
        " (SELECT FROM pg_background_activity a WHERE a.cookie = c AND a.command_tag = 'INSERT 0 1')"
    )
    wait_until(lambda: conn.rows(query, (cookies,)) == [], what="the outcomes")


def test_jobs_submitted_while_it_dies_commit_exactly_once(
    start_cluster: Callable[..., Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    own = start_cluster(settings={"max_connections": "300"})
    database = own.create_database()
    admin = own.connect(database)
    admin.execute("CREATE TABLE done (number int)")
    settings = "-c pg_background.max_workers=4 -c pg_background.pool_size=2 -c pg_background.launch_timeout=60s"
    submitters = Submitters([own.connect(database, options=settings) for _ in range(20)], 100)
    with ThreadPoolExecutor(20) as pool:
        running = [pool.submit(submitters.run, position) for position in range(20)]
        kills = 0
        chance = random.Random(4)
        while not all(future.done() for future in running) and kills < 10:
            time.sleep(0.1 + chance.random() * 0.5)
            for pid in supervisor_pids(admin):
                kills += admin.value("SELECT pg_terminate_backend(%s)::int", (pid,))
        for future in running:
            future.result()
        list(pool.map(lambda position: wait(submitters.sessions[position], _last(submitters, position)), range(20)))
        # Each submitter takes care of its own once more.
        list(pool.map(listed, submitters.sessions))
    committed = Counter(number for (number,) in admin.rows("SELECT number FROM done"))
    classes: Counter[tuple[str, ...]] = Counter()
    for number, handle in submitters.handles.items():
        state, tag, _, code = ended(admin, handle)
        classes["committed" if committed[number] else "not committed", state, tag or code] += 1
    with capsys.disabled():
        print(f"\n  {kills} supervisors terminated, {dict(submitters.refused)} refused, {dict(classes)}")
    assert max(committed.values()) == 1
    assert set(committed) >= set(submitters.handles)
    assert classes == {("committed", "stopped", "INSERT 0 1"): len(submitters.handles)}
    assert len(submitters.handles) > 1900
    assert kills >= 3
    for session in submitters.sessions:
        session.close()
    admin.close()


def _last(submitters: Submitters, position: int) -> Handle:
    first = position * submitters.jobs_each
    return max(item for item in submitters.handles.items() if first <= item[0] < first + submitters.jobs_each)[1]


# --- the server and the extension under it --------------------------------------------------------


@pytest.mark.parametrize("way", ["fast", "immediate", "postmaster killed"])
def test_restart_of_the_server_leaves_nothing_in_the_way(start_cluster: Callable[..., Cluster], way: str) -> None:
    own = start_cluster()
    database = own.create_database()
    session = own.connect(database)
    handle = launch(session, "SELECT pg_sleep(60)")
    detach(session, launch(session, "SELECT pg_sleep(60)"))
    submit(session, "SELECT 1")
    pid = supervisor_pid(session)
    if way == "postmaster killed":
        own.kill_postmaster()
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="the supervisor's end")
        own.start()
    else:
        own.restart(way)
    assert not Path(f"/proc/{pid}").exists()
    with own.connect(database) as again:
        assert run(again, "SELECT 5", "n int") == [(5,)]
        running = "SELECT count(*) FROM pg_background_activity WHERE state = 'running'"
        assert again.value(running) == 0
        lost = again.rows("SELECT sqlstate FROM pg_background_activity WHERE cookie = %s", (handle.cookie,))
        assert lost in ([], [("08006",)], [("57P01",)])
    session.close()


def test_extension_moves_to_another_schema_under_running_workers(
    busy: Handle, alice: Session, conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    orphaned = connect(role("orphaned"))
    orphan = submit(orphaned, "SELECT pg_sleep(1)")
    orphaned.close()
    handles = [launch(alice, "SELECT pg_sleep(1)"), submit(alice, "SELECT pg_sleep(1)")]
    conn.execute("CREATE SCHEMA elsewhere")
    conn.execute("ALTER EXTENSION pg_background SET SCHEMA elsewhere")
    conn.execute("GRANT USAGE ON SCHEMA elsewhere TO pgbackground_role")
    alice.execute("SET search_path = elsewhere, public")
    conn.execute("SET search_path = elsewhere, public")
    for handle in handles:
        wait(alice, handle, schema="elsewhere")
        assert ended(alice, handle) == ("stopped", "SELECT 1", 1, None)
    assert ended(conn, orphan) == ("stopped", "SELECT 1", 1, None)
    assert result(alice, launch(alice, "SELECT 5", schema="elsewhere"), "n int", schema="elsewhere") == [(5,)]


def test_extension_is_dropped_and_made_again_under_running_workers(busy: Handle, conn: Session) -> None:
    conn.execute("CREATE TABLE done (number int)")
    handles = [
        launch(conn, "INSERT INTO done SELECT 1 FROM pg_sleep(0.5)"),
        submit(conn, "INSERT INTO done SELECT 2 FROM pg_sleep(0.5)"),
    ]
    conn.execute("DROP EXTENSION pg_background")
    with sqlstate("42883"):
        wait(conn, handles[0])
    wait_until(lambda: conn.value("SELECT count(*) FROM done") == 2, what="both commits")
    conn.execute("CREATE EXTENSION pg_background")
    assert run(conn, "SELECT 5", "n int") == [(5,)]
    handle = submit(conn, "INSERT INTO done VALUES (3)")
    assert ended(conn, handle) == ("stopped", "INSERT 0 1", 1, None)
    assert len(supervisor_pids(conn)) <= 2


def test_whoever_locks_its_table_stops_nobody(busy: Handle, alice: Session, conn: Session) -> None:
    with conn.transaction():
        conn.execute("LOCK TABLE _pg_background_worker")
        handle = submit(alice, "SELECT 5")
        wait(alice, handle)
        wait(conn, submit(conn, "SELECT 5"))
        conn.execute("SELECT pg_terminate_backend(%s, 5000)", (supervisor_pid(conn),))
        assert not Path(f"/proc/{supervisor_pids(conn)}").exists()


def test_an_end_that_it_hears_of_while_its_table_is_locked_stays(alice: Session, conn: Session, connect: Any) -> None:
    launcher = connect(Role(alice.info.user, "secret of alice"))
    handle = launch(launcher, "SELECT 'x' FROM pg_sleep(0.5)")
    wait_until(lambda: conn.rows(_STORED, (handle.cookie,)) == [("running", None)], what="its row")
    with conn.transaction():
        conn.execute("LOCK TABLE _pg_background_worker")
        terminate_supervisor(conn)
        other = launch(alice, "SELECT pg_sleep(60)")
        wait_until(lambda: is_idle(alice, handle.pid), what="the job's end")
        assert result(launcher, handle) == [("x",)]
        gone = {(launcher.pid,), (handle.pid,)}
        launcher.close()
        wait_until(lambda: not gone.intersection(alice.rows("SELECT pid FROM pg_stat_activity")), what="their ends")
    wait(alice, handle)
    wait_until(lambda: conn.rows(_STORED, (handle.cookie,)) != [("running", None)], what="its end in the table")
    assert conn.rows(_STORED, (handle.cookie,)) == [("stopped", None)]
    alice.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 0)", other)


_STORED = "SELECT state, sqlstate FROM _pg_background_worker WHERE key = %s"


def test_a_handle_is_known_though_the_table_cannot_be_read(alice: Session, conn: Session, connect: Any) -> None:
    """The successor knows it from the table alone, until the session comes over."""
    launcher = connect(Role(alice.info.user, "secret of alice"))
    handle = launch(launcher, "SELECT 'x' FROM pg_sleep(0.5)")
    wait_until(lambda: conn.rows(_STORED, (handle.cookie,)) == [("running", None)], what="its row")
    with ThreadPoolExecutor(1) as pool:
        with conn.transaction():
            conn.execute("LOCK TABLE _pg_background_worker")
            terminate_supervisor(conn)
            waits = pool.submit(wait, alice, handle)
            wait_until(lambda: supervisor_pids(conn), what="a successor")
            with suppress(TimeoutError):
                waits.result(1.5)
            assert not waits.done()
        assert result(launcher, handle) == [("x",)]
        waits.result(10)


def test_a_cancel_is_not_for_it(busy: Handle, alice: Session, conn: Session) -> None:
    pid = supervisor_pid(conn)
    for _ in range(20):
        conn.execute("SELECT pg_cancel_backend(%s)", (pid,))
        wait(alice, submit(alice, "SELECT 1"))
    assert supervisor_pid(conn) == pid


def test_a_cancel_is_not_for_it_while_it_looks_at_a_worker(busy: Handle, alice: Session, conn: Session) -> None:
    """Before it terminates a worker it looks whether that is in a transaction; a stopped one makes it look for long."""
    pid = supervisor_pid(conn)
    alice.execute("SET pg_background.worker_timeout = '300ms'")
    handle = submit(alice, "SELECT pg_sleep(60)")
    wait_until(lambda: is_waiting(conn, handle, "PgSleep"), what="the job's sleep")
    with stopped(handle.pid):
        for _ in range(50):
            conn.execute("SELECT pg_cancel_backend(%s), pg_sleep(0.02)", (pid,))
    assert supervisor_pid(conn) == pid
    assert ended(alice, handle) == ("error", None, None, "57014")


def test_a_full_disk_is_waited_out(busy: Handle, alice: Session, conn: Session) -> None:
    """A trigger stands in for the disk: the error comes from the server, where a full disk's would."""
    conn.execute(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE EXCEPTION 'could not extend file: no space left on device' USING ERRCODE = 'disk_full'; END$$"
    )
    pid = supervisor_pid(conn)
    conn.execute("CREATE TRIGGER full_disk BEFORE INSERT ON _pg_background_worker EXECUTE FUNCTION full_disk()")
    handles = [submit(alice, f"SELECT {number}") for number in range(100)]
    wait(alice, handles[-1])
    assert conn.value("SELECT count(*) FROM pg_background_activity WHERE state = 'stopped'") == 0
    conn.execute("DROP FUNCTION full_disk() CASCADE")
    for handle in handles:
        assert ended(alice, handle)[0] == "stopped"
    assert supervisor_pid(conn) == pid


def test_its_table_does_not_grow_with_the_number_of_jobs(fresh_database: str, conn: Session) -> None:
    conn.execute("SET pg_background.launch_timeout = '60s'")
    size = "SELECT pg_relation_size('_pg_background_worker')"
    submitting = "SELECT count(pg_background_submit_v2('SELECT 1')) FROM generate_series(1, 1000)"
    conn.execute(submitting)
    wait(conn, submit(conn, "SELECT 1"))
    first = conn.value(size)
    conn.execute(submitting)
    wait(conn, submit(conn, "SELECT 1"))
    assert conn.value(size) < 3 * first + 8192
    assert conn.value("SELECT count(*) FROM pg_background_activity WHERE state = 'stopped'") > 1900


def test_a_worker_handed_over_after_its_end_runs_the_next_job(cluster: Cluster, alice: Session, conn: Session) -> None:
    """Its session had not looked when another supervisor took over, which knew that end from the table."""
    handle = launch(alice, "SELECT pg_sleep(0.2), 1")
    wait(conn, handle)
    logged = server_log_size(cluster)
    terminate_supervisor(conn)
    # Hands the first one over.
    later = [launch(alice, "SELECT 2")]
    assert result(alice, handle, "a text, b int") == [("", 1)]
    later.append(launch(alice, "SELECT 2"))
    assert later[1].pid == handle.pid
    for job in later:
        assert result(alice, job, "n int") == [(2,)]
    outcome = "SELECT state, command_tag FROM pg_background_outcome_v2(%s, %s)"
    for job in (handle, *later):
        wait_until(lambda job=job: conn.rows(outcome, job) == [("stopped", "SELECT 1")])  # type: ignore[misc]
    assert "no message was expected" not in server_log(cluster, logged)
