"""Values of every type arrive exactly: what `result_v2` gives is compared with the query itself, byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from psycopg import sql

from tests.clusters import Session, sqlstate

# Values of each type that a table can hold, as the type's input takes them.
VALUES: dict[str, tuple[str, ...]] = {
    "bool": ("true", "false"),
    "bytea": ("", r"\x00ff5c22275c", r"\x" + "00" * 300),
    '"char"': ("a", "\\", '"', ",", "{", ""),
    "name": ("", "relname", 'a "b", {c}', "é" * 31),
    "int8": ("0", "-9223372036854775808", "9223372036854775807"),
    "int2": ("0", "-32768", "32767"),
    "int2vector": ("", "1", "1 2 3"),
    "int4": ("0", "-2147483648", "2147483647"),
    "regproc": ("0", "pg_sleep"),
    "text": ("", " ", "NULL", "null", '"', "\\", "{}", "a,b", "'", "\t\r\n\x01\x1f\x7f", "héß😀", "\\N", "x" * 9000),
    "oid": ("0", "4294967295"),
    "tid": ("(0,1)", "(4294967295,65535)"),
    "xid": ("0", "4294967295"),
    "cid": ("0", "4294967295"),
    "oidvector": ("", "1", "1 4294967295"),
    "json": ("null", '"a\\u0000b"', '{"a" :  [1, "x\\\\"], "a": 2}', "1.0"),
    "xml": ("", "<a>é &lt; </a>", "text only", '<?xml version="1.1"?><a/>', "<!DOCTYPE a><a/>", "<a/><b/>"),
    "point": ("(0,0)", "(1e-300,-Infinity)", "(NaN,0.1)"),
    "lseg": ("[(0,0),(1,0.1)]",),
    "path": ("((0,0),(1,1))", "[(0,0),(1,1),(2,0.3)]"),
    "box": ("(1,1),(0,0)", "(0.1,Infinity),(-3,-1e300)"),
    "polygon": ("((0,0),(1,1),(2,0.7))",),
    "line": ("{1,2,3}", "{0.1,-1,1e-17}"),
    "float4": ("0", "-0", "0.1", "3.4028235e38", "1e-45", "NaN", "-Infinity"),
    "float8": ("0", "-0", "0.1", "1.7976931348623157e308", "5e-324", "NaN", "Infinity", "0.30000000000000004"),
    "circle": ("<(0,0),1>", "<(0.1,-1),1e100>"),
    "money": ("0", "-92233720368547758.08", "92233720368547758.07", "-0.01"),
    "macaddr": ("08:00:2b:01:02:03",),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
    "inet": ("0.0.0.0/0", "192.168.0.1/24", "::1", "fe80::1/64"),
    "cidr": ("10.0.0.0/8", "::/0"),
    "aclitem": ("=r/postgres", "postgres=arwdDxt/postgres"),
    "bpchar": ("", "a", "a  ", "  ", "é ,"),
    "varchar": ("", "a", "NULL", 'a"b'),
    "date": ("0044-03-15 BC", "2024-02-29", "5874897-12-31", "infinity", "-infinity"),
    "time": ("00:00", "24:00", "23:59:59.999999"),
    "timestamp": ("4713-11-24 00:00 BC", "2024-02-29 12:34:56.789012", "294276-12-31 23:59:59.999999", "infinity"),
    "timestamptz": ("4713-11-24 00:00+00 BC", "1883-11-18 12:03:58-05", "294276-12-31 23:59:59.999999+00", "-infinity"),
    "interval": ("0", "-1 year -2 mons +3 days -04:05:06.789", "178000000 years", "1 mon -1 day", "00:00:00.000001"),
    "timetz": ("00:00+15:59", "24:00-15:59", "12:34:56.789+05:30"),
    "bit": ("0", "1"),
    "varbit": ("", "1", "0101010101010101010"),
    "numeric": ("0", "0.00", "-1.50", "NaN", "Infinity", "-Infinity", "1e-16000", "9" * 400 + ".5"),
    "refcursor": ("", "c 1"),
    "regprocedure": ("0", "pg_catalog.abs(int)"),
    "regoper": ("0",),
    "regoperator": ("0", "pg_catalog.+(int,int)"),
    "regclass": ("0", "pg_class", "4294967295"),
    "regtype": ("0", "timestamp with time zone", '"char"', "int[]"),
    "uuid": ("00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "txid_snapshot": ("10:20:10,14,15", "1:1:"),
    "pg_lsn": ("0/0", "FFFFFFFF/FFFFFFFF"),
    "tsvector": ("", "'a b':1A,2 'it''s' '\\\\':3"),
    "tsquery": ("", "'a' & !('b' | 'c':*A) <2> 'it''s'"),
    "regconfig": ("simple", "english"),
    "regdictionary": ("simple",),
    "jsonb": ("null", '"x\\\\\\"y"', '{"a": [1.10, null, {}], "é": ""}', "1e1000"),
    "jsonpath": ("$", 'strict $."a b"[*] ? (@ > 1 && @ like_regex "\\\\d")'),
    "regnamespace": ("pg_catalog", "0"),
    "regrole": ("postgres", "0"),
    "regcollation": ("0", '"C"', '"POSIX"'),
    "pg_snapshot": ("10:20:10,14,15", "1:1:"),
    "xid8": ("0", "18446744073709551615"),
    "int4range": ("empty", "[1,5)", "(,)", "[1,)"),
    "numrange": ("empty", "(0.1,2.50]", "[1,]"),
    "tsrange": ("[2024-01-01 00:00,2024-01-02 00:00)", "[-infinity,infinity]"),
    "tstzrange": ("[2024-01-01 00:00+00,2024-01-02 00:00+00)", "empty"),
    "daterange": ("[2024-01-01,infinity)", "empty"),
    "int8range": ("[-9223372036854775808,9223372036854775807)",),
    "int4multirange": ("{}", "{[1,2),[5,)}"),
    "nummultirange": ("{}", "{(0.1,0.2],[5,6)}"),
    "tsmultirange": ("{[2024-01-01 00:00,2024-01-02 00:00)}",),
    "tstzmultirange": ("{[2024-01-01 00:00+00,2024-01-02 00:00+00)}",),
    "datemultirange": ("{[2024-01-01,2024-01-03),[2025-01-01,)}",),
    "int8multirange": ("{[1,3),[5,7)}",),
}
# Their input takes nothing; what the server puts into its own tables comes from there.
OUTPUT_ONLY = {
    "pg_node_tree": "SELECT ev_action FROM pg_rewrite LIMIT 1",
    "pg_ndistinct": "SELECT stxdndistinct FROM pg_statistic_ext_data",
    "pg_dependencies": "SELECT stxddependencies FROM pg_statistic_ext_data",
    "pg_mcv_list": "SELECT stxdmcv FROM pg_statistic_ext_data",
    "pg_brin_bloom_summary": None,
    "pg_brin_minmax_multi_summary": None,
    "gtsvector": None,
}
WITH_MODIFIERS = (
    ("char(5)", ("", "ab", "ab  c")),
    ("varchar(5)", ("", "ab", "abcde")),
    ("bit(5)", ("01010",)),
    ("varbit(5)", ("", "010")),
    ("numeric(5,2)", ("1", "-123.45", "NaN")),
    ("numeric(3,0)", ("1",)),
    ("numeric(2,-3)", ("12345",)),
    ("numeric(2,5)", ("0.00012",)),
    ("time(0)", ("12:34:56",)),
    ("time(3)", ("12:34:56.789",)),
    ("timetz(2)", ("12:34:56.78+01",)),
    ("timestamp(1)", ("2024-01-01 00:00:00.5",)),
    ("timestamptz(0)", ("2024-01-01 00:00:00+00",)),
    ("interval(2)", ("1 day 00:00:01.23",)),
    ("interval day to second(3)", ("1 day 00:00:01.234",)),
    ("interval year to month", ("1 year 2 mons",)),
)


def literal(text: str | None) -> str:
    return "NULL" if text is None else sql.Literal(text).as_string(None)


def sends(session: Session, types: Sequence[str]) -> list[str]:
    """A format for each type that shows a value's bytes: its send function, text for what has none."""
    shown = []
    for name in types:
        send, has_send = session.rows(
            "SELECT t.typsend::text, t.typsend <> 0 AND coalesce(e.typsend <> 0, true)"
            " FROM pg_type t LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typcategory = 'A'"
            " WHERE t.oid = %s::regtype",
            (name,),
        )[0]
        value = "{}::text" if send == "textsend" else "{}"
        shown.append(f"pg_catalog.{send}({value})" if has_send else "pg_catalog.format('%s', {})")
    return shown


