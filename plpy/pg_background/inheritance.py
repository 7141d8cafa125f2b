"""Which of the launcher's settings a worker gets, and how.

Three ways, by what a setting needs (design: docs/architecture.md, "Settings"):

- startup options, for what only a superuser may set, as the login may and the launching role could not, and for what
  keeps the identity switch out of the reach of a database's owner;
- reset values, set by the identity switch as the launching role: where RESET and DISCARD ALL lead;
- current values, by set_config() as the launching role, and again for every job of a reused session.

A placeholder can turn out to be code: a library that is loaded later may define it (plperl.on_plperlu_init). The
server then asks whether whoever set it was allowed to. A value must therefore never look as if somebody more powerful
had set it than did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
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

# Settings with which a database's owner could bend or end what runs before the identity switch, and what they are
# until then. A library of local_preload_libraries would be loaded as the login role.
_UNTIL_SWITCH = {
    b"search_path": b"pg_catalog",
    b"statement_timeout": b"0",
    b"lock_timeout": b"0",
    b"default_transaction_isolation": b"read committed",
    b"default_transaction_read_only": b"off",
    b"default_transaction_deferrable": b"off",
    b"local_preload_libraries": b"",
}
# Off in workers altogether.
_TIMEOUTS_OFF = (b"idle_in_transaction_session_timeout", b"idle_session_timeout")
# The set-up goes on after the switch: these get their values at its end.
_TIMEOUTS_OF_JOBS = (b"statement_timeout", b"lock_timeout")
_DIGITS = b"extra_float_digits"

# pg_settings.context of what only a superuser's login may set.
_PRIVILEGED = ("superuser", "backend", "superuser-backend")
_SETTABLE = ("user", *_PRIVILEGED)

_NOT_ALPHANUMERIC = re.compile(rb"[^0-9A-Za-z]")
# The server refuses startup packets of more than 10,000 bytes.
_STARTUP_BYTES = 9000
# Of set_config() in one SELECT, which may have 1,664 columns.
_CALLS_IN_A_SELECT = 1000

# enum GucContext, GucSource
_SUSET, _SU_BACKEND = 5, 3
_SOURCE_SESSION = 13
_BOOTSTRAP_SUPERUSER = 10
# The role pg_database_owner: it cannot log in, has no members, and no right to set anything.
_POWERLESS, _POWERLESS_NAME = 6171, b"pg_database_owner"


class Order(NamedTuple):
    """A value that the identity switch sets."""

    name: bytes
    value: bytes
    source: int  # enum GucSource: OVERRIDE makes it the reset value too
    role: int  # who the server is told has set it


class Inherited(NamedTuple):
    """What a worker session for one set of settings starts with."""

    startup: bytes  # the value of the connection's `options`
    resets: tuple[tuple[bytes, bytes, int, int], ...]  # Orders, as plain tuples: their repr() is sent
    assign: bytes  # a query that sets the current values; empty when there are none
    login_settings: tuple[bytes, ...] = ()  # what it was computed from, beside the launcher's settings
    same_role: bool = False
    custom_names: frozenset[bytes] = frozenset()  # placeholders among resets and current values


class Inheritance:
    """Turns this session's settings into those of its workers."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._contexts: dict[bytes, str] = {}
        self.hidden_settings: dict[int, int] = {}  # by role: how many settings pg_settings does not show it
        self._last_question: tuple[int, bytes, Inherited] | None = None
        self._last_computed = Inherited(b"", (), b"")

    def of(self, guc_state: bytes, login_settings: Iterable[bytes], *, same_role: bool) -> Inherited:
        """What the worker gets, given the serialized settings of now.

        login_settings: names of what ALTER DATABASE and ALTER ROLE set, which the login applies by itself.
        same_role: the worker stays the login role, so that nothing is switched.
        """
        entries = parse_guc_state(guc_state, self._server.major)
        settings = [s for s in entries if _travels(s) and self._context(s.name) in _SETTABLE]
        distrusted = self._distrusted(settings)
        resets = self._resets(settings, login_settings)
        privileged = [s for s in settings if self._is_privileged(s.name)]
        current = [s for s in settings if s not in privileged]
        options = {b"role": b"none", **dict.fromkeys(self._timeouts_off(), b"0")}
        options.update({s.name: s.value for s in resets if self._is_privileged(s.name)})
        set_since = [s for s in privileged if s.source > SOURCE_OVERRIDE]
        if set_since and self._caller_is_superuser():
            current += set_since
        else:
            options.update({s.name: s.value for s in set_since})
        plain_resets = [s for s in resets if s.name not in options]
        orders: list[Order] = []
        if same_role:
            # Not those of settings that SET has changed since: a kept session would not fit after each SET.
            lasting = {s.name for s in settings if s.source <= SOURCE_OVERRIDE}.union(login_settings)
            options.update({s.name: s.value for s in plain_resets if self._is_defined(s.name) and s.name in lasting})
        else:
            options.update(_UNTIL_SWITCH)
            orders += self._reset_orders(plain_resets, distrusted)
            current += self._timeouts_of_jobs(resets, current)
        return Inherited(
            startup_options(options),
            tuple(tuple(order) for order in orders),  # type: ignore[misc]
            self._assignment(self._output_exact(current), distrusted),
            tuple(login_settings),
            same_role,
            frozenset(s.name for s in (*plain_resets, *current) if not self._is_defined(s.name)),
        )

    def again(self, guc_state: bytes, inherited: Inherited) -> Inherited:
        """What a session that was started with `inherited` gets for the settings of now."""
        # What a placeholder is trusted with depends on the caller.
        question = self._server.caller(), guc_state, inherited
        if question != self._last_question:
            self._last_computed = self.of(guc_state, inherited.login_settings, same_role=inherited.same_role)
            self._last_question = question
        return self._last_computed

    def fits(self, guc_state: bytes, inherited: Inherited) -> bool:
        """Whether that session can take them on: what only its start could set must be the same.

        A reset value that it was not given is the server's own, which it has anyway.
        """
        computed = self.again(guc_state, inherited)
        given = {(name, source): (value, setter) for name, value, source, setter in inherited.resets}
        return computed.startup == inherited.startup and all(
            given.get((name, source), (value, setter)) == (value, setter)
            for name, value, source, setter in computed.resets
        )

    def _timeouts_off(self) -> tuple[bytes, ...]:
        return (*_TIMEOUTS_OFF, b"transaction_timeout") if self._server.major >= 17 else _TIMEOUTS_OFF

    # --- which way a setting takes ---

    def _is_privileged(self, name: bytes) -> bool:
        """Whether only a superuser, or the login, may set it; False for placeholders, whoever has set them."""
        return self._context(name) in _PRIVILEGED

    def _context(self, name: bytes) -> str:
        """pg_settings.context of a setting; that of what ordinary roles may set for a placeholder.

        Asked of the server each time: what it takes for a placeholder must never be set as the login role.
        """
        if not self._is_defined(name):
            return "user"
        if name not in self._contexts:
            # First of all, or of a library that was loaded since.
            self._contexts.update(self._read_contexts())
        # What pg_settings does not show is for superusers' eyes only (session_preload_libraries).
        return self._contexts.setdefault(name, "superuser")

    def _is_defined(self, name: bytes) -> bool:
        return self._server.setting_bytes(name) is not None and not self._server.is_placeholder(name)

    def _read_contexts(self) -> dict[bytes, str]:
        rows = self._server.query("SELECT s.name, s.context FROM pg_catalog.pg_settings s")
        return {row["name"].encode(): row["context"] for row in rows}

    def _distrusted(self, settings: Iterable[Setting]) -> frozenset[bytes]:
        """Placeholders that the launching role would be trusted with, but whoever has set them was not.

        So it is where a superuser's definer function launches: the session's settings are its caller's.
        """
        setters = {s.role for s in settings if self._server.is_placeholder(s.name)}
        if not setters:
            return frozenset()
        caller = self._server.caller()
        trusted = self._superusers({caller, *setters})
        if caller not in trusted:
            return self._granted_to_caller(s.name for s in settings if s.role not in {caller, *trusted})
        return frozenset(
            s.name
            for s in settings
            if self._server.is_placeholder(s.name)
            and (s.role not in trusted if self._server.major >= 15 else s.context not in (_SUSET, _SU_BACKEND))
        )

    def _superusers(self, roles: Iterable[int]) -> frozenset[int]:
        rows = self._server.query(
            "SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolsuper AND r.oid OPERATOR(pg_catalog.=) ANY ($1)",
            ["pg_catalog.oid[]"],
            [sorted(roles)],
        )
        return frozenset({_BOOTSTRAP_SUPERUSER, *(int(row["oid"]) for row in rows)})

    def _caller_is_superuser(self) -> bool:
        caller = self._server.caller()
        return caller in self._superusers((caller,))

    def _granted_to_caller(self, names: Iterable[bytes]) -> frozenset[bytes]:
        """Those that a GRANT SET ON PARAMETER (15 and later) lets the caller set."""
        if self._server.major < 15:
            return frozenset()
        decoded = {self._server.decode(name): name for name in names if self._server.is_placeholder(name)}
        rows = self._server.query(
            "SELECT n.name FROM pg_catalog.unnest($1) AS n(name)"
            " WHERE pg_catalog.has_parameter_privilege(CURRENT_USER, n.name, 'SET')",
            ["pg_catalog.text[]"],
            [sorted(decoded)],
        )
        return frozenset(decoded[row["name"]] for row in rows)

    # --- reset values ---

    def _resets(self, settings: Sequence[Setting], login_settings: Iterable[bytes]) -> list[Setting]:
        """Where RESET leads in the launcher, for all that must not be left as the login has it."""
        found = {s.name.lower(): s for s in settings if s.source <= SOURCE_OVERRIDE}
        asked = [*(s.name for s in settings), *filter(_may_travel, login_settings), *_UNTIL_SWITCH]
        for name in asked:
            if name.lower() in found:
                continue
            value = self._server.reset_value(name)
            if value is None and b"." in name:
                value = b""  # a placeholder of the login role, which must not show in the worker
            if value is not None:
                found[name.lower()] = Setting(name, value, SOURCE_OVERRIDE, 0, 0)
        return sorted(found.values())

    def _reset_orders(self, resets: Sequence[Setting], distrusted: frozenset[bytes]) -> Iterator[Order]:
        caller = self._server.caller()
        known = frozenset(s.name for s in resets if s.role) - distrusted
        for setting in resets:
            # Who gave a reset value to what was SET since is not known.
            trusted = setting.name in known or not self._server.is_placeholder(setting.name)
            yield Order(setting.name, setting.value, SOURCE_OVERRIDE, caller if trusted else _POWERLESS)
        for setting in resets:
            if setting.name in _TIMEOUTS_OF_JOBS and setting.value != b"0":
                yield Order(setting.name, b"0", _SOURCE_SESSION, caller)

    # --- current values ---

    def _timeouts_of_jobs(self, resets: Iterable[Setting], current: Iterable[Setting]) -> list[Setting]:
        """Those that were switched off for the set-up, and that `current` does not bring back."""
        present = {s.name for s in current}
        return [
            s._replace(value=self._server.setting_bytes(s.name) or b"0")
            for s in resets
            if s.name in _TIMEOUTS_OF_JOBS and s.value != b"0" and s.name not in present
        ]

    def _output_exact(self, settings: Sequence[Setting]) -> list[Setting]:
        """The same settings, but with floats written out so that they read back as they were."""
        others = [s for s in settings if s.name != _DIGITS]
        digits = int(self._server.required_setting(_DIGITS.decode()))
        if digits == 1 and len(others) == len(settings):
            return others
        return [*others, Setting(_DIGITS, b"%d" % max(1, digits), SOURCE_OVERRIDE, 0, 0)]

    def _assignment(self, settings: Sequence[Setting], distrusted: frozenset[bytes]) -> bytes:
        plain = assignment(s for s in settings if s.name not in distrusted)
        # Only a superuser may set them as somebody else; another role goes without.
        foreign = assignment(s for s in settings if s.name in distrusted)
        if not foreign or not self._caller_is_superuser():
            return plain
        return b"SET ROLE " + _POWERLESS_NAME + b"; " + foreign + b"; RESET ROLE" + (b"; " + plain if plain else b"")


