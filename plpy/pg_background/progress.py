"""The worker's side of progress: a message to the supervisor, which knows the sender by its process.

Runs in the worker's own open transaction and needs neither a second connection nor psycopg. A first report must be
quick in a fresh backend, so this module stands alone, without an importer, and imports only what is built in.
"""

from __future__ import annotations

import _socket  # importing socket, json or ctypes takes longer than all the rest of a first report
import select
import time
from _json import encode_basestring_ascii

TYPE_CHECKING = False  # as typing's, which takes as long
if TYPE_CHECKING:
    from typing import Any, Callable

# worker -> supervisor, see messages.py
AM_I_WORKER = "worker?"  # request -> REPLY true or false
PROGRESS = "progress"  # percent, message, time.monotonic() of the report

_WORKER_NAME = "pg_background"  # loopback.APPLICATION_NAME
_MAX_CHARACTERS = 1000
_ANSWER_TIMEOUT_S = 10.0
_SLICE_S = 0.1  # interrupts are handled at least so often
_RETRY_S = 0.001
_SILENCE_S = 0.5  # a worker that its supervisor does not know asks again after this
_MAX_ANSWER_BYTES = 1000
_SEND_FLAGS = _socket.MSG_NOSIGNAL | _socket.MSG_DONTWAIT

_NULL_PERCENT = '!{"sqlstate": "22004", "message": "the progress of a background worker must not be null"}'
_NO_WORKER = (
    '!{"sqlstate": "0A000", "message": "pg_background_progress can be called by a background worker only",'
    ' "hint": "Call it from the SQL that pg_background_launch_v2 or pg_background_submit_v2 runs."}'
)


def socket_path(database_oid: int) -> str:
    """The control socket of a database's supervisor, relative to the data directory, where backends run.

    In the folder and with the prefix of the server's temporary files, which a restart removes.
    """
    return f"base/pgsql_tmp/pgsql_tmp_pg_background.{database_oid}"


class Runtime:
    """What pg_background_progress needs, in one backend."""

    def __init__(self, plpy: Any) -> None:
        self._plpy = plpy
        oid = plpy.execute(
            "SELECT d.oid FROM pg_catalog.pg_database d"
            " WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
        )[0]["oid"]
        self._path = socket_path(oid)
        self._send: Callable[[bytes, int], int] | None = None
        self._connection: _socket.socket | None = None
        self._was_worker = False
        self._refused = False  # the last supervisor did not know this backend
        self._silent_until = 0.0  # of time.monotonic()

    def progress(self, percent: int | None, text: str | None) -> str | None:
        """Report; the reply is None or an error for _pg_background_checked."""
        if percent is None:
            return _NULL_PERCENT
        if time.monotonic() < self._silent_until:
            return None
        percent = 0 if percent < 0 else min(percent, 100)
        quoted = "null" if text is None else encode_basestring_ascii(text[:_MAX_CHARACTERS])
        packet = f'["{PROGRESS}",{percent},{quoted},{time.monotonic()!r}]'.encode()
        if self._send is not None:
            try:
                self._send(packet, _SEND_FLAGS)
            except OSError:
                pass  # its queue is full, or it has gone
            else:
                return None
        try:
            return self._report_patiently(packet)
        except self._plpy.SPIError as error:  # a cancel
            message = encode_basestring_ascii(str(error.args[0]))
            return f'!{{"sqlstate": "{error.sqlstate}", "message": {message}}}'

    def _report_patiently(self, packet: bytes) -> str | None:
        """Wait for room in the supervisor's queue; where it has gone, find another."""
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._connection is None and not self._connect(deadline):
                break
            assert self._send is not None
            try:
                self._send(packet, _SEND_FLAGS)
            except BlockingIOError:
                self._wait_until(select.POLLOUT)
            except OSError:
                self._drop()
            else:
                return None
        if not (self._was_worker or self._looks_like_a_worker()):
            return _NO_WORKER
        # Its supervisor has gone, or its session has not told the next one of it: no reason for a job to fail.
        if self._refused:
            self._silent_until = time.monotonic() + _SILENCE_S
        return None

    def _looks_like_a_worker(self) -> bool:
        """By its name, which anybody can take: enough to drop a report that nobody waits for."""
        shown = self._plpy.execute("SELECT pg_catalog.current_setting('application_name') AS name")
        return bool(shown[0]["name"] == _WORKER_NAME)

    def _connect(self, deadline: float) -> bool:
        """Whether a supervisor is there, and knows this backend as a worker."""
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        self._connection = connection
        self._refused = False
        try:
            known = self._is_known(connection, deadline)
        except OSError:
            known = False
        except BaseException:
            self._drop()
            raise
        if not known:
            self._drop()
            return False
        self._send = connection.send
        self._was_worker = True
        return True

    def _is_known(self, connection: _socket.socket, deadline: float) -> bool:
        while True:
            try:
                connection.connect(self._path)
            except BlockingIOError:  # many connect at this moment
                if time.monotonic() > deadline:
                    raise
                self._handle_interrupts()
                select.poll().poll(_RETRY_S * 1000)
            else:
                break
        connection.send(f'["{AM_I_WORKER}",1]'.encode(), _SEND_FLAGS)
        while time.monotonic() < deadline:
            if self._wait_until(select.POLLIN):
                answer = connection.recv(_MAX_ANSWER_BYTES)
                known = answer.endswith(b",true]")
                self._refused = bool(answer) and not known
                return known
        return False

    def _wait_until(self, event: int) -> bool:
        """Whether the connection is ready within a slice."""
        assert self._connection is not None
        poll = select.poll()
        poll.register(self._connection.fileno(), event)
        self._handle_interrupts()
        return bool(poll.poll(_SLICE_S * 1000))

    def _handle_interrupts(self) -> None:
        """A cancel raises an error, a termination does not come back."""
        self._plpy.execute("SELECT 1")

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._send = None
