"""The extension's own settings: their defaults, units and ranges."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .errors import INVALID_PARAMETER_VALUE, BackgroundError, Report
from .server import Server
from .units import SettingError, Unit, parse_integer_setting

MIN_QUEUE_BYTES, MAX_QUEUE_BYTES = 64, 256 * 1024 * 1024
_EFFECTIVE_QUEUE_BYTES = 8192
_USERSET = 6  # enum GucContext


class Definition(NamedTuple):
    """A setting of type integer, with its range in its base unit."""

    name: str
    default: str
    unit: Unit
    low: int
    high: int
    description: str


MAX_WORKERS = Definition(
    "pg_background.max_workers", "16", None, 1, 1000, "Background workers that a session may track at once."
)
DEFAULT_QUEUE_SIZE = Definition(
    "pg_background.default_queue_size",
    "64kB",
    "B",
    MIN_QUEUE_BYTES,
    MAX_QUEUE_BYTES,
    "Bytes of a background worker's output that are buffered before it waits for its reader.",
)
WORKER_TIMEOUT = Definition(
    "pg_background.worker_timeout",
    "0",
    "ms",
    0,
    2**31 - 1,
    "How long the whole SQL of a background worker may run; 0 means that statement_timeout holds.",
)
LAUNCH_TIMEOUT = Definition(
    "pg_background.launch_timeout",
    "0",
    "ms",
    0,
    2**31 - 1,
    "How long a launch waits for a connection, or for a submitted worker to end at max_workers, before its error.",
)
POOL_SIZE = Definition(
    "pg_background.pool_size", "4", None, 0, 1000, "Idle worker sessions that a session keeps for reuse."
)
POOL_IDLE_TIMEOUT = Definition(
    "pg_background.pool_idle_timeout", "60s", "ms", 0, 2**31 - 1, "An idle worker session ends itself after this."
)
HISTORY = Definition(
    "pg_background.history", "1d", "ms", 0, 2**31 - 1, "How long the rows of finished background workers stay visible."
)
ALL = (MAX_WORKERS, DEFAULT_QUEUE_SIZE, WORKER_TIMEOUT, LAUNCH_TIMEOUT, POOL_SIZE, POOL_IDLE_TIMEOUT, HISTORY)


def value(server: Server, definition: Definition) -> int:
    """The setting's value in its base unit. 22023 for text that is no such value."""
    text = server.setting(definition.name) or definition.default
    try:
        return parse_integer_setting(definition.name, text, definition.unit, definition.low, definition.high)
    except SettingError as error:
        raise BackgroundError(Report(INVALID_PARAMETER_VALUE, error.message, error.detail, error.hint)) from error


class Configuration(NamedTuple):
    """All that a launch wants to know of this session's settings, in their base units."""

    guc_state: bytes
    max_workers: int
    default_queue_bytes: int
    worker_timeout_ms: int
    launch_timeout_ms: int
    pool_size: int
    pool_idle_timeout_ms: int
    history_ms: int
    standard_strings: bool
    output: Mapping[str, str]  # those that a worker starts with

    def launch_deadline(self) -> float:
        """Until when a launch of now waits, of time.monotonic()."""
        return time.monotonic() + self.launch_timeout_ms / 1000

    def queue_bytes(self, queue_size: int) -> int:
        """What a call's queue_size comes to. 22023 outside of 64 bytes to 256 MB."""
        if queue_size <= 0:
            return max(_EFFECTIVE_QUEUE_BYTES, self.default_queue_bytes)
        if not MIN_QUEUE_BYTES <= queue_size <= MAX_QUEUE_BYTES:
            raise BackgroundError(
                Report(
                    INVALID_PARAMETER_VALUE,
                    f"queue_size {queue_size} is out of range",
                    hint=f"Between {MIN_QUEUE_BYTES} and {MAX_QUEUE_BYTES} bytes are possible;"
                    " 0 means pg_background.default_queue_size.",
                )
            )
        return max(_EFFECTIVE_QUEUE_BYTES, queue_size)


class Configurations:
    """The configuration of now, computed anew only when the settings have changed."""

    def __init__(
        self,
        server: Server,
        output_names: Sequence[str],
        inherited: Callable[[Mapping[str, str]], Mapping[str, str]],
    ) -> None:
        self._server = server
        self._output_names = output_names
        self._inherited = inherited
        self._last: Configuration | None = None

    def now(self) -> Configuration:
        """The configuration under the settings of now. 22023 for a setting that has no valid value."""
        guc_state = self._server.guc_state()
        if self._last is None or self._last.guc_state != guc_state:
            self._last = Configuration(
                guc_state,
                value(self._server, MAX_WORKERS),
                value(self._server, DEFAULT_QUEUE_SIZE),
                value(self._server, WORKER_TIMEOUT),
                value(self._server, LAUNCH_TIMEOUT),
                value(self._server, POOL_SIZE),
                value(self._server, POOL_IDLE_TIMEOUT),
                value(self._server, HISTORY),
                self._server.setting("standard_conforming_strings") == "on",
                self._inherited({name: self._server.shown_setting(name) for name in self._output_names}),
            )
        return self._last


def define(server: Server, memory: dict[str, object]) -> None:
    """Make the settings known to this backend, so that SHOW and RESET know their defaults.

    One that a library has defined is left to it: the C extension may still be loaded, and the server would raise an
    error through ctypes.

    They stay text: the server does not check them, value() does. The server keeps pointers into `memory`, which
    must live as long as the backend; what is defined already in there is left alone.
    """
    defined = memory.setdefault("settings", {})
    assert isinstance(defined, dict)
    define_string = ctypes.PyDLL(None).DefineCustomStringVariable
    for definition in ALL:
        if definition.name in defined or _is_defined(server, definition.name.encode()):
            continue
        strings = (definition.name.encode(), definition.description.encode(), definition.default.encode())
        variable = ctypes.c_char_p()
        defined[definition.name] = (strings, variable)
        name, description, default = strings
        define_string(
            ctypes.c_char_p(name),
            ctypes.c_char_p(description),
            None,
            ctypes.byref(variable),
            ctypes.c_char_p(default),
            ctypes.c_int(_USERSET),
            ctypes.c_int(0),
            None,
            None,
            None,
        )


def _is_defined(server: Server, name: bytes) -> bool:
    """Whether some library has defined the setting."""
    return server.setting_bytes(name) is not None and not server.is_placeholder(name)
