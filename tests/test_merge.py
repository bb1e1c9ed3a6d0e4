"""Branches and merges against a model in plain Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memos import MOS, GeneralTextMemory, GraphMemory, TreeTextMemory
from memos.cube.fields import Body, from_fields, to_fields
from memos.cube.merge import ABSENT, Conflict, Side, common_ancestor, diff, merge
from memos.errors import ArgumentError
from memos.records.check import check

values = st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.sampled_from(["x", "y"]))
fields = st.dictionaries(st.sampled_from(["a", "b", "c", "deleted"]), values, max_size=4).map(
    lambda d: {"deleted": True} if "deleted" in d else d
)
POLICIES = ["ours", "theirs", "newest", "both", None]


@given(fields, fields, fields, st.sampled_from(POLICIES))
def test_a_field_that_one_side_changed_is_that_sides(
    base: Any, ours: Any, theirs: Any, policy: Any
) -> None:
    found = merge("x", base, Side(ours, 1, "o"), Side(theirs, 2, "t"), policy)
    if ours == theirs and repr(sorted(ours.items())) == repr(sorted(theirs.items())):
        assert found.fields == ours
        assert not found.conflicts
    if "deleted" in ours or "deleted" in theirs:
        return
    for name in base.keys() | ours.keys() | theirs.keys():
        was, mine, other = (repr(d.get(name, ABSENT)) for d in (base, ours, theirs))
        value = repr(found.fields.get(name, ABSENT))
        if was == mine or mine == other:
            assert value == other
        elif was == other:
            assert value == mine
        else:
            assert name in {c.field for c in found.conflicts}
            wanted = {"theirs": other, "newest": other}.get(policy, mine)
            assert value == wanted
    assert (found.twin == theirs) == (policy == "both" and bool(found.conflicts)) or not theirs


@given(fields, fields, fields, st.sampled_from(["newest"]), st.integers(0, 2))
def test_a_symmetric_policy_does_not_care_who_is_who(
    base: Any, ours: Any, theirs: Any, policy: Any, at: float
) -> None:
    one, other = Side(ours, 1, "o"), Side(theirs, at, "t")
    there, back = merge("x", base, one, other, policy), merge("x", base, other, one, policy)
    assert repr(sorted(there.fields.items())) == repr(sorted(back.fields.items()))
    assert {c.field for c in there.conflicts} == {c.field for c in back.conflicts}
    again = merge("x", theirs, Side(there.fields, 3, "m"), other, policy)
    assert again.fields == there.fields
    assert not again.conflicts


def test_the_common_ancestor_is_the_last_one() -> None:
    parents = {"m": ("a2", "b1"), "a2": ("a1",), "a1": ("0",), "b1": ("0",), "b2": ("b1",)}
    at = dict(zip(("0", "a1", "a2", "b1", "m", "b2"), range(6), strict=True))
    assert common_ancestor("m", "b2", parents, at) == "b1"
    assert common_ancestor("a2", "b2", parents, at) == "0"
    assert common_ancestor("a2", "m", parents, at) == "a2"
    assert common_ancestor("a2", "z", parents, at) is None


bodies = st.builds(
    Body,
    text=st.text(max_size=5),
    content=st.one_of(
        st.none(),
        st.fixed_dictionaries({"type": st.just("node"), "properties": st.dictionaries(
            st.sampled_from(["p", "p.q", ""]), values)}),
        st.fixed_dictionaries({"vector": st.text(max_size=3)}),
    ),
    metadata=st.dictionaries(st.sampled_from(["", "k", "k.l"]), values),
    importance=st.floats(0, 1),
    parent_id=st.one_of(st.none(), st.just("p")),
    edges=st.lists(
        st.tuples(st.just("t"), st.sampled_from(["", "m"]), st.sampled_from("ab"), st.just(1.0),
                  st.just({})),
        unique_by=lambda e: e[:3],
    ),
)  # fmt: skip


@given(bodies, bodies)
def test_fields_are_the_whole_body(one: Body, other: Body) -> None:
    back = from_fields(to_fields(one))
    if one.content is not None and "properties" in one.content:
        back.text = one.text  # made of the content
    back.edges, one.edges = sorted(back.edges), sorted(one.edges)
    assert back == one
    assert (diff(to_fields(one), to_fields(other)) == {}) == (
        repr(to_fields(one)) == repr(to_fields(other))
        or sorted(map(repr, to_fields(one).items())) == sorted(map(repr, to_fields(other).items()))
    )


# The real thing.


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def three_way(id: str, base: Any, ours: Any, theirs: Any, takes_ours: bool) -> tuple[Any, set[str]]:
    """The model: fields, and those in conflict; None is a deleted cube."""
    if base is None and (ours is None) != (theirs is None):
        return (theirs if ours is None else ours), set()
    if ours is None or theirs is None:
        there = theirs if ours is None else ours
        if there == base:
            return None, set()
        return (ours if takes_ours else theirs), {"deleted"}
    found, conflicts = {}, set()
    for name in {*base, *ours, *theirs}:
        was, mine, other = (d.get(name) for d in (base, ours, theirs))
        value = other if was == mine else mine
        if mine != other and was not in (mine, other):
            conflicts.add(name)
            value = mine if takes_ours else other
        if value is not None:
            found[name] = value
    return found, conflicts


class Branches(RuleBasedStateMachine):
    """Two branches that change, and are merged into one another."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.mos = MOS(clock=self.clock)
        first = GeneralTextMemory("main", embedder=None, on_duplicate="keep", clock=self.clock)
        self.mos.register_memory(first)
        for id in "ab":
            first.add(f"text {id}", {"k": 0}, id=id)
        self.mos.branch("main", "side")
        begin = {id: {"content": f"text {id}", "k": 0} for id in "ab"}
        self.sides: dict[str, dict[str, Any]] = {m: copy.deepcopy(begin) for m in ("main", "side")}
        self.times = {m: dict.fromkeys("ab", 0.0) for m in self.sides}
        self.base: dict[str, Any] = copy.deepcopy(begin)
        self.tick = 0.0

    def touch(self, memory: str, id: str) -> None:
        self.tick += 1
        self.times[memory][id] = self.tick

    ids = st.sampled_from("abcd")
    names = st.sampled_from(["main", "side"])

    @rule(memory=names, id=ids, word=st.sampled_from("uvw"))
    def write(self, memory: str, id: str, word: str) -> None:
        side = self.sides[memory]
        if id not in side:
            self.mos.add(memory, f"text {word}", id=id)
            side[id] = {"content": f"text {word}"}
        elif side[id] is not None:
            self.mos.update(memory, id, f"text {word}")
            side[id]["content"] = f"text {word}"
        else:
            return
        self.touch(memory, id)

    @rule(memory=names, id=ids, key=st.sampled_from("kl"), value=st.integers(1, 3))
    def tag(self, memory: str, id: str, key: str, value: int) -> None:
        if self.sides[memory].get(id) is not None:
            self.mos.update(memory, id, metadata={key: value})
            self.sides[memory][id][key] = value
            self.touch(memory, id)

    @rule(memory=names, id=ids)
    def delete(self, memory: str, id: str) -> None:
        if self.sides[memory].get(id) is not None:
            self.mos.delete(memory, id)
            self.sides[memory][id] = None
            self.touch(memory, id)

    @rule(source=names, policy=st.sampled_from(["ours", "theirs", "newest", None]))
    def merge(self, source: str, policy: str | None) -> None:
        into = "side" if source == "main" else "main"
        ours, theirs = self.sides[into], self.sides[source]
        results, conflicts = {}, set()
        for id, fields_ in theirs.items():
            if id not in ours:
                if fields_ is not None:
                    results[id] = fields_
                continue
            base = self.base.get(id, {})
            if fields_ == base or (fields_ is None and ours[id] is None):
                continue
            newer = self.times[into][id] > self.times[source][id]
            takes_ours = policy == "ours" or (policy == "newest" and newer)
            results[id], some = three_way(id, base, ours[id], fields_, takes_ours)
            conflicts |= {(id, name) for name in some}
        report = self.mos.merge(source, into, policy)
        said = {(c.id, c.field.removeprefix("metadata.")) for c in report.conflicts}
        assert said == conflicts
        assert report.applied == (policy is not None or not conflicts)
        if report.applied:
            for id, result in results.items():
                if ours.get(id) is not None or result is not None:
                    self.touch(into, id)
                ours[id] = copy.deepcopy(result)
                if result is not None or theirs[id] is not None:
                    self.base[id] = copy.deepcopy(theirs[id])
            again = self.mos.merge(source, into, policy)
            assert (again.added, again.changed) == ((), ())

    @invariant()
    def agree(self) -> None:
        for name, side in self.sides.items():
            cubes = {
                c.id: {"content": c.content, **c.metadata} for c in self.mos.memory(name).cubes()
            }
            assert cubes == {id: body for id, body in side.items() if body is not None}

    def teardown(self) -> None:
        assert check(self.mos.records) == []
        self.mos.close()


