"""The extension's settings: units, ranges, levels, SHOW and RESET; and which of the launcher's a worker inherits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import sql

from tests.background import detach, launch, listed, run, wait
from tests.clusters import EXTENSIONS, Cluster, Role, Session, sqlstate, wait_until

DEFAULTS = {
    "pg_background.max_workers": "16",
    "pg_background.default_queue_size": "64kB",
    "pg_background.worker_timeout": "0",
}


def _max_workers(session: Session) -> int:
    """The value in effect."""
    number: int = session.value("SELECT max_workers FROM pg_background_stats_v2()")
    return number


def _queue_size(session: Session) -> int:
    """The default queue size in effect."""
    handle = launch(session, "SELECT 1")
    (worker,) = listed(session)
    detach(session, handle)
    return worker.queue_size


# --- values ---------------------------------------------------------------------------------------


def test_show_prints_the_defaults_after_the_first_call(connect: Callable[..., Session]) -> None:
    session = connect()
    session.execute("SELECT pg_background_stats_v2()")
    assert {name: session.value(f"SHOW {name}") for name in DEFAULTS} == DEFAULTS


_AS_THE_C_EXTENSION = """
DO LANGUAGE plpython3u $$
import ctypes
GD["variable"] = variable = ctypes.c_int()
GD["name"] = name = ctypes.create_string_buffer(b"pg_background.max_workers")
number = ctypes.c_int
ctypes.PyDLL(None).DefineCustomIntVariable(
    name, name, None, ctypes.byref(variable), number(16), number(1), number(1000), number(6), number(0),
    None, None, None)
