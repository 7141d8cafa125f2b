"""units.py against the server: the same texts given to settings of its own, and the same answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pg_background.units import SettingError, Unit, parse_integer_setting

from tests.clusters import Cluster, Session


class Setting(NamedTuple):
    """A setting of the server's own that does no harm, whatever it is set to."""

    name: str
    unit: Unit
    low: int
    high: int


SETTINGS = [
    Setting("log_parameter_max_length_on_error", "B", -1, 2**30 - 1),
    Setting("lock_timeout", "ms", 0, 2**31 - 1),
    Setting("log_min_duration_statement", "ms", -1, 2**31 - 1),
    Setting("geqo_threshold", None, 2, 2**31 - 1),
    Setting("extra_float_digits", None, -15, 3),
]

_NUMBERS = [
    "0", "1", "3", "10", "010", "09", "0x10", "0X1f", "0x", "0x1.8", "0x1.8p3", "0x1p3", "1.5", "2.5",
    "0.5", ".5", "5.", "-1", "+7", "- 1", "-.5", "1e3", "1E3", "1e+2", "1e", "1e-1", "1e400", "1e-400",
    "1e-310", "0e-400", "2147483647", "2147483648", "-2147483649", "99999999999999999999",
    "077777777777777777777777", "0x7fffffff", "9223372036854775808", "inf", "nan", "30.1", "0.0004",
    "0.0005", "1_000", "e5", ".", "", "4194303.9",
]  # fmt: skip
_UNITS = [
    "",
    "B",
    "kB",
    "MB",
    "GB",
    "TB",
    "us",
    "ms",
    "s",
    "min",
    "h",
    "d",
    "KB",
    "S",
    "m",
    "days",
    "é",
    "x",
    "B B",
]
_BINARY = re.compile("0[bB][01]")  # a number where the server's C library says so
_SPACES = ["", "", " ", "\t", "\n", "\v", "  ", "\u00a0"]
texts = st.one_of(
    st.tuples(*map(st.sampled_from, (_SPACES, _NUMBERS, _SPACES, _UNITS, _SPACES))).map("".join),
    st.tuples(st.decimals(allow_nan=False, allow_infinity=False).map(str), st.sampled_from(_UNITS)).map("".join),
    st.tuples(st.floats(0, 1e6).map(str), st.sampled_from(_UNITS)).map("".join),
    st.text("0123456789xXeEpP.+- \tkMGTBusminhdf", max_size=12),
).filter(lambda text: not _BINARY.search(text))


@pytest.fixture(scope="module")
def session(cluster: Cluster) -> Iterator[Session]:
    session = cluster.connect(client_encoding="UTF8")
    yield session
    session.close()


def _by_server(session: Session, name: str, text: str) -> int | tuple[str | None, str | None]:
    """The value in the setting's base unit, or message and hint of the error."""
    try:
        session.execute("SELECT pg_catalog.set_config(%s, %s, false)", (name, text))
    except psycopg.errors.InvalidParameterValue as error:
        return error.diag.message_primary, error.diag.message_hint
    found = session.execute("SELECT setting FROM pg_catalog.pg_settings WHERE name = %s", (name,)).fetchone()
    assert found is not None
    return int(found[0])


def _by_us(setting: Setting, text: str) -> int | tuple[str | None, str | None]:
    try:
        return parse_integer_setting(setting.name, text, setting.unit, setting.low, setting.high)
    except SettingError as error:
        return error.message, error.hint


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@example(text="9" * 5000)
@example(text="0" * 5000 + "7")
def test_takes_and_refuses_what_the_server_does(session: Session, setting: Setting, text: str) -> None:
    theirs, ours = _by_server(session, setting.name, text), _by_us(setting, text)
    if session.info.server_version >= 170000 and isinstance(theirs, tuple) and isinstance(ours, tuple):
        # Later servers show the units of the limits too: only the hint can be compared.
        assert ours[1] == theirs[1]
    else:
        assert ours == theirs
