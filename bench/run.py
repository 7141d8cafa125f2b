#!/usr/bin/env python3
"""Measures pg_background beside its rivals on a scratch server, in one run, and writes docs/benchmarks.md with a plot.

Rivals: dblink on an open connection, dblink with a connection per call, and a client of psycopg on a kept connection as
the floor. All run interleaved, `--repeats` times; what counts are the ratios of the medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import psycopg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.costs import memory, the_supervisor, where_the_time_goes  # noqa: E402
from bench.floor import step_by_step  # noqa: E402
from examples.scratch import ScratchServer, scratch_server  # noqa: E402
from tools.installing import find_server  # noqa: E402

REPORT, PLOT = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"
NOTES = ROOT / "bench" / "notes.md"  # what the figures mean: text, no figures of this run
OURS, OPEN, PER_CALL, FLOOR = (
    "pg_background",
    "dblink, open connection",
    "dblink, connection per call",
    "psycopg client",
)
INSERT = "INSERT INTO log VALUES (1, 'audit')"
_FAN_OUTS = 20  # in a row, so that all are warm

_SETTINGS = """\
max_connections = 620
listen_addresses = ''
shared_buffers = '512MB'
"""
_PG_HBA = "local all all trust\n"

_SCHEMA = """
CREATE TABLE log (id int, what text);
CREATE TABLE wide AS SELECT {columns} FROM generate_series(1, 10000) g;
CREATE PROCEDURE pairs(n int) LANGUAGE plpgsql AS $$
DECLARE h pg_background_handle;
BEGIN
    FOR i IN 1..n LOOP
        h := pg_background_launch_v2('{insert}');
        PERFORM * FROM pg_background_result_v2(h.pid, h.cookie) AS (tag text);
    END LOOP;
END $$;
CREATE PROCEDURE launches(n int) LANGUAGE plpgsql AS $$
DECLARE h pg_background_handle;
BEGIN
    FOR i IN 1..n LOOP
        h := pg_background_launch_v2('{insert}');
        PERFORM pg_background_detach_v2(h.pid, h.cookie);
    END LOOP;
END $$;
CREATE PROCEDURE submits(n int) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP
        PERFORM pg_background_submit_v2('{insert}');
    END LOOP;
END $$;
CREATE PROCEDURE fan_out(width int) LANGUAGE plpgsql AS $$
DECLARE h pg_background_handle; hs pg_background_handle[];
BEGIN
    FOR i IN 1..width LOOP
        hs := hs || pg_background_launch_v2('SELECT 1');
    END LOOP;
    FOREACH h IN ARRAY hs LOOP
        PERFORM * FROM pg_background_result_v2(h.pid, h.cookie) AS (one int);
    END LOOP;
END $$;
CREATE PROCEDURE fan_outs(width int, n int) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP
        CALL fan_out(width);
    END LOOP;
END $$;
CREATE PROCEDURE dblink_open(n int) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP
        PERFORM dblink_exec('kept', '{insert}');
    END LOOP;
END $$;
CREATE PROCEDURE dblink_per_call(n int, conninfo text) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP
        PERFORM dblink_connect_u('once', conninfo);
        PERFORM dblink_exec('once', '{insert}');
        PERFORM dblink_disconnect('once');
    END LOOP;
