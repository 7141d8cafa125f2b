"""Who may call what: pgbackground_role, the helpers that grant and revoke, and what DROP EXTENSION leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import sql

from tests.background import LIST_COLUMNS, detach, launch, listed, result, wait
from tests.clusters import EXTENSIONS, Cluster, Role, Session, sqlstate

RUN_V1 = "SELECT * FROM {}pg_background_result({}pg_background_launch('SELECT 7')) AS r(n int)"
RUN_V2 = (
    "SELECT r.n FROM {}pg_background_launch_v2('SELECT 7') h,"
    " LATERAL {}pg_background_result_v2(h.pid, h.cookie) AS r(n int)"
)
OTHER_CALLS = (
    f"SELECT count(*) FROM pg_background_list_v2() AS l({LIST_COLUMNS})",
    "SELECT workers_launched FROM pg_background_stats_v2()",
)
EXTENSION_FUNCTIONS = (
    "SELECT p.oid::regprocedure::text, p.proacl::text FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid"
    " AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e' JOIN pg_extension e ON e.oid = d.refobjid"
    " AND d.refclassid = 'pg_extension'::regclass WHERE e.extname = 'pg_background'"
)


def _qualified(query: str, schema: str = "") -> str:
    return query.format(schema, schema)


def _wait_and_detach(session: Session) -> None:
    handle = launch(session, "SELECT 1")
    wait(session, handle)
    assert session.value("SELECT pg_background_wait_v2_timeout(%s, %s, 1000)", handle) is True
    detach(session, handle)


def test_nothing_is_open_to_public(conn: Session) -> None:
    functions = conn.rows(EXTENSION_FUNCTIONS)
    assert len(functions) > 20
    # An entry for PUBLIC starts with "=", an ACL that is NULL means EXECUTE for PUBLIC.
    assert [name for name, acl in functions if acl is None or "{=" in acl or ",=" in acl] == []
    types = conn.rows(
        "SELECT t.typname FROM pg_type t"
        " JOIN pg_depend d ON d.objid = t.oid AND d.classid = 'pg_type'::regclass"
        " JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_background'"
        " LEFT JOIN pg_class c ON c.oid = t.typrelid"
        # Later releases count types of arrays and of tables' rows among an extension's members.
        " WHERE d.deptype = 'e' AND t.typelem = 0 AND COALESCE(c.relkind, 'c') = 'c'"
        " AND has_type_privilege('pg_monitor', t.oid, 'USAGE')"
    )
    assert types == []


def test_role_without_a_grant_may_call_nothing(connect: Callable[..., Session], role: Callable[..., Role]) -> None:
    mallory = connect(role("mallory", granted=False))
    for call in (_qualified(RUN_V1), _qualified(RUN_V2), *OTHER_CALLS):
        with sqlstate("42501"):
            mallory.execute(call)


def test_membership_of_pgbackground_role_is_all_that_is_needed(
    connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    bob = connect(role("bob"))
    assert bob.value(_qualified(RUN_V1)) == 7
    assert bob.value(_qualified(RUN_V2)) == 7
    _wait_and_detach(bob)
    for call in OTHER_CALLS:
        bob.execute(call)


def test_executor_role_is_a_plain_role_that_owns_nothing(conn: Session) -> None:
    roles = conn.rows(
        "SELECT rolname, rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls,"
        " EXISTS (SELECT FROM pg_shdepend WHERE refobjid = r.oid AND deptype = 'o')"
        " FROM pg_roles r WHERE rolname LIKE 'pgbackground%%' ORDER BY 1"
    )
    assert roles == [
        ("pgbackground_role", *([False] * 7)),
        ("pgbackground_supervisor", *([False] * 7)),
    ]


def test_admin_functions_are_not_for_members(alice: Session) -> None:
    for call in (
        "SELECT grant_pg_background_privileges(CURRENT_USER)",
        "SELECT revoke_pg_background_privileges(CURRENT_USER)",
        "SELECT pg_background_drop_executor_role()",
    ):
        with sqlstate("42501"):
            alice.execute(call)


# --- grant and revoke -----------------------------------------------------------------------------


def test_grant_helper_opens_the_whole_api(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    bob = role("bob", granted=False)
    assert conn.value("SELECT grant_pg_background_privileges(%s)", (str(bob),)) is True
    session = connect(bob)
    assert session.value(_qualified(RUN_V1)) == 7
    assert session.value(_qualified(RUN_V2)) == 7
    _wait_and_detach(session)
    for call in OTHER_CALLS:
        session.execute(call)
    session.execute("CREATE TEMP TABLE kept (handle pg_background_handle)")
    for call in (
        "SELECT grant_pg_background_privileges(CURRENT_USER)",
        "SELECT pg_background_drop_executor_role()",
    ):
        with sqlstate("42501"):
            session.execute(call)


def test_grant_helper_gives_what_pgbackground_role_has(conn: Session, role: Callable[..., Role]) -> None:
    bob = role("bob", granted=False)
    conn.execute("SELECT grant_pg_background_privileges(%s)", (str(bob),))
    different = conn.rows(
        "SELECT f.name FROM (" + EXTENSION_FUNCTIONS.replace("%", "%%") + ") AS f(name, acl)"
        " WHERE has_function_privilege(%s, f.name, 'EXECUTE')"
        " <> has_function_privilege('pgbackground_role', f.name, 'EXECUTE')",
        (str(bob),),
    )
    assert different == []


def test_grant_helper_can_leave_out_version_1(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    bob = role("bob", granted=False)
    conn.execute("SELECT grant_pg_background_privileges(%s, include_v1 => false)", (str(bob),))
    session = connect(bob)
    assert session.value(_qualified(RUN_V2)) == 7
    for call in (
        "SELECT pg_background_launch('SELECT 1')",
        "SELECT pg_background_detach(1)",
        "SELECT * FROM pg_background_result(1) AS r(n int)",
        "SELECT _pg_background_launch_v1('SELECT 1', 0)",
    ):
        with sqlstate("42501"):
            session.execute(call)


def test_revoke_helper_takes_everything_back(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    bob = role("bob", granted=False)
    conn.execute("SELECT grant_pg_background_privileges(%s)", (str(bob),))
    session = connect(bob)
    assert session.value(_qualified(RUN_V2)) == 7
    assert conn.value("SELECT revoke_pg_background_privileges(%s)", (str(bob),)) is True
    for call in (_qualified(RUN_V1), _qualified(RUN_V2), *OTHER_CALLS):
        with sqlstate("42501"):
            session.execute(call)
    conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(bob)))


def test_revoke_helper_without_v1_leaves_version_1(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str
) -> None:
    conn.execute("CREATE SCHEMA of_its_own; ALTER EXTENSION pg_background SET SCHEMA of_its_own")
    bob = role("bob", granted=False)
    conn.execute("SELECT of_its_own.grant_pg_background_privileges(%s)", (str(bob),))
    conn.execute("SELECT of_its_own.revoke_pg_background_privileges(%s, false)", (str(bob),))
    session = connect(bob, search_path="of_its_own")
    for call in (
        _qualified(RUN_V2),
        *OTHER_CALLS,
        "SELECT _pg_background_launch('SELECT 1', 0)",
        "SELECT _pg_background_submit('SELECT 1', 0)",
    ):
        with sqlstate("42501"):
            session.execute(call)
    read = "SELECT * FROM pg_background_result(pg_background_launch(%s)) AS r(v text)"
    for _ in range(2):  # in a session of its own, then in a kept one
        assert session.rows(read, ("SELECT 'it'",)) == [("it",)]
    assert session.rows(read, ("DO $$BEGIN RAISE NOTICE 'heard'; END$$",)) == [("DO",)]
    assert session.messages() == ["NOTICE: heard"]
    assert len(session.rows(read, ("SELECT repeat('x', 1000) FROM generate_series(1, 5000)",))) == 5000
    for query in ("SELECT 1 / 0", "SELECT (1 / (g - 1000))::text FROM generate_series(1, 2000) g"):
        with sqlstate("22012"):
            session.execute(read, (query,))
    session.execute("SELECT pg_background_detach(pg_background_launch('SELECT 1'))")


def test_revoke_helper_without_v1_takes_all_from_who_has_no_version_1(conn: Session, role: Callable[..., Role]) -> None:
    bob = role("bob", granted=False)
    conn.execute("SELECT grant_pg_background_privileges(%s, false)", (str(bob),))
    conn.execute("SELECT revoke_pg_background_privileges(%s, false)", (str(bob),))
    left = f"SELECT f.name FROM ({EXTENSION_FUNCTIONS}) AS f(name, acl) WHERE f.acl LIKE %s".replace("%'", "%%'")
    assert conn.rows(left, (f"%{bob}=%",)) == []


@pytest.mark.parametrize("call", ["grant_pg_background_privileges", "revoke_pg_background_privileges"])
@pytest.mark.parametrize("name", ["nobody of that name", "public", "PUBLIC", "", "x" * 100])
def test_unknown_role_is_an_error(conn: Session, call: str, name: str) -> None:
    with sqlstate("42704", match="does not exist"):
        conn.execute(f"SELECT {call}(%s)", (name,))


@pytest.mark.parametrize("call", ["grant_pg_background_privileges", "revoke_pg_background_privileges"])
def test_null_arguments_change_nothing(conn: Session, call: str) -> None:
    for arguments in ("NULL", "'pgbackground_role', NULL", "'pgbackground_role', true, NULL"):
        assert conn.value(f"SELECT {call}({arguments})") is None
    assert conn.value(
        "SELECT has_function_privilege('pgbackground_role', 'pg_background_launch(text, int4)', 'EXECUTE')"
    )


@pytest.mark.parametrize(
    "name", ['Odd "quoted" name', "semi;colon", "per%cent %I %s", "back\\slash '", "gr\u00fc\u00dfe"]
)
def test_printed_commands_quote_names_and_can_be_run(conn: Session, role: Callable[..., Role], name: str) -> None:
    odd = role(name, granted=False)
    conn.execute("SELECT grant_pg_background_privileges(%s)", (str(odd),))
    assert conn.notices == []
    conn.execute("SELECT revoke_pg_background_privileges(%s, print_commands => true)", (str(odd),))
    conn.execute("SELECT grant_pg_background_privileges(%s, print_commands => true)", (str(odd),))
    printed = [str(notice.message) for notice in conn.notices]
    assert {notice.severity for notice in conn.notices} == {"NOTICE"}
    quoted = sql.Identifier(odd).as_string(conn)
    assert any(
        command == f"GRANT EXECUTE ON FUNCTION public.pg_background_launch(text,integer) TO {quoted}"
        for command in printed
    )
    revokes = [command for command in printed if command.startswith("REVOKE")]
    assert all(command.endswith(f" FROM {quoted}") for command in revokes)
    assert revokes
    for command in printed:
        conn.execute(command)


def test_helpers_are_not_bent_by_the_callers_search_path(conn: Session, role: Callable[..., Role]) -> None:
    bob = role("bob", granted=False)
    conn.execute("CREATE SCHEMA planted")
    conn.execute("CREATE FUNCTION planted.format(text, VARIADIC text[]) RETURNS text LANGUAGE sql AS $$SELECT 'bad'$$")
    conn.execute("CREATE VIEW planted.pg_roles AS SELECT 'nobody'::name AS rolname")
    conn.execute("CREATE VIEW planted.pg_extension AS SELECT 0::oid AS oid, 'pg_background'::name AS extname")
    conn.execute("SET search_path = planted, pg_catalog")
    assert conn.value("SELECT public.grant_pg_background_privileges(%s)", (str(bob),)) is True
    assert conn.value(
        "SELECT has_function_privilege(%s, 'public.pg_background_launch(text, int4)', 'EXECUTE')", (str(bob),)
    )
    with sqlstate("42704"):
        conn.execute("SELECT public.grant_pg_background_privileges('nobody')")


# --- the end of the role, and of the extension ----------------------------------------------------


def test_drop_executor_role_says_which_other_database_depends_on_it(conn: Session, fresh_database: str) -> None:
    with sqlstate("2BP01", match="in database") as raised:
        conn.execute("SELECT pg_background_drop_executor_role()")
    assert raised.diag.message_detail
    # Nothing has changed.
    assert conn.value(
        "SELECT has_function_privilege('pgbackground_role', 'pg_background_launch(text, int4)', 'EXECUTE')"
    )


@pytest.fixture
def own_conn(start_cluster: Callable[..., Cluster]):
    """A superuser's session on a server where no other database has the extension."""
    own = start_cluster()
    with own.connect() as session:
        for extension in EXTENSIONS:
            session.execute(f"CREATE EXTENSION {extension}")
        yield session


