"""The identity switch: a worker is its launching role for good, whatever that role or the database's owner tries."""

from __future__ import annotations

import os
import pwd
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.background import Handle, is_waiting
from tests.clusters import Cluster, Role, Session, sqlstate, wait_until

Connect = Callable[..., Session]
NewRole = Callable[..., Role]
StartCluster = Callable[..., Cluster]

WHO = (
    "SELECT CURRENT_USER::text, SESSION_USER::text, current_setting('is_superuser'), current_setting('role'),"
    " (SELECT usename::text FROM pg_stat_activity WHERE pid = pg_backend_pid())"
)
WHO_COLUMNS = "a text, b text, c text, d text, e text"
ALL_LOCAL = pytest.mark.setups("trust", "peer", "notcp", "renamed")


def job(session: Session, statement: str, columns: str = "v text") -> list[Any]:
    """Runs it in a worker, and returns the rows."""
    pid, cookie = session.rows("SELECT pid, cookie FROM public.pg_background_launch_v2(%s)", (statement,))[0]
    return session.rows(
        f"SELECT * FROM public.pg_background_result_v2(%s, %s) AS r({columns})",
        (pid, cookie),
    )


def value(session: Session, expression: str) -> Any:
    """A text expression's value in a worker."""
    ((found,),) = job(session, f"SELECT ({expression})::text")
    return found


def identified(name: str, superuser: bool = False) -> list[tuple[str, ...]]:
    """What WHO must return in a worker of that role."""
    return [(name, name, "on" if superuser else "off", "none", name)]


def role_oid(session: Session, name: str) -> int:
    return int(session.value("SELECT oid FROM pg_catalog.pg_roles WHERE rolname = %s", (name,)))


def major(session: Session) -> int:
    return session.info.server_version // 10000


@pytest.fixture
def owner(role: NewRole, conn: Session, fresh_database: str) -> Iterator[Role]:
    """A role that owns the database, and may launch."""
    new = role("owner")
    command = sql.SQL("ALTER DATABASE {} OWNER TO {}")
    conn.execute(command.format(sql.Identifier(fresh_database), sql.Identifier(new)))
    yield new
    conn.execute(command.format(sql.Identifier(fresh_database), sql.Identifier(conn.info.user)))


@pytest.fixture
def perl(conn: Session, fresh_database: str) -> None:
    """plperl and plperlu, with a function each that everybody may call."""
    if not conn.rows("SELECT FROM pg_catalog.pg_available_extensions WHERE name = 'plperlu'"):
        pytest.skip("the server has no plperlu")
    conn.execute("CREATE EXTENSION plperl; CREATE EXTENSION plperlu")
    conn.execute("CREATE FUNCTION public.unrestricted() RETURNS text LANGUAGE plperlu AS 'return \"called\"'")
    conn.execute("CREATE FUNCTION public.restricted() RETURNS text LANGUAGE plperl AS 'return \"called\"'")
    conn.execute("GRANT EXECUTE ON FUNCTION public.unrestricted() TO PUBLIC")


# --- who the worker is ----------------------------------------------------------------------------


@ALL_LOCAL
def test_worker_is_the_launching_role(alice: Session) -> None:
    assert job(alice, WHO, WHO_COLUMNS) == identified(alice.info.user)
    name = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    assert job(alice, name) == [("pg_background",)]


@ALL_LOCAL
def test_worker_of_the_superuser_who_is_the_login_role(conn: Session) -> None:
    assert job(conn, WHO, WHO_COLUMNS) == identified(conn.info.user, superuser=True)


@ALL_LOCAL
def test_worker_of_another_superuser(connect: Connect, role: NewRole) -> None:
    boss = role("chief", superuser=True)
    assert job(connect(boss), WHO, WHO_COLUMNS) == identified(boss, superuser=True)


@ALL_LOCAL
def test_worker_of_a_nologin_role_after_set_role(connect: Connect, role: NewRole, conn: Session) -> None:
    group, member = role("group", login=False), role("member", granted=False)
    conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(member)))
    session = connect(member)
    session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(group)))
    assert job(session, WHO, WHO_COLUMNS) == identified(group)


def test_worker_of_a_definer_function_is_its_owners(connect: Connect, role: NewRole, conn: Session) -> None:
    owner, caller = role("owner", login=False), role("caller", granted=False)
    conn.execute(
        "CREATE FUNCTION public.who_in_worker() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER"
        " BEGIN ATOMIC SELECT r.v FROM public.pg_background_result(public.pg_background_launch("
        " 'RESET ROLE; RESET SESSION AUTHORIZATION; SELECT CURRENT_USER || ''|'' || SESSION_USER')) AS r(v text);"
        " END"
    )
    conn.execute(sql.SQL("ALTER FUNCTION public.who_in_worker() OWNER TO {}").format(sql.Identifier(owner)))
    try:
        assert connect(caller).value("SELECT public.who_in_worker()") == f"{owner}|{owner}"
    finally:
        conn.execute("DROP FUNCTION public.who_in_worker()")


ODD_NAMES = ['quo"te', "a'postrophe", "back\\slash", "sp ace", "$switch$", "Ünïcödé ☃", "-", "123", "a.b", "%s%I{}"]


@pytest.mark.parametrize("name", [*ODD_NAMES, "n" * 63, "none\n--", "ä" * 31])
def test_worker_of_a_role_with_an_odd_name(conn: Session, name: str) -> None:
    identifier = sql.Identifier(name)
    conn.execute(sql.SQL("CREATE ROLE {} IN ROLE pgbackground_role").format(identifier))
    try:
        conn.execute(sql.SQL("SET ROLE {}").format(identifier))
        assert job(conn, WHO, WHO_COLUMNS) == identified(name)
    finally:
        conn.execute("RESET ROLE")
        conn.execute(sql.SQL("DROP ROLE {}").format(identifier))


