"""The vector index against brute force in numpy: every score, every order, every filter."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
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

np = pytest.importorskip("numpy")

from memos.errors import ArgumentError, NotFoundError, StoreError  # noqa: E402
from memos.records import _index_file, _index_rows  # noqa: E402
from memos.records.index import VectorIndex  # noqa: E402

METRICS = ("cosine", "dot", "l2")
DTYPES = ("float32", "float16")


def scores_of(metric: str, vectors: Any, query: Any) -> Any:
    """Scores [n] float32 of float32 vectors, summed in float64."""
    v, q = vectors.astype(np.float64), np.asarray(query, np.float64)
    if metric == "l2":
        return -((v - q) ** 2).sum(axis=1).astype(np.float32)
    dot = (v * (q / np.sqrt((q**2).sum()) if metric == "cosine" else q)).sum(axis=1)
    if metric == "cosine":
        dot = dot / np.sqrt((v**2).sum(axis=1))
    return dot.astype(np.float32)


def brute_force(
    metric: str, model: dict[int, Any], query: Any, k: int, allowed: Any = None
) -> tuple[list[int], Any]:
    keys = sorted(model if allowed is None else set(model) & set(allowed))
    if not keys:
        return [], np.empty(0, np.float32)
    scores = scores_of(metric, np.stack([model[key] for key in keys]), query)
    order = sorted(range(len(keys)), key=lambda i: (-scores[i], keys[i]))[:k]
    return [keys[i] for i in order], scores[order]


def as_stored(metric: str, dtype: str, vector: Any) -> Any:
    v = np.asarray(vector, np.float64)
    length = np.sqrt((v**2).sum())
    if metric == "cosine" and not 0.5 <= length <= 2:
        v = v / length
    return v.astype(dtype).astype(np.float32)


def clustered(n: int, dim: int, seed: int = 0, clusters: int = 40) -> Any:
    """Clusters overlap, as those of texts do; the queries are other draws from them."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    x = centres[rng.integers(0, clusters, n)] + 0.7 * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def graphed(n: int = 2000, dim: int = 32, **options: Any) -> tuple[VectorIndex, Any]:
    """An index that searches by its graph, of keys 0, 10, 20, ... and their vectors."""
    pytest.importorskip("hnswlib")
    x = clustered(n, dim)
    forced = {"hnsw_from": 500, "background": False, "ef_search": 64, "fetch_cost": 1}
    index = VectorIndex(dim, **{**forced, **options})
    index.add(np.arange(n) * 10, x)
    index.build(num_threads=1)
    assert index.plan(10).path == "hnsw", index.plan(10)
    return index, x


def recall(
    index: VectorIndex, x: Any, keys: Any, allowed: Any = None, k: int = 10, by: str | None = None
) -> float:
    """Mean recall@k of 50 queries; ``by``: the path that nearly all of them take."""
    found, paths = [], []
    model = dict(zip(keys.tolist(), x, strict=True))
    for query in clustered(50, x.shape[1], seed=5):
        want, _ = brute_force("cosine", model, query, k, allowed)
        got, scores, plan = index.search_with_plan(query, k, allowed)
        assert (np.diff(scores) <= 0).all()
        paths.append(plan.path)
        found.append(len(set(got.tolist()) & set(want)) / len(want))
    assert by is None or paths.count(by) >= 45, paths
    return float(np.mean(found))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 0.5, 0.2, 0.1, 0.01, 0.003])
def test_recall_under_filters(dtype: str, share: float) -> None:
    index, x = graphed(dtype=dtype)
    keys = np.arange(2000) * 10
    rng = np.random.default_rng(1)
    allowed = None if share == 1 else np.sort(rng.choice(keys, int(share * 2000), replace=False))
    assert recall(index, x, keys, allowed) >= 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_recall_of_the_graph_for_every_metric(metric: str) -> None:
    pytest.importorskip("hnswlib")
    x = clustered(4000, 32) * np.exp(0.3 * np.random.default_rng(3).standard_normal((4000, 1)))
    index = VectorIndex(32, metric, hnsw_from=1000, background=False, fetch_cost=1)
    index.add(np.arange(4000), x)
    index.build(num_threads=2)
    model = {i: as_stored(metric, "float32", v) for i, v in enumerate(x)}
    hits = 0
    for query in clustered(50, 32, seed=5):
        keys, scores, plan = index.search_with_plan(query, 10)
        assert plan.path == "hnsw"
        want, want_scores = brute_force(metric, model, query, 10)
        hits += len(set(keys.tolist()) & set(want))
        if keys.tolist() == want:
            np.testing.assert_array_equal(scores, want_scores)
    assert hits >= 0.99 * 500


