"""A worker session: a loopback connection that has become the launching role."""

from __future__ import annotations

import binascii
import marshal
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from . import libpq_feed, switch, wire
from .bootstrap import MEMORY, ONLY_THIS_PYTHON
from .cleaning import PROOF, Cleaning, CleanUp, proof_of_switched
from .errors import (
    INTERNAL_ERROR,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    BackgroundError,
    Report,
    backend_died,
    background_error,
)
from .inheritance import Inheritance, Inherited
from .loopback import Loopback
from .past_libpq import AT_ONCE_BYTES, write_some
from .process import process_start
from .server import READABLE, WRITABLE, Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

SURELY_WRITTEN_BYTES = AT_ONCE_BYTES  # at once, to a worker at rest: what a unix socket holds is three times that
_RESULT_OK = (1, 2)  # ExecStatus.COMMAND_OK, TUPLES_OK
_CONNECTION_OK = 0  # ConnStatus.OK

# What PL/Python puts before the message of an error in the switch, a cancel's for example.
_PYTHON_ERROR = re.compile(r"^(?:plpy|spiexceptions)\.\w+: ")

_FIELD_CODES = {**wire.FIELD_CODES, "severity": ord("V")}
_FIELD_NAMES = {code: name for name, code in _FIELD_CODES.items()}

# In a query of its own, between whose end and the job nothing runs: only what is committed proves anything.
_FORGET_ROLES = b"RESET ROLE; RESET SESSION AUTHORIZATION"
_FORGET_IDLE_TIMEOUT = b"; RESET idle_session_timeout"  # of one that was begun ahead
_WHO_AM_I = b"CURRENT_USER, SESSION_USER, pg_catalog.current_setting('is_superuser')"


def without_python(message: str) -> str:
    """An error's message, without what PL/Python puts before it."""
    return _PYTHON_ERROR.sub("", message)


def report_of(result: PGresult, server: Server, worker_pid: int | None = None) -> Report:
    """An ErrorResponse or NoticeResponse as a Report."""
    fields = {}
    for name, code in _FIELD_CODES.items():
        value = result.error_field(code)
        if value is not None:
            fields[name] = server.decode(value)
    if "sqlstate" not in fields:
        # libpq's own words: the connection is gone.
        message = server.decode(result.error_message or b"").strip()
        return backend_died(worker_pid, message)
    return Report(worker_pid=worker_pid, **{"message": "", **fields})


def report_of_message(body: bytes, server: Server, worker_pid: int) -> Report:
    """The same, where libpq has not read it."""
    fields = {name: server.decode(value) for name, value in wire.error_fields(body, _FIELD_NAMES).items()}
    return Report(worker_pid=worker_pid, **{"sqlstate": INTERNAL_ERROR, "message": "", **fields})


