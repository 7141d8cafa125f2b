"""Settings with units; tests/test_units_server.py holds them against the server's own."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background.units import SettingError, parse_integer_setting

INT_MAX = 2**31 - 1
NAME = "pg_background.some_setting"
MEMORY_HINT = 'Valid units for this parameter are "B", "kB", "MB", "GB", and "TB".'
TIME_HINT = 'Valid units for this parameter are "us", "ms", "s", "min", "h", and "d".'
MILLISECONDS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("16", None, 16),
        (" +16\n", None, 16),
        ("-1", None, -1),
        ("0x40", None, 64),
        ("010", None, 8),
        ("010.5", None, 10),
        ("1e3", None, 1000),
        (".5e1", None, 5),
        ("2.5", None, 2),
        ("3.5", None, 4),
        ("65536", "B", 65536),
        ("64kB", "B", 65536),
        ("64 kB ", "B", 65536),
        ("1.5kB", "B", 1536),
        ("0.001GB", "B", 1048576),
        ("0", "ms", 0),
        ("60s", "ms", 60_000),
        ("1.5 min", "ms", 90_000),
        ("1d", "ms", 86_400_000),
        ("1500us", "ms", 2),
        ("0.0004s", "ms", 0),
    ],
)
def test_reads_what_the_server_reads(text, unit, value):
    assert parse_integer_setting(NAME, text, unit, -1, INT_MAX) == value


@pytest.mark.parametrize(
    ("text", "unit", "hint"),
    [
        ("abc", None, None),
        ("", "ms", None),
        (" ", "B", None),
        ("16 workers", None, None),
        ("64kB", None, None),
        ("0x", None, None),
        (" .5", None, None),
        ("1e400", None, None),
        ("64KB", "B", MEMORY_HINT),
        ("64s", "B", MEMORY_HINT),
        ("1 m", "ms", TIME_HINT),
        ("1 min later", "ms", TIME_HINT),
        ("09", "ms", TIME_HINT),
        ("2147483648", None, "Value exceeds integer range."),
        ("3TB", "B", "Value exceeds integer range."),
        ("-1e30d", "ms", "Value exceeds integer range."),
        ("1e308TB", "B", "Value exceeds integer range."),
    ],
)
def test_refuses_in_the_servers_words(text, unit, hint):
    with pytest.raises(SettingError) as raised:
        parse_integer_setting(NAME, text, unit, 0, INT_MAX)
    assert raised.value.message == f'invalid value for parameter "{NAME}": "{text}"'
    assert raised.value.hint == hint
    assert raised.value.detail is None


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("5000", None, f'5000 is outside the valid range for parameter "{NAME}" (1 .. 1000)'),
        ("0", None, f'0 is outside the valid range for parameter "{NAME}" (1 .. 1000)'),
        ("1kB", "B", f'1024 B is outside the valid range for parameter "{NAME}" (1 .. 1000)'),
        ("-1s", "ms", f'-1000 ms is outside the valid range for parameter "{NAME}" (1 .. 1000)'),
    ],
)
def test_names_the_range(text, unit, message):
    with pytest.raises(SettingError) as raised:
        parse_integer_setting(NAME, text, unit, 1, 1000)
    assert raised.value.message == str(raised.value) == message
    assert raised.value.hint is None


@given(st.integers(-(2**31), INT_MAX))
def test_every_integer_reads_as_itself(number):
    for text in (str(number), f"{number:#x}", f"{number}.0"):
        assert parse_integer_setting(NAME, text, None, -(2**31), INT_MAX) == number


@given(st.integers(0, 20_000), st.sampled_from(sorted(MILLISECONDS)))
def test_whole_times_are_exact(number, unit):
    expected = number * MILLISECONDS[unit]
    if expected <= INT_MAX:
        assert parse_integer_setting(NAME, f"{number}{unit}", "ms", 0, INT_MAX) == expected


@given(st.integers(0, 999_999))
def test_halves_go_to_the_even_neighbour(thousandths):
    text = f"{thousandths / 1000:.3f}"
    assert parse_integer_setting(NAME, text, None, 0, INT_MAX) == round(Fraction(text))


@given(st.text(max_size=20), st.sampled_from([None, "B", "ms"]))
def test_any_text_gives_a_number_in_range_or_a_setting_error(text, unit):
    try:
        value = parse_integer_setting(NAME, text, unit, 1, 1000)
    except SettingError:
        return
    assert 1 <= value <= 1000