END $$;
"""


class Measured(NamedTuple):
    """Seconds of every repeat, by rival."""

    scenario: str
    unit: str
    scale: float
    seconds: dict[str, list[float]]


class Session:
    """A session of an ordinary role, with a kept dblink connection."""

    def __init__(self, server: ScratchServer, role: str, **settings: object) -> None:
        self.conninfo = f"host={server.folder} port={server.port} dbname=bench user={role}"
        self.connection = psycopg.connect(self.conninfo, autocommit=True)
        for name, value in settings.items():
            self.execute(f"SET pg_background.{name} = '{value}'")

    def execute(self, sql: str) -> None:
        """Run a statement."""
        self.connection.execute(sql)

    def value(self, sql: str) -> float:
        """The only value of a query."""
        row = self.connection.execute(sql).fetchone()
        assert row is not None
        return float(row[0])

    def timed(self, sql: str, calls: int = 1) -> float:
        """Seconds a call."""
        started = time.perf_counter()
        self.execute(sql)
        return (time.perf_counter() - started) / calls


def interleaved(
    scenario: str, rivals: dict[str, Callable[[], float]], repeats: int, unit: str = "µs", scale: float = 1e6
) -> Measured:
    """Every rival once to warm up, then all of them in turn."""
    for run in rivals.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            seconds[name].append(run())
    measured = Measured(scenario, unit, scale, seconds)
    print(_text_row(measured), flush=True)
    return measured


def _text_row(measured: Measured) -> str:
    medians = {name: statistics.median(values) * measured.scale for name, values in measured.seconds.items()}
    return f"{measured.scenario}: " + ", ".join(
        f"{name} {value:.1f} {measured.unit}" for name, value in medians.items()
    )


def small_jobs(server: ScratchServer, repeats: int) -> Iterable[Measured]:
    """Autonomous transactions and what they are made of."""
    warm = Session(server, "app", pool_size=16, launch_timeout="10s")
    fresh = Session(server, "app", pool_size=0)
    fresh_superuser = Session(server, "postgres", pool_size=0)
    warm.execute(f"SELECT dblink_connect_u('kept', '{warm.conninfo}')")
    client = psycopg.connect(warm.conninfo, autocommit=True)

    def floor(calls: int = 200) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            client.execute(INSERT)
        return (time.perf_counter() - started) / calls

    per_call = f"CALL dblink_per_call(20, '{warm.conninfo}')"
    kept = {
        OPEN: lambda: warm.timed("CALL dblink_open(200)", 200),
        PER_CALL: lambda: warm.timed(per_call, 20),
        FLOOR: floor,
    }
    yield interleaved(
        "autonomous transaction: launch + result of one INSERT, warm",
        {OURS: lambda: warm.timed("CALL pairs(200)", 200), **kept},
        repeats,
    )
    yield interleaved(
        "the same, a fresh backend each (pool_size 0), ordinary role",
        {OURS: lambda: fresh.timed("CALL pairs(10)", 10), PER_CALL: lambda: warm.timed(per_call, 20)},
        repeats,
    )
    yield interleaved(
        "the same, a fresh backend each (pool_size 0), login role",
        {OURS: lambda: fresh_superuser.timed("CALL pairs(10)", 10), PER_CALL: lambda: warm.timed(per_call, 20)},
        repeats,
    )
    yield interleaved(
        "submit, a burst of 1,000, a call",
        {
            OURS: lambda: warm.timed("CALL submits(1000)", 1000),
            OPEN: lambda: warm.timed("CALL dblink_open(1000)", 1000),
        },
        repeats,
    )
    _wait_until_idle(warm)
    detaching = Session(server, "app", pool_size=16)  # the kept sessions of the other are those of its submitted jobs
    yield interleaved("launch alone (detached)", {OURS: lambda: _launches(detaching)}, repeats)


def _launches(session: Session) -> float:
    seconds = session.timed("CALL launches(8)", 8)
    _wait_until_idle(session)
    return seconds


def _wait_until_idle(session: Session) -> None:
    """Until no worker of this database runs any more."""
    deadline = time.monotonic() + 30
    while session.value("SELECT count(*) FROM pg_background_activity WHERE state = 'running'"):
        if time.monotonic() > deadline:
            raise RuntimeError("workers still run after 30 s")


def fan_outs(server: ScratchServer, repeats: int) -> Iterable[Measured]:
    """SELECT 1 in so many workers at once, and their results."""
    session = Session(server, "app", pool_size=16)

    def fresh() -> float:
        new = Session(server, "app", pool_size=8)
        new.execute("CALL fan_out(1)")
        seconds = new.timed("CALL fan_out(8)")
        new.connection.close()
        return seconds

    for width in (1, 2, 4, 8, 16):
        call = f"CALL fan_outs({width}, {_FAN_OUTS})"
        name = f"fan-out of {width} × SELECT 1 and gather, warm"
        session.execute(call)
        yield interleaved(name, {OURS: lambda: session.timed(call) / _FAN_OUTS}, repeats)  # noqa: B023
    yield interleaved("fan-out of 8, in a session's second call", {OURS: fresh}, repeats, "ms", 1e3)


def rows(server: ScratchServer, repeats: int) -> Iterable[Measured]:
    """Results of many rows."""
    session = Session(server, "app")
    session.execute(f"SELECT dblink_connect_u('kept', '{session.conninfo}')")
    columns = ", ".join(f"c{n}" for n in range(1, 51))
    shapes = {
        "2M rows of one int": ("SELECT g FROM generate_series(1, 2000000) g", "(a int)"),
        "1M rows of int, text, timestamptz, float8": (
            (
                "SELECT g, 'row ' || g, timestamptz '2024-01-01' + g * interval '1 s', g / 7.0::float8"
                " FROM generate_series(1, 1000000) g"
            ),
            "(a int, b text, c timestamptz, d float8)",
        ),
        "10,000 rows of 50 columns": (
            f"SELECT {columns} FROM wide",
            "(" + ", ".join(f"c{n} {'int' if n % 2 else 'text'}" for n in range(1, 51)) + ")",
        ),
    }
    for scenario, (query, shape) in shapes.items():
        literal = "'" + query.replace("'", "''") + "'"
        ours = f"SELECT count(*) FROM pg_background_result(pg_background_launch({literal})) AS {shape}"
        rival = f"SELECT count(*) FROM dblink('kept', {literal}) AS t{shape}"
        yield interleaved(
            scenario,
            {OURS: lambda: session.timed(ours), OPEN: lambda: session.timed(rival)},  # noqa: B023
            min(repeats, 5),
            "ms",
            1e3,
        )


def waits(server: ScratchServer, repeats: int) -> Iterable[Measured]:
    """Progress, wake-ups, and what a session's first call costs."""
    session = Session(server, "app")
    one = "pg_background_wait_v2(h.pid, h.cookie)"
    yield interleaved("wake-up after the end of the work", {OURS: lambda: _wake_up(session, 0.02, one)}, repeats)
    yield _wait_any_among(server, 100, repeats)

    progress = (
        "SELECT * FROM pg_background_result(pg_background_launch('SELECT extract(epoch FROM b - a)::float8 FROM"
        " (SELECT clock_timestamp() AS a, (SELECT count(pg_background_progress(g / 100, ''step'')) FROM"
        " generate_series(1, 10000) g), clock_timestamp() AS b OFFSET 0) AS t')) AS (s float8)"
    )
    yield interleaved("progress call, 10,000 in a loop", {OURS: lambda: session.value(progress) / 10000}, repeats)

    fresh = Session(server, "app", pool_size=0)
    once = (
        "SELECT * FROM pg_background_result(pg_background_launch('SELECT extract(epoch FROM b - a)::float8 FROM"
        " (SELECT clock_timestamp() AS a, pg_background_progress(1), clock_timestamp() AS b OFFSET 0) AS t'))"
        " AS (s float8)"
    )
    yield interleaved("first progress call of a fresh backend", {OURS: lambda: fresh.value(once)}, repeats, "ms", 1e3)

    def first() -> float:
        with psycopg.connect(session.conninfo, autocommit=True) as connection:
            started = time.perf_counter()
            connection.execute("SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (one int)")
            return time.perf_counter() - started

    def second() -> float:
        with psycopg.connect(session.conninfo, autocommit=True) as connection:
            query = "SELECT * FROM pg_background_result(pg_background_launch('SELECT 1')) AS (one int)"
            connection.execute(query)
            started = time.perf_counter()
            connection.execute(query)
            return time.perf_counter() - started

    yield interleaved("first call of a session", {OURS: first}, repeats, "ms", 1e3)
    yield interleaved("second call of a session", {OURS: second}, repeats, "ms", 1e3)


