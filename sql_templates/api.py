"""The one list of the extension's functions, and what its reference says of arguments, views and errors.

CREATE FUNCTION (the part up to the language), REVOKE, GRANT, COMMENT, the helpers that grant and revoke, the
API table of the README and docs/reference.md are all rendered from here. A function's body is in
functions/<name>.sql.j2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Argument(NamedTuple):
    """An argument of an API function; `default` is the SQL expression after DEFAULT."""

    name: str
    type: str
    default: str | None = None

    @property
    def declaration(self) -> str:
        """The argument as CREATE FUNCTION wants it."""
        declared = f"{self.name} {self.type}"
        return declared if self.default is None else f"{declared} DEFAULT {self.default}"


class Function(NamedTuple):
    """A function that users call.

    `version` is "v1", "v2" or "admin"; `role` tells whether pgbackground_role may execute it; `group` is the
    heading under which the README's table lists it.
    """

    name: str
    arguments: tuple[Argument, ...]
    returns: str
    comment: str
    version: str
    group: str
    role: bool = True
    strict: bool = True

    @property
    def signature(self) -> str:
        """Name and argument types, as GRANT and COMMENT want them."""
        return f"{self.name}({', '.join(argument.type for argument in self.arguments)})"

    @property
    def declaration(self) -> str:
        """Name and arguments with their names and defaults."""
        return f"{self.name}({', '.join(argument.declaration for argument in self.arguments)})"

    @property
    def create(self) -> str:
        """CREATE FUNCTION up to, and without, LANGUAGE."""
        on_null = "STRICT" if self.strict else "CALLED ON NULL INPUT"
        flags = f"VOLATILE {on_null} PARALLEL UNSAFE"
        return f"CREATE FUNCTION {self.declaration}\nRETURNS {self.returns}\n{flags}"


class Internal(NamedTuple):
    """A function of the extension's own, whose template says CREATE FUNCTION itself.

    `granted`: the API runs with its caller's rights, so what it calls must be open to pgbackground_role. `version`:
    that of the functions that need it, "v1" or "v2"; "all" for both.
    """

    name: str
    argument_types: tuple[str, ...]
    comment: str
    granted: bool = True
    version: str = "v2"

    @property
    def signature(self) -> str:
        """Name and argument types, as GRANT and COMMENT want them."""
        return f"{self.name}({', '.join(self.argument_types)})"


class Column(NamedTuple):
    """A column of a view."""

    name: str
    type: str
    comment: str


class View(NamedTuple):
    """A view that users read."""

    name: str
    columns: tuple[Column, ...]


class Error(NamedTuple):
    """An error of the extension's own."""

    sqlstate: str
    condition: str
    when: str


_SQL = Argument("sql", "text")
_QUEUE_SIZE = Argument("queue_size", "int4", "0")
_LABEL = Argument("label", "text")
_PARAMS = Argument("params", "text[]")
_TIMEOUT = Argument("timeout_ms", "int4", "0")
_HANDLES = Argument("handles", "pg_background_handle[]")
_PID = Argument("pid", "int4")
_HANDLE = (_PID, Argument("cookie", "int8"))
_PRIVILEGES = (
    Argument("role_name", "text"),
    Argument("include_v1", "boolean", "true"),
    Argument("print_commands", "boolean", "false"),
)

START, READ, CONTROL, OBSERVE, V1, ADMIN = (
    "Start work",
    "Read results",
    "Wait, cancel, let go",
    "Observe",
    "Version 1 (pid only)",
    "Administration",
)

