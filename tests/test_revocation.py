"""Rights that are taken back bite at once: no launch, no reuse of a kept session, no job that waits for a commit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.background import Handle, launch, listed, result, run, wait
from tests.clusters import Role, Session, sqlstate, wait_until
from tests.supervision import terminate_supervisor

Connect = Callable[..., Session]
NewRole = Callable[..., Role]

LOCK = 4812
TWO_SETUPS = pytest.mark.setups("trust", "peer")


def _do(session: Session, command: str, *names: str) -> None:
    session.execute(sql.SQL(command).format(*map(sql.Identifier, names)))


def _revoke_membership(admin: Session, role: str) -> None:
    _do(admin, "REVOKE pgbackground_role FROM {}", role)


def _revoke_by_function(admin: Session, role: str) -> None:
    admin.execute("SELECT public.grant_pg_background_privileges(%s)", (str(role),))
    _do(admin, "REVOKE pgbackground_role FROM {}", role)
    admin.execute("SELECT public.revoke_pg_background_privileges(%s)", (str(role),))


def _drop(admin: Session, role: str) -> None:
    _do(admin, "DROP OWNED BY {}", role)
    _do(admin, "DROP ROLE {}", role)


WAYS = {"REVOKE": _revoke_membership, "revoke_privileges": _revoke_by_function, "DROP ROLE": _drop}

STARTS = (
    "SELECT public.pg_background_launch_v2('SELECT 1')",
    "SELECT public.pg_background_launch_v2('SELECT 1', 0, 'label', NULL)",
    "SELECT public.pg_background_submit_v2('SELECT 1')",
    "SELECT public.pg_background_submit_on_commit_v2('SELECT 1')",
    "SELECT public.pg_background_run_v2('SELECT 1')",
    "SELECT * FROM public.pg_background_run_query_v2('SELECT 1') AS r(n int)",
    "SELECT public.pg_background_launch('SELECT 1')",
    "SELECT public._pg_background_launch('SELECT 1', 0)",
    "SELECT public._pg_background_start('SELECT 1', 0, NULL, NULL, true)",
    "SELECT public._pg_background_defer('SELECT 1', 0, NULL, NULL, gen_random_uuid()::text)",
)


def _started_since(admin: Session, worker_pids: list[int]) -> list[Any]:
    """What these backends have been sent since they were asked what they had been sent last."""
    query = "SELECT pid, query_start FROM pg_stat_activity WHERE pid = ANY (%s) ORDER BY pid"
    return admin.rows(query, (worker_pids,))


@TWO_SETUPS
@pytest.mark.parametrize("way", WAYS)
def test_nothing_starts_and_what_runs_goes_on(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str, way: str
) -> None:
    """A running job is not stopped: its session is as any session of that role. Its table is another's."""
    alice = role("alice")
    conn.execute("CREATE TABLE public.notes (what text); GRANT INSERT ON public.notes TO PUBLIC")
    session = connect(alice)
    kept = [launch(session, "SELECT 1") for _ in range(2)]
    for handle in kept:
        assert result(session, handle, "n int") == [(1,)]
    conn.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
    running = launch(session, f"DO $$ BEGIN PERFORM pg_advisory_lock_shared({LOCK}); END $$; SELECT 1")
    waits = "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s"
    wait_until(lambda: conn.value(waits, (LOCK,)), what="the running job's wait")
    pids = sorted({running.pid, *(handle.pid for handle in kept)})
    idle = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY (%s) AND state = 'idle'"
    wait_until(lambda: conn.value(idle, (pids,)) == 1, what="the end of the clean-up")

    WAYS[way](conn, alice)
    before = _started_since(conn, pids)
    for start in STARTS:
        with pytest.raises(psycopg.Error) as raised:
            session.execute(start)
        assert raised.value.sqlstate == "42501", start
    for call in ("wait", "detach", "cancel", "outcome", "full_sql"):
        with sqlstate("42501"):
            session.execute(f"SELECT public.pg_background_{call}_v2(%s, %s)", running)
    for view in ("pg_background_list", "pg_background_activity"):
        with sqlstate("42501"):
            session.execute(f"SELECT * FROM public.{view}")
    assert _started_since(conn, pids) == before

    conn.execute("SELECT pg_advisory_unlock(%s)", (LOCK,))
    outcome = "SELECT state FROM public.pg_background_activity WHERE (pid, cookie) = (%s, %s)"
    wait_until(lambda: conn.rows(outcome, running) == [("stopped",)], what="the running job's end")
    session.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_job_that_waits_for_a_commit_does_not_start(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str, way: str
) -> None:
    alice = role("alice")
    conn.execute("CREATE TABLE public.ran (what text); GRANT INSERT ON public.ran TO PUBLIC")
    session = connect(alice)
    session.execute("BEGIN")
    submit = "SELECT pid, cookie FROM public.pg_background_submit_on_commit_v2('INSERT INTO public.ran VALUES (''x'')')"
    handle = Handle(*session.rows(submit)[0])
    WAYS[way](conn, alice)
    session.execute("COMMIT")
    outcome = "SELECT state, sqlstate FROM public.pg_background_outcome_v2(%s, %s)"
    wait(conn, handle)
    state, code = conn.rows(outcome, handle)[0]
    assert state == "error"
    assert code in ("42501", "42704")  # the second where the role itself is gone
    assert conn.rows("TABLE public.ran") == []
    session.close()


