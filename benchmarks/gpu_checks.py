"""What benchmarks/gpu.py compares with the CPU, and the tensors that it measures with."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

BACKENDS = ("cuda", "triton")
POOL = {"L": 32, "P": 64, "H": 8, "D": 128, "slots": 256, "batch": 32}
TRITON_S = 75  # of the comparisons, in which Triton compiles a kernel for each case


def check_cases(small: bool) -> Iterator[tuple[str, dict[str, int], str, str]]:
    """(codec, sizes, dtype, numbers) of the comparisons with the CPU."""
    codecs = ("raw", "int8-g64", "int8-g32-rot", "int4-g64", "int4-g64-rot", "int2-g32",
              "int2-g64-rot", "fp8-g64", "fp8-g32-rot", "k:int8-g64,v:int4-g32")  # fmt: skip
    shapes = [
        {"L": 2, "N": 3, "P": 64, "H": 2, "Dk": 128, "Dv": 128},
        {"L": 1, "N": 2, "P": 37, "H": 3, "Dk": 80, "Dv": 96},
    ]
    if not small:
        shapes += [
            {"L": 40, "N": 5, "P": 16, "H": 2, "Dk": 64, "Dv": 64},  # two launches
            {"L": 1, "N": 2, "P": 65, "H": 1, "Dk": 256, "Dv": 256},
            {"L": 1, "N": 2, "P": 64, "H": 1, "Dk": 1024, "Dv": 512},  # rotated in parts
            {"L": 1, "N": 1, "P": 1, "H": 1, "Dk": 8, "Dv": 8},
        ]
    dtypes = ("bfloat16",) if small else ("float32", "float16", "bfloat16")
    for shape in shapes:
        for dtype in dtypes:
            for codec in codecs:
                yield codec, shape, dtype, "normal"
                if not small:
                    yield codec, shape, dtype, "any bits"


def numbers(torch: Any, shape: dict[str, int], dtype: str, how: str, device: str) -> Any:
    g = torch.Generator().manual_seed(5)
    kind = getattr(torch, dtype)

    def one(D: int) -> Any:
        sizes = (shape["N"], shape["P"], shape["H"], D)
        if how == "normal":
            return (4 * torch.randn(sizes, generator=g)).to(kind).to(device)
        word = torch.int32 if dtype == "float32" else torch.int16
        info = torch.iinfo(word)
        return torch.randint(info.min, info.max, sizes, generator=g).to(word).view(kind).to(device)

    keys = [one(shape["Dk"]) for _ in range(shape["L"])]
    return keys, [one(shape["Dv"]) for _ in range(shape["L"])]


def rerotation(torch: Any, shape: dict[str, int]) -> Any:
    """Every pair of channels of every token, 1,000 positions on."""
    from memos import kernels

    at = torch.arange(shape["N"] * shape["P"]).view(shape["N"], shape["P"])
    half = shape["Dk"] // 2
    inv_freq = 10000.0 ** -(torch.arange(half) / half)
    return kernels.Rerotation(at, at + 1000, inv_freq, interleaved=shape["N"] % 2 == 1)


def ready(op: str) -> list[str]:
    from memos import kernels

    getattr(kernels, op)  # known once it is imported
    return [b for b in BACKENDS if kernels.available()[op].get(b) == "ready"]


def check_bytes(small: bool) -> int:
    """Every backend against the CPU, byte for byte. Returns how many comparisons were made."""
    import torch

    from memos import kernels

    count, began = 0, time.monotonic()
    cases = list(check_cases(small))
    random.Random(1).shuffle(cases)  # of every sort early, should the time be up
    for codec, shape, dtype, how in cases:
        backends = ready("pack_kv")
        if small:  # under compute-sanitizer: what was compiled with care for it
            backends = [b for b in backends if b == "cuda"]
        elif time.monotonic() - began > TRITON_S:
            backends = [b for b in backends if b != "triton"]
        parsed = kernels.Codec.parse(codec)
        keys, values = numbers(torch, shape, dtype, how, "cpu")
        ids = torch.arange(shape["N"]).flip(0).contiguous()
        want = kernels.pack_kv(keys, values, ids, parsed)
        back = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
        kernels.unpack_kv(*back, ids, want, parsed)
        turned = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
        by = rerotation(torch, shape)
        kernels.unpack_kv(*turned, ids, want, parsed, by)
        on_gpu = [[t.cuda() for t in part] for part in (keys, values)]
        for backend in backends:
            where = f"{codec}, {shape}, {dtype}, {how}, {backend}"
            with kernels.using(backend):
                got = kernels.pack_kv(*on_gpu, ids.cuda(), parsed)
                assert torch.equal(got.cpu(), want), f"pack_kv: {where}"
                out = [[torch.zeros_like(t) for t in part] for part in on_gpu]
                for rows in (got, kernels.PackedRows(got)):
                    kernels.unpack_kv(*out, ids.cuda(), rows, parsed)
                    for ours, theirs in zip(chain(*out), chain(*back), strict=True):
                        assert same_bytes(torch, ours.cpu(), theirs), f"unpack_kv: {where}"
                kernels.unpack_kv(*out, ids.cuda(), got, parsed, by)
                if parsed.key.kind == "raw" and how != "normal":
                    out = turned  # which NaN comes of two is the device's own
                for ours, theirs in zip(chain(*out), chain(*turned), strict=True):
                    assert same_bytes(torch, ours.cpu(), theirs), f"unpack_kv, turned: {where}"
            count += 4
    for B, dtype in ((1, torch.int8), (127, torch.int8), (4096, torch.bfloat16), (24, torch.int32)):
        cache = torch.randint(-100, 100, (9, B)).to(dtype)
        ids = torch.tensor([8, 0, 3])
        for backend in ready("gather_blocks"):
            with kernels.using(backend):
                got = kernels.gather_blocks(cache.cuda(), ids.cuda())
                assert same_bytes(torch, got.cpu(), cache[ids]), f"gather_blocks: {B}, {backend}"
                into = torch.zeros_like(cache).cuda()
                kernels.write_blocks(into, ids.cuda(), got)
                assert same_bytes(torch, into.cpu()[ids], cache[ids]), f"write_blocks: {backend}"
            count += 2
    return count + check_transfers(small) + check_adapters() + check_turns() + check_pool()


def check_turns() -> int:
    import torch

    from memos import kernels

    count = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for T, D, half, neighbours in ((64, 128, 64, False), (37, 80, 40, True), (5, 24, 7, False)):
            keys = [torch.randn(2, 3, T, D).to(dtype) for _ in range(3)]
            at = torch.arange(T), torch.arange(T) + 100_000
            by = (*at, 10000.0 ** -(torch.arange(half) / half), neighbours)
            on_gpu = [key.clone().cuda() for key in keys]
            kernels.rotate_positions_(keys, *by)
            for backend in ready("rotate_positions_"):
                got = [key.clone() for key in on_gpu]
                with kernels.using(backend):
                    kernels.rotate_positions_(got, *by)
                for a, b in zip(got, keys, strict=True):
                    assert same_bytes(torch, a.cpu(), b), f"rotate_positions_: {D}, {dtype}"
                count += 1
    return count


def pool_of(resident: str, **sizes: int) -> Any:
    """(pool, packed blocks on the host, what has left)."""
    import torch

    from memos.kv.device import BlockShape, DevicePool

    s = POOL | sizes
    shape = BlockShape(s["L"], s["P"], s["H"], s["D"], s["D"], torch.bfloat16)
    left: list[tuple[list[bytes], Any]] = []
    numbers_bytes = 4 * s["L"] * s["P"] * s["H"] * s["D"]
    pool = DevicePool(
        shape, "int4", s["slots"] * numbers_bytes, "cuda", resident=resident,
        evicted=lambda keys, packed: left.append((keys, packed)),
    )  # fmt: skip
    return pool, left


def check_pool() -> int:
    """Blocks through a pool of few slots, back from it and out of it."""
    import torch

    from memos import kernels

    if not ready("pack_kv") or importlib.util.find_spec("blake3") is None:
        return 0  # the stores want that package; the stage "pool" says so
    shape = {"L": 2, "N": 12, "P": 16, "H": 2, "Dk": 64, "Dv": 64}
    keys, values = numbers(torch, shape, "bfloat16", "normal", "cpu")
    ids = torch.arange(12)
    packed = kernels.pack_kv(keys, values, ids, kernels.Codec.parse("int4"))
    names = [b"%d" % i for i in range(12)]
    pool, left = pool_of("packed", L=2, P=16, H=2, D=64, slots=4)
    for m in range(0, 12, 3):
        assert pool.load(names[m : m + 3], [b""] * 3, packed[m : m + 3].contiguous()) == 3
        assert torch.equal(pool.read(names[m : m + 3]).cpu(), packed[m : m + 3])
    pool.evict(names)
    pool.flush()
    gone = {name: row for some, rows in left for name, row in zip(some, rows, strict=True)}
    for i, name in enumerate(names):
        assert torch.equal(gone[name], packed[i]), "DevicePool: what left is not what came"
    return 12 + check_block_pool(packed, "cuda")


def check_block_pool(packed: Any, device: str) -> int:
    """The pool of a KVCacheMemory: chains through a budget that changes, on two streams."""
    import torch

    from memos.kv.device_pools import BlockPool

    blocks, names = list(packed), [b"%d" % i for i in range(len(packed))]
    size = blocks[0].numel()
    pool = BlockPool(tuple(blocks[0].shape), 5 * size, device)
    on_gpu = pool.device.type == "cuda"
    streams = [torch.cuda.Stream(), torch.cuda.current_stream()] if on_gpu else [None]
    count = 0
    for n, budget in ((3, 5), (12, 5), (6, 9), (4, 2), (12, 12)):
        pool.set_budget(budget * size)
        for stream in streams:
            with torch.cuda.stream(stream):
                found = torch.stack(pool.through(names[:n], blocks[:n]))
                assert torch.equal(found.cpu(), packed[:n]), "BlockPool: not the blocks"
            assert pool.held() <= budget * size, "BlockPool: above its budget"
            count += 1
    return count


def same_bytes(torch: Any, a: Any, b: Any) -> bool:
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def check_transfers(small: bool) -> int:
    import torch

    from memos.kernels import _cuda

    if _cuda.missing() is not None:
        return 0
    for B in (24, 4096, 40000) if small else (24, 4096, 40000, 1 << 20):
        planes = [torch.randint(0, 255, (6, B), dtype=torch.uint8, device="cuda") for _ in range(3)]
        host = torch.zeros(4, 3, B, dtype=torch.uint8, pin_memory=True)
        for how in ("kernel", "copies", ""):
            back = [torch.zeros_like(p) for p in planes]
            _cuda.move_blocks(planes, [5, 0, 3, 2], host, to_host=True, how=how)
            _cuda.move_blocks(back, [5, 0, 3, 2], host, to_host=False, how=how)
            torch.cuda.synchronize()
            for s, plane in enumerate(planes):
                picked = [5, 0, 3, 2]
                assert torch.equal(host[:, s], plane[picked].cpu()), f"move_blocks out: {B}, {how}"
                assert torch.equal(back[s][picked], plane[picked]), f"move_blocks in: {B}, {how}"
    return 12


def adapters(torch: Any, T: int, slots: int, R: int, inputs: int, outputs: int) -> tuple[Any, ...]:
    """(y, x, table, plan): T tokens over ``slots`` adapters of one module, bf16 on the GPU."""
    from memos import kernels

    table = kernels.AdapterTable([(inputs, outputs)], slots, torch.bfloat16, "cuda")
    bits = int(torch.tensor(0.5).view(torch.int32))
    for slot in range(slots):
        slab = (
            torch.randn(R * (inputs + outputs), device="cuda")
            .mul(0.02)
            .bfloat16()
            .view(torch.uint8)
        )
        at = 2 * R * inputs  # a multiple of 256
        table.put(slot, slab, torch.tensor([[0, at, R, bits]]))
    ids = torch.arange(T) % slots
    x = torch.randn(T, inputs, device="cuda").bfloat16()
    y = torch.randn(T, outputs, device="cuda").bfloat16()
    return y, x, table, kernels.plan_adapters(ids.cuda(), slots)


def check_adapters() -> int:
    import torch

    from memos import kernels

    y, x, table, plan = adapters(torch, 37, 5, 16, 1024, 512)
    want = y.double().clone()
    for slot in range(5):
        down, up, scale = table.factors(slot, 0)
        tokens = torch.arange(37, device="cuda")[torch.arange(37, device="cuda") % 5 == slot]
        want[tokens] += scale * (x[tokens].double() @ down.double().T) @ up.double()
    count = 0
    for backend in ready("apply_adapters_"):
        out = y.clone()
        with kernels.using(backend):
            kernels.apply_adapters_(out, x, table, 0, plan)
        worst = float((out.double() - want).abs().max() / want.abs().max())
        assert worst < 2**-7, f"apply_adapters_: off by {worst}, {backend}"
        count += 1
    return count


def check_graph() -> None:
    """A captured call replays on what is there then."""
    import torch

    from memos import kernels

    codec = kernels.Codec.parse("int4")
    shape = {"L": 2, "N": 4, "P": 64, "H": 2, "Dk": 128, "Dv": 128}
    for backend in ready("pack_kv"):
        keys, values = numbers(torch, shape, "bfloat16", "normal", "cuda")
        ids = torch.tensor([3, 1], device="cuda")
        out = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
        with kernels.using(backend):
            kernels.unpack_kv(*out, ids, kernels.pack_kv(keys, values, ids, codec), codec)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                packed = kernels.pack_kv(keys, values, ids, codec)
                kernels.unpack_kv(*out, ids, packed, codec)
            for t in (*keys, *values):
                t.normal_()
            ids.copy_(torch.tensor([0, 2]))
            graph.replay()
            want = kernels.pack_kv(keys, values, ids, codec)
        assert torch.equal(packed, want), f"a graph does not replay: {backend}"


def check_two_runtimes() -> None:
    """Our static CUDA runtime and torch's share the device's context: one reads what one wrote."""
    import torch

    from memos import kernels

    cache = torch.arange(64.0, device="cuda").view(8, 8)
    side = torch.cuda.Stream()
    ids = torch.tensor([7, 2], device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    for backend in ready("gather_blocks"):
        with kernels.using(backend), torch.cuda.stream(side):
            got = kernels.gather_blocks(cache, ids) + 1
        side.synchronize()
        assert torch.equal(got, cache[[7, 2]] + 1), backend
