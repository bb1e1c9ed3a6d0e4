"""Why a hit stands where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memos.cube import Hit
from memos.errors import ArgumentError
from memos.retrieval.candidates import Signal, StageTrace
from memos.retrieval.synthesis import Context


@dataclass(frozen=True)
class Explained:
    """One hit.

    Args:
        id, memory, score: of the hit.
        stages:  those it went through, with its signals.
        signals: those that counted, the greatest first.
        merged:  (id, why) of the cubes that it was merged from.
    """

    id: str
    memory: str
    score: float
    stages: tuple[StageTrace, ...]
    signals: tuple[Signal, ...]
    merged: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.memory}/{self.id}  score {self.score:.3f}"]
        lines += [f"  merged from {id}: {why}" for id, why in self.merged]
        lines += [
            f"  {s.name:16s} {s.value:8.3f} * {s.weight:6.2f} = {s.adds:8.3f}" for s in self.signals
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """Why a result is as it is: its hits, and what was left out of a context.

    Args:
        hits:     best first.
        left_out: (id, why) of hits that are not in the context.
    """

    hits: tuple[Explained, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = []
        if self.hits and self.hits[0].stages:
            lines.append(
                " -> ".join(
                    f"{s.stage} ({s.candidates}, {s.ms:.1f} ms)" for s in self.hits[0].stages
                )
            )
        lines += [str(hit) for hit in self.hits]
        lines += [f"left out: {id}: {why}" for id, why in self.left_out]
        return "\n".join(lines)


def explain(result: Hit | Context | Sequence[Hit] | Any) -> Explanation:
    """Every stage, signal and weight that led to a hit, to several, or to a context."""
    if isinstance(result, Context):
        return Explanation(tuple(map(_explained, result.hits)), result.left_out)
    if isinstance(result, Hit):
        return Explanation((_explained(result),))
    if isinstance(result, Sequence) and all(isinstance(hit, Hit) for hit in result):
        return Explanation(tuple(map(_explained, result)))
    raise ArgumentError(
        f"result: a hit, a list of hits or a context wanted, got {type(result).__name__}"
    )


def _explained(hit: Hit) -> Explained:
    stages = tuple(stage for stage in hit.trace if isinstance(stage, StageTrace))
    signals = [s for stage in stages for s in stage.signals if s.adds]
    signals.sort(key=lambda signal: -abs(signal.adds))
    merged = tuple(
        (edge.target, str(edge.properties.get("why", "")))
        for edge in hit.relations
        if edge.outgoing and edge.type == "merged_from"
    )
    return Explained(hit.id, hit.memory, hit.score, stages, tuple(signals), merged)
