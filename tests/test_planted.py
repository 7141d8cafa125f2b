"""Objects that an attacker has planted where a victim's search_path leads: no call of the extension touches one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql

from tests.clusters import Role, Session, wait_until
from tests.whole_api import call_everything
from tools.common import ROOT, control_version

Connect = Callable[..., Session]
NewRole = Callable[..., Role]

# The trap: a sequence keeps count even where the transaction is rolled back.
TRAP = """
    CREATE SCHEMA evil;
    GRANT USAGE ON SCHEMA evil TO PUBLIC;
    CREATE SEQUENCE evil.touched;
    GRANT ALL ON SEQUENCE evil.touched TO PUBLIC;
    CREATE FUNCTION evil.tripped() RETURNS pg_catalog.bool LANGUAGE plpgsql VOLATILE AS $trap$
    BEGIN
        PERFORM pg_catalog.nextval('evil.touched'::pg_catalog.regclass);
        RAISE EXCEPTION 'a planted object was used';
    END $trap$;
"""

# Runs each of the commands that a query makes; what cannot be made (a function of type "any", say) is left out.
PLANT = """
    DO $plant$
    DECLARE
        command pg_catalog.text;
    BEGIN
        FOR command IN {} LOOP
            BEGIN
                EXECUTE command;
            EXCEPTION WHEN OTHERS THEN
                NULL;
            END;
        END LOOP;
    END $plant$
"""
BODY = "LANGUAGE plpgsql AS 'BEGIN PERFORM evil.tripped(); END'"

# Copies of functions: with the very argument types, and, of those that take any, with texts.
FUNCTIONS = f"""
    SELECT pg_catalog.format('CREATE FUNCTION evil.%I(%s) RETURNS %s%s {BODY.replace("'", "''")}',
        p.proname, pg_catalog.oidvectortypes(p.proargtypes), CASE WHEN p.proretset THEN 'SETOF ' END,
        pg_catalog.format_type(p.prorettype, NULL))
    FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND p.proname = ANY ({{names}})
       OR p.pronamespace = 'public'::pg_catalog.regnamespace
    UNION ALL
    SELECT pg_catalog.format('CREATE FUNCTION evil.%I(%s) RETURNS pg_catalog.text {BODY.replace("'", "''")}',
        n.name, pg_catalog.array_to_string(pg_catalog.array_fill('pg_catalog.text'::pg_catalog.text, ARRAY[c]), ','))
    FROM pg_catalog.unnest({{names}}) AS n(name), pg_catalog.generate_series(1, 8) AS c
"""
OPERATORS = f"""
    SELECT pg_catalog.format('CREATE FUNCTION evil.op_%s(%s, %s) RETURNS %s {BODY.replace("'", "''")};'
        'CREATE OPERATOR evil.%s (FUNCTION = evil.op_%s, LEFTARG = %s, RIGHTARG = %s)',
        o.oid, o.oprleft::pg_catalog.regtype, o.oprright::pg_catalog.regtype, o.oprresult::pg_catalog.regtype,
        o.oprname, o.oid, o.oprleft::pg_catalog.regtype, o.oprright::pg_catalog.regtype)
    FROM pg_catalog.pg_operator o
    WHERE o.oprnamespace = 'pg_catalog'::pg_catalog.regnamespace AND o.oprname = ANY ({{names}}) AND o.oprleft <> 0
"""
DOMAINS = """
    SELECT pg_catalog.format('CREATE DOMAIN %s.%I AS pg_catalog.text CHECK (evil.tripped())', {schema}, n.name)
    FROM pg_catalog.unnest({names}) AS n(name)
"""
VIEWS = """
    SELECT pg_catalog.format('CREATE VIEW %s.%I AS SELECT evil.tripped() AS oid', {schema}, n.name)
    FROM pg_catalog.unnest({names}) AS n(name)
"""


def _used() -> dict[str, list[str]]:
    """What the extension uses of pg_catalog: names of functions, operators, relations and types."""
    script = (ROOT / f"pg_background--{control_version()}.sql").read_text("utf-8")
    names = set(re.findall(r"pg_catalog\.(\w+)\b", script))
    return {
        "functions": sorted(set(re.findall(r"pg_catalog\.(\w+)\(", script))),
        "operators": sorted(set(re.findall(r"OPERATOR\(pg_catalog\.([^)]+)\)", script))),
        "relations": sorted(name for name in names if name.startswith("pg_")),
        "types": sorted(name.lstrip("_") for name in names if not name.startswith("pg_")),
    }


def _plant(session: Session, template: str, names: list[str], schema: str = "evil") -> None:
    """As the session's user."""
    array = sql.SQL("{}::pg_catalog.text[]").format(sql.Literal(names))
    query = sql.SQL(template).format(names=array, schema=sql.Literal(schema))
    session.execute(sql.SQL(PLANT).format(query))