def test_role_that_is_dropped_launches_nothing(connect: Connect, role: NewRole, conn: Session) -> None:
    group = role("group", login=False)
    session = connect()
    session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(group)))
    job(session, "SELECT 1::text")
    conn.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(group)))
    with pytest.raises(psycopg.Error) as raised:
        job(session, "SELECT 1::text")
    assert raised.value.sqlstate in ("42501", "42704")
    assert "Traceback" not in str(raised.value)


def test_role_that_is_renamed_launches_under_its_new_name(connect: Connect, role: NewRole, conn: Session) -> None:
    old = role("old", login=False)
    session = connect()
    session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(old)))
    job(session, "SELECT 1::text")
    new = old + " renamed"
    conn.execute(sql.SQL("ALTER ROLE {} RENAME TO {}").format(sql.Identifier(old), sql.Identifier(new)))
    try:
        assert job(session, WHO, WHO_COLUMNS) == identified(new)
    finally:
        conn.execute(sql.SQL("ALTER ROLE {} RENAME TO {}").format(sql.Identifier(new), sql.Identifier(old)))


# --- attempts to get the login role back ------------------------------------------------------------

WAYS_BACK = [
    "RESET ROLE",
    "RESET SESSION AUTHORIZATION",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET LOCAL SESSION AUTHORIZATION DEFAULT",
    "SET ROLE NONE",
    "SET LOCAL ROLE NONE",
    "SET role TO DEFAULT",
    "SET session_authorization TO DEFAULT",
    "RESET ALL",
    "SELECT set_config('role', 'none', false)",
    "SELECT set_config('session_authorization', NULL, false)",
    "UPDATE pg_settings SET setting = 'none' WHERE name = 'role'",
    "DISCARD PLANS",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
    "RESET is_superuser",
]
FORBIDDEN_WAYS = [
    "SET SESSION AUTHORIZATION {login}",
    "SET LOCAL SESSION AUTHORIZATION {login}",
    "SET ROLE {login}",
    "SET LOCAL ROLE {login}",
    "SELECT set_config('role', {login_text}, false)",
    "SELECT set_config('session_authorization', {login_text}, true)",
    "SET is_superuser = on",
    "ALTER ROLE {login} PASSWORD 'x'",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "ALTER SYSTEM SET work_mem = '1MB'",
    "GRANT {login} TO CURRENT_USER",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT rolpassword FROM pg_authid",
    "SELECT pg_reload_conf()",
    "DO LANGUAGE plpython3u 'pass'",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "SET log_statement = 'all'",
    "SET session_replication_role = 'replica'",
    "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE internal AS 'int4in'",
    "SELECT lo_import('/etc/passwd')",
    "LOAD 'plpython3'",
]


_TOP_LEVEL = "ALTER SYSTEM"


def forms(session: Session, ways: list[str]) -> list[str]:
    login = pwd.getpwuid(os.geteuid()).pw_name
    names = [name for (name,) in session.rows("SELECT rolname::text FROM pg_roles WHERE rolsuper")]
    name = login if login in names else names[0]
    return [
        way.replace("{login_text}", sql.Literal(name).as_string(None)).replace(
            "{login}", sql.Identifier(name).as_string(None)
        )
        for way in ways
    ]


@ALL_LOCAL
def test_no_set_reset_or_discard_leads_back(alice: Session) -> None:
    for way in forms(alice, WAYS_BACK):
        quiet = f"DO $do$ BEGIN EXECUTE {sql.Literal(way).as_string(None)}; EXCEPTION WHEN OTHERS THEN NULL; END $do$"
        for string in (f"{way}; {WHO}", f"{quiet}; {WHO}"):
            try:
                assert job(alice, string, WHO_COLUMNS) == identified(alice.info.user), way
            except (psycopg.errors.CantChangeRuntimeParam, psycopg.errors.ActiveSqlTransaction):
                continue


@ALL_LOCAL
def test_rights_of_the_login_role_are_gone(alice: Session) -> None:
    for way in forms(alice, FORBIDDEN_WAYS):
        with pytest.raises(psycopg.Error) as raised:
            job(alice, way)
        # A SELECT that fails has a column list by then.
        assert raised.value.sqlstate in ("42501", "55P02", "42804"), way
        if way.startswith(_TOP_LEVEL):
            continue
        caught = (
            f"DO $do$ BEGIN BEGIN EXECUTE {sql.Literal(way).as_string(None)};"
            " RAISE 'it worked' USING ERRCODE = 'XX001';"
            " EXCEPTION WHEN insufficient_privilege OR cant_change_runtime_param THEN NULL; END; END $do$; "
        )
        assert job(alice, caught + WHO, WHO_COLUMNS) == identified(alice.info.user), way


def test_a_rollback_right_after_the_switch_leads_nowhere(alice: Session) -> None:
    shown = "RAISE NOTICE '%|%|%', CURRENT_USER, SESSION_USER, current_setting('is_superuser');"
    steps = ["", "ROLLBACK;", "COMMIT;", "SET LOCAL ROLE NONE; ROLLBACK;", "RESET SESSION AUTHORIZATION; ROLLBACK;"]
    steps += ["BEGIN RESET SESSION AUTHORIZATION; RAISE division_by_zero; EXCEPTION WHEN OTHERS THEN NULL; END;"]
    steps += ["BEGIN SET ROLE NONE; RESET ROLE; PERFORM 1/0; EXCEPTION WHEN OTHERS THEN NULL; END; ROLLBACK;"]
    for step in steps:
        alice.notices.clear()
        job(alice, f"DO $do$ BEGIN {step} {shown} END $do$")
        assert alice.messages() == [f"NOTICE: {alice.info.user}|{alice.info.user}|off"], step


