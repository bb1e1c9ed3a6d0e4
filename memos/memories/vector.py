"""VectorMemory: vectors that the application made, or that an embedder makes of its texts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.cube import Hit, MemCube
from memos.cube.utf8 import check_utf8
from memos.errors import ArgumentError
from memos.memories.declarative import DeclarativeMemory
from memos.memories.embedded import GIVEN, Embedded

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.scope import Scope
    from memos.records.store import Records
    from memos.records.writes import Change, New

METRICS = ("cosine", "dot", "l2")


class VectorMemory(DeclarativeMemory):
    """Vectors with metadata, found by nearness. Thread-safe once registered.

    Content: a vector (a list or array of numbers), or {"vector": ..., "text": ...}; with an
    embedder also just a text. Read back: {"vector": float32 array, "text": ...}.

    Args:
        name, description: of the memory.
        dim:      numbers of a vector; None: those of the first one.
        metric:   "cosine", "dot" or "l2".
        dtype:    of the stored numbers: "float32" or "float16".
        embedder: who makes vectors of texts: None (nobody), "auto", an Embedder, a callable.
        on_duplicate, clock: as every declarative memory.

    Raises:
        ArgumentError: an argument is out of contract.
    """

    kind = "vector"

    def __init__(
        self,
        name: str,
        description: str = "",
        *,
        dim: int | None = None,
        metric: str = "cosine",
        dtype: str = "float32",
        embedder: Any = None,
        **more: Any,
    ) -> None:
        super().__init__(name, description, **more)
        if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
            raise ArgumentError(f"dim: a number of at least 1 wanted, got {dim!r}")
        if metric not in METRICS:
            raise ArgumentError(f"metric: one of {', '.join(METRICS)} wanted, got {metric!r}")
        if dtype not in ("float32", "float16"):
            raise ArgumentError(f"dtype: 'float32' or 'float16' wanted, got {dtype!r}")
        self.dim, self.metric, self.dtype = dim, metric, dtype
        self.embedded = Embedded(name, embedder, metric=metric, dtype=dtype)

    @classmethod
    def restored(cls, name: str, description: str, config: Mapping[str, Any]) -> VectorMemory:
        embedder = "auto" if config.get("embeds") else None
        known = {key: config[key] for key in ("dim", "metric", "dtype") if key in config}
        return cls(name, description, embedder=embedder, **known)

    def config(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "metric": self.metric,
            "dtype": self.dtype,
            "embeds": self.embedded.has_wish,
        }

    def bind(self, records: Records) -> None:
        super().bind(records)
        self.table.shown = _shown
        search = self.embedded.search_or_none()
        if search is None:
            return
        for name, mine, theirs in (
            ("dim", self.dim, search.dim),
            ("metric", self.metric, search.metric),
            ("dtype", self.dtype, search.dtype),
        ):
            if mine not in (None, theirs):
                raise ArgumentError(
                    f"{name}: memory {self.name!r} is stored with {theirs!r}, got {mine!r}"
                )
        self.dim = search.dim

    def lookup(self, query: Any, limit: int, scope: Scope) -> list[Hit]:
        """The cubes whose vectors are nearest to ``query``, a list or array [dim]."""
        vector = self._vector("query", query)
        with self.records.database.read() as connection:
            found = self.embedded.search(connection, vector, limit, scope)
            if found is None:
                return []
            seqs, scores = found
            cubes = self.table.load(connection, seqs.tolist(), scope)
        return [
            Hit.of(cubes[seq], score=score, trace=({"stage": "vector", "metric": self.metric},))
            for seq, score in zip(seqs.tolist(), scores.tolist(), strict=True)
            if seq in cubes
        ]

    def _read(self, content: Any) -> tuple[str, Any]:
        text, vector = "", content
        if isinstance(content, str):
            text, vector = content, None
        elif isinstance(content, Mapping):
            if content.keys() - {"vector", "text"}:
                raise ArgumentError(
                    f"content: vector and text wanted, got {', '.join(map(str, content))}"
                )
            text, vector = content.get("text", ""), content.get("vector")
            if not isinstance(text, str):
                raise ArgumentError(f"content: a text wanted, got {type(text).__name__}")
        if vector is None:
            if not text.strip():
                raise ArgumentError("content: a vector, or a text to embed, wanted")
            if self.embedded.embedder is None:
                raise ArgumentError(
                    f"content: memory {self.name!r} has no embedder, so it wants a vector; pass "
                    "embedder= , or embedder='auto' with pip install 'memos-native[embed]'"
                )
            check_utf8(text)
            return text, None
        return text, _content(self._vector("content", vector), text)

    def _prepare(self, news: Sequence[New], items: Sequence[Mapping[str, Any]]) -> None:
        texts = [new for new in news if new.content is None]
        for new, content in zip(texts, self._embed([new.text for new in texts]), strict=True):
            new.content = content
        for new in news:
            new.vector = self._stored(new.content)

    def _embed_ahead(self, content: Any, change: Change) -> None:
        """Its vector depends on more than the content: see ``_change``."""

    def _change(self, connection: Connection, old: MemCube, content: Any, change: Change) -> None:
        change.text, change.content = self._read(content)
        if change.content is None:
            (change.content,) = self._embed([change.text])
        change.vector = self._stored(change.content)

    def _restore(
        self, connection: Connection, old: MemCube, text: str, content: Any, change: Change
    ) -> None:
        change.text, change.content = text, content
        change.vector = self._stored(content)

    def _embed(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """Content of texts that came without a vector: one call of the embedder."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return []
        vectors = self.embedded.embedder.embed(distinct, "document")
        by_text = dict(zip(distinct, vectors, strict=True))
        return [_content(self._vector("content", by_text[text]), text) for text in texts]

    def _stored(self, content: Any) -> bytes:
        vector = _shown(content)["vector"]
        embedder = self.embedded.embedder
        identity = GIVEN if embedder is None else embedder.identity
        return self.embedded.opened(len(vector), identity).encode(vector[None])[0]

    def _vector(self, what: str, value: Any) -> Any:
        import numpy

        try:
            vector = numpy.asarray(value, dtype=numpy.float32)
        except (TypeError, ValueError):
            raise ArgumentError(
                f"{what}: a vector of numbers wanted, got {type(value).__name__}"
            ) from None
        if (
            vector.ndim != 1
            or (self.dim is not None and len(vector) != self.dim)
            or not len(vector)
        ):
            wanted = "n" if self.dim is None else self.dim
            raise ArgumentError(f"{what}: shape [{wanted}] wanted, got {list(vector.shape)}")
        if not numpy.isfinite(vector).all():
            raise ArgumentError(f"{what}: finite numbers wanted, got NaN or infinity")
        if self.metric == "cosine" and not vector.any():
            raise ArgumentError(f"{what}: a vector that is not zero wanted under cosine")
        if self.dim is None:
            self.dim = len(vector)
        return vector


def _content(vector: Any, text: str) -> dict[str, str]:
    """Content as it is stored."""
    return {"vector": base64.b85encode(vector.tobytes()).decode(), "text": text}


def _shown(content: Any) -> Any:
    """Stored content as it is read."""
    import numpy

    data = base64.b85decode(content["vector"])
    return {"vector": numpy.frombuffer(data, dtype="<f4").copy(), "text": content["text"]}
