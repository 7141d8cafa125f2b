"""Has libpq take in messages that did not come from the worker, and send some to nobody: what was read in its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import wire

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

_FED_BYTES = 1 << 13
_IDLE = 0  # TransactionStatus.IDLE
_CONNECTION_OK = 0  # ConnStatus.OK


def has_heard(connection: PGconn, reports: wire.Reports) -> bool:
    """Tell libpq what has become of settings, as another has read; whether it knows that now."""
    untold = {name: value for name, value in reports.items() if _reported(connection, name) != value}
    packets = [wire.report_message(name, value) for name, value in untold.items() if value is not None]
    told = not packets or has_read(connection, packets)
    return told and all(_reported(connection, name) == value for name, value in untold.items())


def _reported(connection: PGconn, name: str) -> str:
    return (connection.parameter_status(name.encode("latin-1")) or b"").decode("latin-1")


def has_read(connection: PGconn, packets: Sequence[bytes]) -> bool:
    """Have libpq take messages in that did not come from the worker, and be idle then.

    It reads them from another socket, which takes the connection's place for that moment.
    """
    try:
        with _in_its_place(connection) as source:
            for packet in packets:
                for _ in _feed(connection, source, packet):
                    is_busy = connection.is_busy()
                while not is_busy and connection.get_result() is not None:
                    is_busy = connection.is_busy()
    except Exception:  # noqa: BLE001 - no descriptor is left (OSError), libpq gave it up (psycopg.OperationalError)
        return False
    return connection.transaction_status == _IDLE


def has_taken_over(connection: PGconn, ask: Callable[[], None], received: bytes) -> bool:
    """Have libpq read the rest of an answer, as if it had asked; False where no descriptor is left for that.

    ask: sends any query, which goes to nobody. received: what of the answer has been read already.
    """
    try:
        with _in_its_place(connection) as source:
            ask()
            for _ in _feed(connection, source, received):
                pass
    except OSError:
        return False
    return True


@contextmanager
def _in_its_place(connection: PGconn) -> Iterator[socket.socket]:
    """Another socket takes the place of the connection's meanwhile; its other end. OSError where that cannot be."""
    descriptor = connection.socket
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        there.setblocking(False)
        kept = os.dup(descriptor)
        try:
            os.dup2(there.fileno(), descriptor, inheritable=False)
            yield here
        finally:
            os.dup2(kept, descriptor, inheritable=False)
            os.close(kept)
            if connection.status != _CONNECTION_OK:
                os.close(descriptor)  # libpq has closed the one that had its number


def _feed(connection: PGconn, source: socket.socket, packet: bytes) -> Iterator[None]:
    """Give libpq a packet, a piece at a time: so many bytes it reads at once."""
    for start in range(0, len(packet), _FED_BYTES):
        source.sendall(packet[start : start + _FED_BYTES])
        connection.consume_input()
        yield
