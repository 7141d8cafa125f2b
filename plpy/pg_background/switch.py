"""Turns a fresh worker session, logged in as a superuser, into one of the launching role, for good.

This is the one place where a mistake hands out superuser. The code of this module and a call of `become` are
the body of a DO block that the launcher sends before anything else: no function is called by a name that
somebody else could have planted. It imports nothing of this package, and nothing at its top.

It does what the server's own InitializeSessionUserId does for a background worker, after the fact. An error of the
server in here would jump over Python's frames; ExitOnAnyError turns every one into the end of this backend.
"""


def become(plpy, role_oid, is_superuser, launcher_system_user, orders, held_to_limits=True):
    """Make role_oid the authenticated, session and current user, with the settings that its launcher has.

    is_superuser: what the launcher knows of it. From here on the session has the right to become anybody, or has it
    not, whatever becomes of the role; so the launcher must know which.
    launcher_system_user: (authentication method, identity) that SYSTEM_USER shows from 16 on; None: NULL.
    orders: (name, value, GucSource, setter) for each setting; setter: oid of who is said to have set it. Name and
    value are bytes in the database's encoding.
    held_to_limits: whether the CONNECTION LIMITs of role and database hold.
    Raises 42704 (no such role), 55000 (is_superuser has changed), 53300 (no connection left), 0A000 (unsupported
    server).
    """
    import ctypes

    server = ctypes.PyDLL(None)
    major = check_server(plpy, server)
    role = find_role(plpy, role_oid)
    if role["rolsuper"] is not is_superuser:
        plpy.error("the role of a background worker has just become a superuser, or ceased to be one", sqlstate="55000")
    check_slots(plpy, server, major)

    exit_on_any_error = ctypes.c_bool.in_dll(server, "ExitOnAnyError")
    before = exit_on_any_error.value
    exit_on_any_error.value = True
    switch_users(plpy, server, major, role_oid, is_superuser)
    if held_to_limits:
        check_limits(plpy, server, role_oid, role)
    if major >= 16:
        show_system_user(server, major, launcher_system_user, role_oid)
    for setting, value, source, setter in orders:
        set_option(server, major, setting, value, source, setter)
        if setting == b"exit_on_error":
            # It is the very variable that guards this block.
            before = exit_on_any_error.value
            exit_on_any_error.value = True
    show_role = server.pgstat_bestart if major < 18 else server.pgstat_bestart_final
    show_role()
    exit_on_any_error.value = before


def switch_users(plpy, server, major, role_oid, is_superuser):
    """What makes the session another role's."""
    import ctypes

    get_name = server.GetUserNameFromId
    get_name.restype = ctypes.c_char_p
    name = get_name(ctypes.c_uint32(role_oid), ctypes.c_bool(False))
    if major >= 17:
        server.SetAuthenticatedUserId(ctypes.c_uint32(role_oid))
    else:
        server.SetAuthenticatedUserId(ctypes.c_uint32(role_oid), ctypes.c_bool(is_superuser))
    set_option = server.SetConfigOption
    set_option.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    backend_context, override = 4, 10
    set_option(b"session_authorization", name, backend_context, override)
    for getter in ("GetAuthenticatedUserId", "GetSessionUserId", "GetUserId"):
        get_id = getattr(server, getter)
        get_id.restype = ctypes.c_uint32
        if get_id() != role_oid:
            plpy.fatal("%s() is %d after the switch to role %d" % (getter, get_id(), role_oid))


def set_option(server, major, name, value, source, setter):
    """Set a setting; where the launcher's value is none that this session can take, leave it.

    setter: whose rights the server goes by when a library defines this placeholder later. Without saying so, it would
    take the bootstrap superuser's for what is set as a reset value.
    """
    import ctypes

    log_level, user_context = 15, 6
    number = ctypes.c_int
    values = (ctypes.c_char_p(name), ctypes.c_char_p(value), number(user_context), number(source))
    how = (number(0), ctypes.c_bool(True), number(log_level), ctypes.c_bool(False))
    if major < 15:
        server.set_config_option(*values, *how)
    else:
        server.set_config_option_ext(*values, ctypes.c_uint32(setter), *how)


def show_system_user(server, major, launcher_system_user, role_oid):
    """Make SYSTEM_USER the launcher's, here and in parallel workers: row security may build on it.

    Where the launcher has none (trust), but this login has, it cannot be made NULL any more; then it names nobody.
    """
    import ctypes

    class ClientConnectionInfo(ctypes.Structure):
        _fields_ = (("authn_id", ctypes.c_void_p), ("auth_method", ctypes.c_int))

    info = ClientConnectionInfo.in_dll(server, "MyClientConnectionInfo")
    if launcher_system_user is None and info.authn_id is None:
        return
    method, identity = launcher_system_user or (b"trust", b"%d" % role_oid)
    server.hba_authname.restype = ctypes.c_char_p
    methods = [server.hba_authname(ctypes.c_int(number)) for number in range(15 if major < 18 else 16)]
    copy = server.MemoryContextStrdup
    copy.restype = ctypes.c_void_p
    for_good = ctypes.c_void_p.in_dll(server, "TopMemoryContext")
    server.InitializeSystemUser(ctypes.c_char_p(identity), ctypes.c_char_p(method))
    info.authn_id = copy(for_good, ctypes.c_char_p(identity))
    info.auth_method = methods.index(method)


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
    """rolsuper of the role, and how many connections it and the database may have (-1: as many as there are)."""
    found = plpy.execute(
        "SELECT a.rolsuper, a.rolconnlimit, d.oid AS database, d.datconnlimit"
        " FROM pg_catalog.pg_authid a, pg_catalog.pg_database d"
        " WHERE a.oid OPERATOR(pg_catalog.=) %d::pg_catalog.oid"
        " AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()" % role_oid
    )
    if len(found) != 1:
        plpy.error(
            "role with OID %d does not exist" % role_oid,
            hint="Background workers see a role once the transaction that created it has committed.",
            sqlstate="42704",
        )
    return found[0]


def check_limits(plpy, server, role_oid, role):
    """Hold the CONNECTION LIMIT of role and database, which a superuser's login is not held to."""
    import ctypes

    if role["rolsuper"]:
        return
    counts = (
        ("role", role["rolconnlimit"], server.CountUserBackends(ctypes.c_uint32(role_oid))),
        ("database", role["datconnlimit"], server.CountDBConnections(ctypes.c_uint32(int(role["database"])))),
    )
    for what, limit, count in counts:
        if 0 <= limit < count:
            plpy.error(
                "too many connections for the %s of a background worker" % what,
                detail="CONNECTION LIMIT of the %s is %d, and workers count." % (what, limit),
                hint="Raise it, or lower pg_background.max_workers.",
                sqlstate="53300",
            )


def check_slots(plpy, server, major):
    """Give way when this login took a connection that is reserved: superusers may, a worker must not."""
    import ctypes

    shown = plpy.execute(
        "SELECT pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4 AS superusers,"
        " COALESCE(pg_catalog.current_setting('reserved_connections', true)::pg_catalog.int4, 0) AS others"
    )[0]
    reserved = shown["superusers"] + shown["others"]
    if reserved == 0:
        return  # from 16 on HaveNFreeProcs(0) is false while any is free
    server.HaveNFreeProcs.restype = ctypes.c_bool
    if major >= 16:
        enough = server.HaveNFreeProcs(ctypes.c_int(reserved), ctypes.byref(ctypes.c_int()))
    else:
        enough = server.HaveNFreeProcs(ctypes.c_int(reserved))
    if not enough:
        plpy.error("no connection is left for a background worker", sqlstate="53300")
