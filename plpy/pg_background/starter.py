"""Starts a database's supervisor, from a session that needs it and finds none."""

from __future__ import annotations

import binascii
import fcntl
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from . import messages
from .bootstrap import ONLY_THIS_PYTHON
from .errors import BackgroundError, background_error
from .inheritance import startup_options
from .loopback import Loopback
from .server import READABLE, WRITABLE, Server
from .session import report_of, without_python

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

    from .bootstrap import Module

ROLE = "pgbackground_supervisor"
APPLICATION_NAME = "pg_background supervisor"
_START_ANEW = ("55P03", "57014", "57P01", "08006")  # another one serves, or this one was cancelled or terminated
_CONNECTION_OK = 0
_MODULES = (
    "__init__",
    "after_commit",
    "answers",
    "bootstrap",
    "deferral",
    "jobs",
    "ledger",
    "messages",
    "outcomes",
    "process",
    "progress",
    "questions",
    "reports",
    "sockets",
    "stops",
    "store",
    "supervised",
    "supervisor",
    "supervisor_main",
    "switch",
    "wire",
)
# What an owner of the database could bend, and what must not end or slow the supervisor.
_OPTIONS = {
    b"role": b"none",
    b"search_path": b"pg_catalog",
    b"statement_timeout": b"0",
    b"lock_timeout": b"100ms",  # whoever locks its table must not stop it for long
    b"idle_in_transaction_session_timeout": b"0",
    b"idle_session_timeout": b"0",
    b"client_connection_check_interval": b"0",
    b"client_min_messages": b"notice",
    b"default_transaction_isolation": b"read committed",
    b"default_transaction_read_only": b"off",
    b"default_transaction_deferrable": b"off",
    b"synchronous_commit": b"off",
    b"exit_on_error": b"off",
    b"local_preload_libraries": b"",
    b"jit": b"off",
    b"max_parallel_workers_per_gather": b"0",  # the end of a parallel worker would wake it for the next one
    b"log_min_error_statement": b"panic",  # its statement is all its modules
}


class Start(NamedTuple):
    """A supervisor that is being started: its connection, the lock that keeps others from it, its notices."""

    connection: PGconn
    lock: int
    notices: list[str]

    def close(self) -> None:
        """Leave it to itself."""
        self.connection.finish()
        os.close(self.lock)


class Starter:
    """Sends a new backend the supervisor's program."""

    def __init__(
        self, server: Server, loopback: Callable[[], Loopback], digest: str, read_module: Callable[[str], Module]
    ) -> None:
        self._server = server
        self._loopback = loopback
        self.digest = digest  # of all sources: a supervisor of others makes room
        self._read_module = read_module
        self.path = messages.socket_path(server.database_oid)

    def begin(self) -> Start | None:
        """Send a new supervisor its program; None while another session starts one."""
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        lock = os.open(self.path + ".start", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(lock) or self._is_served():
                os.close(lock)
                return None
            loopback = self._loopback()
            connection = loopback.connect(loopback.logins()[0], startup_options(self._options()), APPLICATION_NAME)
        except BaseException:
            os.close(lock)
            raise
        start = Start(connection, lock, [])
        try:
            connection.notice_handler = lambda notice: start.notices.append(report_of(notice, self._server).message)
            connection.send_query(self._program())
            while connection.flush():
                self._server.wait_for(((connection.socket, READABLE | WRITABLE),), None)
                connection.consume_input()
        except BaseException as error:
            gone = isinstance(error, Exception) and connection.status != _CONNECTION_OK
            start.close()
            if gone:
                return None  # it was terminated at once
            raise
        return start

    def _is_served(self) -> bool:
        """Whether a supervisor listens: another session may have started one a moment ago."""
        with messages.control_socket() as probe:
            try:
                probe.connect(self.path)
            except OSError:
                return False
            return True

    def finish(self, start: Start, deadline: float) -> bool:
        """True when the new supervisor listens; False when another one serves, or at the deadline."""
        connection = start.connection
        try:
            while not start.notices:
                if not self._server.wait_for_one(connection.socket, deadline):
                    return False
                connection.consume_input()
                if connection.is_busy():
                    continue
                result = connection.get_result()
                if result is None:
                    return False
                report = report_of(result, self._server)
                if report.sqlstate in _START_ANEW:
                    return False
                raise background_error(
                    report.sqlstate,
                    "the supervisor of background workers could not start",
                    detail=without_python(report.message),
                    hint=report.hint
                    or "See the server log. If the transaction of CREATE EXTENSION is still open, commit it.",
                )
            return True
        except BackgroundError:
            raise
        except Exception:  # psycopg.OperationalError: not importable before psycopg is
            if connection.status == _CONNECTION_OK:
                raise
            return False  # it was terminated at once
        finally:
            start.close()

    def _options(self) -> dict[bytes, bytes]:
        return {**_OPTIONS, b"transaction_timeout": b"0"} if self._server.major >= 17 else _OPTIONS

    def _program(self) -> bytes:
        """A DO block that brings its modules along: nothing is called by a name that could be planted."""
        role_oid = self._role_oid()
        codes = {module: binascii.b2a_base64(self._read_module(module).code(), newline=False) for module in _MODULES}
        body = (
            "".join(line + "\n" for line in ONLY_THIS_PYTHON) + "from binascii import a2b_base64\n"
            "from marshal import loads\n"
            f"codes = {codes!a}\n"
            "scope = {'__name__': 'pg_background.bootstrap'}\n"
            "exec(loads(a2b_base64(codes['bootstrap'])), scope)\n"
            "scope['install_importer'](lambda name: a2b_base64(codes[name]))\n"
            "from pg_background import supervisor_main\n"
            f"supervisor_main.main(plpy, {role_oid}, {self._server.database_oid}, {self.digest!a})\n"
        ).replace("$", "\\x24")
        return b"/* pg_background supervisor */ DO LANGUAGE plpython3u $supervisor$\n" + body.encode() + b"$supervisor$"

    def _role_oid(self) -> int:
        found = self._server.query(
            "SELECT r.oid, r.rolsuper FROM pg_catalog.pg_roles r"
            f" WHERE r.rolname::pg_catalog.text OPERATOR(pg_catalog.=) '{ROLE}'"
        )
        if not found or found[0]["rolsuper"]:
            raise background_error(
                "42704",
                f'the role "{ROLE}" does not exist, or is a superuser',
                hint=f"CREATE ROLE {ROLE} NOLOGIN; and GRANT it what CREATE EXTENSION pg_background granted,"
                " or create the extension anew.",
            )
        return int(found[0]["oid"])


def _lock(descriptor: int) -> bool:
    """Whether this session may start a supervisor; False while another one does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
