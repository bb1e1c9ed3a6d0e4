"""The pool of blocks on a device, run on the CPU: the same class, against a model."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="blocks are torch tensors")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from memos import kernels  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402
from memos.kernels import Codec  # noqa: E402
from memos.kv.device import BlockShape, DevicePool, home_of  # noqa: E402

SHAPE = BlockShape(2, 4, 2, 8, 16, torch.bfloat16)
BLOCKS = 24


def numbers(count: int = BLOCKS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    sizes = ((count, 4, 2, 8), (count, 4, 2, 16))
    keys, values = ([torch.randn(s, generator=g).bfloat16() for _ in range(2)] for s in sizes)
    return keys, values


KEYS, VALUES = numbers()
IDS = torch.arange(BLOCKS)
PACKED = {c: kernels.pack_kv(KEYS, VALUES, IDS, Codec.parse(c)) for c in ("int4", "raw")}


def name(i: int) -> bytes:
    return b"block %02d" % i


def again(packed: torch.Tensor, codec: str, resident: str) -> torch.Tensor:
    """What leaves a pool after ``packed`` came in: packed once more where numbers stood."""
    if resident == "packed" or codec == "raw":
        return packed
    out = [torch.zeros_like(t) for t in KEYS], [torch.zeros_like(t) for t in VALUES]
    kernels.unpack_kv(*out, torch.arange(len(packed)), packed, Codec.parse(codec))
    return kernels.pack_kv(*out, torch.arange(len(packed)), Codec.parse(codec))


def pool_of(slots: int, codec: str = "int4", resident: str = "packed", **more: Any) -> DevicePool:
    """A pool of exactly so many slots."""
    moved = SHAPE.layers * SHAPE.layer_bytes(Codec.parse(codec))
    raw = Codec.parse("raw")
    slot = SHAPE.layers * SHAPE.layer_bytes(raw) if resident == "raw" else moved
    most, budget = 0, 0
    while most < slots:  # the way in and out grows with the pool
        budget += slot
        try:
            most = DevicePool(SHAPE, codec, budget, "cpu", resident=resident).num_slots
        except ArgumentError:
            continue
    return DevicePool(SHAPE, codec, budget, "cpu", resident=resident, **more)


STEP = st.tuples(
    st.sampled_from(["load", "store", "read", "into", "hold", "free", "evict", "drop", "flush"]),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 6),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    slots=st.integers(1, 9),
    codec=st.sampled_from(["int4", "raw"]),
    resident=st.sampled_from(["packed", "raw"]),
    steps=st.lists(STEP, max_size=40),
)
def test_histories(
    slots: int, codec: str, resident: str, steps: list[tuple[str, int, int]]
) -> None:
    """Blocks in chains of six. Never over the budget; what is read is what came in; what leaves
    arrives once, leaves before the blocks it follows, and never while it is in use."""
    here: dict[int, torch.Tensor] = {}  # block -> what a read must return
    left: list[int] = []
    came: list[tuple[int, torch.Tensor]] = []

    def evicted(keys: list[bytes], packed: torch.Tensor) -> None:
        came.extend((int(key[-2:]), row.clone()) for key, row in zip(keys, packed, strict=True))

    pool = pool_of(slots, codec, resident, evicted=evicted)
    exact = PACKED[codec]
    twice = again(exact, codec, resident)
    held: list[tuple[Any, list[int]]] = []
    for what, first, count in steps:
        last = min(first // 6 * 6 + 6, first + count)
        wanted = list(range(first, last))
        keys = [name(i) for i in wanted]
        parents = [name(i - 1) if i % 6 else b"" for i in wanted]
        before = dict(here)
        used = {i for _, some in held for i in some}
        if what in ("load", "store"):
            if what == "load":
                done = pool.load(keys, parents, exact[first:last].clone())
            else:
                done = pool.store(keys, parents, KEYS, VALUES, wanted)
            for i in wanted[:done]:
                # numbers that were stored are packed once, when they are asked for
                here.setdefault(i, exact[i] if what == "store" else twice[i])
            gone = [i for i in before if pool.contains([name(i)]) == 0]
            for i in gone:
                del here[i]
            left += gone
            assert not set(gone) & (used | set(wanted))
            if done < len(wanted):  # all that is here is in use, wanted, or followed by such
                stuck = {j for i in used | set(wanted) for j in range(i // 6 * 6, i + 1)}
                assert len(here) == slots
                assert set(here) <= stuck
        elif what == "read":
            got = pool.read(keys)
            n = next((k for k, i in enumerate(wanted) if i not in here), len(wanted))
            assert len(got) == n
            for row, i in zip(got, wanted, strict=False):
                assert torch.equal(row, here[i])
        elif what == "into":
            out = [torch.zeros_like(t) for t in KEYS], [torch.zeros_like(t) for t in VALUES]
            n = pool.read_into(keys, *out, wanted)
            want = [torch.zeros_like(t) for t in KEYS], [torch.zeros_like(t) for t in VALUES]
            if n:
                rows = pool.read(keys)
                kernels.unpack_kv(*want, IDS[first : first + n].clone(), rows, Codec.parse(codec))
            if resident == "packed" or codec == "raw":
                for a, b in zip([*out[0], *out[1]], [*want[0], *want[1]], strict=True):
                    assert torch.equal(a, b)
        elif what == "hold":
            context = pool.using(keys)
            some = context.__enter__()
            held.append((context, wanted[: len(some)]))
        elif what == "free" and held:
            held.pop(first % len(held))[0].__exit__(None, None, None)
        elif what == "evict":
            number = pool.evict(keys)
            gone = [i for i in before if pool.contains([name(i)]) == 0]
            assert number == len(gone) <= len(wanted)
            assert not set(gone) & used
            for i in gone:
                del here[i]
            left += gone
        elif what == "drop" and not used & set(wanted):
            assert pool.drop(keys) == len(set(wanted) & set(here))
            for i in wanted:
                here.pop(i, None)
        elif what == "flush":
            pool.flush()
            assert len(came) == len(left)
        for i in here:
            assert pool.contains([name(i)]) == 1
        assert len(pool) == len(here) <= slots
        assert pool.used_bytes <= pool.budget_bytes
        assert len(pool._free) + len(pool) == pool.num_slots  # none is lost
        assert pool.stats()["evictions"] == len(left)
    for context, _ in held:
        context.__exit__(None, None, None)
    pool.flush()
    assert sorted(i for i, _ in came) == sorted(left)
    for i, row in came:
        assert torch.equal(row, exact[i]) or torch.equal(row, twice[i])


def test_the_least_recently_used_leave_first() -> None:
    """Blocks that follow nothing: as an OrderedDict."""
    pool, model = pool_of(5), OrderedDict[int, None]()
    g = random.Random(1)
    gone: list[int] = []
    for _ in range(300):
        i = g.randrange(BLOCKS)
        if g.random() < 0.5:
            pool.load([name(i)], [b""], PACKED["int4"][i : i + 1])
            if i not in model and len(model) == 5:
                gone.append(model.popitem(last=False)[0])
            model[i] = None
            model.move_to_end(i)
        elif len(pool.read([name(i)])):
            model.move_to_end(i)
        assert [j for j in range(BLOCKS) if pool.contains([name(j)])] == sorted(model)
    assert len(gone) > 50


def test_a_chain_shrinks_from_its_end() -> None:
    left: list[bytes] = []
    pool = pool_of(6, evicted=lambda keys, packed: left.extend(keys))
    chain = [name(i) for i in range(6)]
    pool.load(chain, [b"", *chain[:-1]], PACKED["int4"][:6])
    pool.load([name(9), name(10)], [b"", b""], PACKED["int4"][9:11])
    pool.flush()
    assert left == [name(5), name(4)]
    assert pool.contains(chain) == 4


def test_paged_caches_of_numbers() -> None:
    """A raw pool is L caches of pages, to read and to write in place."""
    pool = pool_of(8, "int4", "raw")
    assert pool.store([name(i) for i in range(3)], [b""] * 3, KEYS, VALUES, [4, 0, 2]) == 3
    with pool.using([name(i) for i in range(3)]) as slots:
        keys, values = pool.caches()
        for layer in range(2):
            assert torch.equal(keys[layer][slots], KEYS[layer][[4, 0, 2]])
            assert torch.equal(values[layer][slots], VALUES[layer][[4, 0, 2]])
    with pytest.raises(ArgumentError, match="resident='raw'"):
        pool_of(2).caches()


def test_what_is_in_use_leaves_no_room() -> None:
    pool = pool_of(3)
    pool.load([name(i) for i in range(3)], [b""] * 3, PACKED["int4"][:3])
    with pool.using([name(0), name(1)]):
        assert pool.load([name(i) for i in (5, 6)], [b""] * 2, PACKED["int4"][5:7]) == 1
        with pytest.raises(ArgumentError, match="in use"):
            pool.drop([name(0)])
        assert pool.evict([name(0), name(5)]) == 1
    assert pool.load([name(i) for i in (5, 6)], [b""] * 2, PACKED["int4"][5:7]) == 2


def test_nothing_of_a_dropped_block_is_left() -> None:
    pool = pool_of(3)
    pool.load([name(0)], [b""], PACKED["int4"][:1])
    assert pool.drop([name(0), name(1)]) == 1
    assert not pool._rows().any()


def test_bad_arguments_are_refused() -> None:
    packed = PACKED["int4"]
    with pytest.raises(ArgumentError, match="budget_bytes: at least"):
        DevicePool(SHAPE, "int4", 100, "cpu")
    with pytest.raises(ArgumentError, match="resident"):
        DevicePool(SHAPE, "int4", 1 << 20, "cpu", resident="half")
    with pytest.raises(ArgumentError, match="policy"):
        DevicePool(SHAPE, "int4", 1 << 20, "cpu", policy="none such")
    pool = pool_of(3)
    with pytest.raises(ArgumentError, match="packed: uint8"):
        pool.load([name(0)], [b""], packed[:2])
    with pytest.raises(ArgumentError, match="no key twice"):
        pool.load([name(0)] * 2, [b""] * 2, packed[:2])
    with pytest.raises(ArgumentError, match="block_ids"):
        pool.store([name(0)], [b""], KEYS, VALUES, [1, 2])


def test_where_blocks_are_packed() -> None:
    assert home_of(torch.device("cpu")) == torch.device("cpu")
    if torch.cuda.is_available():
        return
    assert home_of(torch.device("cuda", 0)) == torch.device("cpu")


@pytest.mark.parametrize("blocks", [2, 40])
def test_a_memory_restores_through_its_pool(blocks: int) -> None:
    """With room for all blocks and for two: the same caches; what is deleted is wiped."""
    pytest.importorskip("transformers", reason="the models are those of transformers")
    from memos import KVCacheMemory

    from .models import prompt, tiny

    model, ids = tiny("llama"), prompt(45)
    options = {"model": model, "codec": "int4", "block_tokens": 8, "sink_tokens": 2,
               "recent_tokens": 5}  # fmt: skip
    plain = KVCacheMemory("chat", **options)
    cache = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, return_dict_in_generate=True,
        do_sample=False,
    )  # fmt: skip
    content = {"token_ids": cache.sequences, "cache": cache.past_key_values}
    plain.add(content, id="a")
    want = plain.retrieve("session:a")[0].content.dense()
    block = plain._identity().block_bytes()
    kv = KVCacheMemory("chat", device_bytes=blocks * block, **options)
    kv.add(content, id="a")
    for _ in range(3):
        got = kv.retrieve("session:a")[0].content.dense()
        for ours, theirs in zip(got.layers, want.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
    found = kv.pools.stats()
    assert found["blocks"] == min(blocks, 5)
    assert found["hits"] >= 3 * found["blocks"]
    assert found["bytes"] <= found["budget_bytes"]
    kv.delete("a")
    kv.add(content | {"token_ids": cache.sequences}, id="b")
    pool = kv.pools.pool
    assert pool is not None
    stood = list(pool._blocks.values())
    assert any(block.any() for block in stood)
    kv.delete("b")
    assert kv.retrieve(ids) == []
    assert len(pool) == 0
    assert not any(block.any() for block in stood)
    with pytest.raises(ArgumentError, match="device_bytes"):
        KVCacheMemory("chat", device_bytes=-1, **options)
