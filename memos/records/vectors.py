"""The vectors of one memory: rows in the store, and an index in memory that follows them.

The rows are the truth. The index asks for what changed since it last looked, so that writes of
other processes are seen too; its file is a cache, thrown away whenever it does not fit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from sqlalchemy import Connection, bindparam, select

from memos.errors import NotFoundError
from memos.records.database import Database
from memos.records.index import VectorIndex
from memos.records.life_schema import cold
from memos.records.links import chunks
from memos.records.schema import vectors
from memos.records.scope import Scope

if TYPE_CHECKING:
    from memos.records.rights_seen import Readable

_SAVE_FROM = 5000  # vectors; fewer are read from their rows as fast as from a file


_TOKENS = select(vectors.c.seq, vectors.c.tokens).where(
    vectors.c.seq.in_(bindparam("seqs", expanding=True)), vectors.c.tokens.is_not(None)
)


GONE = b""  # tokens of a purged cube, whose vector must not stay in any index
_COLD = (
    select(vectors.c.seq, vectors.c.data)
    .join(cold, cold.c.seq == vectors.c.seq)
    .where(vectors.c.seq.in_(bindparam("seqs", expanding=True)), vectors.c.data.is_not(None))
)


class VectorSearch:
    """Thread-safe.

    Args:
        memory: number of the memory; dim, metric: of its vectors.
        dtype:  float32 or float16, in the rows and in the index.
        folder: where the index is cached; None: nowhere.
        key:    gives 32 bytes under which that is encrypted; None: it is not.
    """

    def __init__(
        self,
        database: Database,
        memory: int,
        dim: int,
        *,
        metric: str = "cosine",
        dtype: str = "float32",
        folder: Path | None = None,
        key: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self.database, self.memory, self.dim = database, memory, dim
        self._key = key
        self.metric, self.dtype = metric, dtype
        self._path = None if folder is None else folder / f"vectors-{memory}.index"
        self._index: VectorIndex | None = None
        self._seen = self._saved = 0
        # Number of vectors when it was taken, and rows from all over the memory.
        self._sample: tuple[int, Any] = (0, numpy.zeros((1, dim), numpy.float32))
        self._lock = threading.Lock()

    def encode(self, array: Any) -> list[bytes]:
        """Rows [n, dim] as they are stored."""
        wanted = numpy.ascontiguousarray(array, dtype=f"<f{4 if self.dtype == 'float32' else 2}")
        return [row.tobytes() for row in wanted]

    def decode(self, data: bytes) -> Any:
        """A stored row as float32 [dim]."""
        kind = f"<f{4 if self.dtype == 'float32' else 2}"
        return numpy.frombuffer(data, dtype=kind).astype(numpy.float32)

    def search(
        self, connection: Connection, query: Any, limit: int, scope: Scope
    ) -> tuple[Any, Any]:
        """seq [n] int64 and similarity [n] float32 of the nearest cubes, best first."""
        index = self.index(connection)
        view = scope.readable(connection, self.memory)
        if view is not None and not view.is_all and not scope.filters:
            from memos.records import rights_vectors

            keys, scores = rights_vectors.search(index, view, query, limit)
        else:
            keys, scores = index.search(query, limit, scope.allowed(connection, self.memory))
        if not scope.archived:
            return keys, scores
        more, theirs = self.search_cold(connection, query, limit, scope)
        keys, scores = numpy.concatenate([keys, more]), numpy.concatenate([scores, theirs])
        order = numpy.lexsort((keys, -scores))[:limit]
        return keys[order], scores[order]

    def rows(self, connection: Connection, seqs: Sequence[int]) -> dict[int, Any]:
        """The stored vectors of these cubes, float32 [dim]."""
        found = connection.execute(
            select(vectors.c.seq, vectors.c.data).where(
                vectors.c.seq.in_(list(seqs)), vectors.c.data.is_not(None)
            )
        )
        return {int(row[0]): self.decode(row[1]) for row in found}

    def tokens(self, connection: Connection, seqs: Sequence[int]) -> dict[int, Any]:
        """Signs of the token vectors of these cubes, uint8 [tokens, dim / 8]."""
        found = connection.execute(_TOKENS, {"seqs": [int(seq) for seq in seqs]})
        width = -(-self.dim // 8)
        return {
            int(row[0]): numpy.frombuffer(row[1], numpy.uint8).reshape(-1, width) for row in found
        }

    def similarities(self, connection: Connection, query: Any, seqs: Any) -> Any:
        """Similarity [n] float32 of these cubes, as ``search`` gives it; nan without a vector."""
        index = self.index(connection)
        found = numpy.full(len(seqs), numpy.nan, numpy.float32)
        order = numpy.argsort(seqs)
        keys, scores = index.search(query, len(seqs), numpy.asarray(seqs)[order])
        found[order[numpy.searchsorted(numpy.asarray(seqs)[order], keys)]] = scores
        missing = numpy.flatnonzero(numpy.isnan(found))
        if len(missing):
            stored = self._stored(connection, [int(seqs[i]) for i in missing])
            places = [i for i in missing.tolist() if int(seqs[i]) in stored]
            found[places] = self._scores(query, [stored[int(seqs[i])] for i in places])
        return found

    def _stored(self, connection: Connection, seqs: Sequence[int]) -> dict[int, bytes]:
        """The stored bytes of cubes that are in no index."""
        return {
            int(row[0]): row[1]
            for part in chunks(seqs)
            for row in connection.execute(_COLD, {"seqs": part})
        }

    def background(
        self, connection: Connection, query: Any, readable: Readable | None = None
    ) -> tuple[float, float]:
        """Mean and standard deviation of the similarity to 512 cubes from all over the memory.

        Which ones is decided again when the memory grew or shrank by a twentieth.

        Args:
            readable: what a principal may read: only of this; None: of everything.
        """
        index = self.index(connection)
        size, sample = self._sample if readable is None else readable.sample
        now = len(index) if readable is None else len(readable)
        if abs(now - size) * 20 > size or not size:
            keys = index.keys()
            if readable is not None:
                from memos.records.rights_seen import intersected

                keys = intersected(keys, readable.seqs)
            if not len(keys):
                return 0.0, 1.0
            some = numpy.linspace(0, len(keys) - 1, min(512, len(keys))).astype(numpy.int64)
            with contextlib.suppress(NotFoundError):  # removed meanwhile: next time
                sample = index.get(keys[some])
                if self.metric == "cosine":
                    sample /= numpy.maximum(numpy.linalg.norm(sample, axis=1, keepdims=True), 1e-9)
                if readable is None:
                    self._sample = (len(keys), sample)
                else:
                    readable.sample = (now, sample)
        wanted = numpy.asarray(query, numpy.float32)
        if self.metric == "l2":
            scores = -numpy.square(sample - wanted).sum(axis=1)
        else:
            length = numpy.linalg.norm(wanted) if self.metric == "cosine" else 1.0
            scores = sample @ (wanted / max(float(length), 1e-9))
        return float(scores.mean()), float(scores.std()) or 1.0

    def index(self, connection: Connection) -> VectorIndex:
        """The index, brought up to what this connection sees."""
        with self._lock:
            now = self.database.change(connection)
            if self._index is None:
                self._open(connection)
            assert self._index is not None
            if now > self._seen:
                self._follow(connection)
                self._seen = now
            return self._index

    def search_cold(
        self, connection: Connection, query: Any, limit: int, scope: Scope
    ) -> tuple[Any, Any]:
        """As ``search``, among the cubes that are in no index.

        Cost: reads their vectors from the disk.
        """
        rows = connection.execute(
            select(vectors.c.seq, vectors.c.data)
            .join(cold, cold.c.seq == vectors.c.seq)
            .where(cold.c.memory == self.memory, vectors.c.data.is_not(None))
        ).all()
        keys = numpy.fromiter((row[0] for row in rows), numpy.int64, len(rows))
        scores = self._scores(query, [row[1] for row in rows])
        allowed = scope.allowed(connection, self.memory)
        if allowed is not None:
            kept = numpy.isin(keys, allowed)
            keys, scores = keys[kept], scores[kept]
        order = numpy.lexsort((keys, -scores))[:limit]
        return keys[order], scores[order]

    def forget(self) -> None:
        """Drop the index and its file: they are made again from the rows."""
        with self._lock:
            self._index, self._seen, self._saved = None, 0, 0
            self._sample = (0, numpy.zeros((1, self.dim), numpy.float32))
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _scores(self, query: Any, data: Sequence[bytes]) -> Any:
        """Similarity [n] float32 of stored vectors, as the index gives it."""
        if not data:
            return numpy.zeros(0, numpy.float32)
        index = VectorIndex(self.dim, self.metric, self.dtype, hnsw=False, background=False)
        rows = numpy.frombuffer(b"".join(data), f"<f{4 if self.dtype == 'float32' else 2}")
        index.add(numpy.arange(len(data)), rows.reshape(len(data), self.dim))
        keys, scores = index.search(query, len(data), None)
        found = numpy.empty(len(data), numpy.float32)
        found[keys] = scores
        return found

    def close(self) -> None:
        """Write the cache file, where it pays for itself."""
        held = self._index
        # Before the lock: others may wait for it inside of their transactions.
        key = self._key() if held is not None and len(held) >= _SAVE_FROM else None
        with self._lock:
            index = self._index
            if index is None or self._path is None or self.database.readonly:
                return
            if index is held and len(index) >= _SAVE_FROM and self._seen > self._saved:
                self._path.parent.mkdir(exist_ok=True)
                index.save(self._path, stamp=self._seen, key=key)
                self._saved = self._seen
            self._index = None

    def _open(self, connection: Connection) -> None:
        if self._path is not None:
            loaded = VectorIndex.load(
                self._path, dim=self.dim, metric=self.metric, dtype=self.dtype, key=self._key()
            )
            if loaded is not None:
                index, stamp = loaded
                if stamp <= self.database.change(connection):
                    self._index, self._seen, self._saved = index, stamp, stamp
                    return
        self._index, self._seen = VectorIndex(self.dim, self.metric, self.dtype), 0

    def _follow(self, connection: Connection) -> None:
        assert self._index is not None
        mine = (vectors.c.memory == self.memory, vectors.c.change > self._seen)
        columns = (vectors.c.seq, vectors.c.data, vectors.c.tokens)
        rows = connection.execute(select(*columns).where(*mine)).all()
        if self._seen and any(row[1] is None and row[2] == GONE for row in rows):
            # What was purged stands in the index as long as it is changed and not made anew.
            self._index, self._seen = VectorIndex(self.dim, self.metric, self.dtype), 0
            self._sample = (0, numpy.zeros((1, self.dim), numpy.float32))
            if self._path is not None and not self.database.readonly:
                self._path.unlink(missing_ok=True)
            self._follow(connection)
            return
        left = connection.execute(
            select(cold.c.seq).where(cold.c.memory == self.memory, cold.c.change > self._seen)
        )
        away = {int(row[0]) for row in left}
        if rows:
            also = select(cold.c.seq).join(vectors, vectors.c.seq == cold.c.seq).where(*mine)
            away.update(int(row[0]) for row in connection.execute(also))
        gone = sorted(away.union(int(row[0]) for row in rows if row[1] is None))
        here = [row for row in rows if row[1] is not None and row[0] not in away]
        if gone:
            self._index.remove(numpy.array(gone, numpy.int64))
        if here:
            keys = numpy.fromiter((row[0] for row in here), numpy.int64, len(here))
            data = b"".join(row[1] for row in here)
            kind = f"<f{4 if self.dtype == 'float32' else 2}"
            self._index.add(keys, numpy.frombuffer(data, dtype=kind).reshape(len(here), self.dim))