class WorkerSession:
    """A connection whose authenticated, session and current user are the role role_oid."""

    def __init__(self, server: Server, connection: PGconn, role_oid: int) -> None:
        self._server = server
        self.connection = connection
        self.role_oid = role_oid
        self.pid = connection.backend_pid
        self.process_start = process_start(self.pid)
        self.encoding = (connection.parameter_status(b"client_encoding") or b"").decode("ascii")
        self.inherited = Inherited(b"", (), b"")
        self.guc_state = b""
        self.known_to_supervisor = 0  # the number of the control connection over which it was handed over
        self.closed = False
        self.idle_since = 0.0  # of time.monotonic()
        self.users: list[str] = []
        self.is_superuser = False  # when it began: whether it has the right to become anybody
        self.is_switched = False  # from another role: so Python runs in the worker already, which counts placeholders
        self.cleaning = Cleaning(server, connection, [])  # until finish() knows what proves it
        self._out_of_step = False  # libpq waits for an answer that another process has read

    @classmethod
    def start(
        cls,
        server: Server,
        loopback: Loopback,
        inheritance: Inheritance,
        role_oid: int,
        guc_state: bytes,
        idle_timeout_ms: int | None = None,
    ) -> WorkerSession:
        """Log in, and begin to become the role, which takes a while: finish() must follow before anything else.

        idle_timeout_ms: for one that is begun ahead; it ends itself when it was idle for so long.
        """
        refused: BackgroundError | None = None
        role = server.role(role_oid)
        for login in loopback.logins():
            inherited = inheritance.of(guc_state, login.settings, same_role=login.oid == role_oid)
            try:
                connection = loopback.connect(login, inherited.startup)
            except BackgroundError as error:
                if error.report.sqlstate != "08001":
                    raise
                refused = refused or error
                continue
            session = cls(server, connection, role_oid)
            session.guc_state, session.inherited = guc_state, inherited
            session.is_superuser = role is not None and role.is_superuser
            try:
                if login.oid != role_oid:
                    session._begin_switch(idle_timeout_ms)
            except BaseException:
                session.close()
                raise
            return session
        assert refused is not None
        raise refused

    def _begin_switch(self, idle_timeout_ms: int | None) -> None:
        timeout = b"" if idle_timeout_ms is None else b"; SET idle_session_timeout = %d" % idle_timeout_ms
        self._send(self._switch_block(self.inherited, ends_refused=bool(timeout)) + timeout)
        self.is_switched = True

    def finish(self, hidden_settings: dict[int, int]) -> None:
        """Wait until it is the role, prove that, and set what it inherits."""
        if self.is_switched:
            self._last_result()
        self.verify()
        inherited, self.inherited = self.inherited, Inherited(b"", (), b"")
        if self.is_switched:
            proof = proof_of_switched(self.role_oid, is_superuser=self.is_superuser)
            self.cleaning = Cleaning(self._server, self.connection, proof, self._server.member_oid(PROOF))
            if self.role_oid not in hidden_settings:
                # Before the settings: a transaction under them may be one that waits for the launcher's to end.
                present = inherited.custom_names.intersection(name for name, *_ in inherited.resets)
                hidden_settings[self.role_oid] = self.cleaning.count_hidden_settings() - len(present)
        else:
            self.cleaning = Cleaning(self._server, self.connection, self.users)
        self.inherit(inherited)
        self.cleaning.hidden_settings = hidden_settings.get(self.role_oid, 0)

    def inherit(self, inherited: Inherited) -> None:
        """Set the launcher's current values."""
        assignment = self.adopt(inherited)
        if assignment:
            self.run(assignment)

    def adopt(self, inherited: Inherited) -> bytes:
        """As inherit, where the caller has the returned query run, unless it is empty."""
        assigned_before, self.inherited = bool(self.inherited.assign), inherited
        self.cleaning.adopt(inherited)
        return b"RESET ALL; " + inherited.assign if assigned_before else inherited.assign

    def _switch_block(self, inherited: Inherited, *, ends_refused: bool) -> bytes:
        """The DO block that becomes the role. Python's own literals carry the values, in plain ASCII.

        The code is sent compiled, which the worker would need 2 ms for. Its source is this extension's module `switch`.
        ends_refused: where it cannot, nobody waits for its error, and it must not stay as the login role.
        """
        role = f"{self.role_oid:d}, {self.is_superuser!r}"
        arguments = f"plpy, {role}, {_system_user(self._server)!a}, {inherited.resets!a}"
        lines = (
            "try:",
            *("    " + line for line in ONLY_THIS_PYTHON),
            "    from binascii import a2b_base64",
            "    from marshal import loads",
            "    scope = {}",
            f"    exec(loads(a2b_base64({_compiled_switch()!a})), scope)",
            f"    scope['become']({arguments.replace('$', chr(92) + 'x24')})",
            "except Exception as error:",
            "    plpy.fatal(str(error))" if ends_refused else "    raise",
            f"GD.setdefault({MEMORY!a}, {{}})['is_worker'] = True",
        )
        return b"DO LANGUAGE plpython3u $switch$" + "\n".join(lines).encode("ascii") + b"$switch$"

    def verify(self) -> None:
        """Prove that the session's user is the role, and that nothing leads back to another."""
        self.run(_FORGET_ROLES + _FORGET_IDLE_TIMEOUT)
        row = self.run(b"SELECT " + _WHO_AM_I)
        self.users = [self._server.decode(row.get_value(0, column) or b"") for column in range(row.nfields)]
        role = self._server.role(self.role_oid)
        if role is not None and role.is_superuser is not self.is_superuser:
            raise background_error(
                OBJECT_NOT_IN_PREREQUISITE_STATE,
                "the role of the background worker has just become a superuser, or ceased to be one",
                hint="Launch it again.",
            )
        if role is None or self.users != [role.name, role.name, "on" if role.is_superuser else "off"]:
            raise background_error(
                INTERNAL_ERROR,
                "the background worker did not become the launching role",
                detail=f"It says of its users and power: {self.users!r}; expected was {role!r}.",
                hint="If the role was renamed in a transaction that is still open, commit. Otherwise please report"
                " this with the server's version.",
            )

    # --- between two jobs ---

    @property
    def is_still_its_role(self) -> bool:
        """Whether the role has the power that it had: the server keeps a session's right to become anybody."""
        if not self.is_superuser:
            return True
        role = self._server.role(self.role_oid)
        return role is not None and role.is_superuser

    def has_room_for(self, clean_up: CleanUp) -> bool:
        """Whether its few kilobytes can be written at once."""
        return len(clean_up.packet) <= AT_ONCE_BYTES and self._server.is_ready(self.connection.socket, WRITABLE)

    def queue_clean_up(self, clean_up: CleanUp, *, libpq_waits: bool) -> None:
        """Send it behind a job whose answer the supervisor reads; libpq_waits: libpq was told of that job."""
        self._out_of_step = libpq_waits
        self.write(clean_up.packet, lambda _: None)

    def resynchronize(self, reports: wire.Reports) -> bool:
        """Whether libpq can be used: it waits for an answer that the supervisor has read, and gets another one.

        libpq cannot be told that a query is over. So it reads an empty query's answer. reports: of what else it must
        be told.
        """
        if self._out_of_step and libpq_feed.has_read(self.connection, [wire.EMPTY_ANSWER]):
            self._out_of_step = False
        return not self._out_of_step and libpq_feed.has_heard(self.connection, reports)

    # --- traffic ---

    def run(self, sql: bytes) -> PGresult:
        """Run a query of the set-up and wait for its last result; its error becomes ours."""
        self._send(sql)
        self._server.spin_until_readable(self.connection.socket)
        return self._last_result()

    def _send(self, sql: bytes) -> None:
        try:
            self.connection.send_query(sql)
            self.flush()
        except Exception as error:
            report = self.loss(error)
            if report is None:
                raise
            raise BackgroundError(report) from error

    def loss(self, error: Exception) -> Report | None:
        """08006 if the connection is gone, of which libpq's error tells; None for any other error.

        That is a psycopg.OperationalError, which cannot be imported before psycopg is.
        """
        gone = self.connection.status != _CONNECTION_OK
        return backend_died(self.pid, str(error).strip()) if gone else None

    def _last_result(self) -> PGresult:
        last: PGresult | None = None
        while True:
            while self.connection.is_busy():
                self._server.wait_for(((self.connection.socket, READABLE),), None)
                if not self._take_in():
                    break
            result = self.connection.get_result()
            if result is None:
                break
            if last is None or last.status in _RESULT_OK:
                last = result
        if last is None or last.status not in _RESULT_OK:
            report = backend_died(self.pid) if last is None else report_of(last, self._server, self.pid)
            message = without_python(report.message)
            raise BackgroundError(replace(report, message=message, context=None, worker_pid=None))
        return last

    def _take_in(self) -> bool:
        """Read what has arrived; False when the backend is gone: its last words are a result then."""
        try:
            self.connection.consume_input()
        except Exception:  # psycopg.OperationalError
            if self.connection.status == _CONNECTION_OK:
                raise
            return False
        return True

    def flush(self, before_waiting: Callable[[bool], None] | None = None) -> None:
        """Send all that is queued, reading meanwhile so that neither side waits for the other.

        before_waiting(True) when not all fits at once, before_waiting(False) after that.
        """
        if not self.connection.flush():
            return
        if before_waiting is not None:
            before_waiting(True)
        while self.connection.flush():
            ready = self._server.wait_for(((self.connection.socket, READABLE | WRITABLE),), None)
            if ready:
                self.connection.consume_input()
        if before_waiting is not None:
            before_waiting(False)

    def write(self, packet: bytes, before_waiting: Callable[[bool], None]) -> None:
        """Send messages past libpq, which stays idle; before_waiting(True) when not all fits at once."""
        sent = write_some(self.connection, packet, self.pid)
        if sent == len(packet):
            return
        before_waiting(True)
        while sent < len(packet):
            self._server.wait_for(((self.connection.socket, WRITABLE),), None)
            sent += write_some(self.connection, packet[sent : sent + AT_ONCE_BYTES], self.pid)
        before_waiting(False)

    def abandon(self) -> None:
        """Leave the connection to the supervisor, which has a duplicate: libpq would tell the server of its end."""
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nowhere, self.connection.socket, inheritable=False)
        os.close(nowhere)
        self.close()

    def close(self) -> None:
        """End the connection. What is under way goes on to its end unless it has much to say."""
        self.closed = True
        self.connection.finish()


@cache
def _compiled_switch() -> bytes:
    loader = switch.__spec__.loader if switch.__spec__ else None
    code = loader.get_code(switch.__name__)  # type: ignore[union-attr]
    return binascii.b2a_base64(marshal.dumps(code), newline=False)


def _system_user(server: Server) -> tuple[bytes, bytes] | None:
    """(method, identity) for SYSTEM_USER in the worker: the launcher's own; None where that is NULL."""
    shown = server.query("SELECT SYSTEM_USER AS name")[0]["name"] if server.major >= 16 else None
    if shown is None:
        return None
    method, _, identity = shown.partition(":")
    return method.encode(), server.encode(identity)