API: tuple[Function, ...] = (
    Function(
        "pg_background_launch_v2",
        (_SQL, _QUEUE_SIZE),
        "pg_background_handle",
        "Starts a background worker that runs sql as one transaction, and returns its handle (pid, cookie) as"
        " soon as the SQL has been sent. queue_size: bytes buffered for the reader, 0 for"
        " pg_background.default_queue_size. Raises 0A000 for transaction control and COPY with the client,"
        " 22023 for a bad queue_size, 53400 at pg_background.max_workers, 53300 when the server has no"
        " connection left.",
        "v2",
        START,
    ),
    Function(
        "pg_background_submit_v2",
        (_SQL, _QUEUE_SIZE),
        "pg_background_handle",
        "Starts a background worker whose output is thrown away (fire and forget). Errors as pg_background_launch_v2.",
        "v2",
        START,
    ),
    *(
        Function(
            name,
            arguments,
            "pg_background_handle",
            f"As {name}(sql, queue_size), with {what}.",
            "v2",
            START,
            strict=False,
        )
        for name in ("pg_background_launch_v2", "pg_background_submit_v2")
        for arguments, what in (
            ((_SQL, Argument("queue_size", "int4"), _LABEL), "a label for people, which the views show"),
            (
                (_SQL, Argument("queue_size", "int4"), _LABEL, _PARAMS),
                (
                    "a label, and with values for $1, $2 and so on. The server binds them, with types that it infers as"
                    " for a prepared statement; they are never part of the SQL. sql must be a single statement (42601)"
                ),
            ),
        )
    ),
    Function(
        "pg_background_submit_on_commit_v2",
        (
            _SQL,
            _QUEUE_SIZE,
            Argument("label", "text", "NULL"),
            Argument("params", "text[]", "NULL"),
        ),
        "pg_background_handle",
        "As pg_background_submit_v2, but the job starts when the caller's transaction has committed, and never if that,"
        " or the savepoint that the call stood in, was rolled back. The jobs of a transaction run one after the other,"
        " in the order of the calls. The transaction cannot be prepared for two-phase commit (0A000). The handle serves"
        " pg_background_wait_v2, pg_background_cancel_v2 and pg_background_outcome_v2; pg_background_list_v2 does not"
        " show it.",
        "v2",
        START,
        strict=False,
    ),
    Function(
        "pg_background_run_v2",
        (
            _SQL,
            _QUEUE_SIZE,
            _TIMEOUT,
            Argument("label", "text", "NULL"),
            Argument("params", "text[]", "NULL"),
        ),
        "pg_background_run_result",
        "Runs sql in a background worker, waits for its end and lets it go: an autonomous transaction in one call. Its"
        " rows are thrown away. Columns: pid, cookie, state, consumed, completed, has_error, row_count, command_tag,"
        " sqlstate, error_message, label, launched_at, timed_out, elapsed_ms. Never raises the worker's error. After"
        " timeout_ms milliseconds (0: no limit) the worker is cancelled. If this call itself is cancelled, so is the"
        " worker.",
        "v2",
        START,
        strict=False,
    ),
    Function(
        "pg_background_result_v2",
        _HANDLE,
        "SETOF record",
        "Waits for the worker and returns the rows of its last statement, once; the call needs a column list."
        " Without rows: one text row per command tag. Raises the worker's own error, 42804 for another column"
        " list, 42704 for an unknown handle or results already read, 0A000 for a submitted worker, 40P01 when"
        " the worker waits for this session.",
        "v2",
        READ,
    ),
    Function(
        "pg_background_result_v2",
        (*_HANDLE, Argument("rowtype", "anyelement")),
        "SETOF anyelement",
        "As pg_background_result_v2(pid, cookie), with the columns of a table or composite type instead of a column"
        " list: pg_background_result_v2(pid, cookie, NULL::orders).",
        "v2",
        READ,
        strict=False,
    ),
    Function(
        "pg_background_result_json_v2",
        _HANDLE,
        "SETOF jsonb",
        "As pg_background_result_v2, each row as a JSON object, whatever its columns. Of several columns with one name"
        " the later ones get a number (_2). Without rows: objects with the one key command_tag.",
        "v2",
        READ,
    ),
    Function(
        "pg_background_run_query_v2",
        (_SQL, _QUEUE_SIZE, _TIMEOUT, Argument("label", "text", "NULL"), Argument("col_def", "text", "NULL")),
        "SETOF record",
        "Runs sql in a background worker and returns its rows, in one call that leaves nothing behind; raises the"
        " worker's error. After timeout_ms milliseconds (0: no limit) the worker is cancelled, which is error 57014."
        " The call needs a column list, as that of pg_background_result_v2; col_def, if given, must say the same.",
        "v2",
        READ,
        strict=False,
    ),
    Function(
        "pg_background_wait_v2",
        _HANDLE,
        "void",
        "Waits until the worker's work has ended, whatever its end. Raises 42704 or 55000 for a wrong handle,"
        " 40P01 when the worker waits for this session.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_wait_v2_timeout",
        (*_HANDLE, Argument("timeout_ms", "int4")),
        "bool",
        "Waits for the worker at most timeout_ms milliseconds (0 to 86,400,000; clamped; 0 only looks). True"
        " when it has ended, false at the timeout.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_cancel_v2",
        _HANDLE,
        "void",
        "Asks the worker to stop, as pg_cancel_backend does; it stays tracked until its result is read or it"
        " is detached.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_cancel_v2_grace",
        (*_HANDLE, Argument("grace_ms", "int4")),
        "void",
        "Cancels the worker, waits up to grace_ms milliseconds (0 to 3,600,000; clamped), then terminates its"
        " backend. Never SIGKILL.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_detach_v2",
        _HANDLE,
        "void",
        "Stops tracking the worker, which goes on to its end and commits. Raises 42704 or 55000 for a wrong handle.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_wait_any_v2",
        (_HANDLES, _TIMEOUT),
        "pg_background_handle",
        "Sleeps until one of these workers has ended, and returns its handle; NULL after timeout_ms milliseconds (0: no"
        " limit), and for no handles. NULLs among them are passed over. Raises 42704, 55000 and 42501 as"
        " pg_background_wait_v2, and without a limit 40P01 when all of them wait for this session.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_drain_v2",
        (_HANDLES, _TIMEOUT),
        "SETOF pg_background_outcome",
        "Waits until all of these workers have ended, or timeout_ms milliseconds (0: no limit) have passed, returns an"
        " outcome for each, in the order of the handles, and stops tracking them: what still runs goes on. Errors as"
        " pg_background_wait_v2.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_cancel_all_v2",
        (),
        "int4",
        "Cancels all running workers of this session that the caller may manage; returns how many.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_cancel_by_label_v2",
        (Argument("pattern", "text"), Argument("grace_ms", "int4", "0")),
        "int4",
        "Cancels this session's running workers whose label matches the pattern, as LIKE does; returns how many. With"
        " grace_ms above 0 it waits so many milliseconds for their ends, then terminates their backends.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_detach_all_v2",
        (),
        "int4",
        "Stops tracking all workers of this session that the caller may manage; returns how many.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_purge_v2",
        (),
        "int4",
        "Stops tracking those workers of this session that have ended, unread results included; returns how many.",
        "v2",
        CONTROL,
    ),
    Function(
        "pg_background_outcome_v2",
        _HANDLE,
        "pg_background_outcome",
        "What became of a worker, of any session: pid, cookie, state, consumed, completed (it has ended), has_error"
        " (and not well), row_count, command_tag, sqlstate, error_message, label, launched_at. All NULL for a handle"
        " that is unknown or that the caller may not manage; raises no error.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_result_info_v2",
        _HANDLE,
        "pg_background_result_info",
        "row_count, command_tag, completed, has_error, started_at and finished_at of a worker. Raises 42704, 55000 or"
        " 42501 for a wrong handle.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_error_info_v2",
        _HANDLE,
        "pg_background_error_info",
        "sqlstate, message, detail, hint, context, schema_name, table_name, column_name and constraint_name of a"
        " worker's error; NULLs if it has none. Raises 42704, 55000 or 42501 for a wrong handle.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_full_sql_v2",
        _HANDLE,
        "text",
        "The whole SQL of a worker that this session tracks or has let go (the last 200, up to 50,000 characters); of"
        " any other the first 120 characters, which are what the views show. Raises 42704, 55000 or 42501 for a wrong"
        " handle.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_list_v2",
        (),
        "SETOF record",
        "This session's tracked workers that the caller may manage: (pid int4, cookie int8, launched_at"
        " timestamptz, user_id oid, queue_size int4, state text, sql_preview text, last_error text, consumed"
        " bool). state: running, stopped, canceled or error.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_stats_v2",
        (),
        "pg_background_stats",
        "Counts of this session's workers, their average execution time in milliseconds, and max_workers.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_progress",
        (Argument("pct", "int4"), Argument("msg", "text", "NULL")),
        "void",
        "Called by a worker's own SQL: reports its progress in percent (clamped to 0..100) and a message,"
        " which other sessions see within 50 ms. Raises 0A000 outside of a worker, 22004 for a NULL pct.",
        "v2",
        OBSERVE,
        strict=False,
    ),
    Function(
        "pg_background_get_progress_v2",
        _HANDLE,
        "pg_background_progress",
        "What the worker last reported: (progress_pct int4, progress_msg text); NULLs where nothing was"
        " reported or the handle is unknown.",
        "v2",
        OBSERVE,
    ),
    Function(
        "pg_background_launch",
        (_SQL, _QUEUE_SIZE),
        "int4",
        "As pg_background_launch_v2, but returns the worker's pid alone; its cookie is 0.",
        "v1",
        V1,
    ),
    Function(
        "pg_background_result",
        (_PID,),
        "SETOF record",
        "As pg_background_result_v2, without a check of the cookie.",
        "v1",
        V1,
    ),
    Function(
        "pg_background_detach",
        (_PID,),
        "void",
        "As pg_background_detach_v2, without a check of the cookie.",
        "v1",
        V1,
    ),
    Function(
        "pg_background_check",
        (),
        "TABLE (prerequisite text, status text, detail text, remedy text)",
        "Tries each thing that background workers need, and works where launching fails: server, libpq and psycopg,"
        " roles, settings, connections, loopback login, identity switch, supervisor. status is ok or failed, remedy"
        " says what to do.",
        "v2",
        OBSERVE,
    ),
    Function(
        "grant_pg_background_privileges",
        _PRIVILEGES,
        "boolean",
        "Grants EXECUTE on the API to a role, with or without the version 1 functions; prints the commands if"
        " asked. Raises 42704 for an unknown role.",
        "admin",
        ADMIN,
        role=False,
    ),
    Function(
        "revoke_pg_background_privileges",
        _PRIVILEGES,
        "boolean",
        "Takes back what grant_pg_background_privileges gave to a role. Without include_v1 a role that has the version"
        " 1 functions keeps what they need. Raises 42704 for an unknown role.",
        "admin",
        ADMIN,
        role=False,
    ),
    Function(
        "pg_background_drop_executor_role",
        (),
        "void",
        "Revokes what the extension granted to pgbackground_role and drops that role, or says what still"
        " depends on it (2BP01).",
        "admin",
        ADMIN,
        role=False,
    ),
)