Branches.TestCase.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
test_a_model_says_the_same = Branches.TestCase


def opened(memory: Any) -> tuple[MOS, Any]:
    clock = Clock()
    memory._clock = clock
    mos = MOS(clock=clock)
    return mos, mos.register_memory(memory)


def test_both_keeps_both_sides() -> None:
    mos, notes = opened(GeneralTextMemory("notes", embedder=None))
    mos.add("notes", "Ann lives in Paris", id="a")
    mos.branch("notes", "draft")
    mos.update("draft", "a", "Ann lives in Rome", author="bot")
    mos.update("notes", "a", "Ann lives in Oslo")
    report = mos.merge("draft", "notes")
    assert not report.applied
    assert [c.field for c in report.conflicts] == ["content"]
    assert "'Ann lives in Paris', ours 'Ann lives in Oslo'" in str(report)
    assert notes.get("a").versions == 2
    theirs = mos.get("a", "draft").digest
    report = mos.merge("draft", "notes", "both", author="ann")
    assert report.added == (f"a~{theirs[:8]}",)
    assert [c.content for c in notes.cubes()] == ["Ann lives in Rome", "Ann lives in Oslo"]
    last = notes.history("a")[-1]
    assert last.author == "ann"
    assert last.parents == (notes.history("a")[-2].digest, theirs)
    assert mos.merge("draft", "notes", "both").changed == ()

    def longest(conflict: Conflict) -> Any:
        return max(conflict.ours, conflict.theirs, key=len)

    mos.update("draft", "a", "Ann lives in Rome now")
    mos.update("notes", "a", "Ann is in Oslo")
    mos.merge("draft", "notes", longest)
    assert notes.get("a").content == "Ann lives in Rome now"