def _wake_up(session: Session, seconds: float, wait: str) -> float:
    """From the end of a worker `h` that sleeps so long to the return of this call."""
    session.execute(f"""
        DO $$
        DECLARE h pg_background_handle; ended timestamptz;
        BEGIN
            h := pg_background_launch_v2('SELECT pg_sleep({seconds}), clock_timestamp()');
            PERFORM {wait};
            PERFORM set_config('bench.woke', extract(epoch FROM clock_timestamp())::text, false);
            SELECT at INTO ended FROM pg_background_result_v2(h.pid, h.cookie) AS (v text, at timestamptz);
            PERFORM set_config('bench.ended', extract(epoch FROM ended)::text, false);
        END $$""")
    return session.value("SELECT current_setting('bench.woke')::float8 - current_setting('bench.ended')::float8")


def _wait_any_among(server: ScratchServer, workers: int, repeats: int) -> Measured:
    """From the end of one of them to the return of wait_any_v2."""
    session = Session(server, "app", max_workers=2 * workers)
    launches = "pg_background_launch_v2('SELECT pg_sleep(600)', 0 * g) AS h"  # for each g
    sleepers = f"SELECT h.* FROM generate_series(2, {workers}) AS g, {launches}"
    session.execute("CREATE TEMP TABLE sleepers (pid int4, cookie int8); INSERT INTO sleepers " + sleepers)
    handles = "(SELECT array_agg(ROW(s.pid, s.cookie)::pg_background_handle) || h FROM sleepers s)"
    any_of_them = f"pg_background_wait_any_v2({handles}, 0)"
    scenario = f"wake-up of wait_any_v2 among {workers} workers"
    measured = interleaved(scenario, {OURS: lambda: _wake_up(session, 0.05, any_of_them)}, repeats)
    session.execute("SELECT pg_background_cancel_all_v2()")
    session.connection.close()
    return measured


