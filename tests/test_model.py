"""Random interleavings of calls, from several sessions and roles, against a model of the contract.

PG_BACKGROUND_MODEL_STEPS: how many calls (default 400); PG_BACKGROUND_MODEL_SEED: which ones. A failure shows the
seed and the calls that led to it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.pq import TransactionStatus

from tests.background import LIST_COLUMNS
from tests.clusters import Session, wait_until

STEPS = int(os.environ.get("PG_BACKGROUND_MODEL_STEPS", "400"))
SEED = int(os.environ.get("PG_BACKGROUND_MODEL_SEED", "8"))

MAX_WORKERS = 5
_PATIENCE_MS = 10_000
_SHOWN_CALLS = 200

NOT_TRACKED, WRONG_COOKIE, NO_MEMBER, SUBMITTED, FULL = "42704", "55000", "42501", "0A000", "53400"
_STOPPED, _CANCELED, _ERROR = "stopped", "canceled", "error"

# What jobs do: each leaves a row in `log` if it commits.
SCRIPTS = {
    "quick": "INSERT INTO model.log VALUES ({n})",
    "rows": "INSERT INTO model.log VALUES ({n}); SELECT g FROM generate_series(1, 300) g",
    "fail": "INSERT INTO model.log VALUES ({n}); SELECT 1/0",
    "report": "INSERT INTO model.log VALUES ({n}); SELECT pg_background_progress({n}, 'job {n}')",
    "brief": "INSERT INTO model.log VALUES ({n}); SELECT pg_sleep(0.01)",
    "long": "INSERT INTO model.log VALUES ({n}); SELECT pg_sleep(3600)",
}
_WEIGHTS = (4, 2, 2, 2, 3, 4)


@dataclass
class Actor:
    """A session and what the model knows of it."""

    name: str
    session: Session
    role: str
    roles: tuple[str, ...]  # that it may SET ROLE to
    members_of: dict[str, set[str]]
    launched: int = 0
    tracked: list[ModelJob] = field(default_factory=list)

    def may_manage(self, job: ModelJob) -> bool:
        return job.role in self.members_of[self.role]


@dataclass
class ModelJob:
    """A job as the contract sees it."""

    number: int
    kind: str
    pid: int
    cookie: int
    owner: Actor
    role: str
    submitted: bool
    v1: bool = False
    settled: bool = False  # known to have ended
    consumed: bool = False
    canceled: bool = False  # it was asked for, when the job had not ended for certain
    shot: bool = False  # by pg_cancel_backend or pg_terminate_backend
    detached: bool = False

    @property
    def handle(self) -> tuple[int, int]:
        return self.pid, self.cookie

    @property
    def is_held(self) -> bool:
        """It runs until somebody ends it, and nobody has."""
        return self.kind == "long" and not (self.canceled or self.shot)

    @property
    def is_bound_to_end(self) -> bool:
        return not self.is_held

    def possible_states(self) -> set[str]:
        ends = {_ERROR} if self.kind == "fail" else set() if self.kind == "long" else {_STOPPED}
        if self.canceled:
            ends.add(_CANCELED)
        if self.shot:
            ends.add(_ERROR)
        return ends


class Model:
    """Makes random calls and holds their outcomes against the contract."""

    def __init__(self, actors: list[Actor], admin: Session, seed: int) -> None:
        self.random = random.Random(seed)
        self.actors = actors
        self.admin = admin
        self.jobs: list[ModelJob] = []
        self.calls: list[str] = []
        self.steps: tuple[tuple[Callable[[Actor], None], int], ...] = (
            (self.launch, 9),
            (self.wait, 6),
            (self.poll, 4),
            (self.cancel, 4),
            (self.cancel_grace, 2),
            (self.detach, 4),
            (self.result, 6),
            (self.progress, 3),
            (self.list_workers, 4),
            (self.stats, 2),
            (self.shoot, 2),
            (self.begin_or_end, 4),
            (self.change_role, 3),
            (self.wrong_cookie, 2),
        )

    def run(self, steps: int) -> None:
        calls, weights = zip(*self.steps)
        for _ in range(steps):
            actor = self.random.choice(self.actors)
            self.random.choices(calls, weights)[0](actor)
        self.finish()

    # --- calls and their errors ---

    def call(self, actor: Actor, query: str, arguments: tuple[Any, ...], expected: set[str | None]) -> list[Any] | None:
        """The rows of a call, or None for an error; which of them is expected, by SQLSTATE, None for rows."""
        shown = f"{actor.name} as {actor.role}: {query} {arguments} expecting {sorted(map(str, expected))}"
        self.calls.append(shown)
        seen: str | None = None
        rows: list[Any] | None = None
        try:
            rows = actor.session.rows(query, arguments)
        except psycopg.Error as error:
            seen = error.sqlstate
            self.calls.append(f"    -> {seen} {error.diag.message_primary}")
            if actor.session.info.transaction_status == TransactionStatus.INERROR:
                actor.session.execute("ROLLBACK")
                # A role that was set in the transaction goes with it: read it back.
                actor.role = actor.session.value("SELECT current_user::text")
        else:
            self.calls.append(f"    -> {rows[:3]}")
        tracked = [(job.number, job.kind, job.submitted, job.settled, job.canceled) for job in actor.tracked]
        assert seen in expected, f"{shown}: got {seen}; number, kind, submitted, settled, canceled: {tracked}"
        return rows

    def pick(self, actor: Actor) -> ModelJob | None:
        """Some job, preferably one that the actor tracks; version 1 handles are good in their own session only."""
        candidates = actor.tracked if actor.tracked and self.random.random() < 0.7 else self.jobs[-40:]
        candidates = [job for job in candidates if not job.v1 or job in actor.tracked]
        return self.random.choice(candidates) if candidates else None

    def access(self, actor: Actor, job: ModelJob) -> set[str | None]:
        """What a call of `cancel` or `wait` comes to."""
        return {None} if actor.may_manage(job) else {NO_MEMBER}

    def access_tracked(self, actor: Actor, job: ModelJob, *, result: bool = False) -> set[str | None]:
        """What a call that only the tracking session may make comes to, for the handle alone."""
        if job in actor.tracked:
            known = self.access(actor, job)
            # An ended submitted worker may have made room for another.
            return known | {NOT_TRACKED, WRONG_COOKIE} if self.may_be_gone(job) else known
        namesakes = [other for other in actor.tracked if other.pid == job.pid]
        if not namesakes or result:
            return {NOT_TRACKED}
        return {NOT_TRACKED, WRONG_COOKIE} if self.may_be_gone(namesakes[0]) else {WRONG_COOKIE}

    def may_be_gone(self, job: ModelJob) -> bool:
        return job.submitted and job.is_bound_to_end

    # --- the calls ---

    def launch(self, actor: Actor) -> None:
        kind = self.random.choices(list(SCRIPTS), _WEIGHTS)[0]
        number = len(self.jobs)
        way = self.random.choice(("launch_v2", "launch_v2", "submit_v2", "launch"))
        certain = [job for job in actor.tracked if not self.may_be_gone(job)]
        expected: set[str | None] = {None}
        if len(certain) >= MAX_WORKERS:
            expected = {FULL}
        elif len(actor.tracked) >= MAX_WORKERS and not all(job.settled for job in actor.tracked if job not in certain):
            expected = {None, FULL}
        columns = "pg_background_launch, 0" if way == "launch" else "pid, cookie"
        query = f"SELECT {columns} FROM pg_background_{way}(%s)"
        rows = self.call(actor, query, (SCRIPTS[kind].format(n=number),), expected)
        if rows is None:
            return
        pid, cookie = rows[0]
        job = ModelJob(number, kind, pid, cookie, actor, actor.role, way == "submit_v2", way == "launch")
        assert not [other for other in actor.tracked if other.pid == pid and not self.may_be_gone(other)]
        actor.launched += 1
        actor.tracked = [other for other in actor.tracked if other.pid != pid]
        actor.tracked.append(job)
        self.jobs.append(job)

    def wait(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is None:
            return
        if job.is_held:
            self.poll_job(actor, job, self.random.choice((0, 5)))
        elif self.random.random() < 0.5:
            self.poll_job(actor, job, _PATIENCE_MS)
        else:
            query = "SELECT pg_background_wait_v2(%s, %s)"
            if self.call(actor, query, job.handle, self.access(actor, job)) is not None:
                job.settled = True

    def poll(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is not None:
            self.poll_job(actor, job, 0)

    def poll_job(self, actor: Actor, job: ModelJob, timeout_ms: int) -> None:
        query = "SELECT pg_background_wait_v2_timeout(%s, %s, %s)"
        rows = self.call(actor, query, (*job.handle, timeout_ms), self.access(actor, job))
        if rows is None:
            return
        ended = rows[0][0]
        if job.settled or (job.is_bound_to_end and timeout_ms == _PATIENCE_MS):
            assert ended
        if job.is_held:
            assert not ended
        job.settled = job.settled or ended

    def cancel(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is not None:
            query = "SELECT pg_background_cancel_v2(%s, %s)"
            if self.call(actor, query, job.handle, self.access(actor, job)) is not None and not job.settled:
                job.canceled = True

    def cancel_grace(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is None:
            return
        query = "SELECT pg_background_cancel_v2_grace(%s, %s, %s)"
        grace_ms = self.random.choice((0, 20, 5000))
        if self.call(actor, query, (*job.handle, grace_ms), self.access(actor, job)) is not None and not job.settled:
            job.canceled = job.settled = True

    def detach(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is None:
            return
        handle: tuple[int, ...] = job.handle
        if job.v1:
            query, arguments = "SELECT pg_background_detach(%s)", handle[:1]
        else:
            query, arguments = "SELECT pg_background_detach_v2(%s, %s)", handle
        expected = self.access_tracked(actor, job)
        if job.submitted and job.owner is actor and not job.detached:
            expected |= self.access(actor, job)  # one that made room is no stranger
        if self.call(actor, query, arguments, expected) is not None:
            job.detached = True
            actor.tracked = [other for other in actor.tracked if other is not job]

    def result(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is None or job.is_held:
            return
        handle: tuple[int, ...] = job.handle
        if job.v1:
            query, arguments = "SELECT * FROM pg_background_result(%s) AS r(x {})", handle[:1]
        else:
            query, arguments = "SELECT * FROM pg_background_result_v2(%s, %s) AS r(x {})", handle
        query = query.format({"rows": "int", "fail": "int", "report": "text", "brief": "text"}.get(job.kind, "text"))
        expected = self.access_tracked(actor, job, result=True)
        if None in expected:
            expected = (expected - {None, WRONG_COOKIE}) | ({SUBMITTED} if job.submitted else self.outcomes(job))
        # Before the call: an error in a transaction takes the role back that was set in it.
        reads = job in actor.tracked and actor.may_manage(job) and not job.submitted
        rows = self.call(actor, query, arguments, expected)
        if reads:
            job.settled = True
            actor.tracked.remove(job)
        if rows is not None:
            lengths = {"rows": 300, "quick": 1, "report": 1, "brief": 1}
            assert len(rows) == lengths[job.kind]

    def outcomes(self, job: ModelJob) -> set[str | None]:
        """SQLSTATEs that reading a result may end with."""
        ends: set[str | None] = {"22012"} if job.kind == "fail" else set() if job.kind == "long" else {None}
        if job.canceled:
            ends |= {"57014", "57P01"}
        if job.shot:
            ends |= {"57014", "57P01", "08006"}
        return ends

    def progress(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is None:
            return
        query = "SELECT * FROM pg_background_get_progress_v2(%s, %s)"
        rows = self.call(actor, query, job.handle, {None})
        assert rows is not None
        reported = (min(100, job.number), f"job {job.number}")
        if job.kind != "report" or not actor.may_manage(job):
            assert rows in ([], [(None, None)])
        elif job.settled and not job.canceled and not job.shot and not job.v1:
            # The table may be some milliseconds behind.
            wait_until(lambda: self.call(actor, query, job.handle, {None}) == [reported], timeout=2)
        else:
            assert rows in ([], [(None, None)], [reported])

    def list_workers(self, actor: Actor) -> None:
        query = f"SELECT pid, cookie, state, consumed, last_error FROM pg_background_list_v2() AS l({LIST_COLUMNS})"
        rows = self.call(actor, query, (), {None})
        assert rows is not None
        shown = {(pid, cookie): (state, consumed, error) for pid, cookie, state, consumed, error in rows}
        assert len(shown) == len(rows)
        for job in list(actor.tracked):
            if not actor.may_manage(job):
                assert job.handle not in shown
                continue
            if job.handle not in shown:
                assert self.may_be_gone(job), f"job {job.number} is not listed"
                actor.tracked.remove(job)
                continue
            state, consumed, error = shown.pop(job.handle)
            assert not consumed
            if state == "running":
                assert not job.settled, f"job {job.number} has ended"
            else:
                assert state in job.possible_states(), f"job {job.number}: {state} {error}"
                job.settled = True
        assert not shown, "listed, but not tracked"

    def stats(self, actor: Actor) -> None:
        columns = "workers_launched, workers_completed, workers_failed, workers_canceled, workers_active"
        rows = self.call(actor, f"SELECT {columns} FROM pg_background_stats_v2()", (), {None})
        assert rows is not None
        launched, completed, failed, canceled, active = rows[0]
        assert launched == actor.launched
        own = [job for job in self.jobs if job.owner is actor]
        assert completed + failed + canceled <= launched
        assert completed <= sum(job.kind not in ("fail", "long") for job in own)
        assert canceled <= sum(job.canceled for job in own)
        assert active <= len(actor.tracked)

    def shoot(self, _actor: Actor) -> None:
        """Somebody else's cancel or termination, of a job that runs for certain."""
        running = [job for job in self.jobs if job.is_held]
        if running:
            job = self.random.choice(running)
            call = self.random.choice(("pg_cancel_backend", "pg_terminate_backend"))
            self.calls.append(f"{call}({job.pid})")
            sleeping = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
            wait_until(lambda: self.admin.rows(sleeping, (job.pid,)))  # earlier a cancel would be lost
            self.admin.execute(sql.SQL("SELECT {}(%s)").format(sql.Identifier(call)), (job.pid,))
            job.shot = True

    def begin_or_end(self, actor: Actor) -> None:
        """Jobs and handles do not care for the launcher's transactions."""
        idle = actor.session.info.transaction_status == TransactionStatus.IDLE
        command = "BEGIN" if idle else self.random.choice(("COMMIT", "ROLLBACK", "SAVEPOINT s; ROLLBACK TO s"))
        self.calls.append(f"{actor.name}: {command}")
        actor.session.execute(command)
        actor.role = actor.session.value("SELECT current_user::text")

    def change_role(self, actor: Actor) -> None:
        role = self.random.choice(actor.roles)
        self.calls.append(f"{actor.name}: SET ROLE {role}")
        actor.session.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        actor.role = role

    def wrong_cookie(self, actor: Actor) -> None:
        job = self.pick(actor)
        if job is None or job.v1:
            return
        handle = (job.pid, job.cookie ^ 2)
        namesakes = [other for other in actor.tracked if other.pid == job.pid]
        expected: set[str | None] = {WRONG_COOKIE} if namesakes else {NOT_TRACKED}
        if namesakes and self.may_be_gone(namesakes[0]):
            expected.add(NOT_TRACKED)
        for call in ("wait_v2", "cancel_v2", "detach_v2"):
            query = f"SELECT pg_background_{call}(%s, %s)"
            self.call(actor, query, handle, expected)

    # --- the end ---

    def finish(self) -> None:
        """All end; what the table, the log and each session's counts say of each job must agree."""
        for actor in self.actors:
            actor.session.execute("ROLLBACK" if actor.session.info.transaction_status else "SELECT")
            actor.session.execute("RESET ROLE")
            actor.role = actor.session.value("SELECT current_user::text")
        for job in self.jobs:
            if job.is_held:
                self.call(self.actors[-1] if not job.v1 else job.owner, "SELECT pg_background_cancel_v2(%s, %s)",
                          job.handle, {None})  # fmt: skip
                job.canceled = True
        ended = "SELECT count(*) FROM pg_background_activity WHERE state <> 'running'"
        wait_until(lambda: self.admin.value(ended) == len(self.jobs), what="the end of all workers")
        seen = self.admin.rows(
            "SELECT substring(sql_preview FROM '[0-9]+')::int, state, cookie, pid FROM pg_background_activity"
        )
        states = {number: state for number, state, *_ in seen}
        assert len(states) == len(self.jobs)
        committed = {number for (number,) in self.admin.rows("SELECT n FROM model.log")}
        for job in self.jobs:
            assert states[job.number] in job.possible_states(), f"job {job.number} ({job.kind}): {states[job.number]}"
            assert (job.number in committed) == (states[job.number] == _STOPPED), f"job {job.number} ({job.kind})"
        for actor in self.actors:
            self.check_counts(actor, [states[job.number] for job in self.jobs if job.owner is actor])

    def check_counts(self, actor: Actor, states: list[str]) -> None:
        self.call(actor, f"SELECT 1 FROM pg_background_list_v2() AS l({LIST_COLUMNS})", (), {None})
        expected = (len(states), *(states.count(state) for state in (_STOPPED, _ERROR, _CANCELED)), 0)
        columns = "workers_launched, workers_completed, workers_failed, workers_canceled, workers_active"
        query = f"SELECT {columns} FROM pg_background_stats_v2()"
        assert actor.session.rows(query) == [expected], f"{actor.name}: {states}"


