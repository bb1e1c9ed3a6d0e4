"""The cache file of the vector index: as it was, or a miss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos.errors import StoreError
from memos.records import _index_file
from memos.records.index import VectorIndex

from .index_help import DTYPES, METRICS, clustered, graphed


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
