"""memos add and memos import."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from memos.commands import console, files, folder
from memos.errors import ArgumentError, MemosError

if TYPE_CHECKING:
    from memos.mos import MOS

KINDS = ("text", "tree", "vector", "graph", "parametric")
_JSONL = (".jsonl", ".ndjson")


def add(options: argparse.Namespace) -> int:
    """One cube, or one for each line of a file."""
    given = _given(
        metadata=metadata_of(options.metadata),
        parent_id=options.parent,
        importance=options.importance,
        ttl_s=options.ttl,
        thread=options.thread,
        id=options.id,
    )
    if options.jsonl is not None:
        source = Lines(options.jsonl)
        with _memory(options, options.kind or "text") as mos:
            ids = _add_lines(mos, options.memory, source, given)
        told = f"{options.memory}: {len(ids):,} lines, {len(set(ids)):,} cubes"
    else:
        content = _content(options)
        kind = options.kind or _stored_kind(options)
        made = kind or "text"
        item: dict[str, Any] = {"content": _parsed(content, made), **given}
        is_vector = made == "vector" and not isinstance(item["content"], str)
        with _memory(options, made, embeds=not is_vector) as mos:
            ids = [mos.add(options.memory, item.pop("content"), **item).id]
        told = ids[0]
    if options.json:
        console.write_json({"memory": options.memory, "ids": ids})
    else:
        sys.stdout.write(console.safe(told) + "\n")
    return 0


def import_(options: argparse.Namespace) -> int:
    """Documents into a tree memory, lines of JSON into any memory, files of cubes."""
    if files.is_import(options):
        return files.import_(options)
    metadata = metadata_of(options.metadata)
    for name in options.files:
        if Path(name).is_dir():
            raise ArgumentError(f"FILE: files wanted, got the folder {name}")
        if name.endswith(files.SUFFIX):
            raise ArgumentError(f"FILE: {name} says its memories itself: memos import {name}")
    lines = {name: Lines(name) for name in options.files if _is_jsonl(name)}
    documents = [name for name in options.files if name not in lines]
    if lines and options.format is not None:
        raise ArgumentError(f"--format: only for documents, got {next(iter(lines))} as well")
    wanted = "tree" if documents else "text"
    kind = _stored_kind(options) or wanted
    if documents and kind != "tree":
        raise ArgumentError(
            f"memory {options.memory!r}: documents want one of kind tree, this is of kind {kind}"
        )
    for name in documents:  # before anything is made
        Path(name).stat()
    done: dict[str, dict[str, Any]] = {}
    with _memory(options, kind) as mos:
        with console.progress("documents", len(documents)) as tell:
            for number, name in enumerate(documents, 1):
                done[name] = _add_document(mos, options, name, metadata)
                tell(number)
        for name, items in lines.items():
            ids = _add_lines(mos, options.memory, items, _given(metadata=metadata))
            done[name] = {"file": name, "ids": ids, "cubes": len(set(ids))}
    told = [done[name] for name in options.files]
    if options.json:
        console.write_json({"memory": options.memory, "files": told})
        return 0
    from rich.table import Table

    table = Table("file", "cubes", "id")
    for one in told:
        id = one["ids"][0] if len(one["ids"]) == 1 else ""
        table.add_row(console.text(one["file"]), f"{one['cubes']:,}", console.text(id))
    console.show(table)
    return 0


class Lines:
    """A file with a JSON object in each line, read twice: first to check and to count.

    Args:
        name: of the file; "-": standard input.

    Raises:
        ArgumentError: names the line that is no JSON object with content.
    """

    def __init__(self, name: str) -> None:
        self.name = "standard input" if name == "-" else name
        self._path = Path(name)
        self._kept: list[str] | None = None  # of what can be read only once
        if name == "-":
            self._kept = _stdin().split("\n")
        elif not self._path.is_file():
            with _reading(self._path) as file:
                self._kept = list(file)
        self.count = sum(1 for _ in self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._lines(), 1):
            if not line.strip():
                continue
            try:
                item = _loads(line)
            except ValueError as error:
                raise ArgumentError(f"{self.name}:{number}: JSON wanted ({error})") from None
            if not isinstance(item, dict) or "content" not in item:
                raise ArgumentError(
                    f"{self.name}:{number}: an object with content wanted, got "
                    f"{console.one_line(line, 80)}"
                )
            yield item

    def _lines(self) -> Iterator[str]:
        if self._kept is not None:
            yield from self._kept
            return
        with _reading(self._path) as file:
            yield from file


def metadata_of(given: Sequence[str] | None) -> dict[str, Any] | None:
    """Metadata from ``key=value`` and JSON objects; None where there is none.

    A value that is JSON, such as 3, true or ["a"], is read as that; any other is text.
    """
    if not given:
        return None
    found: dict[str, Any] = {}
    for one in given:
        if one.lstrip().startswith("{"):
            found.update(object_of("--metadata", one))
            continue
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise ArgumentError(f"--metadata: key=value or a JSON object wanted, got {one!r}")
        try:
            found[key] = _loads(value)
        except ValueError:
            found[key] = value
    return found


def object_of(what: str, given: str) -> dict[str, Any]:
    """A JSON object that an option gives."""
    try:
        found = _loads(given)
    except ValueError as error:
        raise ArgumentError(f"{what}: a JSON object wanted, got {given!r} ({error})") from None
    if not isinstance(found, dict):
        raise ArgumentError(f"{what}: a JSON object wanted, got {given!r}")
    return found


# Inside.


def _given(**values: Any) -> dict[str, Any]:
    """Those that are said."""
    return {name: value for name, value in values.items() if value is not None}


def _memory(options: argparse.Namespace, kind: str, *, embeds: bool = True) -> MOS:
    """The MOS of the folder with the memory in it, which is made where it is new.

    Args:
        embeds: texts may come; a memory of vectors that the caller makes has no embedder.
    """
    mos = folder.opened(options, readonly=False)
    try:
        known = mos.memories.get(options.memory)
        if known is None:
            embedder = folder.embedder_of(options) if embeds else None
            mos.register_memory(folder.make(kind, options.memory, embedder))
        elif getattr(options, "kind", None) not in (None, known.kind):
            raise ArgumentError(
                f"--kind: memory {options.memory!r} is of kind {known.kind}, got {kind}"
            )
    except MemosError:
        mos.close()
        raise
    return mos


def _stored_kind(options: argparse.Namespace) -> str | None:
    """What the memory is, where it is there."""
    if not folder.exists(options):
        return None
    with folder.opened(options) as mos:
        known = mos.memories.get(options.memory)
        return None if known is None else str(known.kind)


def _add_lines(mos: MOS, memory: str, lines: Lines, given: Mapping[str, Any]) -> list[str]:
    stored = 0

    def count(done: int) -> None:
        nonlocal stored
        stored = done
        tell(done)

    items = ({**given, **item, **_both(given, item)} for item in lines)
    with console.progress(lines.name, lines.count) as tell:
        try:
            return [cube.id for cube in mos.add_many(memory, items, progress=count)]
        except MemosError as error:
            before = f"only the first {stored:,} lines are" if stored else "nothing is"
            raise ArgumentError(f"{lines.name}: {before} stored: {error}") from error


def _both(given: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the command and that of a line, which counts where both say something."""
    own = item.get("metadata")
    if "metadata" not in given or not isinstance(own, dict):
        return {"metadata": given["metadata"]} if own is None and "metadata" in given else {}
    return {"metadata": {**given["metadata"], **own}}


