"""pg_dump, pg_dumpall and pg_upgrade: the extension works where its database is restored, without another call."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg import sql

from tests.clusters import Cluster, Session, sqlstate, wait_until

pytestmark = pytest.mark.local_server


@pytest.fixture
def target(start_cluster: Callable[..., Cluster]) -> Cluster:
    """A new server, which knows none of the extension's roles."""
    return start_cluster()


def _call(cluster: Cluster, program: str, *arguments: str, text: str | None = None) -> str:
    """What one of PostgreSQL's client programs prints; fails where it fails or has anything to complain about."""
    assert cluster.executor is not None
    path = Path(cluster.executor.executable).with_name(program)
    done = subprocess.run([path, *arguments], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), f"{program}: {done.stderr}"
    return done.stdout


def _restore(cluster: Cluster, script: str, dbname: str = "postgres") -> None:
    with_database = f"{cluster.conninfo} dbname={dbname}"
    _call(cluster, "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname", with_database, text=script)


def _works(session: Session, user: str, schema: str = "public") -> None:
    """A job of this role, one after a commit, and the view."""
    session.execute(sql.SQL("SET SESSION AUTHORIZATION {}").format(sql.Identifier(user)))
    session.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(schema)))
    launch = f"SELECT {schema}.pg_background_run_v2('SELECT 1')"
    assert session.value(f"SELECT state FROM ({launch} AS r) s, LATERAL (SELECT (s.r).state) t(state)") == "stopped"
    with session.transaction():
        handle = session.rows(f"SELECT pid, cookie FROM {schema}.pg_background_submit_on_commit_v2('SELECT 2')")[0]
    session.execute(f"SELECT {schema}.pg_background_wait_v2(%s, %s)", handle)
    assert session.value(f"SELECT state FROM {schema}.pg_background_outcome_v2(%s, %s)", handle) == "stopped"
    seen = f"SELECT launcher_pid FROM {schema}.pg_background_activity"
    wait_until(lambda: (session.pid,) in session.rows(seen), timeout=2, what="the view, up to 50 ms behind")
    session.execute("RESET search_path; RESET SESSION AUTHORIZATION")


def _privileges(session: Session) -> list[tuple[str, str]]:
    """Who may call what, without the names of those who granted it."""
    return session.rows(
        "SELECT p.proname || '(' || oidvectortypes(p.proargtypes) || ')', grantee.rolname"
        " FROM pg_extension e JOIN pg_depend d ON d.refobjid = e.oid AND d.deptype = 'e'"
        " JOIN pg_proc p ON p.oid = d.objid AND d.classid = 'pg_proc'::regclass"
        " CROSS JOIN aclexplode(COALESCE(p.proacl, acldefault('f', p.proowner))) a"
        " LEFT JOIN pg_roles grantee ON grantee.oid = a.grantee"
        " WHERE e.extname = 'pg_background' AND a.grantee <> p.proowner ORDER BY 1, 2"
    )


@pytest.mark.parametrize("schema", ["public", "bg"])
def test_one_database_restored_into_a_cluster_without_the_roles(
    cluster: Cluster, conn: Session, fresh_database: str, target: Cluster, schema: str
) -> None:
    if schema != "public":
        conn.execute("DROP EXTENSION pg_background; CREATE SCHEMA bg; CREATE EXTENSION pg_background SCHEMA bg")
    source = f"{cluster.conninfo} dbname={fresh_database}"
    _restore(target, _call(cluster, "pg_dump", "--create", "--dbname", source))
    with target.connect(fresh_database) as session:
        session.execute("CREATE ROLE bob LOGIN; GRANT pgbackground_role TO bob; CREATE ROLE eve LOGIN")
        _works(session, "bob", schema)
        _works(session, session.info.user, schema)
        assert _privileges(session) == _privileges(conn)
        with sqlstate("42501"):
            _works(session, "eve", schema)


def test_a_parallel_restore_of_an_archive(
    cluster: Cluster, fresh_database: str, target: Cluster, tmp_path: Path
) -> None:
    source, archive = f"{cluster.conninfo} dbname={fresh_database}", tmp_path / "archive"
    _call(cluster, "pg_dump", "--format=directory", "--file", str(archive), "--dbname", source)
    _call(target, "pg_restore", "--create", "--exit-on-error", "--jobs=2", "--dbname", target.conninfo, str(archive))
    with target.connect(fresh_database) as session:
        _works(session, session.info.user)


def test_a_whole_cluster_keeps_its_grants(start_cluster: Callable[..., Cluster]) -> None:
    source, target = start_cluster(), start_cluster()
    with source.connect() as session:
        session.execute("CREATE EXTENSION pg_background CASCADE")
        session.execute("CREATE ROLE member LOGIN; GRANT pgbackground_role TO member; CREATE ROLE helped LOGIN")
        session.execute("SELECT grant_pg_background_privileges('helped', include_v1 => false)")
        _works(session, "member")
        expected = _privileges(session)
    dump = _call(source, "pg_dumpall", "--dbname", source.conninfo)
    owner = sql.Identifier(str(source.executor.user if source.executor else "")).as_string()
    _restore(target, dump.replace(f"CREATE ROLE {owner.strip(chr(34))};\n", ""))  # initdb has made that one
    with target.connect() as session:
        _works(session, "member")
        _works(session, "helped")
        assert _privileges(session) == expected


def test_pg_upgrade_carries_it_over(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """From one cluster to another of the same version: pg_upgrade goes its whole way there, too."""
    old, new = start_cluster(), start_cluster()
    with old.connect() as session:
        session.execute("CREATE EXTENSION pg_background CASCADE")
        session.execute("CREATE ROLE member LOGIN; GRANT pgbackground_role TO member")
        _works(session, "member")
        expected = _privileges(session)
    old.stop()
    new.stop()
    assert old.executor is not None
    programs = Path(old.executor.executable).parent
    upgrade: list[str | Path] = [programs / "pg_upgrade", "--old-bindir", programs, "--new-bindir", programs]
    upgrade += ["--old-datadir", old.datadir, "--new-datadir", new.datadir, "--username", old.executor.user]
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long a name for a socket's folder
        upgrade += ["--socketdir", folder]
        done = subprocess.run(upgrade, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    new.start()
    with new.connect() as session:
        _works(session, "member")
        assert _privileges(session) == expected
        session.execute("DROP EXTENSION pg_background")
    old.start()