def test_a_filter_against_the_query_is_scanned() -> None:
    """Only what is farthest from the query is allowed: the graph cannot see it."""
    index, x = graphed()
    query = x[0]
    allowed = np.sort(np.argsort(x @ query)[:1200]) * 10
    keys, _, plan = index.search_with_plan(query, 10, allowed)
    assert plan.path == "hnsw, exact"
    want, _ = brute_force("cosine", dict(zip(range(0, 20_000, 10), x, strict=True)), query, 10,
                          allowed.tolist())  # fmt: skip
    assert keys.tolist() == want


def test_what_is_written_after_the_build_is_found_at_once() -> None:
    index, x = graphed()
    fresh = clustered(300, 32, seed=8)
    index.add(np.arange(300) * 10 + 5, fresh)  # beside the graph
    index.add(np.arange(0, 1000, 10), -x[:100])  # replaced
    index.remove(np.arange(1000, 3000, 10))
    plan = index.plan(10)
    assert (plan.path, plan.tail) == ("hnsw", 400)
    model = dict(zip(range(0, 20_000, 10), x, strict=True))
    model.update(zip(range(5, 3000, 10), fresh, strict=True))
    model.update(zip(range(0, 1000, 10), -x[:100], strict=True))
    for key in range(1000, 3000, 10):
        del model[key]
    keys = np.array(sorted(model))
    vectors = np.stack([model[key] for key in keys.tolist()])
    for _ in range(2):
        assert recall(index, vectors, keys, by="hnsw") >= 0.99
        for i in (0, 50, 99):
            assert index.search(-x[i], 1)[0].tolist() == [10 * i]
            assert index.search(fresh[i], 1)[0].tolist() == [10 * i + 5]
            assert 1000 + 10 * i not in index.search(x[100 + i], 20)[0]
        index.build(num_threads=1)
        assert index.plan(10).tail == 0


def test_the_dead_do_not_fill_the_list_of_the_graph() -> None:
    index, x = graphed()
    query = clustered(1, 32, seed=5)[0]
    index.remove(np.argsort(-(x @ query))[:150] * 10)
    assert index.search_with_plan(query, 10)[2].path == "hnsw"
    index = VectorIndex(32, hnsw_from=500, background=False, fetch_cost=1)
    index.add(np.arange(2000), x)
    while index._next is None or index._next.covered < 2000:
        assert index._step(1)
    index.remove(np.argsort(-(x @ query))[:150])  # they are in a graph that nobody sees yet
    index.build(num_threads=1)
    assert index.search_with_plan(query, 10)[2].path == "hnsw"


def test_a_worn_graph_serves_until_another_is_ready() -> None:
    index, x = graphed(6000)
    index.remove(np.arange(0, 30_000, 10))
    keys, rest = np.arange(30_000, 60_000, 10), x[3000:]
    assert recall(index, rest, keys, by="hnsw") >= 0.99
    worn = index._view.graph
    assert index._step(1)  # the rows are renumbered under the old graph, the new one grows unseen
    assert index._view.graph is worn
    assert index._view.rows.dead == 0
    assert index.plan(10).path == "hnsw"
    assert recall(index, rest, keys, by="hnsw") >= 0.99
    index.add(np.arange(7), clustered(7, 32, seed=21))
    index.remove(keys[:5])
    keys, rest = keys[5:], rest[5:]
    keys = np.concatenate([np.arange(7), keys])
    rest = np.concatenate([clustered(7, 32, seed=21), rest])
    assert recall(index, rest, keys, by="hnsw") >= 0.99
    index.build(num_threads=1)
    assert index._view.graph is not worn
    assert recall(index, rest, keys, by="hnsw") >= 0.99
    index.remove(keys[100:])
    index.build(num_threads=1)
    assert index._view.graph is None  # too few are left
    assert "100 vectors" in index.plan(1).reason


def test_the_builder_works_behind_the_collection() -> None:
    pytest.importorskip("hnswlib")
    index = VectorIndex(32, hnsw_from=500, fetch_cost=1)
    x = clustered(3000, 32)
    for lo in range(0, 3000, 300):
        index.add(np.arange(lo, lo + 300), x[lo : lo + 300])
        assert index.search(x[lo], 1)[0].tolist() == [lo]
    wait_for(lambda: index.plan(10).path == "hnsw" and index.plan(10).tail <= 1000)
    assert recall(index, x, np.arange(3000)) >= 0.99
    wait_for(lambda: index._thread is None)
    index.remove(np.arange(2900))
    wait_for(lambda: index._view.graph is None and index._thread is None)


