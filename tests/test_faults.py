"""System calls and calls of the server made to fail, one after the other: a clear error or recovery, and nothing left.

A fault comes from outside where it can: a limit of the operating system on a backend of ours (prlimit), a folder that
cannot be written to, a signal, a socket in the place of another. Where it cannot, `failing` puts a function that fails
in the place of one in the session's own Python, as a superuser may.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.clusters import Session


def test_a_cancel_while_the_runtime_is_loaded_is_a_cancel(connect: Callable[..., Session], conn: Session) -> None:
    """Of the functions that return a number as well: it was an invalid input syntax."""
    fresh = connect()
    fresh.execute("SET statement_timeout = '100ms'")
    with conn.transaction():
        conn.execute("LOCK TABLE pg_extension")
        with pytest.raises(psycopg.errors.QueryCanceled):
            fresh.execute("SELECT _pg_background_placeholders()")
    fresh.execute("RESET statement_timeout")
    assert fresh.value("SELECT _pg_background_placeholders()") >= 0
