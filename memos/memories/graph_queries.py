"""The queries of a GraphMemory: what fits, what is near, how it is linked, what matters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memos.cube import Hit, MemCube
from memos.errors import ArgumentError, NotFoundError
from memos.memories.declarative import DeclarativeMemory
from memos.memories.graph_content import (
    MAX_DEPTH,
    Query,
    checked_count,
    checked_direction,
    checked_match,
    checked_query,
    checked_types,
)
from memos.memories.graph_hits import Neighbourhood, Path, hit_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.graph import Edge, SqliteGraph, Structure
    from memos.records.outbox import Mirror
    from memos.records.scope import Scope
    from memos.records.walks import Adjacency

_PATH_NODES = 200_000  # visited by one search for a path


class GraphQueries(DeclarativeMemory):
    """The half of a GraphMemory that reads. Thread-safe once registered."""

    _mirror: Mirror | None = None
    _local: SqliteGraph | None = None
    _structure: Structure | None = None

    def lookup(self, query: Any, limit: int, scope: Scope) -> list[Hit]:
        """Nodes by label, properties or id, and what they are linked to.

        Args:
            query: {"node": {"label" or "labels", "properties", "id"}, "relationships": types,
                "depth": steps (1 where relationships or a direction are given, else 0),
                "direction": "out", "in" or "both" (default), "max_nodes": of one hit (1000)}.
            limit: matching nodes.

        Returns:
            The matching nodes, oldest first. Each one's content also has "relationships":
            [{"id", "type", "source_id", "target_id", "properties", "node": {...}}], where the
            node has its own "relationships" while there is depth left. Every relationship and
            every node beyond is told once, at its nearest place. ``neighbours`` has the cubes
            of the nodes reached, nearest first, then those of the relationships.
        """
        from memos.records.walks import reach

        asked = checked_query(query, self.name)
        with self._reading() as (connection, structure):
            found = self._matching(connection, structure, asked, scope, limit)
            adjacency = self._adjacency(connection, structure, asked.types, asked.direction, scope)
            if len(found) > 1:  # the first steps of all hits together
                reach(adjacency, found, asked.depth, asked.max_nodes * len(found))
            reached = [reach(adjacency, [s], asked.depth, asked.max_nodes) for s in found]
            wanted = {seq for walk in reached for seq in walk.distance}
            wanted |= {edge.cube for walk in reached for edge in walk.edges}
            cubes = self.table.load(connection, sorted(wanted), scope)
        return [
            hit_of(seq, walk, cubes, asked.depth) for seq, walk in zip(found, reached, strict=True)
        ]

    def nodes(
        self,
        label: str | None = None,
        properties: Mapping[str, Any] | None = None,
        limit: int = 100,
        *,
        filters: Mapping[str, Any] | None = None,
    ) -> list[MemCube]:
        """Nodes with this label and these properties, oldest first."""
        from memos.records.graph import Wanted

        labels, wanted = checked_match(label, properties)
        scope = self.scope(filters)
        with self._reading() as (connection, structure):
            limit = checked_count("limit", limit, 0)
            seqs = structure.find(connection, Wanted(labels, wanted), scope, limit)
            cubes = self.table.load(connection, seqs, scope)
        return [cubes[seq] for seq in seqs]

    def neighbourhood(
        self,
        id: str,
        depth: int = 1,
        types: Sequence[str] | None = None,
        direction: str = "both",
        limit: int = 1000,
        *,
        filters: Mapping[str, Any] | None = None,
    ) -> Neighbourhood:
        """What a node is linked to within some steps.

        Args:
            depth: steps, 0 to 10.
            types: of the relationships; None: all.
            limit: nodes.

        Raises NotFoundError, ArgumentError.
        Cost: one indexed read of the relationships per step and 500 nodes.
        """
        from memos.records.walks import reach

        depth = checked_count("depth", depth, 0, MAX_DEPTH)
        limit = checked_count("limit", limit, 1)
        kinds, scope = checked_types(types, "types"), self.scope(filters)
        with self._reading() as (connection, structure):
            start = self._node(connection, id, scope)
            adjacency = self._adjacency(connection, structure, kinds, direction, scope)
            walk = reach(adjacency, [start], depth, limit)
            edges = [edge.cube for edge in walk.edges]
            cubes = self.table.load(connection, [*walk.distance, *edges], scope)
        return Neighbourhood(
            nodes=tuple(cubes[seq] for seq in walk.distance),
            relationships=tuple(cubes[seq] for seq in edges),
            distances={cubes[seq].id: steps for seq, steps in walk.distance.items()},
            is_truncated=walk.is_truncated,
        )

    def shortest_path(
        self,
        a: str,
        b: str,
        types: Sequence[str] | None = None,
        direction: str = "both",
        max_depth: int = 10,
        *,
        filters: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """A path of the fewest steps from one node to another; None: there is none so short.

        Raises:
            NotFoundError: an end is unknown.
            ArgumentError: also when the search grows beyond 200,000 nodes.
        """
        from memos.records.walks import TooLargeError, shortest_path

        max_depth = checked_count("max_depth", max_depth, 0)
        kinds, scope = checked_types(types, "types"), self.scope(filters)
        direction = checked_direction(direction)
        against = {"out": "in", "in": "out", "both": "both"}[direction]
        with self._reading() as (connection, structure):
            ends = [self._node(connection, id, scope) for id in (a, b)]
            forward = self._adjacency(connection, structure, kinds, direction, scope)
            backward = self._adjacency(connection, structure, kinds, against, scope)
            try:
                found = shortest_path(forward, backward, ends[0], ends[1], max_depth, _PATH_NODES)
            except TooLargeError:
                raise ArgumentError(
                    f"max_depth: from {a!r} to {b!r} more than {_PATH_NODES:,} nodes lie within "
                    f"{max_depth} steps; a smaller depth or fewer types wanted"
                ) from None
            if found is None:
                return None
            nodes, edges = found
            cubes = self.table.load(connection, [*nodes, *(e.cube for e in edges)], scope)
        return Path(tuple(cubes[seq] for seq in nodes), tuple(cubes[edge.cube] for edge in edges))

    def pagerank(
        self,
        seeds: Sequence[str] | Mapping[str, float],
        *,
        types: Sequence[str] | None = None,
        direction: str = "both",
        damping: float = 0.85,
        limit: int = 20,
        max_nodes: int = 10_000,
        max_iterations: int = 100,
        tolerance: float = 1e-9,
        filters: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """Nodes by how often a walk that starts again at the seeds comes by.

        Args:
            seeds:     ids, or id -> weight above 0.
            direction: of a step along a relationship; its property "weight" counts.
            damping:   probability of a step, 0 to below 1.
            limit:     hits.
            max_nodes: read, nearest to the seeds first.

        Returns:
            Hits with ``score``; the scores of all nodes together are 1.

        Cost: the relationships of max_nodes nodes are read; then one pass per iteration.
        Source: Page, Brin, Motwani and Winograd, "The PageRank citation ranking" (1999).
        """
        from memos.records.walks import pagerank

        weights = _seeds(seeds)
        if not isinstance(damping, int | float) or not 0 <= damping < 1:
            raise ArgumentError(f"damping: a number from 0 to below 1 wanted, got {damping!r}")
        kinds, scope = checked_types(types, "types"), self.scope(filters)
        limit = checked_count("limit", limit, 0)
        with self._reading() as (connection, structure):
            start = {self._node(connection, id, scope): w for id, w in weights.items()}
            found = pagerank(
                self._adjacency(connection, structure, kinds, direction, scope),
                start,
                direction=direction,
                damping=damping,
                tolerance=tolerance,
                max_iterations=checked_count("max_iterations", max_iterations, 1),
                most=checked_count("max_nodes", max_nodes, 1),
            )
            scores = [(seq, score) for seq, score in found[:limit] if score > 0]
            cubes = self.table.load(connection, [seq for seq, _ in scores], scope)
        trace = ({"stage": "pagerank", "seeds": len(weights)},)
        return [Hit.of(cubes[seq], score=score, trace=trace) for seq, score in scores]

    def degree(
        self,
        id: str,
        types: Sequence[str] | None = None,
        direction: str = "both",
        *,
        filters: Mapping[str, Any] | None = None,
    ) -> int:
        """How many relationships a node has; one to itself counts once."""
        direction = checked_direction(direction)
        kinds, scope = checked_types(types, "types"), self.scope(filters)
        total = after = 0
        with self._reading() as (connection, structure):
            seq = self._node(connection, id, scope)
            while True:
                page = structure.edges(connection, [seq], kinds, direction, scope, 10_000, after)
                total += len(page)
                if len(page) < 10_000:
                    return total
                after = page[-1].cube

    # Inside.

    @property
    def _graph(self) -> SqliteGraph:
        self.records  # noqa: B018 - says what is missing
        assert self._local is not None
        return self._local

    @contextmanager
    def _reading(self) -> Iterator[tuple[Connection, Structure]]:
        """One state of the store, and who answers; a server knows of every write before it."""
        self.records  # noqa: B018 - says what is missing
        if self._mirror is not None:
            self._mirror.later()
        assert self._structure is not None
        with self.records.database.read() as connection:
            yield connection, self._structure

    def _adjacency(
        self,
        connection: Connection,
        structure: Structure,
        types: Sequence[str] | None,
        direction: str,
        scope: Scope,
    ) -> Adjacency:
        from memos.records.walks import Adjacency

        direction = checked_direction(direction)

        def fetch(seqs: Sequence[int], limit: int) -> Sequence[Edge]:
            return structure.edges(connection, seqs, types, direction, scope, limit)

        return Adjacency(fetch, direction)

    def _matching(
        self, connection: Connection, structure: Structure, asked: Query, scope: Scope, limit: int
    ) -> list[int]:
        from memos.records.graph import Wanted

        limit = checked_count("limit", limit, 0)
        wanted = Wanted(asked.labels, asked.properties)
        if asked.id is None:
            return structure.find(connection, wanted, scope, limit)
        found = self._graph.ends(connection, [asked.id], scope).values()
        return [seq for seq, content in found if wanted.fits(content)][:limit]

    def _node(self, connection: Connection, id: str, scope: Scope) -> int:
        found = self._graph.ends(connection, [id], scope)
        if id not in found:
            raise NotFoundError(f"memory {self.name!r}: no node {id!r}")
        return int(found[id][0])


def _seeds(seeds: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(seeds, str):
        seeds = [seeds]
    weights = dict(seeds) if isinstance(seeds, Mapping) else dict.fromkeys(seeds, 1.0)
    if not weights:
        raise ArgumentError("seeds: at least one node wanted")
    for id, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ArgumentError(f"seeds[{id!r}]: a weight above 0 wanted, got {weight!r}")
    return weights
