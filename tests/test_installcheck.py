"""`make installcheck` without a DSN: pg_regress against a running server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.clusters import Cluster, find_pg_config
from tools import installing, regress
from tools.common import ROOT

DATABASE = "contrib_regression"


@pytest.fixture
def regress_server(cluster: Cluster) -> Iterator[Cluster]:
    """The suite's server, without the database of pg_regress afterwards."""
    program = regress.pg_regress(installing.read_server(find_pg_config()))
    if not program.exists():
        pytest.skip(f"{program} is not installed")
    yield cluster
    cluster.drop_database(DATABASE)


@pytest.mark.local_server
def test_the_regression_test_passes(regress_server: Cluster) -> None:
    with regress_server.connect() as session:
        where = {"PGHOST": session.info.host, "PGPORT": str(session.info.port), "PGUSER": session.info.user}
    command = [sys.executable, ROOT / "build.py", "installcheck", "--pg-config", find_pg_config()]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **where}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
