"""Fixtures and options of the suite. A test that needs a server asks for `conn`, `alice` or `connect`.

    def test_one(conn): ...                      # superuser session in this module's database
    def test_two(alice): ...                     # a new LOGIN role, only granted pgbackground_role
    @pytest.mark.setups("trust", "peer")         # once on each; see tests.clusters.SETUPS
    def test_three(connect, role): connect(role(granted=False), work_mem="1MB")
    def test_four(fresh_database, conn): ...     # a database for this test alone
    def test_five(start_cluster): start_cluster("peer", {"max_connections": "12"})

PostgreSQL refuses to run as root, so as root the suite runs itself again as OS user postgres (or
$PG_BACKGROUND_TEST_USER), with its home, temporary files and caches in a scratch folder.
"""

from __future__ import annotations

import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from psycopg import sql

from tests.clusters import (
    SETUPS,
    Cluster,
    Role,
    Session,
    check_no_crash,
    check_no_worker_left,
    server_log_size,
)

RUNNING = "running"
_SERVER_END_SECONDS = 20
_CLEANUP_OPTIONS = "-c lock_timeout=10s -c statement_timeout=30s"


# --- options, markers -----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pg_background")
    group.addoption(
        "--setup",
        choices=sorted(SETUPS),
        default="trust",
        help="the set-up on which tests run that name none (default: trust)",
    )
    group.addoption(
        "--encoding",
        default="UTF8",
        help="of the databases that tests work in (default: UTF8)",
    )
    group.addoption(
        "--server-setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of every server that the suite starts; may be repeated",
    )
    group.addoption(
        "--dsn-of-running-server",
        default=os.environ.get("DSN_OF_RUNNING_SERVER"),
        metavar="CONNINFO",
        help="use this server, as this superuser, and start none (default: $DSN_OF_RUNNING_SERVER)",
    )


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile("suite", deadline=None)  # the machine may be busy with the rest of it
    hypothesis.settings.load_profile("suite")
    config.addinivalue_line("markers", "setups(*names): run the test once on each of these set-ups")
    config.addinivalue_line("markers", "local_server: needs a server started by the suite, on this machine")
    config.addinivalue_line("markers", "crashes_server: the test makes a backend crash on purpose")
    given = [setting.partition("=") for setting in config.getoption("--server-setting")]
    Cluster.settings_for_all = {name: text for name, _, text in given}
    Cluster.encoding = config.getoption("--encoding")
    for name in [name for name in os.environ if name.startswith("PG") and name != "PG_CONFIG"]:
        if not name.startswith("PG_BACKGROUND"):
            del os.environ[name]
    # The default would end this process without ending its servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cluster" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("setups")
    names = list(marker.args) if marker else [metafunc.config.getoption("--setup")]
    if metafunc.config.getoption("--dsn-of-running-server"):
        names = [RUNNING]
    metafunc.parametrize("cluster", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--dsn-of-running-server"):
        return
    for item in items:
        if item.get_closest_marker("local_server") or "start_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="needs a server started by the suite"))


# --- as root: the suite again, as another user ----------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if os.geteuid() != 0:
        return None
    name = os.environ.get("PG_BACKGROUND_TEST_USER", "postgres")
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise pytest.UsageError(
            f"PostgreSQL refuses to run as root, and there is no OS user {name} to run as"
        ) from None
    scratch = Path(tempfile.mkdtemp(prefix="pgbg-run-", dir="/tmp"))
    try:
        return _run_again(config, user, scratch)
    finally:
        _end_servers_below(scratch)
        shutil.rmtree(scratch)


def _run_again(config: pytest.Config, user: pwd.struct_passwd, scratch: Path) -> int:
    for folder in ("home", "tmp"):
        (scratch / folder).mkdir()
        os.chown(scratch / folder, user.pw_uid, user.pw_gid)
    os.chown(scratch, user.pw_uid, user.pw_gid)
    environment = {
        **os.environ,
        "HOME": str(scratch / "home"),
        "USER": user.pw_name,
        "LOGNAME": user.pw_name,
        "TMPDIR": str(scratch / "tmp"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "home" / "hypothesis"),
    }
    python = _interpreter_for(user, environment, config.rootpath)
    options = ["-o", f"cache_dir={scratch / 'home' / 'pytest'}"]
    command = [*python, "-m", "pytest", *config.invocation_params.args, *options]
    child = subprocess.Popen(command, env=environment, **_as_user(user))
    # Ctrl-C reaches the child too: it ends its servers, and this process must wait for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


def _as_user(user: pwd.struct_passwd) -> dict[str, Any]:
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}


