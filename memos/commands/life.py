"""memos archive, freeze, thaw, purge, sweep, duplicates and distil."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memos.commands import console, folder
from memos.errors import ArgumentError

if TYPE_CHECKING:
    from memos.mos import MOS

_BUDGETS = ("hot_cubes", "hot_bytes", "archive_after_s", "least_importance", "delete_after_s")


def archive(options: argparse.Namespace) -> int:
    """Out of the indexes, with all that hangs on it."""
    with _writing(options) as mos:
        moved = mos.archive(options.id, options.memory, why=options.why)
    return _tell(options, {"id": options.id, "archived": moved}, f"{moved} archived")


def freeze(options: argparse.Namespace) -> int:
    """From now on it cannot change."""
    with _writing(options) as mos:
        cube = mos.freeze(options.id, options.memory, why=options.why)
    return _tell(options, {"id": cube.id, "state": cube.state}, cube.state)


def thaw(options: argparse.Namespace) -> int:
    """It may change again."""
    with _writing(options) as mos:
        cube = mos.thaw(options.id, options.memory, why=options.why)
    return _tell(options, {"id": cube.id, "state": cube.state}, cube.state)


def purge(options: argparse.Namespace) -> int:
    """Forget a cube, or a memory, for good."""
    if (options.id is None) == (not options.all):
        raise ArgumentError("purge: ID, or --all with --memory, wanted")
    if options.all and options.memory is None:
        raise ArgumentError("purge: --memory says which memory --all means")
    with _writing(options) as mos:
        if options.all:
            done = mos.purge(memory=options.memory)
        else:
            done = mos.purge(options.id, options.memory)
    told = [f"{done.cubes} purged"]
    told += [f"made of it, and not purged: {memory}/{id}" for memory, id in done.derived]
    return _tell(options, dataclasses.asdict(done), "\n".join(told))


def sweep(options: argparse.Namespace) -> int:
    """Archive what is too much, too old or too unimportant."""
    given = {name: getattr(options, name) for name in _BUDGETS}
    with _writing(options) as mos:
        done = mos.sweep(
            memory=options.memory, **{name: n for name, n in given.items() if n is not None}
        )
    lines = []
    for one in done:
        moved = ", ".join(f"{number} by {why}" for why, number in one.archived.items())
        parts = [f"{one.hot} in the indexes", f"archived: {moved or 'none'}"]
        parts += [f"{one.expired} expired"] if one.expired else []
        parts += [f"{one.deleted} deleted"] if one.deleted else []
        parts += [f"{one.over} too many, which may not leave"] if one.over else []
        lines.append(f"{one.memory}: {'; '.join(parts)}")
    return _tell(options, [dataclasses.asdict(one) for one in done], "\n".join(lines))


def duplicates(options: argparse.Namespace) -> int:
    """Cubes that say the same."""
    if options.undo is not None:
        with _writing(options) as mos:
            back = [cube.id for cube in mos.undo_merge(options.undo, options.memory)]
        return _tell(options, {"sources": back}, "\n".join(back))
    if options.merge:
        with _writing(options) as mos:
            made = mos.merge_duplicates(options.memory)
        found = [{"id": cube.id, "merged_from": list(cube.derived_from)} for cube in made]
        lines = [f"{one['id']}: {len(one['merged_from'])} merged" for one in found]
    else:
        with folder.opened(options) as mos:
            found = [dataclasses.asdict(pair) for pair in mos.find_duplicates(options.memory)]
        lines = [f"{one['first']} {one['second']}: {one['why']}" for one in found]
    return _tell(options, found, "\n".join(lines) or "none")


def distil(options: argparse.Namespace) -> int:
    """What texts say for long, as cubes of another memory."""
    with _writing(options) as mos:
        if options.into not in mos.memories:
            mos.register_memory(folder.make("text", options.into, folder.embedder_of(options)))
        job = mos.distil(options.memory, options.into)
    if job.state != "DONE":
        raise ArgumentError(f"distil: {job.failed} of {job.units} parts failed: {job.error}")
    result = {name: int(number) for name, number in job.result.items()}
    new, again = result.get("new", 0), result.get("again", 0)
    return _tell(options, {"parts": job.units, **result}, f"{new} new, {again} said again")


def parsers(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    json: Callable[[Any], None],
    count: Callable[[str], int],
    number: Callable[[str], float],
) -> None:
    """Add the parsers of these commands."""
    for name, run, summary in (
        ("archive", archive, "take a cube, with all that hangs on it, out of the indexes"),
        ("freeze", freeze, "let a cube not change any more"),
        ("thaw", thaw, "let a frozen cube change again"),
    ):
        made = command(commands, name, run, summary, f"memos {name} key-1")
        made.add_argument("id", metavar="ID", help="of the cube")
        made.add_argument("--memory", metavar="M", help="where several memories have this id")
        made.add_argument("--why", metavar="TEXT", default="", help="goes into the cube's record")
        json(made)
    made = command(
        commands,
        "purge",
        purge,
        "remove for good what a cube ever said",
        "memos purge key-1",
        "Contents, versions, words, vectors and files go; a tombstone stays. There is no way back.",
    )
    made.add_argument("id", metavar="ID", nargs="?", help="of the cube, a deleted one too")
    made.add_argument("--memory", metavar="M", help="that it is in; with --all which one")
    made.add_argument("--all", action="store_true", help="every cube of --memory")
    json(made)
    made = command(
        commands,
        "sweep",
        sweep,
        "archive what is too much, too old or too unimportant",
        "memos sweep --hot-cubes 20000",
        "What has outlived its time is deleted. What is frozen or pinned stays.",
    )
    made.add_argument("--memory", metavar="M", help="only this one (default: all)")
    for option, kind, metavar, what in (
        ("--hot-cubes", count, "N", "at most so many cubes of a memory in the indexes"),
        ("--hot-bytes", count, "N", "at most so many bytes of them"),
        ("--archive-after-s", number, "S", "what was not used for so many seconds"),
        ("--least-importance", number, "X", "what is less important, from 0 to 1"),
        ("--delete-after-s", number, "S", "delete what has been archived for so long"),
    ):
        made.add_argument(option, metavar=metavar, type=kind, help=what)
    json(made)
    made = command(
        commands,
        "duplicates",
        duplicates,
        "find texts that say the same in almost the same words, and merge them",
        "memos duplicates notes --merge",
        "Numbers, names and negations have to agree.",
    )
    made.add_argument("memory", metavar="MEMORY", help="name of a text memory")
    way = made.add_mutually_exclusive_group()
    way.add_argument("--merge", action="store_true", help="make one cube of those that are one")
    way.add_argument("--undo", metavar="ID", help="take the merge that made this cube back")
    json(made)
    made = command(
        commands,
        "distil",
        distil,
        "keep what a memory's texts say for long, in another memory",
        "memos distil chat --into facts",
        "By rules, for English: preferences, facts about people, dates. Each names its sources.",
        embeds=True,
    )
    made.add_argument("memory", metavar="MEMORY", help="name of the memory")
    made.add_argument(
        "--into", metavar="M", required=True, help="a text memory, made where it is new"
    )
    json(made)


def _writing(options: argparse.Namespace) -> MOS:
    return folder.opened(options, readonly=False, new=False)


def _tell(options: argparse.Namespace, value: Any, text: str) -> int:
    if options.json:
        console.write_json(value)
    else:
        console.show(console.text(text, keep="\n"))
    return 0
