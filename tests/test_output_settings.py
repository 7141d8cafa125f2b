"""Values arrive exactly, whatever the output settings of launcher, worker and reader; or they are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.clusters import Cluster, Role, Session, sqlstate, wait_until

ConnectFixture = Callable[..., Session]

DATE_STYLES = [f"{style}, {order}" for style in ("ISO", "SQL", "Postgres", "German") for order in ("MDY", "DMY", "YMD")]
INTERVAL_STYLES = ("postgres", "postgres_verbose", "sql_standard", "iso_8601")
# IST is Israel's to the server's input; Moscow and Sao Paulo changed their minds; Lord Howe's clocks move by 30 min;
# CET is an abbreviation, too, which knows no summer; "<+0530>-5:30" is POSIX'.
ZONES = (
    "UTC", "Europe/Berlin", "Asia/Kolkata", "Europe/Moscow", "America/Sao_Paulo", "Australia/Lord_Howe", "CET",
    "America/New_York", "Pacific/Apia", "<+0530>-5:30", "Europe/Dublin", "Asia/Kathmandu",
)  # fmt: skip
QUERY = (
    "SELECT date '2024-02-01' + g, timestamp '2024-02-01 03:04:05.678' + g * interval '1 day',"
    " ARRAY[date '0044-03-05 BC' + g, NULL], daterange(date '2001-02-03', date '2001-04-05' + g),"
    " interval '-1 year 2 mons -3 days 04:05:06.789' * g, ARRAY[interval '1 day -2 hours' * g],"
    " time '01:02:03.4', timetz '01:02:03.4+05:30', tsrange(timestamp '2001-02-03 04:05:06', NULL)"
    " FROM generate_series(0, 2) g"
)
TYPES = (
    "date", "timestamp", "date[]", "daterange", "interval", "interval[]", "time", "timetz", "tsrange",
)  # fmt: skip
GIVEN = ", ".join(f"c{place} {kind}" for place, kind in enumerate(TYPES))
# Both sides of each change of the clocks, of this century's and of older ones.
ZONED_QUERY = (
    "SELECT t FROM unnest(ARRAY[0, 1711846800, 1729994400, 1414270800, 946684800, -2500000000, -1e11, 1700000000,"
    " 1682889000.123456, 1325239200, 1712415600, 1728142200]) e, generate_series(-3, 3) g,"
    " LATERAL (SELECT to_timestamp(e) + g * interval '30 min') x(t)"
)


def read(session: Session, handle: Any, columns: str, given: str) -> list[Any]:
    return session.rows(f"SELECT {columns} FROM pg_background_result_v2(%s, %s) AS r({given})", handle)


def launch(session: Session, query: str) -> Any:
    return session.rows("SELECT * FROM pg_background_launch_v2(%s)", (query,))[0]


def set_to(session: Session, **settings: str) -> None:
    for name, value in settings.items():
        session.execute("SELECT set_config(%s, %s, false)", (name, value))


EXACT_COLUMNS = (
    "c0 - date '2000-01-01', extract(epoch FROM c1), c2[1] - date '2000-01-01', lower(c3) - date '2000-01-01',"
    " upper(c3) - date '2000-01-01', interval_send(c4), interval_send(c5[1]), time_send(c6), timetz_send(c7),"
    " timestamp_send(lower(c8))"
)


@pytest.mark.parametrize("date_style", DATE_STYLES)
def test_dates_and_intervals_are_exact_under_every_style(conn: Session, date_style: str) -> None:
    expected = conn.rows(f"SELECT {EXACT_COLUMNS} FROM ({QUERY}) AS r({_names()})")
    for interval_style in INTERVAL_STYLES:
        set_to(conn, datestyle=date_style, intervalstyle=interval_style)
        assert read(conn, launch(conn, QUERY), EXACT_COLUMNS, GIVEN) == expected


def _names() -> str:
    return ", ".join(f"c{place}" for place in range(len(TYPES)))


@pytest.mark.parametrize(
    ("launched", "read_under"),
    list(itertools.permutations(("ISO, MDY", "SQL, DMY", "Postgres, MDY", "German, YMD"), 2)),
)
def test_a_reader_who_changed_the_styles_reads_the_same(conn: Session, launched: str, read_under: str) -> None:
    expected = conn.rows(f"SELECT {EXACT_COLUMNS} FROM ({QUERY}) AS r({_names()})")
    set_to(conn, datestyle=launched, intervalstyle="sql_standard", timezone="Asia/Kolkata")
    handle = launch(conn, QUERY)
    set_to(conn, datestyle=read_under, intervalstyle="postgres_verbose", timezone="America/New_York")
    before = settings_of(conn)
    assert read(conn, handle, EXACT_COLUMNS, GIVEN) == expected
    assert settings_of(conn) == before


def settings_of(session: Session) -> list[Any]:
    return session.rows(
        "SELECT name, setting FROM pg_settings WHERE name IN"
        " ('DateStyle', 'IntervalStyle', 'TimeZone', 'lc_monetary', 'search_path', 'array_nulls', 'xmloption')"
    )


@pytest.mark.parametrize("zone", ZONES)
def test_timestamps_with_abbreviated_zones_are_exact_or_refused(conn: Session, zone: str) -> None:
    """Refused are only those whose text stands for two instants."""
    set_to(conn, timezone=zone)
    for date_style in ("ISO, MDY", "SQL, DMY", "Postgres, MDY", "German, DMY"):
        set_to(conn, datestyle=date_style)
        conn.execute("CREATE TEMP TABLE zoned AS " + ZONED_QUERY)
        ambiguous = (
            "EXISTS (SELECT FROM generate_series(-3600 * 24, 3600 * 24, 900) d"
            " WHERE d <> 0 AND (t + d * interval '1 s')::text = t::text)"
        )
        iso = "current_setting('DateStyle') LIKE 'ISO%'"
        unique = conn.rows(f"SELECT timestamptz_send(t), t::text FROM zoned WHERE {iso} OR NOT {ambiguous}")
        assert len(unique) > 60
        instants = ", ".join(
            f"timestamptz '2000-01-01 00:00+00' + {int.from_bytes(sent, 'big', signed=True)} * interval '1 us'"
            for sent, _ in unique
        )
        handle = launch(conn, f"SELECT t FROM unnest(ARRAY[{instants}]) t")
        set_to(conn, datestyle="ISO, YMD", timezone="UTC")
        assert read(conn, handle, "timestamptz_send(t)", "t timestamptz") == [(sent,) for sent, _ in unique]
        set_to(conn, datestyle=date_style, timezone=zone)
        conn.execute("DROP TABLE zoned")


def test_a_timestamp_that_stands_for_two_instants_is_refused(conn: Session) -> None:
    set_to(conn, timezone="Europe/Moscow", datestyle="SQL, DMY")
    handle = launch(conn, "SELECT timestamptz '2014-10-26 01:30+03'")
    with sqlstate("0A000", "26/10/2014 01:30:00 MSK(.|\n)*ISO"):
        read(conn, handle, "*", "t timestamptz")


@pytest.mark.parametrize(
    ("kind", "value"), [("timestamptz[]", "ARRAY[now()]"), ("tstzrange", "tstzrange(now(), NULL)")]
)
def test_abbreviated_zones_inside_of_other_types_are_refused(conn: Session, kind: str, value: str) -> None:
    set_to(conn, timezone="Asia/Kolkata", datestyle="Postgres, DMY")
    with sqlstate("0A000", "abbreviated"):
        read(conn, launch(conn, f"SELECT {value}"), "count(t)", f"t {kind}")
    set_to(conn, timezone="UTC")
    assert read(conn, launch(conn, f"SELECT {value}"), "count(t)", f"t {kind}") == [(1,)]
    set_to(conn, timezone="Asia/Kolkata", datestyle="ISO, DMY")
    assert read(conn, launch(conn, f"SELECT {value}"), "count(t)", f"t {kind}") == [(1,)]


# --- settings that the job changes ----------------------------------------------------------------


def test_what_several_statements_end_with_holds_for_the_rows(conn: Session) -> None:
    handle = launch(
        conn,
        "SET datestyle = 'SQL, DMY'; SET LOCAL timezone = 'Asia/Kolkata'; SET intervalstyle = iso_8601;"
        " SELECT date '2024-02-01', timestamptz '2024-02-01 00:00+00', interval '-1 day 2 h'",
    )
    rows = read(
        conn,
        handle,
        "d = '2024-02-01', t = '2024-02-01 00:00+00', i = '-1 day 2 h'",
        "d date, t timestamptz, i interval",
    )
    assert rows == [(True, True, True)]


@pytest.mark.parametrize(
    ("name", "value", "expression", "kind"),
    [
        ("datestyle", "SQL, DMY", "date '2024-12-11'", "date"),
        ("datestyle", "SQL, DMY", "ARRAY[ROW(date '2024-12-11')::dated]", "dated[]"),
        ("intervalstyle", "sql_standard", "interval '-1 day'", "interval"),
        ("extra_float_digits", "0", "0.1::float8", "float8"),
        ("extra_float_digits", "-10", "point '(0.1,0.2)'", "point"),
        ("search_path", "pg_catalog", "'pg_class'::regclass", "regclass"),
    ],
)
def test_a_lone_statement_that_changes_what_its_rows_depend_on_is_refused(
    conn: Session, name: str, value: str, expression: str, kind: str
) -> None:
    conn.execute("DROP TYPE IF EXISTS dated; CREATE TYPE dated AS (d date)")
    handle = launch(conn, f"SELECT set_config('{name}', '{value}', false), {expression}")
    with sqlstate("0A000", f"(?i){name}"):
        read(conn, handle, "*", f"s text, x {kind}")


def test_the_time_zone_may_change_where_offsets_are_numbers(conn: Session) -> None:
    handle = launch(conn, "SELECT set_config('timezone', 'Asia/Kolkata', false), timestamptz '2024-01-01 00:00+00'")
    assert read(conn, handle, "t = '2024-01-01 00:00+00'", "s text, t timestamptz") == [(True,)]


def test_settings_that_the_rows_do_not_depend_on_may_change(conn: Session) -> None:
    conn.execute("DROP TYPE IF EXISTS plain_enum CASCADE; CREATE TYPE plain_enum AS ENUM ('a')")
    handle = launch(
        conn,
        "SELECT set_config(n, v, false), 1.5, 'a'::plain_enum, ARRAY['x'] FROM (VALUES ('datestyle', 'SQL'),"
        " ('timezone', 'Europe/Berlin'), ('search_path', ''), ('extra_float_digits', '0')) x(n, v)",
    )
    assert len(read(conn, handle, "*", "s text, n numeric, e plain_enum, t text[]")) == 4


def test_several_statements_with_too_few_float_digits_are_refused(conn: Session) -> None:
    with sqlstate("0A000", "extra_float_digits"):
        read(conn, launch(conn, "SET extra_float_digits = 0; SELECT 0.1::float8"), "*", "f float8")


def test_floats_are_exact_where_the_launcher_prints_few_digits(conn: Session) -> None:
    set_to(conn, extra_float_digits="-5")
    handle = launch(conn, "SELECT 0.1::float8 + 0.2, ARRAY[0.1::float4], point(1.0 / 3, 0)")
    rows = read(
        conn,
        handle,
        "f = 0.1::float8 + 0.2, g[1] = 0.1::float4, p ~= point(1.0 / 3, 0)",
        "f float8, g float4[], p point",
    )
    assert rows == [(True, True, True)]


@pytest.mark.parametrize("output", ["hex", "escape"])
def test_bytea_is_exact_under_both_outputs(conn: Session, output: str) -> None:
    set_to(conn, bytea_output=output)
    every_byte = r"'\x" + bytes(range(256)).hex() + "'::bytea"
    handle = launch(conn, f"SELECT {every_byte}, ARRAY[{every_byte}]")
    assert read(conn, handle, f"b = {every_byte}, a[1] = {every_byte}", "b bytea, a bytea[]") == [(True, True)]
    handle = launch(conn, f"SET bytea_output = escape; SELECT {every_byte}, ARRAY[{every_byte}]")
    assert read(conn, handle, f"b = {every_byte}, a[1] = {every_byte}", "b bytea, a bytea[]") == [(True, True)]


@pytest.mark.parametrize(("launched", "read_under"), list(itertools.product(("content", "document"), repeat=2)))
def test_xml_is_exact_under_both_options(conn: Session, launched: str, read_under: str) -> None:
    set_to(conn, xmloption=launched)
    handle = launch(conn, "SELECT XMLPARSE(CONTENT 'a <b/>'), XMLPARSE(DOCUMENT '<!DOCTYPE a><a/>')")
    set_to(conn, xmloption=read_under)
    assert read(conn, handle, "x::text, y::text", "x xml, y xml") == [("a <b/>", "<!DOCTYPE a><a/>")]
    assert conn.value("SHOW xmloption") == read_under


def test_money_is_read_under_the_workers_locale(conn: Session) -> None:
    locales = [name for (name,) in conn.rows("SELECT DISTINCT collname FROM pg_collation WHERE collprovider = 'c'")]
    tried = [name for name in ("C", "en_US.utf8", "de_DE.utf8", "ja_JP.utf8", "fr_FR.utf8") if name in locales]
    for launched, read_under in itertools.product(tried, repeat=2):
        set_to(conn, lc_monetary=launched)
        handle = launch(conn, "SELECT 1234567::money / 100, ARRAY[(-12.34)::numeric::money]")
        set_to(conn, lc_monetary=read_under)
        rows = read(conn, handle, "cash_send(m), cash_send(a[1])", "m money, a money[]")
        set_to(conn, lc_monetary=launched)
        assert rows == conn.rows("SELECT cash_send(1234567::money / 100), cash_send((-12.34)::numeric::money)")


# --- names of objects -----------------------------------------------------------------------------


def test_names_of_objects_are_looked_up_where_the_worker_saw_them(fresh_database: str, conn: Session) -> None:
    conn.execute(
        "CREATE SCHEMA one; CREATE SCHEMA two; CREATE TYPE two.k AS (a int)"
        "; CREATE TABLE one.t (); CREATE TABLE two.t ()"
    )
    expected = conn.rows("SELECT 'one.t'::regclass::oid, 'two.k'::regtype::oid, 'one.t[]'::regtype::oid")
    conn.execute("SET search_path = one, two, public")
    query = "SELECT 'one.t'::regclass, ARRAY['two.k']::regtype[], 'one.t[]'::regtype"
    handle = launch(conn, query)
    conn.execute("SET search_path = two, public")
    conn.execute("CREATE TEMP TABLE t ()")
    columns, given = "a::oid, b[1]::oid, c::oid", "a regclass, b regtype[], c regtype"
    assert read(conn, handle, columns, given) == expected
    assert conn.value("SHOW search_path") == "two, public"
    conn.execute("SET search_path = public")
    handle = launch(conn, "SET LOCAL search_path = two; SELECT 1; SET search_path = one, two; " + query)
    assert read(conn, handle, columns, given) == expected


def test_names_printed_under_a_path_of_the_transaction_are_refused(conn: Session) -> None:
    with sqlstate("0A000", "search_path"):
        read(conn, launch(conn, "SET LOCAL search_path = pg_catalog; SELECT 'pg_class'::regclass"), "*", "a regclass")


def test_names_of_temporary_objects_are_refused(conn: Session) -> None:
    with sqlstate("0A000", "temporary"):
        read(conn, launch(conn, "CREATE TEMP TABLE t (); SELECT 't'::regclass"), "*", "a regclass")
    assert read(conn, launch(conn, "CREATE TEMP TABLE t (); SELECT 'now'::regproc"), "a::text", "a regproc") == [
        ("now",)
    ]


def test_names_are_not_read_by_another_role(connect: ConnectFixture, role: Callable[..., Role], conn: Session) -> None:
    user = role("member", login=False)
    conn.execute(f'SET ROLE "{user}"')
    handle = launch(conn, "SELECT 'pg_class'::regclass")
    conn.execute("RESET ROLE")
    with sqlstate("0A000", "role"):
        read(conn, handle, "*", "a regclass")


# --- putting back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["read", "list", "job"])
def test_the_readers_settings_are_put_back_after_an_error(conn: Session, failing: str) -> None:
    set_to(conn, datestyle="SQL, DMY")
    queries = {
        "read": "SELECT set_config('datestyle', 'ISO', false), date '2024-01-02'",
        "list": "SELECT 'x', date '2024-01-02'",
        "job": "SELECT 'x', date '2024-01-02' + 1 / (3 - g) FROM generate_series(1, 3) g",
    }
    handle = launch(conn, queries[failing])
    set_to(conn, datestyle="German, DMY", array_nulls="off")
    before = settings_of(conn)
    with conn.transaction():
        with sqlstate({"read": "0A000", "list": "42804", "job": "22012"}[failing]), conn.transaction():
            read(conn, handle, "*", "s text, d int" if failing == "list" else "s text, d date")
        assert settings_of(conn) == before
    assert settings_of(conn) == before
    if failing == "list":
        assert read(conn, handle, "d = '2024-01-02'", "s text, d date") == [(True,)]


def test_what_a_transaction_set_for_itself_ends_with_it(conn: Session) -> None:
    handle = launch(conn, "SELECT date '2024-01-02'")
    with conn.transaction():
        conn.execute("SET LOCAL datestyle = 'German, DMY'")
        assert read(conn, handle, "d = '02.01.2024'", "d date") == [(True,)]
        assert conn.value("SHOW datestyle") == "German, DMY"
    assert conn.value("SHOW datestyle") == "ISO, MDY"


@pytest.mark.parametrize(
    ("name", "value"), [("DateStyle", "German"), ("TimeZone", "Asia/Tokyo"), ("client_encoding", "LATIN1")]
)
def test_what_a_job_has_set_is_nothing_to_the_next_one(conn: Session, name: str, value: str) -> None:
    """Also where the server tells its client of the setting, and the clean-up's answer does not come by libpq."""
    conn.execute("SET DateStyle = 'SQL, DMY'")
    for job in (f"SET {name} = '{value}'", "SELECT 1", f"SET {name} = '{value}'"):
        conn.execute("SELECT pg_background_run_v2(%s)", (job,))
        handle = launch(conn, "SELECT pg_backend_pid(), timestamptz '2024-02-01 03:04:05+00', 'é'::text")
        ((pid, instant, text),) = read(
            conn, handle, "p, extract(epoch FROM t)::int8, x", "p int, t timestamptz, x text"
        )
        assert (pid, instant, text) == (handle[0], 1706756645, "é")


