"""The install script and the runtime, read for what an attacker could use; each check is also shown to find something.

docs/security.md tells what each of these rules is for.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import sql_safety
from tools.common import ROOT, control_version

DEFINERS = {
    "_pg_background_mark(oid)": "leaves a row in a table that the caller must not write otherwise",
    "_pg_background_has_committed(uuid)": "looks for that row, and waits for the end of who wrote it",
}
"""The only functions that run with more rights than their caller's, each with its reason."""

MODULES = sorted((ROOT / "plpy" / "pg_background").glob("*.py"))


@pytest.fixture(scope="module")
def script() -> str:
    return (ROOT / f"pg_background--{control_version()}.sql").read_text("utf-8")


# --- the extension --------------------------------------------------------------------------------


def test_every_function_is_read(script: str) -> None:
    created = len(re.findall(r"^CREATE FUNCTION", script, re.MULTILINE))
    assert len(sql_safety.functions(script)) == created > 90


def test_definer_functions_are_listed_with_their_reasons(script: str) -> None:
    assert sql_safety.unlisted_definers(script, DEFINERS) == []


def test_definer_functions_have_a_fixed_search_path(script: str) -> None:
    assert sql_safety.unpinned_definers(script) == []


def test_definer_functions_are_bound_when_they_are_created(script: str) -> None:
    assert [function.signature for function in sql_safety.functions(script) if function.definer and function.body] == []


def test_nothing_is_open_to_public(script: str) -> None:
    assert sql_safety.open_to_public(script) == []


def test_bodies_name_everything_with_its_schema(script: str) -> None:
    assert sql_safety.unqualified_names(script) == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_python_names_everything_with_its_schema(module: Path) -> None:
    assert sql_safety.unqualified_names_of_python(module.read_text("utf-8")) == []


def test_the_document_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8")))
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 50
    assert named - set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE)) == set()


# --- the checks find what they look for -------------------------------------------------------------

PLPGSQL = "CREATE FUNCTION f(a pg_catalog.int4) RETURNS SETOF pg_catalog.record LANGUAGE plpgsql AS $${}$$"


def _plpgsql(body: str, declared: str = "") -> str:
    return PLPGSQL.format(f"\n{declared}BEGIN\n    {body}\nEND;\n")


BAD_STATEMENTS = [
    ("PERFORM length('x');", "function length"),
    ("PERFORM a = 1;", "operator ="),
    ("PERFORM a IN (1, 2);", "operator ="),
    ("PERFORM a BETWEEN 1 AND 2;", "operator BETWEEN"),
    ("PERFORM NULLIF(a, 1);", "operator ="),
    ("PERFORM 'x' LIKE 'y';", "operator ~~"),
    ("PERFORM a IN (SELECT 1);", "operator ="),
    ("PERFORM a IS DISTINCT FROM 1;", "operator ="),
    ("PERFORM CASE a WHEN 1 THEN 2 END;", "CASE"),
    ("PERFORM 'x'::mytype;", "type mytype"),
    ("PERFORM 'x'::pg_catalog.text COLLATE mine;", "collation mine"),
    ("PERFORM * FROM pg_roles;", "relation pg_roles"),
    ("PERFORM * FROM pg_catalog.pg_roles r JOIN pg_catalog.pg_class c USING (oid);", "JOIN USING"),
    ("DELETE FROM mine;", "relation mine"),
    ("a := length('x');", "function length"),
    ("IF a > 1 THEN NULL; END IF;", "operator >"),
    ("RETURN QUERY SELECT lower('x');", "function lower"),
    ("RETURN QUERY EXECUTE 'SELECT lower(''X'')';", "function lower"),
    ("EXECUTE pg_catalog.concat('SELECT ', a, '::mytype');", "type mytype"),
    ("EXECUTE pg_catalog.concat('SELECT ', a, ' || 1');", "operator ||"),
    ("FOR a IN EXECUTE 'SELECT left(1)' LOOP NULL; END LOOP;", "function left"),
]


@pytest.mark.parametrize(("statement", "found"), BAD_STATEMENTS)
def test_a_name_without_schema_is_found(statement: str, found: str) -> None:
    assert found in "\n".join(sql_safety.unqualified_names(_plpgsql(statement)))


