"""Units that are compressed before they are dropped: in the plan, by the worker, in a MOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memos import MOS, KVCacheMemory
from memos.errors import ArgumentError
from memos.scheduler import Rules
from memos.scheduler.plan import COMPRESS, DROP, Action, plan
from memos.scheduler.units import State
from memos.scheduler.worker import SKIPPED

from .test_scheduler_plan import NOW, TIERS, attached, kinds, kv

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from .compress_help import dense, once_more, same  # noqa: E402
from .models import build  # noqa: E402
from .test_scheduler_mos import Clock  # noqa: E402


def test_what_would_be_dropped_is_compressed_where_that_pays() -> None:
    budgets = {"device": 0, "host": 0, "disk": 400}
    small = {"num_bytes": dict.fromkeys(TIERS, 100), "compressed_bytes": dict.fromkeys(TIERS, 40)}
    rows = [kv("cold", "disk", 1.0, **small), kv("dead", "disk", 0.0, **small)]
    rows += [kv("warm", "disk", 9.0), kv("new", None, 90.0, num_bytes={"disk": 240})]
    found = kinds(rows, budgets, compress_above=1.0)
    assert set(found) == {"dead", "cold", "new"}
    actions = plan(State.of(rows, TIERS), budgets, NOW)
    assert [a.unit for a in actions].count("cold") == 1, "once"
    assert found["dead"].kind == DROP, "for nothing it takes no room"
    assert (found["cold"].kind, found["cold"].source, found["cold"].target) == (
        COMPRESS, "disk", "disk"
    )  # fmt: skip
    assert found["cold"].num_bytes == 40
    assert (
        "instead of dropping it, it takes 40 bytes in disk instead of 100" in found["cold"].reason
    )
    found = kinds(rows[:2], {"device": 0, "host": 0, "disk": 199}, compress_above=1.0)
    assert [action.kind for action in found.values()] == [DROP, COMPRESS], "then there is room"
    found = kinds(rows[:1], {"device": 0, "host": 0, "disk": 99}, compress_above=1.0)
    assert [action.kind for action in found.values()] == [DROP], "there is none for both"


def test_a_tier_that_is_nearly_full_is_compressed_before_it_is() -> None:
    small = {"compressed_bytes": dict.fromkeys(TIERS, 40)}
    rows = [
        kv("hot", "disk", 90.0, copies=frozenset(["host", "disk"]), **small),
        kv("warm", "disk", 2.0, copies=frozenset(["host", "disk"]), **small),
        kv("cold", "disk", 1.0, **small),
        kv("done", "disk", 0.5),
        kv("pinned", "disk", 0.1, pinned=True, **small),
        kv("open", "disk", 0.1, in_use=True, **small),
        kv("larger", "disk", 0.1, compressed_bytes={"disk": 120}),
    ]
    budgets = {"device": 0, "host": 1000, "disk": 800}
    state = State.of(rows, TIERS)
    actions = plan(state, budgets, NOW)
    assert [(a.kind, a.unit, a.source) for a in actions if a.unit != "done"] == [
        (COMPRESS, "cold", "disk")
    ], "that is enough"
    assert "700 of 800 bytes in disk are taken or wanted" in actions[0].reason
    actions = plan(state, {**budgets, "disk": 750}, NOW)
    assert [(a.kind, a.unit, a.source) for a in actions if a.source != "host"][:2] == [
        (COMPRESS, "cold", "disk"), (COMPRESS, "warm", "disk")
    ]  # fmt: skip
    assert (DROP, "warm", "host") in [(a.kind, a.unit, a.source) for a in actions]
    assert not [a for a in plan(state, {**budgets, "disk": 900}, NOW) if a.kind == COMPRESS]


def test_what_is_worth_less_makes_room_for_the_compression_of_what_is_worth_more() -> None:
    rows = [
        kv("old", "disk", 0.5, num_bytes={"disk": 40}, buildable=False),
        kv("older", "disk", 0.1, num_bytes={"disk": 40}, buildable=False),
        kv("text", "disk", 0.1, num_bytes={"disk": 40}),
        kv("new", "disk", 5.0, compressed_bytes={"disk": 40}),
    ]
    budgets = {"device": 0, "host": 0, "disk": 250}
    actions = plan(State.of(rows, TIERS), budgets, NOW)
    assert [(a.kind, a.unit) for a in actions] == [(DROP, "older"), (COMPRESS, "new")]
    assert "less than those of new, which is compressed" in actions[0].reason
    cold = [*rows[:3], kv("new", "disk", 0.01, compressed_bytes={"disk": 40})]
    assert plan(State.of(cold, TIERS), budgets, NOW) == []


def test_a_unit_is_compressed_or_as_it_was() -> None:
    rows = [kv("a", "disk", 1.0, compressed_bytes={"disk": 40})]
    scheduler, memory, worker = attached(rows, {"device": 0, "host": 0, "disk": 140})
    scheduler.rules = Rules(compress_above=0.5)
    words = scheduler.explain("a")
    assert words["compressed_bytes"] == {"disk": 40}
    assert "40 bytes instead of 100 once compressed" in words["words"]
    memory.gate.clear()
    scheduler.run()
    assert memory.entered.wait(30)
    assert worker.ledger.used()["disk"] == 140, "both copies, for a moment"
    worker.cancel()
    assert worker.wait(30)
    assert worker.ledger.used()["disk"] == 100
    assert scheduler.unit("a") == rows[0]
    memory.gate.set()
    memory.fails = {"a"}
    scheduler.run()
    assert worker.wait(30)
    assert worker.ledger.used()["disk"] == 100
    assert scheduler.unit("a") == rows[0]
    memory.fails = set()
    scheduler.clock = lambda: NOW + 31.0
    with worker.using("a"):
        worker.submit([Action(COMPRESS, "a", "disk", "disk", 40, "cold")])
        assert worker.wait(30)
    assert worker.outcomes()[-1].state == SKIPPED
    worker.submit([Action(COMPRESS, "a", "disk", "disk", 41, "cold")])
    assert worker.wait(30)
    assert (worker.outcomes()[-1].state, memory.compressed) == (SKIPPED, []), "no room for both"
    scheduler.run()
    assert worker.wait(30)
    assert memory.compressed == ["a"]
    assert worker.ledger.used() == {"device": 0, "host": 0, "disk": 40}
    assert worker.ledger.peaks["disk"] == 140
    assert scheduler.unit("a").num_bytes["disk"] == 40
    assert scheduler.run() == []
    assert scheduler.explain("a")["action"]["kind"] == COMPRESS
    assert "compress disk" in scheduler.stats()["costs"]
    scheduler.close()


# A MOS.

P = 16
OPTIONS: dict[str, Any] = {"codec": "int8-g32", "cold_codec": "int2-g32", "block_tokens": P}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", dtype=torch.bfloat16, head_dim=32, max_position_embeddings=1024)


def ids_of(session: int, tokens: int = 100) -> list[int]:
    return torch.randint(
        0, 90, (tokens,), generator=torch.Generator().manual_seed(session)
    ).tolist()


def talk(memory: KVCacheMemory, model: Any, session: int, text: dict[int, list[int]]) -> int:
    ids = [*text.get(session, ids_of(session)), 3, 4]
    turn = memory.begin(f"s{session}", ids)
    output = model.generate(**turn.inputs, max_new_tokens=4, do_sample=False)
    turn.commit(output)
    text[session] = output[0].tolist()
    return int(turn.reused_tokens)


def stepped(mos: MOS, held: Any, budget: int) -> None:
    scheduler = mos.scheduler
    scheduler.step()
    while not scheduler.worker.wait(0.001):
        assert held() <= budget
    assert held() <= budget
    scheduler.refresh()


def talked(
    tier: str, cold: str | None, share: int, model: Any, folder: Path
) -> tuple[int, dict[str, Any]]:
    """Ten sessions in the bytes of ``share`` of them, each in two turns: the tokens that the second
    turns reuse, and what is known of the memory then. The budget holds at every look."""
    text: dict[int, list[int]] = {}
    path = folder / str(cold) if tier == "disk" else None
    with KVCacheMemory("chat", model=model, path=path and folder / "one", **OPTIONS) as one:
        talk(one, model, 0, {})
        budget = share * one.store.held()[tier]
    clock, options = Clock(), {**OPTIONS, "cold_codec": cold}
    mos, memory = (
        MOS(clock=clock),
        KVCacheMemory("chat", model=model, path=path, clock=clock, **options),
    )
    mos.register_memory(memory)
    mos.schedule({"host": 1 << 24, tier: budget}, every_s=None, tune=False)

    def held() -> int:
        return int(memory.store.held()[tier])

    reused = 0
    for i in [*range(10), *reversed(range(10))]:
        reused += talk(memory, model, i, text)
        assert held() <= budget
        clock.now += 60
        stepped(mos, held, budget)
    assert memory.store.stats()[tier]["quota_bytes"] <= budget
    done = {o.action.kind for o in mos.scheduler.last_actions(200) if o.state == "done"}
    assert (COMPRESS in done) == (cold is not None)
    for i in range(10):
        if cold is not None and is_cold(memory, f"s{i}"):
            assert not mos.scheduler.unit(f"chat/s{i}").compressed_bytes, "once"
    stats = mos.stats()["scheduler"]
    mos.close()
    memory.close()
    return reused, stats


ALL = 10 * 105  # a turn ends with a token whose K and V nobody has computed yet


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_cold_sessions_become_smaller_and_are_not_dropped(
    tier: str, model: Any, tmp_path: Path
) -> None:
    plain, _ = talked(tier, None, 8, model, tmp_path / "8")
    ours, stats = talked(tier, OPTIONS["cold_codec"], 8, model, tmp_path / "8")
    assert plain < ours == ALL
    assert stats["memories"]["chat"]["compressed"] >= 5
    assert stats["costs"][f"compress {tier}"] > 0


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_more_than_fits_even_then(tier: str, model: Any, tmp_path: Path) -> None:
    """The engine evicts all the time, and what stands there of no whole session is room."""
    plain, _ = talked(tier, None, 3, model, tmp_path / "3")
    ours, stats = talked(tier, OPTIONS["cold_codec"], 3, model, tmp_path / "3")
    assert plain < ours < ALL
    assert stats["memories"]["chat"]["compressed"] >= 3


def is_cold(memory: KVCacheMemory, session: str) -> bool:
    found = memory.tenant.session(session)
    return found is not None and found.identity == memory.cold_identity.digest


def test_what_may_not_be_compressed(model: Any) -> None:
    """Pinned sessions, those in a turn, and those whose blocks others use."""
    clock = Clock()
    memory = KVCacheMemory("chat", model=model, clock=clock, **OPTIONS)
    mos = MOS(clock=clock)
    mos.register_memory(memory)
    text: dict[int, list[int]] = {}
    for i in range(4):
        talk(memory, model, i, text)
    shared = memory.begin("s4", [*text[3], 5])  # the same, and a little more
    shared.commit()
    memory.pin("s0")
    budget = memory.store.held()["host"] * 5 // 4
    scheduler = mos.schedule({"host": budget}, every_s=None, rules=Rules(compress_above=0.1))
    turn = memory.begin("s1", [*text[1], 5])
    scheduler.refresh()
    offered = {i for i in range(5) if scheduler.unit(f"chat/s{i}").compressed_bytes}
    assert offered == {2}
    source = scheduler._router.source("chat/s1")
    for name, why in (("s1", "a turn uses it"), ("s0", "pinned")):
        with pytest.raises(ArgumentError, match=why):
            source.compress(Action(COMPRESS, f"chat/{name}", "host", "host", 1, ""), lambda: False)
    before = dense(memory.get("s2").content)
    scheduler.step()
    assert scheduler.worker.wait(30)
    assert [i for i in range(5) if is_cold(memory, f"s{i}")] == [2]
    wanted = once_more(before, "int2-g32", P, memory.identity.sink_tokens)
    assert same(dense(memory.get("s2").content), wanted)
    turn.commit()
    mos.close()
    memory.close()
