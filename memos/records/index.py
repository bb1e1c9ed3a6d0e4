"""The vector index: an in-memory cache over (key, vector) pairs, exact or by an HNSW graph."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memos import settings
from memos.errors import ArgumentError, NotFoundError
from memos.records import _index_file
from memos.records._index_hnsw import MISSING, Graph, hnswlib
from memos.records._index_plan import TRUSTED, Plan, Planner
from memos.records._index_rows import (
    DTYPES,
    METRICS,
    Floats,
    Ints,
    Query,
    Rows,
    Vectors,
)

_TAIL_ROWS = 1000  # rows outside the graph that do not call the builder
_DEAD_ROWS = 1024  # dead rows that nobody clears away


class _View(NamedTuple):
    """What a search reads: the rows, and the graph over those it covers.

    ``remap`` leads from the graph's labels to rows whose numbers changed under it.
    """

    rows: Rows
    graph: Graph | None = None
    remap: Ints | None = None
    covered: int = 0

    def tail(self) -> int:
        """Rows behind those that the graph covers."""
        if self.graph is None:
            return self.rows.total
        covered = self.graph.covered if self.remap is None else self.covered
        return max(0, self.rows.total - covered)


class VectorIndex:
    """Nearest vectors of a collection held in memory, with a filter on keys.

    Small collections and narrow filters are scanned; else a graph proposes candidates, which are
    filtered and scored again exactly. Where its proposals do not suffice the allowed rows are
    scanned: no filter costs recall. Scores do not depend on the way, and equal scores come in
    the order of their keys.

    Thread-safe: searches run beside each other and beside one writer, on the state of the moment
    they began. The graph is built behind the collection, by a thread that ends when it is done.

    Args:
        dim:        numbers of a vector.
        metric:     "cosine", "dot", or "l2" (the score is minus the squared distance).
        dtype:      "float32", or "float16": half the bytes of a vector, scores of the rounded
            numbers; a graph keeps float32.
        hnsw:       False: no graph, every search is exact.
        hnsw_from:  vectors from which a graph is built; a scan of so many takes 3 ms at dim 384.
        M:          links of a node of the graph.
        ef_construction: candidates while a node is linked.
        ef_search:  candidates of a search at least.
        fetch_cost: rows that can be scanned in the time of one more candidate. Measured at
            100,000 x 384: 3.5 us a candidate, 0.25 us a row.
        background: False: the graph grows only in ``build()``.

    Raises:
        ArgumentError: an argument is out of contract.

    Cost: dim * 4 (or 2) + 28 bytes a vector; with a graph dim * 4 + 150 more.

    Source: Y. A. Malkov, D. A. Yashunin: Efficient and robust approximate nearest neighbor search
    using Hierarchical Navigable Small World graphs, arXiv:1603.09320.
    """

    def __init__(
        self,
        dim: int,
        metric: str = "cosine",
        dtype: str = "float32",
        *,
        hnsw: bool = True,
        hnsw_from: int = 20_000,
        M: int = 16,
        ef_construction: int = 100,
        ef_search: int = 128,
        fetch_cost: float = 14.0,
        background: bool = True,
    ) -> None:
        _check_whole("dim", dim)
        _check_choice("metric", metric, METRICS)
        _check_choice("dtype", dtype, DTYPES)
        for name, value, least in (
            ("hnsw_from", hnsw_from, 1),
            ("M", M, 2),
            ("ef_construction", ef_construction, 1),
            ("ef_search", ef_search, 1),
        ):
            _check_whole(name, value, least)
        self.dim, self.metric, self.dtype = dim, metric, dtype
        self._hnsw_from, self._M, self._ef_construction = hnsw_from, M, ef_construction
        self._background = background
        self._exact_because = None if hnsw else "hnsw=False"
        if hnsw and hnswlib() is None:
            self._exact_because = MISSING
        self._planner = Planner(hnsw_from, ef_search, fetch_cost, self._exact_because)
        self._vectors = Vectors(dim, metric, dtype)
        self._view = _View(self._vectors.now)
        self._write = threading.Lock()  # add, remove, and changes of the view
        self._building = threading.Lock()  # taken before _write
        self._next: Graph | None = None  # grows unseen until it covers everything
        self._next_generation = 0
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._view.rows.keys)

    def __repr__(self) -> str:
        return (
            f"VectorIndex(dim={self.dim}, metric={self.metric!r}, dtype={self.dtype!r}): "
            f"{len(self)} vectors, {self._view.tail()} not in a graph"
        )

    def keys(self) -> Ints:
        """All keys, int64 [n], ascending."""
        return self._view.rows.keys.copy()

    def memory_bytes(self) -> int:
        """Bytes of vectors, keys and graph, room for growth included."""
        with self._write:
            graph = self._view.graph
            return self._vectors.memory_bytes() + (graph.memory_bytes() if graph else 0)

    def add(self, keys: Any, vectors: Any) -> None:
        """Insert or replace: a key that is there gets the new vector, of equal keys the last wins.

        Args:
            keys:    int64 [n].
            vectors: [n, dim] numbers. Under cosine one whose length is not between 0.5 and 2 is
                kept with length one.

        Raises:
            ArgumentError: shapes or kinds do not fit; a number is not finite, or beyond float16;
                a vector is longer than 1e18, or zero under cosine. Nothing was added then.

        Cost: one pass over the vectors; over all keys too unless the new ones come after them.
        """
        wanted = _as_keys("keys", keys)
        array = _as_numbers("vectors", vectors)
        if array.shape != (len(wanted), self.dim):
            raise ArgumentError(
                f"vectors: shape ({len(wanted)}, {self.dim}) wanted, {array.shape} came"
            )
        if not len(wanted):
            return
        distinct, last = np.unique(wanted[::-1], return_index=True)
        if len(distinct) < len(wanted):
            wanted, array = distinct, array[len(wanted) - 1 - last]
        with self._write:
            self._publish(self._vectors.add(wanted, array))
        self._wake()

    def remove(self, keys: Any) -> int:
        """Forget keys, int64 [n]; unknown ones are left out. Returns how many there were."""
        wanted = _as_keys("keys", keys)
        with self._write:
            gone = self._vectors.remove(wanted)
            self._publish(gone)
        self._wake()
        return len(gone)

    def get(self, keys: Any) -> Floats:
        """Vectors as they are stored, float32 [n, dim].

        Raises:
            NotFoundError: a key is not in the index.
        """
        wanted, rows = _as_keys("keys", keys), self._view.rows
        found = rows.find(wanted)
        if (found < 0).any():
            raise NotFoundError(f"key {wanted[found < 0][0]}: not in the index")
        return rows.stored(found).astype(np.float32)

    def search(self, query: Any, k: int, allowed: Any = None) -> tuple[Ints, Floats]:
        """The k best vectors for a query.

        Args:
            query:   [dim] finite numbers, not all zero under cosine.
            k:       how many at most.
            allowed: int64, ascending, without repetitions: no other keys are returned; those that
                are not in the index do not matter. None: all.

        Returns:
            (keys int64, scores float32), best first: cosine, dot product or minus the squared
            distance.

        Raises:
            ArgumentError: an argument is out of contract.

        Cost: at 100,000 x 384 about 0.5 ms by the graph; 14 ms to scan all, 2 ms to scan 10,000.
        """
        keys, scores, _ = self.search_with_plan(query, k, allowed)
        return keys, scores

    def scan(self, query: Any, k: int, keys: Any) -> tuple[Ints, Floats]:
        """The k best of these keys, all of them scored; as ``search``, without a graph."""
        _check_whole("k", k)
        rows, asked = self._view.rows, Query(query, self.dim, self.metric)
        which = rows.find(_as_keys("keys", keys))
        which = which[which >= 0]
        if not len(which):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return rows.best(asked, which, rows.approximate(asked, which), k)

    def search_with_plan(
        self, query: Any, k: int, allowed: Any = None
    ) -> tuple[Ints, Floats, Plan]:
        """As ``search``, and the way that was taken."""
        view = self._view
        rows = view.rows
        asked = Query(query, self.dim, self.metric)
        only = _as_allowed(allowed)
        plan = self._plan(view, k, only)
        if plan.path == "hnsw":
            assert view.graph is not None
            found = self._candidates(view, asked, k, only, plan.fetch)
            if isinstance(found, tuple):
                return *rows.best(asked, *found, k), plan
            reason = f"the graph's list had {found} of {k} allowed vectors"
            plan = Plan("hnsw, exact", reason, plan.size, plan.allowed, plan.fetch, plan.tail)
        if only is None:
            which = rows.rows
        else:
            which = rows.find(only)
            which = which[which >= 0]
        if not len(which):
            return np.empty(0, np.int64), np.empty(0, np.float32), plan
        return *rows.best(asked, which, rows.approximate(asked, which), k), plan

    def plan(self, k: int, allowed: Any = None) -> Plan:
        """Which way a search would take now, and why. Arguments as those of ``search``."""
        return self._plan(self._view, k, _as_allowed(allowed))

    def build(self, num_threads: int | None = None) -> None:
        """Bring the graph up to date now, if there is to be one. Others search and write meanwhile.

        Cost: at dim 384 about 0.4 ms a vector and thread.
        """
        threads = settings.num_threads() if num_threads is None else num_threads
        _check_whole("num_threads", threads)
        while self._step(threads):
            pass

    def save(self, path: str | Path, stamp: int = 0, *, key: bytes | None = None) -> None:
        """Write the index to a cache file, in the place of an older one.

        Args:
            stamp: any int64, given back by ``load``: the change number of what was indexed.
            key:   32 bytes under which the file is encrypted; None: it is not.

        Raises:
            StoreError: the file cannot be written.
        """
        with self._write:
            view = self._view
            has_state = view.graph is not None and view.remap is None
            state = view.graph.state() if has_state and view.graph is not None else None
        _index_file.write(Path(path), view.rows, state, stamp, key)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dim: int,
        metric: str = "cosine",
        dtype: str = "float32",
        *,
        key: bytes | None = None,
        **options: Any,
    ) -> tuple[VectorIndex, int] | None:
        """An index and its stamp from a cache file.

        Returns:
            None where there is no such file, where it is of another dim, metric, dtype or
            version, or where any bit of it changed: the index is to be filled again.

        Cost: 100,000 x 384 with its graph in about 0.4 s.
        """
        index = cls(dim, metric, dtype, **options)
        loaded = _index_file.read(Path(path), dim, metric, dtype, key)
        if loaded is None:
            return None
        index._vectors = Vectors.of(loaded.rows)
        graph = None if index._exact_because else loaded.graph
        index._view = _View(loaded.rows, graph)
        index._wake()
        return index, loaded.stamp

    def _plan(self, view: _View, k: int, allowed: Ints | None) -> Plan:
        _check_whole("k", k)
        size = len(view.rows.keys)
        few = size if allowed is None else min(size, len(allowed))
        tail = None if view.graph is None else view.tail()
        return self._planner.plan(k, few, size, view.rows.total, tail)

    def _candidates(
        self, view: _View, query: Query, k: int, allowed: Ints | None, fetch: int
    ) -> tuple[Ints, Floats] | int:
        """Rows and their approximate scores; or how many there were, too few to be trusted."""
        rows, graph = view.rows, view.graph
        assert graph is not None
        found, distances, covered = graph.nearest(query.approx, fetch)
        if view.remap is not None:
            found, covered = view.remap[found], view.covered
        good = (found >= 0) & (found < rows.total)
        good[good] = self._wanted(rows, found[good], allowed)
        trusted = int(good[: int(len(good) * TRUSTED)].sum())
        if trusted < k:
            return trusted
        scores = -distances if self.metric == "l2" else 1 - distances
        tail = np.arange(min(covered, rows.total), rows.total)
        tail = tail[self._wanted(rows, tail, allowed)]
        if not len(tail):
            return found[good], scores[good]
        return (
            np.concatenate([found[good], tail]),
            np.concatenate([scores[good], rows.approximate(query, tail)]),
        )

    @staticmethod
    def _wanted(rows: Rows, which: Ints, allowed: Ints | None) -> Any:
        """Which rows are alive and allowed."""
        wanted = rows.alive(which)
        if allowed is not None:
            keys = rows.row_keys[which]
            at = np.minimum(np.searchsorted(allowed, keys), len(allowed) - 1)
            wanted &= allowed[at] == keys
        return wanted

    def _publish(self, dead: Ints) -> None:
        """Show readers what was written; ``_write`` is held."""
        view = self._view
        rows = self._vectors.now
        if view.graph is None and rows.dead > max(_DEAD_ROWS, len(rows.keys)):
            self._vectors.compact()
            rows = self._vectors.now
        self._view = view._replace(rows=rows)
        if view.graph is not None and view.remap is None:
            # A row that the builder links at this moment stays unmarked: searches leave it out.
            view.graph.mark_dead(dead[dead < view.graph.covered])

    def _is_graph_wanted(self, view: _View) -> bool:
        least = self._hnsw_from if view.graph is None else self._hnsw_from // 2
        return not self._exact_because and len(view.rows.keys) >= max(1, least)

    def _is_behind(self) -> bool:
        """Whether it is worth the builder's while."""
        view = self._view
        if not self._is_graph_wanted(view):
            return view.graph is not None
        return view.remap is not None or view.tail() > _TAIL_ROWS or _is_worn(view)

    def _step(self, num_threads: int) -> bool:
        """A little of what there is to do for the graph; False: nothing was."""
        with self._building:
            view = self._view
            if not self._is_graph_wanted(view):
                self._next = None
                with self._write:
                    self._view = _View(self._view.rows)
                return False
            if _is_worn(view):
                view = self._renumber()
            rows = view.rows
            if view.graph is not None and view.remap is None:
                target = view.graph
            else:
                if self._next is None or self._next_generation != rows.generation:
                    self._next = self._empty_graph(rows.total)
                    self._next_generation = rows.generation
                target = self._next
            # Searches wait for one slice of the graph that they use.
            slice_rows = (32 if target is view.graph else 512) * num_threads
            stop = min(target.covered + slice_rows, rows.total)
            if target.covered < stop:
                living = np.arange(target.covered, stop)
                living = living[rows.alive(living)]
                target.add(living, rows.points(living), stop, num_threads)
                return True
            if target is view.graph:
                return False
            self._next = None
            with self._write:
                rows = self._vectors.now
                if rows.generation == self._next_generation:
                    labels = target.labels()
                    target.mark_dead(labels[~rows.alive(labels)])
                    self._view = _View(rows, target)
            return True

    def _renumber(self) -> _View:
        """Copy the living rows together under a graph that goes on serving."""
        with self._write:
            view = self._view
            assert view.graph is not None
            covered = int((view.rows.rows < view.graph.covered).sum())
            remap = self._vectors.compact()
            self._view = _View(self._vectors.now, view.graph, remap, covered)
            return self._view

    def _empty_graph(self, capacity: int) -> Graph:
        return Graph(
            self.dim,
            "l2" if self.metric == "l2" else "ip",
            M=self._M,
            ef_construction=self._ef_construction,
            capacity=capacity,
        )

    def _wake(self) -> None:
        if not self._background or not self._is_behind():
            return
        with self._thread_lock:
            if self._thread is None:
                threads = max(1, settings.num_threads() // 2)
                self._thread = threading.Thread(
                    target=_build_behind, args=(weakref.ref(self), threads), name="memos-hnsw"
                )
                self._thread.start()

    def _rest(self) -> bool:
        """Whether the builder may go; one that comes later starts another."""
        with self._thread_lock:
            if self._is_behind():
                return False
            self._thread = None
            return True


def _build_behind(reference: weakref.ref[VectorIndex], num_threads: int) -> None:
    """Build until done, or until nobody holds the index or the program ends."""
    while threading.main_thread().is_alive():
        index = reference()
        if index is None or (not index._step(num_threads) and index._rest()):
            return
        del index


def _is_worn(view: _View) -> bool:
    """A third of the graph's rows are dead."""
    return (
        view.graph is not None
        and view.remap is None
        and view.rows.dead > max(_DEAD_ROWS, view.rows.total // 3)
    )


def _as_keys(name: str, keys: Any) -> Ints:
    array = np.asarray(keys)
    if not array.size and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArgumentError(
            f"{name}: whole numbers [n] wanted, {array.dtype} of shape {array.shape} came"
        )
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise ArgumentError(f"{name}: int64 wanted, {array.max()} came")
    return array.astype(np.int64)


def _as_numbers(name: str, values: Any) -> Any:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of unequal length
        raise ArgumentError(f"{name}: rows of equal length wanted: {error}") from None
    if array.dtype.kind not in "fiu":
        raise ArgumentError(f"{name}: numbers wanted, {array.dtype} came")
    return array


def _as_allowed(allowed: Any) -> Ints | None:
    if allowed is None:
        return None
    keys = _as_keys("allowed", allowed)
    if (keys[1:] <= keys[:-1]).any():
        raise ArgumentError("allowed: ascending keys without repetitions wanted")
    return keys


def _check_whole(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}: a whole number from {least} wanted, {value!r} came")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name}: one of {', '.join(choices)} wanted, {value!r} came")
