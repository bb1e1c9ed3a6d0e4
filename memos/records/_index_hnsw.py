"""The graph of an index: hnswlib, safe beside threads, and its state as plain arrays."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memos.errors import BackendError
from memos.records._index_rows import BLOCK_ROWS, Floats, Ints

MISSING = "hnswlib is not installed: pip install 'memos-native[vector]'"

# Of a graph's own state: what a file keeps beside the arrays, and what must be as a fresh graph
# of the installed hnswlib has it.
_SCALARS = ("max_level", "enterpoint_node", "ef_construction", "M", "has_deletions")
_LAYOUT = (
    *("ser_version", "space", "dim", "normalize", "offset_level0", "size_data_per_element"),
    *("label_offset", "offset_data", "max_M", "max_M0", "M", "mult", "size_links_per_element"),
)


def hnswlib() -> Any:
    """The package, or None where it is not installed."""
    try:
        return importlib.import_module("hnswlib")
    except ImportError:
        return None


class Graph:
    """An HNSW graph over rows, which are its labels.

    Any number of threads search at once; one that changes the graph has it alone.

    Source: Y. A. Malkov, D. A. Yashunin: Efficient and robust approximate nearest neighbor search
    using Hierarchical Navigable Small World graphs, arXiv:1603.09320.

    Args:
        space:  of hnswlib: "ip" or "l2".
        M:      links of a node, twice as many on the lowest level.
        ef_construction: length of the candidate list while a node is linked.
        capacity: nodes there is room for at first.
    """

    def __init__(
        self, dim: int, space: str, *, M: int, ef_construction: int, capacity: int = 1
    ) -> None:
        package = hnswlib()
        if package is None:
            raise BackendError(MISSING)
        self._index = package.Index(space, dim)
        self._index.init_index(
            max(1, capacity), M=M, ef_construction=ef_construction, random_seed=1
        )
        self._shared = _Shared()
        self._dead = 0
        self.covered = 0  # rows below this one are in the graph, or were dead when their turn came

    def add(self, rows: Ints, vectors: Floats, covered: int, num_threads: int) -> None:
        """Link rows; afterwards the graph covers all rows below ``covered``."""
        with self._shared.alone():
            if len(rows):
                wanted = self._index.get_current_count() + len(rows)
                if wanted > self._index.get_max_elements():
                    self._index.resize_index(1024 + wanted * 9 // 8)
                self._index.add_items(vectors, rows, num_threads=num_threads)
            self.covered = covered

    def mark_dead(self, rows: Ints) -> None:
        """Rows that searches shall not return any more. Each once."""
        with self._shared.alone():
            for row in rows.tolist():
                self._index.mark_deleted(row)
            self._dead += len(rows)

    def labels(self) -> Ints:
        with self._shared.together():
            return np.array(self._index.get_ids_list(), np.int64)

    def nearest(self, query: Floats, fetch: int) -> tuple[Ints, Floats, int]:
        """The ``fetch`` nearest rows, best first, their distances, and what the graph covers.

        The candidate list is as long as ``fetch``: hnswlib takes the longer of ef and k. So no
        search changes the graph's ef under another.
        """
        with self._shared.together():
            covered = self.covered
            fetch = min(fetch, self._index.get_current_count() - self._dead)
            if fetch <= 0:
                return np.empty(0, np.int64), np.empty(0, np.float32), covered
            try:
                rows, distances = self._index.knn_query(query, k=fetch, num_threads=1)
            except RuntimeError:  # fewer than fetch were reached: the caller scans
                return np.empty(0, np.int64), np.empty(0, np.float32), covered
        return rows[0].astype(np.int64), distances[0], covered

    def memory_bytes(self) -> int:
        with self._shared.together():
            count = self._index.get_current_count()
            per_node = self._index.index_file_size() / count if count else 0
            return int(per_node * self._index.get_max_elements())

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Scalars and arrays from which ``restored`` makes this graph, given the vectors."""
        with self._shared.together():
            covered, state = self.covered, self._index.__getstate__()[0]
        count, width = state["cur_element_count"], state["size_data_per_element"]
        nodes = state["data_level0"].view(np.uint8)[: count * width].reshape(count, width)
        labels = nodes[:, state["label_offset"] : state["label_offset"] + 8]
        return (
            {"covered": covered, **{name: state[name] for name in _SCALARS}},
            {
                "links": np.ascontiguousarray(nodes[:, : state["offset_data"]]),
                "labels": np.ascontiguousarray(labels).view(np.int64).reshape(count),
                "levels": state["element_levels"][:count].astype(np.int32),
                "upper": state["link_lists"].view(np.uint8),
            },
        )

    @classmethod
    def restored(
        cls,
        dim: int,
        space: str,
        scalars: dict[str, Any],
        arrays: dict[str, NDArray[Any]],
        points: Any,
    ) -> Graph | None:
        """The graph of a ``state``; None where it does not fit the installed hnswlib.

        Args:
            points: from labels, int64 [n], to their vectors, float32 [n, dim].
        """
        graph = cls(dim, space, M=scalars["M"], ef_construction=scalars["ef_construction"])
        fresh = graph._index.__getstate__()[0]
        links, labels = arrays["links"], arrays["labels"]
        count, offset = len(labels), fresh.get("offset_data")
        expected = offset + 4 * dim + 8 if offset else None
        if any(name not in fresh for name in (*_SCALARS, *_LAYOUT)) or not _is_sound(
            scalars, arrays, fresh
        ):
            return None
        if fresh["size_data_per_element"] != expected or fresh["label_offset"] != expected - 8:
            return None
        nodes = np.empty((count, expected), np.uint8)
        nodes[:, :offset] = links
        for lo in range(0, count, BLOCK_ROWS):
            block = points(labels[lo : lo + BLOCK_ROWS])
            nodes[lo : lo + BLOCK_ROWS, offset : expected - 8] = block.view(np.uint8)
        nodes[:, expected - 8 :] = labels.view(np.uint8).reshape(count, 8)
        graph._index = hnswlib().Index(
            {
                **fresh,
                **{name: scalars[name] for name in _SCALARS},
                "ep_added": True,
                "max_elements": count,
                "cur_element_count": count,
                "label_lookup_external": labels.astype(np.uint64),
                "label_lookup_internal": np.arange(count, dtype=np.uint32),
                "element_levels": arrays["levels"],
                "data_level0": nodes.view(np.int8).reshape(-1),
                "link_lists": arrays["upper"].view(np.int8),
            }
        )
        graph.covered = scalars["covered"]
        graph._dead = int((links[:, 2] & 1).sum())  # hnswlib's mark of the deleted
        return graph


