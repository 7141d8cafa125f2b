"""pg_background_submit_on_commit_v2: a job runs if, and as soon as, the caller's transaction has committed; once.

PG_BACKGROUND_LONG=1 runs 10,000 random transactions, the normal run 1,000.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from tests.background import Handle, is_gone, listed, wait
from tests.clusters import SUPERVISOR_NAME, Cluster, Role, Session, sqlstate, wait_until
from tests.supervision import supervisor_pid, supervisor_pids

TRANSACTIONS = 10_000 if os.environ.get("PG_BACKGROUND_LONG") else 1000
START_SECONDS = 0.1  # in the suite, on a loaded machine; on an idle one the median is below 5 ms


@pytest.fixture
def ran(alice: Session) -> Session:
    """alice, with a table for what has run."""
    alice.execute(
        "CREATE TABLE ran (place bigint GENERATED ALWAYS AS IDENTITY, what text,"
        " at timestamptz DEFAULT clock_timestamp())"
    )
    return alice


def submit(session: Session, query: str, params: list[Any] | None = None, label: str | None = None) -> Handle:
    """Submits a job for after the commit."""
    call = "SELECT pid, cookie FROM pg_background_submit_on_commit_v2(%s, 0, %s, %s::text[])"
    return Handle(*session.rows(call, (query, label, params))[0])


def note(session: Session, what: str) -> Handle:
    """Submits a job that leaves a row."""
    return submit(session, "INSERT INTO ran (what) VALUES ($1)", [what])


def rows(session: Session) -> list[str]:
    """What has run, in order."""
    return [row[0] for row in session.rows("SELECT what FROM ran ORDER BY place")]


def state(session: Session, handle: Handle) -> tuple[str, str | None]:
    """A job's state and SQLSTATE."""
    wait(session, handle)
    row: tuple[str, str | None] = session.rows("SELECT state, sqlstate FROM pg_background_outcome_v2(%s, %s)", handle)[
        0
    ]
    return row


def test_it_runs_after_the_commit_and_sees_what_was_written(ran: Session) -> None:
    ran.execute("CREATE TABLE fresh (n int)")
    with ran.transaction():
        handle = submit(ran, "INSERT INTO ran (what) SELECT 'sees ' || count(*) FROM fresh", label="after")
        ran.execute("INSERT INTO fresh SELECT generate_series(1, 5)")
        assert ran.value("SELECT state FROM pg_background_outcome_v2(%s, %s)", handle) == "running"
        ran.execute("SELECT pg_sleep(0.2)")
        assert rows(ran) == []
    assert state(ran, handle) == ("stopped", None)
    assert rows(ran) == ["sees 5"]
    assert ran.value("SELECT label FROM pg_background_outcome_v2(%s, %s)", handle) == "after"
    assert listed(ran) == []


def test_it_never_runs_after_a_rollback(ran: Session) -> None:
    with ran.transaction(force_rollback=True):
        handle = note(ran, "never")
    assert state(ran, handle) == ("canceled", "40000")
    with sqlstate("22012"), ran.transaction():
        handle = note(ran, "never")
        ran.execute("SELECT 1 / 0")
    assert state(ran, handle) == ("canceled", "40000")
    assert rows(ran) == []


def test_savepoints(ran: Session) -> None:
    with ran.transaction():
        handles = []
        with ran.transaction(force_rollback=True):
            note(ran, "rolled back, the first of all")
        with ran.transaction():
            handles.append(note(ran, "1"))
            with ran.transaction(force_rollback=True), ran.transaction():
                note(ran, "released, then rolled back with what is around")
        handles.append(note(ran, "2"))
    for handle in handles:
        assert state(ran, handle) == ("stopped", None)
    assert rows(ran) == ["1", "2"]


def test_a_statement_of_its_own_is_a_transaction(ran: Session) -> None:
    handle = note(ran, "at once")
    assert state(ran, handle) == ("stopped", None)
    assert rows(ran) == ["at once"]


def test_the_order_is_that_of_submission(ran: Session) -> None:
    with ran.transaction():
        handles = [submit(ran, "SELECT pg_sleep(0.1)"), *(note(ran, str(n)) for n in range(30))]
    assert {state(ran, handle) for handle in handles} == {("stopped", None)}
    assert rows(ran) == [str(n) for n in range(30)]
    assert len({handle.pid for handle in handles}) == 1


