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


def main(plpy: Any, role_oid: int, database_oid: int, digest: str) -> None:
    """Serve a database. 55P03 when another supervisor does already."""
    store = Store(plpy)
    switch.become(plpy, role_oid, None, (), held_to_limits=False)
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
    listener = _listen(path)
    plpy.notice(READY)
    # Whoever started this may leave, and a notice to nobody would end it.
    plpy.execute("SELECT pg_catalog.set_config('client_min_messages', 'error', false)")
    plpy.commit()
    _raise_descriptor_limit()
    Supervisor(store, listener, path, lock_fd, digest, _interrupt_handler(plpy), _transaction_probe(plpy)).run()
    # A termination that was asked for happens now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    plpy.execute("SELECT 1")
    plpy.commit()
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


def _interrupt_handler(plpy: Any) -> Callable[[], bool]:
    """Lets the server act on a request of another session: a statement does. False: this backend must end.

    Its termination waits until it has written down what it knows: SIGTERM stays blocked. The server's clean-up
    after an error unblocks it, hence each time anew.
    """
    pending = ctypes.c_int.in_dll(ctypes.PyDLL(None), "InterruptPending")
    plan = plpy.prepare("SELECT 1")

    def handle() -> bool:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        if pending.value:
            try:
                plpy.execute(plan)
            except plpy.SPIError as error:
                if error.sqlstate != "57014":  # a cancel is not for us
                    raise
            plpy.commit()
        return signal.SIGTERM not in signal.sigpending()

    return handle


def _transaction_probe(plpy: Any) -> Callable[[int], bool]:
    """Tells whether a backend is inside of a transaction: it holds the lock on its own virtual transaction then."""
    plan = plpy.prepare(
        "SELECT FROM pg_catalog.pg_locks l WHERE l.pid OPERATOR(pg_catalog.=) $1 AND l.granted"
        " AND l.locktype OPERATOR(pg_catalog.=) 'virtualxid' AND l.mode OPERATOR(pg_catalog.=) 'ExclusiveLock'",
        ["pg_catalog.int4"],
    )

    def in_transaction(pid: int) -> bool:
        found = plpy.execute(plan, [pid]).nrows() > 0
        plpy.commit()
        return bool(found)

    return in_transaction
