"""Rows on their way from a worker to the caller: columns as literals that the server unnests.

Per row PL/Python is slow, per column and batch it is not. A column of a built-in type travels as one array
literal: of the type itself, or, where its values cannot be elements of an array (arrays, and types without an array
type), of texts that are cast one by one. A user's type travels as JSON objects that json_to_recordset reads: that
calls the type's own input function and nothing else, where a cast from text might be a function that the type's
owner has planted. (Where its array type serves, one array literal inside of one JSON object is faster.)
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from .backlog import Rows
from .errors import DATATYPE_MISMATCH, FEATURE_NOT_SUPPORTED, background_error
from .server import Server
from .wire import Field

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

FIRST_USER_OID = 16384  # FirstNormalObjectId: below it are objects of initdb, owned by the bootstrap superuser

BOOL, CHAR, INT8, INT2, INT4, TEXT, OID, FLOAT4, FLOAT8 = 16, 18, 20, 21, 23, 25, 26, 700, 701
DATE, TIME, TIMESTAMP, TIMESTAMPTZ, INTERVAL, TIMETZ, NUMERIC = 1082, 1083, 1114, 1184, 1186, 1266, 1700
VOID, UUID = 2278, 2950

# Their output never holds what an array literal must quote.
PLAIN_TYPES = frozenset(
    (
        BOOL,
        INT8,
        INT2,
        INT4,
        OID,
        FLOAT4,
        FLOAT8,
        DATE,
        TIME,
        TIMESTAMP,
        TIMESTAMPTZ,
        INTERVAL,
        TIMETZ,
        NUMERIC,
        UUID,
    )
)

# A batch beyond this is halved: reading it takes several times its size in memory.
_BIG_BATCH_BYTES = 8 * 1024 * 1024

# A result that is there whole and takes no more than this becomes part of the query's text.
_WRITTEN_OUT_BYTES = 4096

_CONTROL_CHARACTERS = re.compile(rb"[\x01-\x1f]")


class Style(enum.Enum):
    """How a column's values are written down."""

    PLAIN = enum.auto()  # an array literal without quotes
    QUOTED = enum.auto()  # an array literal of quoted elements
    TEXT = enum.auto()  # an array literal of texts, each to be cast by itself
    CODE = enum.auto()  # "char": an array literal of byte codes; a byte need not be text
    PACKED = enum.auto()  # a JSON object that holds an array literal of quoted elements
    RECORDS = enum.auto()  # a JSON array of objects
    PSEUDO = enum.auto()  # a type that no table can hold: only NULL (and void's empty text) passes


class Column(NamedTuple):
    """Type and style of one column of a result."""

    name: bytes
    type_oid: int
    typmod: int
    style: Style

    def encode(self, values: list[bytes | None]) -> bytes:
        """A batch of the column's values as one literal."""
        return _ENCODERS[self.style](values)


