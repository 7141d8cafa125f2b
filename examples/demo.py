"""The worked example of `make demo`: what an ordinary role can do with background workers.

It starts a scratch server with stock Debian authentication and shows each statement with what it gives.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import psycopg

from examples.scratch import ScratchServer, scratch_server

_TABLES = ("orders_north", "orders_east", "orders_south", "orders_west")
_ROWS = 750_000
_NOTICE_LINES = 12
_WATCH_SECONDS = 0.1
_WATCH_LIMIT_SECONDS = 60

_ADMIN = """\
CREATE EXTENSION pg_background CASCADE;
CREATE ROLE alice LOGIN PASSWORD '{password}';
GRANT pgbackground_role TO alice;
CREATE SCHEMA shop AUTHORIZATION alice;
ALTER ROLE alice SET search_path = shop, public;
"""

_GENERATE = """\
CREATE TABLE {table} AS
SELECT id, md5(id::text) AS item, id % 97 AS amount
FROM generate_series(1, {rows}) AS id"""

_COUNT = "SELECT count(*) FROM {table} WHERE item LIKE '%7f%'"

_REPRICE = """\
DO $do$
BEGIN
    FOR part IN 1..10 LOOP
        UPDATE orders_south SET amount = amount + 1
        WHERE id > (part - 1) * {rows} / 10 AND id <= part * {rows} / 10;
        PERFORM pg_background_progress(part * 10, format('part %s of 10', part));
    END LOOP;
END $do$"""

_WATCH = """\
SELECT state, progress_bar, progress_msg, round(extract(epoch FROM elapsed), 1) AS seconds
FROM pg_background_activity WHERE (pid, cookie) = ({pid}, {cookie})"""

_LAUNCH = "SELECT * FROM pg_background_launch_v2($$ {sql} $$)"
_SUBMIT = "SELECT * FROM pg_background_submit_v2($$ {sql} $$)"
_RESULT = "SELECT * FROM pg_background_result_v2({pid}, {cookie}) AS ({columns})"


class Handle(tuple[int, int]):
    """pid and cookie of a worker, as pg_background_handle has them."""

    __slots__ = ()

    def result(self, columns: str) -> str:
        """The statement that reads this worker's result."""
        return _RESULT.format(pid=self[0], cookie=self[1], columns=columns)

    def watch(self) -> str:
        """The statement that shows how far this worker is."""
        return _WATCH.format(pid=self[0], cookie=self[1])


