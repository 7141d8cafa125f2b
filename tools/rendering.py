"""build.py render and check: the install script, docs/reference.md and the README's API table."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tools.common import CONTROL, ROOT, BuildError, control_version, write_atomically
from tools.reference import render_reference

if TYPE_CHECKING:
    from sql_templates.api import Function

TEMPLATES = ROOT / "sql_templates"
RUNTIME = ROOT / "plpy" / "pg_background"
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference.md"
TABLE_BEGIN, TABLE_END = "<!-- api:begin -->", "<!-- api:end -->"

_DIFF_LINES = 40
_NAME_LENGTH = 63


class Module(NamedTuple):
    """A module of the runtime, and the SQL function that carries its source."""

    name: str
    source: str

    @property
    def function(self) -> str:
        """Name of the SQL function."""
        return f"_pg_background_module_{self.name}"


def runtime_modules(folder: Path = RUNTIME) -> tuple[Module, ...]:
    """The runtime's modules in the order of their names, each fit to be carried by the install script."""
    modules = tuple(Module(path.stem, path.read_text("utf-8")) for path in sorted(folder.glob("*.py")))
    for module in modules:
        _check_module(module)
    return modules


def _check_module(module: Module) -> None:
    """Refuse what would end the dollar quotes, or what CREATE EXTENSION would replace in the script."""
    if len(module.function) > _NAME_LENGTH:
        raise BuildError(f"runtime module {module.name}: its name is too long")
    for text in ("$module$", "$source$", "@extschema", "@extowner@"):
        if text in module.source:
            raise BuildError(f"runtime module {module.name}: contains {text}")
    if re.search(r"^\\echo", module.source, re.MULTILINE | re.IGNORECASE):
        raise BuildError(f"runtime module {module.name}: a line starts with \\echo")


def runtime_digest(modules: Sequence[Module]) -> str:
    """The first 12 hex digits of the SHA-256 over all names and sources."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(f"{module.name}\0{module.source}\0".encode())
    return digest.hexdigest()[:12]


def literal(text: str) -> str:
    """The text as an SQL string literal that standard_conforming_strings does not bend."""
    quoted = "'" + text.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in text else quoted


class _Created:
    """What the templates' create() has rendered so far."""

    def __init__(self, api: Sequence[Function]) -> None:
        self._api = api
        self.functions: list[Function] = []

    def create(self, name: str, argument_types: str | None = None) -> str:
        """CREATE FUNCTION up to LANGUAGE; argument_types ("text, int4") picks one of several of that name."""
        signature = name if argument_types is None else f"{name}({argument_types})"
        found = [function for function in self._api if signature in (function.name, function.signature)]
        if len(found) != 1:
            raise BuildError(f"create({signature!r}): {len(found)} functions of api.py fit")
        if found[0] in self.functions:
            raise BuildError(f"create({signature!r}): rendered twice")
        self.functions.append(found[0])
        return found[0].create


_OWN_FLAGS = re.compile(
    r"\{\{\s*create\([^}]*\}\}(?:(?!\n(?:AS|BEGIN)\b).)*?"
    r"\b(STRICT|VOLATILE|STABLE|IMMUTABLE|PARALLEL|CALLED ON NULL INPUT)\b",
    re.DOTALL,
)


def _check_template(name: str, source: str) -> None:
    """Refuse flags beside create(), which renders them: the server would call them redundant."""
    found = _OWN_FLAGS.search(source)
    if found:
        raise BuildError(f"sql_templates/{name}: {found.group(1)} is rendered by create(), from api.py")


