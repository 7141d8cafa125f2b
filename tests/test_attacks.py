"""What one role tries against another's workers, by the API, by the internal functions, and around both.

Planted objects are in test_planted.py, rights that are taken back in test_revocation.py, the identity of workers in
test_identity.py, odd names in test_hostile_names.py. docs/security.md tells which test stands for what.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from sql_templates.api import INTERNAL
from tests.background import Handle, detach, launch, listed, result, run, wait
from tests.clusters import Cluster, Role, Session, sqlstate, wait_until
from tests.supervision import control_path, supervisor_pid, terminate_supervisor
from tests.test_supervisor import stranger

Connect = Callable[..., Session]
NewRole = Callable[..., Role]

SECRET = "the secret of bob"
ALL_SETUPS = pytest.mark.setups("trust", "peer", "notcp")
MEMBERS = (
    "SELECT p.oid::regprocedure::text, p.pronargs FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid"
    " AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e' JOIN pg_extension e ON e.oid = d.refobjid"
    " AND d.refclassid = 'pg_extension'::regclass WHERE e.extname = 'pg_background' ORDER BY 1"
)
# A value of each type: a strict function with a NULL is never called, and so not refused.
SOME = {
    **dict.fromkeys(("integer", "bigint", "oid", "anyelement"), "1"),
    **dict.fromkeys(("text[]", "pg_background_handle[]", "jsonb"), "'{}'"),
    "text": "'x'",
    "boolean": "true",
    "uuid": "'00000000-0000-4000-8000-000000000000'",
}
TABLES = ("_pg_background_worker", "_pg_background_marker")


@pytest.fixture
def bob(connect: Connect, role: NewRole) -> Session:
    """The victim."""
    return connect(role("bob"))


@pytest.fixture
def running(bob: Session) -> Iterator[Handle]:
    """bob's worker: it has said how far it is, and runs until the end of the test."""
    handle = launch(bob, f"SELECT pg_background_progress(7, '{SECRET}'); SELECT '{SECRET}', pg_sleep(600)")
    progress = "SELECT progress_msg FROM pg_background_get_progress_v2(%s, %s)"
    wait_until(lambda: bob.value(progress, handle) == SECRET, what="its progress")
    yield handle
    bob.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 0)", handle)


@pytest.fixture
def failed(bob: Session) -> Handle:
    """bob's worker that has ended with an error."""
    handle = launch(bob, f"DO $$ BEGIN RAISE EXCEPTION '{SECRET}' USING DETAIL = '{SECRET}'; END $$")
    wait(bob, handle)
    return handle


# --- who has no right at all ------------------------------------------------------------------------


@ALL_SETUPS
def test_a_role_without_the_right_can_call_and_read_nothing(connect: Connect, role: NewRole, conn: Session) -> None:
    session = connect(role("mallory", granted=False))
    members = conn.rows(MEMBERS)
    assert len(members) > 90
    for signature, count in members:
        name, _, types = signature.rstrip(")").partition("(")
        arguments = ", ".join(f"{SOME[kind]}::{kind}" for kind in types.split(",")[:count] if kind)
        with sqlstate("42501"):
            session.execute(f"SELECT {name}({arguments.replace('anyelement', 'int4')})")
    for relation in (*TABLES, "pg_background_list", "pg_background_activity"):
        with sqlstate("42501"):
            session.execute(f"SELECT * FROM {relation}")
    with sqlstate("42501"):
        session.execute("CREATE TEMP TABLE mine (handle pg_background_handle)")


@pytest.mark.parametrize("granted", [True, False])
def test_nobody_writes_the_tables_or_becomes_the_supervisor(connect: Connect, role: NewRole, granted: bool) -> None:
    session = connect(role("mallory", granted=granted))
    for table in TABLES:
        for command in (
            "TABLE {}",
            "INSERT INTO {} DEFAULT VALUES",
            "UPDATE {} SET role_oid = 10",
            "DELETE FROM {}",
            "TRUNCATE {}",
            "LOCK TABLE {} IN ACCESS SHARE MODE",
            "CREATE TRIGGER mine BEFORE INSERT ON {} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "ALTER TABLE {} ADD COLUMN mine int",
            "ANALYZE {}",
        ):
            if command.startswith("ANALYZE"):
                session.execute(command.format(table))  # a warning, and no more
                assert session.notices[-1].severity == "WARNING"
                continue
            with pytest.raises(psycopg.Error) as raised:
                session.execute(command.format(table))
            assert raised.value.sqlstate in ("42501", "25P01"), command
    for way in ("SET ROLE pgbackground_supervisor", "SET SESSION AUTHORIZATION pgbackground_supervisor"):
        with sqlstate("42501"):
            session.execute(way)