@pytest.fixture
def planted(fresh_database: str, conn: Session, connect: Connect, role: NewRole) -> Session:
    """mallory's session: it owns the schema evil, full of traps."""
    mallory = role("mallory", granted=False)
    conn.execute(
        sql.SQL("GRANT CREATE, TEMP ON DATABASE {} TO {}").format(
            sql.Identifier(fresh_database), sql.Identifier(mallory)
        )
    )
    session = connect(mallory)
    session.execute(TRAP)
    used = _used()
    _plant(session, FUNCTIONS, used["functions"])
    _plant(session, OPERATORS, used["operators"])
    _plant(session, DOMAINS, used["types"])
    _plant(session, VIEWS, used["relations"])
    session.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA evil TO PUBLIC")
    return session


def _touched(session: Session) -> bool:
    found: bool = session.value("SELECT is_called FROM evil.touched")
    return found


def test_the_traps_are_there_and_work(planted: Session) -> None:
    counts = {
        "pg_proc": ("pronamespace", 300),
        "pg_operator": ("oprnamespace", 100),
        "pg_type": ("typnamespace", 100),
        "pg_class": ("relnamespace", 20),
    }
    for catalog, (column, least) in counts.items():
        query = f"SELECT count(*) FROM pg_catalog.{catalog} WHERE {column} = 'evil'::regnamespace"
        assert planted.value(query) > least, catalog
    assert not _touched(planted)
    planted.execute("SET search_path = evil, pg_catalog")
    for query in (
        "SELECT concat('a'::pg_catalog.text)",
        "SELECT 1 OPERATOR(=) 1",
        "SELECT 'x'::text",
        "TABLE pg_roles",
    ):
        with pytest.raises(psycopg.Error, match="a planted object was used"):
            planted.execute(query)
    assert _touched(planted)


@pytest.mark.parametrize("superuser", [True, False])
@pytest.mark.parametrize("path", ["evil, pg_catalog, pg_temp", "pg_temp, evil, public, pg_catalog"])
def test_no_call_uses_what_is_planted_in_the_search_path(
    planted: Session, connect: Connect, role: NewRole, superuser: bool, path: str
) -> None:
    victim = connect(role("victim", superuser=superuser))
    victim.execute("SELECT pg_catalog.set_config('search_path', %s, false)", (path,))
    call_everything(victim)
    assert not _touched(planted)


def test_no_call_uses_what_is_planted_in_the_temporary_schema(
    planted: Session, connect: Connect, role: NewRole, conn: Session
) -> None:
    """Tables and types there are found first; the two definer functions must not take them for theirs."""
    used = _used()
    victim = connect(role("victim"))
    victim.execute("CREATE TEMP TABLE _pg_background_marker (role_oid oid, key uuid, is_launchers bool)")
    victim.execute("CREATE TEMP TABLE _pg_background_worker (key int8)")
    _plant(victim, DOMAINS, used["types"], "pg_temp")
    _plant(victim, VIEWS, used["relations"], "pg_temp")
    with pytest.raises(psycopg.Error, match="a planted object was used"):
        victim.execute("TABLE pg_roles")
    before = planted.value("SELECT last_value FROM evil.touched")
    call_everything(victim)
    assert planted.value("SELECT last_value FROM evil.touched") == before
    for table in ("_pg_background_marker", "_pg_background_worker"):
        assert victim.rows(f"SELECT * FROM pg_temp.{table}") == []


