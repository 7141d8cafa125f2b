"""The modules' function bodies: source, and the code that CREATE EXTENSION has put behind it."""

from __future__ import annotations

import binascii
import importlib
import marshal
import sys

import pytest
from pg_background.bootstrap import Module, install_importer

_BODY = "SELECT $module$answer = 41 + 1\n$module$::pg_catalog.text"


def _answer(module: Module) -> int:
    scope: dict[str, int] = {}
    exec(marshal.loads(module.code()), scope)
    return scope["answer"]


def _with_code_of(body: str, source: str) -> str:
    """The body with the code of another source in its comment, under the mark that it has."""
    select, comment = body.split("/*")
    mark = comment.split()[0]
    code = binascii.b2a_base64(marshal.dumps(compile(source, "<other>", "exec")), newline=False).decode()
    return f"{select}/* {mark} {code} */"


def test_code_comes_from_the_source_where_there_is_no_other() -> None:
    assert _answer(Module("answers", _BODY)) == 42


def test_compiled_body_keeps_the_source() -> None:
    compiled = Module("answers", Module("answers", _BODY).compiled_body())
    assert compiled.source == Module("answers", _BODY).source
    assert _answer(compiled) == 42


def test_compiled_code_is_taken_without_a_look_at_the_source() -> None:
    body = _with_code_of(Module("answers", _BODY).compiled_body(), "answer = 7")
    assert _answer(Module("answers", body)) == 7


@pytest.mark.parametrize("change", [("41", "40"), ("+ 1\n", "+ 1 - 1\n")])
def test_code_of_an_edited_source_is_not_taken(change: tuple[str, str]) -> None:
    body = Module("answers", _BODY).compiled_body().replace(*change, 1)
    assert _answer(Module("answers", body)) == 41


def test_code_of_another_python_is_not_taken() -> None:
    body = _with_code_of(Module("answers", _BODY).compiled_body(), "answer = 7")
    mark = body.split("/*")[1].split()[0]
    assert _answer(Module("answers", body.replace(mark, "00" + mark[2:]))) == 42


def test_code_is_compiled_under_the_name_that_tracebacks_show() -> None:
    assert marshal.loads(Module("answers", _BODY).code()).co_filename == "<pg_background.answers>"


def test_importer_loads_what_it_is_given_and_nothing_else() -> None:
    finders, modules = list(sys.meta_path), dict(sys.modules)
    bodies = {"__init__": _BODY.replace("answer", "package"), "answers": _BODY}
    try:
        install_importer(lambda name: Module(name, bodies[name]).code())
        answers = importlib.import_module("pg_background.answers")

        assert answers.answer == 42
        with pytest.raises(KeyError):
            importlib.import_module("pg_background.others")
    finally:
        sys.meta_path[:] = finders
        sys.modules.clear()
        sys.modules.update(modules)
