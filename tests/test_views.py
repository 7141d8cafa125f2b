"""pg_background_activity and pg_background_list: what they show, to whom, and that all counts agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from psycopg import sql

from tests.background import Handle, detach, is_waiting, launch, listed, result, wait
from tests.clusters import Role, Session, wait_until
from tests.test_survival import ended, submit

_COLUMNS = [
    "pid",
    "cookie",
    "launcher_pid",
    "role",
    "label",
    "state",
    "sql_preview",
    "launched_at",
    "finished_at",
    "elapsed",
    "progress_pct",
    "progress_msg",
    "progress_bar",
    "command_tag",
    "row_count",
    "sqlstate",
    "error_message",
    "wait_event_type",
    "wait_event",
]


def activity(session: Session, handle: Handle, columns: str = "*") -> dict[str, Any]:
    """A worker's row, once it shows."""
    wait_until(
        lambda: session.rows("SELECT FROM pg_background_activity WHERE pid = %s AND cookie = %s", handle), what="a row"
    )
    cursor = session.execute(f"SELECT {columns} FROM pg_background_activity WHERE pid = %s AND cookie = %s", handle)
    (row,) = cursor.fetchall()
    return dict(zip([column.name for column in cursor.description or ()], row))


def test_activity_has_the_columns_of_the_contract(conn: Session) -> None:
    cursor = conn.execute("SELECT * FROM pg_background_activity LIMIT 0")
    assert [column.name for column in cursor.description or ()] == _COLUMNS


def test_activity_shows_a_running_worker(alice: Session) -> None:
    handle = launch(alice, "SELECT pg_background_progress(45, 'nearly'), pg_sleep(60)")
    row = wait_until(lambda: (r := activity(alice, handle))["progress_pct"] and r["wait_event"] and r, what="a sleep")
    assert (row["launcher_pid"], row["role"], row["state"]) == (alice.pid, alice.info.user, "running")
    assert (row["progress_pct"], row["progress_msg"], row["progress_bar"]) == (
        45,
        "nearly",
        "[#########...........]  45%",
    )
    assert (row["finished_at"], row["sqlstate"], row["command_tag"]) == (None, None, None)
    assert (row["wait_event_type"], row["wait_event"]) == ("Timeout", "PgSleep")
    assert row["elapsed"].total_seconds() >= 0
    alice.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 0)", handle)


@pytest.mark.parametrize(("percent", "bar"), [(0, "[....................]   0%"), (100, "[####################] 100%")])
def test_progress_bar(alice: Session, percent: int, bar: str) -> None:
    handle = launch(alice, f"SELECT pg_background_progress({percent})")
    wait(alice, handle)
    wait_until(lambda: activity(alice, handle)["progress_bar"] == bar, what=bar)


def test_only_own_roles_are_seen_and_all_by_members_of_pg_read_all_stats(
    alice: Session, conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    handle = submit(alice, "SELECT 'secret'")
    ended(alice, handle)
    bob, member, monitor = role("bob"), role("member"), role("monitor")
    conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(alice.info.user), sql.Identifier(member)))
    conn.execute(sql.SQL("GRANT pg_read_all_stats TO {}").format(sql.Identifier(monitor)))
    counts = {
        who: connect(who).value("SELECT count(*) FROM pg_background_activity WHERE cookie = %s", (handle.cookie,))
        for who in (bob, member, monitor)
    }
    assert counts == {bob: 0, member: 1, monitor: 1}


