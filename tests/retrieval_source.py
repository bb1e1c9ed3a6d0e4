"""A source of plain Python, numpy and SQLite's full text: what retrieval is tested on."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from memos.cube import MemCube


@dataclass
class Row:
    """One unit; it has what a Unit of retrieval has."""

    seq: int
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    thread: str | None = None
    parent: int | None = None
    importance: float = 0.5
    created_at: float = 0.0
    context: str = ""
    vector: Any = None
    tokens: Any = None
    change: int = 0


class ListSource:
    """Units in a dict; ``scope`` is None, or a function that says which rows may be seen."""

    def __init__(
        self,
        embed: Callable[[str], Any] | None = None,
        *,
        name: str = "list",
        embed_tokens: Callable[[str], Any] | None = None,
    ) -> None:
        self.name, self.owner = name, self
        self.rows: dict[int, Row] = {}
        self.edges: list[tuple[int, str, int, float]] = []
        self._embed, self._embed_tokens = embed, embed_tokens
        self._stamp = 0
        self._gone: dict[int, int] = {}
        self._matrix: tuple[int, Any, Any] = (-1, None, None)
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.execute(
            "CREATE VIRTUAL TABLE f USING fts5(text, context, tokenize='porter unicode61')"
        )
        self.loads = 0

    def put(self, *rows: Row) -> None:
        """Add rows, or replace those with the same number."""
        self._stamp += 1
        for row in rows:
            row.change = self._stamp
            if row.vector is None and self._embed is not None:
                row.vector = self._embed(row.text)
            if row.seq in self.rows:
                self._db.execute("DELETE FROM f WHERE rowid = ?", (row.seq,))
            self.rows[row.seq] = row
            self._db.execute(
                "INSERT INTO f(rowid, text, context) VALUES (?, ?, ?)",
                (row.seq, row.text, row.context or " ".join(map(str, row.metadata.values()))),
            )

    def remove(self, seq: int) -> None:
        self._stamp += 1
        del self.rows[seq]
        self._gone[seq] = self._stamp
        self._db.execute("DELETE FROM f WHERE rowid = ?", (seq,))

    def relate(self, source: int, type: str, target: int, weight: float = 1.0) -> None:
        self.edges.append((source, type, target, weight))

    # What retrieval calls.

    def count(self) -> int:
        return len(self.rows)

    def search_text(self, text: str, limit: int, scope: Any) -> tuple[Any, Any]:
        words = re.findall(r"\w+", text)
        found: list[tuple[int, float]] = []
        if words:
            match = " OR ".join(f'"{word}"' for word in words)
            rows = self._db.execute(
                "SELECT rowid, -rank FROM f WHERE f MATCH ? ORDER BY rank, rowid", (match,)
            )
            found = [row for row in rows if self._sees(row[0], scope)][:limit]
        return _arrays(found)

    def search_vector(self, vector: Any, limit: int, scope: Any) -> tuple[Any, Any]:
        seqs, matrix = self._vectors()
        if not len(seqs):
            return _arrays([])
        near = matrix @ vector
        order = numpy.argsort(-near, kind="stable")
        if scope is not None:
            order = order[[self._sees(int(seq), scope) for seq in seqs[order]]]
        order = order[:limit]
        return seqs[order], near[order]

    def similarities(self, vector: Any, seqs: Any) -> Any:
        known, matrix = self._vectors()
        at = {int(seq): i for i, seq in enumerate(known)}
        found = numpy.full(len(seqs), numpy.nan)
        for i, seq in enumerate(seqs.tolist()):
            if seq in at:
                found[i] = matrix[at[seq]] @ vector
        return found

    def background(self, vector: Any) -> tuple[float, float]:
        _, matrix = self._vectors()
        near = matrix[:: max(1, len(matrix) // 400)] @ vector
        return float(near.mean()), float(near.std())

    def embed_query(self, text: str) -> Any:
        return None if self._embed is None else self._embed(text)

    def named_values(self, words: Sequence[str]) -> list[tuple[str, str]]:
        values = {
            (key, value)
            for row in self.rows.values()
            for key, value in row.metadata.items()
            if isinstance(value, str) and value.lower().startswith(tuple(words) or ("\0",))
        }
        return sorted(values)

    def load(self, seqs: Sequence[int], scope: Any) -> dict[int, Row]:
        self.loads += len(seqs)
        return {seq: self.rows[seq] for seq in seqs if self._sees(seq, scope)}

    def visible(self, seqs: Sequence[int], scope: Any) -> list[int]:
        return [seq for seq in seqs if self._sees(seq, scope)]

    def neighbours(self, seqs: Sequence[int], scope: Any) -> dict[int, tuple[list[int], list[int]]]:
        chains: dict[Any, list[int]] = {}
        for seq in sorted(self.rows):
            if (chain := self._chain(seq)) is not None:
                chains.setdefault(chain, []).append(seq)
        found = {}
        for seq in seqs:
            chain = chains.get(self._chain(seq), []) if seq in self.rows else []
            if seq in chain:
                i = chain.index(seq)
                found[seq] = (chain[max(i - 1, 0) : i], chain[i + 1 : i + 2])
        return found

    def relations(self, seqs: Sequence[int]) -> list[tuple[int, str, int, float]]:
        wanted = set(seqs)
        return [edge for edge in self.edges if edge[0] in wanted or edge[2] in wanted]

    def changes(self, since: int) -> tuple[int, list[int] | None]:
        changed = [seq for seq, row in self.rows.items() if row.change > since]
        return self._stamp, changed + [seq for seq, at in self._gone.items() if at > since]

    def cubes(self, seqs: Sequence[int], scope: Any) -> Mapping[int, MemCube]:
        return {
            seq: MemCube(
                id=str(seq),
                kind="text",
                content=row.text,
                metadata=dict(row.metadata),
                created_at=row.created_at,
                memory=self.name,
                importance=row.importance,
                parent_id=None if row.parent is None else str(row.parent),
            )
            for seq, row in self.load(seqs, scope).items()
        }

    def embed_query_tokens(self, text: str) -> Any:
        return None if self._embed_tokens is None else self._embed_tokens(text)

    def token_vectors(self, seqs: Sequence[int]) -> dict[int, Any]:
        found = {seq: self.rows[seq].tokens for seq in seqs if seq in self.rows}
        return {seq: tokens for seq, tokens in found.items() if tokens is not None}

    # Inside.

    def _chain(self, seq: int) -> Any:
        row = self.rows[seq]
        if row.parent is not None:
            return ("parent", row.parent)
        return None if row.thread is None else ("thread", row.thread)

    def _sees(self, seq: int, scope: Any) -> bool:
        return seq in self.rows and (scope is None or bool(scope(self.rows[seq])))

    def _vectors(self) -> tuple[Any, Any]:
        if self._matrix[0] != self._stamp:
            rows = [row for seq, row in sorted(self.rows.items()) if row.vector is not None]
            seqs = numpy.array([row.seq for row in rows], numpy.int64)
            matrix = numpy.array([row.vector for row in rows])
            self._matrix = (self._stamp, seqs, matrix)
        return self._matrix[1], self._matrix[2]


def _arrays(found: Sequence[tuple[int, float]]) -> tuple[Any, Any]:
    return (
        numpy.array([seq for seq, _ in found], numpy.int64),
        numpy.array([score for _, score in found], numpy.float64),
    )
