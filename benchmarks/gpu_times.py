"""What benchmarks/gpu.py times, each beside the copy, link or matrix rate of the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpu_checks import POOL, adapters, numbers, pool_of, ready

CODECS = ("raw", "int8", "int4", "int4-g64", "int4-g64-rot", "int2", "fp8")
KV = {"L": 32, "M": 24, "P": 64, "H": 8, "D": 128}  # Llama-3-8B, 1536 tokens, bf16: 200 MB
ADAPTERS = {"T": 64, "slots": 8, "R": 16, "inputs": 4096, "outputs": 4096}
DECODE = {"T": 8, "layers": 4, "h": 4096, "f": 11008}
TRANSFERS = ((8 << 10, 64, 32), (128 << 10, 64, 16), (1 << 20, 64, 4))  # bytes, planes, blocks


@dataclass
class Row:
    """One measurement. ``share`` is of ``of``: copy, link or matrix rate; 0: of none."""

    op: str
    case: str
    backend: str
    us: float
    gb_s: float = 0.0
    share: float = 0.0
    of: str = ""


def table(rows: Sequence[Row]) -> str:
    """The rows as text, the best share of each op and case first."""
    head = ("op", "case", "backend", "us", "GB/s", "share")
    lines = [head]
    for row in sorted(rows, key=lambda r: (r.op, r.case, -r.share, r.us)):
        share = f"{100 * row.share:.0f} % of {row.of}" if row.of else ""
        speed = f"{row.gb_s:.0f}" if row.gb_s else ""
        lines.append((row.op, row.case, row.backend, f"{row.us:.1f}", speed, share))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


class Clock:
    """Medians of the time between two events, after warm-up."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, work: Callable[[], Any], times: int = 1) -> float:
        """Microseconds of ``work()``, of which ``times`` are captured into one graph or called."""
        import torch

        for _ in range(3):
            work()
        torch.cuda.synchronize()
        run: Callable[[], Any] = work
        if times > 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(times):
                    work()
            run = graph.replay
        found = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(1000 * begin.elapsed_time(end) / times)
        return statistics.median(found)


def rates(clock: Clock) -> dict[str, float]:
    """Copies on the device and over the link in GB/s, products of matrices in TFLOP/s."""
    import torch

    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = 2e-3 * a.numel() / clock(lambda: b.copy_(a))
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    out = 1e-3 * pinned.numel() / clock(lambda: pinned.copy_(a[: 1 << 28], non_blocking=True))
    into = 1e-3 * pinned.numel() / clock(lambda: a[: 1 << 28].copy_(pinned, non_blocking=True))
    m = torch.randn(8192, 8192, device="cuda").bfloat16()
    matrix = 2e-6 * 8192**3 / clock(lambda: m @ m)
    return {"copy": copy, "link out": out, "link in": into, "matrix": matrix}


def time_kv(clock: Clock, copy: float) -> Iterator[Row]:
    import torch

    from memos import kernels

    shape = {"L": KV["L"], "N": KV["M"], "P": KV["P"], "H": KV["H"], "Dk": KV["D"], "Dv": KV["D"]}
    keys, values = numbers(torch, shape, "bfloat16", "normal", "cuda")
    ids = torch.randperm(KV["M"], device="cuda")
    plain = sum(t.nbytes for t in (*keys, *values))
    at = torch.arange(KV["M"] * KV["P"]).view(KV["M"], KV["P"])
    by = kernels.Rerotation(at, at + 7, 10000.0 ** -torch.arange(0, 1, 2 / KV["D"]))
    for name in CODECS:
        codec = kernels.Codec.parse(name)
        for backend in ready("pack_kv"):
            with kernels.using(backend):
                packed = kernels.pack_kv(keys, values, ids, codec)
                moved = plain + packed.nbytes
                unpack = partial(kernels.unpack_kv, keys, values, ids, packed, codec)
                for op, work in (
                    ("pack_kv", partial(kernels.pack_kv, keys, values, ids, codec)),
                    ("unpack_kv", unpack),
                    ("unpack_kv, turned", partial(unpack, by)),
                ):
                    us = clock(work)
                    speed = 1e-3 * moved / us
                    yield Row(op, name, backend, us, speed, speed / copy, "copy")


def time_blocks(clock: Clock, copy: float) -> Iterator[Row]:
    import torch

    from memos import kernels

    for B in (4 << 10, 64 << 10, 1 << 20):
        M = (256 << 20) // B
        cache = torch.empty(2 * M, B, dtype=torch.uint8, device="cuda")
        ids = torch.randperm(2 * M, device="cuda")[:M].contiguous()
        for backend in ready("gather_blocks"):
            with kernels.using(backend):
                blocks = kernels.gather_blocks(cache, ids)
                for op, work in (
                    ("gather_blocks", partial(kernels.gather_blocks, cache, ids)),
                    ("write_blocks", partial(kernels.write_blocks, cache, ids, blocks)),
                ):
                    us = clock(work)
                    speed = 2e-3 * blocks.nbytes / us
                    yield Row(op, f"{B >> 10} KiB", backend, us, speed, speed / copy, "copy")


