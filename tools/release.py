"""build.py dist: PGXN's zip archive; and what every kind of package has in common."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tools.common import CONTROL, ROOT, BuildError, control_version

DIST = ROOT / "dist"


def extension_files() -> list[Path]:
    """What goes into the server's folder for extensions."""
    return [CONTROL, ROOT / f"pg_background--{control_version()}.sql"]


def documents() -> list[Path]:
    """What goes into the packages' folder for documents, their changelog aside."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").iterdir())]


def meta() -> dict[str, str]:
    """PGXN's description of this release: name, version, abstract and so on."""
    described: dict[str, str] = json.loads((ROOT / "META.json").read_text("utf-8"))
    return described


def source_date() -> int:
    """When these sources were committed, in seconds: no file of a package is younger."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    asked = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"], check=False, capture_output=True, text=True
    )
    return int(asked.stdout) if asked.returncode == 0 else int(CONTROL.stat().st_mtime)


def run(*command: str | Path, **environment: str) -> str:
    """Run a program and return what it prints; BuildError with its output when it fails or is missing."""
    variables = {**os.environ, "SOURCE_DATE_EPOCH": str(source_date()), **environment}
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build_archive() -> None:
    """Write what is committed as a zip archive: the same bytes for the same commit."""
    name = f"{meta()['name']}-{meta()['version']}"
    DIST.mkdir(exist_ok=True)
    archive = DIST / f"{name}.zip"
    # A zip archive holds local times.
    run("git", "-C", ROOT, "archive", "--format=zip", f"--prefix={name}/", f"--output={archive}", "HEAD", TZ="UTC")
    print(archive)
