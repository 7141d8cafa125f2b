"""Worker sessions are kept and used again, and show nothing of an earlier job."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.background import Handle, detach, is_gone, launch, listed, result, run, wait
from tests.clusters import Cluster, Session, sqlstate, wait_until
from tests.supervision import descriptors, terminate_supervisor

PID = "SELECT pg_backend_pid()"


def worker_pid(session: Session) -> int:
    """The backend that the next job runs in."""
    return int(run(session, PID, "pid int")[0][0])


def submit(session: Session, query: str) -> Handle:
    """Starts a worker whose output is thrown away, and waits for its end."""
    handle = Handle(*session.rows("SELECT pid, cookie FROM pg_background_submit_v2(%s)", (query,))[0])
    wait(session, handle)
    return handle


def cancel(session: Session, handle: Handle) -> None:
    """Asks a worker to stop, and waits until it has."""
    session.execute("SELECT pg_background_cancel_v2(%s, %s)", handle)
    wait(session, handle)


# --- when a session is used again -----------------------------------------------------------------


def test_a_finished_workers_session_runs_the_next_job(alice: Session) -> None:
    assert len({worker_pid(alice) for _ in range(5)}) == 1


def test_a_failed_jobs_session_runs_the_next_job(alice: Session) -> None:
    before = worker_pid(alice)
    with sqlstate("22012"):
        run(alice, "SELECT 1/0")
    assert worker_pid(alice) == before


@pytest.mark.parametrize("size", [0, 1])
def test_a_smaller_pool_size_holds_from_the_next_launch_on(alice: Session, conn: Session, size: int) -> None:
    handles = [launch(alice, PID) for _ in range(3)]
    kept = {int(result(alice, handle, "pid int")[0][0]) for handle in handles}
    alice.execute(f"SET pg_background.pool_size = {size}")
    assert (worker_pid(alice) in kept) is (size == 1)
    wait_until(lambda: sum(not is_gone(conn, pid) for pid in kept) == size)


def test_submitted_jobs_are_given_kept_sessions(alice: Session) -> None:
    alice.execute("SET pg_background.max_workers = 2")
    pids = {submit(alice, "SELECT 1").pid for _ in range(20)}
    assert len(pids) <= 3  # one for each that is tracked, and the one that takes the place of the first


def test_a_burst_of_submitted_jobs_starts_no_more_sessions_than_are_kept(alice: Session) -> None:
    """A session is told to be clean when all of its answers were taken: it need not be ended for being unread."""
    for setting in ("max_workers = 4", "pool_size = 4", "launch_timeout = '20s'"):
        alice.execute(f"SET pg_background.{setting}")
    submits = "SELECT (pg_background_submit_v2('SELECT 1')).pid FROM generate_series(1, 400)"
    pids = {pid for (pid,) in alice.rows(f"SELECT DISTINCT pid FROM ({submits}) AS s(pid)")}
    assert len(pids) <= 6  # a busy machine may take more than a moment to clean one


def test_pool_size_0_gives_every_job_a_fresh_backend(alice: Session) -> None:
    alice.execute("SET pg_background.pool_size = 0")
    started = {
        run(
            alice,
            "SELECT pg_postmaster_start_time(), backend_start FROM pg_stat_get_activity(pg_backend_pid())",
            "a timestamptz, b timestamptz",
        )[0][1]
        for _ in range(3)
    }
    assert len(started) == 3


def test_no_more_sessions_are_kept_than_pool_size(alice: Session, cluster: Cluster, conn: Session) -> None:
    alice.execute("SET pg_background.pool_size = 2")
    handles = [launch(alice, PID) for _ in range(5)]
    for handle in handles:
        result(alice, handle, "pid int")
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_background'"
    wait_until(lambda: conn.value(query) == 2, what="two kept sessions")


def test_a_cancelled_workers_session_is_not_used_again(alice: Session) -> None:
    handle = launch(alice, "SELECT pg_sleep(30)")
    cancel(alice, handle)
    with sqlstate("57014"):
        result(alice, handle)
    assert worker_pid(alice) != handle.pid


def until_reused(pid_of_next: Callable[[], int]) -> int:
    """The pid of a backend that has run two jobs: the next job may be faster than the clean-up on a busy machine."""
    seen: set[int] = set()

    def again() -> int:
        pid = pid_of_next()
        if pid in seen:
            return pid
        seen.add(pid)
        return 0

    return wait_until(again, what="a backend that is used again")


def let_go(session: Session, query: str) -> Handle:
    """Starts a worker, detaches it, and waits for its end."""
    handle = launch(session, query)
    detach(session, handle)
    wait(session, handle)
    return handle


@pytest.mark.parametrize(
    ("query", "tag", "sqlstate"),
    [
        ("SELECT 1", "SELECT 1", None),
        ("SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g", "SELECT 20000", None),
        ("CREATE TEMP TABLE t (n int); INSERT INTO t VALUES (1), (2)", "INSERT 0 2", None),
        ("SELECT 1; SELECT 1/0", None, "22012"),
        ("SELECT 1/0", None, "22012"),
        ("", "", None),
        ("SELECT pg_sleep(0.2)", "SELECT 1", None),
    ],
)
def test_a_detached_workers_session_runs_the_next_job(
    alice: Session, query: str, tag: str | None, sqlstate: str | None
) -> None:
    def pid_of_next() -> int:
        handle = let_go(alice, query)
        outcome = "SELECT command_tag, sqlstate FROM pg_background_outcome_v2(%s, %s)"
        assert alice.rows(outcome, handle) == [(tag, sqlstate)]
        return handle.pid

    kept = until_reused(pid_of_next)
    # libpq, which has read none of these answers, reads those of the next jobs.
    rows = "SELECT g, pg_backend_pid() FROM generate_series(1, 1000) g"
    wait_until(lambda: run(alice, rows, "g int, pid int") == [(g, kept) for g in range(1, 1001)])


def test_a_detached_workers_session_runs_the_next_job_after_one_with_parameters(alice: Session) -> None:
    alice.execute("CREATE TABLE kept (t text)")
    call = "SELECT pid, cookie FROM pg_background_launch_v2('INSERT INTO kept VALUES ($1)', 0, NULL, ARRAY[%s])"

    def pid_of_next() -> int:
        handle = Handle(*alice.rows(call, ("it's",))[0])
        detach(alice, handle)
        wait(alice, handle)
        return handle.pid

    kept = until_reused(pid_of_next)
    assert set(alice.rows("SELECT t FROM kept")) == {("it's",)}
    wait_until(lambda: worker_pid(alice) == kept)


def test_a_worker_that_is_detached_after_its_end_was_noticed_elsewhere(alice: Session, conn: Session) -> None:
    handle = launch(alice, "SELECT pg_sleep(0.2)")
    wait(conn, handle)
    detach(alice, handle)
    assert alice.rows("SELECT state FROM pg_background_outcome_v2(%s, %s)", handle) == [("stopped",)]
    wait_until(lambda: worker_pid(alice) == handle.pid)


def test_a_worker_that_is_detached_when_some_of_its_output_was_read(alice: Session) -> None:
    handle = launch(alice, "DO $$ BEGIN RAISE NOTICE 'here'; PERFORM pg_sleep(0.3); END $$")
    wait_until(lambda: alice.value("SELECT pg_background_wait_v2_timeout(%s, %s, 100)", handle) is False)
    detach(alice, handle)
    wait(alice, handle)
    assert alice.rows("SELECT command_tag FROM pg_background_outcome_v2(%s, %s)", handle) == [("DO",)]
    assert worker_pid(alice) != handle.pid


def test_a_detached_worker_that_is_cancelled_is_not_used_again(alice: Session) -> None:
    handle = launch(alice, "SELECT pg_sleep(30)")
    detach(alice, handle)
    cancel(alice, handle)
    assert alice.rows("SELECT state FROM pg_background_outcome_v2(%s, %s)", handle) == [("canceled",)]
    assert worker_pid(alice) != handle.pid


def test_a_detached_worker_goes_on_when_its_supervisor_is_replaced(alice: Session, conn: Session) -> None:
    alice.execute("CREATE TABLE kept (n int)")
    handle = launch(alice, "SELECT pg_sleep(0.5); INSERT INTO kept VALUES (1)")
    detach(alice, handle)
    terminate_supervisor(conn)
    wait(alice, handle)
    assert alice.rows("SELECT command_tag FROM pg_background_outcome_v2(%s, %s)", handle) == [("INSERT 0 1",)]
    assert alice.value("SELECT count(*) FROM kept") == 1
    assert run(alice, "SELECT 1", "n int") == [(1,)]


def test_detaching_workers_that_have_died_leaks_nothing(alice: Session, conn: Session) -> None:
    worker_pid(alice)
    before = descriptors(alice.pid)  # with one kept session
    for _ in range(6):
        handle = launch(alice, "SELECT pg_sleep(30)")
        conn.execute("SELECT pg_terminate_backend(%s, 5000)", (handle.pid,))
        wait(conn, handle)  # its supervisor has seen it, its session has not
        detach(alice, handle)
        # In each call a session takes in what the supervisor has told meanwhile.
        wait_until(lambda: listed(alice) == [] and descriptors(alice.pid) <= before, what="no more sockets than before")
    until_reused(lambda: let_go(alice, "SELECT 1").pid)


def test_a_job_that_is_detached_after_its_parameters_were_refused_is_an_error(alice: Session) -> None:
    """The server's answer comes while most of them have not been sent."""
    call = "SELECT pid, cookie FROM pg_background_launch_v2('INSERT INTO missing VALUES ($1)', 0, NULL, ARRAY[%s])"
    handle = Handle(*alice.rows(call, ("x" * 5_000_000,))[0])
    detach(alice, handle)
    wait(alice, handle)
    ((state, code),) = alice.rows("SELECT state, sqlstate FROM pg_background_outcome_v2(%s, %s)", handle)
    assert (state, code in ("42P01", "08006")) == ("error", True)


