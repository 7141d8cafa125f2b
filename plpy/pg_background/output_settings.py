"""The settings that decide how a value looks as text, and which types each of them touches.

Rows travel as text. A value reads back as it was only under the settings it was written with; so a reader whose
settings have changed since the launch takes on the worker's while it reads, and what a job wrote after changing
them itself is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import FEATURE_NOT_SUPPORTED, background_error
from .results import (
    BOOL,
    CHAR,
    DATE,
    FLOAT4,
    FLOAT8,
    INT2,
    INT4,
    INT8,
    INTERVAL,
    NUMERIC,
    OID,
    TEXT,
    TIME,
    TIMESTAMP,
    TIMESTAMPTZ,
    TIMETZ,
    UUID,
    VOID,
    Column,
)

NAMES = ("DateStyle", "IntervalStyle", "TimeZone", "extra_float_digits", "lc_monetary", "search_path")

_BYTEA, _NAME, _JSON, _XML, _JSONB, _BPCHAR, _VARCHAR, _BIT, _VARBIT = 17, 19, 114, 142, 3802, 1042, 1043, 1560, 1562
_INET, _CIDR, _MACADDR, _MACADDR8, _MONEY, _PG_LSN = 869, 650, 829, 774, 790, 3220

# Types whose text is the same under all settings, or, as bytea's, says by itself how it is to be read.
_INDIFFERENT = frozenset(
    (BOOL, CHAR, INT2, INT4, INT8, OID, TEXT, NUMERIC, UUID, VOID, TIME, TIMETZ)
    + (_BYTEA, _NAME, _JSON, _XML, _JSONB, _BPCHAR, _VARCHAR, _BIT, _VARBIT)
    + (_INET, _CIDR, _MACADDR, _MACADDR8, _PG_LSN)
)
# Types that only these settings touch; a type in neither list may hold anything.
_TOUCHED_BY = {
    DATE: ("DateStyle",),
    TIMESTAMP: ("DateStyle",),
    TIMESTAMPTZ: ("DateStyle", "TimeZone"),
    INTERVAL: ("IntervalStyle",),
    FLOAT4: ("extra_float_digits",),
    FLOAT8: ("extra_float_digits",),
    _MONEY: ("lc_monetary",),
}

# One row with all of NAMES, in their order.
PROBE = b"SELECT " + b", ".join(b"pg_catalog.current_setting('%s')" % name.encode() for name in NAMES)


def touching(columns: Iterable[Column]) -> tuple[str, ...]:
    """The settings on which the text of these columns depends."""
    touched: set[str] = set()
    for column in columns:
        oid = column.type_oid
        if oid in _INDIFFERENT:
            continue
        touched.update(_TOUCHED_BY.get(oid, NAMES))
    return tuple(name for name in NAMES if name in touched)


def refuse_changed(columns: tuple[Column, ...], started: Mapping[str, str], ended: Mapping[str, str]) -> None:
    """0A000 when the job ended with other settings than it started with, and its values depend on them."""
    for name in touching(columns):
        if name == "extra_float_digits" and int(ended[name]) >= 1:
            continue
        if name == "TimeZone" and ended["DateStyle"].startswith("ISO"):
            continue
        if started[name] != ended[name]:
            raise background_error(
                FEATURE_NOT_SUPPORTED,
                f"the background worker changed {name}, on which its result depends",
                detail=f'It was "{started[name]}" and became "{ended[name]}".',
                hint="Change the setting in the session that launches the worker, or cast the columns to text.",
            )
