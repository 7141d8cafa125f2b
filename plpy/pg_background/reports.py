"""Workers' reports of progress, as the supervisor takes them in."""

from __future__ import annotations

import json
import time
from typing import Callable

from . import messages
from .ledger import Ledger
from .sockets import Sockets
from .supervised import Link

_AT_ONCE = 1000
_NO_REPORT = (messages.ProtocolError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


def _reported_at(packet: bytes) -> float:
    """When, of time.monotonic(); 0 for what is no report, which is found out when it is taken."""
    try:
        return float(json.loads(packet)[3])
    except _NO_REPORT:
        return 0.0


class Reports:
    """Hears reporters, and notes what they say in the rows of their jobs."""

    def __init__(
        self,
        sockets: Sockets,
        ledger: Ledger,
        receive: Callable[[Link], None],
        close_link: Callable[[Link], None],
    ) -> None:
        self._sockets = sockets
        self._ledger = ledger
        self._receive = receive
        self._close_link = close_link
        self._reporters: dict[int, Link] = {}  # by pid
        self._unheard: set[Link] = set()  # those whose reports came before it was known of which job

    @property
    def is_behind(self) -> bool:
        """Whether reports were read that are still to be noted."""
        return bool(self._unheard)

    def add(self, link: Link) -> None:
        """A worker is going to report."""
        self._reporters[link.pid] = link
        self._sockets.rest_reporter(link)

    def remove(self, link: Link) -> None:
        """It has gone."""
        if self._reporters.get(link.pid) is link:
            del self._reporters[link.pid]

    def has_reporter(self, pid: int) -> bool:
        """Whether this worker has a line to report on."""
        return pid in self._reporters

    def hear_unheard(self) -> None:
        """Those that were read before their jobs were announced."""
        unheard, self._unheard = self._unheard, set()
        for link in unheard:
            self.hear(link)

    def hear_before_end(self, pid: int, at: float | None) -> None:
        """All that a worker has reported of a job that ended then, of time.monotonic(); None: now."""
        reporter = self._reporters.get(pid)
        if reporter is not None:
            self.hear(reporter, time.monotonic() if at is None else at)

    def hear(self, link: Link, until: float | None = None) -> None:
        """Note what a worker has reported; of several reports of one job the last one counts.

        until: when the current job had ended, of time.monotonic(); what was reported later waits until its job has been
        announced. Without that, all announcements are read first; what is reported meanwhile waits as well.
        """
        packets, gone = messages.receive_all(link.connection, _AT_ONCE)
        link.packets += packets
        channel = self._sockets.channels.get(link.pid)
        if until is None:
            until = _reported_at(link.packets[-1]) if link.packets else 0.0
            if channel is not None and channel.link is not None:
                self._receive(channel.link)
                channel = self._sockets.channels.get(link.pid)
        border = channel.job.started if channel is not None and channel.job is not None else 0.0
        try:
            self._take(link, border, until)
        except _NO_REPORT:
            gone = True
        if gone:
            self._close_link(link)

    def _take(self, link: Link, border: float, until: float) -> None:
        """Note the reports until then; between two jobs lies the border. Errors as of a message that is none."""
        packets, link.packets = link.packets, []
        reports = [json.loads(packet) for packet in (packets[:1] + packets[-1:])]
        if not reports:
            return
        is_late = reports[-1][3] > until
        if is_late or (reports[0][3] < border) != (reports[-1][3] < border):
            reports = [json.loads(packet) for packet in packets]
        for kind, *arguments in reports:
            if kind != messages.PROGRESS:
                raise messages.ProtocolError(kind)
            if arguments[2] <= until:
                self.note(link.pid, *arguments)
        if is_late:
            link.packets = [packet for packet in packets if _reported_at(packet) > until]
            self._unheard.add(link)

    def note(self, pid: int, percent: int, text: str | None, at: float) -> None:
        """A report may be read after the end of its job, even after the start of the next: `at` tells whose it is."""
        channel = self._sockets.channels.get(pid)
        job = channel.job if channel is not None else None
        if channel is not None and job is not None and at < job.started:
            job = channel.previous
        row = job.row if job is not None else self._ledger.inherited_row(pid)
        if row is not None:
            row.update(progress_pct=percent, progress_msg=text)
            self._ledger.note(row)