def test_a_cancel_while_workers_are_detached_loses_none(alice: Session) -> None:
    handles = [launch(alice, "SELECT pg_sleep(0.5)") for _ in range(8)]
    alice.execute("SET statement_timeout = 1")
    for _ in range(20):
        with suppress(psycopg.errors.QueryCanceled):
            alice.execute("SELECT pg_background_detach_all_v2()")
    alice.execute("RESET statement_timeout")
    for handle in handles:
        wait(alice, handle)
    alice.execute("SELECT pg_background_detach_all_v2()")
    assert listed(alice) == []
    states = "SELECT DISTINCT state FROM pg_background_activity WHERE launcher_pid = %s"
    wait_until(lambda: alice.rows(states, (alice.pid,)) == [("stopped",)])


@pytest.mark.parametrize("query", ["SELECT 1", "SELECT pg_sleep(0.05); SELECT 2", "SELECT pg_sleep(0.05)/0"])
def test_a_burst_of_detached_workers_leaves_nothing_behind(alice: Session, conn: Session, query: str) -> None:
    handles = []
    for _ in range(40):
        handles.append(launch(alice, query))
        detach(alice, handles[-1])
    for handle in handles:
        wait(alice, handle)
    sessions = "SELECT pid, state, query FROM pg_stat_activity WHERE application_name = 'pg_background'"

    def too_many() -> list[Any]:
        listed(alice)  # a session takes back what was cleaned, or ends it, in its next call
        found = conn.rows(sessions)
        return found if len(found) > 4 else []

    wait_until(lambda: not too_many(), what="no more than pool_size sessions")
    assert too_many() == []
    states = "SELECT DISTINCT state FROM pg_background_activity WHERE launcher_pid = %s"
    wait_until(lambda: alice.rows(states, (alice.pid,)) == [("error" if "/0" in query else "stopped",)])


