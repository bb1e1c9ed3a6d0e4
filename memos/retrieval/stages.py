"""The stages that find candidates: by their words, by their meaning, and both as one relevance.

A stage is any function ``(query, candidates) -> candidates``. Those here are small classes, so
that their settings can be read and changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from memos.retrieval.candidates import Candidates
from memos.retrieval.query import Query, words_of
from memos.retrieval.source import Array

_STEM = 5  # letters that tell words apart, endings left out
SMALL = 1000  # units; all of a smaller store are candidates


@dataclass
class TextSearch:
    """Units with the words of the query, by BM25.

    Args:
        limit:  candidates from this path.
        scored: units whose BM25 is kept, for those that come in by another path.
    """

    limit: int = 100
    scored: int = 1000
    name: str = "text"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        seqs, ranks = candidates.source.search_text(query.terms, self.scored, candidates.scope)
        if len(seqs) and candidates.shared.sources > 1:
            share = _coverage(candidates, query, int(seqs[0]))
            candidates.shared.coverage[candidates.source.name] = share
        candidates.add(seqs[: self.limit])
        order = numpy.argsort(seqs)
        candidates.text_scores = (seqs[order], ranks[order])
        return candidates


@dataclass
class VectorSearch:
    """Units near to the query in meaning; of a small store all units.

    Args:
        limit: candidates from this path.
    """

    limit: int = 100
    name: str = "vector"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        source, scope = candidates.source, candidates.scope
        candidates.vector = source.embed_query(query.spoken or query.text)
        if candidates.vector is None:
            return candidates
        total = candidates.total = source.count()
        candidates.shared.dense.append(candidates)
        limit = total if total <= SMALL else self.limit
        seqs, near = source.search_vector(candidates.vector, limit, scope)
        candidates.add(seqs)
        candidates.signals["similarity"] = numpy.full(len(candidates), numpy.nan)
        candidates.signals["similarity"][candidates.places(seqs)] = near
        candidates.is_complete = total <= SMALL and len(seqs) >= total
        if candidates.is_complete and len(near) > 1:
            candidates.background = (float(near.mean()), float(near.std()))
        return candidates


@dataclass
class Fuse:
    """One relevance of both: ``text * bm25 / best bm25 + dense * z(similarity)``.

    z is the distance from the mean similarity of the store, in standard deviations: scores are
    fused, not ranks, so that a clear winner of one path stays one. Of several memories each has
    its own best BM25, which counts as far as that text has the words of the query; z is against
    the largest memory with the same embedder.
    """

    text: float = 4.0
    dense: float = 1.0
    name: str = "fuse"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        candidates.put("text", text_of(candidates, candidates.seqs), self.text)
        if candidates.vector is not None:
            near = candidates.signals["similarity"]
            missing = numpy.isnan(near)
            if missing.any():
                near[missing] = candidates.source.similarities(
                    candidates.vector, candidates.seqs[missing]
                )
            candidates.put("dense", dense_of(candidates, near), self.dense)
        return candidates


def text_of(candidates: Candidates, seqs: Array) -> Array:
    """BM25 of these units as a share of the best one; 0 where no word is found."""
    if candidates.text_scores is None or not len(candidates.text_scores[0]):
        return numpy.zeros(len(seqs))
    known, ranks = candidates.text_scores
    at = numpy.minimum(numpy.searchsorted(known, seqs), len(known) - 1)
    coverage = candidates.shared.coverage
    best = max(coverage.values(), default=0.0)  # 0: no text has a word of the query as it stands
    share = coverage.get(candidates.source.name, 1.0) / best if best else 1.0
    return numpy.where(known[at] == seqs, ranks[at] * share / max(ranks.max(), 1e-12), 0.0)


def dense_of(candidates: Candidates, near: Array) -> Array:
    """Similarities as standard deviations above the store's mean; nan becomes 0."""
    if not len(near):
        return numpy.zeros(0)
    alike = [c for c in candidates.shared.dense if numpy.array_equal(c.vector, candidates.vector)]
    largest = max(alike, key=lambda c: c.total, default=candidates)
    if largest.background is None:
        largest.background = largest.source.background(candidates.vector)
    mean, deviation = largest.background
    if not deviation > 1e-9:
        return numpy.zeros(len(near))
    return numpy.asarray(numpy.nan_to_num((near - mean) / deviation))


def _coverage(candidates: Candidates, query: Query, seq: int) -> float:
    unit = candidates.source.load([seq], candidates.scope).get(seq)
    terms = query.terms.split()
    if unit is None or not terms:
        return 0.0
    words = words_of(f"{unit.text} {unit.context}")
    stems = {word[:_STEM] for word in words}
    return sum(term[:_STEM] in stems for term in terms) / len(terms)
