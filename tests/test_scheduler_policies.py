"""Every policy against plain models, and what all of them promise to an engine."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError
from memos.scheduler import prefix, reuse
from memos.scheduler.engines import BlockPolicy
from memos.scheduler.policy import make_policy, policies
from memos.scheduler.prefix import Memos
from memos.scheduler.replay import Request, clairvoyant, load_trace, replay
from memos.scheduler.workload import SHAPES, synthetic

# A path of a tree: the key of a node is the path to it.
paths = st.lists(st.integers(0, 2), min_size=1, max_size=7)
lives = st.lists(st.tuples(paths, st.floats(0, 50)), min_size=1, max_size=60)


def keys_of(path: list[int]) -> list[tuple[int, ...]]:
    return [tuple(path[: i + 1]) for i in range(len(path))]


def requests_of(life: list[tuple[list[int], float]]) -> Iterator[Request]:
    now = 0.0
    for path, gap in life:
        now += gap
        yield Request(now, keys_of(path))


@settings(max_examples=60, deadline=None)
@given(lives, st.integers(1, 20), st.sampled_from(sorted(policies())))
def test_a_replay_holds_its_budget(life: Any, capacity: int, name: str) -> None:
    policy = make_policy(name, capacity)
    found = replay(list(requests_of(life)), policy, capacity)
    assert found.peak <= capacity
    assert len(policy) <= capacity
    assert 0 <= found.hits <= found.blocks == sum(len(path) for path, _ in life)
    assert len(set(policy.order())) == len(policy.order()) == len(policy)


@settings(max_examples=40, deadline=None)
@given(lives, st.integers(1, 20))
def test_lru_is_lru(life: Any, capacity: int) -> None:
    held: collections.OrderedDict[Any, None] = collections.OrderedDict()
    hits = 0
    for request in requests_of(life):
        found = 0
        while found < len(request.keys) and request.keys[found] in held:
            found += 1
        hits += found
        for key in reversed(request.keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > capacity:
            held.popitem(last=False)
    policy = make_policy("lru", capacity)
    assert replay(list(requests_of(life)), policy, capacity).hits == hits
    assert policy.order() == list(held)


@settings(max_examples=40, deadline=None)
@given(lives, st.integers(1, 20), st.booleans())
def test_memos_strands_no_block_and_counts_right(life: Any, capacity: int, packs: bool) -> None:
    policy: Memos[Any] = Memos(capacity, packed=0.3 if packs else None)
    held: set[Any] = set()
    for request in requests_of(life):
        found = 0
        while found < len(request.keys) and request.keys[found] in held:
            found += 1
        if found < len(request.keys):
            parent = request.keys[found - 1] if found else None
            policy.on_add(request.keys[found:], parent, request.now)
        policy.on_hit(request.keys[:found], request.now)
        held.update(request.keys)
        if policy.weighs() > capacity:
            gone = policy.evict(policy.weighs() - capacity, request.now)
            assert held.issuperset(gone)
            held.difference_update(gone)
        assert set(policy.order()) == held
        assert len(policy) == len(held)
        assert all(len(key) == 1 or key[:-1] in held for key in held), "stranded"
        weight = sum(0.3 if key in policy.packed else 1.0 for key in held)
        assert policy.weighs() == pytest.approx(weight)
        assert weight <= capacity + 1e-6
        assert policy.packed <= held


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("adtr"), paths), max_size=60),
    st.sampled_from(["lru", "lfu", "memos"]),
    st.randoms(use_true_random=False),
)
def test_an_engine_gets_leaves_only(steps: Any, name: str, rng: random.Random) -> None:
    """Admit, delete, touch and make room in any order, as a store does."""
    now = [0.0]
    policy = BlockPolicy(make_policy(name, 10), clock=lambda: now[0])
    held: dict[bytes, bytes] = {}

    def name_of(path: tuple[int, ...]) -> bytes:
        return bytes(path).ljust(32, b"\xff") if path else bytes(32)

    for kind, path in steps:
        now[0] += 1.0
        chain = keys_of(path)
        if kind == "a":
            for key in chain:
                policy.admit(name_of(key), name_of(key[:-1]))
                held[name_of(key)] = name_of(key[:-1])
        elif kind == "t":
            for key in chain:
                policy.touch(name_of(key))
        elif kind == "d":
            policy.remove(name_of(chain[-1]))
            held.pop(name_of(chain[-1]), None)
        else:
            for key in policy.victims():
                assert key in held
                assert key not in held.values(), "something follows it"
                if rng.random() < 0.7:
                    policy.remove(key)
                    del held[key]
                elif rng.random() < 0.2:
                    break
        assert len(policy) == len(held)
    order = policy.order()
    assert sorted(order) == sorted(held)


@pytest.mark.parametrize("name", sorted(policies()))
def test_all_victims_can_be_removed(name: str) -> None:
    policy = make_policy(name, 100)
    for i in range(10):
        policy.on_add([(i, j) for j in range(5)], None, float(i))
    gone = []
    for key in policy.victims(20.0):
        policy.on_remove((key,))
        gone.append(key)
    assert sorted(gone) == [(i, j) for i in range(10) for j in range(5)]
    assert len(policy) == 0


def test_frequency_ages() -> None:
    policy = make_policy("lfu", 2)
    policy.on_add(["old"], None, 0.0)
    for now in range(5):
        policy.on_hit(["old"], float(now))
    for i in range(20):
        policy.on_add([i], None, 10.0 + i)
        policy.evict(1, 10.0 + i) if len(policy) > 2 else None
    assert "old" not in policy.order()


def sessions(seed: int, n: int, again: float) -> list[Request]:
    """Short visits, and sessions that come back after a minute."""
    rng = random.Random(seed)
    found: list[tuple[float, list[Any]]] = []
    for i in range(n):
        start = 5.0 * i
        keys = [(i, j) for j in range(8)]
        found.append((start, keys))
        if i % 4 == 0:
            for _ in range(5):
                start += rng.uniform(40, 80)
                keys = keys + [(i, len(keys) + j) for j in range(2)]
                if rng.random() < again:
                    found.append((start, keys))
    found.sort(key=lambda pair: pair[0])
    return [Request(now, keys) for now, keys in found]


def test_what_comes_back_is_learnt() -> None:
    requests = sessions(0, 1500, 1.0)
    lru = replay(requests, make_policy("lru", 100), 100)
    ours = replay(requests, make_policy("memos", 100), 100)
    best = clairvoyant(requests, 100)
    assert lru.hit_rate + 0.3 * (best.hit_rate - lru.hit_rate) < ours.hit_rate <= best.hit_rate


def test_a_replay_is_deterministic() -> None:
    requests = sessions(1, 400, 0.7)
    results = {replay(requests, make_policy("memos", 60), 60).hits for _ in range(2)}
    assert len(results) == 1


def test_costs_and_weights_count() -> None:
    policy: Memos[str] = Memos(10)
    policy.on_add(["cheap"], None, 0.0, cost=1.0)
    policy.on_add(["dear"], None, 0.0, cost=100.0)
    policy.on_add(["large"], None, 0.0, weight=5.0, cost=1.0)
    assert policy.evict(1.0, 1.0) == ["large"]
    assert policy.evict(1.0, 1.0) == ["cheap"]
    assert policy.explain("dear", 1.0)["held"]
    assert not policy.explain("cheap", 1.0)["held"]
    assert policy.explain("unknown", 1.0) == {}


def test_the_index_is_that_of_the_best_wait() -> None:
    rates = np.full((1, reuse.BINS), 1e-9)
    rates[0, 10] = 1.0
    index = reuse.index_of(rates)[0]
    best = 0.0
    used = left = 0.0
    waited = 0.0
    left = 1.0
    for b in range(reuse.BINS):  # from age 0, waits of every length
        mass = rates[0, b] * reuse.WIDTHS[b]
        chance = -np.expm1(-mass)
        waited += left * (chance / rates[0, b])
        used += left * chance
        left *= 1 - chance
        best = max(best, used / waited)
    assert index[0] == pytest.approx(best)
    assert index[10] > index[5] > index[0] > index[11]


def test_rates_are_learnt() -> None:
    model = reuse.Reuse((2,))
    for _ in range(500):
        model.end(0, 100.0, 1.0, True)
        model.end(1, 100.0, 1.0, False)
    nothing = np.zeros(0)
    model.update(nothing.astype(int), nothing, nothing, 1.0)
    assert model.describe(0, 80.0)[1] > 10 * model.describe(1, 80.0)[1]
    ages = np.array([0.0, 0.99, 1.0, 1.4143, 3.0, 1e12])
    assert reuse.bins_of(np.maximum(ages, 1e-9)).tolist() == [reuse.bin_of(a) for a in ages]


def test_traces_are_read(tmp_path: Any) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1500, "hash_ids": [1, 2]}\n\n{"hash_ids": [1]}\n')
    assert load_trace(path) == [Request(1.5, [1, 2]), Request(3.0, [1])]
    path.write_text('{"timestamp": 0}\n')
    with pytest.raises(ArgumentError, match="line 1"):
        load_trace(path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"lru, lfu, s3fifo, arc, memos wanted"):
        make_policy("best", 10)
    with pytest.raises(ArgumentError, match="more than 0"):
        make_policy("lru", 0)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_no_shape_of_traffic_makes_it_bad(shape: str) -> None:
    requests = synthetic(shape, 1200, seed=7)
    assert requests == synthetic(shape, 1200, seed=7)
    assert all(a.now <= b.now for a, b in itertools.pairwise(requests))
    parents: dict[int, Any] = {}
    for request in requests:
        for parent, key in zip([None, *request.keys], request.keys, strict=False):
            assert parents.setdefault(key, parent) == parent, "a block follows one other"
    capacity = len(parents) // 20
    rates = {n: replay(requests, make_policy(n, capacity), capacity).hit_rate for n in policies()}
    assert rates["memos"] >= max(rates.values()) - 0.02


def test_blocks_that_change_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No chain does that, and a replay of a file that does goes on."""
    monkeypatch.setattr(prefix, "_GHOSTS", 4)
    rng = random.Random(3)
    requests = [Request(float(i), rng.sample(range(12), rng.randrange(1, 6))) for i in range(2000)]
    policy: Memos[int] = Memos(5, ghosts=0.5)
    found = replay(requests, policy, 5)
    assert found.peak <= 5
    assert len(policy) <= 5