def test_a_tracked_workers_pid_is_not_given_to_another(alice: Session) -> None:
    handle = launch(alice, PID)
    wait(alice, handle)
    assert worker_pid(alice) != handle.pid
    assert result(alice, handle, "pid int") == [(handle.pid,)]


def test_kept_sessions_are_not_shared_between_roles(conn: Session, role: Callable[..., str]) -> None:
    first, second = role("first"), role("second")
    pids: dict[str, int] = {}
    for name in (first, second, first, second):
        conn.execute(f'SET ROLE "{name}"')
        user, pid = run(conn, "SELECT current_user::text, pg_backend_pid()", "u text, pid int")[0]
        assert user == name
        assert pids.setdefault(name, pid) == pid
    assert pids[first] != pids[second]
    conn.execute("RESET ROLE")


def test_idle_sessions_of_another_role_make_room(conn: Session, role: Callable[..., str]) -> None:
    conn.execute("SET pg_background.pool_size = 1")
    first = worker_pid(conn)
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role())))
    assert worker_pid(conn) == worker_pid(conn) != first


def test_an_idle_session_ends_after_pool_idle_timeout(alice: Session, conn: Session) -> None:
    alice.execute("SET pg_background.pool_idle_timeout = '200ms'")
    pid = worker_pid(alice)
    wait_until(lambda: is_gone(conn, pid), what="its end")
    assert worker_pid(alice) != pid


