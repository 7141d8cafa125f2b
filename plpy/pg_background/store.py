"""The supervisor's rows in the unlogged table: written in batches, each in a transaction of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .units import SettingError, parse_integer_setting

TABLE = "_pg_background_worker"

# The table's columns; a row is a dict of them. `key` is random and never 0, where the cookie of v1 workers is.
KEY = "key"
COLUMNS = (
    KEY,
    "pid",
    "cookie",
    "launcher_pid",
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
MAX_ROWS = 10_000
HISTORY, HISTORY_DEFAULT = "pg_background.history", "1d"

Row = dict[str, Any]


class Store:
    """Writes rows; made before the identity switch, whose role need not see the extension's schema."""

    def __init__(self, plpy: Any) -> None:
        self._plpy = plpy
        name = plpy.execute(
            "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) AS name"
            " FROM pg_catalog.pg_extension e"
            " JOIN pg_catalog.pg_depend d"
            "   ON d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass::pg_catalog.oid"
            "  AND d.refobjid OPERATOR(pg_catalog.=) e.oid AND d.deptype OPERATOR(pg_catalog.=) 'e'"
            "  AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid"
            " JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) d.objid"
            " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
            " WHERE e.extname OPERATOR(pg_catalog.=) 'pg_background'"
            f" AND c.relname::pg_catalog.text OPERATOR(pg_catalog.=) '{TABLE}'"
        )[0]["name"]
        columns = ", ".join(COLUMNS)
        updates = ", ".join(f"{column} = EXCLUDED.{column}" for column in COLUMNS[1:])
        self._upsert = plpy.prepare(
            f"INSERT INTO {name} AS w ({columns})"
            f" SELECT {columns} FROM pg_catalog.json_populate_recordset(NULL::{name}, $1::pg_catalog.json)"
            f" ON CONFLICT ({KEY}) DO UPDATE SET {updates}",
            ["pg_catalog.text"],
        )
        self._find = plpy.prepare(
            f"SELECT * FROM {name} w WHERE w.pid OPERATOR(pg_catalog.=) $1 AND w.cookie OPERATOR(pg_catalog.=) $2"
            " ORDER BY w.launched_at DESC LIMIT 1",
            ["pg_catalog.int4", "pg_catalog.int8"],
        )
        self._running = plpy.prepare(f"SELECT * FROM {name} w WHERE w.state OPERATOR(pg_catalog.=) 'running'")
        self._history = plpy.prepare(f"SELECT pg_catalog.current_setting('{HISTORY}', true) AS history")
        self._prune = plpy.prepare(
            f"DELETE FROM {name} w USING (SELECT o.key, o.finished_at,"
            f"   pg_catalog.row_number() OVER (ORDER BY o.finished_at DESC) AS place FROM {name} o"
            "    WHERE o.finished_at IS NOT NULL) AS o"
            " WHERE o.key OPERATOR(pg_catalog.=) w.key AND (o.place OPERATOR(pg_catalog.>) $1"
            "  OR o.finished_at OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp()"
            "     OPERATOR(pg_catalog.-) pg_catalog.make_interval(secs => $2)))",
            ["pg_catalog.int8", "pg_catalog.float8"],
        )

    def history_s(self) -> float:
        """How long finished rows stay, in seconds; the default for a setting that is none."""
        shown = self._plpy.execute(self._history)[0]["history"]
        self._plpy.commit()
        try:
            return parse_integer_setting(HISTORY, shown or HISTORY_DEFAULT, "ms", 0, 2**31 - 1) / 1000
        except SettingError:
            return parse_integer_setting(HISTORY, HISTORY_DEFAULT, "ms", 0, 2**31 - 1) / 1000

    def write(self, rows: Iterable[Row]) -> None:
        """Insert or update these rows, and commit."""
        self._plpy.execute(self._upsert, [json.dumps([*rows])])
        self._plpy.commit()

    def find(self, pid: int, cookie: int) -> Row | None:
        """The row with this handle, the latest where version 1 has several."""
        rows = [dict(row) for row in self._plpy.execute(self._find, [pid, cookie])]
        self._plpy.commit()
        return rows[0] if rows else None

    def running(self) -> list[Row]:
        """Rows that say running."""
        rows = [dict(row) for row in self._plpy.execute(self._running)]
        self._plpy.commit()
        return rows

    def prune(self, history_s: float) -> None:
        """Remove rows that ended longer ago than history_s, and the oldest beyond MAX_ROWS."""
        self._plpy.execute(self._prune, [MAX_ROWS, history_s])
        self._plpy.commit()
