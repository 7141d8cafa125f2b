"""Reads integer settings as PostgreSQL does: `16`, `64kB`, `1.5 min`, `0x40`, `1e3`.

The extension's settings are placeholders, that is, text which the server does not check. The rules here are
those of the server's own parse_int, down to what C's strtol and strtod take.
"""

from __future__ import annotations

import re
import sys
from typing import Literal, NamedTuple, Optional

Unit = Optional[Literal["B", "ms"]]

_INT_MIN, _INT_MAX = -(2**31), 2**31 - 1
_LONG_MIN, _LONG_MAX = -(2**63), 2**63 - 1
_LONG_DIGITS = 19

# C's isspace() in the C locale.
_SPACE = " \t\n\v\f\r"
# Group names are the base; octal digits that end early leave the rest, as strtol does: "0" and "9".
_STRTOL = re.compile(
    r"""[ \t\n\v\f\r]*
    (?P<sign> [-+]? )
    (?: 0[xX] (?P<hex> [0-9a-fA-F]+ ) | (?P<octal> 0[0-7]* ) | (?P<decimal> [1-9][0-9]* ) )
    """,
    re.VERBOSE,
)
_STRTOD = re.compile(
    r"""[ \t\n\v\f\r]*
    (?: [-+]? 0[xX] (?P<hex> [0-9a-fA-F]+ \.? [0-9a-fA-F]* ) (?: [pP][-+]?[0-9]+ )?
      | [-+]? (?P<decimal> [0-9]+ \.? [0-9]* | \.[0-9]+ ) (?: [eE][-+]?[0-9]+ )?
    )""",
    re.VERBOSE,
)


class _UnitTable(NamedTuple):
    multipliers: dict[str, float]  # each unit in base units, the largest first
    hint: str


_TABLES = {
    "B": _UnitTable(
        {"TB": 1024.0**4, "GB": 1024.0**3, "MB": 1024.0**2, "kB": 1024.0, "B": 1.0},
        'Valid units for this parameter are "B", "kB", "MB", "GB", and "TB".',
    ),
    "ms": _UnitTable(
        {"d": 86_400_000.0, "h": 3_600_000.0, "min": 60_000.0, "s": 1000.0, "ms": 1.0, "us": 1.0 / 1000},
        'Valid units for this parameter are "us", "ms", "s", "min", "h", and "d".',
    ),
}


class SettingError(ValueError):
    """The text of a setting is not valid (SQLSTATE 22023); says so in PostgreSQL's words."""

    def __init__(self, message: str, detail: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hint = hint


def parse_integer_setting(name: str, text: str, unit: Unit, low: int, high: int) -> int:
    """The number that `text` means for the setting `name`, in its base unit.

    `unit` is the base unit, which a bare number is in: "B" for bytes, "ms" for milliseconds, None for a
    setting that takes no unit. `low` and `high` are its limits, both allowed. Raises SettingError.
    """
    number, end = _leading_number(text)
    if number is None:
        raise _invalid(name, text)
    unit_text = text[end:].strip(_SPACE)
    if unit_text:
        if unit is None:
            raise _invalid(name, text)
        multipliers, hint = _TABLES[unit]
        if unit_text not in multipliers:
            raise _invalid(name, text, hint)
        number = _in_base_unit(number, unit_text, multipliers)
    rounded = _rint(number)
    if not _INT_MIN <= rounded <= _INT_MAX:
        raise _invalid(name, text, "Value exceeds integer range.")
    value = int(rounded)
    if not low <= value <= high:
        shown = f"{value} {unit}" if unit else str(value)
        raise SettingError(f'{shown} is outside the valid range for parameter "{name}" ({low} .. {high})')
    return value


def _invalid(name: str, text: str, hint: str | None = None) -> SettingError:
    return SettingError(f'invalid value for parameter "{name}": "{text}"', hint=hint)


def _leading_number(text: str) -> tuple[float | None, int]:
    """The number that `text` starts with, None if there is none, and the offset of its end.

    An integer first, which may be octal or hexadecimal; where that stops at a fraction or an exponent, or
    overflows, a float from the start again. So "010" is 8, but "010.5" is 10.5.
    """
    integer = _STRTOL.match(text)
    number = _long(integer) if integer else None
    end = integer.end() if integer else 0
    if text[end : end + 1] in (".", "e", "E") or (integer and number is None):
        decimal = _STRTOD.match(text)
        return (_double(decimal), decimal.end()) if decimal else (None, 0)
    return (None if number is None else float(number)), end


def _long(integer: re.Match[str]) -> int | None:
    """What strtol returns, or None where it sets ERANGE."""
    sign = -1 if integer["sign"] == "-" else 1
    if integer["decimal"] is None:
        number = sign * (int(integer["hex"], 16) if integer["hex"] else int(integer["octal"], 8))
    elif len(integer["decimal"]) > _LONG_DIGITS:
        return None
    else:
        number = sign * int(integer["decimal"])
    return number if _LONG_MIN <= number <= _LONG_MAX else None


def _double(decimal: re.Match[str]) -> float | None:
    """What strtod returns, or None where it sets ERANGE: on overflow, and on underflow too.

    One known difference: a hexadecimal fraction below 2^-1022 without a rounding error is 0 to the server.
    """
    text = decimal.group().strip(_SPACE)
    if decimal["hex"]:
        try:
            number = float.fromhex(text)
        except OverflowError:
            return None
    else:
        number = float(text)
    too_large = abs(number) > sys.float_info.max
    too_small = abs(number) < sys.float_info.min and (decimal["hex"] or decimal["decimal"]).strip("0.") != ""
    return None if too_large or too_small else number


def _in_base_unit(number: float, unit_text: str, multipliers: dict[str, float]) -> float:
    """The number in base units, rounded to the next smaller unit if there is one: 30.1GB to whole MB."""
    units = list(multipliers)
    in_base_unit = number * multipliers[unit_text]
    smaller = units[units.index(unit_text) + 1 :]
    if not smaller:
        return in_base_unit
    step = multipliers[smaller[0]]
    return _rint(in_base_unit / step) * step


def _rint(number: float) -> float:
    """C's rint(): halves go to the even neighbour; what is that large has no fraction."""
    return number if abs(number) >= 2.0**52 else float(round(number))
