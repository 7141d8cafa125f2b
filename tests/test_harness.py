"""The harness itself: a test-suite that cannot fail proves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from port_for import get_port

from tests import clusters
from tests.clusters import (
    EXTENSIONS,
    SETUPS,
    SUPERVISOR_NAME,
    WORKER_NAME,
    Cluster,
    Role,
    Session,
    check_no_crash,
    check_no_worker_left,
    find_pg_config,
    server_log,
    server_log_size,
    sqlstate,
    wait_until,
)

if TYPE_CHECKING:
    from _pytest.pytester import Pytester, RunResult

pytest_plugins = ["pytester"]

CHECKOUT = Path(__file__).resolve().parent.parent
Connect = Callable[..., Session]
NewRole = Callable[..., Role]
RunInner = Callable[[str, "Cluster | None"], "RunResult"]


@pytest.fixture
def run_inner(pytester: Pytester, monkeypatch: pytest.MonkeyPatch) -> RunInner:
    """Runs a test module under this harness in a process of its own, on a running server or on none."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT), prepend=os.pathsep)

    def run(code: str, cluster: Cluster | None) -> RunResult:
        pytester.makepyfile(code)
        options = [f"--dsn-of-running-server={cluster.conninfo}"] if cluster else []
        return pytester.runpytest_subprocess("-p", "tests.conftest", *options)

    return run


# --- set-ups --------------------------------------------------------------------------------------


def test_runs_as_a_user_that_postgresql_accepts() -> None:
    assert os.geteuid() != 0
    assert os.access(Path.home(), os.W_OK)


@pytest.mark.local_server
@pytest.mark.setups("trust", "peer", "notcp", "renamed")
def test_rules_in_force_are_those_of_the_set_up(cluster: Cluster) -> None:
    with cluster.connect() as admin:
        in_force = admin.rows("SELECT type, auth_method, error FROM pg_catalog.pg_hba_file_rules")
    written = [(rule.split()[0], rule.split()[-1], None) for rule in SETUPS[cluster.setup].hba]
    assert in_force == written


@pytest.mark.local_server
@pytest.mark.setups("peer")
def test_peer_lets_a_role_in_by_password_over_tcp_only(cluster: Cluster, current_database: str, role: NewRole) -> None:
    bob = role("bob")
    with cluster.connect(current_database, bob) as session:
        assert session.value("SELECT inet_client_addr()") is not None
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        cluster.connect(current_database, bob, password="wrong")
    socket_folder = str(cluster.datadir.parent)
    with pytest.raises(psycopg.OperationalError, match="Peer authentication failed"):
        cluster.connect(current_database, bob, host=socket_folder)


@pytest.mark.local_server
@pytest.mark.setups("trust", "renamed")
def test_trust_asks_for_no_password(cluster: Cluster, current_database: str, role: NewRole) -> None:
    with cluster.connect(current_database, role(), password="wrong", host="127.0.0.1") as session:
        assert session.value("SELECT 1") == 1


@pytest.mark.local_server
@pytest.mark.setups("notcp")
def test_notcp_has_no_tcp(cluster: Cluster) -> None:
    with pytest.raises(psycopg.OperationalError, match="refused"):
        cluster.connect(host="127.0.0.1")


@pytest.mark.local_server
@pytest.mark.setups("renamed")
def test_renamed_has_no_role_of_the_os_users_name(cluster: Cluster) -> None:
    with cluster.connect() as admin:
        assert admin.value("SELECT rolname FROM pg_catalog.pg_roles WHERE oid = 10") == "boss"
        names = admin.rows("SELECT FROM pg_catalog.pg_roles WHERE rolname = %s", (SETUPS["trust"].superuser,))
        assert names == []


@pytest.mark.local_server
def test_server_does_not_see_the_environment_of_the_tests(cluster: Cluster) -> None:
    environment = Path(f"/proc/{cluster.postmaster_pid}/environ").read_text().split("\0")
    assert [entry for entry in environment if entry.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))] == []