def test_a_superuser_no_more_gets_no_session_of_its_time_as_superuser(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str
) -> None:
    """Up to 16 the server lets a session become anybody whose user was a superuser when it began."""
    chief, mallory = role("chief", superuser=True), role("mallory", granted=False)
    _do(conn, "GRANT {} TO {}", chief, mallory)
    session = connect(mallory)
    _do(session, "SET ROLE {}", chief)
    first = run(session, "SELECT pg_backend_pid(), current_setting('is_superuser')", "pid int, power text")
    session.execute("BEGIN")
    submit = "SELECT pid FROM public.pg_background_submit_on_commit_v2('SELECT 1')"
    deferred = session.value(submit)
    session.execute("COMMIT")
    own = sql.Identifier(conn.info.user).as_string(conn)
    wait_until(lambda: _is_idle(conn, deferred), what="the deferred job's end")
    _do(conn, "ALTER ROLE {} NOSUPERUSER", chief)
    second = run(session, "SELECT pg_backend_pid(), current_setting('is_superuser')", "pid int, power text")
    assert first[0][1] == "on"
    assert second[0][1] == "off"
    assert second[0][0] != first[0][0]
    session.execute("BEGIN")
    assert session.value(submit) != deferred
    session.execute("COMMIT")
    with sqlstate("42501"):
        run(session, f"SET SESSION AUTHORIZATION {own}; SELECT 1", "n int")


def test_nor_in_a_transaction_that_sees_it_as_a_superuser_still(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str
) -> None:
    chief, mallory = role("chief", superuser=True), role("mallory", granted=False)
    _do(conn, "GRANT {} TO {}", chief, mallory)
    session = connect(mallory)
    _do(session, "SET ROLE {}", chief)
    run(session, "SELECT 1", "n int")
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    session.execute("SELECT 1")
    _do(conn, "GRANT pgbackground_role TO {}", chief)
    _do(conn, "ALTER ROLE {} NOSUPERUSER", chief)
    assert run(session, "SELECT current_setting('is_superuser')", "power text") == [("off",)]
    own = sql.Identifier(conn.info.user).as_string(conn)
    with sqlstate("42501"):
        run(session, f"SET SESSION AUTHORIZATION {own}; SELECT 1", "n int")


def _is_idle(admin: Session, pid: int) -> bool:
    query = "SELECT state = 'idle' AND query = 'DISCARD ALL' FROM pg_stat_activity WHERE pid = %s"
    return admin.rows(query, (pid,)) == [(True,)]


def test_a_role_that_was_left_is_out_of_reach(connect: Connect, role: NewRole, conn: Session) -> None:
    """Its workers, kept sessions and handles, though the session that launched them is the same."""
    group, carol = role("group", login=False), role("carol")
    _do(conn, "GRANT {} TO {}", group, carol)
    session = connect(carol)
    _do(session, "SET ROLE {}", group)
    run(session, "SELECT 1", "n int")
    handle = launch(session, "SELECT 1")
    old = session.value("SELECT public.pg_background_launch('SELECT 1')")
    session.execute("RESET ROLE")
    assert {worker.pid for worker in listed(session)} == {handle.pid, old}
    _do(conn, "REVOKE {} FROM {}", group, carol)
    assert listed(session) == []
    for call in ("wait", "detach", "cancel", "full_sql", "result_info", "error_info"):
        with sqlstate("42501"):
            session.execute(f"SELECT public.pg_background_{call}_v2(%s, %s)", handle)
    for call in ("pg_background_result(%s) AS r(n int)", "pg_background_detach(%s) AS r"):
        with sqlstate("42501"):
            session.execute(f"SELECT * FROM public.{call}", (old,))
    assert session.rows("SELECT state FROM public.pg_background_outcome_v2(%s, %s)", handle) == [(None,)]
    assert run(session, "SELECT CURRENT_USER::text") == [(str(carol),)]


