"""What an answer makes of its job's row."""

from __future__ import annotations

import struct

import pytest
from pg_background import wire
from pg_background.outcomes import last_answer, outcome_of
from pg_background.supervised import Job

_TERMINATED = b"SFATAL\0VFATAL\0C57P01\0Mterminating\0\0"


def _answer(*messages: tuple[bytes, bytes]) -> wire.Answer:
    answer = wire.Answer()
    for kind, body in messages:
        answer.take(kind, body)
        answer.tags += kind == b"C"
    return answer


@pytest.mark.parametrize("end", [(b"Z", b"I"), (b"E", _TERMINATED)])
def test_the_probes_tag_is_not_the_jobs(end: tuple[bytes, bytes]) -> None:
    """Nor where the backend was terminated when it had committed."""
    answer = _answer((b"C", b"INSERT 0 2\0"), (b"C", b"SELECT 1\0"), end)
    changes = outcome_of(Job({"state": "running"}, 0, 2, {"probe": True}), answer, bytes.decode)
    assert (changes["state"], changes["command_tag"], changes["row_count"]) == ("stopped", "INSERT 0 2", 2)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


_READY = _message(b"Z", b"I")
_JOB = _message(b"C", b"INSERT 0 7\0") + _READY
_CLEAN_UP = (
    _message(b"C", b"DISCARD ALL\0") + _READY,
    _message(b"D", b"\0\1\0\0\0\1a") + _message(b"C", b"SELECT 1\0") + _READY,
    _message(b"V", struct.pack("!i", 7) + b"5,5,5,1") + _READY,
)


@pytest.mark.parametrize("come", range(4))
def test_what_a_stream_ends_with_is_the_jobs_answer_or_none(come: int) -> None:
    """However much of the clean-up behind it has come; that never stands for the job."""
    job = Job({"state": "running"}, 0, 1, {"clean_ups": 3})
    answer = last_answer(_JOB + b"".join(_CLEAN_UP[:come]), job)
    assert answer is not None
    assert answer.tag == b"INSERT 0 7"
    assert last_answer(b"".join(_CLEAN_UP[:come]), job) is None


_ASSIGNED = _message(b"C", b"SELECT 1\0") + _READY
_WITH_SETTINGS = (_CLEAN_UP[0], _ASSIGNED, _CLEAN_UP[2])
_FAILED = _message(b"E", b"SERROR\0C22012\0Mdivision by zero\0\0") + _READY


@pytest.mark.parametrize("job_answer", [_JOB, _FAILED], ids=["well", "failed"])
@pytest.mark.parametrize("taken", range(1, 4))
@pytest.mark.parametrize("come", range(4))
def test_a_clean_ups_answer_is_no_outcome_whatever_was_read_before(job_answer: bytes, taken: int, come: int) -> None:
    """Where a session may have read a part, all of it must be there."""
    job = Job({"state": "running"}, 0, 1, {"clean_ups": 3})
    groups = (job_answer, *_WITH_SETTINGS)[: 1 + come]
    whole = last_answer(b"".join(groups), job, whole=True)
    assert (whole is not None) == (come == 3)
    assert last_answer(b"".join(groups[taken:]), job, whole=True) is None
    part = last_answer(b"".join(groups), job)
    assert part is not None
    assert (part.error is not None) == (job_answer is _FAILED)


_TYPES = _message(b"T", b"\0\1n\0" + struct.pack("!IhIhih", 0, 0, 23, 4, -1, 0))
_ROW = _message(b"D", b"\0\1\0\0\0\1a")


@pytest.mark.parametrize("groups_after", [0, 2])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_stream_that_breaks_off_between_two_messages_tells_no_end(rows: int, groups_after: int) -> None:
    """INSERT; SELECT; and the probe: with the third tag it has committed, whether the group's end has come or not."""
    job = Job({"state": "running"}, 0, 3, {"probe": True, "clean_ups": groups_after})
    inserted = _message(b"C", b"INSERT 0 1\0")
    selected = _message(b"C", b"SELECT 1\0")
    broken = inserted + _TYPES + _ROW * rows
    assert last_answer(broken, job) is None
    assert last_answer(broken + selected + _TYPES + _ROW, job) is None
    committed = last_answer(broken + selected + _TYPES + _ROW + selected, job)
    assert committed is not None
    assert outcome_of(job, committed, bytes.decode)["command_tag"] == "SELECT 1"
    terminated = last_answer(broken + _message(b"E", _TERMINATED), job)
    assert terminated is not None
    assert outcome_of(job, terminated, bytes.decode)["sqlstate"] == "57P01"


@pytest.mark.parametrize("probe", [False, True])
def test_what_a_clean_up_has_proved_is_no_outcome(probe: bool) -> None:
    """Where somebody else has read all before it."""
    job = Job({"state": "running"}, 0, 3 if probe else 1, {"probe": probe, "clean_ups": 2})
    assert last_answer(_CLEAN_UP[2], job) is None
    assert last_answer(_message(b"I", b"") + _READY + _CLEAN_UP[0] + _CLEAN_UP[2], job) is not None
