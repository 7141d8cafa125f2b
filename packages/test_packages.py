"""The packages, each installed and tried in a clean Debian system; `make test-packages`, as root, takes some minutes.

Needs debootstrap, lintian and rpm. What is no .deb cannot be installed here: of those the contents are checked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import debian_roots
from tests.debian_roots import Cluster, Root
from tests.readme import check, script, section, steps
from tools import debian, release, rpm

pytestmark = [pytest.mark.packages, pytest.mark.timeout(1800)]

VERSION = release.meta()["version"]


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with all Debian packages, newly built."""
    debian.build_packages([14, 15, 16, 17, 18])
    return release.DIST


@pytest.fixture(scope="module", params=[15, 17, 18])
def system(request: pytest.FixtureRequest, packages: Path) -> Iterator[Root]:
    """A clean system of the release that ships this version, the package and what it depends on installed."""
    with debian_roots.clean_system(request.param) as root:
        needs_psycopg = request.param == 15
        names = [f"postgresql-{request.param}-pg-background_*", *(["pg-background-psycopg_*"] if needs_psycopg else [])]
        files = [next(iter(packages.glob(name))) for name in names]
        for file in files:
            (root.path / "tmp" / file.name).write_bytes(file.read_bytes())
        debian_roots.install_in(root, *(f"/tmp/{file.name}" for file in files))
        yield root


@pytest.fixture(scope="module")
def server(system: Root) -> Iterator[Cluster]:
    """A server with stock authentication in there."""
    cluster = debian_roots.start_in(system, auth="peer")
    yield cluster
    debian_roots.stop(cluster)


def psql(server: Cluster, statements: str, who: str = "") -> str:
    """What psql prints in there: for the superuser, or with the given words of its command line."""
    uid, gid = server.root.postgres_ids()
    connection = f"host={server.root.inside(server.socket_folder)} port={server.port} dbname=postgres"
    program = ["psql", "-X", who.format(port=server.port) or connection]
    command = server.root.command(["sh", "-c", f"exec {shlex.join(program)} 2>&1"], user=f"{uid}:{gid}")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PGPASSWORD": "wonderland"}
    done = subprocess.run(command, input=statements, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_tour_runs_where_the_package_was_installed(server: Cluster) -> None:
    for step in steps(section("<!-- tour:admin -->", "<!-- tour:begin -->")):
        assert "ERROR" not in psql(server, step.statements)
    tour = steps(section("<!-- tour:begin -->", "<!-- tour:end -->"))
    check(tour, psql(server, script(tour), "host=127.0.0.1 port={port} user=alice dbname=postgres"))


def test_all_prerequisites_are_there_and_psycopg_is_the_expected_one(server: Cluster) -> None:
    psql(server, "CREATE EXTENSION IF NOT EXISTS pg_background CASCADE;")
    question = "SELECT prerequisite, status, detail FROM pg_background_check();"
    rows = psql(server, f"\\pset format unaligned\n\\t\n{question}")
    assert "|failed|" not in rows, rows
    which = "".join(re.findall(r"^libpq and psycopg\|ok\|(.*)$", rows, re.MULTILINE))
    place = "/pg_background/python3" if server.root.version == 15 else "/usr/lib/python3/dist-packages"
    assert place in which, rows
    assert "(c)" in which or "(binary)" in which


def test_nothing_is_left_after_the_packages_were_removed(system: Root) -> None:
    names = [f"postgresql-{system.version}-pg-background", *(["pg-background-psycopg"] if system.version == 15 else [])]
    system.run("apt-get", "purge", "-y", *names)
    assert list((system.path / "usr").rglob("*pg*background*")) == []


def test_lintian_finds_no_error(packages: Path) -> None:
    found = release.run("lintian", "--allow-root", "--fail-on", "error", *sorted(packages.glob("*.deb")))
    assert "\nE:" not in "\n" + found


def test_packages_are_the_same_bytes_when_they_are_built_again(packages: Path) -> None:
    package = packages / f"postgresql-17-pg-background_{VERSION}-1_all.deb"
    debian.build_packages([17])
    first = package.read_bytes()
    debian.build_packages([17])
    assert package.read_bytes() == first


@pytest.fixture(scope="module")
def rpm_package() -> Path:
    """The RPM package for PostgreSQL 17."""
    rpm.build_packages([17])
    return release.DIST / f"pg_background_plpython_17-{VERSION}-1.noarch.rpm"


def test_the_rpm_has_the_extension_its_documents_and_nothing_else(rpm_package: Path) -> None:
    listed = release.run("rpm", "-qlp", rpm_package).splitlines()
    extension = "/usr/pgsql-17/share/extension"
    assert {f"{extension}/{file.name}" for file in release.extension_files()} <= set(listed)
    assert all(re.match(rf"{extension}/pg_background|/usr/share/(doc|licenses)/", path) for path in listed), listed
    assert "noarch" in release.run("rpm", "-qp", "--queryformat", "%{ARCH}", rpm_package)


def test_the_rpm_asks_for_the_server_its_python_and_psycopg(rpm_package: Path) -> None:
    required = release.run("rpm", "-qRp", rpm_package).splitlines()
    assert {"postgresql17-server", "postgresql17-plpython3", "python3dist(psycopg) >= 3.2"} <= set(required)
    assert not [name for name in required if name.startswith(("/bin", "/usr/bin", "lib"))]


def test_the_archive_for_pgxn_holds_what_its_description_names(monkeypatch: pytest.MonkeyPatch) -> None:
    release.build_archive()
    archive = release.DIST / f"{release.meta()['name']}-{VERSION}.zip"
    first = archive.read_bytes()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    release.build_archive()
    assert archive.read_bytes() == first
    with zipfile.ZipFile(archive) as opened:
        names = {name.partition("/")[2] for name in opened.namelist()}
    assert {
        "META.json",
        "README.md",
        "Makefile",
        "build.py",
        *(file.name for file in release.extension_files()),
    } <= names
