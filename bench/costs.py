"""What has no rival to be compared with: processor time by process, memory, the supervisor's throughput."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg

from bench import supervisor
from examples.scratch import ScratchServer

_PAIRS = 2000
_WORKERS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background' AND datname = current_database()"
_SUPERVISOR = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_background supervisor'"
_DBLINK = "SELECT pid FROM dblink('kept', 'SELECT pg_backend_pid()') AS d(pid int)"
_MANY_ROWS = 10_000_000

Groups = tuple[list[int], list[int], list[int]]  # pids: calling backend, other backends, supervisors


def _cpu_us(pid: int) -> float:
    """Processor time of a process so far, by the kernel."""
    return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[0]) / 1000


def _pids(session: psycopg.Connection, query: str) -> list[int]:
    return [pid for (pid,) in session.execute(query).fetchall()]


def _peak_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def where_the_time_goes(server: ScratchServer) -> list[str]:
    """A table: microseconds of processor time a transaction, in each process that has a part in it."""
    conninfo = f"host={server.folder} port={server.port} dbname=bench user=app"
    lines = [
        "| autonomous transaction, µs of processor time | calling backend | other backend | supervisor | together |",
        "|---|---|---|---|---|",
    ]
    administrator = f"{conninfo} user=postgres"
    with (
        psycopg.connect(conninfo, autocommit=True) as session,
        psycopg.connect(administrator, autocommit=True) as other,
    ):
        session.execute("SELECT dblink_connect_u('kept', %s)", (conninfo,))
        session.execute("CALL pairs(200)")
        calling = [session.info.backend_pid]
        ways: dict[str, tuple[str, Callable[[], Groups]]] = {
            "launch and result": ("pairs", lambda: (calling, _pids(other, _WORKERS), _pids(other, _SUPERVISOR))),
            "dblink_exec, open connection": ("dblink_open", lambda: (calling, _pids(session, _DBLINK), [])),
        }
        for name, (procedure, groups) in ways.items():
            before = {pid: _cpu_us(pid) for group in groups() for pid in group}
            session.execute(f"CALL {procedure}({_PAIRS})")
            # Those that have started meanwhile, a second worker session for example, began with nothing.
            used = [sum(_cpu_us(pid) - before.get(pid, 0) for pid in group) / _PAIRS for group in groups()]
            lines.append(f"| {name} | {' | '.join(f'{us:.0f}' for us in (*used, sum(used)))} |")
    return lines


def memory(server: ScratchServer) -> list[str]:
    """How much the launching backend grows over a result of many rows."""
    conninfo = f"host={server.folder} port={server.port} dbname=bench user=app"
    with psycopg.connect(conninfo, autocommit=True) as session:
        pid = session.info.backend_pid
        query = "SELECT count(*) FROM pg_background_result(pg_background_launch(%s)) AS (a int)"
        session.execute(query, ("SELECT g FROM generate_series(1, 100000) g",))
        before = _peak_kb(pid)
        session.execute(query, (f"SELECT g FROM generate_series(1, {_MANY_ROWS}) g",))
        return [
            f"- The launching backend over a result of {_MANY_ROWS:,} rows: + {(_peak_kb(pid) - before) / 1024:.0f} MB."
        ]


def the_supervisor(server: ScratchServer) -> list[str]:
    """Its throughput on one core, and its memory."""
    server.psql("CREATE DATABASE supervised")
    return [f"- The supervisor: {line}." for line in supervisor.measure(server, "supervised", 10_000, 100_000)]
