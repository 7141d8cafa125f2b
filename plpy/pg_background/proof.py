"""What a worker session, cleaned up after a job, says of itself: whose it is, and whether the job left a placeholder.

A placeholder (`myapp.tenant`) that was set once cannot be unset: it reads as '' for ever after, and no view shows it.
So a session in which a job has made one that its launcher has not is not used again; the count tells.

This runs after every job of a kept session: what it asks for is prepared once.
"""

from __future__ import annotations

import ctypes

TYPE_CHECKING = False  # as typing's, which takes 2 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .bootstrap import Module

# enum GucContext, GucSource, GucAction; of elevel
_USER_CONTEXT, _SESSION_SOURCE, _SET, _LOG = 6, 13, 0, 15


class Runtime:
    """What _pg_background_proof needs, in one backend."""

    def __init__(self, plpy: Any, memory: dict[str, Any], key: str, read_module: Callable[[str], Module]) -> None:
        del key, read_module
        self._memory = memory
        self._plpy = plpy
        self._server = server = ctypes.PyDLL(None)
        for name in ("GetAuthenticatedUserId", "GetSessionUserId", "GetUserId"):
            getattr(server, name).restype = ctypes.c_uint32
        server.GetConfigOption.restype = ctypes.c_char_p
        self._query = ctypes.c_char_p.in_dll(server, "debug_query_string")
        self._is_superuser = (ctypes.c_char_p(b"is_superuser"), ctypes.c_bool(False), ctypes.c_bool(False))
        self._all_settings = (
            server.GetNumConfigOptions if hasattr(server, "GetNumConfigOptions") else self._list_settings
        )
        self._of_total = (-1, 0)
        self._idle_timeout_ms = -1
        self._assignment: tuple[Any, ...] = ()
        self._seen: tuple[Any, ...] = ()
        self._said = ""

    def retire(self) -> None:
        """Nothing is held."""

    def begin_anew(self) -> None:
        """Nothing is remembered of a job."""

    def of(self, idle_timeout_ms: int) -> str:
        """Oids of the authenticated, the session and the current user; is_superuser; how many settings are hidden.

        Called by the protocol's FunctionCall, outside of any query, it ends the job of a worker session, in which
        nobody but its launcher can call like that. From then on the session ends itself when it was idle for so long;
        0: never. It tells nothing there where the switch of the identity has left no mark.
        """
        if self._query.value is None:
            if not self._memory.get("is_worker"):
                return ""
            for runtime in self._memory["runtimes"].values():
                runtime.begin_anew()
            self._set_idle_timeout(idle_timeout_ms)
        server = self._server
        is_superuser = server.GetConfigOption(*self._is_superuser)
        users = server.GetAuthenticatedUserId(), server.GetSessionUserId(), server.GetUserId()
        seen = users, is_superuser, self._all_settings()
        if seen != self._seen:
            self._said = f"{users[0]},{users[1]},{users[2]},{is_superuser.decode()},{self._hidden_settings(seen[2])}"
            self._seen = seen
        return self._said

    def _set_idle_timeout(self, idle_timeout_ms: int) -> None:
        """As SET does, without what a statement costs after DISCARD ALL. Refused, it would be logged, not raised."""
        server, number = self._server, ctypes.c_int
        has_setter = hasattr(server, "set_config_option_ext")  # from 15 on
        if idle_timeout_ms != self._idle_timeout_ms:
            values = (ctypes.c_char_p(b"idle_session_timeout"), ctypes.c_char_p(b"%d" % idle_timeout_ms))
            who = (number(_USER_CONTEXT), number(_SESSION_SOURCE))
            setter = (ctypes.c_uint32(server.GetUserId()),) if has_setter else ()
            how = (number(_SET), ctypes.c_bool(True), number(_LOG), ctypes.c_bool(False))
            self._assignment, self._idle_timeout_ms = (*values, *who, *setter, *how), idle_timeout_ms
        (server.set_config_option_ext if has_setter else server.set_config_option)(*self._assignment)

    def _hidden_settings(self, total: int) -> int:
        """Placeholders, and those few settings that pg_settings never shows."""
        if total != self._of_total[0]:
            shown = self._plpy.execute("SELECT pg_catalog.count(*) AS number FROM pg_catalog.pg_settings")
            self._of_total = (total, total - int(shown[0]["number"]))
        return self._of_total[1]

    def _list_settings(self) -> int:
        """From 16 on: the number of all settings."""
        count = ctypes.c_int()
        list_settings = self._server.get_guc_variables
        list_settings.restype = ctypes.c_void_p
        self._server.pfree(ctypes.c_void_p(list_settings(ctypes.byref(count))))
        return count.value