def test_relations_are_merged_one_by_one() -> None:
    mos, notes = opened(GeneralTextMemory("notes", embedder=None))
    for id in "abcd":
        mos.add("notes", f"text {id}", id=id)
    notes.relate("a", "knows", "b")
    draft = mos.branch("notes", "draft")
    assert [(r.type, r.target) for r in draft.get("a").relations] == [("knows", "b")]
    draft.relate("a", "knows", "c")
    notes.relate("a", "knows", "d", weight=0.5)
    notes.relate("a", "knows", "b", weight=0.25)
    mos.merge("draft", "notes", "ours")
    found = {(r.target, r.weight) for r in notes.get("a").relations if r.outgoing}
    assert found == {("b", 0.25), ("c", 1.0), ("d", 0.5)}
    mos.rollback("a", 1, "notes")
    assert [r for r in notes.get("a").relations if r.outgoing] == []
    assert check(mos.records) == []


def test_trees_are_merged_by_node() -> None:
    mos, tree = opened(TreeTextMemory("tree", embedder=None))
    for id, parent in (("r", None), ("x", "r"), ("y", "r"), ("z", "x")):
        mos.add("tree", f"Part {id}", id=id, parent_id=parent)
    side = mos.branch("tree", "side")
    assert [c.id for c in side.children("r")] == ["x", "y"]
    tree.move("x", "y")
    side.move("y", "x")
    report = mos.merge("side", "tree")
    assert not report.applied
    assert {c.field for c in report.conflicts} == {"parent_id"}
    mos.merge("side", "tree", "ours")
    assert tree.get("x").parent_id == "y"
    assert tree.get("y").parent_id == "r"
    # What was deleted here and added to there.
    mos.add("side", "New leaf", id="n", parent_id="z")
    mos.delete("tree", "z")
    report = mos.merge("side", "tree")
    assert [(c.id, c.field) for c in report.conflicts] == [("z", "deleted")]
    mos.merge("side", "tree", "theirs")
    assert tree.get("n").parent_id == "z"
    assert tree.get("z").parent_id == "x"
    assert check(mos.records) == []


