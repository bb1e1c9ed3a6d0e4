"""The command ``memos``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from memos import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor(as_json=options.json)
    parser.print_help()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memos", description="Memory for large language models.")
    parser.add_argument("--version", action="version", version=f"memos {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    doctor = commands.add_parser(
        "doctor",
        help="what runs on this machine, and why something does not",
        description="What runs on this machine, and why something does not. "
        "Exit code 0: all that is installed works; 1: something is broken.",
    )
    doctor.add_argument("--json", action="store_true", help="the report as JSON")
    return parser


def _doctor(as_json: bool) -> int:
    from memos import doctor

    report = doctor.examine()
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        from rich.console import Console

        Console().print(*doctor.render(report), sep="\n")
    return 0 if report.ok else 1
