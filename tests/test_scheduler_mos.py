"""The scheduler of a MOS: real memories, their bytes under one budget, moves that really happen."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, KVCacheMemory
from memos.errors import ArgumentError, QuotaError
from memos.scheduler import Rules
from memos.scheduler.sources import Engine, Shares
from memos.scheduler.tuning import Tuner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def kv(model: Any, tmp_path: Path) -> Iterator[KVCacheMemory]:
    memory = KVCacheMemory("chat", model=model, path=tmp_path / "kv", block_tokens=16, codec="raw")
    yield memory
    memory.close()


def talk(memory: KVCacheMemory, model: Any, session: str, tokens: int = 70) -> int:
    ids = [(7 * i + len(session) * 13 + sum(map(ord, session))) % 97 for i in range(tokens)]
    turn = memory.begin(session, ids)
    turn.commit(model.generate(**turn.inputs, max_new_tokens=4, do_sample=False))
    return int(turn.reused_tokens)


def host(memory: KVCacheMemory) -> int:
    return int(memory.store.stats()["host"]["bytes"])


def test_sessions_are_units_and_move(model: Any, kv: KVCacheMemory) -> None:
    clock = Clock()
    mos = MOS(clock=clock)
    mos.register_memory(kv)
    scheduler = mos.schedule({"host": 1 << 24}, every_s=None)
    names = [f"s{i}" for i in range(6)]
    for name in names:
        talk(kv, model, name)
        clock.now += 1
    scheduler.refresh()
    assert len(scheduler) == 6
    one = scheduler.unit("chat/s0")
    assert one.copies == {"host", "disk"}
    assert one.heat > 0
    assert one.rebuild_s > 0
    assert not one.in_use
    # A third of what they take now: the engine gives up the rest at once.
    budget = host(kv) // 3
    scheduler = mos.schedule({"host": budget}, every_s=None)
    assert host(kv) <= budget
    assert kv.store.stats()["host"]["quota_bytes"] <= budget
    scheduler.step()
    assert scheduler.worker is not None
    assert scheduler.worker.wait(30)
    scheduler.refresh()
    cold = next(n for n in names if "host" not in scheduler.unit(f"chat/{n}").copies)
    assert "disk" in scheduler.unit(f"chat/{cold}").copies
    # What is used again and again comes back to memory by itself.
    for _ in range(20):
        scheduler.use(f"chat/{cold}")
        clock.now += 1
    scheduler.use(f"chat/{cold}")
    for _ in range(4):
        scheduler.step()
        assert scheduler.worker.wait(30)
        assert host(kv) <= budget
    scheduler.refresh()
    assert "host" in scheduler.unit(f"chat/{cold}").copies
    assert talk(kv, model, cold) > 0
    words = scheduler.explain(f"chat/{cold}")["words"]
    assert "uses an hour" in words
    stats = mos.stats()["scheduler"]
    assert stats["tiers"]["host"]["budget"] == budget
    assert stats["worker"]["done"] >= 1
    mos.close()
    assert kv.meter is None


def test_the_budget_holds_at_every_moment(model: Any, tmp_path: Path) -> None:
    """Two memories write while moves run: their tiers together never hold more."""
    memories = [
        KVCacheMemory(n, model=model, path=tmp_path / n, block_tokens=16, codec="raw")
        for n in ("a", "b")
    ]
    mos = MOS()
    for memory in memories:
        mos.register_memory(memory)
    talk(memories[0], model, "first")
    budget = 5 * host(memories[0])
    scheduler = mos.schedule({"host": budget}, every_s=0.01)
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            quotas = scheduler.quotas("host")
            assert sum(quotas.values()) <= budget
            seen.append(sum(m.store.stats()["host"]["quota_bytes"] for m in memories))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(24):
        talk(memories[(i // 6) % 2], model, f"s{i % 9}")
        assert sum(map(host, memories)) <= budget
    stop.set()
    watcher.join()
    mos.close()
    assert sum(m.store.stats()["host"]["quota_bytes"] for m in memories) <= budget
    for memory in memories:
        assert memory.store.stats()["host"]["peak_bytes"] <= budget
        memory.close()


def test_pinned_sessions_stay(model: Any, kv: KVCacheMemory) -> None:
    mos = MOS()
    mos.register_memory(kv)
    talk(kv, model, "kept")
    kv.pin("kept")
    scheduler = mos.schedule({"host": 1 << 24, "disk": 1 << 24}, every_s=None)
    scheduler.refresh()
    assert scheduler.unit("chat/kept").pinned
    with pytest.raises(QuotaError, match="pinned"):
        kv.store.set_quotas(disk_bytes=10)
    with pytest.raises(ArgumentError, match="pinned"):
        kv.tenant.leave("kept", "disk")
    assert scheduler.plan() == []
    mos.close()


def test_a_turn_in_progress_keeps_its_session(model: Any, kv: KVCacheMemory) -> None:
    clock = Clock()
    mos = MOS(clock=clock)
    mos.register_memory(kv)
    talk(kv, model, "open")
    scheduler = mos.schedule({"host": 1 << 24}, every_s=None)
    turn = kv.begin("open", list(range(80)))
    scheduler.refresh()
    assert scheduler.unit("chat/open").in_use
    clock.now += 601  # it was given up
    scheduler.refresh()
    assert not scheduler.unit("chat/open").in_use
    turn.commit()
    mos.close()


class Made:
    """Activates and learns by noting that it did."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def cost(self, what: Any) -> tuple[int, float]:
        return 1000, 2.0

    def activate(self, memory: str, id: str, cancelled: Callable[[], bool]) -> None:
        self.done.append((memory, id))

    def deactivate(self, memory: str, id: str) -> None:
        self.done.remove((memory, id))

    def consolidate(self, memory: str, ids: Sequence[str], cancelled: Callable[[], bool]) -> None:
        self.done.append((memory, tuple(ids)))


