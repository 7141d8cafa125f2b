"""docs/cookbook.md holds: each recipe runs from the file itself, and gives what it shows; so do README's examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from sql_templates.api import API
from tests.clusters import Session
from tests.readme import Step, normalized, section, steps
from tests.test_readme import psql

COOKBOOK = (Path(__file__).parent.parent / "docs" / "cookbook.md").read_text("utf-8")
_MARK = "-- block of the cookbook"


def _check(session: Session, blocks: list[Step]) -> None:
    """What psql prints for each block is what follows it; a block without output raises no error."""
    script = "\\set SHOW_CONTEXT never\n" + "".join(f"\\echo {_MARK}\n{block.statements}\n" for block in blocks)
    printed = psql(session, script).split(_MARK)[1:]
    assert len(printed) == len(blocks)
    for block, output in zip(blocks, printed):
        if block.shown is None:
            assert "ERROR" not in output, f"{block.statements}\n{output}"
        else:
            without_echo = "\n".join(line for line in output.splitlines() if not line.startswith("CREATE "))
            unqualified = without_echo.replace(f"{session.info.user}.", "")
            assert normalized(unqualified) == normalized(block.shown), block.statements


@pytest.mark.setups("peer")
def test_the_recipes_give_what_they_show(alice: Session) -> None:
    blocks = steps(COOKBOOK)
    assert len(blocks) >= COOKBOOK.count("\n## ")
    _check(alice, blocks)


@pytest.mark.setups("peer")
def test_the_readmes_example_of_each_function(alice: Session) -> None:
    examples = section("<!-- examples:begin -->", "<!-- examples:end -->")
    _check(alice, steps(examples))
    unseen = {function.name for function in API if function.role and f"{function.name}(" not in examples}
    assert not unseen
