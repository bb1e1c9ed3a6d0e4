"""The arguments of ``memos``: one parser for every command."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable
from typing import Any

from memos import __version__
from memos.commands import audit, console, files, folder, keys, life, read, structure, top, write

EXIT_CODES = """\
exit codes: 0 done; 1 an error, one line on standard error says which; 2 wrong arguments;
3 nothing found (search, context, graph --query)."""
FOLDER = f"""\
The memories are in the folder that --store names, else the variable {folder.STORE}, else
{folder.DEFAULT}. Only add and import make it."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="memos",
        description="Memory for large language models: text, documents, vectors and graphs that "
        "are kept in a folder and found again.",
        epilog=f"{FOLDER}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"memos {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for add in (_add, _import, _search, _context, _show, _history, _tree, _graph):
        add(commands)
    _export_text(commands)
    _export(commands)
    _inspect(commands)
    _stats(commands)
    _top(commands)
    _keys(commands)
    _audit(commands)
    life.parsers(commands, _command, _json, _count, _number)
    _doctor(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
    more: str = "",
    *,
    embeds: bool = False,
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {more}".strip(), 88),
        epilog=f"example: {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(run=run, parser=made)
    made.add_argument(
        "--store", metavar="PATH", help=f"the folder; else {folder.STORE}, else {folder.DEFAULT}"
    )
    _key(made)
    if embeds:
        made.add_argument(
            "--embedder",
            choices=folder.EMBEDDERS,
            help="who makes vectors of texts, for search by meaning: auto, the local model where "
            f"it is installed; none, only words count (default: {folder.EMBEDDER}, else auto)",
        )
    return made


def _key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        metavar="WHERE",
        help="the master key of an encrypted folder is there: file:PATH, env:NAME or "
        f"keyring:SERVICE/NAME; else {folder.KEY} says so, or is the key",
    )


def _json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metadata",
        metavar="KEY=VALUE",
        action="append",
        help="or a JSON object; may be repeated. A VALUE that is JSON (3, true, [1, 2]) is that",
    )


def _add(commands: Any) -> None:
    made = _command(
        commands,
        "add",
        write.add,
        "remember something",
        "memos add notes 'The key is under the mat.' --metadata room=hall",
        "Makes the memory where it is new. Prints the id of the cube; what is there already, "
        "content and metadata, is not stored twice.",
        embeds=True,
    )
    made.add_argument("memory", metavar="MEMORY", help="name of the memory")
    made.add_argument(
        "text",
        metavar="TEXT",
        nargs="?",
        help="the content; - reads standard input. For a graph memory JSON, a node or a "
        "relationship; for a vector memory a JSON list of numbers, or a text",
    )
    made.add_argument("--file", metavar="F", help="the content is what stands in this file")
    made.add_argument(
        "--jsonl",
        metavar="F",
        help="many at once: in each line of F an object with content and, as far as wanted, "
        "metadata, id, parent_id, importance, ttl_s, thread, relations; - reads standard input",
    )
    made.add_argument("--kind", choices=write.KINDS, help="of a new memory (default: text)")
    _metadata(made)
    made.add_argument("--id", metavar="ID", help="of the cube (default: a new UUID)")
    made.add_argument("--parent", metavar="ID", help="in a tree memory: the cube above")
    made.add_argument("--importance", metavar="X", type=_number, help="from 0 to 1 (default: 0.5)")
    made.add_argument(
        "--ttl", metavar="SECONDS", type=_number, help="forget it after so long (default: never)"
    )
    made.add_argument(
        "--thread", metavar="NAME", help="conversation whose cubes follow one another"
    )
    _json(made)


def _import(commands: Any) -> None:
    made = _command(
        commands,
        "import",
        write.import_,
        "read documents into a tree memory, or what memos export wrote",
        "memos import handbook README.md docs/*.md",
        "Headings become sections, with the paragraphs below them. A .jsonl file is read line by "
        "line as by memos add --jsonl, into a text memory where it is new. Files that end in "
        f"{files.SUFFIX} say their memories themselves: memos import FILE{files.SUFFIX}; each is "
        "verified, and stored whole or not at all.",
        embeds=True,
    )
    made.add_argument("memory", metavar="MEMORY", help=f"its name; or a FILE{files.SUFFIX}")
    made.add_argument("files", metavar="FILE", nargs="*", help="Markdown, text, or .jsonl")
    made.add_argument(
        "--format", choices=("markdown", "text"), help="of documents (default: by the suffix)"
    )
    _metadata(made)
    made.add_argument(
        "--on-conflict",
        choices=files.CONFLICTS,
        default="error",
        help=f"where a {files.SUFFIX} has an id that is there already (default: error)",
    )
    made.add_argument(
        "--rename",
        metavar="OLD=NEW",
        action="append",
        help=f"what a memory of a {files.SUFFIX} is called here; may be repeated",
    )
    _trusted(made)
    _json(made)


