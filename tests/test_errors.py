"""Errors: the worker's own with all their fields, and the extension's with their SQLSTATEs."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.background import Handle, detach, launch, listed, result, run, wait
from tests.clusters import EXTENSIONS, Cluster, Session, sqlstate, wait_until

FIELDS = {
    "DETAIL": "message_detail",
    "HINT": "message_hint",
    "SCHEMA": "schema_name",
    "TABLE": "table_name",
    "COLUMN": "column_name",
    "DATATYPE": "datatype_name",
    "CONSTRAINT": "constraint_name",
}
# What every way through format(), RAISE and a regular expression must leave alone.
NASTY = "50% of '%s' \"%I\" $1 \\1 \\n {0} $$ \u00e4\u20ac\U0001d11e\nsecond line"


def _raise(fields: tuple[str, ...], sqlstate_: str = "UT001", text: str = NASTY) -> str:
    """A job that raises an error with these fields, each with a text that names it."""
    using = [("ERRCODE", sqlstate_), ("MESSAGE", "message " + text), *((name, name + " " + text) for name in fields)]
    options = ", ".join(f"{name} = {_literal(value)}" for name, value in using)
    return f"DO $job$ BEGIN RAISE EXCEPTION USING {options}; END $job$"


def _literal(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


# --- the worker's own errors ----------------------------------------------------------------------


def test_error_fields_come_in_every_combination(alice: Session) -> None:
    combinations = [fields for n in range(len(FIELDS) + 1) for fields in itertools.combinations(FIELDS, n)]
    assert len(combinations) == 128
    for fields in combinations:
        with sqlstate("UT001") as raised:
            run(alice, _raise(fields))
        diag = raised.diag
        assert diag.message_primary == "message " + NASTY
        seen = {name: getattr(diag, attribute) for name, attribute in FIELDS.items()}
        assert seen == {name: name + " " + NASTY if name in fields else None for name in FIELDS}
    assert listed(alice) == []


def test_empty_message_and_fields_stay_as_they_are(alice: Session) -> None:
    with sqlstate("UT002") as raised:
        run(alice, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'UT002', MESSAGE = '', DETAIL = 'd'; END $$")
    assert (raised.diag.message_primary, raised.diag.message_detail) == ("", "d")


def test_constraint_violation_names_its_objects(alice: Session) -> None:
    alice.execute("CREATE TABLE strict (id int PRIMARY KEY, n int NOT NULL CONSTRAINT positive CHECK (n > 0))")
    schema = alice.value("SELECT CURRENT_USER::text")
    for query, code, column, constraint in (
        ("INSERT INTO strict VALUES (1, NULL)", "23502", "n", None),
        ("INSERT INTO strict VALUES (1, -1)", "23514", None, "positive"),
        ("INSERT INTO strict VALUES (1, 1), (1, 1)", "23505", None, "strict_pkey"),
    ):
        with sqlstate(code) as direct:
            alice.execute(query)
        with sqlstate(code) as raised:
            run(alice, query)
        diag = raised.diag
        assert (diag.schema_name, diag.table_name) == (schema, "strict")
        assert (diag.column_name, diag.constraint_name) == (column, constraint)
        assert diag.message_primary == direct.diag.message_primary
        assert diag.message_detail == direct.diag.message_detail


def test_domain_violation_names_its_type(alice: Session) -> None:
    alice.execute("CREATE DOMAIN even AS int CONSTRAINT is_even CHECK (VALUE % 2 = 0)")
    with sqlstate("23514") as raised:
        run(alice, "SELECT 3::even", "n int")
    assert (raised.diag.datatype_name, raised.diag.constraint_name) == ("even", "is_even")


def test_context_tells_the_workers_pid_and_its_own_context(alice: Session) -> None:
    alice.execute("CREATE FUNCTION fail() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1/0; END $$")
    handle = launch(alice, "SELECT fail()")
    with sqlstate("22012") as raised:
        result(alice, handle, "n int")
    assert raised.diag.context is not None
    assert "background worker" in raised.diag.context
    assert str(handle.pid) in raised.diag.context
    assert "fail() line 1" in raised.diag.context


@pytest.mark.parametrize("code", ["01000", "02000"])
def test_code_of_no_error_class_is_still_an_error(alice: Session, code: str) -> None:
    # RAISE takes them.
    query = f"DO $$ BEGIN RAISE EXCEPTION 'odd' USING ERRCODE = '{code}'; END $$"
    with pytest.raises(psycopg.Error, match="odd") as raised:
        run(alice, query)
    assert raised.value.sqlstate == code


@pytest.mark.parametrize("code", ["57014", "40001", "40P01", "P0002", "XX000"])
def test_any_sqlstate_passes(alice: Session, code: str) -> None:
    with sqlstate(code, match="message 50%"):
        run(alice, _raise(("DETAIL", "TABLE"), code))
    with sqlstate(code):
        run(alice, _raise((), code))


def test_error_can_be_caught_by_its_condition(alice: Session) -> None:
    alice.execute("""
        DO $$
        DECLARE
            one text;
            two text;
        BEGIN
            BEGIN
                PERFORM * FROM pg_background_result(pg_background_launch('SELECT 1/0')) AS r(n int);
            EXCEPTION WHEN division_by_zero THEN
                GET STACKED DIAGNOSTICS one = MESSAGE_TEXT;
            END;
            BEGIN
                PERFORM * FROM pg_background_result(pg_background_launch('SELECT * FROM nowhere')) AS r(n int);
            EXCEPTION WHEN undefined_table THEN
                GET STACKED DIAGNOSTICS two = MESSAGE_TEXT;
            END;
            ASSERT (one, two) = ('division by zero', 'relation "nowhere" does not exist'), (one, two)::text;
        END $$""")


def test_statement_timeout_is_inherited_and_ends_the_worker(alice: Session) -> None:
    run(alice, "SELECT 1", "n int")
    alice.execute("BEGIN; SET LOCAL statement_timeout = '500ms'")
    handle = launch(alice, "SELECT pg_sleep(60)")
    alice.execute("COMMIT")
    with sqlstate("57014", match="statement timeout") as raised:
        result(alice, handle)
    assert str(handle.pid) in str(raised.diag.context)
    counts = "SELECT workers_failed, workers_canceled FROM pg_background_stats_v2()"
    assert alice.rows(counts) == [(1, 0)]


def test_first_call_of_a_session_that_is_cut_short_shows_no_traceback(connect: Callable[..., Session]) -> None:
    for timeout_ms in (2, 4, 8, 16, 24, 32, 48, 64, 96):
        session = connect(statement_timeout=timeout_ms)
        try:
            with sqlstate("57014"):
                launch(session, "SELECT pg_sleep(10)")
                wait(session, Handle(listed(session)[0].pid, listed(session)[0].cookie))
        finally:
            session.execute("RESET statement_timeout")
        assert run(session, "SELECT 1", "n int") == [(1,)]
        for worker in listed(session):
            session.execute("SELECT pg_terminate_backend(%s, 5000)", (worker.pid,))
        session.close()


def test_very_long_error_comes_whole(alice: Session) -> None:
    with sqlstate("P0001") as raised:
        run(alice, "DO $$ BEGIN RAISE EXCEPTION '%', repeat('long ', 200000); END $$")
    assert raised.diag.message_primary == "long " * 200000


def test_setting_used_to_carry_an_error_does_not_stay(alice: Session) -> None:
    with sqlstate("UT001"):
        run(alice, _raise(("TABLE",)))
    for name in ("pg_background.report",):
        assert not alice.value("SELECT current_setting(%s, true)", (name,))
    assert run(alice, "SELECT current_setting('pg_background.report', true) IS NULL", "b bool") == [(True,)]


# --- a worker that is gone ------------------------------------------------------------------------


def test_terminated_worker_is_an_error_that_says_so(alice: Session, conn: Session) -> None:
    handle = launch(alice, "SELECT pg_sleep(60)")
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (handle.pid,))
    wait(alice, handle)
    assert [worker.state for worker in listed(alice)] == ["error"]
    with pytest.raises(psycopg.Error) as raised:
        result(alice, handle)
    # The backend still tells why it ended: that is the server's own error.
    assert raised.value.sqlstate in ("57P01", "08006")
    assert str(handle.pid) in f"{raised.value}{raised.value.diag.context}"
    counts = "SELECT workers_failed, workers_canceled, workers_active FROM pg_background_stats_v2()"
    assert alice.rows(counts) == [(1, 0, 0)]
    assert run(alice, "SELECT 1", "n int") == [(1,)]


@pytest.mark.parametrize("release", ["result", "detach"])
def test_backend_that_ends_after_its_job_is_nothing_to_the_job(alice: Session, conn: Session, release: str) -> None:
    handle = launch(alice, "SELECT 5")
    wait(alice, handle)
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (handle.pid,))
    if release == "result":
        assert result(alice, handle, "n int") == [(5,)]
    else:
        detach(alice, handle)
    assert listed(alice) == []
    assert run(alice, "SELECT 1", "n int") == [(1,)]


def test_worker_that_ends_its_own_backend_is_an_error(alice: Session) -> None:
    handle = launch(alice, "SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(10)")
    with pytest.raises(psycopg.Error) as raised:
        result(alice, handle, "b bool, v text")
    assert raised.value.sqlstate in ("57P01", "08006")
    assert listed(alice) == []


def test_killed_worker_restarts_the_server_which_then_launches_again(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster()
    with own.connect() as session:
        for extension in EXTENSIONS:
            session.execute(f"CREATE EXTENSION {extension}")
        handle = launch(session, "SELECT pg_sleep(60)")
        os.kill(handle.pid, signal.SIGKILL)
        with pytest.raises(psycopg.Error):
            result(session, handle)

    def connects() -> bool:
        try:
            own.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    wait_until(connects, what="the server's recovery")
    with own.connect() as session:
        assert run(session, "SELECT 1", "n int") == [(1,)]


# --- the extension's own errors -------------------------------------------------------------------

UNKNOWN = Handle(2**31 - 1, 5)
CALLS = {
    "result": "SELECT * FROM pg_background_result_v2({pid}, {cookie}) AS r(n int)",
    "wait": "SELECT pg_background_wait_v2({pid}, {cookie})",
    "wait_timeout": "SELECT pg_background_wait_v2_timeout({pid}, {cookie}, 10)",
    "detach": "SELECT pg_background_detach_v2({pid}, {cookie})",
}
CALLS_V1 = {
    "result": "SELECT * FROM pg_background_result({pid}) AS r(n int)",
    "detach": "SELECT pg_background_detach({pid})",
}


@pytest.mark.parametrize("call", [*CALLS.values(), *CALLS_V1.values()])
@pytest.mark.parametrize("pid", [UNKNOWN.pid, 0, -1, 1])
def test_unknown_handle_is_42704(alice: Session, call: str, pid: int) -> None:
    with sqlstate("42704", match=str(pid)) as raised:
        alice.execute(call.format(pid=pid, cookie=5))
    assert raised.diag.message_hint


@pytest.mark.parametrize("name", CALLS)
def test_other_cookie_is_55000_but_42704_for_result(alice: Session, name: str) -> None:
    handle = launch(alice, "SELECT 1")
    other = Handle(handle.pid, handle.cookie ^ 1)
    for wrong in (other, Handle(handle.pid, 0)):
        with sqlstate("42704" if name == "result" else "55000", match=str(handle.pid)):
            alice.execute(CALLS[name].format(**wrong._asdict()))
    assert result(alice, handle, "n int") == [(1,)]


def test_v1_worker_has_no_other_cookie_than_0(alice: Session) -> None:
    pid = alice.value("SELECT pg_background_launch('SELECT 1')")
    with sqlstate("55000"):
        wait(alice, Handle(pid, 1))
    assert alice.rows("SELECT * FROM pg_background_result(%s) AS r(n int)", (pid,)) == [(1,)]


def test_other_sessions_worker_has_no_result_here(alice: Session, conn: Session) -> None:
    handle = launch(alice, "SELECT 1")
    for call in (CALLS["result"], CALLS["detach"], *CALLS_V1.values()):
        with sqlstate("42704"):
            conn.execute(call.format(**handle._asdict()))
    assert result(alice, handle, "n int") == [(1,)]


def test_no_connection_left_is_53300(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster(settings={"max_connections": "8", "superuser_reserved_connections": "2"})
    with own.connect() as admin:
        for extension in EXTENSIONS:
            admin.execute(f"CREATE EXTENSION {extension}")
        admin.execute("CREATE ROLE bob LOGIN IN ROLE pgbackground_role")
    with own.connect("postgres", "bob") as session:
        taken = _take_all_connections(own)
        descriptors = set()
        for _ in range(3):
            with sqlstate("53300") as raised:
                launch(session, "SELECT 1")
            assert raised.diag.message_hint
            descriptors.add(_descriptors(session))
        assert len(descriptors) == 1
        assert listed(session) == []
        for _ in range(3):  # one for the worker, one for the supervisor
            taken.pop().close()
        wait_until(lambda: _launches(session), what="a free connection")
        for other in taken:
            other.close()


def _take_all_connections(own: Cluster) -> list[Session]:
    taken: list[Session] = []
    try:
        while len(taken) < 20:
            taken.append(own.connect("postgres", "bob"))
    except psycopg.OperationalError:
        return taken
    raise AssertionError("the server has no limit on connections")


def _descriptors(session: Session) -> int:
    return len(list(Path(f"/proc/{session.pid}/fd").iterdir()))


def _launches(session: Session) -> bool:
    try:
        return run(session, "SELECT 1", "n int") == [(1,)]
    except psycopg.errors.TooManyConnections:
        return False


def test_role_without_rights_gets_the_servers_error(
    connect: Callable[..., Session], role: Callable[..., str], conn: Session
) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS private (n int)")
    bob = connect(role("bob"))
    with sqlstate("42501", match="private"):
        run(bob, "SELECT * FROM private", "n int")


def test_dropped_role_cannot_launch(conn: Session, role: Callable[..., str]) -> None:
    bob = role("bob", login=False)
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(bob)))
    run(conn, "SELECT 1", "n int")
    conn.execute(sql.SQL("RESET ROLE; BEGIN; DROP ROLE {0}; ROLLBACK; SET ROLE {0}").format(sql.Identifier(bob)))
    assert run(conn, "SELECT CURRENT_USER::text") == [(str(bob),)]


def test_errors_leave_the_session_usable(alice: Session) -> None:
    for _ in range(10):
        with sqlstate("22012"):
            run(alice, "SELECT 1/0")
        with sqlstate("42704"):
            alice.execute(CALLS["wait"].format(**UNKNOWN._asdict()))
        handle = launch(alice, "SELECT 1")
        with sqlstate("42804"):
            result(alice, handle, "n text")
        detach(alice, handle)
    assert listed(alice) == []
    assert run(alice, "SELECT 1", "n int") == [(1,)]