@pytest.mark.parametrize(
    "query",
    [
        "SET client_encoding = 'LATIN1'; SELECT 'Ã©'::text",
        "SELECT set_config('client_encoding', 'LATIN1', false), 'Ã©'::text",
    ],
)
def test_text_in_another_encoding_is_refused(conn: Session, query: str) -> None:
    with sqlstate("0A000") as raised:
        conn.execute("SELECT pg_background_result_json_v2(%s, %s)", launch(conn, query))
    assert "client_encoding" in str(raised.error)


def test_numbers_are_the_same_in_each_encoding(conn: Session) -> None:
    handle = launch(conn, "SET client_encoding = 'LATIN1'; SELECT 1.5, 2")
    assert [str(value) for value in read(conn, handle, "*", "a numeric, b int")[0]] == ["1.5", "2"]
    handle = launch(conn, "SET client_encoding = 'UTF8'; SELECT 'é'::text")
    assert read(conn, handle, "*", "a text") == [("é",)]


@pytest.mark.parametrize("zone", ["'europe/berlin'", "'utc'", "5", "INTERVAL '05:30' HOUR TO MINUTE"])
def test_a_time_zone_has_not_changed_that_is_shown_by_another_name(conn: Session, zone: str) -> None:
    conn.execute(f"SET DateStyle = 'SQL'; SET TIME ZONE {zone}")
    handle = launch(conn, "SELECT timestamptz '2024-10-26 12:00+00'")
    assert read(conn, handle, "extract(epoch FROM t)::int8", "t timestamptz") == [(1729944000,)]
    assert conn.value("SHOW TimeZone")


