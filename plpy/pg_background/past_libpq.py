"""What travels between a launcher and its worker past libpq, which stays idle and knows nothing of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import BackgroundError, backend_died
from .server import Server

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

AT_ONCE_BYTES = 1 << 16  # so many are read, and written where not all fits


def write_some(connection: PGconn, packet: bytes, pid: int) -> int:
    """Send what fits, and return how many bytes that is. 08006 when the backend, which has this pid, is gone."""
    try:
        return os.write(connection.socket, packet)
    except BlockingIOError:
        return 0
    except ConnectionError as error:
        raise BackgroundError(backend_died(pid, error.strerror)) from error


def read_some(server: Server, connection: PGconn, deadline: float | None) -> bytes:
    """What the worker has sent; empty when the connection has ended, or at the deadline."""
    while True:
        received = read_what_is_there(connection)
        if received is not None:
            return received
        if not server.wait_for_one(connection.socket, deadline):
            return b""


def read_what_is_there(connection: PGconn) -> bytes | None:
    """As read_some, without waiting: None where nothing has come yet."""
    try:
        return os.read(connection.socket, AT_ONCE_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""