@contextmanager
def told(model: Model, seed: int) -> Iterator[None]:
    """Shows what happened when the block fails."""
    try:
        yield
    except BaseException:
        print(f"PG_BACKGROUND_MODEL_SEED={seed}, {len(model.jobs)} jobs; the last calls:")
        print("\n".join(model.calls[-_SHOWN_CALLS:]))
        raise


@pytest.fixture
def actors(
    fresh_database: str, conn: Session, connect: Callable[..., Session], role: Callable[..., Any]
) -> list[Actor]:
    """Two sessions of alice, who is a member of carol; one of bob, who is nobody's; a superuser's."""
    alice, bob, carol = role("alice"), role("bob"), role("carol", login=False)
    conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(carol), sql.Identifier(alice)))
    conn.execute("CREATE SCHEMA model; CREATE TABLE model.log (n int)")
    conn.execute("GRANT USAGE ON SCHEMA model TO PUBLIC; GRANT INSERT ON model.log TO PUBLIC")
    superuser = conn.value("SELECT current_user::text")
    everybody = {alice, bob, carol, superuser}
    members_of = {alice: {alice, carol}, bob: {bob}, carol: {carol}, superuser: everybody}
    settings = {"pg_background.max_workers": MAX_WORKERS, "pg_background.pool_size": 2}

    def actor(name: str, user: Any, roles: tuple[str, ...]) -> Actor:
        return Actor(name, connect(user, **settings), str(user or superuser), roles, members_of)

    return [
        actor("first", alice, (alice, carol)),
        actor("second", alice, (alice, carol)),
        actor("stranger", bob, (bob,)),
        actor("admin", None, (superuser, alice, bob)),
    ]


def test_random_calls_do_what_the_contract_says(actors: list[Actor], conn: Session) -> None:
    model = Model(actors, conn, SEED)
    with told(model, SEED):
        model.run(STEPS)
