"""Mixed work of many sessions while workers, sessions and supervisors are killed: is every job accounted for?

Two databases of one server. In the stormy one everything is killed; in the calm one only workers are, and jobs
cancelled, so that the memory of its sessions and of its supervisor can be watched. test_soak.py runs this.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from tests.background import Handle
from tests.clusters import SUPERVISOR_NAME, WORKER_NAME, Cluster, Role, Session, server_log, wait_until
from tests.supervision import descriptors, supervisor_pids

SETTINGS = {"max_connections": "220", "shared_buffers": "64MB"}
ROLES = 5
_SESSION_OPTIONS = (
    "-c pg_background.max_workers=4 -c pg_background.pool_size=2 -c pg_background.launch_timeout=30s"
    " -c statement_timeout=60s"
)
_OUTCOME_SECONDS = 60.0  # a job that nobody runs any more must have an outcome after so long
_SETTLE_SECONDS = 90.0
_ROWS = 5000
# Of a launcher at rest: the client, the control socket, two kept workers, four that are tracked, and some of the
# server's own.
_MOST_DESCRIPTORS = 12

# What a call may end with, beside the end of its connection: jobs and sessions are cancelled and terminated, and
# there are fewer connections than would be used. Anything else is a bug.
_EXPECTED_ERRORS = frozenset((None, "57014", "57P01", "08006", "53300", "53400", "22012", "42704"))
# A cancel that meets a worker session's set-up is an error of PL/Python's there, and in the log.
_NEVER_LOGGED = re.compile(
    r"was terminated by signal|PANIC:|TRAP:|ERROR:  (?!spiexceptions)[\w.]*(Error|Exception): (?!canceling )"
)
_FULL, _CANCELED = "53400", "57014"
_LOST = "08006"
_ROLLED_BACK = "40000"


@dataclass
class Job:
    """A job that was accepted: its handle was returned."""

    number: int  # its row in the table
    kind: str
    handle: Handle
    client: Client
    accepted_at: float
    must_run: bool | None = None  # of those that wait for a commit, once that is known
    may_be_lost: bool = False  # its launcher has died, or its worker was terminated


class Verdict(NamedTuple):
    """What became of a job."""

    state: str
    sqlstate: str | None
    committed: bool


class Ledger:
    """The jobs of one database, and whether what is recorded of each is what happened."""

    def __init__(self, cluster: Cluster, database: str) -> None:
        self._session = cluster.connect(database)
        self._session.execute("CREATE TABLE done (number bigint)")
        self._session.execute("CREATE INDEX ON done (number)")
        self._session.execute("GRANT INSERT ON done TO pgbackground_role")
        self._lock = threading.Lock()
        self._open: dict[int, Job] = {}  # by cookie
        self._never: list[int] = []
        self._terminated: set[int] = set()  # pids of workers
        self.accepted: Counter[str] = Counter()
        self.verdicts: Counter[tuple[str, str, str | None]] = Counter()
        self.wrong: list[str] = []

    def accept(self, job: Job) -> Job:
        """Note a job whose handle has been returned."""
        with self._lock:
            self._open[job.handle.cookie] = job
            job.may_be_lost = job.handle.pid in self._terminated
            self.accepted[job.kind] += 1
        return job

    def complain(self, what: str) -> None:
        """Note a wrong that was seen elsewhere."""
        with self._lock:
            self.wrong.append(what)

    def launcher_died(self, client: Client) -> None:
        """The outcomes of its jobs may be unknown from here on."""
        with self._lock:
            for job in self._open.values():
                job.may_be_lost = job.may_be_lost or job.client is client

    def worker_is_terminated(self, pid: int) -> None:
        """One that is busy sending rows cannot say why it ended."""
        with self._lock:
            self._terminated.add(pid)
            for job in self._open.values():
                job.may_be_lost = job.may_be_lost or job.handle.pid == pid

    def check(self) -> int:
        """Close the entries of jobs that have ended; how many are open."""
        with self._lock:
            open_jobs = dict(self._open)
        ended = {
            cookie: (state, code)
            for cookie, state, code in self._session.rows(
                "SELECT cookie, state, sqlstate FROM pg_background_activity"
                " WHERE cookie = ANY(%s) AND state <> 'running'",
                (list(open_jobs),),
            )
        }
        counts = Counter(
            number
            for (number,) in self._session.rows(
                "SELECT number FROM done WHERE number = ANY(%s)", ([job.number for job in open_jobs.values()],)
            )
        )
        for cookie, job in open_jobs.items():
            if cookie in ended:
                self._close(job, Verdict(*ended[cookie], counts[job.number] > 0))
        return len(self._open)

    def _close(self, job: Job, verdict: Verdict) -> None:
        age = time.monotonic() - job.accepted_at
        if verdict.sqlstate == _LOST and not job.may_be_lost and age < _OUTCOME_SECONDS:
            return  # its session may still come back with the worker
        with self._lock:
            del self._open[job.handle.cookie]
            self.verdicts[job.kind, verdict.state, verdict.sqlstate] += 1
            if not verdict.committed and verdict.sqlstate != _LOST:
                self._never.append(job.number)
        problem = _problem(job, verdict)
        if problem:
            self.complain(f"{problem}: {verdict} of {job}\n{self._jobs_around(job)}")

    def _jobs_around(self, job: Job) -> str:
        """What is recorded of the jobs of the same backend, the last one first."""
        rows = self._session.rows(
            "SELECT launched_at, finished_at, cookie, state, command_tag, row_count, sqlstate, error_message,"
            " sql_preview FROM pg_background_activity WHERE pid = %s ORDER BY launched_at DESC LIMIT 5",
            (job.handle.pid,),
        )
        return "\n".join(map(str, rows))

    def close(self) -> None:
        """The last check, when nothing runs any more."""
        with suppress(AssertionError):
            wait_until(lambda: self.check() == 0, timeout=_SETTLE_SECONDS, what="all outcomes")
        for job in self._open.values():
            rows = self._session.rows(
                "SELECT state FROM pg_background_activity WHERE cookie = %s", (job.handle.cookie,)
            )
            self.complain(f"no outcome: {rows} of {job}")
        twice = self._session.rows("SELECT number FROM done GROUP BY number HAVING count(*) > 1")
        late = self._session.rows("SELECT number FROM done WHERE number = ANY(%s)", (self._never,))
        self.wrong += [f"ran twice: {row}" for row in twice] + [f"committed after its outcome: {row}" for row in late]
        self._session.close()


def _problem(job: Job, verdict: Verdict) -> str | None:
    if verdict.sqlstate == _LOST:
        return None if job.may_be_lost else "lost, though its launcher and its worker live"
    if verdict.committed != (verdict.state == "stopped"):
        return "recorded as what it was not"
    if (job.must_run is False and verdict.committed) or (job.must_run and verdict.sqlstate == _ROLLED_BACK):
        return "ran or not, against its transaction"
    if job.kind == "failing" and verdict.state == "stopped":
        return "did not fail"
    return None


class Client:
    """A session that does a bit of everything, in a thread of its own."""

    def __init__(self, storm: Storm, database: str, ledger: Ledger, role: Role, seed: int) -> None:
        self._storm, self._database, self._ledger, self._role = storm, database, ledger, role
        self._chance = random.Random(seed)
        self._kept: list[Handle] = []
        self.session = self._connect()
        self.errors: Counter[str | None] = Counter()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _connect(self) -> Session:
        return self._storm.cluster.connect(self._database, self._role, options=_SESSION_OPTIONS)

    def _work(self) -> None:
        actions = (
            self._launch,
            self._submit,
            self._submit,
            self._on_commit,
            self._detach,
            self._run,
            self._progress,
            self._rows,
            self._cancel,
            self._fail,
            self._gather,
        )
        while not self._storm.stopping.is_set():
            try:
                self._chance.choice(actions)()
            except psycopg.Error as error:
                self._note_error(error)
            if self.session.closed or self.session.broken:
                self._come_back()
        with suppress(psycopg.Error):
            self.session.execute("SELECT pg_background_detach_all_v2()")

    def _note_error(self, error: psycopg.Error) -> None:
        self.errors[error.sqlstate] += 1
        if error.sqlstate not in _EXPECTED_ERRORS or "Traceback" in str(error):
            self._ledger.complain(f"a call failed: {error.sqlstate} {error}")
        if self.errors[_FULL] > self.errors[_CANCELED]:
            self._ledger.complain("room is not given back")
        with suppress(psycopg.Error):
            self.session.rollback()
            if error.sqlstate == _FULL:  # of workers whose calls were cancelled before they were let go
                self.session.execute("SELECT pg_background_detach_all_v2()")

    def _come_back(self) -> None:
        self._ledger.launcher_died(self)
        self.session.close()
        self._kept.clear()
        while not self._storm.stopping.is_set():
            try:
                self.session = self._connect()
            except psycopg.OperationalError:  # no connection is left
                time.sleep(0.1)
            else:
                return

    def _accept(self, kind: str, number: int, query: str, parameters: tuple[Any, ...]) -> Job:
        handle = Handle(*self.session.rows(query, parameters)[0])
        return self._ledger.accept(Job(number, kind, handle, self, time.monotonic()))

    def _start(self, kind: str, call: str, work: str) -> Job:
        number = next(self._storm.numbers)
        query = f"SELECT pid, cookie FROM pg_background_{call}_v2(%s)"
        return self._accept(kind, number, query, (work.format(number=number),))

    def _result(self, job: Job, columns: str) -> list[Any]:
        return self.session.rows(f"SELECT * FROM pg_background_result_v2(%s, %s) AS r({columns})", job.handle)

    # --- what it does ---

    def _launch(self) -> None:
        number = next(self._storm.numbers)
        query = "SELECT pid, cookie FROM pg_background_launch_v2('INSERT INTO done VALUES ($1)', 0, 'launched', %s)"
        job = self._accept("launched", number, query, ([str(number)],))
        if self._result(job, "tag text") != [("INSERT 0 1",)]:
            self._ledger.complain(f"a wrong result of {job}")

    def _submit(self) -> None:
        self._start("submitted", "submit", "SELECT pg_sleep(random() * 0.02); INSERT INTO done VALUES ({number})")

    def _on_commit(self) -> None:
        commits = self._chance.random() < 0.7
        self.session.execute("BEGIN")
        jobs = [
            self._start("on commit", "submit_on_commit", "INSERT INTO done VALUES ({number})")
            for _ in range(self._chance.randint(1, 3))
        ]
        self.session.execute("COMMIT" if commits else "ROLLBACK")
        for job in jobs:
            job.must_run = commits

    def _detach(self) -> None:
        work = "INSERT INTO done VALUES ({number}); SELECT repeat('x', 1000) FROM generate_series(1, 1000)"
        job = self._start("detached", "launch", work)
        self.session.execute("SELECT pg_background_detach_v2(%s, %s)", job.handle)

    def _run(self) -> None:
        number = next(self._storm.numbers)
        query = "SELECT pid, cookie FROM pg_background_run_v2('INSERT INTO done VALUES ($1)', params => %s)"
        self._accept("run", number, query, ([str(number)],))

    def _progress(self) -> None:
        work = (
            "DO $$BEGIN FOR i IN 1..20 LOOP PERFORM pg_background_progress(5 * i, 'step'); END LOOP;"
            " INSERT INTO done VALUES ({number}); END$$"
        )
        job = self._start("progress", "launch", work)
        self.session.execute("SELECT pg_background_wait_v2(%s, %s)", job.handle)
        self._result(job, "tag text")

    def _rows(self) -> None:
        work = f"INSERT INTO done VALUES ({{number}}); SELECT i, repeat('x', 100) FROM generate_series(1, {_ROWS}) i"
        job = self._start("rows", "launch", work)
        if len(self._result(job, "i int, x text")) != _ROWS:
            self._ledger.complain(f"rows are missing of {job}")

    def _cancel(self) -> None:
        job = self._start("cancelled", "launch", "INSERT INTO done VALUES ({number}); SELECT pg_sleep(5)")
        self.session.execute("SELECT pg_background_cancel_v2_grace(%s, %s, 1000)", job.handle)
        self.session.execute("SELECT pg_background_detach_v2(%s, %s)", job.handle)

    def _fail(self) -> None:
        job = self._start("failing", "launch", "INSERT INTO done VALUES ({number}); SELECT 1 / 0")
        self._result(job, "n int")

    def _gather(self) -> None:
        jobs = [
            self._start("gathered", "launch", "INSERT INTO done SELECT {number} FROM pg_sleep(random() * 0.05)")
            for _ in range(2)
        ]
        handles = [f"({job.handle.pid},{job.handle.cookie})" for job in jobs]
        self.session.execute("SELECT pg_background_wait_any_v2(%s::pg_background_handle[], 20000)", (handles,))
        self.session.execute("SELECT * FROM pg_background_drain_v2(%s::pg_background_handle[], 20000)", (handles,))


class Storm:
    """All of it; `run` gives the figures, `wrong` what was not as promised."""

    def __init__(self, cluster: Cluster, seconds: float, sessions: int = 50, seed: int = 1) -> None:
        self.cluster, self._seconds = cluster, seconds
        self.stopping = threading.Event()
        self.numbers = itertools.count(1)
        self._chance = random.Random(seed)
        self._admin = cluster.connect()
        self._databases = {name: cluster.create_database() for name in ("stormy", "calm")}
        self._roles = [self._create_role(number) for number in range(ROLES)]
        self._ledgers = {name: Ledger(cluster, database) for name, database in self._databases.items()}
        calm = sessions // 5
        self._clients = {
            name: [
                Client(self, self._databases[name], self._ledgers[name], self._roles[n % ROLES], seed + n)
                for n in range(count)
            ]
            for name, count in (("stormy", sessions - calm), ("calm", calm))
        }
        self._calm = cluster.connect(self._databases["calm"])
        self.kills: Counter[str] = Counter()
        self.memory: dict[str, list[tuple[float, int]]] = {}  # (seconds since the start, kB)
        self.wrong: list[str] = []

    def _create_role(self, number: int) -> Role:
        name = f"soaker{number}"
        self._admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(name)))
        self._admin.execute(sql.SQL("GRANT pgbackground_role TO {}").format(sql.Identifier(name)))
        return Role(name, name)

    def run(self) -> str:
        """Work and kill for the time given, settle, account; the figures as text."""
        clients = [client for group in self._clients.values() for client in group]
        for client in clients:
            client.thread.start()
        self._kill_and_check()
        self.stopping.set()
        for client in clients:
            client.thread.join(120)
            if client.thread.is_alive():
                self.wrong.append(f"a call does not end: {self.cluster.activity(client.session.info.dbname)}")
        self._look_for_open_descriptors()
        for client in clients:
            client.session.close()
        for ledger in self._ledgers.values():
            ledger.close()
            self.wrong += ledger.wrong
        self._calm.close()
        self._look_for_leftovers()
        return self._figures(clients)

    # --- the storm ---

    def _kill_and_check(self) -> None:
        started = time.monotonic()
        check_at = sample_at = started + 1
        while (now := time.monotonic()) < started + self._seconds:
            with suppress(psycopg.OperationalError):  # no connection is left
                self._chance.choice(self._blows())()
            if now >= check_at:
                check_at = now + 1
                for ledger in self._ledgers.values():
                    ledger.check()
            if now >= sample_at:
                sample_at = now + max(1.0, self._seconds / 100)
                self._sample_memory(now - started)
            self.stopping.wait(self._chance.random() * 0.5)

    def _blows(self) -> list[Callable[[], None]]:
        return [
            lambda: self._signal("worker terminated", "pg_terminate_backend", WORKER_NAME, calm=True),
            lambda: self._signal("worker cancelled", "pg_cancel_backend", WORKER_NAME, calm=True),
            lambda: self._signal("supervisor terminated", "pg_terminate_backend", SUPERVISOR_NAME),
            self._terminate_launcher,
            self._cancel_launcher,
            self._disconnect_launcher,
        ]

    def _signal(self, name: str, function: str, application: str, *, calm: bool = False) -> None:
        where = "calm" if calm and self._chance.random() < 0.3 else "stormy"
        pids = self._admin.rows(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = %s AND (state = 'active' OR %s)"
            " ORDER BY random() LIMIT 1",
            (self._databases[where], application, application == SUPERVISOR_NAME),  # which shows no state
        )
        for (pid,) in pids:
            if name == "worker terminated":
                self._ledgers[where].worker_is_terminated(pid)
            self.kills[name] += self._admin.value(f"SELECT {function}(%s)::int", (pid,))

    def _victim(self) -> Client:
        return self._chance.choice(self._clients["stormy"])

    def _terminate_launcher(self) -> None:
        victim = self._victim()
        self._ledgers["stormy"].launcher_died(victim)
        self.kills["launcher terminated"] += self._admin.value(
            "SELECT pg_terminate_backend(%s)::int", (victim.session.pid,)
        )

    def _cancel_launcher(self) -> None:
        group = self._clients[self._chance.choice(("stormy", "calm"))]
        pid = self._chance.choice(group).session.pid
        self.kills["call cancelled"] += self._admin.value("SELECT pg_cancel_backend(%s)::int", (pid,))

    def _disconnect_launcher(self) -> None:
        """Without a word to the server."""
        victim = self._victim()
        self._ledgers["stormy"].launcher_died(victim)
        with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(victim.session.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
            self.kills["launcher disconnected"] += 1

    # --- what is left ---

    def _sample_memory(self, at: float) -> None:
        for client in self._clients["calm"]:
            self._note_memory(f"launcher {client.session.pid}", client.session.pid, at)
        for pid in supervisor_pids(self._calm):
            self._note_memory(f"supervisor {pid}", pid, at)

    def _note_memory(self, name: str, pid: int, at: float) -> None:
        with suppress(FileNotFoundError, ProcessLookupError, AttributeError):
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            assert found is not None
            self.memory.setdefault(name, []).append((at, int(found[1])))

    def growth(self, kind: str) -> list[tuple[str, int, int, float]]:
        """Of each process that was watched long enough: its kB after warming up, its last ones, the seconds between."""
        grown = []
        for name, samples in self.memory.items():
            warm = [sample for sample in samples if sample[0] >= samples[0][0] + self._seconds / 4]
            if name.startswith(kind) and len(warm) > 10:
                third = len(warm) // 3
                first = sorted(kb for _, kb in warm[:third])[third // 2]
                last = sorted(kb for _, kb in warm[-third:])[third // 2]
                grown.append((name, first, last, warm[-1][0] - warm[0][0]))
        return grown

    def _look_for_open_descriptors(self) -> None:
        """A session has at most its pool and the control socket, which is no leak; and all its workers have ended."""
        for client in self._clients["calm"]:
            with suppress(AssertionError):
                wait_until(partial(self._is_idle, client), timeout=_SETTLE_SECONDS)
            count = descriptors(client.session.pid)
            if count > _MOST_DESCRIPTORS:
                self.wrong.append(f"{count} sockets are open in the launcher {client.session.pid}")

    @staticmethod
    def _is_idle(client: Client) -> bool:
        return not client.session.value("SELECT workers_active FROM pg_background_stats_v2()")

    def _look_for_leftovers(self) -> None:
        for database in self._databases.values():
            with suppress(AssertionError):
                wait_until(partial(self._is_empty, database), timeout=30, what="no backend left")
            if not self._is_empty(database):
                self.wrong.append(self.cluster.activity(database))
        files = [file.name for file in (self.cluster.datadir / "base/pgsql_tmp").iterdir()]
        self.wrong += [f"a file is left: {name}" for name in files if not name.endswith((".lock", ".start"))]
        for database in self._databases.values():
            self.cluster.drop_database(database)
        for role in self._roles:
            self._admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
        self._admin.close()
        log = server_log(self.cluster)
        self.wrong += [f"in the server's log: {line}" for line in log.splitlines() if _NEVER_LOGGED.search(line)]

    def _is_empty(self, database: str) -> bool:
        return not self._admin.value("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", (database,))

    # --- the figures ---

    def _figures(self, clients: list[Client]) -> str:
        accepted = sum((ledger.accepted for ledger in self._ledgers.values()), Counter[str]())
        verdicts = sum((ledger.verdicts for ledger in self._ledgers.values()), Counter[tuple[str, str, Any]]())
        errors = sum((client.errors for client in clients), Counter[Any]())
        lines = [f"{accepted.total()} jobs accepted in {self._seconds:.0f} s, {len(clients)} sessions"]
        for kind, count in sorted(accepted.items()):
            ends = {
                f"{state} {code or ''}".strip(): number
                for (of, state, code), number in sorted(verdicts.items(), key=str)
                if of == kind
            }
            lines.append(f"  {kind:<10} {count:>7}  " + ", ".join(f"{end}: {number}" for end, number in ends.items()))
        lines.append("killed: " + ", ".join(f"{name}: {count}" for name, count in sorted(self.kills.items())))
        lines.append("calls that failed: " + ", ".join(f"{code}: {n}" for code, n in sorted(errors.items(), key=str)))
        for name, first, last, seconds in self.growth("launcher") + self.growth("supervisor"):
            lines.append(f"memory of {name}: {first} kB after warming up, {last} kB {seconds:.0f} s later")
        lines.append(f"not as promised: {len(self.wrong)}")
        return "\n".join([*lines, *(wrong[:2000] for wrong in self.wrong[:20])])
