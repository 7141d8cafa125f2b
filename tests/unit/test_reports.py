"""What the server tells of settings, as it is read off a worker's socket."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from pg_background import wire

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
VALUES = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=200)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5))
def test_the_last_value_of_each_setting_counts(reports: list[tuple[str, str]]) -> None:
    answers = b"".join(wire.report_message(*report) for report in reports) + wire.READY_FOR_QUERY
    assert wire.reports_in(answers) == dict(reports)
    answer = wire.Answer()
    assert wire.parse(answers, answer).consumed == len(answers)
    assert answer.reports == dict(reports)


def test_a_value_that_is_cut_or_too_long_is_none() -> None:
    message = wire.report_message("search_path", "x" * 50_000)
    answer = wire.Answer()
    wire.parse(message[:40_000], answer)
    assert answer.reports == {"search_path": None}
    assert wire.reports_in(message + wire.READY_FOR_QUERY) == {"search_path": None}


@given(st.binary(max_size=40))
def test_what_only_looks_like_a_report_is_no_error(body: bytes) -> None:
    wire.parse(b"S" + struct.pack("!I", len(body) + 4) + body + wire.READY_FOR_QUERY, wire.Answer())
