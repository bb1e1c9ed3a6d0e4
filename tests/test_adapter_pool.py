"""Adapters under budgets: what a pool says it holds is there, byte for byte, and never more than
it may; whoever uses one keeps it; every thread gets what it asked for."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch", reason="adapters are torch tensors")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from memos.adapters.adapter import Adapter, Factors  # noqa: E402
from memos.adapters.policy import LRU, make_policy  # noqa: E402
from memos.adapters.pool import AdapterPool  # noqa: E402
from memos.adapters.slab import SlabLayout, StoredSlabs  # noqa: E402
from memos.adapters.store import AdapterStore  # noqa: E402
from memos.errors import ArgumentError, NotFoundError, QuotaError  # noqa: E402
from memos.kernels.adapters import AdapterTable  # noqa: E402

MODULES = [("q", 16, 24), ("up", 16, 40), ("down", 40, 16)]
LAYOUT = SlabLayout(MODULES, torch.float32)


def make(seed: int, rank: int = 4, modules=MODULES) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g), 1.0)
        for name, i, o in modules
    }
    return Adapter(factors, {})


class Slabs(StoredSlabs):
    """Stored slabs that count how many bytes of them are alive, and can be held up."""

    def __init__(self, store: AdapterStore, layout: SlabLayout = LAYOUT) -> None:
        super().__init__(store, layout)
        self.alive, self.most, self.loads = 0, 0, []
        self.gate = threading.Event()
        self.gate.set()
        self.held = ""  # the digest that waits at the gate; "": all
        self.lock = threading.Lock()

    def load(self, digest: str, into=None):
        if self.held in ("", digest):
            assert self.gate.wait(30)
        size = 0 if into is not None else self.num_bytes(digest)
        self.count(size)
        with self.lock:
            self.loads.append(digest)
        try:
            slab, offsets = super().load(digest, into)
        except BaseException:
            self.count(-size)
            raise
        assert slab is into or size
        if slab is not into:
            weakref.finalize(slab, self.count, -size)
        return slab, offsets

    def count(self, num_bytes: int) -> None:
        with self.lock:
            self.alive += num_bytes
            self.most = max(self.most, self.alive)


def pool_of(
    adapters, *, room: float, slots: int = 8, layout=LAYOUT, **more
) -> tuple[AdapterPool, Slabs, list[str]]:
    """A pool with room for this many adapters of the size of the first."""
    store = AdapterStore(None)
    names = [store.put(a) for a in adapters]
    source = Slabs(store, layout)
    table = AdapterTable([(i, o) for _, i, o in layout.modules], slots, layout.dtype)
    size = source.num_bytes(names[0])
    pool = AdapterPool(table, source, device_bytes=int(room * size), **more)
    return pool, source, names


def holds(pool: AdapterPool, slot: int, adapter: Adapter) -> None:
    for i, (name, _, _) in enumerate(pool.source.layout.modules):
        down, up, scale = pool.table.factors(slot, i)
        f = adapter.factors[name]
        assert torch.equal(down[: f.rank], f.down.to(down.dtype))
        assert torch.equal(up[: f.rank], f.up.T.to(up.dtype))
        assert not down[f.rank :].any()
        assert not up[f.rank :].any()
        assert scale == f.scale


def test_an_adapter_is_loaded_once_and_stays() -> None:
    adapters = [make(i) for i in range(3)]
    pool, source, names = pool_of(adapters, room=3)
    for _ in range(2):
        for name, adapter in zip(names, adapters, strict=True):
            slot = pool.acquire(name)
            holds(pool, slot, adapter)
            pool.release(name)
    stats = pool.stats()
    assert source.loads == names
    assert (stats["hits"], stats["misses"], stats["loads"], stats["hit_rate"]) == (3, 3, 3, 0.5)
    assert stats["device"] == {"bytes": 3 * source.num_bytes(names[0]), "adapters": 3,
                               "budget": pool.device_bytes}  # fmt: skip
    assert stats["host"] == {"bytes": 0, "budget": 0, "adapters": 0}
    assert stats["load_s"] > 0
    pool.close()
    assert source.alive == 0
    assert not pool.table.rows.any()


def test_the_least_recently_used_goes_first() -> None:
    adapters = [make(i) for i in range(4)]
    pool, source, (a, b, c, d) = pool_of(adapters, room=3)
    for name in (a, b, c, a):
        with pool.using([name]):
            pass
    with pool.using([d]) as slots:
        holds(pool, slots[d], adapters[3])
    assert source.loads == [a, b, c, d]
    with pool.using([a, c, d]):
        assert source.loads == [a, b, c, d]
    with pool.using([b]):
        assert source.loads == [a, b, c, d, b]
    assert pool.stats()["evictions"] == 2


def test_evicted_memory_is_used_again() -> None:
    adapters = [make(0), make(1), make(2, 16), make(3)]
    pool, source, (a, b, large, d) = pool_of(adapters, room=1)
    pool.device_bytes = source.num_bytes(large)
    places = []
    for name, adapter in zip((a, b, large, d, b), [*adapters, adapters[1]], strict=True):
        pool.drop(a)
        with pool.using([name]) as slots:
            holds(pool, slots[name], adapter)
            places.append(pool.table.factors(slots[name], 0)[0].data_ptr())
    assert source.most <= pool.device_bytes
    assert source.loads == [a, b, large, d, b]
    pool.device_bytes = source.num_bytes(d)
    pool.drop(d)
    with pool.using([b]):
        place = pool._entries[b].memory.data_ptr()
    with pool.using([d]) as slots:
        assert pool._entries[d].memory.data_ptr() == place
        holds(pool, slots[d], adapters[3])
    source.store.delete(b)
    with pytest.raises(NotFoundError) as caught:
        pool.acquire(b)
    assert source.alive == 0, caught.value  # the error does not keep what it was to be loaded into
    with pool.using([a]) as slots:
        holds(pool, slots[a], adapters[0])


def test_slots_are_a_budget_too() -> None:
    pool, _, names = pool_of([make(i) for i in range(3)], room=10, slots=2)
    with pool.using(names[:2]), pytest.raises(QuotaError, match="num_slots=2"):
        pool.acquire(names[2])
    with pool.using(names[2:]):
        assert pool.stats()["device"]["adapters"] == 2


def test_what_is_in_use_or_pinned_stays() -> None:
    adapters = [make(i) for i in range(4)]
    pool, source, names = pool_of(adapters, room=2)
    size = source.num_bytes(names[0])
    pool.pin(names[0])
    slot = pool.acquire(names[1])
    with pytest.raises(QuotaError) as caught:
        pool.acquire(names[2])
    for said in (
        f"device_bytes={2 * size}",
        f"room for {size} bytes",
        f"{size} bytes of 1 others are pinned",
        f"{size} bytes of 1 more in use",
    ):
        assert said in str(caught.value)
    holds(pool, slot, adapters[1])
    pool.release(names[1])
    with pool.using([names[2]]) as slots:
        holds(pool, slots[names[2]], adapters[2])
    assert sorted(source.loads) == sorted(names[:3])
    pool.pin(names[0], False)
    with pool.using(names[2:]):
        pass
    assert names[0] not in pool._entries
    with pytest.raises(QuotaError, match="3 adapters"):
        pool.acquire_all(names[:3])
    assert pool.stats()["device"]["adapters"] == 2  # nothing was evicted for what cannot fit


def test_a_mixed_batch_gets_all_or_nothing() -> None:
    adapters = [make(i) for i in range(4)]
    pool, source, names = pool_of(adapters, room=3)
    source.store.delete(names[3])
    source.num_bytes = lambda digest: LAYOUT.make(adapters[0])[0].numel()
    with pytest.raises(NotFoundError):
        pool.acquire_all([names[0], names[3], names[1]])
    stats = pool.stats()
    assert stats["in_use"] == 0
    assert stats["device"]["adapters"] == 1  # the first was there before the second failed
    slots = pool.acquire_all([names[1], names[0], names[1]])
    assert len(slots) == 2
    for i in range(2):
        holds(pool, slots[names[i]], adapters[i])
    pool.release(*slots)
    with pytest.raises(ArgumentError, match="in use wanted"):
        pool.release(names[0])


def test_the_wrong_model_leaves_nothing() -> None:
    wrong = make(0, 4, [("q", 16, 25)])
    pool, _, names = pool_of([make(1), wrong, make(2, 4, MODULES[:1])], room=2)
    with pytest.raises(ArgumentError, match="another base model"):
        pool.acquire(names[1])
    with pool.using([names[2]]) as slots:
        assert pool.table.factors(slots[names[2]], 1) is None
    assert pool.stats()["device"]["adapters"] == 1


def test_a_source_must_keep_its_word() -> None:
    pool, source, names = pool_of([make(0)], room=2)
    size = source.num_bytes(names[0])
    source.num_bytes = lambda digest: size - 256
    with pytest.raises(ArgumentError, match=f"a slab of {size - 256} bytes wanted"):
        pool.acquire(names[0])
    assert pool.stats()["device"] == {"bytes": 0, "budget": 2 * size, "adapters": 0}


def test_prefetch_loads_in_the_background() -> None:
    adapters = [make(i) for i in range(4)]
    pool, source, names = pool_of(adapters, room=2)
    assert pool.prefetch(names[0])
    pool.wait_prefetched()
    assert source.loads == [names[0]]
    with pool.using([names[0]]) as slots:
        holds(pool, slots[names[0]], adapters[0])
    assert pool.stats()["hits"] == 1
    # No room: a hint is forgotten. Damage: the error waits for who wants the adapter.
    with pool.using(names[:2]):
        assert pool.prefetch(names[2])
        pool.wait_prefetched()
    assert pool.stats()["refused_prefetches"] == 1
    source.store.delete(names[3])
    pool.prefetch(names[3])
    pool.wait_prefetched()
    with pytest.raises(NotFoundError, match=names[3]):
        pool.acquire(names[3])
    source.store.put(adapters[3])
    with pool.using([names[3]]) as slots:
        holds(pool, slots[names[3]], adapters[3])


def test_prefetches_are_bounded_and_waited_for() -> None:
    adapters = [make(i) for i in range(6)]
    pool, source, names = pool_of(adapters, room=1, prefetch_limit=2)
    source.gate.clear()
    assert pool.prefetch(names[0])
    while names[0] not in pool._entries:
        time.sleep(0.001)
    assert [pool.prefetch(n) for n in (names[1], names[1], names[2], names[3])] == [
        True, True, True, False,
    ]  # fmt: skip
    # The only slot is on its way to a prefetch: who wants it waits and then evicts that.
    found = []
    thread = threading.Thread(target=lambda: found.append(pool.acquire(names[4])))
    thread.start()
    time.sleep(0.02)
    assert not found
    source.gate.set()
    thread.join(30)
    holds(pool, found[0], adapters[4])
    pool.wait_prefetched()
    assert pool.stats()["device"]["adapters"] == 1
    pool.release(names[4])
    pool.close()


def test_a_load_keeps_no_one_from_others() -> None:
    adapters = [make(i) for i in range(3)]
    pool, source, names = pool_of(adapters, room=3)
    with pool.using([names[0]]):
        pass
    source.held = names[1]
    source.gate.clear()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(pool.acquire(names[1]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while names[1] not in pool._entries:
        time.sleep(0.001)
    with pool.using([names[0], names[2]]) as slots:  # while the others wait
        holds(pool, slots[names[0]], adapters[0])
        holds(pool, slots[names[2]], adapters[2])
        assert not found
    source.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(set(found)) == 1
    assert len(found) == 4
    assert source.loads.count(names[1]) == 1
    pool.release(*[names[1]] * 4)


def test_who_waits_for_a_load_that_fails_is_told() -> None:
    pool, source, names = pool_of([make(0), make(1)], room=2)
    size = source.num_bytes(names[0])
    source.num_bytes = lambda digest: size
    source.gate.clear()
    told = []

    def want() -> None:
        try:
            pool.acquire(names[0])
        except NotFoundError as error:
            told.append(error)

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    while pool.stats()["misses"] < 3:
        time.sleep(0.001)
    source.store.delete(names[0])
    source.gate.set()
    for thread in threads:
        thread.join(30)
    assert len(told) == 3
    assert pool.stats()["device"]["bytes"] == 0
    assert pool.stats()["in_use"] == 0


def test_drop_forgets() -> None:
    adapters = [make(0), make(1)]
    pool, source, names = pool_of(adapters, room=2, staged=True, host_bytes=1 << 20)
    pool.pin(names[0])
    with pool.using([names[0]]), pytest.raises(ArgumentError, match="is in use 1 times"):
        pool.drop(names[0])
    pool.drop(names[0])
    pool.drop(names[0])
    stats = pool.stats()
    assert stats["device"]["bytes"] == stats["host"]["bytes"] == stats["pinned"] == 0
    assert source.alive == 0
    with pool.using([names[0]]) as slots:
        holds(pool, slots[names[0]], adapters[0])


def test_a_closed_pool_is_closed() -> None:
    pool, _, names = pool_of([make(0)], room=1)
    with pool.using(names), pytest.raises(ArgumentError, match="no adapter in use"):
        pool.close()
    pool.prefetch(names[0])
    pool.close()
    pool.close()
    for act in (pool.acquire, pool.prefetch, pool.pin):
        with pytest.raises(ArgumentError, match="closed"):
            act(names[0])


@pytest.mark.parametrize(
    "wrong", [{"device_bytes": -1}, {"host_bytes": -1}, {"policy": "no such policy"}]
)
def test_arguments_out_of_contract(wrong) -> None:
    table = AdapterTable([(8, 8)], 1, torch.float32)
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        AdapterPool(table, StoredSlabs(AdapterStore(None), LAYOUT), **{"device_bytes": 1, **wrong})


# Host memory behind the device


def test_the_host_keeps_what_the_device_evicts() -> None:
    adapters = [make(i) for i in range(4)]
    store = AdapterStore(None)
    names = [store.put(a) for a in adapters]
    source = Slabs(store)
    size = source.num_bytes(names[0])
    table = AdapterTable([(i, o) for _, i, o in MODULES], 4, torch.float32)
    pool = AdapterPool(table, source, device_bytes=size, host_bytes=3 * size, staged=True)
    for name, adapter in zip(names[:3] * 2, adapters[:3] * 2, strict=True):
        with pool.using([name]) as slots:
            holds(pool, slots[name], adapter)
    stats = pool.stats()
    assert source.loads == names[:3]
    assert (stats["loads"], stats["host_hits"], stats["evictions"]) == (3, 3, 5)
    assert stats["host"] == {"bytes": 3 * size, "budget": 3 * size, "adapters": 3}
    with pool.using([names[3]]):
        pass
    with pool.using([names[1]]), pytest.raises(QuotaError, match="device_bytes"):
        pool.acquire(names[0])
    assert source.loads == names  # names[0] was the one that the host let go
    assert source.most <= 3 * size
    small = AdapterPool(table, source, device_bytes=size, host_bytes=size - 1, staged=True)
    with pytest.raises(QuotaError, match=f"host_bytes={size - 1}: {size} bytes wanted"):
        small.acquire(names[0])
    assert small.stats()["device"]["bytes"] == 0


def test_the_host_budget_holds_while_loads_are_on_their_way() -> None:
    adapters = [make(0), make(1)]
    store = AdapterStore(None)
    names = [store.put(a) for a in adapters]
    source = Slabs(store)
    size = source.num_bytes(names[0])
    table = AdapterTable([(i, o) for _, i, o in MODULES], 4, torch.float32)
    pool = AdapterPool(table, source, device_bytes=4 * size, host_bytes=size, staged=True)
    source.held = names[0]
    source.gate.clear()
    found = {}
    threads = [
        threading.Thread(target=lambda n=name: found.update({n: pool.acquire(n)})) for name in names
    ]
    threads[0].start()
    while not pool.stats()["host"]["adapters"]:
        time.sleep(0.001)
    threads[1].start()
    time.sleep(0.05)
    assert not source.loads  # the second waits for room, though nothing holds it at the gate
    assert pool.stats()["host"]["bytes"] == size
    source.gate.set()
    for thread in threads:
        thread.join(30)
    for name, adapter in zip(names, adapters, strict=True):
        holds(pool, found[name], adapter)
    assert source.most <= size


def test_a_failed_load_leaves_no_bytes_on_the_host() -> None:
    pool, source, names = pool_of([make(0), make(1)], room=2, staged=True, host_bytes=1 << 20)
    size = source.num_bytes(names[0])
    source.num_bytes = lambda digest: size
    source.store.delete(names[0])
    with pytest.raises(NotFoundError):
        pool.acquire(names[0])
    assert pool.stats()["host"] == {"bytes": 0, "budget": 1 << 20, "adapters": 0}
    with pool.using(names[1:]):
        assert pool.stats()["host"]["bytes"] == size


# Random histories against a plain model


class Model:
    """What a pool must do, with ints for bytes."""

    def __init__(self, sizes, budget: int, slots: int) -> None:
        self.sizes, self.budget, self.slots = sizes, budget, slots
        self.there: OrderedDict[str, int] = OrderedDict()  # digest -> users, LRU first
        self.pinned: set[str] = set()
        self.broken: set[str] = set()
        self.kept_errors: set[str] = set()
        self.counts = dict.fromkeys(["hits", "misses", "loads", "evictions"], 0)

    def used(self) -> int:
        return sum(self.sizes[d] for d in self.there)

    def bring(self, digests, uses: int) -> str:
        """'ok', 'quota' or 'broken'."""
        wanted = list(dict.fromkeys(digests))
        if uses:
            for d in wanted:
                if d in self.kept_errors:
                    self.kept_errors.discard(d)
                    if d not in self.there:
                        return "broken"
        missing = [d for d in wanted if d not in self.there]
        need = self.used() + sum(self.sizes[d] for d in missing) - self.budget
        slots = len(self.there) + len(missing) - self.slots
        idle = [d for d, users in self.there.items()
                if not users and d not in self.pinned and d not in wanted]  # fmt: skip
        if need > sum(self.sizes[d] for d in idle) or slots > len(idle):
            return "quota"
        for d in idle:
            if need <= 0 and slots <= 0:
                break
            del self.there[d]
            self.counts["evictions"] += 1
            need, slots = need - self.sizes[d], slots - 1
        for d in missing:
            self.there[d] = 0
        if uses:
            for d in wanted:
                self.counts["misses" if d in missing else "hits"] += 1
                self.there.move_to_end(d)
        for i, d in enumerate(missing):
            if d in self.broken:
                for other in missing[i:]:
                    del self.there[other]
                if not uses:
                    self.kept_errors.add(d)
                return "broken"
            self.counts["loads"] += 1
        for d in wanted:
            self.there[d] += uses
        return "ok"


ADAPTERS = [make(i, rank) for i, rank in enumerate((1, 8, 8, 9, 16, 20, 24, 40))]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_histories(data) -> None:
    room = data.draw(st.sampled_from([1.0, 2.0, 3.5, 6.0, 9.0]), label="room")
    slots = data.draw(st.sampled_from([2, 3, 8]), label="slots")
    staged = data.draw(st.booleans(), label="staged")
    pool, source, names = pool_of(
        ADAPTERS, room=room, slots=slots, staged=staged, host_bytes=1 << 30
    )
    sizes = {d: source.num_bytes(d) for d in names}
    source.num_bytes = sizes.__getitem__
    adapter_of = dict(zip(names, ADAPTERS, strict=True))
    model = Model(sizes, pool.device_bytes, slots)
    held: list[list[str]] = []
    digest = st.sampled_from(names)
    # A host tier would serve what the store has lost.
    acts = ["acquire", "acquire", "release", "pin", "unpin", "prefetch", "drop"]
    acts += [] if staged else ["break", "mend"]
    for _ in range(data.draw(st.integers(5, 40), label="steps")):
        act = data.draw(st.sampled_from(acts), label="act")
        if act in ("acquire", "pin"):
            many = data.draw(st.lists(digest, min_size=1, max_size=3), label="digests")
            many = many[: 1 if act == "pin" else 3]
            result = model.bring(many, 1)
            try:
                if act == "acquire":
                    held.append(list(pool.acquire_all(many)))
                else:
                    pool.pin(many[0])
                    model.pinned.add(many[0])
                    model.there[many[0]] -= 1
                assert result == "ok"
            except QuotaError:
                assert result == "quota"
            except NotFoundError:
                assert result == "broken"
        elif act == "release" and held:
            gone = held.pop(data.draw(st.integers(0, len(held) - 1), label="which"))
            pool.release(*gone)
            for d in gone:
                model.there[d] -= 1
        elif act == "unpin":
            one = data.draw(digest, label="digest")
            pool.pin(one, False)
            model.pinned.discard(one)
        elif act == "prefetch":
            one = data.draw(digest, label="digest")
            if one not in model.there:
                model.kept_errors.discard(one)
                model.bring([one], 0)
            pool.prefetch(one)
            pool.wait_prefetched()
        elif act == "drop":
            one = data.draw(digest, label="digest")
            if model.there.get(one):
                with pytest.raises(ArgumentError):
                    pool.drop(one)
            else:
                pool.drop(one)
                model.there.pop(one, None)
                model.pinned.discard(one)
                model.kept_errors.discard(one)
        elif act in ("break", "mend"):
            one = data.draw(digest, label="digest")
            if act == "break" and one not in model.broken:
                model.broken.add(one)
                source.store.delete(one)
            elif act == "mend":
                model.broken.discard(one)
                source.store.put(adapter_of[one])
        stats = pool.stats()
        assert stats["device"]["bytes"] == model.used() <= pool.device_bytes
        assert set(pool._entries) == set(model.there)
        assert stats["in_use"] == sum(users > 0 for users in model.there.values())
        for key in ("hits", "misses", "evictions"):
            assert stats[key] == model.counts[key]
        assert stats["loads"] + stats["host_hits"] == model.counts["loads"]
        taken = set()
        for d in pool._entries:
            slot = pool._entries[d].slot
            holds(pool, slot, adapter_of[d])
            taken.add(slot)
        for slot in set(range(slots)) - taken:
            assert not pool.table.rows[slot].any()
        if not staged:
            assert source.most <= pool.device_bytes
    for many in held:
        pool.release(*many)
    pool.close()
    assert source.alive == 0


# Threads


@pytest.mark.parametrize("staged", [False, True])
def test_threads_see_their_own_adapters(staged: bool) -> None:
    adapters = [make(i, 1 + i % 24) for i in range(12)]
    pool, source, names = pool_of(
        adapters, room=8, slots=6, staged=staged, host_bytes=40_000, prefetch_limit=4
    )
    errors: list[BaseException] = []
    refused = [0]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                numbers = rng.sample(range(12), rng.choice([1, 1, 1, 2]))
                try:
                    with pool.using([names[i] for i in numbers]) as slots:
                        for i in numbers:
                            holds(pool, slots[names[i]], adapters[i])
                        if rng.random() < 0.3:
                            pool.prefetch(names[rng.randrange(12)])
                        for i in numbers:
                            holds(pool, slots[names[i]], adapters[i])
                except QuotaError:
                    refused[0] += 1
                assert pool.stats()["device"]["bytes"] <= pool.device_bytes
                assert pool.stats()["host"]["bytes"] <= max(pool.host_bytes, 0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert refused[0] < 120
    if not staged:
        assert source.most <= pool.device_bytes
    pool.close()
    assert source.alive == 0


def test_many_adapters_under_zipf(tmp_path) -> None:
    """200 adapters of rank 8 to 64 in files, room for 20: contents, budget, and the hit rate that
    an LRU of 20 has."""
    modules = [(f"layers.{i}.{n}", 32, 48) for i in range(2) for n in "qv"]
    layout = SlabLayout(modules, torch.bfloat16)
    adapters = [make(i, (8, 16, 24, 32, 48, 64)[i % 6], modules) for i in range(200)]
    store = AdapterStore(tmp_path, durable=False)
    names = [store.put(a) for a in adapters]
    source = Slabs(store, layout)
    sizes = [source.num_bytes(n) for n in names]
    budget = 20 * sum(sizes) // len(sizes)
    table = AdapterTable([(i, o) for _, i, o in modules], 64, layout.dtype)
    pool = AdapterPool(table, source, device_bytes=budget)
    rng = random.Random(0)
    weights = [1 / (i + 1) for i in range(200)]
    lru: OrderedDict[int, int] = OrderedDict()
    hits = 0
    for i in rng.choices(range(200), weights, k=1000):
        with pool.using([names[i]]) as slots:
            holds(pool, slots[names[i]], adapters[i])
        hits += i in lru
        lru[i] = sizes[i]
        lru.move_to_end(i)
        while sum(lru.values()) > budget:
            lru.popitem(last=False)
    stats = pool.stats()
    assert source.most <= budget
    assert stats["device"]["bytes"] == sum(lru.values())
    assert stats["hits"] == hits
    assert stats["hits"] + stats["misses"] == 1000
    assert 0.3 < stats["hit_rate"] < 0.9


def test_policies_are_made_by_name() -> None:
    policy = make_policy("lru")
    assert isinstance(policy, LRU)
    for key in "abcab":
        policy.admit(key, 1)
    policy.touch("x")
    policy.touch("c")
    policy.remove("x")
    policy.remove("a")
    assert list(policy.victims()) == ["b", "c"]
    with pytest.raises(ArgumentError, match="policy: one of lru wanted, got 'fifo'"):
        make_policy("fifo")
