#!/usr/bin/env python3
"""The one build tool of pg_background for PL/Python.

render   sql_templates/ and plpy/pg_background/ become pg_background--<version>.sql and the README's API table
check    fails when one of these is stale
install  puts the extension and psycopg for the server's own Python into a server's sharedir
demo     runs the worked example on a scratch server

Only render and check need Jinja; the others get by with the standard library and this Python's pip.
"""

from __future__ import annotations

import argparse
import compileall
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sql_templates.api import Function

ROOT = Path(__file__).resolve().parent
TEMPLATES = ROOT / "sql_templates"
RUNTIME = ROOT / "plpy" / "pg_background"
CONTROL = ROOT / "pg_background.control"
README = ROOT / "README.md"
SIGNATURE = "pg_background for PL/Python"
TABLE_BEGIN, TABLE_END = "<!-- api:begin -->", "<!-- api:end -->"

PSYCOPG_AT_LEAST, PSYCOPG_BELOW = (3, 2), (3, 4)
_DIFF_LINES = 40
_NAME_LENGTH = 63


class BuildError(Exception):
    """Something that the user must put right; its text says what."""


# --- render -------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """A module of the runtime, and the SQL function that carries its source."""

    name: str
    source: str

    @property
    def function(self) -> str:
        """Name of the SQL function."""
        return f"_pg_background_module_{self.name}"