def _interpreter_for(user: pwd.struct_passwd, environment: dict[str, str], checkout: Path) -> list[str]:
    """A Python that the user may run: this one, or the system's of the same version with our packages.

    The second is for a virtual environment whose interpreter is in root's home. `environment` gets the
    packages' folder then; the servers that the suite starts do not see it.
    """
    probe = "import sys, os; os.listdir(sys.argv[1]); import pytest, psycopg, pytest_postgresql"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    system = {**environment, "PYTHONPATH": packages}
    complaints = []
    for python, variables in ((sys.executable, environment), (f"/usr/bin/{version}", system)):
        try:
            subprocess.run(
                [python, "-c", probe, str(checkout)],
                env=variables,
                check=True,
                capture_output=True,
                text=True,
                **_as_user(user),
            )
        except OSError as error:
            complaints.append(f"{python}: {error}")
        except subprocess.CalledProcessError as error:
            complaints.append(f"{python}: {error.stderr.strip().splitlines()[-1]}")
        else:
            environment.update(variables)
            return [python]
    raise pytest.UsageError(
        f"the suite must run as OS user {user.pw_name}, who cannot run it from {checkout}:\n  "
        + "\n  ".join(complaints)
        + "\nMove the checkout to a folder that this user can read, and make its .venv from /usr/bin/python3."
    )


def _end_servers_below(scratch: Path) -> None:
    """Stops servers whose test process was killed before it could."""
    for pidfile in scratch.glob("tmp/pgbg-*/data/postmaster.pid"):
        pid = int(pidfile.read_text().split()[0])
        with suppress(ProcessLookupError, FileNotFoundError):  # it has ended by itself
            _end_server(pid, pidfile.parent)


def _end_server(pid: int, datadir: Path) -> None:
    """Ends that server at once, if the process is still the one that serves this data directory."""
    pidfd = os.pidfd_open(pid)
    try:
        if os.fsencode(datadir) in Path(f"/proc/{pid}/cmdline").read_bytes():
            signal.pidfd_send_signal(pidfd, signal.SIGQUIT)
            select.select([pidfd], [], [], _SERVER_END_SECONDS)
    finally:
        os.close(pidfd)


# --- servers and databases ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _clusters(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Cluster]]:
    """Starts each set-up's server when it is first asked for, and stops them all at the end."""
    tag = os.environ.get("PYTEST_XDIST_WORKER", "main")
    running_server = request.config.getoption("--dsn-of-running-server")
    started: dict[str, Cluster] = {}

    def get(setup: str) -> Cluster:
        if setup not in started:
            if setup == RUNNING:
                started[setup] = Cluster(RUNNING, running_server, tag=tag)
            else:
                started[setup] = Cluster.start_new(setup, tag)
        return started[setup]

    yield get
    for cluster in started.values():
        cluster.close()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, _clusters: Callable[[str], Cluster]) -> Cluster:
    """The server of this test's set-up; one for all tests of that set-up."""
    return _clusters(request.param)


@pytest.fixture
def start_cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster]]:
    """`start_cluster(setup="trust", settings={}, environment={})`: a server for this test alone, to restart, to crash.

    environment: variables that its postmaster has beside the usual ones.
    """
    started: list[Cluster] = []

    def start(
        setup: str = "trust", settings: dict[str, str] | None = None, environment: dict[str, str] | None = None
    ) -> Cluster:
        started.append(Cluster.start_new(setup, "own", settings, environment))
        return started[-1]

    yield start
    for cluster in started:
        # A fast shutdown hangs in PostgreSQL itself while it recovers from a crash.
        cluster.close("immediate")


@pytest.fixture(scope="module")
def database(cluster: Cluster) -> Iterator[str]:
    """Name of this module's database, the extension installed; dropped by a plain DROP DATABASE."""
    name = cluster.create_database()
    yield name
    cluster.drop_database(name)