def _add_document(
    mos: MOS, options: argparse.Namespace, name: str, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    memory = mos.memory(options.memory)
    try:
        root = memory.add_document(Path(name), format=options.format, metadata=metadata)
    except MemosError as error:
        raise type(error)(f"{name} is not stored, files before it are: {error}") from error
    cubes = 1 + len(memory.descendants(root.id))
    return {"file": name, "ids": [root.id], "cubes": cubes}


def _content(options: argparse.Namespace) -> str:
    """The text that the command gives: its argument, a file, or standard input."""
    if options.file is not None:
        with _reading(Path(options.file)) as file:
            return file.read()
    if options.text == "-":
        return _stdin().removesuffix("\n").removesuffix("\r")
    return str(options.text)


def _parsed(content: str, kind: str) -> Any:
    if not content.strip():
        raise ArgumentError("content: something that is not empty wanted")
    if kind == "graph":
        return object_of("content of a graph memory", content)
    if kind == "vector" and content.lstrip()[0] in "[{":
        try:
            return _loads(content)
        except ValueError as error:
            raise ArgumentError(f"content of a vector memory: JSON wanted ({error})") from None
    return content


def _is_jsonl(name: str) -> bool:
    return Path(name).suffix.lower() in _JSONL


def _loads(text: str) -> Any:
    """JSON without NaN and infinity, which no other reader takes. Raises ValueError."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input: UTF-8 wanted ({error.reason})") from None


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """An open UTF-8 file; its line ends stay."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: UTF-8 wanted ({error.reason})") from None
