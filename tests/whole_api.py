"""One call, at least, of each function of the API: whoever bends names, settings or schemas sees what breaks."""

from __future__ import annotations

from typing import Any

from tests.clusters import Session, sqlstate

HANDLE = "public.pg_background_handle"
LIST = (
    "pid pg_catalog.int4, cookie pg_catalog.int8, launched_at pg_catalog.timestamptz, user_id pg_catalog.oid,"
    " queue_size pg_catalog.int4, state pg_catalog.text, sql_preview pg_catalog.text, last_error pg_catalog.text,"
    " consumed pg_catalog.bool"
)


def call_everything(session: Session, schema: str = "public") -> None:
    """Each function of the API, in each of its ways; statements of the jobs themselves name all with its schema.

    schema: where the extension is, quoted.
    """
    done = "SELECT 1::pg_catalog.int4 AS a, 'x'::pg_catalog.text AS b"
    columns = "AS r(a pg_catalog.int4, b pg_catalog.text)"

    def start(how: str, *arguments: Any) -> tuple[int, int]:
        marks = ", ".join(["%s"] * len(arguments))
        pid, cookie = call(f"SELECT h.pid, h.cookie FROM public.pg_background_{how}_v2({marks}) AS h", *arguments)[0]
        return pid, cookie

    def call(query: str, *arguments: Any) -> list[Any]:
        home = schema.replace("%", "%%") + "."
        return session.rows(query.replace("public.", home), arguments)

    for handle in (start("launch", done), start("launch", done, 0, "label"), start("launch", done, 0, None, [])):
        assert call("SELECT public.pg_background_wait_v2_timeout(%s, %s, 60000)", *handle) == [(True,)]
        for told in ("outcome", "result_info", "error_info", "full_sql", "get_progress"):
            call(f"SELECT public.pg_background_{told}_v2(%s, %s)", *handle)
        assert call(f"SELECT * FROM public.pg_background_result_v2(%s, %s) {columns}", *handle) == [(1, "x")]
    report = f"SELECT 'x'::pg_catalog.text AS b FROM {schema}.pg_background_progress(50, 'half')"
    handle = start("launch", report)
    assert call("SELECT * FROM public.pg_background_result_v2(%s, %s, NULL::pg_catalog.text)", *handle) == [("x",)]
    handle = start("launch", done)
    assert call("SELECT * FROM public.pg_background_result_json_v2(%s, %s)", *handle) == [({"a": 1, "b": "x"},)]
    failing = "DO LANGUAGE plpgsql $$ BEGIN RAISE EXCEPTION USING ERRCODE = '23505', TABLE = 't', DETAIL = 'd'; END $$"
    with sqlstate("23505"):
        call(f"SELECT * FROM public.pg_background_result_v2(%s, %s) {columns}", *start("launch", failing))
    with sqlstate("42804"):
        call("SELECT * FROM public.pg_background_result_v2(%s, %s) AS r(a pg_catalog.int8)", *start("launch", done))

    for handle in (start("submit", done), start("submit", done, 0, "label"), start("submit", done, 0, "label", [])):
        call("SELECT public.pg_background_wait_v2(%s, %s)", *handle)
        call("SELECT public.pg_background_detach_v2(%s, %s)", *handle)
    handle = start("submit_on_commit", done)
    call("SELECT public.pg_background_wait_v2(%s, %s)", *handle)
    assert call("SELECT (o).state FROM public.pg_background_outcome_v2(%s, %s) AS o", *handle) == [("stopped",)]

    endless = "SELECT pg_catalog.pg_sleep(3600)"
    call("SELECT public.pg_background_cancel_v2(%s, %s)", *start("launch", endless))
    call("SELECT public.pg_background_cancel_v2_grace(%s, %s, 5000)", *start("launch", endless))
    start("launch", endless, 0, "one")
    call("SELECT public.pg_background_cancel_by_label_v2('one', 5000), public.pg_background_cancel_all_v2()")
    a, b = start("launch", done), start("launch", done)
    call(f"SELECT public.pg_background_wait_any_v2(ARRAY[(%s, %s), (%s, %s)]::{HANDLE}[], 60000)", *a, *b)
    call(f"SELECT * FROM public.pg_background_drain_v2(ARRAY[(%s, %s), (%s, %s)]::{HANDLE}[], 60000)", *a, *b)
    start("launch", done)
    call(f"SELECT * FROM public.pg_background_list_v2() AS w({LIST})")
    call("SELECT * FROM public.pg_background_list")
    call("SELECT * FROM public.pg_background_activity")
    call(
        "SELECT public.pg_background_stats_v2(), public.pg_background_purge_v2(), public.pg_background_detach_all_v2()"
    )
    assert call(f"SELECT state FROM public.pg_background_run_v2('{endless}', 0, 1, 'run', NULL)") == [("canceled",)]
    rows = "public.pg_background_run_query_v2(%s, 0, 60000, 'query', {})"
    for col_def in ("NULL", "'a pg_catalog.int4, b pg_catalog.text'"):
        assert call(f"SELECT * FROM {rows.format(col_def)} {columns}", done) == [(1, "x")]
    assert {status for _, status, *_ in call("SELECT * FROM public.pg_background_check()")} == {"ok"}
    pid = call("SELECT public.pg_background_launch(%s)", endless)[0][0]
    call("SELECT public.pg_background_detach(%s)", pid)
    call("SELECT pg_catalog.pg_terminate_backend(%s, 5000)", pid)
    pid = call("SELECT public.pg_background_launch(%s)", done)[0][0]
    assert call(f"SELECT * FROM public.pg_background_result(%s) {columns}", pid) == [(1, "x")]
