"""Which settings a worker inherits, where no server is needed; tests/test_identity.py has the rest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pg_background.inheritance import Inheritance, Inherited, startup_options


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


def as_the_server_splits(options: bytes) -> list[bytes]:
    """pg_split_opts, where any byte but a letter or a digit may be a space in the server's locale."""
    words, word, escaped = [], b"", False
    for byte in (bytes((code,)) for code in options):
        if escaped or byte.isalnum() or byte in b"-=_.":
            word, escaped = word + byte, False
        elif byte == b"\\":
            escaped = True
        elif word:
            words.append(word)
            word = b""
    return [*words, word] if word else words


@given(st.dictionaries(st.sampled_from((b"search_path", b"role", b"a.b")), st.binary(min_size=1), min_size=1))
def test_no_value_of_a_startup_option_ends_it_or_begins_another(options: dict[bytes, bytes]) -> None:
    expected = [word for name, value in options.items() for word in (b"-c", name + b"=" + value)]
    assert as_the_server_splits(startup_options(options)) == expected


def test_each_byte_of_a_startup_option_that_may_be_a_space_is_escaped() -> None:
    for code in range(256):
        byte = bytes((code,))
        written = byte if byte.isalnum() else b"\\" + byte
        assert startup_options({b"role": b"a" + byte + b"z"}) == b"-c role=a" + written + b"z"
