"""build.py installcheck: the regression test, by a server's pg_regress, against what PGHOST and PGPORT name."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tools import installing, release
from tools.common import ROOT, BuildError

_INPUT = ROOT / "tests" / "regress"


def run(pg_config: str | None) -> None:
    """Run pg_regress; BuildError, after the differences were printed, when the server does another thing."""
    server = installing.find_server(pg_config)
    program = pg_regress(server)
    if not program.exists():
        raise BuildError(f"{program} is missing: it comes with the server's package, or the one for development")
    with tempfile.TemporaryDirectory(prefix="pg_background-regress-") as output:
        folders = [f"--inputdir={_INPUT}", f"--outputdir={output}", f"--bindir={server.pg_config.parent}"]
        done = subprocess.run([program, *folders, "--dbname=contrib_regression", "pg_background"], check=False)
        if done.returncode != 0:
            differences = Path(output) / "regression.diffs"
            said = differences.read_text("utf-8") if differences.exists() else ""
            raise BuildError(f"pg_regress failed\n{said}")


def pg_regress(server: installing.Server) -> Path:
    """Where a server's pg_regress is, there or not."""
    makefile = Path(release.run(server.pg_config, "--pgxs").strip())
    return makefile.parent.parent / "test" / "regress" / "pg_regress"
