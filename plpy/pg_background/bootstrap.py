"""Brings the runtime into a session: an importer for the modules that the extension carries as SQL functions.

The functions' stubs fetch and run this module's source; it imports nothing of the package at its top.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_PACKAGE = "pg_background"
_FUNCTION_PREFIX = "_pg_background_module_"
_QUOTE = "$" + "module$"  # in two parts: the install script quotes this very text with it

# Sources run as the server's operating system user. They come from members of the extension, found by pg_depend,
# that a superuser owns; a function of the same name, whoever made it and wherever, is none.
_SOURCE_QUERY = """
SELECT p.prosrc AS body
FROM pg_catalog.pg_extension e
JOIN pg_catalog.pg_depend d
  ON d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass::pg_catalog.oid
 AND d.refobjid OPERATOR(pg_catalog.=) e.oid
 AND d.deptype OPERATOR(pg_catalog.=) 'e'
 AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) d.objid
JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) p.proowner AND r.rolsuper
WHERE e.extname OPERATOR(pg_catalog.=) 'pg_background'
  AND p.proname::pg_catalog.text OPERATOR(pg_catalog.=) $1
"""


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds pg_background and its modules, and compiles each when it is first imported."""

    def __init__(self, read_source: Callable[[str], str]) -> None:
        self._read_source = read_source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of this package; None for any other."""
        del path, target
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=f"<{fullname}>", is_package=fullname == _PACKAGE)

    def get_source(self, fullname: str) -> str:
        """A module's source, as the install script carries it."""
        return self._read_source("__init__" if fullname == _PACKAGE else fullname[len(_PACKAGE) + 1 :])

    def get_code(self, fullname: str) -> Any:
        """The compiled module; tracebacks name it and its line."""
        return compile(self.get_source(fullname), f"<{fullname}>", "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        """True for the package itself."""
        return fullname == _PACKAGE


def source_reader(plpy: Any) -> Callable[[str], str]:
    """Reads a module's source from the extension of this database."""

    def read(module: str) -> str:
        plan = plpy.prepare(_SOURCE_QUERY, ["pg_catalog.text"])
        found = plpy.execute(plan, [_FUNCTION_PREFIX + module])
        if len(found) != 1:
            raise ImportError(f"the extension pg_background has no module {module}", name=module)
        return str(found[0]["body"].split(_QUOTE)[1])

    return read


def install_importer(read_source: Callable[[str], str]) -> None:
    """Import the package's modules with read_source(module) from now on, and none that was imported before."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _Importer.__name__]
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Importer(read_source))


def load(plpy: Any, gd: dict[Any, Any], key: str, module: str) -> Any:
    """A module's Runtime, newly made and kept in GD under (key, module); the key names version and sources.

    A runtime of other sources (before ALTER EXTENSION UPDATE, say) lets its workers go on to their ends first.
    """
    memory = gd.setdefault("memory of " + _PACKAGE, {})
    runtimes = memory.setdefault("runtimes", {})
    read_source = source_reader(plpy)
    if memory.get("key") != key:
        for old in list(runtimes):
            del gd[old]
            runtimes.pop(old).retire()
        install_importer(read_source)
        memory["key"] = key
    runtime = importlib.import_module(f"{_PACKAGE}.{module}").Runtime(plpy, memory, key, read_source)
    gd[key, module] = runtimes[key, module] = runtime
    return runtime