def test_a_dropped_index_stops_its_builder() -> None:
    pytest.importorskip("hnswlib")
    index = VectorIndex(64, hnsw_from=500)
    index.add(np.arange(20_000), clustered(20_000, 64))
    thread = index._thread
    assert thread is not None
    del index
    thread.join(20)
    assert not thread.is_alive()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_eight_threads() -> None:
    """Four write keys of their own, four search: no error, and whoever is stable is found."""
    pytest.importorskip("hnswlib")
    index = VectorIndex(16, hnsw_from=300, fetch_cost=1)
    stable = clustered(1000, 16)
    index.add(np.arange(1000), stable)
    errors: list[BaseException] = []
    done = threading.Event()
    model: dict[int, Any] = dict(enumerate(stable))

    def write(me: int) -> None:
        rng = np.random.default_rng(me)
        mine: dict[int, Any] = {}
        for _ in range(60):
            keys = rng.integers(0, 500, 40) + 10_000 * me
            vectors = rng.standard_normal((40, 16)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            index.add(keys, vectors)
            mine.update(zip(keys.tolist(), vectors, strict=True))
            gone = rng.integers(0, 500, 30) + 10_000 * me
            index.remove(gone)
            for key in gone.tolist():
                mine.pop(key, None)
        model.update(mine)

    def read(me: int) -> None:
        rng = np.random.default_rng(me)
        while not done.is_set():
            i = int(rng.integers(0, 1000))
            allowed = None if i % 2 else np.arange(i % 7, 50_000)
            keys, scores = index.search(stable[i], 5, allowed)
            if i >= 7:
                assert (keys[0], scores[0]) == (i, 1)
            assert (np.diff(scores) <= 0).all()

    def guarded(target: Any, me: int) -> None:
        try:
            target(me)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=guarded, args=(write, i + 1)) for i in range(4)]
    readers = [threading.Thread(target=guarded, args=(read, i)) for i in range(4)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not errors, errors
    assert index.keys().tolist() == sorted(model)
    index.build()
    keys = np.array(sorted(model))
    assert recall(index, np.stack([model[key] for key in keys.tolist()]), keys) >= 0.99


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_save_and_load(tmp_path: Path, metric: str, dtype: str) -> None:
    pytest.importorskip("hnswlib")
    x = clustered(3000, 32)
    options = {"hnsw_from": 500, "background": False, "fetch_cost": 1}
    index = VectorIndex(32, metric, dtype, **options)
    index.add(np.arange(2500), x[:2500])
    index.build(num_threads=1)
    index.remove(np.arange(0, 200, 3))
    index.add(np.arange(2400, 3000), x[2400:])
    path = tmp_path / "vectors"
    index.save(path, stamp=-(2**40))
    loaded = VectorIndex.load(path, 32, metric, dtype, **options)
    assert loaded is not None
    copy, stamp = loaded
    assert stamp == -(2**40)
    assert copy.plan(10) == index.plan(10)
    assert copy.plan(10).path == "hnsw"
    for _ in range(2):
        np.testing.assert_array_equal(copy.keys(), index.keys())
        np.testing.assert_array_equal(copy.get(copy.keys()), index.get(index.keys()))
        for query in clustered(20, 32, seed=5):
            for allowed in (None, np.arange(0, 3000, 2), np.arange(50)):
                for a, b in zip(
                    index.search(query, 10, allowed), copy.search(query, 10, allowed), strict=True
                ):
                    np.testing.assert_array_equal(a, b)
        for each in (index, copy):  # and both go on alike
            each.remove(np.arange(300, 400))
            each.add(np.arange(4000, 4200), x[:200])
            each.build(num_threads=1)
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_index_saves_and_loads(tmp_path: Path) -> None:
    VectorIndex(3).save(tmp_path / "v", stamp=4)
    loaded = VectorIndex.load(tmp_path / "v", 3)
    assert loaded is not None
    index, stamp = loaded
    assert (len(index), stamp) == (0, 4)
    index.add([1], [[1, 2, 3]])
    assert index.search([1, 2, 3], 1)[0].tolist() == [1]


def small_file(path: Path) -> bytes:
    pytest.importorskip("hnswlib")
    index = VectorIndex(3, hnsw_from=8, M=2, background=False)
    index.add(np.arange(20), clustered(20, 3))
    index.build(num_threads=1)
    assert index._view.graph is not None
    index.save(path, stamp=9)
    assert VectorIndex.load(path, 3) is not None
    return path.read_bytes()


def test_any_flipped_byte_is_a_miss(tmp_path: Path) -> None:
    data = small_file(tmp_path / "v")
    rng = np.random.default_rng(0)
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / "d").write_bytes(damaged)
        assert VectorIndex.load(tmp_path / "d", 3) is None, i


