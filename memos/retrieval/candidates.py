"""What stages hand to one another, and what comes out at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from memos.retrieval.query import Pair
from memos.retrieval.source import Array, Scope, Source
from memos.retrieval.units import Units


@dataclass
class Shared:
    """What the sources of one query see of one another.

    Args:
        sources:  how many there are.
        coverage: source's name -> share of the query's words that its best text has.
        dense:    the candidates of every source that searched by meaning.
    """

    sources: int = 1
    coverage: dict[str, float] = field(default_factory=dict)
    dense: list[Candidates] = field(default_factory=list)


class Candidates:
    """Units that may answer a query: their numbers, signals and scores, one entry each.

    A stage gets it and returns it, or another one. ``seqs`` ascend; ``signals`` are arrays of the
    same length. Not thread-safe: a query has its own.

    Args:
        source:  the memory that is searched; ``scope``: what may be seen of it.
        units:   what is known of its units.
        shared:  what other sources of this query see too.
    """

    def __init__(self, source: Source, scope: Scope, units: Units, shared: Shared) -> None:
        self.source, self.scope, self.units, self.shared = source, scope, units, shared
        self.seqs: Array = numpy.zeros(0, numpy.int64)
        self.signals: dict[str, Array] = {}
        self.weights: dict[str, float] = {}
        self.score: Array = numpy.zeros(0)
        self.is_complete = False  # every unit that may be seen is here
        self.total = 0  # units of the source, about
        self.vector: Any = None  # of the query
        self.text_scores: tuple[Array, Array] | None = None  # more than became candidates
        self.background: tuple[float, float] | None = None
        self.stages: list[StageTrace] = []

    def __len__(self) -> int:
        return len(self.seqs)

    def add(self, seqs: Array) -> Array:
        """Add units that are not here yet, with nan for every signal; returns the new ones."""
        new = numpy.sort(seqs[self.places(seqs) < 0])
        if len(new) > 1:
            new = new[numpy.append(True, new[1:] != new[:-1])]
        if len(new):
            order = numpy.argsort(numpy.concatenate([self.seqs, new]), kind="stable")
            empty = numpy.full(len(new), numpy.nan)
            self.seqs = numpy.concatenate([self.seqs, new])[order]
            self.signals = {
                name: numpy.concatenate([values, empty])[order]
                for name, values in self.signals.items()
            }
            self.score = numpy.concatenate([self.score, numpy.zeros(len(new))])[order]
        return new

    def keep(self, mask: Array) -> None:
        """Drop the candidates where this is False."""
        self.seqs, self.score = self.seqs[mask], self.score[mask]
        self.signals = {name: values[mask] for name, values in self.signals.items()}

    def places(self, seqs: Array) -> Array:
        """Index of each of these units among the candidates; -1: it is none."""
        if not len(self.seqs):
            return numpy.full(len(seqs), -1, numpy.int64)
        at = numpy.minimum(numpy.searchsorted(self.seqs, seqs), len(self.seqs) - 1)
        return numpy.where(self.seqs[at] == seqs, at, -1)

    def columns(self, *names: str) -> dict[str, Array]:
        """What is known of the candidates; those that are gone from the source are dropped."""
        found, columns = self.units.columns(self.source, self.scope, self.seqs, names)
        if not found.all():
            self.keep(found)
        return columns

    def having(self, pairs: Iterable[Pair]) -> Array:
        """Which candidates have one of these (key, value) in their metadata: bool [n]."""
        return self.units.having(self.source, self.scope, self.seqs, pairs)

    def put(self, name: str, values: Array, weight: float) -> None:
        """Set a signal, and its share in the score."""
        old = self.signals.get(name)
        if old is not None and name in self.weights:
            self.score = self.score - self.weights[name] * numpy.nan_to_num(old)
        self.signals[name] = values
        self.weights[name] = weight
        self.score = self.score + weight * numpy.nan_to_num(values)

    def order(self, limit: int | None = None) -> Array:
        """Indexes of the candidates, best first; the older one first among equals."""
        return numpy.argsort(-self.score, kind="stable")[:limit]


class Signal(NamedTuple):
    """What one signal added to the score of one unit."""

    name: str
    value: float
    weight: float

    @property
    def adds(self) -> float:
        return self.value * self.weight


class StageTrace(NamedTuple):
    """What a stage did to one source's candidates; for one unit with its ``signals``.

    Args:
        stage:      its name; ``memory``: the source's name.
        candidates: how many there were after it.
        ms:         how long it took.
        names:      of the signals that it set.
    """

    stage: str
    memory: str
    candidates: int
    ms: float
    names: tuple[str, ...] = ()
    signals: tuple[Signal, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One result of a query, before its cube is read.

    Args:
        seq:    number of the unit; ``source``: the memory it is in.
        score:  sum of weight * signal; comparable within one result.
        trace:  the stages it went through.
    """

    seq: int
    source: Source = field(repr=False)
    score: float
    trace: tuple[StageTrace, ...] = ()

    @property
    def signals(self) -> dict[str, Signal]:
        """Every signal by its name."""
        return {signal.name: signal for stage in self.trace for signal in stage.signals}


Stage = Callable[[Any, Candidates], Candidates]  # (Query, Candidates) -> Candidates