INTERNAL: tuple[Internal, ...] = (
    Internal(
        "_pg_background_raise", ("jsonb",), "raises the error that a report of the runtime describes.", version="all"
    ),
    Internal(
        "_pg_background_checked",
        ("text",),
        "passes a reply of the runtime on, or raises the error it reports.",
        version="all",
    ),
    Internal("_pg_background_refused", ("text",), "raises the error of a reply that is not NULL."),
    Internal("_pg_background_launch", ("text", "int4"), "starts a worker; reply: its handle."),
    Internal(
        "_pg_background_start",
        ("text", "int4", "text", "text[]", "bool"),
        "starts a worker with a label and parameters; reply: its handle.",
    ),
    Internal(
        "_pg_background_launch_v1", ("text", "int4"), "starts a worker with cookie 0; reply: its pid.", version="v1"
    ),
    Internal("_pg_background_submit", ("text", "int4"), "starts a worker that keeps no output; reply: its handle."),
    Internal(
        "_pg_background_open_result",
        ("int4", "int8"),
        "waits for rows; reply: the query that delivers them.",
        version="all",
    ),
    Internal(
        "_pg_background_batches", ("int4",), "batches of an opened result, a literal for each column.", version="all"
    ),
    Internal(
        "_pg_background_close_result",
        ("int4",),
        "ends the reading of a result; reply: nothing, or its error.",
        version="all",
    ),
    Internal(
        "_pg_background_taken", ("int4",), "lets a worker go whose whole result the calling query holds.", version="all"
    ),
    Internal("_pg_background_wait", ("int4", "int8", "int4"), "waits for a worker; reply: whether it has ended."),
    Internal("_pg_background_detach", ("int4", "int8"), "stops tracking a worker.", version="all"),
    Internal("_pg_background_cancel", ("int4", "int8", "int4"), "asks a worker to stop."),
    Internal("_pg_background_progress", ("int4", "text"), "sends a worker's progress to the supervisor."),
    Internal(
        "_pg_background_proof",
        ("int4",),
        "a worker session's users, and how many settings are hidden in it.",
        version="all",
    ),
    Internal("_pg_background_list", (), "reply: this session's workers as JSON."),
    Internal("_pg_background_stats", (), "reply: this session's counts as JSON."),
    Internal("_pg_background_mark", ("oid",), "leaves a marker for a role's worker in the caller's transaction."),
    Internal(
        "_pg_background_has_committed",
        ("uuid",),
        "waits for the end of the transaction that left this marker for the session's user; whether that committed.",
    ),
    Internal(
        "_pg_background_defer",
        ("text", "int4", "text", "text[]", "text"),
        "hands over a job that waits for the commit of the transaction with this marker; reply: its handle.",
    ),
    Internal(
        "_pg_background_run",
        ("text", "int4", "int4", "text", "text[]"),
        "runs a worker to its end; reply: a pg_background_run_result as JSON.",
    ),
    Internal(
        "_pg_background_run_query",
        ("text", "text", "int4", "int4", "text", "text"),
        "starts a worker that is read at once; reply: its pid and cookie.",
    ),
    Internal("_pg_background_abandon", ("text",), "cancels a worker that was to be read at once, if it is there."),
    Internal("_pg_background_reported", ("int4", "int8"), "what a worker last reported, as the view has it."),
    Internal("_pg_background_told", ("text", "int4", "int8"), "reply: what a worker's outcome, say, is, as JSON."),
    Internal(
        "_pg_background_open_as",
        ("int4", "int8", "oid"),
        "waits for rows; reply: the query that delivers them as rows of a type, or as JSON.",
    ),
    Internal(
        "_pg_background_wait_any",
        ("pg_background_handle[]", "int4"),
        "waits for the end of one of these workers; reply: its handle.",
    ),
    Internal(
        "_pg_background_drain",
        ("pg_background_handle[]", "int4"),
        "waits for the ends of all these workers; reply: their outcomes as JSON.",
    ),
    Internal("_pg_background_take", ("text",), "cancels or releases all workers of this session; reply: how many."),
    Internal("_pg_background_check", (), "reply: what background workers need, and whether it is there, as JSON."),
    Internal(
        "_pg_background_cancel_by_label",
        ("text", "int4"),
        "cancels this session's workers whose labels match; reply: how many.",
    ),
)

