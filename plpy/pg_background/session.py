"""A worker session: a loopback connection that has become the launching role."""

from __future__ import annotations

import binascii
import marshal
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from . import settings, switch, wire
from .bootstrap import MEMORY, ONLY_THIS_PYTHON
from .errors import (
    CONNECTION_FAILURE,
    INTERNAL_ERROR,
    OBJECT_NOT_IN_PREREQUISITE_STATE,
    BackgroundError,
    Report,
    background_error,
)
from .inheritance import Inheritance, Inherited
from .loopback import Loopback
from .process import process_start
from .server import READABLE, WRITABLE, Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

_WRITE_BYTES = 1 << 16
SURELY_WRITTEN_BYTES = _WRITE_BYTES  # at once, to a worker at rest: what a unix socket holds is three times that
_IDLE = 0  # TransactionStatus.IDLE
_RESULT_OK = (1, 2)  # ExecStatus.COMMAND_OK, TUPLES_OK
_CONNECTION_OK = 0  # ConnStatus.OK

_FED_BYTES = 1 << 13
_CLEAN_UP_S = 1.0  # then another session is taken

# What PL/Python puts before the message of an error in the switch, a cancel's for example.
_PYTHON_ERROR = re.compile(r"^(?:plpy|spiexceptions)\.\w+: ")

_FIELD_CODES = {**wire.FIELD_CODES, "severity": ord("V")}

_PROOF = "_pg_background_proof"
# In a query of its own, between whose end and the job nothing runs: only what is committed proves anything.
_FORGET_ROLES = b"RESET ROLE; RESET SESSION AUTHORIZATION"
_FORGET_IDLE_TIMEOUT = b"; RESET idle_session_timeout"  # of one that was begun ahead
_WHO_AM_I = b"CURRENT_USER, SESSION_USER, pg_catalog.current_setting('is_superuser')"
# After a job. All settings of this extension have values where it was used to launch: then a fresh session takes its
# place, as no query can make a launcher forget its workers. (Where they all are configured, none is kept.)
_WHO_AM_I_STILL = (
    b"CURRENT_USER, SESSION_USER, CASE WHEN pg_catalog.num_nulls(%s)"
    % b", ".join([b"pg_catalog.current_setting('%s', true)" % definition.name.encode() for definition in settings.ALL])
    + b" OPERATOR(pg_catalog.=) 0 THEN 'launcher' ELSE pg_catalog.current_setting('is_superuser') END"
)


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


def backend_died(worker_pid: int | None, detail: str | None = None) -> Report:
    """08006: the worker's backend is gone."""
    return Report(
        CONNECTION_FAILURE,
        f"the backend of the background worker with PID {worker_pid} ended unexpectedly",
        detail=detail or None,
        hint="The server log may tell why: look for that PID.",
    )


class CleanUp(NamedTuple):
    """What makes a session as a fresh one."""

    idle_timeout_ms: int
    packet: bytes
    answers: int  # their number; the last one proves whose the session is


