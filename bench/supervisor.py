#!/usr/bin/env python3
"""Measures the supervisor on a scratch server: messages a second on one core, its memory, and its table's size.

What counts is the processor time that it takes for the messages of real sessions and workers, by the kernel:
other processes on the machine do not bend it. `--jobs` submitted jobs, then as many reports of progress, then
`--many` jobs for its memory; a supervisor makes room for a successor after 50,000 rows, which is part of that.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.scratch import ScratchServer, scratch_server  # noqa: E402
from tools.installing import find_server  # noqa: E402

_SETTINGS = """\
max_connections = 50
listen_addresses = ''
"""
_WARM_UP_JOBS = 3000  # the memory that it keeps of finished jobs is full by then
_SUPERVISOR = (
    "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background supervisor'"
    " AND datname = current_database() ORDER BY backend_start DESC LIMIT 1"
)
_BATCH = 1000


class Usage(NamedTuple):
    """What a process has used so far."""

    cpu_s: float
    resident_kb: int


def usage(pid: int) -> Usage:
    """Processor time and memory of a process."""
    nanoseconds = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return Usage(nanoseconds / 1e9, int(resident.split()[1]))


def submit(session: psycopg.Connection, jobs: int) -> None:
    """Submit so many jobs, and wait for the last one."""
    query = "SELECT count(pg_background_submit_v2('SELECT 1')) FROM generate_series(1, %s)"
    for _ in range(0, jobs, _BATCH):
        session.execute(query, (_BATCH,))
    session.execute("SELECT pg_background_wait_v2(h.pid, h.cookie) FROM pg_background_submit_v2('SELECT 1') h")


def report(session: psycopg.Connection, reports: int) -> None:
    """Have a worker report its progress so often."""
    loop = f"DO $$BEGIN FOR i IN 1..{reports} LOOP PERFORM pg_background_progress(i % 100, 'step'); END LOOP; END$$"
    query = "SELECT pg_background_wait_v2(h.pid, h.cookie) FROM pg_background_launch_v2(%s) h"
    session.execute(query, (loop,))


def measured(session: psycopg.Connection, what: str, count: int, work: Callable[[], None]) -> str:
    """What the supervisor takes for `count` of something."""
    pid = supervisor(session)
    before, started = usage(pid), time.monotonic()
    work()
    wall_s, now = time.monotonic() - started, supervisor(session)
    after = usage(now)
    memory = f"{count / wall_s:,.0f} a second came; memory {after.resident_kb:,} kB, before {before.resident_kb:,} kB"
    if now != pid:
        return f"{count:,} {what}: {memory}, another supervisor by now"
    cpu_s = after.cpu_s - before.cpu_s
    return f"{count:,} {what}: {count / cpu_s:,.0f} a second on one core ({1e6 * cpu_s / count:.1f} µs each); {memory}"


def supervisor(session: psycopg.Connection) -> int:
    """Process id of the newest supervisor."""
    (pid,) = session.execute(_SUPERVISOR).fetchone() or (0,)
    return int(pid)


def measure(server: ScratchServer, database: str, jobs: int, many: int) -> Iterator[str]:
    """All figures."""
    conninfo = f"host={server.folder} port={server.port} user=postgres dbname={database}"
    with psycopg.connect(conninfo, autocommit=True) as session:
        session.execute("CREATE EXTENSION pg_background CASCADE")
        session.execute("SET pg_background.launch_timeout = '60s'")
        submit(session, _WARM_UP_JOBS)
        yield measured(session, "jobs", jobs, lambda: submit(session, jobs))
        yield measured(session, "reports of progress", jobs, lambda: report(session, jobs))
        if many:
            yield measured(session, "jobs", many, lambda: submit(session, many))
        size = session.execute("SELECT pg_size_pretty(pg_relation_size('_pg_background_worker'))").fetchone()
        rows = session.execute("SELECT count(*) FROM pg_background_activity").fetchone()
        yield f"its table: {size and size[0]} for {rows and rows[0]:,} rows"


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--pg-config", help="of the server to measure")
    arguments = parser.parse_args()
    bin_folder = Path(find_server(arguments.pg_config).pg_config).parent
    with scratch_server(bin_folder, settings=_SETTINGS, pg_hba="local all all trust\n") as scratch:
        print(f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}")
        for line in measure(scratch, "postgres", arguments.jobs, arguments.many):
            print(line, flush=True)


if __name__ == "__main__":
    main()
