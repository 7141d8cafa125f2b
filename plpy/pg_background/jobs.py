"""The jobs of a database's sessions, as these tell the supervisor of them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Any

from . import messages
from .ledger import Ledger
from .outcomes import LOST, lost_connection, timestamp
from .reports import Reports
from .sockets import Sockets
from .store import ENDS, KEY, Row
from .supervised import Channel, Job, Link

_REMEMBERED = 2000  # finished jobs that questions find in memory


def announced_row(link: Link, announced: messages.Announcement) -> Row:
    """What the row of a new job begins with."""
    row = announced.row()
    row["launcher_pid"], row["launcher_start"] = link.pid, link.process_start
    return row


class Jobs:
    """All that run, and the last ones that have ended."""

    def __init__(self, sockets: Sockets, ledger: Ledger, reports: Reports) -> None:
        self._sockets = sockets
        self._ledger = ledger
        self._reports = reports
        self.by_key: dict[int, Job] = {}
        self.finished: deque[int] = deque()  # keys of those that ended lately
        self.unwatched: set[int] = set()  # keys of those whose sockets are watched from the next tick on
        self._deadlines: list[tuple[float, int]] = []  # a heap, of time.monotonic() and key

    def channel_for(self, link: Link, row: Row, descriptors: list[int]) -> Channel | None:
        """That of a new job's worker, whose socket has come along unless it was here; None where it was given up."""
        pid = int(row["pid"])
        if descriptors:
            self._sockets.adopt(link, pid, row["process_start"], descriptors.pop(0))
        return self._sockets.channels.get(pid)

    # --- what sessions tell ---

    def on_job(
        self,
        link: Link,
        descriptors: list[int],
        announcement: list[Any],
        started_ns: int,
        tags_of_commit: int | None,
        extras: dict[str, Any],
    ) -> None:
        """A job is about to be sent, or is handed over by a session whose supervisor has gone."""
        row = announced_row(link, messages.Announcement(*announcement))
        pid, key = int(row["pid"]), int(row[KEY])
        if extras.get("again"):
            row = self._row_so_far(dict(row, consumed=extras["consumed"]))
        if self._has_already(link, pid, key):
            return
        channel = self.channel_for(link, row, descriptors)
        job = Job(row, started_ns, tags_of_commit, extras)
        if channel is None:
            self.refuse(link, job)
        elif not job.running:
            self._keep_ended(channel, link, job, read_here=bool(extras.get("unknown_position")))
        else:
            self._begin(channel, link, job, extras)

    def took_whole(
        self,
        link: Link,
        following: list[Any],
        announcement: list[Any],
        started_ns: int,
        tags_of_commit: int | None,
        extras: dict[str, Any],
    ) -> bool:
        """Take a launched job together with its end, where that is the message behind; whether it was so.

        Most launched jobs have ended before this process looks: that takes half of what both messages would.
        """
        announced = messages.Announcement(*announcement)
        channel = self._sockets.channels.get(announced.pid)
        is_whole = (
            following[:2] == [messages.FINISHED, announced.key]
            and channel is not None
            and channel.link is link
            and not (announced.submitted or "again" in extras or self._reports.has_reporter(announced.pid))
        )
        if channel is None or not is_whole:
            return False
        _, key, changes, ended_ns = following
        finished_at = messages.moment(announced.launched_us + (ended_ns - started_ns) // 1000)
        row = {**announced_row(link, announced), "finished_at": finished_at.isoformat(), **changes}
        self._sockets.unwatch(channel)
        channel.begin(job := Job(row, started_ns, tags_of_commit, extras))
        channel.reads = channel.writing = False
        channel.queue = None
        self.by_key[key] = job
        self._ledger.note(row)
        self._remember(key)
        return True

    def _remember(self, key: int) -> None:
        """The last ones that have ended stay known."""
        self.finished.append(key)
        while len(self.finished) > _REMEMBERED:
            self.by_key.pop(self.finished.popleft(), None)

    def _begin(self, channel: Channel, link: Link, job: Job, extras: dict[str, Any]) -> None:
        key: int = job.row[KEY]
        self.by_key[key] = job
        channel.begin(job)
        channel.writing = bool(extras.get("writing"))
        channel.reports = {}
        self._ledger.note(job.row)
        timeout_ms = extras.get("timeout_ms", 0)
        if timeout_ms:
            self.add_deadline(job, timeout_ms)
        channel.reads = job.row["submitted"]
        channel.queue = None
        link.may_rest = not channel.reads
        if extras.get("unknown_position"):
            self._sockets.drain(channel)
            self._sockets.terminate_after_job(channel)
        elif channel.reads:
            self._sockets.watch(channel)
        else:
            self.unwatched.add(key)

    def refuse(self, link: Link, job: Job) -> None:
        """A job in a connection that was given up here: what its session has sent behind this must be heard."""
        changes = lost_connection(job)
        self.by_key[job.row[KEY]] = job
        self._sockets.send(link, messages.Ended(job.row["pid"], job.row[KEY], changes, []).message())
        self.end(job, changes)

    def _keep_ended(self, channel: Channel, link: Link, job: Job, *, read_here: bool) -> None:
        """A job that is handed over again, whose end is known; a session that reads it itself keeps the connection."""
        if read_here:
            self._tell_end(link, job.row, [])
            self._sockets.close_channel(channel)
        else:
            channel.job = job

    def _has_already(self, link: Link, pid: int, key: int) -> bool:
        """Whether this job's stream is being read here: its session has only come back over another link."""
        channel = self._sockets.channels.get(pid)
        if channel is None or channel.job is None or channel.job.row[KEY] != key or not channel.job.running:
            return False
        if channel.link is not None:
            channel.link.channels.discard(pid)
        channel.link = link
        link.channels.add(pid)
        return True

    def _row_so_far(self, row: Row) -> Row:
        """A job that is handed over again: its progress, or its end, may be known already."""
        self._ledger.inherited.pop(row[KEY], None)
        job = self.by_key.get(row[KEY])
        known = job.row if job is not None else self._ledger.ask(lambda store: store.find_key(row[KEY]))
        if known is None:
            return row
        if known["state"] != "running" and known["sqlstate"] != LOST:  # not lost after all
            return dict(known)
        return dict(row, progress_pct=known.get("progress_pct"), progress_msg=known.get("progress_msg"))

    def _tell_end(self, link: Link, row: Row, clean_up: list[str | None] | None) -> None:
        """A submitted or detached job that ended before its session could hear of it."""
        changes = {name: value for name, value in row.items() if name in ENDS and value is not None}
        self._sockets.send(link, messages.Ended(row["pid"], row[KEY], changes, clean_up).message())

    def on_writing(self, _: Link, pid: int, writing: bool) -> None:
        """A session has sent a part of its job, or now all of it."""
        channel = self._sockets.channels.get(pid)
        if channel is not None:
            channel.writing = writing
            if channel.farewell_due:
                self._sockets.say_farewell(channel)

    def on_finished(self, _: Link, key: int, changes: Row, at_ns: int) -> None:
        """A session has read the end of its job."""
        job = self.by_key.get(key)
        if job is None:
            self._ledger.record_end(key, changes)
            return
        channel = self._sockets.channels.get(job.row["pid"])
        if channel is not None and channel.job is job and not channel.reads:
            self._sockets.unwatch(channel)
        self.end(job, changes, at_ns / 1e9)

    def on_detach(self, link: Link, pid: int, clean_ups: int) -> None:
        """A session leaves the rest of a worker's output to the supervisor; so many answers are to a clean-up."""
        channel = self._sockets.channels.get(pid)
        if channel is None or channel.link is not link:
            return  # its backend has gone, of which the session has been told
        job = channel.job
        if channel.drains:
            return  # handed over again as a detached one
        if job is None:
            self._sockets.close_channel(channel)
        elif clean_ups:
            self._read_with_clean_up(channel, link, job, clean_ups)
        elif job.running:
            self._sockets.drain(channel)
            self._sockets.terminate_after_job(channel)
        else:
            self._tell_end(link, job.row, [])  # seen here before the session looked
            self._sockets.close_channel(channel)

    def _read_with_clean_up(self, channel: Channel, link: Link, job: Job, clean_ups: int) -> None:
        """Of this worker's output its session has read nothing, and nothing but the clean-up follows it."""
        if not job.running:
            self._tell_end(link, job.row, None)  # seen here before the session looked
        job.groups_after = clean_ups
        channel.reads = True
        channel.answers_left = 1 + clean_ups
        self._sockets.watch(channel)
        self._sockets.ready.append(channel)

    def on_closed(self, link: Link, pid: int) -> None:
        """A session has ended a worker's session."""
        channel = self._sockets.channels.get(pid)
        if channel is not None and channel.link is link and not channel.drains:
            if channel.job is not None and channel.job.running:
                self.end(channel.job, lost_connection(channel.job))  # announced, but it could not be sent
            self._sockets.close_channel(channel)

    def on_record(self, link: Link, row: Row) -> None:
        """A predecessor's row; or a session's, of a job that ended while there was no supervisor to tell."""
        row = {"launcher_pid": link.pid, "launcher_start": link.process_start, **row}
        job = self.by_key.get(row[KEY])
        if job is None:
            self._ledger.note({**(self._ledger.known_row(row[KEY]) or {}), **row})
            return
        self._ledger.inherited.pop(row[KEY], None)
        if row["state"] != "running":
            self.end(job, row)
        elif job.row.get("progress_pct") is None:
            job.row.update(progress_pct=row.get("progress_pct"), progress_msg=row.get("progress_msg"))
            self._ledger.note(job.row)

    # --- ends ---

    def end(self, job: Job, changes: Row, at: float | None = None) -> None:
        """A job has ended, with this outcome; a second report of the same end changes little."""
        first = job.running
        if first:
            self._reports.hear_before_end(job.row["pid"], at)
        if not first and (job.row.get("sqlstate") == LOST or changes.get("state") == "stopped"):
            job.row.update(dict.fromkeys(ENDS))  # its session knows better
        job.row.update(changes)
        if job.row.get("finished_at") is None:
            job.row["finished_at"] = timestamp()
        self._ledger.note(job.row)
        if not first:
            return
        for link, request in job.waiters:
            link.waiting.pop(request, None)
            self._sockets.send(link, [messages.REPLY, request, job.row])
        job.waiters.clear()
        self._remember(job.row[KEY])

    def forget(self, channel: Channel) -> None:
        """Another supervisor has this worker: nothing more is to be written about it here."""
        job = channel.job
        if job is not None and job.running:
            self.by_key.pop(job.row[KEY], None)
            self._ledger.forget(job.row[KEY])
        self._sockets.close_channel(channel)

    # --- at their times ---

    def add_deadline(self, job: Job, timeout_ms: int) -> None:
        """A job that has been sent is to end by then."""
        heapq.heappush(self._deadlines, (job.started + timeout_ms / 1000, job.row[KEY]))

    def next_deadline(self, otherwise: float) -> float:
        """The first one, of time.monotonic(), if that is before `otherwise`."""
        return min(otherwise, self._deadlines[0][0]) if self._deadlines else otherwise

    def overdue(self, now: float) -> Iterator[Job]:
        """Those that run although their time is over, each once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self.by_key.get(heapq.heappop(self._deadlines)[1])
            if job is not None and job.running:
                yield job

    def prune_deadlines(self) -> None:
        """Forget those of jobs that nobody remembers."""
        self._deadlines = [entry for entry in self._deadlines if entry[1] in self.by_key]
        heapq.heapify(self._deadlines)

    def watch_unwatched(self) -> None:
        """Look after what runs for longer than a moment."""
        for key in self.unwatched:
            job = self.by_key.get(key)
            channel = self._sockets.channels.get(job.row["pid"]) if job is not None and job.running else None
            if channel is not None and channel.job is job:
                self._sockets.watch(channel)
        self.unwatched.clear()
