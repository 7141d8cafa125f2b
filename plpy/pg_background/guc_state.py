"""Reads what the server's SerializeGUCState writes: every setting that is not at its built-in default.

The server makes this state for its parallel workers. It is the one place that shows placeholders
(`myapp.tenant`) and SET LOCAL values along with everything else. An entry is: name, value and source file, each
ended by a NUL; the line, only where there is a file; source, context and, from 15 on, the role that set it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# enum GucSource: from here on a value comes from more than the configuration files and the command line.
SOURCE_GLOBAL = 5
SOURCE_OVERRIDE = 10

_SIZE = struct.Struct("@N")
_LINE = struct.Struct("=i")
_ROLE_SINCE_MAJOR = 15


class Setting(NamedTuple):
    """A setting's name and value (in the base unit, as set_config takes it), and how it came to it."""

    name: bytes
    value: bytes
    source: int  # enum GucSource
    context: int  # enum GucContext: what whoever set it was allowed to
    role: int  # oid of who set it; 0 before 15, which does not know


class GucStateError(ValueError):
    """The state does not have the layout that this version is known to write."""


def parse_guc_state(state: bytes, major: int) -> list[Setting]:
    """All entries of a serialized state, in the server's order; GucStateError unless it ends exactly there."""
    tail = struct.Struct("=iiI" if major >= _ROLE_SINCE_MAJOR else "=ii")
    settings = []
    position = _SIZE.size
    try:
        end = position + _SIZE.unpack_from(state)[0]
        while position < end:
            name, position = _text(state, position)
            value, position = _text(state, position)
            source_file, position = _text(state, position)
            if source_file:
                position += _LINE.size
            source, context, *role = tail.unpack_from(state, position)
            position += tail.size
            settings.append(Setting(name, value, source, context, role[0] if role else 0))
    except (struct.error, ValueError) as error:
        raise GucStateError(f"the serialized settings break off at byte {position}") from error
    if position != end or end > len(state):
        raise GucStateError(f"the serialized settings end at byte {position}, not at {end}")
    return settings


def _text(state: bytes, position: int) -> tuple[bytes, int]:
    end = state.index(b"\0", position)
    return state[position:end], end + 1
