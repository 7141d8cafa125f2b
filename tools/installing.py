"""build.py install: the extension, and psycopg for the server's own Python, into a server's sharedir."""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tools.common import CONTROL, ROOT, BuildError, control_version, write_atomically

SIGNATURE = "pg_background for PL/Python"
PSYCOPG_AT_LEAST, PSYCOPG_BELOW = (3, 2), (3, 4)


class Server(NamedTuple):
    """An installed PostgreSQL server."""

    pg_config: Path
    version: str
    sharedir: Path
    pkglibdir: Path

    @property
    def plpython(self) -> Path:
        """The library of plpython3u, there or not."""
        return self.pkglibdir / "plpython3.so"

    @property
    def major(self) -> str:
        """The major version, as packages are named."""
        found = re.search(r"\d+", self.version)
        return found.group() if found else "NN"


def read_server(pg_config: Path) -> Server:
    """Ask a pg_config about its server."""
    command = [str(pg_config), "--version", "--sharedir", "--pkglibdir"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{pg_config} does not work: {error}") from error
    return Server(pg_config, answer[0], Path(answer[1]), Path(answer[2]))


def find_server(pg_config: str | None = None) -> Server:
    """The server of --pg-config or PG_CONFIG, else the newest installed one that has plpython3u."""
    named = pg_config or os.environ.get("PG_CONFIG")
    if named:
        path = shutil.which(named)
        if path is None:
            raise BuildError(f"no such pg_config: {named}")
        return read_server(Path(path))
    candidates = [
        *Path("/usr/lib/postgresql").glob("*/bin/pg_config"),
        *Path("/usr").glob("pgsql-*/bin/pg_config"),
    ]
    on_path = shutil.which("pg_config")
    if on_path:
        candidates.append(Path(on_path))
    servers = [read_server(path) for path in candidates]
    able = [server for server in servers if server.plpython.exists()]
    if not servers:
        raise BuildError("no PostgreSQL server found: run make bootstrap, or name one with --pg-config")
    return max(able or servers, key=lambda server: int(server.major) if server.major.isdigit() else 0)


def server_python(server: Server) -> str:
    """The version ("3.11") of the Python that the server's plpython3.so links to."""
    if not server.plpython.exists():
        raise BuildError(
            f"{server.plpython} is missing: install postgresql-plpython3-{server.major} (Debian, Ubuntu) or"
            f" postgresql{server.major}-plpython3 (PGDG on RHEL; postgresql-plpython3 from the distribution)"
        )
    found = re.search(rb"libpython(3\.\d+)([a-z]*)\.so", server.plpython.read_bytes())
    if not found:
        raise BuildError(f"{server.plpython} names no libpython3.X.so: which Python it uses cannot be told")
    if b"t" in found.group(2):
        raise BuildError(f"{server.plpython} uses a free-threaded Python, which is not supported")
    return found.group(1).decode()


def _refuse_foreign(path: Path, force: bool) -> None:
    """Leave the files of the C extension, or of anything else by this name, alone."""
    if not path.exists():
        return
    text = path.read_text("utf-8", errors="replace")
    if SIGNATURE in text[:400] and "module_pathname" not in text.lower()[:400]:
        return
    if not force:
        raise BuildError(f"{path} belongs to another extension: set FORCE=1 to replace it")
    print(f"replaces {path} of another extension (FORCE=1)")


def refuse_packaged(server: Server) -> None:
    """Leave what Debian's package manager has installed to it; the link is only in the packages of tools/debian.py."""
    link = server.sharedir / "pg_background"
    if link.is_symlink():
        package = f"postgresql-{server.major}-pg-background"
        raise BuildError(f"{link} belongs to the package {package}: upgrade that one, or apt-get remove it first")


def install_extension(server: Server, force: bool) -> None:
    """Copy the control file and the script into sharedir/extension."""
    folder = server.sharedir / "extension"
    sources = [CONTROL, ROOT / f"pg_background--{control_version()}.sql"]
    for source in sources:
        _refuse_foreign(folder / source.name, force)
    for source in reversed(sources):
        target, text = folder / source.name, source.read_text("utf-8")
        if target.exists() and target.read_text("utf-8") == text:
            print(f"up to date: {target}")
            continue
        write_atomically(target, text)
        print(f"installed:  {target}")


def installed_psycopg(folder: Path, python: str) -> str | None:
    """The version of the psycopg in the folder; None unless it is whole and within the pinned range."""
    names = [path.name for path in folder.glob("psycopg*.dist-info")]
    found = re.search(r"(?:^|\n)psycopg-([\d.]+)\.dist-info", "\n".join(names))
    if not found or f"psycopg_binary-{found.group(1)}.dist-info" not in names:
        return None
    tag = "cpython-" + python.replace(".", "")
    whole = any(folder.glob(f"psycopg_binary/_psycopg.{tag}-*.so"))
    if not whole or not (folder / "typing_extensions.py").exists():
        return None
    version = tuple(int(part) for part in found.group(1).split("."))
    return found.group(1) if PSYCOPG_AT_LEAST <= version < PSYCOPG_BELOW else None


def psycopg_requirement() -> str:
    """The pinned range, for pip."""
    low, high = (".".join(map(str, version)) for version in (PSYCOPG_AT_LEAST, PSYCOPG_BELOW))
    return f"psycopg[binary]>={low},<{high}"


def install_psycopg(server: Server, python: str) -> None:
    """Put psycopg with its C implementation for the server's Python beside the extension."""
    folder = server.sharedir / "pg_background" / f"python{python}"
    present = installed_psycopg(folder, python)
    if present:
        print(f"up to date: {folder} (psycopg {present})")
        return
    folder.parent.mkdir(exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        pip_install(fresh, python)
        _compile(fresh, folder, python)
        version = installed_psycopg(fresh, python)
        if version is None:
            raise BuildError(f"pip left no psycopg with its C implementation for Python {python} in {fresh}")
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        print(f"installed:  {folder} (psycopg {version})")
    finally:
        for leftover in (fresh, stale):
            if leftover.exists():
                shutil.rmtree(leftover)


def pip_install(target: Path, python: str) -> None:
    """Run pip for another Python than its own; typing-extensions is named because pip judges by its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-compile", "--only-binary=:all:", "--implementation", "cp"]
    command += [
        "--python-version",
        python,
        "--target",
        str(target),
        psycopg_requirement(),
        "typing-extensions>=4.6",
    ]
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    if subprocess.run(command, check=False, env=environment).returncode != 0:
        raise BuildError(f"pip found no psycopg for Python {python} (its own message stands above)")


def _compile(fresh: Path, final: Path, python: str) -> None:
    """Compile to bytecode, as the server may not write there; tracebacks are to name the final folder."""
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        compileall.compile_dir(str(fresh), quiet=2, stripdir=str(fresh), prependdir=str(final))
        return
    interpreter = shutil.which(f"python{python}")
    if interpreter is None:
        print(f"note: no python{python} here to compile with: each session's first call takes longer")
        return
    command = [interpreter, "-m", "compileall", "-qq", "-s", str(fresh), "-p", str(final), str(fresh)]
    subprocess.run(command, check=False)


def install(pg_config: str | None) -> None:
    """Install the extension and psycopg into a server, saying each step."""
    os.umask(0o022)
    server = find_server(pg_config)
    python = server_python(server)
    print(f"server:     {server.version}, {server.pg_config}, Python {python}")
    for folder in (server.sharedir / "extension", server.sharedir):
        if not os.access(folder, os.W_OK):
            raise BuildError(f"no right to write into {folder}: run as root (sudo make install)")
    refuse_packaged(server)
    install_extension(server, os.environ.get("FORCE") == "1")
    install_psycopg(server, python)
    print("done:       CREATE EXTENSION pg_background CASCADE;")
