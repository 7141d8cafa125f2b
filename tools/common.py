"""What all commands of build.py share: where things are, and the error that names what the user must put right."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTROL = ROOT / "pg_background.control"


class BuildError(Exception):
    """Something that the user must put right; its text says what."""


def control_version(control: Path = CONTROL) -> str:
    """The default_version of the control file."""
    found = re.search(r"^default_version\s*=\s*'([^']+)'", control.read_text("ascii"), re.MULTILINE)
    if not found:
        raise BuildError(f"{control}: no default_version")
    return found.group(1)


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file and rename, so that nobody reads half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
