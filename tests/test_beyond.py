"""What goes beyond version 1.8: one-call runs, outcomes, waits for any and all of many workers, typed rows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg import sql

from tests.background import Handle, array, detach, launch, listed, result, run, wait, wait_any
from tests.clusters import Role, Session, sqlstate, wait_until
from tests.supervision import cpu_seconds

WAKE_SECONDS = 0.05  # in the suite, on a loaded machine; on an idle one the median is below 5 ms
MANY = 100


def outcome(session: Session, handle: Handle) -> dict[str, Any]:
    """A worker's outcome, by column."""
    return _record(session, "SELECT * FROM pg_background_outcome_v2(%s, %s)", handle)


def run_v2(session: Session, query: str, **options: Any) -> dict[str, Any]:
    """A one-call run's result, by column."""
    named = "".join(f", {name} => %s" for name in options)
    return _record(session, f"SELECT * FROM pg_background_run_v2(%s{named})", (query, *options.values()))


def _record(session: Session, call: str, values: Any) -> dict[str, Any]:
    cursor = session.execute(call, values)
    assert cursor.description is not None
    row = cursor.fetchone()
    assert row is not None
    return dict(zip([column.name for column in cursor.description], row))


def submit(session: Session, query: str) -> Handle:
    """Starts a worker whose output is thrown away."""
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def labelled(session: Session, query: str, label: str) -> Handle:
    """Starts a worker with a label."""
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_launch_v2(%s, 0, %s::text)", (query, label))[0])


@pytest.fixture
def lock(conn: Session) -> Iterator[Session]:
    """A session that holds the advisory lock 79, for which workers wait."""
    conn.execute("SELECT pg_advisory_lock(79)")
    yield conn
    conn.execute("SELECT pg_advisory_unlock_all()")


BLOCKED = "SELECT pg_advisory_xact_lock_shared(79)"


# --- run_v2 -----------------------------------------------------------------------------------------


def test_a_run_is_an_autonomous_transaction(alice: Session) -> None:
    alice.execute("CREATE TABLE audit (what text)")
    with alice.transaction(force_rollback=True):
        done = run_v2(alice, "INSERT INTO audit VALUES ($1)", label="audit", params=["it's"])
    assert alice.rows("SELECT what FROM audit") == [("it's",)]
    assert done["launched_at"] is not None
    assert done["elapsed_ms"] > 0
    expected = {
        "state": "stopped",
        "consumed": False,
        "completed": True,
        "has_error": False,
        "row_count": 1,
        "command_tag": "INSERT 0 1",
        "sqlstate": None,
        "error_message": None,
        "label": "audit",
        "timed_out": False,
    }
    assert {name: done[name] for name in expected} == expected
    assert listed(alice) == []


def test_a_run_never_raises_the_workers_error(alice: Session) -> None:
    done = run_v2(alice, "SELECT 1 / 0")
    assert (done["state"], done["has_error"], done["sqlstate"]) == ("error", True, "22012")
    assert done["error_message"] == "division by zero"
    assert run_v2(alice, "SELECT")["state"] == "stopped"
    assert run_v2(alice, "")["command_tag"] == ""


def test_a_run_throws_its_rows_away(alice: Session) -> None:
    done = run_v2(alice, "SELECT repeat('x', 1000) FROM generate_series(1, 20000)", queue_size=64)
    assert done["row_count"] == 20000


def test_a_run_ends_at_its_timeout(alice: Session) -> None:
    alice.execute("CREATE TABLE never (n int)")
    start = time.monotonic()
    done = run_v2(alice, "INSERT INTO never VALUES (1); SELECT pg_sleep(60)", timeout_ms=200)
    assert time.monotonic() - start < 20
    assert (done["state"], done["timed_out"], done["sqlstate"]) == ("canceled", True, "57014")
    assert "200 ms" in done["error_message"]
    assert alice.rows("SELECT * FROM never") == []
    assert listed(alice) == []