def test_the_owner_of_the_database_changes_nothing_of_the_extension(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str
) -> None:
    """It may own the schema public by that, and could rename it: docs/security.md says why it must be trusted."""
    owner = role("owner")
    back = sql.Identifier(conn.info.user)
    change = sql.SQL("ALTER DATABASE {} OWNER TO {}")
    conn.execute(change.format(sql.Identifier(fresh_database), sql.Identifier(owner)))
    session = connect(owner)
    replace = (
        "CREATE OR REPLACE FUNCTION public._pg_background_module_switch() RETURNS text LANGUAGE sql IMMUTABLE"
        " PARALLEL SAFE AS $f$ SELECT $module$raise SystemExit$module$::text $f$"
    )
    for command in (
        "DROP EXTENSION pg_background",
        "ALTER EXTENSION pg_background UPDATE",
        "ALTER EXTENSION pg_background SET SCHEMA pg_temp",
        "ALTER EXTENSION pg_background DROP FUNCTION public.pg_background_detach(int4)",
        replace,
        "ALTER FUNCTION public._pg_background_mark(oid) RESET search_path",
        "ALTER FUNCTION public._pg_background_mark(oid) OWNER TO CURRENT_USER",
        "CREATE RULE mine AS ON INSERT TO public._pg_background_worker DO INSTEAD NOTHING",
        "CREATE EVENT TRIGGER mine ON ddl_command_end EXECUTE FUNCTION public._pg_background_stats()",
    ):
        with sqlstate("42501"):
            session.execute(command)
    own = "CREATE FUNCTION public.mine() RETURNS text LANGUAGE sql AS 'SELECT 1::text'"
    with suppress(psycopg.errors.InsufficientPrivilege):  # before 15 the schema is not its own
        session.execute(own)
        with sqlstate("42501"):
            session.execute("ALTER EXTENSION pg_background ADD FUNCTION public.mine()")
    assert run(session, "SELECT CURRENT_USER::text") == [(str(owner),)]
    conn.execute(change.format(sql.Identifier(fresh_database), back))


# --- another role's workers ---------------------------------------------------------------------------

MANAGING = (
    "pg_background_wait_v2({pid}, {cookie})",
    "pg_background_wait_v2_timeout({pid}, {cookie}, 10)",
    "pg_background_cancel_v2({pid}, {cookie})",
    "pg_background_cancel_v2_grace({pid}, {cookie}, 0)",
    "pg_background_full_sql_v2({pid}, {cookie})",
    "pg_background_result_info_v2({pid}, {cookie})",
    "pg_background_error_info_v2({pid}, {cookie})",
    "pg_background_wait_any_v2(ARRAY[({pid}, {cookie})]::pg_background_handle[], 10)",
    "pg_background_drain_v2(ARRAY[({pid}, {cookie})]::pg_background_handle[], 10)",
)
UNTRACKED = (
    "pg_background_result_v2({pid}, {cookie}, NULL::text)",
    "pg_background_result_json_v2({pid}, {cookie})",
    "pg_background_detach_v2({pid}, {cookie})",
    "pg_background_detach({pid})",
    "_pg_background_checked(_pg_background_open_result({pid}, {cookie}))",
    "_pg_background_checked(_pg_background_open_result({pid}, NULL))",
    "_pg_background_checked(_pg_background_open_as({pid}, {cookie}, NULL))",
    "_pg_background_checked(_pg_background_detach({pid}, {cookie}))",
)