def test_discard_all_keeps_the_role_and_the_launchers_reset_values(connect: Connect, role: NewRole) -> None:
    session = connect(role("alice"), parameters={"options": "-c work_mem=1234kB -c my.placeholder=start"})
    session.execute("SET work_mem = '2MB'; SET my.placeholder = 'now'")
    state = "concat_ws('|', CURRENT_USER, SESSION_USER, current_setting('work_mem'), current_setting('my.placeholder'))"
    name = session.info.user
    assert value(session, state) == f"{name}|{name}|2MB|now"
    session.notices.clear()
    job(session, f"DO $do$ BEGIN RESET ALL; RAISE NOTICE '%', {state}; END $do$")
    assert session.messages() == [f"NOTICE: {name}|{name}|1234kB|start"]


def test_parallel_workers_of_a_worker_are_the_role_too(connect: Connect, role: NewRole, conn: Session) -> None:
    name = "force_parallel_mode" if major(conn) < 16 else "debug_parallel_query"
    for new in (role("alice"), role("group", login=False)):
        session = connect()
        session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(new)))
        session.execute(f"SET {name} = 'on'")
        who = (
            "SELECT concat_ws('|', CURRENT_USER, SESSION_USER, current_setting('is_superuser'), count(*)) FROM pg_class"
        )
        assert job(session, who) == [(f"{new}|{new}|off|" + str(session.value("SELECT count(*) FROM pg_class")),)]
        plan = "\n".join(line for (line,) in job(session, "EXPLAIN (COSTS off) SELECT CURRENT_USER"))
        assert "Gather" in plan


def test_row_security_on_session_user_sees_the_role(alice: Session, conn: Session, connect: Connect) -> None:
    schema = alice.info.user
    conn.execute(
        sql.SQL(
            "CREATE TABLE {0}.guarded(owner name); INSERT INTO {0}.guarded VALUES ({1}), ({2});"
            " GRANT SELECT ON {0}.guarded TO {0}; ALTER TABLE {0}.guarded ENABLE ROW LEVEL SECURITY;"
            " CREATE POLICY own ON {0}.guarded USING (owner = SESSION_USER)"
        ).format(sql.Identifier(schema), sql.Literal(schema), sql.Literal(conn.info.user))
    )
    table = sql.Identifier(schema).as_string(None) + ".guarded"
    assert job(alice, f"SELECT owner::text FROM {table}") == [(schema,)]
    assert job(alice, "SET row_security = off; SELECT current_user::text") == [(schema,)]
    with sqlstate("42501"):
        job(alice, f"SET row_security = off; SELECT owner::text FROM {table}")


def test_definer_functions_event_triggers_and_their_set_clauses_lead_nowhere(
    alice: Session, conn: Session, fresh_database: str
) -> None:
    conn.execute(
        "CREATE FUNCTION public.as_boss() RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog"
        " AS $$ BEGIN PERFORM set_config('role', 'none', false); RETURN CURRENT_USER; END $$;"
        " CREATE FUNCTION public.on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE '%|%', CURRENT_USER, SESSION_USER; END $$;"
        " CREATE EVENT TRIGGER seen ON ddl_command_end EXECUTE FUNCTION public.on_ddl()"
    )
    with sqlstate("42501"):
        job(alice, "SELECT public.as_boss()")
    assert job(
        alice,
        "DO $do$ BEGIN PERFORM public.as_boss(); EXCEPTION WHEN insufficient_privilege THEN NULL; END $do$; " + WHO,
        WHO_COLUMNS,
    ) == identified(alice.info.user)
    alice.notices.clear()
    job(alice, "CREATE TEMP TABLE t()")
    assert alice.messages() == [f"NOTICE: {alice.info.user}|{alice.info.user}"]


def test_nothing_made_before_the_switch_is_left(alice: Session) -> None:
    left = (
        "SELECT concat_ws('|', (SELECT count(*) FROM pg_cursors), (SELECT count(*) FROM pg_prepared_statements),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),"
        " pg_my_temp_schema(), (SELECT count(*) FROM pg_listening_channels()))"
    )
    assert job(alice, left) == [("0|0|0|0|0",)]


def test_only_members_may_signal_a_worker(alice: Session, connect: Connect, role: NewRole) -> None:
    bob = connect(role("bob"))
    pid = alice.value("SELECT public.pg_background_launch('SELECT pg_sleep(60)')")
    wait_until(lambda: is_waiting(alice, Handle(pid, 0), "PgSleep"))
    for signal in ("pg_cancel_backend", "pg_terminate_backend"):
        with sqlstate("42501"):
            bob.value(f"SELECT {signal}(%s)", (pid,))
    assert alice.value("SELECT pg_cancel_backend(%s)", (pid,))
    with sqlstate("57014"):
        alice.rows("SELECT * FROM public.pg_background_result(%s) AS r(v text)", (pid,))


def test_exit_on_error_is_as_it_was(alice: Session) -> None:
    assert value(alice, "current_setting('exit_on_error')") == "off"
    caught = "DO $do$ BEGIN PERFORM 1/0; EXCEPTION WHEN OTHERS THEN NULL; END $do$; SELECT 'alive'::text"
    assert job(alice, caught) == [("alive",)]
    alice.execute("SET exit_on_error = on")
    assert value(alice, "current_setting('exit_on_error')") == "on"


