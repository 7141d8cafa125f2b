"""What keeps the extension within PostgreSQL 14 and Python 3.9, where no such server or interpreter is at hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.matrix import FACTORS, covering, pairs

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "plpy" / "pg_background").glob("*.py"))
TEMPLATES = sorted((ROOT / "sql_templates").glob("**/*.j2"))

# By the release that brought them.
LATER_THAN_14 = {
    15: (r"MERGE INTO", r"NULLS NOT DISTINCT", r"security_invoker", r"regexp_(like|count|substr|instr)"),
    16: (
        *(
            r"WITH (INHERIT|SET) (TRUE|FALSE|OPTION)",
            r"any_value",
            r"pg_stat_io",
            r"array_(sample|shuffle)",
            r"IS JSON",
        ),
        *(r"JSON_(ARRAY|OBJECT)(AGG)?\s*\(", r"SYSTEM_USER", r"pg_input_(is_valid|error_info)", r"\d+_\d+"),
        *(r"debug_parallel_query", r"STORAGE (PLAIN|EXTERNAL|EXTENDED|MAIN)"),
    ),
    17: (
        *(r"JSON_(TABLE|EXISTS|QUERY|VALUE|SCALAR|SERIALIZE)", r"transaction_timeout", r"merge_action", r"pg_maintain"),
        *(r"pg_wait_events", r"event_triggers", r"to_bin", r"pg_basetype"),
    ),
    18: (
        r"uuidv[47]",
        r"WITHOUT OVERLAPS",
        r"NOT ENFORCED",
        r"casefold",
        r"pg_aios",
        r"array_(sort|reverse)",
        r"pg_get_acl",
    ),
}
GUARDED = {
    ("session.py", "SYSTEM_USER"),
    *((module, "transaction_timeout") for module in ("starter.py", "inheritance.py", "on_commit.py")),
}
"""Used by the module only where the server is new enough."""


def _later(text: str) -> set[str]:
    """Words of the text that PostgreSQL 14 does not know."""
    words = [rf"\b{word}" for words in LATER_THAN_14.values() for word in words]
    return {found.group() for found in re.finditer("|".join(words), text, re.IGNORECASE)}


def _strings(module: Path) -> str:
    """A module's string constants, where its SQL is, without its docstrings."""
    tree = ast.parse(module.read_text("utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [value.decode("latin-1") if isinstance(value, bytes) else value for value in constants]
    return "\n".join(text for text in texts if isinstance(text, str) and text not in docstrings)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_modules_are_python_3_9(module: Path) -> None:
    tree = ast.parse(module.read_text("utf-8"), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"tomllib"}


def test_the_parser_refuses_what_3_9_does_not_know() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 9))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_sql_of_modules_is_that_of_14(module: Path) -> None:
    assert {word for word in _later(_strings(module)) if (module.name, word) not in GUARDED} == set()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_templates_are_sql_of_14(template: Path) -> None:
    source = re.sub(r"\{#.*?#\}", "", template.read_text("utf-8"), flags=re.DOTALL)
    assert _later(source) == set()


@pytest.mark.parametrize(
    "text",
    [
        "MERGE INTO t USING s ON true WHEN MATCHED THEN DELETE",
        "GRANT a TO b WITH INHERIT FALSE",
        "SELECT * FROM JSON_TABLE(j, '$' COLUMNS (a int))",
        "SELECT * FROM pg_stat_io",
        "CREATE UNIQUE INDEX ON t (a) NULLS NOT DISTINCT",
        "SELECT 1_000",
        "SELECT uuidv7()",
    ],
)
def test_later_sql_is_seen(text: str) -> None:
    assert _later(text)


def test_the_matrix_holds_every_pair_of_values() -> None:
    combinations = covering(FACTORS)
    held = {pair for values in combinations for pair in pairs(values)}
    names = list(FACTORS)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            for value in FACTORS[first]:
                for other in FACTORS[second]:
                    assert ((first, value), (second, other)) in held
    assert len(combinations) <= 16