def test_each_job_is_a_transaction_of_its_own(ran: Session) -> None:
    with ran.transaction():
        handles = [
            submit(ran, "INSERT INTO ran (what) VALUES ('no'); SELECT 1 / 0"),
            submit(ran, "SET work_mem = '3MB'; CREATE TEMP TABLE t (n int)"),
            submit(ran, "VACUUM ran"),
            submit(ran, "INSERT INTO ran (what) SELECT current_setting('work_mem') || to_regclass('pg_temp.t')::text"),
            submit(ran, "INSERT INTO ran (what) SELECT current_setting('work_mem')"),
        ]
        usual = ran.value("SELECT current_setting('work_mem')")
    states = [state(ran, handle) for handle in handles]
    assert states == [("error", "22012"), *[("stopped", None)] * 4]
    assert [what for what in rows(ran) if what] == [usual]


def test_it_starts_at_once(ran: Session) -> None:
    late = []
    for n in range(20):
        with ran.transaction():
            handle = note(ran, str(n))
        committed = ran.value("SELECT clock_timestamp()")
        wait(ran, handle)
        late.append((ran.value("SELECT at FROM ran WHERE what = %s", (str(n),)) - committed).total_seconds())
    print(f"on commit: started {statistics.median(late) * 1000:.1f} ms after the commit, at most {max(late):.3f} s")
    assert statistics.median(late) < START_SECONDS


def test_it_runs_when_the_session_ends_right_after_the_commit(ran: Session, conn: Session, connect: Any) -> None:
    user = ran.info.user
    wanted = []
    for n in range(10):
        session = connect(Role(user, "secret of alice"))
        session.execute("BEGIN")
        note(session, f"{n} a")
        note(session, f"{n} b")
        if n % 2:
            session.execute("COMMIT")
            wanted += [f"{n} a", f"{n} b"]
        if n % 3:
            session.execute("SELECT pg_sleep(0.01)")
        session.close()
    wait_until(lambda: sorted(rows(ran)) == sorted(wanted), what="the jobs")
    conn.execute("SELECT pg_sleep(0.2)")
    assert sorted(rows(ran)) == sorted(wanted)


@pytest.mark.parametrize("way", ["session stays", "session ends"])
def test_a_terminated_supervisor_takes_none_with_it(ran: Session, conn: Session, connect: Any, way: str) -> None:
    session = connect(Role(ran.info.user, "secret of alice"))
    session.execute("BEGIN")
    handles = [note(session, "a"), note(session, "b")]
    terminated = supervisor_pid(conn)
    conn.execute("SELECT pg_terminate_backend(%s)", (terminated,))
    assert state(ran, note(ran, "another")) == ("stopped", None)  # by a successor
    session.execute("COMMIT")
    if way == "session ends":
        session.close()
    for handle in handles:
        assert state(conn, handle) == ("stopped", None)
    assert rows(ran) == ["another", "a", "b"]
    wait_until(lambda: terminated not in supervisor_pids(conn), what="its end")


def test_a_termination_while_the_supervisors_table_is_locked_loses_none(ran: Session, conn: Session) -> None:
    """A statement of its that fails has the server let signals in again, the one that came meanwhile included."""
    for number in range(5):
        ran.execute("BEGIN")
        with conn.transaction():
            conn.execute("LOCK TABLE _pg_background_worker")
            handle = note(ran, str(number))
            wait_until(lambda: is_blocked(conn))
            terminate_supervisors(conn)
            wait_until(lambda: not is_blocked(conn))
        ran.execute("COMMIT")
        ran.execute("SELECT pg_background_wait_v2(%s, %s)", handle)
        assert rows(ran) == [str(n) for n in range(number + 1)]


def is_blocked(conn: Session) -> bool:
    """Whether a supervisor waits for a lock."""
    return bool(
        conn.rows(
            "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
            " AND wait_event_type = 'Lock'",
            (SUPERVISOR_NAME,),
        )
    )