ARGUMENTS: Mapping[str, str] = {
    "`sql`": "one or several statements. Several are one transaction, and rows come from the last of them; one alone"
    " runs at top level, so that VACUUM and the like can. No transaction control, no COPY with the client.",
    "`queue_size`": "bytes of output that are buffered for a reader that does not read; then the worker waits. 0 or"
    " less means pg_background.default_queue_size. 64 bytes to 256 MB, in effect at least 8 kB; approximate.",
    "`label`": "a name for people. The views show it, pg_background_cancel_by_label_v2 finds it. NULL: none.",
    "`params`": "values for $1, $2 and so on, bound by the server; a NULL element is a NULL. NULL: no parameters.",
    "`pid`, `cookie`": "the worker's handle. A kept session's pid comes again for a later job, the cookie does not.",
    "`handles`": "an array of handles, as array_agg of the launches' results.",
    "`timeout_ms`": "milliseconds. 0: no limit; but pg_background_wait_v2_timeout only looks.",
    "`grace_ms`": "milliseconds from the cancel to the termination of the backend.",
    "`rowtype`": "any value of the wanted row type; its type alone counts: NULL::orders.",
    "`col_def`": "the text of the column list, for callers that keep it in a variable. It must agree with the call's."
    " NULL: not checked.",
    "`pattern`": "as for LIKE.",
    "`pct`, `msg`": "percent done, clamped to 0..100, and a text of which 1,000 characters are kept.",
    "`role_name`": "a role, as text; its name as it is, not quoted.",
    "`include_v1`": "whether the version 1 functions are among the granted or revoked ones.",
    "`print_commands`": "whether each command is shown as a NOTICE.",
}

