"""A worker's string is one transaction, and the launcher's own transaction is another matter."""

from __future__ import annotations

import pytest
from psycopg import sql

from tests.background import Handle, launch, listed, result, run
from tests.clusters import Session, sqlstate, wait_until


@pytest.fixture
def log_table(alice: Session) -> str:
    """A table of alice's, empty."""
    alice.execute("CREATE TABLE log (n int, what text)")
    return "log"


# --- one string, one transaction ------------------------------------------------------------------


def test_statements_of_a_string_commit_together(alice: Session, log_table: str) -> None:
    tags = run(alice, "INSERT INTO log VALUES (1); INSERT INTO log VALUES (2), (3); UPDATE log SET what = 'x'")
    assert tags == [("INSERT 0 1",), ("INSERT 0 2",), ("UPDATE 3",)]
    assert alice.value("SELECT count(DISTINCT xmin::text) FROM log WHERE what = 'x'") == 1


def test_statements_of_a_string_roll_back_together(alice: Session, log_table: str) -> None:
    handle = launch(alice, "INSERT INTO log VALUES (1); SELECT 1/0; INSERT INTO log VALUES (2)")
    with sqlstate("22012"):
        result(alice, handle)
    assert alice.value("SELECT count(*) FROM log") == 0


def test_deferred_constraint_fails_at_the_end_and_rolls_everything_back(alice: Session) -> None:
    alice.execute(
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "CREATE TABLE child (id int CONSTRAINT orphan REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )
    assert run(alice, "INSERT INTO child VALUES (1); INSERT INTO parent VALUES (1)") == [
        ("INSERT 0 1",),
        ("INSERT 0 1",),
    ]
    for query, columns in (
        ("INSERT INTO child VALUES (2)", "r text"),
        ("INSERT INTO child VALUES (2); SELECT 1", "n int"),
        ("INSERT INTO child VALUES (2) RETURNING id", "n int"),
    ):
        with sqlstate("23503") as raised:
            run(alice, query, columns)
        assert raised.diag.constraint_name == "orphan"
    assert alice.rows("SELECT id FROM child") == [(1,)]


def test_worker_commits_whatever_the_launcher_does(alice: Session, log_table: str) -> None:
    with alice.transaction(force_rollback=True):
        alice.execute("INSERT INTO log VALUES (1, 'launcher')")
        assert run(alice, "INSERT INTO log SELECT count(*), 'worker' FROM log") == [("INSERT 0 1",)]
    assert alice.rows("SELECT n, what FROM log") == [(0, "worker")]


@pytest.mark.parametrize("ending", ["", ";", " ; ", ";;", "; -- said", " /* said; */", "\n-- said"])
def test_single_statement_runs_at_top_level(alice: Session, log_table: str, ending: str) -> None:
    assert run(alice, "VACUUM log" + ending) == [("VACUUM",)]
    assert run(alice, "-- first\n" + "VACUUM log" + ending) == [("VACUUM",)]


@pytest.mark.parametrize(
    ("query", "tag"),
    [
        ("VACUUM (ANALYZE) log", "VACUUM"),
        ("CLUSTER", "CLUSTER"),
        ("DISCARD ALL", "DISCARD ALL"),
    ],
)
def test_statement_that_refuses_a_transaction_block_works(alice: Session, log_table: str, query: str, tag: str) -> None:
    assert run(alice, query) == [(tag,)]


@pytest.mark.parametrize(
    ("query", "tag"),
    [
        ("CREATE INDEX CONCURRENTLY by_n ON log (n)", "CREATE INDEX"),
        ("REINDEX TABLE CONCURRENTLY log", "REINDEX"),
        ("DROP INDEX CONCURRENTLY IF EXISTS by_n", "DROP INDEX"),
    ],
)
def test_concurrent_index_command_works(alice: Session, log_table: str, query: str, tag: str) -> None:
    # Such a command waits for all older snapshots: a session that waits for it must not hold one itself.
    handle = launch(alice, query)
    wait_until(lambda: alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", handle), what=query)
    assert result(alice, handle) == [(tag,)]


def test_alter_system_works(conn: Session) -> None:
    assert run(conn, "ALTER SYSTEM SET application_name = DEFAULT") == [("ALTER SYSTEM",)]
    assert run(conn, "ALTER SYSTEM RESET application_name") == [("ALTER SYSTEM",)]


def test_create_database_works(conn: Session) -> None:
    assert run(conn, "CREATE DATABASE made_by_worker") == [("CREATE DATABASE",)]
    assert run(conn, "DROP DATABASE made_by_worker") == [("DROP DATABASE",)]


def test_vacuum_beside_another_statement_is_the_servers_error(alice: Session, log_table: str) -> None:
    with sqlstate("25001"):
        run(alice, "INSERT INTO log VALUES (1); VACUUM log")
    assert alice.value("SELECT count(*) FROM log") == 0


def test_procedure_that_commits_works_alone(alice: Session, log_table: str) -> None:
    alice.execute(
        "CREATE PROCEDURE half() LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO log VALUES (1); COMMIT; INSERT INTO log VALUES (2); ROLLBACK; END $$"
    )
    assert run(alice, "CALL half()") == [("CALL",)]
    assert alice.rows("SELECT n FROM log") == [(1,)]


# --- the launcher's own transaction ---------------------------------------------------------------


def test_rollback_after_launch_keeps_the_worker(alice: Session) -> None:
    alice.execute("BEGIN")
    handle = launch(alice, "SELECT 1")
    alice.execute("ROLLBACK")
    assert [worker.pid for worker in listed(alice)] == [handle.pid]
    assert result(alice, handle, "n int") == [(1,)]
    assert listed(alice) == []


def test_rollback_to_a_savepoint_keeps_the_worker(alice: Session) -> None:
    alice.execute("BEGIN; SAVEPOINT s")
    handle = launch(alice, "SELECT 1")
    alice.execute("ROLLBACK TO SAVEPOINT s")
    assert result(alice, handle, "n int") == [(1,)]
    alice.execute("COMMIT")
    assert listed(alice) == []


def test_error_between_launch_and_result_keeps_the_worker(alice: Session) -> None:
    alice.execute("BEGIN")
    handle = launch(alice, "SELECT 1")
    with sqlstate("22012"):
        alice.execute("SELECT 1/0")
    with sqlstate("25P02"):
        result(alice, handle, "n int")
    alice.execute("ROLLBACK")
    assert result(alice, handle, "n int") == [(1,)]


def test_rollback_after_reading_does_not_give_the_result_back(alice: Session) -> None:
    handle = launch(alice, "SELECT 1")
    alice.execute("BEGIN")
    assert result(alice, handle, "n int") == [(1,)]
    alice.execute("ROLLBACK")
    with sqlstate("42704"):
        result(alice, handle, "n int")
    assert listed(alice) == []


def test_statement_that_fails_after_its_own_launch_keeps_the_worker(alice: Session, log_table: str) -> None:
    with sqlstate("22012"):
        alice.execute("SELECT (pg_background_launch_v2('INSERT INTO log VALUES (1)')).pid / 0")
    (worker,) = listed(alice)
    assert result(alice, Handle(worker.pid, worker.cookie)) == [("INSERT 0 1",)]
    assert alice.value("SELECT count(*) FROM log") == 1


def test_launch_in_a_plpgsql_exception_block_survives_its_rollback(alice: Session, log_table: str) -> None:
    alice.execute("""
        DO $$
        DECLARE
            h pg_background_handle;
            n int;
        BEGIN
            BEGIN
                h := pg_background_launch_v2('INSERT INTO log VALUES (1); SELECT 42');
                RAISE 'undone';
            EXCEPTION WHEN raise_exception THEN
                NULL;
            END;
            SELECT r.n INTO n FROM pg_background_result_v2(h.pid, h.cookie) AS r(n int);
            ASSERT n = 42;
            BEGIN
                PERFORM * FROM pg_background_result(pg_background_launch('SELECT 1/0')) AS r(n int);
                ASSERT false;
            EXCEPTION WHEN division_by_zero THEN
                n := 43;
            END;
            ASSERT n = 43;
        END $$""")
    assert alice.value("SELECT count(*) FROM log") == 1
    assert listed(alice) == []


def test_prepare_transaction_in_the_launcher_works(alice: Session, conn: Session, log_table: str) -> None:
    name = f"of {alice.pid}"
    alice.execute("BEGIN; INSERT INTO log VALUES (1, 'launcher')")
    early = launch(alice, "INSERT INTO log VALUES (2, 'worker')")
    assert run(alice, "SELECT 7", "n int") == [(7,)]
    alice.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(name)))
    assert result(alice, early) == [("INSERT 0 1",)]
    assert alice.rows("SELECT what FROM log") == [("worker",)]
    alice.execute(sql.SQL("COMMIT PREPARED {}").format(sql.Literal(name)))
    assert sorted(alice.rows("SELECT what FROM log")) == [("launcher",), ("worker",)]


@pytest.mark.parametrize("mode", ["READ ONLY", "ISOLATION LEVEL SERIALIZABLE", "ISOLATION LEVEL REPEATABLE READ"])
def test_workers_transaction_is_its_own(alice: Session, log_table: str, mode: str) -> None:
    alice.execute(f"BEGIN {mode}")
    assert alice.value("SELECT count(*) FROM log") == 0
    assert run(alice, "INSERT INTO log VALUES (1)") == [("INSERT 0 1",)]
    assert run(alice, "SHOW transaction_isolation") == [("read committed",)]
    # The launcher's snapshot stays what it was.
    assert alice.value("SELECT count(*) FROM log") == (1 if mode == "READ ONLY" else 0)
    alice.execute("COMMIT")


def test_launch_and_result_in_the_middle_of_a_pipeline(alice: Session) -> None:
    with alice.pipeline():
        first = alice.execute("SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS r(n int)")
        second = alice.execute("SELECT * FROM pg_background_result(pg_background_launch('SELECT 2')) AS r(n int)")
        assert (first.fetchall(), second.fetchall()) == ([(1,)], [(2,)])
