"""Graph expansion: what stands around a unit says how relevant it is.

Edges are those that exist anyway: before and after in a conversation or a document, the session
or section, and the explicit relations between units.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from memos.retrieval.candidates import Candidates
from memos.retrieval.query import Query
from memos.retrieval.source import Array
from memos.retrieval.stages import dense_of, text_of

_MEMBERS = 3  # of a group, its best ones, say how relevant it is


@dataclass
class Expand:
    """Neighbours of the best candidates become candidates; relevance flows along the edges.

    Signals, of the relevance r that the stages before gave:
        previous, next: r of the unit before and after.
        answer:         r of the unit before, where that is a question.
        parent:         mean r of the three best of the same session or section, as z-score over
                        the sessions or sections.
        children:       mean r of the three best units below it.
        related:        the greatest of edge weight * r over related units.

    Args:
        seeds: of the best candidates the neighbours are fetched, where not all units are
            candidates already.
        types: weight of each type of relation; one that is not named weighs 1.
    """

    seeds: int = 50
    previous: float = 0.15
    next: float = 0.15
    answer: float = 0.35
    parent: float = 1.0
    children: float = 0.1
    related: float = 0.35
    types: dict[str, float] = field(default_factory=dict)
    name: str = "expand"

    def __call__(self, query: Query, candidates: Candidates) -> Candidates:
        best = candidates.seqs[candidates.order(self.seeds)]
        edges = candidates.source.relations(best.tolist())
        ends = numpy.array([(edge[0], edge[2]) for edge in edges], numpy.int64).reshape(-1, 2)
        weights = numpy.array([edge[3] * self.types.get(edge[1], 1.0) for edge in edges])
        if not candidates.is_complete and len(best):
            source, scope = candidates.source, candidates.scope
            _, near = candidates.units.columns(source, scope, best, ("previous", "next", "parent"))
            self._fetch(candidates, numpy.concatenate([*near.values(), ends.ravel()]))
        columns = candidates.columns("previous", "next", "group", "parent", "is_question")
        r = candidates.score.copy()
        before = candidates.places(columns["previous"])
        after = candidates.places(columns["next"])
        above = numpy.where(before >= 0, r[before], 0.0)
        candidates.put("previous", above, self.previous)
        candidates.put("next", numpy.where(after >= 0, r[after], 0.0), self.next)
        asked = (before >= 0) & columns["is_question"][before]
        candidates.put("answer", numpy.where(asked, above, 0.0), self.answer)
        candidates.put("parent", _group_scores(r, columns["group"]), self.parent)
        above_it = candidates.places(columns["parent"])
        if (above_it >= 0).any():
            candidates.put("children", best_means(r, above_it), self.children)
        at = candidates.places(ends.ravel()).reshape(-1, 2)
        if (at >= 0).all(axis=1).any():
            candidates.put("related", self._related(r, at, weights), self.related)
        return candidates

    def _fetch(self, candidates: Candidates, seqs: Array) -> None:
        wanted = numpy.unique(seqs[(seqs >= 0) & (candidates.places(seqs) < 0)]).tolist()
        if not wanted:
            return
        visible = candidates.source.visible(wanted, candidates.scope)
        new = candidates.add(numpy.array(sorted(visible), numpy.int64))
        if not len(new):
            return
        places = candidates.places(new)
        shares = {"text": text_of(candidates, new)}
        if candidates.vector is not None:
            near = candidates.source.similarities(candidates.vector, new)
            candidates.signals["similarity"][places] = near
            shares["dense"] = dense_of(candidates, near)
        for name, values in shares.items():
            if name in candidates.weights:
                candidates.signals[name][places] = values
                candidates.score[places] += candidates.weights[name] * values

    @staticmethod
    def _related(r: Array, ends: Array, weights: Array) -> Array:
        best = numpy.zeros(len(r))
        known = ends.min(axis=1) >= 0
        for near, far in ((0, 1), (1, 0)):
            here, there = ends[known, near], ends[known, far]
            numpy.maximum.at(best, here, weights[known] * r[there])
        return best


def best_means(r: Array, groups: Array) -> Array:
    """[n] of group i the mean of its three best members; 0 where it has none. -1: no group."""
    member = numpy.flatnonzero(groups >= 0)
    sizes = numpy.bincount(groups[member], minlength=len(r))
    order = member[numpy.lexsort((-r[member], groups[member]))]
    starts = numpy.cumsum(sizes) - sizes
    place = numpy.arange(len(order)) - starts[groups[order]]
    first = order[place < _MEMBERS]
    sums = numpy.bincount(groups[first], r[first], minlength=len(r))
    return sums / numpy.maximum(numpy.minimum(sizes, _MEMBERS), 1)


def _group_scores(r: Array, groups: Array) -> Array:
    """[n] z-score of each unit's group; 0 without a group, or with one group only."""
    scores = numpy.zeros(len(r))
    member = numpy.flatnonzero(groups >= 0)
    if not len(member):
        return scores
    different, group = numpy.unique(groups[member], return_inverse=True)
    if len(different) < 2:
        return scores
    means = best_means(r[member], group)[: len(different)]
    deviation = means.std()
    if deviation > 1e-9:
        scores[member] = ((means - means.mean()) / deviation)[group]
    return scores
