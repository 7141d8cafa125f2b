"""Scratch servers for the test-suite, and what tests need to talk to them.

A `Cluster` is one PostgreSQL server: started here through pytest-postgresql's executor, or a running
one that the suite was pointed at. A `Session` is one connection to it. The helpers `wait_until`,
`sqlstate` and `server_log` are for tests to import; the fixtures are in conftest.py.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import psycopg
import pytest
from mirakuru.exceptions import ProcessExitedWithError
from port_for import get_port
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import tuple_row
from pytest_postgresql.executor import PostgreSQLExecutor

EXTENSIONS = ("plpython3u", "pg_background")
WORKER_NAME = "pg_background"
SUPERVISOR_NAME = "pg_background supervisor"

_T = TypeVar("_T")
_SOCKET_DIR_MAX = 80  # a socket's path must stay below 107 bytes, its name included
PORTS = (20000, 32000)  # below the range from which the kernel gives clients their ports
_START_ATTEMPTS = 3
_STOP_SECONDS = "20"
_DROP_DATABASE_SECONDS = 10
_LEAK_SECONDS = 5
_CRASH = re.compile(r"was terminated by signal|PANIC:|TRAP:")
_SERVER_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "max_prepared_transactions": "10",
    "shared_buffers": "32MB",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
}


# --- where the server's programs are --------------------------------------------------------------


def _ask_pg_config(pg_config: Path, what: str) -> Path:
    return Path(subprocess.check_output([str(pg_config), what], text=True).strip())


def _major_version(pg_config: Path) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", pg_config.parent.parent.name))


def find_pg_config() -> Path:
    """The pg_config of the server to test: $PG_CONFIG, or the newest installed one with PL/Python.

    Raises LookupError, with what to do, where there is none.
    """
    named = os.environ.get("PG_CONFIG")
    found = [Path(shutil.which(named) or named)] if named else []
    if not named:
        installed = Path("/usr/lib/postgresql").glob("*/bin/pg_config")
        found = sorted(installed, key=_major_version, reverse=True)
    for pg_config in found:
        if pg_config.exists() and (_ask_pg_config(pg_config, "--pkglibdir") / "plpython3.so").exists():
            return pg_config
    tried = ", ".join(map(str, found)) or "nothing below /usr/lib/postgresql"
    raise LookupError(
        f"no PostgreSQL server with PL/Python found (looked at: {tried}); run make bootstrap, or set PG_CONFIG"
    )


# --- connections ----------------------------------------------------------------------------------


class Role(str):
    """The name of a role that a test created, with its password. A str: usable wherever a name is."""

    password: str

    def __new__(cls, name: str, password: str) -> Role:
        role = super().__new__(cls, name)
        role.password = password
        return role


class Notice(NamedTuple):
    """A notice, copied: psycopg's own record is emptied once its handler returns."""

    severity: str | None
    sqlstate: str | None
    message: str | None
    detail: str | None
    hint: str | None
    context: str | None

    @classmethod
    def copy(cls, diag: psycopg.errors.Diagnostic) -> Notice:
        """The fields of what a notice handler is given."""
        return cls(
            diag.severity_nonlocalized,
            diag.sqlstate,
            diag.message_primary,
            diag.message_detail,
            diag.message_hint,
            diag.context,
        )


class Session(psycopg.Connection[Any]):
    """A psycopg connection that keeps the notices it was sent, in `notices`."""

    def __init__(self, pgconn: psycopg.pq.abc.PGconn, row_factory: Any = tuple_row) -> None:
        super().__init__(pgconn, row_factory)
        self.notices: list[Notice] = []
        self.add_notice_handler(lambda diag: self.notices.append(Notice.copy(diag)))

    @property
    def pid(self) -> int:
        """Process id of the server's backend."""
        return self.info.backend_pid

    def rows(self, query: Any, params: Any = None) -> list[Any]:
        """All rows of a query."""
        return self.execute(query, params).fetchall()

    def value(self, query: Any, params: Any = None) -> Any:
        """The first column of a query's only row; fails where there is not exactly one row."""
        rows = self.rows(query, params)
        assert len(rows) == 1, f"expected one row, got {len(rows)}: {query}"
        return rows[0][0]

    def messages(self) -> list[str]:
        """The notices so far, as "SEVERITY: text", in order."""
        return [f"{notice.severity}: {notice.message}" for notice in self.notices]


