"""What PL/Python, a clean-up and the supervisor's part cost at the least: the same INSERT by a few lines of PL/Python.

They do what launch and result cannot do without, and nothing else: no check of anything, no error, no other caller.
Each step adds one thing, and all run interleaved with dblink on an open connection.
"""

from __future__ import annotations

import statistics
import time

import psycopg

from examples.scratch import ScratchServer

_PAIRS, _REPEATS = 200, 15

# Logs in as the launching role, where pg_hba.conf trusts everybody; one connection for each step.
_FUNCTIONS = """
CREATE FUNCTION bare_open(path text, messages int) RETURNS void LANGUAGE plpython3u AS $$
import os, select, socket, struct
class Bare: pass
bare = GD["bare"] = Bare()
bare.worker = socket.socket(socket.AF_UNIX)
bare.worker.connect(path)
packet = struct.pack("!I", 196608) + b"user\\0app\\0database\\0bench\\0\\0"
bare.worker.sendall(struct.pack("!I", len(packet) + 4) + packet)
received = b""
while not received.endswith(b"Z\\0\\0\\0\\5I"):
    received += bare.worker.recv(65536)
bare.fd, bare.wait = bare.worker.fileno(), select.poll()
bare.wait.register(bare.fd, select.POLLIN)
query = lambda sql: b"Q" + struct.pack("!I", len(sql) + 5) + sql + b"\\0"
proof = plpy.execute("SELECT '_pg_background_proof'::regproc::oid AS oid")[0]["oid"]
body = struct.pack("!IHHi", int(proof), 0, 1, 5) + b"60000" + struct.pack("!H", 0)
bare.query, bare.clean_up = query, query(b"DISCARD ALL") + b"F" + struct.pack("!I", len(body) + 4) + body
bare.reader, bare.line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
bare.messages, bare.behind, bare.unread = messages, b"", 0
$$;
CREATE FUNCTION bare_launch(sql text, cleans bool) RETURNS text LANGUAGE plpython3u AS $$
import os
bare = GD["bare"]
while bare.behind.count(b"Z\\0\\0\\0\\5I") < bare.unread:
    bare.behind += os.read(bare.fd, 65536)
if bare.messages:
    bare.line.send(b"x" * 200)
bare.unread = 2 if cleans else 0
os.write(bare.fd, bare.query(sql.encode()) + (bare.clean_up if cleans else b""))
return "(1,1)"
$$;
CREATE FUNCTION bare_result() RETURNS text LANGUAGE plpython3u AS $$
import os
bare = GD["bare"]
bare.wait.poll()
answer = os.read(bare.fd, 65536)
end = answer.index(b"Z\\0\\0\\0\\5I") + 6
bare.behind = answer[end:]
if bare.messages:
    bare.line.send(b"x" * 100)
    bare.reader.recv(1000)
    bare.reader.recv(1000)
return answer[5 : end - 7].decode()
$$;
CREATE PROCEDURE bare_pairs(n int, cleans bool) LANGUAGE plpgsql AS $$
DECLARE h pg_background_handle; tag text;
BEGIN
    FOR i IN 1..n LOOP
        h := bare_launch('INSERT INTO log VALUES (1, ''audit'')', cleans)::pg_background_handle;
        tag := bare_result();
    END LOOP;
END $$;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO app;
"""

_STEPS = (
    ("two calls of PL/Python, that write the job and read its answer", 0, "false"),
    ("and a clean-up behind the job", 0, "true"),
    ("and two messages to the supervisor, which nobody looks at", 1, "true"),
)


def step_by_step(server: ScratchServer) -> list[str]:
    """A table: what each step adds, as a ratio to dblink."""
    server.psql(_FUNCTIONS, "bench")
    conninfo = f"host={server.folder} port={server.port} dbname=bench user=app"
    calls: dict[str, tuple[psycopg.Connection, str]] = {}
    kept = psycopg.connect(conninfo, autocommit=True)
    kept.execute("SELECT dblink_connect_u('kept', %s)", (conninfo,))
    calls["dblink_exec, open connection"] = kept, f"CALL dblink_open({_PAIRS})"
    for name, messages, cleans in _STEPS:
        session = psycopg.connect(conninfo, autocommit=True)
        session.execute("SELECT bare_open(%s, %s)", (f"{server.folder}/.s.PGSQL.{server.port}", messages))
        calls[name] = session, f"CALL bare_pairs({_PAIRS}, {cleans})"
    session = psycopg.connect(conninfo, autocommit=True)
    calls["launch and result"] = session, f"CALL pairs({_PAIRS})"
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(_REPEATS + 2):
        for name, (connection, call) in calls.items():
            started = time.perf_counter()
            connection.execute(call)
            if repeat >= 2:  # the first ones warm up
                seconds[name].append((time.perf_counter() - started) / _PAIRS * 1e6)
    for connection, _ in calls.values():
        connection.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["dblink_exec, open connection"]
    lines = ["| autonomous transaction, step by step | µs | ratio |", "|---|---|---|"]
    return [*lines, *(f"| {name} | {median:.0f} | {median / base:.2f} |" for name, median in medians.items())]
