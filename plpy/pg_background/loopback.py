"""Logs a worker session in over the server's own unix socket.

libpq comes with psycopg (psycopg.pq); it must not bind to a libpq that the server has loaded already, for
dblink, say, which may be years older.
"""

from __future__ import annotations

import csv
import ctypes
import os
import pwd
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import TYPE_CHECKING, NamedTuple

from .errors import INSUFFICIENT_RESOURCES, TOO_MANY_CONNECTIONS, UNABLE_TO_CONNECT, background_error
from .server import READABLE, WRITABLE, Server

if TYPE_CHECKING:
    from types import ModuleType

    from psycopg.pq.abc import PGconn

APPLICATION_NAME = "pg_background"
_CONNECT_TIMEOUT_S = 60
_DESCRIPTORS_TO_CONNECT = 3  # at most, at a time: the socket, and files that libpq reads
_MAX_PATH_BYTES = 1024
_LIBPQ_WITH_CHUNKS = 170000  # rows come in chunks from this version on


class Login(NamedTuple):
    """A role that this operating system user may be let in as."""

    oid: int
    name: str
    settings: tuple[bytes, ...]  # names of what ALTER ROLE and ALTER DATABASE set


def import_pq() -> ModuleType:
    """psycopg.pq, from beside the extension or from sys.path, bound to its own libpq."""
    folder = _bundled_folder()
    # First, because a release's own psycopg may be too old; afterwards last, out of the way of others' modules.
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
    try:
        from psycopg import pq
    except ImportError as error:
        raise background_error(
            "58P01",
            "the Python package psycopg is not installed for the server's Python",
            detail=f"{error}. Looked in {folder} and in sys.path.",
            hint='Run "python3 build.py install", which puts psycopg beside the extension.',
        ) from error
    finally:
        sys.setdlopenflags(flags)
        sys.path.append(sys.path.pop(0))
    if pq.version() < _LIBPQ_WITH_CHUNKS or not hasattr(pq.PGconn, "set_chunked_rows_mode"):
        raise background_error(
            "58P01",
            "psycopg or its libpq is too old for background workers",
            detail=f"This session has loaded {describe(pq)}. Needed are psycopg 3.2 and libpq 17.",
            hint='Run "python3 build.py install", which puts both beside the extension. A function that imports another'
            " psycopg must not come before the session's first background worker.",
        )
    return pq


def describe(pq: ModuleType) -> str:
    """Which psycopg and libpq these are, and where they come from."""
    psycopg = sys.modules["psycopg"]
    version = getattr(psycopg, "__version__", "of an unknown version")
    return f"psycopg {version} ({pq.__impl__}) with libpq {pq.version()}, from {psycopg.__file__}"


def _bundled_folder() -> str:
    """Where `build.py install` puts psycopg: SHAREDIR/pg_background/python3.X."""
    server = ctypes.PyDLL(None)
    executable = (ctypes.c_char * _MAX_PATH_BYTES).in_dll(server, "my_exec_path").value
    share = ctypes.create_string_buffer(_MAX_PATH_BYTES)
    server.get_share_path(executable, share)
    return os.path.join(os.fsdecode(share.value), "pg_background", "python%d.%d" % sys.version_info[:2])