@ALL_SETUPS
def test_another_roles_handle_opens_nothing(bob: Session, running: Handle, failed: Handle, alice: Session) -> None:
    """alice has learned bob's handles."""
    for handle in (running, failed):
        for call in MANAGING:
            with sqlstate("42501") as raised:
                alice.execute("SELECT " + call.format(pid=handle.pid, cookie=handle.cookie))
            assert SECRET not in raised.text
        for call in UNTRACKED:
            with sqlstate("42704"):
                alice.execute("SELECT " + call.format(pid=handle.pid, cookie=handle.cookie))
        for view in ("outcome", "get_progress"):
            ((*seen,),) = alice.rows(f"SELECT * FROM pg_background_{view}_v2(%s, %s)", handle)
            assert set(seen) == {None}
    assert {worker.pid: worker.state for worker in listed(bob)} == {running.pid: "running", failed.pid: "error"}


def test_a_guessed_cookie_is_of_no_use(bob: Session, running: Handle, connect: Connect) -> None:
    """Even of one's own role's worker: it is what tells one job of a pid from the next."""
    other = connect(Role(bob.info.user, bob.info.password))
    for cookie in (0, 1, -1, running.cookie + 1, -running.cookie, 2**63 - 1):
        for call in MANAGING:
            with sqlstate("42704"):
                other.execute("SELECT " + call.format(pid=running.pid, cookie=cookie))
            with sqlstate("55000"):
                bob.execute("SELECT " + call.format(pid=running.pid, cookie=cookie))


def test_cookies_do_not_repeat_and_fill_their_range(alice: Session) -> None:
    cookies = [alice.rows("SELECT cookie FROM pg_background_run_v2('SELECT 1')")[0][0] for _ in range(64)]
    assert len(set(cookies)) == 64
    assert all(0 < cookie < 2**63 for cookie in cookies)
    for bit in range(63):
        assert {cookie >> bit & 1 for cookie in cookies} == {0, 1}, f"bit {bit} never changes"


@ALL_SETUPS
def test_no_view_shows_another_roles_sql_error_or_progress(
    bob: Session, running: Handle, failed: Handle, alice: Session, conn: Session
) -> None:
    run(alice, "SELECT 1", "n int")
    conn.execute("ANALYZE _pg_background_worker")
    assert conn.rows("SELECT FROM pg_stats WHERE tablename = '_pg_background_worker'") != []
    for query in (
        "TABLE pg_background_activity",
        "TABLE pg_background_list",
        "TABLE pg_stat_activity",
        "TABLE pg_stats",
        "TABLE pg_prepared_statements",
        "TABLE pg_cursors",
    ):
        assert SECRET not in repr(alice.rows(query)), query
    pids = {row[0] for row in alice.rows("SELECT pid FROM pg_background_activity")}
    assert not pids & {running.pid, failed.pid}
    hidden = "SELECT count(*) FROM pg_stat_activity WHERE query <> '<insufficient privilege>' AND pid IN (%s, %s)"
    assert alice.value(hidden, (running.pid, supervisor_pid(conn))) == 0


def test_the_caller_of_a_definer_function_reaches_nothing_of_its_owner(
    bob: Session, alice: Session, connect: Connect, conn: Session, fresh_database: str
) -> None:
    """The worker, the kept session behind it and what it left are in the caller's own session, but the owner's."""
    name = sql.Identifier(bob.info.user)
    conn.execute("CREATE SCHEMA definers; GRANT USAGE, CREATE ON SCHEMA definers TO PUBLIC")
    bob.execute(
        "CREATE FUNCTION definers.start(job text) RETURNS pg_background_handle LANGUAGE sql SECURITY DEFINER"
        " SET search_path = public, pg_temp AS 'SELECT pg_background_launch_v2(job)';"
        "CREATE FUNCTION definers.finish(job text) RETURNS text LANGUAGE sql SECURITY DEFINER"
        " SET search_path = public, pg_temp AS 'SELECT state FROM pg_background_run_v2(job)'"
    )
    pid, cookie = alice.rows("SELECT pid, cookie FROM definers.start(%s)", (f"SELECT '{SECRET}', pg_sleep(600)",))[0]
    assert alice.value("SELECT definers.finish(%s)", (f"SELECT '{SECRET}'",)) == "stopped"
    for call in MANAGING:
        with sqlstate("42501"):
            alice.execute("SELECT " + call.format(pid=pid, cookie=cookie))
    for call in ("result_v2({pid}, {cookie}, NULL::text)", "detach_v2({pid}, {cookie})", "detach({pid})"):
        with sqlstate("42501"):
            alice.execute("SELECT pg_background_" + call.format(pid=pid, cookie=cookie))
    taken = (
        "SELECT pg_background_cancel_all_v2() + pg_background_detach_all_v2() + pg_background_purge_v2()"
        " + pg_background_cancel_by_label_v2('%%')"
    )
    assert alice.value(taken.replace("%%", "%")) == 0
    assert SECRET not in repr(alice.rows("TABLE pg_background_activity") + alice.rows("TABLE pg_background_list"))
    assert run(alice, "SELECT CURRENT_USER || '|' || SESSION_USER") == [(f"{alice.info.user}|{alice.info.user}",)]
    assert bob.value("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", (pid, cookie)) is False
    bob.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 5000)", (pid, cookie))
    conn.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(name))
    conn.execute(sql.SQL("GRANT pgbackground_role TO {}").format(name))


