"""Full text over cubes that are in no index: their rows are read, and scored as the index scores.

Nothing is kept for them. A query reads all of them once; the words of those with a likely match
are cut as the tokenizer cuts them.
"""

from __future__ import annotations

import math
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from sqlalchemy import Connection

from memos.records.fulltext import CONTEXT_WEIGHT, TOKENIZER, Array, FullText, stems_of, words_of
from memos.records.states import COLD

_CUT = 2000  # rows whose words are cut
_K1, _B, _LEAST = 1.2, 0.75, 1e-6  # as FTS5 has them


def search_cold(
    connection: Connection,
    fulltext: FullText,
    query: str,
    limit: int,
    allowed: Array | None = None,
    *,
    is_alone: bool = False,
) -> tuple[Array, Array]:
    """As ``FullText.search``, among the cubes of the memory that are in no index.

    Args:
        is_alone: whoever asks may not see everything: no count but of what is allowed goes into
            the scores.

    Returns:
        seq [n] int64, BM25 [n] float64, best first: how rare a word is counts over both kinds.

    Cost: reads the texts of all of them, about 3 us each, and cuts those that may match.
    """
    words = words_of(query)
    none = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.float64)
    if not words or limit < 1:
        return none
    stems = set(stems_of(tuple(words)).values())
    beginnings = {_beginning(stem) for stem in stems}
    likely = re.compile("|".join(rf"\b{re.escape(word)}" for word in sorted(beginnings)[::-1]))
    may = None if allowed is None else set(allowed.tolist())
    total = length = 0
    rows: list[tuple[int, str, str]] = []
    heads: list[frozenset[str]] = []
    states = ", ".join(f"'{state}'" for state in COLD)
    found = connection.exec_driver_sql(
        "SELECT cubes.seq, cubes.text, cubes.context FROM cold JOIN cubes ON cubes.seq = cold.seq "
        f"WHERE cold.memory = ? AND cubes.state IN ({states})",
        (fulltext.memory,),
    )
    for seq, text, context in found:
        if is_alone and may is not None and seq not in may:
            continue
        total += 1
        length += text.count(" ") + context.count(" ") + bool(text) + bool(context)
        if may is None or seq in may:
            has = frozenset(likely.findall(_folded(f"{text} {context}")))
            if has:
                rows.append((seq, text, context))
                heads.append(has)
    if not rows:
        return none
    seen = Counter(head for has in heads for head in has)
    whole = len(rows) <= max(_CUT, limit)
    if not whole:  # the best as far as whole words are not looked at
        worth = {head: math.log((total + 1) / n) for head, n in seen.items()}
        values = numpy.array([sum(worth[head] for head in has) for has in heads])
        best_rows = numpy.argsort(-values, kind="stable")[: max(_CUT, limit)]
        rows = [rows[i] for i in sorted(best_rows.tolist())]
    counts, lengths = _cut(rows, stems)
    have = Counter(stem for counted in counts.values() for stem in counted)
    hot: Mapping[str, int] = {}
    everything = total
    if not is_alone:
        hot = fulltext.document_frequencies(connection, stems, fulltext.rows(connection))
        everything += fulltext.rows(connection)
    names = {stem: stem if whole else _beginning(stem) for stem in stems}
    rarity = {
        stem: max(_LEAST, math.log((everything - n + 0.5) / (n + 0.5)))
        for stem in stems
        # Both counts may be a little late.
        for n in [min(everything, hot.get(stem, 0) + (have if whole else seen)[names[stem]])]
    }
    average = max(1.0, length / total)
    scores = {
        seq: sum(
            rarity[stem] * f * (_K1 + 1) / (f + _K1 * (1 - _B + _B * lengths[seq] / average))
            for stem, f in counted.items()
        )
        for seq, counted in counts.items()
    }
    best = sorted(scores, key=lambda seq: (-scores[seq], seq))[:limit]
    return (
        numpy.array(best, numpy.int64),
        numpy.array([scores[seq] for seq in best], numpy.float64),
    )


def _beginning(stem: str) -> str:
    """What every word of this stem begins with: the stemmer changes no more than the last letter
    of what it leaves."""
    return stem[:-1] if len(stem) > 2 and stem.isascii() else stem[:2]


def _folded(text: str) -> str:
    low = text.lower()
    if low.isascii():
        return low
    parts = unicodedata.normalize("NFKD", low)
    return "".join(letter for letter in parts if not unicodedata.combining(letter))


def _cut(
    rows: Sequence[tuple[int, str, str]], stems: set[str]
) -> tuple[dict[int, dict[str, float]], Counter[int]]:
    """How often each stem stands in each row, and the tokens of each row."""
    counts: dict[int, dict[str, float]] = {}
    lengths: Counter[int] = Counter()
    with sqlite3.connect(":memory:", isolation_level=None) as own:
        own.execute(f"CREATE VIRTUAL TABLE texts USING fts5(text, context, tokenize='{TOKENIZER}')")
        own.execute("CREATE VIRTUAL TABLE words USING fts5vocab('texts', 'instance')")
        own.execute("BEGIN")
        own.executemany("INSERT INTO texts(rowid, text, context) VALUES (?, ?, ?)", rows)
        every: Any = own.execute("SELECT doc, col, term FROM words")
        for doc, column, term in every:
            lengths[doc] += 1
            if term in stems:
                weight = 1.0 if column == "text" else CONTEXT_WEIGHT
                counted = counts.setdefault(doc, {})
                counted[term] = counted.get(term, 0.0) + weight
        own.execute("ROLLBACK")
    own.close()
    return counts, lengths
