"""On a hot standby, where work can only read; after its promotion; and in read-only transactions on a primary.

Unlogged tables cannot be read there. So the views cannot be, while the calls get what they need from the supervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from psycopg import sql

from tests.background import Handle, detach, launch, listed, run, wait
from tests.clusters import Cluster, Role, Session, server_log, sqlstate, wait_until
from tests.supervision import supervisor_pid

pytestmark = pytest.mark.local_server

_ROLE = Role("reader", "secret of reader")
_ACTIVITY = "SELECT state FROM pg_background_activity WHERE (pid, cookie) = (%s, %s)"


@pytest.fixture(scope="module")
def primary() -> Iterator[Cluster]:
    """A server with the extension, a table `kept` and the ordinary role `reader` in its database postgres."""
    cluster = Cluster.start_new("trust", "primary")
    try:
        with cluster.connect() as admin:
            admin.execute("CREATE EXTENSION pg_background CASCADE")
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(_ROLE)))
            admin.execute(sql.SQL("GRANT pgbackground_role TO {}").format(sql.Identifier(_ROLE)))
            admin.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n; GRANT ALL ON kept TO reader")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def standby(primary: Cluster) -> Iterator[Cluster]:
    """A hot standby of it; no test promotes it."""
    cluster = primary.start_standby()
    yield cluster
    cluster.close()


@pytest.fixture
def open_session(standby: Cluster) -> Iterator[Callable[..., Session]]:
    """Opens sessions on the standby, of the ordinary role unless told otherwise."""
    opened: list[Session] = []

    def connect(user: str = _ROLE) -> Session:
        opened.append(standby.connect(user=user))
        return opened[-1]

    yield connect
    for session in opened:
        session.close()
    wait_until(lambda: not standby.workers("postgres"), what="the workers' end")


def _submit(session: Session, query: str) -> Handle:
    return Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])


def _outcome(session: Session, handle: Handle) -> tuple[str, str | None]:
    (row,) = session.rows("SELECT state, sqlstate FROM pg_background_outcome_v2(%s, %s)", handle)
    return row[0], row[1]


# --- reading --------------------------------------------------------------------------------------


def test_launch_and_result_work_and_sessions_are_reused(open_session: Callable[..., Session]) -> None:
    session = open_session()
    columns = "pid int, recovering bool, who name, rows bigint"
    query = "SELECT pg_backend_pid(), pg_is_in_recovery(), current_user, (SELECT count(*) FROM kept)"
    ((first, *found),) = run(session, query, columns)
    assert found == [True, "reader", 1000]
    ((second, *_),) = run(session, query, columns)
    assert second == first
    assert listed(session) == []


def test_rows_in_bulk_parameters_and_one_call_runs(open_session: Callable[..., Session]) -> None:
    session = open_session()
    assert run(session, "SELECT sum(n), min(n) FROM kept", "s bigint, m int") == [(500500, 1)]
    assert len(run(session, "SELECT n, repeat('x', 500) FROM kept", "n int, x text")) == 1000
    query = "SELECT n FROM pg_background_run_query_v2($1, 0, 0, 'x', 'n int') AS r(n int)".replace("$1", "%s")
    assert session.rows(query, ("SELECT count(*)::int FROM kept",)) == [(1000,)]
    state = "SELECT state, row_count FROM pg_background_run_v2('SELECT n FROM kept WHERE n < $1', 0, 0, NULL, '{11}')"
    assert session.rows(state) == [("stopped", 10)]


def test_a_job_that_writes_fails_with_the_servers_error(open_session: Callable[..., Session]) -> None:
    session = open_session()
    with sqlstate("25006", match="read-only transaction"):
        run(session, "INSERT INTO kept VALUES (0)")
    handle = _submit(session, "DELETE FROM kept")
    wait(session, handle)
    assert _outcome(session, handle) == ("error", "25006")


def test_other_sessions_wait_watch_and_cancel(open_session: Callable[..., Session]) -> None:
    session, other = open_session(), open_session()
    job = _submit(session, "SELECT pg_background_progress(40, 'reading'); SELECT pg_sleep(3600)")
    progress = "SELECT progress_pct, progress_msg FROM pg_background_get_progress_v2(%s, %s)"
    wait_until(lambda: other.rows(progress, job) == [(40, "reading")], what="the progress report")
    assert other.value("SELECT pg_background_wait_v2_timeout(%s, %s, 0)", job) is False
    other.execute("SELECT pg_background_cancel_v2(%s, %s)", job)
    wait(other, job)
    assert _outcome(other, job) == ("canceled", "57014")
    assert _outcome(session, job) == ("canceled", "57014")


def test_a_job_outlives_its_session_and_others_learn_its_outcome(open_session: Callable[..., Session]) -> None:
    watcher = open_session()
    run(watcher, "SELECT 1", "n int")  # connected to the supervisor, which has no table to remember in
    with open_session() as session:
        handle = launch(session, "SELECT pg_sleep(0.2)")
        detach(session, handle)
    wait(watcher, handle)
    assert _outcome(watcher, handle) == ("stopped", None)


def test_a_new_supervisor_takes_over(open_session: Callable[..., Session]) -> None:
    admin, session = open_session("postgres"), open_session()
    handle = launch(session, "SELECT pg_sleep(3600)")
    before = supervisor_pid(admin)
    admin.execute("SELECT pg_terminate_backend(%s, 5000)", (before,))
    session.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 5000)", handle)
    assert supervisor_pid(admin) != before
    assert _outcome(session, handle) == ("canceled", "57014")
    detach(session, handle)


def test_the_check_finds_nothing_wrong(open_session: Callable[..., Session]) -> None:
    found = open_session("postgres").rows("SELECT prerequisite, status, detail FROM pg_background_check()")
    assert {name: status for name, status, _ in found} == dict.fromkeys((name for name, _, _ in found), "ok"), found


def test_what_cannot_work_says_why(open_session: Callable[..., Session]) -> None:
    session = open_session()
    with sqlstate("25006", match="cannot execute pg_background_submit_on_commit_v2"):
        session.execute("SELECT pg_background_submit_on_commit_v2('SELECT 1')")
    with sqlstate("0A000", match="unlogged relations during recovery"):
        session.execute("SELECT * FROM pg_background_activity")


def test_the_supervisor_writes_nothing_into_the_log(standby: Cluster, open_session: Callable[..., Session]) -> None:
    session = open_session()
    handle = _submit(session, "SELECT pg_sleep(1.2)")  # longer than it takes to try a failed write again
    wait(session, handle)
    assert "unlogged" not in "".join(line for line in server_log(standby).splitlines() if "supervisor" in line)


# --- promotion ------------------------------------------------------------------------------------


def test_everything_works_after_a_promotion(primary: Cluster) -> None:
    standby = primary.start_standby("promoted")
    try:
        with standby.connect(user=_ROLE) as session, standby.connect() as admin:
            running = launch(session, "SELECT pg_sleep(3600)")
            supervisor = supervisor_pid(admin)
            assert admin.value("SELECT pg_promote(true, 60)") is True
            # The supervisor that has served the standby serves the primary, and now tells of what it knew before.
            _is_shown_as(session, running, "running")
            assert supervisor_pid(admin) == supervisor
            session.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 5000)", running)
            _is_shown_as(session, running, "canceled")
            detach(session, running)
            _writes(session)
        with standby.connect(user=_ROLE) as session:
            _writes(session)
    finally:
        standby.close()


def _is_shown_as(session: Session, handle: Handle, state: str) -> None:
    wait_until(lambda: session.rows(_ACTIVITY, handle) == [(state,)], what=f"the view to say {state}")


def _writes(session: Session) -> None:
    """Launched, submitted and deferred jobs write, and the view shows them."""
    session.execute("DELETE FROM kept WHERE n < 0")
    assert run(session, "INSERT INTO kept VALUES (-1) RETURNING n", "n int") == [(-1,)]
    with session.transaction():
        query = "SELECT pid, cookie FROM pg_background_submit_on_commit_v2('INSERT INTO kept VALUES (-2)')"
        deferred = Handle(*session.rows(query)[0])
    submitted = _submit(session, "INSERT INTO kept VALUES (-3)")
    for handle in (deferred, submitted):
        wait(session, handle)
        _is_shown_as(session, handle, "stopped")
    assert session.rows("SELECT n FROM kept WHERE n < 0 ORDER BY n") == [(-3,), (-2,), (-1,)]


# --- read-only transactions on a primary ----------------------------------------------------------


@pytest.fixture
def read_only(primary: Cluster) -> Iterator[Session]:
    """A session on the primary whose transactions only read."""
    with primary.connect(user=_ROLE, options="-c default_transaction_read_only=on") as session:
        yield session


def test_a_read_only_session_starts_read_only_jobs(read_only: Session) -> None:
    assert run(read_only, "SELECT count(*) FROM kept", "n bigint") == [(1000,)]
    with sqlstate("25006", match="read-only transaction"):
        run(read_only, "INSERT INTO kept VALUES (0)")
    job = _submit(read_only, "SELECT pg_background_progress(7)")
    wait(read_only, job)
    _is_shown_as(read_only, job, "stopped")


def test_a_read_only_transaction_of_a_session_that_may_write(primary: Cluster) -> None:
    """READ ONLY of one transaction is not inherited: the job has a transaction of its own."""
    with primary.connect(user=_ROLE) as session:
        with session.transaction():
            session.execute("SET TRANSACTION READ ONLY")
            assert run(session, "INSERT INTO kept VALUES (-9) RETURNING n", "n int") == [(-9,)]
            with sqlstate("25006", match="submit_on_commit_v2.. in a read-only"), session.transaction():
                session.execute("SELECT pg_background_submit_on_commit_v2('SELECT 1')")
        session.execute("DELETE FROM kept WHERE n = -9")
