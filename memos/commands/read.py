"""memos search, context, show, history, export-text and stats."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.commands import console, folder
from memos.commands.write import object_of
from memos.cube import Hit, MemCube
from memos.errors import ArgumentError

if TYPE_CHECKING:
    from rich.table import Table

    from memos.retrieval import Explanation
    from memos.retrieval.candidates import Signal

NOTHING = 3  # exit code: no error, and nothing found
_LINES = 3  # of a cube in a table


def search(options: argparse.Namespace) -> int:
    """What fits a query, best first."""
    filters = None if options.filter is None else object_of("--filter", options.filter)
    with folder.opened(options) as mos:
        query: Any = options.query
        if options.memory is not None and mos.memory(options.memory).kind == "vector":
            query = _vector(query)
        hits = mos.retrieve(
            options.memory,
            query,
            options.limit,
            filters=filters,
            include_ancestors=options.ancestors,
            include_archived=options.archived,
        )
        why = mos.explain(hits) if options.explain else None
    if options.json:
        found = [console.hit_json(hit, ancestors=options.ancestors) for hit in hits]
        if why is not None:
            for one, because in zip(found, why.hits, strict=True):
                one["explanation"] = {
                    "stages": [
                        {"stage": s.stage, "candidates": s.candidates, "ms": s.ms}
                        for s in because.stages
                    ],
                    "signals": [_signal(s) for s in because.signals],
                }
        console.write_json({"query": options.query, "hits": found})
    elif hits:
        console.show(_hits(hits, why))
        if why is not None and why.hits[0].stages:
            stages = (f"{s.stage} {s.candidates} ({s.ms:.1f} ms)" for s in why.hits[0].stages)
            console.show(console.text(f"{hits[0].memory}: " + " -> ".join(stages)))
    else:
        console.complain("nothing found")
    return 0 if hits else NOTHING


def context(options: argparse.Namespace) -> int:
    """Text for a prompt, with its sources."""
    filters = None if options.filter is None else object_of("--filter", options.filter)
    with folder.opened(options) as mos:
        found = mos.context(
            options.query,
            options.budget,
            options.memory or None,
            limit=options.limit,
            filters=filters,
        )
    if options.json:
        console.write_json(
            {
                "query": found.query,
                "text": found.text,
                "tokens": found.tokens,
                "citations": [dataclasses.asdict(citation) for citation in found.citations],
                "left_out": [{"id": id, "why": why} for id, why in found.left_out],
            }
        )
    elif found.text:
        console.write_text(found.text + "\n")
    else:
        console.complain("nothing found that fits the budget" if found.hits else "nothing found")
    return 0 if found.text else NOTHING


def show(options: argparse.Namespace) -> int:
    """One cube with everything known of it."""
    with folder.opened(options) as mos:
        cube = mos.get(options.id, options.memory)
    if options.json:
        console.write_json(console.cube_json(cube))
        return 0
    table = _table("field", "value")
    for name, value in _fields(cube):
        table.add_row(name, console.text(value, keep="\n"))
    console.show(table)
    return 0


def history(options: argparse.Namespace) -> int:
    """Every version of a cube, oldest first."""
    with folder.opened(options) as mos:
        versions = mos.history(options.id, options.memory)
    if options.json:
        console.write_json(
            {"id": options.id, "versions": [dataclasses.asdict(version) for version in versions]}
        )
        return 0
    table = _table("version", "when", "state", "author", "content", "metadata")
    for version in versions:
        cube = MemCube(options.id, _kind_of(version.content), version.content)
        metadata = json.dumps(version.metadata, ensure_ascii=False) if version.metadata else ""
        table.add_row(
            str(version.number),
            console.when(version.at),
            console.text(version.state),
            console.text(version.author or ""),
            console.text(console.one_line(console.describe(cube), 200)),
            console.text(console.one_line(metadata, 200)),
        )
    console.show(table)
    return 0


def export_text(options: argparse.Namespace) -> int:
    """Documents, or the texts of a memory, as they were imported or changed since."""
    with folder.opened(options) as mos:
        memory = mos.memory(options.memory)
        if memory.kind not in ("text", "tree"):
            raise ArgumentError(
                f"memory {options.memory!r}: one of kind text or tree wanted, got {memory.kind}"
            )
        if memory.kind == "tree":
            ids = [cube.id for cube in memory.roots()] if options.id is None else [options.id]
            texts = [(id, memory.export_text(id)) for id in ids]
        elif options.id is not None:
            texts = [(options.id, memory.get(options.id).content)]
        else:
            texts = [(cube.id, cube.content) for cube in reversed(memory.cubes(None))]
    if options.json:
        documents = [{"id": id, "text": text} for id, text in texts]
        console.write_json({"memory": options.memory, "documents": documents})
        return 0
    text = "\n".join(text if text.endswith("\n") else text + "\n" for _, text in texts)
    if options.output is None:
        console.write_text(text)
    else:
        Path(options.output).write_bytes(text.encode())
    return 0


def stats(options: argparse.Namespace) -> int:
    """What the folder holds."""
    path, _ = folder.folder_of(options)
    with folder.opened(options) as mos:
        found = mos.stats()
    if options.json:
        console.write_json({"store": path, **found})
        return 0
    table = _table("memory", "kind", "cubes", "vectors")
    for name, memory in found["memories"].items():
        numbers = (f"{memory.get(key, 0):,}" for key in ("cubes", "vectors"))
        table.add_row(console.text(name), console.text(memory["kind"]), *numbers)
    console.show(table)
    sys.stdout.write(f"{console.safe(path)}: {found['bytes'] / 1e6:,.1f} MB\n")
    return 0


# Inside.


def _signal(signal: Signal) -> dict[str, Any]:
    return {name: getattr(signal, name) for name in ("name", "value", "weight", "adds")}


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _hits(hits: Sequence[Hit], why: Explanation | None) -> Table:
    from rich.text import Text

    table = _table("score", "memory", "cube")
    width = max(console.console().width - 30, 20)
    for i, hit in enumerate(hits):
        cell = Text(overflow="fold")
        above = " > ".join(
            console.one_line(console.describe(cube), 60) for cube in reversed(hit.ancestors)
        )
        if above:
            cell.append(above + "\n", style="dim")
        cell.append(console.one_line(console.describe(hit), _LINES * width) + "\n")
        cell.append(console.safe(hit.id), style="dim")
        if why is not None:
            for signal in why.hits[i].signals:
                line = f"{signal.name} {signal.value:.3f} * {signal.weight:.2f} = {signal.adds:.3f}"
                cell.append(f"\n  {console.safe(line)}", style="dim")
        table.add_row(f"{hit.score:.3f}", console.text(hit.memory), cell)
    return table


def _fields(cube: MemCube) -> list[tuple[str, str]]:
    """Names and values of a cube as a person reads them; what is not said is left out."""
    found = [("id", cube.id), ("memory", cube.memory), ("kind", cube.kind)]
    found.append(("content", console.describe(cube)))
    if cube.kind in ("node", "relationship"):
        found.append(("", json.dumps(cube.content, ensure_ascii=False, indent=2)))
    if cube.metadata:
        found.append(("metadata", json.dumps(cube.metadata, ensure_ascii=False, indent=2)))
    for edge in cube.relations:
        arrow = "->" if edge.outgoing else "<-"
        found.append(("relation", f"{arrow} {edge.type} {edge.target} (weight {edge.weight:g})"))
    found += [("state", cube.state), ("importance", f"{cube.importance:g}")]
    found += [("versions", str(cube.versions)), ("created", console.when(cube.created_at))]
    if cube.versions > 1:
        found.append(("updated", console.when(cube.updated_at)))
    if cube.expires_at is not None:
        found.append(("expires", console.when(cube.expires_at)))
    named = {"parent": cube.parent_id, "source": cube.source, "creator": cube.creator}
    found += [(name, value) for name, value in named.items() if value is not None]
    if cube.derived_from:
        found.append(("derived from", ", ".join(cube.derived_from)))
    if cube.acl is not None:
        found.append(("acl", json.dumps(cube.acl)))
    return found


def _kind_of(content: Any) -> str:
    return str(content.get("type", "")) if isinstance(content, dict) else ""


def _vector(query: str) -> Any:
    """The numbers of a query that is a JSON list; any other query is text."""
    if not query.lstrip().startswith("["):
        return query
    try:
        return json.loads(query)
    except ValueError as error:
        raise ArgumentError(f"QUERY: text or a JSON list of numbers wanted ({error})") from None
