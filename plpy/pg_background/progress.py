"""The worker's side of progress: a message to the supervisor, which knows the sender by its process.

Runs in the worker's own open transaction and needs neither a second connection nor psycopg.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from . import messages
from .errors import FEATURE_NOT_SUPPORTED, NULL_VALUE_NOT_ALLOWED, Report

_MAX_CHARACTERS = 1000
_ANSWER_TIMEOUT_S = 10.0


class Runtime:
    """What pg_background_progress needs, in one backend."""

    def __init__(self, plpy: Any, memory: dict[str, Any], key: str, read_source: Callable[[str], str]) -> None:
        del memory, key, read_source
        self._plpy = plpy
        self._path = messages.socket_path(ctypes.c_uint32.in_dll(ctypes.PyDLL(None), "MyDatabaseId").value)
        self._connection: socket.socket | None = None
        self._was_worker = False

    def retire(self) -> None:
        """Another runtime takes over."""
        self._drop()

    def progress(self, percent: int | None, text: str | None) -> str:
        """Report; the reply is empty or, outside of a worker, an error."""
        if percent is None:
            return (
                "!" + Report(NULL_VALUE_NOT_ALLOWED, "the progress of a background worker must not be null").to_json()
            )
        message = [messages.PROGRESS, max(0, min(100, percent)), None if text is None else text[:_MAX_CHARACTERS]]
        for _ in range(2):  # a supervisor may have gone, and another come
            if self._connection is None and not self._connect():
                break
            try:
                self._send(message)
            except OSError:
                self._drop()
            else:
                return ""
        if self._was_worker:
            return ""  # nobody listens at the moment; the next report finds the next supervisor
        return (
            "!"
            + Report(
                FEATURE_NOT_SUPPORTED,
                "pg_background_progress can be called by a background worker only",
                hint="Call it from the SQL that pg_background_launch_v2 or pg_background_submit_v2 runs.",
            ).to_json()
        )

    def _connect(self) -> bool:
        """Whether a supervisor is there, and knows this backend as a worker."""
        connection = messages.control_socket()
        try:
            connection.settimeout(_ANSWER_TIMEOUT_S)
            connection.connect(self._path)
            messages.send(connection, [messages.AM_I_WORKER, 1])
            received = messages.receive(connection)
        except (OSError, messages.ProtocolError):
            received = None
        if received is None or received.message[2] is not True:
            connection.close()
            return False
        connection.setblocking(False)
        self._connection = connection
        self._was_worker = True
        return True

    def _send(self, message: list[Any]) -> None:
        assert self._connection is not None
        try:
            messages.send(self._connection, message)
        except BlockingIOError:
            self._wait_until_writable(time.monotonic() + _ANSWER_TIMEOUT_S)
            messages.send(self._connection, message)

    def _wait_until_writable(self, deadline: float) -> None:
        from .server import WRITABLE, Server

        assert self._connection is not None
        if not Server(self._plpy).wait_for(((self._connection.fileno(), WRITABLE),), deadline):
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
