"""Notices that a worker waits for the very session that waits for it: neither would ever go on.

The server's own deadlock check cannot see this, as the session waits outside of the lock manager. While it waits
without a limit it therefore looks for itself, once in a while: from the worker along pg_blocking_pids, and from
sessions that wait for workers of their own to those workers. Of the latter it learns from the supervisor, to which
each session tells for whom it waits once that takes longer than deadlock_timeout.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import messages
from .control import Control
from .errors import DEADLOCK_DETECTED, BackgroundError, background_error
from .server import Server

# A chain through other sessions is put together from looks at different times: it counts when seen twice.
_CONFIRM_S = 0.5
# Where several sessions of a circle see it, one of them gives way first, and the others look once more.
_GIVE_WAY_S = 0.25
# Most waits are over after this; so many cost nothing but the wait.
_SHORT_S = 0.02

_BLOCKERS = (
    "SELECT pg_catalog.pg_blocking_pids($1)"
    " OPERATOR(pg_catalog.||) pg_catalog.pg_safe_snapshot_blocking_pids($1) AS pids"
)
_AWAITED_LOCK = (
    "SELECT l.locktype, l.mode, l.database, l.relation, l.page, l.tuple, l.virtualxid,"
    " l.transactionid::pg_catalog.text AS transactionid, l.classid, l.objid, l.objsubid,"
    " CASE WHEN l.database OPERATOR(pg_catalog.=) ANY (ARRAY[0::pg_catalog.oid, $2])"
    "  THEN l.relation::pg_catalog.regclass::pg_catalog.text END AS name,"
    " (SELECT t.relation::pg_catalog.regclass::pg_catalog.text FROM pg_catalog.pg_locks t"
    "  WHERE t.pid OPERATOR(pg_catalog.=) l.pid AND t.granted AND t.locktype OPERATOR(pg_catalog.=) 'tuple'"
    "  AND t.database OPERATOR(pg_catalog.=) $2 LIMIT 1) AS table_of_row"
    " FROM pg_catalog.pg_locks l WHERE NOT l.granted AND l.pid OPERATOR(pg_catalog.=) ANY"
    " (SELECT a.pid FROM pg_catalog.pg_stat_activity a"
    "  WHERE a.pid OPERATOR(pg_catalog.=) $1 OR a.leader_pid OPERATOR(pg_catalog.=) $1) LIMIT 1"
)


class Link(NamedTuple):
    """One process waits for another: for a lock of its, or for the end of the worker that it runs."""

    waiter: int
    awaited: int
    is_worker: bool


Circle = tuple[Link, ...]


class Watch:
    """Waits of this session for one worker, or for the first of several, without a limit. Use it as a context manager.

    Nothing is done before deadlock_timeout has passed.
    """

    # What most waits never change stands here.
    _pause = 0.0
    _look_at = 0.0
    _seen: tuple[Circle, ...] = ()
    _confirm_at = 0.0
    _published = False

    def __init__(self, server: Server, control: Control, *worker_pids: int) -> None:
        self._server = server
        self._control = control
        self._worker_pids = worker_pids

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._published:
            self._control.leave_word([messages.WAITS_FOR, None, None])

    def wait_for(self, descriptors: Sequence[tuple[int, int]]) -> bool:
        """Wait until a descriptor is ready; False after a look, for which the control socket was read.

        40P01 when the worker, or each of them, waits for this session, directly or through others.
        """
        if not self._pause:
            began = time.monotonic()
            if self._server.wait_for(descriptors, began + _SHORT_S):
                return True
            timeout_s = int(self._server.required_setting("deadlock_timeout")) / 1000
            self._pause = max(timeout_s, _CONFIRM_S)
            self._look_at = began + timeout_s
        if self._server.wait_for(descriptors, self._look_at):
            return True
        self._look()
        return False

    def _look(self) -> None:
        circles = self._circles()
        now = time.monotonic()
        if not circles:
            self._seen = ()
            self._look_at = now + self._pause
            return
        if circles != self._seen:
            self._seen = circles
            gives_way = self._server.pid == min(link.waiter for circle in circles for link in circle if link.is_worker)
            self._confirm_at = now + (_CONFIRM_S if gives_way else _CONFIRM_S + _GIVE_WAY_S)
        elif now >= self._confirm_at:
            raise self._detected(circles)
        self._look_at = self._confirm_at

    def _circles(self) -> tuple[Circle, ...]:
        """One for each worker; none at all where one of them waits for others only, or for nobody."""
        workers_of = self._workers_awaited()
        circles: list[Circle] = []
        for worker_pid in self._worker_pids:
            circle = self._circle(worker_pid, workers_of)
            if not circle:
                return ()
            circles.append(circle)
        return tuple(circles)

    def _circle(self, worker_pid: int, workers_of: Mapping[int, Iterable[int]]) -> Circle:
        """The shortest chain of waits from this session to the worker and back; empty if there is none."""
        me = self._server.pid
        arrived_by: dict[int, Link] = {worker_pid: Link(me, worker_pid, True)}
        unvisited = deque([worker_pid])
        while unvisited:
            process = unvisited.popleft()
            for link in self._waits_of(process, workers_of):
                if link.awaited == me:
                    return _chain(arrived_by, link)
                if link.awaited not in arrived_by:
                    arrived_by[link.awaited] = link
                    unvisited.append(link.awaited)
        return ()

    def _waits_of(self, process: int, workers_of: Mapping[int, Iterable[int]]) -> Iterable[Link]:
        yield from (Link(process, worker, True) for worker in workers_of.get(process, ()))
        found = self._server.query(_BLOCKERS, ["pg_catalog.int4"], [process])[0]["pids"]
        # 0 stands for a prepared transaction, which waits for nobody.
        yield from (Link(process, blocker, False) for blocker in found or () if blocker)

    def _workers_awaited(self) -> Mapping[int, Sequence[int]]:
        """Whom the sessions of this database wait for, by their pids, after telling whom this one waits for.

        Not where it waits for the first of several: others would take it that it waits for each.
        """
        workers_of: dict[int, list[int]] = {}
        self._published = True  # even if a cancel comes before the answer
        try:
            pairs = self._control.ask(messages.WAITS_FOR, self._worker_pids[0] if len(self._worker_pids) == 1 else None)
        except BackgroundError:
            return workers_of  # no supervisor can start at the moment: locks alone can be followed
        for session, worker in pairs:
            workers_of.setdefault(session, []).append(worker)
        return workers_of

    def _detected(self, circles: Sequence[Circle]) -> BackgroundError:
        me, workers = self._server.pid, ", ".join(map(str, self._worker_pids))
        if len(self._worker_pids) == 1:
            message = (
                f"the background worker with PID {workers} waits for this session (PID {me}),"
                " which waits for the worker"
            )
        else:
            message = (
                f"the background workers with PIDs {workers} all wait for this session (PID {me}),"
                " which waits for the first of them to end"
            )
        return background_error(
            DEADLOCK_DETECTED,
            f"deadlock detected: {message}",
            detail="\n".join(self._description(link) for circle in circles for link in (*circle[1:], circle[0])),
            hint="They go on when this transaction ends, or the session's lock is released. Commit before waiting, or"
            " wait with a timeout.",
        )

    def _description(self, link: Link) -> str:
        if link.is_worker:
            return f"Process {link.waiter} waits for the background worker with PID {link.awaited}."
        types, arguments = ["pg_catalog.int4", "pg_catalog.oid"], [link.waiter, self._server.database_oid]
        found = self._server.query(_AWAITED_LOCK, types, arguments)
        lock = description_of_lock(found[0]) if found else "a snapshot"
        return f"Process {link.waiter} waits for {lock}; blocked by process {link.awaited}."


def _chain(arrived_by: Mapping[int, Link], last: Link) -> Circle:
    """The links that led to the last one, it included, from its end to the start."""
    links = [last]
    while links[-1].waiter != last.awaited:
        links.append(arrived_by[links[-1].waiter])
    return tuple(reversed(links))


def description_of_lock(lock: Mapping[str, Any]) -> str:
    """A row of pg_locks in the words that the server has for it, with the table's name where it is known."""
    kind, database = lock["locktype"], lock["database"]
    relation = f"relation {lock['name'] or lock['relation']} of database {database}"
    things = {
        "relation": relation,
        "extend": f"extension of {relation}",
        "page": f"page {lock['page']} of {relation}",
        "tuple": f"tuple ({lock['page']},{lock['tuple']}) of {relation}",
        "transactionid": f"transaction {lock['transactionid']}",
        "virtualxid": f"virtual transaction {lock['virtualxid']}",
        "object": f"object {lock['objid']} of class {lock['classid']} of database {database}",
        "advisory": f"advisory lock [{database},{lock['classid']},{lock['objid']},{lock['objsubid']}]",
    }
    row = f" (a row of {lock['table_of_row']})" if kind == "transactionid" and lock["table_of_row"] else ""
    return f"{lock['mode']} on {things.get(kind, kind)}{row}"