def test_a_cancelled_run_cancels_its_worker(alice: Session, conn: Session) -> None:
    for call in (
        "SELECT pg_background_run_v2('SELECT pg_sleep(61)')",
        "SELECT * FROM pg_background_run_query_v2('SELECT pg_sleep(61)') AS r(t text)",
        "SELECT * FROM pg_background_run_query_v2('SELECT pg_sleep(61)', timeout_ms => 60000) AS r(t text)",
        "SELECT * FROM pg_background_run_query_v2('SELECT 1 FROM pg_sleep(61)', col_def => 't int') AS r(t int)",
    ):
        alice.execute("SET statement_timeout = '200ms'")
        with sqlstate("57014"):
            alice.execute(call)
        alice.execute("RESET statement_timeout")
        assert listed(alice) == []
        wait_until(lambda: _sleepers(conn) == 0, what="the worker's end")


def _sleepers(conn: Session) -> int:
    active = "state = 'active' AND query LIKE '%pg_sleep(61)%' AND pid <> pg_backend_pid()"
    return int(conn.value(f"SELECT count(*) FROM pg_stat_activity WHERE {active}"))


def test_a_run_that_waits_for_its_launcher_is_a_deadlock(alice: Session) -> None:
    alice.execute("CREATE TABLE held (n int)")
    with sqlstate("40P01"), alice.transaction():
        alice.execute("LOCK TABLE held")
        run_v2(alice, "INSERT INTO held VALUES (1)")
    assert listed(alice) == []
    assert alice.rows("SELECT * FROM held") == []


def test_null_sql_is_refused(alice: Session) -> None:
    for call in ("pg_background_run_v2(NULL)", "pg_background_run_query_v2(NULL) AS r(n int)"):
        with sqlstate("22004"):
            alice.execute(f"SELECT * FROM {call}")


def test_nulls_mean_the_defaults(alice: Session) -> None:
    assert run_v2(alice, "SELECT 1", queue_size=None, timeout_ms=None, label=None, params=None)["state"] == "stopped"


# --- run_query_v2 -----------------------------------------------------------------------------------


def run_query(session: Session, query: str, columns: str, **options: Any) -> list[Any]:
    """The rows of a one-call run."""
    named = "".join(f", {name} => %s" for name in options)
    call = f"SELECT * FROM pg_background_run_query_v2(%s{named}) AS r({columns})"
    return session.rows(call, (query, *options.values()))


def test_run_query_returns_rows(alice: Session) -> None:
    for options in ({}, {"col_def": "n int, t text"}, {"timeout_ms": 60000, "label": "x", "queue_size": 64}):
        rows = run_query(alice, "SELECT g, 'v' || g FROM generate_series(1, 2000) g", "n int, t text", **options)
        assert rows == [(n, f"v{n}") for n in range(1, 2001)]
        assert listed(alice) == []
    assert run_query(alice, "VACUUM pg_class", "tag text") == [("VACUUM",)]


def test_run_query_raises_and_leaves_nothing_behind(alice: Session) -> None:
    with sqlstate("22012"):
        run_query(alice, "SELECT 1 / 0", "n int")
    with sqlstate("42804"):
        run_query(alice, "SELECT 1", "n text")
    with sqlstate("42804"):
        run_query(alice, "SELECT 1", "n int", col_def="n text")
    with sqlstate("57014", match="100 ms"):
        run_query(alice, "SELECT pg_sleep(60)", "n text", timeout_ms=100)
    with sqlstate("22012"):
        run_query(alice, "SELECT 1 / (500 - g) FROM generate_series(1, 1000) g", "n int")
    assert listed(alice) == []


@pytest.mark.parametrize(
    "col_def", ["n int) AS x, pg_sleep(1) AS f(", "n int; SELECT 1", "n int)", "n int) -- ", "(", "n int /* ) */ ) x("]
)
def test_a_column_list_cannot_break_out(alice: Session, col_def: str) -> None:
    with sqlstate("42601"):
        run_query(alice, "SELECT 1", "n int", col_def=col_def)
    assert listed(alice) == []


def test_a_column_list_may_hold_what_a_column_list_holds(alice: Session) -> None:
    columns = 'n numeric(5, 2), "a;)" text COLLATE "C" -- comment'
    rows = run_query(alice, "SELECT 1.25::numeric(5, 2), 'x'::text", 'n numeric(5, 2), "a;)" text', col_def=columns)
    assert [(str(n), t) for n, t in rows] == [("1.25", "x")]