# --- settings: what could run code or keep the switch from happening --------------------------------


def test_placeholder_of_an_ordinary_role_is_not_trusted_as_code(connect: Connect, role: NewRole, perl: None) -> None:
    """The code would run as the server's OS user when the worker calls somebody's plperlu function."""
    alice = role("alice")
    for language, call in (("plperlu", "unrestricted"), ("plperl", "restricted")):
        by_options = connect(alice, parameters={"options": f"-c plperl.on_{language}_init=die\\ 7;"})
        by_set = connect(alice, **{f"plperl.on_{language}_init": "die 7;"})
        set_since = connect(alice, parameters={"options": f"-c plperl.on_{language}_init=die\\ 7;"})
        set_since.execute(f"SET plperl.on_{language}_init = 'die 8;'")
        for session in (by_options, by_set, set_since):
            assert session.value("SELECT current_setting(%s)", (f"plperl.on_{language}_init",)).startswith("die ")
            assert value(session, f"public.{call}()") == "called"
            assert job(session, f"RESET ALL; SELECT public.{call}()") == [("called",)]


def test_definer_function_of_a_superuser_does_not_trust_its_callers_placeholders(
    connect: Connect, role: NewRole, perl: None, conn: Session
) -> None:
    boss, alice = role("chief", superuser=True), role("alice", granted=False)
    for owner in (boss, conn.info.user):
        conn.execute(
            "CREATE OR REPLACE FUNCTION public.by_owner() RETURNS SETOF text LANGUAGE plpgsql SECURITY DEFINER AS $$"
            " BEGIN RETURN QUERY SELECT * FROM public.pg_background_result(public.pg_background_launch("
            " 'SELECT concat_ws(''|'', public.unrestricted(), public.restricted(), current_setting(''my.tenant''))'"
            ")) AS r(v text); END $$"
        )
        conn.execute(sql.SQL("ALTER FUNCTION public.by_owner() OWNER TO {}").format(sql.Identifier(owner)))
        code = 'die\\ "code\\ ran";'
        options = f"-c plperl.on_plperlu_init={code} -c plperl.on_plperl_init={code} -c my.tenant=seven"
        by_options = connect(alice, parameters={"options": options})
        by_set = connect(alice, **{"plperl.on_plperlu_init": 'die "code ran"', "my.tenant": "seven"})
        for session in (by_options, by_set):
            assert session.value("SELECT public.by_owner()") == "called|called|seven", owner


def test_superuser_is_still_trusted_with_its_own_placeholders(
    connect: Connect, role: NewRole, perl: None, conn: Session
) -> None:
    for session in (conn, connect(role("chief", superuser=True))):
        session.execute("SET plperl.on_plperlu_init = '$main::seen = 1'")
        job(session, "SELECT public.unrestricted()")
        assert value(session, "current_setting('plperl.on_plperlu_init')") == "$main::seen = 1"
        ((seen,),) = job(
            session,
            "CREATE FUNCTION pg_temp.seen() RETURNS text LANGUAGE plperlu AS 'return $main::seen';"
            " SELECT pg_temp.seen()",
        )
        assert seen == "1"


HOSTILE_SETTINGS = [
    "role = {login}",
    "role = {owner}",
    "session_authorization = {owner}",
    "search_path = evil, pg_catalog",
    "statement_timeout = 1",
    "lock_timeout = 1",
    "idle_session_timeout = 1",
    "idle_in_transaction_session_timeout = 1",
    "default_transaction_read_only = on",
    "default_transaction_isolation = serializable",
    "default_transaction_deferrable = on",
    "exit_on_error = on",
    "standard_conforming_strings = off",
    "quote_all_identifiers = on",
    "bytea_output = escape",
    "array_nulls = off",
    "row_security = off",
    "client_encoding = LATIN1",
    "DateStyle = 'SQL, DMY'",
    "extra_float_digits = -5",
    "client_min_messages = error",
    "force_parallel_mode = on",
    "debug_parallel_query = on",
    "transaction_timeout = 1",
    "local_preload_libraries = 'no_such_library'",
    "max_parallel_workers_per_gather = 8",
]


@pytest.mark.parametrize("setting", HOSTILE_SETTINGS)
def test_settings_of_a_hostile_database_owner_do_not_bend_the_switch(
    setting: str, owner: Role, connect: Connect, role: NewRole, conn: Session, fresh_database: str, cluster: Cluster
) -> None:
    bob = role("bob")
    sessions = [connect(bob), connect(owner), connect()]
    sessions[0].execute("SELECT 1")
    mine = connect(owner)
    mine.execute(sql.SQL("CREATE SCHEMA evil; CREATE FUNCTION evil.f() RETURNS int LANGUAGE sql AS 'SELECT 1'"))
    mine.execute("CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT 1/0 $$")
    login = pwd.getpwuid(os.geteuid()).pw_name if cluster.executor else conn.info.user
    chosen = setting.format(login=sql.Literal(login).as_string(None), owner=sql.Literal(owner).as_string(None))
    command = sql.SQL("ALTER DATABASE {} SET " + chosen).format(sql.Identifier(fresh_database))
    try:
        mine.execute(command)
    except psycopg.errors.UndefinedObject:
        pytest.skip("this version has no such setting")
    except psycopg.errors.InsufficientPrivilege:
        conn.execute(command)
    try:
        for session in sessions:
            superuser = session.info.user == conn.info.user
            assert job(session, WHO, WHO_COLUMNS) == identified(session.info.user, superuser), setting
    finally:
        conn.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(fresh_database)))


