"""The vectors of a memory's cubes: who makes them, and where they are searched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.scope import Scope
    from memos.records.store import Records
    from memos.records.vectors import VectorSearch

_BATCH = 1000


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

    @property
    def has_wish(self) -> bool:
        """Whether an embedder was asked for."""
        return self._wish is not None

    def bind(self, records: Records, memory: int) -> None:
        self._records, self._memory = records, memory

    def close(self) -> None:
        if self._search is not None:
            self._search.close()

    @property
    def embedder(self) -> Any:
        """The embedder, resolved at its first use; None where there is none."""
        if self._wish is None:
            return None
        with self._lock:
            if not self._is_resolved:
                from memos.records.embedding import CachedEmbedder, resolve

                found = resolve(self._wish)
                if found is not None and self._records is not None:
                    found = CachedEmbedder(found, self._records.embedding_cache)
                self._embedder, self._is_resolved = found, True
            return self._embedder

    def encode(
        self, texts: Sequence[str], progress: Callable[[int, int], object] | None = None
    ) -> list[bytes | None]:
        """Stored vectors of these texts; None each where there is no embedder."""
        embedder = self.embedder
        if embedder is None or not texts:
            return [None] * len(texts)
        arrays = embedder.embed(texts, "document")
        return list(self.opened(arrays.shape[1], embedder.identity).encode(arrays))

    def query(self, text: str) -> Any:
        """The query's vector, float32 [dim]; None where nothing was embedded."""
        if self.search_or_none() is None or self.embedder is None:
            return None
        return self.embedder.embed([text], "query")[0]

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
            with self._lock:
                self._search = self._search or self._records.vector_search(self._memory)
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
