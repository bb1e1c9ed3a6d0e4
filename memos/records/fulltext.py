"""Full text of one memory: SQLite's FTS5 with BM25, over the text and its metadata in words."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy
from sqlalchemy import ColumnElement, Connection, column, func, literal_column, select, table, text
from sqlalchemy import Float as SqlFloat

from memos.records.schema import cubes

TOKENIZER = "porter unicode61 remove_diacritics 2"
CONTEXT_WEIGHT = 1.0  # of a word in the metadata; one in the text counts 1
_WORD = re.compile(r"\w+")
_KEPT = 4096  # document frequencies that are remembered


class FullText:
    """Thread-safe: it holds document frequencies only.

    Args:
        memory:   number of the memory; its tables are text_N and words_N.
        scan_rows: a query reads at most about so many rows: its rarest words first, and the
            others only as far as they fit. Words left out do not count towards the score; they
            are looked up too where there are fewer hits than asked for.
    """

    def __init__(self, memory: int, scan_rows: int = 20_000) -> None:
        self.memory, self.scan_rows = memory, scan_rows
        self._name, self._words = f"text_{memory:d}", f"words_{memory:d}"
        self._table = table(self._name, column("rowid"), column("text"), column("context"))
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, int]] = {}  # stem: documents, rows at that time

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

    def search(
        self,
        connection: Connection,
        query: str,
        limit: int,
        where: ColumnElement[bool] | None = None,
        *,
        every_word: bool = False,
        total: int | None = None,
    ) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
        """Cubes with words of the query, best first.

        Args:
            query:      any text: its words are looked up, nothing in it is syntax.
            where:      over the columns of ``cubes``; rows that fail it do not count as hits.
            every_word: only cubes that have all of them.
            total:      rows in the memory, where the caller knows it.

        Returns:
            seq [n] int64, BM25 [n] float64, higher is better.
        """
        words = words_of(query)
        chosen = self.chosen(connection, words, total, all_of_them=every_word)
        rows = self._matches(connection, chosen, limit, where, every_word)
        if len(rows) < limit and len(chosen) < len(words):
            rows = self._matches(connection, words, limit, where, every_word)
        seqs = numpy.fromiter((row[0] for row in rows), numpy.int64, len(rows))
        ranks = numpy.fromiter((-row[1] for row in rows), numpy.float64, len(rows))
        return seqs, ranks

    def _matches(
        self,
        connection: Connection,
        words: Sequence[str],
        limit: int,
        where: ColumnElement[bool] | None,
        every_word: bool,
    ) -> Sequence[Any]:
        if not words or limit < 1:
            return []
        match = (" AND " if every_word else " OR ").join(f'"{word}"' for word in words)
        rank = literal_column(f"bm25({self._name}, 1.0, {CONTEXT_WEIGHT})", SqlFloat)
        statement = select(self._table.c.rowid, rank.label("rank")).where(
            text(f"{self._name} MATCH :match").bindparams(match=match)
        )
        if where is not None:
            same = select(cubes.c.seq).where(cubes.c.seq == self._table.c.rowid, where)
            statement = statement.where(same.exists())
        return connection.execute(statement.order_by(text("rank")).limit(limit)).all()

    def chosen(
        self,
        connection: Connection,
        words: Sequence[str],
        total: int | None,
        all_of_them: bool = False,
    ) -> list[str]:
        """The words to look up: the rarest, as far as ``scan_rows`` goes; at least one."""
        if all_of_them or len(words) < 2:
            return list(words)
        if total is None:
            total = self.rows(connection)
        if total * len(words) <= self.scan_rows:
            return list(words)
        stems = stems_of(tuple(words))
        counts = self.document_frequencies(connection, stems.values(), total)
        found: list[str] = []
        budget = self.scan_rows
        for word in sorted(words, key=lambda word: counts.get(stems.get(word, word), 0)):
            count = counts.get(stems.get(word, word), 0)
            if count > budget and found:
                break
            if count:
                found.append(word)
                budget -= count
        return found

    def rows(self, connection: Connection) -> int:
        """About how many rows there are."""
        last = select(func.count()).select_from(cubes).where(cubes.c.memory == self.memory)
        return int(connection.execute(last).scalar_one())

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


def words_of(query: str) -> list[str]:
    """The different words of a text, in lower case."""
    return list(dict.fromkeys(word.replace("_", " ") for word in _WORD.findall(query.lower())))


@lru_cache(maxsize=2048)
def stems_of(words: tuple[str, ...]) -> Mapping[str, str]:
    """Word -> stem, as SQLite's tokenizer makes it; a word of several tokens: its last one."""
    found: dict[str, str] = {}
    with _stemmer_lock:
        connection = _stemmer()
        connection.executemany(
            "INSERT INTO words(rowid, word) VALUES (?, ?)", list(enumerate(words))
        )
        for doc, term in connection.execute("SELECT doc, term FROM stems ORDER BY doc, offset"):
            found[words[doc]] = term
        connection.execute("DELETE FROM words")
    return found


_stemmer_lock = threading.Lock()


@lru_cache(maxsize=1)
def _stemmer() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    connection.execute(f"CREATE VIRTUAL TABLE words USING fts5(word, tokenize='{TOKENIZER}')")
    connection.execute("CREATE VIRTUAL TABLE stems USING fts5vocab('words', 'instance')")
    return connection
