"""Databases in several encodings: whatever text goes in comes out again, wherever it passes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from tests.background import Handle, launch, listed, result, run, wait
from tests.clusters import Cluster, Role, Session, sqlstate, wait_until
from tests.supervision import supervisor_pid

pytestmark = pytest.mark.usefixtures("encoding")

# Text that each can hold; SQL_ASCII holds any bytes, and these are UTF-8.
TEXTS = {
    "UTF8": "gr\u00fcn \u20ac \u2603 \U0001d11e \\ ' \" $$",
    "LATIN1": "gr\u00fcn \u00e9\u00ff \u00a0\u00d7 \\ ' \" $$",
    "EUC_JP": "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8 \\ ' \" $$",
    "SQL_ASCII": "gr\u00fcn \u20ac \u2603 \\ ' \" $$",
}
_OUTSIDE = "\U0001f600"  # of LATIN1 and EUC_JP
_ACTIVITY = "SELECT label, sql_preview, state, error_message FROM pg_background_activity WHERE (pid, cookie) = (%s, %s)"


@pytest.fixture(scope="module", params=sorted(TEXTS))
def encoding(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def text(encoding: str) -> str:
    """Text in that encoding."""
    return TEXTS[encoding]


@pytest.fixture(scope="module")
def database(cluster: Cluster, encoding: str) -> Iterator[str]:
    """This module's database, once in each encoding."""
    name = cluster.new_name("encoded")
    create = "CREATE DATABASE {} TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' ENCODING {}"
    with cluster.connect() as admin:
        admin.execute(sql.SQL(create).format(sql.Identifier(name), sql.Literal(encoding)))
    with cluster.connect(name) as admin:
        admin.execute("CREATE EXTENSION pg_background CASCADE")
    yield name
    cluster.drop_database(name)


@pytest.fixture
def session(connect: Callable[..., Session], role: Callable[..., Role]) -> Session:
    """A session of an ordinary role, whose client speaks UTF8."""
    return connect(role("alice", schema=True), parameters={"client_encoding": "UTF8"})