def test_drop_executor_role_and_the_way_back(own_conn: Session) -> None:
    own_conn.execute("CREATE ROLE bob LOGIN IN ROLE pgbackground_role")
    own_conn.execute("CREATE ROLE carol LOGIN")
    own_conn.execute("SELECT grant_pg_background_privileges('carol')")

    own_conn.execute("CREATE TABLE kept (n int)")
    own_conn.execute("GRANT SELECT ON kept TO pgbackground_role")
    with sqlstate("2BP01") as raised:
        own_conn.execute("SELECT pg_background_drop_executor_role()")
    assert raised.diag.message_detail == "privileges for table public.kept"
    own_conn.execute("REVOKE SELECT ON kept FROM pgbackground_role")

    own_conn.execute("SELECT pg_background_drop_executor_role()")
    assert own_conn.rows("SELECT FROM pg_roles WHERE rolname = 'pgbackground_role'") == []
    # No trace of its oid, which pg_dump would stumble over.
    assert (
        own_conn.rows(
            "SELECT FROM pg_init_privs, aclexplode(initprivs) a WHERE a.grantee <> 0"
            " AND a.grantee NOT IN (SELECT oid FROM pg_roles)"
        )
        == []
    )
    own_conn.execute("SET ROLE carol")
    assert own_conn.value(_qualified(RUN_V2)) == 7
    own_conn.execute("SET ROLE bob")
    with sqlstate("42501"):
        own_conn.execute(_qualified(RUN_V2))
    own_conn.execute("RESET ROLE")
    with sqlstate("42704"):
        own_conn.execute("SELECT pg_background_drop_executor_role()")

    own_conn.execute("DROP EXTENSION pg_background")
    own_conn.execute("DROP ROLE pgbackground_supervisor")
    own_conn.execute("CREATE EXTENSION pg_background")
    own_conn.execute("GRANT pgbackground_role TO bob")
    own_conn.execute("SET ROLE bob")
    assert own_conn.value(_qualified(RUN_V2)) == 7


