"""pg_background_check: tries each thing that background workers need, and says what to do where one is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from . import settings
from .errors import ADMIN_SHUTDOWN, INTERNAL_ERROR, QUERY_CANCELED, BackgroundError, Report, background_error
from .inheritance import startup_options
from .loopback import Loopback, describe, import_pq
from .starter import ROLE as SUPERVISOR_ROLE

if TYPE_CHECKING:
    from .registry import Registry
    from .server import Server

_EXECUTOR_ROLE = "pgbackground_role"
_LOGIN_OPTIONS = {b"role": b"none", b"search_path": b"pg_catalog", b"statement_timeout": b"0"}
_SEE_LOG = "See the server log."


class Finding(NamedTuple):
    """A row of pg_background_check()."""

    prerequisite: str
    status: str  # ok or failed
    detail: str
    remedy: str | None


class SelfCheck:
    """The prerequisites, one method for each: it returns what it found, or raises what is wrong."""

    def __init__(
        self,
        server: Server,
        registry: Registry,
        configurations: settings.Configurations,
        report_of: Callable[[Exception], Report],
    ) -> None:
        self._server = server
        self._registry = registry
        self._configurations = configurations
        self._report_of = report_of

    def findings(self) -> list[Finding]:
        """All of them; what fails keeps none of the others from being tried."""
        checks = (
            ("server", self._version),
            ("libpq and psycopg", self._client_library),
            ("roles", self._roles),
            ("settings", self._settings),
            ("connections", self._connections),
            ("loopback login", self._login),
            ("identity switch", self._identity),
            ("supervisor", self._supervisor),
        )
        return [self._finding(name, check) for name, check in checks]

    def _finding(self, name: str, check: Callable[[], str]) -> Finding:
        try:
            return Finding(name, "ok", check(), None)
        except Exception as error:
            report = self._report(error)
            if report.sqlstate in (QUERY_CANCELED, ADMIN_SHUTDOWN):
                raise
            detail = f"{report.message} (SQLSTATE {report.sqlstate})"
            if report.detail:
                detail += f": {report.detail}"
            return Finding(name, "failed", detail, report.hint or _SEE_LOG)

    def _report(self, error: Exception) -> Report:
        try:
            return self._report_of(error)
        except Exception as defect:  # noqa: BLE001 - a broken installation has many faces
            return Report(INTERNAL_ERROR, f"{type(defect).__name__}: {defect}")

    def _version(self) -> str:
        python = ".".join(map(str, sys.version_info[:3]))
        return f"PostgreSQL {self._server.required_setting('server_version')}, Python {python}"

    def _client_library(self) -> str:
        return describe(import_pq())

    def _roles(self) -> str:
        roles = self._server.query(
            "SELECT r.rolname::pg_catalog.text AS name, r.rolcanlogin OR r.rolsuper AS is_wrong,"
            " pg_catalog.pg_has_role(CURRENT_USER, r.oid, 'MEMBER') AS is_member FROM pg_catalog.pg_roles r"
            " WHERE r.rolname::pg_catalog.text OPERATOR(pg_catalog.=) ANY ($1)",
            ["pg_catalog.text[]"],
            [[_EXECUTOR_ROLE, SUPERVISOR_ROLE]],
        )
        found = {role["name"]: role for role in roles}
        for name in (SUPERVISOR_ROLE, _EXECUTOR_ROLE):
            if name not in found or found[name]["is_wrong"]:
                raise background_error(
                    "42704",
                    f'the role "{name}" does not exist, or can log in, or is a superuser',
                    hint=f"CREATE ROLE {name} NOLOGIN; and GRANT it what CREATE EXTENSION pg_background granted, or"
                    " create the extension anew.",
                )
        member = "a member" if found[_EXECUTOR_ROLE]["is_member"] else "no member"
        return f"{_EXECUTOR_ROLE} and {SUPERVISOR_ROLE} are there, the caller is {member} of the first"

    def _settings(self) -> str:
        values = []
        for each in settings.ALL:
            try:
                values.append(f"{each.name.partition('.')[2]} {settings.value(self._server, each)}")
            except BackgroundError as error:
                hint = f"SET {each.name} to a valid value, or RESET it; pg_settings tells where it comes from."
                raise BackgroundError(replace(error.report, hint=error.report.hint or hint)) from error
        return ", ".join(values)

    def _connections(self) -> str:
        if not self._server.has_free_slots(1):
            raise background_error(
                "53300",
                "no connection is left for a background worker",
                hint="Raise max_connections, or end sessions that are not needed.",
            )
        return f"there is room, max_connections is {self._server.required_setting('max_connections')}"

    def _login(self) -> str:
        """Each superuser in turn, as a launch does."""
        loopback = Loopback(self._server)
        refused: BackgroundError | None = None
        for login in loopback.logins():
            try:
                connection = loopback.connect(login, startup_options(_LOGIN_OPTIONS))
            except BackgroundError as error:
                refused = refused or error
            else:
                connection.finish()
                return f'as "{login.name}" over the unix socket'
        assert refused is not None
        raise refused

    def _identity(self) -> str:
        current, session = self._registry.sessions.prove(self._configurations.now())
        return f'a worker became "{current}", its session user is "{session}"'

    def _supervisor(self) -> str:
        self._registry.control.ensure()
        return f"it answers, with process {self._registry.control.supervisor_pid}"
