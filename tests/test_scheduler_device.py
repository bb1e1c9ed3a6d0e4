"""The device tier of KV in the scheduler, with pools on the CPU: real sessions, real moves."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, KVCacheMemory
from memos.errors import ArgumentError, StoreError
from memos.scheduler import State, Unit, plan
from memos.scheduler.plan import DROP, PROMOTE, Action
from memos.scheduler.sources_device import DEVICE

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .test_scheduler_mos import Clock, model, talk  # noqa: E402, F401

BIG = 1 << 24


@pytest.fixture
def kv(model: Any, tmp_path: Path) -> Iterator[KVCacheMemory]:  # noqa: F811
    path = tmp_path / "kv"
    with KVCacheMemory(
        "chat", model=model, path=path, block_tokens=16, codec="int4", device_bytes=BIG
    ) as memory:
        yield memory


def block(memory: KVCacheMemory) -> int:
    return memory.identity.block_bytes()


def moved(scheduler: Any, *actions: Action) -> list[str]:
    """Carry these out; what became of them."""
    scheduler.worker.submit(actions)
    assert scheduler.worker.wait(30)
    scheduler._router.look_again()
    scheduler.refresh()
    return [outcome.state for outcome in scheduler.last_actions(len(actions))][::-1]


def same_as_stored(memory: KVCacheMemory) -> None:
    """Every block on the device is what the store has under its key."""
    pool, identity = memory.pools.pool, memory.identity
    assert pool is not None
    for key in pool.held_keys():
        [payload] = memory.tenant.get([key], identity)
        here = pool._blocks[key].view(-1)
        assert bytes(payload[: identity.block_bytes()]) == bytes(here.numpy())


def test_sessions_come_to_the_device_and_leave(model: Any, kv: KVCacheMemory) -> None:  # noqa: F811
    mos = MOS()
    mos.register_memory(kv)
    for name in ("one", "two"):
        talk(kv, model, name)  # 70 and 4 tokens: four blocks of 16 and a tail
    scheduler = mos.schedule({"device": 8 * block(kv), "host": BIG}, every_s=None)
    scheduler.refresh()
    assert scheduler.unit("chat/one").copies == {"host", "disk"}
    assert scheduler.unit("chat/one").num_bytes["device"] == 4 * block(kv)
    promote = Action(PROMOTE, "chat/one", "host", DEVICE, 4 * block(kv), "")
    assert moved(scheduler, promote) == ["done"]
    assert scheduler.unit("chat/one").copies == {"device", "host", "disk"}
    assert scheduler.stats()["tiers"]["device"]["bytes"] == kv.pools.held() == 4 * block(kv)
    same_as_stored(kv)
    ids = kv.tenant.session("one").token_ids  # type: ignore[union-attr]
    before = scheduler._router.source("chat/one")._access[DEVICE].count
    turn = kv.begin("one", [*ids, 5])
    assert turn.from_device
    assert scheduler._router.source("chat/one")._access[DEVICE].count == before + 1
    assert kv.pools.stats()["hits"] == 4
    with pytest.raises(ArgumentError, match="a turn uses it"):
        scheduler._router.discard("chat/one", DEVICE)
    turn.commit(model.generate(**turn.inputs, max_new_tokens=2, do_sample=False))
    drop = Action(DROP, "chat/one", DEVICE, None, 4 * block(kv), "")
    assert moved(scheduler, drop) == ["done"]
    assert kv.pools.held() == 0
    assert scheduler.unit("chat/one").copies == {"host", "disk"}
    # What two sessions share counts half for each, and stays when one of them leaves.
    ids = [(3 * i) % 97 for i in range(40)]
    for name in ("three", "four"):
        turn = kv.begin(name, [*ids, *[len(name)] * 12])
        turn.commit(model.generate(**turn.inputs, max_new_tokens=2, do_sample=False))
    scheduler.refresh()
    kv.pools.pool.drop(kv.pools.pool.held_keys())  # type: ignore[union-attr]
    moves = [Action(PROMOTE, f"chat/{n}", "host", DEVICE, 1, "") for n in ("three", "four")]
    assert moved(scheduler, *moves) == ["done", "done"]
    assert scheduler.unit("chat/three").num_bytes["device"] == 2 * block(kv)
    assert kv.pools.held() == 4 * block(kv)
    assert moved(scheduler, Action(DROP, "chat/three", DEVICE, None, 1, "")) == ["done"]
    assert kv.pools.held() == 3 * block(kv)
    assert DEVICE in scheduler.unit("chat/four").copies
    mos.close()


def test_what_the_store_forgot_is_wiped(model: Any, kv: KVCacheMemory) -> None:  # noqa: F811
    mos = MOS()
    mos.register_memory(kv)
    scheduler = mos.schedule({"device": 9 * block(kv), "host": BIG}, every_s=None)
    for name in ("one", "two"):
        talk(kv, model, name)
    scheduler.refresh()
    moves = [Action(PROMOTE, f"chat/{n}", "host", DEVICE, 1, "") for n in ("one", "two")]
    assert moved(scheduler, *moves) == ["done", "done"]
    pool = kv.pools.pool
    assert pool is not None
    stood = dict(pool._blocks)
    kv.delete("one")
    scheduler.step()
    assert len(pool) == 4
    assert not any(stood[key].any() for key in stood.keys() - pool._blocks.keys())
    # Its last copy in the store goes: that on the device was read through it.
    scheduler._router.discard("chat/two", "disk")
    assert len(pool) == 0
    scheduler.refresh()
    assert scheduler.unit("chat/two").copies == frozenset()
    with pytest.raises(StoreError, match="does not have all"):
        scheduler._router.source("chat/two").copy(moves[1], lambda: False)
    assert kv.begin("two", [(7 * i) % 97 for i in range(70)]).reused_tokens == 0
    mos.close()


def test_budgets_reach_the_pool(model: Any, tmp_path: Path) -> None:  # noqa: F811
    """Two memories share a device; without a budget for it nothing changes."""
    options = {"model": model, "block_tokens": 16, "codec": "raw"}
    with (
        KVCacheMemory("a", device_bytes=1 << 22, **options) as a,
        KVCacheMemory("b", device_bytes=1 << 22, **options) as b,
        KVCacheMemory("c", **options) as c,
    ):
        mos = MOS()
        for memory in (a, b, c):
            mos.register_memory(memory)
            for _ in range(2):
                talk(memory, model, "first")
        assert a.pools.held() == b.pools.held() == 4 * block(a)
        assert c.pools.pool is None
        scheduler = mos.schedule({"host": BIG}, every_s=None)
        scheduler.step()
        assert (a.pools.held(), a.pools.budget_bytes) == (4 * block(a), 1 << 22)
        budget = 6 * block(a)
        scheduler = mos.schedule({"device": budget, "host": BIG}, every_s=None)
        assert a.pools.held() + b.pools.held() <= budget
        assert sum(scheduler.quotas("device").values()) <= budget
        for _ in range(3):
            for memory in (a, b, c):
                assert talk(memory, model, "second") in (0, 64, 69)
                assert a.pools.held() + b.pools.held() <= budget
        assert c.pools.pool is None, "a model on the CPU wants no copy beside the host's"
        scheduler = mos.schedule({"device": block(a) - 1, "host": BIG}, every_s=None)
        assert a.pools.held() == b.pools.held() == 0
        assert talk(a, model, "second") >= 64
        assert a.pools.held() == 0
        mos.close()


def test_turns_in_threads_while_the_scheduler_moves(model: Any, tmp_path: Path) -> None:  # noqa: F811
    memories = [
        KVCacheMemory(n, model=model, path=tmp_path / n, block_tokens=16, device_bytes=1)
        for n in ("a", "b")
    ]
    budget = 9 * block(memories[0])
    mos = MOS()
    sums: list[int] = []

    def watched(memory: KVCacheMemory, sets: Callable[[int], None]) -> Callable[[int], None]:
        def set_budget(num_bytes: int) -> None:  # never two at once: shares are divided in turn
            sets(num_bytes)
            assert memory.pools.held() <= num_bytes
            sums.append(sum(other.pools.budget_bytes for other in memories))

        return set_budget

    for memory in memories:
        mos.register_memory(memory)
        memory.pools.set_budget(0)
        memory.pools.set_budget = watched(memory, memory.pools.set_budget)  # type: ignore[method-assign]
    scheduler = mos.schedule({"device": budget, "host": BIG}, every_s=0.005)
    stop, wrong = threading.Event(), []
    first: dict[tuple[str, str], Any] = {}
    lock = threading.Lock()

    def moves(seed: int) -> None:
        g = random.Random(seed)
        while not stop.is_set():
            memory = g.choice(memories)
            unit = f"{memory.name}/s{g.randrange(6)}"
            scheduler.use(unit)
            if g.random() < 0.2:
                scheduler._router.shares.divide("device")

    def turns(seed: int) -> None:
        g = random.Random(seed)
        for _ in range(25):
            memory, i = g.choice(memories), g.randrange(6)
            ids = [(7 * j + i * 13) % 97 for j in range(60)]
            turn = memory.begin(f"s{i}", ids)
            out = model.generate(**turn.inputs, max_new_tokens=3, do_sample=False)
            if g.random() < 0.1 and memory.has(f"s{i}"):
                memory.delete(f"s{i}")
            else:
                turn.commit(out)
            with lock:
                known = first.setdefault((memory.name, f"{i} {turn.reused_tokens > 0}"), out)
            if not torch.equal(known, out):
                wrong.append(i)

    others = [threading.Thread(target=moves, args=(7,))]
    users = [threading.Thread(target=turns, args=(seed,)) for seed in (1, 2, 3)]
    for thread in [*others, *users]:
        thread.start()
    for thread in users:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    mos.close()
    assert max(sums) <= budget
    assert len(sums) > 10
    assert not wrong
    for memory in memories:
        if memory.pools.pool is not None:
            assert memory.pools.stats()["peak_bytes"] <= budget
            memory.pools.pool.drop_unless(lambda k, t=memory.tenant: t.contains([k]) == 1)
            same_as_stored(memory)
        memory.close()
    assert sum(m.pools.stats().get("loads", 0) for m in memories) > 0


def test_a_copy_that_is_read_through_another_takes_nothing_from_it() -> None:
    """The store's copy of a hot session in memory is not the first to go."""
    sizes, access = {"device": 10, "host": 10}, {"device": 0.1, "host": 0.2}
    hot, cold = (
        Unit(
            name, num_bytes=sizes, access_s=access, heat=heat, rebuildable=True, rebuild_s=9.0,
            copies=frozenset(copies), last=0.0, mirror=DEVICE,
        )
        for name, heat, copies in (("hot", 50.0, ["device", "host"]), ("cold", 2.0, ["host"]))
    )  # fmt: skip
    state = State.of([hot, cold], ["device", "host"])
    [drop] = plan(state, {"device": 10, "host": 15}, 0.0)
    assert (drop.unit, drop.source) == ("cold", "host")