def test_a_supervisors_role_that_somebody_may_become_is_refused(own_conn: Session) -> None:
    own_conn.execute("DROP EXTENSION pg_background; CREATE ROLE mallory; GRANT pgbackground_supervisor TO mallory")
    with sqlstate("42710", match="has members"):
        own_conn.execute("CREATE EXTENSION pg_background")
    own_conn.execute("REVOKE pgbackground_supervisor FROM mallory; CREATE EXTENSION pg_background")


def test_drop_executor_role_after_the_extension_has_moved(own_conn: Session) -> None:
    own_conn.execute("DROP EXTENSION pg_background; CREATE SCHEMA one; CREATE SCHEMA two")
    own_conn.execute("CREATE EXTENSION pg_background SCHEMA one")
    own_conn.execute("ALTER EXTENSION pg_background SET SCHEMA two")
    own_conn.execute("GRANT USAGE ON SCHEMA two TO pgbackground_role")
    own_conn.execute("SELECT two.pg_background_drop_executor_role()")
    assert own_conn.rows("SELECT FROM pg_roles WHERE rolname = 'pgbackground_role'") == []


def test_drop_extension_leaves_two_roles_that_own_nothing(own_conn: Session) -> None:
    own_conn.execute("CREATE SCHEMA leftover_check")
    assert own_conn.value(_qualified(RUN_V2)) == 7
    own_conn.execute("DROP EXTENSION pg_background")
    left = own_conn.rows("SELECT rolname FROM pg_roles WHERE rolname LIKE '%background%' ORDER BY 1")
    assert left == [("pgbackground_role",), ("pgbackground_supervisor",)]
    assert (
        own_conn.rows(
            "SELECT d.* FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid WHERE r.rolname LIKE 'pgbackground%'"
        )
        == []
    )
    objects = own_conn.rows(
        "SELECT proname FROM pg_proc WHERE proname ~ 'pg_?background'"
        " UNION ALL SELECT relname FROM pg_class WHERE relname ~ 'pg_?background'"
        " UNION ALL SELECT typname FROM pg_type WHERE typname ~ 'pg_?background'"
        " UNION ALL SELECT nspname FROM pg_namespace WHERE nspname ~ 'pg_?background'"
    )
    assert objects == []
    own_conn.execute("DROP ROLE pgbackground_role, pgbackground_supervisor")


