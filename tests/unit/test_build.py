"""build.py and tools/: what they render and refuse, and find in a server's folders. No server is started."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import build
from sql_templates.api import API, INTERNAL, Argument, Function
from tools import debian, installing, rendering
from tools.common import CONTROL, ROOT, BuildError, control_version

MASTER = (
    "{% for m in modules %}{{ m.function }}{% endfor %}\n"
    '{% include "functions/pg_background_detach.sql.j2" %}\n'
    "{% for f in created() %}COMMENT ON FUNCTION {{ f.signature }} IS {{ literal(f.comment) }};\n{% endfor %}"
)
BODY = '{#- a template -#}\n{{ create("pg_background_detach") }}\nLANGUAGE sql\nAS $$SELECT$$;\n'


class Tree(NamedTuple):
    templates: Path
    runtime: Path
    control: Path

    def write(self, name: str, text: str) -> None:
        path = self.templates / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def render(self) -> str:
        return rendering.render_script(self.templates, self.runtime, self.control)[0]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path / "templates", tmp_path / "runtime", tmp_path / "pg_background.control")
    made.runtime.mkdir()
    made.control.write_text("default_version = '1.8'\n")
    made.write("pg_background.sql.j2", MASTER)
    made.write("functions/pg_background_detach.sql.j2", BODY)
    return made


@pytest.fixture
def server(tmp_path: Path) -> installing.Server:
    (tmp_path / "share" / "extension").mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    return installing.Server(tmp_path / "pg_config", "PostgreSQL 16.4", tmp_path / "share", tmp_path / "lib")


def test_the_committed_files_are_current() -> None:
    for path, text in rendering.rendered_files().items():
        assert path.read_text("utf-8") == text, f"{path.name} is stale: run build.py render"


def test_rendering_twice_gives_the_same_bytes() -> None:
    assert rendering.render_script() == rendering.render_script()


def test_every_function_of_the_script_is_closed_to_public_and_has_a_comment() -> None:
    script, _ = rendering.render_script()
    statements = re.sub(r"\$source\$.*?\$source\$", "", script, flags=re.DOTALL)
    for name in re.findall(r"^CREATE (?:OR REPLACE )?FUNCTION (\w+)", statements, re.MULTILINE):
        assert re.search(rf"^REVOKE ALL ON FUNCTION {name}\(.*\) FROM PUBLIC;", statements, re.MULTILINE), name
        assert re.search(rf"^COMMENT ON FUNCTION {name}\(", statements, re.MULTILINE), name


def test_the_script_carries_the_runtime_as_readable_text() -> None:
    script, _ = rendering.render_script()
    for module in rendering.runtime_modules():
        assert module.source in script


def test_the_api_list_names_each_signature_once() -> None:
    signatures = [function.signature for function in API] + [function.signature for function in INTERNAL]
    assert len(signatures) == len(set(signatures))


def test_internal_functions_are_marked_by_their_names() -> None:
    assert all(function.name.startswith("_pg_background_") for function in INTERNAL)
    assert not any(function.name.startswith("_") for function in API)


def test_a_function_declares_its_defaults_and_flags() -> None:
    function = Function("f", (Argument("a", "int4"), Argument("b", "text", "NULL")), "SETOF record", "", "v2", "g")
    assert function.create == (
        "CREATE FUNCTION f(a int4, b text DEFAULT NULL)\nRETURNS SETOF record\nVOLATILE STRICT PARALLEL UNSAFE"
    )
    assert function.signature == "f(int4, text)"


def test_create_renders_the_declaration_and_a_comment_follows(tree: Tree) -> None:
    script = tree.render()
    assert script.startswith("CREATE FUNCTION pg_background_detach(pid int4)\nRETURNS void\nVOLATILE STRICT")
    assert "COMMENT ON FUNCTION pg_background_detach(int4) IS 'As pg_background_detach_v2" in script


def test_a_template_that_the_master_names_and_nobody_wrote_is_an_error(tree: Tree) -> None:
    tree.write("pg_background.sql.j2", '{% include "views/pg_background_list.sql.j2" %}')
    with pytest.raises(BuildError, match=r"master names views/pg_background_list\.sql\.j2"):
        tree.render()


def test_a_template_that_no_list_names_is_an_error(tree: Tree) -> None:
    tree.write("functions/_pg_background_forgotten.sql.j2", "SELECT;")
    with pytest.raises(BuildError, match=r"no list of the master names .*forgotten"):
        tree.render()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ('{{ create("nobody") }}', "0 functions of api.py fit"),
        ('{{ create("pg_background_detach", "text") }}', "0 functions of api.py fit"),
        (
            '{{ create("pg_background_detach") }}{{ create("pg_background_detach", "int4") }}',
            "rendered twice",
        ),
        (
            '{{ create("pg_background_detach") }}\nLANGUAGE sql STRICT\nAS $$SELECT$$;',
            "STRICT is rendered by",
        ),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("-- na\u00efve", "is not ASCII"),
    ],
)
def test_a_wrong_template_is_refused(tree: Tree, template: str, message: str) -> None:
    tree.write("functions/pg_background_detach.sql.j2", template)
    with pytest.raises(BuildError, match=message):
        tree.render()


def test_the_word_strict_in_a_body_is_no_flag(tree: Tree) -> None:
    tree.write("functions/pg_background_detach.sql.j2", BODY.replace("SELECT", "SELECT 1 INTO STRICT x"))
    assert "INTO STRICT x" in tree.render()


@pytest.mark.parametrize(
    "source", ["a = '$module$'", "a = '$source$'", "'@extschema@'", "'@extowner@'", "'''\n\\echo x\n'''"]
)
def test_a_module_that_the_script_cannot_carry_is_refused(tree: Tree, source: str) -> None:
    (tree.runtime / "worker.py").write_text(source)
    with pytest.raises(BuildError, match="runtime module worker"):
        tree.render()


def test_the_digest_follows_names_and_sources() -> None:
    module = rendering.Module("a", "x = 1\n")
    digests = {
        rendering.runtime_digest([module]),
        rendering.runtime_digest([module._replace(name="b")]),
        rendering.runtime_digest([module._replace(source="x = 2\n")]),
        rendering.runtime_digest([module, module]),
    }
    assert len(digests) == 4
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests)


def test_a_literal_doubles_quotes_and_backslashes() -> None:
    assert rendering.literal("it's") == "'it''s'"
    assert rendering.literal("a\\b'") == " E'a\\\\b'''"


def test_the_readme_keeps_what_is_outside_its_markers() -> None:
    readme = f"before\n{rendering.TABLE_BEGIN}\nold\n{rendering.TABLE_END}\nafter\n"
    table = rendering.render_table(API)
    replaced = rendering.readme_with_table(readme, table)
    assert replaced.startswith("before\n")
    assert replaced.endswith("\nafter\n")
    assert "old" not in replaced
    assert rendering.readme_with_table(replaced, table) == replaced
    assert all(function.declaration in table for function in API)


def test_the_readmes_table_has_the_first_sentence_of_each_comment() -> None:
    function = Function("f", (), "int4", "Counts a|b, now: 0. Raises 22004.", "v2", "Group")
    assert "| `f()` | `int4` | Counts a\\|b, now: 0. |\n" in rendering.render_table([function])


def test_the_description_for_pgxn_is_of_this_version_and_names_files_that_exist() -> None:
    meta = json.loads((ROOT / "META.json").read_text("utf-8"))
    (provided,) = meta["provides"].values()
    assert provided["version"] == meta["version"] == f"{control_version()}.0"
    assert (ROOT / provided["file"]).is_file()
    assert (ROOT / provided["docfile"]).is_file()


def test_a_readme_without_markers_is_an_error() -> None:
    with pytest.raises(BuildError, match="markers"):
        rendering.readme_with_table("no table here", "")


def test_the_servers_python_is_read_from_plpython(server: installing.Server) -> None:
    server.plpython.write_bytes(b"\x7fELF...\0libc.so.6\0libpython3.11.so.1.0\0")
    assert installing.server_python(server) == "3.11"


def test_a_free_threaded_python_is_refused(server: installing.Server) -> None:
    server.plpython.write_bytes(b"\0libpython3.13t.so.1.0\0")
    with pytest.raises(BuildError, match="free-threaded"):
        installing.server_python(server)


def test_a_missing_plpython_names_the_package_to_install(server: installing.Server) -> None:
    with pytest.raises(BuildError, match="postgresql-plpython3-16"):
        installing.server_python(server)


def test_install_puts_control_and_script_in_place_and_is_quiet_the_second_time(
    server: installing.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    installing.install_extension(server, force=False)
    assert capsys.readouterr().out.count("installed:") == 2
    assert (server.sharedir / "extension" / "pg_background.control").read_text() == CONTROL.read_text()
    installing.install_extension(server, force=False)
    assert capsys.readouterr().out.count("up to date:") == 2
    assert len(list((server.sharedir / "extension").iterdir())) == 2


@pytest.mark.parametrize("name", ["pg_background.control", "pg_background--1.8.sql"])
def test_files_of_the_c_extension_are_replaced_only_by_force(server: installing.Server, name: str) -> None:
    foreign = server.sharedir / "extension" / name
    foreign.write_text("default_version = '1.8'\nmodule_pathname = '$libdir/pg_background'\n")
    with pytest.raises(BuildError, match=r"another extension.*FORCE=1"):
        installing.install_extension(server, force=False)
    assert [path.name for path in foreign.parent.iterdir()] == [name]
    installing.install_extension(server, force=True)
    assert "module_pathname" not in foreign.read_text()


def test_what_a_package_has_installed_is_left_to_the_package_manager(server: installing.Server) -> None:
    installing.refuse_packaged(server)
    (server.sharedir / "pg_background").symlink_to("../../../lib/pg-background")
    with pytest.raises(BuildError, match="belongs to the package postgresql-16-pg-background"):
        installing.refuse_packaged(server)


@pytest.mark.parametrize(
    ("version", "binary", "accepted"),
    [
        ("3.2.9", "3.2.9", True),
        ("3.1.20", "3.1.20", False),
        ("3.4.0", "3.4.0", False),
        ("3.2.9", "3.2.8", False),
    ],
)
def test_a_psycopg_outside_the_pinned_range_or_in_pieces_is_replaced(
    tmp_path: Path, version: str, binary: str, accepted: bool
) -> None:
    for name in (f"psycopg-{version}", f"psycopg_binary-{binary}"):
        (tmp_path / f"{name}.dist-info").mkdir()
    (tmp_path / "psycopg_binary").mkdir()
    (tmp_path / "psycopg_binary" / "_psycopg.cpython-312-x86_64-linux-gnu.so").touch()
    (tmp_path / "typing_extensions.py").touch()
    assert installing.installed_psycopg(tmp_path, "3.12") == (version if accepted else None)
    assert installing.installed_psycopg(tmp_path, "3.13") is None


def test_the_pinned_range_is_the_projects() -> None:
    assert f'"{installing.psycopg_requirement()}"' in (ROOT / "pyproject.toml").read_text()


def test_a_wrong_pg_config_is_an_error_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["install", "--pg-config", "/nowhere/pg_config"]) == 1
    assert capsys.readouterr().err == "build.py: no such pg_config: /nowhere/pg_config\n"


def test_the_packages_want_the_minor_releases_that_the_switch_accepts() -> None:
    source = (ROOT / "plpy" / "pg_background" / "switch.py").read_text("utf-8")
    found = re.search(r"first_minor = (\{.*?\})", source)
    assert found
    accepted = ast.literal_eval(found.group(1))
    assert {major: f"{major}.{minor}" for major, minor in accepted.items()} == debian.FIRST_MINOR
