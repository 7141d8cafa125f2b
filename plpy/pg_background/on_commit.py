"""Jobs that run after the caller's transaction has committed, and never if it has rolled back.

Each call leaves a row with a random key in the caller's transaction. A worker session, set up as the caller, is handed
to the supervisor with the job and its guard: a query that inserts the same key, which makes the server wait for the
end of the (sub)transaction that has inserted it first, and tells whether that row stayed. The jobs of a transaction
share a session, and run in the order of their submission.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import TYPE_CHECKING

from . import messages, wire
from .control import SessionLeftError
from .errors import INVALID_PARAMETER_VALUE, background_error
from .job import Job, new_key
from .session import WorkerSession

if TYPE_CHECKING:
    from .registry import Registry
    from .server import Server
    from .settings import Configuration


class Batch:
    """A worker session with the jobs of one transaction."""

    def __init__(self, session: WorkerSession, transaction: str) -> None:
        self.session = session
        self.transaction = transaction
        self.unresolved: set[int] = set()  # keys
        self.dirty = False
        self.counts = True  # it takes a place of max_workers
        self.reports: dict[str, str | None] = {}  # what has become of settings, as the supervisor has read


class OnCommit:
    """This session's jobs that wait for a commit."""

    def __init__(self, server: Server, registry: Registry) -> None:
        self._server = server
        self._registry = registry
        self._batches: dict[int, Batch] = {}  # by the worker's pid

    def __len__(self) -> int:
        """How many sessions have jobs of which it is not known that they are over."""
        return sum(bool(batch.unresolved and batch.counts) for batch in self._batches.values())

    def begin_anew(self) -> None:
        """An earlier job of this session, which is a worker's, has handed these over."""
        for batch in self._batches.values():
            batch.counts = False

    def defer(self, job: Job, configuration: Configuration, marker: str) -> tuple[int, int]:
        """Hand a job over; its handle. `marker`: the key of the row that this transaction has inserted for it."""
        while True:
            try:
                return self._defer(job, configuration, marker)
            except SessionLeftError:
                continue  # to the supervisor that has just gone; the next one gets another

    def _defer(self, job: Job, configuration: Configuration, marker: str) -> tuple[int, int]:
        batch = self._batch(configuration)
        session = batch.session
        key = new_key()
        guard, answers = self._guard(_checked_key(marker), session, configuration)
        clean_up = session.cleaning.clean_up(configuration.pool_idle_timeout_ms)
        announcement = job.announced(key, key, session, configuration, time.time_ns() // 1000)
        extras = {
            "clean_ups": clean_up.answers,
            "timeout_ms": configuration.worker_timeout_ms,
            "started_ns": time.monotonic_ns(),
            "guard_bytes": len(guard),
            "guard_answers": answers,
            "proof": session.cleaning.proof,
        }
        self._server.forbid_prepare()
        batch.unresolved.add(key)
        try:
            with os.fdopen(os.memfd_create("pg_background", os.MFD_CLOEXEC), "wb", buffering=0) as file:
                _write_all(file.fileno(), guard + job.encoded(self._server) + clean_up.packet)
                self._registry.control.tell([messages.DEFER, announcement, extras], session, file.fileno())
        except BaseException:
            batch.unresolved.discard(key)
            batch.dirty = True  # its session was to have settings that were not sent
            if not batch.unresolved and self._batches.get(session.pid) is batch:
                self._let_go(batch)
            raise
        return session.pid, key

    def _batch(self, configuration: Configuration) -> Batch:
        """The batch of this transaction whose session can take these settings on, or a new one."""
        registry = self._registry
        deadline = configuration.launch_deadline()
        registry.when_connected(registry.control.hear_or_replace, deadline)
        transaction = str(
            self._server.query("SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid")[0]["xid"]
        )
        own = [batch for batch in self._batches.values() if batch.transaction == transaction]
        idle = [batch for batch in self._batches.values() if batch not in own and not batch.unresolved]
        for batch in own + idle:
            # One that has nothing to do and says something has ended, by its idle timeout for example.
            ended = not batch.unresolved and self._server.is_readable(batch.session.connection.socket)
            if not (batch.dirty or ended) and registry.sessions.can_serve(batch.session, configuration):
                batch.transaction, batch.counts = transaction, True
                return batch
        for batch in idle:
            self._let_go(batch)
        session = registry.session(configuration, deadline)
        self._batches[session.pid] = batch = Batch(session, transaction)
        return batch

    def _guard(self, marker: str, session: WorkerSession, configuration: Configuration) -> tuple[bytes, int]:
        """The guard's packet, and how many answers it has: the settings of this call follow where they are others."""
        verdict = (
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE; SET LOCAL statement_timeout = 0;"
            " SET LOCAL lock_timeout = 0; "
            + ("SET LOCAL transaction_timeout = 0; " if self._server.major >= 17 else "")
            + f"SELECT {self._server.home()}._pg_background_has_committed('{marker}'::pg_catalog.uuid)"
        )
        packet = wire.query_message(self._server.encode(verdict))
        if session.guc_state == configuration.guc_state:
            return packet, 1
        return packet + wire.query_message(self._registry.sessions.adopt_settings(session, configuration)), 2

    # --- news ---

    def take(self, ended: messages.Ended) -> bool:
        """News of a job; False if it is none of these."""
        batch = self._batches.get(ended.pid)
        if batch is None or ended.key not in batch.unresolved:
            return False
        if ended.clean_up is None:
            return True
        batch.unresolved.discard(ended.key)
        batch.reports.update(ended.reports)
        has_run = ended.clean_up != messages.NOT_RUN
        if has_run and (ended.changes is not None or not batch.session.cleaning.is_clean(ended.clean_up)):
            batch.dirty = True
        if not has_run and (ended.changes or {}).get("sqlstate") != messages.ROLLED_BACK:
            batch.dirty = True  # its guard failed, or an earlier job could not be cleaned up after
        if has_run and not batch.unresolved:  # so the transaction is over
            self._let_go(batch)
        return True

    def _let_go(self, batch: Batch) -> None:
        del self._batches[batch.session.pid]
        self._registry.sessions.put_back(batch.session, batch.reports, clean=not batch.dirty)

    def leave_behind(self) -> None:
        """Another supervisor is there: the one that has these jobs sees them to their ends."""
        for batch in self._batches.values():
            batch.session.abandon()
        self._batches.clear()


def _checked_key(marker: str) -> str:
    """A key as it goes into SQL. 22023 for anything else."""
    try:
        return str(uuid.UUID(marker))
    except ValueError as error:
        raise background_error(INVALID_PARAMETER_VALUE, "the marker of a transaction must be a UUID") from error


def _write_all(file: int, content: bytes) -> None:
    written = 0
    while written < len(content):
        written += os.write(file, content[written:])
