"""Literals that carry a column's values, and the query that turns them into rows; without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background import results
from pg_background.backlog import Rows
from pg_background.errors import BackgroundError
from pg_background.output_settings import Dependence, inherited, refuse_changed, wanted_by_reader
from pg_background.results import Column, Style

values = st.lists(st.none() | st.binary(max_size=9).filter(lambda b: b"\0" not in b))
ISO = {
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "Europe/Berlin",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    "search_path": "public",
}


class Chunk:
    """A PGresult of rows."""

    def __init__(self, rows: Sequence[Sequence[bytes | None]]) -> None:
        self._rows = rows
        self.ntuples = len(rows)

    def get_value(self, row: int, column: int) -> bytes | None:
        return self._rows[row][column]


def column(style: Style, type_oid: int = results.TEXT, typmod: int = -1) -> Column:
    return Column(b"c", type_oid, typmod, style)


def parse_array(literal: bytes) -> list[bytes | None]:
    """A one-dimensional array of quoted elements, as array_in reads it."""
    assert literal[:1] == b"{"
    elements: list[bytes | None] = []
    place = 1
    while literal[place : place + 1] != b"}":
        if literal[place : place + 4] == b"NULL":
            elements.append(None)
            place += 4
        else:
            assert literal[place : place + 1] == b'"'
            place += 1
            element = b""
            while literal[place : place + 1] != b'"':
                place += literal[place : place + 1] == b"\\"
                element += literal[place : place + 1]
                place += 1
            elements.append(element)
            place += 1
        place += literal[place : place + 1] == b","
    assert place == len(literal) - 1
    return elements


@given(values)
def test_a_quoted_array_holds_each_value(batch: list[bytes | None]) -> None:
    assert parse_array(column(Style.QUOTED).encode(batch)) == batch


@given(st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_json_objects_hold_each_value(batch: list[str | None]) -> None:
    encoded = [None if text is None else text.encode() for text in batch]
    assert [record["v"] for record in json.loads(column(Style.RECORDS).encode(encoded))] == batch
    packed = json.loads(column(Style.PACKED).encode(encoded))["v"]
    assert parse_array(packed.encode()) == encoded


def test_a_plain_array_takes_values_as_they_are() -> None:
    assert column(Style.PLAIN).encode([b"1", b"-2"]) == b"{1,-2}"
    assert column(Style.PLAIN).encode([b"1", None]) == b"{1,NULL}"


@pytest.mark.parametrize(
    ("text", "code"), [(b"", b"0"), (b"a", b"97"), (b"\xff", b"-1"), (b"\\", b"92"), (b"\\200", b"-128")]
)
def test_a_char_travels_as_its_code(text: bytes, code: bytes) -> None:
    assert column(Style.CODE).encode([text, None]) == b"{" + code + b",NULL}"


def test_only_empty_values_of_pseudo_types_pass() -> None:
    assert column(Style.PSEUDO).encode([b"", None]) == b'{"",NULL}'
    with pytest.raises(BackgroundError) as raised:
        column(Style.PSEUDO).encode([b"(1)"])
    assert raised.value.report.sqlstate == "0A000"


def test_a_chunk_is_one_batch_unless_it_is_big() -> None:
    columns = (column(Style.PLAIN), column(Style.QUOTED))
    small = Chunk([[b"1", b"a"], [b"2", None]])
    assert list(results.encode_rows(small, columns)) == [Rows((b"{1,2}", b'{"a",NULL}'))]  # type: ignore[arg-type]
    wide = b"x" * 3_000_000
    big = Chunk([[b"%d" % row, wide] for row in range(5)])
    batches = list(results.encode_rows(big, columns))  # type: ignore[arg-type]
    assert [batch.columns[0] for batch in batches] == [b"{0,1}", b"{2}", b"{3,4}"]
    assert all(batch.size() < 8 * 1024 * 1024 for batch in batches)


def test_the_name_of_a_type_cannot_hold_the_place_of_the_schema() -> None:
    row = {"oid": 99999, "typmod": -1, "schema": "s", "name": '"a{schema}\\"', "array_name": "_a", "formatted": "x"}
    assert results._type_name(row).plain == 's.U&"a\\007Bschema}\\\\"'


# --- output settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "read"),
    [
        ("ISO, YMD", "ISO, YMD"),
        ("SQL, YMD", "SQL, MDY"),
        ("SQL, DMY", "SQL, DMY"),
        ("Postgres, YMD", "Postgres, MDY"),
        ("German, YMD", "German, DMY"),
        ("German, MDY", "German, DMY"),
    ],
)
def test_a_style_is_read_in_the_order_that_it_prints(printed: str, read: str) -> None:
    wanted = wanted_by_reader(Dependence(("DateStyle",)), {**ISO, "DateStyle": printed})
    assert wanted == {"DateStyle": read, "array_nulls": "on"}


def test_a_worker_prints_floats_with_all_digits() -> None:
    assert inherited({**ISO, "extra_float_digits": "-3"})["extra_float_digits"] == "1"
    assert inherited({**ISO, "extra_float_digits": "3"})["extra_float_digits"] == "3"


def test_a_time_zone_matters_only_where_its_abbreviation_is_printed() -> None:
    dependence = Dependence(("DateStyle", "TimeZone"))
    refuse_changed(dependence, ISO, {**ISO, "TimeZone": "UTC"})
    german = {**ISO, "DateStyle": "German, DMY"}
    with pytest.raises(BackgroundError, match="TimeZone"):
        refuse_changed(dependence, german, {**german, "TimeZone": "UTC"})
    assert "TimeZone" not in wanted_by_reader(dependence, ISO)
    assert wanted_by_reader(dependence, german)["TimeZone"] == "Europe/Berlin"
