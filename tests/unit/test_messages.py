"""Messages of the control socket: what is sent arrives, and garbage is told from it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background import messages

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a control connection, which do not wait."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


@given(st.lists(VALUES, max_size=5))
def test_what_is_sent_arrives(arguments: list[Any]) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        messages.send(left, ["kind", *arguments])
        received = messages.receive(right)
        assert received is not None
        assert received.message == ["kind", *arguments]
        assert received.descriptors == ()


@given(
    st.none() | st.text(),
    st.booleans(),
    st.text(max_size=120),
    st.none() | st.integers(0, 2**63),
    st.none() | st.integers(0, 9),
    st.integers(0, 3),
)
def test_a_jobs_packet_is_what_would_have_been_sent(
    label: str | None, submitted: bool, preview: str, start: int | None, tags: int | None, clean_ups: int
) -> None:
    announcement = messages.Announcement(
        2**62, 4711, 5, 16384, label, submitted, 65536, preview, 1_700_000_000_000_000, start, 86_400_000
    )
    told = messages.told_of_job(label, submitted, 65536, preview)
    packet = messages.job_packet(
        2**62, 4711, 5, 16384, told, 1_700_000_000_000_000, start, 86_400_000, 12345, tags, clean_ups
    )
    extras = {"clean_ups": clean_ups} if clean_ups else {}
    assert json.loads(packet) == [messages.JOB, list(announcement), 12345, tags, extras]


@given(st.integers(1, 2**63 - 1), st.none() | st.integers(0, 2**40))
def test_an_ends_packet_is_what_would_have_been_sent(key: int, rows: int | None) -> None:
    changes = {"state": "stopped", "command_tag": "INSERT 0 1", "row_count": rows}
    packet = messages.finished_packet(key, "INSERT 0 1", rows, 67890)
    assert json.loads(packet) == [messages.FINISHED, key, changes, 67890]


def test_descriptors_arrive_and_nothing_is_left_open(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    reader, writer = os.pipe()
    messages.send(left, ["kind"], writer)
    os.close(writer)
    received = messages.receive(right)
    assert received is not None
    (copy,) = received.descriptors
    os.write(copy, b"x")
    os.close(copy)
    assert os.read(reader, 2) == b"x"
    assert os.read(reader, 2) == b""  # nobody else holds the other end
    os.close(reader)


def test_a_message_that_is_too_long_is_shortened(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    messages.send(left, ["kind", {"error_message": "x" * 1_000_000, "key": 5}, ["y" * 600] * 2])
    received = messages.receive(right)
    assert received is not None
    assert received.message == ["kind", {"error_message": "x" * 500, "key": 5}, ["y" * 500] * 2]


@pytest.mark.parametrize("packet", [b"x", b"{}", b"[]", b"5", b"[" * 100_000, b'["kind"', b"\xff", b"null"])
def test_garbage_is_a_protocol_error(pair: tuple[socket.socket, socket.socket], packet: bytes) -> None:
    left, right = pair
    reader, writer = os.pipe()
    socket.send_fds(left, [packet], [writer])
    os.close(writer)
    with pytest.raises(messages.ProtocolError):
        messages.receive(right)
    assert os.read(reader, 1) == b""  # what came with it was closed
    os.close(reader)


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(packet: bytes) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(packet)
        try:
            received = messages.receive(right)
        except messages.ProtocolError:
            return
        assert received is not None
        assert isinstance(received.message, list)


def test_the_end_of_the_other_side_is_no_message(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    with pytest.raises(BlockingIOError):
        messages.receive(right)
    messages.send(left, ["last"])
    left.close()
    received = messages.receive(right)
    assert received is not None
    assert received.message == ["last"]
    assert messages.receive(right) is None


def test_all_that_has_come(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    for n in range(5):
        messages.send(left, ["progress", n])
    packets, gone = messages.receive_all(right, 3)
    assert (len(packets), gone) == (3, False)
    left.close()
    packets, gone = messages.receive_all(right, 30)
    assert (len(packets), gone) == (2, True)


def test_who_is_at_the_other_end(pair: tuple[socket.socket, socket.socket]) -> None:
    assert messages.peer_pid(pair[0]) == os.getpid()
