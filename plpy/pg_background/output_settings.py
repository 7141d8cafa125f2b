"""The settings that decide how a value looks as text, and which types each of them touches.

Rows travel as text. A value reads back as it was only under the settings it was written with. So a reader takes on
the worker's settings while it reads; where a job has changed them so that it cannot be known which rows were written
under which, its rows are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from .errors import FEATURE_NOT_SUPPORTED, BackgroundError, background_error
from .results import (
    CHAR,
    DATE,
    FIRST_USER_OID,
    FLOAT4,
    FLOAT8,
    INTERVAL,
    PLAIN_TYPES,
    TEXT,
    TIMESTAMP,
    TIMESTAMPTZ,
    VOID,
    Column,
)
from .server import Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .session import WorkerSession

NAMES = ("DateStyle", "IntervalStyle", "TimeZone", "extra_float_digits", "lc_monetary", "search_path")

# The server tells its client by itself, before it is ready for the next query, what these have become.
_REPORTED = frozenset(("DateStyle", "IntervalStyle", "TimeZone"))
# Settings that only matter to who reads: an array literal's NULL, and content that is no document, must be readable.
_READER_NEEDS = {"array_nulls": "on", "xmloption": "content"}

_BYTEA, _NAME, _JSON, _XML, _MONEY, _BPCHAR, _VARCHAR, _JSONB = 17, 19, 114, 142, 790, 1042, 1043, 3802
_GEOMETRIC = (600, 601, 602, 603, 604, 628, 718)
# regproc, regprocedure, regoper, regoperator, regclass, regtype, regconfig, regdictionary, regcollation
_NAMES_OF_OBJECTS = (24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4191)
# regclass, regtype: only relations and types are looked up in pg_temp.
_TEMPORARY_KINDS = frozenset((2205, 2206))

# A type of the server's own that is not here looks the same under all settings, or as bytea says how it is written.
_TOUCHED_BY: dict[int, tuple[str, ...]] = {
    DATE: ("DateStyle",),
    TIMESTAMP: ("DateStyle",),
    TIMESTAMPTZ: ("DateStyle", "TimeZone"),
    INTERVAL: ("IntervalStyle",),
    _MONEY: ("lc_monetary",),
    **dict.fromkeys((FLOAT4, FLOAT8, *_GEOMETRIC), ("extra_float_digits",)),
    **dict.fromkeys(_NAMES_OF_OBJECTS, ("search_path",)),
}
# A base type that was not there at initdb may print anything, but no names of other objects.
_TOUCHES_UNKNOWN = tuple(name for name in NAMES if name != "search_path")

_ENCODING = "client_encoding"  # which a job may change as well; all text depends on it
_PROBED = (*NAMES, _ENCODING)
# One row with all of _PROBED, in their order.
PROBE = b"SELECT " + b", ".join(b"pg_catalog.current_setting('%s')" % name.encode() for name in _PROBED)
# Where the worker looks for a name without a schema; and whether it has temporary objects, which nobody else can name.
_SCHEMAS_PROBE = (
    b"SELECT pg_catalog.array_to_string(ARRAY(SELECT pg_catalog.quote_ident(s.name::pg_catalog.text)"
    b" FROM pg_catalog.unnest(pg_catalog.current_schemas(true)) WITH ORDINALITY AS s(name, place)"
    b" WHERE s.name OPERATOR(pg_catalog.<>) ALL (ARRAY(SELECT n.nspname FROM pg_catalog.pg_namespace n"
    b"  WHERE n.oid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()))"
    b" ORDER BY s.place), ', '),"
    b" EXISTS (SELECT FROM pg_catalog.pg_class c"
    b"  WHERE c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema())"
    b" OR EXISTS (SELECT FROM pg_catalog.pg_type t"
    b"  WHERE t.typnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()),"
    b" pg_catalog.current_setting('search_path')"
)

# Types that consist of nothing else and that are met often; what the others consist of is looked up.
_SCALARS = PLAIN_TYPES | frozenset((_BYTEA, CHAR, _NAME, TEXT, _JSON, _BPCHAR, _VARCHAR, VOID, _JSONB))
_UNKNOWN = 0
# All types that each of $1 consists of, itself included.
PARTS_QUERY = """
    WITH RECURSIVE part(root, oid) AS (
        SELECT r.oid, r.oid FROM pg_catalog.unnest($1) AS r(oid)
        UNION
        SELECT p.root, c.oid
        FROM part p JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) p.oid, LATERAL (
            SELECT pg_catalog.unnest(ARRAY[t.typelem, t.typbasetype])
            UNION ALL
            SELECT r.rngsubtype FROM pg_catalog.pg_range r
            WHERE r.rngtypid OPERATOR(pg_catalog.=) t.oid OR r.rngmultitypid OPERATOR(pg_catalog.=) t.oid
            UNION ALL
            SELECT a.atttypid FROM pg_catalog.pg_attribute a
            WHERE a.attrelid OPERATOR(pg_catalog.=) t.typrelid AND t.typrelid OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
            AND a.attnum OPERATOR(pg_catalog.>) 0::pg_catalog.int2 AND NOT a.attisdropped
        ) AS c(oid)
        WHERE c.oid OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
    )
    SELECT p.root, p.oid, t.typtype OPERATOR(pg_catalog.=) 'b' AND t.typsubscript::pg_catalog.oid
        OPERATOR(pg_catalog.<>) 'pg_catalog.array_subscript_handler'::pg_catalog.regproc::pg_catalog.oid AS is_base
    FROM part p JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) p.oid"""


class Dependence(NamedTuple):
    """What the text of a result's values depends on."""

    settings: tuple[str, ...]  # in the order of NAMES
    zoned_inside: bool = False  # a timestamptz is inside of another type
    temporary: bool = False  # a name of a table or type, which may be a temporary one
    xml: bool = False


