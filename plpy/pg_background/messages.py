"""What travels on the control socket between sessions, workers and the supervisor: one definition for both ends.

A message is one packet of a SOCK_SEQPACKET unix socket: a JSON array whose first element is its kind, with file
descriptors beside it where the kind says so. Both ends are backends of one server and run as one operating system
user; nobody else can reach the socket, which lies in the data directory.
"""

from __future__ import annotations

import array
import fcntl
import json
import json.encoder
import os
import socket
import struct
import termios
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from . import progress

# session -> supervisor
HELLO = "hello"  # digest of the sender's runtime
# Announcement, time.monotonic_ns() before the job is sent, number of command tags with which it has committed or null,
# extras; with the worker's socket, once for each connection
JOB = "job"
# Announcement, extras; with the worker's socket as JOB, and a file in memory that holds deferral.Packet
DEFER = "defer"
FINISHED = "finished"  # key, changed columns of its row, time.monotonic_ns() after the end
# worker pid, number of the clean-up's answers: the session lets go, the supervisor reads to the end. With a clean-up
# it tells of both ends, as for a submitted job, and the connection is used again.
DETACH = "detach"
CLOSED = "closed"  # worker pid: the connection is no more
WRITING = "writing"  # worker pid, whether: while true, the job has not been sent whole
MOVED_ON = "moved on"  # this link's workers are another supervisor's now
FIND = "find"  # request, pid, cookie -> REPLY with the row or null
WAIT = "wait"  # request, pid, cookie -> REPLY when it has ended, with the row or null
WAITS_FOR = "waits for"  # request, worker pid -> REPLY with all such [session pid, worker pid]; null, null: no more
FORGET = "forget"  # request: its WAIT has been given up
CANCEL = "cancel"  # request, pid, cookie, grace in ms or null -> REPLY at once

# worker -> supervisor: defined where they are sent from, as that module stands alone
AM_I_WORKER = progress.AM_I_WORKER
PROGRESS = progress.PROGRESS
socket_path = progress.socket_path

# supervisor -> the supervisor that came after it
RECORD = "record"  # row that the sender cannot write any more; sessions send it too, of jobs that have ended meanwhile

# supervisor -> session
WELCOME = "welcome"
OTHER_RUNTIME = "other runtime"  # in place of WELCOME: this supervisor makes room for a newer one
ENDED = "ended"  # the fields of Ended
# worker pid, key, time.monotonic() of its termination or null: a session has asked the worker to stop
CANCELING = "canceling"
MOVED = "moved"  # another supervisor will take over: connect anew
NO_DESCRIPTOR = "no descriptor"  # this supervisor may not open more files; the connection ends
REPLY = "reply"  # request, value

# In place of a clean-up's answer: a deferred job has ended without having been sent.
NOT_RUN: list[str | None] = ["not run"]

# What both ends say of a job that the server was made to stop.
TIMED_OUT = "canceling background worker due to pg_background.worker_timeout"
TERMINATED = "the background worker was terminated, as it had not stopped within the grace period of its cancel"

_MAX_BYTES = 1 << 17
_SHORTENED_CHARACTERS = 500  # of each text in a message that is longer than that
_EPOCH = datetime.fromtimestamp(0, timezone.utc)
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


_decode = json.JSONDecoder().raw_decode  # decode() also looks for white space around, of which ours has none


def _encoder() -> Callable[[Any], str]:
    """As JSONEncoder.encode, which sets up its C part anew for every value; that takes longer than to encode ours."""
    encoder = json.JSONEncoder(separators=(",", ":"))
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return encoder.encode
    chunks = make(None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return lambda value: "".join(chunks(value, 0))


_encode = _encoder()
# As integers: with the socket module's flags, which are enums, an "and" takes longer than the system call.
_RECEIVED_IN_PART, _DESCRIPTORS_LOST = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)
NO_SIGNAL, _CLOSE_ON_EXEC = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC)
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * array.array("i").itemsize)


# SQLSTATE of a job that was not to run, as its transaction was rolled back.
ROLLED_BACK = "40000"


class ProtocolError(Exception):
    """A packet that is no message."""


class DescriptorsLostError(ProtocolError):
    """The receiving process may not open as many files as were sent."""


class Announcement(NamedTuple):
    """A job as the session knows it that starts it: what its row begins with. An array on its way."""

    key: int
    pid: int
    cookie: int
    role_oid: int
    label: str | None
    submitted: bool
    queue_size: int
    sql_preview: str
    launched_us: int  # since the epoch
    process_start: int | None
    history_ms: int

    def row(self) -> dict[str, Any]:
        """The row (see store.COLUMNS)."""
        row = self._asdict()
        row["launched_at"] = moment(row.pop("launched_us")).isoformat()
        row["state"] = "running"
        row["consumed"] = False
        return row


