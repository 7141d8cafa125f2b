"""Has libpq take in messages that did not come from the worker: what another has read in its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
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
    descriptor = connection.socket
    try:
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            there.setblocking(False)
            kept = os.dup(descriptor)
            try:
                os.dup2(there.fileno(), descriptor, inheritable=False)
                for packet in packets:
                    _feed(connection, here, packet)
            finally:
                os.dup2(kept, descriptor, inheritable=False)
                os.close(kept)
                if connection.status != _CONNECTION_OK:
                    os.close(descriptor)  # libpq has closed the one that had its number
    except Exception:  # noqa: BLE001 - no descriptor is left (OSError), libpq gave it up (psycopg.OperationalError)
        return False
    return connection.transaction_status == _IDLE


def _feed(connection: PGconn, source: socket.socket, packet: bytes) -> None:
    for start in range(0, len(packet), _FED_BYTES):  # so many libpq reads at once
        source.sendall(packet[start : start + _FED_BYTES])
        connection.consume_input()
        is_busy = connection.is_busy()
    while not is_busy and connection.get_result() is not None:
        is_busy = connection.is_busy()
