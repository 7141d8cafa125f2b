"""What an answer makes of its job's row."""

from __future__ import annotations

from typing import Any

import pytest
from pg_background import wire
from pg_background.outcomes import outcome_of
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
    extras: dict[str, Any] = {"probe": True, "tags_of_commit": 2}
    answer = _answer((b"C", b"INSERT 0 2\0"), (b"C", b"SELECT 1\0"), end)
    changes = outcome_of(Job({"state": "running"}, extras), answer, bytes.decode)
    assert (changes["state"], changes["command_tag"], changes["row_count"]) == ("stopped", "INSERT 0 2", 2)