def test_nologin_ends_no_session(connect: Connect, role: NewRole, conn: Session) -> None:
    """As PostgreSQL has it: whoever is logged in stays; a role without LOGIN may launch, by SET ROLE, too."""
    alice = role("alice")
    session = connect(alice)
    run(session, "SELECT 1", "n int")
    _do(conn, "ALTER ROLE {} NOLOGIN", alice)
    assert run(session, "SELECT CURRENT_USER::text") == [(str(alice),)]
    with pytest.raises(psycopg.OperationalError):
        connect(alice)


def test_a_renamed_roles_running_worker_stays_its_own(connect: Connect, role: NewRole, conn: Session) -> None:
    old = role("old")
    session = connect(old)
    handle = launch(session, "SELECT CURRENT_USER::text FROM pg_sleep(0)")
    new = old + " renamed"
    _do(conn, "ALTER ROLE {} RENAME TO {}", old, new)
    try:
        assert listed(session)[0].pid == handle.pid
        assert run(session, "SELECT CURRENT_USER::text") == [(new,)]
        seen = "SELECT DISTINCT role::text FROM public.pg_background_activity WHERE pid = %s"
        wait_until(lambda: conn.rows(seen, (handle.pid,)) == [(new,)], what="the new name")
        assert len(result(session, handle)) == 1
    finally:
        _do(conn, "ALTER ROLE {} RENAME TO {}", new, old)


# --- markers of transactions ------------------------------------------------------------------------


def test_a_marker_that_was_read_is_of_no_use(
    fresh_database: str, connect: Connect, role: NewRole, alice: Session, conn: Session
) -> None:
    """mallory sees what alice's worker asks, and asks the same, before and after alice has committed."""
    mallory = role("mallory")
    _do(conn, "GRANT pg_read_all_stats TO {}", mallory)
    session = connect(mallory)
    session.execute("SET statement_timeout = '10s'")
    alice.execute("CREATE TABLE ran (what text)")
    alice.execute("BEGIN")
    submit = "SELECT pid, cookie FROM public.pg_background_submit_on_commit_v2('INSERT INTO ran VALUES (''x'')')"
    handle = Handle(*alice.rows(submit)[0])
    seen = "SELECT substring(query FROM '_has_committed\\(''([-0-9a-f]+)''') FROM pg_stat_activity WHERE pid = %s"
    marker = wait_until(lambda: session.value(seen, (handle.pid,)), what="the guard")
    ask = "SELECT public._pg_background_has_committed(%s)"
    assert session.value(ask, (marker,)) is False  # and it does not wait for alice
    session.execute("BEGIN")
    assert session.value(ask, (marker,)) is False
    alice.execute("COMMIT")
    wait(alice, handle)
    assert alice.rows("SELECT what FROM ran") == [("x",)]
    assert session.value(ask, (marker,)) is False
    session.execute("COMMIT")
    assert conn.rows("SELECT * FROM public._pg_background_marker") == []


def test_a_marker_for_another_role_serves_nobody(
    fresh_database: str, connect: Connect, role: NewRole, alice: Session, conn: Session
) -> None:
    session = connect(role("mallory"))
    oid = conn.value("SELECT oid FROM pg_roles WHERE rolname = %s", (alice.info.user,))
    marker = session.value("SELECT public._pg_background_mark(%s)", (oid,))
    defer = "SELECT (public._pg_background_defer('SELECT 1', 0, NULL, NULL, %s)::public.pg_background_handle).*"
    handle = Handle(*session.rows(defer, (str(marker),))[0])
    wait(session, handle)
    outcome = "SELECT state, sqlstate FROM public.pg_background_outcome_v2(%s, %s)"
    assert session.rows(outcome, handle) == [("canceled", "40000")]


def test_markers_of_lost_jobs_are_removed(
    fresh_database: str, connect: Connect, role: NewRole, alice: Session, conn: Session
) -> None:
    """A supervisor starts: what is older than a minute was its predecessor's; the new may have their jobs under way."""
    run(alice, "SELECT 1", "n int")
    oid = conn.value("SELECT oid FROM pg_roles WHERE rolname = %s", (alice.info.user,))
    old, new = (alice.value("SELECT public._pg_background_mark(%s)", (oid,)) for _ in range(2))
    conn.execute("UPDATE public._pg_background_marker SET made_at = now() - interval '2 min' WHERE key = %s", (old,))
    terminate_supervisor(conn)
    deadline = time.monotonic() + 20
    while conn.rows("SELECT key FROM public._pg_background_marker") != [(new,)]:
        assert time.monotonic() < deadline
        run(alice, "SELECT 1", "n int")