def fetch(session: Session, query: str, types: Sequence[str], *, through_worker: bool) -> list[Any]:
    """The rows of a query, a column's values as bytes."""
    names = [f"c{place}" for place in range(len(types))]
    columns = ", ".join(
        f"CASE WHEN r.{name} IS DISTINCT FROM NULL THEN {send.format('r.' + name)} END"
        for name, send in zip(names, sends(session, types))
    )
    if not through_worker:
        return session.rows(f"SELECT {columns} FROM ({query}) AS r({', '.join(names)})")
    given = ", ".join(f"{name} {kind}" for name, kind in zip(names, types))
    return session.rows(
        f"SELECT {columns} FROM pg_background_launch_v2({literal(query)}) AS h,"
        f" LATERAL pg_background_result_v2(h.pid, h.cookie) AS r({given})"
    )


def assert_exact(session: Session, query: str, types: Sequence[str], rows: int | None = None) -> None:
    """What the worker gives is what the query gives, NULLs told from empty values."""
    direct = fetch(session, query, types, through_worker=False)
    assert fetch(session, query, types, through_worker=True) == direct
    assert rows is None or len(direct) == rows


def values_of(kind: str, texts: Sequence[str | None]) -> str:
    return "VALUES " + ", ".join(f"({literal(text)}::{kind})" for text in texts)