def test_create_extension_refuses_a_role_of_that_name_that_is_more_than_plain(own_conn: Session) -> None:
    own_conn.execute("DROP EXTENSION pg_background")
    own_conn.execute("ALTER ROLE pgbackground_role LOGIN")
    with sqlstate("42710", match="pgbackground_role"):
        own_conn.execute("CREATE EXTENSION pg_background")
    own_conn.execute("ALTER ROLE pgbackground_role NOLOGIN")
    own_conn.execute("CREATE EXTENSION pg_background")


def test_only_superusers_create_the_extension(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role], fresh_database: str
) -> None:
    conn.execute("DROP EXTENSION pg_background")
    owner = role("owner", granted=False)
    conn.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(fresh_database), sql.Identifier(owner)))
    with sqlstate("42501"):
        connect(owner).execute("CREATE EXTENSION pg_background")
    conn.execute(sql.SQL("ALTER DATABASE {} OWNER TO CURRENT_USER").format(sql.Identifier(fresh_database)))


# --- rights over single workers -------------------------------------------------------------------


def test_each_call_checks_membership_of_the_launching_role(conn: Session, role: Callable[..., Role]) -> None:
    bob, carol = role("bob"), role("carol")
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(bob)))
    new = launch(conn, "SELECT 1")
    old = conn.value("SELECT pg_background_launch('SELECT 1')")
    assert [worker.pid for worker in listed(conn)] == [new.pid, old]

    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(carol)))
    assert listed(conn) == []
    for call in (
        "SELECT * FROM pg_background_result_v2({pid}, {cookie}) AS r(n int)",
        "SELECT pg_background_wait_v2({pid}, {cookie})",
        "SELECT pg_background_wait_v2_timeout({pid}, {cookie}, 0)",
        "SELECT pg_background_detach_v2({pid}, {cookie})",
        "SELECT * FROM pg_background_result({old}) AS r(n int)",
        "SELECT pg_background_detach({old})",
    ):
        with sqlstate("42501", match=f"PID ({new.pid}|{old})"):
            conn.execute(call.format(pid=new.pid, cookie=new.cookie, old=old))

    # A member of the launching role may, and a superuser may.
    conn.execute("RESET ROLE")
    conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(bob), sql.Identifier(carol)))
    assert [worker.pid for worker in listed(conn)] == [new.pid, old]
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(carol)))
    assert [worker.pid for worker in listed(conn)] == [new.pid, old]
    assert result(conn, new, "n int") == [(1,)]
    conn.execute("RESET ROLE")
    conn.execute(f"SELECT pg_background_detach({old})")
    assert listed(conn) == []