def test_superusers_settings_travel_and_reset_to_the_launchers_values(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str
) -> None:
    alice = role("alice")
    conn.execute(sql.SQL("ALTER ROLE {} SET log_min_error_statement = 'fatal'").format(sql.Identifier(alice)))
    assert value(connect(alice), "current_setting('log_min_error_statement')") == "fatal"
    for session in (connect(role("chief", superuser=True)), conn):
        session.execute("SET log_min_error_statement = 'panic'")
        show = "current_setting('log_min_error_statement')"
        assert value(session, show) == "panic"
        session.notices.clear()
        job(session, f"DO $do$ BEGIN RESET ALL; RAISE NOTICE '%', {show}; END $do$")
        assert session.messages() == ["NOTICE: error"]


def test_settings_that_only_superusers_see_travel(
    connect: Connect, role: NewRole, conn: Session, fresh_database: str
) -> None:
    """session_preload_libraries for a role is how auto_explain and the like are switched on."""
    alice = role("alice")
    conn.execute(sql.SQL("ALTER ROLE {} SET session_preload_libraries = 'plpgsql'").format(sql.Identifier(alice)))
    session = connect(alice)
    assert job(session, WHO, WHO_COLUMNS) == identified(alice)
    session = connect()
    session.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(alice)))
    job(session, WHO, WHO_COLUMNS)
    session.execute("RESET SESSION AUTHORIZATION; SET dynamic_library_path = '$libdir:/nowhere'")
    assert value(session, "current_setting('dynamic_library_path')") == "$libdir:/nowhere"


@pytest.mark.parametrize("option", ["ignore_system_indexes=on", "post_auth_delay=0", "log_disconnections=on"])
def test_settings_made_at_the_connection_do_not_stop_a_launch(connect: Connect, role: NewRole, option: str) -> None:
    new = role("chief", superuser=True) if option.startswith("log") else role("alice")
    session = connect(new, parameters={"options": f"-c {option}"})
    assert job(session, WHO, WHO_COLUMNS) == identified(new, superuser=option.startswith("log"))
    name, _, chosen = option.partition("=")
    assert value(session, f"current_setting('{name}')") == chosen
    connect()


@pytest.mark.parametrize("name", ["my.setting", "My.Setting", "a_.b$1", "pg_backgroundx.y"])
@pytest.mark.parametrize(
    "chosen",
    ["plain", "", "quo'te", 'dou"ble', "back\\slash", "$switch$", "new\nline\r\ttab", "ünï ☃", "x" * 20000],
)
def test_placeholders_travel_exactly(alice: Session, name: str, chosen: str) -> None:
    alice.execute("SELECT set_config(%s, %s, false)", (name, chosen))
    found = value(alice, f"current_setting({sql.Literal(name).as_string(None)})")
    assert found == chosen


def test_own_settings_do_not_travel_in_any_spelling(alice: Session) -> None:
    alice.execute("SET \"PG_Background\".thing = 'x'")
    assert value(alice, "current_setting('pg_background.thing', true)") is None


def test_many_placeholders_travel(alice: Session) -> None:
    alice.execute(
        "DO $$ BEGIN FOR i IN 1..2500 LOOP PERFORM set_config('my.p' || i, 'value ' || i, false); END LOOP; END $$"
    )
    assert value(alice, "current_setting('my.p1') || '|' || current_setting('my.p2500')") == "value 1|value 2500"


def test_set_local_and_function_settings_travel(alice: Session) -> None:
    with alice.transaction():
        alice.execute("SET LOCAL work_mem = '3MB'; SET LOCAL my.local = 'l'")
        assert value(alice, "current_setting('work_mem') || current_setting('my.local')") == "3MBl"


def test_placeholder_of_the_login_role_does_not_show(conn: Session, alice: Session, cluster: Cluster) -> None:
    login = conn.info.user
    conn.execute(sql.SQL("ALTER ROLE {} SET my.secret = 'boss'").format(sql.Identifier(login)))
    try:
        assert value(alice, "current_setting('my.secret', true)") in ("", None)
        alice.execute("SELECT set_config('My.Secret', 'mine', false)")
        assert value(alice, "current_setting('my.secret')") == "mine"
    finally:
        conn.execute(sql.SQL("ALTER ROLE {} RESET my.secret").format(sql.Identifier(login)))


def test_reset_value_that_is_no_longer_valid_does_not_stop_a_launch(
    connect: Connect, role: NewRole, conn: Session
) -> None:
    alice = role("alice")
    conn.execute(sql.SQL("ALTER ROLE {} SET default_text_search_config = 'public.mine'").format(sql.Identifier(alice)))
    conn.execute("CREATE TEXT SEARCH CONFIGURATION public.mine (COPY = pg_catalog.simple)")
    session = connect(alice)
    session.execute("SET default_text_search_config = 'pg_catalog.simple'")
    conn.execute("DROP TEXT SEARCH CONFIGURATION public.mine")
    assert job(session, WHO, WHO_COLUMNS) == identified(alice)


def test_statement_timeout_of_the_database_does_not_end_the_set_up(
    connect: Connect, role: NewRole, conn: Session
) -> None:
    alice = role("alice")
    conn.execute(sql.SQL("ALTER ROLE {} SET statement_timeout = 1").format(sql.Identifier(alice)))
    session = connect(alice, parameters={"options": "-c statement_timeout=0"})
    assert job(session, WHO, WHO_COLUMNS) == identified(alice)