@pytest.mark.parametrize("launcher", ["ordinary", "superuser", "with a job after a commit"])
def test_sessions_that_are_not_needed_any_more_end_while_another_is_used(
    alice: Session, connect: Callable[..., Session], conn: Session, launcher: str
) -> None:
    session = connect() if launcher == "superuser" else alice
    if launcher == "with a job after a commit":
        query = "SELECT pid, cookie FROM pg_background_submit_on_commit_v2('SELECT 1')"
        wait(session, Handle(*session.rows(query)[0]))
    session.execute("SET pg_background.pool_size = 4")
    session.execute("SET pg_background.pool_idle_timeout = '1s'")
    handles = [launch(session, PID) for _ in range(4)]
    kept = {int(result(session, handle, "pid int")[0][0]) for handle in handles}
    assert len(kept) == 4
    most = descriptors(session.pid)

    def only_one_is_left() -> bool:
        return worker_pid(session) in kept and sum(not is_gone(conn, pid) for pid in kept) == 1

    wait_until(only_one_is_left)
    # Their launcher closes its ends, one with each job.
    wait_until(lambda: worker_pid(session) in kept and descriptors(session.pid) == most - 3, what="three closed")


def test_rows_can_be_read_after_their_session_has_ended_for_being_idle(alice: Session, conn: Session) -> None:
    alice.execute("SET pg_background.pool_idle_timeout = '200ms'")
    pid = worker_pid(alice)
    handle = launch(alice, PID)
    wait_until(lambda: is_gone(conn, pid), what="its end")
    assert (handle.pid, result(alice, handle, "pid int")) == (pid, [(pid,)])
    assert alice.notices == []