def test_a_definer_functions_job_after_the_commit_is_its_owners(
    bob: Session, alice: Session, conn: Session, fresh_database: str
) -> None:
    conn.execute(
        "CREATE SCHEMA definers; GRANT USAGE, CREATE ON SCHEMA definers TO PUBLIC;"
        "CREATE TABLE definers.ran (who text); GRANT INSERT ON definers.ran TO PUBLIC"
    )
    bob.execute(
        "CREATE FUNCTION definers.later() RETURNS pg_background_handle LANGUAGE sql SECURITY DEFINER"
        " SET search_path = public, pg_temp AS $$ SELECT pg_background_submit_on_commit_v2("
        "'INSERT INTO definers.ran SELECT CURRENT_USER || ''|'' || SESSION_USER') $$"
    )
    handle = alice.rows("SELECT pid, cookie FROM definers.later()")[0]
    wait(bob, Handle(*handle))
    assert conn.rows("TABLE definers.ran") == [(f"{bob.info.user}|{bob.info.user}",)]
    with sqlstate("42501"):
        wait(alice, Handle(*handle))


# --- internal functions, called by hand ---------------------------------------------------------------

NASTY: dict[str, list[Any]] = {
    "text": ["", "!", "!{}", '!{"sqlstate": "00000"}', "=", "'; DROP TABLE x; --", "{schema}", "%s %n", "x" * 100_000,
             "SELECT 1", "cancel_all", "00000000-0000-4000-8000-000000000000"],
    "int4": [0, 1, -1, 2**31 - 1, -(2**31)],
    "int8": [0, 1, -1, 2**63 - 1, -(2**63)],
    "bool": [True, False],
    "oid": [0, 10, 2249, 2**32 - 1],
    "uuid": ["00000000-0000-4000-8000-000000000000"],
    "jsonb": ["{}", "[]", "null", '"x"', '{"sqlstate": 5, "message": {}}', '{"worker_pid": "1\\n;", "context": 1}'],
    "text[]": ["{}", "{NULL}", "{{a,b},{c,d}}", "{a,b}"],
    "pg_background_handle[]": ["{}", "{NULL}", '{"(,)"}', '{"(1,1)","(-5,0)"}', '{{"(1,1)"},{"(2,2)"}}'],
}  # fmt: skip


def _made_up_calls(chance: random.Random, victim: Handle) -> Iterator[tuple[str, list[Any]]]:
    """Every internal function with all single, and some random, combinations of arguments, bob's handle among them."""
    values = {kind: [None, *choices] for kind, choices in NASTY.items()}
    values["int4"].append(victim.pid)
    values["int8"].append(victim.cookie)
    values["pg_background_handle[]"].append(f'{{"({victim.pid},{victim.cookie})"}}')
    for function in INTERNAL:
        choices = [values[kind] for kind in function.argument_types]
        combinations = list(itertools.islice(itertools.product(*choices), 2000))
        marks = ", ".join(f"%s::{kind}" for kind in function.argument_types)
        for arguments in chance.sample(combinations, min(8, len(combinations))):
            yield f"SELECT public.{function.name}({marks})", list(arguments)


