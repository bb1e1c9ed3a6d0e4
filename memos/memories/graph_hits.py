"""What the queries of a GraphMemory return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.cube import Hit, MemCube

if TYPE_CHECKING:
    from memos.records.graph import Edge
    from memos.records.walks import Reach


@dataclass(frozen=True)
class Neighbourhood:
    """A part of a graph.

    Args:
        nodes:         nearest first; the one that was asked for is the first.
        relationships: between these nodes, as they were reached.
        distances:     id of a node -> steps.
        is_truncated:  there was more within the depth.
    """

    nodes: tuple[MemCube, ...]
    relationships: tuple[MemCube, ...]
    distances: Mapping[str, int]
    is_truncated: bool


@dataclass(frozen=True)
class Path:
    """A way through a graph: one node more than relationships. ``len(path)`` counts the steps."""

    nodes: tuple[MemCube, ...]
    relationships: tuple[MemCube, ...]

    def __len__(self) -> int:
        return len(self.relationships)

    def __bool__(self) -> bool:  # a path of no steps is one
        return True


def hit_of(seq: int, walk: Reach, cubes: Mapping[int, MemCube], depth: int) -> Hit:
    """A matching node with what was reached from it; without steps its content as it is."""
    cube = cubes[seq]
    content = cube.content
    if depth:
        content = {**content, "relationships": _relationships(seq, walk, cubes)}
    reached = [cubes[other] for other in walk.distance if other != seq]
    edges = [cubes[edge.cube] for edge in walk.edges]
    trace = {
        "stage": "graph",
        "nodes": len(reached),
        "relationships": len(edges),
        "is_truncated": walk.is_truncated,
    }
    return Hit.of(cube, content=content, score=1.0, neighbours=(*reached, *edges), trace=(trace,))


def _relationships(start: int, walk: Reach, cubes: Mapping[int, MemCube]) -> list[dict[str, Any]]:
    """The walk as a tree: each relationship at the end it was reached from."""
    at: dict[int, list[Edge]] = {}
    for edge in walk.edges:
        at.setdefault(walk.near[edge.cube], []).append(edge)
    told: dict[int, list[dict[str, Any]]] = {seq: [] for seq in walk.distance}
    for seq in reversed(walk.distance):  # the furthest first: they hang below nearer ones
        for edge in at.get(seq, ()):
            far = edge.far(seq)
            node = {"id": cubes[far].id, **cubes[far].content}
            if walk.via.get(far) == edge and told[far]:
                node["relationships"] = told[far]
            content = cubes[edge.cube].content
            told[seq].append(
                {
                    "id": cubes[edge.cube].id,
                    "type": content["label"],
                    "source_id": content["source_id"],
                    "target_id": content["target_id"],
                    "properties": content["properties"],
                    "node": node,
                }
            )
    return told[start]
