"""The extension's calls, as tests write them over and over."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.clusters import Session

LIST_COLUMNS = (
    "pid int4, cookie int8, launched_at timestamptz, user_id oid, queue_size int4, state text,"
    " sql_preview text, last_error text, consumed bool"
)


def _escaped(schema: str) -> str:
    """For psycopg, in a query with parameters."""
    return schema.replace("%", "%%")


class Handle(NamedTuple):
    """A worker's pid and cookie."""

    pid: int
    cookie: int


class Listed(NamedTuple):
    """A row of pg_background_list_v2()."""

    pid: int
    cookie: int
    launched_at: Any
    user_id: int
    queue_size: int
    state: str
    sql_preview: str
    last_error: str | None
    consumed: bool


def launch(session: Session, query: str, queue_size: int = 0, schema: str = "public") -> Handle:
    """Starts a worker, version 2."""
    call = f"SELECT pid, cookie FROM {_escaped(schema)}.pg_background_launch_v2(%s, %s)"
    return Handle(*session.rows(call, (query, queue_size))[0])


def result(session: Session, handle: Handle, columns: str = "r text", schema: str = "public") -> list[Any]:
    """A worker's rows; `columns` is the column list."""
    return session.rows(f"SELECT * FROM {_escaped(schema)}.pg_background_result_v2(%s, %s) AS r({columns})", handle)


def run(session: Session, query: str, columns: str = "r text") -> list[Any]:
    """Launch and result."""
    return result(session, launch(session, query), columns)


def wait(session: Session, handle: Handle, schema: str = "public") -> None:
    """Waits for a worker's end."""
    session.execute(f"SELECT {_escaped(schema)}.pg_background_wait_v2(%s, %s)", handle)


def array(handles: list[Handle]) -> str:
    """An SQL array of handles."""
    rows = ", ".join(f"({pid}, {cookie})" for pid, cookie in handles)
    return f"ARRAY[{rows}]::pg_background_handle[]"


def wait_any(session: Session, handles: list[Handle], timeout_ms: int = 0) -> Handle | None:
    """The handle of one that has ended."""
    call = f"SELECT (h).pid, (h).cookie FROM pg_background_wait_any_v2({array(handles)}, %s) AS h"
    row = session.rows(call, (timeout_ms,))[0]
    return None if row[0] is None else Handle(*row)


def detach(session: Session, handle: Handle, schema: str = "public") -> None:
    """Lets a worker go."""
    session.execute(f"SELECT {_escaped(schema)}.pg_background_detach_v2(%s, %s)", handle)


def listed(session: Session, schema: str = "public") -> list[Listed]:
    """The tracked workers that the session's role may manage, oldest first."""
    query = f"SELECT * FROM {schema}.pg_background_list_v2() AS l({LIST_COLUMNS}) ORDER BY launched_at"
    return [Listed(*row) for row in session.rows(query)]


def is_waiting(session: Session, handle: Handle, event: str) -> bool:
    """Whether a worker's backend waits for this; only when it works does pg_cancel_backend reach its SQL."""
    query = "SELECT wait_event = %s FROM pg_stat_activity WHERE pid = %s"
    return bool(session.rows(query, (event, handle.pid)) == [(True,)])


def is_idle(session: Session, pid: int) -> bool:
    """Whether a backend waits for its next statement: a worker's job has ended."""
    return bool(session.rows("SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'idle'", (pid,)))


def is_gone(session: Session, pid: int) -> bool:
    """Whether there is no such backend."""
    return not session.rows("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,))
