#!/usr/bin/env python3
"""The suite on PostgreSQL 17 and 18, inside of bootstrapped Debian systems (debian_roots.py), in many set-ups.

    tests/matrix.py          the whole suite on each version, then combinations: make test-matrix
    tests/matrix.py --ci     the part of it that CI has time for
    tests/matrix.py --list   what would run

A combination is a value for each of FACTORS; together they hold every pair of values of two factors. Needs the OS user
root; makes what is missing: the systems (cached), and in each the packages that the tests need.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import debian_roots
from tests.debian_roots import CHECKOUT, Root, RootError

FACTORS = {
    "version": ("17", "18"),
    "setup": ("trust", "peer", "notcp", "renamed"),
    "encoding": ("UTF8", "LATIN1", "SQL_ASCII"),
    "pool_size": ("4", "0"),
    "settings": ("stock", "unusual"),
}

UNUSUAL_SETTINGS = {
    "TimeZone": "America/St_Johns",
    "bytea_output": "escape",
    "extra_float_digits": "-3",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "array_nulls": "off",
    "xmloption": "document",
    "transform_null_equals": "on",
    "default_transaction_isolation": "repeatable read",
    "plan_cache_mode": "force_generic_plan",
}
"""They change how text is read and written, or how the extension's own queries are planned."""

ANYWHERE = ("test_cancel.py", "test_check.py", "test_relocation.py", "test_encodings.py")
"""Tests that hold in every combination."""

IN_CI = tuple(
    f"tests/{file}"
    for file in (
        "test_check.py",
        "test_identity.py",
        "test_launch.py",
        "test_privileges.py",
        "test_relocation.py",
        "test_standby.py",
    )
)
"""What depends on the server's version most, and on time least."""

NOT_OF_A_SERVER = tuple(f"--ignore=tests/{file}" for file in ("test_static_safety.py", "test_installcheck.py", "unit"))
"""Tests of the sources, and one that needs git and make."""

_PACKAGES = "opt/pg_background-tests"  # in a root: what pip brings for the tests
_COPIES = "srv"  # in a root: copies of the checkout
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis", "build", "dist")


@dataclass(frozen=True)
class Run:
    """One run of pytest on one version."""

    version: int
    name: str
    arguments: tuple[str, ...]


# --- what is run ----------------------------------------------------------------------------------


def covering(factors: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """A few combinations of the factors' values in which every pair of values of two factors occurs."""
    candidates = [dict(zip(factors, values)) for values in itertools.product(*factors.values())]
    missing = {pair for candidate in candidates for pair in pairs(candidate)}
    chosen = []
    while missing:
        best = max(candidates, key=lambda candidate: len(missing & pairs(candidate)))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def pairs(values: dict[str, str]) -> set[tuple[tuple[str, str], ...]]:
    """Every two of the values, with the names of their factors."""
    return set(itertools.combinations(values.items(), 2))


def _combined(version: str, setup: str, encoding: str, pool_size: str, settings: str) -> Run:
    server_settings = dict(UNUSUAL_SETTINGS) if settings == "unusual" else {}
    server_settings["pg_background.pool_size"] = pool_size
    arguments = [f"tests/{file}" for file in ANYWHERE] + ["--setup", setup, "--encoding", encoding]
    for name, value in server_settings.items():
        arguments += ["--server-setting", f"{name}={value}"]
    name = f"{setup}, {encoding}, pool_size {pool_size}, {settings} settings"
    return Run(int(version), name, tuple(arguments))


def _runs() -> list[Run]:
    whole = [
        Run(17, "the whole suite, no TCP", (*NOT_OF_A_SERVER, "--setup", "notcp")),
        Run(18, "the whole suite, peer", (*NOT_OF_A_SERVER, "--setup", "peer")),
    ]
    return whole + [_combined(**values) for values in covering(FACTORS)]


def _runs_in_ci() -> list[Run]:
    return [
        Run(17, "CI's selection, peer", (*IN_CI, "--setup", "peer")),
        Run(18, "CI's selection, no TCP", (*IN_CI, "--setup", "notcp")),
    ]


# --- how ------------------------------------------------------------------------------------------


def _requirements() -> list[str]:
    """What tests of a server need, from what .venv was made of."""
    lines = (CHECKOUT / ".venv" / "requirements.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith(("ruff", "mypy", "pglast"))]


def _install_test_packages(root: Root) -> Path:
    """Python packages for the root's Python; its folder is named after what is in it."""
    python, requirements = root.python_version(), _requirements()
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    folder = root.path / _PACKAGES / f"python{python}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        command += ["--root-user-action=ignore", "--no-compile", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", python, "--target", f"{scratch}/packages"]
        subprocess.run([*command, *requirements, "typing-extensions>=4.6"], check=True)
        (Path(scratch) / "packages").rename(folder)
    return folder


@contextmanager
def _copy_of_checkout(root: Root) -> Iterator[Path]:
    """A copy that every OS user in the root can read."""
    with tempfile.TemporaryDirectory(prefix="pg_background-", dir=root.path / _COPIES) as scratch:
        copy = Path(scratch) / "checkout"
        shutil.copytree(CHECKOUT, copy, ignore=_NOT_COPIED, symlinks=True)
        Path(scratch).chmod(0o755)
        yield copy


def _run_pytest(root: Root, checkout: Path, packages: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Its exit status, and the line with its counts."""
    environment = {
        **debian_roots.environment(),
        "HOME": "/root",
        "PYTHONPATH": root.inside(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    script = 'cd "$1" && shift && exec python3 -m pytest -q "$@"'
    command = root.command(["sh", "-c", script, "sh", root.inside(checkout), *arguments])
    pytest = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert pytest.stdout is not None
    counts = "no tests were run"
    for line in pytest.stdout:
        print(line, end="", flush=True)
        if re.match(r"\d+ \w+(, \d+ \w+)* in ", line):
            counts = line.strip()
    return pytest.wait(), counts


def _execute(runs: Sequence[Run], pytest_arguments: Sequence[str]) -> list[str]:
    """Run them, version by version; a line for each, and the names of those that failed."""
    lines, failed = [], []
    versions = sorted({run.version for run in runs})
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        roots = dict(zip(versions, pool.map(debian_roots.prepare, versions)))
    lines.append(f"prepared the systems in {time.monotonic() - began:.0f} s")
    for version, group in itertools.groupby(sorted(runs, key=lambda run: run.version), key=lambda run: run.version):
        root = roots[version]
        debian_roots.install(version)
        packages = _install_test_packages(root)
        with _copy_of_checkout(root) as checkout:
            for run in group:
                print(f"--- PostgreSQL {version}: {run.name}", flush=True)
                status, counts = _run_pytest(root, checkout, packages, [*run.arguments, *pytest_arguments])
                lines.append(f"{version}: {'ok    ' if status == 0 else 'FAILED'} {run.name}: {counts}")
                if status != 0:
                    failed.append(run.name)
    print("\n".join(["--- Summary", *lines]))
    return failed


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ci", action="store_true", help="only what CI has time for")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--only", metavar="TEXT", default="", help="only runs whose version and name contain this")
    parser.add_argument("pytest", nargs="*", default=["-n", "2"], help="arguments for pytest, after -- (default: -n 2)")
    chosen = parser.parse_args()
    runs = [run for run in (_runs_in_ci() if chosen.ci else _runs()) if chosen.only in f"{run.version} {run.name}"]
    if chosen.list:
        print("\n".join(f"{run.version} {run.name}" for run in runs))
        return 0
    try:
        return 1 if _execute(runs, chosen.pytest) else 0
    except (RootError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
