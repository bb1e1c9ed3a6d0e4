"""The graph of the vector index: recall, what is written meanwhile, its builder, threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos.records.index import VectorIndex

from .index_help import DTYPES, METRICS, as_stored, brute_force, clustered, graphed, recall


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
