"""The stages of a query, in a list that a user can reorder, replace and read."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy

from memos.cube import Hit
from memos.errors import ArgumentError, NotFoundError
from memos.retrieval.candidates import Candidate, Candidates, Shared, Signal, Stage, StageTrace
from memos.retrieval.expand import Expand
from memos.retrieval.query import STOP_WORDS, Query, parse, words_of
from memos.retrieval.rerank import LateInteraction, Rerank
from memos.retrieval.source import Scope, Source
from memos.retrieval.stages import Fuse, TextSearch, VectorSearch
from memos.retrieval.units import Units
from memos.tracing import traced


def default_stages() -> list[Stage]:
    """Text, vector, fuse, expand, rerank, and late interaction where there are token vectors."""
    return [TextSearch(), VectorSearch(), Fuse(), Expand(), Rerank(), LateInteraction()]


def default_pipeline() -> Pipeline:
    """A pipeline with the default stages."""
    return Pipeline()


class Pipeline:
    """Runs a query through ``stages``: each is a function ``(query, candidates) -> candidates``.

    The weights are the same for every kind of memory: signals are measured against the store they
    come from, and one that does not apply is 0. Thread-safe as long as ``stages`` is left alone.

    Args:
        stages: in this order; None: ``default_stages()``.
        clock:  seconds since 1970.
    """

    def __init__(
        self, stages: Iterable[Stage] | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.stages = default_stages() if stages is None else list(stages)
        self._clock = clock
        self._lock = threading.Lock()
        self._units: weakref.WeakKeyDictionary[Any, Units] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Pipeline([{', '.join(map(name_of, self.stages))}])"

    def stage(self, name: str) -> Any:
        """The stage of this name, to read or change its settings. Raises NotFoundError."""
        for stage in self.stages:
            if name_of(stage) == name:
                return stage
        names = ", ".join(map(name_of, self.stages))
        raise NotFoundError(f"stage {name!r}: one of {names} wanted")

    def replace(self, name: str, stage: Stage) -> None:
        """Put another stage in the place of the one of this name. Raises NotFoundError."""
        self.stages[self.stages.index(self.stage(name))] = stage

    def run(
        self,
        query: str | Query,
        sources: Source | Sequence[Source],
        limit: int | None = 10,
        scope: Scope = None,
        *,
        now: float | None = None,
    ) -> list[Hit]:
        """The best cubes of one or several memories, ranked together.

        Args:
            query: a text, or one that is parsed already.
            limit: how many; None: all candidates.
            scope: handed to the sources: what may be seen.
            now:   seconds since 1970; "last week" is seen from there.

        Returns:
            Best first, each with its trace.

        Cost: as ``rank``, and reading ``limit`` cubes.
        """
        ranked = self.rank(query, sources, limit, scope, now=now)
        found: dict[int, Any] = {}
        for source in {id(c.source): c.source for c in ranked}.values():
            seqs = [c.seq for c in ranked if c.source is source]
            found.update(source.cubes(seqs, scope))
        return [
            Hit.of(found[c.seq], score=c.score, trace=c.trace) for c in ranked if c.seq in found
        ]

    def rank(
        self,
        query: str | Query,
        sources: Source | Sequence[Source],
        limit: int | None = 10,
        scope: Scope = None,
        *,
        now: float | None = None,
    ) -> list[Candidate]:
        """As ``run``, without reading the cubes.

        Cost: numpy over the candidates: all units of a memory of up to 1000, else a few hundred.
        """
        if not isinstance(query, str | Query):
            raise ArgumentError(f"query: a text wanted, got {type(query).__name__}")
        found = list(sources) if isinstance(sources, Sequence) else [sources]
        if isinstance(query, str):
            query = self.parse(query, found, now=now)
        shared = Shared(len(found))
        sets = [
            Candidates(source, scope, self._units_of(source, scope), shared) for source in found
        ]
        for stage in self.stages:  # all sources in step, so that they see the same ``shared``
            for i, candidates in enumerate(sets):
                sets[i] = _run_stage(stage, query, candidates)
        ranked = [result for candidates in sets for result in _results(candidates, limit)]
        if len(sets) > 1:
            ranked.sort(key=lambda result: -result.score)
        return ranked[:limit]

    def parse(self, text: str, sources: Sequence[Source], *, now: float | None = None) -> Query:
        """What a text asks for, given the metadata that these sources have."""
        words = [word for word in dict.fromkeys(words_of(text)) if word not in STOP_WORDS]
        pairs = [pair for source in sources for pair in source.named_values(words)]
        return parse(text, pairs, self._clock() if now is None else now)

    def _units_of(self, source: Source, scope: Scope) -> Units:
        with self._lock:
            units = self._units.get(source.owner)
            if units is None:
                units = self._units[source.owner] = Units()
        units.refresh(source, scope)
        return units


def _told(candidates: Candidates) -> dict[str, Any]:
    """Of a stage, for its span."""
    ran = candidates.stages[-1]
    return {
        "memos.stage": ran.stage,
        "memos.memory": ran.memory,
        "memos.candidates": ran.candidates,
    }


def name_of(stage: Stage) -> str:
    """The name of a stage: its attribute ``name``, or a function's own."""
    return str(getattr(stage, "name", None) or getattr(stage, "__name__", type(stage).__name__))


@traced("memos.stage", _told)
def _run_stage(stage: Stage, query: Query, candidates: Candidates) -> Candidates:
    start, before = time.perf_counter(), set(candidates.weights)
    after = stage(query, candidates)
    if not isinstance(after, Candidates):
        raise ArgumentError(
            f"stage {name_of(stage)}: it must return Candidates, got {type(after).__name__}"
        )
    ms = 1000 * (time.perf_counter() - start)
    new = tuple(name for name in after.weights if name not in before)
    after.stages.append(StageTrace(name_of(stage), after.source.name, len(after), ms, new))
    return after


def _results(candidates: Candidates, limit: int | None) -> list[Candidate]:
    best = candidates.order(limit)
    values = {
        name: numpy.nan_to_num(candidates.signals[name][best]).tolist()
        for name in candidates.weights
    }
    found = []
    for i, place in enumerate(best.tolist()):
        trace = tuple(
            stage._replace(
                signals=tuple(
                    Signal(name, values[name][i], candidates.weights[name]) for name in stage.names
                )
            )
            for stage in candidates.stages
        )
        seq, score = int(candidates.seqs[place]), float(candidates.score[place])
        found.append(Candidate(seq, candidates.source, score, trace))
    return found
