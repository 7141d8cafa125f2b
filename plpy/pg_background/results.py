"""Rows on their way from a worker to the caller: columns as literals that the server unnests.

Per row PL/Python is slow, per column and batch it is not. A column of a built-in type travels as one array
literal. Any other type (of a user, or an array, or without an array type) travels as JSON objects that
json_to_recordset reads: that calls the type's own input function and nothing else, where a cast from text might be
a function that the type's owner has planted.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Optional

from .backlog import Rows
from .errors import DATATYPE_MISMATCH, FEATURE_NOT_SUPPORTED, background_error
from .server import Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

_FIRST_USER_OID = 16384  # FirstNormalObjectId: below it are objects of initdb, owned by the bootstrap superuser

BOOL, CHAR, INT8, INT2, INT4, TEXT, OID, FLOAT4, FLOAT8 = 16, 18, 20, 21, 23, 25, 26, 700, 701
DATE, TIME, TIMESTAMP, TIMESTAMPTZ, INTERVAL, TIMETZ, NUMERIC = 1082, 1083, 1114, 1184, 1186, 1266, 1700
VOID, UUID = 2278, 2950

# Their output never holds what an array literal must quote.
_PLAIN = frozenset(
    (BOOL, INT8, INT2, INT4, OID, FLOAT4, FLOAT8, DATE, TIME, TIMESTAMP, TIMESTAMPTZ, INTERVAL, TIMETZ, NUMERIC, UUID)
)

_CONTROL_CHARACTERS = re.compile(rb"[\x01-\x1f]")


class Style(enum.Enum):
    """How a column's values are written down."""

    PLAIN = enum.auto()  # an array literal without quotes
    QUOTED = enum.auto()  # an array literal of quoted elements
    CODE = enum.auto()  # "char": an array literal of byte codes; a byte need not be text
    RECORDS = enum.auto()  # a JSON array of objects
    PSEUDO = enum.auto()  # a type that no table can hold: only NULL (and void's empty text) passes


class Column(NamedTuple):
    """Type and style of one column of a result."""

    name: bytes
    type_oid: int
    typmod: int
    style: Style

    def encode(self, values: list[Optional[bytes]]) -> bytes:
        """A batch of the column's values as one literal."""
        return _ENCODERS[self.style](values)


class TypeStyles:
    """Which style each type takes."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._styles: dict[int, Style] = {}

    def columns(self, result: PGresult) -> tuple[Column, ...]:
        """The columns of a result. 42804 when it has none."""
        if not result.nfields:
            raise background_error(
                DATATYPE_MISMATCH,
                "the result of the background worker has no columns",
                hint="Select at least one column.",
            )
        return tuple(
            Column(result.fname(i) or b"", result.ftype(i), result.fmod(i), self._style(result.ftype(i)))
            for i in range(result.nfields)
        )

    def _style(self, oid: int) -> Style:
        if oid in _PLAIN:
            return Style.PLAIN
        if oid >= _FIRST_USER_OID:
            return Style.RECORDS
        if not self._styles:
            self._learn_built_in_types()
        return self._styles.get(oid, Style.RECORDS)

    def _learn_built_in_types(self) -> None:
        rows = self._server.query(
            "SELECT t.oid, t.typtype OPERATOR(pg_catalog.=) 'p' AS pseudo,"
            " t.typarray OPERATOR(pg_catalog.<>) 0::pg_catalog.oid"
            " AND t.typdelim OPERATOR(pg_catalog.=) ','"
            " AND t.typcategory OPERATOR(pg_catalog.<>) 'A' AS fits_array"
            " FROM pg_catalog.pg_type t WHERE t.oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid"
        )
        for row in rows:
            style = Style.QUOTED if row["fits_array"] else Style.RECORDS
            self._styles[int(row["oid"])] = Style.PSEUDO if row["pseudo"] else style
        self._styles[CHAR] = Style.CODE


def encode_rows(result: PGresult, columns: tuple[Column, ...]) -> Rows:
    """All rows of a chunk."""
    get_value, rows = result.get_value, range(result.ntuples)
    return Rows(
        tuple(
            column.encode([get_value(row, position) for row in rows]) for position, column in enumerate(columns)
        )
    )


def tag_rows(tags: Iterable[bytes]) -> Rows:
    """Command tags as rows of one text column."""
    return Rows((_quoted(list(tags)),))


def _plain(values: list[Optional[bytes]]) -> bytes:
    try:
        return b"{" + b",".join(values) + b"}"  # type: ignore[arg-type]
    except TypeError:  # a NULL
        return b"{" + b",".join([b"NULL" if value is None else value for value in values]) + b"}"


def _quoted(values: list[Optional[bytes]]) -> bytes:
    """Escaping in one go: NUL cannot occur in text, so that it can stand for the separator, and for NULL."""
    try:
        joined, nulls = b"\0".join(values), []  # type: ignore[arg-type]
    except TypeError:
        nulls = [position for position, value in enumerate(values) if value is None]
        joined = b"\0".join([value or b"" for value in values])
    escaped = joined.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    if not nulls:
        return b'{"' + escaped.replace(b"\0", b'","') + b'"}' if values else b"{}"
    elements = escaped.split(b"\0")
    for position in nulls:
        elements[position] = b"\0"
    return (b'{"' + b'","'.join(elements) + b'"}').replace(b'"\0"', b"NULL")


def _codes(values: list[Optional[bytes]]) -> bytes:
    """Byte codes as signed numbers; from 16 on the server writes a byte above 127 as an octal escape."""
    return _plain([None if value is None else b"%d" % _char_code(value) for value in values])


def _char_code(value: bytes) -> int:
    if len(value) == 4 and value.startswith(b"\\"):
        code = int(value[1:], 8)
    else:
        code = value[0] if value else 0
    return code - 256 if code > 127 else code


def _records(values: list[Optional[bytes]]) -> bytes:
    return b"[" + b",".join([_record(value) for value in values]) + b"]"


def _record(value: Optional[bytes]) -> bytes:
    if value is None:
        return b'{"v":null}'
    escaped = value.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    escaped = _CONTROL_CHARACTERS.sub(lambda found: b"\\u%04x" % found.group()[0], escaped)
    return b'{"v":"' + escaped + b'"}'


def _pseudo(values: list[Optional[bytes]]) -> bytes:
    """void's value is the empty text; the value of any other pseudo-type has no input function."""
    if any(values):
        raise background_error(
            FEATURE_NOT_SUPPORTED,
            "a value of a pseudo-type cannot be returned by a background worker",
            hint="Cast the column to a type that a table can hold, such as text.",
        )
    return _quoted(values)