class TypeStyles:
    """Which style each type takes."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._built_in = dict.fromkeys(PLAIN_TYPES, Style.PLAIN)

    def columns(self, fields: Sequence[Field]) -> tuple[Column, ...]:
        """The columns of a result. 42804 when it has none."""
        if not fields:
            raise background_error(
                DATATYPE_MISMATCH,
                "the result of the background worker has no columns",
                hint="Select at least one column.",
            )
        styles = self._styles({field.type_oid for field in fields})
        chosen = [_style_of_column(styles.get(field.type_oid), field.typmod) for field in fields]
        if Style.RECORDS in chosen:  # then all are functions in FROM, where unnest would take a row to pieces
            chosen = [Style.RECORDS if style is Style.PACKED else style for style in chosen]
        return tuple([Column(*field, style) for field, style in zip(fields, chosen)])

    def _styles(self, oids: set[int]) -> dict[int, Style]:
        """The styles of those types that can be seen here; one that the job itself has made cannot yet."""
        unknown = oids - self._built_in.keys()
        if not unknown:
            return self._built_in
        found = self._look_up(unknown)
        self._built_in.update({oid: style for oid, style in found.items() if oid < FIRST_USER_OID})
        return {**self._built_in, **found}

    def _look_up(self, oids: set[int]) -> dict[int, Style]:
        rows = self._server.query(
            "SELECT t.oid, t.typtype OPERATOR(pg_catalog.=) 'p' AS pseudo,"
            " t.typtype OPERATOR(pg_catalog.=) 'c' AS composite,"
            " t.typarray OPERATOR(pg_catalog.<>) 0::pg_catalog.oid"
            " AND t.typdelim OPERATOR(pg_catalog.=) ',' AS fits_array"
            " FROM pg_catalog.pg_type t WHERE t.oid OPERATOR(pg_catalog.=) ANY ($1)",
            ["pg_catalog.oid[]"],
            [sorted(oids)],
        )
        return {int(row["oid"]): _style_of(row) for row in rows}


def _style_of(row: dict[str, Any]) -> Style:
    oid = int(row["oid"])
    if row["pseudo"]:
        return Style.PSEUDO
    if oid == CHAR:
        return Style.CODE
    if oid < FIRST_USER_OID and not row["composite"]:
        return Style.QUOTED if row["fits_array"] else Style.TEXT
    return Style.PACKED if row["fits_array"] else Style.RECORDS


def _style_of_column(style: Style | None, typmod: int) -> Style:
    """The style of a type (None: unknown here) with a modifier; unnest loses that, and a cast could be planted."""
    if style is None or (style is Style.PACKED and typmod != -1):
        return Style.RECORDS
    return style


def fields_of(result: PGresult) -> list[Field]:
    """The columns of a result, as the server describes them."""
    return [Field(result.fname(i) or b"", result.ftype(i), result.fmod(i)) for i in range(result.nfields)]


def encode_values(rows: Sequence[Sequence[bytes | None]], columns: tuple[Column, ...]) -> Rows:
    """A batch of a few rows."""
    return Rows(tuple([column.encode(list(values)) for column, values in zip(columns, zip(*rows))]))


def encode_rows(result: PGresult, columns: tuple[Column, ...]) -> Iterator[Rows]:
    """All rows of a chunk: one batch, or more where it would be so big that the server's memory suffers."""
    return _encode(result, columns, range(result.ntuples))


def _encode(result: PGresult, columns: tuple[Column, ...], rows: range) -> Iterator[Rows]:
    get_value = result.get_value
    batch = Rows(
        tuple([column.encode(list(map(get_value, rows, repeat(place)))) for place, column in enumerate(columns)])
    )
    if len(rows) == 1 or batch.size() <= _BIG_BATCH_BYTES:
        yield batch
        return
    del batch
    middle = len(rows) // 2
    yield from _encode(result, columns, rows[:middle])
    yield from _encode(result, columns, rows[middle:])


def _plain(values: list[bytes | None]) -> bytes:
    try:
        return b"{" + b",".join(values) + b"}"  # type: ignore[arg-type]
    except TypeError:  # a NULL
        return b"{" + b",".join([b"NULL" if value is None else value for value in values]) + b"}"


def _quoted(values: list[bytes | None]) -> bytes:
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


def _codes(values: list[bytes | None]) -> bytes:
    """Byte codes as signed numbers; from 16 on the server writes a byte above 127 as an octal escape."""
    return _plain([None if value is None else b"%d" % _char_code(value) for value in values])


def _char_code(value: bytes) -> int:
    if len(value) == 4 and value.startswith(b"\\"):
        value = bytes((int(value[1:], 8),))
    return int.from_bytes(value, "big", signed=True)


def _packed(values: list[bytes | None]) -> bytes:
    return b'{"v":"' + _json_escaped(_quoted(values)) + b'"}'


def _records(values: list[bytes | None]) -> bytes:
    return b"[" + b",".join([_record(value) for value in values]) + b"]"


def _record(value: bytes | None) -> bytes:
    return b'{"v":null}' if value is None else b'{"v":"' + _json_escaped(value) + b'"}'


def _json_escaped(text: bytes) -> bytes:
    escaped = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return _CONTROL_CHARACTERS.sub(lambda found: b"\\u%04x" % found.group()[0], escaped)


def _pseudo(values: list[bytes | None]) -> bytes:
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
    Style.TEXT: _quoted,
    Style.CODE: _codes,
    Style.PACKED: _packed,
    Style.RECORDS: _records,
    Style.PSEUDO: _pseudo,
}