def test_internal_functions_called_by_hand_give_nothing(
    bob: Session, running: Handle, connect: Connect, role: NewRole
) -> None:
    name = role("mallory")
    session = connect(name, statement_timeout="2s", **{"pg_background.max_workers": 1000})
    for call, arguments in _made_up_calls(random.Random(8), running):
        try:
            found = repr(session.rows(call, arguments))
        except psycopg.Error as error:
            found = str(error)
        assert SECRET not in found, (call, arguments)
        assert not session.closed, (call, arguments)
    assert session.value("SELECT CURRENT_USER || '|' || SESSION_USER") == f"{name}|{name}"
    session.execute("SELECT pg_background_cancel_all_v2(), pg_background_detach_all_v2()")
    assert run(session, "SELECT CURRENT_USER || '|' || SESSION_USER") == [(f"{name}|{name}",)]
    assert [worker.state for worker in listed(bob)] == ["running"]
    assert bob.rows("SELECT * FROM pg_background_get_progress_v2(%s, %s)", running) == [(7, SECRET)]


# --- the control socket -------------------------------------------------------------------------------


@pytest.mark.local_server
@pytest.mark.parametrize("packet", [b'["progress",99,"forged",%a]', b'["worker?",1]'])
def test_only_the_workers_own_backend_reports_its_progress(
    cluster: Cluster, bob: Session, running: Handle, conn: Session, packet: bytes
) -> None:
    """Who reports is known from the kernel: a process of the server's own OS user, but no worker, is nobody."""
    with stranger(control_path(cluster, conn)) as connection:
        connection.send(b'["worker?",1]')
        assert connection.recv(1000) == b'["reply",1,false]'
        connection.send(packet % 1e9 if b"%a" in packet else packet)
        # Questions are answered after what was sent before them.
        assert bob.rows("SELECT state FROM pg_background_outcome_v2(%s, %s)", running) == [("running",)]
    assert bob.rows("SELECT * FROM pg_background_get_progress_v2(%s, %s)", running) == [(7, SECRET)]


@pytest.mark.local_server
def test_the_control_socket_is_out_of_reach_of_other_users(start_cluster: Callable[..., Cluster]) -> None:
    """To connect takes the right to write the socket's file, and to pass its folder.

    A data directory may be readable by a group, and then all that the server makes in it is.
    """
    own = start_cluster()
    own.stop()
    own.datadir.chmod(0o750)
    own.start()
    database = own.create_database()
    with own.connect(database) as session:
        run(session, "SELECT 1", "n int")
        path = control_path(own, session)
        for file in (path, path.parent, *path.parent.glob(path.name + ".*")):
            seen = file.stat()
            assert seen.st_uid == os.geteuid()
            assert not seen.st_mode & (stat.S_IWGRP | stat.S_IRWXO), f"{file} has mode {seen.st_mode:o}"


