"""The vectors of a memory's cubes: who makes them, and where they are searched."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from memos.cube.identity import digest
from memos.cube.utf8 import check_utf8
from memos.errors import ArgumentError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.embedding import FunctionKey
    from memos.records.scope import Scope
    from memos.records.store import Records
    from memos.records.vectors import VectorSearch

GIVEN = "vectors given by the application"  # their maker, where there is no embedder
Encoded = tuple[bytes | None, bytes | None]
_KEPT = 256
# Of this process: one query asks several memories.
_queries: dict[tuple[str | FunctionKey, int, str], tuple[Any, Any]] = {}
_queries_lock = threading.Lock()


class Embedded:
    """Thread-safe. Without an embedder everything but search by meaning works.

    Args:
        name:     of the memory, for messages.
        embedder: "auto" (the local model, where it is installed), None, an Embedder, a callable
            from texts to vectors, or the folder of a sentence-transformers model.
        metric, dtype: of the stored vectors.
    """

    def __init__(
        self, name: str, embedder: Any = "auto", *, metric: str = "cosine", dtype: str = "float16"
    ) -> None:
        self.name, self.metric, self.dtype = name, metric, dtype
        self._wish = embedder
        self._embedder: Any = None
        self._is_resolved = False
        self._records: Records | None = None
        self._memory = 0
        self._search: VectorSearch | None = None
        self._lock = threading.Lock()

    def like(self, other: Embedded) -> None:
        """Use the embedder of another memory; before this one is bound."""
        self._wish, self.metric, self.dtype = other._wish, other.metric, other.dtype

    @property
    def has_wish(self) -> bool:
        """Whether an embedder was asked for."""
        return self._wish is not None

    def bind(self, records: Records, memory: int) -> None:
        self._records, self._memory = records, memory

    def close(self) -> None:
        if self._search is not None:
            self._search.close()
        if self._embedder is None:
            return
        from memos.records.embedding import unnamed

        if (function := unnamed(self._embedder)) is not None:  # its queries keep it alive
            with _queries_lock:
                for key in [key for key in _queries if key[0] == function]:
                    del _queries[key]

    @property
    def embedder(self) -> Any:
        """The embedder, resolved at its first use; None where there is none."""
        if self._wish is None:
            return None
        with self._lock:
            if not self._is_resolved:
                from memos.records.embedding import resolve

                self._embedder, self._is_resolved = resolve(self._wish), True
            return self._embedder

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """What is stored of each text: its vector, and signs of its token vectors.

        A text that was embedded before, in any memory of the store, is not embedded again; by a
        function without an identity it is.
        """
        found = self.made(texts)
        if texts and self.embedder is not None:
            self.opened(self.embedder.dim, self.embedder.identity)
        return found

    def made(self, texts: Sequence[str]) -> list[Encoded]:
        """As ``encode``, where the caller knows whose vectors this memory has."""
        embedder = self.embedder
        if embedder is None or not texts:
            return [(None, None)] * len(texts)
        from memos.records.embedding import unnamed

        assert self._records is not None
        for text in texts:
            check_utf8(text)
        cache = self._records.embedding_cache
        is_kept = unnamed(embedder) is None
        # With dim: what is kept must fit.
        digests = self._digests(texts, embedder.identity, embedder.dim)
        kept = cache.get_many(list(digests.values())) if is_kept else {}
        known = {text: kept[d] for text, d in digests.items() if self._is_whole(kept.get(d, b""))}
        missing = [text for text in digests if text not in known]
        if missing:
            fresh = dict(zip(missing, self._embed(missing), strict=True))
            if is_kept:
                cache.put_many({digests[text]: data for text, data in fresh.items()})
            known |= fresh
        size = self._size()
        return [(known[text][:size], known[text][size:] or None) for text in texts]

    def forget(self, texts: Iterable[str]) -> None:
        """Drop what is kept of these texts: their vectors in the cache of the store."""
        assert self._records is not None
        maker, dim = self._records.embedder_of(self._memory)
        digests = self._digests(texts, maker, dim)
        self._records.embedding_cache.drop_many(list(digests.values()))
        with _queries_lock:
            for key in [key for key in _queries if key[2] in digests]:
                del _queries[key]

    def _digests(self, texts: Iterable[str], maker: str, dim: int) -> dict[str, bytes]:
        identity = f"memos embedding\0{maker}\0{dim}\0{self.dtype}"
        return {text: digest(identity, text) for text in texts}

    def _size(self) -> int:
        """Bytes of a vector."""
        return int(self.embedder.dim) * (4 if self.dtype == "float32" else 2)

    def _is_whole(self, data: bytes) -> bool:
        """Whether this is a vector, and signs of whole tokens where the embedder gives them."""
        import numpy

        size = self._size()
        signs = len(data) - size
        if signs < 0 or (signs and not hasattr(self.embedder, "embed_with_tokens")):
            return False
        vector = numpy.frombuffer(data[:size], f"<f{4 if self.dtype == 'float32' else 2}")
        return signs % -(-self.embedder.dim // 8) == 0 and bool(numpy.isfinite(vector).all())

    def _embed(self, texts: list[str]) -> list[bytes]:
        """Vector and token signs of each text, one after the other."""
        import numpy

        embedder = self.embedder
        tokens: Sequence[Any] = [b""] * len(texts)
        if hasattr(embedder, "embed_with_tokens"):
            arrays, words = embedder.embed_with_tokens(texts, "document")
            tokens = [numpy.packbits(each > 0, axis=1).tobytes() for each in words]
        else:
            arrays = embedder.embed(texts, "document")
        numbers = numpy.ascontiguousarray(arrays, f"<f{4 if self.dtype == 'float32' else 2}")
        return [row.tobytes() + signs for row, signs in zip(numbers, tokens, strict=True)]

    def query(self, text: str) -> Any:
        """The query's vector, float32 [dim]; None where nothing was embedded."""
        return self._query(text)[0]

    def query_tokens(self, text: str) -> Any:
        """Vectors of the query's tokens, float32 [tokens, dim]; None where there are none."""
        return self._query(text)[1]

    def _query(self, text: str) -> tuple[Any, Any]:
        if self.search_or_none() is None or self.embedder is None:
            return None, None
        from memos.records.embedding import unnamed

        embedder = self.embedder
        assert self._records is not None
        maker, dim = self._records.embedder_of(self._memory)
        if maker not in (embedder.identity, GIVEN):
            if self._wish == "auto":  # the local model did not make these vectors
                return None, None
            self.opened(embedder.dim, embedder.identity)
        check_utf8(text)
        key = (unnamed(embedder) or embedder.identity, dim, text)
        with _queries_lock:
            if key in _queries:
                return _queries[key]
        if hasattr(embedder, "embed_with_tokens"):
            vectors, tokens = embedder.embed_with_tokens([text], "query")
            found = vectors[0], tokens[0]
        else:
            found = embedder.embed([text], "query")[0], None
        with _queries_lock:
            _queries[key] = found
            if len(_queries) > _KEPT:
                del _queries[next(iter(_queries))]
        return found

    def tokens(self, connection: Connection, seqs: Sequence[int]) -> dict[int, Any]:
        """Signs of the token vectors of cubes that have them, uint8 [tokens, dim / 8]."""
        search = self.search_or_none()
        return {} if search is None else search.tokens(connection, seqs)

    def search(
        self, connection: Connection, vector: Any, limit: int, scope: Scope
    ) -> tuple[Any, Any] | None:
        """As VectorSearch.search; None where the memory has no vectors."""
        found = self.search_or_none()
        return None if found is None else found.search(connection, vector, limit, scope)

    def search_or_none(self) -> VectorSearch | None:
        """The vectors of this memory, if there are any."""
        if self._search is None:
            assert self._records is not None
            # Not under the lock: others may wait for it inside of their transactions.
            found = self._records.vector_search(self._memory)
            with self._lock:
                self._search = self._search or found
        return self._search

    def opened(self, dim: int, identity: str) -> VectorSearch:
        """The vectors of this memory, which ``identity`` makes from now on.

        Raises ArgumentError when another embedder made those that are there.
        """
        assert self._records is not None
        search = self.search_or_none()
        if search is None:
            search = self._records.vector_search(
                self._memory, identity=identity, dim=dim, metric=self.metric, dtype=self.dtype
            )
            assert search is not None
            self._search = search
        known = self._records.embedder_of(self._memory)
        if known != (identity, dim):
            raise ArgumentError(
                f"memory {self.name!r}: its vectors were made by {known[0]} ({known[1]} numbers), "
                f"not by {identity} ({dim}); pass that embedder, or make a new memory"
            )
        return search
