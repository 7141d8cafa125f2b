"""Reading results: rows and command tags, column lists, once, notices, and readers that stop half-way."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.background import Handle, detach, is_idle, launch, listed, result, run, wait
from tests.clusters import Session, sqlstate, wait_until

_BIG = "SELECT g, repeat('x', 100) FROM generate_series(1, {}) g"


@pytest.fixture
def log_table(alice: Session) -> str:
    """A table of alice's, empty."""
    alice.execute("CREATE TABLE log (n int, what text)")
    return "log"


# --- what comes back ------------------------------------------------------------------------------


def test_rows_come_back_in_order(alice: Session) -> None:
    query = "SELECT g, 'row ' || g FROM generate_series(1, 5000) g"
    assert run(alice, query, "n int, t text") == [(n, f"row {n}") for n in range(1, 5001)]


def test_usual_types_come_back_exactly(alice: Session) -> None:
    values = """
        1::int2, 2::int4, -3::int8, 1.5::float4, 'NaN'::float8, 0.1::float8 + 0.2, 1234.5600::numeric, true,
        ''::text, 'NULL'::text, E'quote '' " back \\\\ tab \\t'::text, NULL::text, '2024-02-29'::date,
        '2024-02-29 12:34:56.789012+05:30'::timestamptz, '1 mon 2 days 03:04:05.6'::interval,
        '5d5e9f8c-1111-4222-8333-944444444444'::uuid, '{"a": [1, null]}'::jsonb, '\\x00ff5c27'::bytea,
        '{1,NULL,3}'::int4[], '{a,"NULL",NULL,"b,c"}'::text[]"""
    types = alice.rows(f"SELECT {values}")
    columns = (
        "a int2, b int4, c int8, d float4, e float8, f float8, g numeric, h bool, i text, j text, k text, l text,"
        " m date, n timestamptz, o interval, p uuid, q jsonb, r bytea, s int4[], t text[]"
    )
    assert str(run(alice, f"SELECT {values}", columns)) == str(types)


def test_rows_come_from_the_last_statement_only(alice: Session, log_table: str) -> None:
    assert run(alice, "SELECT 'first', 1; SELECT 2", "n int") == [(2,)]
    assert run(alice, "SELECT 1; SELECT 2 WHERE false", "n int") == []
    assert run(alice, "SELECT 1; INSERT INTO log VALUES (3) RETURNING n", "n int") == [(3,)]


def test_command_tags_where_the_last_statement_returns_no_rows(alice: Session, log_table: str) -> None:
    assert run(alice, "INSERT INTO log VALUES (1), (2)") == [("INSERT 0 2",)]
    query = "SELECT 'lost'; CREATE TEMP TABLE t (); UPDATE log SET n = 0; DELETE FROM log WHERE false"
    assert run(alice, query) == [("SELECT 1",), ("CREATE TABLE",), ("UPDATE 2",), ("DELETE 0",)]
    assert run(alice, "DO $$ BEGIN NULL; END $$;") == [("DO",)]


@pytest.mark.parametrize("query", ["", " ", ";", ";;\n;", "-- nothing", "/* nothing */", "-- one\n; /* two */ ;"])
def test_empty_sql_gives_no_rows(alice: Session, query: str) -> None:
    assert run(alice, query) == []
    assert listed(alice) == []


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("EXPLAIN (COSTS OFF) SELECT 1", "line text"),
        ("SHOW search_path", "value text"),
        ("VALUES (1), (2)", "n int"),
        ("TABLE pg_am", 'o oid, n name, h regproc, t "char"'),
        ("FETCH ALL FROM c", None),
        ("EXECUTE nothing", None),
        ("SELECT pg_sleep(0)", "x text"),
    ],
)
def test_other_statements_with_rows(alice: Session, query: str, columns: str | None) -> None:
    if columns is None:
        with sqlstate("34000" if "FETCH" in query else "26000"):
            run(alice, query)
    elif "am" in query:
        assert len(run(alice, query, columns)) == alice.value("SELECT count(*) FROM pg_am")
    else:
        assert run(alice, query, columns)


def test_cursor_within_one_string(alice: Session) -> None:
    query = "DECLARE c CURSOR FOR SELECT generate_series(1, 10); MOVE 7 IN c; FETCH ALL FROM c"
    assert run(alice, query, "n int") == [(8,), (9,), (10,)]


