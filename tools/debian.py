"""build.py deb: Debian packages of the extension, and of psycopg for a release whose own one is too old."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools import installing, release
from tools.common import ROOT, BuildError

PSYCOPG_PACKAGE = "pg-background-psycopg"
_PSYCOPG_FOLDER = "usr/lib/pg-background"
_REVISION = "-1"
# The first minor releases that the extension accepts (plpy/pg_background/switch.py).
FIRST_MINOR = {14: "14.14", 15: "15.9", 16: "16.5", 17: "17.1", 18: "18.0"}

_COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: {name}

Files: *
Copyright: {holder}
License: {license}
{note}"""

_GPL = """\
 On Debian systems, the text of this license is in /usr/share/common-licenses/GPL-3.
"""

_LGPL = """\
 This is psycopg as its authors publish it for Python, with libpq and the libraries that libpq needs. Their licenses
 are in /usr/lib/pg-background. On Debian systems, the text of psycopg's is in /usr/share/common-licenses/LGPL-3.
"""

# Each needs its reason: the libraries are as psycopg's authors built them, bound to each other by relative paths.
_PSYCOPG_OVERRIDES = "".join(
    f"{PSYCOPG_PACKAGE}: {tag}\n"
    for tag in (
        "custom-library-search-path",
        "embedded-library",
        "hardening-no-fortify-functions",
        "library-not-linked-against-libc",
        "hardening-no-bindnow",
        "package-installs-into-obsolete-dir",
        "sharedobject-in-library-directory-missing-soname",
    )
)

_POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ] && command -v py3compile >/dev/null; then
    py3compile -p {package} /{folder}
fi
"""

_PRERM = """\
#!/bin/sh
set -e
if command -v py3clean >/dev/null; then
    py3clean -p {package}
else
    find /{folder} -name __pycache__ -prune -exec rm -rf {{}} +
fi
"""


def build_packages(majors: Sequence[int]) -> None:
    """Build a package for each major version of PostgreSQL, and psycopg's if this release needs it."""
    release.DIST.mkdir(exist_ok=True)
    for major in majors:
        print(_build_extension(major))
    if not _release_has_psycopg():
        print(_build_psycopg())


def _release_has_psycopg() -> bool:
    """True if this machine's apt has a python3-psycopg that the extension takes."""
    policy = release.run("apt-cache", "policy", "python3-psycopg")
    found = re.search(r"Candidate: (?:\d+:)?(\d+)\.(\d+)", policy)
    return found is not None and (int(found.group(1)), int(found.group(2))) >= installing.PSYCOPG_AT_LEAST


def _build_extension(major: int) -> Path:
    name = f"postgresql-{major}-pg-background"
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / name
        share = tree / f"usr/share/postgresql/{major}"
        _copy(release.extension_files(), share / "extension")
        # The runtime looks for psycopg beside the extension; it leads nowhere where the release's own is used.
        (share / "pg_background").symlink_to(os.path.relpath(f"/{_PSYCOPG_FOLDER}", f"/{share.relative_to(tree)}"))
        _copy(release.documents(), tree / "usr/share/doc" / name)
        _write_common_documents(tree, name, _extension_version(), _copyright_of_extension())
        fields = {
            "Version": _extension_version(),
            "Architecture": "all",
            "Depends": f"postgresql-{major} (>= {FIRST_MINOR[major]}), postgresql-plpython3-{major},"
            f" {_psycopg_dependency()}",
            "Description": _description(),
        }
        return _pack(tree, name, fields)


def _psycopg_dependency() -> str:
    """The release's psycopg, its C implementation and libpq where they are new enough, or what is built here."""
    low = ".".join(map(str, installing.PSYCOPG_AT_LEAST))
    needed = {"python3-psycopg": low, "python3-psycopg-c": low, "libpq5": "17"}
    return ", ".join(f"{package} (>= {version}) | {PSYCOPG_PACKAGE}" for package, version in needed.items())


def _description() -> str:
    return (
        f"{release.meta()['abstract'][0].lower()}{release.meta()['abstract'][1:]}\n"
        " A function call starts a worker, a session of the server's own that runs SQL as\n"
        " the same role with the same settings; other calls read its rows, wait for it,\n"
        " cancel it or let it go. Autonomous transactions, VACUUM from inside a function,\n"
        " parallel work from one session, jobs that outlive it.\n"
        " .\n"
        " It has the functions of the C extension pg_background 1.8, and replaces it."
    )


