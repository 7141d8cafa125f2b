"""The clean-up of a worker session between two jobs: what it is sent, and what its answers prove."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import libpq_feed, settings, wire
from .errors import INTERNAL_ERROR, BackgroundError, Report, backend_died
from .inheritance import Inherited
from .past_libpq import read_some, read_what_is_there, write_some
from .server import Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

_CLEAN_UP_S = 1.0  # then another session is taken

PROOF = "_pg_background_proof"
# After a job. All settings of this extension have values where it was used to launch: then a fresh session takes its
# place, as no query can make a launcher forget its workers. (Where they all are configured, none is kept.)
_WHO_AM_I_STILL = (
    b"CURRENT_USER, SESSION_USER, CASE WHEN pg_catalog.num_nulls(%s)"
    % b", ".join([b"pg_catalog.current_setting('%s', true)" % definition.name.encode() for definition in settings.ALL])
    + b" OPERATOR(pg_catalog.=) 0 THEN 'launcher' ELSE pg_catalog.current_setting('is_superuser') END"
)


class CleanUp(NamedTuple):
    """What makes a session as a fresh one."""

    idle_timeout_ms: int
    packet: bytes
    answers: int  # their number; the last one proves whose the session is


_NO_CLEAN_UP = CleanUp(-1, b"", 0)


def proof_of_switched(role_oid: int, *, is_superuser: bool) -> list[str]:
    """What _pg_background_proof says first in a session that has become this role."""
    return [*[str(role_oid)] * 3, "on" if is_superuser else "off"]


class Cleaning:
    """The clean-up of one session.

    proof: what its last answer must start with; nothing ever is clean where that is empty.
    proof_oid: of the function that tells it, where Python runs in the session already; 0 where a query asks.
    """

    def __init__(self, server: Server, connection: PGconn, proof: list[str], proof_oid: int = 0) -> None:
        self._server = server
        self._connection = connection
        self._pid = connection.backend_pid
        self.proof = proof
        self._proof_oid = proof_oid
        self.hidden_settings = 0  # how many placeholders that function counts at least
        self._custom_names: frozenset[bytes] = frozenset()
        self._assign = b""
        self._latest = _NO_CLEAN_UP
        self._proven_answer = b""
        self._answers_awaited = 0
        self._first_answer: bytes | None = None  # what has been read already
        self._reports: wire.Reports = {}  # of settings, by the job, which libpq does not know of

    def adopt(self, inherited: Inherited) -> None:
        """The session gets these settings, and is to have them again after each job."""
        self._assign = inherited.assign
        self._custom_names |= inherited.custom_names
        self._latest, self._proven_answer = _NO_CLEAN_UP, b""

    def count_hidden_settings(self) -> int:
        """What the proof of this session, which no job has used, says of it."""
        write_some(self._connection, wire.call_message(self._proof_oid, b"0"), self._pid)
        self._answers_awaited = 1
        unread, answer = b"", wire.Answer()
        while self._answers_awaited:
            received = read_some(self._server, self._connection, None)
            if not received:
                raise BackgroundError(backend_died(self._pid))
            unread, answer = self._take_answers(unread + received, answer)
        error = wire.error_fields(answer.error or b"")
        if error or answer.row is None:
            sqlstate, message = (self._server.decode(error.get(name, b"")) for name in ("sqlstate", "message"))
            raise BackgroundError(Report(sqlstate or INTERNAL_ERROR, message))
        return int(wire.row_values(answer.row)[-1] or 0)

    def clean_up(self, idle_timeout_ms: int) -> CleanUp:
        """What makes the session as a fresh one, that ends itself when it was idle for so long.

        Where Python runs in it already, the proof is asked of a function by its oid: what has its name by now may be
        anybody's, and a call takes half of a query's time.
        """
        if self._latest.idle_timeout_ms != idle_timeout_ms:
            assign, parts = self._assign, [wire.query_message(b"DISCARD ALL")]
            if self._proof_oid:
                parts += [wire.query_message(assign)] if assign else []
                parts.append(wire.call_message(self._proof_oid, b"%d" % idle_timeout_ms))
            else:
                timeout = b"SET idle_session_timeout = %d; " % idle_timeout_ms
                assignment = assign + b"; " if assign else b""
                parts.append(wire.query_message(timeout + assignment + b"SELECT " + _WHO_AM_I_STILL))
            self._latest = CleanUp(idle_timeout_ms, b"".join(parts), len(parts))
        return self._latest

    def send(self, idle_timeout_ms: int) -> None:
        """Send it past libpq; finish() reads the answers when the session is wanted again."""
        clean_up = self.clean_up(idle_timeout_ms)
        if write_some(self._connection, clean_up.packet, self._pid) != len(clean_up.packet):
            raise BackgroundError(backend_died(self._pid))
        self._answers_awaited = clean_up.answers

    def expect(self, answers: int, received: bytes, reports: wire.Reports) -> None:
        """It was sent behind the job; some of its answers may have been read with the job's."""
        self._answers_awaited, self._first_answer, self._reports = answers, received or None, reports

    @property
    def idle_timeout_ms(self) -> int:
        """After so long the session ends itself, if it is not used; 0: never; negative: not known."""
        return self._latest.idle_timeout_ms

    @property
    def is_done(self) -> bool:
        """Whether finish() would not have to wait, as far as can be seen."""
        if self._answers_awaited and self._first_answer is None:
            self._first_answer = read_what_is_there(self._connection)
        return not self._answers_awaited or self._first_answer is not None

    def is_as_proven(self) -> bool:
        """Whether all answers have come, are those that have proved it before, and were the last that was heard of it.

        finish() finds out about others.
        """
        if self._reports or not (self._answers_awaited and self._proven_answer):
            return False
        received = self._first_answer or b""
        if len(received) < len(self._proven_answer):
            received += read_what_is_there(self._connection) or b""
            self._first_answer = received or None
        if received != self._proven_answer or self._says_more():
            return False
        self._answers_awaited, self._first_answer = 0, None
        return True

    def _says_more(self) -> bool:
        """Whether anything lies unread, or the connection has ended."""
        return self._server.is_readable(self._connection.socket)

    def finish(self) -> bool:
        """Whether the session may be used again. Seldom waits: the answers have come long ago.

        One that does not answer is given up: what cleans it takes a snapshot, which may have to wait for the very
        transaction that waits here (default_transaction_deferrable).
        """
        deadline = time.monotonic() + _CLEAN_UP_S
        if not self._answers_awaited:
            return not self._says_more()
        all_read, unread, answer = b"", b"", wire.Answer()
        reports, self._reports = self._reports, {}
        while self._answers_awaited:
            received, self._first_answer = self._first_answer, None
            if received is None:
                received = read_some(self._server, self._connection, deadline)
            if not received:
                return False
            all_read += received
            if all_read == self._proven_answer and not reports:
                self._answers_awaited = 0
                return not self._says_more()
            unread, answer = self._take_answers(unread + received, answer)
            if answer.error:
                return False
        is_last = not unread and not self._says_more()
        clean = is_last and self._is_clean_answer(answer)
        reports = {**reports, **wire.reports_in(all_read)}
        self._proven_answer = all_read if clean and not reports else b""
        return clean and libpq_feed.has_heard(self._connection, reports)

    def _take_answers(self, window: bytes, answer: wire.Answer) -> tuple[bytes, wire.Answer]:
        """What is left of the window, and the last answer in it."""
        while window and self._answers_awaited:
            position = wire.parse(window, answer)
            if not answer.complete:
                break
            window = window[position.consumed :]
            self._answers_awaited -= 1
            if self._answers_awaited and not answer.error:
                answer = wire.Answer()
        return window, answer

    def _is_clean_answer(self, answer: wire.Answer) -> bool:
        values = wire.row_values(answer.row) if answer.row else []
        return self.is_clean([self._server.decode(value or b"") for value in values])

    def is_clean(self, row: Sequence[str | None]) -> bool:
        """Whether the last answer proves that the session is still the role's, and counts no new placeholder."""
        proof, most = self.proof, self.hidden_settings + len(self._custom_names)
        counted = row[len(proof) :]
        is_proven = bool(proof) and list(row[: len(proof)]) == proof and len(counted) == bool(self._proof_oid)
        return is_proven and all(int(number or 0) <= most for number in counted)
