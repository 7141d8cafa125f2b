"""Which of the launcher's settings a worker gets, and how.

Three ways, by what a setting needs (design: docs/architecture.md, "Settings"):

- startup options, for what only a superuser may set: the login may, the launching role could not;
- reset values, set by the identity switch as the launching role: where RESET and DISCARD ALL lead;
- current values, by set_config() as the launching role, and again for every job of a reused session.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .errors import CONFIGURATION_LIMIT_EXCEEDED, background_error
from .guc_state import SOURCE_GLOBAL, SOURCE_OVERRIDE, Setting, parse_guc_state
from .server import Server

_LEFT_OUT = frozenset(
    (
        b"application_name",
        b"client_encoding",
        b"idle_in_transaction_session_timeout",
        b"idle_session_timeout",
        b"is_superuser",
        b"max_stack_depth",
        b"role",
        b"seed",
        b"session_authorization",
        b"timezone_abbreviations",
        b"transaction_deferrable",
        b"transaction_isolation",
        b"transaction_read_only",
        b"transaction_timeout",
    )
)
_LEFT_OUT_PREFIX = b"pg_background."

# Settings that a database's owner could use to bend what runs before the identity switch.
_TIMEOUTS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
)
_ALWAYS_RESET = ("search_path", "statement_timeout", "lock_timeout")

# The server refuses startup packets of more than 10,000 bytes.
_STARTUP_BYTES = 9000


class Inherited(NamedTuple):
    """What a worker session for one set of settings starts with."""

    startup: bytes  # the value of the connection's `options`
    resets: tuple[tuple[bytes, bytes], ...]
    assign: bytes  # one query that sets the current values; empty when there are none
    role_settings: tuple[str, ...] = ()  # what it was computed from, beside the launcher's settings
    same_role: bool = False
    custom_names: frozenset[bytes] = frozenset()  # placeholders among resets and current values


class Inheritance:
    """Turns this session's settings into those of its workers."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._contexts: dict[bytes, str] = {}
        self.hidden_settings: dict[int, int] = {}  # by role: how many settings pg_settings does not show it
        self._last_state = b""
        self._last_inherited = self._last_computed = Inherited(b"", (), b"")

    def of(self, guc_state: bytes, role_settings: Iterable[str], *, same_role: bool) -> Inherited:
        """What the worker gets, given the serialized settings of now.

        role_settings: "name=value" texts of ALTER DATABASE and ALTER ROLE that the login applies by itself.
        same_role: the worker stays the login role, so that nothing is switched.
        """
        settings = [setting for setting in parse_guc_state(guc_state, self._server.major) if _travels(setting)]
        self._learn_contexts(setting.name for setting in settings)
        applied_by_login = {self._server.encode(text.split("=", 1)[0]) for text in role_settings}
        resets = self._resets(settings, {name for name in applied_by_login if _may_travel(name)})
        privileged = {name: value for name, value in resets.items() if self._is_privileged(name)}
        privileged.update({s.name: s.value for s in settings if self._is_privileged(s.name)})
        options = {b"role": b"none", **privileged}
        plain_resets = {name: value for name, value in resets.items() if name not in privileged}
        if same_role:
            options.update({name: value for name, value in plain_resets.items() if name in self._contexts})
        else:
            options[b"search_path"] = b"pg_catalog"
            options.update({name.encode(): b"0" for name in self._timeouts()})
        current = [s for s in settings if not self._is_privileged(s.name)]
        return Inherited(
            startup_options(options),
            tuple(sorted(plain_resets.items())),
            assignment(_output_exact(current)),
            tuple(role_settings),
            same_role,
            frozenset(n for n in (*plain_resets, *(s.name for s in current)) if n not in self._contexts),
        )

    def again(self, guc_state: bytes, inherited: Inherited) -> Inherited:
        """What a session that was started with `inherited` gets for the settings of now."""
        if guc_state != self._last_state or inherited != self._last_inherited:
            computed = self.of(guc_state, inherited.role_settings, same_role=inherited.same_role)
            self._last_state, self._last_inherited, self._last_computed = guc_state, inherited, computed
        return self._last_computed

    def fits(self, guc_state: bytes, inherited: Inherited) -> bool:
        """Whether that session can take them on: what only its start could set must be the same."""
        computed = self.again(guc_state, inherited)
        return computed.startup == inherited.startup and computed.resets == inherited.resets

    def _timeouts(self) -> tuple[str, ...]:
        return (*_TIMEOUTS, "transaction_timeout") if self._server.major >= 17 else _TIMEOUTS

    def _is_privileged(self, name: bytes) -> bool:
        """Whether only a superuser may set it; False for placeholders, whoever has set them."""
        return self._contexts.get(name) == "superuser"

    def _learn_contexts(self, names: Iterable[bytes]) -> None:
        """Read pg_settings when it may know more than before: a library may have been loaded since."""
        if self._contexts and all(name in self._contexts or b"." in name for name in names):
            return
        rows = self._server.query(
            "SELECT s.name, s.context FROM pg_catalog.pg_settings s"
            " WHERE s.context OPERATOR(pg_catalog.=) ANY ('{user,superuser}'::pg_catalog.text[])"
        )
        self._contexts = {row["name"].encode(): row["context"] for row in rows}

    def _resets(self, settings: list[Setting], applied_by_login: set[bytes]) -> dict[bytes, bytes]:
        """Reset values: of what did not come by SET, the value itself; of the others, pg_settings'."""
        resets = {s.name: s.value for s in settings if s.source <= SOURCE_OVERRIDE}
        asked = {s.name for s in settings if s.name not in resets}
        asked |= applied_by_login - resets.keys()
        asked |= {name.encode() for name in _ALWAYS_RESET} - resets.keys()
        rows = self._server.query(
            "SELECT s.name, s.reset_val FROM pg_catalog.pg_settings s WHERE s.name OPERATOR(pg_catalog.=) ANY ($1)",
            ["pg_catalog.text[]"],
            [sorted(self._server.decode(name) for name in asked)],
        )
        found = {row["name"].encode(): self._server.encode(row["reset_val"] or "") for row in rows}
        resets.update({name: value for name, value in found.items() if name in self._contexts})
        # A placeholder that ALTER ROLE gave to the login role must not show in the worker.
        resets.update({name: b"" for name in applied_by_login - resets.keys() if b"." in name})
        return resets