def _is_sound(
    scalars: dict[str, Any], arrays: dict[str, NDArray[Any]], fresh: dict[str, Any]
) -> bool:
    """Whether every link leads to a node that exists on its level: hnswlib itself never asks."""
    links, labels, levels = arrays["links"], arrays["labels"], arrays["levels"]
    count, entry = len(labels), scalars["enterpoint_node"]
    if not count or links.shape != (count, fresh["offset_data"]) or levels.shape != (count,):
        return False
    if not 0 <= entry < count or levels[entry] != scalars["max_level"] or levels.min() < 0:
        return False
    if levels.max() != scalars["max_level"]:
        return False
    width = fresh["size_links_per_element"]
    if arrays["upper"].shape != (int(levels.sum()) * width,):
        return False
    ends = np.cumsum(levels)
    level_of = np.arange(ends[-1]) - np.repeat(ends - levels, levels) + 1
    upper = arrays["upper"].reshape(-1, width)
    return _links_end_well(
        links, np.zeros(count, np.int32), levels, fresh["max_M0"]
    ) and _links_end_well(upper, level_of, levels, fresh["max_M"])


def _links_end_well(
    lists: NDArray[np.uint8], level_of: NDArray[Any], levels: NDArray[np.int32], limit: int
) -> bool:
    words = np.ascontiguousarray(lists).view(np.uint32)
    lengths = words[:, 0] & 0xFFFF  # the bytes above it mark the deleted
    if not len(words):
        return True
    if lengths.max() > limit or limit + 1 != words.shape[1]:
        return False
    used = np.arange(limit) < lengths[:, None]
    targets = np.where(used, words[:, 1:], 0)
    if targets.max() >= len(levels):
        return False
    return bool((~used | (levels[targets] >= level_of[:, None])).all())


class _Shared:
    """Many readers or one writer; a waiting writer goes before readers that come after it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0
        self._is_written = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            while self._is_written or self._writers_waiting:
                self._changed.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._writers_waiting += 1
            while self._is_written or self._readers:
                self._changed.wait()
            self._writers_waiting -= 1
            self._is_written = True
        try:
            yield
        finally:
            with self._changed:
                self._is_written = False
                self._changed.notify_all()
