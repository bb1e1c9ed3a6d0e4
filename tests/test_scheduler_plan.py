"""Plans on random states, checked move by move; the worker that carries them out."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError, NotFoundError
from memos.scheduler.plan import (
    ACTIVATE,
    ARCHIVE,
    COMPRESS,
    CONSOLIDATE,
    DEMOTE,
    DROP,
    PREFETCH,
    PROMOTE,
    Action,
    Rules,
    plan,
)
from memos.scheduler.scheduler import Scheduler
from memos.scheduler.units import KINDS, Costs, Estimate, State, Unit
from memos.scheduler.worker import CANCELLED, DONE, FAILED, SKIPPED, Ledger, Worker

TIERS = ("device", "host", "disk")
NOW = 10_000.0


@st.composite
def units(draw: Any, id: str) -> Unit:
    places = draw(st.sets(st.sampled_from(TIERS), min_size=1))
    rebuildable = draw(st.booleans())
    copies = draw(st.sets(st.sampled_from(sorted(places)), min_size=0 if rebuildable else 1))
    size = st.integers(0, 100)
    cost = st.floats(0, 20)
    smaller = draw(st.sets(st.sampled_from(sorted(places))))  # the codec is asked for each tier
    return Unit(
        id=id,
        kind=draw(st.sampled_from(KINDS)),
        num_bytes={tier: draw(size) for tier in sorted(places)},
        copies=frozenset(copies),
        heat=draw(st.floats(0, 1000)),
        last=NOW - draw(st.floats(-10, 1e5)),
        importance=draw(st.floats(0, 1)),
        pinned=draw(st.integers(0, 5)) == 0,
        in_use=draw(st.integers(0, 5)) == 0,
        rebuildable=rebuildable,
        rebuild_s=draw(cost),
        access_s={tier: draw(cost) for tier in sorted(places)},
        next_use=draw(st.none() | st.floats(NOW - 100, NOW + 5000)),
        archived=draw(st.booleans()),
        buildable=draw(st.booleans()),
        compressed_bytes={tier: draw(size) for tier in sorted(smaller)},
    )


@st.composite
def states(draw: Any) -> list[Unit]:
    return [draw(units(f"u{i}")) for i in range(draw(st.integers(0, 12)))]


budgets_of = st.fixed_dictionaries({tier: st.integers(0, 500) for tier in TIERS})
rules_of = st.builds(
    Rules,
    limit=st.integers(0, 20),
    archive_rate=st.sampled_from([0.0, 1e-4, 1.0]),
    compress_above=st.sampled_from([0.0, 0.8, 1.0]),
)


def used(all_units: Mapping[str, Unit]) -> dict[str, int]:
    return {
        tier: sum(u.num_bytes[tier] for u in all_units.values() if tier in u.copies)
        for tier in TIERS
    }


def compressed(unit: Unit) -> Unit:
    sizes = {**unit.num_bytes, **unit.compressed_bytes}
    return dataclasses.replace(unit, num_bytes=sizes, compressed_bytes={})


def during(action: Action) -> dict[str, int]:
    """Bytes beside all others while the action runs: both copies of what becomes smaller."""
    return {str(action.target): action.num_bytes} if action.kind == COMPRESS else {}


def check_and_apply(all_units: dict[str, Unit], action: Action) -> None:
    """What an executor would do, in two steps, and what must hold before and after."""
    unit = all_units[action.unit]
    assert action.reason
    if action.kind == ARCHIVE:
        assert unit.kind == "text"
        assert not unit.archived
        assert not unit.pinned
        assert not unit.in_use
        all_units[unit.id] = dataclasses.replace(unit, archived=True)
        return
    assert not unit.pinned
    assert not unit.in_use
    copies = set(unit.copies)
    if action.kind == COMPRESS:
        assert copies == {action.source} == {action.target}
        assert action.num_bytes == unit.compressed_bytes[str(action.source)]
        assert action.num_bytes < unit.num_bytes[str(action.source)]
        all_units[unit.id] = compressed(unit)
        return
    if action.target is not None:
        assert action.target not in copies
        assert action.num_bytes == unit.num_bytes[action.target]
        copies.add(action.target)
    if action.kind in (PROMOTE, PREFETCH):
        assert action.source in unit.copies
        assert TIERS.index(str(action.target)) < TIERS.index(str(action.source))
    elif action.kind == DEMOTE:
        assert action.source in unit.copies
        assert TIERS.index(str(action.target)) > TIERS.index(str(action.source))
        copies.remove(action.source)
    elif action.kind == DROP:
        assert action.target is None
        copies.remove(action.source)
    else:
        assert action.kind == (CONSOLIDATE if unit.kind == "adapter" else ACTIVATE)
        assert action.source is None
        assert not unit.copies
        assert unit.rebuildable
    assert copies or unit.rebuildable, "the last copy"
    all_units[unit.id] = dataclasses.replace(unit, copies=frozenset(copies))


@settings(max_examples=200, deadline=None)
@given(states(), budgets_of, rules_of)
def test_every_prefix_of_a_plan_is_valid(
    rows: list[Unit], budgets: dict[str, int], rules: Rules
) -> None:
    state = State.of(rows, TIERS)
    actions = plan(state, budgets, NOW, rules)
    assert actions == plan(State.of(rows, TIERS), budgets, NOW, rules), "deterministic"
    assert len(actions) <= rules.limit
    now = {unit.id: unit for unit in rows}
    for action in actions:
        before = used(now)
        for tier, num_bytes in during(action).items():
            assert before[tier] + num_bytes <= budgets[tier]
        check_and_apply(now, action)
        for tier, num_bytes in used(now).items():
            assert num_bytes <= max(budgets[tier], before[tier])
    for unit in rows:
        if unit.pinned or unit.in_use:
            assert now[unit.id] == unit


@settings(max_examples=200, deadline=None)
@given(states(), budgets_of)
def test_plans_come_to_rest(rows: list[Unit], budgets: dict[str, int]) -> None:
    """Carried out again and again, plans end: nothing goes to and fro for ever."""
    now = {unit.id: unit for unit in rows}
    for _ in range(60):
        actions = plan(State.of(now.values(), TIERS), budgets, NOW)
        if not actions:
            break
        for action in actions:
            check_and_apply(now, action)
    else:
        raise AssertionError(actions)


@settings(max_examples=40, deadline=None)
@given(states(), budgets_of, st.integers(0, 30))
def test_after_a_crash_anywhere_the_rest_is_planned_anew(
    rows: list[Unit], budgets: dict[str, int], crash: int
) -> None:
    """The copy is made and the source not yet given up: that state is valid, and can be planned."""
    state = State.of(rows, TIERS)
    actions = plan(state, budgets, NOW)
    assume(actions)
    now = {unit.id: unit for unit in rows}
    stop = crash % len(actions)
    for action in actions[:stop]:
        check_and_apply(now, action)
    last = actions[stop]
    if last.kind == COMPRESS:
        if crash % 2:  # it is the one copy, or the other
            check_and_apply(now, last)
    elif last.target is not None:
        unit = now[last.unit]
        now[last.unit] = dataclasses.replace(unit, copies=unit.copies | {last.target})
    for tier, num_bytes in used(now).items():
        assert num_bytes <= max(budgets[tier], state.used()[tier])
    for action in plan(State.of(now.values(), TIERS), budgets, NOW):
        check_and_apply(now, action)


def kv(id: str, where: str | None, heat: float = 0.0, **more: Any) -> Unit:
    given: dict[str, Any] = {
        "num_bytes": dict.fromkeys(TIERS, 100),
        "copies": frozenset([where] if where else []),
        "heat": heat,
        "last": NOW,
        "rebuildable": True,
        "rebuild_s": 2.0,
        "access_s": {"device": 0.0, "host": 0.01, "disk": 0.1},
    }
    return Unit(id, **{**given, **more})


def kinds(rows: list[Unit], budgets: dict[str, int], **rules: Any) -> dict[str, Action]:
    found = plan(State.of(rows, TIERS), budgets, NOW, Rules(**rules))
    return {action.unit: action for action in found}


PLENTY = dict.fromkeys(TIERS, 1000)


def test_hot_texts_become_kv_and_hot_knowledge_adapters() -> None:
    rows = [kv("hot", None, 50.0), kv("cold", None, 0.001), kv("skill", None, 90.0, kind="adapter")]
    found = kinds(rows, PLENTY)
    assert found["hot"].kind == ACTIVATE
    assert found["hot"].target == "device"
    assert "uses an hour" in found["hot"].reason
    assert found["skill"].kind == CONSOLIDATE
    assert "cold" not in found, "a prefill costs more than it saves"
    assert not kinds(rows, PLENTY, build=())


def test_what_is_not_used_makes_room_for_what_is() -> None:
    budgets = {"device": 200, "host": 200, "disk": 1000}
    rows = [
        kv("a", "device", 0.0, rebuildable=False),
        kv("b", "device", 0.1),
        kv("c", "disk", 80.0),
    ]
    found = kinds(rows, budgets)
    assert (found["a"].kind, found["a"].target) == (DEMOTE, "host")
    assert (found["c"].kind, found["c"].source, found["c"].target) == (PROMOTE, "disk", "device")
    assert "b" not in found, "it fits, and stays"


def test_what_is_expected_is_fetched_before() -> None:
    rows = [
        kv("soon", "disk", 0.01, next_use=NOW + 60),
        kv("later", "disk", 0.01, next_use=NOW + 9e5),
    ]
    found = kinds(rows, PLENTY)
    assert found["soon"].kind == PREFETCH
    assert "wanted in 60 s" in found["soon"].reason
    assert "later" not in found


def test_cold_texts_are_archived_and_important_ones_later() -> None:
    rows = [
        Unit("cold", "text", last=NOW),
        Unit("warm", "text", heat=5.0, last=NOW),
        Unit("pinned", "text", last=NOW, pinned=True),
        Unit("done", "text", last=NOW, archived=True),
    ]
    found = kinds(rows, PLENTY, archive_rate=1e-5)
    assert set(found) == {"cold"}
    assert found["cold"].kind == ARCHIVE


def test_a_tier_above_its_budget_only_loses() -> None:
    rows = [kv("a", "device", 1.0, rebuildable=False), kv("b", "device", 9.0, rebuildable=False)]
    found = kinds(rows, {"device": 100, "host": 100, "disk": 0})
    assert set(found) == {"a"}
    assert kinds(rows, {"device": 100, "host": 0, "disk": 0}) == {}, "the last copies stay"


def test_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="budgets"):
        plan(State.of([], TIERS), {"device": 1}, NOW)
    with pytest.raises(ArgumentError, match="each id once"):
        State.of([Unit("a"), Unit("a")], TIERS)
    with pytest.raises(ArgumentError, match="tiers of"):
        State.of([Unit("a", num_bytes={"tape": 1})], TIERS)
    with pytest.raises(ArgumentError, match="num_bytes"):
        State.of([Unit("a", copies=frozenset(["host"]))], TIERS)


def test_estimates_follow_what_is_measured() -> None:
    estimate = Estimate(100.0)
    estimate.add(1.0)
    assert estimate.value == 1.0, "what was assumed is forgotten at once"
    for _ in range(50):
        estimate.add(3.0)
    assert estimate.value == pytest.approx(3.0, rel=1e-2)
    costs = Costs(bytes_per_s=1e6)
    assert costs.seconds("load", "disk", 10**6) == pytest.approx(1.0)
    costs.add("load", "disk", 10**6, 0.5)
    assert costs.seconds("load", "disk", 2 * 10**6) == pytest.approx(1.0)
    assert costs.measured() == {"load disk": pytest.approx(2e6)}


# The worker.


class Memory:
    """Copies of units in this process; its moves can be made to fail, or to wait."""

    def __init__(self, rows: list[Unit]) -> None:
        self.copies = {(unit.id, tier) for unit in rows for tier in unit.copies}
        self.half_made: set[tuple[str, str]] = set()
        self.archived: list[str] = []
        self.compressed: list[str] = []
        self.fails: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        place = action.unit, str(action.target)
        self.half_made.add(place)
        self.entered.set()
        while not self.gate.wait(0.005):
            if cancelled():
                return
        if action.unit in self.fails:
            raise OSError("the disk is gone")
        self.half_made.discard(place)
        self.copies.add(place)

    def discard(self, unit: str, tier: str) -> None:
        self.half_made.discard((unit, tier))
        self.copies.discard((unit, tier))

    def archive(self, unit: str) -> None:
        self.archived.append(unit)

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        assert (action.unit, str(action.source)) in self.copies
        self.entered.set()
        while not self.gate.wait(0.005):
            if cancelled():
                return False
        if action.unit in self.fails:
            raise OSError("the disk is gone")
        self.compressed.append(action.unit)
        return True


def attached(rows: list[Unit], budgets: dict[str, int]) -> tuple[Scheduler, Memory, Worker]:
    scheduler = Scheduler(budgets, clock=lambda: NOW)
    for unit in rows:
        scheduler.put(unit)
    memory = Memory(rows)
    return scheduler, memory, scheduler.attach(memory)


@settings(max_examples=40, deadline=None)
@given(states(), st.data())
def test_what_a_worker_does_is_what_was_planned(rows: list[Unit], data: Any) -> None:
    sizes = used({unit.id: unit for unit in rows})
    budgets = {tier: sizes[tier] + data.draw(st.integers(0, 200)) for tier in TIERS}
    scheduler, memory, worker = attached(rows, budgets)
    memory.fails = data.draw(st.sets(st.sampled_from([u.id for u in rows]))) if rows else set()
    actions = scheduler.run()
    assert worker.wait(30)
    copies = {(u.id, tier) for u in scheduler._units.values() for tier in u.copies}
    assert memory.copies == copies, "the scheduler knows where everything is"
    assert not memory.half_made
    assert worker.ledger.used() == used(scheduler._units)
    assert all(worker.ledger.peaks[tier] <= budgets[tier] for tier in TIERS)
    for unit in rows:
        assert unit.rebuildable or any(id == unit.id for id, _ in memory.copies)
    assert sum(worker.counts.values()) == len(actions)
    before = {unit.id: unit for unit in rows}
    for id in memory.compressed:
        assert scheduler.unit(id).num_bytes == compressed(before[id]).num_bytes
        assert not scheduler.unit(id).compressed_bytes, "once"
    assert len(set(memory.compressed)) == len(memory.compressed)
    scheduler.close()


def test_a_half_done_move_leaves_the_unit_where_it_was() -> None:
    scheduler, memory, worker = attached([kv("a", "disk", 80.0)], PLENTY)
    memory.fails = {"a"}
    scheduler.run()
    assert worker.wait(30)
    assert memory.copies == {("a", "disk")}
    assert worker.ledger.used() == {"device": 0, "host": 0, "disk": 100}
    outcome = scheduler.last_actions()[0]
    assert (outcome.state, outcome.why) == (FAILED, "OSError: the disk is gone")
    memory.fails = set()
    assert scheduler.run() == [], "it rests a while"
    now = scheduler.clock() + 31.0
    scheduler.clock = lambda: now
    scheduler.run()
    assert worker.wait(30)
    assert memory.copies == {("a", "disk"), ("a", "device")}
    assert scheduler.explain("a")["action"]["kind"] == PROMOTE


def test_a_move_can_be_cancelled_and_requests_never_wait() -> None:
    scheduler, memory, worker = attached([kv("a", "disk", 80.0), kv("b", "disk", 70.0)], PLENTY)
    memory.gate.clear()
    scheduler.run()
    assert memory.entered.wait(30)
    assert worker.ledger.used()["device"] == 100, "reserved before it is there"
    with worker.using("a"):  # does not wait for the move
        assert worker.in_use() == {"a"}
    worker.cancel()
    assert worker.wait(30)
    assert memory.copies == {("a", "disk"), ("b", "disk")}
    assert not memory.half_made
    assert worker.counts == {CANCELLED: 2}
    assert worker.ledger.used() == {"device": 0, "host": 0, "disk": 200}
    scheduler.close()
    with pytest.raises(ArgumentError, match="closed"):
        worker.submit([])


def test_what_comes_into_use_while_it_moves_stays() -> None:
    rows = [kv("a", "device", 0.0, rebuildable=False)]
    memory = Memory(rows)
    worker = Worker(memory, Ledger(PLENTY, {"device": 100}), lambda unit, tier: 100)
    memory.gate.clear()
    worker.submit([Action(DEMOTE, "a", "device", "host", 100, "cold")])
    assert memory.entered.wait(30)
    with worker.using("a"):
        memory.gate.set()
        assert worker.wait(30)
    assert memory.copies == {("a", "device"), ("a", "host")}
    assert worker.outcomes()[0].state == SKIPPED
    worker.submit([Action(DROP, "a", "device", None, 100, "held twice")])
    assert worker.wait(30)
    assert memory.copies == {("a", "host")}
    assert worker.outcomes()[-1].state == DONE


def test_no_room_is_no_move() -> None:
    memory = Memory([kv("a", "disk")])
    worker = Worker(memory, Ledger({"device": 99, "disk": 100}, {"disk": 100}), lambda *_: 100)
    worker.submit([Action(PROMOTE, "a", "disk", "device", 100, "hot")])
    assert worker.wait(30)
    assert worker.outcomes()[0].state == SKIPPED
    assert memory.copies == {("a", "disk")}
    with pytest.raises(ArgumentError, match="at most the 0 bytes"):
        worker.ledger.give_back("device", 1)


def test_a_scheduler_learns_gaps_and_explains() -> None:
    clock = [NOW]
    scheduler = Scheduler(PLENTY, clock=lambda: clock[0])
    scheduler.put(kv("a", "disk"))
    for _ in range(4):
        clock[0] += 100.0
        scheduler.use("a")
    scheduler.use("nobody")
    unit = scheduler.unit("a")
    assert unit.next_use == pytest.approx(clock[0] + 100)
    assert 3.5 < unit.heat <= 4
    scheduler.measure("a", "access", "disk", 0.5)
    scheduler.measure("a", "rebuild", "", 3.0)
    assert scheduler.plan()[0].kind == PREFETCH
    found = scheduler.explain("a")
    assert found["access_s"]["disk"] == 0.5
    assert found["rebuild_s"] == 3.0
    assert "uses an hour" in found["words"]
    clock[0] += 1000.0
    assert scheduler.state().next_use[0] != scheduler.state().next_use[0], "overdue: nan"
    assert scheduler.hottest()[0][0] == "a"
    assert scheduler.stats()["tiers"]["disk"] == {"bytes": 100, "budget": 1000, "units": 1}
    with pytest.raises(ArgumentError, match="access at one of"):
        scheduler.measure("a", "access", "tape", 1.0)
    with pytest.raises(ArgumentError, match="attach"):
        scheduler.run()
    scheduler.remove("a")
    with pytest.raises(NotFoundError, match="no unit 'a'"):
        scheduler.explain("a")