def test_column_names_are_the_callers(alice: Session) -> None:
    alice.execute("SELECT 1")
    cursor = alice.execute(
        "SELECT r.* FROM pg_background_result(pg_background_launch('SELECT 1 AS a, 2 AS a')) AS r(x int, \"Y\" int)"
    )
    assert [column.name for column in cursor.description or ()] == ["x", "Y"]
    assert cursor.fetchall() == [(1, 2)]


# --- column lists ---------------------------------------------------------------------------------

_MISFITS = [
    ("SELECT 1", "a text"),
    ("SELECT 1", "a int8"),
    ("SELECT 1", "a int, b int"),
    ("SELECT 1, 2", "a int"),
    ("SELECT 'x'::text", "a varchar"),
    ("SELECT 'x'::varchar(3)", "a varchar(4)"),
    ("SELECT 1::numeric(10, 2)", "a numeric(10, 3)"),
    ("SELECT now()", "a timestamp"),
    ("SELECT '{1}'::int[]", "a int8[]"),
    ("VACUUM", "a int"),
    ("VACUUM", "a text, b text"),
]


@pytest.mark.parametrize(("query", "columns"), _MISFITS)
def test_column_list_that_does_not_fit_is_an_error_and_takes_nothing(alice: Session, query: str, columns: str) -> None:
    handle = launch(alice, query.replace("VACUUM", "VACUUM pg_am"))
    for _ in range(2):
        with sqlstate("42804"):
            result(alice, handle, columns)
    assert [(worker.pid, worker.consumed) for worker in listed(alice)] == [(handle.pid, False)]
    right = {
        "SELECT 1": "a int",
        "SELECT 1, 2": "a int, b int",
        "SELECT 'x'::text": "a text",
        "SELECT 'x'::varchar(3)": "a varchar(3)",
        "SELECT 1::numeric(10, 2)": "a numeric(10, 2)",
        "SELECT now()": "a timestamptz",
        "SELECT '{1}'::int[]": "a int[]",
        "VACUUM": "a text",
    }[query]
    assert len(result(alice, handle, right)) == 1


def test_column_list_that_does_not_fit_a_running_worker_takes_nothing(alice: Session) -> None:
    handle = launch(alice, "SELECT g, pg_sleep(0.001) FROM generate_series(1, 200) g")
    with sqlstate("42804"):
        result(alice, handle, "n text")
    assert len(result(alice, handle, "n int, v text")) == 200


def test_misfit_of_v1_can_be_asked_again_too(alice: Session) -> None:
    pid = alice.value("SELECT pg_background_launch('SELECT 1')")
    with sqlstate("42804"):
        alice.execute("SELECT * FROM pg_background_result(%s) AS r(a text)", (pid,))
    assert alice.value("SELECT * FROM pg_background_result(%s) AS r(a int)", (pid,)) == 1


def test_domain_column_comes_as_its_base_type(alice: Session) -> None:
    alice.execute("CREATE DOMAIN positive AS numeric(6, 2) CHECK (VALUE > 0)")
    handle = launch(alice, "SELECT 1.5::positive")
    with sqlstate("42804"):
        result(alice, handle, "a positive")
    assert str(result(alice, handle, "a numeric(6, 2)")[0][0]) == "1.50"


def test_result_without_columns_is_an_error(alice: Session) -> None:
    with sqlstate("42804"):
        run(alice, "SELECT", "a int")
    for worker in listed(alice):
        detach(alice, Handle(worker.pid, worker.cookie))


def test_no_column_list_is_the_servers_error(alice: Session) -> None:
    handle = launch(alice, "SELECT 1")
    with sqlstate("42601"):
        alice.execute("SELECT * FROM pg_background_result_v2(%s, %s)", handle)
    assert result(alice, handle, "a int") == [(1,)]


# --- once -----------------------------------------------------------------------------------------


def test_results_are_read_once(alice: Session) -> None:
    handle = launch(alice, "SELECT 1")
    assert result(alice, handle, "a int") == [(1,)]
    for _ in range(2):
        with sqlstate("42704", match=str(handle.pid)) as raised:
            result(alice, handle, "a int")
        assert raised.diag.message_hint
    pid = alice.value("SELECT pg_background_launch('SELECT 1')")
    alice.execute("SELECT * FROM pg_background_result(%s) AS r(a int)", (pid,))
    with sqlstate("42704"):
        alice.execute("SELECT * FROM pg_background_result(%s) AS r(a int)", (pid,))