def test_a_function_in_the_query_sees_no_hidden_row(
    alice: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    ended(alice, submit(alice, "SELECT 'secret'"))
    bob = connect(role("bob", schema=True))
    bob.execute(
        "CREATE FUNCTION peep(text) RETURNS bool LANGUAGE plpgsql COST 0.0001 AS"
        " $$BEGIN RAISE NOTICE '%', $1; RETURN true; END$$"
    )
    bob.execute("SELECT FROM pg_background_activity WHERE peep(sql_preview)")
    assert bob.notices == []


# --- they agree -----------------------------------------------------------------------------------


def _ends(alice: Session, conn: Session) -> dict[str, tuple[Handle, tuple[str, str | None]]]:
    """A worker for each kind of end, with the state and SQLSTATE that it has after it."""
    sleep = "SELECT pg_sleep(60)"
    ends = {
        "commit": (launch(alice, "SELECT 1"), ("stopped", None)),
        "commit of a submitted job": (submit(alice, "SELECT 1"), ("stopped", None)),
        "error": (launch(alice, "SELECT 1/0"), ("error", "22012")),
        "error of a submitted job": (submit(alice, "SELECT 1/0"), ("error", "22012")),
        "cancel": (launch(alice, sleep), ("canceled", "57014")),
        "cancel of a submitted job": (submit(alice, sleep), ("canceled", "57014")),
        "pg_cancel_backend": (launch(alice, sleep), ("error", "57014")),
        "pg_terminate_backend": (launch(alice, sleep), ("error", "57P01")),
        "termination of a submitted job": (submit(alice, sleep), ("error", "57P01")),
        "statement_timeout": (launch(alice, f"SET LOCAL statement_timeout = 100; {sleep}"), ("error", "57014")),
    }
    alice.execute("SET pg_background.worker_timeout = 100")
    ends["worker_timeout"] = (launch(alice, sleep), ("error", "57014"))
    ends["worker_timeout of a submitted job"] = (submit(alice, sleep), ("error", "57014"))
    alice.execute("RESET pg_background.worker_timeout")
    for kind, (handle, (state, code)) in ends.items():
        if state == "canceled":
            alice.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
        elif kind == "pg_cancel_backend":
            wait_until(lambda: is_waiting(conn, handle, "PgSleep"))  # noqa: B023 - called at once
            conn.execute("SELECT pg_cancel_backend(%s)", (handle.pid,))
        elif code == "57P01":
            conn.execute("SELECT pg_terminate_backend(%s, 10000)", (handle.pid,))
    return ends


def test_list_view_and_counts_agree_after_every_kind_of_end(fresh_database: str, alice: Session, conn: Session) -> None:
    alice.execute("SET pg_background.pool_size = 0")  # else ended submitted workers make room for their sessions
    ends = _ends(alice, conn)
    for handle, _ in ends.values():
        wait(alice, handle)
    states = {kind: (ended(alice, handle)[0], ended(alice, handle)[3]) for kind, (handle, _) in ends.items()}
    assert states == {kind: end for kind, (_, end) in ends.items()}
    assert {worker.cookie: worker.state for worker in listed(alice)} == {
        handle.cookie: end[0] for handle, end in ends.values()
    }
    view = alice.rows("SELECT cookie, state FROM pg_background_list")
    assert dict(view) == {worker.cookie: worker.state for worker in listed(alice)}
    expected = Counter(state for _, (state, _) in ends.values())
    stats = alice.rows("SELECT * FROM pg_background_stats_v2()")[0]
    counted = (len(ends), expected["stopped"], expected["error"], expected["canceled"], 0)
    assert stats[:5] == counted
    for handle, _ in ends.values():
        detach(alice, handle)
    assert alice.rows("SELECT * FROM pg_background_stats_v2()")[0][:5] == counted
    assert listed(alice) == []


def test_detached_workers_are_counted_at_their_end(alice: Session) -> None:
    handles = [launch(alice, query) for query in ("SELECT pg_sleep(0.3)", "SELECT 1/0 FROM pg_sleep(0.3)", "SELECT 1")]
    for handle in handles:
        detach(alice, handle)
    for handle in handles:
        ended(alice, handle)
    counts = "SELECT workers_completed, workers_failed, workers_active FROM pg_background_stats_v2()"
    wait_until(lambda: alice.rows(counts) == [(2, 1, 0)], what="all three counted")


# --- how long -------------------------------------------------------------------------------------


def test_finished_rows_go_after_pg_background_history(alice: Session) -> None:
    kept = submit(alice, "SELECT 1")
    alice.execute("SET pg_background.history = '400ms'")
    handle = submit(alice, "SELECT 1")
    assert ended(alice, handle)[0] == "stopped"
    wait_until(
        lambda: not alice.rows("SELECT FROM pg_background_activity WHERE cookie = %s", (handle.cookie,)), what="its end"
    )
    assert ended(alice, kept)[0] == "stopped"


def test_result_of_a_finished_worker_outlives_its_row(alice: Session) -> None:
    alice.execute("SET pg_background.history = 0")
    handle = launch(alice, "SELECT 5")
    wait(alice, handle)
    assert result(alice, handle, "n int") == [(5,)]