def test_server_is_the_one_that_pg_config_names(cluster: Cluster, conn: Session) -> None:
    if cluster.executor is None:
        pytest.skip("a running server")
    version = subprocess.check_output([str(find_pg_config()), "--version"], text=True).split()[1]
    assert str(conn.info.server_version // 10000) == version.split(".", maxsplit=1)[0]


def test_pg_config_without_plpython_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "pg_config"
    fake.write_text(f"#!/bin/sh\necho {tmp_path}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PG_CONFIG", str(fake))
    with pytest.raises(LookupError, match="no PostgreSQL server with PL/Python"):
        find_pg_config()


# --- databases, roles, connections ----------------------------------------------------------------


@pytest.mark.setups("trust", "peer", "notcp", "renamed")
def test_database_has_the_extensions(cluster: Cluster, conn: Session, database: str) -> None:
    assert conn.info.dbname == database
    installed = [name for (name,) in conn.rows("SELECT extname FROM pg_catalog.pg_extension")]
    assert set(EXTENSIONS) <= set(installed)
    assert conn.value("SELECT current_setting('is_superuser')") == "on"


def test_module_has_one_database(conn: Session, database: str) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS kept ()")
    assert conn.info.dbname == database


def test_fresh_database_is_another(conn: Session, fresh_database: str, database: str) -> None:
    assert conn.info.dbname == fresh_database != database
    assert conn.value("SELECT to_regclass('kept')") is None


def test_database_in_use_cannot_be_dropped_silently(cluster: Cluster) -> None:
    name = cluster.create_database()
    complaint = r"(?s)being accessed by other users.*the one in the way"
    in_the_way = cluster.connect(name, application_name="the one in the way")
    with in_the_way, pytest.raises(AssertionError, match=complaint):
        cluster.drop_database(name)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        cluster.connect(name)


@pytest.mark.setups("trust", "peer", "notcp", "renamed")
def test_alice_is_an_ordinary_role_that_was_only_granted_the_api(alice: Session) -> None:
    about = alice.rows(
        "SELECT rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls"
        " FROM pg_catalog.pg_roles WHERE rolname = current_user"
    )
    assert about == [(False, False, False, True, False, False)]
    groups = alice.rows("SELECT roleid::regrole::text FROM pg_auth_members WHERE member = current_user::regrole")
    assert groups == [("pgbackground_role",)]
    alice.execute("CREATE TABLE mine ()")


@pytest.mark.parametrize("name", ["plain", "Two Words", 'quote"quote', "it's", "back\\slash", "größe", "%s"])
def test_role_names_of_any_kind(connect: Connect, role: NewRole, conn: Session, name: str) -> None:
    someone = role(name)
    assert someone.startswith(name)
    assert connect(someone).value("SELECT session_user::text") == someone


@pytest.mark.setups("trust")
def test_role_is_dropped_with_what_it_owns(cluster: Cluster, conn: Session, run_inner: RunInner) -> None:
    left = "SELECT count(*) FROM pg_catalog.pg_roles WHERE rolname LIKE 'dropme%'"
    outcome = run_inner(
        """
        def test_one(role, connect):
            owner = role("dropme", schema=True)
            connect(owner).execute("CREATE TABLE t ()")
        """,
        cluster,
    )
    outcome.assert_outcomes(passed=1)
    assert conn.value(left) == 0


def test_settings_are_set_in_the_session(connect: Connect) -> None:
    session = connect(work_mem="1234kB", **{"myapp.tenant": "it's me"})
    assert session.value("SHOW work_mem") == "1234kB"
    assert session.value("SHOW myapp.tenant") == "it's me"
    assert session.value("SELECT source FROM pg_settings WHERE name = 'work_mem'") == "session"


def test_notices_are_collected_in_order(conn: Session) -> None:
    conn.execute("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$")
    assert conn.messages() == ["NOTICE: one", "WARNING: two"]
    assert [notice.sqlstate for notice in conn.notices] == ["00000", "01000"]


# --- the check for what a test leaves behind ------------------------------------------------------


def test_leaked_worker_is_reported_and_ended(cluster: Cluster, connect: Connect, database: str) -> None:
    leaked = connect(parameters={"application_name": WORKER_NAME})
    with pytest.raises(pytest.fail.Exception, match=f"(?s){leaked.pid}.*pg_stat_activity.*{WORKER_NAME}"):
        check_no_worker_left(cluster, database, timeout=0.1)
    check_no_worker_left(cluster, database)
    with pytest.raises(psycopg.OperationalError):
        leaked.execute("SELECT 1")


def test_worker_that_ends_in_time_is_no_leak(cluster: Cluster, connect: Connect, database: str) -> None:
    worker = connect(parameters={"application_name": WORKER_NAME})
    assert cluster.workers(database) == [worker.pid]
    timer = threading.Timer(0.3, worker.close)
    timer.start()
    check_no_worker_left(cluster, database)
    timer.join()


def test_supervisor_and_other_databases_are_no_leak(
    cluster: Cluster, connect: Connect, database: str, conn: Session
) -> None:
    connect(parameters={"application_name": SUPERVISOR_NAME})
    connect(dbname="postgres", parameters={"application_name": WORKER_NAME})
    connect(parameters={"application_name": "someone else"})
    check_no_worker_left(cluster, database, timeout=0)


@pytest.mark.setups("trust")
def test_leak_fails_the_test_that_leaks_and_only_that(cluster: Cluster, run_inner: RunInner) -> None:
    outcome = run_inner(
        """
        leaked = []
        def test_leaks(cluster, current_database):
            leaked.append(cluster.connect(current_database, application_name="pg_background"))
        def test_clean(conn):
            conn.execute("SELECT 1")
        """,
        cluster,
    )
    outcome.assert_outcomes(passed=2, errors=1)
    outcome.stdout.fnmatch_lines(["*ERROR at teardown of test_leaks*", "*worker sessions*are left*"])


@pytest.mark.setups("trust")
def test_running_server_is_used_and_local_tests_are_skipped(cluster: Cluster, run_inner: RunInner) -> None:
    outcome = run_inner(
        f"""
        import pytest
        def test_same(cluster, conn):
            assert cluster.setup == "running" and cluster.conninfo == {cluster.conninfo!r}
        @pytest.mark.setups("trust", "peer")
        def test_once(conn):
            assert conn.value("SELECT 1") == 1
        @pytest.mark.local_server
        def test_local(conn):
            assert False
        def test_own(start_cluster):
            assert False
        """,
        cluster,
    )
    outcome.assert_outcomes(passed=2, skipped=2)


@pytest.mark.setups("trust")
def test_without_the_extension_it_says_what_to_do(cluster: Cluster, run_inner: RunInner) -> None:
    outcome = run_inner(
        """
        import tests.clusters
        tests.clusters.EXTENSIONS = ("plpython3u", "pg_no_such_extension")
        def test_one(conn):
            assert False
        """,
        cluster,
    )
    assert outcome.ret == 4
    outcome.stdout.fnmatch_lines(["*no extension pg_no_such_extension: run make install first*"])


def test_unit_tests_start_no_server(run_inner: RunInner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_CONFIG", "/nowhere/pg_config")
    run_inner("def test_unit(): assert True", None).assert_outcomes(passed=1)


# --- servers that a test may stop and crash -------------------------------------------------------


def test_own_server_restarts_with_its_settings(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster("peer", {"max_connections": "17", "myapp.motto": "it's \\here"})
    for mode in ("fast", "immediate"):
        before = own.postmaster_pid
        own.restart(mode)
        assert own.postmaster_pid != before
        with own.connect() as admin:
            assert admin.value("SHOW max_connections") == "17"
            assert admin.value("SHOW myapp.motto") == "it's \\here"


def test_own_server_survives_the_end_of_its_postmaster(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster()
    own.kill_postmaster()
    with pytest.raises(psycopg.OperationalError):
        own.connect()
    own.start()
    with own.connect() as admin:
        assert admin.value("SELECT 1") == 1


def test_stopped_server_is_cleaned_up(start_cluster: Callable[..., Cluster]) -> None:
    start_cluster().stop("immediate")


def test_server_that_cannot_start_shows_its_log(start_cluster: Callable[..., Cluster]) -> None:
    with pytest.raises(RuntimeError, match='invalid value for parameter "work_mem": "plenty"'):
        start_cluster("trust", {"work_mem": "plenty"})


def test_taken_port_is_swapped_for_another(
    start_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], get_port([clusters.PORTS])]
        monkeypatch.setattr("tests.clusters.get_port", lambda _: ports.pop(0))
        start_cluster()
    assert ports == []


@pytest.mark.local_server
def test_server_that_does_not_stop_fails_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.clusters._STOP_SECONDS", "1")
    stuck = Cluster.start_new("trust")
    with stuck.connect() as session:
        os.kill(session.pid, signal.SIGSTOP)
        with pytest.raises(AssertionError, match="server does not shut down"):
            stuck.stop()
        os.kill(session.pid, signal.SIGCONT)
    stuck.close()
    assert not stuck.datadir.parent.exists()


def test_crash_of_a_backend_is_noticed(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster()
    check_no_crash(own, 0)
    start = server_log_size(own)
    with own.connect() as victim:
        os.kill(victim.pid, signal.SIGSEGV)
        wait_until(lambda: "was terminated by signal" in server_log(own, start), what="the crash in the log")
    with pytest.raises(pytest.fail.Exception, match="a backend crashed"):
        check_no_crash(own, start)


# --- helpers --------------------------------------------------------------------------------------


def test_wait_until_returns_what_came_or_fails_at_its_deadline() -> None:
    answers = iter([None, 0, "here"])
    assert wait_until(lambda: next(answers)) == "here"
    with pytest.raises(AssertionError, match=r"waited 0\.05 s in vain for the moon; last seen: False"):
        wait_until(lambda: False, timeout=0.05, what="the moon")


def test_sqlstate_accepts_the_right_error_only(conn: Session) -> None:
    with sqlstate("22012", match="division") as raised:
        conn.execute("SELECT 1/0")
    assert raised.diag.message_primary == "division by zero"
    with (
        pytest.raises(AssertionError, match="expected SQLSTATE 22012, got SQLSTATE 42601"),
        sqlstate("22012"),
    ):
        conn.execute("SELEC")
    with pytest.raises(AssertionError, match="not found in"), sqlstate("22012", match="zebra"):
        conn.execute("SELECT 1/0")
    with pytest.raises(pytest.fail.Exception, match="none was raised"), sqlstate("22012"):
        conn.execute("SELECT 1")


@pytest.mark.parametrize("field", ["", "DETAIL", "HINT"])
def test_sqlstate_refuses_a_traceback_wherever_it_shows(conn: Session, field: str) -> None:
    using = f" USING {field} = 'Traceback (most recent call last)'" if field else ""
    message = "bad" if field else "Traceback (most recent call last)"
    with pytest.raises(AssertionError, match="Traceback"), sqlstate("P0001"):
        conn.execute(f"DO $$ BEGIN RAISE '{message}'{using}; END $$")


def test_sqlstate_refuses_an_error_that_shows_plpython(conn: Session) -> None:
    with pytest.raises(AssertionError, match="PL/Python"), sqlstate("22012"):
        conn.execute("DO LANGUAGE plpython3u $$ plpy.execute('SELECT 1/0') $$")


# --- the run as another user ----------------------------------------------------------------------


def test_interpreter_is_one_that_this_user_may_run() -> None:
    subprocess.run([sys.executable, "-c", "import pytest, psycopg"], check=True)
