"""What the tests of the vector index share: brute force, and collections like those of texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memos.records.index import VectorIndex

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