def test_failed_worker_is_released_by_its_error(alice: Session) -> None:
    handle = launch(alice, "SELECT 1/0")
    with sqlstate("22012"):
        result(alice, handle, "a int")
    with sqlstate("42704"):
        result(alice, handle, "a int")
    assert listed(alice) == []


def test_empty_result_and_tags_are_read_once_too(alice: Session) -> None:
    for query in ("SELECT 1::text WHERE false", "", "VACUUM pg_am"):
        handle = launch(alice, query)
        result(alice, handle)
        with sqlstate("42704"):
            result(alice, handle)


def test_self_join_reads_once(alice: Session) -> None:
    handle = launch(alice, "SELECT 1")
    read = f"pg_background_result_v2({handle.pid}, {handle.cookie})"
    with sqlstate("42704"):
        alice.execute(f"SELECT * FROM {read} AS a(n int), {read} AS b(n int)")
    assert listed(alice) == []


def test_consumed_shows_while_rows_are_read(alice: Session) -> None:
    handle = launch(alice, "SELECT g FROM generate_series(1, 3) g")
    wait(alice, handle)
    assert [worker.consumed for worker in listed(alice)] == [False]
    # plpgsql's RETURN QUERY reads everything at once; so look from within the worker's own rows: a notice cannot,
    # a second reader can.
    query = (
        "SELECT (SELECT bool_and(l.consumed) FROM pg_background_list_v2() AS l(pid int4, cookie int8,"
        " launched_at timestamptz, user_id oid, queue_size int4, state text, sql_preview text, last_error text,"
        " consumed bool)) FROM pg_background_result_v2({}, {}) AS r(n int)"
    )
    assert alice.rows(query.format(*handle)) == [(None,)] * 3


# --- in larger queries ----------------------------------------------------------------------------


def test_launch_nested_in_result_as_ora2pg_writes_it(alice: Session, log_table: str) -> None:
    alice.execute("""
        CREATE FUNCTION log_atx(what text) RETURNS void LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO log VALUES (1, what);
        END $$;
        CREATE FUNCTION log(what text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
        DECLARE
            v_query text;
        BEGIN
            v_query := 'SELECT true FROM log_atx ( ' || quote_nullable(what) || ' )';
            PERFORM * FROM pg_background_result(pg_background_launch(v_query)) AS p (ret boolean);
        END $$""")
    with alice.transaction(force_rollback=True):
        alice.execute("SELECT log('it''s kept')")
        alice.execute("INSERT INTO log VALUES (2, 'lost')")
    assert alice.rows("SELECT n, what FROM log") == [(1, "it's kept")]
    alice.execute(
        "SELECT * FROM pg_background_result(pg_background_launch('INSERT INTO log VALUES (3)')) AS p (result text)"
    )
    assert alice.value("SELECT count(*) FROM log") == 2
    assert listed(alice) == []


def test_nested_call_passes_values_and_errors_of_a_function(alice: Session) -> None:
    alice.execute("""
        CREATE FUNCTION ask(query text) RETURNS int LANGUAGE plpgsql AS $$
        DECLARE
            v_ret int;
        BEGIN
            SELECT v INTO v_ret FROM pg_background_result(pg_background_launch(query)) AS p (v int);
            RETURN v_ret;
        EXCEPTION WHEN division_by_zero THEN
            RETURN -1;
        END $$""")
    assert alice.rows("SELECT ask('SELECT ' || g) FROM generate_series(1, 20) g") == [(n,) for n in range(1, 21)]
    assert alice.value("SELECT ask('SELECT 1/0')") == -1
    assert listed(alice) == []


def test_lateral_launches_one_worker_a_row(alice: Session) -> None:
    rows = alice.rows(
        "SELECT g, r.n FROM generate_series(1, 5) g,"
        " LATERAL pg_background_result(pg_background_launch('SELECT 10 * ' || g)) AS r(n int)"
    )
    assert rows == [(g, 10 * g) for g in range(1, 6)]
    assert listed(alice) == []


