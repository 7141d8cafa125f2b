"""Which psycopg a session takes: Debian 12's own one, say, is too old, and others' functions may import it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clusters import Session, sqlstate

pytestmark = pytest.mark.local_server

_OLD_PQ = "__impl__ = 'python'\nclass PGconn: pass\ndef version(): return 150018\n"


@pytest.fixture
def old_psycopg(conn: Session, tmp_path: Path) -> Session:
    """A session whose sys.path starts with a psycopg that is too old."""
    package = tmp_path / "psycopg"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '3.1.7'\n")
    (package / "pq.py").write_text(_OLD_PQ)
    for folder in (package, *list(package.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    conn.execute(f"DO LANGUAGE plpython3u $$ import sys; sys.path.insert(0, {str(tmp_path)!r}) $$")
    return conn


def test_the_one_beside_the_extension_goes_before_an_old_one(old_psycopg: Session) -> None:
    assert old_psycopg.value("SELECT state FROM pg_background_run_v2('SELECT 1')") == "stopped"
    old_psycopg.execute("DO LANGUAGE plpython3u $$ import sys; assert 'pg_background' not in sys.path[0] $$")


def test_an_old_one_that_the_session_has_loaded_before_is_refused_in_plain_words(old_psycopg: Session) -> None:
    old_psycopg.execute("DO LANGUAGE plpython3u $$ import psycopg.pq $$")
    with sqlstate("58P01") as raised:
        old_psycopg.execute("SELECT pg_background_launch_v2('SELECT 1')")
    assert "3.1.7" in str(raised.diag.message_detail)
    finding = old_psycopg.rows("SELECT status, detail FROM pg_background_check() WHERE prerequisite LIKE 'libpq%'")
    assert finding[0][0] == "failed"
    assert "3.1.7" in finding[0][1]
