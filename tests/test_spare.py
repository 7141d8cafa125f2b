"""Where workers are launched in a row, the next one's session is begun while the last one's becomes its role."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import sql

from tests.background import Handle, launch, result, run
from tests.clusters import WORKER_NAME, Role, Session, wait_until
from tests.test_reuse import worker_pid

_USERS = "SELECT current_user::text, session_user::text, current_setting('is_superuser'), pg_backend_pid()"
_COLUMNS = "u text, s text, p text, pid int"
_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
_LOGGED_IN = "SELECT FROM pg_stat_activity WHERE application_name = %s AND usename <> %s AND state = 'idle'"
_IN_A_ROW = 4  # the first that is begun ahead is the third one's


def backends(session: Session) -> set[int]:
    """Process ids of all worker sessions of this database."""
    return {pid for (pid,) in session.rows(_BACKENDS, (WORKER_NAME,))}


def launch_in_a_row(session: Session, query: str = _USERS) -> list[Handle]:
    """Of workers that all run at once."""
    launches = f"SELECT pg_background_launch_v2(%s) AS h FROM generate_series(1, {_IN_A_ROW})"
    return [Handle(*row) for row in session.rows(f"SELECT (h).pid, (h).cookie FROM ({launches}) AS s", (query,))]


def spare_beside(handles: list[Handle], conn: Session) -> int:
    """The process of the session that was begun ahead and that no worker runs in."""
    (spare,) = backends(conn) - {handle.pid for handle in handles}
    return int(spare)


@pytest.fixture
def alone(fresh_database: str, alice: Session) -> Session:
    """In a database without other workers; its first worker has taken on its role, and is a kept one now."""
    del fresh_database
    alice.execute("SET pg_background.pool_size = 16")
    worker_pid(alice)
    return alice


def test_a_session_that_was_begun_ahead_is_the_next_workers(alone: Session, conn: Session) -> None:
    handles = launch_in_a_row(alone)
    spare = spare_beside(handles, conn)
    handle = launch(alone, _USERS)
    name = alone.info.user
    assert result(alone, handle, _COLUMNS) == [(name, name, "off", spare)]
    for handle in handles:
        assert result(alone, handle, _COLUMNS) == [(name, name, "off", handle.pid)]


def test_none_is_begun_that_the_pool_would_not_keep(alone: Session, conn: Session) -> None:
    alone.execute(f"SET pg_background.pool_size = {_IN_A_ROW}")
    assert {handle.pid for handle in launch_in_a_row(alone)} == backends(conn)
    alone.execute("SET pg_background.pool_size = 0")
    launch_in_a_row(alone)
    assert len(backends(conn)) == 2 * _IN_A_ROW


def test_it_ends_after_pool_idle_timeout(alone: Session, conn: Session) -> None:
    alone.execute("SET pg_background.pool_idle_timeout = '300ms'")
    spare = spare_beside(launch_in_a_row(alone), conn)
    wait_until(lambda: spare not in backends(conn), what="its end")
    assert run(alone, "SELECT 1", "n int") == [(1,)]


def test_it_ends_with_its_launcher(alone: Session, conn: Session) -> None:
    launch_in_a_row(alone)
    alone.close()
    wait_until(lambda: not backends(conn), what="the end of all")


def test_other_settings_do_not_meet_it(alone: Session, conn: Session) -> None:
    handles = launch_in_a_row(alone)
    spare = spare_beside(handles, conn)
    alone.execute("SET work_mem = '123kB'")
    shown = run(alone, "SELECT current_setting('work_mem'), pg_backend_pid()", "w text, pid int")
    assert shown[0][0] == "123kB"
    assert shown[0][1] != spare
    wait_until(lambda: spare not in backends(conn), what="its end")


def test_another_role_does_not_get_it(fresh_database: str, conn: Session, role: Callable[..., Role]) -> None:
    del fresh_database
    first, second = role("first"), role("second")
    conn.execute("SET pg_background.pool_size = 16")
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(first)))
    run(conn, "SELECT 1", "n int")
    launch_in_a_row(conn)
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(second)))
    assert run(conn, _USERS, _COLUMNS)[0][:3] == (second, second, "off")
    conn.execute("RESET ROLE")
    conn.execute("SELECT pg_background_detach_all_v2()")


@pytest.mark.parametrize(("before", "after"), [("SUPERUSER", "NOSUPERUSER"), ("NOSUPERUSER", "SUPERUSER")])
def test_a_change_of_its_roles_power_is_not_missed(
    fresh_database: str,
    conn: Session,
    role: Callable[..., Role],
    connect: Callable[..., Session],
    before: str,
    after: str,
) -> None:
    del fresh_database
    changed = role("changed", superuser=before == "SUPERUSER")
    session = connect(changed, **{"pg_background.pool_size": 16})
    run(session, "SELECT 1", "n int")
    spare = spare_beside(launch_in_a_row(session), conn)
    conn.execute(sql.SQL("ALTER ROLE {} " + after).format(sql.Identifier(changed)))
    seen = run(session, _USERS, _COLUMNS)[0]
    assert seen[:3] == (changed, changed, "on" if after == "SUPERUSER" else "off")
    assert seen[3] != spare
    session.execute("SELECT pg_background_detach_all_v2()")


def test_one_that_cannot_become_its_role_ends_at_once(alone: Session, conn: Session) -> None:
    """It must not stay as the login role."""
    name = sql.Identifier(alone.info.user)
    for _ in range(5):
        handles = launch_in_a_row(alone)
        conn.execute(sql.SQL("ALTER ROLE {} SUPERUSER").format(name))
        wait_until(lambda: not conn.rows(_LOGGED_IN, (WORKER_NAME, alone.info.user)), what="its end")
        conn.execute(sql.SQL("ALTER ROLE {} NOSUPERUSER").format(name))
        for handle in handles:
            result(alone, handle, _COLUMNS)


def test_a_job_in_it_sees_no_idle_timeout(alone: Session, conn: Session) -> None:
    alone.execute("SET pg_background.pool_idle_timeout = '300ms'")
    spare = spare_beside(launch_in_a_row(alone), conn)
    handle = launch(alone, "SELECT current_setting('idle_session_timeout'), pg_backend_pid()")
    assert result(alone, handle, "t text, pid int") == [("0", spare)]


@pytest.mark.parametrize("kind", ["ROLE", "DATABASE"])
def test_none_is_begun_where_connections_are_counted(alone: Session, conn: Session, kind: str) -> None:
    """It could take the last one, which a worker is to have."""
    limited = sql.Identifier(alone.info.user if kind == "ROLE" else alone.info.dbname)
    conn.execute(sql.SQL("ALTER {} {} CONNECTION LIMIT 50").format(sql.SQL(kind), limited))
    handles = launch_in_a_row(alone)
    assert {handle.pid for handle in handles} == backends(conn)


def test_none_is_begun_that_max_workers_forbids(alone: Session, conn: Session) -> None:
    alone.execute(f"SET pg_background.max_workers = {_IN_A_ROW}")
    assert {handle.pid for handle in launch_in_a_row(alone)} == backends(conn)


def test_one_that_was_terminated_is_not_missed(alone: Session, conn: Session) -> None:
    spare = spare_beside(launch_in_a_row(alone), conn)
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (spare,))
    name = alone.info.user
    assert run(alone, _USERS, _COLUMNS)[0][:3] == (name, name, "off")