def _query(made: argparse.ArgumentParser, limit: int) -> None:
    made.add_argument(
        "-n", "--limit", metavar="N", type=_count, default=limit, help=f"hits (default: {limit})"
    )
    made.add_argument(
        "--filter",
        metavar="JSON",
        help='conditions on the metadata, such as \'{"stars": {"$gte": 3}}\'',
    )


def _search(commands: Any) -> None:
    made = _command(
        commands,
        "search",
        read.search,
        "find what fits a query, best first",
        "memos search 'where is the key' -n 3",
        embeds=True,
    )
    made.add_argument(
        "query", metavar="QUERY", help="words; for a vector memory also a JSON list of numbers"
    )
    made.add_argument("--memory", metavar="M", help="only this one (default: all that read text)")
    _query(made, 5)
    made.add_argument("--explain", action="store_true", help="why each hit stands where it stands")
    made.add_argument("--ancestors", action="store_true", help="with the headings above each hit")
    made.add_argument("--archived", action="store_true", help="also among archived cubes")
    _json(made)


def _context(commands: Any) -> None:
    made = _command(
        commands,
        "context",
        read.context,
        "write what a prompt should carry for a query",
        "memos context 'where is the key' --budget 500",
        "The best hits without repetition, within a budget, each with a number for its citation.",
        embeds=True,
    )
    made.add_argument("query", metavar="QUERY", help="words")
    made.add_argument(
        "--budget",
        metavar="TOKENS",
        type=_count,
        default=1000,
        help="of the text, four characters a token (default: 1000)",
    )
    made.add_argument(
        "--memory", metavar="M", action="append", help="only this one; may be repeated"
    )
    _query(made, 20)
    _json(made)


def _by_id(commands: Any, name: str, run: Any, summary: str, example: str) -> None:
    made = _command(commands, name, run, summary, example)
    made.add_argument("id", metavar="ID", help="of the cube")
    made.add_argument("--memory", metavar="M", help="where several memories have this id")
    _json(made)


def _show(commands: Any) -> None:
    summary = "show one cube with everything known of it"
    _by_id(commands, "show", read.show, summary, "memos show key-1")


def _history(commands: Any) -> None:
    summary = "show every version of a cube, also of a deleted one"
    _by_id(commands, "history", read.history, summary, "memos history key-1")


def _tree(commands: Any) -> None:
    made = _command(
        commands,
        "tree",
        structure.tree,
        "draw the documents of a tree memory",
        "memos tree handbook --depth 1",
    )
    made.add_argument("memory", metavar="MEMORY", help="name of the memory")
    made.add_argument("id", metavar="ID", nargs="?", help="only this cube and what is below")
    made.add_argument("--depth", metavar="N", type=_count, help="levels below (default: all)")
    made.add_argument("--ids", action="store_true", help="the id of every cube")
    _json(made)


def _graph(commands: Any) -> None:
    made = _command(
        commands,
        "graph",
        structure.graph,
        "draw what a node of a graph memory is linked to",
        "memos graph people ada --depth 2 --type KNOWS",
    )
    made.add_argument("memory", metavar="MEMORY", help="name of the memory")
    made.add_argument("id", metavar="ID", nargs="?", help="of the node")
    made.add_argument("--depth", metavar="N", type=_count, default=1, help="steps (default: 1)")
    made.add_argument(
        "--type", metavar="T", action="append", help="of relationships; may be repeated"
    )
    made.add_argument(
        "--direction", choices=("out", "in", "both"), default="both", help="(default: both)"
    )
    made.add_argument(
        "-n",
        "--limit",
        metavar="N",
        type=_count,
        default=100,
        help="nodes, or hits of a query (default: 100)",
    )
    made.add_argument(
        "--query",
        metavar="JSON",
        help="instead of ID: an object with node and, as far as wanted, relationships, depth, "
        'direction, max_nodes, such as \'{"node": {"label": "Person"}, "depth": 1}\'',
    )
    _json(made)


def _export_text(commands: Any) -> None:
    made = _command(
        commands,
        "export-text",
        read.export_text,
        "write documents, or the texts of a text memory, as text",
        "memos export-text handbook --output handbook.md",
        "A document comes back as it was imported, or changed since.",
    )
    made.add_argument("memory", metavar="MEMORY", help="name of the memory")
    made.add_argument("id", metavar="ID", nargs="?", help="only this cube, with what is below")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--output", metavar="F", help="a file (default: standard output)")
    _json(where)


def _export(commands: Any) -> None:
    made = _command(
        commands,
        "export",
        files.export,
        "write memories into one file, with all that is known of them",
        f"memos export backup{files.SUFFIX}",
        "Versions, relations, access lists, provenance, vectors, adapters. Another store, here or "
        f"elsewhere, reads it with memos import FILE{files.SUFFIX}.",
    )
    made.add_argument("file", metavar="FILE", help="a new file")
    made.add_argument(
        "--memory", metavar="M", action="append", help="only this one; may be repeated"
    )
    made.add_argument(
        "--id",
        metavar="ID",
        action="append",
        help="only this cube, with what it cannot stand without; may be repeated",
    )
    made.add_argument("--sign", metavar="PEM", help="a file with an Ed25519 private key")
    made.add_argument(
        "--encrypt",
        action="store_true",
        help=f"with a passphrase, from the variable {files.PASSPHRASE} or asked for",
    )
    made.add_argument("--force", action="store_true", help="replace a file that is there")
    _json(made)