_NO_CLEAN_UP = CleanUp(-1, b"", 0)


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
        self.users: list[str] = []
        self._is_superuser = False  # when it began: whether it has the right to become anybody
        self.is_switched = False  # from another role: so Python runs in the worker already, which counts placeholders
        self._hidden_settings = 0  # how many it counts at least
        self._custom_names: frozenset[bytes] = frozenset()
        self._clean_up = _NO_CLEAN_UP  # the latest
        self._proof_oid = 0
        self._proven_answer = b""
        self._answers_awaited = 0
        self._first_answer: bytes | None = None  # of the clean-up: what has been read already
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
            session._is_superuser = role is not None and role.is_superuser
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
            self._proof_oid = self._server.member_oid(_PROOF)
            if self.role_oid not in hidden_settings:
                # Before the settings: a transaction under them may be one that waits for the launcher's to end.
                present = inherited.custom_names.intersection(name for name, *_ in inherited.resets)
                hidden_settings[self.role_oid] = self._count_hidden_settings() - len(present)
        self.inherit(inherited)
        self._hidden_settings = hidden_settings.get(self.role_oid, 0)

    def _count_hidden_settings(self) -> int:
        """What the proof of this session, which no job has used, says of it."""
        self._write_some(wire.call_message(self._proof_oid, b"0"))
        self._answers_awaited = 1
        unread, answer = b"", wire.Answer()
        while self._answers_awaited:
            received = self._read_some(None)
            if not received:
                raise BackgroundError(backend_died(self.pid))
            unread, answer = self._take_answers(unread + received, answer)
        error = wire.error_fields(answer.error or b"")
        if error or answer.row is None:
            sqlstate, message = (self._server.decode(error.get(name, b"")) for name in ("sqlstate", "message"))
            raise BackgroundError(Report(sqlstate or INTERNAL_ERROR, message))
        return int(wire.row_values(answer.row)[-1] or 0)

    def inherit(self, inherited: Inherited) -> None:
        """Set the launcher's current values."""
        assignment = self.adopt(inherited)
        if assignment:
            self.run(assignment)

    def adopt(self, inherited: Inherited) -> bytes:
        """As inherit, where the caller has the returned query run, unless it is empty."""
        assigned_before, self.inherited = bool(self.inherited.assign), inherited
        self._custom_names |= inherited.custom_names
        self._clean_up, self._proven_answer = _NO_CLEAN_UP, b""
        return b"RESET ALL; " + inherited.assign if assigned_before else inherited.assign

    def _switch_block(self, inherited: Inherited, *, ends_refused: bool) -> bytes:
        """The DO block that becomes the role. Python's own literals carry the values, in plain ASCII.

        The code is sent compiled, which the worker would need 2 ms for. Its source is this extension's module `switch`.
        ends_refused: where it cannot, nobody waits for its error, and it must not stay as the login role.
        """
        role = f"{self.role_oid:d}, {self._is_superuser!r}"
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
        if role is not None and role.is_superuser is not self._is_superuser:
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

    def is_clean(self, row: Sequence[str | None]) -> bool:
        """Whether the clean-up's last answer proves that this is still the role's, and counts no new placeholder."""
        proof, most = self.proof, self._hidden_settings + len(self._custom_names)
        counted = row[len(proof) :]
        is_proven = bool(proof) and list(row[: len(proof)]) == proof and len(counted) == self.is_switched
        return is_proven and all(int(number or 0) <= most for number in counted)

    @property
    def proof(self) -> list[str]:
        """What the last answer to a clean-up must start with."""
        if not self.is_switched:
            return self.users
        return [*[str(self.role_oid)] * 3, "on" if self._is_superuser else "off"]

    # --- between two jobs ---

    @property
    def is_still_its_role(self) -> bool:
        """Whether the role has the power that it had: the server keeps a session's right to become anybody."""
        if not self._is_superuser:
            return True
        role = self._server.role(self.role_oid)
        return role is not None and role.is_superuser

    @property
    def is_idle(self) -> bool:
        """Whether the connection lives and is outside of a transaction."""
        return self.connection.transaction_status == _IDLE

    def clean_up(self, idle_timeout_ms: int) -> CleanUp:
        """What makes this session as a fresh one, that ends itself when it was idle for so long.

        Where Python runs in it already, the proof is asked of a function by its oid: what has its name by now may be
        anybody's, and a call takes half of a query's time.
        """
        if self._clean_up.idle_timeout_ms != idle_timeout_ms:
            assign, parts = self.inherited.assign, [wire.query_message(b"DISCARD ALL")]
            if self.is_switched:
                parts += [wire.query_message(assign)] if assign else []
                parts.append(wire.call_message(self._proof_oid, b"%d" % idle_timeout_ms))
            else:
                timeout = b"SET idle_session_timeout = %d; " % idle_timeout_ms
                assignment = assign + b"; " if assign else b""
                parts.append(wire.query_message(timeout + assignment + b"SELECT " + _WHO_AM_I_STILL))
            self._clean_up = CleanUp(idle_timeout_ms, b"".join(parts), len(parts))
        return self._clean_up

    def send_clean_up(self, idle_timeout_ms: int) -> None:
        """Send it past libpq; finish_clean_up reads the answers when the session is wanted again."""
        clean_up = self.clean_up(idle_timeout_ms)
        if self._write_some(clean_up.packet) != len(clean_up.packet):
            raise BackgroundError(backend_died(self.pid))
        self._answers_awaited = clean_up.answers

    def has_room_for(self, clean_up: CleanUp) -> bool:
        """Whether its few kilobytes can be written at once."""
        return len(clean_up.packet) <= _WRITE_BYTES and self._server.is_ready(self.connection.socket, WRITABLE)

    def queue_clean_up(self, clean_up: CleanUp) -> None:
        """Send it behind a job whose answer the supervisor reads, not libpq."""
        self._out_of_step = True
        self.write(clean_up.packet, lambda _: None)

    def resynchronize(self, reports: wire.Reports) -> bool:
        """Whether libpq can be used: it waits for an answer that the supervisor has read, and gets another one.

        libpq cannot be told that a query is over. So it reads an empty query's answer. reports: of what else it must
        be told.
        """
        if self._out_of_step and self._has_libpq_read([wire.EMPTY_ANSWER]):
            self._out_of_step = False
        return not self._out_of_step and self._has_libpq_heard(reports)

    def _has_libpq_heard(self, reports: wire.Reports) -> bool:
        """Tell libpq what has become of settings, as another has read; whether it knows that now."""
        untold = {name: value for name, value in reports.items() if self._reported(name) != value}
        packets = [wire.report_message(name, value) for name, value in untold.items() if value is not None]
        told = not packets or self._has_libpq_read(packets)
        return told and all(self._reported(name) == value for name, value in untold.items())

    def _reported(self, name: str) -> str:
        return (self.connection.parameter_status(name.encode("latin-1")) or b"").decode("latin-1")

    def _has_libpq_read(self, packets: Sequence[bytes]) -> bool:
        """Have libpq take messages in that did not come from the worker, and be idle then.

        It reads them from another socket, which takes the connection's place for that moment.
        """
        descriptor = self.connection.socket
        try:
            here, there = socket.socketpair()
            with here, there:
                here.setblocking(False)
                there.setblocking(False)
                kept = os.dup(descriptor)
                try:
                    os.dup2(there.fileno(), descriptor, inheritable=False)
                    for packet in packets:
                        self._feed(here, packet)
                finally:
                    os.dup2(kept, descriptor, inheritable=False)
                    os.close(kept)
                    if self.connection.status != _CONNECTION_OK:
                        os.close(descriptor)  # libpq has closed the one that had its number
        except Exception:  # noqa: BLE001 - no descriptor is left (OSError), libpq gave it up (psycopg.OperationalError)
            return False
        return self.is_idle

    def _feed(self, source: socket.socket, packet: bytes) -> None:
        for start in range(0, len(packet), _FED_BYTES):  # so many libpq reads at once
            source.sendall(packet[start : start + _FED_BYTES])
            self.connection.consume_input()
            is_busy = self.connection.is_busy()
        while not is_busy and self.connection.get_result() is not None:
            is_busy = self.connection.is_busy()

    @property
    def is_clean_up_done(self) -> bool:
        """Whether finish_clean_up would not have to wait, as far as can be seen."""
        if self._answers_awaited and self._first_answer is None:
            self._first_answer = self._read_what_is_there()
        return not self._answers_awaited or self._first_answer is not None

    def finish_clean_up(self) -> bool:
        """Whether the session may be used again. Seldom waits: the answers have come long ago.

        One that does not answer is given up: what cleans it takes a snapshot, which may have to wait for the very
        transaction that waits here (default_transaction_deferrable).
        """
        deadline = time.monotonic() + _CLEAN_UP_S
        if not self._answers_awaited:
            return not self._server.is_readable(self.connection.socket)
        all_read, unread, answer = b"", b"", wire.Answer()
        while self._answers_awaited:
            received, self._first_answer = self._first_answer, None
            if received is None:
                received = self._read_some(deadline)
            if not received:
                return False
            all_read += received
            if all_read == self._proven_answer:
                self._answers_awaited = 0
                return True
            unread, answer = self._take_answers(unread + received, answer)
            if answer.error:
                return False
        clean = not unread and self._is_clean_answer(answer)
        reports = wire.reports_in(all_read)
        self._proven_answer = all_read if clean and not reports else b""
        return clean and self._has_libpq_heard(reports)

    def _read_some(self, deadline: float | None) -> bytes:
        """What the worker has sent past libpq; empty when the connection has ended, or at the deadline."""
        while True:
            received = self._read_what_is_there()
            if received is not None:
                return received
            if not self._server.wait_for_one(self.connection.socket, deadline):
                return b""

    def _read_what_is_there(self) -> bytes | None:
        """The same, without waiting: None where nothing has come yet."""
        try:
            return os.read(self.connection.socket, _WRITE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _take_answers(self, window: bytes, answer: wire.Answer) -> tuple[bytes, wire.Answer]:
        """What is left of the window, and the last answer in it."""
        while window and self._answers_awaited:
            position = wire.parse(window, answer)
            if not answer.complete:
                break
            window = window[position.consumed :]
            self._answers_awaited -= 1
            if self._answers_awaited and not answer.error:
                answer = wire.Answer()
        return window, answer

    def _is_clean_answer(self, answer: wire.Answer) -> bool:
        values = wire.row_values(answer.row) if answer.row else []
        return self.is_clean([self._server.decode(value or b"") for value in values])

    # --- traffic ---

    def run(self, sql: bytes) -> PGresult:
        """Run a query of the set-up and wait for its last result; its error becomes ours."""
        self._send(sql)
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
        sent = self._write_some(packet)
        if sent == len(packet):
            return
        before_waiting(True)
        while sent < len(packet):
            self._server.wait_for(((self.connection.socket, WRITABLE),), None)
            sent += self._write_some(packet[sent : sent + _WRITE_BYTES])
        before_waiting(False)

    def _write_some(self, packet: bytes) -> int:
        try:
            return os.write(self.connection.socket, packet)
        except BlockingIOError:
            return 0
        except ConnectionError as error:
            raise BackgroundError(backend_died(self.pid, error.strerror)) from error

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
