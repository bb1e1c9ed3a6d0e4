"""The scheduler: what it knows of every unit, the plans it makes of that, and why.

It holds no bytes. Whoever uses units tells it; a worker carries the plans out.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memos.errors import ArgumentError, MemosError, NotFoundError
from memos.scheduler.plan import COMPRESS, DEMOTE, DROP, Action, Ranking, Rules, check_budgets, plan
from memos.scheduler.sources import Router, Shares, Source
from memos.scheduler.telemetry import Telemetry
from memos.scheduler.tuning import HALF_LIVES_S, Tuner
from memos.scheduler.units import HALF_LIFE_S, Costs, Estimate, State, Unit
from memos.scheduler.worker import DONE, FAILED, Executor, Ledger, Outcome, Worker

UNLIMITED = 1 << 62  # a budget that no engine is cut to
_RESTS_S = 30.0  # a unit whose move failed
_MADE_RESTS_S = 600.0  # one that could not be built
_GAPS = 3  # a unit is expected for so many of its usual gaps


class Scheduler:
    """One budget per tier, and a plan of what lives where. Thread-safe.

    Args:
        budgets:     bytes by tier, fastest first.
        rules:       of the plans.
        half_life_s: of a use.
        clock:       seconds since 1970.
        tune:        False: the half-life stays as it is.
    """

    def __init__(
        self,
        budgets: Mapping[str, int],
        *,
        rules: Rules | None = None,
        half_life_s: float = HALF_LIFE_S,
        clock: Callable[[], float] = time.time,
        tune: bool = True,
    ) -> None:
        self.tiers = tuple(budgets)
        self.budgets = dict(budgets)
        self.rules = rules or Rules()
        self.half_life_s = half_life_s
        self.costs = Costs()
        self.clock = clock
        self._units: dict[str, Unit] = {}
        self._gaps: dict[str, Estimate] = {}
        self._last_actions: OrderedDict[str, Action] = OrderedDict()
        self._last_plan: list[Action] = []
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._router: Router | None = None
        self._beat: threading.Thread | None = None
        self._stop = threading.Event()
        self._error = ""
        self._resting: dict[str, float] = {}  # units whose move failed: until when they stay
        self.notes: Callable[[str], dict[str, Any]] = lambda id: {}
        self._plan_s = 0.0
        self.counts: Counter[str] = Counter()
        others = [half_life_s, *(one for one in HALF_LIVES_S if one != half_life_s)]
        self.tuner = Tuner(sorted(others) if tune else [half_life_s], half_life_s)
        self._telemetry = Telemetry(self)
        self.number = self._telemetry.number  # in this process: stands in every figure
        self.shows: Callable[[Scheduler], object] = lambda scheduler: None  # after every step
        check_budgets(State.of([], self.tiers), self.budgets)

    # What there is

    def put(self, unit: Unit) -> None:
        """A unit is there, or is another one from now on: its copies, sizes, costs, pins."""
        State.of([unit], self.tiers)
        with self._lock:
            self._units[unit.id] = unit

    def update(self, unit: Unit) -> None:
        """As ``put``, of what is there and what it costs; what is known of its uses stays."""
        with self._lock:
            known = self._units.get(unit.id)
            if known is not None:
                unit = dataclasses.replace(
                    unit,
                    heat=known.heat,
                    last=max(known.last, unit.last),
                    next_use=known.next_use,
                )
            self.put(unit)

    def remove(self, id: str) -> None:
        """A unit is gone. Unknown ones are ignored."""
        with self._lock:
            self.tuner.forget(id)
            self._units.pop(id, None)
            self._gaps.pop(id, None)
            self._last_actions.pop(id, None)

    def unit(self, id: str) -> Unit:
        """What is known of a unit. Raises NotFoundError."""
        with self._lock:
            if id not in self._units:
                raise NotFoundError(f"scheduler: no unit {id!r}")
            return self._units[id]

    def find(self, id: str) -> Unit | None:
        """As ``unit``; None for an unknown one."""
        with self._lock:
            return self._units.get(id)

    def __len__(self) -> int:
        return len(self._units)

    def use(self, id: str, at: float | None = None) -> None:
        """A unit was used. From its gaps follows when it is expected again. Unknown: ignored."""
        now = self.clock() if at is None else at
        with self._lock:
            unit = self._units.get(id)
            if unit is None:
                return
            age = max(now - unit.last, 0.0)
            heat = unit.heat * 0.5 ** (age / self.half_life_s) + 1.0
            self.counts["uses"] += 1
            self.counts["hits"] += bool(unit.copies & {*self.tiers[:1], *self.tiers[:-1]})
            if self.tuner.used(id, now):
                self._take_half_life()
                heat = self.tuner.heat(id, now) or heat
            next_use = None
            if unit.heat > 0:
                gap = self._gaps.setdefault(id, Estimate(age, 0.3))
                gap.add(age)
                next_use = now + gap.value
            self._units[id] = dataclasses.replace(unit, heat=heat, last=now, next_use=next_use)

    def measure(self, id: str, operation: str, where: str, seconds: float) -> None:
        """An operation on a unit took so long.

        Args:
            operation: "access" from the tier ``where``: load and decode; or "rebuild".
        """
        with self._lock:
            unit = self.unit(id)
            if operation == "rebuild":
                self._units[id] = dataclasses.replace(unit, rebuild_s=seconds)
            elif operation == "access" and where in self.tiers:
                access = {**unit.access_s, where: seconds}
                self._units[id] = dataclasses.replace(unit, access_s=access)
            else:
                raise ArgumentError(
                    f"measure: access at one of {', '.join(self.tiers)}, or rebuild, wanted, "
                    f"got {operation!r} at {where!r}"
                )
            size = max(unit.num_bytes.values(), default=0)
            self.costs.add(operation, where, size, seconds)

    # Plans

    def state(self) -> State:
        """Everything in columns, as it is now."""
        now = self.clock()
        with self._lock:
            used = self._worker.in_use() if self._worker else set()
            known, gaps = list(self._units.values()), dict(self._gaps)
            self._resting = {id: until for id, until in self._resting.items() if until > now}
            used |= self._resting.keys()
        units = [_expected(unit, gaps.get(unit.id), now) for unit in known]
        units = [dataclasses.replace(u, in_use=True) if u.id in used else u for u in units]
        state = State.of(units, self.tiers, self.half_life_s)
        if self._router is not None and state.compressed is not None:
            held, known_bytes = self._router.shares.used, state.used()
            state.stray = {t: max(held(t) - known_bytes[t], 0) for t in self.tiers}
        return state

    def plan(self) -> list[Action]:
        """What should be done now; nothing is."""
        self.refresh()
        start = time.perf_counter()
        with self._telemetry.planning():
            found = plan(self.state(), self.budgets, self.clock(), self.rules)
        with self._lock:
            self._last_plan = found
            self._plan_s = time.perf_counter() - start
            self.counts["plans"] += 1
        return found

    def run(self) -> list[Action]:
        """Make a plan and hand it to the worker. Raises ArgumentError without one."""
        if self._worker is None:
            raise ArgumentError("run: a scheduler with an executor wanted, see attach")
        found = self.plan()
        self._worker.submit(found)
        return found

    def attach(self, executor: Executor) -> Worker:
        """Let a worker carry the plans out with this; returns it."""
        if self._worker is not None:
            self._worker.close()
        ledger = Ledger(self.budgets, self.state().used())
        self._worker = Worker(executor, ledger, self._size, moved=self._moved, clock=self.clock)
        return self._worker

    # Memories

    def add_source(self, source: Source) -> None:
        """Plan for the units of a memory too, whose engines get a part of the budgets."""
        with self._lock:
            if self._router is None:
                cut = {t: budget for t, budget in self.budgets.items() if budget < UNLIMITED}
                self._router = Router(Shares(cut), self._size)
                self.attach(self._router)
        self._router.add(source)

    def remove_source(self, name: str) -> None:
        """Forget a memory and its units."""
        if self._router is not None:
            for id in self._router.remove(name):
                self.remove(id)

    def quotas(self, tier: str) -> dict[str, int]:
        """What each memory may hold of a tier now: together at most its budget."""
        return {} if self._router is None else self._router.shares.quotas(tier)

    def refresh(self) -> None:
        """Take in what memories tell: units, what they take, uses."""
        if self._router is None:
            return
        known = set(self.tiers)
        for unit in self._router.changed():
            if isinstance(unit, str):
                self.remove(unit)
                continue
            here = {tier: size for tier, size in unit.num_bytes.items() if tier in known}
            access = {tier: s for tier, s in unit.access_s.items() if tier in known}
            smaller = {tier: size for tier, size in unit.compressed_bytes.items() if tier in known}
            self.update(
                dataclasses.replace(
                    unit,
                    num_bytes=here,
                    access_s=access,
                    copies=unit.copies & known,
                    compressed_bytes=smaller,
                )
            )
        for id, at in self._router.uses():
            self.use(id, at)
        if self._worker is not None and self._worker.is_idle():
            self._worker.ledger.set(self.state().used())

    def step(self) -> list[Action]:
        """Make a plan, and hand it to the worker unless it still works on the last one."""
        if self._worker is None or not self._worker.is_idle():
            return []
        if self._router is not None:
            self._router.look_again()
            for tier in self.tiers:
                self._router.shares.divide(tier)
        found = self.run()
        self.shows(self)
        return found

    def start(self, every_s: float = 10.0) -> None:
        """Do a ``step`` every so many seconds in the background, until ``close``."""
        if not every_s > 0:
            raise ArgumentError(f"every_s: seconds above 0 wanted, got {every_s}")
        if self._beat is not None:
            raise ArgumentError("start: it runs already")
        self._beat = threading.Thread(
            target=self._run, args=(every_s,), name="memos-planner", daemon=True
        )
        self._beat.start()

    def _run(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self.step()
            except MemosError as error:  # a store that is busy or closed: the next step tries again
                self._error = str(error)

    def close(self) -> None:
        """Stop planning and the worker; the memories keep the quotas they have."""
        self._stop.set()
        beat, self._beat = self._beat, None
        if beat is not None:
            beat.join()
        if self._worker is not None:
            self._worker.close()
        if self._router is not None:
            self._router.close()
        self._telemetry.close()

    @property
    def worker(self) -> Worker | None:
        """Who carries plans out; None before ``attach`` or ``add_source``."""
        return self._worker

    # What is shown

    def explain(self, id: str, now: float | None = None) -> dict[str, Any]:
        """Why a unit is where it is, in words and numbers.

        Returns:
            copies; heat; uses_per_hour; next_use_s: from now, None: not known; importance;
            rebuild_s, access_s; compressed_bytes: by tier, what it would take compressed again,
            empty: it cannot be; tiers: for each {worth: seconds that a copy there saves per
            second and byte, price: the least that gets a place, wanted}; action: the last one on
            it, with its reason; words: all of that in a sentence; of a text associations: what
            was used together with it.

        Raises:
            NotFoundError: no such unit.
        """
        if self._router is not None and self.find(id) is None:
            self._router.ask(id)
            self.refresh()
        unit = self.unit(id)
        now = self.clock() if now is None else now
        state = self.state()
        ranking = Ranking(state, self.budgets, now, self.rules)
        place = list(state.ids).index(id)
        rate = float(ranking.rate[place]) * 3600
        tiers = {}
        words = []
        for t, tier in enumerate(self.tiers):
            worth, price = float(ranking.density[place, t]), float(ranking.price[t])
            wanted = bool(ranking.wanted[place, t])
            tiers[tier] = {"worth": worth, "price": price, "wanted": wanted}
            words.append(f"{tier}: worth {worth:.3g}, {price:.3g} needed")
            if tier in unit.compressed_bytes and tier in unit.copies:
                smaller, now_there = unit.compressed_bytes[tier], unit.num_bytes[tier]
                words[-1] += f", {smaller:,} bytes instead of {now_there:,} once compressed"
        with self._lock:
            action = self._last_actions.get(id)
        place_words = ", ".join(sorted(unit.copies)) or "nowhere"
        return {
            **self.notes(id),
            "id": id,
            "kind": unit.kind,
            "copies": sorted(unit.copies),
            "heat": unit.heat,
            "uses_per_hour": rate,
            "next_use_s": None if unit.next_use is None else unit.next_use - now,
            "importance": unit.importance,
            "pinned": unit.pinned,
            "rebuild_s": unit.rebuild_s if unit.rebuildable else None,
            "access_s": dict(unit.access_s),
            "compressed_bytes": dict(unit.compressed_bytes),
            "tiers": tiers,
            "action": None if action is None else dataclasses.asdict(action),
            "words": f"{unit.kind} {id} is in {place_words}; {rate:.3g} uses an hour; "
            + "; ".join(words),
        }

    def stats(self) -> dict[str, Any]:
        """tiers: {bytes, budget, units} of each; units; planned: actions of the last plan;
        worker: what became of actions; costs: measured bytes per second; memories: hit_rate and
        other figures of each; tuning: what is learnt; plans, plan_s; error: of the last step."""
        state = self.state()
        used = state.used()
        counts = state.copies.sum(axis=0).tolist()
        return {
            "tiers": {
                tier: {"bytes": used[tier], "budget": self.budgets[tier], "units": counts[t]}
                for t, tier in enumerate(self.tiers)
            },
            "units": len(state),
            "planned": len(self._last_plan),
            "plan_s": self._plan_s,
            "plans": self.counts["plans"],
            "uses": self.counts["uses"],
            "hit_rate": self.counts["hits"] / max(self.counts["uses"], 1),
            "memories": {} if self._router is None else self._router.figures(),
            "tuning": self.tuner.stats(),
            "error": self._error,
            "worker": dict(self._worker.counts) if self._worker else {},
            "costs": self.costs.measured(),
        }

    def hottest(self, limit: int = 10) -> list[tuple[str, float]]:
        """(id, uses an hour) of the units with the most expected uses."""
        state = self.state()
        rates = state.rates(self.clock(), self.rules.horizon_s) * 3600
        order = sorted(range(len(state)), key=lambda i: (-rates[i], state.ids[i]))
        return [(state.ids[i], float(rates[i])) for i in order[:limit]]

    def last_actions(self, limit: int = 10) -> Sequence[Outcome]:
        """What the worker did last, newest first."""
        return [] if self._worker is None else self._worker.outcomes()[::-1][:limit]

    # Inside

    def _take_half_life(self) -> None:
        """Another half-life was chosen: the heat of every unit is what it says."""
        self.half_life_s = self.tuner.half_life_s
        for id, unit in self._units.items():
            heat = self.tuner.heat(id, unit.last)
            if heat is not None:
                self._units[id] = dataclasses.replace(unit, heat=heat)

    def _size(self, id: str, tier: str) -> int:
        return self.unit(id).num_bytes[tier]

    def _moved(self, outcome: Outcome) -> None:
        """The worker made or gave up a copy."""
        action = outcome.action
        with self._lock:
            unit = self._units.get(action.unit)
            if unit is None:
                return
            copies = set(unit.copies)
            if outcome.made and action.kind == COMPRESS:
                unit = dataclasses.replace(
                    unit,
                    num_bytes={**unit.num_bytes, **unit.compressed_bytes},
                    compressed_bytes={},
                )
            if outcome.made and action.target is not None:
                copies.add(action.target)
            if outcome.gave_up and action.source is not None:
                copies.discard(action.source)
            archived = unit.archived or (action.kind == "archive" and outcome.state == DONE)
            self._units[action.unit] = dataclasses.replace(
                unit, copies=frozenset(copies), archived=archived
            )
            self._last_actions[action.unit] = action
            if outcome.state == FAILED:
                rests = _RESTS_S if action.source is not None else _MADE_RESTS_S
                self._resting[action.unit] = self.clock() + rests
            self._telemetry.moved(outcome)
            if outcome.state == DONE and action.kind not in (DROP, DEMOTE):
                where = action.source or unit.kind
                operation = "load" if action.source else "rebuild"
                if action.kind == COMPRESS:
                    operation = COMPRESS
                self.costs.add(operation, where, action.num_bytes, outcome.seconds)


def _expected(unit: Unit, gap: Estimate | None, now: float) -> Unit:
    """A unit that is overdue by several of its gaps is not expected any more."""
    if unit.next_use is not None and gap is not None and now > unit.last + _GAPS * gap.value:
        return dataclasses.replace(unit, next_use=None)
    return unit
