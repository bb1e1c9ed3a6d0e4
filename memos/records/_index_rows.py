"""The vectors of an index in memory: appended, never overwritten, read through snapshots.

A row is written once and stays as it is; a changed vector is a new row and the old one is dead. So
a reader that holds a ``Rows`` sees the collection of one moment, without a lock, while a writer
appends behind it. Dead rows go when ``compact`` copies the living.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memos.errors import ArgumentError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

METRICS = ("cosine", "dot", "l2")
DTYPES = ("float32", "float16")
MAX_NORM = 1e18  # the product of two norms and its sums stay finite in float32
CHUNK_ROWS = 16_384
BLOCK_ROWS = 512  # 512 x 384 float32 is 0.8 MB: a block and its copy stay in the L2 cache
# A gathered row costs about twice a row in passing: 0.25 and 0.14 us at 384 dimensions.
GATHER_COST = 2.0
# The bits of a float16 shifted into a float32's places are the number times 2**-112.
_HALF_SCALE = np.float32(2.0**112)
_HALF_MASK = np.array(0x8FFFE000, np.uint32).view(np.int32)


class Chunk(NamedTuple):
    """Consecutive rows from ``start``: vectors [capacity, dim], squared norms [capacity]."""

    start: int
    vectors: NDArray[Any]
    squares: Floats


@dataclasses.dataclass(frozen=True)
class Rows:
    """One moment of a collection.

    Attributes:
        keys:       int64 [n], ascending: the living keys.
        rows:       int64 [n]: the row of each key.
        row_keys:   int64 [total]: the key each row was written for, dead rows included.
        chunks:     where the rows are.
        max_norm:   no vector is longer.
        generation: grows when rows change their numbers.
    """

    dim: int
    metric: str
    keys: Ints
    rows: Ints
    row_keys: Ints
    chunks: tuple[Chunk, ...]
    max_norm: float = 0.0
    generation: int = 0

    @property
    def total(self) -> int:
        return len(self.row_keys)

    @property
    def dead(self) -> int:
        return len(self.row_keys) - len(self.keys)

    def find(self, keys: Ints) -> Ints:
        """The row of each key, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self.keys, keys)
        at[at == len(self.keys)] = 0
        return np.where(self.keys[at] == keys, self.rows[at], -1)

    def alive(self, rows: Ints) -> NDArray[np.bool_]:
        """Which of these rows are the present ones of their keys."""
        found: NDArray[np.bool_] = self.find(self.row_keys[rows]) == rows
        return found

    def stored(self, rows: Ints) -> NDArray[Any]:
        """Copies of the stored vectors, [len(rows), dim] in the stored dtype."""
        out = np.empty((len(rows), self.dim), self.chunks[0].vectors.dtype)
        for chunk, mask, inside in self._parts(rows):
            out[mask] = chunk.vectors[inside]
        return out

    def points(self, rows: Ints) -> Floats:
        """Stored vectors as a graph takes them: float32, under cosine of length one."""
        out = self.stored(rows).astype(np.float32, copy=False)
        if self.metric == "cosine":
            for chunk, mask, inside in self._parts(rows):
                out[mask] /= np.sqrt(chunk.squares[inside])[:, None]
        return out

    def approximate(self, query: Query, rows: Ints) -> Floats:
        """Scores of rows, each within ``query.error(max_norm)``. No large temporary.

        Cost: one pass over the rows, or over all rows where those asked for are not few.
        """
        scores = np.empty(len(rows), np.float32)
        if len(rows) * GATHER_COST > self.total:
            every = np.empty(self.total, np.float32)
            for chunk in self.chunks:
                stop = min(chunk.start + len(chunk.vectors), self.total)
                self._scan(query, chunk, every[chunk.start : stop])
            return every[rows]
        buffer = np.empty((BLOCK_ROWS, self.dim), self.chunks[0].vectors.dtype)
        for lo in range(0, len(rows), BLOCK_ROWS):
            block = rows[lo : lo + BLOCK_ROWS]
            for chunk, mask, inside in self._parts(block):
                taken = buffer[: len(inside)]
                chunk.vectors.take(inside, axis=0, out=taken, mode="clip")
                part = np.empty(len(inside), np.float32)
                self._scan(query, Chunk(0, taken, chunk.squares[inside]), part)
                scores[lo : lo + BLOCK_ROWS][mask] = part
        return scores

    def exact(self, query: Query, rows: Ints) -> Floats:
        """Scores of rows, summed in float64: the same for equal vectors wherever they stand."""
        scores = np.empty(len(rows), np.float32)
        for lo in range(0, len(rows), BLOCK_ROWS):
            block = self.stored(rows[lo : lo + BLOCK_ROWS]).astype(np.float64)
            if self.metric == "l2":
                block -= query.exact
                value = -np.square(block).sum(axis=1)
            else:
                value = (block * query.exact).sum(axis=1)
                if self.metric == "cosine":
                    value /= np.sqrt(np.square(block).sum(axis=1))
            scores[lo : lo + BLOCK_ROWS] = value
        return scores

    def best(self, query: Query, rows: Ints, approx: Floats, k: int) -> tuple[Ints, Floats]:
        """The k best of rows by exact score, equal scores by key. Approx: as ``approximate``."""
        if len(rows) > k:
            kth = np.partition(approx, len(rows) - k)[len(rows) - k]
            least = np.float32(kth - 2 * query.error(self.max_norm))
            rows = rows[approx >= np.nextafter(least, np.float32(-np.inf))]
        scores = self.exact(query, rows)
        keys = self.row_keys[rows]
        order = np.lexsort((keys, -scores))[:k]
        return keys[order], scores[order]

    def _scan(self, query: Query, chunk: Chunk, out: Floats) -> None:
        """Approximate scores of the first len(out) rows of a chunk."""
        vectors, squares = chunk.vectors[: len(out)], chunk.squares[: len(out)]
        if vectors.dtype == np.float32:
            np.matmul(vectors, query.approx, out=out)
        else:  # five times as fast as astype
            halves = vectors.view(np.int16)
            size = np.float32(2.0 ** np.ceil(np.log2(np.abs(query.approx).max() or 1)))
            scaled = query.approx / size * _HALF_SCALE
            buffer = np.empty((min(BLOCK_ROWS, len(out)), self.dim), np.int32)
            for lo in range(0, len(out), BLOCK_ROWS):
                block = halves[lo : lo + BLOCK_ROWS]
                bits = buffer[: len(block)]
                np.copyto(bits, block)
                np.left_shift(bits, 13, out=bits)
                np.bitwise_and(bits, _HALF_MASK, out=bits)
                np.matmul(bits.view(np.float32), scaled, out=out[lo : lo + BLOCK_ROWS])
            out *= size
        if self.metric == "l2":
            out *= 2
            out -= squares
            out -= np.float32(query.square)
        elif self.metric == "cosine":
            out /= np.sqrt(squares)

    def _parts(self, rows: Ints) -> Iterator[tuple[Chunk, Any, Ints]]:
        """Chunks that hold some of the rows, which of them, and their places inside."""
        if len(self.chunks) == 1:
            yield self.chunks[0], slice(None), rows
            return
        starts = np.array([chunk.start for chunk in self.chunks])
        of = np.searchsorted(starts, rows, side="right") - 1
        for i in np.unique(of):
            mask = of == i
            yield self.chunks[i], mask, rows[mask] - starts[i]