def test_graphs_are_merged_by_node_and_edge() -> None:
    mos, graph = opened(GraphMemory("graph", embedder=None))

    def node(**properties: Any) -> dict[str, Any]:
        return {"type": "node", "label": "P", "properties": properties}

    def edge(a: str, b: str) -> dict[str, Any]:
        ends = {"source_id": a, "target_id": b}
        return {"type": "relationship", "label": "KNOWS", **ends, "properties": {}}

    for id in "xyz":
        mos.add("graph", node(name=id), id=id)
    mos.add("graph", edge("x", "y"), id="xy")
    mos.branch("graph", "side")
    mos.update("side", "x", node(name="x", age=3))
    mos.update("graph", "x", node(name="Xaver"))
    mos.add("side", edge("z", "x"), id="zx")
    mos.delete("side", "y")
    assert mos.merge("side", "graph").conflicts == ()
    assert graph.get("x").content["properties"] == {"name": "Xaver", "age": 3}
    assert {c.id for c in graph.cubes()} == {"x", "z", "zx"}
    hits = mos.retrieve("graph", {"node": {"properties": {"name": "Xaver"}}, "depth": 1})
    assert {h.id for h in hits} >= {"x"}
    # An edge to a node that is gone here.
    mos.update("side", "z", node(name="zed"))
    mos.delete("graph", "z")
    report = mos.merge("side", "graph")
    assert not report.applied
    assert ("z", "deleted") in {(c.id, c.field) for c in report.conflicts}
    mos.merge("side", "graph", "theirs")
    assert {c.id for c in graph.cubes()} >= {"x", "z"}
    found = mos.retrieve("graph", {"node": {"properties": {"name": "zed"}}})
    assert [h.id for h in found] == ["z"]
    assert check(mos.records) == []


def test_what_comes_back_is_found_again(tmp_path: Any) -> None:
    mos = MOS(tmp_path)
    notes = mos.register_memory(GeneralTextMemory("notes", embedder=lambda texts: [
        [float(len(text)), 1.0] for text in texts
    ]))  # fmt: skip
    mos.add("notes", "Ann plays chess", {"k": 1}, id="a")
    mos.branch("notes", "draft")
    mos.update("draft", "a", metadata={"k": 2})
    mos.delete("notes", "a")
    assert mos.merge("draft", "notes", "theirs").changed == ("a",)
    assert [h.id for h in mos.retrieve("notes", "chess", filters={"k": 2})] == ["a"]
    assert notes.stats()["vectors"] == 1
    assert [(t.old, t.new, t.trigger) for t in mos.transitions("a", "notes")][-1] == (
        "DELETED", "CREATED", "branch"
    )  # fmt: skip
    assert check(mos.records) == []
    # What was forgotten for good does not.
    mos.purge("a", "notes")
    mos.update("draft", "a", "Ann plays go")
    assert mos.merge("draft", "notes", "theirs").changed == ()
    assert mos.retrieve("notes", "Ann") == []
    mos.close()


def test_what_cannot_be_merged() -> None:
    mos, _ = opened(GeneralTextMemory("notes", embedder=None))
    mos.register_memory(TreeTextMemory("tree", embedder=None))
    with pytest.raises(ArgumentError, match="two memories of one kind wanted"):
        mos.merge("notes", "tree")
    with pytest.raises(ArgumentError, match="'ours', 'theirs', 'newest', 'both', a callable"):
        mos.merge("notes", "notes", "mine")
    with pytest.raises(ArgumentError, match="name: one that no memory has wanted, got 'tree'"):
        mos.branch("notes", "tree")
