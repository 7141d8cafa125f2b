"""The supervisor, as tests look at it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.clusters import SUPERVISOR_NAME, Cluster, Session, wait_until

_SUPERVISORS = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"


def supervisor_pids(session: Session) -> list[int]:
    """Process ids of the supervisors of this session's database, as of now in a transaction too."""
    session.execute("SELECT pg_stat_clear_snapshot()")
    return [pid for (pid,) in session.rows(_SUPERVISORS, (SUPERVISOR_NAME,))]


def supervisor_pid(session: Session) -> int:
    """Process id of the one supervisor; one that makes room for it may need a moment."""
    wait_until(lambda: len(supervisor_pids(session)) == 1, what="one supervisor")
    (pid,) = supervisor_pids(session)
    return pid


def terminate_supervisor(session: Session) -> int:
    """Terminates the supervisor, as the session's superuser, so often that it waits for no job; its process id."""
    pid = supervisor_pid(session)

    def ended() -> bool:
        return session.value("SELECT pg_terminate_backend(%s, 100)", (pid,)) or pid not in supervisor_pids(session)

    wait_until(ended, what="its end")
    return pid


def control_path(cluster: Cluster, session: Session) -> Path:
    """The control socket of the session's database."""
    oid = session.value("SELECT oid FROM pg_database WHERE datname = current_database()")
    return cluster.datadir / f"base/pgsql_tmp/pgsql_tmp_pg_background.{oid}"


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[0]) / 1e9


def descriptors(pid: int) -> int:
    """How many sockets and processes a process has open; files of tables come and go."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(descriptor.readlink()))
    return sum(1 for link in links if link.startswith("socket:") or "pidfd" in link)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    try:
        yield
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)
