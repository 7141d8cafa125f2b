"""The backend that this session runs in: the one module that touches the server's `plpy` and its symbols.

Symbols of the server's executable are called through ctypes where SQL has no way or too slow a one. Only
functions that cannot raise an error are called so: an error would jump over Python's frames.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple

from .bootstrap import members
from .errors import INTERNAL_ERROR, OBJECT_NAMES, UNDEFINED_OBJECT, BackgroundError, Report
from .spin import Spin

_SIZE_BYTES = ctypes.sizeof(ctypes.c_size_t)

# A wait looks at the server's interrupts at least this often; a signal ends the slice at once.
_SLICE_MS = 100

# Bytes that are no text of the database's encoding; text of it that is none of UTF-8, which is PL/Python's.
_NO_TEXT = ("22021", "22P05")

_ACCESSED_TEMPORARY_NAMESPACE = 1  # XACT_FLAGS_ACCESSEDTEMPNAMESPACE

_SOON_MS = 20  # most answers come in that time

READABLE = select.POLLIN
WRITABLE = select.POLLOUT


class _PollDescriptor(ctypes.Structure):
    """struct pollfd."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class Role(NamedTuple):
    """What matters of a role."""

    name: str
    is_superuser: bool


class Server:
    """This backend: its caller, settings, interrupts and waits."""

    def __init__(self, plpy: Any) -> None:
        self._plpy = plpy
        backend = ctypes.PyDLL(None)
        self._backend = backend
        backend.GetUserId.restype = ctypes.c_uint32
        # Oid of the current user: inside a SECURITY DEFINER function, its owner.
        self.caller: Callable[[], int] = backend.GetUserId
        self._get_config_option = backend.GetConfigOption
        self._get_config_option.restype = ctypes.c_char_p
        self._show_time_zone = backend.show_timezone
        self._show_time_zone.restype = ctypes.c_char_p
        self._get_reset_value = backend.GetConfigOptionResetString
        self._get_reset_value.restype = ctypes.c_char_p
        self._estimate_guc_state = backend.EstimateGUCStateSpace
        self._estimate_guc_state.restype = ctypes.c_size_t
        self._serialize_guc_state = backend.SerializeGUCState
        self._serialize_guc_state.argtypes = (ctypes.c_size_t, ctypes.c_char_p)
        self._guc_buffer: Any = ctypes.create_string_buffer(16384)
        self._interrupt_pending = ctypes.c_int.in_dll(backend, "InterruptPending")
        self._postmaster_pid = ctypes.c_int.in_dll(backend, "PostmasterPid").value
        self._poll = ctypes.CDLL(None).poll
        self._poll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int)
        self._spin = Spin()
        self._poll_arrays = [(_PollDescriptor * count)() for count in range(4)]
        self.database_oid = ctypes.c_uint32.in_dll(backend, "MyDatabaseId").value
        self._plans: dict[str, Any] = {}
        self.major = int(self.required_setting("server_version_num")) // 10000
        self.encoding = self.required_setting("server_encoding")
        self.pid = os.getpid()

    # --- who calls, and with which settings ---

    def setting(self, name: str) -> str | None:
        """A setting's value in its base unit, whoever may see it; None where there is no such setting."""
        value = self.setting_bytes(name.encode())
        return None if value is None else self.decode(value)

    def required_setting(self, name: str) -> str:
        """A setting that every server has."""
        value = self.setting(name)
        if value is None:
            raise BackgroundError(Report(INTERNAL_ERROR, f'the server has no setting "{name}"'))
        return value

    def shown_setting(self, name: str) -> str:
        """A setting that every server has, as SHOW has it: a time zone is kept as it was written, but has a name."""
        return self.decode(self._show_time_zone()) if name == "TimeZone" else self.required_setting(name)

    def is_placeholder(self, name: bytes) -> bool:
        """Whether a setting is a custom one that no library has defined."""
        return bool(self._flags(name) & (0x0200 if self.major >= 16 else 0x0080))

    def reset_value(self, name: bytes) -> bytes | None:
        """Where RESET leads, in the base unit; None for what is no setting or only superusers may see."""
        hidden = 0x0400 if self.major >= 16 else 0x0100
        if self.setting_bytes(name) is None or self._flags(name) & hidden:
            return None
        return self._get_reset_value(name) or b""

    def setting_bytes(self, name: bytes) -> bytes | None:
        """As `setting`, in the database's encoding."""
        value: bytes | None = self._get_config_option(name, ctypes.c_bool(True), ctypes.c_bool(False))
        return value

    def _flags(self, name: bytes) -> int:
        return int(self._backend.GetConfigOptionFlags(name, ctypes.c_bool(True)))

    def guc_state(self) -> bytes:
        """All settings that are not at their defaults, as the server serializes them for parallel workers."""
        size = self._estimate_guc_state()
        if size > len(self._guc_buffer):
            self._guc_buffer = ctypes.create_string_buffer(2 * size)
        self._serialize_guc_state(size, self._guc_buffer)
        length = int.from_bytes(self._guc_buffer[:_SIZE_BYTES], sys.byteorder)
        state: bytes = self._guc_buffer[: _SIZE_BYTES + length]
        return state

    def has_free_slots(self, wanted: int) -> bool:
        """Whether so many connections are free beside those reserved for superusers and the like."""
        reserved = int(self.required_setting("superuser_reserved_connections"))
        reserved += int(self.setting("reserved_connections") or 0)
        free = ctypes.c_int()
        have = self._backend.HaveNFreeProcs
        have.restype = ctypes.c_bool
        arguments = (ctypes.c_int(reserved + wanted),)
        if self.major >= 16:
            return bool(have(*arguments, ctypes.byref(free)))
        return bool(have(*arguments))

    # --- SQL ---

    def query(self, sql: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Run a query with a plan that is kept for the session; every name in it must be qualified."""
        plan = self._plans.get(sql)
        if plan is None:
            plan = self._plans[sql] = self._plpy.prepare(sql, list(types))
        return list(self._plpy.execute(plan, list(arguments)))

    def role(self, oid: int) -> Role | None:
        """The role with this oid; None when there is none.

        The transaction may look at what was before a superuser was none any more. What is asked about membership of
        the bootstrap superuser is answered as of now, and is true for each superuser.
        """
        rows = self.query(
            "SELECT r.rolname::pg_catalog.text AS name,"
            " r.rolsuper AND pg_catalog.pg_has_role(r.oid, 10::pg_catalog.oid, 'MEMBER') AS is_superuser"
            " FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) $1",
            ["pg_catalog.oid"],
            [oid],
        )
        return Role(rows[0]["name"], bool(rows[0]["is_superuser"])) if rows else None

    def forbid_prepare(self) -> None:
        """Make PREPARE TRANSACTION of this transaction an error of the server's: it would wait for no worker.

        The server refuses it where temporary objects were used, of which this is the mark.
        """
        ctypes.c_int.in_dll(self._backend, "MyXactFlags").value |= _ACCESSED_TEMPORARY_NAMESPACE

    def home(self) -> str:
        """The extension's schema, quoted."""
        return str(
            self.query(
                "SELECT e.extnamespace::pg_catalog.regnamespace::pg_catalog.text AS name FROM pg_catalog.pg_extension e"
                " WHERE e.extname OPERATOR(pg_catalog.=) 'pg_background'"
            )[0]["name"]
        )

    def member_oid(self, name: str) -> int:
        """The oid of a function that is a member of the extension, whatever its schema and whoever has planted what."""
        found = self.query(
            f"SELECT p.oid FROM {members('pg_proc')}"
            " JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) d.objid"
            " WHERE p.proname::pg_catalog.text OPERATOR(pg_catalog.=) $1",
            ["pg_catalog.text"],
            [name],
        )
        if not found:
            raise BackgroundError(Report(UNDEFINED_OBJECT, f"the extension pg_background has no function {name}"))
        return int(found[0]["oid"])

    def report_of(self, error: BaseException) -> Report | None:
        """What a plpy.SPIError says; None for any other exception."""
        if not isinstance(error, (self._plpy.SPIError, self._plpy.Error)):
            return None
        fields: dict[str, Any] = {name: getattr(error, name, None) for name in ("detail", "hint", *OBJECT_NAMES)}
        sqlstate = getattr(error, "sqlstate", None) or INTERNAL_ERROR
        return Report(sqlstate, str(error.args[0]) if error.args else "", **fields)

    def relay(self, notice: Report) -> None:
        """Emit a worker's notice here, at its own level."""
        emit = {
            "DEBUG": self._plpy.debug,
            "LOG": self._plpy.log,
            "INFO": self._plpy.info,
            "NOTICE": self._plpy.notice,
        }.get(notice.severity, self._plpy.warning)
        fields = {name: getattr(notice, name) for name in ("sqlstate", "detail", "hint", *OBJECT_NAMES)}
        given = {name: value for name, value in fields.items() if value is not None}
        # plpy.debug() emits DEBUG2, which "debug1" would hold back.
        held_back = notice.severity == "DEBUG" and self.setting("client_min_messages") == "debug1"
        if held_back:
            self.query("SELECT pg_catalog.set_config('client_min_messages', 'debug2', true)")
        emit(notice.message, **given)
        if held_back:
            self.query("SELECT pg_catalog.set_config('client_min_messages', 'debug1', true)")

    # --- text ---

    def encode(self, text: str) -> bytes:
        """Text as bytes of the database's encoding."""
        if self.encoding in ("UTF8", "SQL_ASCII"):
            return text.encode()
        converted = self.query(
            "SELECT pg_catalog.convert_to($1, pg_catalog.getdatabaseencoding()) AS bytes", ["pg_catalog.text"], [text]
        )
        return bytes(converted[0]["bytes"])

    def decode(self, text: bytes) -> str:
        """Bytes of the database's encoding as text; what is no text of it is replaced, never an error."""
        if text.isascii() or self.encoding in ("UTF8", "SQL_ASCII"):
            return text.decode("utf-8", "replace")
        try:
            converted = self.query(
                "SELECT pg_catalog.convert_from($1, pg_catalog.getdatabaseencoding()) AS text",
                ["pg_catalog.bytea"],
                [text],
            )
        except self._plpy.SPIError as error:
            if error.sqlstate not in _NO_TEXT:
                raise
            return text.decode("ascii", "replace").replace("\ufffd", "?")
        return str(converted[0]["text"])

    # --- waiting ---

    def handle_interrupts(self) -> None:
        """Let the server act on a cancel, a timeout, a termination or another session's request.

        A cancel raises plpy.SPIError; a termination does not come back.
        """
        if self._interrupt_pending.value:
            with self._messages_in_ascii():
                self.query("SELECT 1")

    @contextmanager
    def _messages_in_ascii(self) -> Iterator[None]:
        """Have the server's messages untranslated meanwhile, where PL/Python cannot pass on what is not ASCII.

        It takes an error's text for UTF-8, and its failure leaves the backend broken.
        """
        if self.encoding in ("UTF8", "SQL_ASCII"):
            yield
            return
        language = self.setting_bytes(b"lc_messages")
        self._set_language(b"C")
        try:
            yield
        finally:
            self._set_language(language)

    def _set_language(self, language: bytes | None) -> None:
        """As SET LOCAL lc_messages does; without a query, in which the interrupt would be handled."""
        superuser_set, session_source, local, log = 5, 13, 1, 15  # enum GucContext, GucSource, GucAction; elevel
        number, true, false = ctypes.c_int, ctypes.c_bool(True), ctypes.c_bool(False)
        who = (number(superuser_set), number(session_source), number(local))
        self._backend.set_config_option(
            ctypes.c_char_p(b"lc_messages"), ctypes.c_char_p(language), *who, true, number(log), false
        )

    def is_readable(self, descriptor: int) -> bool:
        """Whether something has arrived, without waiting."""
        return self.is_ready(descriptor, READABLE)

    def is_ready(self, descriptor: int, events: int, within_ms: int = 0) -> bool:
        """Whether the descriptor is ready for this, or is in a moment; a signal ends that, whatever it asks for."""
        polled = self._poll_arrays[1]
        polled[0].fd, polled[0].events = descriptor, events
        return bool(self._poll(polled, 1, within_ms) > 0)

    def spin_until_readable(self, descriptor: int) -> bool:
        """Stay awake for a moment until something has arrived, or an interrupt is to be handled; whether it was so."""
        return self._spin.until(lambda: self.is_readable(descriptor) or bool(self._interrupt_pending.value))

    def is_readable_soon(self, descriptor: int) -> bool:
        """The same, and then sleep for another moment. A longer one would have to handle interrupts."""
        if self.spin_until_readable(descriptor):
            return True
        return not self._interrupt_pending.value and self.is_ready(descriptor, READABLE, _SOON_MS)

    def wait_for_one(self, descriptor: int, deadline: float | None) -> bool:
        """Wait until something has arrived; False at the deadline (time.monotonic()). Handles interrupts meanwhile."""
        return bool(self.wait_for(((descriptor, READABLE),), deadline))

    def wait_for(self, descriptors: Sequence[tuple[int, int]], deadline: float | None) -> list[int]:
        """Wait until one of (fd, events) is ready or the deadline (time.monotonic()) has passed.

        Returns the positions of those that are ready; none at the deadline. Handles interrupts meanwhile.
        """
        count = len(descriptors)
        polled = self._poll_arrays[count] if count < len(self._poll_arrays) else (_PollDescriptor * count)()
        for position, (descriptor, events) in enumerate(descriptors):
            polled[position].fd, polled[position].events = descriptor, events
        while True:
            self.handle_interrupts()
            ready = self._poll(polled, count, _slice_ms(deadline))
            if ready > 0:
                return [position for position in range(count) if polled[position].revents]
            if deadline is not None and time.monotonic() >= deadline:
                return []
            if os.getppid() != self._postmaster_pid:
                self._plpy.fatal("terminating connection due to unexpected postmaster exit")


def _slice_ms(deadline: float | None) -> int:
    """How long the next poll may sleep, in whole milliseconds, rounded up."""
    if deadline is None:
        return _SLICE_MS
    left = deadline - time.monotonic()
    return max(0, min(_SLICE_MS, int(left * 1000) + 1))