def _may_travel(name: bytes) -> bool:
    lower = name.lower()
    return lower not in _LEFT_OUT and not lower.startswith(_LEFT_OUT_PREFIX)


def _travels(setting: Setting) -> bool:
    return setting.source >= SOURCE_GLOBAL and _may_travel(setting.name)


def assignment(settings: Iterable[Setting]) -> bytes:
    """SELECTs of set_config() calls; empty for no settings."""
    calls = [
        b"pg_catalog.set_config(" + quote_literal(setting.name) + b"," + quote_literal(setting.value) + b",false)"
        for setting in settings
    ]
    return b"; ".join(
        b"SELECT " + b",".join(calls[start : start + _CALLS_IN_A_SELECT])
        for start in range(0, len(calls), _CALLS_IN_A_SELECT)
    )


def quote_literal(text: bytes) -> bytes:
    """A string literal, whatever standard_conforming_strings says."""
    return b"E'" + text.replace(b"\\", b"\\\\").replace(b"'", b"''") + b"'"


def startup_options(options: dict[bytes, bytes]) -> bytes:
    """The connection parameter `options`: a backslash before all that the server's locale may take for a space."""
    words = []
    for name, value in options.items():
        words.append(b"-c " + name + b"=" + _NOT_ALPHANUMERIC.sub(rb"\\\g<0>", value))
    joined = b" ".join(words)
    if len(joined) > _STARTUP_BYTES:
        raise background_error(
            CONFIGURATION_LIMIT_EXCEEDED,
            "the settings of this session are too long for a background worker",
            detail=f"They take {len(joined)} bytes; {_STARTUP_BYTES} are possible.",
            hint="Shorten the longest of the settings that only superusers may change.",
        )
    return joined