def test_session_is_reused_under_a_statement_timeout_of_the_role(
    connect: Connect, role: NewRole, conn: Session
) -> None:
    alice = role("alice")
    conn.execute(sql.SQL("ALTER ROLE {} SET statement_timeout = '10min'").format(sql.Identifier(alice)))
    session = connect(alice)
    assert value(session, "current_setting('statement_timeout')") == "10min"
    pid = value(session, "pg_backend_pid()")
    session.execute("SET work_mem = '2MB'")
    assert value(session, "pg_backend_pid()") == pid
    assert value(session, "current_setting('statement_timeout')") == "10min"


def test_floats_keep_their_digits_whatever_the_launcher_shows(connect: Connect, role: NewRole) -> None:
    session = connect(role("alice"), parameters={"options": "-c extra_float_digits=-3"})
    assert value(session, "current_setting('extra_float_digits')") == "1"


# --- SYSTEM_USER ------------------------------------------------------------------------------------


@pytest.mark.setups("trust", "peer")
def test_system_user_is_the_launchers_in_parallel_workers_too(
    alice: Session, conn: Session, connect: Connect, role: NewRole
) -> None:
    if major(conn) < 16:
        pytest.skip("SYSTEM_USER came with 16")
    # A superuser who is the login role itself keeps that login's: nothing is switched.
    for session in (alice, connect(role("chief", superuser=True))):
        own = session.value("SELECT SYSTEM_USER")
        for parallel in ("off", "on"):
            session.execute(f"SET debug_parallel_query = {parallel}")
            shown = value(session, "SYSTEM_USER")
            assert shown == own or (own is None and shown == f"trust:{role_oid(conn, session.info.user)}")


# --- limits, refusals, losses -----------------------------------------------------------------------


def test_connection_limit_of_the_role_holds_for_workers(conn: Session, connect: Connect, role: NewRole) -> None:
    alice = role("alice")
    conn.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT 2").format(sql.Identifier(alice)))
    session = connect(alice)
    session.execute("SET pg_background.pool_size = 0")
    pid = session.value("SELECT public.pg_background_launch('SELECT pg_sleep(60)')")
    with sqlstate("53300", "CONNECTION LIMIT of the role is 2"):
        session.execute("SELECT public.pg_background_launch('SELECT 1')")
    session.execute("SELECT pg_terminate_backend(%s)", (pid,))
    with sqlstate("57P01"):
        session.rows("SELECT * FROM public.pg_background_result(%s) AS r(v text)", (pid,))
    assert job(session, WHO, WHO_COLUMNS) == identified(alice)


def test_connection_limit_of_the_database_holds_for_workers(conn: Session, alice: Session, fresh_database: str) -> None:
    """Superusers are not held to it, as ever."""
    limit = sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}")
    conn.execute(limit.format(sql.Identifier(fresh_database), sql.Literal(2)))
    with sqlstate("53300", "CONNECTION LIMIT of the database is 2"):
        alice.execute("SELECT public.pg_background_launch('SELECT 1')")
    assert job(conn, WHO, WHO_COLUMNS) == identified(conn.info.user, superuser=True)
    conn.execute(limit.format(sql.Identifier(fresh_database), sql.Literal(-1)))
    assert job(alice, WHO, WHO_COLUMNS) == identified(alice.info.user)


@pytest.mark.parametrize("reserved", [0, 3])
def test_reserved_connections_are_left_alone(start_cluster: StartCluster, reserved: int) -> None:
    cluster = start_cluster("trust", {"max_connections": "10", "superuser_reserved_connections": str(reserved)})
    dbname = cluster.create_database()
    with cluster.connect(dbname) as admin:
        admin.execute("CREATE ROLE alice LOGIN IN ROLE pgbackground_role")
        admin.execute("SET pg_background.pool_size = 0")
        assert job(admin, WHO, WHO_COLUMNS) == identified(admin.info.user, superuser=True)
        launcher = cluster.connect(dbname, "alice")
        launcher.execute("SET pg_background.pool_size = 0")
        others = []
        try:
            job(launcher, WHO, WHO_COLUMNS)
            wait_until(lambda: not cluster.workers(dbname), what="the workers' ends")
            while (session := _connected(cluster, dbname)) is not None:
                others.append(session)
            for session in (launcher, admin):
                with sqlstate("53300"):
                    session.execute("SELECT public.pg_background_launch('SELECT 1')")
            others.pop().close()
            wait_until(lambda: _has_room(cluster, dbname, admin), what="a free connection")
            assert job(launcher, WHO, WHO_COLUMNS) == identified("alice")
        finally:
            for session in (*others, launcher):
                session.close()


def _connected(cluster: Cluster, dbname: str) -> Session | None:
    try:
        return cluster.connect(dbname, "alice")
    except psycopg.OperationalError:
        return None


def _has_room(cluster: Cluster, dbname: str, admin: Session) -> bool:
    session = _connected(cluster, dbname)
    if session is None:
        return False
    pid = session.pid
    session.close()
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %s"
    return bool(wait_until(lambda: admin.value(gone, (pid,)), what="its end"))


