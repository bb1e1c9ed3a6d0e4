"""Personalised PageRank over the candidates: an optional stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from memos.retrieval.candidates import Candidates
from memos.retrieval.query import Query
from memos.retrieval.source import Array

_SMALLEST = 1e-6  # share of a walk: below it all are equal


@dataclass
class PageRank:
    """Adds the z-score of the logarithm of the share of random walks that end at a candidate.

    Walks start at good candidates and follow relations and the order of a conversation or
    document in both directions. It helps where relations carry the answer over several steps;
    put it behind ``rerank``.

    Args:
        weight:      of the z-score.
        stop:        chance to end at each step.
        order:       weight of an edge to the unit before or after; relations have their own.
        temperature: in scores: a candidate that is worse by this starts e times fewer walks.
        types:       weight of each type of relation; one that is not named weighs 1.

    Cost: ``steps`` passes over the edges.

    Source: Jeh and Widom, Scaling Personalized Web Search, 2003; Gutierrez et al., HippoRAG, 2024.
    """

    weight: float = 0.5
    stop: float = 0.5
    order: float = 1.0
    temperature: float = 1.5
    steps: int = 15
    types: dict[str, float] = field(default_factory=dict)
    name: str = "pagerank"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        if len(candidates) < 2:
            return candidates
        ends, weights = self._edges(candidates)
        if not len(ends):
            return candidates
        start = numpy.exp((candidates.score - candidates.score.max()) / self.temperature)
        shares = numpy.log(walk(start, ends, weights, self.stop, self.steps) + _SMALLEST)
        deviation = shares.std()
        if deviation > 1e-9:
            candidates.put(self.name, (shares - shares.mean()) / deviation, self.weight)
        return candidates

    def _edges(self, candidates: Candidates) -> tuple[Array, Array]:
        here = numpy.arange(len(candidates))
        after = candidates.places(candidates.columns("next")["next"])
        ends = [numpy.stack([here, after], 1)[after >= 0]]
        weights = [numpy.full(len(ends[0]), self.order)]
        edges = candidates.source.relations(candidates.seqs.tolist())
        if edges:
            seqs = numpy.array([(edge[0], edge[2]) for edge in edges], numpy.int64)
            places = candidates.places(seqs.ravel()).reshape(-1, 2)
            inside = (places >= 0).all(axis=1)
            given = numpy.array([edge[3] * self.types.get(edge[1], 1.0) for edge in edges])
            ends.append(places[inside])
            weights.append(given[inside])
        return numpy.concatenate(ends), numpy.concatenate(weights)


def walk(start: Array, ends: Array, weights: Array, stop: float, steps: int) -> Array:
    """Shares [n] of random walks that end at each node; they sum to 1.

    Args:
        start:   [n] in proportion to how many walks begin there.
        ends:    int64 [e, 2], walked both ways; ``weights`` [e].
        stop:    chance to end at each step; a walk without an edge to follow begins anew.
    """
    n = len(start)
    start = start / start.sum()
    source = numpy.concatenate([ends[:, 0], ends[:, 1]])
    target = numpy.concatenate([ends[:, 1], ends[:, 0]])
    both = numpy.concatenate([weights, weights])
    total = numpy.bincount(source, both, minlength=n)
    share = both / numpy.maximum(total[source], 1e-12)
    lost = total <= 0
    at = start
    for _ in range(steps):
        moved = numpy.bincount(target, at[source] * share, minlength=n)
        moved += at[lost].sum() * start
        at = stop * start + (1 - stop) * moved
    return at
