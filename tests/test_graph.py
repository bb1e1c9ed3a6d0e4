"""GraphMemory: one contract for every backend, and histories against plain dicts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError, NotFoundError
from memos.memories.graph import GraphMemory
from memos.memories.source import MemorySource
from memos.records import walks
from memos.records.graph import Edge
from memos.records.scope import Scope
from memos.records.store import Records

from .bolt_server import Graphs, bolt, params_of, targets  # noqa: F401 - bolt is a fixture
from .graph_model import history


@pytest.fixture(params=["sqlite", *targets()])
def graphs(request: pytest.FixtureRequest) -> Iterator[Graphs]:
    made = Graphs(request.param, params_of(request.param, request.getfixturevalue))
    yield made
    made.close()


def node(label: str, name: str | None = None, **properties: Any) -> dict[str, Any]:
    named = properties if name is None else {"name": name, **properties}
    return {"type": "node", "label": label, "properties": named}


def edge(label: str, source: str, target: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "relationship",
        "label": label,
        "source_id": source,
        "target_id": target,
        "properties": properties,
    }


def medical(memory: GraphMemory) -> tuple[str, str, str]:
    disease = memory.add(
        node(
            "Disease",
            "Diabetes Mellitus",
            description="A metabolic disorder characterized by high blood sugar levels",
            types=["Type 1", "Type 2", "Gestational"],
        )
    )["id"]
    symptom = memory.add(node("Symptom", "Polyuria", description="Excessive urination"))["id"]
    link = memory.add(
        edge(
            "EXHIBITS_SYMPTOM",
            disease,
            symptom,
            frequency="common",
            mechanism="Osmotic diuresis due to hyperglycemia",
        )
    )["id"]
    return disease, symptom, link


def words(memory: GraphMemory, text: str) -> list[str]:
    """Ids of the cubes that full text finds."""
    source = MemorySource(memory)
    seqs, _ = source.search_text(text, 10, memory.scope(), every_word=True)
    return [source.cubes([seq], memory.scope())[seq].id for seq in map(int, seqs)]


# What a user of the library sees, on every backend.


def test_a_disease_with_its_symptoms(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, link = medical(memory)
    query = {
        "node": {"label": "Disease", "properties": {"name": "Diabetes Mellitus"}},
        "relationships": ["EXHIBITS_SYMPTOM"],
        "depth": 1,
    }
    (hit,) = memory.lookup(query, 5, memory.scope())
    assert (hit.id, hit.kind, hit.memory) == (disease, "node", "g")
    assert hit.content["properties"]["types"] == ["Type 1", "Type 2", "Gestational"]
    (told,) = hit.content["relationships"]
    assert (told["id"], told["type"]) == (link, "EXHIBITS_SYMPTOM")
    assert (told["source_id"], told["target_id"]) == (disease, symptom)
    assert told["properties"]["frequency"] == "common"
    assert told["node"]["id"] == symptom
    assert told["node"]["properties"]["name"] == "Polyuria"
    assert [cube.id for cube in hit.neighbours] == [symptom, link]
    assert [cube.kind for cube in hit.neighbours] == ["node", "relationship"]
    assert hit.trace[0]["is_truncated"] is False


def test_directions_types_and_depths(graphs: Graphs) -> None:
    memory = graphs()
    a, b, c = (memory.add(node("N", name)).id for name in "abc")
    ab = memory.add(edge("X", a, b)).id
    bc = memory.add(edge("Y", b, c)).id
    loop = memory.add(edge("X", b, b)).id

    def around(**more: Any) -> set[str]:
        found = memory.neighbourhood(b, **more)
        return {cube.id for cube in (*found.nodes, *found.relationships)}

    assert around() == {a, b, c, ab, bc, loop}
    assert around(direction="out") == {b, c, bc, loop}
    assert around(direction="in") == {a, b, ab, loop}
    assert around(types=["Y"]) == {b, c, bc}
    assert around(types="Y") == {b, c, bc}
    assert around(types=["Z"]) == {b}
    assert around(depth=0) == {b}
    far = memory.neighbourhood(a, 2, direction="out")
    assert far.distances == {a: 0, b: 1, c: 2}
    assert (memory.degree(b), memory.degree(b, direction="out"), memory.degree(b, ["Y"])) == (
        3,
        2,
        1,
    )
    cut = memory.neighbourhood(b, limit=2)
    assert len(cut.nodes) == 2
    assert cut.is_truncated


def test_what_is_reached_is_told_once_as_a_tree(graphs: Graphs) -> None:
    memory = graphs()
    a, b, c = (memory.add(node("N", name)).id for name in "abc")
    memory.add(edge("R", a, b))
    memory.add(edge("R", b, c))
    memory.add(edge("R", c, a))
    memory.add(edge("R", a, b, again=True))
    query = {"node": {"id": a}, "depth": 3, "direction": "out"}
    (hit,) = memory.lookup(query, 1, memory.scope())
    first, second = hit.content["relationships"]
    assert first["node"]["id"] == second["node"]["id"] == b
    assert "relationships" not in second["node"]
    (on,) = first["node"]["relationships"]
    (back,) = on["node"]["relationships"]
    assert (on["node"]["id"], back["node"]["id"]) == (c, a)
    assert "relationships" not in back["node"]
    assert "relationships" not in memory.get(a).content


def test_lookup_without_steps_gives_nodes_as_they_are(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, _ = medical(memory)
    scope = memory.scope()
    assert [h.id for h in memory.lookup({"node": {}}, 5, scope)] == [disease, symptom]
    assert [h.id for h in memory.lookup({"node": {}}, 1, scope)] == [disease]
    assert memory.lookup({"node": {}}, 0, scope) == []
    (hit,) = memory.lookup({"node": {"label": "Symptom"}}, 5, scope)
    assert hit.content == memory.get(symptom).content
    assert hit.neighbours == ()
    assert memory.lookup({"node": {"label": "symptom"}}, 5, scope) == []
    assert memory.lookup({"node": {"id": "nobody"}}, 5, scope) == []
    assert memory.lookup({"node": {"id": disease, "label": "Symptom"}}, 5, scope) == []
    (hit,) = memory.lookup({"node": {"label": "Symptom"}, "direction": "in"}, 5, scope)
    assert hit.content["relationships"][0]["node"]["id"] == disease


@pytest.mark.parametrize(
    ("have", "want", "fits"),
    [
        (3, 3.0, True),
        (3.0, 3, True),
        (3, "3", False),
        (1, True, False),
        (True, True, True),
        (None, None, True),
        (["a", "b"], "a", True),
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["a"], False),
        ([1, "a"], "a", True),
        ([], [], True),
        ({"x": 1}, {"x": 1.0}, True),
        ({"x": 1}, {"x": 2}, False),
        (2**70, 2**70, True),
        ("x" * 1000, "x" * 1000, True),
        ("x" * 1000, "x" * 999 + "y", False),
        ("a`b\"'\\", "a`b\"'\\", True),
    ],
)
def test_properties_match_within_their_type(
    graphs: Graphs, have: Any, want: Any, fits: bool
) -> None:
    memory = graphs()
    for key in ("plain", "odd `key`"):
        cube = memory.add(node("N", **{key: have}))
        assert cube.content["properties"] == {key: have}
        assert len(memory.nodes("N", {key: want})) == fits


def test_a_list_of_labels(graphs: Graphs) -> None:
    memory = graphs()
    both = memory.add({"type": "node", "labels": ["Person", "Doctor"], "properties": {}}).id
    one = memory.add({"type": "node", "labels": ["Person"]}).id
    assert memory.get(one).content == {"type": "node", "label": "Person", "properties": {}}
    find = {"node": {"labels": ["Doctor", "Person"]}}
    assert [hit.id for hit in memory.lookup(find, 5, memory.scope())] == [both]
    assert [cube.id for cube in memory.nodes("Person")] == [both, one]
    memory.update(both, {"type": "node", "label": "Retired"})
    assert [cube.id for cube in memory.nodes("Person")] == [one]
    assert [cube.id for cube in memory.nodes("Retired")] == [both]


def test_an_update_replaces_and_keeps_the_relationships(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, link = medical(memory)
    memory.update(disease, node("Disease", "Diabetes", severity=3), metadata={"by": "me"})
    assert memory.nodes(properties={"severity": 3})[0].id == disease
    assert memory.nodes(properties={"types": "Type 1"}) == []
    assert memory.degree(disease) == 1
    assert [v.content["properties"].get("severity") for v in memory.history(disease)] == [None, 3]
    memory.set_properties(disease, {"severity": 4, "new": True})
    assert memory.get(disease).content["properties"] == {
        "name": "Diabetes",
        "new": True,
        "severity": 4,
    }
    memory.update(link, edge("EXHIBITS_SYMPTOM", disease, symptom, frequency="rare"))
    (hit,) = memory.lookup({"node": {"id": disease}, "depth": 1}, 1, memory.scope())
    assert hit.content["relationships"][0]["properties"] == {"frequency": "rare"}


def test_what_an_update_cannot_change(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, link = medical(memory)
    for id, content, message in [
        (disease, edge("R", disease, symptom), "content.type"),
        (link, node("N"), "content.type"),
        (link, edge("OTHER", disease, symptom), "content.label"),
        (link, edge("EXHIBITS_SYMPTOM", symptom, symptom), "content.source_id"),
        (link, edge("EXHIBITS_SYMPTOM", disease, disease), "content.target_id"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            memory.update(id, content)
    assert memory.get(link).versions == memory.get(disease).versions == 1


def test_deleting_a_node_deletes_its_relationships(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, link = medical(memory)
    memory.add(edge("SELF", disease, disease))
    memory.delete(disease, author="me")
    assert [cube.id for cube in memory.cubes()] == [symptom]
    assert memory.neighbourhood(symptom).relationships == ()
    with pytest.raises(NotFoundError):
        memory.neighbourhood(disease)
    last = memory.history(link)[-1]
    assert (last.state, last.author) == ("DELETED", "me")
    assert last.content["label"] == "EXHIBITS_SYMPTOM"
    with pytest.raises(NotFoundError):
        memory.delete(link)


def test_deleting_a_relationship_leaves_its_ends(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, link = medical(memory)
    memory.delete(link)
    assert memory.shortest_path(disease, symptom) is None
    assert len(memory.nodes()) == 2
    again = memory.add(edge("EXHIBITS_SYMPTOM", disease, symptom)).id
    assert memory.shortest_path(disease, symptom).relationships[0].id == again  # type: ignore


def test_time_over_for_a_node_is_over_for_what_hangs_on_it(graphs: Graphs) -> None:
    now = [1000.0]
    memory = graphs(clock=lambda: now[0])
    a = memory.add(node("N", "a")).id
    b = memory.add(node("N", "b"), ttl_s=10).id
    c = memory.add(node("N", "c")).id
    ab, bc = memory.add(edge("R", a, b)).id, memory.add(edge("R", b, c)).id
    assert memory.shortest_path(a, c) is not None
    now[0] += 11
    assert memory.shortest_path(a, c) is None
    assert memory.neighbourhood(a).relationships == ()
    assert memory.expire() == 3
    assert {memory.history(id)[-1].state for id in (b, ab, bc)} == {"DELETED"}


def test_filters_hold_on_the_whole_way(graphs: Graphs) -> None:
    memory = graphs()
    mine, theirs = {"user_id": "u1"}, {"user_id": "u2"}
    a = memory.add(node("N", "a"), mine).id
    b = memory.add(node("N", "b"), theirs).id
    c = memory.add(node("N", "c"), mine).id
    for left, right in ((a, b), (b, c)):
        memory.add(edge("R", left, right), mine)
    assert len(memory.shortest_path(a, c)) == 2  # type: ignore
    assert memory.shortest_path(a, c, filters=mine) is None
    assert memory.neighbourhood(a, 2, filters=mine).distances == {a: 0}
    assert [cube.id for cube in memory.nodes("N", filters=mine)] == [a, c]
    assert [hit.id for hit in memory.pagerank([a], filters=mine)] == [a]
    assert memory.degree(a, filters=mine) == 0
    (hit,) = memory.lookup({"node": {"id": a}, "depth": 2}, 5, memory.scope(mine))
    assert hit.content["relationships"] == []
    with pytest.raises(NotFoundError):
        memory.neighbourhood(b, filters=mine)


def test_shortest_path(graphs: Graphs) -> None:
    memory = graphs()
    ids = [memory.add(node("N", str(i))).id for i in range(6)]
    for i in range(5):
        memory.add(edge("NEXT", ids[i], ids[i + 1]))
    short = memory.add(edge("JUMP", ids[0], ids[3]))
    path = memory.shortest_path(ids[0], ids[5])
    assert path is not None
    assert [cube.id for cube in path.nodes] == [ids[0], ids[3], ids[4], ids[5]]
    assert path.relationships[0].id == short.id
    assert len(memory.shortest_path(ids[0], ids[5], ["NEXT"])) == 5  # type: ignore
    assert memory.shortest_path(ids[0], ids[5], max_depth=2) is None
    assert memory.shortest_path(ids[5], ids[0], direction="out") is None
    assert len(memory.shortest_path(ids[5], ids[0], direction="in")) == 3  # type: ignore
    assert memory.shortest_path(ids[2], ids[2]).nodes[0].id == ids[2]  # type: ignore
    assert memory.shortest_path(ids[0], ids[5], ["NOPE"]) is None


def test_pagerank_prefers_what_is_near_and_strong(graphs: Graphs) -> None:
    memory = graphs()
    a, b, c, d = (memory.add(node("N", name)).id for name in "abcd")
    memory.add(edge("R", a, b, weight=9))
    memory.add(edge("R", a, c, weight=1))
    hits = memory.pagerank([a])
    assert [hit.id for hit in hits] == [a, b, c]
    assert sum(hit.score for hit in hits) == pytest.approx(1)
    assert [hit.id for hit in memory.pagerank({a: 1, d: 5}, limit=1)] == [d]
    assert [hit.id for hit in memory.pagerank([b], direction="out")] == [b]
    assert {hit.id for hit in memory.pagerank([a], max_nodes=2)} == {a, b}
    memory.add(edge("R", d, a, weight=1.7e308))
    memory.add(edge("R", d, b, weight=1.7e308))
    memory.add(edge("R", d, c, weight=5e-324))
    assert sum(hit.score for hit in memory.pagerank([d])) == pytest.approx(1)
    for seeds in ([], {a: 0}, {a: -1}, {a: float("nan")}, {a: "x"}):
        with pytest.raises(ArgumentError, match="seeds"):
            memory.pagerank(seeds)
    with pytest.raises(NotFoundError):
        memory.pagerank(["nobody"])


def test_many_at_once_with_ids_of_their_own(graphs: Graphs) -> None:
    memory = graphs()
    people = [{"content": node("Person", "Li"), "id": f"p{i}"} for i in range(30)]
    links = [{"content": edge("KNOWS", f"p{i}", f"p{(i + 1) % 30}")} for i in range(30)]
    cubes = memory.add_many([*links[:3], *people, *links[3:]])
    assert len({cube.id for cube in cubes}) == 60
    assert len(memory.shortest_path("p0", "p15", max_depth=20)) == 15  # type: ignore
    assert len(memory.nodes("Person", {"name": "Li"}, limit=1000)) == 30
    with pytest.raises(ArgumentError, match="p3"):
        memory.add(node("Person"), id="p3")
    with pytest.raises(NotFoundError, match="nobody"):
        memory.add_many([{"content": node("New")}, {"content": edge("KNOWS", "p0", "nobody")}])
    assert memory.nodes("New") == []


def test_an_exact_duplicate_is_the_one_that_is_there(graphs: Graphs) -> None:
    memory = graphs()
    disease, symptom, link = medical(memory)
    assert medical(memory) == (disease, symptom, link)
    twice = [{"content": node("N", "x", y=1)}, {"content": node("N", y=1, name="x")}]
    first, second = memory.add_many(twice)
    assert first.id == second.id
    assert memory.add(node("Symptom", "Polyuria", description="Other")).id != symptom
    memory.update(symptom, node("Symptom", "Thirst"))
    renamed = memory.get(link).content
    assert memory.add(renamed).id == link
    assert memory.degree(disease) == 1


def test_threads_add_to_one_memory(graphs: Graphs, tmp_path: Path) -> None:
    memory = graphs(graphs.records(tmp_path / "store"))
    hub = memory.add(node("Hub"), id="hub").id
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for j in range(6):
                leaf = memory.add(node("Leaf", f"{i} {j}")).id
                memory.add(edge("AT", leaf, hub))
                memory.add(node("Shared", str(j)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert memory.degree(hub) == 48
    assert len(memory.nodes("Leaf")) == 48
    assert len(memory.nodes("Shared")) == 6


def test_everything_is_there_after_opening_again(graphs: Graphs, tmp_path: Path) -> None:
    path = tmp_path / "store"
    with_first = graphs.records(path)
    disease, symptom, link = medical(graphs(with_first))
    with_first.close()
    memory = graphs(graphs.records(path))
    assert [cube.id for cube in memory.shortest_path(disease, symptom).relationships] == [link]  # type: ignore
    reader = graphs(graphs.records(path, readonly=True))
    assert reader.nodes("Symptom")[0].id == symptom
    assert reader.degree(disease) == 1


def test_two_memories_of_one_store_do_not_meet(graphs: Graphs) -> None:
    records = graphs.records()
    left, right = graphs(records, "left"), graphs(records, "right")
    a = left.add(node("N", "a"), id="a").id
    right.add(node("N", "a"), id="a")
    b = right.add(node("N", "b")).id
    right.add(edge("R", a, b))
    assert left.degree("a") == 0
    assert right.degree("a") == 1
    assert len(left.nodes()) == 1
    with pytest.raises(NotFoundError):
        left.add(edge("R", "a", b))
    left.relate("a", "SAME_AS", b)  # an edge across memories: no relationship of either
    assert [edge.type for edge in left.get("a").relations] == ["SAME_AS"]
    assert left.degree("a") == 0
    left.add(node("N", "c"), id="c")
    left.relate("a", "LIKES", "c", properties={"since": 1}, weight=2.0)
    (told,) = left.neighbourhood("a").relationships
    assert told.content["properties"] == {"since": 1, "weight": 2.0}


# What needs no server.


@settings(max_examples=40)
@given(st.data())
def test_long_histories_in_sqlite(data: Any) -> None:
    graphs = Graphs("sqlite", None)
    try:
        history(graphs, data, 20)
    finally:
        graphs.close()


@st.composite
def small_graphs(draw: Any) -> tuple[int, list[Edge]]:
    """Nodes 0 to n - 1; relationships with numbers above."""
    n = draw(st.integers(2, 9))
    ends = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.sampled_from([0.5, 1.0, 3.0]))
    drawn = draw(st.lists(ends, max_size=16))
    return n, [Edge(100 + i, a, "R", b, w) for i, (a, b, w) in enumerate(drawn)]


@settings(max_examples=300)
@given(small_graphs(), st.sampled_from(["out", "in", "both"]), st.integers(0, 5), st.data())
def test_walks(graph: tuple[int, list[Edge]], direction: str, depth: int, data: Any) -> None:
    import numpy

    n, edges = graph
    a, b = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))

    def steps(way: str) -> list[tuple[int, int, Edge]]:
        out = [(e.source, e.target, e) for e in edges if way != "in"]
        back = [(e.target, e.source, e) for e in edges if way != "out"]
        return out + [s for s in back if way == "in" or s[0] != s[1]]

    def adjacency(way: str) -> walks.Adjacency:
        def fetch(seqs: Any, limit: int) -> list[Edge]:
            return sorted({e for near, _, e in steps(way) if near in seqs})[:limit]

        return walks.Adjacency(fetch, way)

    distance = {a: 0}
    for step in range(1, n + 1):
        for near, far, _ in steps(direction):
            if distance.get(near) == step - 1:
                distance.setdefault(far, step)
    found = walks.reach(adjacency(direction), [a], depth, 100)
    assert found.distance == {seq: steps for seq, steps in distance.items() if steps <= depth}
    walked = {e for near, _, e in steps(direction) if distance.get(near, depth) < depth}
    assert (set(found.edges), len(found.edges)) == (walked, len(walked))
    assert not found.is_truncated
    few = walks.reach(adjacency(direction), [a], None, 2)
    assert len(few.distance) == min(2, len(distance))
    assert few.is_truncated == (len(distance) > 2)

    against = {"out": "in", "in": "out", "both": "both"}[direction]
    path = walks.shortest_path(adjacency(direction), adjacency(against), a, b, depth, 100)
    assert (path is None) == (distance.get(b, 99) > depth)
    if path is not None:
        nodes, between = path
        assert (nodes[0], nodes[-1], len(between)) == (a, b, distance[b])
        moves = list(zip(nodes, nodes[1:], between, strict=False))
        assert all(move in steps(direction) for move in moves)

    matrix = numpy.zeros((n, n))
    for near, far, e in steps(direction):
        matrix[far, near] += e.weight
    restart = numpy.zeros(n)
    restart[a], restart[b] = 1, restart[b] + 2
    restart /= restart.sum()
    out = matrix.sum(0)
    matrix[:, out == 0] = restart[:, None]
    matrix /= numpy.where(out == 0, 1, out)
    want = numpy.linalg.solve(numpy.eye(n) - 0.6 * matrix, 0.4 * restart)
    seeds = {a: 3.0} if a == b else {a: 1.0, b: 2.0}
    ranks = walks.pagerank(
        adjacency(direction),
        seeds,
        direction=direction,
        damping=0.6,
        tolerance=1e-12,
        max_iterations=200,
        most=100,
    )
    assert dict(ranks) == pytest.approx({s: want[s] for s, _ in ranks}, abs=1e-9)
    assert sum(score for _, score in ranks) == pytest.approx(1)


@pytest.fixture
def memory() -> Iterator[GraphMemory]:
    graphs = Graphs("sqlite", None)
    yield graphs()
    graphs.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "type 'node' or 'relationship'"),
        ({}, "type 'node' or 'relationship'"),
        ({"type": "edge"}, "type 'node' or 'relationship'"),
        ({"type": "node"}, "a label"),
        ({"type": "node", "labels": []}, "a label"),
        ({"type": "node", "label": "A", "labels": ["B"]}, "got both"),
        ({"type": "node", "labels": "AB"}, "a list of labels"),
        ({"type": "node", "label": "A B"}, "letters, digits and underscores"),
        ({"type": "node", "label": "A`) DETACH DELETE n //"}, "letters, digits and underscores"),
        ({"type": "node", "label": ""}, "letters"),
        ({"type": "node", "label": "A\n"}, "letters"),
        ({"type": "node", "label": 3}, "letters"),
        ({"type": "node", "label": "MemosNode"}, "MemosNode"),
        ({"type": "node", "label": "A", "properties": [1]}, "content.properties: a dict"),
        ({"type": "node", "label": "A", "properties": {"x": {1}}}, "JSON wanted"),
        ({"type": "node", "label": "A", "properties": {1: 2}}, "keys that are strings"),
        ({"type": "node", "label": "A", "properties": {"x": float("nan")}}, "JSON wanted"),
        ({"type": "node", "label": "A", "properties": {"x": "\ud800"}}, "surrogate"),
        ({"type": "node", "label": "A", "name": "x"}, "'name'"),
        ({"type": "relationship", "label": "R", "source_id": "a"}, "content.target_id"),
        ({"type": "relationship", "source_id": "a", "target_id": "a"}, "a label, its type"),
        ({"type": "relationship", "label": "R-S", "source_id": "a", "target_id": "a"}, "letters"),
    ],
)
def test_content_that_is_out_of_contract(memory: GraphMemory, content: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        memory.add(content)
    assert memory.cubes() == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "a dict with node"),
        ([1.0], "a dict with node"),
        ({"node": "x"}, "a dict with node"),
        ({"node": {}, "relations": ["R"]}, "'relations'"),
        ({"node": {"name": "x"}}, "'name'"),
        ({"node": {"label": "A B"}}, "query.node.label"),
        ({"node": {"id": 3}}, "query.node.id"),
        ({"node": {"properties": [1]}}, "query.node.properties"),
        ({"node": {}, "relationships": []}, "query.relationships"),
        ({"node": {}, "relationships": ["R`"]}, "query.relationships"),
        ({"node": {}, "relationships": 3}, "query.relationships"),
        ({"node": {}, "depth": -1}, "query.depth"),
        ({"node": {}, "depth": 11}, "query.depth"),
        ({"node": {}, "depth": True}, "query.depth"),
        ({"node": {}, "direction": "up"}, "direction"),
        ({"node": {}, "max_nodes": 0}, "query.max_nodes"),
    ],
)
def test_queries_that_are_out_of_contract(memory: GraphMemory, query: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        memory.lookup(query, 5, memory.scope())


def test_arguments_that_are_out_of_contract(memory: GraphMemory) -> None:
    a = memory.add(node("N", "a")).id
    for call in (
        lambda: memory.neighbourhood(a, -1),
        lambda: memory.neighbourhood(a, limit=0),
        lambda: memory.neighbourhood(a, direction="up"),
        lambda: memory.shortest_path(a, a, max_depth=-1),
        lambda: memory.pagerank([a], damping=1),
        lambda: memory.degree(a, types=[]),
        lambda: memory.nodes("N", limit=-1),
        lambda: memory.add(node("N"), parent_id=a),
        lambda: memory.set_properties(a, [1]),  # type: ignore
        lambda: GraphMemory("x", storage_backend="mysql"),
        lambda: GraphMemory("x", connection_params={"uri": "bolt://127.0.0.1:1"}),
    ):
        with pytest.raises(ArgumentError):
            call()
    link = memory.add(edge("R", a, a)).id
    for call in (
        lambda: memory.neighbourhood(link),
        lambda: memory.degree("nobody"),
        lambda: memory.shortest_path(a, "nobody"),
        lambda: memory.add(edge("R", a, link)),
    ):
        with pytest.raises(NotFoundError):
            call()
    with pytest.raises(ArgumentError, match="register"):
        GraphMemory("unbound").nodes()


def test_words_find_nodes_and_relationships(memory: GraphMemory) -> None:
    disease, symptom, link = medical(memory)
    assert words(memory, "metabolic disease") == [disease]
    assert set(words(memory, "polyuria")) == {symptom, link}
    assert words(memory, "diabetes exhibits symptom polyuria") == [link]
    assert words(memory, "osmotic hyperglycemia") == [link]
    camel = memory.add(node("HTTPServer", port=8080, tags=[{"team": "blue"}])).id
    assert words(memory, "http server 8080 blue") == [camel]


def test_a_new_name_is_found_at_the_relationships_too(memory: GraphMemory) -> None:
    disease, symptom, link = medical(memory)
    memory.update(symptom, node("Symptom", "Thirst"))
    assert words(memory, "polyuria") == []
    assert words(memory, "diabetes exhibits symptom thirst") == [link]
    assert memory.get(link).versions == 1
    memory.update(link, edge("EXHIBITS_SYMPTOM", disease, symptom, frequency="rare"))
    assert words(memory, "exhibits thirst rare") == [link]
    memory.delete(symptom)
    assert words(memory, "thirst") == []


def test_meaning_follows_a_new_name() -> None:
    import numpy

    def embed(texts: Any) -> Any:
        return [[float(len(text)), text.count("z"), 1.0] for text in texts]

    records = Records()
    memory = GraphMemory("g", embedder=embed)
    memory.bind(records)
    _, symptom, link = medical(memory)

    def nearness(text: str) -> float:
        """Of the relationship to a text."""
        vector = numpy.array(embed([text])[0], numpy.float32)
        with records.database.read() as connection:
            seq = memory.table.seq(connection, link, memory.scope())
            found = memory.embedded.search(connection, vector, 10, memory.scope())
        assert found is not None
        return float(found[1][list(found[0]).index(seq)])

    facts = "common; Osmotic diuresis due to hyperglycemia"
    old = f"Diabetes Mellitus exhibits symptom Polyuria: {facts}"
    new = f"Diabetes Mellitus exhibits symptom {'z' * 80}: {facts}"
    assert nearness(old) == pytest.approx(1, abs=1e-3)
    memory.update(symptom, node("Symptom", "z" * 80))
    assert nearness(new) == pytest.approx(1, abs=1e-3)
    assert nearness(old) < 0.99
    memory.close()
    records.close()


def test_equal_contents_have_equal_digests_after_any_renaming(memory: GraphMemory) -> None:
    a, b = memory.add(node("N", "a")).id, memory.add(node("N", "b")).id
    link = memory.add(edge("R", a, b, z=1, y=[1, {"b": 2, "a": 1}])).id
    memory.update(a, node("N", "other"))
    memory.update(link, metadata={"k": 1})
    again = memory.add(edge("R", a, b, y=[1, {"a": 1, "b": 2}], z=1), {"k": 1})
    assert again.id == link


def test_a_large_graph_is_walked_in_few_statements(memory: GraphMemory) -> None:
    people = [{"content": node("P", str(i)), "id": str(i)} for i in range(2000)]
    links = [
        {"content": edge("R", str(i), str(j % 2000))}
        for i in range(2000)
        for j in (i + 1, i * 7, i * 31 + 5)
    ]
    memory.add_many(people + links)
    statements: list[str] = []
    import sqlalchemy

    def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    engine = memory.records.database._engine
    sqlalchemy.event.listen(engine, "before_cursor_execute", count)
    found = memory.neighbourhood("0", 10, limit=5000)
    assert len(found.nodes) == 2000
    assert len(found.relationships) == 6000
    assert len(statements) < 200
    statements.clear()
    path = memory.shortest_path("0", "1999", direction="out", max_depth=30)
    assert path is not None
    assert len(statements) < 60
    plan = "\n".join(
        str(row)
        for statement in [s for s in statements if "FROM relations" in s][:1]
        for row in _plan(memory, statement)
    )
    assert "relations_source" in plan or "relations_target" in plan
    assert "SCAN relations" not in plan


def _plan(memory: GraphMemory, statement: str) -> Any:
    with memory.records.database.read() as connection:
        marks = tuple([1] * statement.count("?"))
        return connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", marks).all()


def test_a_path_search_that_grows_too_far_says_so(
    memory: GraphMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memos.memories import graph_queries

    monkeypatch.setattr(graph_queries, "_PATH_NODES", 5)
    ids = [memory.add(node("N", str(i))).id for i in range(20)]
    for id in ids[1:10]:
        memory.add(edge("R", ids[0], id))
    for id in ids[11:]:
        memory.add(edge("R", ids[10], id))
    with pytest.raises(ArgumentError, match="max_depth"):
        memory.shortest_path(ids[0], ids[10])


def test_scope_is_what_the_caller_says(memory: GraphMemory) -> None:
    memory.add(node("N", "a"), {"k": 1})
    assert memory.lookup({"node": {}}, 5, Scope({"k": 2}, memory.scope().now)) == []
    assert len(memory.lookup({"node": {}}, 5, Scope({"k": 1}, memory.scope().now))) == 1


def test_importing_the_memory_loads_no_driver() -> None:
    import subprocess
    import sys

    code = (
        "import sys, memos.memories.graph\n"
        "from memos.memories.graph import GraphMemory\n"
        "GraphMemory('g')\n"
        "sys.exit(bool({'neo4j', 'sqlalchemy', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