# --- outcomes ---------------------------------------------------------------------------------------


def test_the_outcome_of_each_end(alice: Session, lock: Session) -> None:
    handle = labelled(alice, BLOCKED, "waits")
    seen = outcome(alice, handle)
    assert (seen["state"], seen["completed"], seen["has_error"], seen["label"]) == ("running", False, False, "waits")
    alice.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    wait(alice, handle)
    seen = outcome(alice, handle)
    assert (seen["state"], seen["completed"], seen["has_error"], seen["sqlstate"]) == ("canceled", True, True, "57014")
    detach(alice, handle)
    assert outcome(alice, handle)["state"] == "canceled"
    for start in (launch, submit):
        handle = start(alice, "SELECT g FROM generate_series(1, 7) g")
        wait(alice, handle)
        seen = outcome(alice, handle)
        assert (seen["row_count"], seen["command_tag"], seen["consumed"]) == (7, "SELECT 7", False)


def test_outcomes_survive_the_release_and_tell_that_rows_were_read(alice: Session, connect: Any) -> None:
    handle = launch(alice, "SELECT 1")
    assert result(alice, handle, "n int") == [(1,)]
    assert outcome(alice, handle)["consumed"] is True
    assert outcome(alice, handle)["state"] == "stopped"
    run(alice, "SELECT 2", "n int")  # by the same backend
    assert outcome(alice, handle)["row_count"] == 1
    kept = launch(alice, "SELECT 3")
    assert outcome(alice, handle)["state"] == "stopped"
    detach(alice, kept)
    assert outcome(connect(), handle)["state"] == "stopped"


def test_outcome_never_raises(alice: Session, connect: Callable[..., Session], role: Callable[..., Role]) -> None:
    handle = launch(alice, "SELECT 1")
    wait(alice, handle)
    stranger = connect(role("stranger"))
    for session, unknown in (
        (alice, Handle(1, 1)),
        (alice, Handle(handle.pid, 1)),
        (alice, Handle(-1, -1)),
        (stranger, handle),
    ):
        assert set(outcome(session, unknown).values()) == {None}
    assert set(_record(alice, "SELECT * FROM pg_background_outcome_v2(NULL, 1)", ()).values()) == {None}
    detach(alice, handle)


def test_result_and_error_info(alice: Session) -> None:
    alice.execute("CREATE TABLE positive (n int CONSTRAINT above CHECK (n > 0))")
    info = "SELECT * FROM pg_background_result_info_v2(%s, %s)"
    error = "SELECT * FROM pg_background_error_info_v2(%s, %s)"
    for start in (launch, submit):
        good, bad = start(alice, "SELECT 1; SELECT 2"), start(alice, "INSERT INTO positive VALUES (-1)")
        wait(alice, good)
        wait(alice, bad)
        seen = _record(alice, info, good)
        assert (seen["row_count"], seen["command_tag"], seen["completed"], seen["has_error"]) == (
            1,
            "SELECT 1",
            True,
            False,
        )
        assert seen["started_at"] < seen["finished_at"]
        assert set(_record(alice, error, good).values()) == {None}
        assert _record(alice, info, bad)["has_error"] is True
        seen = _record(alice, error, bad)
        assert (seen["sqlstate"], seen["table_name"], seen["constraint_name"]) == ("23514", "positive", "above")
        assert seen["schema_name"] == alice.value("SELECT current_schema()")
        assert "positive" in seen["message"]
        assert "-1" in seen["detail"]
        for handle in (good, bad):
            detach(alice, handle)
        assert _record(alice, error, bad)["constraint_name"] == "above"


def test_the_whole_sql(alice: Session, connect: Callable[..., Session]) -> None:
    query = "SELECT 1 -- " + "\u00e9\u4e2d'" * 500
    handle = launch(alice, query)
    assert alice.value("SELECT pg_background_full_sql_v2(%s, %s)", handle) == query
    wait(alice, handle)
    detach(alice, handle)
    assert alice.value("SELECT pg_background_full_sql_v2(%s, %s)", handle) == query
    assert connect().value("SELECT pg_background_full_sql_v2(%s, %s)", handle) == query[:120]
    handle = launch(alice, "!")
    assert alice.value("SELECT pg_background_full_sql_v2(%s, %s)", handle) == "!"
    detach(alice, handle)


