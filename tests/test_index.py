"""The vector index against brute force in numpy: every score, every order, every filter."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memos.errors import ArgumentError, NotFoundError
from memos.records import _index_rows
from memos.records.index import VectorIndex

from .index_help import DTYPES, METRICS, as_stored, brute_force, graphed


class Histories(RuleBasedStateMachine):
    """Whole numbers of few values: equal vectors and equal scores are frequent."""

    dim = 3
    key = st.integers(-5, 12).map(lambda i: i * 1_000_003)
    number = st.integers(-2, 2)

    def __init__(self, metric: str, dtype: str, hnsw_from: int) -> None:
        super().__init__()
        self.metric, self.dtype = metric, dtype
        self.index = VectorIndex(
            self.dim, metric, dtype, hnsw_from=hnsw_from, background=False, M=4, fetch_cost=0
        )
        self.model: dict[int, Any] = {}

    @initialize(data=st.data(), size=st.integers(0, 25))
    def begin(self, data: st.DataObject, size: int) -> None:
        self.add(data, size)
        self.build()

    @rule(data=st.data(), size=st.integers(0, 4))
    def add(self, data: st.DataObject, size: int) -> None:
        keys = data.draw(st.lists(self.key, min_size=size, max_size=size))
        vector = st.lists(self.number, min_size=3, max_size=3)
        if self.metric == "cosine":
            vector = vector.filter(any)
        vectors = data.draw(st.lists(vector, min_size=size, max_size=size))
        self.index.add(np.array(keys, np.int64), np.array(vectors, np.float32).reshape(size, 3))
        for key, v in zip(keys, vectors, strict=True):
            self.model[key] = as_stored(self.metric, self.dtype, v)

    @rule(keys=st.lists(key, max_size=3))
    def remove(self, keys: list[int]) -> None:
        assert self.index.remove(keys) == len(self.model.keys() & set(keys))
        for key in keys:
            self.model.pop(key, None)

    @rule(query=st.lists(number, min_size=3, max_size=3), data=st.data())
    def search(self, query: list[int], data: st.DataObject) -> None:
        if self.metric == "cosine" and not any(query):
            with pytest.raises(ArgumentError, match="query: a zero vector"):
                self.index.search(query, 1)
            return
        allowed = data.draw(st.none() | st.sets(self.key).map(sorted))
        for only in (None, allowed):
            for k in (1, 2, 5, 30):
                keys, scores = self.index.search(query, k, only)
                want, want_scores = brute_force(self.metric, self.model, query, k, only)
                assert keys.tolist() == want
                assert keys.dtype == np.int64
                assert scores.dtype == np.float32
                np.testing.assert_array_equal(scores, want_scores)

    @rule()
    def build(self) -> None:
        self.index.build(num_threads=1)

    @rule()
    def compact(self) -> None:
        """What a thousand dead rows would bring about."""
        if self.index._view.graph is None:
            self.index._vectors.compact()
            self.index._view = self.index._view._replace(rows=self.index._vectors.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.model))))
        want = np.array([self.model[key] for key in keys], np.float32).reshape(len(keys), 3)
        np.testing.assert_array_equal(self.index.get(keys), want)

    @invariant()
    def has_the_same_keys(self) -> None:
        assert self.index.keys().tolist() == sorted(self.model)
        assert len(self.index) == len(self.model)


@pytest.mark.parametrize("hnsw_from", [10_000, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_histories(metric: str, dtype: str, hnsw_from: int) -> None:
    run_state_machine_as_test(
        lambda: Histories(metric, dtype, hnsw_from),
        settings=settings(max_examples=25, stateful_step_count=20),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=8)
@given(data=st.data())
def test_larger_collections_in_many_chunks(metric: str, dtype: str, data: st.DataObject) -> None:
    """Chunks of few rows, blocks of fewer: every seam between them is crossed."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    index = VectorIndex(24, metric, dtype, hnsw=False)
    model: dict[int, Any] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        n = int(rng.integers(1, 1500))
        keys = rng.integers(-4000, 4000, n)
        x = rng.standard_normal((n, 24)) * 10.0 ** rng.integers(-3, 3)
        x[rng.integers(0, n, n // 4)] = x[0]
        index.add(keys, x)
        for key, v in zip(keys.tolist(), x, strict=True):
            model[key] = as_stored(metric, dtype, v)
        gone = rng.integers(-4000, 4000, int(rng.integers(0, 2000)))
        index.remove(gone)
        for key in gone.tolist():
            model.pop(key, None)
    assert index.keys().tolist() == sorted(model)
    for share in (None, 0.9, 0.1, 0.0):
        query = rng.standard_normal(24)
        allowed = None
        if share is not None:
            allowed = np.flatnonzero(rng.random(9000) < share) - 4500
        keys, scores = index.search(query, 20, allowed)
        want, want_scores = brute_force(
            metric, model, query, 20, None if allowed is None else allowed.tolist()
        )
        assert keys.tolist() == want
        np.testing.assert_array_equal(scores, want_scores)


def test_scores_far_from_the_origin_are_exact() -> None:
    """Where |q|^2 + |v|^2 - 2 q v has no correct digit left in float32."""
    rng = np.random.default_rng(0)
    x = (1000 + 1e-3 * rng.standard_normal((3000, 16))).astype(np.float32)
    index = VectorIndex(16, "l2", hnsw=False)
    index.add(np.arange(3000), x)
    keys, scores = index.search(x[77], 5)
    want, want_scores = brute_force("l2", dict(enumerate(x)), x[77], 5)
    assert keys.tolist() == want
    np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_numbers(dtype: str) -> None:
    sizes = [6e4, 1e-7] if dtype == "float16" else [1e17, 1e-17]
    for metric in ("dot", "l2"):
        index = VectorIndex(2, metric, dtype, hnsw=False)
        x = np.array([[sizes[0], 0], [0, sizes[0]], [sizes[1], sizes[1]]])
        index.add([1, 2, 3], x)
        model = {i + 1: as_stored(metric, dtype, v) for i, v in enumerate(x)}
        for query in ([1e17, -1e17], [1e-17, 0], [0, 0]):
            keys, scores = index.search(query, 3)
            want, want_scores = brute_force(metric, model, query, 3)
            assert (keys.tolist(), scores.tolist()) == (want, want_scores.tolist())


def test_equal_vectors_leave_the_index_alone() -> None:
    index, x = graphed()
    before = index._view.rows.total
    index.add(np.arange(2000) * 10, x)
    assert index._view.rows.total == before
    index.add([0, 10], x[[5, 1]])
    assert index._view.rows.total == before + 1


def test_of_equal_keys_in_one_call_the_last_wins() -> None:
    index = VectorIndex(2)
    index.add([3, 1, 3, 3], [[1, 0], [0, 1], [1, 1], [-1, 0]])
    assert index.keys().tolist() == [1, 3]
    assert index.get([3]).tolist() == [[-1, 0]]


def test_the_plan_says_why() -> None:
    index = VectorIndex(4, hnsw_from=100, background=False)
    assert index.plan(1).reason == "0 vectors: a graph is built from 100"
    index.add(np.arange(200), np.random.default_rng(0).standard_normal((200, 4)))
    assert "build() was not called" in index.plan(1).reason
    assert VectorIndex(4, hnsw=False).plan(1).reason == "hnsw=False"
    assert index.plan(3, [5, 7]).allowed == 2
    index, _ = graphed()
    assert index.plan(10, []).reason == "nothing is allowed"
    assert "5 of 2000 vectors allowed cost 5 to scan" in index.plan(10, np.arange(5)).reason
    assert index.memory_bytes() > 2000 * 32 * 4 * 2
    index, _ = graphed(fetch_cost=0)
    plan = index.plan(10, np.arange(0, 20_000, 100))
    assert (plan.path, plan.allowed) == ("exact", 200)
    assert plan.reason.endswith("10 of them may reach to rank 195")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: VectorIndex(0), "dim: a whole number from 1"),
        (lambda i: VectorIndex(3, "euclid"), "metric: one of cosine, dot, l2"),
        (lambda i: VectorIndex(3, dtype="int8"), "dtype: one of float32, float16"),
        (lambda i: i.add([1], [[1, 2]]), r"vectors: shape \(1, 3\) wanted, \(1, 2\) came"),
        (lambda i: i.add([1, 2], [[1, 2, 3]]), r"shape \(2, 3\) wanted"),
        (lambda i: i.add([1.5], [[1, 2, 3]]), "keys: whole numbers"),
        (lambda i: i.add([2**63], [[1, 2, 3]]), "keys: int64 wanted"),
        (lambda i: i.add([1, 2], [[1, 2, 3], [1, 2]]), "vectors: rows of equal length"),
        (lambda i: i.add([1], [["a", "b", "c"]]), "vectors: numbers wanted"),
        (lambda i: i.add([1, 2], [[1, 2, 3], [1, np.nan, 2]]), r"vectors\[1\]: finite .* nan"),
        (lambda i: i.add([1], [[1, -np.inf, 2]]), r"vectors\[0\]: finite numbers wanted, -inf"),
        (lambda i: i.add([1, 2], [[1, 2, 3], [0, 0, 0]]), r"vectors\[1\]: a zero vector has no"),
        (lambda i: i.add([1], [[1e30, 0, 0]]), r"vectors\[0\]: a length of at most 1e\+18"),
        (lambda i: i.search([1, 2], 1), r"query: 3 numbers wanted, shape \(2,\) came"),
        (lambda i: i.search([1, np.nan, 2], 1), "query: finite numbers wanted, nan came"),
        (lambda i: i.search([0, 0, 0], 1), "query: a zero vector has no direction"),
        (lambda i: i.search([1, 2, 3], 0), "k: a whole number from 1 wanted, 0 came"),
        (lambda i: i.search([1, 2, 3], 1, [2, 1]), "allowed: ascending"),
        (lambda i: i.search([1, 2, 3], 1, [1, 1]), "allowed: ascending"),
        (lambda i: i.search([1, 2, 3], 1, [0.5]), "allowed: whole numbers"),
        (lambda i: i.build(num_threads=0), "num_threads: a whole number"),
    ],
)
def test_mistakes_are_named_and_change_nothing(call: Any, message: str) -> None:
    index = VectorIndex(3)
    index.add([7], [[1, 1, 1]])
    with pytest.raises(ArgumentError, match=message):
        call(index)
    assert index.keys().tolist() == [7]
    with pytest.raises(NotFoundError, match="key 8: not in the index"):
        index.get([7, 8])


def test_numbers_beyond_float16_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"vectors\[1\]: numbers up to 65504 wanted"):
        VectorIndex(1, "dot", "float16").add([1, 2], [[1], [70_000]])
    index = VectorIndex(1, "cosine", "float16")
    index.add([1], [[70_000]])
    assert index.get([1]).tolist() == [[1]]


def test_chunks_are_small_in_these_tests() -> None:
    """test_larger_collections crosses chunks only while they are smaller than its collections."""
    assert _index_rows.BLOCK_ROWS <= 1024
    index = VectorIndex(2, hnsw=False)
    for i in range(4):
        index.add(np.arange(i * 1000, (i + 1) * 1000), np.ones((1000, 2)))
    assert len(index._view.rows.chunks) > 1
