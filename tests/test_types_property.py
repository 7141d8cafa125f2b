"""Random tables of all types: `result_v2` gives what the query itself gives, byte by byte.

HYPOTHESIS_EXAMPLES=5000 runs more of them.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.clusters import Session
from tests.test_types import assert_exact

_EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "80"))
_MAX_COLUMNS, _MAX_ROWS, _MAX_DEPTH = 7, 6, 3

_TYPES_OF_USERS = """
    CREATE TYPE label AS ENUM ('', 'NULL', 'a"b', 'c,d', '{}', '\\', ' é ');
    CREATE DOMAIN counted AS int CHECK (value <> 12345);
    CREATE TYPE flat AS (a int, b text, c label);
    CREATE TYPE deep AS (f flat, fs flat[], "odd name" text[], d counted, ts timestamptz);
    CREATE TYPE texts AS RANGE (subtype = text, collation = "C");
"""
LABELS = ("", "NULL", 'a"b', "c,d", "{}", "\\", " é ")


class Kind(NamedTuple):
    """A type, and texts that its input takes (None: NULL)."""

    name: str
    texts: st.SearchStrategy[str | None]
    delimiter: str = ","


def array_text(elements: list[str | None], delimiter: str) -> str:
    quoted = (
        "NULL" if element is None else '"' + element.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for element in elements
    )
    return "{" + delimiter.join(quoted) + "}"


def row_text(fields: tuple[str | None, ...]) -> str:
    quoted = ("" if f is None else '"' + f.replace("\\", "\\\\").replace('"', '""') + '"' for f in fields)
    return "(" + ",".join(quoted) + ")"


def ordered(pair: tuple[int, int]) -> tuple[int, int]:
    return min(pair), max(pair)


def int_ranges(low: int, high: int) -> st.SearchStrategy[str]:
    bounds = st.tuples(st.integers(low, high), st.integers(low, high)).map(ordered)
    closed = bounds.map(lambda b: f"[{b[0]},{b[1]}]")
    return st.one_of(closed, bounds.map(lambda b: f"({b[0]},)"), st.sampled_from(("empty", "(,)")))


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
awkward = st.sampled_from(
    ("", "NULL", "null", '"', "\\", "'", "{", "}", ",", "\\N", "\x01\x1f", "\n", " ", '\\\\"', "a b")
)
texts = st.one_of(texts, awkward, st.text("\\\",{}()' aN\n", max_size=8))
floats = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr), st.sampled_from(("NaN", "Infinity", "-0"))
)
single_floats = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr), st.just("-Infinity"))
points = st.tuples(floats, floats).map(lambda p: f"({p[0]},{p[1]})")
numerics = st.one_of(st.decimals(allow_nan=False, allow_infinity=False, places=9).map("{:f}".format), st.just("NaN"))
micros = st.integers(0, 86_399_999_999)
times = micros.map(lambda m: f"{m // 3_600_000_000:02}:{m // 60_000_000 % 60:02}:{m % 60_000_000 / 1e6:09.6f}")
dates = st.one_of(st.dates().map(str), st.sampled_from(("infinity", "-infinity", "0001-02-28 BC", "99999-01-01")))
timestamps = st.datetimes().map(str)
zoned = st.tuples(timestamps, st.integers(-15, 15)).map(lambda p: f"{p[0]}{p[1]:+03}")
intervals = st.tuples(st.integers(-9999, 9999), st.integers(-9999, 9999), st.integers(-(10**15), 10**15)).map(
    lambda p: f"{p[0]} mons {p[1]} days {p[2]} microseconds"
)
bits = st.text("01", max_size=20)
json_leaves = st.one_of(st.none(), st.booleans(), st.integers(), texts)
documents = st.recursive(
    json_leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3))
)
labels = st.sampled_from(LABELS)
integers = st.integers(-(2**31), 2**31 - 1).map(str)
flat = st.tuples(st.none() | integers, st.none() | texts, st.none() | labels).map(row_text)
deep = st.tuples(
    st.none() | flat,
    st.none() | st.lists(st.none() | flat, max_size=2).map(lambda e: array_text(e, ",")),
    st.none() | st.lists(st.none() | texts, max_size=2).map(lambda e: array_text(e, ",")),
    st.none() | st.integers(-9, 9).map(str),
    st.none() | zoned,
).map(row_text)

BASE = (
    Kind("bool", st.sampled_from(("t", "f"))),
    Kind("int2", st.integers(-32768, 32767).map(str)),
    Kind("int4", integers),
    Kind("int8", st.integers(-(2**63), 2**63 - 1).map(str)),
    Kind("oid", st.integers(0, 2**32 - 1).map(str)),
    Kind("float4", single_floats),
    Kind("float8", floats),
    Kind("numeric", numerics),
    Kind("numeric(12,3)", st.decimals(-10**8, 10**8, places=3).map(str)),
    Kind("money", st.integers(-(2**62), 2**62).map(lambda n: f"{n // 100}.{n % 100:02}")),
    Kind("text", texts),
    Kind("varchar", texts),
    Kind("varchar(20)", texts),
    Kind("char(15)", texts),
    Kind('"char"', st.characters(min_codepoint=1, max_codepoint=126)),
    Kind("name", texts),
    Kind("bytea", st.binary(max_size=20).map(lambda b: "\\x" + b.hex())),
    Kind("bit(3)", st.text("01", min_size=3, max_size=3)),
    Kind("varbit", bits),
    Kind("date", dates),
    Kind("time", times),
    Kind("time(2)", times),
    Kind("timetz", st.tuples(times, st.integers(-15, 15)).map(lambda p: f"{p[0]}{p[1]:+03}")),
    Kind("timestamp", timestamps),
    Kind("timestamp(0)", timestamps),
    Kind("timestamptz", zoned),
    Kind("interval", intervals),
    Kind("uuid", st.uuids().map(str)),
    Kind("json", documents.map(json.dumps)),
    Kind("jsonb", documents.map(lambda d: json.dumps(d, ensure_ascii=False))),
    Kind("inet", st.ip_addresses().map(str)),
    Kind("cidr", st.ip_addresses().map(str)),
    Kind("macaddr", st.binary(min_size=6, max_size=6).map(lambda b: b.hex(":"))),
    Kind("macaddr8", st.binary(min_size=8, max_size=8).map(lambda b: b.hex(":"))),
    Kind("point", points),
    Kind("lseg", st.tuples(points, points).map(lambda p: f"[{p[0]},{p[1]}]")),
    Kind("box", st.tuples(points, points).map(lambda p: f"{p[0]},{p[1]}"), ";"),
    Kind("path", st.lists(points, min_size=1, max_size=4).map(lambda p: f"[{','.join(p)}]")),
    Kind("polygon", st.lists(points, min_size=1, max_size=4).map(lambda p: f"({','.join(p)})")),
    Kind("circle", points.map(lambda p: f"<{p},1.5>")),
    Kind("pg_lsn", st.tuples(*[st.integers(0, 2**32 - 1)] * 2).map(lambda p: f"{p[0]:X}/{p[1]:X}")),
    Kind("tid", st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 65535)).map(lambda p: f"({p[0]},{p[1]})")),
    Kind("xid", st.integers(0, 2**32 - 1).map(str)),
    Kind("xid8", st.integers(0, 2**64 - 1).map(str)),
    Kind("int2vector", st.lists(st.integers(-32768, 32767).map(str), max_size=4).map(" ".join)),
    Kind("oidvector", st.lists(st.integers(0, 2**32 - 1).map(str), max_size=4).map(" ".join)),
    Kind("tsvector", texts.filter(str.strip).map(lambda t: "'" + t.replace("\\", "\\\\").replace("'", "''") + "':3A")),
    Kind("jsonpath", st.integers(0, 99).map(lambda n: f"$.a[{n}] ? (@ > {n})")),
    Kind("int4range", int_ranges(-(2**31), 2**31 - 2)),
    Kind("int8range", int_ranges(-(2**63), 2**63 - 2)),
    Kind("numrange", int_ranges(-(10**20), 10**20)),
    Kind("daterange", st.tuples(st.dates(), st.dates()).map(lambda p: f"[{min(p)},{max(p)}]")),
    Kind("tstzrange", st.tuples(st.datetimes(), st.datetimes()).map(lambda p: f'["{min(p)}+00","{max(p)}+00")')),
    Kind("int4multirange", st.lists(int_ranges(-99, 99), max_size=3).map(lambda r: "{" + ",".join(r) + "}")),
    Kind("label", labels),
    Kind("flat", flat),
    Kind("deep", deep),
    Kind("texts", texts.map(lambda t: row_text((t, None)).replace('""', '\\"') if "\\" not in t else "empty")),
)  # fmt: skip


@st.composite
def arrays(draw: st.DrawFn) -> Kind:
    """An array type of one to three dimensions; its values need not agree on how many."""
    base = draw(st.sampled_from(BASE))
    elements = st.none() | base.texts

    @st.composite
    def values(draw_value: st.DrawFn) -> str:
        sizes = draw_value(st.lists(st.integers(1, 3), min_size=1, max_size=_MAX_DEPTH))
        literal = nested(draw_value, sizes)
        if draw_value(st.booleans()):
            lows = [draw_value(st.integers(-5, 5)) for _ in sizes]
            literal = "".join(f"[{low}:{low + size - 1}]" for low, size in zip(lows, sizes)) + "=" + literal
        return literal

    def nested(draw_value: st.DrawFn, sizes: list[int]) -> str:
        if len(sizes) == 1:
            return array_text([draw_value(elements) for _ in range(sizes[0])], base.delimiter)
        return "{" + base.delimiter.join(nested(draw_value, sizes[1:]) for _ in range(sizes[0])) + "}"

    return Kind(base.name + "[]", st.just("{}") | values())


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str | None]]]:
    """Types of the columns, and rows."""
    kinds = draw(st.lists(st.one_of(st.sampled_from(BASE), arrays()), min_size=1, max_size=_MAX_COLUMNS))
    row = st.tuples(*(st.none() | kind.texts for kind in kinds)).map(list)
    return [kind.name for kind in kinds], draw(st.lists(row, max_size=_MAX_ROWS))


@settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=tables())
def test_random_tables_come_back(conn: Session, table: tuple[list[str], list[list[str | None]]]) -> None:
    kinds, rows = table
    if not conn.value("SELECT to_regtype('deep') IS NOT NULL"):
        conn.execute(_TYPES_OF_USERS)
    columns = ", ".join(f"c{place} {kind}" for place, kind in enumerate(kinds))
    conn.execute(f"DROP TABLE IF EXISTS random_table; CREATE TABLE random_table ({columns})")
    holes = ", ".join(f"%s::{kind}" for kind in kinds)
    for row in rows:
        conn.execute(f"INSERT INTO random_table VALUES ({holes})", row)
    assert_exact(conn, "SELECT * FROM random_table", kinds, len(rows))