_STATE = Column("state", "text", "running, stopped (ended well), canceled (by a cancel of this extension), error.")

VIEWS: tuple[View, ...] = (
    View(
        "pg_background_activity",
        (
            Column("pid", "int4", "The worker's backend."),
            Column("cookie", "int8", "With the pid: the handle. 0 for a version 1 launch."),
            Column("launcher_pid", "int4", "The session that launched it."),
            Column("role", "name", "The role it runs as."),
            Column("label", "text", "As given, or NULL."),
            _STATE,
            Column("sql_preview", "text", "The first 120 characters of its SQL."),
            Column("launched_at", "timestamptz", "When it was launched."),
            Column("finished_at", "timestamptz", "When it ended; NULL while it runs."),
            Column("elapsed", "interval", "From launch to end, or until now; NULL where its end is not known."),
            Column("progress_pct", "int4", "What it last reported."),
            Column("progress_msg", "text", "What it last reported."),
            Column("progress_bar", "text", "The percentage as a bar of 20 characters, to watch."),
            Column("command_tag", "text", "Of its last statement, once that has ended."),
            Column("row_count", "int8", "As the command tag tells."),
            Column("sqlstate", "text", "Of its error."),
            Column("error_message", "text", "Of its error."),
            Column("wait_event_type", "text", "What its backend waits for now, as in pg_stat_activity."),
            Column("wait_event", "text", "What its backend waits for now, as in pg_stat_activity."),
        ),
    ),
    View(
        "pg_background_list",
        (
            Column("pid", "int4", "The worker's backend."),
            Column("cookie", "int8", "With the pid: the handle. 0 for a version 1 launch."),
            Column("launched_at", "timestamptz", "When it was launched."),
            Column("user_id", "oid", "The role it runs as."),
            Column("queue_size", "int4", "In effect, in bytes."),
            _STATE,
            Column("sql_preview", "text", "The first 120 characters of its SQL."),
            Column("last_error", "text", "Its error's message, at most 512 characters."),
            Column("consumed", "bool", "Whether the reading of its result has begun."),
            Column("label", "text", "As given, or NULL."),
        ),
    ),
)