# --- set-ups --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How a server lets its clients in."""

    name: str
    hba: tuple[str, ...]
    listen_addresses: str = "127.0.0.1"
    superuser: str = field(default_factory=lambda: pwd.getpwuid(os.geteuid()).pw_name)
    roles_use_tcp: bool = False


_TRUST_SOCKET = "local all all trust"
_TRUST_REPLICATION = "local replication all trust"
_TRUST_TCP = ("host all all 127.0.0.1/32 trust", "host all all ::1/128 trust")


def _setups() -> dict[str, Setup]:
    owner = pwd.getpwuid(os.geteuid()).pw_name
    stock_debian = (
        f'local all "{owner}" peer',
        "local all all peer",
        "host all all 127.0.0.1/32 scram-sha-256",
        "host all all ::1/128 scram-sha-256",
    )
    setups = (
        Setup("trust", (_TRUST_SOCKET, _TRUST_REPLICATION, *_TRUST_TCP)),
        Setup("peer", stock_debian, roles_use_tcp=True),
        Setup("notcp", (_TRUST_SOCKET,), listen_addresses=""),
        Setup("renamed", (_TRUST_SOCKET, *_TRUST_TCP), superuser="boss"),
    )
    return {setup.name: setup for setup in setups}


SETUPS: Mapping[str, Setup] = _setups()
"""trust: all is trust. peer: as stock Debian has it. notcp: trust, socket only. renamed: trust, and the
bootstrap superuser has another name than the server's OS user."""


# --- servers --------------------------------------------------------------------------------------


class _Executor(PostgreSQLExecutor):
    """pytest-postgresql's executor; it knows the server to be up by its unix socket, as TCP may be off."""

    environment: Mapping[str, str] = {}
    """What the server's environment has beside the usual."""

    def _answers(self) -> bool:
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
            return probe.connect_ex(f"{self.unixsocketdir}/.s.PGSQL.{self.port}") == 0

    def pre_start_check(self) -> bool:
        return self._answers()

    def after_start_check(self) -> bool:
        # The socket is there before the server lets anyone in; pg_ctl ends when it does.
        return self.process is not None and self.process.poll() == 0 and self._answers()

    @property
    def envvars(self) -> dict[str, str]:
        """The server's environment: without what would bend its Python or libpq to the tests' own."""
        foreign = re.compile(r"PYTHON|PYTEST|VIRTUAL_ENV|PG[A-Z]")
        usual = {name: text for name, text in super().envvars.items() if not foreign.match(name)}
        return {**usual, **self.environment}


class _CopyExecutor(_Executor):
    """For a data directory that is there already, a standby's or a moved one."""

    def init_directory(self) -> None:
        pass


def _conf_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _free_port() -> int:
    port = get_port([PORTS])
    if port is None:
        raise RuntimeError(f"no free port between {PORTS[0]} and {PORTS[1]}")
    return port


def _make_executor(setup: Setup, folder: Path, kind: type[_Executor] = _Executor) -> _Executor:
    return kind(
        executable=str(_ask_pg_config(find_pg_config(), "--bindir") / "pg_ctl"),
        host="127.0.0.1",
        port=_free_port(),
        user=setup.superuser,
        dbname="postgres",
        datadir=str(folder / "data"),
        unixsocketdir=str(folder),
        logfile=str(folder / "log"),
        startparams="-w",
        sleep=0.02,
    )


def _configure(executor: _Executor, setup: Setup, settings: Mapping[str, str]) -> None:
    chosen = {**_SERVER_SETTINGS, "listen_addresses": setup.listen_addresses, **settings}
    data = Path(executor.datadir)
    with (data / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{name} = {_conf_quote(text)}\n" for name, text in chosen.items())
    (data / "pg_hba.conf").write_text("\n".join(setup.hba) + "\n")


def _scratch_folder() -> Path:
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="pgbg-", dir=folder if len(folder) < _SOCKET_DIR_MAX else "/tmp"))