def control_version(control: Path = CONTROL) -> str:
    """The default_version of the control file."""
    found = re.search(r"^default_version\s*=\s*'([^']+)'", control.read_text("ascii"), re.MULTILINE)
    if not found:
        raise BuildError(f"{control}: no default_version")
    return found.group(1)


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

    def has_function(self, name: str) -> bool:
        """True if the function's template exists."""
        return (self._folder / "functions" / f"{name}.sql.j2").is_file()

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
    names = dict.fromkeys(function.name for function in API)
    environment.globals.update(
        version=control_version(control),
        modules=modules,
        runtime_digest=runtime_digest(modules),
        api=API,
        internal=INTERNAL,
        api_templates=[name for name in names if folder.has_function(name)],
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
    comment = function.comment.replace("|", "\\|")
    return f"| `{function.declaration}` | `{function.returns}` | {comment} |"


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
    """What render writes: the install script, and the README where there is one."""
    script, functions = render_script()
    files = {ROOT / f"pg_background--{control_version()}.sql": script}
    if README.exists():
        files[README] = readme_with_table(README.read_text("utf-8"), render_table(functions))
    return files


def _say_what_is_missing() -> None:
    """Name the functions of api.py that have no template."""
    from sql_templates.api import API

    folder = _Templates(TEMPLATES)
    missing = [function.name for function in API if not folder.has_function(function.name)]
    if missing:
        print(f"note: without a template, left out: {', '.join(missing)}", file=sys.stderr)


def render() -> None:
    """Write what is rendered, where it differs."""
    for path, text in rendered_files().items():
        if path.exists() and path.read_text("utf-8") == text:
            print(f"{path.name}: up to date")
            continue
        _write_atomically(path, text)
        print(f"{path.name}: written")
    _say_what_is_missing()


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
    _say_what_is_missing()


def _write_atomically(path: Path, text: str) -> None:
    """Write beside the file and rename, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- install ------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """An installed PostgreSQL server."""

    pg_config: Path
    version: str
    sharedir: Path
    pkglibdir: Path

    @property
    def plpython(self) -> Path:
        """The library of plpython3u, there or not."""
        return self.pkglibdir / "plpython3.so"

    @property
    def major(self) -> str:
        """The major version, as packages are named."""
        found = re.search(r"\d+", self.version)
        return found.group() if found else "NN"


def read_server(pg_config: Path) -> Server:
    """Ask a pg_config about its server."""
    command = [str(pg_config), "--version", "--sharedir", "--pkglibdir"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{pg_config} does not work: {error}") from error
    return Server(pg_config, answer[0], Path(answer[1]), Path(answer[2]))


def find_server(pg_config: str | None = None) -> Server:
    """The server of --pg-config or PG_CONFIG, else the newest installed one that has plpython3u."""
    named = pg_config or os.environ.get("PG_CONFIG")
    if named:
        path = shutil.which(named)
        if path is None:
            raise BuildError(f"no such pg_config: {named}")
        return read_server(Path(path))
    candidates = [
        *Path("/usr/lib/postgresql").glob("*/bin/pg_config"),
        *Path("/usr").glob("pgsql-*/bin/pg_config"),
    ]
    on_path = shutil.which("pg_config")
    if on_path:
        candidates.append(Path(on_path))
    servers = [read_server(path) for path in candidates]
    able = [server for server in servers if server.plpython.exists()]
    if not servers:
        raise BuildError("no PostgreSQL server found: run make bootstrap, or name one with --pg-config")
    return max(able or servers, key=lambda server: int(server.major) if server.major.isdigit() else 0)


def server_python(server: Server) -> str:
    """The version ("3.11") of the Python that the server's plpython3.so links to."""
    if not server.plpython.exists():
        raise BuildError(
            f"{server.plpython} is missing: install postgresql-plpython3-{server.major} (Debian, Ubuntu) or"
            f" postgresql{server.major}-plpython3 (PGDG on RHEL; postgresql-plpython3 from the distribution)"
        )
    found = re.search(rb"libpython(3\.\d+)([a-z]*)\.so", server.plpython.read_bytes())
    if not found:
        raise BuildError(f"{server.plpython} names no libpython3.X.so: which Python it uses cannot be told")
    if b"t" in found.group(2):
        raise BuildError(f"{server.plpython} uses a free-threaded Python, which is not supported")
    return found.group(1).decode()


def _refuse_foreign(path: Path, force: bool) -> None:
    """Leave the files of the C extension, or of anything else by this name, alone."""
    if not path.exists():
        return
    text = path.read_text("utf-8", errors="replace")
    if SIGNATURE in text[:400] and "module_pathname" not in text.lower()[:400]:
        return
    if not force:
        raise BuildError(f"{path} belongs to another extension: set FORCE=1 to replace it")
    print(f"replaces {path} of another extension (FORCE=1)")


def install_extension(server: Server, force: bool) -> None:
    """Copy the control file and the script into sharedir/extension."""
    folder = server.sharedir / "extension"
    sources = [CONTROL, ROOT / f"pg_background--{control_version()}.sql"]
    for source in sources:
        _refuse_foreign(folder / source.name, force)
    for source in reversed(sources):
        target, text = folder / source.name, source.read_text("utf-8")
        if target.exists() and target.read_text("utf-8") == text:
            print(f"up to date: {target}")
            continue
        _write_atomically(target, text)
        print(f"installed:  {target}")


def installed_psycopg(folder: Path, python: str) -> str | None:
    """The version of the psycopg in the folder; None unless it is whole and within the pinned range."""
    names = [path.name for path in folder.glob("psycopg*.dist-info")]
    found = re.search(r"(?:^|\n)psycopg-([\d.]+)\.dist-info", "\n".join(names))
    if not found or f"psycopg_binary-{found.group(1)}.dist-info" not in names:
        return None
    tag = "cpython-" + python.replace(".", "")
    whole = any(folder.glob(f"psycopg_binary/_psycopg.{tag}-*.so"))
    if not whole or not (folder / "typing_extensions.py").exists():
        return None
    version = tuple(int(part) for part in found.group(1).split("."))
    return found.group(1) if PSYCOPG_AT_LEAST <= version < PSYCOPG_BELOW else None


def psycopg_requirement() -> str:
    """The pinned range, for pip."""
    low, high = (".".join(map(str, version)) for version in (PSYCOPG_AT_LEAST, PSYCOPG_BELOW))
    return f"psycopg[binary]>={low},<{high}"


def install_psycopg(server: Server, python: str) -> None:
    """Put psycopg with its C implementation for the server's Python beside the extension."""
    folder = server.sharedir / "pg_background" / f"python{python}"
    present = installed_psycopg(folder, python)
    if present:
        print(f"up to date: {folder} (psycopg {present})")
        return
    folder.parent.mkdir(exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        _pip_install(fresh, python)
        _compile(fresh, folder, python)
        version = installed_psycopg(fresh, python)
        if version is None:
            raise BuildError(f"pip left no psycopg with its C implementation for Python {python} in {fresh}")
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        print(f"installed:  {folder} (psycopg {version})")
    finally:
        for leftover in (fresh, stale):
            if leftover.exists():
                shutil.rmtree(leftover)


def _pip_install(target: Path, python: str) -> None:
    """Run pip for another Python than its own; typing-extensions is named because pip judges by its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-compile", "--only-binary=:all:", "--implementation", "cp"]
    command += [
        "--python-version",
        python,
        "--target",
        str(target),
        psycopg_requirement(),
        "typing-extensions>=4.6",
    ]
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    if subprocess.run(command, check=False, env=environment).returncode != 0:
        raise BuildError(f"pip found no psycopg for Python {python} (its own message stands above)")


def _compile(fresh: Path, final: Path, python: str) -> None:
    """Compile to bytecode, as the server may not write there; tracebacks are to name the final folder."""
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        compileall.compile_dir(str(fresh), quiet=2, stripdir=str(fresh), prependdir=str(final))
        return
    interpreter = shutil.which(f"python{python}")
    if interpreter is None:
        print(f"note: no python{python} here to compile with: each session's first call takes longer")
        return
    command = [interpreter, "-m", "compileall", "-qq", "-s", str(fresh), "-p", str(final), str(fresh)]
    subprocess.run(command, check=False)


def install(pg_config: str | None) -> None:
    """Install the extension and psycopg into a server, saying each step."""
    os.umask(0o022)
    server = find_server(pg_config)
    python = server_python(server)
    print(f"server:     {server.version}, {server.pg_config}, Python {python}")
    for folder in (server.sharedir / "extension", server.sharedir):
        if not os.access(folder, os.W_OK):
            raise BuildError(f"no right to write into {folder}: run as root (sudo make install)")
    install_extension(server, os.environ.get("FORCE") == "1")
    install_psycopg(server, python)
    print("done:       CREATE EXTENSION pg_background CASCADE;")


# --- the command line ---------------------------------------------------------------------------------


def demo(pg_config: str | None) -> int:
    """Run the worked example on a scratch server."""
    from examples import demo as example

    return example.main(find_server(pg_config).pg_config)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="write the install script and the README's API table")
    commands.add_parser("check", help="fail when one of them is stale")
    for name, text in (("install", "install into a server"), ("demo", "run the worked example")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--pg-config", metavar="PATH", help="of the server; default: PG_CONFIG, or found")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 1 after an error that the user must put right."""
    chosen = _arguments(arguments)
    try:
        if chosen.command == "render":
            render()
        elif chosen.command == "check":
            check()
        elif chosen.command == "install":
            install(chosen.pg_config)
        else:
            return demo(chosen.pg_config)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"build.py: {error}: run make bootstrap, then .venv/bin/python build.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
