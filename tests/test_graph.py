"""GraphMemory: one contract for every backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memos.errors import ArgumentError, NotFoundError

from .bolt_server import Graphs, bolt, params_of, targets  # noqa: F401 - bolt is a fixture
from .graph_help import edge, medical, node


@pytest.fixture(params=["sqlite", *targets()])
def graphs(request: pytest.FixtureRequest) -> Iterator[Graphs]:
    made = Graphs(request.param, params_of(request.param, request.getfixturevalue))
    yield made
    made.close()


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