class Cluster:
    """One server, ours or a running one; `setup` is its name ("trust", …, "running")."""

    settings_for_all: ClassVar[Mapping[str, str]] = {}
    """Settings of every server that is started here."""
    encoding: ClassVar[str] = "UTF8"
    """Of databases that are made from the template."""

    def __init__(
        self,
        setup: str,
        conninfo: str,
        *,
        executor: _Executor | None = None,
        role_host: str | None = None,
        tag: str = "main",
    ) -> None:
        self.setup = setup
        self.conninfo = conninfo
        self.executor = executor
        self._role_host = role_host
        self._tag = f"{tag}_{os.getpid()}"
        self._names = 0
        self._template: str | None = None

    @classmethod
    def start_new(
        cls,
        setup: str,
        tag: str = "main",
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Cluster:
        """Makes and starts a scratch server of that set-up; `settings` go into its postgresql.conf."""
        chosen = SETUPS[setup]
        for attempt in range(1, _START_ATTEMPTS + 1):
            folder = _scratch_folder()
            executor = _make_executor(chosen, folder)
            try:
                executor.init_directory()
                executor.environment = environment or {}
                _configure(executor, chosen, {**cls.settings_for_all, **(settings or {})})
                executor.start()
            except ProcessExitedWithError as error:
                log = Path(executor.logfile).read_text(errors="replace")
                shutil.rmtree(folder)
                # Another suite may take the port between its choice and the server's bind.
                if "Address already in use" in log and attempt < _START_ATTEMPTS:
                    continue
                raise RuntimeError(f"the {setup} server did not start:\n{log}") from error
            break
        return cls._serving(executor, chosen, tag)

    @classmethod
    def _serving(cls, executor: _Executor, setup: Setup, tag: str) -> Cluster:
        conninfo = make_conninfo(host=executor.unixsocketdir, port=executor.port, user=executor.user, dbname="postgres")
        role_host = "127.0.0.1" if setup.roles_use_tcp else None
        return cls(setup.name, conninfo, executor=executor, role_host=role_host, tag=tag)

    def start_standby(self, tag: str = "standby") -> Cluster:
        """Makes a hot standby of this server, of set-up trust, and starts it; it is to be closed first."""
        setup, folder = SETUPS[self.setup], _scratch_folder()
        executor = _make_executor(setup, folder, _CopyExecutor)
        try:
            subprocess.run(
                [
                    str(Path(executor.executable).with_name("pg_basebackup")),
                    *("--pgdata", executor.datadir, "--dbname", self.conninfo),
                    *("--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf", "--no-sync"),
                ],
                check=True,
                capture_output=True,
                text=True,
            )
            executor.start()
        except BaseException:
            shutil.rmtree(folder)
            raise
        return self._serving(executor, setup, tag)

    # -- its life --

    def _local(self) -> _Executor:
        if self.executor is None:
            raise RuntimeError("this server was not started by the suite: mark the test local_server")
        return self.executor

    @property
    def datadir(self) -> Path:
        """The data directory."""
        return Path(self._local().datadir)

    @property
    def postmaster_pid(self) -> int:
        """Process id of the postmaster."""
        return int((self.datadir / "postmaster.pid").read_text().split()[0])

    def stop(self, mode: str = "fast") -> None:
        """Stops the server; `mode` is pg_ctl's: smart, fast or immediate."""
        executor = self._local()
        command = [executor.executable, "stop", "-w", "-t", _STOP_SECONDS, "-D", executor.datadir, "-m", mode]
        stopped = subprocess.run(command, capture_output=True, text=True, check=False)
        ended = stopped.returncode == 0 or not executor.running()  # by itself, a moment before
        assert ended, f"{stopped.stdout}{stopped.stderr}{server_log(self)[-4000:]}"
        self._forget_pg_ctl()

    def start(self) -> None:
        """Starts the server again after `stop` or `kill_postmaster`."""
        self._local().start()

    def restart(self, mode: str = "fast") -> None:
        """Stops and starts the server."""
        self.stop(mode)
        self.start()

    def kill_postmaster(self) -> None:
        """Ends the postmaster with SIGKILL and returns when it is gone; its backends may live longer."""
        pidfd = os.pidfd_open(self.postmaster_pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_until(lambda: not self._local().running(), what="the postmaster's end")
        finally:
            os.close(pidfd)
        self._forget_pg_ctl()

    def _forget_pg_ctl(self) -> None:
        """Lets the executor start again: it keeps the pg_ctl that it started before."""
        super(PostgreSQLExecutor, self._local()).stop()

    def close(self, mode: str = "fast") -> None:
        """Ends what the suite brought: the whole server, or on a running one the template database.

        A server that does not obey `mode` is ended by an immediate shutdown, and the call fails.
        """
        if self.executor is None:
            if self._template is not None:
                self.drop_database(self._template)
            return
        try:
            if self.executor.running():
                self.stop(mode)
        finally:
            if self.executor.running():
                self.stop("immediate")
            shutil.rmtree(self.datadir.parent)

    # -- connections and databases --

    def connect(
        self,
        dbname: str | None = None,
        user: str | None = None,
        *,
        autocommit: bool = True,
        **parameters: Any,
    ) -> Session:
        """A connection as the superuser, or as `user` (a Role, or a name with password=…).

        `parameters` are libpq's (application_name, options, …). The caller closes it.
        """
        if dbname is not None:
            parameters["dbname"] = dbname
        if user is not None:
            parameters.setdefault("password", getattr(user, "password", None))
            parameters["user"] = str(user)
            if self._role_host is not None:
                parameters.setdefault("host", self._role_host)
        if self.encoding == "SQL_ASCII":
            parameters.setdefault("client_encoding", "UTF8")  # else psycopg returns bytes
        # A prepared statement after the fifth run of a query would make tests depend on their length.
        return Session.connect(self.conninfo, autocommit=autocommit, prepare_threshold=None, **parameters)

    def new_name(self, prefix: str) -> str:
        """A short name that nothing else on this server has."""
        self._names += 1
        return f"{prefix}_{self._tag}_{self._names}"

    def template(self) -> str:
        """The database with the extension installed that test databases are copied from."""
        if self._template is None:
            self._template = self._make_template(self.new_name("template"))
        return self._template

    def _make_template(self, name: str) -> str:
        with self.connect() as admin:
            known = admin.rows("SELECT name FROM pg_catalog.pg_available_extensions")
            missing = [extension for extension in EXTENSIONS if (extension,) not in known]
            if missing:
                pytest.exit(f"the server has no extension {', '.join(missing)}: run make install first", returncode=4)
            # Several xdist workers may share a running server: one at a time creates the roles.
            admin.execute("SELECT pg_catalog.pg_advisory_lock(8123, 1)")
            create = "CREATE DATABASE {} TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' ENCODING {}"
            admin.execute(sql.SQL(create).format(sql.Identifier(name), sql.Literal(self.encoding)))
            with self.connect(name) as session:
                for extension in EXTENSIONS:
                    session.execute(sql.SQL("CREATE EXTENSION {}").format(sql.Identifier(extension)))
        return name

    def create_database(self, prefix: str = "db") -> str:
        """A new database with the extension installed; returns its name."""
        name, template = self.new_name(prefix), self.template()
        copy = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with self.connect() as admin:
            admin.execute(copy.format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop_database(self, name: str) -> None:
        """A plain DROP DATABASE, as a user would do it; fails where that takes more than 10 s.

        That it works although a supervisor was connected is a promise of the product.
        """
        drop = sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name))
        with self.connect(options=f"-c statement_timeout={_DROP_DATABASE_SECONDS}s") as admin:
            try:
                admin.execute(drop)
            except psycopg.Error as error:
                activity = self.activity(name)
                admin.execute(drop + sql.SQL(" WITH (FORCE)"))
                raise AssertionError(f"DROP DATABASE {name} failed: {error}\n{activity}") from error

    # -- what goes on in it --

    def activity(self, dbname: str) -> str:
        """pg_stat_activity of a database, as text for a failure's message."""
        with self.connect() as admin:
            seen = admin.execute(
                "SELECT pid, backend_type, usename, application_name, state, wait_event_type, wait_event,"
                " pg_catalog.clock_timestamp() - backend_start AS age, left(query, 200) AS query"
                " FROM pg_catalog.pg_stat_activity WHERE datname = %s ORDER BY backend_start",
                (dbname,),
            )
            names = [column.name for column in seen.description or ()]
            lines = [", ".join(f"{n}={v}" for n, v in zip(names, row)) for row in seen.fetchall()]
        return "pg_stat_activity of " + dbname + ":\n" + ("\n".join(lines) or "(no backend)")

    def workers(self, dbname: str) -> list[int]:
        """Process ids of the worker sessions in a database, the supervisor's not among them."""
        with self.connect() as admin:
            found = admin.rows(
                "SELECT pid FROM pg_catalog.pg_stat_activity"
                " WHERE datname = %s AND pg_catalog.starts_with(application_name, %s)"
                " AND application_name <> %s",
                (dbname, WORKER_NAME, SUPERVISOR_NAME),
            )
        return [pid for (pid,) in found]


def server_log(cluster: Cluster, since: int = 0) -> str:
    """The server's log from that byte on; "" for a server that the suite did not start."""
    if cluster.executor is None:
        return ""
    with Path(cluster.executor.logfile).open("rb") as log:
        log.seek(since)
        return log.read().decode(errors="replace")


def server_log_size(cluster: Cluster) -> int:
    """Where the log ends now: the `since` of a later `server_log`."""
    return 0 if cluster.executor is None else Path(cluster.executor.logfile).stat().st_size


# --- checks after a test --------------------------------------------------------------------------


def check_no_worker_left(cluster: Cluster, dbname: str, timeout: float = _LEAK_SECONDS) -> None:
    """Fails where worker sessions are left in the database after so many seconds.

    They are terminated then, so that the next test starts clean.
    """
    deadline = time.monotonic() + timeout
    while leaked := cluster.workers(dbname):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    else:
        return
    activity = cluster.activity(dbname)
    with cluster.connect() as admin:
        for pid in leaked:
            admin.execute("SELECT pg_catalog.pg_terminate_backend(%s, 5000)", (pid,))
    pytest.fail(f"worker sessions {leaked} are left {timeout:g} s after the test\n{activity}", pytrace=False)


def check_no_crash(cluster: Cluster, since: int) -> None:
    """Fails where the server's log tells, from that byte on, of a backend that crashed."""
    log = server_log(cluster, since)
    if _CRASH.search(log):
        pytest.fail(f"a backend crashed in this test; the server's log:\n{log[-6000:]}", pytrace=False)


# --- helpers for tests ----------------------------------------------------------------------------


def wait_until(condition: Callable[[], _T], timeout: float = 10, what: str = "the condition") -> _T:
    """Calls `condition` until it returns something true, and returns that; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s in vain for {what}; last seen: {outcome!r}")
        time.sleep(0.01)
    return outcome


@dataclass
class Raised:
    """What `sqlstate` caught."""

    error: psycopg.Error | None = None

    @property
    def diag(self) -> psycopg.errors.Diagnostic:
        """The error's fields."""
        assert self.error is not None, "nothing was raised yet"
        return self.error.diag

    @property
    def text(self) -> str:
        """All that a user can read of the error, a line a field."""
        assert self.error is not None, "nothing was raised yet"
        fields = (
            self.diag.message_primary,
            self.diag.message_detail,
            self.diag.message_hint,
            self.diag.context,
            self.diag.internal_query,
        )
        return "\n".join([str(self.error), *(text for text in fields if text)])


@contextmanager
def sqlstate(code: str, match: str | None = None) -> Iterator[Raised]:
    """The block must raise a psycopg error of that SQLSTATE that shows no trace of PL/Python.

    `match` is a regular expression that must be found in the error's text. Yields a `Raised`, whose
    `diag` and `text` can be looked at after the block.
    """
    raised = Raised()
    try:
        yield raised
    except psycopg.Error as error:
        raised.error = error
    if raised.error is None:
        pytest.fail(f"expected an error with SQLSTATE {code}, none was raised")
    seen = f"SQLSTATE {raised.error.sqlstate}: {raised.text}"
    assert raised.error.sqlstate == code, f"expected SQLSTATE {code}, got {seen}"
    assert "Traceback" not in raised.text, seen
    assert "PL/Python" not in raised.text, seen
    assert match is None or re.search(match, raised.text), f"{match!r} not found in {seen}"
