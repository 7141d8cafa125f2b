"""How jobs end: what each way changes in a job's row."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Callable

from . import messages, wire
from .store import Row
from .supervised import Job

LOST = "08006"  # the outcome is unknown, as far as was seen
_CLEAN_UP_TAG = b"DISCARD ALL"  # of the first answer that is not the job's


def outcome_of(job: Job, answer: wire.Answer, decode: Callable[[bytes], str]) -> Row:
    """The changes that an answer makes to its job's row."""
    changes: Row = {"finished_at": timestamp()}
    if answer.error is None:
        tag = (answer.tag_before if job.tags_after else answer.tag) or b""
        text = decode(tag)
        changes.update(state="stopped", command_tag=text, row_count=wire.row_count(text))
        return changes
    fields = {name: decode(value) for name, value in wire.error_fields(answer.error).items()}
    interrupted = fields.get("sqlstate") in ("57014", "57P01")
    if interrupted and job.tags_of_commit is not None and answer.tags >= job.tags_of_commit:
        # The signal came during the commit, and became an error after it.
        return outcome_of(job, answer.without_error(), decode)
    ours = job.canceled and interrupted
    if job.timed_out and not job.canceled and interrupted:
        fields["sqlstate"] = "57014"
        fields["message"] = messages.TIMED_OUT
    changes.update(state="canceled" if ours else "error", sqlstate=fields.pop("sqlstate", None))
    for name in ("message", "detail", "hint", "context"):
        changes["error_" + name] = fields.pop(name, None)
    changes.update(fields)
    return changes


def last_answer(tail: bytes, job: Job, *, whole: bool = False) -> wire.Answer | None:
    """The job's answer in the tail of a stream, with the clean-up's behind it; None if it is not there.

    whole: all of the clean-up's. Otherwise as many as have come, of which the first must be known by its tag: the
    job's answer may have been read by somebody else.
    """
    for groups_after in range(job.groups_after, -1, -1):
        answer = wire.last_answer(tail, groups_after, job.tags_after, job.tags_of_commit)
        if answer is not None:
            may_be_part = not whole and _is_before_clean_up(tail, groups_after, answer, job)
            is_jobs = groups_after == job.groups_after or may_be_part
            return answer if is_jobs and _tells_the_end(answer, job) else None
    return None


def _tells_the_end(answer: wire.Answer, job: Job) -> bool:
    """Not where the stream breaks off behind some message before the commit."""
    has_committed = job.tags_of_commit is not None and answer.tags >= job.tags_of_commit
    return answer.complete or answer.error is not None or has_committed


def _is_before_clean_up(tail: bytes, groups_after: int, answer: wire.Answer, job: Job) -> bool:
    """Whether an answer is no part of a clean-up itself, as far as can be seen."""
    if answer.tag == _CLEAN_UP_TAG:
        return False
    if groups_after:
        behind = wire.last_answer(tail, groups_after - 1)
        return behind is not None and behind.tag == _CLEAN_UP_TAG
    was_empty = answer.tag is None and answer.row is None
    return answer.error is not None or was_empty or answer.tags > job.tags_after


def timestamp() -> str:
    """Now, as the table takes it."""
    return datetime.now(timezone.utc).isoformat()


def rolled_back() -> Row:
    """40000, the class of transactions that were rolled back."""
    message = "the transaction that submitted the background job was rolled back"
    return {"state": "canceled", "sqlstate": messages.ROLLED_BACK, "error_message": message, "finished_at": timestamp()}


def canceled_before() -> Row:
    """As a cancel of what runs."""
    message = "the background job was canceled before it started"
    return {"state": "canceled", "sqlstate": "57014", "error_message": message, "finished_at": timestamp()}


def never_ran() -> Row:
    """08006 as well: the session ended before it had sent the whole job."""
    message = "the launching session ended before it had sent the whole SQL, which did not run"
    return {"state": "error", "sqlstate": LOST, "error_message": message, "finished_at": timestamp()}


def lost_connection(job: Job | None) -> Row:
    """08006: the worker's backend is gone, and what became of its job is not known, unless it was us."""
    message = "the background worker's backend ended, the outcome of its SQL is unknown"
    state, sqlstate = "error", LOST
    if job is not None and job.kill_at is not None and time.monotonic() >= job.kill_at:
        if job.canceled:
            state, sqlstate, message = "canceled", "57P01", messages.TERMINATED
        else:
            sqlstate, message = "57014", messages.TIMED_OUT
    return {"state": state, "sqlstate": sqlstate, "error_message": message, "finished_at": timestamp()}
