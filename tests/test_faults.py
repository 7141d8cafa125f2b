"""System calls and calls of the server made to fail, one after the other: a clear error or recovery, and nothing left.

A fault comes from outside where it can: a limit of the operating system on a backend of ours (prlimit), a folder that
cannot be written to, a signal, a proxy that cuts a connection. Where it cannot, `failing` puts a function that fails in
the place of one in the session's own Python, as a superuser may.
"""

from __future__ import annotations

import errno
import resource
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from tests.background import Handle, detach, is_idle, launch, listed, result, run, wait
from tests.clusters import Cluster, Session, server_log, server_log_size, sqlstate, wait_until
from tests.supervision import control_path, descriptors, stopped, supervisor_pid, supervisor_pids, terminate_supervisor
from tests.test_survival import ended, outcome, submit

pytestmark = pytest.mark.local_server

_PUT_FAULT = """
DO LANGUAGE plpython3u $fault$
import os
import sys


class StandIn:
    def __init__(self, real, name, function):
        self._real, self._name, self._function = real, name, function

    def __getattr__(self, name):
        return self._function if name == self._name else getattr(self._real, name)


module_name, _, path = {place!r}.partition(".")
module = sys.modules["pg_background." + module_name]
owner_name, _, name = path.rpartition(".")
owner = getattr(module, owner_name) if owner_name else module
real, left = getattr(owner, name), [{times}]


def fail(*arguments, **named):
    if not left[0]:
        return real(*arguments, **named)
    left[0] -= 1
    raise OSError({number}, os.strerror({number}))


if owner_name:
    setattr(module, owner_name, StandIn(owner, name, fail))
else:
    setattr(module, name, fail)
$fault$
"""


def fail_once(session: Session, place: str, number: int, times: int = 1) -> None:
    """Makes a function of the session's Python fail: `place` is module.function, or module.imported.function."""
    session.execute(_PUT_FAULT.format(place=place, number=number, times=times))


@pytest.fixture
def session(connect: Callable[..., Session]) -> Session:
    """A superuser's session that keeps no workers, with a supervisor."""
    session = connect(**{"pg_background.pool_size": 0})
    assert run(session, "SELECT 5", "n int") == [(5,)]
    session.execute("DROP TABLE IF EXISTS done; CREATE TABLE done (number int)")
    return session


@pytest.fixture
def leaves_nothing(session: Session, conn: Session) -> Iterator[None]:
    """Whatever the test did to the session: the next calls work, and nothing is left over."""
    before = descriptors(session.pid)
    yield
    assert run(session, "SELECT 5", "n int") == [(5,)]
    handle = submit(session, "SELECT 6")
    wait(session, handle)
    assert ended(conn, handle) == ("stopped", "SELECT 1", 1, None)
    session.execute("SELECT pg_background_detach_all_v2()")
    wait_until(lambda: not listed(session) and descriptors(session.pid) <= before, what="no descriptor left over")
    assert len(supervisor_pids(conn)) == 1


# --- the launcher's system calls ------------------------------------------------------------------


class Fault(NamedTuple):
    """A system call that fails in the launcher, and what the user is to see of it: None for nothing."""

    place: str
    number: int
    sqlstate: str | None


_ON_THE_WAY_TO_A_SUPERVISOR = [
    Fault("messages.control_socket", errno.EMFILE, "53000"),
    Fault("messages.control_socket", errno.ENOBUFS, "58030"),
    Fault("starter.os.makedirs", errno.EACCES, "58030"),
    Fault("starter.os.open", errno.ENOSPC, "53100"),
    Fault("starter.os.open", errno.EMFILE, "53000"),
    Fault("starter.fcntl.flock", errno.ENOLCK, "58030"),
    Fault("messages.send", errno.EPIPE, None),
    Fault("messages.receive", errno.ECONNRESET, None),
]
_WITH_A_SUPERVISOR = [
    Fault("messages.send", errno.EPIPE, None),
    Fault("messages.send", errno.EMFILE, None),
    Fault("messages.send", errno.ETOOMANYREFS, None),  # too many descriptors on their way
    Fault("messages.send", errno.EAGAIN, None),
    Fault("messages.receive", errno.ECONNRESET, None),
]


def _names(faults: list[Fault]) -> list[str]:
    return [f"{fault.place} {errno.errorcode[fault.number]}" for fault in faults]


def on_commit(session: Session, query: str) -> Handle:
    """Submits a job for after the commit, which is at once."""
    call = "SELECT pid, cookie FROM pg_background_submit_on_commit_v2(%s)"
    return Handle(*session.rows(call, (query,))[0])