@pytest.mark.local_server
def test_there_is_no_network_listener(running: Handle, bob: Session, conn: Session) -> None:
    listening = _network_sockets()
    for pid in (bob.pid, running.pid, supervisor_pid(conn)):
        links = {str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
        sockets = {link for link in links if link.startswith("socket:")}
        assert sockets
        assert not sockets & listening


def _network_sockets() -> set[str]:
    """All sockets of this machine that wait for TCP connections or UDP packets, as /proc/PID/fd shows them."""
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" or (name.startswith("udp") and fields[3] == "07"):
                found.add(f"socket:[{fields[9]}]")
    return found


# --- using up what all share --------------------------------------------------------------------------


def test_a_session_that_asks_all_the_time_stops_nobody(bob: Session, alice: Session) -> None:
    """The supervisor looks each of these handles up in its table, one after the other."""
    alice.execute("SET statement_timeout = '20s'")
    asks = "PERFORM public.pg_background_outcome_v2(n, n) FROM generate_series(1, 1000) n"
    flood = f"DO $$ BEGIN LOOP {asks}; END LOOP; END $$"
    ended = threading.Event()

    def ask() -> None:
        with suppress(psycopg.errors.QueryCanceled):
            alice.execute(flood)
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(20):
            pid, cookie = bob.rows("SELECT pid, cookie FROM pg_background_submit_v2('SELECT 1')")[0]
            assert bob.value("SELECT pg_background_wait_v2_timeout(%s, %s, 5000)", (pid, cookie)) is True
        assert not ended.is_set()
    finally:
        alice.cancel()
        thread.join(20)
    assert ended.is_set()


def test_what_a_role_writes_about_itself_is_bounded(alice: Session, conn: Session) -> None:
    """Texts in memory and in the table: SQL, labels, progress, errors."""
    with sqlstate("22023"):
        alice.execute("SELECT pg_background_submit_v2('SELECT 1', 0, repeat('x', 1001))")
    big = (
        "DO $$ BEGIN PERFORM pg_background_progress(1, repeat('p', 1000000));"
        " RAISE EXCEPTION '%', repeat('e', 9000000); END $$"
    )
    handle = launch(alice, big + "--" + "s" * 1_000_000)
    wait(alice, handle)
    row = "SELECT pg_column_size(w.*) FROM _pg_background_worker w WHERE (pid, cookie) = (%s, %s) AND state = 'error'"
    ((size,),) = wait_until(lambda: conn.rows(row, handle), what="its row")
    assert size < 200_000
    alice.execute("SELECT pg_background_detach_v2(%s, %s)", handle)


# --- what a reader runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["array", "row", "range", "rows"])
def test_what_a_domain_checks_is_not_run_by_whoever_reads_json(
    connect: Connect, role: NewRole, conn: Session, column: str
) -> None:
    mallory = role("mallory", schema=True)
    owner = connect(mallory)
    home = sql.Identifier(mallory)
    owner.execute(
        sql.SQL(
            "SET search_path = {0}; CREATE TABLE seen (who name);"
            " CREATE FUNCTION look(v int) RETURNS bool LANGUAGE plpgsql AS $$"
            " BEGIN INSERT INTO {0}.seen VALUES (CURRENT_USER); RETURN true; END $$;"
            " CREATE DOMAIN d AS int CHECK ({0}.look(VALUE)); CREATE TYPE c AS (v d);"
            " CREATE TYPE r AS RANGE (subtype = d);"
            ' CREATE TABLE t ("array" d[], "row" c, "range" r, "rows" c[]);'
            " INSERT INTO t VALUES ('{{1}}', '(1)', '[1,1]', '{{(1)}}'); TRUNCATE seen; RESET search_path"
        ).format(home)
    )
    query = sql.SQL("SELECT {} FROM {}.t").format(sql.Identifier(column), home).as_string(conn)
    handle = launch(conn, query)
    with sqlstate("0A000"):
        conn.rows("SELECT pg_background_result_json_v2(%s, %s)", handle)
    detach(conn, handle)
    assert not conn.rows(sql.SQL("SELECT FROM {}.seen").format(home))
    # Its owner is the one whose code it is.
    assert owner.rows("SELECT pg_background_result_json_v2(%s, %s)", launch(owner, query))
    assert {who for (who,) in owner.rows(sql.SQL("SELECT who FROM {}.seen").format(home))} == {str(mallory)}


# --- what a role may lock ---------------------------------------------------------------------------


def test_a_marker_that_its_role_has_locked_keeps_no_other_from_being_removed(
    fresh_database: str, alice: Session, bob: Session, conn: Session
) -> None:
    """To ask by hand takes the marker, which is locked until the end of that transaction."""
    run(bob, "SELECT 1", "n int")
    mark = "SELECT public._pg_background_mark(CURRENT_USER::regrole::oid)"
    held, _ = alice.value(mark), bob.value(mark)
    conn.execute("UPDATE public._pg_background_marker SET made_at = now() - interval '2 min'")
    with alice.transaction():
        assert alice.value("SELECT public._pg_background_has_committed(%s)", (held,)) is True
        terminate_supervisor(conn)
        run(bob, "SELECT 1", "n int")
        left = "SELECT key FROM public._pg_background_marker"
        wait_until(lambda: conn.rows(left) == [(held,)], what="bob's marker removed")


def test_who_calls_the_proof_lets_nothing_go(alice: Session) -> None:
    """It ends a job where a launcher calls it, by the protocol and outside of any query."""
    handle = launch(alice, "SELECT 5")
    alice.execute("SELECT _pg_background_proof(0)")
    assert result(alice, handle, "n int") == [(5,)]
    nested = "SELECT (pg_background_launch_v2('SELECT 1')).pid, _pg_background_proof(0)"
    nested += ", (SELECT workers_launched FROM pg_background_stats_v2())"
    assert result(alice, launch(alice, nested), "pid int, proof text, launched bigint")[0][2] == 1
