"""pg_background_check: a row for each prerequisite, also where launching fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.clusters import EXTENSIONS, Cluster, Role, Session, sqlstate, wait_until

PREREQUISITES = [
    "server",
    "libpq and psycopg",
    "roles",
    "settings",
    "connections",
    "loopback login",
    "identity switch",
    "supervisor",
]


def check(session: Session) -> dict[str, tuple[str, str, str | None]]:
    """Status, detail and remedy of each prerequisite."""
    rows = session.rows("SELECT * FROM pg_background_check()")
    assert [row[0] for row in rows] == PREREQUISITES
    return {row[0]: row[1:] for row in rows}


def failed(session: Session) -> set[str]:
    """What is not right."""
    return {name for name, (status, _, _) in check(session).items() if status != "ok"}


@pytest.mark.setups("trust", "peer", "renamed")
def test_all_is_right_for_whoever_may_launch(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    assert failed(conn) == set()
    bob = role("bob")
    findings = check(connect(bob))
    assert {status for status, _, _ in findings.values()} == {"ok"}
    assert {remedy for _, _, remedy in findings.values()} == {None}
    assert str(bob) in findings["identity switch"][1]
    assert "psycopg 3" in findings["libpq and psycopg"][1]
    with sqlstate("42501"):
        connect(role("stranger", granted=False)).execute("SELECT * FROM pg_background_check()")


def test_a_bad_setting_is_named(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 'many'")
    findings = check(alice)
    status, detail, _ = findings["settings"]
    assert status == "failed"
    assert "max_workers" in detail
    assert "22023" in detail


def test_a_cancel_is_none_of_the_findings(alice: Session) -> None:
    alice.execute("SET statement_timeout = '1ms'")
    with sqlstate("57014"):
        alice.execute("SELECT * FROM pg_background_check()")
    alice.execute("RESET statement_timeout")
    assert failed(alice) == set()


@pytest.mark.local_server
def test_a_refused_login_and_a_missing_role(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster()
    name = cluster.create_database()
    with cluster.connect(name) as session:
        assert set(EXTENSIONS) <= {row[0] for row in session.rows("SELECT extname FROM pg_extension")}
        session.execute("CREATE ROLE other SUPERUSER LOGIN")
        hba = cluster.datadir / "pg_hba.conf"
        owner = session.value("SELECT CURRENT_USER")
        session.close()
    with cluster.connect(name, "other") as session:
        before = hba.read_text()
        hba.write_text(f"local all {owner} reject\n{before}")
        session.execute("SELECT pg_reload_conf()")
        wait_until(lambda: "loopback login" in failed(session), what="the new pg_hba.conf")
        findings = check(session)
        assert {name for name, (status, _, _) in findings.items() if status == "failed"} == {
            "loopback login",
            "identity switch",
            "supervisor",
        }
        assert f"local all {owner} peer" in (findings["loopback login"][2] or "")
        assert "08001" in findings["loopback login"][1]
        hba.write_text(before)
        session.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not failed(session), what="the old pg_hba.conf")
        session.execute("ALTER ROLE pgbackground_role LOGIN")
        assert failed(session) == {"roles"}
        assert "pgbackground_role" in (check(session)["roles"][2] or "")


def test_the_remedy_for_a_setting_without_a_valid_value_names_it(conn: Session) -> None:
    conn.execute("SET pg_background.max_workers = 'junk'")
    status, detail, remedy = check(conn)["settings"]
    assert (status, "junk" in detail) == ("failed", True)
    assert remedy is not None
    assert "SET pg_background.max_workers" in remedy
