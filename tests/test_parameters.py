"""Labels, and parameters that the server binds: values stay values, whatever they hold.

PG_BACKGROUND_LONG=1 binds a million random values; the normal run 20,000.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg import sql

from tests.background import Handle, detach, result, wait
from tests.clusters import EXTENSIONS, Cluster, Session, sqlstate

VALUES_PER_JOB = 1000
VALUES = 1_000_000 if os.environ.get("PG_BACKGROUND_LONG") else 20_000
HOSTILE = (
    "'; DROP TABLE kept; --",
    "$1",
    "\\",
    "\\'",
    "''",
    '"',
    "",
    "NULL",
    "{}",
    "a\nb\tc\r\x01\x7f",
    "$$; COMMIT; $$",
    "\u00e9\u4e2d\U0001f600\u200b",
    "ROLLBACK",
    "%s %(x)s {0} :name",
)


def start(
    session: Session,
    kind: str,
    query: str,
    params: list[Any] | None = None,
    label: str | None = None,
    queue_size: int | None = 0,
) -> Handle:
    """Starts a worker by the call with all four arguments."""
    call = f"SELECT pid, cookie FROM pg_background_{kind}_v2(%s, %s, %s, %s::text[])"
    return Handle(*session.rows(call, (query, queue_size, label, params))[0])


def outcome(session: Session, handle: Handle, columns: str) -> tuple[Any, ...]:
    """Columns of the worker's row in the view, once it is there."""
    session.execute("SELECT pg_sleep(0.05)")
    row: tuple[Any, ...] = session.rows(
        f"SELECT {columns} FROM pg_background_activity WHERE (pid, cookie) = (%s, %s)", handle
    )[0]
    return row


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["launch", "submit"])
@pytest.mark.parametrize("label", ["nightly", "\u00e9'\"\\ %", "", None])
def test_a_label_shows_in_both_views(alice: Session, kind: str, label: str | None) -> None:
    call = f"SELECT pid, cookie FROM pg_background_{kind}_v2('SELECT 1', 0, %s::text)"
    handle = Handle(*alice.rows(call, (label,))[0])
    wait(alice, handle)
    assert alice.value("SELECT label FROM pg_background_list WHERE pid = %s", (handle.pid,)) == label
    assert outcome(alice, handle, "label") == (label,)
    detach(alice, handle)


def test_a_label_that_is_a_text_is_refused(alice: Session) -> None:
    start(alice, "submit", "SELECT 1", label="x" * 1000)
    with sqlstate("22023", match="label"):
        start(alice, "submit", "SELECT 1", label="x" * 1001)


def test_nulls_mean_none(alice: Session) -> None:
    handle = start(alice, "launch", "SELECT 1; SELECT 2", None, None, None)
    assert result(alice, handle, "n int") == [(2,)]
    for kind in ("launch", "submit"):
        with sqlstate("22004"):
            alice.execute(f"SELECT pg_background_{kind}_v2(NULL, 0, NULL::text)")


# --- parameters -----------------------------------------------------------------------------------


def test_types_are_inferred_by_the_server(alice: Session) -> None:
    alice.execute("CREATE TABLE typed (n int, d date, a text[], j jsonb, b bytea)")
    handle = start(
        alice,
        "launch",
        "INSERT INTO typed VALUES ($1, $2, $3, $4, $5) RETURNING n + $6, d",
        ["7", "2024-02-01", '{a,"b,c"}', '{"k": [1]}', "\\x00ff", "35"],
    )
    assert [row[0] for row in result(alice, handle, "n int, d date")] == [42]
    stored = ('(7,2024-02-01,"{a,""b,c""}","{""k"": [1]}","\\\\x00ff")',)
    assert alice.rows("SELECT typed::text FROM typed") == [stored]


@pytest.mark.parametrize("kind", ["launch", "submit"])
def test_hostile_values_stay_values(alice: Session, kind: str) -> None:
    alice.execute("CREATE TABLE kept (n serial, v text)")
    values = [*HOSTILE, None]
    for value in values:
        handle = start(alice, kind, "INSERT INTO kept (v) VALUES ($1)", [value])
        wait(alice, handle)
        detach(alice, handle)
    assert [row[0] for row in alice.rows("SELECT v FROM kept ORDER BY n")] == values


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP"])
def test_values_in_another_encoding(cluster: Cluster, connect: Callable[..., Session], encoding: str) -> None:
    name = cluster.new_name(encoding.lower())
    values = ["plain", "\u00e9\u00df" if encoding == "LATIN1" else "\u65e5\u672c", None, ""]
    with cluster.connect("postgres") as admin:
        create = "CREATE DATABASE {} ENCODING {} LOCALE 'C' TEMPLATE template0"
        admin.execute(sql.SQL(create).format(sql.Identifier(name), sql.Literal(encoding)))
    try:
        session = connect(dbname=name)
        for extension in EXTENSIONS:
            session.execute(f"CREATE EXTENSION {extension}")
        assert start_and_read(session, values) == values
        session.close()
    finally:
        cluster.drop_database(name)


def start_and_read(session: Session, values: list[str | None]) -> list[str | None]:
    """The values, as they come back from a worker."""
    rows = ", ".join(f"(${place})" for place in range(1, len(values) + 1))
    handle = start(session, "launch", f"VALUES {rows}", values)
    return [row[0] for row in result(session, handle, "v text")]


