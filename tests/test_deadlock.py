"""A session that waits for a worker that waits for the session: 40P01, and never a false alarm."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from tests.background import Handle, launch, listed, result, run, wait, wait_any
from tests.clusters import Session, sqlstate, wait_until
from tests.supervision import stopped, supervisor_pid

DEADLOCK_TIMEOUT_S = 0.2
_LIMIT_S = DEADLOCK_TIMEOUT_S + 1.5

Connect = Callable[..., Session]


@pytest.fixture
def waiter(connect: Connect, role: Callable[..., Any]) -> Session:
    """An ordinary role's session with a table `t` of one row; its sessions look for deadlocks after 0.2 s."""
    owner = role("waiter", schema=True)
    with connect() as admin:
        admin.execute(f'ALTER ROLE "{owner}" SET deadlock_timeout = {DEADLOCK_TIMEOUT_S * 1000:.0f}')
    session = connect(owner)
    session.execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")
    return session


@pytest.fixture
def another(waiter: Session, connect: Connect) -> Callable[[], Session]:
    """`another()`: one more session of the same role."""
    name, password = waiter.info.user, waiter.info.password

    def open_session() -> Session:
        return connect(name, parameters={"password": password})

    return open_session


def is_blocked(session: Session, pid: int) -> bool:
    return bool(session.value("SELECT pg_blocking_pids(%s) <> '{}'", (pid,)))


def error_of(call: Callable[[], object]) -> psycopg.Error | None:
    """What a call raises."""
    try:
        call()
    except psycopg.Error as error:
        return error
    return None


