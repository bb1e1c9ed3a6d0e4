"""memos tree and memos graph."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.commands import console, folder
from memos.commands.read import NOTHING
from memos.commands.write import object_of
from memos.cube import Hit, MemCube
from memos.errors import ArgumentError
from memos.memories.graph_content import name_of

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from memos.memories.graph_hits import Neighbourhood
    from memos.mos import MOS

_LEVELS = 12  # drawn below the first; deeper ones would leave no room for their text


def tree(options: argparse.Namespace) -> int:
    """Documents, or one cube, with what is below."""
    with folder.opened(options) as mos:
        memory = _of_kind(mos, options.memory, "tree")
        tops = memory.roots() if options.id is None else [memory.get(options.id)]
        below = {top.id: memory.descendants(top.id, options.depth) for top in tops}
    rows: list[tuple[int, MemCube]] = []  # (depth, cube) in document order
    for top in tops:
        rows.append((0, top))
        depths = {top.id: 0}
        for cube in below[top.id]:
            depths[cube.id] = depths.get(cube.parent_id or "", 0) + 1
            rows.append((depths[cube.id], cube))
    if options.json:
        cubes = [{**console.cube_json(cube), "depth": depth} for depth, cube in rows]
        console.write_json({"memory": options.memory, "cubes": cubes})
        return 0
    if not rows:
        console.complain(f"memory {options.memory!r} is empty")
    width = console.console().width
    for group in _groups(rows):
        console.show(_drawn(group, width, ids=options.ids))
    return 0


def graph(options: argparse.Namespace) -> int:
    """What a node is linked to, or what a structured query finds."""
    with folder.opened(options) as mos:
        memory = _of_kind(mos, options.memory, "graph")
        if options.query is not None:
            query = object_of("--query", options.query)
            hits = mos.retrieve(options.memory, query, options.limit)
            return _show_hits(hits, as_json=options.json)
        found = memory.neighbourhood(
            options.id, options.depth, options.type, options.direction, options.limit
        )
    if options.json:
        console.write_json(
            {
                "nodes": [
                    {**console.cube_json(node), "distance": found.distances[node.id]}
                    for node in found.nodes
                ],
                "relationships": [console.cube_json(edge) for edge in found.relationships],
                "is_truncated": found.is_truncated,
            }
        )
        return 0
    console.show(_neighbours(found))
    if found.is_truncated:
        console.complain(f"there is more within the depth; -n {options.limit} was the limit")
    return 0


def _of_kind(mos: MOS, name: str, kind: str) -> Any:
    memory = mos.memory(name)
    if memory.kind != kind:
        raise ArgumentError(f"memory {name!r}: one of kind {kind} wanted, got {memory.kind}")
    return memory


# Trees.


def _groups(rows: Sequence[tuple[int, MemCube]]) -> list[list[tuple[int, MemCube]]]:
    """The rows of one document each."""
    groups: list[list[tuple[int, MemCube]]] = []
    for depth, cube in rows:
        if depth == 0:
            groups.append([])
        groups[-1].append((depth, cube))
    return groups


def _drawn(rows: Sequence[tuple[int, MemCube]], width: int, *, ids: bool) -> Tree:
    from rich.tree import Tree

    branches: list[Tree] = []
    hidden = 0
    for depth, cube in rows:
        if depth > _LEVELS:
            hidden += 1
            continue
        with_id = ids or depth == 0
        room = width - 4 * depth - (len(cube.id) + 2 if with_id else 0)
        label = console.text(console.one_line(console.describe(cube), max(room, 20)))
        if with_id:
            label.append("  " + console.safe(cube.id), style="dim")
        branch = branches[depth - 1].add(label) if depth else Tree(label)
        branches[depth:] = [branch]
    if hidden:
        branches[0].add(console.text(f"... {hidden:,} more, deeper than is drawn", "dim"))
    return branches[0]


# Graphs.


def _show_hits(hits: Sequence[Hit], *, as_json: bool) -> int:
    if as_json:
        console.write_json({"hits": [console.hit_json(hit) for hit in hits]})
    elif not hits:
        console.complain("nothing found")
    else:
        console.show(*(_told(hit) for hit in hits))
    return 0 if hits else NOTHING


def _told(hit: Hit) -> Tree:
    """A hit with the relationships that its content tells."""
    from rich.tree import Tree

    def grow(branch: Tree, node: Mapping[str, Any], id: str) -> None:
        for edge in node.get("relationships", ()):
            far = edge["node"]
            leaf = branch.add(_edge(edge["type"], edge["source_id"] == id, far, far["id"]))
            grow(leaf, far, far["id"])

    top = Tree(_node(hit.content, hit.id))
    grow(top, hit.content, hit.id)
    return top


def _neighbours(found: Neighbourhood) -> Tree:
    """The nodes, each below the nearer one through which it was reached."""
    from rich.tree import Tree

    nodes = {node.id: node.content for node in found.nodes}
    start = found.nodes[0].id
    branches = {start: Tree(_node(nodes[start], start))}

    def distance(edge: MemCube) -> int:
        return min(found.distances[edge.content[end]] for end in ("source_id", "target_id"))

    for edge in sorted(found.relationships, key=distance):
        source, target = edge.content["source_id"], edge.content["target_id"]
        goes_out = found.distances[source] <= found.distances[target]
        near, far = (source, target) if goes_out else (target, source)
        leaf = branches[near].add(_edge(edge.content["label"], goes_out, nodes[far], far))
        branches.setdefault(far, leaf)
    return branches[start]


def _edge(type: str, goes_out: bool, far: Mapping[str, Any], id: str) -> Text:
    label = console.text(f"-{type}-> " if goes_out else f"<-{type}- ", "bold")
    label.append_text(_node(far, id))
    return label


def _node(content: Mapping[str, Any], id: str) -> Text:
    labels = content.get("labels") or [content["label"]]
    label = console.text(console.one_line(name_of(content, id), 60))
    label.append(f" ({console.safe(', '.join(labels))})")
    if name_of(content, id) != id:
        label.append("  " + console.safe(id), style="dim")
    return label
