"""Starting workers: handles, what is refused, limits, and letting go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.background import Handle, detach, launch, listed, result, run, wait
from tests.clusters import Cluster, Session, sqlstate, wait_until


@pytest.fixture
def log_table(alice: Session) -> str:
    """A table of alice's, empty."""
    alice.execute("CREATE TABLE log (n int, what text)")
    return "log"


# --- handles --------------------------------------------------------------------------------------


def test_v1_launch_returns_the_pid_of_a_backend(alice: Session, conn: Session) -> None:
    pid = alice.value("SELECT pg_background_launch('SELECT pg_sleep(30)')")
    # launch returns when the SQL has been sent, which is a little before the backend starts on it.
    seen = "SELECT application_name, state FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: conn.rows(seen, (pid,)) == [("pg_background", "active")], what="the active worker")
    assert pid != alice.pid
    conn.execute("SELECT pg_cancel_backend(%s)", (pid,))
    with sqlstate("57014"):
        alice.execute("SELECT * FROM pg_background_result(%s) AS r(x text)", (pid,))


def test_v1_worker_has_cookie_0_for_v2_calls(alice: Session) -> None:
    pid = alice.value("SELECT pg_background_launch('SELECT 5')")
    assert [worker[:2] for worker in listed(alice)] == [(pid, 0)]
    wait(alice, Handle(pid, 0))
    assert result(alice, Handle(pid, 0), "n int") == [(5,)]


def test_v2_handle_is_a_composite_of_pid_and_random_cookie(alice: Session) -> None:
    query = "SELECT pg_typeof(h)::text, pg_typeof(h.pid)::text, pg_typeof(h.cookie)::text, h.pid, h.cookie"
    rows = [alice.rows(query + " FROM pg_background_launch_v2('SELECT 1') h")[0] for _ in range(5)]
    assert {row[:3] for row in rows} == {("pg_background_handle", "integer", "bigint")}
    cookies = {cookie for *_, cookie in rows}
    assert len(cookies) == 5
    assert 0 not in cookies
    # Random in all their bits, not a counter.
    assert max(cookies) > 2**56
    for worker in listed(alice):
        detach(alice, Handle(worker.pid, worker.cookie))


def test_launch_returns_before_the_work_is_done(alice: Session, conn: Session) -> None:
    handle = launch(alice, "SELECT pg_sleep(30)")
    assert alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", handle) is False
    assert listed(alice)[0].state == "running"
    conn.execute("SELECT pg_terminate_backend(%s)", (handle.pid,))  # heeded even before its SQL has arrived
    wait(alice, handle)
    detach(alice, handle)


@pytest.mark.parametrize(
    "call",
    [
        "pg_background_launch(NULL)",
        "pg_background_launch('SELECT 1', NULL)",
        "pg_background_launch_v2(NULL)",
        "pg_background_launch_v2('SELECT 1', NULL)",
        "pg_background_detach(NULL)",
        "pg_background_detach_v2(NULL, 1)",
        "pg_background_detach_v2(1, NULL)",
        "pg_background_wait_v2(NULL, 1)",
        "pg_background_wait_v2_timeout(1, 1, NULL)",
        "pg_background_wait_v2_timeout(NULL, NULL, NULL)",
    ],
)
def test_null_argument_gives_null_and_does_nothing(alice: Session, call: str) -> None:
    assert alice.value(f"SELECT ({call}) IS NULL") is True
    assert listed(alice) == []


def test_null_argument_gives_no_rows(alice: Session) -> None:
    assert alice.rows("SELECT * FROM pg_background_result(NULL) AS r(n int)") == []
    assert alice.rows("SELECT * FROM pg_background_result_v2(1, NULL) AS r(n int)") == []


# --- what is refused ------------------------------------------------------------------------------


