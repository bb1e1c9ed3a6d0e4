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


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_cold_sessions_become_smaller_and_are_not_dropped(
    tier: str, model: Any, tmp_path: Path
) -> None:
    """Ten sessions in the bytes of eight: all their tokens are reused, and the budget holds."""
    text: dict[int, list[int]] = {}
    reused, sessions = {}, 10
    path = tmp_path / "kv" if tier == "disk" else None
    with KVCacheMemory("chat", model=model, **{**OPTIONS, "cold_codec": None}) as plain:
        talk(plain, model, 0, {})
        one = plain.store.held()["host"]
    if tier == "disk":
        with KVCacheMemory("chat", model=model, path=tmp_path / "one", **OPTIONS) as plain:
            talk(plain, model, 0, {})
            one = plain.store.held()["disk"]
    budget = 8 * one
    for cold in (None, OPTIONS["cold_codec"]):
        clock, text = Clock(), {}
        where = path and path / str(cold)
        memory = KVCacheMemory(
            "chat", model=model, path=where, clock=clock, **{**OPTIONS, "cold_codec": cold}
        )
        mos = MOS(clock=clock)
        mos.register_memory(memory)
        scheduler = mos.schedule({"host": 1 << 24, tier: budget}, every_s=None, tune=False)

        def held(memory: KVCacheMemory = memory) -> int:
            return int(memory.store.held()[tier])

        for i in range(sessions):
            talk(memory, model, i, text)
            clock.now += 60
            stepped(mos, held, budget)
        kinds = {o.action.kind for o in scheduler.last_actions(100) if o.state == "done"}
        assert (COMPRESS in kinds) == (cold is not None)
        reused[cold] = 0
        for i in range(sessions):
            reused[cold] += talk(memory, model, i, text)
            clock.now += 60
            stepped(mos, held, budget)
        if cold is not None:
            stats = mos.stats()["scheduler"]
            assert stats["memories"]["chat"]["compressed"] >= 5
            assert stats["costs"][f"compress {tier}"] > 0
            names = [i for i in range(sessions) if is_cold(memory, f"s{i}")]
            unit = scheduler.unit(f"chat/s{names[0]}")
            assert not unit.compressed_bytes
            assert tier in unit.copies
        assert memory.store.stats()[tier]["quota_bytes"] <= budget
        mos.close()
        memory.close()
    # All that was stored: a turn ends with a token whose K and V nobody has computed yet.
    assert reused[OPTIONS["cold_codec"]] == sessions * 105
    assert reused[None] < 0.7 * sessions * 105


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