# --- every type -----------------------------------------------------------------------------------


def test_no_type_that_a_table_can_hold_is_left_out_here(conn: Session) -> None:
    known = {
        row[0]
        for row in conn.rows(
            "SELECT oid FROM pg_type WHERE oid = ANY(%s::regtype[]::oid[])", ([*VALUES, *OUTPUT_ONLY],)
        )
    }
    stored = conn.rows(
        "SELECT oid, typname FROM pg_type WHERE oid < 16384 AND typtype IN ('b', 'r', 'm', 'e')"
        " AND NOT (typcategory = 'A' AND typsubscript = 'array_subscript_handler'::regproc"
        "          AND typname ~ '^_')"
    )
    assert [name for oid, name in stored if oid not in known] == []


@pytest.mark.parametrize("kind", VALUES)
def test_a_base_type_comes_back_alone_in_arrays_and_in_composites(conn: Session, kind: str) -> None:
    texts = VALUES[kind]
    assert_exact(conn, values_of(kind, [*texts, None]), [kind], len(texts) + 1)
    assert_exact(conn, values_of(kind, [None]), [kind], 1)
    assert_exact(conn, f"{values_of(kind, texts)} LIMIT 0", [kind], 0)
    assert_exact(conn, arrays_of(kind, [*texts, None]), [f"{kind}[]"], 5)
    conn.execute("DROP TYPE IF EXISTS holder CASCADE; DROP TYPE IF EXISTS holders CASCADE")
    conn.execute(f"CREATE TYPE holder AS (a {kind}, b {kind}[], c int)")
    conn.execute("CREATE TYPE holders AS (one holder, many holder[])")
    query, types = composites_of(kind, texts), ["holder", "holder[]", "holders"]
    if kind == "aclitem":  # it has no send function, so that a row's fails
        query, types = f"SELECT t::text FROM ({query}) t", ["text"]
    assert_exact(conn, query, types, 2)


