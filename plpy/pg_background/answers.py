"""What workers say, as the supervisor reads it off their sockets: how jobs ended, and whether sessions were cleaned.

Of workers whose session waits or works it only looks at what has arrived; the output of submitted, detached and
orphaned ones it reads and throws away, so that they never block.
"""

from __future__ import annotations

import copy
import time
from typing import Callable

from . import messages, wire
from .after_commit import AfterCommit
from .jobs import Jobs
from .ledger import Ledger
from .outcomes import last_answer, lost_connection, outcome_of
from .sockets import Sockets
from .store import KEY, Row
from .supervised import WINDOW_BYTES, Channel, Job, Link

_MAX_WINDOW_BYTES = 1 << 24
_TAIL_BYTES = 1 << 17


class Answers:
    """Reads the sockets of which something may have arrived."""

    def __init__(
        self,
        sockets: Sockets,
        ledger: Ledger,
        jobs: Jobs,
        after_commit: AfterCommit,
        receive: Callable[[Link], None],
    ) -> None:
        self._sockets = sockets
        self._ledger = ledger
        self._jobs = jobs
        self._after_commit = after_commit
        self._receive = receive

    def read_ready(self) -> None:
        """Each of them once; in line again goes what may have more."""
        for _ in range(len(self._sockets.ready)):
            channel = self._sockets.ready.popleft()
            if self._sockets.channels.get(channel.pid) is not channel or channel.is_between_jobs:
                continue
            if channel.drains:
                again = self._read_to_the_end(channel)
            elif channel.reads:
                again = self._read_answers(channel)
            else:
                again = self._peek(channel)
            if again:
                self._sockets.ready.append(channel)

    def _peek(self, channel: Channel) -> bool:
        """See whether a job has ended whose session has not looked yet."""
        job = channel.job
        if job is None or not job.running:
            return False
        looked_at = time.monotonic()
        window = wire.receive_from(channel.connection, _TAIL_BYTES * 2, wire.PEEK)
        if window is None:
            return False
        if channel.link is not None:
            # Its session may have read that job's answer, sent the next job, or detached it.
            self._receive(channel.link)
            if channel.job is not job or not job.running or channel.reads or channel.drains:
                return False
        ended = window.endswith(wire.READY_FOR_QUERY)
        hung_up = wire.hung_up(channel.connection)
        # Its session may have read a part of what a clean-up has answered: nothing is known before all is there.
        answer = last_answer(window, job, whole=not hung_up) if ended or hung_up else None
        if answer is not None:
            self._jobs.end(job, self._outcome_of(job, answer), looked_at)
        elif hung_up:
            self._jobs.end(job, lost_connection(job), None)
        return False

    def _read_answers(self, channel: Channel) -> bool:
        """Read a submitted job's answer, and those of the clean-up queued behind it."""
        self._after_commit.send_outgoing(channel)
        if channel.skip:
            return self._skip(channel)
        window = wire.receive_from(channel.connection, channel.window, wire.PEEK)
        if not window:
            return self._lost(channel, window)
        if window.endswith(wire.READY_FOR_QUERY) and self._take_all(channel, window):
            return False
        position = wire.parse(window, channel.answer)
        complete = channel.answer.complete
        is_outcome = complete and self._is_outcome(channel)
        if is_outcome:
            self._take_outcome(channel)  # told before it is taken: were this process to end here, it would be lost
        if position.consumed:
            wire.receive_from(channel.connection, position.consumed, 0)
            channel.window = WINDOW_BYTES
        channel.skip = position.skip
        if complete and not is_outcome:
            self._take_other_answer(channel)  # taken before it is told: its session sees whether something lies unread
        if not position.consumed and len(window) == channel.window and channel.window < _MAX_WINDOW_BYTES:
            channel.window *= 2
            return True
        if not position.consumed and not position.skip and wire.has_no_more(channel.connection, len(window)):
            # The last word of a backend that was terminated: no end of its answer follows.
            return self._lost(channel, b"")
        return bool(position.consumed) and channel.answers_left > 0

    def _skip(self, channel: Channel) -> bool:
        """Throw away what is left of a row."""
        thrown = wire.receive_from(channel.connection, min(channel.skip, _MAX_WINDOW_BYTES), 0)
        if not thrown:
            return self._lost(channel, thrown)
        channel.skip -= len(thrown)
        return True

    def _take_all(self, channel: Channel, window: bytes) -> bool:
        """Take a job's answer together with those of its clean-up, if that is what the window holds.

        One message tells its session of both: in a burst of jobs that is a third of what they cost here.
        """
        job = channel.job
        answers: list[wire.Answer] = []
        if channel.queue is not None or channel.link is None or job is None or not self._is_outcome(channel):
            return False
        position, answer = 0, copy.copy(channel.answer)
        while not answers or len(answers) < channel.answers_left:
            position += wire.parse(window[position:], answer).consumed
            if not answer.complete:
                return False
            answers.append(answer)
            answer = wire.Answer()
        if position != len(window) or not job.running:
            return False
        unclean = len(answers) == 1 or any(answer.error for answer in answers[1:])
        clean_up = self._clean_up_of(answers[-1], unclean=unclean)
        outcome = self._outcome_of(job, answers[0])
        wire.receive_from(channel.connection, position, 0)
        channel.answer, channel.answers_left = wire.Answer(), 0
        for answer in answers:
            channel.reports.update(answer.reports)
        self._sockets.unwatch(channel)
        self._tell_ended(channel, job, outcome, clean_up)
        return True

    @staticmethod
    def _is_outcome(channel: Channel) -> bool:
        """Whether the group that was read is a job's answer: no verdict on it, nor its clean-up's."""
        if channel.queue is not None and channel.queue.asked is not None:
            return False
        return channel.job is not None and channel.answers_left == channel.job.groups_after + 1

    def _take_outcome(self, channel: Channel) -> None:
        answer = channel.take_answer()
        channel.answers_left -= 1
        assert channel.job is not None
        if channel.job.running:
            self._tell_ended(channel, channel.job, self._outcome_of(channel.job, answer), None)

    def _take_other_answer(self, channel: Channel) -> None:
        """A verdict on a job that waits for a commit, or a part of a clean-up."""
        answer = channel.take_answer()
        if self._after_commit.take_answer(channel, answer):
            return
        channel.answers_left -= 1
        job, link = channel.job, channel.link
        assert job is not None
        channel.unclean = channel.unclean or answer.error is not None
        if channel.answers_left:
            return
        row = self._clean_up_of(answer, unclean=channel.unclean)
        if link is not None:
            self._sockets.unwatch(channel)
            self._sockets.send(link, messages.Ended(channel.pid, job.row[KEY], None, row, channel.reports).message())
        self._after_commit.take_clean_up(channel, row)

    def _tell_ended(self, channel: Channel, job: Job, changes: Row, clean_up: list[str | None] | None) -> None:
        """The worker's own session first: what others do upon the end must find it informed."""
        ended_at = time.monotonic()  # before its session can have sent the next job there
        if channel.link is not None:
            reports = {} if clean_up is None else channel.reports
            ended = messages.Ended(channel.pid, job.row[KEY], changes, clean_up, reports)
            self._sockets.send(channel.link, ended.message())
        self._jobs.end(job, changes, ended_at)

    def _lost(self, channel: Channel, received: bytes | None) -> bool:
        """Nothing to read: not yet (b"" stands for the end of the connection)."""
        if received is None:
            return False
        job = channel.job
        if job is not None and job.running:
            answer = channel.answer
            changes = self._outcome_of(job, answer) if answer.error else lost_connection(job)
            self._tell_ended(channel, job, changes, [])
        elif job is not None and channel.link is not None and channel.answers_left:
            in_clean_up = messages.Ended(channel.pid, job.row[KEY], None, [])
            self._sockets.send(channel.link, in_clean_up.message())
        if channel.queue is not None:
            for item in channel.queue.unstarted():
                self._after_commit.end_unsent(channel, item.job, lost_connection(item.job))
        self._sockets.close_channel(channel)
        return False

    def _read_to_the_end(self, channel: Channel) -> bool:
        """Throw a stream away whose place in a message nobody knows; its last bytes tell the outcome."""
        received = wire.receive_from(channel.connection, WINDOW_BYTES, 0)
        if received is None:
            return False
        if received:
            channel.tail = (channel.tail + received)[-_TAIL_BYTES:]
            return True
        job = channel.job
        if job is not None and job.running:
            answer = last_answer(channel.tail, job)
            changes = self._outcome_of(job, answer) if answer is not None else lost_connection(job)
            self._tell_ended(channel, job, changes, [])
        self._sockets.close_channel(channel)
        return False

    def end_drained(self) -> None:
        """Note the ends that were read off already: a successor finds the rest of these streams only."""
        for channel in self._sockets.channels.values():
            job = channel.job
            if job is not None and job.running and channel.drains:
                answer = last_answer(channel.tail, job)
                if answer is not None:
                    self._jobs.end(job, self._outcome_of(job, answer), None)

    def _outcome_of(self, job: Job, answer: wire.Answer) -> Row:
        return outcome_of(job, answer, self._ledger.decode)

    def _clean_up_of(self, last: wire.Answer, *, unclean: bool) -> list[str | None]:
        """What a session is told of its clean-up: the last answer's row; nothing where it must not be used again."""
        if unclean or last.row is None:
            return []
        return [None if value is None else self._ledger.decode(value) for value in wire.row_values(last.row)]
