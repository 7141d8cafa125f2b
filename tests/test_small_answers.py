"""Jobs whose answers are read past libpq, and those whose sessions are cleaned right behind them.

A statement that writes and returns no rows, and one that was seen to return few and plain rows, has the clean-up of its
session sent with it. Whatever comes instead of what was expected is exact all the same, or an error.
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.background import Handle, detach, is_gone, is_idle, is_waiting, launch, listed, result, run, wait
from tests.clusters import Session, sqlstate, wait_until
from tests.supervision import descriptors, stopped, supervisor_pid, terminate_supervisor

_SLOW_INSERT = "INSERT INTO log SELECT 1, 'slow' FROM pg_sleep(0.5)"
_MANY = 100_000


@pytest.fixture
def writer(alice: Session) -> Session:
    """A session whose role has a table, and a kept worker session."""
    alice.execute("CREATE TABLE log (n int, what text)")
    run(alice, "SELECT 1", "n int")
    return alice


def outcome(session: Session, handle: Handle) -> Any:
    """State, command tag and SQLSTATE of a worker, as the view shows it."""
    query = "SELECT state, command_tag, sqlstate FROM pg_background_activity WHERE pid = %s AND cookie = %s"
    rows = session.rows(query, handle)
    return rows[0] if rows else None


def worker_pid(session: Session) -> int:
    """The backend that the next job runs in."""
    return int(run(session, "SELECT pg_backend_pid()", "pid int")[0][0])


# --- statements that return no rows ---------------------------------------------------------------


def test_writing_statements_give_their_tags_and_one_session_runs_them_all(writer: Session) -> None:
    before = worker_pid(writer)
    assert run(writer, "INSERT INTO log VALUES (1, 'a'), (2, 'b')") == [("INSERT 0 2",)]
    assert run(writer, " update log SET n = 3;") == [("UPDATE 2",)]
    assert run(writer, "DELETE FROM log WHERE what = 'a'") == [("DELETE 1",)]
    assert run(writer, "INSERT INTO log VALUES (4, 'c') RETURNING n", "n int") == [(4,)]
    assert writer.rows("SELECT * FROM log ORDER BY n") == [(3, "b"), (4, "c")]
    assert worker_pid(writer) == before


def test_parameters_go_the_same_way(writer: Session) -> None:
    call = "SELECT pid, cookie FROM pg_background_launch_v2(%s, 0, 'a label', %s)"
    for value in ('it\'s \\ "quoted"', None, "again"):
        insert = Handle(*writer.rows(call, ("INSERT INTO log VALUES ($1::int, $2)", ["7", value]))[0])
        assert result(writer, insert) == [("INSERT 0 1",)]
        select = Handle(*writer.rows(call, ("SELECT n, what FROM log WHERE what IS NOT DISTINCT FROM $1", [value]))[0])
        assert result(writer, select, "n int, what text") == [(7, value)]


def test_notices_come_in_order_and_before_the_error(writer: Session) -> None:
    writer.execute("""
        CREATE FUNCTION talk() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE NOTICE 'n = %', NEW.n;
            RAISE WARNING '%', repeat('long ', 5000);
            IF NEW.n = 2 THEN
                RAISE EXCEPTION 'no two' USING ERRCODE = 'P0002', HINT = 'Take three.', TABLE = 'log', COLUMN = 'n';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER talk BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION talk();
    """)
    before = worker_pid(writer)
    assert run(writer, "INSERT INTO log VALUES (1, 'a')") == [("INSERT 0 1",)]
    long = "WARNING: " + "long " * 5000
    assert writer.messages() == ["NOTICE: n = 1", long]
    writer.notices.clear()
    with sqlstate("P0002") as raised:
        run(writer, "INSERT INTO log VALUES (2, 'b')")
    assert (raised.diag.message_primary, raised.diag.message_hint) == ("no two", "Take three.")
    assert (raised.diag.table_name, raised.diag.column_name) == ("log", "n")
    assert "background worker" in (raised.diag.context or "")
    assert writer.messages() == ["NOTICE: n = 2", long]
    assert worker_pid(writer) == before


def test_settings_that_a_trigger_changes_are_those_of_its_job_only(writer: Session) -> None:
    writer.execute("""
        CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM set_config('DateStyle', 'German', false), set_config('TimeZone', 'Asia/Tokyo', false),
                    set_config('work_mem', '1MB', false);
            RETURN NEW;
        END $$;
        CREATE TRIGGER change BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION change();
    """)
    query = "SELECT current_setting('DateStyle'), current_setting('TimeZone'), current_setting('work_mem'), now()::text"
    columns = "style text, zone text, memory text, at text"
    before = run(writer, query, columns)[0]
    for _ in range(3):
        assert run(writer, "INSERT INTO log VALUES (1, 'a')") == [("INSERT 0 1",)]
        assert run(writer, query, columns)[0][:3] == before[:3]
        assert run(writer, "SELECT date '2024-02-01', timestamptz '2024-02-01 12:00+00'", "d date, t timestamptz") == [
            tuple(writer.rows("SELECT date '2024-02-01', timestamptz '2024-02-01 12:00+00'")[0])
        ]


@pytest.mark.parametrize("style", ["ISO, MDY", "SQL, DMY", "German, DMY"])
def test_rows_that_a_rule_makes_of_an_insert_are_exact(writer: Session, style: str) -> None:
    writer.execute("""
        CREATE RULE instead AS ON INSERT TO log DO INSTEAD
            SELECT g AS n, 'row ' || g AS what, date '2024-02-01' + g AS d FROM generate_series(1, 3) g
    """)
    writer.execute(f"SET DateStyle = '{style}'")
    expected = writer.rows("SELECT g, 'row ' || g, date '2024-02-01' + g FROM generate_series(1, 3) g")
    for _ in range(2):
        assert run(writer, "INSERT INTO log VALUES (1, 'a')", "n int, what text, d date") == expected


def test_rows_of_a_rule_that_cannot_be_read_are_refused_and_nothing_else(writer: Session) -> None:
    writer.execute("CREATE RULE instead AS ON INSERT TO log DO INSTEAD SELECT 'log'::regclass AS r")
    for _ in range(2):
        with sqlstate("0A000") as raised:
            run(writer, "INSERT INTO log VALUES (1, 'a')", "r regclass")
        assert "pool_size" in (raised.diag.message_hint or "")
    writer.execute("SET pg_background.pool_size = 0")
    assert run(writer, "INSERT INTO log VALUES (1, 'a')", "r regclass") == [("log",)]


def test_many_rows_that_a_rule_makes_of_an_insert_come_all(writer: Session) -> None:
    writer.execute(
        f"CREATE RULE instead AS ON INSERT TO log DO INSTEAD SELECT g AS n FROM generate_series(1, {_MANY}) g"
    )
    assert run(writer, "INSERT INTO log VALUES (1, 'a')", "n int") == [(n,) for n in range(1, _MANY + 1)]
    assert run(writer, "SELECT 1", "n int") == [(1,)]


def test_what_a_job_leaves_behind_is_gone_before_its_result_is_read(writer: Session, conn: Session) -> None:
    writer.execute("""
        CREATE FUNCTION lock() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_lock(4711); RETURN NEW; END $$;
        CREATE TRIGGER lock BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION lock();
    """)
    handle = launch(writer, "INSERT INTO log VALUES (1, 'a')")
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = %s"
    wait_until(lambda: is_idle(conn, handle.pid) and conn.value(locks, (handle.pid,)) == 0)
    assert result(writer, handle) == [("INSERT 0 1",)]


@pytest.mark.parametrize("query", ["INSERT INTO log VALUES (1, 'a')", "SELECT 'INSERT 0 1'"])
@pytest.mark.parametrize("way", ["idle for too long", "terminated"])
def test_a_kept_session_that_has_ended_is_replaced(writer: Session, conn: Session, query: str, way: str) -> None:
    """Though all that it was to say of its clean-up was heard, with the answer of its last job."""
    if way == "idle for too long":
        writer.execute("SET pg_background.pool_idle_timeout = '200ms'")
    for _ in range(5):
        handle = launch(writer, query)
        wait_until(partial(_has_ended, conn, handle.pid))
        assert result(writer, handle) == [("INSERT 0 1",)]
        if way == "terminated":
            conn.execute("SELECT pg_terminate_backend(%s, 10000)", (handle.pid,))
        wait_until(partial(is_gone, conn, handle.pid))
    wait_until(lambda: writer.rows("SELECT DISTINCT state FROM pg_background_activity") == [("stopped",)])
    assert writer.messages() == []


def _has_ended(session: Session, pid: int) -> bool:
    return is_idle(session, pid) or is_gone(session, pid)


def test_a_clean_up_too_long_to_be_taken_at_once_keeps_no_launch(writer: Session, conn: Session) -> None:
    """The settings of the session are a part of it."""
    writer.execute("SELECT set_config('myapp.big', repeat('x', 600000), false)")
    run(writer, "SELECT 1", "n int")
    with conn.transaction():
        conn.execute(f"LOCK TABLE {writer.value('SELECT current_schema()')}.log")
        started = time.monotonic()
        handles = [launch(writer, "INSERT INTO log VALUES (1, 'a')") for _ in range(3)]
        assert time.monotonic() - started < 5
    assert [result(writer, handle) for handle in handles] == [[("INSERT 0 1",)]] * 3


def test_rows_of_several_rules_are_not_mixed(writer: Session) -> None:
    """Those of the first are the result, as where libpq reads them."""
    writer.execute("CREATE RULE a AS ON INSERT TO log DO ALSO SELECT 1 AS n")
    writer.execute("CREATE RULE b AS ON INSERT TO log DO ALSO SELECT 'abc' AS what, 5 AS n")
    for _ in range(2):
        assert run(writer, "INSERT INTO log VALUES (1, 'a')", "n int") == [(1,)]
        assert run(writer, "/* not seen to write */ INSERT INTO log VALUES (1, 'a')", "n int") == [(1,)]


# --- rows that were plain before ------------------------------------------------------------------


def test_a_query_that_was_plain_may_return_other_types_later(writer: Session) -> None:
    """Of settings that the server reports the values are known; other ones are refused once."""
    writer.execute("SET DateStyle = 'SQL, DMY'")
    query = "SELECT changing()"
    for declared, value, refused in (
        ("int", "1", 0),
        ("date", "'2024-02-01'", 0),
        ("text", "'plain'", 0),
        ("regclass", "'log'::regclass", 1),
        ("float8", "0.1", 0),
        ("int", "2", 0),
        ("money", "'1.00'", 1),
    ):
        writer.execute(
            f"DROP FUNCTION IF EXISTS changing();"
            f" CREATE FUNCTION changing() RETURNS {declared} LANGUAGE sql AS $$ SELECT {value}::{declared} $$"
        )
        for number in range(3):
            if number < refused:
                with sqlstate("0A000") as raised:
                    run(writer, query, f"v {declared}")
                assert "Launch it again" in (raised.diag.message_hint or "")
            else:
                assert run(writer, query, f"v {declared}") == writer.rows(query)


def test_a_query_that_failed_was_not_plain(writer: Session) -> None:
    with sqlstate("42P01"):
        run(writer, "SELECT 'later'::regclass", "r regclass")
    writer.execute("CREATE TABLE later ()")
    for _ in range(3):
        assert run(writer, "SELECT 'later'::regclass", "r regclass") == [("later",)]


def test_a_tables_columns_may_change_at_any_time(writer: Session) -> None:
    query = "SELECT * FROM changing"
    for declared, value in (("int", "1"), ("regclass", "'log'::regclass"), ("int", "2"), ("point", "'(0.1,1)'")):
        writer.execute(f"DROP TABLE IF EXISTS changing; CREATE TABLE changing AS SELECT {value}::{declared} AS v")
        for _ in range(3):
            assert run(writer, query, f"v {declared}") == writer.rows(query)


def test_a_query_that_was_plain_may_change_settings_later(writer: Session) -> None:
    writer.execute("CREATE TABLE style (name text)")
    writer.execute("""
        CREATE FUNCTION day() RETURNS date LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM set_config('DateStyle', s.name, false) FROM style s;
            RETURN date '2024-02-01';
        END $$
    """)
    query = "SELECT day()"
    for _ in range(3):
        assert run(writer, query, "d date") == writer.rows("SELECT date '2024-02-01'")
    writer.execute("INSERT INTO style VALUES ('SQL, DMY')")
    for _ in range(3):
        with sqlstate("0A000"):
            run(writer, query, "d date")
    assert run(writer, "SHOW DateStyle") == writer.rows("SHOW DateStyle")


def test_a_query_that_was_small_may_return_many_rows_later(writer: Session) -> None:
    writer.execute("""
        CREATE TABLE growing AS SELECT 0 AS n;
        CREATE FUNCTION all_of_them() RETURNS SETOF int LANGUAGE sql AS 'SELECT n FROM growing ORDER BY n'
    """)
    query = "SELECT all_of_them()"
    for _ in range(3):
        assert run(writer, query, "n int") == [(0,)]
    writer.execute(f"INSERT INTO growing SELECT g FROM generate_series(1, {_MANY}) g")
    before = worker_pid(writer)
    for _ in range(3):
        assert run(writer, query, "n int") == [(n,) for n in range(_MANY + 1)]
    assert worker_pid(writer) == before
    assert writer.messages() == []
    writer.execute("DELETE FROM growing WHERE n > 0")
    for _ in range(3):
        assert run(writer, query, "n int") == [(0,)]


def test_a_value_of_many_megabytes_takes_no_longer_than_through_libpq(writer: Session) -> None:
    writer.execute("""
        CREATE TABLE size AS SELECT 1 AS bytes;
        CREATE FUNCTION big() RETURNS text LANGUAGE sql AS $$ SELECT repeat('x', bytes) FROM size $$
    """)
    for _ in range(3):
        assert run(writer, "SELECT big()") == [("x",)]
    writer.execute("UPDATE size SET bytes = 60000000")
    seconds = []
    for _ in range(2):  # with the clean-up behind it, and then through libpq
        started = time.monotonic()
        handle = launch(writer, "SELECT big()")
        query = "SELECT length(r), r = repeat('x', 60000000) FROM pg_background_result_v2(%s, %s) AS t(r text)"
        assert writer.rows(query, handle) == [(60_000_000, True)]
        seconds.append(time.monotonic() - started)
    assert seconds[0] < 3 * seconds[1] + 0.5


@pytest.mark.parametrize("rows", [1, 20_000])
def test_text_in_another_encoding_is_refused_however_much_it_is(writer: Session, rows: int) -> None:
    writer.execute("""  -- what it returns is text of UTF8, too, when it is written in LATIN1
        CREATE TABLE encoding (name text, rows int);
        INSERT INTO encoding VALUES (getdatabaseencoding(), 1);
        CREATE FUNCTION texts() RETURNS SETOF text LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM set_config('client_encoding', name, false) FROM encoding;
            RETURN QUERY SELECT chr(195) || chr(164) FROM encoding, generate_series(1, rows);
        END $$
    """)
    for _ in range(3):
        assert run(writer, "SELECT texts()") == [("\u00c3\u00a4",)]
    writer.execute("UPDATE encoding SET name = 'LATIN1', rows = %s", (rows,))
    for _ in range(3):
        with sqlstate("0A000") as raised:
            run(writer, "SELECT texts()")
        assert "client_encoding" in (raised.diag.message_primary or "")


def test_a_query_that_was_plain_keeps_its_session_whatever_it_says(writer: Session) -> None:
    writer.execute("""
        CREATE TABLE loud (yes bool);
        CREATE FUNCTION speak() RETURNS int LANGUAGE plpgsql AS $$
        BEGIN
            IF EXISTS (SELECT FROM loud) THEN RAISE NOTICE 'loud'; END IF;
            RETURN 1;
        END $$
    """)
    for _ in range(3):
        assert run(writer, "SELECT speak()", "n int") == [(1,)]
    writer.execute("INSERT INTO loud VALUES (true)")
    pids = set()
    for _ in range(6):
        assert run(writer, "SELECT speak()", "n int") == [(1,)]
        pids.add(worker_pid(writer))
    assert writer.messages() == ["NOTICE: loud"] * 6
    assert len(pids) == 1


def test_a_plain_query_that_fails_later_is_its_error(writer: Session) -> None:
    writer.execute("""
        CREATE TABLE divisor AS SELECT 1 AS n;
        CREATE FUNCTION divided() RETURNS int LANGUAGE sql AS 'SELECT 10 / n FROM divisor'
    """)
    query = "SELECT divided()"
    for _ in range(3):
        assert run(writer, query, "n int") == [(10,)]
    before = worker_pid(writer)
    writer.execute("UPDATE divisor SET n = 0")
    for _ in range(3):
        with sqlstate("22012"):
            run(writer, query, "n int")
    assert worker_pid(writer) == before


def test_a_column_list_that_does_not_fit_takes_nothing(writer: Session) -> None:
    for _ in range(3):
        handle = launch(writer, "SELECT 5, 'five'")
        with sqlstate("42804"):
            result(writer, handle, "n int")
        with sqlstate("42804"):
            result(writer, handle, "n int, what int")
        assert result(writer, handle, "n int, what text") == [(5, "five")]


def test_runs_whose_rows_nobody_wants_use_one_session(writer: Session) -> None:
    pids = {writer.value("SELECT pid FROM pg_background_run_v2('SELECT * FROM log')") for _ in range(10)}
    assert len(pids) == 1
    writer.execute(f"INSERT INTO log SELECT g, 'many' FROM generate_series(1, {_MANY}) g")
    for _ in range(3):
        row = writer.rows("SELECT state, row_count FROM pg_background_run_v2('SELECT * FROM log')")[0]
        assert row == ("stopped", _MANY)


# --- when something happens to them ---------------------------------------------------------------


@pytest.mark.parametrize("looks", [False, True], ids=["unread", "looked at"])
@pytest.mark.parametrize("way", ["exit", "terminate"])
def test_the_outcome_of_an_orphan_is_its_own_not_that_of_the_clean_up(
    writer: Session, conn: Session, way: str, looks: bool
) -> None:
    handle = launch(writer, _SLOW_INSERT)
    if looks:
        assert [worker.state for worker in listed(writer)] == ["running"]
    if way == "terminate":
        conn.execute("SELECT pg_terminate_backend(%s, 10000)", (writer.pid,))
    writer.close()
    wait_until(lambda: outcome(conn, handle) == ("stopped", "INSERT 0 1", None))


def test_the_end_of_a_job_that_nobody_reads_is_seen(writer: Session, conn: Session) -> None:
    handle = launch(writer, "INSERT INTO log VALUES (1, 'a')")
    wait_until(lambda: outcome(conn, handle) == ("stopped", "INSERT 0 1", None))
    failed = launch(writer, "INSERT INTO log VALUES (1 / (SELECT 0), 'a')")
    wait_until(lambda: outcome(conn, failed) == ("error", None, "22012"))
    assert result(writer, handle) == [("INSERT 0 1",)]
    with sqlstate("22012"):
        result(writer, failed)


def test_a_detached_ones_session_runs_the_next_job(writer: Session, conn: Session) -> None:
    handle = launch(writer, "INSERT INTO log VALUES (1, 'a')")
    detach(writer, handle)
    wait_until(lambda: outcome(conn, handle) == ("stopped", "INSERT 0 1", None))
    wait_until(lambda: worker_pid(writer) == handle.pid, what="its session")


@pytest.mark.parametrize("kind", ["tracked", "detached"])
def test_another_supervisor_tells_the_same_outcome(writer: Session, conn: Session, kind: str) -> None:
    handle = launch(writer, _SLOW_INSERT)
    if kind == "detached":
        detach(writer, handle)
    terminate_supervisor(conn)
    if kind == "tracked":
        assert result(writer, handle) == [("INSERT 0 1",)]
    else:
        wait(writer, handle)
    wait_until(lambda: outcome(conn, handle) == ("stopped", "INSERT 0 1", None))
    assert writer.rows("SELECT what FROM log") == [("slow",)]


def test_a_cancel_is_its_own_and_the_session_is_not_used_again(writer: Session, conn: Session) -> None:
    handle = launch(writer, "INSERT INTO log SELECT 1, 'never' FROM pg_sleep(30)")
    wait_until(lambda: is_waiting(conn, handle, "PgSleep"))
    writer.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    with sqlstate("57014"):
        result(writer, handle)
    wait_until(lambda: outcome(conn, handle) == ("canceled", None, "57014"))
    assert worker_pid(writer) != handle.pid
    assert writer.rows("SELECT * FROM log") == []


def test_the_termination_of_its_backend_is_its_error(writer: Session, conn: Session) -> None:
    handle = launch(writer, "INSERT INTO log SELECT 1, 'never' FROM pg_sleep(30)")
    wait_until(lambda: is_waiting(conn, handle, "PgSleep"))
    conn.execute("SELECT pg_terminate_backend(%s, 10000)", (handle.pid,))
    with sqlstate("57P01"):
        result(writer, handle)
    wait_until(lambda: outcome(conn, handle) == ("error", None, "57P01"))
    assert run(writer, "INSERT INTO log VALUES (1, 'a')") == [("INSERT 0 1",)]


def test_a_result_that_waits_for_nobody_to_read_it_outlives_its_backend(writer: Session, conn: Session) -> None:
    """It ends itself when its session was idle for pool_idle_timeout; what it has said is there to be read."""
    writer.execute("SET pg_background.pool_idle_timeout = '100ms'")
    handle = launch(writer, "INSERT INTO log VALUES (1, 'a')")
    wait_until(lambda: not conn.rows("SELECT FROM pg_stat_activity WHERE pid = %s", (handle.pid,)))
    assert result(writer, handle) == [("INSERT 0 1",)]
    assert writer.messages() == []
    assert run(writer, "SELECT 1", "n int") == [(1,)]


@pytest.mark.local_server
@pytest.mark.parametrize("rows", [3, _MANY])
def test_no_descriptor_is_needed_to_read_rows(writer: Session, rows: int) -> None:
    """Where libpq cannot be had to read them, they are read without it."""
    handle = launch(writer, f"SELECT g, 'row ' || g FROM generate_series(1, {rows}) g")
    soft, hard = resource.prlimit(writer.pid, resource.RLIMIT_NOFILE)
    before = descriptors(writer.pid)
    highest = max(int(entry.name) for entry in Path(f"/proc/{writer.pid}/fd").iterdir())
    resource.prlimit(writer.pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        assert result(writer, handle, "n int, what text") == [(n, f"row {n}") for n in range(1, rows + 1)]
    finally:
        resource.prlimit(writer.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors(writer.pid) == before
    assert worker_pid(writer) == handle.pid


# --- what others see ------------------------------------------------------------------------------


def test_another_session_that_waits_sees_the_end_at_once(writer: Session, conn: Session) -> None:
    """Though the supervisor reads what sessions tell of launched jobs only so often."""
    for _ in range(20):
        handle = launch(writer, "INSERT INTO log SELECT 1, 'a' FROM pg_sleep(0.1)")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait, conn, handle)
            result(writer, handle)
            ended = time.monotonic()
            waiting.result()
            assert time.monotonic() - ended < 0.05


def test_an_end_is_known_to_whoever_asks_after_it(writer: Session, conn: Session) -> None:
    """And a cancel that comes after it meets no later job of the same session."""
    call = "SELECT state FROM pg_background_outcome_v2(%s, %s)"
    for number in range(200):
        handle = launch(writer, f"INSERT INTO log VALUES ({number}, 'a')")
        assert result(writer, handle) == [("INSERT 0 1",)]
        assert conn.value(call, handle) == "stopped"
        conn.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    assert writer.value("SELECT count(*) FROM log") == 200


def test_jobs_told_of_with_their_ends_stand_in_the_view(writer: Session, conn: Session) -> None:
    """A supervisor that was busy finds the beginnings and ends of many in its line."""
    with stopped(supervisor_pid(conn)):
        handles = []
        for number in range(20):
            handle = launch(writer, f"INSERT INTO log VALUES ({number}, 'a')")
            assert result(writer, handle) == [("INSERT 0 1",)]
            handles.append(handle)
    wait_until(lambda: {outcome(conn, handle) for handle in handles} == {("stopped", "INSERT 0 1", None)})
    query = "SELECT bool_and(finished_at >= launched_at AND elapsed < '5 s') FROM pg_background_activity"
    assert conn.value(query)
