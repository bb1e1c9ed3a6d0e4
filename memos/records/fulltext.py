"""Full text of one memory: SQLite's FTS5 with BM25, over the text and its metadata in words."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy
from sqlalchemy import (
    Connection,
    bindparam,
    column,
    func,
    select,
    table,
    text,
)

from memos.records.life_schema import cold
from memos.records.schema import cubes, store

if TYPE_CHECKING:
    from memos.records.rights_seen import Readable

Array = numpy.ndarray[Any, Any]
TOKENIZER = "porter unicode61 remove_diacritics 2"
CONTEXT_WEIGHT = 1.0  # of a word in the metadata; one in the text counts 1
_WORD = re.compile(r"[\w\u0300-\u036f]+")  # a letter's accents may follow it
_ENOUGH = 50  # hits by rare words; the newest with a common one add nothing then
_LISTED = 3000  # allowed rows that SQLite is told of; more are kept or dropped here
_KEPT = 4096  # document frequencies that are remembered


class FullText:
    """Thread-safe: it holds document frequencies only.

    Args:
        memory:   number of the memory; its tables are text_N and words_N.
        scan_rows: a query reads at most about so many rows: its rarest words first, and the
            others only as far as they fit. Where that
            gives fewer hits than asked for, the newest cubes with one of the others follow.
    """

    def __init__(self, memory: int, scan_rows: int = 4_000) -> None:
        self.memory, self.scan_rows = memory, scan_rows
        self._name, self._words = f"text_{memory:d}", f"words_{memory:d}"
        self._table = table(self._name, column("rowid"), column("text"), column("context"))
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, int]] = {}  # stem: documents, rows at that time
        self._rows = self._last = 0

    def create(self, connection: Connection) -> None:
        """Make the tables where they are not there."""
        connection.execute(
            text(
                f"CREATE VIRTUAL TABLE IF NOT EXISTS {self._name} USING fts5(text, context, "
                f"content='cubes', content_rowid='seq', tokenize='{TOKENIZER}')"
            )
        )
        connection.execute(
            text(
                f"CREATE VIRTUAL TABLE IF NOT EXISTS {self._words} "
                f"USING fts5vocab('{self._name}', 'row')"
            )
        )

    def insert(self, connection: Connection, rows: Sequence[tuple[int, str, str]]) -> None:
        """Add (seq, text, context)."""
        if rows:
            connection.exec_driver_sql(
                f"INSERT INTO {self._name}(rowid, text, context) VALUES (?, ?, ?)", list(rows)
            )

    def delete(self, connection: Connection, rows: Sequence[tuple[int, str, str]]) -> None:
        """Remove (seq, text, context) as they were added."""
        if rows:
            connection.exec_driver_sql(
                f"INSERT INTO {self._name}({self._name}, rowid, text, context) "
                "VALUES ('delete', ?, ?, ?)",
                list(rows),
            )

    def refill(self, connection: Connection, states: Sequence[str]) -> None:
        """Index the cubes in these states, and nothing else.

        Cost: the words of these cubes, whatever was in the index before.
        """
        connection.exec_driver_sql(f"INSERT INTO {self._name}({self._name}) VALUES ('delete-all')")
        marks = ", ".join("?" * len(states))
        connection.exec_driver_sql(
            f"INSERT INTO {self._name}(rowid, text, context) SELECT seq, text, context FROM cubes "
            f"WHERE memory = ? AND state IN ({marks}) ORDER BY seq",
            (self.memory, *states),
        )
        self.forget()

    def forget(self) -> None:
        """Count rows and words again with the next query."""
        with self._lock:
            self._counts.clear()
            self._last = 0

    def search(
        self,
        connection: Connection,
        query: str,
        limit: int,
        allowed: Array | None = None,
        *,
        every_word: bool = False,
        readable: Readable | None = None,
    ) -> tuple[Array, Array]:
        """Cubes with words of the query, best first.

        Args:
            query:      any text: its words are looked up, nothing in it is syntax.
            allowed:    [n] int64, ascending: only these cubes count; None: all.
            every_word: only cubes that have all of them.
            readable:   what a principal may read: it is as if there were nothing else.

        Returns:
            seq [n] int64, BM25 [n] float64, higher is better.
        """
        words = words_of(query)
        none = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.float64)
        if not words or limit < 1 or (allowed is not None and not len(allowed)):
            return none
        if readable is not None:
            from memos.records.rights_text import ReadableText

            view = ReadableText(connection, self, readable, tokens_of(tuple(words)))
            return view.search(words, limit, allowed, every_word, _ENOUGH)
        chosen = self.chosen(connection, words, every_word)
        seqs, ranks = none
        if chosen:
            seqs, ranks = self._matches(connection, chosen, limit, allowed, every_word)
        for word in [] if every_word else [word for word in words if word not in chosen]:
            if len(seqs) >= min(limit, _ENOUGH):
                break
            # Where there is nothing better, the best of many; else just the newest.
            scan = limit if len(seqs) and allowed is None else self.scan_rows
            more, theirs = self._newest(connection, word, scan, allowed)
            fresh = ~numpy.isin(more, seqs)
            seqs = numpy.concatenate([seqs, more[fresh]])
            ranks = numpy.concatenate([ranks, theirs[fresh]])
        order = numpy.lexsort((seqs, -ranks))[:limit]
        return seqs[order], ranks[order]

    def _matches(
        self,
        connection: Connection,
        words: Sequence[str],
        limit: int,
        allowed: Array | None,
        every_word: bool,
    ) -> tuple[Array, Array]:
        """The best matches; with ``allowed`` all of them are read, and kept where allowed."""
        match = (" AND " if every_word else " OR ").join(f'"{word}"' for word in words)
        order = "" if allowed is not None else " ORDER BY rank LIMIT ?"
        return self._rows_of(connection, match, order, limit, allowed)

    def _newest(
        self, connection: Connection, word: str, limit: int, allowed: Array | None
    ) -> tuple[Array, Array]:
        """The newest cubes with a word that is too common to rank by."""
        return self._rows_of(
            connection, f'"{word}"', " ORDER BY rowid DESC LIMIT ?", limit, allowed
        )

    def _rows_of(
        self, connection: Connection, match: str, order: str, limit: int, allowed: Array | None
    ) -> tuple[Array, Array]:
        sql = (
            f"SELECT rowid, bm25({self._name}, 1.0, {CONTEXT_WEIGHT}) AS rank FROM {self._name} "
            f"WHERE {self._name} MATCH ?"
        )
        values: list[Any] = [match]
        if allowed is not None and len(allowed) <= _LISTED:
            # The plus keeps SQLite from one search per number; BM25, which costs more than the
            # match itself, is then computed for what is allowed only.
            sql += " AND +rowid IN (SELECT value FROM json_each(?))"
            values.append(str(allowed.tolist()))
        rows = connection.exec_driver_sql(
            sql + order, tuple(values + [limit] * bool(order))
        ).fetchall()
        seqs = numpy.fromiter((row[0] for row in rows), numpy.int64, len(rows))
        ranks = numpy.fromiter((-row[1] for row in rows), numpy.float64, len(rows))
        if allowed is not None:
            at = numpy.searchsorted(allowed, seqs)
            kept = allowed[numpy.minimum(at, len(allowed) - 1)] == seqs
            seqs, ranks = seqs[kept], ranks[kept]
        return seqs, ranks

    def chosen(
        self,
        connection: Connection,
        words: Sequence[str],
        all_of_them: bool = False,
    ) -> list[str]:
        """The words to look up: the rarest, as far as ``scan_rows`` goes."""
        if all_of_them:
            return list(words)
        total = self.rows(connection)
        if total * len(words) <= self.scan_rows:
            return list(words)
        stems = stems_of(tuple(words))
        counts = self.document_frequencies(connection, stems.values(), total)
        found: list[str] = []
        budget = self.scan_rows
        for word in sorted(words, key=lambda word: counts.get(stems.get(word, word), 0)):
            budget -= counts.get(stems.get(word, word), 0)
            if budget < 0:
                break
            found.append(word)
        return found

    def rows(self, connection: Connection) -> int:
        """About how many rows there are: counted again when the store grew by a twentieth."""
        last = int(connection.execute(_LAST).scalar_one())
        if not self._last <= last <= self._last + self._last // 20:
            self._rows = int(connection.execute(_COUNT, {"memory": self.memory}).scalar_one())
            self._last = last
        return self._rows

    def document_frequencies(
        self, connection: Connection, stems: Iterable[str], total: int
    ) -> Mapping[str, int]:
        """In how many rows each stem occurs; up to a tenth of the rows late."""
        wanted = set(stems)
        with self._lock:
            known = {
                stem: count
                for stem in wanted
                if (count_at := self._counts.get(stem)) is not None
                and abs(total - count_at[1]) * 10 <= total
                for count in count_at[:1]
            }
        missing = sorted(wanted - known.keys())
        if missing:
            vocabulary = table(self._words, column("term"), column("doc"))
            rows = connection.execute(
                select(vocabulary.c.term, vocabulary.c.doc).where(vocabulary.c.term.in_(missing))
            ).all()
            fresh = {**dict.fromkeys(missing, 0), **{row[0]: int(row[1]) for row in rows}}
            known |= fresh
            with self._lock:
                if len(self._counts) > _KEPT:
                    self._counts.clear()
                self._counts.update({stem: (count, total) for stem, count in fresh.items()})
        return known


_LAST = select(store.c.seq).where(store.c.id == 1)
_COUNT = select(
    select(func.count())
    .select_from(cubes)
    .where(cubes.c.memory == bindparam("memory"))
    .scalar_subquery()
    - select(func.count())
    .select_from(cold)
    .where(cold.c.memory == bindparam("memory"))
    .scalar_subquery()
)


def words_of(query: str) -> list[str]:
    """The different words of a text, in lower case."""
    # One by one, as the tokenizer does: a last sigma and a dotted capital I depend on others.
    lower = "".join(low if len(low := letter.lower()) == 1 else letter for letter in query)
    return list(dict.fromkeys(word.replace("_", " ") for word in _WORD.findall(lower)))


def stems_of(words: tuple[str, ...]) -> Mapping[str, str]:
    """Word -> stem, as SQLite's tokenizer makes it; a word of several tokens: its last one."""
    return {word: tokens[-1] for word, tokens in tokens_of(words).items()}


@lru_cache(maxsize=2048)
def tokens_of(words: tuple[str, ...]) -> Mapping[str, Sequence[str]]:
    """Word -> the tokens that SQLite's tokenizer makes of it, in order."""
    found: dict[str, list[str]] = {}
    with _stemmer_lock:
        connection = _stemmer()
        connection.executemany(
            "INSERT INTO words(rowid, word) VALUES (?, ?)", list(enumerate(words))
        )
        for doc, term in connection.execute("SELECT doc, term FROM stems ORDER BY doc, offset"):
            found.setdefault(words[doc], []).append(term)
        connection.execute("DELETE FROM words")
    return found


_stemmer_lock = threading.Lock()


@lru_cache(maxsize=1)
def _stemmer() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    connection.execute(f"CREATE VIRTUAL TABLE words USING fts5(word, tokenize='{TOKENIZER}')")
    connection.execute("CREATE VIRTUAL TABLE stems USING fts5vocab('words', 'instance')")
    return connection
