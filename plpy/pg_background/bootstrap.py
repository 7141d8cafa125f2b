"""Brings the runtime into a session: an importer for the modules that the extension carries as SQL functions.

The functions' stubs fetch and run this module's source; it imports nothing of the package at its top.
"""

from __future__ import annotations

import binascii
import importlib
import marshal
import sys
from _frozen_importlib_external import MAGIC_NUMBER  # importlib.util, where it is public, takes 3 ms to import
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, ModuleType
    from typing import Any

_PACKAGE = "pg_background"
MEMORY = f"memory of {_PACKAGE}"  # the place in GD of what must live as long as the backend
_FUNCTION_PREFIX = "_pg_background_module_"
_QUOTE = "$" + "module$"  # in two parts: the install script quotes this very text with it


# What code that was compiled here begins with elsewhere: that of another Python would crash it.
ONLY_THIS_PYTHON = (
    "from _frozen_importlib_external import MAGIC_NUMBER",
    f"if MAGIC_NUMBER != {MAGIC_NUMBER!a}:",
    "    message = 'the Python of the server was replaced while this session was open'",
    "    plpy.error(message, sqlstate='0A000', hint='Reconnect.')",
)


def members(catalog: str) -> str:
    """A table of this extension's members in a catalog, `d`; an object of the same name elsewhere is none of them."""
    return f"""pg_catalog.pg_extension e
JOIN pg_catalog.pg_depend d
  ON d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass::pg_catalog.oid
 AND d.refobjid OPERATOR(pg_catalog.=) e.oid
 AND d.deptype OPERATOR(pg_catalog.=) 'e'
 AND e.extname OPERATOR(pg_catalog.=) 'pg_background'
 AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.{catalog}'::pg_catalog.regclass::pg_catalog.oid"""


# Sources run as the server's operating system user: so they are those of members that a superuser owns.
_SOURCES = f"""
FROM {members("pg_proc")}
JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) d.objid
JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) p.proowner AND r.rolsuper
"""
_BODY_QUERY = f"SELECT p.prosrc AS body {_SOURCES} WHERE p.proname::pg_catalog.text OPERATOR(pg_catalog.=) $1"
_ALL_QUERY = (
    "SELECT p.prosrc AS body, p.oid::pg_catalog.regproc::pg_catalog.text AS function,"
    " p.proname::pg_catalog.text AS name"
    f" {_SOURCES} WHERE pg_catalog.starts_with(p.proname::pg_catalog.text, '{_FUNCTION_PREFIX}')"
)


class Module:
    """A module as the body of its function has it: the source, and behind it what CREATE EXTENSION compiled from it."""

    def __init__(self, name: str, body: str) -> None:
        self._name = name
        _, self.source, self._compiled = body.split(_QUOTE)

    def code(self) -> bytes:
        """Marshalled code of this Python."""
        found = self._compiled.split()
        if len(found) == 5 and found[2] == self._mark():
            return binascii.a2b_base64(found[3])
        name = _PACKAGE if self._name == "__init__" else f"{_PACKAGE}.{self._name}"
        return marshal.dumps(compile(self.source, f"<{name}>", "exec", dont_inherit=True))

    def compiled_body(self) -> str:
        """The body with this Python's code in a comment, which holds neither quotes nor asterisks."""
        code = binascii.b2a_base64(self.code(), newline=False).decode("ascii")
        select, cast = f"SELECT {_QUOTE}", f"{_QUOTE}::pg_catalog.text"
        return f"{select}{self.source}{cast} /* {self._mark()} {code} */"

    def _mark(self) -> str:
        """Tells code of another Python, or of a source that was edited since."""
        return f"{MAGIC_NUMBER.hex()}-{binascii.crc32(self.source.encode()):08x}"


class _Importer:
    """Finds and loads pg_background and its modules. importlib.abc, which has this interface, takes 15 ms to import."""

    def __init__(self, read_code: Callable[[str], bytes], read_source: Callable[[str], str] | None) -> None:
        self._read_code = read_code
        self._read_source = read_source

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The spec of a module of this package; None for any other."""
        del path, target
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        return ModuleSpec(fullname, self, origin=f"<{fullname}>", is_package=fullname == _PACKAGE)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The usual one."""
        del spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's code; tracebacks name it and its line."""
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, fullname: str) -> CodeType:
        """The compiled module."""
        code: CodeType = marshal.loads(self._read_code(_short(fullname)))
        return code

    def get_source(self, fullname: str) -> str | None:
        """A module's source, as the install script carries it; None where only the code came along."""
        return None if self._read_source is None else self._read_source(_short(fullname))


def _short(fullname: str) -> str:
    return "__init__" if fullname == _PACKAGE else fullname[len(_PACKAGE) + 1 :]


def module_reader(plpy: Any) -> Callable[[str], Module]:
    """Reads a module from the extension of this database."""
    plan = plpy.prepare(_BODY_QUERY, ["pg_catalog.text"])

    def read(name: str) -> Module:
        found = plpy.execute(plan, [_FUNCTION_PREFIX + name])
        if len(found) != 1:
            raise ImportError(f"the extension pg_background has no module {name}", name=name)
        return Module(name, found[0]["body"])

    return read


def compile_all(plpy: Any) -> None:
    """Give each module's function the code of this Python, which sessions then need not compile."""
    for row in plpy.execute(_ALL_QUERY):
        body = Module(row["name"][len(_FUNCTION_PREFIX) :], row["body"]).compiled_body()
        plpy.execute(
            f"CREATE OR REPLACE FUNCTION {row['function']}() RETURNS pg_catalog.text"
            f" LANGUAGE sql IMMUTABLE PARALLEL SAFE AS {plpy.quote_literal(body)}"
        )


def install_importer(read_code: Callable[[str], bytes], read_source: Callable[[str], str] | None = None) -> None:
    """Import the package's modules with read_code(module) from now on, and none that was imported before."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _Importer.__name__]
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Importer(read_code, read_source))


def load(plpy: Any, gd: dict[Any, Any], key: str, module: str) -> Any:
    """A module's Runtime, newly made and kept in GD under (key, module); the key names version and sources.

    A runtime of other sources (before ALTER EXTENSION UPDATE, say) lets its workers go on to their ends first.
    """
    memory = gd.setdefault(MEMORY, {})
    runtimes = memory.setdefault("runtimes", {})
    read_module = module_reader(plpy)
    if memory.get("key") != key:
        for old in list(runtimes):
            del gd[old]
            runtimes.pop(old).retire()
        install_importer(lambda name: read_module(name).code(), lambda name: read_module(name).source)
        memory["key"] = key
    runtime = importlib.import_module(f"{_PACKAGE}.{module}").Runtime(plpy, memory, key, read_module)
    gd[key, module] = runtimes[key, module] = runtime
    return runtime