_ENCODERS = {
    Style.PLAIN: _plain,
    Style.QUOTED: _quoted,
    Style.CODE: _codes,
    Style.RECORDS: _records,
    Style.PSEUDO: _pseudo,
}

TAG_COLUMN = Column(b"result", TEXT, -1, Style.QUOTED)


class _TypeName(NamedTuple):
    """A type as SQL text that no search_path can bend: scalar, and its array."""

    exact: str  # with its modifier
    plain: str
    array: str


class TypeNames:
    """Looks up what a column's type is called now; a user's type may have been renamed since."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def of(self, columns: tuple[Column, ...]) -> Optional[dict[tuple[int, int], _TypeName]]:
        """Names by (oid, typmod); None while a type is not visible here (its creation has not committed)."""
        wanted = sorted({(column.type_oid, column.typmod) for column in columns if column.style is not Style.PSEUDO})
        rows = self._server.query(
            "SELECT t.oid, w.typmod, pg_catalog.quote_ident(n.nspname) AS schema,"
            " pg_catalog.quote_ident(t.typname) AS name,"
            " (SELECT pg_catalog.quote_ident(a.typname) FROM pg_catalog.pg_type a"
            "  WHERE a.oid OPERATOR(pg_catalog.=) t.typarray) AS array_name,"
            " pg_catalog.format_type(t.oid, w.typmod) AS formatted"
            " FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS w(oid, typmod)"
            " JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) w.oid"
            " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace",
            ["pg_catalog.oid[]", "pg_catalog.int4[]"],
            [[oid for oid, _ in wanted], [typmod for _, typmod in wanted]],
        )
        if len(rows) < len(wanted):
            return None
        return {(int(row["oid"]), row["typmod"]): _type_name(row) for row in rows}


# Types that SQL spells with key words, whose modifier stands inside of the name; key words cannot be planted.
_KEYWORD_TYPES = frozenset((1042, 1043, TIME, TIMESTAMP, TIMESTAMPTZ, INTERVAL, TIMETZ, 1560, 1562, NUMERIC))
_MODIFIER = re.compile(r"\([^()]*\)(?=(\[\])?$)")


def _type_name(row: dict[str, object]) -> _TypeName:
    plain = f"{row['schema']}.{row['name']}"
    array = f"{row['schema']}.{row['array_name']}"
    if row["typmod"] == -1:
        return _TypeName(plain, plain, array)
    if int(str(row["oid"])) in _KEYWORD_TYPES:
        return _TypeName(str(row["formatted"]), plain, array)
    modifier = _MODIFIER.search(str(row["formatted"]))
    return _TypeName(plain + (modifier.group() if modifier else ""), plain, array)


def rows_query(
    columns: tuple[Column, ...], names: dict[tuple[int, int], _TypeName], batches: str, encoding: str
) -> str:
    """The query that turns what `batches` (a call that returns SETOF bytea[]) delivers into typed rows."""
    expressions = [_unnest(column, names, f"pg_catalog.convert_from(s.b[{position}], '{encoding}')")
                   for position, column in enumerate(columns, 1)]
    source = f"FROM (SELECT {batches} AS b OFFSET 0) AS s"
    if all(column.style is not Style.RECORDS for column in columns):
        return "SELECT " + ", ".join(f"{call}{cast}" for call, cast in expressions) + " " + source
    calls = ", ".join(call for call, _ in expressions)
    outputs = ", ".join(f"r.c{position}{cast}" for position, (_, cast) in enumerate(expressions, 1))
    names_list = ", ".join(f"c{position}" for position in range(1, len(columns) + 1))
    return f"SELECT {outputs} {source}, LATERAL ROWS FROM ({calls}) AS r({names_list})"


def _unnest(column: Column, names: dict[tuple[int, int], _TypeName], text: str) -> tuple[str, str]:
    """(set-returning call, cast of each value) for a column."""
    if column.style is Style.PSEUDO:
        return f"pg_catalog.unnest({text}::pg_catalog._text)", ""
    name = names[column.type_oid, column.typmod]
    if column.style is Style.RECORDS:
        return f"pg_catalog.json_to_recordset({text}::pg_catalog.json) AS (v {name.exact})", ""
    if column.style is Style.CODE:
        return f"pg_catalog.unnest({text}::pg_catalog._int4)", '::pg_catalog."char"'
    cast = "" if column.typmod == -1 else f"::{name.exact}"
    return f"pg_catalog.unnest({text}::{name.array})", cast