def test_an_unqualified_type_of_a_variable_is_found() -> None:
    script = _plpgsql("NULL;", "DECLARE\n    b int4;\n    c CONSTANT text := 'x';\n    d pg_catalog.text;\n")
    assert sql_safety.unqualified_names(script) == [
        "f(int4): type int4 of a variable",
        "f(int4): type text of a variable",
    ]


def test_an_unqualified_name_in_sql_and_python_bodies_is_found() -> None:
    script = (
        "CREATE FUNCTION s() RETURNS int4 LANGUAGE sql AS 'SELECT length(''x'')';"
        "CREATE FUNCTION p() RETURNS int4 LANGUAGE plpython3u AS $$\nplpy.execute('SELECT now()')\nreturn 1\n$$"
    )
    assert [complaint.split(":")[0] for complaint in sql_safety.unqualified_names(script)] == ["s()", "p()"]
    assert sql_safety.unqualified_names("CREATE FUNCTION b() RETURNS int4 BEGIN ATOMIC SELECT now(); END") == []


def test_an_unqualified_name_in_a_block_is_found() -> None:
    script = "DO LANGUAGE plpgsql $do$\nBEGIN\n    PERFORM FROM pg_catalog.pg_class c WHERE c.oid = 5;\nEND;\n$do$"
    assert sql_safety.unqualified_names(script) == ["DO block 1: operator = has no schema"]


@pytest.mark.parametrize(
    "source",
    [
        'query("SELECT now()")',
        'query(f"SELECT * FROM {name} w WHERE w.a = 1")',
        'query("SELECT pg_catalog.now()" + f" FROM {name} JOIN mine ON true")',
        'fragment = f"pg_catalog.unnest({text}::mine)"',
        'fragment = f"{{schema}}.f() AND pg_catalog.now() < {text}"',
        'run(b"SELECT " + b"pg_catalog.now(), lower(1)")',
        'run("SELECT %s FROM pg_class" % what)',
        'fragment = b"CASE pg_catalog.num_nulls(%s) WHEN 0 THEN 1 END" % names',
    ],
)
def test_an_unqualified_name_in_a_module_is_found(source: str) -> None:
    assert sql_safety.unqualified_names_of_python(source) != []


def test_a_new_definer_function_is_found_and_an_old_reason() -> None:
    script = "CREATE FUNCTION f(a int4, OUT b int4) LANGUAGE sql SECURITY DEFINER BEGIN ATOMIC SELECT 1; END"
    assert sql_safety.unlisted_definers(script, {"g()": "once"}) == [
        "f(int4): SECURITY DEFINER, for no listed reason",
        "g(): listed, but no definer function",
    ]


@pytest.mark.parametrize("clause", ["", "SET search_path = pg_catalog", "SET search_path = public, pg_temp"])
def test_a_definer_function_that_can_be_bent_is_found(clause: str) -> None:
    body = "LANGUAGE sql SECURITY DEFINER {} BEGIN ATOMIC SELECT 1; END"
    assert len(sql_safety.unpinned_definers("CREATE FUNCTION f() RETURNS int4 " + body.format(clause))) == 1
    pinned = body.format("SET search_path = pg_catalog, pg_temp")
    assert sql_safety.unpinned_definers("CREATE FUNCTION f() RETURNS int4 " + pinned) == []


def test_what_is_open_to_public_is_found() -> None:
    create = "CREATE FUNCTION f(a text[]) RETURNS int4 LANGUAGE sql BEGIN ATOMIC SELECT 1; END;"
    assert sql_safety.open_to_public(create) == ["f(text[]): open to PUBLIC"]
    assert sql_safety.open_to_public(create + "REVOKE ALL ON FUNCTION f(text[]) FROM PUBLIC;") == []
    assert sql_safety.open_to_public(create + "REVOKE ALL ON FUNCTION f(text) FROM PUBLIC;") != []
    assert sql_safety.open_to_public("CREATE TYPE t AS (a int4);") == ["t: open to PUBLIC"]
    for grant in ("GRANT SELECT ON t TO PUBLIC", "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC"):
        assert sql_safety.open_to_public(grant) != []
