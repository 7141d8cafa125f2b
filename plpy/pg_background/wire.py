"""Reads a worker's answers off its socket, without libpq: for the supervisor, which wants outcomes only.

An answer is a group of messages of PostgreSQL's protocol that ends with ReadyForQuery. Rows are thrown away.
"""

from __future__ import annotations

import re
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

_HEADER = struct.Struct("!cI")
_TYPES = frozenset(bytes((code,)) for code in b"123ACDEGHIKNRSTVWcdnstvZ")
_MAX_MESSAGE = 1 << 30
READY_FOR_QUERY = b"Z\0\0\0\5I"
_ENDINGS = tuple(b"Z\0\0\0\5" + status for status in (b"I", b"T", b"E"))

# After one of these a command tag before it is not the last one.
_NEXT_STATEMENT = b"TDCEI"
# The only row that is looked at is the clean-up's.
_KEPT_ROW_BYTES = 256
# Longer messages are not waited for until they are there whole.
_MAX_WHOLE_BYTES = 1 << 15
_MAX_REPORT_BYTES = 1 << 13

# As integers: the socket module's are enums, which take their time.
PEEK, _DO_NOT_WAIT = int(socket.MSG_PEEK), int(socket.MSG_DONTWAIT)

TERMINATE = b"X\0\0\0\4"
EMPTY_ANSWER = b"I\0\0\0\4" + READY_FOR_QUERY  # to an empty query

# Fields of an ErrorResponse or NoticeResponse.
FIELD_CODES = {
    "sqlstate": ord("C"),
    "message": ord("M"),
    "detail": ord("D"),
    "hint": ord("H"),
    "context": ord("W"),
    "schema_name": ord("s"),
    "table_name": ord("t"),
    "column_name": ord("c"),
    "datatype_name": ord("d"),
    "constraint_name": ord("n"),
}
_FIELD_NAMES = {code: name for name, code in FIELD_CODES.items()}

# A column of a RowDescription, behind its name: table, its column, type, its length, typmod, format.
_FIELD = struct.Struct("!IhIhih")
# CommandComplete and ReadyForQuery, in the extended protocol behind what says that there are no rows.
_LONE_TAG = re.compile(
    rb"(?:1\x00\x00\x00\x042\x00\x00\x00\x04n\x00\x00\x00\x04)?"
    rb"C\x00\x00\x00.([A-Z0-9 ]{1,64})\x00Z\x00\x00\x00\x05I",
    re.DOTALL,
)


def query_message(sql: bytes) -> bytes:
    """A simple-protocol Query."""
    return b"Q" + struct.pack("!I", len(sql) + 5) + sql + b"\0"


def call_message(function_oid: int, argument: bytes) -> bytes:
    """A call of a function of one argument by its oid, which no name can bend; its answer is a group as well."""
    body = struct.pack("!IHHi", function_oid, 0, 1, len(argument)) + argument + struct.pack("!H", 0)
    return b"F" + struct.pack("!I", len(body) + 4) + body


def bound_query_messages(sql: bytes, parameters: Sequence[bytes | None], *, describe: bool) -> bytes:
    """The extended protocol's Parse, Bind, Execute and Sync for one statement; its answer is a group as well.

    describe: the answer is to tell the columns of the rows, as that to a Query does.
    """
    values = b"".join(
        [struct.pack("!i", -1) if value is None else struct.pack("!i", len(value)) + value for value in parameters]
    )
    messages = (
        (b"P", b"\0" + sql + b"\0" + struct.pack("!H", 0)),
        (b"B", b"\0\0" + struct.pack("!HH", 0, len(parameters)) + values + struct.pack("!H", 0)),
        *([(b"D", b"P\0")] if describe else []),
        (b"E", b"\0" + struct.pack("!i", 0)),
        (b"S", b""),
    )
    return b"".join([kind + struct.pack("!I", len(body) + 4) + body for kind, body in messages])


# What has become of settings, a character for a byte; None: longer than libpq takes it.
Reports = Mapping[str, Optional[str]]
NO_REPORTS: Reports = {}


class Answer:
    """What matters of a group of messages: its last command tags, its error, its last row."""

    def __init__(self) -> None:
        self.tag: bytes | None = None
        self.tag_before: bytes | None = None
        self.tags = 0  # how many, as far as was read
        self.error: bytes | None = None
        self.row: bytes | None = None
        self.complete = False
        self.reports: Reports = {}

    def take(self, kind: bytes, body: bytes) -> None:
        """Note one message of the group."""
        if kind == b"C":
            self.tag_before, self.tag = self.tag, body.rstrip(b"\0")
        elif kind == b"E" and self.error is None:
            self.error = body
        elif kind == b"D":
            self.row = body
        elif kind == b"V":
            self.row = _row_of(body[4:].split(b","))
        elif kind == b"S":
            self.reports = {**self.reports, **report(body)}
        elif kind == b"Z":
            self.complete = True

    def without_error(self) -> Answer:
        """The same, but as if it had ended well."""
        answer = Answer()
        answer.tag, answer.tag_before, answer.row, answer.complete = self.tag, self.tag_before, self.row, self.complete
        return answer