def arrays_of(kind: str, elements: Sequence[str | None]) -> str:
    """Arrays of one and two dimensions, with odd bounds, empty, and none."""
    flat = "ARRAY[" + ", ".join(map(literal, elements)) + f"]::{kind}[]"
    nested = f"ARRAY[{flat}, {flat}]"
    bounds = f"array_fill({literal(elements[0])}::{kind}, ARRAY[2, 1], ARRAY[-3, 7])::{kind}[]"
    return " UNION ALL ".join(
        f"SELECT {array}" for array in (flat, nested, bounds, f"'{{}}'::{kind}[]", f"NULL::{kind}[]")
    )


def composites_of(kind: str, texts: Sequence[str]) -> str:
    """Rows of a composite type, of its arrays, and of a composite type of these."""
    row = f"ROW({literal(texts[-1])}, ARRAY[{literal(texts[0])}, NULL]::{kind}[], NULL)::holder"
    query = f"SELECT {row}, ARRAY[{row}, NULL], ROW({row}, ARRAY[{row}, NULL])::holders"
    return f"{query} UNION ALL SELECT NULL, NULL, ROW(NULL, NULL)::holders"


@pytest.mark.parametrize(("kind", "texts"), WITH_MODIFIERS)
def test_a_type_modifier_comes_back(conn: Session, kind: str, texts: tuple[str, ...]) -> None:
    """With the modifier in the caller's list: without it there the server would refuse it (42804)."""
    assert_exact(conn, values_of(kind, [*texts, None]), [kind], len(texts) + 1)
    flat = "ARRAY[" + ", ".join(map(literal, [*texts, None])) + f"]::{kind}[]"
    assert_exact(conn, f"SELECT {flat} UNION ALL SELECT '{{}}'::{kind}[]", [f"{kind}[]"], 2)


@pytest.mark.parametrize("kind", OUTPUT_ONLY)
def test_of_a_type_without_input_only_nulls_come_back(conn: Session, kind: str) -> None:
    assert_exact(conn, f"SELECT NULL::{kind} UNION ALL SELECT NULL", [kind], 2)


@pytest.mark.parametrize("kind", [kind for kind, query in OUTPUT_ONLY.items() if query])
def test_a_value_of_a_type_without_input_is_refused(conn: Session, kind: str) -> None:
    conn.execute("DROP TABLE IF EXISTS correlated")
    conn.execute("CREATE TABLE correlated AS SELECT g % 5 AS a, g % 5 AS b FROM generate_series(1, 500) g")
    conn.execute("CREATE STATISTICS of_correlated ON a, b FROM correlated")
    conn.execute("ANALYZE correlated")
    query = f"SELECT ({OUTPUT_ONLY[kind]})"
    assert conn.value(query)
    with sqlstate("0A000", kind):
        fetch(conn, query, [kind], through_worker=True)


def test_every_byte_of_the_internal_char_type_comes_back(conn: Session) -> None:
    query = """SELECT (g - 128)::"char" FROM generate_series(0, 255) g"""
    assert_exact(conn, query, ['"char"'], 256)


# --- types of users -------------------------------------------------------------------------------

_USER_TYPES = r"""
    CREATE SCHEMA "odd ""s"", {schema} \ é";
    SET search_path = "odd ""s"", {schema} \ é", public;
    CREATE TYPE "e,n""u{schema}m\" AS ENUM ('', 'NULL', 'a"b', 'c,d', '{}', '\', ' é ');
    CREATE DOMAIN word AS varchar(7) CHECK (value <> 'never');
    CREATE TYPE "Pair" AS (left_ int, "right one" text);
    CREATE TYPE outer_ AS (p "Pair", ps "Pair"[], e "e,n""u{schema}m\", w word, b box[]);
    CREATE TYPE words AS RANGE (subtype = text);
    CREATE TABLE holder (a int, gone text, b outer_);
    ALTER TABLE holder DROP COLUMN gone;
    CREATE TABLE everything (e "e,n""u{schema}m\", es "e,n""u{schema}m\"[], w word, ws word[], p "Pair", ps "Pair"[],
        o outer_, r words, rs words[], m nummultirange, h holder);
    INSERT INTO everything SELECT e, ARRAY[[e, NULL], [e, e]], 'wörd', '{a,NULL,"b,c"}',
        ROW(-1, e'\\ "x", \n')::"Pair", ARRAY[ROW(1, NULL)::"Pair", NULL, ROW(NULL, '')::"Pair"],
        ROW(ROW(1, 'NULL'), ARRAY[ROW(2, '{')::"Pair"], e, 'w', ARRAY[box '(1,1),(0,0)', NULL])::outer_,
        words('"c", \', 'd e'), ARRAY[words(NULL, 'x'), 'empty'], '{[1.10,2.0)}', ROW(1, NULL::outer_)::holder
        FROM unnest(enum_range(NULL::"e,n""u{schema}m\")) e;
    INSERT INTO everything DEFAULT VALUES;
"""
_USER_COLUMNS = (
    '"e,n""u{schema}m\\"', '"e,n""u{schema}m\\"[]', "varchar", "word[]", '"Pair"', '"Pair"[]', "outer_", "words",
    "words[]", "nummultirange", "holder",
)  # fmt: skip