def _literal(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _submit(session: Session, query: str, label: str | None = None) -> Handle:
    call = "SELECT pid, cookie FROM pg_background_submit_v2(%s, 0, %s)"
    return Handle(*session.rows(call, (query, label))[0])


# --- what every encoding can do -------------------------------------------------------------------


def test_rows_and_names_of_columns(session: Session, text: str) -> None:
    value = _literal(text)
    query = (
        f"SELECT {value}, ARRAY[{value}, NULL], ROW({value})::text = ROW({value})::text FROM generate_series(1, 500)"
    )
    assert run(session, query, "t text, a text[], r bool") == [(text, [text, None], True)] * 500
    handle = launch(session, f"SELECT {value} AS {_name(text)}")
    assert session.rows("SELECT * FROM pg_background_result_json_v2(%s, %s)", handle) == [({text: text},)]


def test_tables_and_types_of_such_names(session: Session, text: str) -> None:
    table, kind = _name(text), _name("e " + text)
    session.execute(f"CREATE TABLE {table} ({table} text)")
    session.execute(f"CREATE TYPE {kind} AS ENUM ({_literal(text)})")
    assert run(session, f"INSERT INTO {table} VALUES ({_literal(text)}) RETURNING {table}") == [(text,)]
    assert run(session, f"SELECT {_literal(text)}::{kind}", f"e {kind}") == [(text,)]
    handle = launch(session, f"TABLE {table}")
    read = f"SELECT t.{table} FROM pg_background_result_v2({handle.pid}, {handle.cookie}, NULL::{table}) AS t"
    assert session.rows(read) == [(text,)]
    assert session.rows(f"SELECT * FROM {table}") == [(text,)]


def test_errors_and_notices(session: Session, text: str) -> None:
    raised = (
        f"DO LANGUAGE plpgsql {_literal(_raise('NOTICE', text))};"
        f"DO LANGUAGE plpgsql {_literal(_raise('EXCEPTION', text))}"
    )
    with sqlstate("P0001") as error:
        run(session, raised)
    assert (error.diag.message_primary, error.diag.message_detail, error.diag.message_hint) == (text, text, text)
    assert [notice.message for notice in session.notices] == [text]


def _raise(level: str, text: str) -> str:
    value = _literal(text)
    return f"BEGIN RAISE {level} USING MESSAGE = {value}, DETAIL = {value}, HINT = {value}; END"


def test_an_error_in_another_encoding_is_one(session: Session, text: str, encoding: str) -> None:
    other = "LATIN1" if encoding == "UTF8" else "UTF8"
    handle = launch(session, f"SET client_encoding = '{other}'; SELECT '{text[:3]}'::int")
    wait(session, handle)
    assert listed(session)[0].state == "error"
    with sqlstate("22P02"):
        result(session, handle)


def test_the_views_show_labels_sql_and_errors(session: Session, text: str) -> None:
    query = f"SELECT {_literal(text)}::int"
    job = _submit(session, query, text)
    wait(session, job)
    ((label, preview, state, error),) = wait_until(
        lambda: session.rows(_ACTIVITY + " AND state = 'error'", job), what="the row in the view"
    )
    assert (label, preview, state) == (text, query, "error")
    assert text in error
    assert session.value("SELECT pg_background_full_sql_v2(%s, %s)", job) == query
    (row,) = listed(session)
    assert row.sql_preview == query
    assert text in str(row.last_error)
    outcome = "SELECT label, error_message FROM pg_background_outcome_v2(%s, %s)"
    assert session.rows(outcome, job) == [(text, error)]


def test_previews_are_cut_between_characters(session: Session, text: str) -> None:
    query = f"SELECT {_literal(text * 30)}"
    job = _submit(session, query)
    wait(session, job)
    preview = wait_until(lambda: session.rows(_ACTIVITY + " AND state = 'stopped'", job), what="the row")[0][1]
    assert preview == query[:120]


def test_progress(session: Session, text: str) -> None:
    job = _submit(session, f"SELECT pg_background_progress(50, {_literal(text)})")
    wait(session, job)
    progress = "SELECT progress_pct, progress_msg FROM pg_background_get_progress_v2(%s, %s)"
    wait_until(lambda: session.rows(progress, job) == [(50, text)], what="the progress report")


def test_parameters_labels_and_patterns(session: Session, text: str) -> None:
    call = "SELECT pid, cookie FROM pg_background_launch_v2('SELECT $1, $2::text[]', 0, %s, ARRAY[%s, %s])"
    array = '{"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"}'
    handle = Handle(*session.rows(call, (text, text, array))[0])
    assert result(session, handle, "t text, a text[]") == [(text, [text])]
    _submit(session, "SELECT pg_sleep(3600)", text)
    pattern = text.replace("\\", "\\\\")
    assert session.value("SELECT pg_background_cancel_by_label_v2(%s, 5000)", (pattern,)) == 1


def test_settings_are_inherited(session: Session, text: str) -> None:
    session.execute("SELECT set_config('myapp.tenant', %s, false)", (text,))
    session.execute("SELECT set_config('search_path', %s, false)", (f"public, {_name(text)}",))
    shown = "current_setting('myapp.tenant'), current_setting('search_path')"
    assert run(session, f"SELECT {shown}", "a text, b text") == session.rows(f"SELECT {shown}")


def test_jobs_after_a_commit(session: Session, text: str) -> None:
    session.execute("CREATE TABLE kept (t text)")
    with session.transaction():
        call = "SELECT pid, cookie FROM pg_background_submit_on_commit_v2(%s, 0, %s, ARRAY[%s])"
        job = Handle(*session.rows(call, ("INSERT INTO kept VALUES ($1)", text, text))[0])
    wait(session, job)
    assert session.rows("SELECT t FROM kept") == [(text,)]


def test_the_extension_in_a_schema_of_such_a_name(
    cluster: Cluster, conn: Session, connect: Callable[..., Session], current_database: str, text: str
) -> None:
    admin = connect(parameters={"client_encoding": "UTF8"})
    admin.execute(f"CREATE SCHEMA {_name(text)}; ALTER EXTENSION pg_background SET SCHEMA {_name(text)}")
    try:
        user = connect(parameters={"client_encoding": "UTF8"})
        user.execute(f"SET search_path = {_name(text)}")
        call = "SELECT pid, cookie FROM pg_background_submit_v2('SELECT 1')"
        jobs = [Handle(*user.rows(call)[0])]
        with user.transaction():
            jobs.append(Handle(*user.rows(call.replace("submit_v2", "submit_on_commit_v2"))[0]))
        for job in jobs:
            user.execute("SELECT pg_background_wait_v2(%s, %s)", job)
        stopped = "SELECT count(*) FROM pg_background_activity WHERE (pid, cookie) = (%s, %s) AND state = 'stopped'"

        def are_shown() -> bool:
            # Where the schema is closed to the supervisor that was there before, this turns to one that sees the table.
            user.execute("SELECT pg_background_wait_v2(%s, %s)", jobs[0])
            return all(user.rows(stopped, job) == [(1,)] for job in jobs)

        wait_until(are_shown, what="the jobs in the view")
    finally:
        admin.execute("ALTER EXTENSION pg_background SET SCHEMA public")


def test_roles_of_such_names(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], text: str
) -> None:
    admin = connect(parameters={"client_encoding": "UTF8"})
    bob = role("bob", schema=True)
    name = f"{text} {bob}"
    admin.execute(f"ALTER ROLE {bob} RENAME TO {_name(name)}")
    try:
        admin.execute(f"SET SESSION AUTHORIZATION {_name(name)}")
        assert run(admin, "SELECT current_user::text, session_user::text", "a text, b text") == [(name, name)]
        admin.execute("RESET SESSION AUTHORIZATION")
    finally:
        admin.execute(f"ALTER ROLE {_name(name)} RENAME TO {bob}")