$$
"""


def test_a_setting_that_a_library_has_defined_is_left_alone(conn: Session) -> None:
    conn.execute(_AS_THE_C_EXTENSION)
    conn.execute("SET pg_background.max_workers = 2")
    assert _max_workers(conn) == 2
    assert run(conn, "SELECT 1", "n int4") == [(1,)]


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("1000", 1000), (" 7 ", 7), ("0x10", 16), ("", 16), ("2.4", 2), ("1e2", 100)]
)
def test_max_workers_takes_what_an_integer_setting_takes(alice: Session, text: str, number: int) -> None:
    alice.execute("SELECT set_config('pg_background.max_workers', %s, false)", (text,))
    assert _max_workers(alice) == number


@pytest.mark.parametrize(
    ("text", "size"),
    [("64kB", 65536), ("8192", 8192), ("1MB", 1048576), ("256MB", 268435456), ("16 kB", 16384), ("9000B", 9000)],
)
def test_default_queue_size_takes_units_of_memory(alice: Session, text: str, size: int) -> None:
    alice.execute("SELECT set_config('pg_background.default_queue_size', %s, false)", (text,))
    assert _queue_size(alice) == size


@pytest.mark.parametrize("text", ["0", "100", "1s", "5min", "1 h", "24d", "0.5s"])
def test_worker_timeout_takes_units_of_time(alice: Session, text: str) -> None:
    alice.execute("SELECT set_config('pg_background.worker_timeout', %s, false)", (text,))
    handle = launch(alice, "SELECT 1")
    wait(alice, handle)
    detach(alice, handle)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_workers", "0"),
        ("max_workers", "1001"),
        ("max_workers", "-1"),
        ("max_workers", "many"),
        ("max_workers", "16kB"),
        ("max_workers", "99999999999999999999"),
        ("default_queue_size", "63"),
        ("default_queue_size", "257MB"),
        ("default_queue_size", "1TB"),
        ("default_queue_size", "64 k"),
        ("default_queue_size", "5min"),
        ("default_queue_size", "-1"),
    ],
)
def test_bad_value_is_22023_naming_the_setting_and_starts_nothing(alice: Session, name: str, text: str) -> None:
    # set_config() itself refuses what a session's first call has made known, or the launch refuses it.
    with sqlstate("22023", match=f"pg_background.{name}"):
        alice.execute("SELECT set_config(%s, %s, false)", (f"pg_background.{name}", text))
        launch(alice, "SELECT 1")
    alice.execute(f"RESET pg_background.{name}")
    assert listed(alice) == []
    assert run(alice, "SELECT 1", "n int") == [(1,)]


def test_explicit_queue_size_does_not_need_the_default(alice: Session) -> None:
    alice.execute("SELECT set_config('pg_background.default_queue_size', '1MB', false)")
    detach(alice, launch(alice, "SELECT 1", 70000))
    assert _queue_size(alice) == 1048576


# --- levels ---------------------------------------------------------------------------------------


def test_set_before_the_first_call_holds(connect: Callable[..., Session]) -> None:
    session = connect(**{"pg_background.max_workers": "3"})
    assert _max_workers(session) == 3
    assert session.value("SHOW pg_background.max_workers") == "3"
    session.execute("RESET pg_background.max_workers")
    assert _max_workers(session) == 16
    assert session.value("SHOW pg_background.max_workers") == "16"


def test_set_after_the_first_call_and_reset(alice: Session) -> None:
    assert _max_workers(alice) == 16
    alice.execute("SET pg_background.max_workers = 5")
    assert _max_workers(alice) == 5
    alice.execute("SET pg_background.max_workers TO DEFAULT")
    assert _max_workers(alice) == 16
    alice.execute("SET pg_background.max_workers = 6")
    alice.execute("DISCARD ALL")
    assert _max_workers(alice) == 16


def test_set_local_ends_with_its_transaction_or_savepoint(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 9")
    with alice.transaction():
        alice.execute("SET LOCAL pg_background.max_workers = 2")
        assert _max_workers(alice) == 2
        with alice.transaction(force_rollback=True):
            alice.execute("SET LOCAL pg_background.max_workers = 1")
            assert _max_workers(alice) == 1
        assert _max_workers(alice) == 2
    assert _max_workers(alice) == 9


def test_functions_set_clause_holds_inside_of_it(alice: Session) -> None:
    assert _max_workers(alice) == 16
    alice.execute(
        "CREATE FUNCTION inside() RETURNS int LANGUAGE sql SET pg_background.max_workers = 4"
        " AS $$ SELECT max_workers FROM pg_background_stats_v2() $$"
    )
    assert (alice.value("SELECT inside()"), _max_workers(alice)) == (4, 16)


def test_role_and_database_settings_hold_and_the_closer_one_wins(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str
) -> None:
    user = role("bob")
    bob, dbname = sql.Identifier(user), sql.Identifier(fresh_database)
    conn.execute(sql.SQL("ALTER DATABASE {} SET pg_background.max_workers = 11").format(dbname))
    assert _max_workers(connect(user)) == 11
    conn.execute(sql.SQL("ALTER ROLE {} SET pg_background.max_workers = 12").format(bob))
    assert _max_workers(connect(user)) == 12
    conn.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} SET pg_background.max_workers = 13").format(bob, dbname))
    session = connect(user)
    assert _max_workers(session) == 13
    session.execute("SET pg_background.max_workers = 14")
    assert _max_workers(session) == 14
    session.execute("RESET pg_background.max_workers")
    assert _max_workers(session) == 13
    assert session.value("SHOW pg_background.max_workers") == "13"
    assert _max_workers(connect(user, parameters={"options": "-c pg_background.max_workers=15"})) == 15


def test_bad_value_from_the_role_shows_at_the_call(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    bob = role("bob")
    conn.execute(sql.SQL("ALTER ROLE {} SET pg_background.max_workers = 'lots'").format(sql.Identifier(bob)))
    session = connect(bob)
    for _ in range(2):
        with sqlstate("22023", match="pg_background.max_workers"):
            launch(session, "SELECT 1")
    session.execute("SET pg_background.max_workers = 2")
    assert run(session, "SELECT 1", "n int") == [(1,)]


def test_configuration_file_and_reload_reach_open_sessions(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster(settings={"pg_background.max_workers": "7"})
    with own.connect() as admin:
        for extension in EXTENSIONS:
            admin.execute(f"CREATE EXTENSION {extension}")
    with own.connect() as admin, own.connect() as session:
        assert _max_workers(session) == 7
        for value, expected in (("8", 8), ("9", 9)):
            admin.execute(f"ALTER SYSTEM SET pg_background.max_workers = {value}")
            admin.execute("SELECT pg_reload_conf()")
            wait_until(lambda: _max_workers(session) == expected, what="the reloaded value")  # noqa: B023
        session.execute("SET pg_background.max_workers = 3")
        assert _max_workers(session) == 3
        session.execute("RESET pg_background.max_workers")
        assert _max_workers(session) == 9
        admin.execute("ALTER SYSTEM RESET pg_background.max_workers")
        admin.execute("SELECT pg_reload_conf()")
        wait_until(lambda: _max_workers(session) == 7, what="the file's value")


def test_settings_survive_a_change_of_the_runtime(conn: Session, alice: Session, fresh_database: str) -> None:
    alice.execute("SET pg_background.max_workers = 3")
    assert _max_workers(alice) == 3
    conn.execute("DROP EXTENSION pg_background")
    conn.execute("CREATE EXTENSION pg_background")
    assert _max_workers(alice) == 3
    alice.execute("RESET pg_background.max_workers")
    assert _max_workers(alice) == 16


# --- what a worker inherits -----------------------------------------------------------------------


def _in_worker(session: Session, name: str) -> str:
    shown: str = run(session, f"SELECT pg_catalog.current_setting('{name}', true)")[0][0]
    return shown


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("work_mem", "12MB", "12MB"),
        ("search_path", 'pg_temp, "Odd ""Schema", public', 'pg_temp, "Odd ""Schema", public'),
        ("TimeZone", "Asia/Kolkata", "Asia/Kolkata"),
        ("DateStyle", "German", "German, DMY"),
        ("statement_timeout", "61s", "61s"),
        ("lock_timeout", "1min", "1min"),
        ("default_transaction_isolation", "serializable", "serializable"),
        ("synchronous_commit", "off", "off"),
        ("standard_conforming_strings", "off", "off"),
        ("bytea_output", "escape", "escape"),
        ("myapp.tenant", "it's \\ \" \u00e4\u20ac", "it's \\ \" \u00e4\u20ac"),
    ],
)
@pytest.mark.parametrize("local", [False, True])
def test_setting_of_the_session_is_inherited(alice: Session, name: str, value: str, shown: str, local: bool) -> None:
    quoted = value if name == "search_path" else sql.Literal(value).as_string(alice)
    with alice.transaction():
        alice.execute(f"SET {'LOCAL' if local else ''} {name} = {quoted}")
        call = "SELECT * FROM public.pg_background_result(public.pg_background_launch({})) AS r(t text)"
        query = f"SELECT pg_catalog.current_setting('{name}')"
        assert alice.value(sql.SQL(call).format(query)) == shown
    if local and "." not in name:
        assert _in_worker(alice, name) == alice.value("SELECT current_setting(%s)", (name,)) != shown


def test_later_changes_reach_later_workers_only(alice: Session) -> None:
    alice.execute("SET myapp.tenant = 'one'")
    assert _in_worker(alice, "myapp.tenant") == "one"
    alice.execute("SET myapp.tenant = 'two'")
    assert _in_worker(alice, "myapp.tenant") == "two"
    alice.execute("SET work_mem = '5MB'")
    assert _in_worker(alice, "work_mem") == "5MB"
    alice.execute("RESET work_mem")
    assert _in_worker(alice, "work_mem") == alice.value("SHOW work_mem")


def test_role_and_database_settings_are_inherited_once(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str
) -> None:
    bob = role("bob")
    dbname = sql.Identifier(fresh_database)
    conn.execute(sql.SQL("ALTER DATABASE {} SET work_mem = '3MB'").format(dbname))
    conn.execute(sql.SQL("ALTER DATABASE {} SET myapp.level = 'database'").format(dbname))
    conn.execute(sql.SQL("ALTER ROLE {} SET statement_timeout = '77s'").format(sql.Identifier(bob)))
    session = connect(bob)
    assert _in_worker(session, "work_mem") == "3MB"
    assert _in_worker(session, "myapp.level") == "database"
    assert _in_worker(session, "statement_timeout") == "77s"
    session.execute("SET statement_timeout = '78s'")
    # In the worker as in the launcher, RESET leads to the role's value.
    assert run(session, "RESET statement_timeout; SELECT current_setting('statement_timeout')") == [("77s",)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("application_name", "my app"),
        ("idle_in_transaction_session_timeout", "55s"),
        ("idle_session_timeout", "54s"),
        ("pg_background.max_workers", "3"),
        ("client_encoding", "LATIN1"),
    ],
)
def test_setting_that_must_not_travel_stays_here(alice: Session, name: str, value: str) -> None:
    alice.execute("SELECT set_config(%s, %s, false)", (name, value))
    assert _in_worker(alice, name) != value


def test_transaction_modes_of_the_launcher_do_not_travel(alice: Session) -> None:
    with alice.transaction():
        alice.execute("SET TRANSACTION READ ONLY, ISOLATION LEVEL SERIALIZABLE, DEFERRABLE")
        query = "SELECT current_setting('transaction_read_only') || current_setting('transaction_isolation')"
        assert run(alice, query) == [("offread committed",)]


def test_what_a_job_sets_does_not_reach_the_launcher_or_the_next_job(alice: Session) -> None:
    run(alice, "SET work_mem = '9MB'; SET search_path = pg_catalog; SELECT set_config('myapp.x', 'y', false)")
    assert alice.value("SHOW work_mem") != "9MB"
    for _ in range(3):
        assert _in_worker(alice, "work_mem") == alice.value("SHOW work_mem")
        assert _in_worker(alice, "search_path") == alice.value("SHOW search_path")
        assert not _in_worker(alice, "myapp.x")


def test_floats_are_exact_whatever_extra_float_digits_says(alice: Session) -> None:
    alice.execute("SET extra_float_digits = -15")
    assert int(_in_worker(alice, "extra_float_digits")) >= 1
    exact = "SELECT x = 0.1::float8 + 0.2::float8 FROM pg_background_result(pg_background_launch({})) AS r(x float8)"
    assert alice.value(sql.SQL(exact).format("SELECT 0.1::float8 + 0.2::float8")) is True