@contextmanager
def expected(code: str | None) -> Iterator[None]:
    """An error of that SQLSTATE, or none."""
    if code is None:
        yield
    else:
        with sqlstate(code):
            yield


@pytest.mark.parametrize("fault", _ON_THE_WAY_TO_A_SUPERVISOR, ids=_names(_ON_THE_WAY_TO_A_SUPERVISOR))
def test_system_calls_on_the_way_to_a_supervisor(
    session: Session, conn: Session, leaves_nothing: None, fault: Fault
) -> None:
    terminate_supervisor(conn)
    fail_once(session, fault.place, fault.number)
    with expected(fault.sqlstate):
        wait(session, submit(session, "SELECT 1"))


@pytest.mark.parametrize("call", ["launch", "submit", "on commit"])
@pytest.mark.parametrize("fault", _WITH_A_SUPERVISOR, ids=_names(_WITH_A_SUPERVISOR))
def test_system_calls_with_a_supervisor(
    session: Session, conn: Session, leaves_nothing: None, fault: Fault, call: str
) -> None:
    start = {"launch": "launch_v2", "submit": "submit_v2", "on commit": "submit_on_commit_v2"}[call]
    fail_once(session, fault.place, fault.number)
    with expected(fault.sqlstate):
        session.execute(f"SELECT pg_background_{start}('INSERT INTO done VALUES (1)')")
    wait_until(lambda: conn.value("SELECT count(*) FROM done") == 1, what="the job's commit")


@pytest.mark.parametrize(
    ("place", "number", "code"),
    [
        ("past_libpq.os.write", errno.EPIPE, "08006"),
        ("past_libpq.os.write", errno.ECONNRESET, "08006"),
        ("on_commit.os.memfd_create", errno.EMFILE, "53000"),
        ("on_commit.os.memfd_create", errno.ENOMEM, "53200"),
        ("on_commit.os.write", errno.ENOSPC, "53100"),
    ],
)
def test_a_job_that_cannot_be_sent(
    session: Session, conn: Session, leaves_nothing: None, place: str, number: int, code: str
) -> None:
    call = "submit_on_commit_v2" if place.startswith("on_commit") else "submit_v2"
    wait(session, on_commit(session, "SELECT 1"))  # which loads what is to fail
    fail_once(session, place, number)
    with sqlstate(code):
        session.execute(f"SELECT pg_background_{call}('INSERT INTO done VALUES (1)')")
    running = "SELECT count(*) FROM pg_background_activity WHERE state = 'running'"
    wait_until(lambda: conn.value(running) == 0, what="its end in the table")
    assert conn.value("SELECT count(*) FROM done") == 0


def test_a_worker_that_is_terminated_while_its_job_is_sent(
    session: Session, conn: Session, leaves_nothing: None
) -> None:
    session.execute("SET pg_background.pool_size = 1")
    handle = launch(session, "SELECT 1")
    result(session, handle, "n int")
    running = "SELECT count(*) FROM pg_background_activity WHERE state = 'running'"
    read = (
        "SELECT FROM pg_background_launch_v2(repeat('-', 30000000)) h,"
        " pg_background_result_v2(h.pid, h.cookie) AS r(t text)"
    )
    time.sleep(0.5)  # it has been cleaned by then
    with ThreadPoolExecutor(1) as pool:
        with stopped(handle.pid):
            reading = pool.submit(session.execute, read)
            wait_until(lambda: conn.value(running) == 1, what="the job in the table")
            time.sleep(0.5)  # its socket is full by then
            conn.execute("SELECT pg_terminate_backend(%s)", (handle.pid,))
        with pytest.raises(psycopg.Error) as raised:
            reading.result(20)
    assert raised.value.sqlstate in ("08006", "57P01")  # of the launch, or where that came through, of the result
    session.execute("SET pg_background.pool_size = 0")
    assert listed(session) == []


