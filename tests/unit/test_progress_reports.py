"""Whose job a report of progress counts for, whatever arrives while it is looked at."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from pg_background import messages
from pg_background.reports import Reports
from pg_background.store import KEY
from pg_background.supervised import Heard, Job, Link


class Ledger:
    """Nothing is inherited, and what is noted can be read in the rows."""

    def inherited_row(self, _: int) -> None:
        return None

    def note(self, _: dict[str, Any]) -> None:
        return None


class Channel:
    """That of the one worker."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.job: Job | None = None
        self.previous: Job | None = None


class Sockets:
    """One worker, whose reports need no rest."""

    def __init__(self) -> None:
        self.channels: dict[int, Channel] = {}

    def rest_reporter(self, _: Link) -> None:
        return None


def packet(percent: int, text: str | None, at: float) -> bytes:
    """A report, as a worker sends it."""
    return json.dumps([messages.PROGRESS, percent, text, at]).encode()


class Supervision:
    """A worker that runs jobs of 10 s each: job n from 10 n on. `session` holds what its session has told."""

    def __init__(self, reporter: Link, worker: socket.socket) -> None:
        self._worker = worker
        self._reporter = reporter
        self.channel = Channel(reporter)
        sockets = Sockets()
        sockets.channels[os.getpid()] = self.channel
        self.closed: list[Link] = []
        self.reports = Reports(sockets, Ledger(), self._receive, self.closed.append)  # type: ignore[arg-type]
        self.session: list[tuple[str, int]] = []
        self.rows: dict[int, dict[str, Any]] = {}
        self.while_an_end_is_handled: list[int] = []
        self.reports.add(reporter)

    def report(self, number: int) -> None:
        """The worker reports of this job."""
        self._worker.send(packet(number, f"job {number}", 10.0 * number + 5))

    def _receive(self, _: Link) -> None:
        """As Supervisor._receive: first all is read, then each message is handled."""
        inbox, self.session = self.session, []
        for kind, number in inbox:
            if kind == "job":
                row = self.rows[number] = {KEY: number, "state": "running", "progress_pct": None}
                job = Job(row, 10 * number * 10**9, 1, {})
                self.channel.previous, self.channel.job = self.channel.job, job
                continue
            for later in self.while_an_end_is_handled:
                self.session += [("job", later)]
                self.report(later)
                self.session += [("end", later)]
            self.while_an_end_is_handled = []
            self.reports.hear_before_end(os.getpid(), 10.0 * number + 9)
            self.rows[number]["state"] = "stopped"

    def hear(self) -> dict[int, int | None]:
        """Look after all that is there; the percentages in the rows."""
        self.reports.hear(self._reporter)
        self.reports.hear_unheard()
        return {number: row["progress_pct"] for number, row in self.rows.items()}


@pytest.fixture
def supervision() -> Iterator[Supervision]:
    ours, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, worker:
        yield Supervision(Link(ours), worker)


def test_each_report_counts_for_its_job(supervision: Supervision) -> None:
    for number in (1, 2):
        supervision.session += [("job", number)]
        supervision.report(number)
        supervision.session += [("end", number)]
    assert supervision.hear() == {1: 1, 2: 2}


@pytest.mark.parametrize("later", [[3], [3, 4], [3, 4, 5]])
def test_what_is_reported_while_an_end_is_handled_waits_for_its_jobs_announcement(
    supervision: Supervision, later: list[int]
) -> None:
    """A report that was read later than the announcements: its job may be one that is not known yet."""
    supervision.session += [("job", 1)]
    supervision.report(1)
    supervision.session += [("end", 1), ("job", 2)]
    supervision.while_an_end_is_handled = later
    assert supervision.hear() == {1: 1, 2: None, **{number: number for number in later}}


def test_of_several_reports_of_one_job_the_last_one_counts(supervision: Supervision) -> None:
    supervision.session += [("job", 1)]
    for percent in (10, 20, 30):
        supervision._worker.send(packet(percent, None, 10.0 + percent / 100))
    assert supervision.hear() == {1: 30}


GARBAGE = [b"{}", b'{"3":1}', b"[]", b"1", b"[1,2,3,4]", b'["progress",1,null,"x"]', b"\xff", b"[" * 100_000]
TOO_LARGE = b'["progress",1,null,1' + b"0" * 400 + b"]"


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_garbage_ends_the_line_of_who_sends_it_and_nothing_else(
    supervision: Supervision, garbage: bytes, position: int
) -> None:
    supervision.session += [("job", 1)]
    packets = [packet(percent, None, 10.0 + percent / 100) for percent in (10, 20)]
    packets.insert(position, garbage)
    for sent in packets:
        supervision._worker.send(sent)
    supervision.hear()
    assert supervision.closed or position == 1  # of several reports only the first and the last are looked at


def test_a_time_that_is_no_float_is_no_error(supervision: Supervision) -> None:
    supervision.session += [("job", 1)]
    supervision._worker.send(TOO_LARGE)
    assert supervision.hear() == {1: None}


def test_only_what_lies_there_is_read(supervision: Supervision) -> None:
    """Whoever sends as fast as the supervisor reads must not keep it from all else."""
    link = supervision._reporter

    def send(number: int) -> None:
        messages.send(supervision._worker, [messages.WRITING, number, True])

    for number in range(3):
        send(number)
    assert link.read_messages(lambda: send(3)) is Heard.NOTHING
    assert [received.message[1] for received in link.inbox] == [0, 1, 2]
    link.inbox.clear()
    assert link.read_messages(lambda: None) is Heard.NOTHING
    assert [received.message[1] for received in link.inbox] == [3, 3]
    supervision._worker.close()
    assert link.read_messages(lambda: None) is Heard.END