def test_exactly_what_was_committed_runs_once_while_supervisors_end(ran: Session, conn: Session) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    wanted = []
    for n in range(TRANSACTIONS // 50):
        committed = chance.random() < 0.6
        with ran.transaction(force_rollback=not committed):
            for m in range(chance.randrange(1, 5)):
                if chance.random() < 0.15:
                    terminate_supervisors(conn)
                note(ran, f"{n} {m}")
                wanted += [f"{n} {m}"] * committed
        if chance.random() < 0.15:
            terminate_supervisors(conn)
    wait_until(lambda: len(rows(ran)) >= len(wanted), what="the jobs", timeout=30)
    assert sorted(rows(ran)) == sorted(wanted)


def terminate_supervisors(conn: Session) -> None:
    """Asks all of this database's to end, and does not wait for that."""
    for pid in supervisor_pids(conn):
        conn.execute("SELECT pg_terminate_backend(%s)", (pid,))


def test_rolled_back_jobs_do_not_run_though_the_supervisor_was_terminated(ran: Session, conn: Session) -> None:
    ran.execute("BEGIN")
    handle = note(ran, "never")
    terminated = supervisor_pid(conn)
    conn.execute("SELECT pg_terminate_backend(%s)", (terminated,))
    ran.execute("ROLLBACK")
    wait_until(lambda: terminated not in supervisor_pids(conn), what="its end")
    assert state(conn, handle) == ("canceled", "40000")
    assert rows(ran) == []


@pytest.mark.local_server
def test_a_shutdown_does_not_wait_for_them(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster()
    session = own.connect(own.create_database())
    session.execute("BEGIN")
    submit(session, "SELECT 1")
    own.stop("fast")  # fails where it takes longer than 20 s
    session.close()


def test_a_terminated_session_rolls_back(ran: Session, conn: Session, connect: Any) -> None:
    session = connect(Role(ran.info.user, "secret of alice"))
    session.execute("BEGIN")
    handle = note(session, "never")
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (session.pid,))
    assert state(conn, handle) == ("canceled", "40000")
    assert rows(ran) == []


def test_settings_are_those_of_each_call(ran: Session) -> None:
    show = "INSERT INTO ran (what) SELECT current_setting('myapp.tenant', true) || ' ' || current_setting('work_mem')"
    with ran.transaction():
        ran.execute("SET LOCAL myapp.tenant = 'one'; SET LOCAL work_mem = '1MB'")
        handles = [submit(ran, show)]
        ran.execute("SET LOCAL myapp.tenant = 'two'")
        handles.append(submit(ran, show))
        ran.execute("SET LOCAL work_mem = '2MB'")
        handles.append(submit(ran, show))
    for handle in handles:
        wait(ran, handle)
    assert rows(ran) == ["one 1MB", "two 1MB", "two 2MB"]


def test_timeouts_and_isolation_do_not_touch_the_wait(ran: Session) -> None:
    wait(ran, note(ran, "warm"))  # loading Python, psycopg and the runtime takes longer
    ran.execute("SET statement_timeout = '500ms'; SET lock_timeout = '50ms'")
    ran.execute("SET default_transaction_isolation = 'serializable'")
    with ran.transaction():
        handle = note(ran, "in time")
        slow = submit(ran, "SELECT pg_sleep(60)")
        for _ in range(3):
            ran.execute("SELECT pg_sleep(0.3)")
    ran.execute("RESET ALL")
    assert state(ran, handle) == ("stopped", None)
    assert state(ran, slow) == ("error", "57014")
    assert rows(ran) == ["warm", "in time"]


def test_worker_timeout_counts_from_the_start(ran: Session) -> None:
    ran.execute("SET pg_background.worker_timeout = '300ms'")
    with ran.transaction():
        handle, slow = note(ran, "in time"), submit(ran, "SELECT pg_sleep(60)")
        ran.execute("SELECT pg_sleep(0.5)")
    assert state(ran, handle) == ("stopped", None)
    assert state(ran, slow) == ("error", "57014")


def test_read_only_transactions_cannot(ran: Session) -> None:
    with sqlstate("25006"), ran.transaction():
        ran.execute("SET TRANSACTION READ ONLY")
        note(ran, "never")


def test_a_prepared_transaction_is_the_servers_own_error(ran: Session) -> None:
    ran.execute("BEGIN")
    handle = note(ran, "never")
    with sqlstate("0A000", "PREPARE"):
        ran.execute("PREPARE TRANSACTION 'with a job'")
    assert state(ran, handle) == ("canceled", "40000")
    assert rows(ran) == []


def test_what_is_refused(ran: Session) -> None:
    with sqlstate("0A000"):
        submit(ran, "COMMIT")
    with sqlstate("22004"):
        ran.execute("SELECT pg_background_submit_on_commit_v2(NULL)")
    with sqlstate("22023"):
        ran.execute("SELECT pg_background_submit_on_commit_v2('SELECT 1', 1)")
    assert state(ran, submit(ran, "SELECT $1; SELECT 2", ["x"])) == ("error", "42601")


def test_waiting_for_it_in_its_transaction_is_a_deadlock(ran: Session) -> None:
    with sqlstate("40P01"), ran.transaction():
        wait(ran, note(ran, "never"))
    assert rows(ran) == []


def test_other_waits_see_no_deadlock(ran: Session) -> None:
    with ran.transaction():
        handle = note(ran, "later")
        other = Handle(*ran.rows("SELECT pid, cookie FROM pg_background_launch_v2('SELECT pg_sleep(2.5)')")[0])
        wait(ran, other)
        ran.execute("SELECT pg_background_detach_v2(%s, %s)", other)
    assert state(ran, handle) == ("stopped", None)


def test_cancel_before_and_after_the_start(ran: Session, conn: Session) -> None:
    with ran.transaction():
        first, second, third = note(ran, "first"), note(ran, "second"), note(ran, "third")
        slow, last = submit(ran, "SELECT pg_sleep(60)"), note(ran, "last")
        ran.execute("SELECT pg_background_cancel_v2(%s, %s)", first)
        conn.execute("SELECT pg_background_cancel_v2(%s, %s)", third)
    assert state(ran, first) == ("canceled", "57014")
    assert state(ran, second) == ("stopped", None)
    assert state(ran, third) == ("canceled", "57014")
    conn.execute("SELECT pg_background_cancel_v2(%s, %s)", slow)
    assert state(ran, slow) == ("canceled", "57014")
    assert state(ran, last) == ("stopped", None)
    assert rows(ran) == ["second", "last"]


def test_handles_are_the_roles_own(ran: Session, connect: Callable[..., Session], role: Callable[..., Role]) -> None:
    with ran.transaction():
        handle = note(ran, "mine")
        with sqlstate("42501"):
            connect(role("stranger")).execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    assert state(ran, handle) == ("stopped", None)


def test_it_counts_towards_max_workers(ran: Session) -> None:
    ran.execute("SET pg_background.max_workers = 1")
    with ran.transaction():
        held = Handle(*ran.rows("SELECT pid, cookie FROM pg_background_launch_v2('SELECT 1')")[0])
        with sqlstate("53400"), ran.transaction():
            note(ran, "never")
        ran.execute("SELECT pg_background_detach_v2(%s, %s)", held)
        note(ran, "one")
        handle = note(ran, "two")
    assert state(ran, handle) == ("stopped", None)
    assert rows(ran) == ["one", "two"]


def test_the_definer_functions_stand_made_up_arguments(ran: Session, conn: Session) -> None:
    made_up = "00000000-0000-4000-8000-000000000000"
    assert ran.value("SELECT _pg_background_has_committed(%s)", (made_up,)) is False
    assert ran.value("SELECT _pg_background_has_committed(NULL)") is None
    call = "SELECT _pg_background_checked(_pg_background_defer('SELECT 1', 0, NULL, NULL, %s))"
    with sqlstate("22023"):
        ran.execute(call, ("'; DROP TABLE ran; --",))
    pid, cookie = ran.value(call, (made_up,)).strip("()").split(",")
    assert state(ran, Handle(int(pid), int(cookie))) == ("canceled", "40000")
    with sqlstate("42501"):
        ran.execute("SELECT * FROM _pg_background_marker")
    assert conn.rows("SELECT * FROM _pg_background_marker") == []


def test_a_large_job(ran: Session) -> None:
    text = "x" * 3_000_000
    with ran.transaction():
        handles = [submit(ran, "INSERT INTO ran (what) SELECT length($1)::text", [text]) for _ in range(3)]
        handles.append(submit(ran, f"INSERT INTO ran (what) SELECT length('{text}')::text"))
    assert [state(ran, handle) for handle in handles] == [("stopped", None)] * 4
    assert rows(ran) == ["3000000"] * 4


def test_sessions_are_used_again(ran: Session) -> None:
    pids = set()
    for n in range(30):
        with ran.transaction(force_rollback=n % 3 == 0):
            handle = note(ran, str(n))
        wait(ran, handle)
        pids.add(handle.pid)
    assert len(pids) < 5
    assert rows(ran) == [str(n) for n in range(30) if n % 3]


# --- at random ------------------------------------------------------------------------------------


def _random_block(session: Session, chance: random.Random, depth: int, prefix: str) -> Iterator[str]:
    """Calls at random depth; yields what stays if everything around stays."""
    for place in range(chance.randint(1, 3)):
        what = f"{prefix}.{place}"
        if depth < 3 and chance.random() < 0.4:
            stays: list[str] = []
            rolls_back = chance.random() < 0.5
            with session.transaction(force_rollback=rolls_back):
                stays.extend(_random_block(session, chance, depth + 1, what))
            if not rolls_back:
                yield from stays
        else:
            note(session, what)
            yield what


def test_exactly_what_was_committed_runs_once(ran: Session) -> None:
    chance = random.Random(7)
    expected: list[str] = []
    batches: list[list[str]] = []
    for n in range(TRANSACTIONS):
        rolls_back = chance.random() < 0.5
        with ran.transaction(force_rollback=rolls_back):
            stays = list(_random_block(ran, chance, 0, str(n)))
        if not rolls_back:
            expected += stays
            batches.append(stays)
    last = note(ran, "last")
    wait(ran, last)
    wait_until(lambda: len(rows(ran)) >= len(expected) + 1, timeout=60, what="all the jobs")
    assert sorted(rows(ran)) == sorted([*expected, "last"])
    seen = {what: place for place, what in enumerate(rows(ran))}
    for stays in batches:
        assert [seen[what] for what in stays] == sorted(seen[what] for what in stays)
    running = "SELECT pid, label FROM pg_background_activity WHERE state = 'running'"
    wait_until(lambda: not ran.rows(running), what="the view to show no job as running")


def test_many_sessions_at_once(ran: Session, connect: Any) -> None:
    user, start = ran.info.user, time.monotonic()
    sessions = [connect(Role(user, "secret of alice")) for _ in range(5)]
    for n in range(10):
        for session in sessions:
            session.execute("BEGIN")
            note(session, f"{n} of {session.pid}")
        for place, session in enumerate(sessions):
            session.execute("ROLLBACK" if (n + place) % 2 else "COMMIT")
    wanted = sorted(f"{n} of {s.pid}" for n in range(10) for place, s in enumerate(sessions) if not (n + place) % 2)
    wait_until(lambda: len(rows(ran)) >= len(wanted), what="the jobs")
    assert sorted(rows(ran)) == wanted
    assert time.monotonic() - start < 60


def test_nothing_is_left_after_a_cancelled_call(ran: Session, conn: Session) -> None:
    chance = random.Random(3)
    survived = []
    for n in range(30):
        ran.execute(f"SET statement_timeout = {chance.randint(1, 12)}")
        try:
            note(ran, str(n))
            survived.append(str(n))
        except psycopg.errors.QueryCanceled:
            pass
        ran.execute("RESET statement_timeout")
    final = note(ran, "final")
    wait(ran, final)
    wait_until(lambda: set(rows(ran)) == {*survived, "final"}, what="the jobs")
    wait_until(lambda: conn.rows("SELECT * FROM _pg_background_marker") == [], what="no marker left")


def test_a_session_that_has_ended_for_being_idle_is_replaced(ran: Session) -> None:
    ran.execute("SET pg_background.pool_idle_timeout = '200ms'")
    handle = note(ran, "first")
    assert state(ran, handle) == ("stopped", None)
    wait_until(lambda: is_gone(ran, handle.pid), what="its end")
    with ran.transaction():
        handle = note(ran, "second")
    assert state(ran, handle) == ("stopped", None)
    assert rows(ran) == ["first", "second"]


def test_jobs_that_wait_for_a_commit_take_a_place_of_max_workers(ran: Session) -> None:
    ran.execute("SET pg_background.max_workers = 1")
    with ran.transaction():
        handle = note(ran, "after")
        with sqlstate("53400"), ran.transaction():
            ran.execute("SELECT pg_background_launch_v2('SELECT 1')")
    assert state(ran, handle) == ("stopped", None)
    ran.execute("SET pg_background.launch_timeout = '10s'")
    ran.execute("SELECT pg_background_launch_v2('SELECT 1')")


def test_a_job_that_was_rolled_back_takes_no_place_of_max_workers(ran: Session) -> None:
    ran.execute("SET pg_background.max_workers = 1; SET pg_background.launch_timeout = '10s'")
    with ran.transaction(force_rollback=True):
        handle = note(ran, "never")
    assert state(ran, handle) == ("canceled", "40000")
    ran.execute("SELECT pg_background_launch_v2('SELECT 1')")
