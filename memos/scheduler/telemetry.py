"""Figures of schedulers for OpenTelemetry; nothing where its API is not installed.

Only the API is used: which exporter there is, and whether there is one, is the application's.

Metrics: memos.tier.bytes, memos.tier.budget, memos.tier.units, memos.hit_rate (by memory),
memos.moves and memos.move.seconds (by kind and state), memos.plan.seconds; spans memos.plan and
memos.move. Where a process has several schedulers each has a number, memos.scheduler.
"""

from __future__ import annotations

import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memos.tracing import SCOPE, tracer

if TYPE_CHECKING:
    from memos.scheduler.scheduler import Scheduler
    from memos.scheduler.worker import Outcome

_all: weakref.WeakValueDictionary[int, Scheduler] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Telemetry:
    """The figures of one scheduler, which is not kept alive."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.number = next(_numbers)
        _all[self.number] = scheduler
        self._has_api = _instruments() is not None

    def close(self) -> None:
        """Nothing is told from now on."""
        _all.pop(self.number, None)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """A span around a plan."""
        made = _instruments() if self._has_api else None
        if made is None:
            yield
            return
        start = time.perf_counter()
        with made.tracer.start_as_current_span("memos.plan"):
            yield
        made.plan_s.record(time.perf_counter() - start, {"memos.scheduler": self.number})

    def moved(self, outcome: Outcome) -> None:
        """A move is over."""
        made = _instruments() if self._has_api else None
        if made is None:
            return
        action = outcome.action
        what = {
            "memos.kind": action.kind,
            "memos.state": outcome.state,
            "memos.scheduler": self.number,
        }
        made.moves.add(1, what)
        made.move_s.record(outcome.seconds, what)
        end = time.time_ns()
        more = {
            "memos.unit": action.unit,
            "memos.source": action.source or "",
            "memos.target": action.target or "",
            "memos.bytes": action.num_bytes,
            "memos.reason": action.reason,
        }
        start = end - int(outcome.seconds * 1e9)
        span = made.tracer.start_span("memos.move", start_time=start, attributes={**what, **more})
        span.end(end)


class _Instruments:
    def __init__(self, metrics: Any) -> None:
        self.tracer = tracer()
        meter = metrics.get_meter(SCOPE)
        self._observation = metrics.Observation
        for name, unit in (("bytes", "By"), ("budget", "By"), ("units", "{unit}")):
            meter.create_observable_gauge(f"memos.tier.{name}", [self._tiers(name)], unit)
        meter.create_observable_gauge("memos.hit_rate", [self._hit_rates], "1")
        self.moves = meter.create_counter("memos.moves", "{move}")
        self.move_s = meter.create_histogram("memos.move.seconds", "s")
        self.plan_s = meter.create_histogram("memos.plan.seconds", "s")

    def _tiers(self, name: str) -> Callable[[Any], list[Any]]:
        def observe(_: Any) -> list[Any]:
            return [
                self._observation(one[name], {"memos.tier": tier, "memos.scheduler": number})
                for number, scheduler in list(_all.items())
                for tier, one in scheduler.stats()["tiers"].items()
            ]

        return observe

    def _hit_rates(self, _: Any) -> list[Any]:
        return [
            self._observation(
                figures["hit_rate"], {"memos.memory": name, "memos.scheduler": number}
            )
            for number, scheduler in list(_all.items())
            for name, figures in scheduler.stats()["memories"].items()
            if "hit_rate" in figures
        ]


@functools.lru_cache(maxsize=1)
def _instruments() -> _Instruments | None:
    """Made once: an instrument of a name is there once in a process."""
    try:
        from opentelemetry import metrics
    except ModuleNotFoundError:
        return None
    return _Instruments(metrics)
