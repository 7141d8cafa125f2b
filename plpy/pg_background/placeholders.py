"""Counts the placeholders (`myapp.tenant`) of a worker session.

A placeholder that was set once cannot be unset: it reads as '' for ever after, and no view shows it. So a session in
which a job has made one that its launcher has not is not used again; the count tells.
"""

from __future__ import annotations

import ctypes

TYPE_CHECKING = False  # as typing's, which takes 2 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .bootstrap import Module


class Runtime:
    """What _pg_background_placeholders needs, in one backend."""

    def __init__(self, plpy: Any, memory: dict[str, Any], key: str, read_module: Callable[[str], Module]) -> None:
        del memory, key, read_module
        self._plpy = plpy
        self._server = ctypes.PyDLL(None)
        self._of_total = (-1, 0)

    def retire(self) -> None:
        """Nothing is held."""

    def count(self) -> int:
        """Placeholders, and those few settings that pg_settings never shows."""
        total = self._all_settings()
        if total != self._of_total[0]:
            shown = self._plpy.execute("SELECT pg_catalog.count(*) AS number FROM pg_catalog.pg_settings")
            self._of_total = (total, total - int(shown[0]["number"]))
        return self._of_total[1]

    def _all_settings(self) -> int:
        if hasattr(self._server, "GetNumConfigOptions"):  # to 15
            return int(self._server.GetNumConfigOptions())
        count = ctypes.c_int()
        list_settings = self._server.get_guc_variables
        list_settings.restype = ctypes.c_void_p
        self._server.pfree(ctypes.c_void_p(list_settings(ctypes.byref(count))))
        return count.value