@pytest.mark.parametrize("extension_schema", ["public", 'ext "{schema}" é'])
def test_types_of_users_come_back(fresh_database: str, conn: Session, extension_schema: str) -> None:
    home = sql.Identifier(extension_schema)
    if extension_schema != "public":
        conn.execute(sql.SQL("CREATE SCHEMA {}").format(home))
        conn.execute(sql.SQL("ALTER EXTENSION pg_background SET SCHEMA {}").format(home))
    conn.execute(_USER_TYPES)
    conn.execute(sql.SQL("SET search_path = {}, {}").format(sql.Identifier('odd "s", {schema} \\ é'), home))
    query = "SELECT e, es, w, ws, p, ps, o, r, rs, m, h FROM everything"
    types = list(_USER_COLUMNS)
    types[2] = "varchar(7)"
    assert_exact(conn, query, types, 8)
    for place, kind in enumerate(types):  # alone each takes another way than together
        assert_exact(conn, f"SELECT c{place} FROM ({query}) AS q({', '.join(f'c{i}' for i in range(11))})", [kind])


def test_an_array_type_that_was_renamed_is_found(fresh_database: str, conn: Session) -> None:
    conn.execute("CREATE TYPE mood AS ENUM ('ok', 'sad')")
    conn.execute("CREATE TYPE _mood AS (a int)")  # the array type makes room
    assert_exact(conn, "SELECT 'ok'::mood, ARRAY['sad']::mood[], ROW(1)::_mood", ["mood", "mood[]", "_mood"], 1)


def test_types_that_the_job_creates_come_back(fresh_database: str, conn: Session) -> None:
    handle = conn.rows(
        "SELECT * FROM pg_background_launch_v2("
        "'CREATE TYPE born AS ENUM (''a'', ''b\"''); CREATE TYPE twin AS (b born, t text);"
        " SELECT ''b\"''::born, ARRAY[''a'']::born[], ROW(''a'', ''\\'')::twin FROM generate_series(1, 3)')"
    )[0]
    conn.execute("SELECT pg_background_wait_v2(%s, %s)", handle)
    rows = conn.rows(
        "SELECT a::text, b::text, c::text FROM pg_background_result_v2(%s, %s) AS (a born, b born[], c twin)", handle
    )
    assert rows == [('b"', "{a}", '(a,"\\\\")')] * 3


def test_a_domain_comes_as_its_base_type(fresh_database: str, conn: Session) -> None:
    conn.execute("CREATE DOMAIN inner_ AS numeric(5,2); CREATE DOMAIN outer_ AS inner_ CHECK (value > 0)")
    assert_exact(conn, "SELECT 1.5::outer_::numeric(5,2)", ["numeric(5,2)"], 1)
    with sqlstate("42804"):
        fetch(conn, "SELECT 1.5::outer_", ["outer_"], through_worker=True)


