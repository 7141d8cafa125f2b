"""docs/moving.md: the query that notes who was granted what."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.clusters import Role, Session
from tests.readme import ROOT


def test_the_query_gives_the_commands_that_grant_again(conn: Session, role: Callable[..., Role]) -> None:
    bob = role("bob's", granted=False)
    page = (ROOT / "docs" / "moving.md").read_text("utf-8")
    query = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)[0]
    before = {command for (command,) in conn.rows(query)}
    conn.execute(f'GRANT EXECUTE ON FUNCTION pg_background_launch(text, int4) TO "{bob}"')
    (command,) = {command for (command,) in conn.rows(query)} - before
    assert command == f'GRANT EXECUTE ON FUNCTION pg_background_launch(text,integer) TO "{bob}";'
    conn.execute(command)
