"""A worker session: a loopback connection that has become the launching role."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Optional

from . import switch
from .errors import CONNECTION_FAILURE, INTERNAL_ERROR, BackgroundError, Report, background_error
from .inheritance import Inheritance, Inherited
from .loopback import Loopback
from .server import READABLE, WRITABLE, Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

_RESULT_OK = (1, 2)  # ExecStatus.COMMAND_OK, TUPLES_OK

# Fields of the protocol's ErrorResponse and NoticeResponse.
_FIELD_CODES = {
    "sqlstate": ord("C"),
    "message": ord("M"),
    "detail": ord("D"),
    "hint": ord("H"),
    "context": ord("W"),
    "schema_name": ord("s"),
    "table_name": ord("t"),
    "column_name": ord("c"),
    "datatype_name": ord("d"),
    "constraint_name": ord("n"),
    "severity": ord("V"),
}

# In a query of its own: only what is committed proves anything.
_FORGET_ROLES = b"RESET ROLE; RESET SESSION AUTHORIZATION"
_WHO_AM_I = (
    b"SELECT pg_catalog.quote_ident(CURRENT_USER)::pg_catalog.regrole::pg_catalog.oid,"
    b" pg_catalog.quote_ident(SESSION_USER)::pg_catalog.regrole::pg_catalog.oid,"
    b" pg_catalog.current_setting('is_superuser'),"
    b" (SELECT CASE WHEN r.rolsuper THEN 'on' ELSE 'off' END FROM pg_catalog.pg_roles r"
    b"  WHERE r.rolname OPERATOR(pg_catalog.=) CURRENT_USER)"
)


def report_of(result: PGresult, server: Server, worker_pid: Optional[int] = None) -> Report:
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
    return Report(worker_pid=worker_pid, **{"message": "", **fields})  # type: ignore[arg-type]


def backend_died(worker_pid: Optional[int], detail: Optional[str] = None) -> Report:
    """08006: the worker's backend is gone."""
    return Report(
        CONNECTION_FAILURE,
        f"the backend of the background worker with PID {worker_pid} ended unexpectedly",
        detail=detail or None,
        hint="The server log may tell why: look for that PID.",
    )


class WorkerSession:
    """A connection whose authenticated, session and current user are the role role_oid."""

    def __init__(self, server: Server, connection: PGconn, role_oid: int) -> None:
        self._server = server
        self.connection = connection
        self.role_oid = role_oid
        self.pid = connection.backend_pid
        self.pidfd = _pidfd_open(self.pid)

    @classmethod
    def start(cls, server: Server, loopback: Loopback, inheritance: Inheritance, role_oid: int) -> WorkerSession:
        """Log in, become the role, prove it, and set what it inherits."""
        guc_state = server.guc_state()
        refused: Optional[BackgroundError] = None
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
            try:
                session._set_up(inherited, same_role=login.oid == role_oid)
            except BaseException:
                session.close()
                raise
            return session
        assert refused is not None
        raise refused

    def _set_up(self, inherited: Inherited, *, same_role: bool) -> None:
        if not same_role:
            self.run(self._switch_block(inherited))
        self.verify()
        if inherited.assign:
            self.run(inherited.assign)

    def _switch_block(self, inherited: Inherited) -> bytes:
        """The DO block that becomes the role. Python's own literals carry the values, in plain ASCII."""
        arguments = f"plpy, {self.role_oid:d}, {_system_user(self._server)!a}, {inherited.resets!a}"
        body = _source_of_switch() + f"\nbecome({arguments.replace('$', chr(92) + 'x24')})\n"
        return b"DO LANGUAGE plpython3u $switch$" + body.encode("ascii") + b"$switch$"

    def verify(self) -> None:
        """Prove that the session's user is the role, and that nothing leads back to another."""
        self.run(_FORGET_ROLES)
        row = self.run(_WHO_AM_I)
        current, session, is_superuser, role_is_superuser = (row.get_value(0, column) for column in range(4))
        expected = str(self.role_oid).encode()
        if current != expected or session != expected or is_superuser != role_is_superuser:
            raise background_error(
                INTERNAL_ERROR,
                "the background worker did not become the launching role",
                detail=f"Its users are {current!r} and {session!r}, expected was {expected!r};"
                f" is_superuser is {is_superuser!r}.",
                hint="The worker was closed. Please report this with the server's version.",
            )

    def run(self, sql: bytes) -> PGresult:
        """Run a query of the set-up and wait for its last result; its error becomes ours."""
        self.connection.send_query(sql)
        self.flush()
        last: Optional[PGresult] = None
        while True:
            while self.connection.is_busy():
                self._server.wait_for(((self.connection.socket, READABLE),), None)
                self.connection.consume_input()
            result = self.connection.get_result()
            if result is None:
                break
            if last is None or last.status in _RESULT_OK:
                last = result
        if last is None or last.status not in _RESULT_OK:
            report = backend_died(self.pid) if last is None else report_of(last, self._server)
            raise BackgroundError(report)
        return last

    def flush(self) -> None:
        """Send all that is queued, reading meanwhile so that neither side waits for the other."""
        while self.connection.flush():
            ready = self._server.wait_for(((self.connection.socket, READABLE | WRITABLE),), None)
            if ready:
                self.connection.consume_input()

    def close(self) -> None:
        """End the connection. What is under way goes on to its end unless it has much to say."""
        self.connection.finish()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def _source_of_switch() -> str:
    loader = switch.__spec__.loader if switch.__spec__ else None
    source: Optional[str] = loader.get_source(switch.__name__)  # type: ignore[union-attr]
    assert source is not None
    return source


def _pidfd_open(pid: int) -> Optional[int]:
    """A descriptor of the process itself, so that a signal cannot reach another one; None before Linux 5.3."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _system_user(server: Server) -> tuple[bytes, bytes]:
    """(method, identity) for SYSTEM_USER in the worker: the launcher's own.

    Where the launcher has none (trust), the worker must not show the login's: a policy could build on it.
    """
    shown = server.query("SELECT SYSTEM_USER AS name")[0]["name"] if server.major >= 16 else None
    if shown is None:
        return b"pg_background", str(server.caller()).encode()
    method, _, identity = shown.partition(":")
    return method.encode(), server.encode(identity)