REFUSED = (
    "BEGIN",
    "START TRANSACTION",
    "COMMIT",
    "END",
    "ROLLBACK",
    "ABORT",
    "SAVEPOINT s",
    "RELEASE SAVEPOINT s",
    "ROLLBACK TO SAVEPOINT s",
    "PREPARE TRANSACTION 'x'",
    "COMMIT PREPARED 'x'",
    "ROLLBACK PREPARED 'x'",
    "COMMIT AND CHAIN",
    "COPY log TO STDOUT",
    "COPY log FROM STDIN",
    "COPY (SELECT ';') TO STDOUT",
    "copy log(n) from stdin (format csv)",
)


@pytest.mark.parametrize(
    "around", ["{}", "  /* x */ {};", "INSERT INTO log VALUES (1); {}", "{}; INSERT INTO log VALUES (1)"]
)
def test_transaction_control_and_copy_are_refused_before_anything_runs(alice: Session, around: str) -> None:
    for command in REFUSED:
        for function in ("pg_background_launch", "pg_background_launch_v2"):
            with sqlstate("0A000", match=command.split(maxsplit=1)[0].upper()) as raised:
                alice.execute(f"SELECT {function}(%s)", (around.format(command),))
            assert raised.diag.message_hint
    assert listed(alice) == []
    assert alice.value("SELECT workers_launched FROM pg_background_stats_v2()") == 0


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 'COMMIT; ROLLBACK'",
        "SELECT $$; COMMIT; $$::text",
        "/* COMMIT; */ SELECT 'BEGIN'::text -- ; ROLLBACK",
        'SELECT x::text AS "COMMIT" FROM (VALUES (1)) AS "COPY"(x)',
    ],
)
def test_words_in_strings_and_comments_are_not_transaction_control(alice: Session, query: str) -> None:
    assert len(run(alice, query)) == 1


def test_copy_with_the_client_in_a_function_or_execute_is_refused(conn: Session) -> None:
    for query in (
        "DO $$ BEGIN EXECUTE 'COPY pg_class TO STDOUT'; END $$",
        "DO $$ BEGIN COPY pg_class TO STDOUT; END $$",
    ):
        with sqlstate("0A000", match="COPY"):
            run(conn, query)
    assert run(conn, "COPY (SELECT 1) TO '/dev/null'") == [("COPY 1",)]


def test_transaction_control_in_a_function_is_the_servers_error(alice: Session) -> None:
    with sqlstate("2D000"):
        run(alice, "SELECT 1; DO $$ BEGIN COMMIT; END $$")


@pytest.mark.parametrize("queue_size", [1, 63, 256 * 1024 * 1024 + 1, 2**31 - 1])
def test_queue_size_out_of_range(alice: Session, queue_size: int) -> None:
    for function in ("pg_background_launch", "pg_background_launch_v2"):
        with sqlstate("22023", match=str(queue_size)) as raised:
            alice.execute(f"SELECT {function}('SELECT 1', %s)", (queue_size,))
        assert raised.diag.message_hint
    assert listed(alice) == []


@pytest.mark.parametrize("queue_size", [-(2**31), -1, 0, 64, 65536, 256 * 1024 * 1024])
def test_queue_size_within_its_range(alice: Session, queue_size: int) -> None:
    handle = launch(alice, "SELECT g FROM generate_series(1, 3000) g", queue_size)
    assert len(result(alice, handle, "n int")) == 3000


def test_syntax_error_is_the_workers(alice: Session) -> None:
    handle = launch(alice, "SELEC 1")
    with sqlstate("42601", match='"SELEC"'):
        result(alice, handle)


# --- limits ---------------------------------------------------------------------------------------


