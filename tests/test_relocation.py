"""The extension in other schemas, moved, dropped, created anew and changed, with sessions open and workers running."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from psycopg import sql

from tests.background import Handle, detach, launch, listed, result, wait
from tests.clusters import Role, Session, sqlstate, wait_until

SCHEMAS = ["bg", "Odd Schema", 'qu"ote', "semi;colon 'x' %s $$", "gr\u00fcn"]


def _move(conn: Session, schema: str) -> str:
    """Moves the extension to a new schema, opens that to its users, and returns its name quoted."""
    name = sql.Identifier(schema)
    conn.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    conn.execute(sql.SQL("ALTER EXTENSION pg_background SET SCHEMA {}").format(name))
    conn.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO pgbackground_role").format(name))
    return name.as_string(conn)


def _create_in(conn: Session, schema: str) -> str:
    """Drops the extension and creates it in a new schema; returns that schema's name quoted."""
    name = sql.Identifier(schema)
    conn.execute("DROP EXTENSION pg_background")
    conn.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    conn.execute(sql.SQL("CREATE EXTENSION pg_background SCHEMA {}").format(name))
    return name.as_string(conn)


def _works(session: Session, schema: str = "public") -> None:
    """Every call of the API that needs no other session, qualified."""
    one, two = launch(session, "SELECT 1", schema=schema), launch(session, "SELECT 2", schema=schema)
    assert [worker.pid for worker in listed(session, schema)] == [one.pid, two.pid]
    wait(session, one, schema)
    call = f"SELECT {schema}.pg_background_wait_v2_timeout({one.pid}, {one.cookie}, 5000)"
    assert session.value(call) is True
    assert result(session, one, "n int", schema) == [(1,)]
    detach(session, two, schema)
    nested = f"{schema}.pg_background_result({schema}.pg_background_launch('SELECT {{}}'))"
    assert session.value(f"SELECT n FROM {nested.format(3)} AS r(n int)") == 3
    with sqlstate("22012"):
        session.execute(f"SELECT n FROM {nested.format('1/0')} AS r(n int)")
    session.execute(f"SELECT workers_launched FROM {schema}.pg_background_stats_v2()")
    assert listed(session, schema) == []


# --- other schemas --------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS)
def test_extension_works_in_any_schema_outside_of_the_search_path(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str, schema: str
) -> None:
    quoted = _create_in(conn, schema)
    _works(conn, quoted)
    # Granting pgbackground_role was all that an admin had to do.
    bob = connect(role("bob"))
    _works(bob, quoted)
    with sqlstate("42883"):
        bob.execute("SELECT pg_background_launch('SELECT 1')")
    bob.execute("SET search_path = ''")
    _works(bob, quoted)


def test_grant_helper_opens_the_schema_too(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str
) -> None:
    quoted = _create_in(conn, "Odd Schema")
    bob = role("bob", granted=False)
    session = connect(bob)
    conn.execute(f"SELECT {quoted}.grant_pg_background_privileges(%s)", (str(bob),))
    _works(session, quoted)
    conn.execute(f"SELECT {quoted}.revoke_pg_background_privileges(%s)", (str(bob),))
    with sqlstate("42501", match="permission denied for schema"):
        launch(session, "SELECT 1", schema=quoted)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_extension_moves_with_sessions_open_and_workers_running(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str, schema: str
) -> None:
    bob = connect(role("bob", schema=True))
    _works(bob)
    bob.execute("CREATE TABLE seen (n int)")
    running = launch(bob, "SELECT pg_sleep(0.3); INSERT INTO seen VALUES (1)")
    ended = launch(bob, "SELECT 8")
    wait(bob, ended)
    failed = launch(bob, "SELECT 1/0")

    quoted = _move(conn, schema)
    assert [worker.pid for worker in listed(bob, quoted)] == [running.pid, ended.pid, failed.pid]
    assert result(bob, ended, "n int", quoted) == [(8,)]
    with sqlstate("22012"):
        result(bob, failed, "n int", quoted)
    wait(bob, running, quoted)
    assert len(result(bob, running, "r text", quoted)) == 2
    assert bob.value("SELECT n FROM seen") == 1
    _works(bob, quoted)
    _works(connect(), quoted)


def test_moving_there_and_back_again(conn: Session, alice: Session, fresh_database: str) -> None:
    for round_ in range(3):
        _works(alice, _move(conn, f"bg{round_}"))
        conn.execute("ALTER EXTENSION pg_background SET SCHEMA public")
        _works(alice)


# --- dropped and created anew ---------------------------------------------------------------------