class _TypeName(NamedTuple):
    """A type as SQL text that no search_path can bend: scalar, and its array."""

    exact: str  # with its modifier
    plain: str
    array: str


class TypeNames:
    """Looks up what a column's type is called now; a user's type may have been renamed since."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._built_in: dict[tuple[int, int], _TypeName] = {}

    def of(self, columns: tuple[Column, ...]) -> dict[tuple[int, int], _TypeName] | None:
        """Names by (oid, typmod); None while a type is not visible here (its creation has not committed)."""
        wanted = {(column.type_oid, column.typmod) for column in columns if column.style is not Style.PSEUDO}
        if not wanted <= self._built_in.keys():
            names = self._look_up(sorted(wanted))
            if names is None:
                return None
            self._built_in.update({key: name for key, name in names.items() if key[0] < FIRST_USER_OID})
            return names
        return self._built_in

    def _look_up(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], _TypeName] | None:
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


# Types that SQL spells with key words, whose modifier may stand inside of the name, and their arrays; key words
# cannot be planted.
_KEYWORD_TYPES = frozenset((1042, 1043, TIME, TIMESTAMP, TIMESTAMPTZ, INTERVAL, TIMETZ, 1560, 1562, NUMERIC)) | {
    *(1014, 1015, 1183, 1115, 1185, 1187, 1270, 1561, 1563, 1231)
}
_MODIFIER = re.compile(r"\([^()]*\)(?=(\[\])?$)")


def _type_name(row: dict[str, object]) -> _TypeName:
    schema = _identifier(str(row["schema"]))
    plain = f"{schema}.{_identifier(str(row['name']))}"
    array = f"{schema}.{_identifier(str(row['array_name']))}"
    if row["typmod"] == -1:
        return _TypeName(plain, plain, array)
    if int(str(row["oid"])) in _KEYWORD_TYPES:
        return _TypeName(str(row["formatted"]), plain, array)
    modifier = _MODIFIER.search(str(row["formatted"]))
    return _TypeName(plain + (modifier.group() if modifier else ""), plain, array)


def _identifier(quoted: str) -> str:
    """An identifier as quote_ident gave it, without a brace: "{schema}" in the query stands for something else."""
    if "{" not in quoted:
        return quoted
    return "U&" + quoted.replace("\\", "\\\\").replace("{", "\\007B")


# The instant whose text is r.c{n}: of those that show this local time in the session's zone the one that prints that
# text; none where two print the same (clocks were set back, and the abbreviation stayed). Input would not do: there
# an abbreviation has one meaning, whatever the zone.
_ZONED = """CASE WHEN r.c{n} IS NULL THEN NULL
    WHEN pg_catalog.right(r.c{n}, 8) OPERATOR(pg_catalog.=) 'infinity' THEN r.c{n}::pg_catalog.timestamptz
    ELSE (
        SELECT CASE WHEN pg_catalog.count(DISTINCT i.instant) OPERATOR(pg_catalog.=) 1::pg_catalog.int8
                    THEN pg_catalog.min(i.instant)
                    WHEN {{schema}}._pg_background_raise(pg_catalog.jsonb_build_object(
                        'sqlstate', '0A000',
                        'message', 'the result of the background worker holds a timestamp that cannot be read back',
                        'detail', pg_catalog.format('"%s" stands for no single instant.', r.c{n}),
                        'hint', 'Set DateStyle to ISO in the session that launches the worker.')) IS NULL
                    THEN NULL END
        FROM (SELECT pg_catalog.regexp_replace(r.c{n}, ' [^ ]+( BC)?$', E'\\\\1')::pg_catalog.timestamp
              OFFSET 0) AS l(shown),
        LATERAL (
            SELECT pg_catalog.timezone('UTC', l.shown) OPERATOR(pg_catalog.-) (
                s.near::pg_catalog.timestamp OPERATOR(pg_catalog.-) pg_catalog.timezone('UTC', s.near)) AS instant
            FROM (SELECT l.shown::pg_catalog.timestamptz OPERATOR(pg_catalog.+) h.around AS near
                  FROM pg_catalog.unnest('{{-26:00,-3:00,0:00,3:00,26:00}}'::pg_catalog._interval) AS h(around)) AS s
        ) AS i
        WHERE i.instant::pg_catalog.text OPERATOR(pg_catalog.=) r.c{n}
    ) END"""


def streamed(batches: str, columns: tuple[Column, ...], encoding: str) -> tuple[list[str], str]:
    """The columns' literals, as SQL, and where they come from: a call that returns SETOF bytea[]."""
    places = range(1, len(columns) + 1)
    literals = [f"pg_catalog.convert_from(s.b[{place}], '{encoding}')" for place in places]
    return literals, f"FROM (SELECT {batches} AS b OFFSET 0) AS s"