class Session:
    """A client session that prints what it does, in the manner of psql."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._notices: list[str] = []
        connection.add_notice_handler(self._notice)

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        self._notices += f"{diagnostic.severity}:  {diagnostic.message_primary}".splitlines()

    def run(self, sql: str) -> list[tuple[object, ...]]:
        """Run a statement in silence and return its rows."""
        cursor = self._connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []

    def show(self, sql: str, *, brief: bool = False) -> list[tuple[object, ...]]:
        """Print a statement, run it, print and return its rows; an error is printed with its SQLSTATE.

        brief: a row takes one line.
        """
        print("alice=> " + sql.replace("\n", "\n   ...> ") + ";")
        try:
            cursor = self._connection.execute(sql.encode())
        except psycopg.Error as error:
            _print_error(error)
            return []
        finally:
            self._print_notices()
        if cursor.description is None:
            print(f"{cursor.statusmessage}\n")
            return []
        rows = cursor.fetchall()
        names = [column.name for column in cursor.description]
        (_print_lines if brief else _print_table)(names, rows)
        return rows

    def launch(self, sql: str, call: str = _LAUNCH) -> Handle:
        """Print and run the launch of a background worker."""
        rows = self.show(call.format(sql=sql), brief=True)
        if not rows:
            raise RuntimeError("the launch failed, as shown above")
        return Handle(rows[0])  # type: ignore[arg-type]

    def _print_notices(self) -> None:
        for line in self._notices[:_NOTICE_LINES]:
            print(line)
        if len(self._notices) > _NOTICE_LINES:
            print(f"... and {len(self._notices) - _NOTICE_LINES} lines more")
        self._notices.clear()


def _print_error(error: psycopg.Error) -> None:
    diagnostic = error.diag
    print(f"ERROR:  {diagnostic.sqlstate}: {diagnostic.message_primary}")
    for label, text in (
        ("DETAIL", diagnostic.message_detail),
        ("HINT", diagnostic.message_hint),
        ("CONSTRAINT NAME", diagnostic.constraint_name),
        ("CONTEXT", _worker_context(diagnostic.context or "")),
    ):
        if text:
            print(f"{label}:  {text}")
    print()


def _worker_context(context: str) -> str:
    """The line that names the worker; the others are of the functions that raised the error here."""
    lines = [line.partition("-- ")[2] for line in context.splitlines() if "in a background worker" in line]
    return "\n".join(lines) or context


def _print_lines(names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for row in rows:
        print("  " + ", ".join(f"{name}: {value}" for name, value in zip(names, row)) + "\n")


def _print_table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells)]
    print(" | ".join(name.center(width) for name, width in zip(names, widths)).join(("  ", "")))
    print("-+-".join("-" * width for width in widths).join(("--", "")))
    for row in cells:
        print(" | ".join(cell.ljust(width) for cell, width in zip(row, widths)).join(("  ", "")))
    print(f"({len(rows)} row{'' if len(rows) == 1 else 's'})\n")


def _heading(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def _generate(session: Session) -> None:
    _heading(f"{len(_TABLES)} tables of {_ROWS:,} rows, each made by a background worker")
    handles = [session.launch(_GENERATE.format(table=table, rows=_ROWS)) for table in _TABLES]
    for handle in handles:
        session.show(handle.result("command_tag text"), brief=True)


def _count(session: Session) -> None:
    _heading("Count four tables: in turn, then in four workers at once")
    print("Workers inherit the session's settings. With parallel query off, each count keeps one core busy.\n")
    session.show("SET max_parallel_workers_per_gather = 0")
    counts = [_COUNT.format(table=table) for table in _TABLES]
    for sql in counts:
        session.run(sql)  # reads the table into the cache, so that both measured rounds find it there
    started = time.perf_counter()
    for sql in counts:
        session.show(sql, brief=True)
    in_turn = time.perf_counter() - started
    started = time.perf_counter()
    handles = [session.launch(sql) for sql in counts]
    for handle in handles:
        session.show(handle.result("count bigint"), brief=True)
    at_once = time.perf_counter() - started
    print(f"in turn: {in_turn * 1000:.0f} ms    in four workers: {at_once * 1000:.0f} ms    ", end="")
    print(f"{in_turn / at_once:.2f} times as fast, on {os.cpu_count()} cores")


def _audit(session: Session) -> None:
    _heading("An audit row that survives a ROLLBACK")
    session.show("CREATE TABLE audit (at timestamptz DEFAULT clock_timestamp(), who text, what text)")
    session.show("BEGIN")
    session.show("DELETE FROM orders_west")
    session.show(
        "SELECT tag\n"
        "FROM pg_background_launch_v2($$ INSERT INTO audit (who, what)\n"
        "                                VALUES (current_user, 'tried to empty orders_west') $$) AS h,\n"
        "     pg_background_result_v2(h.pid, h.cookie) AS r(tag text)"
    )
    session.show("ROLLBACK")
    session.show("SELECT (SELECT count(*) FROM orders_west) AS orders_west, who, what FROM audit")


def _vacuum(session: Session) -> None:
    _heading("VACUUM from inside a transaction, its notices relayed")
    session.show("DELETE FROM orders_north WHERE amount < 10")
    session.show("BEGIN")
    handle = session.launch("VACUUM (VERBOSE) orders_north")
    session.show(handle.result("command_tag text"))
    session.show("COMMIT")


def _progress(session: Session) -> None:
    _heading("Fire and forget, and watch it: what every session of alice's sees")
    handle = session.launch(_REPRICE.format(rows=_ROWS // 2), _SUBMIT)
    print("alice=> " + handle.watch().replace("\n", "\n   ...> ") + f" \\watch {_WATCH_SECONDS}")
    shown: object = None
    deadline = time.monotonic() + _WATCH_LIMIT_SECONDS
    while shown != "ended":
        for state, *rest in session.run(handle.watch()):
            if shown != rest[1]:
                print("  " + "  ".join("" if value is None else str(value) for value in (state, *rest)))
            shown = rest[1] if state == "running" else "ended"
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job did not end within {_WATCH_LIMIT_SECONDS} s")
        time.sleep(_WATCH_SECONDS)


def _error(session: Session) -> None:
    _heading("A worker's error arrives as it was raised")
    session.show("CREATE TABLE stock (item text PRIMARY KEY, pieces int CONSTRAINT not_below_zero CHECK (pieces >= 0))")
    handle = session.launch("INSERT INTO stock VALUES ('bolt', 12), ('nut', -3)")
    session.show(handle.result("command_tag text"))


def _tour(server: ScratchServer, password: str) -> None:
    conninfo = f"host=127.0.0.1 port={server.port} dbname=postgres user=alice password={password}"
    # closing, as the connection's own context would roll back, which an interrupted query does not let it.
    with closing(psycopg.connect(conninfo, autocommit=True, application_name="demo")) as connection:
        session = Session(connection)
        for step in (_generate, _count, _audit, _vacuum, _progress, _error):
            step(session)


def main(pg_config: Path) -> int:
    """Run the demo with the server of this pg_config; 1 after a failure, 130 when interrupted."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    password = secrets.token_urlsafe(16)
    try:
        print("A scratch server with stock Debian authentication (peer, scram-sha-256) starts ...")
        with scratch_server(pg_config.parent) as server:
            _heading("The administrator, once")
            print(_ADMIN.format(password="..."), end="")
            server.psql(_ADMIN.format(password=password))
            _tour(server, password)
        print("\nThe scratch server is stopped and removed.")
    except KeyboardInterrupt:
        print("\ninterrupted; the scratch server is stopped and removed", file=sys.stderr)
        return 130
    except (RuntimeError, psycopg.Error) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0
