"""What goes wrong, as PostgreSQL reports it: SQLSTATE, message, detail, hint and the names of objects."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# The SQLSTATEs that the extension raises by itself (PostgreSQL's appendix "Error Codes").
CONNECTION_FAILURE = "08006"
UNABLE_TO_CONNECT = "08001"
FEATURE_NOT_SUPPORTED = "0A000"
INVALID_PARAMETER_VALUE = "22023"
NULL_VALUE_NOT_ALLOWED = "22004"
INSUFFICIENT_PRIVILEGE = "42501"
SYNTAX_ERROR = "42601"
UNDEFINED_OBJECT = "42704"
DATATYPE_MISMATCH = "42804"
INSUFFICIENT_RESOURCES = "53000"
DISK_FULL = "53100"
OUT_OF_MEMORY = "53200"
TOO_MANY_CONNECTIONS = "53300"
CONFIGURATION_LIMIT_EXCEEDED = "53400"
OBJECT_NOT_IN_PREREQUISITE_STATE = "55000"
QUERY_CANCELED = "57014"
ADMIN_SHUTDOWN = "57P01"
DEADLOCK_DETECTED = "40P01"
IO_ERROR = "58030"
INTERNAL_ERROR = "XX000"

_RAN_OUT = {errno.ENOSPC: DISK_FULL, errno.EDQUOT: DISK_FULL, errno.ENOMEM: OUT_OF_MEMORY}

# For the server's JSON functions. Characters as they are: SQL_ASCII databases know no \u escapes.
as_json = json.JSONEncoder(ensure_ascii=False).encode


# Fields of a Report that name objects.
OBJECT_NAMES = ("schema_name", "table_name", "column_name", "datatype_name", "constraint_name")
# Those that an error and a job's row have in common, by the columns' names.
_IN_ROW = {
    "sqlstate": "sqlstate",
    **{f"error_{name}": name for name in ("message", "detail", "hint", "context")},
    **{name: name for name in OBJECT_NAMES},
}


@dataclass(frozen=True)
class Report:
    """An error or notice with the fields of PostgreSQL's protocol; an absent field is None.

    `worker_pid` is set for what a worker reported: it then says so in the context that users see.
    """

    sqlstate: str
    message: str
    detail: str | None = None
    hint: str | None = None
    context: str | None = None
    schema_name: str | None = None
    table_name: str | None = None
    column_name: str | None = None
    datatype_name: str | None = None
    constraint_name: str | None = None
    severity: str = "ERROR"
    worker_pid: int | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], worker_pid: int) -> Report:
        """The error of a job, as its row tells it."""
        fields = {field: row[column] for column, field in _IN_ROW.items() if row.get(column) is not None}
        return cls(**{"sqlstate": INTERNAL_ERROR, "message": "", **fields}, worker_pid=worker_pid)

    def in_row(self) -> dict[str, str]:
        """What it is in a job's row: the columns that have a value."""
        values = {column: getattr(self, field) for column, field in _IN_ROW.items()}
        return {column: value for column, value in values.items() if value is not None}

    def to_json(self) -> str:
        """The fields that are there, as a JSON object."""
        return as_json({name: value for name, value in asdict(self).items() if value is not None})


class BackgroundError(Exception):
    """An error that the caller of an API function gets to see."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.message)
        self.report = report


def background_error(
    sqlstate: str, message: str, *, detail: str | None = None, hint: str | None = None
) -> BackgroundError:
    """A BackgroundError of the extension's own."""
    return BackgroundError(Report(sqlstate, message, detail, hint))


def backend_died(worker_pid: int | None, detail: str | None = None) -> Report:
    """08006: the worker's backend is gone."""
    return Report(
        CONNECTION_FAILURE,
        f"the backend of the background worker with PID {worker_pid} ended unexpectedly",
        detail=detail or None,
        hint="The server log may tell why: look for that PID.",
    )


def report_of_system_call(error: OSError) -> Report:
    """What the operating system refused: out of something, or 58030."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Report(
            INSUFFICIENT_RESOURCES,
            "out of file descriptors for background workers",
            hint="Release workers, or raise the server's limit on open files (ulimit -n, LimitNOFILE).",
        )
    reason = error.strerror or str(error)
    if error.filename is None:
        message = f"a system call for background workers failed: {reason}"
    else:
        message = f'could not use file "{error.filename}" for background workers: {reason}'
    return Report(_RAN_OUT.get(error.errno or 0, IO_ERROR), message)