def test_hot_texts_are_activated_and_learnt() -> None:
    clock = Clock()
    mos = MOS(clock=clock)
    mos.register_memory(GeneralTextMemory("notes", clock=clock))
    cubes = [mos.add("notes", f"the {word} is on the shelf") for word in "abcdefghijk"]
    made, learnt = Made(), Made()
    scheduler = mos.schedule(
        {"host": 1500}, every_s=None, activator=made, consolidator=learnt, tune=False
    )
    hot = cubes[3]
    for _ in range(25):
        clock.now += 5
        mos.use(hot)
    scheduler.step()
    assert scheduler.worker is not None
    assert scheduler.worker.wait(10)
    assert made.done == [("notes", hot.id)], "one fits"
    assert learnt.done == [], "one hot text is no reason to learn"
    assert "host" in scheduler.unit(f"notes/{hot.id} kv").copies
    for _ in range(25):
        clock.now += 5
        mos.use(*cubes)
    scheduler.step()
    assert scheduler.worker.wait(10)
    assert learnt.done == [("notes", tuple(sorted(cube.id for cube in cubes)))]
    assert len(made.done) == 1
    mos.close()


def test_the_kv_of_hot_texts_is_that_of_contexts(tmp_path: Path) -> None:
    from .test_activation import kv_memory

    clock = Clock()
    with MOS(tmp_path / "m", clock=clock) as mos, kv_memory(tmp_path / "kv") as kv:
        mos.register_memory(GeneralTextMemory("notes", embedder=None, clock=clock))
        mos.register_memory(kv)
        hot = mos.add("notes", "The boiler in the cellar is serviced by Weber every autumn.")
        cold = mos.add("notes", "The cat eats twice a day, at seven and at six.")
        scheduler = mos.schedule({"host": 1 << 24}, every_s=None, activator="kv", tune=False)
        mos.use(cold)
        for _ in range(200):
            clock.now += 1
            mos.use(hot)
        scheduler.step()
        assert scheduler.worker is not None
        assert scheduler.worker.wait(30)
        assert ("notes", hot.id) in kv.activated()
        context = mos.context("who services the boiler", as_kv=True, share=0.0)
        assert hot.id not in context.prefilled
        clock.now += 30 * 86400
        scheduler.remove_source("notes")


