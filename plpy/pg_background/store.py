"""The supervisor's rows in the unlogged table: written in batches, each in a transaction of its own."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from typing import Any

from .bootstrap import members

LOCK_NOT_AVAILABLE = "55P03"
TABLE, MARKER_TABLE = "_pg_background_worker", "_pg_background_marker"

# The table's columns; a row is a dict of them. `key` is random and never 0, where the cookie of v1 workers is.
KEY = "key"
COLUMNS = (
    KEY,
    "pid",
    "cookie",
    "launcher_pid",
    "launcher_start",
    "role_oid",
    "label",
    "submitted",
    "queue_size",
    "sql_preview",
    "launched_at",
    "process_start",
    "state",
    "consumed",
    "finished_at",
    "history_ms",
    "progress_pct",
    "progress_msg",
    "command_tag",
    "row_count",
    "sqlstate",
    "error_message",
    "error_detail",
    "error_hint",
    "error_context",
    "schema_name",
    "table_name",
    "column_name",
    "datatype_name",
    "constraint_name",
)
# Those that the end of a job changes.
ENDS = frozenset(COLUMNS[COLUMNS.index("command_tag") :]) | {"state", "finished_at"}
MAX_ROWS = 10_000

# By name: the statement, and the types of its arguments. That of the other table is the last one.
_STATEMENTS: dict[str, tuple[str, list[str]]] = {
    "upsert": (
        (
            f"INSERT INTO {{worker}} AS w ({', '.join(COLUMNS)})"
            f" SELECT {', '.join(COLUMNS)}"
            " FROM pg_catalog.json_populate_recordset(NULL::{worker}, $1::pg_catalog.json)"
            f" ON CONFLICT ({KEY}) DO UPDATE SET {', '.join(f'{column} = EXCLUDED.{column}' for column in COLUMNS[1:])}"
            # What a predecessor knows late must not undo an end, unless that was a guess.
            " WHERE w.state OPERATOR(pg_catalog.=) 'running' OR EXCLUDED.state OPERATOR(pg_catalog.<>) 'running'"
            " OR w.sqlstate OPERATOR(pg_catalog.=) '08006'"
        ),
        ["pg_catalog.text"],
    ),
    "any": ("SELECT FROM {worker} w LIMIT 1", []),
    "find": (
        (
            "SELECT * FROM {worker} w WHERE w.pid OPERATOR(pg_catalog.=) $1 AND w.cookie OPERATOR(pg_catalog.=) $2"
            " ORDER BY w.launched_at DESC LIMIT 1"
        ),
        ["pg_catalog.int4", "pg_catalog.int8"],
    ),
    "find_key": (f"SELECT * FROM {{worker}} w WHERE w.{KEY} OPERATOR(pg_catalog.=) $1", ["pg_catalog.int8"]),
    "running": ("SELECT * FROM {worker} w WHERE w.state OPERATOR(pg_catalog.=) 'running'", []),
    "prune": (
        (
            "DELETE FROM {worker} w USING (SELECT o.key, o.finished_at,"
            "   pg_catalog.row_number() OVER (ORDER BY o.finished_at DESC) AS place FROM {worker} o"
            "    WHERE o.finished_at IS NOT NULL) AS o"
            " WHERE o.key OPERATOR(pg_catalog.=) w.key AND (o.place OPERATOR(pg_catalog.>) $1"
            "  OR o.finished_at OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-)"
            "     pg_catalog.make_interval(secs => w.history_ms OPERATOR(pg_catalog./) 1000.0::pg_catalog.float8)))"
        ),
        ["pg_catalog.int8"],
    ),
    # A role may hold the lock on its own marker for as long as it likes.
    "sweep": (
        (
            "DELETE FROM {marker} m WHERE m.ctid OPERATOR(pg_catalog.=) ANY (ARRAY("
            "SELECT o.ctid FROM {marker} o WHERE o.made_at OPERATOR(pg_catalog.<)"
            " (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.make_interval(mins => 1))"
            " FOR UPDATE SKIP LOCKED))"
        ),
        [],
    ),
}

Row = dict[str, Any]


class Store:
    """Writes rows; made before the identity switch, whose role need not see the extension's schema."""

    def __init__(self, plpy: Any) -> None:
        self._plpy = plpy
        self._encoding = plpy.execute("SELECT pg_catalog.getdatabaseencoding() AS encoding")[0]["encoding"]
        self._convert = plpy.prepare(
            "SELECT pg_catalog.convert_from($1, pg_catalog.getdatabaseencoding()) AS text", ["pg_catalog.bytea"]
        )
        self._alone = plpy.prepare(
            "SELECT pg_catalog.count(*) OPERATOR(pg_catalog.=) 1 AS alone"
            " FROM pg_catalog.pg_stat_get_activity(NULL) a"
            " JOIN pg_catalog.pg_database d ON d.oid OPERATOR(pg_catalog.=) a.datid"
            "  AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
            " JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) a.usesysid"
            "  AND r.rolname OPERATOR(pg_catalog.=) CURRENT_USER"
        )
        self._recovery_in_progress = ctypes.PyDLL(None).RecoveryInProgress
        self._recovery_in_progress.restype = ctypes.c_bool
        self._in_recovery = True
        self._plans: dict[str, Any] = {}
        schema = self._schema()
        if schema is None:
            plpy.error("the extension pg_background is not there", sqlstate="42704")
        try:
            for name in _STATEMENTS:
                self._prepare(name, schema)
        except plpy.SPIError as error:
            if error.sqlstate != LOCK_NOT_AVAILABLE:
                raise
            # Somebody locks a table. What could not be planned is, when it is needed, if this role sees the schema.

    def is_out_of_reach(self) -> bool:
        """Whether this is a hot standby, which can neither read nor write unlogged tables; a promotion ends that."""
        was_in_recovery, self._in_recovery = self._in_recovery, self._recovery_in_progress()
        if was_in_recovery and not self._in_recovery:
            self._plpy.commit()  # the transaction that began before the promotion may not write
        return self._in_recovery

    def find_table(self) -> bool:
        """Whether the table is there for us, perhaps in another schema than before."""
        if self._schema() is None:
            self._plpy.commit()
            return False
        self._plans = {}
        try:
            self._execute("any")
        except Exception as error:  # noqa: BLE001 - it has just gone, or somebody locks it
            return getattr(error, "sqlstate", None) == LOCK_NOT_AVAILABLE
        finally:
            self._plpy.commit()
        return True

    def _execute(self, name: str, *arguments: Any) -> Any:
        """Run one of _STATEMENTS. 55P03 where somebody locks the table, 55000 where it cannot be planned any more."""
        if name not in self._plans:
            schema = self._schema()
            if schema is None:
                self._plpy.error(f"the table {TABLE} cannot be seen", sqlstate="55000")
            self._prepare(name, schema)
        return self._plpy.execute(self._plans[name], arguments)

    def _prepare(self, name: str, schema: str | None) -> None:
        statement, types = _STATEMENTS[name]
        tables = {"worker": f"{schema}.{TABLE}", "marker": f"{schema}.{MARKER_TABLE}"}
        self._plans[name] = self._plpy.prepare(statement.format(**tables), types)

    def _schema(self) -> str | None:
        """The table's, quoted; None when there is no extension any more, or its schema is closed to us.

        The catalog is asked, since PL/Python cannot pass on an error whose text is neither ASCII nor UTF-8: the
        refusal would end this backend.
        """
        found = self._plpy.execute(
            "SELECT n.nspname::pg_catalog.text AS name,"
            " pg_catalog.has_schema_privilege(CURRENT_USER, n.oid, 'USAGE') AS is_open"
            f" FROM {members('pg_class')}"
            " JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) d.objid"
            " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
            f" WHERE c.relname::pg_catalog.text OPERATOR(pg_catalog.=) '{TABLE}'"
        )
        if not found or not found[0]["is_open"]:
            return None
        return self._quoted(found[0]["name"])

    def _quoted(self, name: str) -> str:
        """A name for a statement, in plain ASCII where the server would take PL/Python's UTF-8 for its own encoding."""
        name = name.replace('"', '""')
        if name.isascii() or self._encoding in ("UTF8", "SQL_ASCII"):
            return f'"{name}"'
        name = name.replace("\\", "\\\\")
        return 'U&"%s"' % "".join(char if char.isascii() else "\\+%06x" % ord(char) for char in name)

    def decode(self, text: bytes) -> str:
        """Bytes of the database's encoding; what is no text of it is replaced, never an error."""
        if text.isascii() or self._encoding in ("UTF8", "SQL_ASCII"):
            return text.decode("utf-8", "replace")
        try:
            return str(self._plpy.execute(self._convert, [text])[0]["text"])
        except self._plpy.SPIError:
            return text.decode("ascii", "replace").replace("\ufffd", "?")

    def rollback(self) -> None:
        """End the transaction of what has failed: it must hold nothing back."""
        self._plpy.rollback()

    def write(self, rows: Iterable[Row]) -> None:
        """Insert or update these rows, and commit."""
        # Characters as they are: the server takes no \u escapes where its encoding lacks the character or has none.
        self._execute("upsert", json.dumps([*rows], ensure_ascii=False))
        self._plpy.commit()

    def write_one_by_one(self, rows: Iterable[Row]) -> None:
        """As write, where one of the rows is not possible: in plain ASCII, or not at all."""
        for row in list(rows):
            for attempt in (row, {name: _plain(value) for name, value in row.items()}):
                try:
                    self.write([attempt])
                except Exception as error:  # noqa: BLE001 - a value out of range, a missing one
                    self.rollback()
                    self._plpy.log(f"pg_background: a row could not be written: {error}")
                else:
                    break

    def find_key(self, key: int) -> Row | None:
        """The row of a job."""
        rows = [dict(row) for row in self._execute("find_key", key)]
        self._plpy.commit()
        return rows[0] if rows else None

    def find(self, pid: int, cookie: int) -> Row | None:
        """The row with this handle, the latest where version 1 has several."""
        rows = [dict(row) for row in self._execute("find", pid, cookie)]
        self._plpy.commit()
        return rows[0] if rows else None

    def running(self) -> list[Row]:
        """Rows that say running."""
        rows = [dict(row) for row in self._execute("running")]
        self._plpy.commit()
        return rows

    def is_alone(self) -> bool:
        """Whether no other supervisor is there, which made room for this one and may still write."""
        alone = bool(self._plpy.execute(self._alone)[0]["alone"])
        self._plpy.commit()
        return alone

    def prune(self) -> None:
        """Remove rows that ended longer ago than their history_ms, and the oldest beyond MAX_ROWS."""
        self._execute("prune", MAX_ROWS)
        self._plpy.commit()

    def sweep_markers(self) -> None:
        """Remove the markers of deferred jobs that no supervisor knows any more; who calls must know that."""
        self._execute("sweep")
        self._plpy.commit()


def _plain(value: Any) -> Any:
    return value.encode("ascii", "replace").decode().replace("\0", "?") if isinstance(value, str) else value