def test_a_function_in_the_schema_of_before_is_not_called(
    fresh_database: str, connect: Connect, role: NewRole, conn: Session
) -> None:
    """The extension has moved away from mallory's schema, and workers are kept that were started before."""
    mallory = role("mallory", granted=False)
    conn.execute(f"DROP EXTENSION pg_background; {TRAP}")
    conn.execute(sql.SQL("CREATE SCHEMA former AUTHORIZATION {}").format(sql.Identifier(mallory)))
    conn.execute("GRANT USAGE ON SCHEMA former TO PUBLIC")
    conn.execute("CREATE SCHEMA later; GRANT USAGE ON SCHEMA later TO PUBLIC")
    conn.execute("CREATE EXTENSION pg_background SCHEMA former")
    alice = connect(role("alice"))
    pid = alice.value("SELECT former.pg_background_launch('SELECT 1')")
    assert alice.rows("SELECT * FROM former.pg_background_result(%s) AS r(n int)", (pid,)) == [(1,)]
    conn.execute("ALTER EXTENSION pg_background SET SCHEMA later")
    planter = connect(mallory)
    for name, returned in (
        ("_pg_background_proof(int4)", "text"),
        ("_pg_background_has_committed(uuid)", "bool"),
        ("_pg_background_checked(text)", "text"),
        ("_pg_background_open_result(int4, int8)", "text"),
        ("_pg_background_taken(int4)", "text"),
        ("_pg_background_close_result(int4)", "text"),
    ):
        planter.execute(f"CREATE FUNCTION former.{name} RETURNS {returned} {BODY}")
    for _ in range(3):
        alice.value("SELECT state FROM later.pg_background_run_v2('SELECT 1')")
        for query, rows in (("SELECT 1", 1), ("SELECT generate_series(1, 3)", 3), ("LISTEN nobody", 1)):
            column = "t text" if query.startswith("LISTEN") else "n int"
            pid = alice.value("SELECT later.pg_background_launch(%s)", (query,))
            assert len(alice.rows(f"SELECT * FROM later.pg_background_result(%s) AS r({column})", (pid,))) == rows
        handle = alice.rows("SELECT pid, cookie FROM later.pg_background_submit_on_commit_v2('SELECT 1')")[0]
        alice.execute("SELECT later.pg_background_wait_v2(%s, %s)", handle)
    wait_until(lambda: not conn.rows("SELECT FROM pg_stat_activity WHERE usename = %s AND state = 'active'",
                                     (alice.info.user,)), what="the clean-ups' ends")  # fmt: skip
    assert not _touched(conn)


INEXACT = ("oid", "regclass", "regproc", "regnamespace", "name", "text", '"char"', "int4", "int8", "bool")


def test_create_extension_uses_nothing_that_is_planted_in_its_schema(
    planted: Session, conn: Session, fresh_database: str
) -> None:
    """Operators fit better there than those of pg_catalog where these take other types."""
    conn.execute("DROP EXTENSION pg_background; CREATE SCHEMA target")
    conn.execute(sql.SQL("GRANT ALL ON SCHEMA target TO {}").format(sql.Identifier(planted.info.user)))
    count = 0
    for left, right in itertools.product(INEXACT, INEXACT):
        arguments = f"pg_catalog.{left}, pg_catalog.{right}"
        planted.execute(f"CREATE FUNCTION target.compared({arguments}) RETURNS pg_catalog.bool {BODY}")
        for operator in ("=", "<>", ">", "<", "~", "!~"):
            planted.execute(
                f"CREATE OPERATOR target.{operator} (FUNCTION = target.compared,"
                f" LEFTARG = pg_catalog.{left}, RIGHTARG = pg_catalog.{right})"
            )
            count += 1
    conn.execute("CREATE EXTENSION pg_background SCHEMA target")
    assert count == 600
    assert not _touched(planted)


def test_an_overload_in_the_extensions_schema_is_not_called(
    planted: Session, connect: Connect, role: NewRole, conn: Session, fresh_database: str
) -> None:
    """Of those functions that are called by name, for each type that an argument could be taken for."""
    conn.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(planted.info.user)))
    for name, arguments in (
        ("_pg_background_open_as", ("int4", "int8", "regtype")),
        ("_pg_background_open_result", ("int4", "int4")),
        ("_pg_background_checked", ("varchar",)),
        ("_pg_background_taken", ("int8",)),
        ("_pg_background_close_result", ("int8",)),
        ("_pg_background_raise", ("json",)),
    ):
        types = ", ".join(f"pg_catalog.{argument}" for argument in arguments)
        planted.execute(f"CREATE FUNCTION public.{name}({types}) RETURNS pg_catalog.text {BODY}")
    victim = connect(role("victim"))
    call_everything(victim)
    assert not _touched(planted)
