"""Vector search: what a filter costs in recall and time, and what the index costs in memory.

100,000 unit vectors of 384 numbers in 1,000 overlapping clusters, queries from the same clusters.
``selectivity`` is the share of keys that a search may return, drawn at random. recall_at_10 is
against a scan of everything in float64; p50_ms and p95_ms are of single searches, one after the
other. ``path`` is the way most searches took. "numpy" is the scan that one would write by hand.
load_s: from a file that was just written, checksum and graph included.
"""

from __future__ import annotations

import collections
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

from memos.records.index import VectorIndex  # noqa: E402

UNITS, DIM, CLUSTERS, QUERIES, K = 100_000, 384, 1_000, 100, 10
SELECTIVITIES = (1.0, 0.5, 0.1, 0.01, 0.001)


@functools.lru_cache(maxsize=1)
def data() -> tuple[Any, Any]:
    """Vectors and queries."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, DIM), dtype=np.float32)

    def draw(n: int) -> Any:
        x = centres[rng.integers(0, CLUSTERS, n)]
        x += 0.7 * rng.standard_normal((n, DIM), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return draw(UNITS), draw(QUERIES)


@functools.lru_cache(maxsize=len(SELECTIVITIES))
def case(selectivity: float) -> tuple[Any, list[set[int]]]:
    """The allowed keys, and the right answer to each query."""
    x, queries = data()
    keys = np.arange(UNITS)
    if selectivity < 1:
        draw = np.random.default_rng(1).choice(UNITS, int(UNITS * selectivity), replace=False)
        keys = np.sort(draw)
    answers = []
    chosen = x[keys]
    for query in queries:
        near = keys[np.argsort(-(chosen @ query))[: 4 * K]]
        exact = (x[near].astype(np.float64) * query).sum(axis=1)
        answers.append(set(near[np.argsort(-exact)[:K]].tolist()))
    return (None if selectivity == 1 else keys), answers


@functools.lru_cache(maxsize=4)
def built(dtype: str, hnsw: bool) -> tuple[VectorIndex, float]:
    """The index of all vectors, and the seconds it took to add them and to build the graph."""
    index = VectorIndex(DIM, "cosine", dtype, hnsw=hnsw, background=False)
    start = time.perf_counter()
    index.add(np.arange(UNITS), data()[0])
    index.build()
    return index, time.perf_counter() - start


def measure(
    benchmark: Any, search: Callable[[Any, Any], tuple[Any, str]], selectivity: float
) -> dict[str, Any]:
    allowed, answers = case(selectivity)
    queries = data()[1]
    found: list[float] = []
    times: list[float] = []
    paths: collections.Counter[str] = collections.Counter()

    def run() -> None:
        for query, answer in zip(queries, answers, strict=True):
            start = time.perf_counter()
            keys, path = search(query, allowed)
            times.append(time.perf_counter() - start)
            found.append(len(answer & set(keys.tolist())) / K)
            paths[path] += 1

    benchmark.pedantic(run, rounds=1, warmup_rounds=1)
    p50, p95 = np.percentile(times[-QUERIES:], [50, 95])
    return {
        "units": UNITS,
        "dim": DIM,
        "selectivity": selectivity,
        "path": paths.most_common(1)[0][0],
        "recall_at_10": float(np.mean(found)),
        "p50_ms": float(p50) * 1e3,
        "p95_ms": float(p95) * 1e3,
    }


@pytest.mark.parametrize("selectivity", SELECTIVITIES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_search(benchmark: Any, dtype: str, selectivity: float) -> None:
    index, build_s = built(dtype, True)

    def search(query: Any, allowed: Any) -> tuple[Any, str]:
        keys, _, plan = index.search_with_plan(query, K, allowed)
        return keys, plan.path

    row = measure(benchmark, search, selectivity)
    if index.plan(K).path == "exact":
        pytest.skip("everything is exact here: pip install 'memos-native[vector]'")
    assert row["recall_at_10"] >= 0.99
    benchmark.extra_info.update(
        op="search",
        dtype=dtype,
        **row,
        build_s=build_s,
        bytes_per_unit=index.memory_bytes() / UNITS,
    )


@pytest.mark.parametrize("selectivity", SELECTIVITIES)
def test_numpy(benchmark: Any, selectivity: float) -> None:
    x, _ = data()

    def search(query: Any, allowed: Any) -> tuple[Any, str]:
        scores = (x if allowed is None else x[allowed]) @ query
        best = np.argpartition(-scores, K)[:K]
        best = best[np.argsort(-scores[best])]
        return (best if allowed is None else allowed[best]), "numpy"

    row = measure(benchmark, search, selectivity)
    benchmark.extra_info.update(op="search", dtype="float32", **row, bytes_per_unit=4.0 * DIM)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_without_a_graph(benchmark: Any, dtype: str) -> None:
    index, build_s = built(dtype, False)

    def search(query: Any, allowed: Any) -> tuple[Any, str]:
        keys, _, plan = index.search_with_plan(query, K, allowed)
        return keys, plan.path

    benchmark.extra_info.update(
        op="search",
        dtype=dtype,
        **measure(benchmark, search, 1.0),
        build_s=build_s,
        bytes_per_unit=index.memory_bytes() / UNITS,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_and_load(benchmark: Any, tmp_path: Path, dtype: str) -> None:
    index, _ = built(dtype, True)
    path = tmp_path / "vectors"
    start = time.perf_counter()
    index.save(path, stamp=1)
    save_s = time.perf_counter() - start

    def run() -> None:
        loaded = VectorIndex.load(path, DIM, "cosine", dtype, background=False)
        assert loaded is not None
        assert len(loaded[0]) == UNITS

    benchmark.pedantic(run, rounds=5)
    benchmark.extra_info.update(
        op="load",
        dtype=dtype,
        units=UNITS,
        dim=DIM,
        save_s=save_s,
        load_s=benchmark.stats.stats.median,
        bytes_per_unit=os.stat(path).st_size / UNITS,
    )