_PLANTED_CASTS = """
    CREATE TYPE prey AS (a int);
    CREATE TYPE hunted AS ENUM ('x');
    CREATE TABLE calls (what text);
    CREATE FUNCTION trap(text) RETURNS prey LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'cast to prey as %', current_user; END$$;
    CREATE FUNCTION traps(text) RETURNS prey[] LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'cast to prey[] as %', current_user; END$$;
    CREATE FUNCTION trap_e(text) RETURNS hunted LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'cast to hunted as %', current_user; END$$;
    CREATE FUNCTION trap_json(json) RETURNS hunted LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'cast from json as %', current_user; END$$;
    CREATE FUNCTION traps_e(text) RETURNS hunted[] LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'cast to hunted[] as %', current_user; END$$;
    CREATE FUNCTION trap_self(prey, int, bool) RETURNS prey LANGUAGE plpgsql AS
        $$BEGIN RAISE EXCEPTION 'length coercion as %', current_user; END$$;
    CREATE CAST (text AS prey) WITH FUNCTION trap(text) AS IMPLICIT;
    CREATE CAST (text AS prey[]) WITH FUNCTION traps(text) AS IMPLICIT;
    CREATE CAST (text AS hunted) WITH FUNCTION trap_e(text) AS IMPLICIT;
    CREATE CAST (json AS hunted) WITH FUNCTION trap_json(json) AS IMPLICIT;
    CREATE CAST (text AS hunted[]) WITH FUNCTION traps_e(text) AS IMPLICIT;
    CREATE CAST (prey AS prey) WITH FUNCTION trap_self(prey, int, bool) AS IMPLICIT;
"""


def test_casts_that_a_types_owner_planted_are_not_called(fresh_database: str, alice: Session, conn: Session) -> None:
    alice.execute(_PLANTED_CASTS)
    schema = sql.Identifier(alice.info.user).as_string(None)
    conn.execute(f"SET search_path = {schema}, public")
    query = "SELECT ROW(1)::prey, ARRAY[ROW(2)]::prey[], 'x'::hunted, ARRAY['x', NULL]::hunted[]"
    types = ["prey", "prey[]", "hunted", "hunted[]"]
    expected = [("(1)", "{(2)}", "x", "{x,NULL}")]
    for wanted in (range(4), *((place,) for place in range(4))):
        columns = ", ".join(f"c{place}" for place in wanted)
        given = ", ".join(f"c{place} {types[place]}" for place in wanted)
        texts = ", ".join(f"format('%%s', c{place})" for place in wanted)
        rows = conn.rows(
            f"SELECT {texts} FROM pg_background_launch_v2(%s) h,"
            f" LATERAL pg_background_result_v2(h.pid, h.cookie) AS r({given})",
            (f"SELECT {columns} FROM ({query}) q(c0, c1, c2, c3)",),
        )
        assert rows == [tuple(expected[0][place] for place in wanted)]


# --- what is no type of a table -------------------------------------------------------------------


def test_void_is_readable_as_text(conn: Session) -> None:
    rows = conn.rows(
        "SELECT r.* FROM pg_background_launch_v2('SELECT pg_sleep(0)') h,"
        " LATERAL pg_background_result_v2(h.pid, h.cookie) AS r(x text)"
    )
    assert rows == [("",)]


@pytest.mark.parametrize(
    ("query", "null"),
    [
        ("SELECT ROW(1, 'a')", "SELECT NULL::record"),
        ("SELECT ARRAY[ROW(1)]", "SELECT NULL::record[]"),
        ("SELECT 'x'::cstring", "SELECT NULL::cstring"),
        ("SELECT stavalues1 FROM pg_statistic WHERE stavalues1 IS NOT NULL LIMIT 1", "SELECT NULL::anyarray"),
    ],
)
def test_a_pseudo_types_value_is_refused_and_its_null_passes(conn: Session, query: str, null: str) -> None:
    conn.execute("ANALYZE pg_class")
    with sqlstate("0A000", "pseudo-type(.|\n)*Cast"):
        fetch(conn, query, ["text"], through_worker=True)
    assert fetch(conn, null, ["text"], through_worker=True) == [(None,)]


# --- sizes ----------------------------------------------------------------------------------------


