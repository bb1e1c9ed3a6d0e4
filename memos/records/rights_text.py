"""Full text for a principal: BM25 of what it may read, as if there were nothing else.

SQLite's own BM25 counts documents, words and lengths of the whole memory: from such a score one
could tell that a word stands in something one may not read. Here the same formula is computed
from the words' places in the index, of readable cubes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
from sqlalchemy import Connection

from memos.records.rights_seen import Readable, among, intersected

if TYPE_CHECKING:
    from memos.records.fulltext import FullText

Array = numpy.ndarray[Any, Any]
_K1, _B = 1.2, 0.75  # as FTS5 has them
_LEAST_IDF = 1e-6
_AT_ONCE = 512
_SPAN = 1 << 32  # of one column's places, for phrases
_NONE = (numpy.empty(0, numpy.int64), numpy.empty(0, numpy.float64))


class ReadableText:
    """One query of one principal. Not thread-safe.

    Args:
        tokens: word -> what it is in the index; several tokens follow one another.
    """

    def __init__(
        self,
        connection: Connection,
        fulltext: FullText,
        readable: Readable,
        tokens: Mapping[str, Sequence[str]],
    ) -> None:
        self._connection, self._fulltext, self._readable = connection, fulltext, readable
        self._tokens = tokens
        self._known: dict[str, tuple[Array, Array]] = {}
        self._look_up = instances(connection, fulltext.memory)

    def search(
        self, words: Sequence[str], limit: int, allowed: Array | None, every_word: bool, enough: int
    ) -> tuple[Array, Array]:
        """As FullText.search, for words that were read already.

        Args:
            allowed: int64 [n], ascending: of the readable ones only these count.
            enough:  hits by rare words; the newest with a common one add nothing then.
        """
        if not words or limit < 1 or not self._readable.documents:
            return _NONE
        chosen = list(words) if every_word else self._chosen(words)
        seqs, ranks = self._matches(chosen, every_word) if chosen else _NONE
        seqs, ranks = _kept(seqs, ranks, allowed)
        for word in [] if every_word else [word for word in words if word not in chosen]:
            if len(seqs) >= min(limit, enough):
                break
            scan = limit if len(seqs) and allowed is None else self._fulltext.scan_rows
            more, theirs = self._newest(word, scan, allowed)
            fresh = ~numpy.isin(more, seqs)
            seqs = numpy.concatenate([seqs, more[fresh]])
            ranks = numpy.concatenate([ranks, theirs[fresh]])
        order = numpy.lexsort((seqs, -ranks))[:limit]
        return seqs[order], ranks[order]

    def document_frequency(self, word: str) -> int:
        """In how many readable cubes a word occurs; up to a tenth of them late."""
        total, key = self._readable.documents, " ".join(self._tokens.get(word, [word]))
        known = self._readable.frequencies.get(key)
        if known is None or abs(total - known[1]) * 10 > total:
            if word in self._known:
                found = len(self._known[word][0])
            else:
                row = self._with_word(word, "group_concat(rowid)").fetchone()
                seqs = _numbers(row[0])
                found = int(numpy.count_nonzero(self._readable.lengths_of(seqs) >= 0))
            known = (found, total)
            self._readable.frequencies[key] = known
        return known[0]

    def _chosen(self, words: Sequence[str]) -> list[str]:
        """The words to look up: the rarest, as far as ``scan_rows`` goes."""
        if self._readable.documents * len(words) <= self._fulltext.scan_rows:
            return list(words)
        found, budget = [], self._fulltext.scan_rows
        for word in sorted(words, key=self.document_frequency):
            budget -= self.document_frequency(word)
            if budget < 0:
                break
            found.append(word)
        return found

    def _matches(self, words: Sequence[str], every_word: bool) -> tuple[Array, Array]:
        """Cubes with one of the words, or with all of them, and their BM25."""
        parts = [self._scores(word) for word in words]
        if every_word:
            seqs = parts[0][0]
            for more, _ in parts[1:]:
                seqs = intersected(seqs, more)
        else:
            seqs = numpy.unique(numpy.concatenate([part for part, _ in parts]))
        ranks = numpy.zeros(len(seqs))
        for more, theirs in parts:
            at = numpy.searchsorted(more, seqs)
            here = at < len(more)
            here[here] = more[at[here]] == seqs[here]
            ranks[here] += theirs[at[here]]
        return seqs, ranks

    def _scores(self, word: str) -> tuple[Array, Array]:
        """Cubes with a word, ascending, and what the word adds to their BM25."""
        seqs, counts = self._postings(word)
        return seqs, self._bm25(seqs, counts, len(seqs))

    def _bm25(self, seqs: Array, counts: Array, frequency: int) -> Array:
        """What a word adds to the BM25 of cubes that have it so often.

        Args:
            frequency: in how many readable cubes it occurs.
        """
        if not len(seqs):
            return numpy.empty(0, numpy.float64)
        total = self._readable.documents
        idf = max(float(numpy.log((total - frequency + 0.5) / (frequency + 0.5))), _LEAST_IDF)
        shares = self._readable.lengths_of(seqs) / (self._readable.words / total)
        found: Array = idf * counts * (_K1 + 1) / (counts + _K1 * (1 - _B + _B * shares))
        return found

    def _newest(self, word: str, scan: int, allowed: Array | None) -> tuple[Array, Array]:
        """The newest cubes with a word that is too common to rank by, and their BM25 as if each
        had it once.

        Cost: reads from the newest on until there are enough.
        """
        wanted = self._readable.seqs if allowed is None else allowed
        rows = self._with_word(word, "rowid", " ORDER BY rowid DESC")
        seqs = numpy.empty(0, numpy.int64)
        while len(seqs) < scan and (some := rows.fetchmany(_AT_ONCE)):
            here = numpy.fromiter((row[0] for row in some), numpy.int64, len(some))
            seqs = numpy.concatenate([seqs, here[among(here, wanted)]])
        seqs = numpy.sort(seqs[:scan])
        return seqs, self._bm25(seqs, numpy.ones(len(seqs)), self.document_frequency(word))

    def _with_word(self, word: str, columns: str, order: str = "") -> Any:
        """A cursor over all cubes with a word."""
        name = f"text_{self._fulltext.memory:d}"
        cursor = self._connection.connection.cursor()
        sql = f"SELECT {columns} FROM {name} WHERE {name} MATCH ?{order}"
        return cursor.execute(sql, (f'"{word}"',))

    def _postings(self, word: str) -> tuple[Array, Array]:
        """Readable cubes with a word, ascending, and how often each has it."""
        if word not in self._known:
            tokens = self._tokens.get(word, [word])
            if len(tokens) == 1:
                row = self._look_up(f"{_DOCS} WHERE term = ?", tokens).fetchone()
                seqs, counts = _runs(_numbers(row[0]))
            else:
                seqs, counts = self._phrase(tokens)
            seqs, counts = _kept(seqs, counts.astype(numpy.float64), self._readable.seqs)
            indexed = self._readable.lengths_of(seqs) >= 0
            self._known[word] = seqs[indexed], counts[indexed]
        return self._known[word]

    def _phrase(self, tokens: Sequence[str]) -> tuple[Array, Array]:
        """Cubes where these tokens follow one another, and how often they do."""
        places: set[tuple[int, int]] | None = None
        for i, token in enumerate(tokens):
            rows = self._look_up(f"{_PLACES} WHERE term = ?", (token,))
            here = {(doc, (col == "context") * _SPAN + offset - i) for doc, col, offset in rows}
            places = here if places is None else places & here
        docs = numpy.array(sorted(doc for doc, _ in places or ()), numpy.int64)
        return numpy.unique(docs, return_counts=True)


def instances(connection: Connection, memory: int) -> Any:
    """Executes SQL over ``instances``: where each word of a memory's full text stands."""
    look_up = connection.connection.cursor().execute
    name = f"instances_{memory:d}"
    look_up(
        f"CREATE VIRTUAL TABLE IF NOT EXISTS temp.{name} "
        f"USING fts5vocab('main', 'text_{memory:d}', 'instance')"
    )
    return lambda sql, values: look_up(sql.format(table=name), tuple(values))


# In one text: a row for each of thousands of numbers costs several times as much.
_DOCS = "SELECT group_concat(doc) FROM temp.{table}"
_PLACES = "SELECT doc, col, offset FROM temp.{table}"


def _numbers(text: str | None) -> Array:
    """The numbers in a text, with commas between them, ascending."""
    found = numpy.fromstring(text or "", numpy.int64, sep=",")
    return found if (found[1:] >= found[:-1]).all() else numpy.sort(found)


def _runs(numbers: Array) -> tuple[Array, Array]:
    """The different ones of ascending numbers, and how often each stands there."""
    if not len(numbers):
        return numbers, numbers
    starts = numpy.flatnonzero(numpy.append(True, numbers[1:] != numbers[:-1]))
    return numbers[starts], numpy.diff(numpy.append(starts, len(numbers)))


def _kept(seqs: Array, values: Array, allowed: Array | None) -> tuple[Array, Array]:
    if allowed is None or not len(seqs):
        return seqs, values
    if not len(allowed):
        return seqs[:0], values[:0]
    at = numpy.minimum(numpy.searchsorted(allowed, seqs), len(allowed) - 1)
    kept = allowed[at] == seqs
    return seqs[kept], values[kept]