class Query:
    """A query vector as the scans want it.

    Raises:
        ArgumentError: it is not dim finite numbers, is too long, or is zero under cosine.
    """

    def __init__(self, vector: Any, dim: int, metric: str) -> None:
        exact = np.asarray(vector, np.float64)
        if exact.shape != (dim,):
            raise ArgumentError(f"query: {dim} numbers wanted, shape {exact.shape} came")
        check_numbers("query", exact[None])
        self.square = float(np.square(exact).sum())
        check_norms("query", np.sqrt([self.square]), metric)
        if metric == "cosine":
            exact = exact / np.sqrt(self.square)
            self.square = 1.0
        self.metric = metric
        self.exact = exact
        self.approx = exact.astype(np.float32)

    def error(self, max_norm: float) -> float:
        """A bound of what rounding does to a float32 score, in any order of summation."""
        norm = float(np.sqrt(self.square))
        if self.metric == "cosine":
            size = 2.0
        else:
            size = (norm + max_norm) ** 2 if self.metric == "l2" else norm * max_norm + 1
        return (len(self.exact) + 16) * 2.0**-24 * size


class Vectors:
    """What one writer appends to, and the ``Rows`` that readers see. Not thread-safe itself."""

    def __init__(self, dim: int, metric: str, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        none = np.empty(0, np.int64)
        chunk = Chunk(0, np.empty((0, dim), self.dtype), np.empty(0, np.float32))
        self.now = Rows(dim, metric, none, none, none, (chunk,))
        self._buffers = {"keys": none, "rows": none, "row_keys": none}

    @classmethod
    def of(cls, now: Rows) -> Vectors:
        """A writer behind rows that came from elsewhere."""
        made = cls(now.dim, now.metric, str(now.chunks[0].vectors.dtype))
        made._set(now)
        return made

    def add(self, keys: Ints, vectors: NDArray[Any]) -> Ints:
        """Append vectors of distinct keys; those already stored so are left alone.

        Returns:
            the rows that died.
        """
        order = np.argsort(keys)
        keys = keys[order]
        norms = self._norms(vectors)
        old = self.now.find(keys)
        fresh = self._changed(vectors, norms, order, old)
        keys, order, old = keys[fresh], order[fresh], old[fresh]
        if not len(keys):
            return keys
        total = self.now.total
        chunks, longest = self._append(vectors, norms, order)
        rows = np.arange(total, total + len(keys), dtype=np.int64)
        now = dataclasses.replace(
            self.now,
            row_keys=self._grow("row_keys", keys),
            chunks=chunks,
            max_norm=max(self.now.max_norm, longest),
        )
        if not len(now.keys) or keys[0] > now.keys[-1]:
            self.now = dataclasses.replace(
                now, keys=self._grow("keys", keys), rows=self._grow("rows", rows)
            )
            return keys[:0]
        known = old >= 0
        at = np.searchsorted(now.keys, keys)
        changed = now.rows.copy()
        changed[at[known]] = rows[known]
        self._set(
            dataclasses.replace(
                now,
                keys=np.insert(now.keys, at[~known], keys[~known]),
                rows=np.insert(changed, at[~known], rows[~known]),
            )
        )
        return old[known]

    def remove(self, keys: Ints) -> Ints:
        """Forget keys; unknown ones are left out. Returns the rows that died."""
        gone = self.now.find(np.unique(keys))
        gone = gone[gone >= 0]
        if len(gone):
            stay = ~np.isin(self.now.rows, gone)
            self._set(
                dataclasses.replace(self.now, keys=self.now.keys[stay], rows=self.now.rows[stay])
            )
        return gone

    def compact(self) -> Ints:
        """Copy the living rows together, in their order. Returns old row -> new row or -1."""
        old = self.now
        living = np.sort(old.rows)
        renumbered = np.full(old.total, -1, np.int64)
        renumbered[living] = np.arange(len(living))
        squares = np.empty(len(living), np.float32)
        vectors = np.empty((len(living), old.dim), self.dtype)
        for lo in range(0, len(living), CHUNK_ROWS):
            block = living[lo : lo + CHUNK_ROWS]
            for chunk, mask, inside in old._parts(block):
                vectors[lo : lo + CHUNK_ROWS][mask] = chunk.vectors[inside]
                squares[lo : lo + CHUNK_ROWS][mask] = chunk.squares[inside]
        self._set(
            dataclasses.replace(
                old,
                rows=renumbered[old.rows],
                row_keys=old.row_keys[living],
                chunks=(Chunk(0, vectors, squares),),
                max_norm=float(np.sqrt(squares.max(initial=0))) * (1 + 1e-6),
                generation=old.generation + 1,
            )
        )
        return renumbered

    def memory_bytes(self) -> int:
        chunks = sum(c.vectors.nbytes + c.squares.nbytes for c in self.now.chunks)
        return chunks + sum(b.nbytes for b in self._buffers.values())

    def _norms(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """Lengths of the given vectors, each of which is checked."""
        norms = np.empty(len(vectors), np.float64)
        for lo in range(0, len(vectors), BLOCK_ROWS):
            block = np.asarray(vectors[lo : lo + BLOCK_ROWS], np.float64)
            check_numbers("vectors", block, lo)
            norms[lo : lo + BLOCK_ROWS] = np.sqrt(np.square(block).sum(axis=1))
            if self.now.metric != "cosine" and self.dtype == np.float16:
                limit = float(np.finfo(np.float16).max)
                if len(bad := np.flatnonzero(np.abs(block).max(axis=1) > limit)):
                    raise ArgumentError(
                        f"vectors[{lo + bad[0]}]: numbers up to {limit:.0f} wanted in float16, "
                        f"{np.abs(block[bad[0]]).max():.6g} came"
                    )
        check_norms("vectors", norms, self.now.metric)
        return norms

    def _rounded(self, vectors: NDArray[Any], norms: NDArray[np.float64], which: Ints) -> Any:
        """Some of the given vectors as they are stored."""
        block = np.asarray(vectors[which], np.float64)
        if self.now.metric == "cosine":
            # A length near one stays: its numbers come back as they were given, to the bit.
            lengths = norms[which]
            block = block / np.where(np.abs(np.log2(lengths)) <= 1, 1.0, lengths)[:, None]
        return block.astype(self.dtype)

    def _changed(
        self, vectors: NDArray[Any], norms: NDArray[np.float64], order: Ints, old: Ints
    ) -> NDArray[np.bool_]:
        """Which differ from what is stored: an index that is brought up to date meets most."""
        changed = np.ones(len(order), np.bool_)
        known = np.flatnonzero(old >= 0)
        for lo in range(0, len(known), BLOCK_ROWS):
            which = known[lo : lo + BLOCK_ROWS]
            new = self._rounded(vectors, norms, order[which])
            changed[which] = (new != self.now.stored(old[which])).any(axis=1)
        return changed

    def _append(
        self, vectors: NDArray[Any], norms: NDArray[np.float64], order: Ints
    ) -> tuple[tuple[Chunk, ...], float]:
        """Write vectors[order] behind the last row. Returns all chunks and the longest norm."""
        chunks = list(self.now.chunks) if self.now.total else []
        row, done, longest = self.now.total, 0, 0.0
        while done < len(order):
            last = chunks[-1] if chunks else None
            if last is None or row == last.start + len(last.vectors):
                capacity = max(1024, min(CHUNK_ROWS, row), len(order) - done)
                last = Chunk(
                    row,
                    np.empty((capacity, self.now.dim), self.dtype),
                    np.empty(capacity, np.float32),
                )
                chunks.append(last)
            inside = row - last.start
            which = order[done : done + min(BLOCK_ROWS, len(last.vectors) - inside)]
            block = self._rounded(vectors, norms, which)
            squares = np.square(block.astype(np.float64)).sum(axis=1)
            last.vectors[inside : inside + len(which)] = block
            last.squares[inside : inside + len(which)] = squares
            longest = max(longest, float(np.sqrt(squares.max())))
            row, done = row + len(which), done + len(which)
        return tuple(chunks), longest

    def _grow(self, name: str, values: Ints) -> Ints:
        """The array ``name`` with values behind it; what readers hold of it does not change."""
        array: Ints = getattr(self.now, name)
        stop = len(array) + len(values)
        if stop > len(self._buffers[name]):
            buffer = np.empty(max(1024, stop, 3 * len(array) // 2), np.int64)
            buffer[: len(array)] = array
            self._buffers[name] = buffer
        self._buffers[name][len(array) : stop] = values
        return self._buffers[name][:stop]

    def _set(self, now: Rows) -> None:
        """Take a state whose arrays are new: nothing is appended to the former ones again."""
        for name in self._buffers:
            array = getattr(now, name)
            if array.base is not self._buffers[name]:
                self._buffers[name] = array
        self.now = now


def check_numbers(name: str, block: NDArray[np.float64], first: int = 0) -> None:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        which = int(np.flatnonzero(~finite)[0])
        bad = block[which][~np.isfinite(block[which])][0]
        place = name if name == "query" else f"{name}[{first + which}]"
        raise ArgumentError(f"{place}: finite numbers wanted, {bad} came")


def check_norms(name: str, norms: NDArray[np.float64], metric: str) -> None:
    if len(long := np.flatnonzero(~(norms <= MAX_NORM))):
        place = name if name == "query" else f"{name}[{long[0]}]"
        raise ArgumentError(
            f"{place}: a length of at most {MAX_NORM:g} wanted, {norms[long[0]]:.6g} came"
        )
    if metric == "cosine" and len(zero := np.flatnonzero(norms == 0)):
        place = name if name == "query" else f"{name}[{zero[0]}]"
        raise ArgumentError(f"{place}: a zero vector has no direction; metric 'cosine' wants one")
