"""The environment of the server's processes: it bends no login of a worker's, and stays as it is."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.background import launch, run, wait
from tests.clusters import Cluster, Session, sqlstate
from tests.supervision import supervisor_pids

pytestmark = pytest.mark.local_server

# What libpq puts into the first words of a session: no error, but other settings.
_SETTINGS = {"PGTZ": "Asia/Tokyo", "PGDATESTYLE": "German, DMY", "PGGEQO": "off", "PGCLIENTENCODING": "LATIN1"}
_SHOWN = (
    "SELECT current_setting('TimeZone'), current_setting('DateStyle'), current_setting('geqo'),"
    " current_setting('client_encoding'), current_setting('application_name'), current_setting('work_mem')"
)
_SHOWN_COLUMNS = "zone text, style text, geqo text, encoding text, name text, memory text"

# What keeps a session from the unix socket, or from the server altogether.
_LOGIN = {
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGDATABASE": "nowhere",
    "PGUSER": "nobody",
    "PGPASSWORD": "wrong",
    "PGPASSFILE": "/nowhere",
    "PGSERVICE": "nowhere",
    "PGSERVICEFILE": "/nowhere",
    "PGAPPNAME": "another",
    "PGOPTIONS": "-c work_mem=1MB",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGCHANNELBINDING": "require",
    "PGREQUIREPEER": "nobody",
    "PGSSLMODE": "verify-full",
    "PGSSLNEGOTIATION": "direct",
    "PGSSLROOTCERT": "/nowhere",
    "PGSSLMINPROTOCOLVERSION": "TLSv1.9",
    "PGGSSENCMODE": "require",
    "PGMINPROTOCOLVERSION": "latest",
    "PGMAXPROTOCOLVERSION": "latest",
    "PGTARGETSESSIONATTRS": "standby",
    "PGLOADBALANCEHOSTS": "perhaps",
    "PGCONNECT_TIMEOUT": "soon",
}

_ENVIRONMENT = """
CREATE FUNCTION environment() RETURNS SETOF text LANGUAGE plpython3u AS $$
from ctypes import POINTER, PyDLL, c_char_p

variables, place = POINTER(c_char_p).in_dll(PyDLL(None), "environ"), 0
while variables[place] is not None:
    yield variables[place].decode()
    place += 1
$$
"""
# As a library does that the server has loaded: os.environ does not know of it.
_SET_VARIABLE = "DO LANGUAGE plpython3u $$\nfrom ctypes import PyDLL\nPyDLL(None).setenv({name!r}, {value!r}, 1)\n$$"
_LOG_IN_AT = (
    "DO LANGUAGE plpython3u $$\nimport sys\n"
    "sys.modules['pg_background.loopback'].Loopback._socket_folder = lambda self: {folder!r}\n$$"
)


@pytest.fixture
def session(connect: Callable[..., Session], fresh_database: str) -> Session:
    """A superuser's session that keeps no workers, with a supervisor."""
    session = connect(**{"pg_background.pool_size": 0})
    session.execute(_ENVIRONMENT)
    assert run(session, "SELECT 5", "n int") == [(5,)]
    return session


def environment(session: Session) -> list[str]:
    """The environment of a session's backend, in order."""
    return [variable for (variable,) in session.rows("SELECT environment()")]


@pytest.mark.parametrize("variables", [_SETTINGS, _LOGIN], ids=["settings", "login"])
def test_environment_of_the_postmaster_does_not_bend_logins(
    start_cluster: Callable[..., Cluster], variables: dict[str, str]
) -> None:
    cluster = start_cluster(environment=variables)
    dbname = cluster.create_database()
    with cluster.connect(dbname) as admin:
        admin.execute(_ENVIRONMENT + "; CREATE ROLE alice LOGIN IN ROLE pgbackground_role")
        before = environment(admin)
        assert {f"{name}={value}" for name, value in variables.items()} <= set(before)
        for user in (None, "alice"):
            with cluster.connect(dbname, user, application_name="pg_background", client_encoding="UTF8") as session:
                assert run(session, _SHOWN, _SHOWN_COLUMNS) == session.rows(_SHOWN)
        assert len(supervisor_pids(admin)) == 1
        wait(admin, launch(admin, "SELECT 1"))
        assert environment(admin) == before


@pytest.mark.parametrize(("name", "value"), _SETTINGS.items())
def test_variable_that_is_set_later_does_not_bend_logins(session: Session, name: str, value: str) -> None:
    session.execute(_SET_VARIABLE.format(name=name.encode(), value=value.encode()))
    before = environment(session)
    assert f"{name}={value}" in before
    shown = run(session, _SHOWN, _SHOWN_COLUMNS)
    assert [row[:4] for row in shown] == [row[:4] for row in session.rows(_SHOWN)]
    assert environment(session) == before


@pytest.fixture
def silent_folder(session: Session) -> Iterator[str]:
    """The folder of a unix socket on which nobody answers, of the same port as the server's."""
    unix_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with tempfile.TemporaryDirectory(prefix="pgbg-", dir="/tmp") as folder, unix_socket as listener:
        listener.bind(str(Path(folder, f".s.PGSQL.{session.value('SHOW port')}")))
        listener.listen()
        yield folder


def test_environment_is_as_before_after_a_login_that_failed(session: Session) -> None:
    session.execute(_SET_VARIABLE.format(name=b"PGTZ", value=b"Asia/Tokyo"))
    before = environment(session)
    session.execute(_LOG_IN_AT.format(folder=b"/nowhere"))
    with sqlstate("08001", "/nowhere"):
        launch(session, "SELECT 1")
    assert environment(session) == before


def test_environment_is_as_before_after_a_login_that_was_cancelled(session: Session, silent_folder: str) -> None:
    session.execute(_SET_VARIABLE.format(name=b"PGTZ", value=b"Asia/Tokyo"))
    before = environment(session)
    session.execute(_LOG_IN_AT.format(folder=silent_folder.encode()))
    session.execute("SET statement_timeout = '300ms'")
    with sqlstate("57014"):
        launch(session, "SELECT 1")
    session.execute("RESET statement_timeout")
    assert environment(session) == before
