"""Rows of a worker against rows of dblink: times, ratios, and the launching backend's memory.

    .venv/bin/python bench/rows.py "host=... user=postgres dbname=..." [--runs 5] [--memory]

The database needs the extensions pg_background and dblink; both ways run in one session, in turn, and only their
ratio means something on another machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg


class Scenario(NamedTuple):
    """A result to fetch: its query, its column list, and the ratio to dblink that is the target and the aim."""

    name: str
    query: str
    columns: str
    target: float | None = None
    aim: float | None = None


_FIFTY = 50
SCENARIOS = (
    Scenario("2M x int", "SELECT g FROM generate_series(1, 2000000) g", "a int", 1.2, 0.8),
    Scenario(
        "1M x (int, text, timestamptz, float8)",
        "SELECT g, 'row ' || g, timestamptz '2024-01-01' + g * interval '1s', g / 7.0::float8"
        " FROM generate_series(1, 1000000) g",
        "a int, b text, c timestamptz, d float8",
        1.4,
        1.0,
    ),
    Scenario(
        "10,000 x 50 int",
        "SELECT " + ", ".join(["g"] * _FIFTY) + " FROM generate_series(1, 10000) g",
        ", ".join(f"c{i} int" for i in range(_FIFTY)),
        3.3,
        2.0,
    ),
    Scenario(
        "1M x text with NULLs",
        "SELECT CASE WHEN g % 3 <> 0 THEN 'row ' || g END FROM generate_series(1, 1000000) g",
        "a text",
    ),
    Scenario(
        "200,000 x (int[], numeric(10,2), jsonb)",
        "SELECT ARRAY[g, g + 1], (g / 3.0)::numeric(10,2), jsonb_build_object('a', g)"
        " FROM generate_series(1, 200000) g",
        "a int[], b numeric(10,2), c jsonb",
    ),
    Scenario("20,000 x 1 kB text", "SELECT repeat('0123456789abcdef', 64) FROM generate_series(1, 20000)", "a text"),
    Scenario("1 row", "SELECT 1", "a int"),
)
_FIRST_CALL = "SELECT * FROM pg_background_launch_v2('SELECT 1') h, pg_background_result_v2(h.pid, h.cookie) AS (a int)"
_MEMORY_QUERY = "SELECT g FROM generate_series(1, 10000000) g"


class Timing(NamedTuple):
    """Seconds of one run each, worker and dblink in turn."""

    worker: list[float]
    dblink: list[float]

    @property
    def ratio(self) -> float:
        """Median of the worker's times over the median of dblink's."""
        return statistics.median(self.worker) / statistics.median(self.dblink)


def _timed(session: psycopg.Connection[Any], query: str, parameters: tuple[object, ...] = ()) -> float:
    started = time.perf_counter()
    session.execute(query, parameters)
    return time.perf_counter() - started


def run(session: psycopg.Connection[Any], scenario: Scenario, runs: int) -> Timing:
    """Times one scenario; the rows are counted in the server, so that the client costs nothing."""
    timing = Timing([], [])
    for _ in range(runs):
        started = time.perf_counter()
        session.execute(
            "SELECT count(*) FROM pg_background_launch_v2(%s) h,"
            f" LATERAL pg_background_result_v2(h.pid, h.cookie) AS r({scenario.columns})",
            (scenario.query,),
        )
        timing.worker.append(time.perf_counter() - started)
        query = f"SELECT count(*) FROM dblink('bench', %s) AS r({scenario.columns})"
        timing.dblink.append(_timed(session, query, (scenario.query,)))
    return timing


def resident_kb(pid: int) -> dict[str, int]:
    """Private memory of a process now and at its peak, in kB: Linux's RssAnon and VmHWM."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmHWM:")}


def memory(conninfo: str) -> Iterator[str]:
    """How much a 10M-row result adds to the launching backend. Needs the server on this machine, and its /proc."""
    with psycopg.connect(conninfo, autocommit=True) as session:
        pid = session.info.backend_pid
        session.execute(_FIRST_CALL)
        before = resident_kb(pid)
        session.execute(
            "SELECT count(*) FROM pg_background_launch_v2(%s) h,"
            " LATERAL pg_background_result_v2(h.pid, h.cookie) AS r(a int)",
            (_MEMORY_QUERY,),
        )
        after = resident_kb(pid)
    for name in before:
        growth_mb = (after[name] - before[name]) / 1024
        yield f"{name}: {before[name]} kB before, {after[name]} kB after, + {growth_mb:.1f} MB"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Rows of a worker against dblink")
    parser.add_argument("conninfo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="the launching backend's memory over 10M rows, too")
    arguments = parser.parse_args()
    with psycopg.connect(arguments.conninfo, autocommit=True) as session:
        version = session.execute("SELECT version()").fetchone()
        print(f"{version[0] if version else ''}\n{platform.platform()}, {platform.machine()}, {_processor()}")
        session.execute("SELECT dblink_connect('bench', %s)", (_loopback(session),))
        for name in ("work_mem", "max_parallel_workers_per_gather"):
            session.execute("SELECT set_config(%s, %s, false)", (name, {"work_mem": "64MB"}.get(name, "0")))
        session.execute(_FIRST_CALL)
        print(f"{'result':58} {'worker ms':>22} {'dblink ms':>10} {'ratio':>6} {'target':>6} {'aim':>5}")
        for scenario in SCENARIOS:
            timing = run(session, scenario, arguments.runs)
            worker = [seconds * 1000 for seconds in timing.worker]
            spread = f"{statistics.median(worker):.1f} ({min(worker):.1f}..{max(worker):.1f})"
            dblink_ms = statistics.median(timing.dblink) * 1000
            print(
                f"{scenario.name:58} {spread:>22} {dblink_ms:>10.1f} {timing.ratio:>6.2f}"
                f" {scenario.target or '':>6} {scenario.aim or '':>5}"
            )
    if arguments.memory:
        print("memory of the launching backend over 10M rows")
        for line in memory(arguments.conninfo):
            print("  " + line)


def _loopback(session: psycopg.Connection[Any]) -> str:
    info = session.info
    return f"host={info.host} port={info.port} dbname={info.dbname} user={info.user}"


def _processor() -> str:
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(models)} x {models[0]}" if models else "unknown processor"


if __name__ == "__main__":
    main()