def _may_travel(name: bytes) -> bool:
    return name.lower() not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIX)


def _travels(setting: Setting) -> bool:
    return setting.source >= SOURCE_GLOBAL and _may_travel(setting.name)


def _output_exact(settings: list[Setting]) -> list[Setting]:
    """The same settings, but with floats written out so that they read back as they were."""
    return [
        setting._replace(value=b"1") if setting.name == b"extra_float_digits" and int(setting.value) < 1 else setting
        for setting in settings
    ]


def assignment(settings: Iterable[Setting]) -> bytes:
    """One SELECT of set_config() calls; empty for no settings."""
    calls = [
        b"pg_catalog.set_config(" + quote_literal(setting.name) + b"," + quote_literal(setting.value) + b",false)"
        for setting in settings
    ]
    return b"SELECT " + b",".join(calls) if calls else b""


def quote_literal(text: bytes) -> bytes:
    """A string literal, whatever standard_conforming_strings says."""
    return b"E'" + text.replace(b"\\", b"\\\\").replace(b"'", b"''") + b"'"


def startup_options(options: dict[bytes, bytes]) -> bytes:
    """The connection parameter `options`: backslash escapes white space and itself."""
    words = []
    for name, value in options.items():
        word = name + b"=" + value
        words.append(b"-c " + b"".join(b"\\" + _byte(b) if _byte(b) in b" \t\n\v\f\r\\" else _byte(b) for b in word))
    joined = b" ".join(words)
    if len(joined) > _STARTUP_BYTES:
        raise background_error(
            CONFIGURATION_LIMIT_EXCEEDED,
            "the settings of this session are too long for a background worker",
            detail=f"They take {len(joined)} bytes; {_STARTUP_BYTES} are possible.",
            hint="Shorten the longest of the settings that only superusers may change.",
        )
    return joined


def _byte(code: int) -> bytes:
    return bytes((code,))