def test_long_sql_is_not_kept_beyond_its_release(alice: Session) -> None:
    query = "SELECT 1 -- " + "\u00e9" * 50_000
    handle = launch(alice, query)
    assert alice.value("SELECT pg_background_full_sql_v2(%s, %s)", handle) == query
    detach(alice, handle)
    assert alice.value("SELECT pg_background_full_sql_v2(%s, %s)", handle) == query[:120]


def test_a_v1_handle_means_the_latest_worker_of_its_pid(alice: Session) -> None:
    def launch_v1(query: str) -> Handle:
        return Handle(alice.value("SELECT pg_background_launch(%s)", (query,)), 0)

    first = launch_v1("SELECT 1")
    assert result(alice, first, "n int") == [(1,)]
    assert outcome(alice, first)["consumed"] is True
    second = launch_v1("SELECT 2")
    wait(alice, second)
    detach(alice, second)
    third = launch_v1("SELECT 3")
    assert first == second == third
    detach(alice, third)
    assert alice.value("SELECT pg_background_full_sql_v2(%s, %s)", third) == "SELECT 3"
    assert outcome(alice, third)["consumed"] is False


INFORMED = ("result_info_v2(%s, %s)", "error_info_v2(%s, %s)", "full_sql_v2(%s, %s)")


@pytest.mark.parametrize("call", [*INFORMED, "wait_any_v2(ARRAY[(%s, %s)]::pg_background_handle[])"])
def test_wrong_handles(alice: Session, connect: Callable[..., Session], role: Callable[..., Role], call: str) -> None:
    handle = launch(alice, "SELECT 1")
    stranger = connect(role("stranger"))
    for session, wrong, code in (
        (alice, Handle(1, 1), "42704"),
        (alice, Handle(handle.pid, handle.cookie ^ 1), "55000"),
        (stranger, handle, "42501"),
        (stranger, Handle(1, 1), "42704"),
    ):
        with sqlstate(code):
            session.execute(f"SELECT pg_background_{call}", wrong)
    detach(alice, handle)


# --- any and all of many ----------------------------------------------------------------------------


def test_wait_any_returns_the_first_to_end(alice: Session, lock: Session) -> None:
    blocked = [launch(alice, BLOCKED) for _ in range(3)]
    quick = launch(alice, "SELECT pg_sleep(0.1)")
    assert wait_any(alice, [*blocked, quick]) == quick
    assert wait_any(alice, [quick, *blocked]) == quick
    start = time.monotonic()
    assert wait_any(alice, blocked, 100) is None
    assert 0.09 < time.monotonic() - start < 1
    submitted = submit(alice, "SELECT pg_sleep(0.1)")
    assert wait_any(alice, [*blocked, submitted]) == submitted
    lock.execute("SELECT pg_advisory_unlock(79)")
    while blocked:
        ended = wait_any(alice, blocked)
        assert ended is not None
        blocked.remove(ended)
    assert alice.value("SELECT pg_background_detach_all_v2()") == 5


def test_wait_any_of_none(alice: Session) -> None:
    assert wait_any(alice, []) is None
    nulls = "ARRAY[NULL, (NULL, 1), (1, NULL)]::pg_background_handle[]"
    assert alice.value(f"SELECT pg_background_wait_any_v2({nulls})") is None
    assert alice.value("SELECT pg_background_wait_any_v2(NULL)") is None


@pytest.mark.parametrize("call", ["wait_any_v2", "drain_v2"])
@pytest.mark.parametrize("rows", ["ARRAY[{0}], ARRAY[{0}]", "ARRAY[NULL, {0}]"])
def test_handles_of_two_dimensions_are_refused(alice: Session, call: str, rows: str) -> None:
    handle = launch(alice, "SELECT 1")
    handles = rows.format(f"ROW({handle.pid}, {handle.cookie})::pg_background_handle")
    with sqlstate("22023", "dimension"):
        alice.execute(f"SELECT pg_background_{call}(ARRAY[{handles}])")
    assert result(alice, handle, "n int") == [(1,)]


