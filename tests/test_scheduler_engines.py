"""The policies inside the real engines: the block store, the adapter pool, a MOS."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from memos.adapters import policy as adapter_policies
from memos.errors import ArgumentError
from memos.kv import policy as kv_policies
from memos.kv.store import KVStore
from memos.mos import MOS
from memos.scheduler import Rules, Scheduler, Unit, install
from memos.scheduler.executors import AdapterExecutor
from memos.scheduler.worker import DONE, FAILED
from tests.store_help import SMALL, entries_for, payload_for

P = SMALL.block_tokens


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kv_policies, adapter_policies):
        monkeypatch.setattr(module, "POLICIES", dict(module.POLICIES))
    install()


@pytest.mark.parametrize("name", ["memos", "lfu"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_store_evicts_as_the_policy_says(name: str, on_disk: bool, tmp_path: Path) -> None:
    clock = [1e9]
    rng = random.Random(0)
    quota = {"host_bytes": 1 << 15, "disk_bytes": 1 << 16}
    with KVStore(
        tmp_path / "kv" if on_disk else None, policy=name, clock=lambda: clock[0], **quota
    ) as store:
        tenant = store.tenant("ada")
        chats: list[list[int]] = []
        hits = 0
        for turn in range(120):
            clock[0] += 10.0
            if not chats or rng.random() < 0.3:
                chats.append([len(chats)] * P)
            chat = rng.choice(chats[-6:])
            entries = [e for e in entries_for(tenant, chat) if not e.tail]
            keys = [entry.key for entry in entries]
            found = tenant.get(keys, SMALL, chat)
            hits += len(found)
            for key, payload in zip(keys, found, strict=False):
                assert bytes(payload) == payload_for(key, len(payload))
            tenant.put(entries, SMALL)
            assert tenant.contains(keys) == len(keys), "what was just put is there"
            chat += [turn] * P
            stats = store.stats()
            assert stats["host"]["bytes"] <= quota["host_bytes"]
            if on_disk:
                assert stats["disk"]["bytes"] <= quota["disk_bytes"]
            for c in chats:  # a block is there only with all before it
                ids = [e.key for e in entries_for(tenant, c) if not e.tail]
                first = tenant.contains(ids)
                assert not any(tenant.contains([key]) for key in ids[first:])
        assert hits > 100


def test_a_pool_evicts_as_the_policy_says_and_a_worker_moves_adapters() -> None:
    pytest.importorskip("torch", reason="adapters are torch tensors")
    from tests.test_adapter_pool import make, pool_of

    pool, source, names = pool_of([make(i) for i in range(4)], room=2, policy="memos")
    for name in (*names, names[0]):
        with pool.using([name]):
            pass
    assert pool.stats()["evictions"] >= 2
    for name in names:
        pool.drop(name)
    size = source.num_bytes(names[0])
    clock = [100.0]
    budgets = {"device": 2 * size, "disk": 10 * size}
    scheduler = Scheduler(budgets, rules=Rules(horizon_s=60.0), clock=lambda: clock[0])
    for name in names:
        scheduler.put(
            Unit(
                name,
                "adapter",
                num_bytes={"device": size, "disk": size},
                copies=frozenset(["disk"]),
                access_s={"device": 0.0, "disk": 1.0},
            )
        )
    worker = scheduler.attach(AdapterExecutor(pool))
    for _ in range(200):
        scheduler.use(names[1])
        scheduler.use(names[2])
    scheduler.run()
    assert worker.wait(30)
    assert pool.stats()["device"]["adapters"] == 2
    assert {u for u in names if "device" in scheduler.unit(u).copies} == {names[1], names[2]}
    clock[0] += 1e6
    for _ in range(200):
        scheduler.use(names[0])
    with pool.using([names[1]]):  # the pool itself keeps what a request uses
        scheduler.run()
        assert worker.wait(30)
    states = {outcome.state for outcome in worker.outcomes()}
    assert DONE in states
    assert states <= {DONE, FAILED, "skipped"}
    assert pool.stats()["device"]["bytes"] <= budgets["device"]
    scheduler.run()
    assert worker.wait(30)
    assert "device" in scheduler.unit(names[0]).copies
    scheduler.close()
    pool.close()


def test_a_mos_has_budgets_and_associations() -> None:
    from memos import GeneralTextMemory

    mos: Any = MOS()
    with pytest.raises(ArgumentError, match="budgets wanted first"):
        _ = mos.scheduler
    scheduler = mos.schedule({"device": 100}, every_s=None)
    assert mos.scheduler is scheduler
    mos.register_memory(GeneralTextMemory("notes"))
    cubes = [mos.add("notes", text) for text in ("tea", "kettle", "moon")]
    mos._associate(cubes[:2])
    mos._associate(cubes[:2])
    mos.hebbian.write()
    [edge] = mos.associations(cubes[0].id)
    assert (edge["id"], edge["memory"], edge["count"]) == (cubes[1].id, "notes", 2)
    assert edge["weight"] == pytest.approx(0.36, abs=1e-3)
    assert mos.associations(cubes[2].id) == []
    assert len(mos.history(cubes[0].id)) == 1, "no new version"
    mos.close()