def test_limit_leaves_nothing_behind(alice: Session) -> None:
    handle = launch(alice, _BIG.format(50000))
    read = f"pg_background_result_v2({handle.pid}, {handle.cookie}) AS r(n int, x text)"
    assert alice.rows(f"SELECT n FROM {read} LIMIT 3") == [(1,), (2,), (3,)]
    assert listed(alice) == []
    with sqlstate("42704"):
        alice.execute(f"SELECT n FROM {read} LIMIT 3")
    subquery = "SELECT (SELECT n FROM pg_background_result(pg_background_launch('SELECT 8')) AS r(n int) LIMIT 1)"
    assert alice.value(subquery) == 8
    assert listed(alice) == []


def test_cursor_closed_early_leaves_nothing_behind(alice: Session) -> None:
    handle = launch(alice, _BIG.format(50000))
    with alice.transaction():
        alice.execute(
            "DECLARE c CURSOR FOR SELECT n FROM"
            f" pg_background_result_v2({handle.pid}, {handle.cookie}) AS r(n int, x text)"
        )
        assert alice.rows("FETCH 2 FROM c") == [(1,), (2,)]
        alice.execute("CLOSE c")
    assert listed(alice) == []


def test_cursor_never_fetched_keeps_the_result(alice: Session) -> None:
    handle = launch(alice, "SELECT 1")
    with alice.transaction():
        alice.execute(
            f"DECLARE c CURSOR FOR SELECT * FROM pg_background_result_v2({handle.pid}, {handle.cookie}) AS r(n int)"
        )
    assert result(alice, handle, "n int") == [(1,)]


def test_create_table_as_join_and_insert(alice: Session, log_table: str) -> None:
    read = "pg_background_result(pg_background_launch('SELECT g, g::text FROM generate_series(1, 1000) g'))"
    alice.execute(f"CREATE TABLE copied AS SELECT * FROM {read} AS r(n int, what text)")
    alice.execute(f"INSERT INTO log SELECT * FROM {read} AS r(n int, what text)")
    joined = f"SELECT count(*) FROM copied JOIN log USING (n, what) JOIN {read} AS r(n int, what text) USING (n, what)"
    assert alice.value(joined) == 1000


def test_two_results_are_read_in_turns(alice: Session) -> None:
    one, two = (launch(alice, f"SELECT g FROM generate_series({start}, 20000, 2) g") for start in (1, 2))
    rows = alice.rows(
        f"SELECT n FROM pg_background_result_v2({one.pid}, {one.cookie}) AS r(n int) UNION ALL"
        f" SELECT n FROM pg_background_result_v2({two.pid}, {two.cookie}) AS r(n int)"
    )
    assert sorted(rows) == [(n,) for n in range(1, 20001)]


# --- readers that fail ----------------------------------------------------------------------------


def test_reader_that_fails_half_way_leaves_nothing_behind(alice: Session) -> None:
    handle = launch(alice, _BIG.format(30000))
    with sqlstate("22012"):
        alice.execute(
            f"SELECT 1 / (n - 20000) FROM pg_background_result_v2({handle.pid}, {handle.cookie}) AS r(n int, x text)"
        )
    assert listed(alice) == []
    assert run(alice, "SELECT 1", "n int") == [(1,)]


def test_job_that_fails_half_way_shows_no_rows(alice: Session) -> None:
    with sqlstate("22012"):
        run(alice, "SELECT 1 / (20000 - g) FROM generate_series(1, 30000) g", "n int")
    assert listed(alice) == []


def test_a_wait_that_fails_while_it_takes_rows_in_loses_none(alice: Session, conn: Session) -> None:
    run(alice, "SELECT 1", "n int")
    wait(alice, launch(alice, "SELECT"))
    handle = launch(alice, "SELECT format('row %s', g) FROM generate_series(1, 1000) g")
    wait_until(lambda: is_idle(conn, handle.pid))
    alice.execute("SET lock_timeout = '100ms'")
    with conn.transaction():
        conn.execute("LOCK TABLE pg_catalog.pg_type IN ACCESS EXCLUSIVE MODE")  # in which a column's type is looked up
        with sqlstate("55P03"):
            wait(alice, handle)
    alice.execute("RESET lock_timeout")
    assert result(alice, handle) == [(f"row {number}",) for number in range(1, 1001)]