def _random_values(seed: int) -> Iterator[str | None]:
    """Texts of all characters that there are, the dangerous ones above all."""
    chance = random.Random(seed)
    dangerous = "'\"\\$;{},%\n\r\t \x01\x1f\x7f\x80\u0085\u2028\ufeff\uffff"
    while True:
        length = chance.choice((0, 1, 1, 2, 3, 5, 8, 40))
        kind = chance.random()
        if kind < 0.02:
            yield None
        elif kind < 0.5:
            yield "".join(chance.choices(dangerous, k=length))
        else:
            points = (
                chance.choice((chance.randrange(1, 0xD800), chance.randrange(0xE000, 0x110000))) for _ in range(length)
            )
            yield "".join(map(chr, points))


def test_random_values_come_back_equal(alice: Session) -> None:
    source = _random_values(20240201)
    for _ in range(VALUES // VALUES_PER_JOB):
        values = [next(source) for _ in range(VALUES_PER_JOB)]
        assert start_and_read(alice, values) == values


def test_a_large_value_and_many_values(alice: Session) -> None:
    large = "\u00e9'\\" * 700_000
    handle = start(alice, "launch", "SELECT md5($1), length($1)", [large])
    assert result(alice, handle, "m text, n int") == [alice.rows("SELECT md5(%s), length(%s)", (large, large))[0]]
    alice.execute("CREATE TABLE large (v text)")
    handle = start(alice, "submit", "INSERT INTO large VALUES ($1)", [large])
    wait(alice, handle)
    assert alice.rows("SELECT v = %s FROM large", (large,)) == [(True,)]
    many = "SELECT cardinality(ARRAY[" + ",".join(f"${n}" for n in range(1, 65536)) + "])"
    handle = start(alice, "launch", many, ["x"] * 65535)
    assert result(alice, handle, "n int") == [(65535,)]
    with sqlstate("22023", match="65536"):
        start(alice, "launch", "SELECT 1", ["x"] * 65536)


@pytest.mark.parametrize("kind", ["launch", "submit"])
def test_one_statement_only(alice: Session, kind: str) -> None:
    alice.execute("CREATE TABLE none (n int)")
    handle = start(alice, kind, "INSERT INTO none VALUES ($1); INSERT INTO none VALUES (2)", ["1"])
    wait(alice, handle)
    assert outcome(alice, handle, "state, sqlstate") == ("error", "42601")
    assert alice.rows("SELECT * FROM none") == []
    detach(alice, handle)


@pytest.mark.parametrize(
    ("query", "params", "code"),
    [
        ("SELECT $1::int", ["x"], "22P02"),
        ("SELECT $1::int + $2", ["1"], "08P01"),
        ("SELECT 1", ["1"], "08P01"),
        ("SELECT 1 / $1", ["0"], "22012"),
    ],
)
def test_what_the_server_refuses_comes_out_as_its_error(
    alice: Session, query: str, params: list[str], code: str
) -> None:
    handle = start(alice, "launch", query, params)
    with sqlstate(code):
        result(alice, handle, "n int")
    submitted = start(alice, "submit", query, params)
    wait(alice, submitted)
    assert outcome(alice, submitted, "state, sqlstate") == ("error", code)


def test_transaction_control_is_refused_with_parameters_too(alice: Session) -> None:
    for kind in ("launch", "submit"):
        with sqlstate("0A000"):
            start(alice, kind, "COMMIT", [])


def test_a_deferred_constraint_fails_the_job(alice: Session) -> None:
    alice.execute("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    alice.execute("INSERT INTO late VALUES (1)")
    for kind in ("launch", "submit"):
        handle = start(alice, kind, "INSERT INTO late VALUES ($1)", ["1"])
        wait(alice, handle)
        assert outcome(alice, handle, "state, sqlstate") == ("error", "23505")
        detach(alice, handle)


def test_vacuum_runs_by_the_extended_protocol(alice: Session) -> None:
    alice.execute("CREATE TABLE dusty (n int)")
    assert result(alice, start(alice, "launch", "VACUUM dusty", []), "tag text") == [("VACUUM",)]


def test_arrays_of_arrays_are_refused(alice: Session) -> None:
    with sqlstate("22023", match="dimension"):
        alice.execute("SELECT pg_background_launch_v2('SELECT $1', 0, NULL, '{{a,b},{c,d}}')")


def test_submitted_parameters_survive_the_session(alice: Session, conn: Session) -> None:
    alice.execute("CREATE TABLE survivor (v text)")
    schema = alice.value("SELECT current_schema()")
    holder = "SELECT pg_advisory_lock(78)"
    conn.execute(holder)
    insert = "INSERT INTO survivor SELECT $1 FROM (SELECT pg_advisory_xact_lock(78)) AS l"
    handle = start(alice, "submit", insert, [HOSTILE[0]])
    alice.close()
    conn.execute("SELECT pg_advisory_unlock(78)")
    wait(conn, handle)
    assert conn.rows(sql.SQL("SELECT v FROM {}.survivor").format(sql.Identifier(schema))) == [(HOSTILE[0],)]