# --- what only some can ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP"], indirect=True)
def test_characters_outside_of_the_encoding_are_the_servers_error(session: Session, conn: Session) -> None:
    with sqlstate("22P05"):
        launch(session, f"SELECT '{_OUTSIDE}'")
    escaped = _OUTSIDE.encode("utf-16-be").hex()
    escaped = f"\\u{escaped[:4]}\\u{escaped[4:]}"
    with sqlstate("22P05"):
        run(session, f'SELECT $$"{escaped}"$$::jsonb', "j jsonb")
    assert run(session, f'SELECT $$"{escaped}"$$::json::text') == [(f'"{escaped}"',)]
    before = supervisor_pid(conn)
    job = _submit(session, f'SELECT $$"{escaped}"$$::jsonb', escaped)
    wait(session, job)
    assert session.rows("SELECT sqlstate, label FROM pg_background_outcome_v2(%s, %s)", job) == [("22P05", escaped)]
    assert supervisor_pid(conn) == before


@pytest.mark.parametrize("encoding", ["SQL_ASCII"], indirect=True)
def test_bytes_that_are_not_utf8_come_through_as_they_are(session: Session, conn: Session) -> None:
    session.execute("CREATE TABLE raw (t text); INSERT INTO raw VALUES (E'gr\\374n \\377'), (E'\\303')")
    copied = (
        "SELECT convert_to(t, 'SQL_ASCII'), convert_to(a[1], 'SQL_ASCII'), a[2] FROM"
        " pg_background_result_v2({}, {}) AS r(t text, a text[])"
    )
    handle = launch(session, "SELECT t, ARRAY[t, 'x'] FROM raw")
    expected = [(b"gr\xfcn \xff", b"gr\xfcn \xff", "x"), (b"\xc3", b"\xc3", "x")]
    assert session.rows(copied.format(*handle)) == expected
    with sqlstate("22P02"):
        run(session, "SELECT t::int FROM raw")  # the message quotes them
    job = _submit(session, "SELECT t::int FROM raw")
    wait(session, job)
    wait_until(lambda: session.rows(_ACTIVITY + " AND state = 'error'", job), what="the row in the view")
    assert supervisor_pid(conn)


@pytest.mark.parametrize("encoding", ["SQL_ASCII"], indirect=True)
def test_sql_that_is_not_utf8_is_refused(session: Session) -> None:
    """PL/Python's strings are Unicode: the server refuses the argument before anything of ours runs."""
    with pytest.raises(psycopg.errors.CharacterNotInRepertoire):
        session.execute("SELECT pg_background_launch_v2(E'SELECT ''\\374''')")


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"], indirect=True)
def test_messages_in_another_language(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], current_database: str
) -> None:
    try:
        conn.execute(f"ALTER DATABASE {current_database} SET lc_messages = 'de_DE.UTF-8'")
    except psycopg.errors.InvalidParameterValue:
        pytest.skip("this system has no locale de_DE.UTF-8; those of tests/matrix.py have")
    session = connect(role("alice"), parameters={"client_encoding": "UTF8"})
    message = "ung\u00fcltige Eingabesyntax f\u00fcr Typ integer: \u00bbx\u00ab"
    with sqlstate("22P02", match=message):
        run(session, "SELECT 'x'::int")
    job = _submit(session, "SELECT 'x'::int")
    wait(session, job)
    assert session.rows("SELECT error_message FROM pg_background_outcome_v2(%s, %s)", job) == [(message,)]
    wait_until(lambda: [row[3] for row in session.rows(_ACTIVITY, job)] == [message], what="the message in the view")
    # What the extension concludes from a message must not depend on its language.
    job = _submit(session, "SELECT pg_sleep(3600)")
    session.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 10000)", job)
    assert session.rows("SELECT state, sqlstate FROM pg_background_outcome_v2(%s, %s)", job) == [("canceled", "57014")]
    conn.execute(f"ALTER DATABASE {current_database} RESET lc_messages")


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"], indirect=True)
def test_a_timeout_in_a_wait_changes_no_setting(session: Session, conn: Session) -> None:
    """Where PL/Python could not pass on the error's translation, it is asked for untranslated."""
    handle = launch(session, "SELECT pg_sleep(60)")
    conn.execute(f"SET lc_messages = 'POSIX'; GRANT \"{session.info.user}\" TO CURRENT_USER")
    conn.execute("BEGIN; SAVEPOINT before; SET LOCAL statement_timeout = '100ms'")
    with sqlstate("57014"):
        wait(conn, handle)
    conn.execute("ROLLBACK TO before")
    assert conn.value("SELECT current_setting('lc_messages')") == "POSIX"
    conn.execute("COMMIT")
    assert conn.value("SELECT current_setting('lc_messages')") == "POSIX"
    session.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    with sqlstate("57014"):
        result(session, handle)
