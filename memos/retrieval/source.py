"""What retrieval asks of a memory. It knows no SQL: the memories implement this."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy

Array: TypeAlias = "numpy.ndarray[Any, Any]"
Scope: TypeAlias = Any  # filters and rights: passed to every call, never looked into


class Unit(Protocol):
    """What ranking reads of one cube.

    seq is its number, unique among the sources of one query and ordered by time; thread the
    conversation or document whose units follow one another; parent the unit above it; context
    what full text reads beside the text: the metadata in words, the headings above.
    """

    @property
    def seq(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def context(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def thread(self) -> str | None: ...
    @property
    def parent(self) -> int | None: ...
    @property
    def importance(self) -> float: ...
    @property
    def created_at(self) -> float: ...


class Source(Protocol):
    """A memory that can be searched.

    Every call with a ``scope`` answers for the units that may be seen, and for no others.
    """

    @property
    def name(self) -> str: ...

    @property
    def owner(self) -> object:
        """What is known of units between queries hangs on this: the memory itself."""

    def count(self) -> int:
        """About how many units there are."""

    def search_text(self, text: str, limit: int, scope: Scope) -> tuple[Array, Array]:
        """seq [n] int64 and BM25 [n] of units with any of these words, best first."""

    def search_vector(self, vector: Any, limit: int, scope: Scope) -> tuple[Array, Array]:
        """seq [n] int64 and similarity [n], best first; empty where there are no vectors."""

    def similarities(self, vector: Any, seqs: Array) -> Array:
        """Similarity [n] of these units, as ``search_vector`` gives it; nan without a vector."""

    def background(self, vector: Any) -> tuple[float, float]:
        """Mean and standard deviation of the similarity to a few hundred units of the store."""

    def embed_query(self, text: str) -> Any:
        """The vector of a query; None where there are no vectors."""

    def named_values(self, words: Sequence[str]) -> Sequence[tuple[str, str]]:
        """(key, value) of the different metadata strings that begin with one of the words."""

    def load(self, seqs: Sequence[int], scope: Scope) -> Mapping[int, Unit]:
        """The units that may be seen."""

    def visible(self, seqs: Sequence[int], scope: Scope) -> Collection[int]:
        """Those of these units that may be seen. A query asks this of a few hundred."""

    def neighbours(
        self, seqs: Sequence[int], scope: Scope
    ) -> Mapping[int, tuple[Sequence[int], Sequence[int]]]:
        """For each unit the one before and the one after it, in its thread or among siblings."""

    def relations(self, seqs: Sequence[int]) -> Sequence[tuple[int, str, int, float]]:
        """(source, type, target, weight) of every edge at one of these units."""

    def changes(self, since: int) -> tuple[int, Sequence[int] | None]:
        """(number of the last change, units changed after ``since``); None: it cannot say which.

        A unit whose neighbour became another one need not be among them.
        """

    def cubes(self, seqs: Sequence[int], scope: Scope) -> Mapping[int, Any]:
        """The MemCubes that may be seen."""


class TokenSource(Protocol):
    """A source that keeps a vector for each token of its texts, for late interaction."""

    def embed_query_tokens(self, text: str) -> Any:
        """float32 [tokens, dim]; None where there are none."""

    def token_vectors(self, seqs: Sequence[int]) -> Mapping[int, Any]:
        """seq -> [tokens, dim] of any scale, or uint8 [tokens, dim / 8]: packed signs."""
