"""docs/reference.md says of functions, types, views and errors what the server has."""

from __future__ import annotations

import re

from pg_background import errors

from sql_templates.api import API, ARGUMENTS, ERRORS, VIEWS
from tests.clusters import Session
from tools.common import ROOT

REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")
_NOT_FOR_USERS = {errors.INTERNAL_ERROR}


def entry(name: str) -> str:
    """The part of the page below a heading."""
    found = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/reference.md has no {name}"
    return found.group(1)


def documented_columns(heading: str) -> list[tuple[str, str]]:
    """Names and types in an entry's table."""
    return re.findall(r"^\| `(\w+)` \| `(\w+)` \|", entry(heading), re.MULTILINE)


def columns(conn: Session, relation: str) -> list[tuple[str, str]]:
    """Names and types that a relation or composite type has in the server."""
    short = {"integer": "int4", "bigint": "int8", "boolean": "bool", "double precision": "float8"}
    short["timestamp with time zone"] = "timestamptz"
    rows = conn.rows(
        "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
        " WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
        (relation,),
    )
    return [(name, short.get(type_name, type_name)) for name, type_name in rows]


def test_each_function_has_one_entry_with_all_its_forms() -> None:
    for function in API:
        assert REFERENCE.count(f"\n### {function.name}\n") == 1
        assert f"{function.declaration} RETURNS {function.returns}\n" in entry(function.name)
        assert function.comment in entry(function.name)


def test_each_argument_is_explained() -> None:
    explained = {name for names in ARGUMENTS for name in re.findall(r"\w+", names)}
    assert {argument.name for function in API for argument in function.arguments} == explained


def test_each_error_of_the_runtime_is_listed_under_the_servers_name_for_it(conn: Session) -> None:
    codes = [value for value in vars(errors).values() if isinstance(value, str) and re.fullmatch("[0-9A-Z]{5}", value)]
    raised = set(codes) - _NOT_FOR_USERS
    assert "08006" in raised
    assert raised <= {error.sqlstate for error in ERRORS}
    for error in ERRORS:
        conn.execute(
            f"DO $do$ BEGIN RAISE SQLSTATE '{error.sqlstate}'; EXCEPTION WHEN {error.condition} THEN NULL; END $do$"
        )


def test_views_and_types_have_the_documented_columns(conn: Session) -> None:
    for view in VIEWS:
        assert columns(conn, view.name) == [(column.name, column.type) for column in view.columns]
        assert documented_columns(f"View {view.name}") == columns(conn, view.name)
    types = [
        name for (name,) in conn.rows("SELECT relname FROM pg_class WHERE relkind = 'c' AND relname ~ '^pg_background'")
    ]
    assert types
    for name in types:
        assert documented_columns(f"Type {name}") == columns(conn, name)
