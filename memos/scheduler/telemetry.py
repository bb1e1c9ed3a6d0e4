"""Figures of a scheduler for OpenTelemetry; nothing where its API is not installed.

Only the API is used: which exporter there is, and whether there is one, is the application's.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memos.scheduler.scheduler import Scheduler
    from memos.scheduler.worker import Outcome

SCOPE = "memos"


class Telemetry:
    """Metrics memos.tier.bytes, memos.tier.budget, memos.tier.units, memos.hit_rate (by memory),
    memos.moves and memos.move.seconds (by kind and state), memos.plan.seconds; spans memos.plan and
    memos.move.

    Args:
        scheduler: whose figures they are; it is not kept alive.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._tracer: Any = None
        try:
            from opentelemetry import metrics, trace
            from opentelemetry.metrics import Observation
        except ModuleNotFoundError:
            return
        self._of = weakref.ref(scheduler)
        self._observation = Observation
        self._tracer = trace.get_tracer(SCOPE)
        meter = metrics.get_meter(SCOPE)
        tiers = ((name, self._tiers(name)) for name in ("bytes", "budget", "units"))
        for name, observe in tiers:
            unit = "{unit}" if name == "units" else "By"
            meter.create_observable_gauge(f"memos.tier.{name}", [observe], unit)
        meter.create_observable_gauge("memos.hit_rate", [self._hit_rates], "1")
        self._moves = meter.create_counter("memos.moves", "{move}")
        self._move_s = meter.create_histogram("memos.move.seconds", "s")
        self._plan_s = meter.create_histogram("memos.plan.seconds", "s")

    @contextmanager
    def planning(self) -> Iterator[None]:
        """A span around a plan."""
        if self._tracer is None:
            yield
            return
        start = time.perf_counter()
        with self._tracer.start_as_current_span("memos.plan"):
            yield
        self._plan_s.record(time.perf_counter() - start)

    def moved(self, outcome: Outcome) -> None:
        """A move is over."""
        if self._tracer is None:
            return
        action = outcome.action
        what = {"memos.kind": action.kind, "memos.state": outcome.state}
        self._moves.add(1, what)
        self._move_s.record(outcome.seconds, what)
        end = time.time_ns()
        more = {
            "memos.unit": action.unit,
            "memos.source": action.source or "",
            "memos.target": action.target or "",
            "memos.bytes": action.num_bytes,
            "memos.reason": action.reason,
        }
        start = end - int(outcome.seconds * 1e9)
        span = self._tracer.start_span("memos.move", start_time=start, attributes={**what, **more})
        span.end(end)

    def _tiers(self, name: str) -> Callable[[Any], list[Any]]:
        def observe(_: Any) -> list[Any]:
            scheduler = self._of()
            if scheduler is None:
                return []
            tiers = scheduler.stats()["tiers"]
            return [
                self._observation(one[name], {"memos.tier": tier}) for tier, one in tiers.items()
            ]

        return observe

    def _hit_rates(self, _: Any) -> list[Any]:
        scheduler = self._of()
        if scheduler is None:
            return []
        return [
            self._observation(figures["hit_rate"], {"memos.memory": name})
            for name, figures in scheduler.stats()["memories"].items()
            if "hit_rate" in figures
        ]