class _Templates:
    """The folder of the templates, and which of them were used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.used: set[str] = set()

    def load(self, name: str) -> str | None:
        """The source of a template, for Jinja; None when there is no such file."""
        path = self._folder / name
        if not path.is_file():
            return None
        source = path.read_text("utf-8")
        _check_template(name, source)
        self.used.add(name)
        return source.rstrip("\n")

    def unused(self) -> list[str]:
        """The templates that nothing has asked for."""
        present = {path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*.j2")}
        return sorted(present - self.used)


def render_script(
    templates: Path = TEMPLATES, runtime: Path = RUNTIME, control: Path = CONTROL
) -> tuple[str, list[Function]]:
    """The install script, and the API functions that it creates, in the order of api.py."""
    import jinja2

    from sql_templates.api import API, INTERNAL

    created = _Created(API)
    folder = _Templates(templates)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(folder.load),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    modules = runtime_modules(runtime)
    environment.globals.update(
        version=control_version(control),
        modules=modules,
        runtime_digest=runtime_digest(modules),
        api=API,
        internal=INTERNAL,
        api_templates=list(dict.fromkeys(function.name for function in API)),
        create=created.create,
        created=lambda: created.functions,
        literal=literal,
    )
    try:
        script = environment.get_template("pg_background.sql.j2").render().strip() + "\n"
    except jinja2.TemplateNotFound as error:
        raise BuildError(f"the master names {error.name}, but sql_templates/ has no such file") from error
    except jinja2.TemplateError as error:
        raise BuildError(f"template {getattr(error, 'name', None) or ''}: {error}") from error
    if folder.unused():
        raise BuildError(f"no list of the master names these templates: {', '.join(folder.unused())}")
    _check_script(script)
    return script, [function for function in API if function in created.functions]


def _check_script(script: str) -> None:
    """Refuse what not every database can read: the script is taken to be in the database's encoding."""
    for number, line in enumerate(script.splitlines(), 1):
        if not line.isascii():
            raise BuildError(f"rendered line {number} is not ASCII: {line.strip()[:80]}")


def _table_row(function: Function) -> str:
    """Declaration, result and the first sentence of the comment; docs/reference.md has all of it."""
    sentence = re.split(r"(?<=\.) (?=[A-Z])", function.comment)[0].replace("|", "\\|")
    return f"| `{function.declaration}` | `{function.returns}` | {sentence} |"


def render_table(functions: Sequence[Function]) -> str:
    """The README's API table: a heading and a table for each group, in the order of api.py."""
    lines: list[str] = []
    for group in dict.fromkeys(function.group for function in functions):
        lines += [f"**{group}**", "", "| function | returns | what it does |", "|---|---|---|"]
        lines += [_table_row(function) for function in functions if function.group == group]
        lines.append("")
    return "\n".join(lines)


def readme_with_table(readme: str, table: str) -> str:
    """The README with everything between its two markers replaced by the table."""
    before, begin, rest = readme.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not begin or not end:
        raise BuildError(f"README.md: the markers {TABLE_BEGIN} and {TABLE_END} are missing")
    return f"{before}{begin}\n{table}{end}{after}"


def rendered_files() -> dict[Path, str]:
    """What render writes: the install script, the reference, and the README where there is one."""
    script, functions = render_script()
    files = {
        ROOT / f"pg_background--{control_version()}.sql": script,
        REFERENCE: render_reference(functions, TEMPLATES),
    }
    if README.exists():
        files[README] = readme_with_table(README.read_text("utf-8"), render_table(functions))
    return files


def render() -> None:
    """Write what is rendered, where it differs."""
    for path, text in rendered_files().items():
        if path.exists() and path.read_text("utf-8") == text:
            print(f"{path.name}: up to date")
            continue
        write_atomically(path, text)
        print(f"{path.name}: written")


def check() -> None:
    """Raise BuildError with an excerpt of the difference when a rendered file is stale."""
    for path, text in rendered_files().items():
        committed = path.read_text("utf-8") if path.exists() else ""
        if committed == text:
            print(f"{path.name}: up to date")
            continue
        lines = (committed.splitlines(), text.splitlines())
        difference = difflib.unified_diff(*lines, "as it is", "rendered", lineterm="")
        excerpt = "\n".join(list(difference)[:_DIFF_LINES])
        raise BuildError(f"{path.name} is stale, run build.py render:\n{excerpt}")