def test_abbreviated_zones_are_read_where_backslashes_escape(conn: Session) -> None:
    conn.execute("SET DateStyle = 'Postgres'; SET standard_conforming_strings = off")
    handle = launch(conn, "SELECT timestamptz '2024-10-26 12:00+00'")
    assert read(conn, handle, "extract(epoch FROM t)::int8", "t timestamptz") == [(1729944000,)]


def test_a_reload_during_a_submitted_job_is_known_to_the_next_one(start_cluster: Callable[..., Cluster]) -> None:
    """The supervisor reads what the server tells of settings then, not libpq."""
    with start_cluster().connect() as session:
        session.execute("CREATE EXTENSION pg_background CASCADE")
        session.execute("SELECT pg_background_run_v2('SELECT 1')")
        handle = session.rows("SELECT * FROM pg_background_submit_v2('SELECT pg_sleep(0.5)')")[0]
        session.execute("ALTER SYSTEM SET DateStyle = 'SQL, DMY'")
        session.execute("SELECT pg_reload_conf()")
        session.execute("SELECT pg_background_wait_v2(%s, %s)", handle)
        session.execute("SELECT pg_background_detach_v2(%s, %s)", handle)
        wait_until(lambda: session.value("SHOW DateStyle") == "SQL, DMY", what="the reload")
        later = launch(session, "SELECT date '2024-02-03'")
        assert read(session, later, "d - date '2024-02-01'", "d date") == [(2,)]


def test_a_job_after_a_commit_knows_nothing_of_the_settings_of_the_one_before_it(alice: Session, conn: Session) -> None:
    alice.execute("SET pg_background.pool_size = 1; SET DateStyle = 'SQL, DMY'")
    before = alice.rows("SELECT * FROM pg_background_submit_v2('SELECT 1')")[0]
    alice.execute("SELECT pg_background_drain_v2(ARRAY[(%s, %s)::pg_background_handle])", before)
    alice.execute("RESET DateStyle")
    with alice.transaction():
        after = alice.rows("SELECT * FROM pg_background_submit_on_commit_v2('SELECT 1')")[0]
    alice.execute("SELECT pg_background_wait_v2(%s, %s)", after)
    wait_until(
        lambda: alice.value(
            "SELECT pg_background_result_json_v2(pid, cookie) FROM pg_background_launch_v2('SELECT 1')"
        ),
        what="a job",
    )
    later = launch(alice, "SELECT date '2024-02-03'")
    assert read(alice, later, "d - date '2024-02-01'", "d date") == [(2,)]