def time_transfers(clock: Clock, rate: dict[str, float]) -> Iterator[Row]:
    import torch

    from memos.kernels import _cuda

    if _cuda.missing() is not None:
        return
    for B, S, M in TRANSFERS:
        planes = [torch.empty(2 * M, B, dtype=torch.uint8, device="cuda") for _ in range(S)]
        host = torch.empty(M, S, B, dtype=torch.uint8, pin_memory=True)
        ids = torch.randperm(2 * M)[:M].tolist()
        stream = torch.cuda.Stream()
        for how in ("kernel", "copies"):
            for to_host in (True, False):
                with torch.cuda.stream(stream):
                    move = partial(_cuda.move_blocks, planes, ids, host, to_host=to_host, how=how)
                    us = clock(move)
                speed, link = 1e-3 * host.nbytes / us, "link out" if to_host else "link in"
                case = f"{B >> 10} KiB {'out' if to_host else 'in'}, {how}"
                yield Row("move_blocks", case, "cuda", us, speed, speed / rate[link], "link")


def time_adapters(clock: Clock) -> Iterator[Row]:
    import torch

    from memos import kernels

    for sizes in (ADAPTERS, ADAPTERS | {"T": 8}, ADAPTERS | {"R": 64}):
        y, x, table, plan = adapters(torch, **sizes)
        case = ", ".join(f"{k} {v}" for k, v in sizes.items())
        for backend in ready("apply_adapters_"):
            with kernels.using(backend):
                us = clock(partial(kernels.apply_adapters_, y, x, table, 0, plan), times=50)
            yield Row("apply_adapters_", case, backend, us)


def time_decode(clock: Clock) -> Iterator[Row]:
    """The linear layers of a decode step, captured: alone, and with an adapter on each."""
    import torch

    from memos import kernels

    T, h, f = DECODE["T"], DECODE["h"], DECODE["f"]
    modules = [(h, h)] * 4 + [(h, f)] * 2 + [(f, h)]
    made = []
    for inputs, outputs in modules * DECODE["layers"]:
        y, x, table, plan = adapters(torch, T, 8, 16, inputs, outputs)
        made.append((torch.randn(outputs, inputs, device="cuda").bfloat16(), y, x, table, plan))

    def step(with_adapters: bool) -> None:
        for weight, y, x, table, plan in made:
            torch.mm(x, weight.T, out=y)
            if with_adapters:
                kernels.apply_adapters_(y, x, table, 0, plan)

    base = clock(lambda: step(False), times=2)
    case = f"T {T}, {DECODE['layers']} layers, h {h}"
    yield Row("decode step", case, "base", base)
    for backend in ready("apply_adapters_"):
        with kernels.using(backend):
            us = clock(lambda: step(True), times=2)
        yield Row("decode step", case, backend, us, 0.0, us / base, "base")


def time_turn(clock: Clock, copy: float) -> Iterator[Row]:
    """Keys of 32 layers and 4096 tokens; the angles of a call are computed on the host."""
    import torch

    from memos import kernels

    T = 4096
    keys = [torch.randn(1, 8, T, 128, device="cuda").bfloat16() for _ in range(32)]
    at = torch.arange(T)
    inv_freq = 10000.0 ** -(torch.arange(64) / 64)
    for backend in ready("rotate_positions_"):
        with kernels.using(backend):
            us = clock(lambda: kernels.rotate_positions_(keys, at, at + 7, inv_freq))
        speed = 2e-3 * sum(key.nbytes for key in keys) / us
        yield Row("rotate_positions_", "angles too", backend, us, speed, speed / copy, "copy")


def time_pool(clock: Clock, rate: dict[str, float]) -> Iterator[Row]:
    """Blocks of 64 tokens of Llama-3-8B in int4 into a full pool: in, and out at its other end."""
    for resident in ("packed", "raw"):
        yield from _time_pool(clock, rate, resident)


def _time_pool(clock: Clock, rate: dict[str, float], resident: str) -> Iterator[Row]:
    import torch

    from memos import kernels

    codec, batch = kernels.Codec.parse("int4"), POOL["batch"]
    shape = {"L": POOL["L"], "N": batch, "P": POOL["P"], "H": POOL["H"]}
    shape |= {"Dk": POOL["D"], "Dv": POOL["D"]}
    keys, values = numbers(torch, shape, "bfloat16", "normal", "cuda")
    ids = list(range(batch))
    packed = kernels.pack_kv(keys, values, torch.arange(batch, device="cuda"), codec)
    host = packed.cpu()
    pool, left = pool_of(resident, slots=4 * batch)
    turn = 0

    def names() -> list[bytes]:
        nonlocal turn
        turn += 1
        return [b"%d.%d" % (turn, i) for i in range(batch)]

    def work(into: Callable[[list[bytes]], Any]) -> float:
        while pool.evictions == 0:
            into(names())
        found = []
        for _ in range(max(3, clock.repeats // 5)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            into(names())
            pool.flush()
            torch.cuda.synchronize()
            found.append(1e6 * (time.perf_counter() - began))
            left.clear()
        return statistics.median(found)

    moves: dict[str, Callable[[list[bytes]], Any]] = {
        "load": lambda some: pool.load(some, [b""] * batch, host),
        "store": lambda some: pool.store(some, [b""] * batch, keys, values, ids),
    }
    for name, into in moves.items():
        us = work(into)
        speed = 1e-3 * host.nbytes / us
        case = f"{name} and evict {batch} blocks, {resident}"
        yield Row("pool", case, "", us, speed, speed / rate["link out"], "link")
    there = names()
    pool.load(there, [b""] * batch, host)
    out = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
    us = clock(lambda: pool.read_into(there, *out, ids))
    speed = 1e-3 * (packed.nbytes + sum(t.nbytes for t in (*keys, *values))) / us
    case = f"read {batch} blocks, {resident}"
    yield Row("pool", case, "", us, speed, speed / rate["copy"], "copy")
