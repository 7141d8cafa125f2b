"""build.py rpm: noarch RPM packages, named and placed as those of the PostgreSQL project for RHEL and its relatives."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import installing, release
from tools.common import ROOT

SPEC = ROOT / "packages" / "pg_background.spec"


def build_packages(majors: Sequence[int]) -> None:
    """Build a package for each major version of PostgreSQL."""
    release.DIST.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = _write_source(Path(scratch))
        for major in majors:
            print(_build(Path(scratch), source, major))


def _write_source(folder: Path) -> Path:
    """The files that the package is made of, as the archive that the spec unpacks."""
    name = f"{release.meta()['name']}-{release.meta()['version']}"
    source = folder / f"{name}.tar"
    documents = [ROOT / "LICENSE", ROOT / "CHANGELOG.md", *release.documents()]
    with tarfile.open(source, "w") as archive:
        for file in [*release.extension_files(), *documents]:
            archive.add(file, f"{name}/{file.relative_to(ROOT)}", filter=_anonymous)
    return source


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mode = 0o644
    member.mtime = release.source_date()
    return member


def _build(scratch: Path, source: Path, major: int) -> Path:
    definitions = {
        "pgmajor": str(major),
        "upstream_name": release.meta()["name"],
        "upstream_version": release.meta()["version"],
        "psycopg_at_least": ".".join(map(str, installing.PSYCOPG_AT_LEAST)),
        "_topdir": str(scratch / "rpmbuild"),
        "_sourcedir": str(source.parent),
        "_rpmdir": str(release.DIST),
        "_rpmfilename": "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm",
        "_dbpath": str(scratch / "rpmdb"),
        "_buildhost": "localhost",
        "use_source_date_epoch_as_buildtime": "1",
        "clamp_mtime_to_source_date_epoch": "1",
    }
    options = [word for name, value in definitions.items() for word in ("--define", f"{name} {value}")]
    said = release.run("rpmbuild", "-bb", "--target", "noarch", *options, SPEC)
    return next(Path(line.partition(": ")[2]) for line in said.splitlines() if line.startswith("Wrote: "))
