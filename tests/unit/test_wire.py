"""Reading a worker's answers off its socket: whatever a stream holds, and wherever it is cut."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background import wire


def message(kind: bytes, body: bytes = b"") -> bytes:
    """A message of the protocol."""
    return kind + struct.pack("!I", len(body) + 4) + body


def data_row(values: list[bytes | None]) -> bytes:
    """A DataRow."""
    fields = [struct.pack("!i", -1) if v is None else struct.pack("!i", len(v)) + v for v in values]
    return message(b"D", struct.pack("!H", len(values)) + b"".join(fields))


def tag(text: bytes) -> bytes:
    """A CommandComplete."""
    return message(b"C", text + b"\0")


def error(sqlstate: bytes, text: bytes) -> bytes:
    """An ErrorResponse."""
    return message(b"E", b"SERROR\0VERROR\0C" + sqlstate + b"\0M" + text + b"\0\0")


READY = message(b"Z", b"I")
TEXTS = st.binary(max_size=300).map(lambda text: text.replace(b"\0", b""))
TAGS = st.sampled_from([b"SELECT 1", b"INSERT 0 5", b"DO", b"VACUUM", b"DISCARD ALL"])
ROWS = st.lists(st.none() | st.binary(max_size=400), max_size=4).map(data_row)
NOTICES = TEXTS.map(lambda text: message(b"N", b"SNOTICE\0M" + text + b"\0\0"))
STATEMENTS = st.tuples(st.lists(ROWS | NOTICES, max_size=6), TAGS)
JOBS = st.tuples(st.lists(STATEMENTS, min_size=1, max_size=4), st.none() | TEXTS)


def stream_of(job: tuple[list[tuple[list[bytes], bytes]], bytes | None]) -> bytes:
    """All that a worker sends for a job: statements, an error in place of the last tag perhaps, ReadyForQuery."""
    statements, failure = job
    parts = []
    for rows, text in statements:
        parts += [message(b"T", b"\0\0"), *rows, tag(text)]
    if failure is not None:
        parts[-1] = error(b"22012", failure)
    return b"".join(parts) + READY


def read_in_pieces(stream: bytes, cuts: list[int]) -> tuple[wire.Answer, int]:
    """As the supervisor reads: looks at what has come so far, and takes what was understood."""
    answer, taken, skip = wire.Answer(), 0, 0
    for arrived in sorted({*(cut % (len(stream) + 1) for cut in cuts), len(stream)}):
        while taken < arrived and not answer.complete:
            if skip:
                thrown = min(skip, arrived - taken)
                skip, taken = skip - thrown, taken + thrown
                continue
            position = wire.parse(stream[taken:arrived], answer)
            taken, skip = taken + position.consumed, position.skip
            if not position.consumed:
                break
    return answer, taken


@given(JOBS, st.lists(st.integers(0, 10_000), max_size=8))
def test_the_outcome_does_not_depend_on_how_a_stream_is_cut(job: tuple, cuts: list[int]) -> None:  # type: ignore[type-arg]
    statements, failure = job
    stream = stream_of(job)
    answer, taken = read_in_pieces(stream, cuts)
    assert answer.complete
    assert taken == len(stream)
    if failure is None:
        assert answer.error is None
        assert answer.tag == statements[-1][1]
        assert answer.tag_before == (statements[-2][1] if len(statements) > 1 else None)
        assert answer.tags == len(statements)
    else:
        assert answer.error is not None
        assert answer.tags == len(statements) - 1
        assert wire.error_fields(answer.error)["sqlstate"] == b"22012"
        assert wire.error_fields(answer.error)["message"] == failure


@given(JOBS, st.integers(0, 10_000))
def test_a_verdict_stays_in_the_socket_until_the_answer_is_whole(job: tuple, cut: int) -> None:  # type: ignore[type-arg]
    """Were the supervisor to end in the middle, its successor would have to find it there."""
    stream = stream_of(job)
    cut %= len(stream)
    answer = wire.Answer()
    position = wire.parse(stream[:cut], answer)
    assert not answer.complete
    rest = wire.Answer()
    if not position.skip:
        assert wire.parse(stream[position.consumed :], rest).consumed == len(stream) - position.consumed
        assert (rest.tag, rest.error) == (job[0][-1][1], None) if job[1] is None else rest.error is not None


@given(JOBS, st.lists(JOBS, max_size=2))
def test_the_outcome_is_found_from_a_streams_tail(job: tuple, later: list) -> None:  # type: ignore[type-arg]
    clean_ups = [([([], b"DISCARD ALL")], None), ([([data_row([b"x"])], b"SELECT 1")], None)]
    stream = stream_of(job) + b"".join(map(stream_of, clean_ups))  # type: ignore[arg-type]
    answer = wire.last_answer(stream, groups_after=2)
    assert answer is not None
    if job[1] is None:
        assert (answer.tag, answer.error) == (job[0][-1][1], None)
    else:
        assert answer.error is not None


@given(JOBS, st.booleans())
def test_tags_before_an_error_are_found_from_a_streams_tail(job: tuple, terminated: bool) -> None:  # type: ignore[type-arg]
    """A backend that is terminated in its commit may have told of it already."""
    statements, _ = job
    stream = stream_of((statements, None)).removesuffix(READY) + error(b"57P01", b"terminating")
    answer = wire.last_answer(stream if terminated else stream + READY, 0, 0, len(statements))
    assert answer is not None
    assert answer.error is not None
    assert answer.tags == len(statements)


def test_an_end_between_two_queries_does_not_change_the_outcome() -> None:
    answer = wire.last_answer(tag(b"INSERT 0 1") + READY + error(b"57P01", b"terminating"), 0, 0, 1)
    assert answer is not None
    assert (answer.tag, answer.error) == (b"INSERT 0 1", None)


def test_the_clean_ups_answer_is_known_as_such_where_the_job_is_probed() -> None:
    answer = wire.last_answer(tag(b"DISCARD ALL") + READY + tag(b"SELECT 1") + READY, 1, 1)
    assert answer is not None
    assert (answer.tag_before, answer.tag) == (None, b"DISCARD ALL")


@pytest.mark.parametrize("groups_after", [0, 2])
def test_a_long_stream_is_read_from_its_end_in_linear_time(groups_after: int) -> None:
    stream = tag(b"INSERT 0 1") * 10_000 + error(b"57014", b"canceling") + READY
    started = time.monotonic()
    answer = wire.last_answer(stream, groups_after, 0, 20_000)
    assert time.monotonic() - started < 1
    assert (answer is None) == bool(groups_after)
    if answer is not None:
        assert answer.tags == 10_000


@given(st.lists(st.none() | st.binary(max_size=50), max_size=20))
def test_values_of_a_row(values: list[bytes | None]) -> None:
    assert wire.row_values(data_row(values)[5:]) == values


@given(st.binary(max_size=2000))
def test_garbage_is_no_outcome_and_no_crash(window: bytes) -> None:
    position = wire.parse(window, wire.Answer())
    assert 0 <= position.consumed <= len(window)
    wire.last_answer(window)


@given(st.binary(max_size=100), st.lists(st.none() | st.binary(max_size=50), max_size=5), st.booleans())
def test_a_bound_query_is_four_messages(sql: bytes, parameters: list[bytes | None], describe: bool) -> None:
    """Five where it is to tell the columns."""
    packet = wire.bound_query_messages(sql, parameters, describe=describe)
    kinds = [kind for kind, _ in _messages_of(packet)]
    assert kinds == ([b"P", b"B", b"D", b"E", b"S"] if describe else [b"P", b"B", b"E", b"S"])


def _messages_of(packet: bytes) -> list[tuple[bytes, bytes]]:
    messages = []
    while packet:
        length = struct.unpack_from("!I", packet, 1)[0]
        messages.append((packet[:1], packet[5 : 1 + length]))
        packet = packet[1 + length :]
    return messages


_NO_ROWS = message(b"1") + message(b"2") + message(b"n")


@pytest.mark.parametrize("before", [b"", _NO_ROWS], ids=["simple", "extended"])
@given(behind=st.binary(max_size=50))
def test_a_lone_tag_is_told_from_what_follows_it(before: bytes, behind: bytes) -> None:
    answer = before + tag(b"INSERT 0 1") + READY
    found = wire.lone_tag(answer + behind)
    assert found is not None
    assert (found.group(1), found.end()) == (b"INSERT 0 1", len(answer))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        tag(b"INSERT 0 1"),
        tag(b"INSERT 0 1") + READY[:-1],
        tag(b"INSERT 0 1") + message(b"Z", b"T"),
        message(b"N", b"SNOTICE\0\0") + tag(b"INSERT 0 1") + READY,
        data_row([b"1"]) + tag(b"SELECT 1") + READY,
        tag(b"INSERT 0 1") * 2 + READY,
        tag(b'"quoted"') + READY,
        error(b"22012", b"division by zero") + READY,
    ],
)
def test_any_other_answer_is_no_lone_tag(answer: bytes) -> None:
    assert wire.lone_tag(answer) is None


_CHUNKS = st.lists(
    st.sampled_from([b"C", b"D", b"N", b"E", b"S", b"1"]).flatmap(
        lambda kind: st.binary(max_size=30).map(lambda body: (kind, body))
    ),
    max_size=6,
)


@given(_CHUNKS, st.data())
def test_whole_messages_are_those_that_have_come_to_their_ends(
    sent: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    """Whatever has come of the next one, and never beyond the end of the group."""
    sent = [*sent, (b"Z", b"I"), (b"C", b"DISCARD ALL\0")]
    stream = b"".join(message(kind, body) for kind, body in sent)
    come = data.draw(st.integers(0, len(stream)))
    messages, end, missing = wire.whole_messages(stream[:come])
    assert messages == sent[: len(messages)]
    assert end == sum(5 + len(body) for _, body in messages)
    group = sent[: sent.index((b"Z", b"I")) + 1]
    whole = [count for count in range(len(group) + 1) if sum(5 + len(body) for _, body in group[:count]) <= come]
    assert len(messages) == whole[-1]
    begun = come - end >= 5 and messages[-1:] != [(b"Z", b"I")]
    assert missing == (5 + len(sent[len(messages)][1]) - (come - end) if begun else 0)


@pytest.mark.parametrize("garbage", [b"?\0\0\0\4", b"C\0\0\0\3", b"D\xff\xff\xff\xff"])
def test_what_is_no_message_is_not_waited_for(garbage: bytes) -> None:
    with pytest.raises(ValueError, match="no message"):
        wire.whole_messages(tag(b"INSERT 0 1") + garbage)


@given(
    st.lists(
        st.tuples(
            st.binary(max_size=63).filter(lambda name: b"\0" not in name),
            st.integers(0, 2**32 - 1),
            st.integers(-(2**31), 2**31 - 1),
        ),
        max_size=5,
    )
)
def test_a_row_description_tells_names_and_types(fields: list[tuple[bytes, int, int]]) -> None:
    body = struct.pack("!H", len(fields)) + b"".join(
        name + b"\0" + struct.pack("!IhIhih", 7, 1, oid, -1, typmod, 0) for name, oid, typmod in fields
    )
    assert [tuple(field) for field in wire.row_description(body)] == fields