def _build_psycopg() -> Path:
    """Psycopg for this release's Python, as build.py install puts it beside the extension."""
    python = release.run("/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / PSYCOPG_PACKAGE
        folder = tree / _PSYCOPG_FOLDER / f"python{python}"
        installing.pip_install(folder, python)
        version = installing.installed_psycopg(folder, python)
        if version is None:
            raise BuildError(f"pip left no psycopg with its C implementation for Python {python} in {folder}")
        shutil.rmtree(folder / "bin", ignore_errors=True)
        _write_common_documents(tree, PSYCOPG_PACKAGE, version + _REVISION, _copyright_of_psycopg())
        overrides = tree / "usr/share/lintian/overrides" / PSYCOPG_PACKAGE
        overrides.parent.mkdir(parents=True)
        overrides.write_text(_PSYCOPG_OVERRIDES)
        _write_scripts(tree)
        major, minor = map(int, python.split("."))
        fields = {
            "Version": version + _REVISION,
            "Architecture": release.run("dpkg", "--print-architecture").strip(),
            "Depends": f"python3 (>= {python}~), python3 (<< {major}.{minor + 1}~), libc6",
            "Description": "psycopg for pg_background\n"
            f" Psycopg 3 with its C implementation for Python {python}, in a folder that only the\n"
            " extension pg_background looks into. For releases whose python3-psycopg is older\n"
            f" than {'.'.join(map(str, installing.PSYCOPG_AT_LEAST))}.",
        }
        return _pack(tree, PSYCOPG_PACKAGE, fields)


def _write_scripts(tree: Path) -> None:
    """Compile when it is installed: the server may not write there, and reads sources slowly."""
    for name, text in (("postinst", _POSTINST), ("prerm", _PRERM)):
        script = tree / "DEBIAN" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(text.format(package=PSYCOPG_PACKAGE, folder=_PSYCOPG_FOLDER))
        script.chmod(0o755)


def _extension_version() -> str:
    return release.meta()["version"] + _REVISION


def _copyright_of_extension() -> str:
    meta = release.meta()
    return _COPYRIGHT.format(name=meta["name"], holder=meta["maintainer"], license="GPL-3", note=_GPL)


def _copyright_of_psycopg() -> str:
    return _COPYRIGHT.format(name="psycopg", holder="The Psycopg Team", license="LGPL-3", note=_LGPL)


def _copy(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _write_common_documents(tree: Path, package: str, version: str, legal: str) -> None:
    folder = tree / "usr/share/doc" / package
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "copyright").write_text(legal, "utf-8")
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(release.source_date()))
    entry = f"{package} ({version}) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- {_maintainer()}  {date}\n"
    _compress(entry.encode(), folder / "changelog.Debian.gz")
    _compress((ROOT / "CHANGELOG.md").read_bytes(), folder / "changelog.gz")


def _compress(content: bytes, path: Path) -> None:
    path.write_bytes(gzip.compress(content, 9, mtime=0))


def _maintainer() -> str:
    """Who builds, as Debian's own tools are told."""
    name = os.environ.get("DEBFULLNAME", release.meta()["maintainer"])
    return f"{name} <{os.environ.get('DEBEMAIL', 'pg-background@packages.invalid')}>"


def _pack(tree: Path, name: str, fields: Mapping[str, str]) -> Path:
    """Build the package from its tree; the same bytes from the same tree."""
    files = sorted(
        path for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and "DEBIAN" not in path.parts
    )
    (tree / "DEBIAN").mkdir(exist_ok=True)
    sums = [f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.relative_to(tree)}\n" for file in files]
    (tree / "DEBIAN" / "md5sums").write_text("".join(sums))
    common = {
        "Package": name,
        "Section": "database",
        "Priority": "optional",
        "Maintainer": _maintainer(),
        "Installed-Size": str(sum(file.stat().st_size for file in files) // 1024 + 1),
    }
    control = "".join(f"{field}: {value}\n" for field, value in {**common, **fields}.items())
    (tree / "DEBIAN" / "control").write_text(control, "utf-8")
    _normalize_modes(tree)
    package = release.DIST / f"{name}_{fields['Version']}_{fields['Architecture']}.deb"
    release.run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, package)
    return package


def _normalize_modes(tree: Path) -> None:
    """What whoever installs may read, whatever the umask was here; libraries and data are not executable."""
    for path in [tree, *tree.rglob("*")]:
        if path.is_symlink():
            continue
        is_script = path.parent.name == "DEBIAN" and path.suffix == "" and path.name in ("postinst", "prerm")
        path.chmod(0o755 if path.is_dir() or is_script else 0o644)
