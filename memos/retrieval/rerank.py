"""Reranking: who, when and what the query asks for, importance and recency; and optionally models
that read query and text together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from memos.errors import ArgumentError
from memos.retrieval.candidates import Candidates
from memos.retrieval.query import Query
from memos.retrieval.source import Array
from memos.retrieval.times import closeness

_DAY_S = 86400.0


@dataclass
class Rerank:
    """Adds what the query says about itself; a signal that does not apply is 0.

    Signals:
        subject:    said by a speaker whom the query names.
        named:      other metadata that the query names.
        time:       1 at a time that the query names, less the further away.
        when:       the query asks when, and the text says when.
        number:     the query asks how many, and the text says how many.
        question:   the text asks instead of telling.
        over:       what it says did not hold any more (metadata valid_to) when the query is asked.
        importance: of the unit, from -1 to 1; 0 where nothing was said.
        recency:    1 now, a half each ``half_life_s``; ``recent`` is added to its weight where
                    the query wants the latest.
    """

    subject: float = 4.0
    named: float = 1.0
    time: float = 5.0
    when: float = 3.5
    number: float = 1.7
    question: float = -1.0
    over: float = -4.0
    importance: float = 1.0
    recency: float = 0.25
    recent: float = 1.5
    half_life_s: float = 30 * _DAY_S
    name: str = "rerank"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        names = ("at", "importance", "ends", "is_question", "has_time", "has_number")
        columns = candidates.columns(*names)
        if query.subjects:
            candidates.put("subject", candidates.having(query.subjects) * 1.0, self.subject)
        if query.named:
            candidates.put("named", candidates.having(query.named) * 1.0, self.named)
        if query.times:
            candidates.put("time", closeness(query.times, columns["at"]), self.time)
        if query.asks_when:
            candidates.put("when", columns["has_time"] * 1.0, self.when)
        if query.asks_number:
            candidates.put("number", columns["has_number"] * 1.0, self.number)
        candidates.put("question", columns["is_question"] * 1.0, self.question)
        over = columns["ends"] <= query.now
        if over.any():
            candidates.put("over", over * 1.0, self.over)
        candidates.put("importance", 2 * columns["importance"] - 1, self.importance)
        age = numpy.maximum(query.now - columns["at"], 0)
        weight = self.recency + (self.recent if query.asks_recent else 0.0)
        candidates.put("recency", numpy.exp2(-age / self.half_life_s), weight)
        return candidates


@dataclass
class LateInteraction:
    """The best ``top``, by the token vectors of query and text (MaxSim) in place of one vector.

    ``mean over query tokens of max over text tokens of cosine``, as z-score over the ``top``. A
    source without token vectors is left as it is.

    Source: Khattab and Zaharia, ColBERT, 2020, section 3.3, without training.
    """

    top: int = 30
    weight: float = 1.5
    name: str = "late_interaction"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        source: Any = candidates.source
        if not hasattr(source, "token_vectors") or not len(candidates):
            return candidates
        tokens = source.embed_query_tokens(query.spoken or query.text)
        if tokens is None or not len(tokens):
            return candidates
        best = candidates.order(self.top)
        seqs = candidates.seqs[best].tolist()
        texts = source.token_vectors(seqs)
        known = numpy.array([seq in texts and len(texts[seq]) > 0 for seq in seqs])
        if not known.any():
            return candidates
        near = max_similarity(tokens, [texts[s] for s, k in zip(seqs, known, strict=True) if k])
        values = numpy.zeros(len(best))
        deviation = near.std()
        if deviation > 1e-9:
            values[known] = (near - near.mean()) / deviation
        dense = candidates.signals.get("dense")
        if dense is not None:  # one reading of the meaning, not two
            kept = dense.copy()
            kept[best[known]] = 0.0
            candidates.put("dense", kept, candidates.weights["dense"])
        _put_on_top(candidates, "late_interaction", best, values, self.weight)
        return candidates


@dataclass
class CrossEncoder:
    """The best ``top``, by a model that reads query and text together.

    Args:
        score:  called with the query and a list of texts; returns a number each.
        weight: of the z-score of these numbers.
    """

    score: Callable[[str, list[str]], Sequence[float]]
    top: int = 30
    weight: float = 3.0
    name: str = "cross_encoder"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        best = candidates.order(self.top)
        loaded = candidates.source.load(candidates.seqs[best].tolist(), candidates.scope)
        best = best[[int(seq) in loaded for seq in candidates.seqs[best]]]
        if not len(best):
            return candidates
        texts = [loaded[int(seq)].text for seq in candidates.seqs[best]]
        values = numpy.asarray(self.score(query.text, texts), numpy.float64)
        if values.shape != (len(texts),):
            raise ArgumentError(
                f"score: {len(texts)} numbers wanted, one for each text, got shape {values.shape}"
            )
        deviation = values.std()
        values = (values - values.mean()) / deviation if deviation > 1e-9 else values * 0
        _put_on_top(candidates, self.name, best, values, self.weight)
        return candidates


def max_similarity(query: Array, texts: Sequence[Array]) -> Array:
    """[n] mean over query tokens of the greatest cosine to a token of each text.

    Args:
        query: float [q, d].
        texts: each [t, d] of any scale, or uint8 [t, d / 8]: the signs, as numpy.packbits packs
            them. One bit a dimension ranks as well as floats do, since the query keeps its own.

    Cost: q * d * (tokens of all texts) multiplications.
    """
    tokens = numpy.concatenate(texts)
    query = numpy.asarray(query, numpy.float32)
    query = query / numpy.maximum(numpy.linalg.norm(query, axis=1, keepdims=True), 1e-9)
    width = query.shape[1]
    if tokens.dtype == numpy.uint8:
        bits = numpy.unpackbits(tokens, axis=1, count=width).astype(numpy.float32)
        # Signs are 2 * bits - 1, and a token of signs has the length sqrt(d).
        near = (2 * (query @ bits.T) - query.sum(axis=1, keepdims=True)) / numpy.sqrt(width)
    else:
        tokens = tokens.astype(numpy.float32)
        tokens /= numpy.maximum(numpy.linalg.norm(tokens, axis=1, keepdims=True), 1e-9)
        near = query @ tokens.T
    starts = numpy.cumsum([0, *(len(text) for text in texts[:-1])])
    return numpy.asarray(numpy.maximum.reduceat(near, starts, axis=1).mean(axis=0), numpy.float64)


def _put_on_top(
    candidates: Candidates, name: str, best: Array, values: Array, weight: float
) -> None:
    """A signal that only the best have: the others stay below them."""
    signal = numpy.zeros(len(candidates))
    signal[best] = values
    candidates.put(name, signal, weight)
    others = numpy.ones(len(candidates), numpy.bool_)
    others[best] = False
    if others.any():
        excess = candidates.score[others].max() - candidates.score[best].min()
        if excess >= 0:
            fallen = numpy.where(others, -1.0, 0.0)
            candidates.put(f"below_{name}", fallen, float(excess) + 1e-6)