def _inspect(commands: Any) -> None:
    made = commands.add_parser(
        "inspect",
        help=f"verify a {files.SUFFIX} and show what is in it",
        description=f"Verify every byte of a {files.SUFFIX} and show what is in it.",
        epilog=f"example: memos inspect backup{files.SUFFIX}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(run=files.inspect, parser=made)
    made.add_argument("file", metavar="FILE", help="what memos export wrote")
    _trusted(made)
    _json(made)


def _trusted(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--trusted",
        metavar="KEY",
        action="append",
        help="an Ed25519 public key, in hex or a file in PEM, that has to have signed; may be "
        "repeated",
    )


def _stats(commands: Any) -> None:
    made = _command(
        commands,
        "stats",
        read.stats,
        "show what the folder holds",
        "memos stats --store chat.memos",
    )
    _json(made)


def _top(commands: Any) -> None:
    made = _command(
        commands,
        "top",
        top.top,
        "watch the scheduler of the process that works on the folder",
        "memos top --store chat.memos --once",
        "Tiers with their budgets, hit rates, the hottest units, the last moves and why. What that "
        "process wrote last is shown, and how long ago. Ctrl-C ends it.",
    )
    made.add_argument("--once", action="store_true", help="print one frame and end")
    made.add_argument(
        "--every", metavar="SECONDS", type=_number, default=1.0, help="between frames (default: 1)"
    )
    made.add_argument("-n", "--limit", metavar="N", type=_count, default=10, help="rows (10)")
    _json(made)


def _keys(commands: Any) -> None:
    made = _command(
        commands,
        "key-new",
        keys.new,
        "make a master key, in a new file",
        "memos key-new ~/.memos-key && memos add notes 'A secret.' --key file:$HOME/.memos-key",
        "Prints the id of the key. A folder that is made with a key is encrypted. Who loses the "
        "key loses what is in the folder.",
    )
    made.add_argument("file", metavar="FILE", help="where to; only its owner may read it")
    _json(made)
    made = _command(
        commands,
        "key-change",
        keys.change,
        "have another master key open an encrypted folder, and the old one no more",
        "memos key-change --to file:new-key --key file:old-key",
        "Prints the id of the new key.",
    )
    made.add_argument("--to", metavar="WHERE", required=True, help="the new key, as for --key")
    _json(made)
    made = _command(
        commands,
        "key-reseal",
        keys.reseal,
        "seal everything in an encrypted folder with new keys",
        "memos key-reseal --key file:my-key",
        "The master key stays. For after a key became known.",
    )
    _json(made)


def _audit(commands: Any) -> None:
    made = _command(
        commands,
        "audit",
        audit.audit,
        "verify the audit records of a folder, or show them",
        "memos audit verify chat.memos",
        "Finds records that were changed, added, taken out, moved or cut off. Exit code 1: "
        "something is wrong with them.",
    )
    made.add_argument(
        "action",
        choices=("verify", "head", "records"),
        help="verify: read all records through; head: how many there are and the last one's hash, "
        "to be kept elsewhere; records: list them",
    )
    made.add_argument("folder", metavar="FOLDER", nargs="?", help="instead of --store")
    made.add_argument(
        "--head", metavar="HASH", help="verify: a hash that was kept elsewhere, which must be there"
    )
    made.add_argument("--id", metavar="ID", help="records: only those about this cube")
    made.add_argument(
        "-n", "--limit", metavar="N", type=_count, default=50, help="records: the last N (50)"
    )
    _json(made)


def _doctor(commands: Any) -> None:
    made = commands.add_parser(
        "doctor",
        help="what runs on this machine, and why something does not",
        description="What runs on this machine, and why something does not. "
        "Exit code 0: all that is installed works; 1: something is broken.",
    )
    made.set_defaults(run=_examine, parser=made)
    made.add_argument(
        "--store", metavar="PATH", help="also read this folder through and tell what is damaged"
    )
    _key(made)
    made.add_argument("--json", action="store_true", help="the report as JSON")


def _examine(options: argparse.Namespace) -> int:
    from memos import doctor

    report = doctor.examine(options.store, folder.key_of(options))
    if options.json:
        console.write_json(report.as_dict())
    else:
        console.show(*doctor.render(report), markup=True)
    return 0 if report.ok else 1


def _count(text: str) -> int:
    """A whole number from 0. Raises ValueError, which argparse puts into words."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _number(text: str) -> float:
    """A finite number. Raises ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


_number.__name__ = "number"  # what argparse calls them
_count.__name__ = "number from 0"
