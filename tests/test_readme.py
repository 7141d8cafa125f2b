"""The README holds: its tour runs line by line as an ordinary role, and gives what it shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from tests.clusters import Cluster, Role, Session, find_pg_config
from tests.readme import README, ROOT, check, script, section, steps

DATABASE = "readme_tour"
ALICE = Role("alice", "wonderland")


def psql(session: Session, script: str) -> str:
    """What psql prints, errors and notices too, in a session of its own as the session's role."""
    program = find_pg_config().parent / "psql"
    command = [str(program) if program.exists() else shutil.which("psql") or "psql", "-X"]
    info = session.info
    conninfo = {"host": info.host, "port": str(info.port), "dbname": info.dbname, "user": info.user}
    ran = subprocess.run(
        [*command, psycopg.conninfo.make_conninfo(password=info.password, **conninfo)],
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=120,
    )
    return ran.stdout


@pytest.fixture
def tourist(cluster: Cluster) -> Iterator[Session]:
    """A session of the README's alice in a database where nothing was done but what the README says."""
    admin_steps = steps(section("<!-- tour:admin -->", "<!-- tour:begin -->"))
    database = sql.Identifier(DATABASE)
    with cluster.connect() as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(database))
        try:
            with cluster.connect(DATABASE) as superuser:
                for step in admin_steps:
                    superuser.execute(step.statements)
            session = cluster.connect(DATABASE, ALICE)
            yield session
            session.close()
        finally:
            cluster.drop_database(DATABASE)
            admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(ALICE)))


@pytest.mark.setups("peer")
def test_the_tour_gives_what_the_readme_shows(tourist: Session) -> None:
    tour = steps(section("<!-- tour:begin -->", "<!-- tour:end -->"))
    assert len(tour) > 5
    check(tour, psql(tourist, script(tour)))


@pytest.mark.setups("peer")
def test_the_query_to_watch_shows_a_running_job_and_how_far_it_is(tourist: Session) -> None:
    (step,) = steps(section("<!-- watch -->", "```console"))
    query = re.sub(r"\\watch.*", ";", step.statements)
    job = "SELECT pg_background_progress(40, 'step 8 of 20'); SELECT pg_sleep(3600)"
    pid, cookie = tourist.rows("SELECT * FROM pg_background_launch_v2(%s)", (job,))[0]
    shown = ""
    for _ in range(100):
        shown = psql(tourist, query)
        if "step 8 of 20" in shown:
            break
    assert "[########............]  40%" in shown
    assert "running" in shown
    tourist.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 10000)", (pid, cookie))


def test_the_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_settings_are_those_of_the_code() -> None:
    from pg_background import settings

    documented = dict(re.findall(r"^\| `(pg_background\.\w+)` \| (\S+) \|", README, re.MULTILINE))
    assert documented == {definition.name: definition.default for definition in settings.ALL}