class Background(threading.Thread):
    """Runs a call in a thread of its own, and keeps what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: psycopg.Error | None = None
        self.start()

    def run(self) -> None:
        self.error = error_of(self._call)

    def finish(self, timeout: float = 10) -> psycopg.Error | None:
        """What the call raised; fails where it does not come back."""
        self.join(timeout)
        assert not self.is_alive(), "the call does not return"
        return self.error


@pytest.mark.parametrize("read", [False, True], ids=["wait", "result"])
def test_deadlock_with_the_own_worker_is_reported(waiter: Session, read: bool) -> None:
    waiter.execute("BEGIN")
    waiter.execute("UPDATE t SET n = 2")
    handle = launch(waiter, "UPDATE t SET n = n * 10")
    started = time.monotonic()
    with sqlstate("40P01") as raised:
        result(waiter, handle) if read else wait(waiter, handle)
    elapsed = time.monotonic() - started
    assert DEADLOCK_TIMEOUT_S <= elapsed < _LIMIT_S
    detail = raised.diag.message_detail or ""
    assert re.search(
        rf"^Process {handle.pid} waits for ShareLock on transaction \d+ \(a row of t\);"
        rf" blocked by process {waiter.pid}\.$"
        rf"\n^Process {waiter.pid} waits for the background worker with PID {handle.pid}\.$",
        detail,
        re.MULTILINE,
    )
    assert str(handle.pid) in (raised.diag.message_primary or "")
    assert str(waiter.pid) in (raised.diag.message_primary or "")
    assert raised.diag.message_hint
    waiter.execute("ROLLBACK")
    assert [worker.pid for worker in listed(waiter)] == [handle.pid]
    wait(waiter, handle)
    assert result(waiter, handle) == [("UPDATE 1",)]
    assert waiter.value("SELECT n FROM t") == 10


@pytest.mark.parametrize(
    ("lock", "sql", "named"),
    [
        ("LOCK TABLE t IN EXCLUSIVE MODE", "INSERT INTO t VALUES (2)", "RowExclusiveLock on relation t of database"),
        ("SELECT pg_advisory_xact_lock(5, 6)", "SELECT pg_advisory_xact_lock(5, 6)", r"on advisory lock \[\d+,5,6,2\]"),
        ("SELECT * FROM t", "CREATE INDEX CONCURRENTLY ON t (n)", "ShareLock on virtual transaction"),
        ("SELECT * FROM t", "VACUUM FULL t", "AccessExclusiveLock on relation t"),
    ],
    ids=["table", "advisory", "virtual transaction", "vacuum full"],
)
def test_lock_is_named(waiter: Session, lock: str, sql: str, named: str) -> None:
    waiter.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    waiter.execute(lock)
    handle = launch(waiter, sql)
    with sqlstate("40P01", match=named):
        wait(waiter, handle)
    waiter.execute("ROLLBACK")
    wait(waiter, handle)


def test_safe_snapshot_counts(waiter: Session) -> None:
    waiter.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
    waiter.execute("UPDATE t SET n = 2")
    waiter.execute("SET LOCAL default_transaction_isolation = 'serializable'")
    waiter.execute("SET LOCAL default_transaction_read_only = on")
    waiter.execute("SET LOCAL default_transaction_deferrable = on")
    handle = launch(waiter, "SELECT n FROM t")
    with sqlstate("40P01", match="waits for a snapshot; blocked by process"):
        wait(waiter, handle)
    waiter.execute("ROLLBACK")
    wait(waiter, handle)


def test_session_lock_counts(waiter: Session) -> None:
    waiter.execute("SELECT pg_advisory_lock(7)")
    handle = launch(waiter, "SELECT pg_advisory_xact_lock(7)")
    with sqlstate("40P01"):
        wait(waiter, handle)
    waiter.execute("SELECT pg_advisory_unlock(7)")
    wait(waiter, handle)


def test_rows_before_the_deadlock_do_not_hide_it(waiter: Session) -> None:
    waiter.execute(
        "CREATE FUNCTION slow(n int) RETURNS int LANGUAGE plpgsql AS"
        " 'BEGIN IF n = 5000 THEN UPDATE t SET n = t.n + 1; END IF; RETURN n; END'"
    )
    waiter.execute("BEGIN")
    waiter.execute("UPDATE t SET n = 2")
    handle = launch(waiter, "SELECT slow(g) FROM generate_series(1, 10000) g")
    with sqlstate("40P01"):
        result(waiter, handle, "n int")
    waiter.execute("ROLLBACK")
    wait(waiter, handle)  # it went on as if detached
    assert waiter.value("SELECT n FROM t") == 2


def test_through_another_session(waiter: Session, another: Callable[[], Session]) -> None:
    """The worker waits for a session that waits for its own worker, which waits for the first session."""
    other = another()
    waiter.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    other.execute("BEGIN; SELECT pg_advisory_xact_lock(2)")
    others_worker = launch(other, "SELECT pg_advisory_xact_lock(1)")
    own_worker = launch(waiter, "SELECT pg_advisory_xact_lock(2)")
    waiting = Background(lambda: wait(other, others_worker))
    started = time.monotonic()
    first = error_of(lambda: wait(waiter, own_worker))
    assert time.monotonic() - started < _LIMIT_S
    waiter.execute("ROLLBACK")
    second = waiting.finish()
    other.execute("ROLLBACK")
    # One of them gave way; the other one's worker could then go on.
    raised = [error for error in (first, second) if error is not None]
    assert [error.sqlstate for error in raised] == ["40P01"]
    detail = raised[0].diag.message_detail or ""
    assert f"Process {waiter.pid} waits for the background worker with PID {own_worker.pid}." in detail
    assert f"Process {other.pid} waits for the background worker with PID {others_worker.pid}." in detail
    wait(waiter, own_worker)
    wait(other, others_worker)


def test_through_a_plain_session(waiter: Session, another: Callable[[], Session]) -> None:
    other = another()
    waiter.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    other.execute("BEGIN; SELECT pg_advisory_xact_lock(2)")
    handle = launch(waiter, "SELECT pg_advisory_xact_lock(2)")
    blocked = Background(lambda: other.execute("SELECT pg_advisory_xact_lock(1)"))
    with sqlstate("40P01", match=f"blocked by process {other.pid}"):
        wait(waiter, handle)
    waiter.execute("ROLLBACK")
    assert blocked.finish() is None
    other.execute("COMMIT")
    wait(waiter, handle)


def test_through_a_worker_of_the_worker(waiter: Session) -> None:
    """The worker launches one of its own, which waits for the session that waits for the first."""
    waiter.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    handle = launch(
        waiter,
        "SELECT pg_background_wait_v2(h.pid, h.cookie)"
        " FROM pg_background_launch_v2('SELECT pg_advisory_xact_lock(1)') AS h",
    )
    first = error_of(lambda: wait(waiter, handle))
    if first is None:  # the worker was the one to give way
        first = error_of(lambda: result(waiter, handle))
        waiter.execute("ROLLBACK")
    else:
        waiter.execute("ROLLBACK")
        wait(waiter, handle)
    assert first is not None
    assert first.sqlstate == "40P01"


def test_worker_of_another_session(waiter: Session, another: Callable[[], Session]) -> None:
    other = another()
    waiter.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    handle = launch(other, "SELECT pg_advisory_xact_lock(1)")
    with sqlstate("40P01"):
        wait(waiter, handle)
    waiter.execute("ROLLBACK")
    wait(waiter, handle)


def test_detached_and_submitted_workers(waiter: Session) -> None:
    waiter.execute("SELECT pg_advisory_lock(1)")
    detached = launch(waiter, "SELECT pg_advisory_xact_lock(1)")
    waiter.execute("SELECT pg_background_detach_v2(%s, %s)", detached)
    call = "SELECT pid, cookie FROM pg_background_submit_v2('SELECT pg_advisory_xact_lock(1)')"
    submitted = Handle(*waiter.rows(call)[0])
    for handle in (detached, submitted):
        with sqlstate("40P01"):
            wait(waiter, handle)
    waiter.execute("SELECT pg_advisory_unlock(1)")
    wait(waiter, detached)
    wait(waiter, submitted)


def test_news_of_other_workers_does_not_put_the_look_off(waiter: Session, another: Callable[[], Session]) -> None:
    """Whoever hears of the end of some submitted worker every 50 ms still looks."""
    waiter.execute("SELECT pg_advisory_lock(1)")
    call = "SELECT pid, cookie FROM pg_background_submit_v2('SELECT pg_advisory_xact_lock(1)')"
    handle = Handle(*waiter.rows(call)[0])
    waiter.execute(
        "SELECT pg_background_submit_v2(format('SELECT pg_sleep(%s)', g * 0.15)) FROM generate_series(1, 12) g"
    )
    started = time.monotonic()
    with sqlstate("40P01"):
        wait(waiter, handle)
    assert time.monotonic() - started < _LIMIT_S
    waiter.execute("SELECT pg_advisory_unlock(1)")
    wait(waiter, handle)


def test_wait_for_the_first_of_several_that_all_wait(waiter: Session) -> None:
    """One that waits for another of them waits for this session, too."""
    waiter.execute("SELECT pg_advisory_lock(1)")
    handles = [launch(waiter, "SELECT pg_advisory_xact_lock(1)") for _ in range(3)]
    waiter.execute("SELECT pg_advisory_lock(2)")
    handles.append(launch(waiter, "SELECT pg_advisory_xact_lock(2)"))
    started = time.monotonic()
    with sqlstate("40P01") as raised:
        wait_any(waiter, handles)
    assert DEADLOCK_TIMEOUT_S <= time.monotonic() - started < _LIMIT_S
    for handle in handles:
        assert str(handle.pid) in (raised.diag.message_primary or "")
        assert f"Process {handle.pid} waits for ExclusiveLock on advisory lock" in (raised.diag.message_detail or "")
    waiter.execute("SELECT pg_advisory_unlock(2)")
    assert wait_any(waiter, handles) == handles[-1]
    waiter.execute("SELECT pg_advisory_unlock(1)")
    for handle in handles:
        wait(waiter, handle)


# --- no false alarm -------------------------------------------------------------------------------


def test_no_alarm_while_a_third_session_holds_the_lock(waiter: Session, another: Callable[[], Session]) -> None:
    other = another()
    other.execute("BEGIN; UPDATE t SET n = 3")
    waiter.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    handle = launch(waiter, "UPDATE t SET n = 4")
    waiting = Background(lambda: wait(waiter, handle))
    wait_until(lambda: is_blocked(other, handle.pid))
    time.sleep(DEADLOCK_TIMEOUT_S + 1.2)
    other.execute("COMMIT")
    assert waiting.finish() is None
    waiter.execute("COMMIT")


def test_no_alarm_where_the_blocker_waits_for_a_worker_with_a_timeout(
    waiter: Session, another: Callable[[], Session]
) -> None:
    other = another()
    waiter.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    other.execute("BEGIN; SELECT pg_advisory_xact_lock(2)")
    others_worker = launch(other, "SELECT pg_advisory_xact_lock(1)")
    own_worker = launch(waiter, "SELECT pg_advisory_xact_lock(2)")

    def give_up() -> None:
        other.value("SELECT pg_background_wait_v2_timeout(%s, %s, 2000)", others_worker)
        other.execute("COMMIT")

    waiting = Background(give_up)
    wait(waiter, own_worker)
    assert waiting.finish() is None
    waiter.execute("COMMIT")
    wait(other, others_worker)


def test_no_alarm_where_one_of_several_goes_on(waiter: Session, another: Callable[[], Session]) -> None:
    other = another()
    other.execute("SELECT pg_advisory_lock(2)")
    waiter.execute("SELECT pg_advisory_lock(1)")
    handles = [launch(waiter, f"SELECT pg_advisory_xact_lock({lock})") for lock in (1, 2)]
    waiting = Background(lambda: wait_any(waiter, handles))
    wait_until(lambda: is_blocked(other, handles[1].pid))
    time.sleep(DEADLOCK_TIMEOUT_S + 1.2)
    other.execute("SELECT pg_advisory_unlock(2)")
    assert waiting.finish() is None
    waiter.execute("SELECT pg_advisory_unlock(1)")
    wait(waiter, handles[0])


def test_no_alarm_where_the_blocker_waits_for_the_first_of_several(
    waiter: Session, another: Callable[[], Session]
) -> None:
    """It goes on with the other one."""
    other, third = another(), another()
    third.execute("SELECT pg_advisory_lock(3)")
    waiter.execute("SELECT pg_advisory_lock(1)")
    other.execute("SELECT pg_advisory_lock(2)")
    others_workers = [launch(other, f"SELECT pg_advisory_xact_lock({lock})") for lock in (1, 3)]
    own_worker = launch(waiter, "SELECT pg_advisory_xact_lock(2)")

    def go_on() -> None:
        wait_any(other, others_workers)
        other.execute("SELECT pg_advisory_unlock(2)")

    first, own = Background(go_on), Background(lambda: wait(waiter, own_worker))
    wait_until(lambda: is_blocked(third, others_workers[1].pid))
    time.sleep(DEADLOCK_TIMEOUT_S + 1.2)
    third.execute("SELECT pg_advisory_unlock(3)")
    assert first.finish() is None
    assert own.finish() is None
    waiter.execute("SELECT pg_advisory_unlock(1)")
    wait(other, others_workers[0])


def test_no_alarm_in_a_wait_with_a_timeout(waiter: Session) -> None:
    waiter.execute("SELECT pg_advisory_lock(1)")
    handle = launch(waiter, "SELECT pg_advisory_xact_lock(1)")
    assert waiter.value("SELECT pg_background_wait_v2_timeout(%s, %s, 1500)", handle) is False
    waiter.execute("SELECT pg_advisory_unlock(1)")
    wait(waiter, handle)


def test_no_alarm_for_a_long_worker(waiter: Session) -> None:
    waiter.execute("BEGIN; UPDATE t SET n = 2")
    assert run(waiter, "SELECT 'done' FROM pg_sleep(1.5)") == [("done",)]
    waiter.execute("COMMIT")


@pytest.mark.parametrize(
    "when", ["after the supervisor was told", pytest.param("while it is told", marks=pytest.mark.local_server)]
)
def test_wait_that_is_over_is_forgotten(
    waiter: Session, another: Callable[[], Session], conn: Session, when: str
) -> None:
    """A session whose wait was canceled counts no longer as one that waits for its worker."""
    other = another()
    waiter.execute("SELECT pg_advisory_lock(1)")
    other.execute("SELECT pg_advisory_lock(2)")
    others_worker = launch(other, "SELECT pg_advisory_xact_lock(1)")
    own_worker = launch(waiter, "SELECT pg_advisory_xact_lock(2)")
    other.execute("SET statement_timeout = '600ms'")
    listens = nullcontext() if when == "after the supervisor was told" else stopped(supervisor_pid(conn))
    with listens, sqlstate("57014"):
        wait(other, others_worker)
    other.execute("SET statement_timeout = 0")
    waiting = Background(lambda: wait(waiter, own_worker))
    time.sleep(DEADLOCK_TIMEOUT_S + 1.2)
    other.execute("SELECT pg_advisory_unlock(2)")
    assert waiting.finish() is None
    waiter.execute("SELECT pg_advisory_unlock(1)")
    wait(other, others_worker)