def test_cancelled_reader_leaves_nothing_behind(alice: Session, conn: Session, log_table: str) -> None:
    query = "INSERT INTO log SELECT 1; SELECT g, pg_sleep(0.01) FROM generate_series(1, 100) g"
    handle = launch(alice, query)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reading = pool.submit(result, alice, handle, "n int, v text")
        wait_until(
            lambda: conn.value("SELECT state = 'active' FROM pg_stat_activity WHERE pid = %s", (alice.pid,)),
            what="the reader",
        )
        conn.execute("SELECT pg_cancel_backend(%s)", (alice.pid,))
        with sqlstate("57014"):
            reading.result()
    assert [worker.pid for worker in listed(alice) if worker.consumed] in ([], [handle.pid])
    for worker in listed(alice):
        detach(alice, Handle(worker.pid, worker.cookie))
    assert run(alice, "SELECT 1", "n int") == [(1,)]


# --- notices --------------------------------------------------------------------------------------

_TALK = """
    DO $$ BEGIN
        RAISE {} 'one' USING DETAIL = 'a detail', HINT = 'a hint', ERRCODE = '01234';
        RAISE INFO 'two';
    END $$"""


@pytest.mark.parametrize("level", ["WARNING", "NOTICE", "INFO", "LOG", "DEBUG"])
def test_notices_come_at_their_own_level_in_order(alice: Session, level: str) -> None:
    if level in ("LOG", "DEBUG"):
        alice.execute("SET client_min_messages = debug1")
        alice.notices.clear()
    handle = launch(alice, _TALK.format(level))
    wait(alice, handle)
    alice.notices.clear()
    assert result(alice, handle) == [("DO",)]
    heard = [notice for notice in alice.notices if notice.message in ("one", "two")]
    shown = {"DEBUG": "DEBUG"}.get(level, level)
    assert [(notice.severity, notice.message) for notice in heard] == [(shown, "one"), ("INFO", "two")]
    assert (heard[0].detail, heard[0].hint) == ("a detail", "a hint")
    assert heard[0].sqlstate == "01234"


def test_notices_show_no_traceback(alice: Session) -> None:
    run(alice, _TALK.format("WARNING"))
    seen = "\n".join(f"{notice.message} {notice.context}" for notice in alice.notices)
    assert "one" in seen
    assert "Traceback" not in seen


def test_notices_are_filtered_by_the_inherited_level(alice: Session) -> None:
    alice.execute("SET client_min_messages = error")
    run(alice, _TALK.format("WARNING"))
    assert [message for message in alice.messages() if "one" in message] == []
    assert "INFO: two" in alice.messages()


def test_vacuum_verbose_says_what_it_does(alice: Session, log_table: str) -> None:
    run(alice, "VACUUM (VERBOSE) log")
    said = [notice for notice in alice.notices if notice.severity == "INFO"]
    assert any("log" in str(notice.message) for notice in said)


def test_notices_among_rows_and_before_an_error_come_too(alice: Session) -> None:
    alice.execute(
        "CREATE FUNCTION say(n int) RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE 'n is %', n; RETURN 1 / (3 - n); END $$"
    )
    with sqlstate("22012"):
        run(alice, "SELECT say(g) FROM generate_series(1, 5) g", "n int")
    assert alice.messages() == ["NOTICE: n is 1", "NOTICE: n is 2", "NOTICE: n is 3"]


def test_thousands_of_notices_keep_their_order_beyond_memory(alice: Session) -> None:
    handle = launch(
        alice, "DO $$ BEGIN FOR i IN 1 .. 6000 LOOP RAISE NOTICE '% %', i, repeat('x', 1000); END LOOP; END $$"
    )
    wait(alice, handle)
    assert result(alice, handle) == [("DO",)]
    numbers = [int(str(notice.message).split(" ", 1)[0]) for notice in alice.notices]
    assert numbers == list(range(1, 6001))


def test_a_cancel_among_notices_leaves_nothing_behind(alice: Session) -> None:
    handle = launch(alice, "DO $$BEGIN FOR i IN 1..200000 LOOP RAISE NOTICE '%', i; END LOOP; END$$")
    wait(alice, handle)
    alice.execute("SET statement_timeout = '100ms'")
    with sqlstate("57014"):
        result(alice, handle)
    alice.execute("RESET statement_timeout")
    assert listed(alice) == []
    assert run(alice, "SELECT 5", "n int") == [(5,)]