@pytest.fixture
def fresh_database(cluster: Cluster) -> Iterator[str]:
    """As `database`, for this test alone; `conn`, `alice` and `connect` of the test go there too."""
    name = cluster.create_database("fresh")
    yield name
    cluster.drop_database(name)


@pytest.fixture
def current_database(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Name of the database that this test works in: `fresh_database` if it asks for it, else `database`."""
    fresh = "fresh_database" in request.fixturenames
    name: str = request.getfixturevalue("fresh_database" if fresh else "database")
    return name


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After the test's connections are closed and before its roles are dropped: no worker is left."""
    if not {"database", "fresh_database", "current_database"} & set(request.fixturenames):
        yield
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    dbname: str = request.getfixturevalue("current_database")
    request.getfixturevalue("role")
    log_start = server_log_size(cluster)
    yield
    if not request.node.get_closest_marker("crashes_server"):
        check_no_crash(cluster, log_start)
    check_no_worker_left(cluster, dbname)


# --- roles and connections ------------------------------------------------------------------------


def _create_role(admin: Session, role: Role, attributes: str, granted: bool, schema: bool) -> None:
    name = sql.Identifier(role)
    create = sql.SQL("CREATE ROLE {} " + attributes + " PASSWORD {}")
    admin.execute(create.format(name, sql.Literal(role.password)))
    if granted:
        admin.execute(sql.SQL("GRANT pgbackground_role TO {}").format(name))
    if schema:
        admin.execute(sql.SQL("CREATE SCHEMA AUTHORIZATION {}").format(name))


def _drop_role(admin: Session, role: Role) -> None:
    """Drops the role, unless the test has done so itself."""
    if not admin.rows("SELECT FROM pg_catalog.pg_roles WHERE rolname = %s", (str(role),)):
        return
    admin.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
    admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.fixture
def role(cluster: Cluster, current_database: str) -> Iterator[Callable[..., Role]]:
    """`role(name=None, login=True, superuser=False, granted=True, schema=False)`: a new role.

    `name` is the start of its name, any characters; `granted`: member of pgbackground_role; `schema`: it
    owns a schema of its name (the only place where an ordinary role can create tables). Dropped at the
    end with all it owns in the test's database.
    """
    created: list[Role] = []

    def create(
        name: str = "role",
        *,
        login: bool = True,
        superuser: bool = False,
        granted: bool = True,
        schema: bool = False,
    ) -> Role:
        new = Role(cluster.new_name(name), "secret of " + name)
        attributes = f"{'LOGIN' if login else 'NOLOGIN'} {'SUPERUSER' if superuser else 'NOSUPERUSER'}"
        with cluster.connect(current_database) as admin:
            created.append(new)
            _create_role(admin, new, attributes, granted, schema)
        return new

    yield create
    with cluster.connect(current_database, options=_CLEANUP_OPTIONS) as admin:
        for old in reversed(created):
            _drop_role(admin, old)


@pytest.fixture
def connect(cluster: Cluster, current_database: str, _nothing_left_behind: None) -> Iterator[Callable[..., Session]]:
    """`connect(user=None, *, dbname=None, parameters={}, **settings)`: a session in the test's database.

    Autocommit; as the superuser, or as a Role. `settings` are SET in it, names with a dot too:
    `connect(alice, **{"pg_background.pool_size": 0})`; `parameters` are libpq's. Closed at the test's end.
    """
    opened: list[Session] = []

    def open_session(
        user: str | None = None,
        *,
        dbname: str | None = None,
        parameters: dict[str, Any] | None = None,
        **settings: object,
    ) -> Session:
        session = cluster.connect(dbname or current_database, user, **(parameters or {}))
        opened.append(session)
        for name, setting in settings.items():
            session.execute("SELECT pg_catalog.set_config(%s, %s, false)", (name, str(setting)))
        return session

    yield open_session
    for session in reversed(opened):
        session.close()


@pytest.fixture
def conn(connect: Callable[..., Session]) -> Session:
    """A superuser's session in the test's database."""
    return connect()


@pytest.fixture
def alice(connect: Callable[..., Session], role: Callable[..., Role]) -> Session:
    """A session of a new ordinary LOGIN role: granted pgbackground_role, owner of a schema of its name."""
    return connect(role("alice", schema=True))