def test_list_shows_the_role_that_launched(conn: Session, role: Callable[..., Role]) -> None:
    bob = role("bob", login=False)
    conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(bob)))
    first = launch(conn, "SELECT 1")
    conn.execute("RESET ROLE")
    second = launch(conn, "SELECT 1")
    seen = [conn.value("SELECT %s::oid::regrole::text", (worker.user_id,)) for worker in listed(conn)]
    assert seen == [str(bob), conn.value("SELECT CURRENT_USER::regrole::text")]
    detach(conn, first)
    detach(conn, second)


def test_definer_functions_worker_belongs_to_its_owner(
    conn: Session, connect: Callable[..., Session], role: Callable[..., Role]
) -> None:
    owner, caller = role("owner", schema=True), role("caller", granted=True)
    session = connect(owner)
    session.execute(
        "CREATE FUNCTION start() RETURNS pg_background_handle LANGUAGE sql SECURITY DEFINER"
        " AS $$ SELECT pg_background_launch_v2('SELECT CURRENT_USER') $$"
    )
    session.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO PUBLIC").format(sql.Identifier(owner)))
    other = connect(caller)
    start = sql.SQL("SELECT pid, cookie FROM {}.start()").format(sql.Identifier(owner))
    handle = other.rows(start)[0]
    assert listed(other) == []
    with sqlstate("42501"):
        wait(other, handle)
