"""A scratch PostgreSQL server with stock Debian authentication, gone when the block ends."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SERVER_USER = "postgres"

# What Debian's packages write: the OS user over the socket, a password over TCP.
_PG_HBA = """\
local   all   postgres                   peer
local   all   all                        peer
host    all   all        127.0.0.1/32    scram-sha-256
host    all   all        ::1/128         scram-sha-256
"""

# Nothing here is to survive a crash, so it need not wait for the disk.
_SETTINGS = """\
listen_addresses = '127.0.0.1'
fsync = off
synchronous_commit = off
full_page_writes = off
max_wal_size = '4GB'
shared_buffers = '512MB'
autovacuum = off
"""


class ScratchServer(NamedTuple):
    """A running scratch server; `folder` holds its data directory, log and socket."""

    bin_folder: Path
    folder: Path
    port: int

    def psql(self, sql: str, database: str = "postgres") -> None:
        """Run SQL as the superuser, over the socket."""
        command = [self.bin_folder / "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-h", self.folder]
        run_as_server([*command, "-p", str(self.port), "-d", database, "-c", sql], self.folder)


def server_user() -> str:
    """The OS user that runs the server: PostgreSQL refuses root."""
    return SERVER_USER if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


def run_as_server(command: Sequence[object], folder: Path) -> None:
    """Run a command as the server's OS user; RuntimeError with its output when it fails."""
    prefix = ["runuser", "-u", SERVER_USER, "--"] if os.geteuid() == 0 else []
    # The output goes to a file: a server that pg_ctl started would keep a pipe open for good.
    with (folder / "commands.log").open("ab") as log:
        started = log.tell()
        done = subprocess.run([*prefix, *map(str, command)], stdout=log, stderr=log, cwd=folder, check=False)
    if done.returncode != 0:
        output = (folder / "commands.log").read_bytes()[started:].decode(errors="replace")
        raise RuntimeError(f"{command[0]} failed:\n{output.strip()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _create(server: ScratchServer, settings: str, pg_hba: str) -> None:
    """Initialize the cluster and start it."""
    data = server.folder / "data"
    user = server_user()
    initdb = [server.bin_folder / "initdb", "-D", data, "-U", user, "-E", "UTF8", "--locale=C.UTF-8"]
    run_as_server([*initdb, "--auth=peer", "--no-sync"], server.folder)
    (data / "pg_hba.conf").write_text(pg_hba, "ascii")
    with (data / "postgresql.conf").open("a", encoding="ascii") as conf:
        conf.write(f"{settings}port = {server.port}\nunix_socket_directories = '{server.folder}'\n")
    pg_ctl = [server.bin_folder / "pg_ctl", "-D", data, "-l", server.folder / "server.log"]
    run_as_server([*pg_ctl, "-w", "-t", "60", "start"], server.folder)


def _remove(server: ScratchServer) -> None:
    """Stop the server if it runs, and remove its folder."""
    data = server.folder / "data"
    try:
        if (data / "postmaster.pid").exists():
            pg_ctl = [server.bin_folder / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"]
            run_as_server(pg_ctl, server.folder)
    finally:
        shutil.rmtree(server.folder)


def _exit_on_sigterm(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


@contextmanager
def scratch_server(bin_folder: Path, *, settings: str = _SETTINGS, pg_hba: str = _PG_HBA) -> Iterator[ScratchServer]:
    """A new server, started; stopped and removed when the block ends, by Ctrl-C or SIGTERM too."""
    folder = Path(tempfile.mkdtemp(prefix="pg_background-demo-"))
    server = ScratchServer(bin_folder, folder, _free_port())
    before = signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, SERVER_USER, SERVER_USER)
        _create(server, settings, pg_hba)
        yield server
    finally:
        # A second Ctrl-C must not leave a server behind.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            _remove(server)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, before)
