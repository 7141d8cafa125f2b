"""Reads the README's examples.

A ```text block shows what psql prints for the ```sql block before it; a ```console block is only an example.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "-- block of the README"


class Step(NamedTuple):
    """A ```sql block, and what psql prints for it where the README shows that."""

    statements: str
    shown: str | None


def section(begin: str, end: str) -> str:
    """The README between two markers."""
    found = re.search(re.escape(begin) + "(.*?)" + re.escape(end), README, re.DOTALL)
    assert found, f"README.md has no {begin} … {end}"
    return found.group(1)


def steps(text: str) -> list[Step]:
    """The ```sql blocks, each with the ```text block that follows it."""
    blocks = [(fence["language"], fence["body"]) for fence in _FENCE.finditer(text)]
    following = [*blocks[1:], ("", "")]
    return [
        Step(body, after if language_after == "text" else None)
        for (language, body), (language_after, after) in zip(blocks, following)
        if language == "sql"
    ]


def normalized(printed: str) -> list[str]:
    """Lines without what differs from run to run: pids, cookies, column widths, an error's context."""
    printed = re.sub(r"^CONTEXT:.*", "", printed, flags=re.MULTILINE | re.DOTALL)
    lines = []
    for line in printed.splitlines():
        short = re.sub(r"-+", "-", re.sub(r"\s+", " ", line)).strip()
        if short:
            lines.append(re.sub(r"\b\d{3,}\b", "N", short))
    return lines


def check(tour: list[Step], printed: str) -> None:
    """Compare what psql printed for `script(tour)` with what the README shows."""
    outputs = printed.split(MARK)[1:]
    assert len(outputs) == len(tour)
    for step, output in zip(tour, outputs):
        if step.shown is not None:
            assert normalized(output) == normalized(step.shown), step.statements
        else:
            assert "ERROR" not in output, f"{step.statements}\n{output}"


def script(tour: list[Step]) -> str:
    """The steps for psql, with a mark before each one's output."""
    return "".join(f"\\echo {MARK}\n{step.statements}\n" for step in tour)
