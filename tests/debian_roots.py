#!/usr/bin/env python3
"""PostgreSQL 17 and 18 on a machine that has neither: scratch clusters in bootstrapped Debian systems.

A *root* is a small Debian system in a cached folder: trixie for PostgreSQL 17, forky for 18. Servers run in
there, tests talk to them from outside. Needs the OS user root and an apt that is set up: a missing
`debootstrap` is installed, the mirror is read from /etc/apt. The folder is /var/cache/pg_background-roots unless the
environment variable PG_BACKGROUND_ROOTS names another one.

Command line::

    tests/debian_roots.py prepare 17        make the root (about a minute, 600 MB), or reuse it
    tests/debian_roots.py install 17        put this checkout's extension and psycopg into it
    tests/debian_roots.py start 17 --port 5517 --auth peer --set max_connections=300
    tests/debian_roots.py stop 17           stop that cluster and remove its files

`start` prints lines of the form name=value: `conninfo` (for any OS user outside), `socket_conninfo` (over the
unix socket; with `--auth peer` for the server's OS user only), `data`, `os_uid` and, with `--auth peer`,
`password`.

In a test::

    with debian_roots.running(17, auth="peer", settings={"max_connections": "300"}) as cluster:
        connection = psycopg.connect(cluster.conninfo)

How it is done, and what to know:

* Every command inside a root runs in a mount namespace of its own, which holds its /proc, /dev and an empty
  /dev/shm. The mounts end with the last process in there: nothing is left to unmount, not even after a crash.
* Processes share the pids of the outside: pidfds, signals and /proc/PID work as they do for a local server.
* The root's OS user postgres gets the uid of the one outside, where that is free; see `Cluster.os_uid`.
* An unfinished root has a temporary name and is renamed when it is complete. To renew one, delete its folder.
* Locales: C.UTF-8, en_US and de_DE in UTF-8 and in ISO-8859-1 (`--encoding LATIN1 --locale de_DE`).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pwd
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CHECKOUT = Path(__file__).resolve().parent.parent
"""The checkout whose extension `install` copies."""

AUTH_METHODS = ("trust", "peer")
"""trust: everybody is let in. peer: the pg_hba.conf of a stock Debian."""

_PSYCOPG = "psycopg[binary]>=3.2,<3.4"
_CLUSTERS = "var/lib/pg_background"  # in the root; each cluster has a folder of its own in there
_START_LIMIT_S = 60
_STOP_LIMIT_S = 60

_LOCALES = ("en_US.UTF-8 UTF-8", "en_US ISO-8859-1", "de_DE.UTF-8 UTF-8", "de_DE ISO-8859-1")

_ENTER = """
root=$1 user=$2; shift 2
mount --bind /proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
exec chroot --userspec="$user" "$root" "$@"
"""

_PEER_HBA = """\
local   all             postgres                                peer
local   all             all                                     peer
host    all             all             127.0.0.1/32            scram-sha-256
host    all             all             ::1/128                 scram-sha-256
local   replication     all                                     peer
host    replication     all             127.0.0.1/32            scram-sha-256
host    replication     all             ::1/128                 scram-sha-256
"""


class RootError(Exception):
    """Something could not be done; the text says what, and what the failing command printed."""


@dataclass(frozen=True)
class Release:
    """A release of Debian: its name and debootstrap's script for it."""

    suite: str
    script: str


RELEASES: Mapping[int, Release] = {17: Release("trixie", "trixie"), 18: Release("forky", "sid")}
"""Major version of PostgreSQL to the release of Debian that ships it."""

_ALL_RELEASES: Mapping[int, Release] = {15: Release("bookworm", "bookworm"), **RELEASES}


def roots_folder() -> Path:
    """The folder that holds all roots."""
    return Path(os.environ.get("PG_BACKGROUND_ROOTS", "/var/cache/pg_background-roots")).absolute()