ERRORS: tuple[Error, ...] = (
    Error("08001", "sqlclient_unable_to_establish_sqlconnection", "The server does not let its own OS user in."),
    Error("08006", "connection_failure", "The worker's backend died; whether it had committed is not known."),
    Error(
        "0A000",
        "feature_not_supported",
        "Transaction control or COPY with the client in a worker's SQL; the result of a submitted worker; values that"
        " cannot travel; progress outside of a worker; PREPARE TRANSACTION after pg_background_submit_on_commit_v2.",
    ),
    Error(
        "22004", "null_value_not_allowed", "NULL where SQL, a handle or a percentage belongs, in what is not strict."
    ),
    Error("22023", "invalid_parameter_value", "queue_size or one of the settings is out of range, or no number."),
    Error("40P01", "deadlock_detected", "Launcher and worker wait for each other."),
    Error("42501", "insufficient_privilege", "The caller is not a member of the role that launched the worker."),
    Error("42601", "syntax_error", "Several statements in one string with parameters."),
    Error(
        "42704",
        "undefined_object",
        "No such worker: for result and detach none that this session tracks, for the others none in this database. Or:"
        " the results were read already.",
    ),
    Error("42804", "datatype_mismatch", "The column list does not fit the result. Nothing is taken: ask again."),
    Error("53000", "insufficient_resources", "No file descriptor is left."),
    Error("53100", "disk_full", "No room on the disk for what a worker's launcher or the supervisor must keep there."),
    Error("53200", "out_of_memory", "The operating system has no memory left for it."),
    Error("53300", "too_many_connections", "No connection is left, of the server's or under a CONNECTION LIMIT."),
    Error("53400", "configuration_limit_exceeded", "pg_background.max_workers is reached in this session."),
    Error("55000", "object_not_in_prerequisite_state", "The pid is right, and the cookie is another."),
    Error("57014", "query_canceled", "The worker was cancelled, or a timeout has ended it."),
    Error("57P01", "admin_shutdown", "The worker's backend was terminated, after a grace period, say."),
    Error("58030", "io_error", "A system call of the launching session failed in another way."),
    Error(
        "58P01", "undefined_file", "psycopg is not installed for the server's Python, or it or its libpq is too old."
    ),
)