def test_detached_workers_notices_are_not_heard(alice: Session) -> None:
    handle = launch(alice, _TALK.format("WARNING"))
    wait(alice, handle)
    detach(alice, handle)
    assert alice.messages() == []


# --- volume ---------------------------------------------------------------------------------------


def _memory_kb(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise AssertionError(f"/proc/{pid}/status has no {field}")


@pytest.mark.local_server
def test_ten_million_rows_stream_through_little_memory(alice: Session) -> None:
    run(alice, "SELECT g FROM generate_series(1, 10000) g", "n int")
    before = _memory_kb(alice.pid, "VmRSS")
    total = alice.rows(
        "SELECT count(*), sum(n) FROM pg_background_result(pg_background_launch("
        "'SELECT g FROM generate_series(1, 10000000) g')) AS r(n int)"
    )
    assert total == [(10_000_000, 10_000_000 * 10_000_001 // 2)]
    assert _memory_kb(alice.pid, "VmHWM") - before < 100 * 1024


@pytest.mark.local_server
def test_waiting_for_a_large_result_keeps_memory_small(alice: Session) -> None:
    run(alice, "SELECT 1", "n int")
    before = _memory_kb(alice.pid, "VmRSS")
    handle = launch(alice, "SELECT repeat(md5(g::text), 32) FROM generate_series(1, 150000) g")
    wait(alice, handle)
    assert _memory_kb(alice.pid, "VmHWM") - before < 60 * 1024
    assert (
        alice.value("SELECT sum(length(t)) FROM pg_background_result_v2(%s, %s) AS r(t text)", handle) == 150000 * 1024
    )


@pytest.mark.local_server
def test_descriptors_and_memory_stay_flat_over_many_launches(alice: Session) -> None:
    def descriptors() -> int:
        return len(list(Path(f"/proc/{alice.pid}/fd").iterdir()))

    many = (
        "SELECT count(*) FROM generate_series(1, %s) g,"
        " LATERAL pg_background_result(pg_background_launch('SELECT 1')) AS r(n int)"
    )
    alice.execute(many, (30,))
    fds, memory = descriptors(), _memory_kb(alice.pid, "VmRSS")
    for _ in range(10):
        assert alice.value(many, (40,)) == 40
        with sqlstate("22012"):
            run(alice, "SELECT 1/0")
        wait(alice, launch(alice, "SELECT 1"))
        for worker in listed(alice):
            detach(alice, Handle(worker.pid, worker.cookie))
    assert descriptors() == fds
    assert _memory_kb(alice.pid, "VmRSS") - memory < 8 * 1024


@pytest.mark.local_server
def test_output_kept_in_files_leaves_no_file(alice: Session) -> None:
    handle = launch(alice, "SELECT repeat('x', 1000) FROM generate_series(1, 20000) g")
    wait(alice, handle)
    detach(alice, handle)
    links = [str(link.readlink()) for link in Path(f"/proc/{alice.pid}/fd").iterdir()]
    assert [link for link in links if "pgsql_tmp" in link] == []


def test_column_list_may_be_wide(alice: Session) -> None:
    names = ", ".join(f"c{n} int" for n in range(500))
    values = ", ".join(str(n) for n in range(500))
    assert run(alice, f"SELECT {values}", names) == [tuple(range(500))]


def test_error_of_psycopg_is_the_servers(connect: Callable[..., Session]) -> None:
    session = connect()
    with pytest.raises(psycopg.errors.DivisionByZero):
        run(session, "SELECT 1/0")


def test_cancel_behind_the_last_row_leaves_no_worker(conn: Session) -> None:
    """What a cancel makes of pg_background_result_v2 there: its last statement is never reached."""
    handle = launch(conn, "SELECT repeat('x', 100) FROM generate_series(1, 1000)")
    opened = conn.value("SELECT _pg_background_open_result(%s, %s)", handle)
    assert "_pg_background_batches" in opened
    assert conn.value("SELECT count(*) > 1 FROM (SELECT _pg_background_batches(%s)) AS batches", (handle.pid,))
    assert listed(conn) == []
    assert run(conn, "SELECT 'next' FROM generate_series(1, 1000)")[-1] == ("next",)