def test_drop_and_create_in_the_same_sessions(conn: Session, alice: Session, fresh_database: str) -> None:
    for _ in range(3):
        _works(alice)
        _works(conn)
        handle = launch(alice, "SELECT 1")
        conn.execute("DROP EXTENSION pg_background")
        with sqlstate("42883"):
            launch(alice, "SELECT 1")
        conn.execute("CREATE EXTENSION pg_background")
        # What this session had launched is still its own.
        assert result(alice, handle, "n int") == [(1,)]


def test_worker_goes_on_when_the_extension_is_dropped(conn: Session, alice: Session, fresh_database: str) -> None:
    alice.execute("CREATE TABLE seen (n int)")
    handle = launch(alice, "SELECT pg_sleep(0.3); INSERT INTO seen VALUES (1)")
    conn.execute("DROP EXTENSION pg_background")
    wait_until(lambda: alice.value("SELECT count(*) FROM seen") == 1, what="the worker's commit")
    conn.execute("CREATE EXTENSION pg_background")
    detach(alice, handle)
    _works(alice)


def test_drop_in_the_session_that_tracks_workers(conn: Session, fresh_database: str) -> None:
    launch(conn, "SELECT 1")
    conn.execute("BEGIN; DROP EXTENSION pg_background; ROLLBACK")
    (worker,) = listed(conn)
    assert result(conn, Handle(worker.pid, worker.cookie), "n int") == [(1,)]
    conn.execute("BEGIN; DROP EXTENSION pg_background; CREATE EXTENSION pg_background")
    handle = launch(conn, "SELECT 1")
    conn.execute("COMMIT")
    detach(conn, handle)
    _works(conn)


# --- a changed definition -------------------------------------------------------------------------

_CHANGED = "a changed runtime says so: "
_UNTRACKED = "this session tracks no background worker"
_DIGEST = re.compile(r"pg_background [0-9.]+ ([0-9a-f]{12})")


def _change_runtime(conn: Session) -> None:
    """Replaces the extension's functions as an update would: one module differs, and so does the digest."""
    functions = conn.rows(
        "SELECT pg_get_functiondef(d.objid) FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid"
        " AND e.extname = 'pg_background' JOIN pg_proc p ON p.oid = d.objid JOIN pg_language l ON l.oid = p.prolang"
        " WHERE d.classid = 'pg_proc'::regclass AND d.deptype = 'e' AND p.prosqlbody IS NULL AND p.prokind = 'f'"
    )
    definitions = [definition for (definition,) in functions]
    digest = next(found[1] for found in map(_DIGEST.search, definitions) if found)
    assert any(_UNTRACKED in definition for definition in definitions)
    with conn.transaction():
        for definition in definitions:
            changed = definition.replace(digest, "0" * len(digest)).replace(_UNTRACKED, _CHANGED + _UNTRACKED)
            if changed != definition:
                conn.execute(changed.encode())


def test_session_takes_up_a_changed_runtime_and_lets_its_workers_finish(
    conn: Session, alice: Session, fresh_database: str
) -> None:
    alice.execute("CREATE TABLE seen (n int)")
    _works(alice)
    with sqlstate("42704") as raised:
        detach(alice, Handle(1, 1))
    assert _CHANGED not in raised.text
    launch(alice, "SELECT pg_sleep(0.3); INSERT INTO seen VALUES (1)")

    _change_runtime(conn)

    with sqlstate("42704", match=_CHANGED):
        detach(alice, Handle(1, 1))
    # The old runtime has let its workers go: they run to their ends.
    assert listed(alice) == []
    wait_until(lambda: alice.value("SELECT count(*) FROM seen") == 1, what="the worker's commit")
    _works(alice)


def test_planted_module_of_the_same_name_is_not_used(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str
) -> None:
    conn.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    conn.execute("CREATE SCHEMA bg; ALTER EXTENSION pg_background SET SCHEMA bg")
    conn.execute("GRANT USAGE ON SCHEMA bg TO pgbackground_role")
    mallory = connect(role("mallory"))
    mallory.execute(
        "CREATE FUNCTION public._pg_background_module_calls() RETURNS text LANGUAGE sql"
        " AS $$SELECT $module$raise RuntimeError('planted')$module$::text$$"
    )
    mallory.execute(
        "CREATE FUNCTION public._pg_background_module_bootstrap() RETURNS text LANGUAGE sql"
        " AS $$SELECT $module$raise RuntimeError('planted')$module$::text$$"
    )
    _works(mallory, "bg")
    _works(conn, "bg")


def test_create_extension_leaves_each_module_compiled_by_the_servers_python(conn: Session, fresh_database: str) -> None:
    bodies = (
        "SELECT count(*), count(*) FILTER (WHERE prosrc ~ $re$::pg_catalog.text /[*] [0-9a-f-]{17} [^ ]+ [*]/$$re$)"
    )
    ((modules, compiled),) = conn.rows(f"{bodies} FROM pg_proc WHERE starts_with(proname, '_pg_background_module_')")
    assert modules == compiled > 30
