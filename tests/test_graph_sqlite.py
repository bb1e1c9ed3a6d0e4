"""GraphMemory without a server: histories, walks against plain dicts, contracts of arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError, NotFoundError
from memos.memories.graph import GraphMemory
from memos.records import walks
from memos.records.graph import Edge
from memos.records.scope import Scope
from memos.records.store import Records

from .bolt_server import Graphs
from .graph_help import edge, medical, node, words
from .graph_model import history


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