class Loopback:
    """Connections from this backend to its own server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pq = import_pq()

    def logins(self) -> list[Login]:
        """The superusers to log in as, the likelier one first; never empty."""
        os_user = _os_user() or ""
        rows = self._server.query(
            "SELECT r.oid, r.rolname::pg_catalog.text AS name, ARRAY("
            "  SELECT pg_catalog.split_part(c.entry, '=', 1)"
            "  FROM pg_catalog.pg_db_role_setting s, pg_catalog.unnest(s.setconfig) AS c(entry)"
            "  WHERE (s.setrole OPERATOR(pg_catalog.=) 0::pg_catalog.oid OR s.setrole OPERATOR(pg_catalog.=) r.oid)"
            "  AND (s.setdatabase OPERATOR(pg_catalog.=) 0::pg_catalog.oid"
            "       OR s.setdatabase OPERATOR(pg_catalog.=) $2)) AS settings"
            " FROM pg_catalog.pg_roles r"
            " WHERE r.rolsuper AND r.rolcanlogin"
            " AND (r.rolname::pg_catalog.text OPERATOR(pg_catalog.=) $1"
            "      OR r.oid OPERATOR(pg_catalog.=) 10::pg_catalog.oid)"
            " ORDER BY (r.rolname::pg_catalog.text OPERATOR(pg_catalog.=) $1) DESC",
            ["pg_catalog.text", "pg_catalog.oid"],
            [os_user, self._server.database_oid],
        )
        if not rows:
            raise background_error(
                UNABLE_TO_CONNECT,
                "no superuser can log in for a background worker",
                detail=f'There is no superuser role "{os_user}" that can log in, nor can the bootstrap superuser.',
                hint=f"CREATE ROLE {_quote_name(os_user or 'postgres')} SUPERUSER LOGIN;",
            )
        return [
            Login(int(row["oid"]), row["name"], tuple(self._server.encode(name) for name in row["settings"]))
            for row in rows
        ]

    def connect(self, login: Login, options: bytes, application_name: str = APPLICATION_NAME) -> PGconn:
        """A connection as that role, not blocking. 08001 when the server does not let it in, 53300 when full."""
        if not self._server.has_free_slots(1):
            raise _too_many_connections()
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        conninfo = self._conninfo(login, options, application_name)
        with _without_variables():
            connection = self._pq.PGconn.connect_start(conninfo)
        try:
            self._finish_connecting(connection, deadline)
        except OSError as error:
            connection.finish()
            raise _out_of_descriptors() from error
        except BaseException:
            connection.finish()
            raise
        if connection.status != self._pq.ConnStatus.OK:
            message = self._server.decode(connection.error_message)
            connection.finish()
            raise self._refused(login, message.strip())
        connection.nonblocking = 1
        opened: PGconn = connection
        return opened

    def _finish_connecting(self, connection: PGconn, deadline: float) -> None:
        polling = self._pq.PollingStatus
        state = polling.WRITING
        while state not in (polling.OK, polling.FAILED):
            if connection.status == self._pq.ConnStatus.BAD:
                return
            events = WRITABLE if state == polling.WRITING else READABLE
            if not self._server.wait_for(((connection.socket, events),), deadline):
                raise background_error(
                    UNABLE_TO_CONNECT,
                    f"the server did not let a background worker in within {_CONNECT_TIMEOUT_S} s",
                    hint="Something may hold a lock on pg_authid or pg_database: see pg_locks.",
                )
            with _without_variables():
                state = connection.connect_poll()

    def _conninfo(self, login: Login, options: bytes, application_name: str) -> bytes:
        """What libpq's own defaults would not do; the server's environment gives it none."""
        parameters = {
            b"host": self._socket_folder(),
            b"port": self._server.required_setting("port").encode(),
            b"dbname": self._server.encode(self._database_name()),
            b"user": self._server.encode(login.name),
            b"options": options,
            b"application_name": application_name.encode(),
            b"client_encoding": self._server.encoding.encode(),
            b"passfile": b"/dev/null/none",  # libpq complains about /dev/null itself
        }
        os_user = _os_user()
        if os_user is not None:
            parameters[b"requirepeer"] = os.fsencode(os_user)
        return b" ".join(name + b"=" + _quote_parameter(value) for name, value in parameters.items())

    def _socket_folder(self) -> bytes:
        folders = self._server.required_setting("unix_socket_directories")
        for folder in next(csv.reader([folders], skipinitialspace=True), []):
            if folder.strip():
                return os.path.abspath(folder.strip()).encode() if folder[0] != "@" else folder.encode()
        raise background_error(
            UNABLE_TO_CONNECT,
            "a background worker cannot log in: the server has no unix socket",
            hint="Set unix_socket_directories and restart the server.",
        )

    def _database_name(self) -> str:
        return str(self._server.query("SELECT pg_catalog.current_database()::pg_catalog.text AS name")[0]["name"])

    def _refused(self, login: Login, message: str) -> Exception:
        if not self._server.has_free_slots(1):
            return _too_many_connections(message)
        if not _can_open(_DESCRIPTORS_TO_CONNECT):
            return _out_of_descriptors()
        return background_error(
            UNABLE_TO_CONNECT,
            f'a background worker could not log in as "{login.name}" over the unix socket',
            detail=f"The server answered: {message}",
            hint=_login_hint(login.name, _os_user()),
        )


@contextmanager
def _without_variables() -> Iterator[None]:
    """Hide the environment's PG* variables: libpq takes parameters of a login from them, and settings (PGTZ).

    For calls of libpq only, which read the environment and do not change it: the C library is shown another array of
    the same variables, and then the old one again. os.environ would not do: it was read when Python started.
    """
    environ = ctypes.c_void_p.in_dll(ctypes.PyDLL(None), "environ")
    before = environ.value
    all_variables = ctypes.cast(before, ctypes.POINTER(ctypes.c_void_p)) if before else [None]
    variables = takewhile(bool, map(all_variables.__getitem__, count()))
    shown = [variable for variable in variables if not ctypes.string_at(variable or 0).startswith(b"PG")]
    array = (ctypes.c_void_p * (len(shown) + 1))(*shown)  # with a NULL at its end
    try:
        environ.value = ctypes.addressof(array)
        yield
    finally:
        environ.value = before


def _os_user() -> str | None:
    """Name of the operating system user that the server runs as; None for a uid without a name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


def _login_hint(role: str, os_user: str | None) -> str:
    """What to do where pg_hba.conf does not let that role in."""
    if os_user is None:
        return (
            f'If pg_hba.conf refuses it, add "local all {_quote_name(role)} trust" to its top: the server\'s'
            " operating system user has no name. Then run SELECT pg_reload_conf()."
        )
    line = f'add "local all {_quote_name(os_user)} peer" to its top, then run SELECT pg_reload_conf().'
    if os_user == role:
        return "If pg_hba.conf refuses it, " + line
    return f"If pg_hba.conf refuses it, CREATE ROLE {_quote_name(os_user)} SUPERUSER LOGIN, {line}"


def _quote_name(name: str) -> str:
    """A role's name, as SQL and pg_hba.conf both take it."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def _quote_parameter(value: bytes) -> bytes:
    return b"'" + value.replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"


def _too_many_connections(message: str | None = None) -> Exception:
    return background_error(
        TOO_MANY_CONNECTIONS,
        "no connection is left for a background worker",
        detail=message,
        hint="Raise max_connections, lower pg_background.max_workers, or set pg_background.launch_timeout to wait.",
    )


def _can_open(count: int) -> bool:
    """Whether this process may open so many files; libpq does not tell why it could not connect."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 - to be closed
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True


def _out_of_descriptors() -> Exception:
    return background_error(
        INSUFFICIENT_RESOURCES,
        "out of file descriptors for another background worker",
        hint="Release workers, or raise the server's limit on open files (ulimit -n, LimitNOFILE).",
    )
