"""Turns a fresh worker session, logged in as a superuser, into one of the launching role, for good.

This is the one place where a mistake hands out superuser. The source of this module and a call of `become` are
the body of a DO block that the launcher sends before anything else: no function is called by a name that
somebody else could have planted. It imports nothing of this package, and nothing at its top.

It does what the server's own InitializeSessionUserId does for a background worker, after the fact. An error of the
server in here would jump over Python's frames; ExitOnAnyError turns every one into the end of this backend.
"""


def become(plpy, role_oid, launcher_system_user, resets):
    """Make role_oid the authenticated, session and current user, and the resets its settings' reset values.

    launcher_system_user: (authentication method, identity) that SYSTEM_USER shows from 16 on.
    resets: (name, value) pairs, as bytes in the database's encoding.
    Raises 42704 (no such role), 53300 (no connection left that is not reserved), 0A000 (unsupported server).
    """
    import ctypes

    server = ctypes.PyDLL(None)
    major = check_server(plpy, server)
    role = find_role(plpy, role_oid)
    check_slots(plpy, server, major)
    name = role["name_bytes"]

    exit_on_any_error = ctypes.c_bool.in_dll(server, "ExitOnAnyError")
    before = exit_on_any_error.value
    exit_on_any_error.value = True
    if major >= 17:
        server.SetAuthenticatedUserId(ctypes.c_uint32(role_oid))
    else:
        server.SetAuthenticatedUserId(ctypes.c_uint32(role_oid), ctypes.c_bool(role["rolsuper"]))
    set_option = server.SetConfigOption
    set_option.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    backend_context, user_context, override = 4, 6, 10
    set_option(b"session_authorization", name, backend_context, override)
    for getter in ("GetAuthenticatedUserId", "GetSessionUserId", "GetUserId"):
        get_id = getattr(server, getter)
        get_id.restype = ctypes.c_uint32
        if get_id() != role_oid:
            plpy.fatal("%s() is %d after the switch to role %d" % (getter, get_id(), role_oid))
    if major >= 16:
        method, identity = launcher_system_user
        server.InitializeSystemUser(ctypes.c_char_p(identity), ctypes.c_char_p(method))
    for setting, value in resets:
        set_option(setting, value, user_context, override)
    show_role = server.pgstat_bestart if major < 18 else server.pgstat_bestart_final
    show_role()
    exit_on_any_error.value = before


def check_server(plpy, server):
    """The server's major version; refuse those in which the switch was never shown to hold."""
    shown = plpy.execute(
        "SELECT pg_catalog.current_setting('server_version_num') AS version,"
        " pg_catalog.current_setting('debug_assertions') AS assertions"
    )[0]
    version = int(shown["version"])
    first_minor = {14: 14, 15: 9, 16: 5, 17: 1, 18: 0}.get(version // 10000)
    if first_minor is None or version % 10000 < first_minor or not hasattr(server, "SetAuthenticatedUserId"):
        plpy.error(
            "background workers cannot run on this minor release of PostgreSQL",
            sqlstate="0A000",
            hint="Supported are 14.14, 15.9, 16.5, 17.1, 18.0 and later minor releases of these.",
        )
    if shown["assertions"] != "off":
        plpy.error("background workers cannot run on a server with debug_assertions", sqlstate="0A000")
    return version // 10000


def find_role(plpy, role_oid):
    """Name (as bytes of the database's encoding) and rolsuper of the role."""
    found = plpy.execute(
        "SELECT pg_catalog.convert_to(a.rolname::pg_catalog.text, pg_catalog.getdatabaseencoding()) AS name_bytes,"
        " a.rolsuper FROM pg_catalog.pg_authid a WHERE a.oid OPERATOR(pg_catalog.=) %d::pg_catalog.oid" % role_oid
    )
    if len(found) != 1:
        plpy.error("role with OID %d does not exist" % role_oid, sqlstate="42704")
    return found[0]


def check_slots(plpy, server, major):
    """Give way when this login took a connection that is reserved: superusers may, a worker must not."""
    import ctypes

    shown = plpy.execute(
        "SELECT pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4 AS superusers,"
        " COALESCE(pg_catalog.current_setting('reserved_connections', true)::pg_catalog.int4, 0) AS others"
    )[0]
    reserved = ctypes.c_int(shown["superusers"] + shown["others"])
    server.HaveNFreeProcs.restype = ctypes.c_bool
    if major >= 16:
        enough = server.HaveNFreeProcs(reserved, ctypes.byref(ctypes.c_int()))
    else:
        enough = server.HaveNFreeProcs(reserved)
    if not enough:
        plpy.error("no connection is left for a background worker", sqlstate="53300")