def test_kept_sessions_end_with_their_launcher(alice: Session, conn: Session) -> None:
    pid = worker_pid(alice)
    assert conn.value("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (pid,)) == 1
    alice.close()
    wait_until(lambda: is_gone(conn, pid), what="its end")


def test_a_kept_session_that_was_terminated_is_replaced(alice: Session, conn: Session) -> None:
    pid = worker_pid(alice)
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    assert worker_pid(alice) != pid


def test_changed_settings_of_the_launcher_reach_a_kept_session(alice: Session) -> None:
    before = worker_pid(alice)
    for value in ("3MB", "5MB", "4MB"):
        alice.execute(f"SET work_mem = '{value}'")
        assert run(alice, "SELECT current_setting('work_mem'), pg_backend_pid()", "v text, pid int") == [
            (value, before)
        ]
    alice.execute("RESET work_mem")
    default = alice.value("SHOW work_mem")
    assert run(alice, "SELECT current_setting('work_mem'), pg_backend_pid()", "v text, pid int") == [(default, before)]


@pytest.mark.parametrize("who", ["an ordinary role", "the login role"])
def test_a_job_sees_nothing_of_the_workers_that_an_earlier_one_launched(
    alice: Session, conn: Session, who: str
) -> None:
    session = alice if who == "an ordinary role" else conn
    nested = "SELECT (pg_background_launch_v2('SELECT 1')).pid, (pg_background_submit_v2('SELECT pg_sleep(0.1)')).pid"
    listing = "SELECT l::text FROM pg_background_list_v2() AS l(pid int, cookie bigint, launched_at timestamptz,"
    listing += " user_id oid, queue_size int, state text, sql_preview text, last_error text, consumed bool)"
    counts = "SELECT workers_launched, workers_completed, workers_failed FROM pg_background_stats_v2()"
    later = "SELECT (pg_background_submit_on_commit_v2('SELECT pg_sleep(0.2)')).pid"
    for _ in range(20):  # more than a session may track
        run(session, nested, "one int, two int")
        run(session, later, "one int")
        assert run(session, listing, "worker text") == []
        assert run(session, counts, "launched bigint, completed bigint, failed bigint") == [(0, 0, 0)]


# --- what an earlier job leaves behind: nothing ---------------------------------------------------


def leave(session: Session, query: str, how: str, columns: str = "r text") -> int:
    """Run a job that leaves something behind, to the kind of end that is asked for; the pid of its backend."""
    if how == "submitted":
        return submit(session, query).pid
    if how == "detached":
        return let_go(session, query).pid
    handle = launch(session, query)
    result(session, handle, columns)
    return handle.pid


@pytest.fixture(params=["launched", "submitted", "detached"])
def how(request: pytest.FixtureRequest) -> str:
    """How the earlier job was started."""
    return str(request.param)


def test_settings_do_not_stay(alice: Session, how: str) -> None:
    pid = leave(alice, "SET work_mem = '7MB'; SET datestyle = 'German'; SET TimeZone = 'Asia/Tokyo'", how)
    shown = run(
        alice,
        "SELECT pg_backend_pid(), current_setting('work_mem'), current_setting('datestyle'),"
        " current_setting('timezone')",
        "pid int, a text, b text, c text",
    )
    expected = [alice.value(f"SHOW {name}") for name in ("work_mem", "datestyle", "timezone")]
    assert shown in ([(pid, *expected)], [(shown[0][0], *expected)])


def test_a_session_in_which_a_job_made_a_placeholder_is_not_used_again(alice: Session, how: str) -> None:
    leave(alice, "SELECT set_config('left.behind', 'x', false)", how)
    assert run(alice, "SELECT current_setting('left.behind', true)") == [(None,)]


def test_temporary_tables_do_not_stay(alice: Session, how: str) -> None:
    leave(alice, "CREATE TEMP TABLE left_behind AS SELECT 1", how)
    assert run(alice, "SELECT to_regclass('pg_temp.left_behind')::text") == [(None,)]


def test_prepared_statements_do_not_stay(alice: Session, how: str) -> None:
    leave(alice, "PREPARE left_behind AS SELECT 1", how)
    assert run(alice, "SELECT count(*)::text FROM pg_prepared_statements") == [("0",)]


def test_advisory_locks_do_not_stay(alice: Session, conn: Session, how: str) -> None:
    leave(alice, "SELECT pg_advisory_lock(424242)::text", how)
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 424242"
    wait_until(lambda: conn.value(query) == 0, what="the lock's release")


def test_listening_does_not_stay(alice: Session, how: str) -> None:
    leave(alice, "LISTEN left_behind", how)
    assert run(alice, "SELECT count(*)::text FROM pg_listening_channels()") == [("0",)]


def test_cursors_do_not_stay(alice: Session, how: str) -> None:
    leave(alice, "DECLARE left_behind CURSOR WITH HOLD FOR SELECT 1", how)
    assert run(alice, "SELECT count(*)::text FROM pg_cursors") == [("0",)]


def test_the_state_of_sequences_does_not_stay(alice: Session, how: str) -> None:
    alice.execute("CREATE SEQUENCE numbers")
    leave(alice, "SELECT nextval('numbers')::text", how)
    with sqlstate("55000"):
        run(alice, "SELECT lastval()::text")


def test_roles_do_not_stay(conn: Session, role: Callable[..., str], how: str) -> None:
    group, member = role("group", login=False), role("member")
    conn.execute(f'GRANT "{group}" TO "{member}"')
    conn.execute(f'SET ROLE "{member}"')
    leave(conn, f'SET ROLE "{group}"', how)
    assert run(conn, "SELECT current_user || ' ' || session_user") == [(f"{member} {member}",)]
    leave(conn, f'SET SESSION AUTHORIZATION "{member}"', how)
    assert run(conn, "SELECT current_user || ' ' || session_user") == [(f"{member} {member}",)]
    conn.execute("RESET ROLE")


def test_nothing_of_a_job_that_changed_everything_and_failed_stays(alice: Session) -> None:
    job = (
        "SET work_mem = '9MB'; CREATE TEMP TABLE left_behind (a int); PREPARE left_behind AS SELECT 1;"
        " LISTEN left_behind; SELECT pg_advisory_lock(77); SELECT 1/0"
    )
    with sqlstate("22012"):
        run(alice, job)
    seen = run(
        alice,
        "SELECT current_setting('work_mem'), to_regclass('pg_temp.left_behind')::text,"
        " (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_listening_channels()),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())",
        "a text, b text, c int8, d int8, e int8",
    )
    assert seen == [(alice.value("SHOW work_mem"), None, 0, 0, 0)]


def test_read_only_and_isolation_defaults_do_not_stay(alice: Session, how: str) -> None:
    leave(alice, "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY, ISOLATION LEVEL SERIALIZABLE", how)
    query = "SELECT current_setting('transaction_read_only') || ' ' || current_setting('transaction_isolation')"
    assert run(alice, query) == [("off read committed",)]


# --- privileges bite at once ----------------------------------------------------------------------


def test_a_revoked_role_gets_no_kept_session(alice: Session, conn: Session) -> None:
    worker_pid(alice)
    conn.execute(f'REVOKE pgbackground_role FROM "{alice.info.user}"')
    with sqlstate("42501"):
        alice.execute("SELECT pg_background_launch('SELECT 1')")
    conn.execute(f'GRANT pgbackground_role TO "{alice.info.user}"')


def test_a_renamed_roles_jobs_run_under_its_new_name(alice: Session, conn: Session) -> None:
    worker_pid(alice)
    name = alice.info.user
    conn.execute(f'ALTER ROLE "{name}" RENAME TO "{name} renamed"')
    assert run(alice, "SELECT current_user::text") == [(f"{name} renamed",)]
    conn.execute(f'ALTER ROLE "{name} renamed" RENAME TO "{name}"')


def test_listed_and_counted_after_reuse(alice: Session) -> None:
    for _ in range(3):
        worker_pid(alice)
    assert listed(alice) == []
    counts = alice.rows("SELECT workers_launched, workers_completed, workers_active FROM pg_background_stats_v2()")
    assert counts == [(3, 3, 0)]


def test_a_job_under_deferrable_defaults_does_not_keep_its_launcher_waiting(alice: Session) -> None:
    """What cleans its session takes a snapshot, and that waits for the end of the launcher's own transaction."""
    alice.execute("CREATE TABLE written (n int)")
    alice.execute(
        "SET default_transaction_isolation = serializable; SET default_transaction_read_only = on;"
        " SET default_transaction_deferrable = on; SET statement_timeout = '20s'"
    )
    alice.execute("BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE NOT DEFERRABLE")
    alice.execute("INSERT INTO written VALUES (1)")
    for _ in range(3):
        assert run(alice, "SET TRANSACTION NOT DEFERRABLE; SELECT 1", "n int") == [(1,)]
    alice.execute("ROLLBACK")