def _run(argv: Sequence[str], *, log: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it printed; RootError if it fails.

    With a log, output is appended there as it comes and the return value is empty. Such a command shares the
    lock on its root: should it outlive this process, the next one waits for it.
    """
    if log is not None:
        with log.open("a") as out:
            status = subprocess.call(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                close_fds=False,
            )
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RootError(f"{shlex.join(argv)} failed with status {status}\n{tail}\n(all of it: {log})")
        return ""
    done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
    if done.returncode:
        printed = done.stdout + done.stderr
        raise RootError(f"{shlex.join(argv)} failed with status {done.returncode}\n{printed}")
    return done.stdout


@dataclass(frozen=True)
class Root:
    """A bootstrapped Debian system with one major version of PostgreSQL."""

    version: int
    path: Path

    def command(self, argv: Sequence[str], *, user: str = "0:0") -> list[str]:
        """The command line that runs argv inside, as the OS user `uid:gid`."""
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _ENTER, "enter"]
        return [*enter, str(self.path), user, *argv]

    def run(self, *argv: str, user: str = "0:0", log: Path | None = None) -> str:
        """Run a command inside and return what it printed; RootError if it fails."""
        return _run(self.command(argv, user=user), log=log, env=environment())

    def inside(self, path: Path) -> str:
        """A path outside, as it is called inside."""
        return "/" + str(path.relative_to(self.path))

    def server_program(self, name: str) -> str:
        """The path, inside, of one of PostgreSQL's programs."""
        return f"/usr/lib/postgresql/{self.version}/bin/{name}"

    def share_folder(self) -> Path:
        """PostgreSQL's sharedir as a path outside."""
        inside = self.run(self.server_program("pg_config"), "--sharedir").strip()
        return self.path / inside.lstrip("/")

    def python_version(self) -> str:
        """The version of the root's Python, such as 3.13."""
        return self.run("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()

    def postgres_ids(self) -> tuple[int, int]:
        """The uid and gid of the root's OS user postgres."""
        for line in (self.path / "etc/passwd").read_text().splitlines():
            name, _, uid, gid, *_ = line.split(":")
            if name == "postgres":
                return int(uid), int(gid)
        raise RootError(f"no OS user postgres in {self.path}")


@dataclass(frozen=True)
class Cluster:
    """A running scratch cluster. Paths are paths outside of the root."""

    root: Root
    folder: Path
    port: int
    auth: str
    password: str | None

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    @property
    def socket_folder(self) -> Path:
        """The folder of the unix socket."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.folder / "log"

    @property
    def os_uid(self) -> int:
        """The uid that the server runs as, which is the one that peer lets in as postgres."""
        return self.root.postgres_ids()[0]

    @property
    def socket_conninfo(self) -> str:
        """Conninfo over the unix socket, as the superuser."""
        host, port = str(self.socket_folder), str(self.port)
        return _conninfo(host=host, port=port, user="postgres", dbname="postgres")

    @property
    def conninfo(self) -> str:
        """Conninfo for any OS user outside, as the superuser: over TCP where the socket wants peer."""
        if self.password is None:
            return self.socket_conninfo
        return _conninfo(
            host="127.0.0.1", port=str(self.port), user="postgres", password=self.password, dbname="postgres"
        )

    def postmaster_pid(self) -> int | None:
        """The pid of the running postmaster, or None. A pid file that outlived its server is seen through."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
            runs_here = Path(f"/proc/{pid}/cwd").samefile(self.data)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return pid if runs_here else None


def _conninfo(**values: str) -> str:
    return " ".join(f"{name}={_conninfo_value(value)}" for name, value in values.items())


def _conninfo_value(value: str) -> str:
    if re.fullmatch(r"[\w./:@-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def environment() -> dict[str, str]:
    """What commands inside a root get to see: nothing of the caller's locale or settings."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    proxy = _apt_setting("Acquire::http::Proxy")
    return {**environment, "http_proxy": proxy} if proxy else environment


def _apt_setting(name: str) -> str:
    """The value of a setting of this machine's apt, empty if it has none."""
    words = shlex.split(_run(["apt-config", "shell", "value", name]))
    return words[0].partition("=")[2] if words else ""


# --- where packages come from ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One entry of apt's sources."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


def _one_line_sources(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        words = re.sub(r"\[.*?\]", "", line.partition("#")[0]).split()
        if len(words) > 3 and words[0] == "deb":
            yield _Source(words[1], (words[2],), tuple(words[3:]))


def _deb822_sources(text: str) -> Iterator[_Source]:
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n\s*\n", text):
        fields = {
            name.lower(): value.split()
            for name, value in re.findall(r"^([\w-]+):((?:.*)(?:\n[ \t].*)*)", paragraph, re.MULTILINE)
        }
        if "deb" in fields.get("types", []) and fields.get("enabled") != ["no"] and fields.get("uris"):
            suites, components = fields.get("suites", []), fields.get("components", [])
            yield _Source(fields["uris"][0], tuple(suites), tuple(components))


def _apt_sources() -> Iterator[_Source]:
    folder = Path("/etc/apt")
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if path.suffix == ".list" and path.is_file():
            yield from _one_line_sources(path.read_text())
        elif path.suffix == ".sources":
            yield from _deb822_sources(path.read_text())


def debian_mirror() -> str:
    """The mirror that this machine's apt takes its own release of Debian from."""
    words = shlex.split(Path("/etc/os-release").read_text(), comments=True)
    codename = dict(word.partition("=")[::2] for word in words).get("VERSION_CODENAME", "")
    own = {codename, "stable", "testing", "unstable", "sid"}
    for source in _apt_sources():
        if own.intersection(source.suites) and "main" in source.components:
            return source.uri
    raise RootError("no Debian mirror found in /etc/apt")


# --- roots ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(what: int | str) -> Iterator[None]:
    """Only one process, or thread, at a time makes or changes a root, or installs what makes them."""
    folder = roots_folder()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (folder / f".{what}.lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_root_user() -> None:
    if os.geteuid() != 0:
        raise RootError("only the OS user root can use bootstrapped systems")


def _root_at(version: int) -> Root:
    if version not in RELEASES:
        raise RootError(f"no release of Debian known for PostgreSQL {version}")
    return Root(version, roots_folder() / f"{version}-{RELEASES[version].suite}")


def find(version: int) -> Root:
    """The root of a version; RootError if it was not made yet."""
    root = _root_at(version)
    if not root.path.is_dir():
        raise RootError(f"no root for PostgreSQL {version}: run {Path(__file__).name} prepare {version}")
    return root


def prepare(version: int) -> Root:
    """Make the root of a version unless it exists, and return it.

    What an interrupted call leaves behind is never taken for a root; the next call removes it.
    """
    _require_root_user()
    root = _root_at(version)
    with _locked(version):
        if root.path.is_dir():
            return root
        for left_over in root.path.parent.glob(f".{root.path.name}.*"):
            shutil.rmtree(left_over)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{root.path.name}.", dir=root.path.parent))
        try:
            _bootstrap(Root(version, unfinished))
            unfinished.rename(root.path)
        except (RootError, OSError):
            shutil.rmtree(unfinished)
            raise
    return root


@contextlib.contextmanager
def clean_system(version: int) -> Iterator[Root]:
    """The Debian release of a version without PostgreSQL, to install packages into; removed at the end.

    It is a copy of one that the first call for that release makes (about a minute).
    """
    _require_root_user()
    folder = roots_folder()
    bare = folder / f"bare-{_ALL_RELEASES[version].suite}"
    with _locked(version):
        if not bare.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{bare.name}.", dir=folder))
            try:
                _debootstrap(Root(version, unfinished), folder / f"{bare.name}.log")
                unfinished.rename(bare)
            except (RootError, OSError):
                shutil.rmtree(unfinished)
                raise
    copy = Path(tempfile.mkdtemp(prefix=f".copy-of-{bare.name}.", dir=folder))
    try:
        _run(["cp", "-a", "--reflink=auto", f"{bare}/.", str(copy)])
        yield Root(version, copy)
    finally:
        shutil.rmtree(copy)


def _bootstrap(root: Root) -> None:
    """Fill an empty folder with a Debian system that has PostgreSQL, its languages and locales."""
    release = RELEASES[root.version]
    log = root.path.parent / f"{root.version}-{release.suite}.log"
    _say(f"making {release.suite} with PostgreSQL {root.version}; log: {log}")
    _debootstrap(root, log)
    _adopt_postgres_user(root)
    _write(root, "etc/locale.gen", "".join(f"{line}\n" for line in _LOCALES))
    _install_packages(root, log)
    root.run("locale-gen", log=log)
    root.run("apt-get", "clean", log=log)
    (root.path / _CLUSTERS).mkdir(mode=0o755, parents=True)


def _debootstrap(root: Root, log: Path) -> None:
    """Fill an empty folder with the smallest Debian system, in which no package starts a service."""
    with _locked("debootstrap"):
        if shutil.which("debootstrap") is None:
            _say("installing debootstrap")
            _run(["apt-get", "update"], env=environment())
            _run(["apt-get", "install", "-y", "--no-install-recommends", "debootstrap"], env=environment())
    release = _ALL_RELEASES[root.version]
    log.write_text("")
    root.path.chmod(0o755)
    # A mount namespace, because debootstrap mounts file systems in there and may be killed.
    _run(
        [
            *("unshare", "--mount", "--propagation", "private"),
            *("debootstrap", "--variant=minbase", "--include=ca-certificates"),
            *(release.suite, str(root.path), debian_mirror()),
            f"/usr/share/debootstrap/scripts/{release.script}",
        ],
        log=log,
        env=environment(),
    )
    _forbid_services(root)


def _install_packages(root: Root, log: Path) -> None:
    languages = [f"postgresql-{language}-{root.version}" for language in ("plpython3", "plperl", "pltcl")]
    install_in(root, f"postgresql-{root.version}", *languages, "python3", "locales", "tzdata-legacy", log=log)


def install_in(root: Root, *packages: str, log: Path | None = None) -> None:
    """Install packages, by name or by their path inside, and what they depend on."""
    options = ["-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io"]
    # A frozen mirror's lists are past their date: this machine's apt says if that may be. Signatures count.
    check_date = _apt_setting("Acquire::Check-Valid-Until") or "true"
    root.run("apt-get", "update", "-o", f"Acquire::Check-Valid-Until={check_date}", log=log)
    root.run("apt-get", "install", *options, *packages, log=log)


def _write(root: Root, path: str, text: str, mode: int = 0o644) -> None:
    file = root.path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


def _forbid_services(root: Root) -> None:
    """Packages must neither start a server nor make a cluster."""
    _write(root, "usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)
    _write(root, "etc/postgresql-common/createcluster.conf", "create_main_cluster = false\n")


def _adopt_postgres_user(root: Root) -> None:
    """Give the root's postgres the uid of the one outside, if there is one and the uid is free inside.

    Then peer lets the OS user postgres of the outside in, too. Otherwise the package chooses a uid.
    """
    try:
        outside = pwd.getpwnam("postgres")
    except KeyError:
        return
    ids = [line.split(":")[2] for name in ("passwd", "group") for line in _lines(root, f"etc/{name}")]
    if {str(outside.pw_uid), str(outside.pw_gid)}.intersection(ids):
        return
    root.run("groupadd", "--system", "--gid", str(outside.pw_gid), "postgres")
    root.run(
        *("useradd", "--system", "--uid", str(outside.pw_uid), "--gid", "postgres"),
        *("--home-dir", "/var/lib/postgresql", "--shell", "/bin/bash", "postgres"),
    )


def _lines(root: Root, path: str) -> list[str]:
    return (root.path / path).read_text().splitlines()


def install(version: int) -> None:
    """Put this checkout's extension and psycopg with its C implementation into a root.

    Psycopg goes to <sharedir>/pg_background/python3.X and stays if it is there already.
    """
    _require_root_user()
    root = find(version)
    with _locked(version):
        share = root.share_folder()
        _install_extension(share / "extension")
        _install_psycopg(root, share / "pg_background")


def _install_extension(folder: Path) -> None:
    control, scripts = CHECKOUT / "pg_background.control", sorted(CHECKOUT.glob("pg_background--*.sql"))
    if not control.is_file() or not scripts:
        _say(f"skipped the extension: {CHECKOUT} has no pg_background.control or no pg_background--*.sql yet")
        return
    for file in [control, *scripts]:
        shutil.copyfile(file, folder / file.name)
        (folder / file.name).chmod(0o644)
        _say(f"installed {folder / file.name}")


def _install_psycopg(root: Root, parent: Path) -> None:
    """Install psycopg for the root's Python, which is another version than the one that runs here."""
    python = root.python_version()
    folder = parent / f"python{python}"
    if folder.is_dir():
        _say(f"kept {folder}")
        return
    parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".psycopg.", dir=parent) as scratch:
        unfinished = Path(scratch) / folder.name
        _run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--root-user-action=ignore", "--no-compile", "--only-binary=:all:"),
                *("--implementation", "cp", "--python-version", python),
                *("--target", str(unfinished), _PSYCOPG),
            ]
        )
        _compile(root, unfinished, folder)
        unfinished.rename(folder)
    _say(f"installed {', '.join(sorted(item.name for item in folder.glob('*.dist-info')))} in {folder}")


def _compile(root: Root, unfinished: Path, folder: Path) -> None:
    """Compile modules for the place they will be moved to: the server itself may not write there."""
    built_in, used_in = root.inside(unfinished), root.inside(folder)
    root.run("python3", "-m", "compileall", "-q", "-s", built_in, "-p", used_in, built_in)


# --- clusters -------------------------------------------------------------------------------------


def start(
    version: int,
    *,
    port: int | None = None,
    auth: str = "trust",
    settings: Mapping[str, str] | None = None,
    encoding: str = "UTF8",
    locale: str = "C.UTF-8",
) -> Cluster:
    """As `start_in`, in the root of a version."""
    return start_in(find(version), port=port, auth=auth, settings=settings, encoding=encoding, locale=locale)


def start_in(
    root: Root,
    *,
    port: int | None = None,
    auth: str = "trust",
    settings: Mapping[str, str] | None = None,
    encoding: str = "UTF8",
    locale: str = "C.UTF-8",
) -> Cluster:
    """Make a scratch cluster in a root and start it.

    Without a port, a free one is taken. The settings override what is chosen here: a socket folder of its
    own, TCP on 127.0.0.1 only, fsync off.
    """
    _require_root_user()
    if auth not in AUTH_METHODS:
        raise RootError(f"unknown auth {auth!r}, expected one of {', '.join(AUTH_METHODS)}")
    (root.path / _CLUSTERS).mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=root.path / _CLUSTERS))
    password = secrets.token_urlsafe(16) if auth == "peer" else None
    cluster = Cluster(root, folder, port or _free_port(), auth, password)
    try:
        _initdb(cluster, encoding, locale)
        _configure(cluster, settings or {})
        _start_server(cluster)
    except BaseException:
        _remove(cluster)
        raise
    return cluster


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _as_postgres(cluster: Cluster, program: str, *argv: str) -> str:
    uid, gid = cluster.root.postgres_ids()
    return cluster.root.run(cluster.root.server_program(program), *argv, user=f"{uid}:{gid}")


def _initdb(cluster: Cluster, encoding: str, locale: str) -> None:
    uid, gid = cluster.root.postgres_ids()
    cluster.folder.chmod(0o755)
    cluster.socket_folder.mkdir(mode=0o755)
    for path in (cluster.folder, cluster.socket_folder):
        os.chown(path, uid, gid)
    options = ["--pgdata", cluster.root.inside(cluster.data), "--username=postgres", "--no-sync"]
    options += ["--no-instructions", f"--encoding={encoding}", f"--locale={locale}"]
    if cluster.password is None:
        _as_postgres(cluster, "initdb", *options, "--auth=trust")
        return
    password_file = cluster.folder / "password"
    password_file.touch(mode=0o600)
    os.chown(password_file, uid, gid)
    password_file.write_text(cluster.password + "\n")
    options += ["--auth-local=peer", "--auth-host=scram-sha-256"]
    options += [f"--pwfile={cluster.root.inside(password_file)}"]
    _as_postgres(cluster, "initdb", *options)
    password_file.unlink()
    (cluster.data / "pg_hba.conf").write_text(_PEER_HBA)


def _configure(cluster: Cluster, settings: Mapping[str, str]) -> None:
    chosen = {
        "port": str(cluster.port),
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": cluster.root.inside(cluster.socket_folder),
        "fsync": "off",
        "full_page_writes": "off",
        **settings,
    }
    with (cluster.data / "postgresql.conf").open("a") as file:
        for name, value in chosen.items():
            quoted = value.replace("\\", "\\\\").replace("'", "''")
            file.write(f"{name} = '{quoted}'\n")


def _start_server(cluster: Cluster) -> None:
    options = ["--pgdata", cluster.root.inside(cluster.data), "--log", cluster.root.inside(cluster.log)]
    try:
        _as_postgres(cluster, "pg_ctl", "start", *options, "--wait", "--timeout", str(_START_LIMIT_S))
    except RootError as error:
        log = cluster.log.read_text(errors="replace") if cluster.log.exists() else "(no log)"
        raise RootError(f"{error}\n{log}") from error


def stop(cluster: Cluster) -> None:
    """Stop a cluster and remove its files. A cluster that has crashed is just removed."""
    _require_root_user()
    _remove(cluster)


def _remove(cluster: Cluster) -> None:
    options = ["--pgdata", cluster.root.inside(cluster.data), "--wait", "--timeout", str(_STOP_LIMIT_S)]
    if cluster.postmaster_pid() is not None:
        try:
            _as_postgres(cluster, "pg_ctl", "stop", *options, "--mode", "fast")
        except RootError:
            if cluster.postmaster_pid() is not None:
                _as_postgres(cluster, "pg_ctl", "stop", *options, "--mode", "immediate")
    shutil.rmtree(cluster.folder)


def clusters(version: int) -> list[Path]:
    """The data directories of all clusters in the root of a version, running or left over."""
    return sorted(path / "data" for path in (find(version).path / _CLUSTERS).iterdir())


def stop_data(version: int, data: Path) -> None:
    """Stop and remove the cluster with this data directory, by whichever process it was started."""
    data = data.resolve()
    if data not in [path.resolve() for path in clusters(version)]:
        raise RootError(f"not a cluster in the root for PostgreSQL {version}: {data}")
    stop(Cluster(find(version), data.parent, 0, "", None))


@contextlib.contextmanager
def running(
    version: int,
    *,
    port: int | None = None,
    auth: str = "trust",
    settings: Mapping[str, str] | None = None,
    encoding: str = "UTF8",
    locale: str = "C.UTF-8",
) -> Iterator[Cluster]:
    """A scratch cluster for the duration of a with block; takes what `start` takes."""
    cluster = start(version, port=port, auth=auth, settings=settings, encoding=encoding, locale=locale)
    try:
        yield cluster
    finally:
        stop(cluster)


# --- command line ---------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("prepare", "make a root, or reuse it"),
        ("install", "install this checkout's extension and psycopg in a root"),
        ("start", "start a scratch cluster"),
        ("stop", "stop a scratch cluster and remove it"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("version", type=int, choices=sorted(RELEASES))
    start_command, stop_command = commands.choices["start"], commands.choices["stop"]
    start_command.add_argument("--port", type=int, help="default: a free one")
    start_command.add_argument("--auth", choices=AUTH_METHODS, default="trust")
    start_command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    start_command.add_argument("--encoding", default="UTF8")
    start_command.add_argument("--locale", default="C.UTF-8")
    which = stop_command.add_mutually_exclusive_group()
    which.add_argument("--data", type=Path, help="needed when several clusters run")
    which.add_argument("--all", action="store_true", help="every cluster of this version")
    return parser


def _start_from_arguments(arguments: argparse.Namespace) -> None:
    settings = {}
    for item in arguments.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise RootError(f"--set wants NAME=VALUE, not {item!r}")
        settings[name.strip()] = value.strip()
    cluster = start(
        arguments.version,
        port=arguments.port,
        auth=arguments.auth,
        settings=settings,
        encoding=arguments.encoding,
        locale=arguments.locale,
    )
    print(f"conninfo={cluster.conninfo}")
    print(f"socket_conninfo={cluster.socket_conninfo}")
    print(f"data={cluster.data}")
    print(f"os_uid={cluster.os_uid}")
    if cluster.password is not None:
        print(f"password={cluster.password}")


def _stop_from_arguments(arguments: argparse.Namespace) -> None:
    chosen = [arguments.data] if arguments.data else clusters(arguments.version)
    if len(chosen) > 1 and not arguments.all:
        listed = "\n".join(map(str, chosen))
        raise RootError(f"several clusters, choose one with --data or say --all:\n{listed}")
    for data in chosen:
        stop_data(arguments.version, data)


def main() -> int:
    """Run the command line."""
    arguments = _parser().parse_args()
    try:
        if arguments.command == "prepare":
            print(prepare(arguments.version).path)
        elif arguments.command == "install":
            install(arguments.version)
        elif arguments.command == "start":
            _start_from_arguments(arguments)
        else:
            _stop_from_arguments(arguments)
    except RootError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