def test_cold_texts_are_archived() -> None:
    clock = Clock()
    mos = MOS(clock=clock)
    mos.register_memory(GeneralTextMemory("notes", clock=clock))
    cold, hot = (mos.add("notes", text) for text in ("an old bill", "the address"))
    rules = Rules(archive_rate=1 / 86400)
    scheduler = mos.schedule({"host": 1000}, every_s=None, rules=rules, tune=False)
    mos.use(cold, hot)
    clock.now += 2 * 86400
    for _ in range(5):
        mos.use(hot)
    scheduler.step()
    assert scheduler.worker is not None
    assert scheduler.worker.wait(10)
    assert mos.get(hot.id).state != "ARCHIVED"
    assert mos.transitions(cold.id)[-1].new == "ARCHIVED"
    mos.close()


def test_contexts_make_edges_that_explain_shows() -> None:
    mos = MOS()
    mos.register_memory(GeneralTextMemory("notes"))
    for text in ("the kettle is red", "the kettle is in the kitchen", "Ada likes the kettle"):
        mos.add("notes", text)
    mos.schedule({"host": 1000}, every_s=None)
    hits = mos.context("where is the kettle").hits
    assert len(hits) > 1
    mos.hebbian.write()
    mos.scheduler.refresh()
    found = mos.scheduler.explain(f"notes/{hits[0].id}")
    assert {edge["id"] for edge in found["associations"]} == {hit.id for hit in hits[1:]}
    related = mos.retrieve(query="kettle kitchen", limit=3)
    assert any("related" in str(mos.explain(hit)) for hit in related)
    mos.close()


class Box:
    def __init__(self, used: int = 0) -> None:
        self.used, self.quota = used, 1 << 40

    def limit(self, num_bytes: int) -> None:
        self.quota = num_bytes
        self.used = min(self.used, num_bytes)


def test_shares_never_add_up_to_more() -> None:
    boxes = [Box(60), Box(30), Box(500)]
    shares = Shares({"host": 120})

    def engine(i: int) -> Engine:
        return Engine(str(i), "host", lambda: boxes[i].used, boxes[i].limit)

    for i in range(3):
        shares.add(engine(i))
        assert sum(box.quota for box in boxes[: i + 1]) <= 120
    assert sum(box.used for box in boxes) <= 120
    boxes[2].used = 0
    shares.make("0", "host", boxes[1].quota)
    assert boxes[0].quota >= boxes[0].used + boxes[1].used
    assert sum(box.quota for box in boxes) <= 120
    with pytest.raises(QuotaError, match="are free"):
        shares.make("0", "host", 121)
    shares.remove("0")
    assert sum(box.quota for box in boxes[1:]) <= 120
    assert shares.quotas("host").keys() == {"1", "2"}


def test_half_lives_are_chosen_by_what_they_foretell() -> None:
    tuner = Tuner((60.0, 3600.0, 86400.0), 3600.0)
    now = 0.0
    for i in itertools.count():
        now += 20.0
        tuner.used(f"u{i % 50}", now)  # each every 1,000 s, for hours
        if i > 20000:
            break
    assert tuner.half_life_s > 60.0
    assert tuner.stats()["half_life_s"] in (3600.0, 86400.0)
    alone = Tuner((60.0,), 60.0)
    assert not any(alone.used("a", float(i)) for i in range(1000))
    with pytest.raises(ArgumentError, match="half-lives"):
        Tuner((60.0,), 61.0)