class Position(NamedTuple):
    """How far a window of bytes was understood: `consumed` bytes may go, `skip` more are of a row to throw away."""

    consumed: int
    skip: int


def parse(window: bytes, answer: Answer) -> Position:
    """Read messages from a window that starts at a message, until the group ends or the window does.

    A command tag that may be the last one, or an error, does not count as consumed before the group is complete:
    were this process to end here, its successor would still find it in the socket.
    """
    position, end = 0, len(window)
    verdict: int | None = None  # where that tag or error starts
    tags = answer.tag_before, answer.tag  # without that
    while end - position >= _HEADER.size:
        kind, length = _HEADER.unpack_from(window, position)
        following = position + 1 + length
        if kind in _NEXT_STATEMENT and answer.error is None:
            answer.tags += verdict is not None
            verdict = None
        if following > end:
            if kind == b"D" and verdict is None:
                return Position(end, following - end)
            if length > _MAX_WHOLE_BYTES and end - position > _MAX_WHOLE_BYTES:
                # More than a socket may hold: its start must do.
                answer.take(kind, window[position + 5 : end])
                return Position(end, following - end)
            break
        if kind == b"C":
            tags = answer.tag_before, answer.tag
        if kind != b"D" or length < _KEPT_ROW_BYTES:
            answer.take(kind, window[position + 5 : following])
        if kind in b"CE" and verdict is None:
            verdict = position
        position = following
        if kind == b"Z":
            answer.tags += verdict is not None and answer.error is None
            return Position(position, 0)
    if verdict is not None and answer.error is None:
        answer.tag_before, answer.tag = tags  # it is read again
    return Position(position if verdict is None else verdict, 0)


def report(body: bytes) -> Reports:
    """A setting and its new value in a ParameterStatus, of which this may be the start only."""
    name, _, rest = body.decode("latin-1").partition("\0")
    value, end, _ = rest.partition("\0")
    return {name: value if end and len(value) <= _MAX_REPORT_BYTES else None}


def reports_in(answers: bytes) -> Reports:
    """The last value of each setting that whole answers tell of."""
    if b"S\0\0" not in answers:
        return {}
    reports: dict[str, str | None] = {}
    for kind, body in _messages(answers, 0) or ():
        if kind == b"S":
            reports.update(report(body))
    return reports


def report_message(name: str, value: str) -> bytes:
    """A ParameterStatus."""
    body = f"{name}\0{value}\0".encode("latin-1")
    return b"S" + struct.pack("!I", len(body) + 4) + body


def last_answer(
    tail: bytes, groups_after: int = 0, tags_after: int = 0, tags_of_commit: int | None = None
) -> Answer | None:
    """The answer that a stream's tail ends with, or the one `groups_after` groups before; None if it is not there.

    The tail may start anywhere. Messages are found backwards: a command tag or an error from which message follows
    message exactly to the end. tags_after: how many command tags of the group are not the job's. tags_of_commit: so
    many are looked for before an error that says that the backend was interrupted.
    A stream that ends with an error, and not with a ReadyForQuery, is that of a backend that was terminated.
    """
    last = _messages(tail, max(0, tail.rfind(b"E\0\0")))
    if last and len(last) == 1 and last[0][0] == b"E":
        before = tail[: tail.rfind(b"E\0\0")]
        if before.endswith(_ENDINGS):
            tail = before  # between two queries
        else:
            groups_after = 0
    found = _Backwards(groups_after, tags_after, tags_of_commit)
    start = len(tail)
    places = {mark: tail.rfind(mark) for mark in (b"C\0\0\0", b"E\0\0", b"I\0\0\0\4")}
    while not found.enough and (position := max(places.values())) >= 0:
        earlier = _messages(tail, position, start)
        if earlier is None:
            earlier = _messages(tail, position)
            if earlier is not None:  # what looked like a message was the inside of a row
                found = _Backwards(groups_after, tags_after, tags_of_commit)
        if earlier is not None:
            start = position
            found.take(earlier)
        places = {mark: tail.rfind(mark, 0, position) if place == position else place for mark, place in places.items()}
    return found.answer()