# --- folders and files ----------------------------------------------------------------------------


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made in the folder meanwhile."""
    mode = folder.stat().st_mode
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(mode)


def test_a_folder_in_which_no_supervisor_can_listen(
    session: Session, conn: Session, cluster: Cluster, leaves_nothing: None
) -> None:
    path = control_path(cluster, conn)
    terminate_supervisor(conn)
    for lock in (path.with_name(path.name + ".lock"), path.with_name(path.name + ".start")):
        lock.unlink()
    with read_only(path.parent), sqlstate("58030", "Permission denied"):
        launch(session, "SELECT 1")


def test_a_socket_that_the_supervisor_cannot_make(
    session: Session, conn: Session, cluster: Cluster, leaves_nothing: None
) -> None:
    """The lock files are there, but no socket can be."""
    path = control_path(cluster, conn)
    terminate_supervisor(conn)
    with read_only(path.parent), sqlstate("38000", "supervisor of background workers could not start"):
        launch(session, "SELECT 1")


_LONG_OUTPUT = {
    "rows": "SELECT repeat('x', 1000) FROM generate_series(1, 20000)",
    "notices": "DO $$BEGIN FOR i IN 1..10000 LOOP RAISE NOTICE '%', repeat('x', 1000); END LOOP; END$$",
}


@pytest.mark.parametrize("query", _LONG_OUTPUT.values(), ids=_LONG_OUTPUT)
def test_output_that_cannot_be_kept_in_a_file(
    session: Session, conn: Session, cluster: Cluster, leaves_nothing: None, query: str
) -> None:
    """What a wait reads of a worker goes to a file past 4 MB. The job ends well; no part of its output is returned."""
    handle = launch(session, query)
    with read_only(control_path(cluster, conn).parent):
        wait(session, handle)
    assert ended(conn, handle)[0] == "stopped"
    with sqlstate("58030", "Permission denied"):
        result(session, handle)


def test_output_that_cannot_be_kept_for_a_while(
    session: Session, conn: Session, cluster: Cluster, leaves_nothing: None
) -> None:
    """The file could be made again before the last rows come."""
    rows = "SELECT repeat('x', 1000) FROM generate_series(1, 20000)"
    handle = launch(session, f"{rows} UNION ALL SELECT pg_sleep(1)::text UNION ALL {rows}")
    with read_only(control_path(cluster, conn).parent):
        session.execute("SELECT pg_background_wait_v2_timeout(%s, %s, 500)", handle)
    wait(session, handle)
    with sqlstate("58030", "Permission denied"):
        result(session, handle)


@pytest.mark.parametrize("query", _LONG_OUTPUT.values(), ids=_LONG_OUTPUT)
def test_output_whose_file_may_not_grow(session: Session, conn: Session, leaves_nothing: None, query: str) -> None:
    """As with a full disk, where the error is ENOSPC."""
    handle = launch(session, query)
    before = resource.prlimit(session.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        wait(session, handle)
    finally:
        resource.prlimit(session.pid, resource.RLIMIT_FSIZE, before)
    assert ended(conn, handle)[0] == "stopped"
    with sqlstate("58030", "File too large"):
        result(session, handle)


# --- the supervisor -------------------------------------------------------------------------------


def test_a_commit_that_fails_is_tried_again(session: Session, conn: Session, leaves_nothing: None) -> None:
    conn.execute(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE EXCEPTION 'could not extend file: no space left on device' USING ERRCODE = 'disk_full'; END$$"
    )
    conn.execute(
        "CREATE CONSTRAINT TRIGGER full_disk AFTER INSERT OR UPDATE ON _pg_background_worker"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION full_disk()"
    )
    pid = supervisor_pid(conn)
    handles = [submit(session, "SELECT 1"), submit(session, "SELECT 1 / 0")]
    for handle in handles:
        wait(session, handle)
    assert not conn.rows("SELECT FROM pg_background_activity WHERE cookie = ANY(%s)", ([h.cookie for h in handles],))
    conn.execute("DROP FUNCTION full_disk() CASCADE")
    assert [ended(conn, handle)[0] for handle in handles] == ["stopped", "error"]
    assert supervisor_pid(conn) == pid


def test_a_supervisor_that_hangs_keeps_no_call_from_being_cancelled(
    session: Session, conn: Session, leaves_nothing: None
) -> None:
    handle = submit(session, "SELECT pg_sleep(0.1)")
    session.execute("SET statement_timeout = '300ms'")
    with stopped(supervisor_pid(conn)), sqlstate("57014"):
        wait(session, handle)
    session.execute("RESET statement_timeout")
    wait(session, handle)


def test_a_supervisor_that_hangs_delays_only(session: Session, conn: Session, leaves_nothing: None) -> None:
    with stopped(supervisor_pid(conn)):
        assert run(session, "SELECT 5", "n int") == [(5,)]  # which needs no answer of its
        handle = submit(session, "SELECT 6")
        wait_until(
            lambda: is_idle(conn, handle.pid),
            what="the end of the job",
        )
    wait(session, handle)


_LAUNCHES_WITHOUT_END = """
    DO $$
    DECLARE
        handle pg_background_handle;
    BEGIN
        LOOP
            handle := pg_background_launch_v2('SELECT 1');
            PERFORM FROM pg_background_result_v2(handle.pid, handle.cookie) AS (n int);
        END LOOP;
    END $$"""


def fill_line(session: Session) -> None:
    """Tells a supervisor that is stopped of so many jobs that no more fits, and ends by a timeout."""
    session.execute("SET statement_timeout = '2s'; SET pg_background.pool_size = 1")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(session.execute, _LAUNCHES_WITHOUT_END)
        try:
            error = call.exception(20)
        except TimeoutError:
            session.connection.cancel()  # that it does not end by itself is the defect
            raise
    assert isinstance(error, psycopg.errors.QueryCanceled)


@pytest.mark.parametrize("is_first_to_wait", ["a launch", "a result"])
def test_a_cancelled_call_ends_though_the_supervisor_takes_nothing(
    session: Session, conn: Session, is_first_to_wait: str, leaves_nothing: None
) -> None:
    session.execute("SET pg_background.pool_size = 1")
    run(session, "SELECT 1", "n int")  # its session is one that the supervisor knows
    with stopped(supervisor_pid(conn)):
        if is_first_to_wait == "a launch":
            submit(session, "SELECT 1")  # one message, where the others come in twos
        fill_line(session)
        fill_line(session)
    session.execute("RESET statement_timeout; SET pg_background.pool_size = 0")
    assert run(session, "SELECT 5", "n int") == [(5,)]


def test_a_detach_that_is_cancelled_is_told_later(session: Session, conn: Session, leaves_nothing: None) -> None:
    handles = [launch(session, "SELECT repeat('x', 1000) FROM generate_series(1, 20000)") for _ in range(5)]
    canceled = 0
    with stopped(supervisor_pid(conn)):
        fill_line(session)
        for handle in handles:  # what is said of the first ones may be so short that it still fits
            try:
                detach(session, handle)
            except psycopg.errors.QueryCanceled:
                canceled += 1
    assert canceled
    session.execute("RESET statement_timeout; SET pg_background.pool_size = 0")
    # What it could not be told goes to it with the session's calls, as it makes room.
    # (The line may have been full for a result of fill_line's: that worker stays listed.)
    cookies = {handle.cookie for handle in handles}
    wait_until(
        lambda: (
            cookies.isdisjoint(worker.cookie for worker in listed(session))
            and all(outcome(conn, handle) for handle in handles)
        ),
        what="the ends of all",
    )
    assert {outcome(conn, handle)[0] for handle in handles} == {"stopped"}


def test_rows_that_a_cancelled_statement_leaves_unread_are_let_go_in_its_abort(
    session: Session, cluster: Cluster, conn: Session, leaves_nothing: None
) -> None:
    """No query can be run and nothing be waited for there, though no supervisor is left to tell."""
    conn.execute("""
        CREATE FUNCTION is_read_fast(int) RETURNS bool LANGUAGE plpgsql AS
            $$BEGIN IF current_setting('test.slow', true) = 'on' AND $1 = 50000 THEN PERFORM pg_sleep(60); END IF;
            RETURN true; END$$;
        CREATE DOMAIN slowly_read AS int CHECK (is_read_fast(VALUE));
        CREATE TYPE row_slowly_read AS (n slowly_read)""")
    handle = launch(session, "SELECT generate_series(1, 1000000)")
    session.execute("SET test.slow = 'on'; SET statement_timeout = '2s'")
    terminate_supervisor(conn)
    size = server_log_size(cluster)
    with sqlstate("57014"):
        session.execute("SELECT pg_background_result_v2(%s, %s, NULL::row_slowly_read)", handle)
    session.execute("RESET statement_timeout")
    assert handle not in [(worker.pid, worker.cookie) for worker in listed(session)]
    wait_until(lambda: ended(conn, handle)[0] == "stopped", what="the end of a worker that nobody reads")
    assert "Exception ignored" not in server_log(cluster, size)
    conn.execute("DROP TYPE row_slowly_read; DROP DOMAIN slowly_read; DROP FUNCTION is_read_fast")


# --- a worker's connection ------------------------------------------------------------------------


class Proxy:
    """Stands between libpq and the server, and cuts each connection after so many pieces of the server's words."""

    def __init__(self, server: str, folder: str) -> None:
        self._server = server
        self.pieces: int | None = None  # None: as many as come
        self.seen = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{folder}/{Path(server).name}")
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        threads = []
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threads.append(threading.Thread(target=self._relay, args=(client,)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _relay(self, client: socket.socket) -> None:
        pieces = 0
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server, suppress(OSError):
            server.connect(self._server)
            while self.pieces is None or pieces < self.pieces:
                for source in select.select([client, server], [], [])[0]:
                    received = source.recv(1 << 16)
                    if not received:
                        return
                    (server if source is client else client).sendall(received)
                    pieces += source is server
                    self.seen = max(self.seen, pieces)

    def close(self) -> None:
        """Ends when the last connection has."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def proxy(session: Session, cluster: Cluster) -> Iterator[Proxy]:
    """Through it the session's workers log in from now on."""
    folder = tempfile.mkdtemp(prefix="pgbg-proxy-", dir="/tmp")
    port = session.value("SHOW port")
    proxy = Proxy(f"{session.value('SHOW unix_socket_directories')}/.s.PGSQL.{port}", folder)
    session.execute(
        "DO LANGUAGE plpython3u $do$\nimport sys\n"
        f"sys.modules['pg_background.loopback'].Loopback._socket_folder = lambda self: {folder.encode()!r}\n$do$"
    )
    yield proxy
    session.close()
    proxy.close()
    Path(folder, f".s.PGSQL.{port}").unlink()
    Path(folder).rmdir()


def test_a_connection_that_breaks_at_any_point_of_the_set_up(
    proxy: Proxy, session: Session, conn: Session, cluster: Cluster, current_database: str
) -> None:
    """After the first word of the server's, the second, and so on, until the job itself has been answered."""
    before = descriptors(session.pid)
    assert run(session, "SELECT 5", "n int") == [(5,)]
    last = proxy.seen
    assert last > 3
    for pieces in range(last):
        proxy.pieces = pieces
        with pytest.raises(psycopg.Error) as raised:
            run(session, "SELECT 5", "n int")
        assert raised.value.sqlstate in ("08001", "08006"), raised.value
        assert "Traceback" not in str(raised.value)
        session.execute("SELECT pg_background_detach_all_v2()")
        wait_until(lambda: not cluster.workers(current_database), what="no worker left")
        assert descriptors(session.pid) <= before
    proxy.pieces = None
    assert run(session, "SELECT 5", "n int") == [(5,)]
    running = "SELECT count(*) FROM pg_background_activity WHERE state = 'running'"
    wait_until(lambda: conn.value(running) == 0, what="all ends in the table")


def test_a_server_that_cannot_be_reached(session: Session, leaves_nothing: None) -> None:
    session.execute(
        "DO LANGUAGE plpython3u $do$\nimport sys\nsys.modules['pg_background.loopback'].folder ="
        " sys.modules['pg_background.loopback'].Loopback._socket_folder\n"
        "sys.modules['pg_background.loopback'].Loopback._socket_folder = lambda self: b'/nowhere'\n$do$"
    )
    for start in (launch, submit):
        with sqlstate("08001", "/nowhere"):
            start(session, "SELECT 1")
    session.execute(
        "DO LANGUAGE plpython3u $do$\nimport sys\nsys.modules['pg_background.loopback'].Loopback._socket_folder ="
        " sys.modules['pg_background.loopback'].folder\n$do$"
    )


# --- another Python ------------------------------------------------------------------------------------


_ANOTHER_PYTHON = """DO LANGUAGE plpython3u $$
from pg_background import session, starter
lines = [line.replace("MAGIC_NUMBER != b'", "MAGIC_NUMBER != b'another ") for line in session.ONLY_THIS_PYTHON]
session.ONLY_THIS_PYTHON = starter.ONLY_THIS_PYTHON = lines
$$"""


@pytest.mark.parametrize("what", ["worker", "supervisor"])
def test_a_python_that_was_replaced_under_an_open_session_is_an_error(alice: Session, conn: Session, what: str) -> None:
    """Code that was compiled for another one could crash the server."""
    run(conn, "SELECT 1", "n int")
    conn.execute(_ANOTHER_PYTHON)
    if what == "supervisor":
        terminate_supervisor(conn)
    else:
        conn.execute(f'SET pg_background.pool_size = 0; SET ROLE "{alice.info.user}"')
    with sqlstate("0A000") as raised:
        launch(conn, "SELECT 1")
    assert "Reconnect" in str(raised.diag.message_hint)
    assert run(alice, "SELECT 1", "n int") == [(1,)]


# --- cancels where nobody expects them -------------------------------------------------------------


def test_a_cancel_while_the_runtime_is_loaded_is_a_cancel(connect: Callable[..., Session], conn: Session) -> None:
    """Of the functions whose replies nobody checks as well."""
    fresh = connect()
    fresh.execute("SET statement_timeout = '100ms'")
    with conn.transaction():
        conn.execute("LOCK TABLE pg_extension")
        with pytest.raises(psycopg.errors.QueryCanceled):
            fresh.execute("SELECT _pg_background_proof(0)")
    fresh.execute("RESET statement_timeout")
    assert fresh.value("SELECT _pg_background_proof(0)").count(",") == 4