def test_1600_columns_come_back(conn: Session) -> None:
    kinds = ("int", "text", "int[]", "numeric(9,2)", '"char"', "timestamptz", "box", "bool")
    texts = ("7", 'a"b', "{1,NULL}", "1.50", "x", "2024-01-01 00:00+00", "(1,1),(0,0)", "t")
    places = [place % len(kinds) for place in range(1600)]
    row = ", ".join(f"{literal(texts[place])}::{kinds[place]}" for place in places)
    assert_exact(conn, f"SELECT {row} FROM generate_series(1, 3)", [kinds[place] for place in places], 3)


def test_a_result_without_rows_has_its_types(conn: Session) -> None:
    types = list(VALUES)
    query = "SELECT " + ", ".join(f"NULL::{kind}" for kind in types) + " WHERE false"
    assert_exact(conn, query, types, 0)


def test_a_text_of_100_mb_comes_back(conn: Session) -> None:
    query = "SELECT repeat('0123456789\"\\,{}é' || chr(10), 6250000)"
    handle = conn.rows("SELECT * FROM pg_background_launch_v2(%s)", (query,))[0]
    row = conn.rows("SELECT octet_length(t), md5(t) FROM pg_background_result_v2(%s, %s) AS (t text)", handle)[0]
    assert row == conn.rows(f"SELECT octet_length(t), md5(t) FROM ({query}) AS d(t)")[0]
    assert row[0] > 100_000_000


def test_wide_rows_come_in_batches_that_memory_can_hold(conn: Session) -> None:
    query = "SELECT g, repeat(g::text || 'x', 300000) FROM generate_series(100, 299) g"
    handle = conn.rows("SELECT * FROM pg_background_launch_v2(%s)", (query,))[0]
    given = "pg_background_result_v2(%s, %s) AS (g int, t text)"
    rows = conn.rows(f"SELECT g, md5(t) FROM {given}", handle)
    assert rows == conn.rows(f"SELECT g, md5(t) FROM ({query}) AS d(g, t)")


# --- the caller's column list ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "given"),
    [
        ("SELECT 1", "a int8"),
        ("SELECT 1", "a int, b int"),
        ("SELECT 1, 2", "a int"),
        ("SELECT 'x'", "a varchar"),
        ("SELECT ARRAY[1]", "a int8[]"),
        ("SELECT 1::numeric(5,2)", "a numeric(6,2)"),
        ("SELECT 'x'::char(3)", "a char(4)"),
    ],
)
def test_a_column_list_that_does_not_fit_takes_nothing(conn: Session, query: str, given: str) -> None:
    handle = conn.rows("SELECT * FROM pg_background_launch_v2(%s)", (query,))[0]
    for _ in range(2):
        with sqlstate("42804"):
            conn.execute(f"SELECT * FROM pg_background_result_v2(%s, %s) AS ({given})", handle)
    conn.execute("SELECT pg_background_detach_v2(%s, %s)", handle)


def test_a_result_without_columns_is_refused(conn: Session) -> None:
    with sqlstate("42804"):
        conn.execute(
            "SELECT r.* FROM pg_background_launch_v2('SELECT') h,"
            " LATERAL pg_background_result_v2(h.pid, h.cookie) AS r(a int)"
        )


ConnectFixture = Callable[..., Session]


@pytest.mark.parametrize("name", ["array_nulls", "xmloption", "quote_all_identifiers", "standard_conforming_strings"])
def test_the_readers_other_settings_do_not_matter(connect: ConnectFixture, name: str) -> None:
    settings = {"array_nulls": "off", "xmloption": "document", "quote_all_identifiers": "on"}
    session = connect(**{name: settings.get(name, "off")})
    query = (
        "SELECT NULL::text, ARRAY[1, NULL], NULL::int, XMLPARSE(CONTENT 'a<b/>'), 1.5::numeric(5,2),"
        " ARRAY['1 s']::interval second(3)[]"
    )
    kinds = ["text", "int[]", "int", "xml", "numeric(5,2)", "interval second(3)[]"]
    assert_exact(session, query, kinds, 1)
    assert session.value(f"SHOW {name}") == settings.get(name, "off")