def texts_of(batch: Rows, encoding: str) -> list[str] | None:
    """The columns of a small batch, each an array as text; None where one is too long, or no text for certain."""
    if batch.size() > _WRITTEN_OUT_BYTES:
        return None
    try:
        return [column.decode("utf-8" if encoding == "UTF8" else "ascii") for column in batch.columns]
    except UnicodeDecodeError:
        return None


def written_out(batch: Rows, encoding: str) -> list[str] | None:
    """The literals of a batch that fits into the query's text; None for any other."""
    texts = texts_of(batch, encoding)
    return None if texts is None else [_literal(text) for text in texts]


def _literal(text: str) -> str:
    """A string constant under any settings, and without "{schema}", which stands for something else in the query."""
    escaped = text.replace("\\", "\\\\").replace("'", "''").replace("{schema}", "\\x7bschema}")
    return f"E'{escaped}'"


def rows_query(
    columns: tuple[Column, ...],
    names: dict[tuple[int, int], _TypeName],
    literals: Sequence[str],
    source: str,
    *,
    zoned: bool = False,
) -> str:
    """The query that turns literals, one for each column of a batch of rows, into typed rows.

    source: its FROM clause. zoned: a timestamptz comes with the abbreviation of its time zone.
    """
    calls = [_rows_of(column, names, literal, zoned=zoned) for column, literal in zip(columns, literals)]
    any_records = any(column.style is Style.RECORDS for column in columns)
    if not zoned and not any_records:
        return f"SELECT {', '.join(call + _cast(column, names) for call, column in zip(calls, columns))} {source}"
    places = range(1, len(columns) + 1)
    if any_records:
        aliases = ", ".join(f"c{place}" for place in places)
        rows = f"{source}, LATERAL ROWS FROM ({', '.join(calls)}) AS r({aliases})"
    else:
        rows = f"FROM (SELECT {', '.join(f'{call} AS c{place}' for place, call in zip(places, calls))} {source}) AS r"
    values = (
        (_ZONED.format(n=place) if zoned and column.type_oid == TIMESTAMPTZ else f"r.c{place}") + _cast(column, names)
        for place, column in zip(places, columns)
    )
    return f"SELECT {', '.join(values)} {rows}"


def _rows_of(column: Column, names: dict[tuple[int, int], _TypeName], text: str, *, zoned: bool) -> str:
    """The set-returning call that turns a column's literal into values."""
    if column.style is Style.CODE:
        return f"pg_catalog.unnest({text}::pg_catalog._int4)"
    if column.style in (Style.TEXT, Style.PSEUDO) or (zoned and column.type_oid == TIMESTAMPTZ):
        return f"pg_catalog.unnest({text}::pg_catalog._text)"
    name = names[column.type_oid, column.typmod]
    if column.style is Style.PACKED:
        record = f"pg_catalog.json_to_record({text}::pg_catalog.json) AS r(v {name.array})"
        return f"pg_catalog.unnest((SELECT r.v FROM {record}))"
    if column.style is Style.RECORDS:
        return f"pg_catalog.json_to_recordset({text}::pg_catalog.json) AS (v {name.exact})"
    return f"pg_catalog.unnest({text}::{name.array})"


def _cast(column: Column, names: dict[tuple[int, int], _TypeName]) -> str:
    """What each value still needs to be of the exact type."""
    if column.style is Style.CODE:
        return '::pg_catalog."char"'
    if column.style is Style.TEXT or (column.typmod != -1 and column.style in (Style.PLAIN, Style.QUOTED)):
        return f"::{names[column.type_oid, column.typmod].exact}"
    return ""