class _Backwards:
    """A group of messages that is put together from its end."""

    def __init__(self, groups_after: int, tags_after: int, tags_of_commit: int | None) -> None:
        self._groups_after = groups_after
        self._tags_after = tags_after
        self._tags_of_commit = tags_of_commit or 0
        self._ends = 0  # ReadyForQuerys so far
        self._is_cut: int | None = None  # 1 where none ends the stream
        self._group: list[tuple[bytes, bytes]] = []  # the last message first
        self._tags = 0
        self._empties = 0  # answers to empty queries
        self._error: bytes | None = None
        self.enough = False

    def take(self, messages: list[tuple[bytes, bytes]]) -> None:
        """Messages that come before those that were taken."""
        for kind, body in reversed(messages):
            if self._is_cut is None:
                self._is_cut = int(kind != b"Z")
            self._ends += kind == b"Z"
            groups_after = self._ends - 1 + self._is_cut
            if groups_after > self._groups_after:
                self.enough = True
                return
            if groups_after == self._groups_after:
                self._group.append((kind, body))
                if kind == b"E":
                    self._error = body
                self._tags += kind == b"C"
                self._empties += kind == b"I"
        if self._error is None:
            # A group that breaks off has ended well only if its commit is among what has come.
            breaks_off = self._is_cut == 1 and not self._ends and self._tags < self._tags_of_commit
            self.enough = self._tags + self._empties > self._tags_after and not breaks_off
        else:
            interrupted = b"C57014\0" in self._error or b"C57P01\0" in self._error
            self.enough = not interrupted or self._tags >= self._tags_of_commit

    def answer(self) -> Answer | None:
        """The group's; None where the stream does not go back so far."""
        if not self._group:
            return None
        answer = Answer()
        for kind, body in reversed(self._group):
            answer.take(kind, body)
        answer.tags = self._tags
        return answer


def _messages(tail: bytes, position: int, end: int | None = None) -> list[tuple[bytes, bytes]] | None:
    """The messages from a position exactly to the end; None if they do not fit."""
    messages = []
    end = len(tail) if end is None else end
    while position < end:
        if end - position < _HEADER.size:
            return None
        kind, length = _HEADER.unpack_from(tail, position)
        following = position + 1 + length
        if kind not in _TYPES or not 4 <= length <= _MAX_MESSAGE or following > end:
            return None
        messages.append((kind, tail[position + 5 : following]))
        position = following
    return messages


def whole_messages(window: bytes) -> tuple[list[tuple[bytes, bytes]], int, int]:
    """The messages of a group that stand whole in a window, which starts at one, and where the next would start.

    Also how many bytes that one lacks, as far as can be told. ValueError for what is no message.
    """
    messages = []
    position, end, missing = 0, len(window), 0
    while end - position >= _HEADER.size:
        kind, length = _HEADER.unpack_from(window, position)
        if kind not in _TYPES or not 4 <= length <= _MAX_MESSAGE:
            raise ValueError(f"no message starts with {window[position : position + _HEADER.size]!r}")
        following = position + 1 + length
        if following > end:
            missing = following - end
            break
        messages.append((kind, window[position + 5 : following]))
        position = following
        if kind == b"Z":
            break
    return messages, position, missing


# Matches an answer that is nothing but a command tag, whose text is the first group; None for any other.
lone_tag = _LONE_TAG.match


class Field(NamedTuple):
    """A column of a RowDescription."""

    name: bytes
    type_oid: int
    typmod: int


def row_description(body: bytes) -> list[Field]:
    """The columns that a RowDescription tells."""
    fields = []
    position = 2
    for _ in range(struct.unpack_from("!H", body)[0]):
        name_end = body.index(b"\0", position)
        _, _, type_oid, _, typmod, _ = _FIELD.unpack_from(body, name_end + 1)
        fields.append(Field(body[position:name_end], type_oid, typmod))
        position = name_end + 1 + _FIELD.size
    return fields


def error_fields(body: bytes, names: Mapping[int, str] = _FIELD_NAMES) -> dict[str, bytes]:
    """The fields of an ErrorResponse or NoticeResponse, by these names."""
    fields = {}
    for field in body.split(b"\0"):
        name = names.get(field[0]) if field else None
        if name is not None:
            fields[name] = field[1:]
    return fields


def _row_of(values: list[bytes]) -> bytes:
    """A DataRow, of the texts that a function call has returned with commas between them."""
    return struct.pack("!H", len(values)) + b"".join([struct.pack("!i", len(value)) + value for value in values])


def row_values(body: bytes) -> list[bytes | None]:
    """The values of a DataRow."""
    values: list[bytes | None] = []
    position = 2
    for _ in range(struct.unpack_from("!H", body)[0]):
        length = struct.unpack_from("!i", body, position)[0]
        position += 4
        values.append(None if length < 0 else body[position : position + length])
        position += max(0, length)
    return values


def row_count(tag: str) -> int | None:
    """The number of rows that a command tag tells; None where it tells none."""
    last = tag.rpartition(" ")[2]
    return int(last) if last.isdecimal() and last.isascii() else None


def receive_from(connection: socket.socket, size: int, flags: int) -> bytes | None:
    """Bytes from a worker; None when there are none yet, b"" at the end of the connection."""
    try:
        return connection.recv(size, flags | _DO_NOT_WAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def has_no_more(connection: socket.socket, size: int) -> bool:
    """Whether the other end has gone, and nothing lies unread but so many bytes."""
    return hung_up(connection) and len(receive_from(connection, size + 1, PEEK) or b"") == size


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end has gone."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))
