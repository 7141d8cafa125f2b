#!/usr/bin/env python3
"""The one build tool of pg_background for PL/Python.

render   makes the install script, docs/reference.md and the README's API table of sql_templates/ and plpy/
check    fails when one of these is stale
install  puts the extension and psycopg for the server's own Python into a server's sharedir
installcheck  runs the regression test by pg_regress, against the server that PGHOST and PGPORT name
deb      builds Debian packages into dist/
rpm      builds RPM packages into dist/
dist     builds PGXN's zip archive into dist/
demo     runs the worked example on a scratch server

Only render and check need Jinja; the others get by with the standard library and this Python's pip.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tools import debian, installing, regress, release, rpm
from tools.common import BuildError

MAJORS = (14, 15, 16, 17, 18)


def demo(pg_config: str | None) -> int:
    """Run the worked example on a scratch server."""
    from examples import demo as example

    return example.main(installing.find_server(pg_config).pg_config)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="write the install script, the reference and the README's API table")
    commands.add_parser("check", help="fail when one of them is stale")
    for name, text in (
        ("install", "install into a server"),
        ("installcheck", "run the regression test"),
        ("demo", "run the worked example"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--pg-config", metavar="PATH", help="of the server; default: PG_CONFIG, or found")
    for name, text in (("deb", "build Debian packages"), ("rpm", "build RPM packages")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--majors", type=int, nargs="+", default=MAJORS, help="of PostgreSQL; default: all")
    commands.add_parser("dist", help="build PGXN's zip archive")
    return parser.parse_args(arguments)


def _run(chosen: argparse.Namespace) -> int:
    if chosen.command in ("render", "check"):
        from tools import rendering

        rendering.render() if chosen.command == "render" else rendering.check()
    elif chosen.command == "install":
        installing.install(chosen.pg_config)
    elif chosen.command == "installcheck":
        regress.run(chosen.pg_config)
    elif chosen.command == "deb":
        debian.build_packages(chosen.majors)
    elif chosen.command == "rpm":
        rpm.build_packages(chosen.majors)
    elif chosen.command == "dist":
        release.build_archive()
    else:
        return demo(chosen.pg_config)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 1 after an error that the user must put right."""
    try:
        return _run(_arguments(arguments))
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"build.py: {error}: run make bootstrap, then .venv/bin/python build.py", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