class ReaderSettings:
    """This session's settings, while it reads the rows of a worker."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._built_in_parts: dict[int, frozenset[int]] = {}

    def dependence(self, columns: Iterable[Column]) -> Dependence:
        """What the text of these columns depends on."""
        roots = {column.type_oid for column in columns}
        parts_of = self._parts_of(roots - _SCALARS)
        parts = roots.union(*parts_of.values())
        touched: set[str] = set()
        for part in parts:
            touched.update(_TOUCHES_UNKNOWN if part == _UNKNOWN else _TOUCHED_BY.get(part, ()))
        return Dependence(
            tuple(name for name in NAMES if name in touched),
            zoned_inside=any(TIMESTAMPTZ in inside for inside in parts_of.values()),
            temporary=not _TEMPORARY_KINDS.isdisjoint(parts),
            xml=_XML in parts,
        )

    def _parts_of(self, roots: set[int]) -> dict[int, frozenset[int]]:
        """All types that each of these consists of; _UNKNOWN among them where that cannot be known."""
        asked = sorted(root for root in roots if root not in self._built_in_parts)
        found: dict[int, set[int]] = {root: set() for root in asked}
        if asked:
            for row in self._server.query(PARTS_QUERY, ["pg_catalog.oid[]"], [asked]):
                part = int(row["oid"])
                is_unknown = row["is_base"] and part >= FIRST_USER_OID
                found[int(row["root"])].add(_UNKNOWN if is_unknown else part)
        for root, parts in found.items():
            if root < FIRST_USER_OID:
                self._built_in_parts[root] = frozenset(parts)
        return {root: self._built_in_parts.get(root) or frozenset(found[root]) for root in roots}

    def hold(self, wanted: Mapping[str, str]) -> bool:
        """Whether these are this session's already."""
        return all(self._server.shown_setting(name) == value for name, value in wanted.items())

    def take_on(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """Set these for the rest of the transaction; what was there before, to be put back."""
        before = {name: self._server.shown_setting(name) for name in wanted}
        changed = {name: before[name] for name, value in wanted.items() if before[name] != value}
        self._set({name: wanted[name] for name in changed})
        return changed

    def put_back(self, before: Mapping[str, str]) -> None:
        """Undo take_on(), whose answer this is. A rollback does it too."""
        self._set(before)

    def _set(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._server.query(
                "SELECT pg_catalog.set_config($1, $2, true)",
                ["pg_catalog.text", "pg_catalog.text"],
                [name, value],
            )


def inherited(launchers: Mapping[str, str]) -> dict[str, str]:
    """What a launcher's NAMES become in its worker: floats are always written so that they read back the same."""
    settings = dict(launchers)
    if int(settings["extra_float_digits"]) < 1:
        settings["extra_float_digits"] = "1"
    return settings


def wanted_by_reader(dependence: Dependence, written: Mapping[str, str]) -> dict[str, str]:
    """The settings to read rows under that were written under `written`. 0A000 where they cannot be read."""
    wanted = {name: written[name] for name in dependence.settings if name != "extra_float_digits"}
    if "DateStyle" in wanted:
        wanted["DateStyle"] = _readable_style(written["DateStyle"])
    if _is_iso(written):
        wanted.pop("TimeZone", None)
    elif dependence.zoned_inside and not _prints_utc(written):
        raise _unreadable(
            "the result of the background worker holds timestamps with abbreviated time zones",
            f'DateStyle is "{written["DateStyle"]}", and they are inside of an array, range or row: an abbreviation'
            " may stand for several offsets.",
            "Set DateStyle to ISO in the session that launches the worker, or cast the columns to text.",
        )
    if "extra_float_digits" in dependence.settings and int(written["extra_float_digits"]) < 1:
        raise _changed("extra_float_digits", "1", written["extra_float_digits"])
    wanted["array_nulls"] = _READER_NEEDS["array_nulls"]
    if dependence.xml:
        wanted["xmloption"] = _READER_NEEDS["xmloption"]
    return wanted


def reads_zones(columns: Iterable[Column], written: Mapping[str, str]) -> bool:
    """Whether some column's timestamps end with an abbreviated time zone."""
    return not _is_iso(written) and any(column.type_oid == TIMESTAMPTZ for column in columns)


def refuse_changed(dependence: Dependence, written: Mapping[str, str], ended: Mapping[str, str]) -> None:
    """0A000 when a statement has ended under other settings than it began with, and its rows depend on them."""
    for name in dependence.settings:
        if name == "extra_float_digits" and int(ended[name]) >= 1:
            continue
        if name == "TimeZone" and _is_iso(written) and _is_iso(ended):
            continue
        if written[name] != ended[name]:
            raise _changed(name, written[name], ended[name])


def after_end(server: Server, session: WorkerSession, dependence: Dependence) -> dict[str, str]:
    """What the settings are now that the job has ended; the worker must be asked for some of them."""
    if not _REPORTED.issuperset(dependence.settings):
        return settings_of(server, session.run(PROBE))
    return {name: server.decode(session.connection.parameter_status(name.encode()) or b"") for name in _REPORTED}


def reported(dependence: Dependence, started: Mapping[str, str], reports: Mapping[str, str | None]) -> dict[str, str]:
    """As after_end, where the session has been cleaned since: of what the server told by itself. 0A000 for the rest."""
    refuse_unreported(dependence)
    return {name: reports.get(name) or started[name] for name in _REPORTED}


def refuse_unreported(dependence: Dependence) -> None:
    """0A000 where rows depend on settings that the server does not report by itself."""
    if not _REPORTED.issuperset(dependence.settings):
        raise _unreadable(
            "the background worker has returned rows which its SQL did not return before, or should not return",
            "Their text depends on settings that were reset right behind it.",
            "Launch it again. Where a rule makes rows of an INSERT, UPDATE or DELETE, use a SELECT, or set"
            " pg_background.pool_size to 0.",
        )


def with_schemas(
    server: Server,
    session: WorkerSession,
    dependence: Dependence,
    written: Mapping[str, str],
    *,
    same_role: bool,
) -> dict[str, str]:
    """The settings with a search_path that finds here what the worker, whose job has ended, found by its own.

    0A000 where that cannot be: another path while the job ran, or names of temporary objects.
    """
    if not same_role:
        raise _unreadable(
            "the result of the background worker names objects, and another role reads it",
            "The roles may find different objects by the same name.",
            "Read it as the role that launched the worker, or cast the columns to text or oid.",
        )
    row = session.run(_SCHEMAS_PROBE)
    schemas, has_temporary, path = (server.decode(row.get_value(0, place) or b"") for place in range(3))
    if path != written["search_path"]:
        raise _changed("search_path", written["search_path"], path)
    if dependence.temporary and has_temporary == "t":
        raise _unreadable(
            "the result of the background worker may name temporary objects",
            "They exist in the worker's session only.",
            "Cast the columns to text or oid.",
        )
    # If it were not named, this session's pg_temp would come first.
    return {**written, "search_path": f"{schemas}, pg_temp" if schemas else "pg_temp"}


def settings_of(server: Server, row: PGresult) -> dict[str, str]:
    """The answer to PROBE."""
    return {name: server.decode(row.get_value(0, place) or b"") for place, name in enumerate(_PROBED)}


def refuse_encoding(columns: Iterable[Column], session: WorkerSession, ended: Mapping[str, str | None]) -> None:
    """0A000 when a job has ended under another client_encoding than it began with, and has returned text.

    ended: what its probe said, if it had one, or what the server has reported.
    """
    encoding = session.encoding
    now = session.connection.parameter_status(_ENCODING.encode()) or b""
    changed = {now.decode("ascii"), ended.get(_ENCODING, encoding)} - {encoding}
    if changed and any(column.type_oid not in PLAIN_TYPES or not column.name.isascii() for column in columns):
        raise _unreadable(
            "the background worker changed client_encoding, on which its result depends",
            f'It was "{encoding}" and became "{changed.pop()}".',
            "Leave client_encoding to the extension: results arrive in the encoding of the database.",
        )


def _is_iso(settings: Mapping[str, str]) -> bool:
    return settings["DateStyle"].startswith("ISO")


def _readable_style(date_style: str) -> str:
    """The DateStyle that reads what this one prints: German has one order, and no style but ISO prints YMD."""
    style, _, order = date_style.partition(", ")
    if style == "German":
        return "German, DMY"
    return f"{style}, {'MDY' if order == 'YMD' and style != 'ISO' else order}"


def _prints_utc(settings: Mapping[str, str]) -> bool:
    return settings["TimeZone"] in ("UTC", "GMT", "Etc/UTC", "Etc/GMT")


def _changed(name: str, before: str, after: str) -> BackgroundError:
    return _unreadable(
        f"the background worker changed {name}, on which its result depends",
        f'It was "{before}" and became "{after}".',
        "Change the setting in the session that launches the worker, or cast the columns to text.",
    )


def _unreadable(message: str, detail: str, hint: str) -> BackgroundError:
    return background_error(FEATURE_NOT_SUPPORTED, message, detail=detail, hint=hint)
