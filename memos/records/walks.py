"""Walks over a graph whose relationships are read as they are needed, level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from memos.records.graph import Edge

MOST_EDGES = 200_000  # relationships of one level

# (nodes, at most so many) -> relationships at them, in order
Fetch = Callable[[Sequence[int], int], Sequence[Edge]]


class Adjacency:
    """Relationships by node, in order, read once. For one query: not thread-safe.

    Args:
        fetch:     reads the relationships at nodes.
        direction: which end of a relationship it leaves from: "out", "in" or "both".
    """

    def __init__(self, fetch: Fetch, direction: str) -> None:
        self._fetch, self._direction = fetch, direction
        self._edges: dict[int, list[Edge]] = {}
        self.is_truncated = False

    def __getitem__(self, seq: int) -> Sequence[Edge]:
        return self._edges[seq]

    def load(self, seqs: Iterable[int]) -> None:
        """Read the relationships at those of the nodes that are not known."""
        missing = sorted({seq for seq in seqs if seq not in self._edges})
        if not missing:
            return
        edges = self._fetch(missing, MOST_EDGES)
        self.is_truncated |= len(edges) >= MOST_EDGES
        new: dict[int, list[Edge]] = {seq: [] for seq in missing}
        for edge in edges:
            out = self._direction != "in" and edge.source in new
            if out:
                new[edge.source].append(edge)
            if (
                self._direction != "out"
                and edge.target in new
                and not (out and edge.target == edge.source)
            ):
                new[edge.target].append(edge)
        self._edges |= new


@dataclass
class Reach:
    """What a walk found.

    Args:
        distance:  node -> steps from the start, in the order of discovery.
        edges:     relationships between these nodes that were walked, in that order.
        near:      number of a relationship -> the node that it was walked from.
        via:       node -> the relationship that discovered it.
        is_truncated: there was more.
    """

    distance: dict[int, int] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    near: dict[int, int] = field(default_factory=dict)
    via: dict[int, Edge] = field(default_factory=dict)
    is_truncated: bool = False


def reach(adjacency: Adjacency, starts: Sequence[int], depth: int | None, most: int) -> Reach:
    """Breadth-first from the starts.

    Args:
        depth: steps; None: as far as it goes.
        most:  nodes, the starts among them.
    """
    found = Reach(distance=dict.fromkeys(starts, 0))
    frontier, steps = list(found.distance), 0
    while frontier and (depth is None or steps < depth):
        adjacency.load(frontier)
        steps += 1
        following: list[int] = []
        for seq in frontier:
            for edge in adjacency[seq]:
                if edge.cube in found.near:
                    continue
                far = edge.far(seq)
                if far not in found.distance:
                    if len(found.distance) >= most:
                        found.is_truncated = True
                        continue
                    found.distance[far], found.via[far] = steps, edge
                    following.append(far)
                found.near[edge.cube] = seq
                found.edges.append(edge)
        frontier = following
    found.is_truncated |= adjacency.is_truncated
    return found


class TooLargeError(Exception):
    """A search visited as many nodes as it may."""


def shortest_path(
    forward: Adjacency, backward: Adjacency, a: int, b: int, max_depth: int, most: int
) -> tuple[list[int], list[Edge]] | None:
    """Nodes and relationships of a shortest path from a to b; None: there is none.

    Breadth-first from both ends, the smaller frontier first. Of several shortest paths always
    the same one.

    Raises TooLargeError after ``most`` nodes.
    """
    if a == b:
        return [a], []
    sides = (forward, backward)
    distance: tuple[dict[int, int], dict[int, int]] = ({a: 0}, {b: 0})
    via: tuple[dict[int, Edge], dict[int, Edge]] = ({}, {})
    frontiers = [[a], [b]]
    for _ in range(max_depth):
        side = 0 if len(frontiers[0]) <= len(frontiers[1]) else 1
        here, there = distance[side], distance[1 - side]
        sides[side].load(frontiers[side])
        if sides[side].is_truncated or len(here) + len(there) > most:
            raise TooLargeError
        following: list[int] = []
        for seq in frontiers[side]:
            for edge in sides[side][seq]:
                far = edge.far(seq)
                if far not in here:
                    here[far], via[side][far] = here[seq] + 1, edge
                    following.append(far)
        meeting = [seq for seq in following if seq in there]
        if meeting:
            # Had they met before, they would have been here: all are equally far.
            return _joined(via, min(meeting), a, b)
        if not following:
            return None
        frontiers[side] = following
    return None


def _joined(
    via: Sequence[Mapping[int, Edge]], middle: int, a: int, b: int
) -> tuple[list[int], list[Edge]]:
    nodes, edges = [middle], list[Edge]()
    seq = middle
    while seq != a:
        edge = via[0][seq]
        seq = edge.far(seq)
        nodes.insert(0, seq)
        edges.insert(0, edge)
    seq = middle
    while seq != b:
        edge = via[1][seq]
        seq = edge.far(seq)
        nodes.append(seq)
        edges.append(edge)
    return nodes, edges


def pagerank(
    adjacency: Adjacency,
    seeds: Mapping[int, float],
    *,
    direction: str,
    damping: float,
    tolerance: float,
    max_iterations: int,
    most: int,
) -> list[tuple[int, float]]:
    """Personalised PageRank over what the seeds reach, best first.

    Args:
        seeds:     node -> share of the restarts, above 0.
        direction: of a step along a relationship: "out", "in" or "both".
        damping:   probability of a step; else the walk starts again at a seed.
        tolerance: sum of the absolute changes at which the iteration ends.
        most:      nodes, nearest first; relationships to further ones are not there.

    Cost: one pass over the relationships per iteration.
    Source: Page, Brin, Motwani and Winograd, "The PageRank citation ranking" (1999); the weight
    of nodes without a way out goes back to the seeds.
    """
    found = reach(adjacency, sorted(seeds), None, most)
    seqs = numpy.array(sorted(found.distance), numpy.int64)
    place = {int(seq): i for i, seq in enumerate(seqs)}
    source, target, weight = _arrays(found.edges, place, direction)
    out = numpy.bincount(source, weight, len(seqs))
    restart = numpy.zeros(len(seqs))
    for seq, share in seeds.items():
        restart[place[seq]] = share
    restart /= restart.sum()
    step = numpy.divide(weight, out[source], out=numpy.zeros(len(weight)), where=out[source] > 0)
    rank = restart.copy()
    for _ in range(max_iterations):
        moved = numpy.bincount(target, rank[source] * step, len(seqs))
        lost = rank[out == 0].sum()
        new = (1 - damping) * restart + damping * (moved + lost * restart)
        change = numpy.abs(new - rank).sum()
        rank = new
        if change < tolerance:
            break
    order = numpy.lexsort((seqs, -rank))
    return [(int(seqs[i]), float(rank[i])) for i in order]


def _arrays(edges: Sequence[Edge], place: Mapping[int, int], direction: str) -> Any:
    source = numpy.array([place[edge.source] for edge in edges], numpy.int64)
    target = numpy.array([place[edge.target] for edge in edges], numpy.int64)
    weight = numpy.array([edge.weight for edge in edges], numpy.float64)
    weight /= weight.max(initial=1.0)  # sums of the largest stay finite
    if direction == "in":
        return target, source, weight
    if direction == "both":  # a loop is one way, not two
        back = source != target
        return (
            numpy.concatenate([source, target[back]]),
            numpy.concatenate([target, source[back]]),
            numpy.concatenate([weight, weight[back]]),
        )
    return source, target, weight
