"""Names and texts made of what quoting, formatting or parsing could trip over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from sql_templates.api import API
from tests import whole_api
from tests.background import launch, result
from tests.clusters import Cluster, Role, Session
from tests.test_identity import WHO, WHO_COLUMNS, identified
from tests.whole_api import call_everything

Connect = Callable[..., Session]
NewRole = Callable[..., Role]

HOSTILE = [
    "q\"u'o\\te; -- %s %I",
    "new\nline\r\t/* {schema} {0} $1",
    "grün ☃ host=x port=1 $switch$",
    "postgresql://x/y?z",
]


def test_call_everything_does_call_everything() -> None:
    source = inspect.getsource(whole_api.call_everything)
    started = {f"pg_background_{how}_v2" for how in ("launch", "submit", "submit_on_commit")}
    told = {f"pg_background_{what}_v2" for what in ("outcome", "result_info", "error_info", "full_sql", "get_progress")}
    names = {function.name for function in API if function.role} - started - told - {"pg_background_progress"}
    assert [name for name in sorted(names) if f"public.{name}(" not in source] == []


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """A name, and that of a database made of it, whose extension is in a schema of that name."""
    try:
        database = cluster.create_database(request.param)
    except psycopg.errors.InvalidParameterValue:
        pytest.skip("this server takes no such name")
    try:
        with cluster.connect(database) as admin:
            schema = sql.Identifier(request.param)
            admin.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
            admin.execute(sql.SQL("ALTER EXTENSION pg_background SET SCHEMA {}").format(schema))
            admin.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO pgbackground_role").format(schema))
        yield request.param, database
    finally:
        cluster.drop_database(database)


def test_role_database_and_schema_of_a_hostile_name(
    hostile: tuple[str, str], cluster: Cluster, role: NewRole, connect: Connect
) -> None:
    name, database = hostile
    victim = role(name)
    with cluster.connect(database, victim) as session:
        session.execute("SELECT set_config('search_path', quote_ident(%s) || ', pg_catalog', false)", (name,))
        session.execute("SELECT set_config('my.setting', %s, false)", (name,))
        schema = sql.Identifier(name).as_string(session)
        call_everything(session, schema)
        handle = launch(session, WHO, schema=schema)
        assert result(session, handle, WHO_COLUMNS, schema) == identified(str(victim))
        handle = launch(session, "SELECT current_setting('my.setting'), current_database()::text", schema=schema)
        assert result(session, handle, "a text, b text", schema) == [(name, database)]
    with cluster.connect(database) as admin:
        home = schema.replace("%", "%%")
        for verb in ("grant", "revoke"):
            assert admin.value(f"SELECT {home}.{verb}_pg_background_privileges(%s)", (str(victim),)) is True


# Of schemas: what could end the quotes around a function's body, or take part in what CREATE EXTENSION replaces there.
HOSTILE_SCHEMAS = [
    "$function$;CREATE SEQUENCE touched;SET a.b=$function$",
    "a$function$b",
    "my pg_background_home",
    "Up Per",
    "o'hare",
    "\\back",
]


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_extension_in_a_schema_of_a_hostile_name(
    name: str, fresh_database: str, conn: Session, role: NewRole, connect: Connect
) -> None:
    """Created there, not moved there."""
    schema = sql.Identifier(name)
    create = "DROP EXTENSION pg_background; CREATE SCHEMA {0}; CREATE EXTENSION pg_background SCHEMA {0}"
    conn.execute(sql.SQL(create).format(schema))
    conn.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO pgbackground_role").format(schema))
    assert conn.rows("SELECT rolname FROM pg_roles WHERE rolsuper AND oid <> 10") == []
    assert conn.rows("SELECT FROM pg_class WHERE relname = 'touched'") == []
    with connect(role("alice")) as session:
        call_everything(session, schema.as_string(session))


@pytest.mark.parametrize("name", HOSTILE)
def test_types_columns_labels_and_texts_of_a_hostile_name(alice: Session, name: str) -> None:
    """A job returns values of a type of that name, in a column of that name, and fails with that text."""
    kind, text = sql.Identifier(name).as_string(alice), sql.Literal(name).as_string(alice)
    alice.execute(f"CREATE TYPE {kind} AS ENUM ({text}, 'other')")
    alice.execute(f"CREATE DOMAIN {sql.Identifier('d ' + name).as_string(alice)} AS text")
    query = f"SELECT {text}::{kind} AS {kind}, {text}::text AS b, ARRAY[{text}::{kind}]"
    columns = f"a {kind}, b text, c {kind}[]"
    escaped = columns.replace("%", "%%")
    assert result(alice, launch(alice, query), escaped)[0][:2] == (name, name)
    handle = launch(alice, query)
    ((found,),) = alice.rows("SELECT * FROM pg_background_result_json_v2(%s, %s)", handle)
    assert found == {name: name, "b": name, "array": [name]}
    handle = launch(alice, f"SELECT {text}::text")
    domain = sql.Identifier("d " + name).as_string(alice).replace("%", "%%")
    assert alice.rows(f"SELECT * FROM pg_background_result_v2(%s, %s, NULL::{domain})", handle) == [(name,)]

    options = f"MESSAGE = {text}, TABLE = {text}, HINT = {text}"
    failing = f"DO LANGUAGE plpgsql $do$ BEGIN RAISE EXCEPTION USING {options}; END $do$"
    with pytest.raises(psycopg.errors.RaiseException) as raised:
        result(alice, launch(alice, failing))
    diag = raised.value.diag
    assert (diag.message_primary, diag.table_name, diag.message_hint) == (name, name, name)

    alice.execute("SELECT pg_background_launch_v2('SELECT pg_sleep(600)', 0, %s)", (name,))
    assert alice.value("SELECT label FROM pg_background_list") == name
    pattern = name.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    assert alice.value("SELECT pg_background_cancel_by_label_v2(%s, 5000)", (pattern,)) == 1
    assert alice.value("SELECT pg_background_detach_all_v2()") == 1


ODD_SETTINGS = {
    "search_path": "",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "DateStyle": "ISO, DMY",
    "TimeZone": "Pacific/Apia",
    "row_security": "off",
    "plpgsql.extra_errors": "all",
    "plan_cache_mode": "force_generic_plan",
    "jit_above_cost": "0",
    "enable_seqscan": "off",
    "work_mem": "64kB",
    "check_function_bodies": "off",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "default_toast_compression": "pglz",
    "client_min_messages": "error",
    "exit_on_error": "off",
}


def test_odd_settings_of_the_launcher_bend_nothing(connect: Connect, role: NewRole) -> None:
    """All that an ordinary role may set and that the server's parser, planner or output go by."""
    call_everything(connect(role("odd"), **ODD_SETTINGS))
