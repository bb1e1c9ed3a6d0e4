"""Differences, rollbacks, clones, branches, and memories as they were."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos import (
    MOS,
    GeneralTextMemory,
    GraphMemory,
    ParametricMemory,
    TreeTextMemory,
    VectorMemory,
)
from memos.cube.merge import ABSENT
from memos.errors import ArgumentError, NotFoundError
from memos.records.check import check


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "folder"])
def mos(request: Any, clock: Clock, tmp_path: Path) -> Any:
    with MOS(None if request.param == "memory" else tmp_path, clock=clock) as mos:
        for kind in (GeneralTextMemory, TreeTextMemory, GraphMemory):
            mos.register_memory(kind(kind.kind, embedder=None, clock=clock))
        mos.register_memory(VectorMemory("vector", dim=2, embedder=None, clock=clock))
        yield mos
        assert check(mos.records) == []


def node(**properties: Any) -> dict[str, Any]:
    return {"type": "node", "label": "P", "properties": properties}


def test_diff_says_which_fields_changed(mos: MOS) -> None:
    mos.add("text", "one", {"a": 1, "b": 2}, id="x")
    mos.add("text", "other", id="y")
    mos.update("text", "x", "two", {"b": 3, "c": None}, importance=0.75)
    mos.relate("x", "about", "y", weight=0.5)
    assert mos.diff("x", 1, 2) == {
        "content": ("one", "two"),
        "importance": (0.5, 0.75),
        "metadata.b": (2, 3),
        "metadata.c": (ABSENT, None),
    }
    assert mos.diff("x", 2) == {"relations.about..y": (ABSENT, ["about", "", "y", 0.5, {}])}
    assert mos.diff("x", 3, 3) == {}
    mos.add("graph", node(name="Ann", age=3), id="n")
    mos.update("graph", "n", node(name="Ann", age=4))
    assert mos.diff("n", 1) == {"content.properties.age": (3, 4)}
    with pytest.raises(ArgumentError, match="a number from 1 to 3 wanted for cube 'x', got 4"):
        mos.diff("x", 4)
    with pytest.raises(NotFoundError, match="no cube 'z'"):
        mos.diff("z", 1)


def test_rollback_is_a_new_version(mos: MOS) -> None:
    mos.add("text", "one", {"a": 1}, id="x", importance=0.25)
    mos.add("text", "other", id="y")
    mos.relate("x", "about", "y")
    mos.update("text", "x", "two", {"b": 2}, importance=0.75)
    cube = mos.rollback("x", 1, author="ann")
    assert (cube.content, cube.metadata, cube.importance) == ("one", {"a": 1}, 0.25)
    assert cube.relations == ()
    assert cube.versions == 4
    assert mos.history("x")[-1].author == "ann"
    assert mos.history("x")[-1].source == "version 1"
    assert [h.id for h in mos.retrieve("text", "one")] == ["x"]
    assert mos.retrieve("text", "two") == []
    assert [h.id for h in mos.memory("text").cubes(filters={"a": 1})] == ["x"]
    assert mos.memory("text").cubes(filters={"b": 2}) == []
    assert mos.rollback("x", 3).relations[0].target == "y"
    mos.delete("text", "x")
    with pytest.raises(NotFoundError):
        mos.rollback("x", 1)


def test_rollback_of_every_kind(mos: MOS) -> None:
    mos.add("graph", node(name="Ann"), id="n")
    mos.add("graph", node(name="Bob"), id="m")
    ends = {"source_id": "n", "target_id": "m"}
    mos.add("graph", {"type": "relationship", "label": "KNOWS", **ends, "properties": {}}, id="e")
    mos.update("graph", "n", node(name="Anna"))
    assert [h.id for h in mos.retrieve("graph", "Anna")][:1] == ["n"]
    mos.rollback("n", 1)
    assert mos.retrieve("graph", "Anna") == []
    assert {h.id for h in mos.retrieve("graph", "Ann")} >= {"n", "e"}
    mos.add("vector", [1.0, 0.0], id="v")
    mos.add("vector", [0.6, 0.8], id="w")
    mos.update("vector", "v", [-1.0, 0.0])
    assert mos.retrieve("vector", [1.0, 0.0], 1)[0].id == "w"
    mos.rollback("v", 1)
    assert mos.retrieve("vector", [1.0, 0.0], 1)[0].id == "v"
    mos.add("tree", "Root", id="r")
    mos.add("tree", "Leaf", id="l", parent_id="r")
    mos.update("tree", "r", "Trunk")
    assert [h.id for h in mos.retrieve("tree", "Trunk")] == ["r", "l"]
    mos.rollback("r", 1)
    assert mos.retrieve("tree", "Trunk") == []
    assert {h.id for h in mos.retrieve("tree", "Root")} == {"r", "l"}


def test_a_clone_begins_where_the_original_is(mos: MOS) -> None:
    mos.add("text", "one", {"a": 1}, id="x", importance=0.25)
    mos.add("text", "other", id="y")
    mos.relate("x", "about", "y")
    clone = mos.clone("x", new_id="z", author="ann")
    assert (clone.content, clone.metadata, clone.importance) == ("one", {"a": 1}, 0.25)
    assert clone.derived_from == ("x",)
    edges = {(r.type, r.target) for r in clone.relations}
    assert edges == {("about", "y"), ("cloned_from", "x")}
    assert mos.history("z")[0].parents == (mos.get("x").digest,)
    mos.update("text", "z", "two")
    assert mos.get("x").content == "one"
    assert mos.get("x").versions == 2
    mos.register_memory(GeneralTextMemory("more", embedder=None))
    there = mos.clone("x", into="more", new_id="x2")
    assert there.memory == "more"
    assert {r.target for r in there.relations} == {"x", "y"}
    mos.add("tree", "Root", id="r")
    mos.add("tree", "Leaf", id="l", parent_id="r")
    assert mos.clone("l").parent_id == "r"
    mos.add("vector", [1.0, 0.0], id="v")
    assert numpy.array_equal(mos.clone("v").content["vector"], mos.get("v").content["vector"])
    mos.add("graph", node(name="Ann"), id="n")
    assert mos.clone("n").content == node(name="Ann")
    with pytest.raises(ArgumentError, match="a text memory wanted, got 'tree'"):
        mos.clone("x", into="tree")


def test_a_purge_tells_of_copies(mos: MOS) -> None:
    mos.add("text", "one", id="x")
    mos.clone("x", new_id="z")
    side = mos.branch("text", "side")
    mos.branch("side", "far")
    mos.update("side", "x", "two")
    mos.update("text", "x", "three")
    mos.merge("side", "text", "both")
    twin = next(c.id for c in mos.memory("text").cubes() if c.id.startswith("x~"))
    purged = mos.purge("x", "text")
    assert set(purged.derived) == {
        ("text", "z"), ("text", twin), ("side", "x"), ("far", "x")
    }  # fmt: skip
    assert side.get("x").content == "two"
    assert mos.history("x", "far")[0].content == "one"


def test_a_branch_is_apart(mos: MOS) -> None:
    mos.add("tree", "Root", id="r")
    for id, parent in (("a", "r"), ("b", "r"), ("c", "a")):
        mos.add("tree", f"Part {id}", {"k": id}, id=id, parent_id=parent)
    mos.memory("tree").move("a", "b")
    mos.update("tree", "c", "Part c anew")
    mos.delete("tree", mos.add("tree", "gone", parent_id="r").id)
    side = mos.branch("tree", "side")
    for id in "rabc":
        mine, other = mos.get(id, "tree"), mos.get(id, "side")
        for name in ("content", "metadata", "parent_id", "versions", "digest", "created_at"):
            assert mine[name] == other[name]
        assert mos.history(id, "tree") == mos.history(id, "side")
    assert [c.id for c in side.cubes()] == [c.id for c in mos.memory("tree").cubes()]
    assert mos.retrieve("side", "anew")[0].id == "c"
    mos.delete("side", "a")
    mos.add("side", "New", parent_id="r")
    assert mos.get("c", "tree").parent_id == "a"
    assert mos.retrieve("tree", "New") == []


def test_a_branch_is_still_there_after_a_restart(tmp_path: Path) -> None:
    with MOS(tmp_path) as mos:
        mos.register_memory(VectorMemory("vector", dim=2, embedder=None))
        mos.add("vector", [1.0, 0.0], id="v")
        mos.branch("vector", "side")
        mos.update("side", "v", [0.0, 1.0])
    with MOS(tmp_path) as mos:
        assert mos.retrieve("vector", [1.0, 0.0])[0].score > 0.99
        assert mos.retrieve("side", [0.0, 1.0])[0].score > 0.99
        report = mos.merge("side", "vector")
        assert report.changed == ("v",)
        assert mos.retrieve("vector", [0.0, 1.0])[0].score > 0.99


def test_the_past_is_found(mos: MOS, clock: Clock) -> None:
    mos.add("text", "Ann lives in Paris", id="ann")
    mos.add("text", "Bob likes tea", id="bob")
    mos.add("tree", "Plans", id="r")
    mos.add("tree", "Go to Rome", id="l", parent_id="r")
    clock.now = 2000.0
    version = mos.update("text", "ann", "Ann lives in Berlin").digest
    mos.delete("text", "bob")
    mos.update("tree", "r", "Done")
    mos.add("text", "Carl plays chess", id="carl")
    clock.now = 3000.0
    mos.memory("tree").move("l", None)
    for time in (1500.0, 1000, datetime.datetime.fromtimestamp(1999, datetime.timezone.utc),
                 "1970-01-01T00:20:00Z", mos.history("ann")[0]):  # fmt: skip
        hits = mos.retrieve("text", "Ann lives", as_of=time)
        assert [h.content for h in hits] == ["Ann lives in Paris"]
        assert [h.id for h in mos.retrieve(None, "Bob", as_of=time)] == ["bob"]
        assert mos.retrieve("text", "Carl", as_of=time) == []
    assert mos.retrieve("text", "Ann lives", as_of=2000)[0].digest == version
    assert [h.id for h in mos.retrieve("tree", "Plans", as_of=1500)] == ["r", "l"]
    hit = mos.retrieve("tree", "Rome", include_ancestors=True, as_of=1500)[0]
    assert [a.content for a in hit.ancestors] == ["Plans"]
    hit = mos.retrieve("tree", "Rome", include_ancestors=True, as_of=2500)[0]
    assert [a.content for a in hit.ancestors] == ["Done"]
    assert mos.retrieve("tree", "Rome", include_ancestors=True, as_of=3000)[0].ancestors == ()
    assert mos.retrieve("text", "Ann", as_of=999) == []
    mos.at(1500).update("text", "ann", "Ann lives nowhere")
    assert mos.get("ann").content == "Ann lives in Berlin"
    for wrong in ("yesterday", None, datetime.datetime(2020, 1, 1), -1, True, [1]):
        if wrong is not None:
            with pytest.raises(ArgumentError, match="time: "):
                mos.retrieve("text", "Ann", as_of=wrong)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "delete", "ttl"]),
                          st.integers(0, 3)), max_size=25), st.randoms())  # fmt: skip
def test_every_moment_can_be_seen_again(steps: list[Any], random: Any) -> None:
    clock = Clock()
    mos = MOS(clock=clock)
    notes = mos.register_memory(GeneralTextMemory("notes", embedder=None, clock=clock,
                                                  on_duplicate="keep"))  # fmt: skip
    moments: list[tuple[float, Any]] = []
    used: set[str] = set()

    def seen(mos: MOS) -> Any:
        return {c.id: (c.content, c.versions, c.digest) for c in mos.memory("notes").cubes()}

    for id, what, number in steps:
        clock.now += number
        notes.expire()
        alive = {c.id for c in notes.cubes()}
        if what != "delete" and id not in used:
            used.add(id)
            mos.add("notes", f"w{number}", id=id, ttl_s=2 if what == "ttl" else None)
        elif id in alive:
            if what == "delete":
                mos.delete("notes", id)
            else:
                mos.update("notes", id, f"w{number}")
        moments.append((clock.now, seen(mos)))
    last = dict(moments)  # of several at one moment the last one
    clock.now += 5
    for at in random.sample(sorted(last), min(4, len(last))):
        assert seen(mos.at(at)) == last[at]


def found_after(notes: GeneralTextMemory, damage: str) -> set[str]:
    """What a check finds after this statement, which is undone."""
    found: set[str] = set()
    try:
        with notes.records.database.write() as connection:
            connection.exec_driver_sql(damage)
            found |= {p.what for p in check(notes.records, connection=connection)}
            raise ZeroDivisionError
    except ZeroDivisionError:
        return found


def test_a_changed_history_is_found(tmp_path: Path) -> None:
    with MOS(tmp_path) as mos:
        notes = mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.add("notes", "one", id="x")
        mos.update("notes", "x", "two", author="ann")
        mos.update("notes", "x", "three")
        assert check(mos.records) == []
        for damage in (
            "UPDATE versions SET author = 'bob' WHERE version = 2",
            "UPDATE versions SET metadata = '{\"a\":1}' WHERE version = 1",
            "UPDATE bodies SET text = 'four' WHERE text = 'two'",
            "UPDATE cubes SET creator = 'eve'",
            "UPDATE versions SET version_digest = x'00' WHERE version = 1",
            "DELETE FROM versions WHERE version = 1",
            "UPDATE cubes SET parents = NULL",
        ):
            assert "version" in found_after(notes, damage), damage
        assert check(mos.records) == []


def test_the_past_of_a_principal_holds_what_it_may_read(mos: MOS, clock: Clock) -> None:
    mos.add("text", "The open plan", id="open")
    mos.add("text", "The secret plan", id="secret", acl={"read": ["user:eve"]})
    mos.grant("user:ann", "read", memory="text")
    clock.now = 2000.0
    mos.update("text", "open", "The new plan")
    mos.update("text", "secret", "The dark plan")
    ann, eve = mos.as_principal("user:ann"), mos.as_principal("user:eve")
    assert [h.content for h in ann.retrieve("text", "plan", as_of=1500)] == ["The open plan"]
    assert [h.content for h in eve.retrieve("text", "plan", as_of=1500)] == ["The secret plan"]
    assert len(mos.retrieve("text", "plan", as_of=1500)) == 2


def test_adapters_are_branched_and_merged_by_digest(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the folders are PEFT's")
    import torch

    from .peft_adapters import build, save_adapter

    for rank in (2, 4, 6):
        save_adapter(tmp_path / f"r{rank}", r=rank)
    model, ids = build("llama"), torch.arange(1, 9).view(1, 8)

    def logits(memory: Any, name: str) -> Any:
        memory.attach(model)
        try:
            with memory.use(name), torch.inference_mode():
                return model(ids).logits
        finally:
            memory.detach()

    with MOS(tmp_path / "store") as mos:
        skills = mos.register_memory(ParametricMemory("skills", embedder=None))
        mos.add("skills", tmp_path / "r2", {"name": "one"}, id="one")
        trial = mos.branch("skills", "trial")
        mos.update("trial", "one", tmp_path / "r4")
        mos.add("trial", tmp_path / "r6", {"name": "two"}, id="two")
        before, after = logits(skills, "one"), logits(trial, "one")
        assert not torch.equal(before, after)
        report = mos.merge("trial", "skills")
        assert (report.added, report.changed) == (("two",), ("one",))
        assert torch.equal(logits(skills, "one"), after)
        assert torch.equal(logits(skills, "two"), logits(trial, "two"))
        mos.rollback("one", 1, "skills")
        assert torch.equal(logits(skills, "one"), before)
        mos.delete("trial", "one")
        assert not skills.check()