def _pairs_for(conninfo: str, seconds: float, start: object, counts: object) -> None:
    connection = psycopg.connect(conninfo, autocommit=True)
    connection.execute("CALL pairs(5)")
    start.wait()  # type: ignore[attr-defined]
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        connection.execute("CALL pairs(20)")
        done += 20
    counts.put(done)  # type: ignore[attr-defined]


def _inserts_for(conninfo: str, seconds: float, start: object, counts: object) -> None:
    connection = psycopg.connect(conninfo, autocommit=True)
    connection.execute(INSERT)
    start.wait()  # type: ignore[attr-defined]
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for _ in range(20):
            connection.execute(INSERT)
        done += 20
    counts.put(done)  # type: ignore[attr-defined]


def sessions_at_once(server: ScratchServer, repeats: int) -> Iterable[Measured]:
    """Throughput of several sessions: seconds a transaction, all sessions together."""
    conninfo = f"host={server.folder} port={server.port} dbname=bench user=app"

    def together(target: Callable[..., None], count: int, seconds: float = 1.5) -> float:
        start, counts = multiprocessing.Barrier(count), multiprocessing.Queue()
        processes = [
            multiprocessing.Process(target=target, args=(conninfo, seconds, start, counts)) for _ in range(count)
        ]
        for process in processes:
            process.start()
        total = sum(counts.get() for _ in processes)
        for process in processes:
            process.join()
        return seconds / float(total)

    for count in (1, 2, 4, 8, 16):
        yield interleaved(
            f"{count} sessions at once, a transaction",
            {
                OURS: lambda: together(_pairs_for, count),  # noqa: B023
                FLOOR: lambda: together(_inserts_for, count),  # noqa: B023
            },
            min(repeats, 3),
        )


def tracked_workers(server: ScratchServer, repeats: int) -> Iterable[Measured]:
    """What a call costs with so many workers tracked."""
    for count in (1, 50, 200, 500):
        session = Session(server, "app", max_workers=1000, pool_size=0)
        session.execute(f"SELECT pg_background_launch_v2('SELECT pg_sleep(600)') FROM generate_series(1, {count})")
        query = "SELECT count(*) FROM pg_background_list"
        yield interleaved(f"list of {count} tracked workers", {OURS: lambda: session.timed(query)}, repeats)  # noqa: B023
        session.execute("SELECT pg_background_cancel_v2(pid, cookie) FROM pg_background_list")
        session.execute("SELECT pg_background_wait_v2(pid, cookie) FROM pg_background_list")
        session.connection.close()


def environment(server: ScratchServer, bin_folder: Path) -> list[str]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text("ascii").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    version = subprocess.run([bin_folder / "postgres", "--version"], capture_output=True, text=True, check=True)
    with psycopg.connect(f"host={server.folder} port={server.port} dbname=bench user=postgres") as connection:
        check = connection.execute(
            "SELECT string_agg(name || ' = ' || setting, ', ') FROM pg_settings"
            " WHERE name IN ('fsync', 'synchronous_commit', 'shared_buffers')"
        ).fetchone()
    assert check is not None
    return [
        (
            f"Date: {datetime.now(timezone.utc):%Y-%m-%d}. {os.cpu_count()} cores ({cpu}), {platform.system()}"
            f" {platform.release()}."
        ),
        (
            f"{version.stdout.strip()}; {check[0]}; client psycopg {psycopg.__version__},"
            f" Python {platform.python_version()}."
        ),
    ]


