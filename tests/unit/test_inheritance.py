"""Which settings a worker inherits, where no server is needed; tests/test_identity.py has the rest."""

from __future__ import annotations

from typing import Any

import pytest
from pg_background.inheritance import Inheritance, Inherited


class Backend:
    """As server.Server, as far as it is asked here."""

    current = 10

    def caller(self) -> int:
        return self.current


def test_what_was_computed_for_one_caller_is_not_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = Backend()
    inheritance = Inheritance(backend)
    computed: list[int] = []

    def compute(*_: Any, **__: Any) -> Inherited:
        computed.append(backend.current)
        return Inherited(b"", (), b"%d" % backend.current)

    monkeypatch.setattr(inheritance, "of", compute)
    start = Inherited(b"", (), b"")
    assert [inheritance.again(b"state", start).assign for _ in range(2)] == [b"10", b"10"]
    backend.current = 11
    assert inheritance.again(b"state", start).assign == b"11"
    assert computed == [10, 11]
