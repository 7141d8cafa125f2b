"""What the supervisor's backend runs: it becomes an unprivileged role, then serves until there is nothing to do."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

from . import messages, switch
from .store import Store
from .supervisor import Supervisor

READY = "pg_background supervisor is ready"
ANOTHER_SERVES = "55P03"
_QUERY_CANCELED = "57014"  # a cancel is not for the supervisor


def main(plpy: Any, role_oid: int, database_oid: int, digest: str) -> None:
    """Serve a database. 55P03 when another supervisor does already."""
    # PL/Python cannot pass on an error whose text is neither ASCII nor UTF-8, as a translated one may be.
    plpy.execute("SELECT pg_catalog.set_config('lc_messages', 'C', false)")
    store = Store(plpy)
    switch.become(plpy, role_oid, False, None, (), held_to_limits=False)
    plpy.commit()
    _prove_role(plpy, role_oid)

    path = messages.socket_path(database_oid)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    lock_fd = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        plpy.error("another supervisor serves this database", sqlstate=ANOTHER_SERVES)
    interrupts = _Interrupts(plpy)
    listener = _listen(path)
    plpy.notice(READY)
    # Whoever started this may leave, and a notice to nobody would end it.
    plpy.execute("SELECT pg_catalog.set_config('client_min_messages', 'error', false)")
    plpy.commit()
    _raise_descriptor_limit()
    Supervisor(store, listener, path, lock_fd, digest, interrupts.handle, _transaction_probe(plpy), plpy.log).run()
    # To return would be to answer a client that has gone, which is a FATAL error in the log.
    ctypes.PyDLL(None).proc_exit(0)


def _raise_descriptor_limit() -> None:
    """Workers need two descriptors each, of as many sessions as the server allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _prove_role(plpy: Any, role_oid: int) -> None:
    """End this backend unless it is the unprivileged role, for good."""
    shown = plpy.execute(
        "SELECT pg_catalog.quote_ident(CURRENT_USER)::pg_catalog.regrole::pg_catalog.oid AS current_oid,"
        " pg_catalog.quote_ident(SESSION_USER)::pg_catalog.regrole::pg_catalog.oid AS session_oid,"
        " pg_catalog.current_setting('is_superuser') AS is_superuser"
    )[0]
    plpy.commit()
    if (int(shown["current_oid"]), int(shown["session_oid"]), shown["is_superuser"]) != (role_oid, role_oid, "off"):
        plpy.fatal("the supervisor of pg_background did not become its role")


def _listen(path: str) -> socket.socket:
    """A socket that listens at the path from the moment that the path is there."""
    unready = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unready)
    listener = messages.control_socket()
    listener.setblocking(False)
    listener.bind(unready)
    listener.listen(128)
    os.rename(unready, path)
    return listener


class _Interrupts:
    """Requests of other sessions. A termination waits until the supervisor has written down what it knows."""

    def __init__(self, plpy: Any) -> None:
        """From here on the server's own handler of SIGTERM is not called: it would end the next statement."""
        self._plpy = plpy
        self._pending = ctypes.c_int.in_dll(ctypes.PyDLL(None), "InterruptPending")
        self._plan = plpy.prepare("SELECT 1")
        self._terminations = 0
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.siginterrupt(signal.SIGTERM, False)

    def _on_terminate(self, *_: object) -> None:
        self._terminations += 1

    def handle(self) -> int:
        """Let the server act on requests: a statement does. Returns how often the end was asked for."""
        if self._pending.value:
            try:
                self._plpy.execute(self._plan)
            except self._plpy.SPIError as error:
                if error.sqlstate != _QUERY_CANCELED:
                    raise
            self._plpy.commit()
        return self._terminations


def _transaction_probe(plpy: Any) -> Callable[[int], bool]:
    """Tells whether a backend is inside of a transaction: it holds the lock on its own virtual transaction then."""
    plan = plpy.prepare(
        "SELECT FROM pg_catalog.pg_locks l WHERE l.pid OPERATOR(pg_catalog.=) $1 AND l.granted"
        " AND l.locktype OPERATOR(pg_catalog.=) 'virtualxid' AND l.mode OPERATOR(pg_catalog.=) 'ExclusiveLock'",
        ["pg_catalog.int4"],
    )

    def in_transaction(pid: int) -> bool:
        while True:
            try:
                found = plpy.execute(plan, [pid]).nrows() > 0
            except plpy.SPIError as error:
                if error.sqlstate != _QUERY_CANCELED:
                    raise
                continue
            plpy.commit()
            return bool(found)

    return in_transaction