def test_any_truncation_is_a_miss(tmp_path: Path) -> None:
    data = small_file(tmp_path / "v")
    for length in range(len(data)):
        (tmp_path / "d").write_bytes(data[:length])
        assert VectorIndex.load(tmp_path / "d", 3) is None, length
    (tmp_path / "d").write_bytes(data + b"\0")
    assert VectorIndex.load(tmp_path / "d", 3) is None


def test_another_index_is_a_miss(tmp_path: Path) -> None:
    small_file(tmp_path / "v")
    assert VectorIndex.load(tmp_path / "v", 4) is None
    assert VectorIndex.load(tmp_path / "v", 3, "dot") is None
    assert VectorIndex.load(tmp_path / "v", 3, "cosine", "float16") is None
    assert VectorIndex.load(tmp_path / "nothing", 3) is None
    assert VectorIndex.load(tmp_path, 3) is None


def link_beyond_the_last_node(arrays: dict[str, Any]) -> None:
    arrays["links"].view(np.uint32)[7, 1] = len(arrays["labels"])


def link_to_a_node_of_a_lower_level(arrays: dict[str, Any]) -> None:
    upper = arrays["upper"].reshape(-1, 4 * 17).view(np.uint32)
    upper[0, 1] = np.flatnonzero(arrays["levels"] == 0)[0]


def too_many_links(arrays: dict[str, Any]) -> None:
    arrays["links"].view(np.uint16)[3, 0] = 33


def a_level_too_many(arrays: dict[str, Any]) -> None:
    arrays["levels"][5] += 1


def all_levels_gone(arrays: dict[str, Any]) -> None:
    arrays["levels"][:] = 0


def label_beyond_the_last_row(arrays: dict[str, Any]) -> None:
    arrays["labels"][9] = 2000


@pytest.mark.parametrize(
    "damage",
    [
        link_beyond_the_last_node,
        link_to_a_node_of_a_lower_level,
        too_many_links,
        a_level_too_many,
        all_levels_gone,
        label_beyond_the_last_row,
    ],
)
def test_a_graph_whose_links_lead_nowhere_is_left_out(tmp_path: Path, damage: Any) -> None:
    """Damage under a right checksum: hnswlib would follow the links out of its memory."""
    index, x = graphed()
    scalars, arrays = index._view.graph.state()
    options = {"hnsw_from": 500, "background": False}
    for is_damaged in (False, True):
        if is_damaged:
            arrays = {name: array.copy() for name, array in arrays.items()}
            damage(arrays)
        _index_file.write(tmp_path / "v", index._view.rows, (scalars, arrays), 1)
        loaded = VectorIndex.load(tmp_path / "v", 32, **options)
        assert loaded is not None
        assert (loaded[0]._view.graph is None) == is_damaged
        assert loaded[0].search(x[3], 1)[0].tolist() == [30]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="was not saved"):
        VectorIndex(3).save(tmp_path / "missing" / "v")


def test_without_hnswlib_everything_is_exact(tmp_path: Path) -> None:
    small_file(tmp_path / "v")
    code = f"""
import sys
sys.modules["hnswlib"] = None
import numpy as np
from memos.records.index import VectorIndex
index = VectorIndex(3, hnsw_from=2)
index.add([1, 2, 3], np.eye(3))
index.build()
assert index.search([0, 1, 0], 1)[0].tolist() == [2]
assert "pip install 'memos-native[vector]'" in index.plan(1).reason
index, stamp = VectorIndex.load({str(tmp_path / "v")!r}, 3, hnsw_from=2)
assert (len(index), stamp, index.plan(1).path) == (20, 9, "exact")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_program_that_ends_does_not_wait_for_its_builder() -> None:
    pytest.importorskip("hnswlib")
    code = """
import numpy as np
from memos.records.index import VectorIndex
index = VectorIndex(256, hnsw_from=100)
index.add(np.arange(100_000), np.random.default_rng(0).standard_normal((100_000, 256), "f"))
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent.parent
    )


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