def report(measurements: list[Measured], facts: list[str], costs: list[str]) -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`, which measures all rivals interleaved in one run. The machine drifts, so the ratios",
        "count. A figure is a median; in brackets the first and third quartile.",
        "",
        *facts,
        "",
        "![Ratios](benchmarks.svg)",
        "",
        "| scenario | ratio | pg_background | rivals |",
        "|---|---|---|---|",
    ]
    for measured in measurements:
        ours = statistics.median(measured.seconds[OURS])
        ratios = "; ".join(
            f"{ours / statistics.median(values):.2f} × {name}"
            for name, values in measured.seconds.items()
            if name != OURS
        )
        rivals = "; ".join(f"{name}: {_figure(measured, name)}" for name in measured.seconds if name != OURS)
        lines.append(f"| {measured.scenario} | {ratios or '-'} | {_figure(measured, OURS)} | {rivals or '-'} |")
    return "\n".join([*lines, "", "## Where the time goes", "", *costs, "", NOTES.read_text("utf-8").rstrip()]) + "\n"


def _figure(measured: Measured, rival: str) -> str:
    values = sorted(value * measured.scale for value in measured.seconds[rival])
    low, median, high = values[len(values) // 4], statistics.median(values), values[(3 * len(values)) // 4]
    return f"{median:,.1f} {measured.unit} [{low:,.1f}, {high:,.1f}]"


def plot(measurements: list[Measured]) -> None:
    """Ratios to each rival, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "pg_background"
    bars = [
        (f"{m.scenario}\nvs {name}", statistics.median(m.seconds[OURS]) / statistics.median(values))
        for m in measurements
        for name, values in m.seconds.items()
        if name != OURS
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(bars) + 1))
    axes.barh([label for label, _ in bars], [ratio for _, ratio in bars], color="#336791")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time of pg_background / time of the rival (less is faster)")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def create_database(server: ScratchServer) -> None:
    """The tables, procedures and the role of the scenarios."""
    columns = ", ".join(f"g + {n} AS c{n}" if n % 2 else f"'text ' || g AS c{n}" for n in range(1, 51))
    server.psql("CREATE DATABASE bench")
    server.psql("CREATE ROLE app LOGIN")
    server.psql("CREATE EXTENSION pg_background CASCADE; CREATE EXTENSION dblink", "bench")
    server.psql("GRANT pgbackground_role TO app", "bench")
    server.psql("GRANT EXECUTE ON FUNCTION dblink_connect_u(text, text) TO app", "bench")
    server.psql(_SCHEMA.format(columns=columns, insert=INSERT.replace("'", "''")), "bench")
    server.psql("GRANT ALL ON ALL TABLES IN SCHEMA public TO app", "bench")


def main() -> None:
    """Measure, print, and write the report unless --no-report."""
    groups = {
        "small": small_jobs,
        "fan-out": fan_outs,
        "rows": rows,
        "waits": waits,
        "sessions": sessions_at_once,
        "tracked": tracked_workers,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"which of {', '.join(groups)}; all when none is given")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-report", action="store_true", help="print only; always so for some of the groups")
    arguments = parser.parse_args()
    bin_folder = Path(find_server().pg_config).parent
    measurements: list[Measured] = []
    with scratch_server(bin_folder, settings=_SETTINGS, pg_hba=_PG_HBA) as server:
        create_database(server)
        facts = environment(server, bin_folder)
        print("\n".join(facts), flush=True)
        for name in arguments.groups or groups:
            measurements.extend(groups[name](server, arguments.repeats))
        costs: list[str] = []
        if not arguments.groups:
            for section in (step_by_step, where_the_time_goes, memory, the_supervisor):
                costs += ["", *section(server)]
            print("\n".join(costs), flush=True)
    if not arguments.no_report and not arguments.groups:
        REPORT.write_text(report(measurements, facts, costs), "utf-8")
        plot(measurements)


if __name__ == "__main__":
    main()