@pytest.mark.parametrize("line", ["local all {owner} reject", "local all {owner} scram-sha-256"])
def test_refused_login_says_what_to_do(start_cluster: StartCluster, line: str) -> None:
    cluster = start_cluster("trust")
    dbname = cluster.create_database()
    hba = cluster.datadir / "pg_hba.conf"
    owner = pwd.getpwuid(os.geteuid()).pw_name
    with cluster.connect(dbname) as admin:
        admin.execute("CREATE ROLE alice LOGIN IN ROLE pgbackground_role")
        with cluster.connect(dbname, "alice") as alice:
            allowed = hba.read_text()
            hba.write_text(line.format(owner=owner) + "\n" + allowed)
            admin.execute("SELECT pg_reload_conf()")
            wait_until(lambda: _is_refused(cluster, owner), what="the new pg_hba.conf")
            with sqlstate("08001", f"local all {owner} peer"):
                alice.execute("SELECT public.pg_background_launch('SELECT 1')")
            hba.write_text(f"local all {owner} peer\n" + allowed)
            admin.execute("SELECT pg_reload_conf()")
            wait_until(lambda: not _is_refused(cluster, owner), what="the cured pg_hba.conf")
            assert job(alice, WHO, WHO_COLUMNS) == identified("alice")


def _is_refused(cluster: Cluster, owner: str) -> bool:
    try:
        cluster.connect(None, owner).close()
    except psycopg.OperationalError:
        return True
    return False


@pytest.mark.parametrize("signal", ["pg_terminate_backend", "pg_cancel_backend"])
def test_worker_lost_in_the_middle_of_its_set_up(alice: Session, conn: Session, connect: Connect, signal: str) -> None:
    """The set-up waits for pg_db_role_setting or pg_authid, wherever it is then."""
    for catalog in ("pg_authid", "pg_proc", "pg_db_role_setting"):
        job(alice, "SELECT 1::text")
        alice.execute("SET pg_background.pool_size = 0")
        _lose_worker(alice, conn, connect(), catalog, signal)
        assert job(alice, WHO, WHO_COLUMNS) == identified(alice.info.user)


def _lose_worker(alice: Session, conn: Session, locker: Session, catalog: str, signal: str) -> None:
    outcome: list[psycopg.Error | None] = []

    def launch() -> None:
        try:
            alice.execute("SELECT public.pg_background_launch('SELECT 1')")
        except psycopg.Error as error:
            outcome.append(error)
        else:
            outcome.append(None)

    blocked = "SELECT l.pid FROM pg_locks l WHERE NOT l.granted AND l.pid <> %s AND l.relation = %s::regclass"
    relation = conn.value("SELECT %s::regclass::oid", (catalog,))
    with locker.transaction():
        locker.execute(f"LOCK TABLE pg_catalog.{catalog} IN ACCESS EXCLUSIVE MODE")
        thread = threading.Thread(target=launch)
        thread.start()
        try:
            ((pid,),) = wait_until(lambda: locker.rows(blocked, (locker.pid, relation)), what="a blocked worker")
            if pid != alice.pid:
                locker.execute(f"SELECT {signal}(%s)", (pid,))
                own = (alice.pid,)  # may need the catalog to tell what has happened
                wait_until(
                    lambda: outcome or own in locker.rows(blocked, (locker.pid, relation)), what="the launch's end"
                )
        finally:
            locker.execute("SELECT 1")
    thread.join(20)
    (error,) = outcome
    if error is not None:
        assert error.sqlstate in ("08001", "08006", "57P01", "57014"), error
        assert "Traceback" not in str(error)


# --- what a launcher's search_path holds, and calls of internal functions -----------------------------


def test_planted_objects_are_never_used(alice: Session, connect: Connect, conn: Session, role: NewRole) -> None:
    """alice plants; a superuser whose search_path starts with her schema calls by qualified name."""
    schema = sql.Identifier(alice.info.user).as_string(None)
    alice.execute("CREATE TABLE touched (what text)")
    alice.execute(f"GRANT INSERT ON {schema}.touched TO PUBLIC")
    bodies = {
        "format(text, text)": "text", "format(text, text, text)": "text", "concat(text, text)": "text",
        "left(text, int)": "text", "substr(text, int)": "text", "replace(text, text, text)": "text",
        "concat_ws(text, text, text)": "text", "current_setting(text)": "text", "set_config(text, text, bool)": "text",
        "quote_ident(text)": "text", "quote_literal(text)": "text", "unnest(text[])": "text",
        "pg_has_role(name, oid, text)": "bool", "current_database()": "name", "jsonb_typeof(jsonb)": "text",
    }  # fmt: skip
    for signature, returned in bodies.items():
        alice.execute(
            f"CREATE FUNCTION {schema}.{signature} RETURNS {returned} LANGUAGE plpgsql AS"
            f" $$ BEGIN INSERT INTO {schema}.touched VALUES ($f${signature}$f$); RETURN NULL; END $$"
        )
    operators = {
        "=": ["text,text", "oid,oid", "name,name", "name,text", "int4,int4", "int8,int8", "bool,bool", '"char","char"'],
        "<>": ["text,text", "int4,int4"], "||": ["text,text"], "->>": ["jsonb,text", "json,text"], "?": ["jsonb,text"],
        "?|": ["jsonb,text[]"], "<": ["int4,int4"], ">": ["int4,int4"],
    }  # fmt: skip
    for operator, pairs in operators.items():
        for number, pair in enumerate(pairs):
            left, right = pair.split(",")
            name = f"op_{abs(hash(operator))}_{number}"
            returned = "text" if operator in ("||", "->>") else "bool"
            alice.execute(
                f"CREATE FUNCTION {schema}.{name}({left}, {right}) RETURNS {returned} LANGUAGE plpgsql AS"
                f" $$ BEGIN INSERT INTO {schema}.touched VALUES ($f${operator} {pair}$f$); RETURN NULL; END $$;"
                f"CREATE OPERATOR {schema}.{operator}"
                f" (FUNCTION = {schema}.{name}, LEFTARG = {left}, RIGHTARG = {right})"
            )
    for relation in ("pg_roles", "pg_authid", "pg_extension", "pg_depend", "pg_proc", "pg_settings", "pg_database"):
        alice.execute(f"CREATE VIEW {schema}.{relation} AS SELECT 1/0 AS oid")
    for planted in ("record", "jsonb", "json", "text", "int4", "int8", "bool", "name", "oid", "bytea", "regclass"):
        alice.execute(
            f"CREATE DOMAIN {schema}.{planted} AS pg_catalog.text"
            f" CHECK (pg_catalog.length(VALUE) OPERATOR(pg_catalog.<) 0)"
        )
    victim = connect()
    victim.execute("SELECT pg_catalog.set_config('search_path', %s, false)", (f"{schema}, pg_catalog, pg_temp",))
    launch = "SELECT pid, cookie FROM public.pg_background_launch_v2(%s)"
    handle = victim.rows(launch, ("SELECT 1::pg_catalog.int4, 'x'::pg_catalog.text",))[0]
    victim.rows("SELECT * FROM public.pg_background_list_v2() AS w(pid pg_catalog.int4, cookie pg_catalog.int8,"
                " launched_at timestamptz, user_id pg_catalog.oid, queue_size pg_catalog.int4, state pg_catalog.text,"
                " sql_preview pg_catalog.text, last_error pg_catalog.text, consumed pg_catalog.bool)")  # fmt: skip
    victim.rows("SELECT * FROM public.pg_background_stats_v2()")
    assert victim.value("SELECT public.pg_background_wait_v2_timeout(%s, %s, 10000)", handle)
    columns = "AS r(a pg_catalog.int4, b pg_catalog.text)"
    result = f"SELECT * FROM public.pg_background_result_v2(%s, %s) {columns}"
    assert victim.rows(result, handle) == [(1, "x")]
    with sqlstate("23505"):
        victim.rows(
            result,
            victim.rows(
                launch,
                ("CREATE TEMP TABLE t (a pg_catalog.int4 PRIMARY KEY); INSERT INTO t VALUES (1), (1)",),
            )[0],
        )  # fmt: skip
    with sqlstate("42704"):
        victim.rows(result, (1, 1))
    handle = victim.rows(launch, ("SELECT pg_catalog.pg_sleep(0)",))[0]
    victim.execute("SELECT public.pg_background_detach_v2(%s, %s)", handle)
    assert alice.rows("SELECT DISTINCT what FROM touched") == []


