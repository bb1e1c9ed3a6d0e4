"""A graph as plain Python dicts, and random histories that a GraphMemory and it go through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
from hypothesis import strategies as st

from memos.cube.identity import canonical
from memos.memories.graph import GraphMemory
from memos.records.check import check

from .bolt_server import Graphs

LABELS = ("Disease", "Symptom", "disease", "Médecin_1")
TYPES = ("HAS", "Causes", "_x")


def equal(a: Any, b: Any) -> bool:
    """JSON equality: 1 is 1.0, but neither is true."""

    def tagged(value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return ("fixed", value)
        if isinstance(value, dict):
            return {key: tagged(inner) for key, inner in value.items()}
        return [tagged(inner) for inner in value] if isinstance(value, list) else value

    return bool(tagged(a) == tagged(b))


@dataclass
class Thing:
    content: dict[str, Any]
    team: str
    until: float

    @property
    def labels(self) -> list[str]:
        one = self.content.get("label")
        return self.content["labels"] if one is None else [one]


@dataclass
class Model:
    """Dicts keep the order of insertion, which is the order of every answer."""

    nodes: dict[str, Thing] = field(default_factory=dict)
    edges: dict[str, Thing] = field(default_factory=dict)
    now: float = 1000.0

    def seen(self, thing: Thing, team: str | None) -> bool:
        return thing.until > self.now and team in (None, thing.team)

    def see(self, team: str | None) -> tuple[dict[str, Thing], dict[str, Thing]]:
        nodes = {id: node for id, node in self.nodes.items() if self.seen(node, team)}
        edges = {
            id: edge
            for id, edge in self.edges.items()
            if self.seen(edge, team)
            and edge.content["source_id"] in nodes
            and edge.content["target_id"] in nodes
        }
        return nodes, edges

    def delete(self, id: str) -> None:
        self.edges.pop(id, None)
        if self.nodes.pop(id, None) is not None:
            for edge in list(self.edges):
                if id in self.ends(edge):
                    del self.edges[edge]

    def expire(self) -> None:
        for id, thing in [*self.nodes.items(), *self.edges.items()]:
            if thing.until <= self.now:
                self.delete(id)

    def ends(self, edge: str) -> tuple[str, str]:
        content = self.edges[edge].content
        return content["source_id"], content["target_id"]

    def find(self, labels: list[str], properties: Mapping[str, Any], team: str | None) -> list[str]:
        def fits(have: Any, want: Any) -> bool:
            inside = isinstance(have, list) and not isinstance(want, list | dict)
            return equal(have, want) or (inside and any(equal(item, want) for item in have))

        return [
            id
            for id, node in self.see(team)[0].items()
            if set(labels) <= set(node.labels)
            and all(
                key in node.content["properties"] and fits(node.content["properties"][key], value)
                for key, value in properties.items()
            )
        ]

    def steps(
        self, id: str, types: list[str] | None, direction: str, team: str | None
    ) -> list[tuple[str, str]]:
        """(relationship, node at its other end)."""
        found = []
        for edge, thing in self.see(team)[1].items():
            source, target = self.ends(edge)
            if types is not None and thing.content["label"] not in types:
                continue
            if direction != "in" and source == id:
                found.append((edge, target))
            elif direction != "out" and target == id:
                found.append((edge, source))
        return found

    def near(
        self, id: str, depth: int, types: list[str] | None, direction: str, team: str | None
    ) -> tuple[dict[str, int], set[str]]:
        distance, edges, frontier = {id: 0}, set(), [id]
        for step in range(1, depth + 1):
            following = []
            for node in frontier:
                for edge, far in self.steps(node, types, direction, team):
                    edges.add(edge)
                    if far not in distance:
                        distance[far] = step
                        following.append(far)
            frontier = following
        return distance, edges

    def rank(self, seed: str, direction: str, team: str | None, damping: float) -> dict[str, float]:
        """PageRank as the solution of its linear equations."""
        nodes = list(self.see(team)[0])
        place = {id: i for i, id in enumerate(nodes)}
        step = numpy.zeros((len(nodes), len(nodes)))
        for id in nodes:
            for edge, far in self.steps(id, None, direction, team):
                weight = self.edges[edge].content["properties"].get("weight")
                plain = isinstance(weight, int | float) and not isinstance(weight, bool)
                strength = float(weight) if plain and weight > 0 else 1.0
                step[place[far], place[id]] += strength
        restart = numpy.zeros(len(nodes))
        restart[place[seed]] = 1
        out = step.sum(0)
        step[:, out == 0] = restart[:, None]
        out[out == 0] = 1
        matrix = numpy.eye(len(nodes)) - damping * step / out
        scores = numpy.linalg.solve(matrix, (1 - damping) * restart)
        return {id: float(scores[place[id]]) for id in nodes}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 2**70, -(2**63), 1.0, 2.5, 1e300, "", "a", "b", "1", "ü"]),
    st.lists(st.sampled_from([1, 2.5, "a", "b", True, None, 1.0]), max_size=3),
    st.lists(st.sampled_from(["a", "b"]), max_size=2),
    st.sampled_from([{}, {"x": 1}, {"x": [1, "a"]}, [[1]], [{"x": "a"}]]),
)
PROPERTIES = st.dictionaries(
    st.sampled_from(["name", "weight", "odd key", "memos_key", "memos_json", "out", "a.b", ""]),
    VALUES,
    max_size=3,
)
NODE = st.one_of(
    st.builds(
        lambda label, p: {"type": "node", "label": label, "properties": p},
        st.sampled_from(LABELS),
        PROPERTIES,
    ),
    st.builds(
        lambda labels, p: {"type": "node", "labels": labels, "properties": p},
        st.lists(st.sampled_from(LABELS), min_size=2, max_size=3, unique=True),
        PROPERTIES,
    ),
)
TEAM = st.sampled_from(["a", "a", "b"])
FILTER = st.sampled_from([None, None, "a", "b"])
TTL = st.sampled_from([math.inf, math.inf, math.inf, 1.5])
DIRECTION = st.sampled_from(["out", "in", "both"])
KINDS = st.sampled_from([None, None, ["HAS"], ["HAS", "_x"], ["Nowhere"]])
PICK = st.integers(0, 99)
OPERATIONS = st.one_of(
    st.tuples(st.just("node"), NODE, TEAM, TTL),
    st.tuples(st.just("node"), NODE, TEAM, TTL),
    st.tuples(st.just("edge"), st.sampled_from(TYPES), PICK, PICK, PROPERTIES, TEAM, TTL),
    st.tuples(st.just("edge"), st.sampled_from(TYPES), PICK, PICK, PROPERTIES, TEAM, TTL),
    st.tuples(st.just("edge"), st.sampled_from(TYPES), PICK, PICK, PROPERTIES, TEAM, TTL),
    st.tuples(st.just("change node"), PICK, NODE),
    st.tuples(st.just("change edge"), PICK, PROPERTIES),
    st.tuples(st.just("metadata"), PICK, TEAM),
    st.tuples(st.just("delete"), PICK),
    st.tuples(st.just("later"), st.booleans()),
    st.tuples(st.just("find"), NODE, PICK, FILTER),
    st.tuples(st.just("near"), PICK, st.integers(0, 3), KINDS, DIRECTION, FILTER),
    st.tuples(st.just("path"), PICK, PICK, st.integers(0, 4), KINDS, DIRECTION, FILTER),
    st.tuples(st.just("rank"), PICK, DIRECTION, FILTER),
)


START = st.tuples(
    st.lists(st.tuples(st.just("node"), NODE, TEAM, TTL), min_size=3, max_size=6),
    st.lists(
        st.tuples(st.just("edge"), st.sampled_from(TYPES), PICK, PICK, PROPERTIES, TEAM, TTL),
        min_size=3,
        max_size=9,
    ),
).map(lambda parts: [*parts[0], *parts[1]])


class Twin:
    """A memory and its model, taken through the same operations and compared."""

    def __init__(self, memory: GraphMemory, model: Model) -> None:
        self.memory, self.model = memory, model

    def go(self, operations: list[Any]) -> None:
        for name, *given in operations:
            getattr(self, name.replace(" ", "_"))(*given)

    # Changes.

    def node(self, content: dict[str, Any], team: str, ttl: float) -> None:
        cube = self._add(content, team, ttl)
        self.model.nodes[cube.id] = Thing(content, team, self.model.now + ttl)

    def edge(
        self, label: str, a: int, b: int, properties: dict[str, Any], team: str, ttl: float
    ) -> None:
        nodes = list(self.model.see(None)[0])
        if not nodes:
            return
        content = {
            "type": "relationship",
            "label": label,
            "source_id": nodes[a % len(nodes)],
            "target_id": nodes[b % len(nodes)],
            "properties": properties,
        }
        cube = self._add(content, team, ttl)
        self.model.edges[cube.id] = Thing(content, team, self.model.now + ttl)

    def change_node(self, pick: int, content: dict[str, Any]) -> None:
        nodes = list(self.model.see(None)[0])
        if nodes:
            id = nodes[pick % len(nodes)]
            self.memory.update(id, content)
            self.model.nodes[id].content = content

    def change_edge(self, pick: int, properties: dict[str, Any]) -> None:
        edges = list(self.model.see(None)[1])
        if edges:
            id = edges[pick % len(edges)]
            content = {**self.model.edges[id].content, "properties": properties}
            self.memory.update(id, content)
            self.model.edges[id].content = content

    def metadata(self, pick: int, team: str) -> None:
        nodes, edges = self.model.see(None)
        things = {**nodes, **edges}
        if things:
            id = list(things)[pick % len(things)]
            self.memory.update(id, metadata={"team": team})
            things[id].team = team

    def delete(self, pick: int) -> None:
        nodes, edges = self.model.see(None)
        things = [*nodes, *edges]
        if things:
            id = things[pick % len(things)]
            self.memory.delete(id)
            self.model.delete(id)

    def later(self, expires: bool) -> None:
        self.model.now += 1
        if expires:
            self.memory.expire()
            self.model.expire()

    # Queries.

    def find(self, content: dict[str, Any], limit: int, team: str | None) -> None:
        labels = content.get("labels") or [content["label"]]
        node = {"labels": labels, "properties": content["properties"]}
        for asked in (node, {"labels": labels}, {"properties": node["properties"]}, {}):
            want = self.model.find(asked.get("labels", []), asked.get("properties", {}), team)
            hits = self.memory.lookup({"node": asked}, limit, self.memory.scope(_filter(team)))
            assert [hit.id for hit in hits] == want[:limit]
            for hit in hits:
                self._same(hit.content, self.model.nodes[hit.id].content)

    def near(
        self, pick: int, depth: int, types: list[str] | None, direction: str, team: str | None
    ) -> None:
        nodes = list(self.model.see(team)[0])
        if not nodes:
            return
        id = nodes[pick % len(nodes)]
        distance, edges = self.model.near(id, depth, types, direction, team)
        more = {"types": types, "direction": direction, "filters": _filter(team)}
        found = self.memory.neighbourhood(id, depth, **more)
        assert found.distances == distance
        assert list(found.distances.values()) == sorted(found.distances.values())
        assert {cube.id for cube in found.relationships} == edges
        assert len(found.relationships) == len(edges)
        assert not found.is_truncated
        assert self.memory.degree(id, **more) == len(self.model.steps(id, types, direction, team))
        query = {"node": {"id": id}, "depth": depth, "direction": direction}
        if types is not None:
            query["relationships"] = types
        (hit,) = self.memory.lookup(query, 5, self.memory.scope(_filter(team)))
        assert {cube.id for cube in hit.neighbours} == (distance.keys() - {id}) | edges
        told = list(_told(hit.content.get("relationships", [])))
        assert sorted(one["id"] for one in told) == sorted(edges)
        for one in told:
            self._same(one["properties"], self.model.edges[one["id"]].content["properties"])
            assert one["node"]["id"] in self.model.ends(one["id"])

    def path(
        self,
        a: int,
        b: int,
        most: int,
        types: list[str] | None,
        direction: str,
        team: str | None,
    ) -> None:
        nodes = list(self.model.see(team)[0])
        if not nodes:
            return
        start, end = nodes[a % len(nodes)], nodes[b % len(nodes)]
        distance, _ = self.model.near(start, most, types, direction, team)
        more = {"types": types, "direction": direction, "max_depth": most}
        path = self.memory.shortest_path(start, end, filters=_filter(team), **more)
        if end not in distance:
            assert path is None
            return
        assert path is not None
        assert len(path) == distance[end]
        ids = [cube.id for cube in path.nodes]
        assert (ids[0], ids[-1], len(ids)) == (start, end, len(path) + 1)
        for here, edge, there in zip(ids, path.relationships, ids[1:], strict=False):
            assert (edge.id, there) in self.model.steps(here, types, direction, team)

    def rank(self, pick: int, direction: str, team: str | None) -> None:
        nodes = list(self.model.see(team)[0])
        if not nodes:
            return
        seed = nodes[pick % len(nodes)]
        want = self.model.rank(seed, direction, team, 0.5)
        hits = self.memory.pagerank(
            [seed], direction=direction, damping=0.5, limit=1000, filters=_filter(team)
        )
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        have = {**dict.fromkeys(want, 0.0), **{hit.id: hit.score for hit in hits}}
        assert have == pytest.approx(want, abs=1e-7)

    # Inside.

    def _add(self, content: dict[str, Any], team: str, ttl: float) -> Any:
        more = {} if ttl == math.inf else {"ttl_s": ttl}
        return self.memory.add(content, {"team": team}, **more)

    def _same(self, have: Any, want: Any) -> None:
        assert canonical(have) == canonical(want)


def history(graphs: Graphs, data: Any, length: int) -> tuple[GraphMemory, Model]:
    """Take a new memory through a random history; its tables hold what lives, no more."""
    model = Model()
    memory = graphs(on_duplicate="keep", clock=lambda: model.now)
    operations = st.lists(OPERATIONS, min_size=length // 2, max_size=2 * length)
    Twin(memory, model).go([*data.draw(START), *data.draw(operations)])
    with memory.records.database.read() as connection:
        nodes = connection.exec_driver_sql("SELECT COUNT(DISTINCT seq) FROM graph_facts").scalar()
        edges = connection.exec_driver_sql("SELECT COUNT(*) FROM relations").scalar()
    assert (nodes, edges) == (len(model.nodes), len(model.edges))
    assert check(memory.records) == []
    return memory, model


def _filter(team: str | None) -> dict[str, str] | None:
    return None if team is None else {"team": team}


def _told(relationships: list[dict[str, Any]]) -> Any:
    for one in relationships:
        yield one
        yield from _told(one["node"].get("relationships", []))
