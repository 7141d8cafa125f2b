"""The supervisor's rows on their way to the table, and what a predecessor has left there as running."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from itertools import count
from typing import Any, Callable

from . import messages
from .outcomes import LOST, lost_connection, timestamp
from .process import process_start
from .store import ENDS, KEY, LOCK_NOT_AVAILABLE, MAX_ROWS, Row, Store

_FLUSH_S = 0.01  # rows wait for their batch at most so long
_BATCH_ROWS = 1000
_RETRY_S = 1.0  # a table that could not be written is tried again after this
_FORWARD_S = 0.01  # and a successor, to whom its sessions turn, after twice this at first
_LAST_TRIES, _LAST_PAUSE_S = 10, 0.05
_LAST_S = 20.0  # as long as somebody locks the table
_LOCKED_S = 0.2  # each try waits for the lock, and all sessions with it
# Classes of SQLSTATE that say nothing about a row: disk or memory full, a lock, a cancel, a failing disk.
_PASSING = ("53", "55", "57", "58", "40")
# The table is not where it was: dropped, moved to another schema, or that schema is closed to us.
_GONE = ("42P01", "42501", "3F000", "42703", "42704", "XX000")


class Ledger:
    """What has changed since the last write; nothing of it is lost where the table cannot be written."""

    def __init__(self, store: Store, successors_path: str, on_gone: Callable[[], None]) -> None:
        self._store: Store | None = store  # None when the table has gone
        self._path = successors_path
        self._on_gone = on_gone  # the table is out of this supervisor's reach for good
        self._dirty: dict[int, Row] = {}  # by key
        self._missing: set[int] = set()  # keys of inherited rows whose process had gone when last looked
        self._flush_at = time.monotonic()
        self._unwritable = False  # at the last attempt
        self._forward_pause_s = _FORWARD_S
        self.inherited: dict[int, Row] = {}  # by key: running when a predecessor wrote them, in nobody's hands yet
        self.has_inherited = False  # the table could be read
        self.is_locked = False  # by somebody else, when it was last read or written
        self._read_at = 0.0  # of time.monotonic(): then it is tried again
        self.written = 0  # rows
        self.written_at = 0.0

    # --- rows ---

    @property
    def is_clean(self) -> bool:
        """Whether all is written."""
        return not self._dirty

    @property
    def may_be_left(self) -> bool:
        """Whether all is written that can be: a table that is gone must not keep a database alive."""
        return not self._dirty or self._unwritable

    def note(self, row: Row) -> None:
        """A row is new, or has changed."""
        if not self._dirty:
            self._flush_at = max(self._flush_at, time.monotonic() + _FLUSH_S)
        self._dirty[row[KEY]] = row

    def forget(self, key: int) -> None:
        """Another supervisor has this job, or will have it: that it runs is read in the table, if anywhere."""
        if self._store is None:
            self._dirty.pop(key, None)

    def next_flush(self, otherwise: float) -> float:
        """When to write, of time.monotonic(), if that is before `otherwise`."""
        return min(otherwise, self._flush_at) if self._dirty else otherwise

    def flush_if_due(self, moment: float) -> None:
        """Write when a batch is full, or old enough."""
        if self._dirty and (moment >= self._flush_at or len(self._dirty) >= _BATCH_ROWS):
            self.flush()

    def flush(self) -> None:
        """Write what has changed. A failure (disk full, say) leaves it for the next time."""
        rows, self._dirty = self._dirty, {}
        self._flush_at = time.monotonic() + _FLUSH_S
        if not rows:
            return
        if self._store is None:
            self._forward(rows)
            return
        if self._store.is_out_of_reach():
            # What still runs when this standby is promoted is written then.
            self._keep_for_later({key: row for key, row in rows.items() if row["state"] == "running"})
            return
        try:
            self._store.write(rows.values())
            self.written_at = time.monotonic()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is sorted out there
            self._store_failed(rows, error)
        else:
            self._unwritable = self.is_locked = False
            self.written += len(rows)

    def finish(self, may_wait: Callable[[], bool]) -> None:
        """Give to the successor what could not be written, or try again: this process ends.

        Not before others can take its place: it would send to itself.
        may_wait: whether it may go on for a while where somebody locks the table.
        """
        give_up_at = time.monotonic() + _LAST_S
        for tried in count():
            if not self._dirty or (self._store is not None and self._store.is_out_of_reach()):
                return
            if tried >= _LAST_TRIES and not (self.is_locked and time.monotonic() < give_up_at and may_wait()):
                return
            rows, self._dirty = self._dirty, {}
            self._forward(rows)
            time.sleep(_LAST_PAUSE_S)  # the lock on the table is somebody else's
            self.flush()

    def ask(self, question: Callable[[Store], Any]) -> Any:
        """The table's answer, or None where it cannot be read; one that is locked is not tried for a while."""
        if self._store is None or self._store.is_out_of_reach():
            return None
        if self.is_locked and time.monotonic() < self._read_at:
            return None
        try:
            answer = question(self._store)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is sorted out there
            self._store_failed({}, error)
            return None
        self.is_locked = False
        return answer

    def decode(self, text: bytes) -> str:
        """Bytes of the database's encoding; what is no text of it is replaced, never an error."""
        return text.decode("utf-8", "replace") if self._store is None else self._store.decode(text)

    def _store_failed(self, rows: dict[int, Row], error: Exception) -> None:
        """Keep the rows for later, give them to a successor, or find out which of them cannot be written."""
        assert self._store is not None
        self._store.rollback()
        sqlstate = getattr(error, "sqlstate", None) or ""
        self.is_locked = sqlstate == LOCK_NOT_AVAILABLE
        self._read_at = time.monotonic() + _LOCKED_S
        if sqlstate in _GONE:
            if self._store.find_table():
                self._keep_for_later(rows)
            else:
                self._store = None
                self._on_gone()
                self._forward(rows)
        elif sqlstate[:2] in _PASSING and rows:
            self._keep_for_later(rows)
        else:
            self._store.write_one_by_one(rows.values())

    def _keep_for_later(self, rows: dict[int, Row]) -> None:
        rows.update(self._dirty)
        finished = [key for key, row in rows.items() if row["state"] != "running"]
        for key in finished[: max(0, len(rows) - 2 * MAX_ROWS)]:
            del rows[key]
        self._dirty = rows
        self._unwritable = True
        self._flush_at = time.monotonic() + _RETRY_S

    def _forward(self, rows: dict[int, Row]) -> None:
        """The table is out of reach here: a successor writes these rows, once a session has started one."""
        with messages.control_socket() as successor:
            successor.setblocking(False)
            try:
                successor.connect(self._path)
                for key, row in list(rows.items()):
                    messages.send(successor, [messages.RECORD, row])
                    del rows[key]
            except OSError:
                pass  # none is there, or it has much to do: the next attempt sends the rest
        self._keep_for_later(rows)
        self._forward_pause_s = min(2 * self._forward_pause_s, _RETRY_S)
        self._flush_at = time.monotonic() + self._forward_pause_s

    # --- what a predecessor has left ---

    def inherit(self, known: Container[int] = ()) -> None:
        """What a predecessor left as running: sessions hand it over, that predecessor ends it, or it is lost.

        known: keys of jobs that are in our hands by now, where the table could not be read before.
        """
        rows = self.ask(lambda store: store.running())
        if rows is None:
            return
        self.has_inherited = True
        self.inherited = {row[KEY]: row for row in rows if row[KEY] not in known and row[KEY] not in self._dirty}
        if self.inherited and self.is_alone():
            self.look_after_inherited(())
            self.look_after_inherited(())
            self.flush()

    def was_written(self, pid: int) -> bool:
        """Whether a predecessor has written down, since this one started, that this process runs a job."""
        for row in self.ask(lambda store: store.running()) or []:
            if row["pid"] == pid:
                self.inherited.setdefault(row[KEY], row)
        return self.inherited_row(pid) is not None

    def is_alone(self) -> bool:
        """Whether no predecessor is there."""
        if self._store is None:
            return False
        try:
            return self._store.is_alone()  # a standby can answer that too
        except Exception as error:  # noqa: BLE001 - whatever it is, it is sorted out there
            self._store_failed({}, error)
            return False

    def inherited_row(self, pid: int) -> Row | None:
        """The row of the job that this process runs, if a predecessor wrote it."""
        for row in self.inherited.values():
            if row["pid"] == pid and row["process_start"] == process_start(pid):
                return row
        return None

    def known_row(self, key: int) -> Row | None:
        """A job's row as a predecessor left it; it is in our hands from now on."""
        row: Row | None = self.inherited.pop(key, None) or self.ask(lambda store: store.find_key(key))
        return row

    def look_after_inherited(self, others: Iterable[tuple[int, int]]) -> None:
        """What has no process behind it will never tell how it ended.

        Unless a predecessor is about to write that down: so it must be missed twice, and still be there as running.
        others: pid and key of the jobs that workers are known to run.
        """
        runs = dict(others)
        missing = set()
        for key, row in self.inherited.items():
            another = runs.get(row["pid"], key) != key
            gone = row["process_start"] != process_start(row["pid"])
            # The session holds the socket, in which the answer may lie.
            orphaned = row["launcher_start"] != process_start(row["launcher_pid"])
            if another or (gone and orphaned):
                missing.add(key)
        lost, self._missing = missing & self._missing, missing
        if not lost:
            return
        running = {row[KEY] for row in self.ask(lambda store: store.running()) or []}
        for key in lost:
            row = self.inherited.pop(key)
            if key in running:
                row.update(lost_connection(None))
                self.note(row)

    def record_end(self, key: int, changes: Row) -> None:
        """A job that a predecessor knew has ended before it could be handed over."""
        row = self.known_row(key)
        if row is not None and (row["state"] == "running" or row["sqlstate"] == LOST):
            row.update({**dict.fromkeys(ENDS), "finished_at": timestamp(), **changes})
            self.note(row)