def test_wait_any_reads_chatty_workers(alice: Session) -> None:
    handles = [launch(alice, "SELECT repeat('x', 1000) FROM generate_series(1, 5000) g", 64) for _ in range(3)]
    for _ in range(3):
        ended = wait_any(alice, handles)
        assert ended is not None
        handles.remove(ended)
        assert len(result(alice, ended)) == 5000


def test_wait_any_from_another_session(alice: Session, connect: Callable[..., Session], lock: Session) -> None:
    blocked, detached = launch(alice, BLOCKED), launch(alice, "SELECT pg_sleep(0.2)")
    detach(alice, detached)
    other = connect()
    assert wait_any(other, [blocked, detached]) == detached
    assert wait_any(alice, [blocked, detached]) == detached
    assert wait_any(other, [blocked], 50) is None
    alice.execute("SELECT pg_background_cancel_v2(%s, %s)", blocked)
    assert wait_any(other, [blocked]) == blocked
    detach(alice, blocked)


def test_wait_any_wakes_at_once_among_many(connect: Callable[..., Session], conn: Session) -> None:
    """100 workers; each in turn is woken by the lock that it waits for, and tells when."""
    launcher = connect(**{"pg_background.max_workers": MANY, "pg_background.pool_size": 0})
    capacity = conn.value("SELECT current_setting('max_connections')::int")
    count = min(MANY, capacity - 20)
    conn.execute("SELECT pg_advisory_lock(80, n) FROM generate_series(1, %s) n", (count,))
    query = "SELECT pg_advisory_xact_lock_shared(80, {}); SELECT clock_timestamp()"
    handles = [launch(launcher, query.format(n)) for n in range(1, count + 1)]
    late = []
    for n in (count, count // 2, 30, 7, 1):  # descending: what is removed is behind the next one
        threading.Timer(0.15, conn.execute, ("SELECT pg_advisory_unlock(80, %s)", (n,))).start()
        before = cpu_seconds(launcher.pid)
        ended = wait_any(launcher, handles)
        now = launcher.value("SELECT clock_timestamp()")
        assert ended == handles[n - 1]
        assert cpu_seconds(launcher.pid) - before < 0.05
        handles.remove(ended)
        late.append((now - result(launcher, ended, "at timestamptz")[0][0]).total_seconds())
    print(f"wait_any among {count}: woken after {statistics.median(late) * 1000:.1f} ms (median)")
    assert statistics.median(late) < WAKE_SECONDS
    conn.execute("SELECT pg_advisory_unlock_all()")
    outcomes = launcher.rows(f"SELECT state FROM pg_background_drain_v2({array(handles)}, 60000)")
    assert outcomes == [("stopped",)] * len(handles)


def test_drain_tells_all_outcomes_in_order_and_lets_go(alice: Session) -> None:
    queries = [
        "SELECT pg_sleep(0.2)",
        "SELECT 1 / 0",
        "SELECT 1",
        "SELECT repeat('x', 1000) FROM generate_series(1, 5000)",
    ]
    handles = [launch(alice, query, 64) for query in queries]
    handles.append(submit(alice, "SELECT pg_sleep(0.1)"))
    wanted = [*handles, handles[0]]
    rows = alice.rows(f"SELECT pid, cookie, state, row_count FROM pg_background_drain_v2({array(wanted)})")
    assert [Handle(pid, cookie) for pid, cookie, _, _ in rows] == wanted
    states = [(state, count) for _, _, state, count in rows]
    assert states == [
        ("stopped", 1),
        ("error", None),
        ("stopped", 1),
        ("stopped", 5000),
        ("stopped", 1),
        ("stopped", 1),
    ]
    assert listed(alice) == []


def test_drain_against_one_deadline(alice: Session, lock: Session) -> None:
    handles = [launch(alice, "SELECT 1"), *(launch(alice, BLOCKED) for _ in range(3))]
    start = time.monotonic()
    rows = alice.rows(f"SELECT state, completed FROM pg_background_drain_v2({array(handles)}, 300)")
    assert time.monotonic() - start < 1
    assert rows == [("stopped", True), *[("running", False)] * 3]
    assert listed(alice) == []
    lock.execute("SELECT pg_advisory_unlock(79)")
    for handle in handles:
        wait(alice, handle)
        assert outcome(alice, handle)["state"] == "stopped"


def test_drain_with_a_wrong_handle_takes_nothing(alice: Session) -> None:
    handle = launch(alice, "SELECT 1")
    with sqlstate("42704"):
        alice.execute(f"SELECT pg_background_drain_v2({array([handle, Handle(1, 1)])})")
    assert result(alice, handle, "n int") == [(1,)]


def test_a_cancelled_drain_keeps_its_workers(alice: Session, lock: Session) -> None:
    handles = [launch(alice, BLOCKED), submit(alice, BLOCKED)]
    for call in (f"pg_background_drain_v2({array(handles)})", f"pg_background_wait_any_v2({array(handles)})"):
        alice.execute("SET statement_timeout = '100ms'")
        with sqlstate("57014"):
            alice.execute(f"SELECT * FROM {call}")
        alice.execute("RESET statement_timeout")
    assert len(listed(alice)) == 2
    lock.execute("SELECT pg_advisory_unlock(79)")
    assert len(alice.rows(f"SELECT * FROM pg_background_drain_v2({array(handles)})")) == 2


def test_drain_notices_a_deadlock(alice: Session, conn: Session) -> None:
    alice.execute("CREATE TABLE held (n int)")
    handle: Handle | None = None
    with sqlstate("40P01"), alice.transaction():
        alice.execute("LOCK TABLE held")
        handle = launch(alice, "INSERT INTO held VALUES (1)")
        alice.execute(f"SELECT pg_background_drain_v2({array([launch(alice, 'SELECT 1'), handle])})")
    assert handle is not None
    wait(alice, handle)
    assert alice.value("SELECT pg_background_purge_v2()") == 2


# --- all of this session's --------------------------------------------------------------------------


def test_cancel_by_label(alice: Session, lock: Session) -> None:
    for label in ("etl:1", "etl:2", "other", "100%", ""):
        labelled(alice, BLOCKED, label)
    launch(alice, BLOCKED)
    assert alice.value("SELECT pg_background_cancel_by_label_v2('none')") == 0
    assert alice.value("SELECT pg_background_cancel_by_label_v2('etl:%')") == 2
    assert alice.value("SELECT pg_background_cancel_by_label_v2('100\\%%', 5000)", ()) == 1
    states = dict(alice.rows("SELECT label, state FROM pg_background_list WHERE label <> ''"))
    assert states["100%"] == "canceled"
    assert states["other"] == "running"
    assert alice.value("SELECT pg_background_cancel_by_label_v2('%', 5000)") >= 2
    assert alice.value("SELECT pg_background_cancel_all_v2()") == 1
    wait_until(lambda: {worker.state for worker in listed(alice)} == {"canceled"}, what="the ends")
    assert alice.value("SELECT pg_background_cancel_all_v2()") == 0
    assert alice.value("SELECT pg_background_purge_v2()") == 6


def test_purge_releases_only_what_has_ended(alice: Session, lock: Session) -> None:
    launch(alice, BLOCKED)
    for start in (launch, submit):
        wait(alice, start(alice, "SELECT 1"))
    assert alice.value("SELECT pg_background_purge_v2()") == 2
    assert alice.value("SELECT pg_background_purge_v2()") == 0
    assert [worker.state for worker in listed(alice)] == ["running"]
    assert alice.value("SELECT pg_background_detach_all_v2()") == 1
    assert alice.value("SELECT pg_background_detach_all_v2()") == 0


def test_they_pass_over_the_workers_of_other_roles(conn: Session, role: Callable[..., Role], lock: Session) -> None:
    name = sql.Identifier(role("bob"))
    launch(conn, BLOCKED)
    conn.execute(sql.SQL("SET ROLE {}").format(name))
    labelled(conn, BLOCKED, "x")
    assert conn.value("SELECT pg_background_cancel_all_v2()") == 1
    assert conn.value("SELECT pg_background_detach_all_v2()") == 1
    assert conn.value("SELECT pg_background_cancel_by_label_v2('%')") == 0
    conn.execute("RESET ROLE")
    assert [worker.state for worker in listed(conn)] == ["running"]
    conn.execute("SELECT pg_advisory_unlock(79)")
    assert conn.value("SELECT pg_background_detach_all_v2()") == 1


# --- rows without a column list ---------------------------------------------------------------------


@pytest.fixture
def orders(alice: Session) -> Session:
    """alice, with a table that has a dropped column, a domain and a modifier."""
    alice.execute("CREATE DOMAIN code AS varchar(5) CHECK (value <> 'no')")
    alice.execute("CREATE TABLE orders (id int, gone int, amount numeric(10, 2), code code, tags text[])")
    alice.execute("ALTER TABLE orders DROP COLUMN gone")
    alice.execute("INSERT INTO orders VALUES (1, 2.5, 'abc', '{a,\"b,c\"}'), (2, NULL, NULL, NULL)")
    return alice


def typed(session: Session, query: str, rowtype: str) -> list[Any]:
    """A worker's rows, as text."""
    handle = launch(session, query)
    call = f"SELECT r::text FROM pg_background_result_v2(%s, %s, NULL::{rowtype}) AS r"
    return [row[0] for row in session.rows(call, handle)]


def test_rows_of_a_tables_type(orders: Session) -> None:
    assert typed(orders, "SELECT * FROM orders", "orders") == ['(1,2.50,abc,"{a,""b,c""}")', "(2,,,)"]
    handle = launch(orders, "SELECT * FROM orders")
    call = "SELECT id, code FROM pg_background_result_v2(%s, %s, NULL::orders) ORDER BY id DESC"
    assert orders.rows(call, handle) == [(2, None), (1, "abc")]
    assert typed(orders, "SELECT 7", "int") == ["7"]
    assert typed(orders, "SELECT 'ab'::code", "code") == ["ab"]
    assert typed(orders, "VACUUM", "text") == ["VACUUM"]


def test_another_row_type_takes_nothing(orders: Session) -> None:
    handle = launch(orders, "SELECT 1 AS id")
    for wrong in ("orders", "text", "code"):
        with sqlstate("42804"):
            orders.execute(f"SELECT * FROM pg_background_result_v2(%s, %s, NULL::{wrong})", handle)
    assert result(orders, handle, "n int") == [(1,)]
    with sqlstate("42704"):
        orders.execute("SELECT * FROM pg_background_result_v2(%s, %s, NULL::orders)", handle)
    with sqlstate("22004"):
        orders.execute("SELECT * FROM pg_background_result_v2(NULL, 1, NULL::orders)")


def as_json(session: Session, query: str) -> list[Any]:
    """A worker's rows, as objects."""
    call = "SELECT * FROM pg_background_result_json_v2(%s, %s)"
    return [row[0] for row in session.rows(call, launch(session, query))]


def test_rows_as_json(orders: Session) -> None:
    assert as_json(orders, "SELECT * FROM orders") == [
        {"id": 1, "amount": 2.5, "code": "abc", "tags": ["a", "b,c"]},
        {"id": 2, "amount": None, "code": None, "tags": None},
    ]
    assert as_json(orders, 'SELECT 1, 2, 3 AS q, 4 AS "{schema}", 5 AS "a""\\\u00e9", 6 AS "?column?_2"') == [
        {"?column?": 1, "?column?_2": 2, "q": 3, "{schema}": 4, 'a"\\\u00e9': 5, "?column?_2_2": 6}
    ]
    assert as_json(
        orders, "SELECT o AS \"order\", json '{\"a\": [1]}', true, 'NaN'::float8 FROM orders o WHERE id = 2"
    ) == [
        {
            "order": {"id": 2, "amount": None, "code": None, "tags": None},
            "json": {"a": [1]},
            "?column?": True,
            "float8": "NaN",
        }
    ]
    assert as_json(orders, "SELECT 1 WHERE false") == []
    assert as_json(orders, "VACUUM") == [{"command_tag": "VACUUM"}]
    with sqlstate("22012"):
        as_json(orders, "SELECT 1 / 0")
    assert listed(orders) == []