def test_context_of_an_error_is_never_run(alice: Session) -> None:
    """It is shown as a comment of a statement; a carriage return ends a comment too."""
    for newline in ("\\r", "\\n", "\\r\\n"):
        inner = f"SELECT 1/0 {newline}; SELECT pg_advisory_lock(4711); --"
        with sqlstate("22012", "pg_advisory_lock"):
            job(alice, f"DO $do$ BEGIN EXECUTE E'{inner}'; END $do$")
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert alice.value(locks) == 0


INTERNAL_CALLS = [
    "_pg_background_open_result(NULL, NULL)",
    "_pg_background_open_result(-1, 0)",
    "_pg_background_open_result(2147483647, -9223372036854775808)",
    "_pg_background_close_result(1)",
    "_pg_background_close_result(NULL)",
    "_pg_background_batches(1)",
    "_pg_background_batches(NULL)",
    "_pg_background_wait(NULL, NULL, NULL)",
    "_pg_background_wait(1, 1, -5)",
    "_pg_background_detach(NULL, NULL)",
    "_pg_background_checked('!')",
    "_pg_background_checked('!{}')",
    "_pg_background_checked('![]')",
    '_pg_background_checked(\'!{"sqlstate": "nonsense", "message": "x"}\')',
    "_pg_background_checked(NULL)",
    "_pg_background_raise('{}')",
    '_pg_background_raise(\'{"sqlstate": "00000", "message": "x", "table_name": ""}\')',
]


@pytest.mark.parametrize("call", INTERNAL_CALLS)
def test_internal_functions_withstand_made_up_arguments(alice: Session, call: str) -> None:
    raised: psycopg.Error | None = None
    rows = []
    try:
        rows = alice.rows(f"SELECT public.{call}")
    except psycopg.Error as error:
        raised = error
    # These two cannot reply with a report; nobody calls them so but by hand.
    bare = call.startswith(("_pg_background_batches", "_pg_background_close_result"))
    if raised is not None and not bare:
        assert "Traceback" not in str(raised)
        assert raised.sqlstate not in ("XX000", "38000"), raised
    assert all(row[0] is None or row[0].startswith("!") for row in rows)
    assert job(alice, WHO, WHO_COLUMNS) == identified(alice.info.user)


def test_internal_functions_give_another_role_nothing(connect: Connect, role: NewRole) -> None:
    alice, bob = role("alice"), role("bob")
    session = connect()
    session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(alice)))
    pid = session.value("SELECT public.pg_background_launch('SELECT ''hers''::text')")
    session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(bob)))
    for call in (
        f"_pg_background_checked(public._pg_background_open_result({pid}, NULL))",
        f"_pg_background_checked(public._pg_background_wait({pid}, 0, 0))",
        f"_pg_background_checked(public._pg_background_detach({pid}, 0))",
    ):
        with sqlstate("42501"):
            session.execute(f"SELECT public.{call}")
    with pytest.raises(psycopg.Error, match="permission denied for the background worker"):
        session.execute(f"SELECT public._pg_background_batches({pid})")
    session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(alice)))
    assert session.rows("SELECT * FROM public.pg_background_result(%s) AS r(v text)", (pid,)) == [("hers",)]
