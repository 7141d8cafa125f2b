"""docs/reference.md: every function, type, view and setting, from the lists that the SQL and the runtime come from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sql_templates.api import ARGUMENTS, ERRORS, VIEWS, View
from tools.common import ROOT

if TYPE_CHECKING:
    from sql_templates.api import Function

_HEAD = """\
# Reference

Every function, type, view, setting and error of pg_background for PL/Python. `build.py render` writes this page
from the lists that the SQL comes from. [README.md](../README.md) is the way in, [cookbook.md](cookbook.md) puts the
functions to work, [troubleshooting.md](troubleshooting.md) explains every error.

A **worker** is a session of the server's own that runs SQL for the session that launched it, the **launcher**. A
**handle**, pid and cookie, names a worker. The functions are in the extension's schema. Members of `pgbackground_role`
may call them, unless the page says otherwise.
"""


def render_reference(functions: Sequence[Function], templates: Path) -> str:
    """The whole page."""
    parts = [_HEAD, _contents(functions)]
    for group, entries in _grouped(functions).items():
        parts += [f"## {group}\n", *(_entry(name, overloads) for name, overloads in entries.items())]
    parts += ["## Arguments\n", _table(("argument", "meaning"), ARGUMENTS.items())]
    parts += ["## Types\n", *(_type(path) for path in sorted(templates.glob("types/*.sql.j2")))]
    parts += ["## Views\n", *(_view(view) for view in VIEWS)]
    parts += ["## Settings\n", _settings()]
    parts += ["## Errors\n", _errors()]
    return "\n".join(parts)


def _grouped(functions: Sequence[Function]) -> Mapping[str, Mapping[str, list[Function]]]:
    """Group, then name, to the functions of that name; in the order of api.py."""
    grouped: dict[str, dict[str, list[Function]]] = {}
    for function in functions:
        grouped.setdefault(function.group, {}).setdefault(function.name, []).append(function)
    return grouped


def _contents(functions: Sequence[Function]) -> str:
    lines = [
        f"- **{group}**: " + ", ".join(f"[{name}](#{name})" for name in entries)
        for group, entries in _grouped(functions).items()
    ]
    others = ("Arguments", "Types", "Views", "Settings", "Errors")
    lines.append("- " + ", ".join(f"[{name}](#{name.lower()})" for name in others))
    return "\n".join(lines) + "\n"


def _entry(name: str, overloads: Sequence[Function]) -> str:
    lines = [f"### {name}", "", "```text"]
    lines += [f"{function.declaration} RETURNS {function.returns}" for function in overloads]
    lines += ["```", ""]
    lines += [paragraph + "\n" for paragraph in dict.fromkeys(function.comment for function in overloads)]
    lines += [f"- {fact}" for fact in _facts(overloads)]
    return "\n".join(lines) + "\n"


def _facts(overloads: Sequence[Function]) -> Iterator[str]:
    """What the comment does not say: NULLs, and who may call it."""
    strict = [function for function in overloads if function.strict and function.arguments]
    if strict:
        result = "no rows" if strict[0].returns.startswith("SETOF") else "NULL"
        which = "" if len(strict) == len(overloads) else f", with {len(strict[0].arguments)} arguments"
        yield f"Strict{which}: where one of them is NULL, nothing is done and the result is {result}."
    if not overloads[0].role:
        yield "For superusers; `pgbackground_role` may not call it."


def _type(path: Path) -> str:
    """A composite type, from its template."""
    source = path.read_text("utf-8")
    name = path.name.partition(".")[0]
    columns = re.findall(r"^    (\w+) ([\w\[\]]+),?$", source, re.MULTILINE)
    comment = _comment(source)
    return f"### Type {name}\n\n{comment}\n\n" + _table(("column", "type"), [(f"`{c}`", f"`{t}`") for c, t in columns])


def _comment(source: str) -> str:
    """The text of a template's COMMENT ON."""
    found = re.search(r"^COMMENT ON .* IS\s+'((?:[^']|'')*)';", source, re.MULTILINE)
    if not found:
        raise ValueError("a template without COMMENT ON")
    return found.group(1).replace("''", "'")


def _view(view: View) -> str:
    comment = _comment((ROOT / "sql_templates" / "views" / f"{view.name}.sql.j2").read_text("utf-8"))
    rows = [(f"`{column.name}`", f"`{column.type}`", column.comment) for column in view.columns]
    return f"### View {view.name}\n\n{comment}\n\n" + _table(("column", "type", "meaning"), rows)


def _settings() -> str:
    """The runtime's own list of settings."""
    sys.path.append(str(ROOT / "plpy"))
    from pg_background import settings

    units = {"B": "bytes", "ms": "milliseconds", None: "number"}
    rows = [(f"`{d.name}`", d.default, units[d.unit], f"{d.low} to {d.high}", d.description) for d in settings.ALL]
    table = _table(("setting", "default", "base unit", "range", "meaning"), rows)
    return (
        "For a session, a role, a database or in postgresql.conf; read when they are used. Values may have PostgreSQL's"
        " units (`64kB`, `5min`). `SHOW` knows them from the first call of a session on. A value that is none is an"
        f" error (22023) where it is used.\n\n{table}"
    )


def _errors() -> str:
    rows = [(f"`{error.sqlstate}`", f"`{error.condition}`", error.when) for error in ERRORS]
    return "The worker's own errors come out of `result` as they were. Besides:\n\n" + _table(
        ("SQLSTATE", "condition", "when"), rows
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
