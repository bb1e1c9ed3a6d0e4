"""Sweeps: what leaves the indexes and why, what stays, and a simulated day."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory, ParametricMemory, TreeTextMemory
from memos.errors import ArgumentError
from memos.lifecycle import Policy
from memos.records.check import check

DAY = 86400.0
_numbers = itertools.count()


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mos(tmp_path: Path, clock: Clock) -> Iterator[MOS]:
    with MOS(tmp_path / "s", clock=clock) as made:
        made.register_memory(GeneralTextMemory("m", embedder=None, clock=clock))
        yield made
        assert check(made.records) == []


def add(mos: MOS, count: int, **more: Any) -> list[str]:
    items = [{"content": f"Note {next(_numbers)}.", **more} for _ in range(count)]
    return [cube.id for cube in mos.add_many("m", items)]


def hot(mos: MOS, name: str = "m") -> set[str]:
    return {cube.id for cube in mos.memory(name).cubes(None)}


def moves(mos: MOS, ids: list[str]) -> set[tuple[str, str]]:
    return {(t.new, t.trigger) for id in ids for t in mos.transitions(id)}


def test_by_capacity_the_least_valuable_leave(mos: MOS, clock: Clock) -> None:
    plain = add(mos, 4)
    important = add(mos, 2, importance=0.9)
    clock.now += 30 * DAY
    used = plain[0]
    for _ in range(5):
        mos.get(used)
    fresh = add(mos, 2, importance=0.4)
    (done,) = mos.sweep(hot_cubes=5, headroom=0.0)
    assert (done.hot, done.archived, done.over) == (5, {"capacity": 3}, 0)
    assert hot(mos) == {used, *important, *fresh}
    assert moves(mos, plain[1:]) == {("ARCHIVED", "capacity")}
    assert mos.transitions(plain[1])[0].why == "more than 5 cubes"


def test_headroom_is_left_free(mos: MOS) -> None:
    add(mos, 30)
    assert mos.sweep(hot_cubes=40)[0].hot == 30
    assert mos.sweep(hot_cubes=30, headroom=0.0)[0].hot == 30
    assert mos.sweep(hot_cubes=30, headroom=0.1)[0].hot == 27
    assert mos.sweep(hot_cubes=20, headroom=0.25)[0].hot == 15


def test_by_bytes(mos: MOS) -> None:
    add(mos, 10)
    before = mos.sweep(hot_bytes=10**9)[0].hot_bytes
    assert before is not None
    (done,) = mos.sweep(hot_bytes=before // 2, headroom=0.0)
    assert 0 < done.hot < 10
    assert done.hot_bytes is not None
    assert done.hot_bytes <= before // 2
    assert mos.sweep(hot_bytes=10**9)[0].hot_bytes == done.hot_bytes


def test_by_age(mos: MOS, clock: Clock) -> None:
    old, kept = add(mos, 2), add(mos, 1, importance=1.0)
    clock.now += 5 * DAY
    mos.get(old[1])
    clock.now += 6 * DAY
    new = add(mos, 1)
    (done,) = mos.sweep(archive_after_s=10 * DAY)
    assert done.archived == {"age": 1}
    assert hot(mos) == {old[1], *kept, *new}
    mos.get(old[0])
    assert mos.sweep(archive_after_s=10 * DAY)[0].archived == {}


def test_by_importance_after_a_while(mos: MOS, clock: Clock) -> None:
    low, high = add(mos, 2, importance=0.1), add(mos, 1)
    assert mos.sweep(least_importance=0.3)[0].archived == {}
    clock.now += 2 * DAY
    mos.get(low[0])
    assert mos.sweep(least_importance=0.3)[0].archived == {"importance": 1}
    assert hot(mos) == {low[0], *high}


def test_what_has_outlived_its_time_is_deleted(mos: MOS, clock: Clock) -> None:
    short, rest = add(mos, 2, ttl_s=10), add(mos, 1)
    mos.archive(short[1])
    clock.now += 11
    (done,) = mos.sweep()
    assert (done.expired, done.hot) == (2, 1)
    assert hot(mos) == set(rest)
    assert moves(mos, short) == {("ARCHIVED", "call"), ("DELETED", "ttl")}


def test_what_was_archived_long_ago_is_deleted_where_that_is_asked_for(
    mos: MOS, clock: Clock
) -> None:
    ids = add(mos, 3)
    mos.archive(ids[0])
    clock.now += 50 * DAY
    mos.archive(ids[1])
    assert mos.sweep()[0].deleted == 0
    assert mos.sweep(delete_after_s=40 * DAY)[0].deleted == 1
    assert moves(mos, ids[:1]) == {("ARCHIVED", "call"), ("DELETED", "age")}
    assert mos.get(ids[1]).state == "ACTIVATED"


def test_of_a_tree_the_leaves_leave_first(mos: MOS, clock: Clock) -> None:
    tree = mos.register_memory(TreeTextMemory("t", embedder=None, clock=clock))
    root = tree.add_document("# A\n\n## B\n\nOne.\n\nTwo.\n\n## C\n\nThree.\n")
    b, _ = tree.children(root.id)
    one, two = tree.children(b.id)
    clock.now += 100 * DAY
    mos.get(one.id)
    (done,) = mos.sweep(hot_cubes=3, memory="t", headroom=0.0)
    assert done.hot == 3
    assert hot(mos, "t") == {root.id, b.id, one.id}  # what is above a used one stays
    mos.pin(one.id)
    (done,) = mos.sweep(hot_cubes=0, memory="t")
    assert (done.hot, done.over) == (3, 3)
    (done,) = mos.sweep(archive_after_s=1.0, settle_s=0, memory="t")
    assert done.hot == 3
    mos.use(two.id)
    assert hot(mos, "t") == {root.id, b.id, one.id, two.id}


def test_of_a_graph_relationships_go_with_their_nodes(mos: MOS, clock: Clock) -> None:
    graph = mos.register_memory(GraphMemory("g", embedder=None, clock=clock))

    def node(name: str) -> str:
        content = {"type": "node", "label": "Person", "properties": {"name": name}}
        return mos.add("g", content).id

    names = [node(name) for name in "abcd"]
    for a, b in itertools.pairwise(names):
        graph.relate(a, "KNOWS", b)
    clock.now += 100 * DAY
    for name in names[:2]:
        mos.get(name)
    (done,) = mos.sweep(hot_cubes=3, memory="g", headroom=0.0)
    assert done.hot == 3
    kinds = {cube.id: cube.kind for cube in graph.cubes(None)}
    assert sorted(kinds.values()) == ["node", "node", "relationship"]
    assert set(names[:2]) <= set(kinds)


def test_an_adapter_in_use_stays_and_others_leave_the_device(tmp_path: Path, clock: Clock) -> None:
    torch = pytest.importorskip("torch")
    from memos.adapters.adapter import Adapter, Factors
    from tests.models import build

    model = build("llama")
    name = "model.layers.0.self_attn.q_proj"

    def adapter(seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        down, up = (torch.randn(size, generator=generator) for size in ((2, 32), (32, 2)))
        return Adapter({name: Factors(down, up, 0.5)}, {"peft_type": "LORA"})

    with MOS(tmp_path / "a", clock=clock) as mos:
        skills = mos.register_memory(ParametricMemory("skills", embedder=None, clock=clock))
        ids = [mos.add("skills", adapter(i), {"name": f"nr{i}"}).id for i in range(3)]
        skills.attach(model)
        for i in range(3):
            with skills.use(f"nr{i}"):
                pass
        assert skills.stats()["device"]["adapters"] == 3
        with skills.use("nr1"):
            with pytest.raises(ArgumentError, match="in use"):
                mos.archive(ids[1])
            (done,) = mos.sweep(hot_cubes=0)
            assert (done.hot, done.over) == (1, 1)
            assert skills.stats()["device"]["adapters"] == 1
        assert hot(mos, "skills") == {ids[1]}
        with pytest.raises(ArgumentError, match="which another adapter has"):
            mos.add("skills", adapter(9), {"name": "nr2"})
        with skills.use("nr2"):  # it is used, and back
            assert hot(mos, "skills") == set(ids[1:])
        assert check(mos.records) == []


def test_policies_are_checked(mos: MOS) -> None:
    for wrong in (
        {"hot_cubes": -1}, {"hot_cubes": True}, {"hot_bytes": 0.5}, {"archive_after_s": -1.0},
        {"least_importance": 2}, {"headroom": "x"}, {"half_life_s": 0},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            mos.sweep(**wrong)
    with pytest.raises(ArgumentError, match="got both"):
        mos.sweep(Policy(), hot_cubes=3)
    with pytest.raises(ArgumentError, match="a Policy wanted"):
        mos.sweep({"m": 3})  # type: ignore[dict-item]
    add(mos, 3)
    assert [done.memory for done in mos.sweep({"m": Policy(hot_cubes=1)})] == ["m"]


def test_a_day_of_use_stays_within_its_budget_and_loses_nothing(mos: MOS, clock: Clock) -> None:
    rng = random.Random(3)
    ids, budget = add(mos, 300), 100
    policy = Policy(hot_cubes=budget, headroom=0.1)
    mos.sweep(policy)
    assert len(hot(mos)) <= budget
    deleted: set[str] = set()
    for step in range(48):
        clock.now += DAY / 48
        ids += add(mos, 2)
        for _ in range(6):
            id = ids[min(int(rng.expovariate(0.02)), len(ids) - 1)]
            if id not in deleted:
                mos.get(id)
        if step % 16 == 7:
            gone = rng.choice([id for id in ids if id not in deleted])
            mos.delete("m", gone)
            deleted.add(gone)
        assert len(hot(mos)) <= budget  # before the sweep and after it
        (done,) = mos.sweep(policy)
        assert done.hot == len(hot(mos)) <= budget
    with mos.records.database.read() as connection:
        counts = mos.memory("m").table.life.count(connection)
    assert counts.pop("DELETED") == len(deleted)
    assert sum(counts.values()) == len(ids) - len(deleted)
    for id in ids:
        if id not in deleted:
            assert mos.get(id).content.startswith("Note")
