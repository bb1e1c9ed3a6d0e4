"""Builds, checks and times the GPU backends: ``python benchmarks/gpu.py``.

Needs a GPU of compute capability 8.0 or newer, nvcc to build with, torch for CUDA. Checks that
every op leaves the bytes of the CPU, that a captured graph replays, and that compute-sanitizer
finds nothing; then times everything, writes all rows to benchmarks/results/gpu.json and ends in a
short table: each kernel's share of the copy bandwidth, link or matrix rate measured beside it.

Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
BACKENDS = ("cuda", "triton")
CODECS = ("raw", "int8", "int4", "int4-g64", "int4-g64-rot", "int2", "fp8")
KV = {"L": 32, "M": 24, "P": 64, "H": 8, "D": 128}  # Llama-3-8B, 1536 tokens, bf16: 200 MB
ADAPTERS = {"T": 64, "slots": 8, "R": 16, "inputs": 4096, "outputs": 4096}
DECODE = {"T": 8, "layers": 4, "h": 4096, "f": 11008}
TRANSFERS = ((8 << 10, 64, 32), (128 << 10, 64, 16), (1 << 20, 64, 4))  # bytes, planes, blocks
SANITIZER = ("memcheck", "racecheck")


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-build", action="store_true", help="use what is built already")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    parser.add_argument("--check", action="store_true", help="check, and time nothing")
    parser.add_argument("--small", action="store_true", help="only the small cases of the checks")
    parser.add_argument("--only", default="", help="time the ops whose name holds this")
    parser.add_argument("--repeats", type=int, default=30, help="measurements per row (median)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the rows go")
    found = parser.parse_args(arguments)
    if found.repeats < 1:
        parser.error("--repeats: at least 1 wanted")
    return found


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


def why_not() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no GPU is here: nothing was built, checked or timed"
    return None


def build() -> None:
    """The package with the CUDA kernels, into this environment."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps",
               "--quiet", "-C", "cmake.define.MEMOS_CUDA=ON", "-e", str(ROOT)]  # fmt: skip
    subprocess.run(command, check=True)


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


def ready(op: str) -> list[str]:
    from memos import kernels

    return [b for b in BACKENDS if kernels.available()[op].get(b) == "ready"]


def check_bytes(small: bool) -> int:
    """Every backend against the CPU, byte for byte. Returns how many comparisons were made."""
    import torch

    from memos import kernels

    count = 0
    for codec, shape, dtype, how in check_cases(small):
        parsed = kernels.Codec.parse(codec)
        keys, values = numbers(torch, shape, dtype, how, "cpu")
        ids = torch.arange(shape["N"]).flip(0).contiguous()
        want = kernels.pack_kv(keys, values, ids, parsed)
        back = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
        kernels.unpack_kv(*back, ids, want, parsed)
        on_gpu = [[t.cuda() for t in part] for part in (keys, values)]
        for backend in ready("pack_kv"):
            where = f"{codec}, {shape}, {dtype}, {how}, {backend}"
            with kernels.using(backend):
                got = kernels.pack_kv(*on_gpu, ids.cuda(), parsed)
                assert torch.equal(got.cpu(), want), f"pack_kv: {where}"
                out = [[torch.zeros_like(t) for t in part] for part in on_gpu]
                for rows in (got, kernels.PackedRows(got)):
                    kernels.unpack_kv(*out, ids.cuda(), rows, parsed)
                    for ours, theirs in zip(chain(*out), chain(*back), strict=True):
                        assert same_bytes(torch, ours.cpu(), theirs), f"unpack_kv: {where}"
            count += 3
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
    return count + check_transfers(small) + check_adapters()


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


def sanitize() -> dict[str, str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return dict.fromkeys(SANITIZER, "not run: compute-sanitizer is not found")
    said = {}
    for name in SANITIZER:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__,
                   "--no-build", "--no-sanitizer", "--check", "--small"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said[name] = "clean" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-500:]
    return said


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
    for name in CODECS:
        codec = kernels.Codec.parse(name)
        for backend in ready("pack_kv"):
            with kernels.using(backend):
                packed = kernels.pack_kv(keys, values, ids, codec)
                moved = plain + packed.nbytes
                for op, work in (
                    ("pack_kv", partial(kernels.pack_kv, keys, values, ids, codec)),
                    ("unpack_kv", partial(kernels.unpack_kv, keys, values, ids, packed, codec)),
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


def machine() -> dict[str, str]:
    import torch

    def said(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"

    return {
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": said("git", "status", "--porcelain", "--untracked-files=no"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    wanted = parse(arguments)
    if (why := why_not()) is not None:
        print(f"gpu: {why}")
        return 2
    if not wanted.no_build:
        build()
    count = check_bytes(wanted.small)
    check_graph()
    check_two_runtimes()
    print(f"checked: {count} comparisons with the CPU, graph replay, two CUDA runtimes")
    checks = {} if wanted.no_sanitizer else sanitize()
    for name, verdict in checks.items():
        print(f"{name}: {verdict}")
    if wanted.check:
        return 0
    clock = Clock(wanted.repeats)
    rate = rates(clock)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "pack_kv unpack_kv": lambda: time_kv(clock, rate["copy"]),
        "gather_blocks write_blocks": lambda: time_blocks(clock, rate["copy"]),
        "move_blocks": lambda: time_transfers(clock, rate),
        "apply_adapters_": lambda: time_adapters(clock),
        "decode": lambda: time_decode(clock),
    }
    rows = [row for name, part in parts.items() if wanted.only in name for row in part()]
    found = {"machine": machine(), "rates": rate, "checks": checks, "compared": count}
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    rows_out = [asdict(row) for row in rows]
    wanted.out.write_text(json.dumps({**found, "rows": rows_out}, indent=1) + "\n")
    print(", ".join(f"{name} {value:.0f}" for name, value in rate.items()), "(GB/s, TFLOP/s)")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
