"""A declarative memory as retrieval sees it: candidates by number, and what is known of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection

    from memos.cube import MemCube
    from memos.memories.declarative import DeclarativeMemory
    from memos.records.cubes import CubeTable
    from memos.records.rights_seen import Readable
    from memos.records.scope import Scope


_MANY = 1000  # changed units: more are not worth listing


@dataclass(frozen=True)
class Unit:
    """What ranking reads of a cube.

    Args:
        seq:     its number, ordered by time.
        change:  number of the transaction that wrote this version of it.
        context: metadata in words, and the headings above it.
        thread:  conversation or document whose units follow one another.
        parent:  number of the unit above it.
    """

    seq: int
    change: int
    id: str
    kind: str
    text: str
    context: str
    metadata: Mapping[str, Any]
    thread: str | None
    parent: int | None
    importance: float
    created_at: float
    updated_at: float


class MemorySource:
    """Thread-safe. Every path applies ``scope`` - states, expiry, filters, rights - first."""

    def __init__(self, memory: DeclarativeMemory, archived: bool = False) -> None:
        self.memory, self.archived = memory, archived
        self.name, self.kind = memory.name, memory.kind
        self._rights = memory.scope().rights  # of who asks

    @property
    def owner(self) -> object:
        """What is known of units between queries hangs on this: of a principal's view its own."""
        if self._rights is None:
            return self.memory
        with self._read() as connection:
            view = self._view(connection)
            assert view is not None
            return view.token

    def search_text(
        self, text: str, limit: int, scope: Scope, *, every_word: bool = False
    ) -> tuple[Any, Any]:
        """seq [n] int64 and BM25 [n] float64 of units with words of the text, best first."""
        with self._read() as connection:
            allowed = scope.allowed(connection, self._table.memory)
            view = scope.readable(connection, self._table.memory)
            found = self._table.fulltext.search(
                connection, text, limit, allowed, every_word=every_word, readable=view
            )
            if not scope.archived:
                return found
            from memos.records.cold_text import search_cold

            more = search_cold(
                connection, self._table.fulltext, text, limit, allowed, is_alone=view is not None
            )
        return _best_of(found, more, limit)

    def search_vector(self, vector: Any, limit: int, scope: Scope) -> tuple[Any, Any]:
        """seq [n] int64 and similarity [n] float32 of the nearest units, best first."""
        import numpy

        found = None
        if limit > 0:  # where nothing may be read there is nothing to ask for
            with self._read() as connection:
                found = self.memory.embedded.search(connection, vector, limit, scope)
        if found is None:
            return numpy.empty(0, numpy.int64), numpy.empty(0, numpy.float32)
        return found

    def embed_query(self, text: str) -> Any:
        """float32 [dim], or None where this memory has no vectors."""
        return self.memory.embedded.query(text)

    def embed_query_tokens(self, text: str) -> Any:
        """float32 [tokens, dim], or None where this memory has no token vectors."""
        return self.memory.embedded.query_tokens(text)

    def token_vectors(self, seqs: Sequence[int]) -> dict[int, Any]:
        """Signs of the token vectors of units that have them, uint8 [tokens, dim / 8]."""
        with self._read() as connection:
            return self.memory.embedded.tokens(connection, seqs)

    def similarities(self, vector: Any, seqs: Any) -> Any:
        """Similarity [n] of these units, as ``search_vector`` gives it; nan without a vector."""
        search = self.memory.embedded.search_or_none()
        if search is None:
            import numpy

            return numpy.full(len(seqs), numpy.nan, numpy.float32)
        with self._read() as connection:
            return search.similarities(connection, vector, seqs)

    def background(self, vector: Any) -> tuple[float, float]:
        """Mean and standard deviation of the similarity to a few hundred units."""
        search = self.memory.embedded.search_or_none()
        if search is None:
            return 0.0, 1.0
        with self._read() as connection:
            return search.background(connection, vector, self._view(connection))

    def changes(self, since: int) -> tuple[int, list[int] | None]:
        """(number of the last change, units changed after ``since``; None: too many)."""
        with self._read() as connection:
            now = self.memory.records.database.change(connection)
            if now == since:
                return now, []
            return now, self._table.changed(connection, since, _MANY)

    def load(self, seqs: Iterable[int], scope: Scope) -> dict[int, Unit]:
        """The units that may be seen."""
        with self._read() as connection:
            wanted, scope = self._readable(connection, seqs, scope)
            rows = self._table.rows(connection, wanted, scope)
            return {
                row.seq: Unit(
                    row.seq,
                    row.change,
                    row.id,
                    row.kind,
                    row.text,
                    row.context,
                    json.loads(row.metadata),
                    row.thread,
                    row.parent,
                    row.importance,
                    row.created_at,
                    row.updated_at,
                )
                for row in rows
            }

    def visible(self, seqs: Sequence[int], scope: Scope) -> set[int]:
        """Which of these units may be seen; cheaper than reading them."""
        with self._read() as connection:
            wanted, scope = self._readable(connection, seqs, scope)
            return self._table.visible(connection, wanted, scope)

    def neighbours(
        self, seqs: Sequence[int], scope: Scope, reach: int = 1
    ) -> dict[int, tuple[list[int], list[int]]]:
        """For each unit the ``reach`` ones before it (nearest first) and after it in its thread."""
        from memos.records.links import neighbours_of

        with self._read() as connection:
            return neighbours_of(connection, list(seqs), scope, reach)

    def relations(self, seqs: Sequence[int]) -> list[tuple[int, str, int, float]]:
        """(source, type, target, weight) of every edge at one of these units, of any memory; those
        that use made among them."""
        from memos.records.links import edges_of

        scope, made = self._scope(), self.memory.records.hebbian
        with self._read() as connection:
            found = edges_of(connection, list(seqs), scope)
            return found + made.edges(connection, list(seqs), self.memory.now(), scope)

    def named_values(self, words: Sequence[str]) -> list[tuple[str, str]]:
        """(key, value) of the different metadata strings that begin with one of the words."""
        from memos.records.filters import values_beginning

        with self._read() as connection:
            view = self._view(connection)
            is_readable = None if view is None or view.is_all else view.has_any
            return values_beginning(connection, self._table.memory, words, is_readable=is_readable)

    def document_frequencies(self, words: Sequence[str]) -> dict[str, int]:
        """In how many units each word occurs, in any form with the same stem."""
        from memos.records.fulltext import stems_of, tokens_of

        if self._rights is not None:
            from memos.records.rights_text import ReadableText

            tokens = tokens_of(tuple(words))
            with self._read() as connection:
                view = self._view(connection)
                assert view is not None
                text = ReadableText(connection, self._table.fulltext, view, tokens)
                return {word: text.document_frequency(word) for word in words}
        stems = stems_of(tuple(words))
        with self._read() as connection:
            total = self._table.fulltext.rows(connection)
            counts = self._table.fulltext.document_frequencies(connection, stems.values(), total)
        return {word: counts.get(stems.get(word, word), 0) for word in words}

    def count(self) -> int:
        """About how many units there are."""
        with self._read() as connection:
            view = self._view(connection)
            if view is not None:
                return view.documents
            away = self._table.life.count_cold(connection) if self.archived else 0
            return self._table.fulltext.rows(connection) + away

    def cubes(self, seqs: Sequence[int], scope: Scope) -> dict[int, MemCube]:
        """The cubes that may be seen, whole."""
        with self._read() as connection:
            return self._table.load(connection, list(seqs), scope)

    @property
    def _table(self) -> CubeTable:
        return self.memory.table

    def _scope(self) -> Scope:
        from memos.records.scope import Scope

        return Scope(rights=self._rights)

    def _readable(
        self, connection: Connection, seqs: Iterable[int], scope: Scope
    ) -> tuple[list[int], Scope]:
        """Those of the units that the principal may read, and the scope without the principal:
        its view knows what SQL would have to ask of each row."""
        wanted = [int(seq) for seq in seqs]
        view = scope.readable(connection, self._table.memory)
        if view is None:
            return wanted, scope
        return view.those_of(wanted), replace(scope, rights=None)

    def _view(self, connection: Connection) -> Readable | None:
        """What the principal may read; None: the owner asks."""
        return self._scope().readable(connection, self._table.memory)

    def _read(self) -> AbstractContextManager[Connection]:
        return self.memory.records.database.read()


def _best_of(found: tuple[Any, Any], more: tuple[Any, Any], limit: int) -> tuple[Any, Any]:
    """The best of two results without a unit in common."""
    import numpy

    seqs, scores = (numpy.concatenate(pair) for pair in zip(found, more, strict=True))
    order = numpy.lexsort((seqs, -scores))[:limit]
    return seqs[order], scores[order]