def moment(microseconds: int) -> datetime:
    """So long after the epoch, in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


class Ended(NamedTuple):
    """What a session is told of the end of a job that the supervisor reads, or of the clean-up behind it."""

    pid: int
    key: int
    changes: dict[str, Any] | None  # in the columns of its row; None where they were told before
    clean_up: list[str | None] | None  # its answer; None where that is still to come
    reports: Mapping[str, str | None] = {}  # with a clean-up: what has become of settings

    def message(self) -> list[Any]:
        """As it is sent."""
        return [ENDED, *self]


def told_of_job(label: str | None, submitted: bool, queue_size: int, preview: str) -> str:
    """The fields of an Announcement that are the same each time that a job is run, as job_packet() takes them."""
    return _encode([label, submitted, queue_size, preview])[1:-1]


def job_packet(
    key: int,
    pid: int,
    cookie: int,
    role_oid: int,
    told: str,
    launched_us: int,
    process_start: int | None,
    history_ms: int,
    started_ns: int,
    tags_of_commit: int | None,
    clean_ups: int,
) -> bytes:
    """JOB as send() would send it, with no extras but clean_ups: most launches send that, and nothing is quicker."""
    start = "null" if process_start is None else process_start
    tags = "null" if tags_of_commit is None else tags_of_commit
    extras = f'{{"clean_ups":{clean_ups}}}' if clean_ups else "{}"
    announcement = f"{key},{pid},{cookie},{role_oid},{told},{launched_us},{start},{history_ms}"
    return f'["{JOB}",[{announcement}],{started_ns},{tags},{extras}]'.encode()


def finished_packet(key: int, tag: str, rows: int | None, ended_ns: int) -> bytes:
    """FINISHED as send() would send it, for a job that has ended well; the tag is a plain one (wire.lone_tag)."""
    count = "null" if rows is None else rows
    changes = f'{{"state":"stopped","command_tag":"{tag}","row_count":{count}}}'
    return f'["{FINISHED}",{key},{changes},{ended_ns}]'.encode()


class Received(NamedTuple):
    """A message, the descriptors that came with it, and the bytes that it took on its way."""

    message: list[Any]
    descriptors: tuple[int, ...]
    size: int


def control_socket() -> socket.socket:
    """A new, unconnected socket of the right kind."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def peer_pid(connection: socket.socket) -> int:
    """Who is at the other end, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid: int = _PEER_CREDENTIALS.unpack(credentials)[0]
    return pid


def bytes_unread(connection: socket.socket) -> int:
    """Of all messages that have come."""
    number = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, number)
    return number[0]


def send(connection: socket.socket, message: list[Any], *descriptors: int) -> None:
    """Send a message whole. BlockingIOError where it would wait, OSError where nobody is there."""
    packet = _encode(message).encode()
    if len(packet) > _MAX_BYTES:
        packet = _encode(_shortened(message)).encode()
    if not descriptors:
        connection.send(packet, NO_SIGNAL)
    else:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        connection.sendmsg([packet], [rights], NO_SIGNAL)


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_SHORTENED_CHARACTERS]
    if isinstance(value, dict):
        return {name: _shortened(part) for name, part in value.items()}
    return [_shortened(part) for part in value] if isinstance(value, (list, tuple)) else value


def receive(connection: socket.socket) -> Received | None:
    """The next message; None when the other end is gone. BlockingIOError when there is none yet."""
    try:
        packet, ancillary, flags, _ = connection.recvmsg(_MAX_BYTES, _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
    except ConnectionResetError:
        # Told once, before what lies unread, where the other end closed with something unread.
        packet, ancillary, flags, _ = connection.recvmsg(_MAX_BYTES, _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
    if not packet:
        return None
    descriptors = _descriptors_of(ancillary) if ancillary else ()
    try:
        return Received(_message_in(packet, flags), descriptors, len(packet))
    except (ValueError, RecursionError, ProtocolError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(str(error)) from error


def _message_in(packet: bytes, flags: int) -> list[Any]:
    if flags & _DESCRIPTORS_LOST:
        raise DescriptorsLostError("descriptors lost")
    text = packet.decode()
    message, end = _decode(text)
    if flags & _RECEIVED_IN_PART or end != len(text) or not isinstance(message, list) or not message:
        raise ProtocolError("truncated, or no array")
    return message


def _descriptors_of(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return tuple(descriptors)


def receive_all(connection: socket.socket, limit: int) -> tuple[list[bytes], bool]:
    """Up to `limit` packets that carry no descriptors, undecoded, and whether the other end is gone."""
    packets: list[bytes] = []
    try:
        while len(packets) < limit:
            packet = connection.recv(_MAX_BYTES)
            if not packet:
                return packets, True
            packets.append(packet)
    except BlockingIOError:
        return packets, False
    except OSError:
        return packets, True
    return packets, False
