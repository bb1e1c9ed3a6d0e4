"""The command ``memos``: how it runs, and its exit codes. The commands are in memos/commands."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from memos.commands import console, files
from memos.commands.parsers import make_parser
from memos.commands.read import NOTHING
from memos.errors import MemosError

OK, ERROR, USAGE = 0, 1, 2
__all__ = ["NOTHING", "main", "make_parser"]
INTERRUPTED, PIPE_CLOSED = 130, 141  # what a shell says of a process ended by that signal

_LATE = {
    "audit": "folder",
    "add": "text",
    "tree": "id",
    "graph": "id",
    "export-text": "id",
    "purge": "id",
    "import": "files",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the locale cannot show is spelled out
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has enough
        _abandon_output()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        console.complain("interrupted; what was stored before is still there")
        return INTERRUPTED
    except MemosError as error:
        console.complain(f"error: {error}")
    except ModuleNotFoundError as error:
        console.complain(f"error: {error}; memos doctor says what is missing and what that costs")
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        console.complain(f"error: {where}{error.strerror or error}")
        _abandon_output()
    return ERROR


def _run(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    try:
        options = _parse(parser, arguments)
    except SystemExit as stop:  # argparse has printed what there is to say
        return stop.code if isinstance(stop.code, int) else USAGE
    if options.command is None:
        parser.print_help()
        return USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options, rest = parser.parse_known_args(arguments)
    # Before Python 3.12.7, argparse gives up an optional argument that follows an option.
    late = _LATE.get(options.command, "")
    if rest and (rest[0] == "-" or not rest[0].startswith("-")):
        if late == "files":
            options.files, rest = options.files + rest, []
        elif late and getattr(options, late) is None:
            setattr(options, late, rest.pop(0))
    here = getattr(options, "parser", parser)
    if rest:
        here.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "add":
        given = [options.text, options.file, options.jsonl]
        if sum(one is not None for one in given) != 1:
            here.error("one of TEXT, -, --file and --jsonl wanted")
        if options.jsonl is not None and options.id is not None:
            here.error("--id: every line of --jsonl says its own")
    if options.command == "import" and not options.files and not files.is_import(options):
        here.error(f"FILE wanted, or only files that end in {files.SUFFIX}")
    if options.command == "graph" and (options.id is None) == (options.query is None):
        here.error("one of ID and --query wanted")
    return options


def _abandon_output() -> None:
    """What still waits for a broken output goes nowhere, so that nothing complains at the end."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