def test_max_workers_bounds_what_is_tracked(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 2")
    first, second = launch(alice, "SELECT 1"), launch(alice, "SELECT 2")
    with sqlstate("53400", match="max_workers is 2") as raised:
        launch(alice, "SELECT 3")
    assert raised.diag.message_hint
    with sqlstate("53400"):
        alice.execute("SELECT pg_background_launch('SELECT 3')")
    # An ended worker counts until it is released.
    wait(alice, first)
    with sqlstate("53400"):
        launch(alice, "SELECT 3")
    result(alice, first, "n int")
    third = launch(alice, "SELECT 3")
    with sqlstate("53400"):
        launch(alice, "SELECT 4")
    detach(alice, second)
    fourth = launch(alice, "SELECT 4")
    alice.execute("SET pg_background.max_workers = 1")
    with sqlstate("53400"):
        launch(alice, "SELECT 5")
    assert result(alice, third, "n int") + result(alice, fourth, "n int") == [(3,), (4,)]
    assert run(alice, "SELECT 5", "n int") == [(5,)]


def test_failed_launch_tracks_nothing_and_takes_no_room(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 1")
    for _ in range(3):
        with sqlstate("0A000"):
            launch(alice, "COMMIT")
        with sqlstate("22023"):
            launch(alice, "SELECT 1", 3)
    assert run(alice, "SELECT 1", "n int") == [(1,)]
    assert alice.value("SELECT workers_launched FROM pg_background_stats_v2()") == 1


# --- letting go -----------------------------------------------------------------------------------


def test_detached_worker_goes_on_and_commits(alice: Session, log_table: str) -> None:
    handle = launch(alice, "SELECT pg_sleep(0.3); INSERT INTO log VALUES (1)")
    detach(alice, handle)
    assert listed(alice) == []
    for call in (
        "SELECT * FROM pg_background_result_v2({0}, {1}) AS r(x text)",
        "SELECT pg_background_detach_v2({0}, {1})",
        "SELECT pg_background_detach({0})",
    ):
        with sqlstate("42704"):
            alice.execute(call.format(*handle))
    wait_until(lambda: alice.value("SELECT count(*) FROM log") == 1, what="the detached worker's commit")


def test_v1_detach_takes_pids_alone(alice: Session, log_table: str) -> None:
    pid = alice.value("SELECT pg_background_launch('INSERT INTO log VALUES (1)')")
    alice.execute("SELECT pg_background_detach(%s)", (pid,))
    assert listed(alice) == []
    handle = launch(alice, "INSERT INTO log VALUES (2)")
    alice.execute("SELECT pg_background_detach(%s)", (handle.pid,))
    assert listed(alice) == []
    wait_until(lambda: alice.value("SELECT count(*) FROM log") == 2, what="both commits")


def test_many_workers_run_at_once(alice: Session, conn: Session) -> None:
    conn.execute("SELECT pg_advisory_lock(41)")
    handles = [launch(alice, f"SELECT {n} FROM pg_advisory_xact_lock_shared(41)") for n in range(8)]
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 41 AND NOT granted"
    wait_until(lambda: conn.value(waiting) == 8, what="eight workers at the lock")
    assert {worker.state for worker in listed(alice)} == {"running"}
    conn.execute("SELECT pg_advisory_unlock(41)")
    assert [result(alice, handle, "n int") for handle in handles] == [[(n,)] for n in range(8)]


def test_workers_end_with_their_session(
    connect: Callable[..., Session], cluster: Cluster, current_database: str
) -> None:
    session = connect()
    for _ in range(3):
        wait(session, launch(session, "SELECT 1"))
    session.close()
    wait_until(lambda: not cluster.workers(current_database), what="no worker session")


def test_client_encoding_is_not_the_workers(alice: Session) -> None:
    alice.execute("SET client_encoding = LATIN1")
    assert run(alice, "SELECT 'gr\u00fcn', octet_length('\u00fc')", "a text, b int") == [("gr\u00fcn", 2)]


def test_worker_can_use_the_extension_itself(alice: Session) -> None:
    nested = "SELECT n + 1 FROM pg_background_result(pg_background_launch($$SELECT 1$$)) AS r(n int)"
    assert run(alice, nested, "n int") == [(2,)]
