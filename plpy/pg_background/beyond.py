"""What goes beyond version 1.8: labels, parameters, one-call runs, waits for any of many, typed rows, self-check.

Each method of Beyond stands behind the internal function of its name; calls.py tells what their replies mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .calls import reply
from .errors import INVALID_PARAMETER_VALUE, NULL_VALUE_NOT_ALLOWED, Report, background_error
from .worker import Parameters

if TYPE_CHECKING:
    from .calls import Runtime
    from .registry import Registry
    from .server import Server

_MAX_LABEL_CHARACTERS = 1000
_MAX_PARAMETERS = 65535  # the protocol counts them in 16 bits


class Beyond:
    """The calls that version 1.8 does not have."""

    def __init__(self, runtime: Runtime, server: Server, registry: Registry) -> None:
        self._runtime = runtime
        self._server = server
        self._registry = registry

    def report_of(self, error: Exception) -> Report:
        """The report for an exception that the user is to see."""
        return self._runtime.report_of(error)

    # --- starting ---

    @reply
    def start(
        self,
        sql: str | None,
        queue_size: int | None,
        label: str | None,
        params: list[str | None] | None,
        submitted: bool,
    ) -> str:
        """A handle, as the text of a pg_background_handle."""
        worker = self._runtime.launch_job(
            _given(sql),
            queue_size or 0,
            submitted=submitted,
            label=_checked_label(label),
            parameters=self._parameters(params),
        )
        return f"({worker.pid},{worker.cookie})"

    def _parameters(self, params: Sequence[str | None] | None) -> Parameters | None:
        """The values as bytes of the database's encoding. 22023 for an array of several dimensions."""
        if params is None:
            return None
        if any(isinstance(value, list) for value in params):
            raise background_error(
                INVALID_PARAMETER_VALUE,
                "the parameters of a background worker must be an array of one dimension",
            )
        if len(params) > _MAX_PARAMETERS:
            raise background_error(
                INVALID_PARAMETER_VALUE,
                f"a background worker cannot have {len(params)} parameters",
                hint=f"Up to {_MAX_PARAMETERS} are possible; pass an array or JSON as one of them.",
            )
        if self._server.encoding in ("UTF8", "SQL_ASCII"):
            return [None if value is None else value.encode() for value in params]
        converted = self._server.query(
            "SELECT ARRAY(SELECT pg_catalog.convert_to(p.value, pg_catalog.getdatabaseencoding())"
            " FROM pg_catalog.unnest($1) WITH ORDINALITY AS p(value, place) ORDER BY p.place) AS bytes",
            ["pg_catalog.text[]"],
            [list(params)],
        )
        return list(converted[0]["bytes"])


def _given(sql: str | None) -> str:
    """22004 for a NULL."""
    if sql is None:
        raise background_error(NULL_VALUE_NOT_ALLOWED, "the SQL of a background worker must not be null")
    return sql


def _checked_label(label: str | None) -> str | None:
    """22023 for one that is no label but a text."""
    if label is not None and len(label) > _MAX_LABEL_CHARACTERS:
        raise background_error(
            INVALID_PARAMETER_VALUE,
            f"a label of {len(label)} characters is too long",
            hint=f"Up to {_MAX_LABEL_CHARACTERS} characters are possible.",
        )
    return label