def test_hot_knowledge_becomes_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from memos import ParametricMemory
    from memos.facade.makers import Learning

    from . import test_learning as learning

    with MOS(tmp_path / "m") as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.register_memory(ParametricMemory("skills", embedder=None))
        cube = mos.add("notes", learning.FACTS[0].content)
        options = {**learning.FAST, "max_steps": 3, "budget": learning.LOOSE}
        learns = Learning(mos, "skills", learning.model(), learning.tokenizer(), **options)
        learns.consolidate("notes", [cube.id], lambda: False)
        [adapter] = mos.memory("skills").cubes(None)
        assert adapter.metadata["name"].startswith("notes ")
        assert [r.target for r in adapter.relations] == [cube.id]
        learns.consolidate("notes", [cube.id], lambda: False)  # as after a crash: it is there
        assert len(list(mos.memory("skills").cubes(None))) == 1
        with pytest.raises(ArgumentError, match="consolidate"):
            learns.consolidate("notes", ["gone"], lambda: False)
        assert {job.kind for job in mos.jobs.list()} == {"consolidate"}
        # Adapters are units too: on disk, and ready for a model once they are used.
        scheduler = mos.schedule({"host": 1 << 24}, every_s=None)
        scheduler.refresh()
        unit = scheduler.unit(f"skills/{adapter.content['digest']}")
        assert unit.copies == {"disk"}
        skills = mos.memory("skills").attach(learning.model())
        assert skills.pool.device_bytes <= 1 << 24
        with skills.use(adapter.metadata["name"]):
            scheduler.refresh()
            assert scheduler.unit(unit.id).copies == {"host", "disk"}
            assert scheduler.unit(unit.id).in_use
            assert scheduler.unit(unit.id).heat > 0
        scheduler.refresh()
        assert not scheduler.unit(unit.id).in_use
        skills.detach()


def test_what_is_given_up_is_only_a_miss(model: Any, kv: KVCacheMemory) -> None:
    """Of one session in a tier: others keep what they share, and nothing is ever wrong."""
    mos = MOS()
    mos.register_memory(kv)
    scheduler = mos.schedule({"host": 1 << 24, "disk": 1 << 24}, every_s=None)
    ids = [(5 * i) % 97 for i in range(48)]
    outputs = {}
    for name in ("one", "two"):
        turn = kv.begin(name, [*ids, *([1, 2, 3] if name == "one" else [4, 5, 6]) * 8])
        outputs[name] = model.generate(**turn.inputs, max_new_tokens=4, do_sample=False)
        turn.commit(outputs[name])
    scheduler.refresh()
    one, two = scheduler.unit("chat/one"), scheduler.unit("chat/two")
    scheduler.refresh()
    shared = scheduler.unit("chat/one").num_bytes["host"]
    assert shared <= one.num_bytes["host"], "what two share counts half for each"
    assert two.copies == {"host", "disk"}
    keys = kv.tenant.session("two").keys
    assert kv.tenant.placed(keys)["disk"][0] == len(keys)
    kv.tenant.leave("one", "host")
    assert kv.tenant.placed(keys)["host"][0] == len(keys), "two has all of its own"
    gone = kv.tenant.session("one").keys
    assert kv.tenant.placed(gone)["disk"][0] == len(gone)
    assert kv.tenant.leave("one", "disk") == len(gone) - 3, "three blocks are two's as well"
    scheduler.step()
    scheduler.refresh()
    assert scheduler.unit("chat/one").copies == frozenset()
    assert scheduler.unit("chat/one").rebuildable
    turn = kv.begin("one", turn_ids := [*ids, *[1, 2, 3] * 8])
    assert turn.reused_tokens == 48
    again = model.generate(**turn.inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, outputs["one"])
    assert again[0, : len(turn_ids)].tolist() == turn_ids
    turn.commit(again)
    kv.delete("two")
    for _ in range(2):
        assert scheduler.worker is not None
        assert scheduler.worker.wait(10)
        scheduler.step()
    assert scheduler.find("chat/two") is None
    assert scheduler.unit("chat/one").copies == {"host", "disk"}
    mos.close()
