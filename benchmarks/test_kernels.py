"""KV kernels beside a plain copy of the same bytes, in the same run.

Rows: op, case, layout, codec, backend, isa, threads, call, gb_s, share_of_copy. ``gb_s`` counts the
bytes of the bf16 side once: read by pack and gather, written by unpack and write.
``share_of_copy`` is the time of one memmove of those bytes (the C library's, one thread, into
touched memory) over the op's time. The two alternate; the median of the pairs' ratios is reported,
so that what slows the machine down hits both. It may pass 100 %: packing writes less than a copy
does, and kernels store past the caches where memmove may not.

call "kernel": the native function alone, into touched memory, as memmove is measured.
call "op": what a caller gets. gather_blocks and pack_kv return fresh memory, and the first touch of
a fresh page costs more than copying to it.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos import kernels  # noqa: E402
from memos.kernels import Codec, _native, kv  # noqa: E402

SOURCE_BYTES = 256 << 20  # larger than the caches
P = 64
ROUNDS = 11
CASES = {"8x128": (8, 128), "3x64": (3, 64)}  # KV heads x head size: Llama-3, SmolLM2
LAYOUTS = ("transformers", "paged")  # [heads, tokens, D]; [blocks, P, heads, D], blocks shuffled
CODECS = ("raw", "int8-g64", "int4-g64", "int4-g64-rot", "int2-g32-rot", "fp8-g64")
OPS = (
    "gather_blocks",
    "write_blocks",
    *(f"{op} {codec}" for op in ("pack_kv", "unpack_kv") for codec in CODECS),
    "rotate_positions_",
    *(f"unpack_turned {codec}" for codec in ("raw", "int8-g64", "int4-g64", "int4-g64-rot")),
)


@dataclass(frozen=True)
class Work:
    """One op over the whole source: the native function alone, the op, and its reference."""

    kernel: Callable[[], object]
    op: Callable[[], object]
    reference: Callable[[], object]
    keep: object = None  # what the kernel has only the address of


class Source:
    """256 MB of bf16 K and V in blocks of P tokens, a copy target and packed bytes, all touched."""

    def __init__(self, case: str, layout: str) -> None:
        H, D = CASES[case]
        self.layout = layout
        block_bytes = 2 * P * H * D * 2
        N = SOURCE_BYTES // block_bytes
        generator = torch.Generator().manual_seed(1)
        some = torch.randn(1 << 20, generator=generator).bfloat16()
        self.flat = some.repeat(-(-N * block_bytes // 2 // len(some)))[: N * block_bytes // 2]
        self.target = self.flat.clone()
        self.shuffled = torch.randperm(N, generator=generator)
        self.block_ids = self.shuffled if layout == "paged" else torch.arange(N)
        self.blocks = self.flat.view(N, block_bytes // 2)
        self.keys, self.values = self.views(self.flat, N, H, D)
        self.bytes = N * block_bytes

    def views(self, flat: torch.Tensor, N: int, H: int, D: int) -> tuple[list[Any], list[Any]]:
        if self.layout == "transformers":
            both = flat.view(2, H, N, P, D).permute(0, 2, 3, 1, 4)
        else:
            both = flat.view(2, N, P, H, D)
        return [both[0]], [both[1]]

    def copy(self) -> None:
        ctypes.memmove(self.target.data_ptr(), self.flat.data_ptr(), self.bytes)

    def _memcpy(self) -> Work:
        """The yardstick itself, on as many threads as the row says: what the memory can do."""
        src, dst, parts = self.flat.data_ptr(), self.target.data_ptr(), 64
        size = self.bytes // parts

        def part(first: int, last: int) -> None:
            ctypes.memmove(dst + first * size, src + first * size, (last - first) * size)

        def run() -> None:
            _native.parallel(part, parts, self.bytes)

        return Work(run, run, run)

    def work(self, name: str) -> Work:
        op, _, codec = name.partition(" ")
        make = getattr(self, f"_{op}")
        return make(Codec.parse(codec)) if codec else make()

    def _gather_blocks(self) -> Work:
        row_bytes, ids = self.blocks.shape[1] * 2, self.shuffled
        src, at, dst = self.flat.data_ptr(), ids.data_ptr(), self.target.data_ptr()

        def part(first: int, last: int) -> None:
            _native.core().cpu_gather_rows(src, at, first, last, row_bytes, dst)

        return Work(
            lambda: _native.parallel(part, len(ids), self.bytes),
            lambda: kernels.gather_blocks(self.blocks, ids),
            lambda: kernels.gather_blocks.reference(self.blocks, ids),
        )

    def _write_blocks(self) -> Work:
        row_bytes, ids = self.blocks.shape[1] * 2, self.shuffled
        dst, at, src = self.target.data_ptr(), ids.data_ptr(), self.flat.data_ptr()
        target = self.target.view_as(self.blocks)

        def part(first: int, last: int) -> None:
            _native.core().cpu_write_rows(dst, at, first, last, row_bytes, src)

        return Work(
            lambda: _native.parallel(part, len(ids), self.bytes),
            lambda: kernels.write_blocks(target, ids, self.blocks),
            lambda: kernels.write_blocks.reference(target, ids, self.blocks),
        )

    def _pack_kv(self, codec: Codec) -> Work:
        arguments = (self.keys, self.values, self.block_ids, codec)
        packed = kernels.pack_kv(*arguments)
        call, tables = self._call(self.keys, self.values, packed, codec)

        def part(first: int, last: int) -> None:
            _native.core().cpu_pack_kv(call.buffer_info()[0], first, last)

        return Work(
            lambda: _native.parallel(part, len(self.block_ids), self.bytes),
            lambda: kernels.pack_kv(*arguments),
            lambda: kernels.pack_kv.reference(*arguments),
            (packed, tables),
        )

    def _unpack_kv(self, codec: Codec) -> Work:
        packed = kernels.pack_kv(self.keys, self.values, self.block_ids, codec)
        N, _, H, D = self.keys[0].shape
        keys, values = self.views(self.target, N, H, D)
        arguments = (keys, values, self.block_ids, packed, codec)
        call, tables = self._call(keys, values, packed, codec)

        def part(first: int, last: int) -> None:
            _native.core().cpu_unpack_kv(call.buffer_info()[0], first, last)

        return Work(
            lambda: _native.parallel(part, len(self.block_ids), self.bytes),
            lambda: kernels.unpack_kv(*arguments),
            lambda: kernels.unpack_kv.reference(*arguments),
            (packed, tables),
        )

    def _unpack_turned(self, codec: Codec) -> Work:
        """Keys on to other positions on the way."""
        packed = kernels.pack_kv(self.keys, self.values, self.block_ids, codec)
        N, _, H, D = self.keys[0].shape
        keys, values = self.views(self.target, N, H, D)
        by = kernels.Rerotation(*self.positions(N), self.inv_freq(D))
        arguments = (keys, values, self.block_ids, packed, codec, by)
        call, tables = self._call(keys, values, packed, codec, by)

        def part(first: int, last: int) -> None:
            _native.core().cpu_unpack_kv(call.buffer_info()[0], first, last)

        return Work(
            lambda: _native.parallel(part, len(self.block_ids), self.bytes),
            lambda: kernels.unpack_kv(*arguments),
            lambda: kernels.unpack_kv.reference(*arguments),
            (packed, tables, by),
        )

    def _rotate_positions_(self) -> Work:
        """All numbers as keys, turned on and on; the angles are computed at each call."""
        N, _, H, D = self.keys[0].shape
        keys = self.target.view(2, H, N * P, D)
        old, new = (at.flatten() for at in self.positions(N))

        def run() -> None:
            kernels.rotate_positions_([keys], old, new, self.inv_freq(D))

        def reference() -> None:
            kernels.rotate_positions_.reference([keys], old, new, self.inv_freq(D))

        return Work(run, run, reference)

    def positions(self, N: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, P] each: everything at 0, and one after the other."""
        at = torch.arange(N * P).view(N, P)
        return torch.zeros_like(at), at

    def inv_freq(self, D: int) -> torch.Tensor:
        return 10000.0 ** -(torch.arange(0, D, 2) / D)

    def _call(
        self, keys: Any, values: Any, packed: torch.Tensor, codec: Codec, by: Any = None
    ) -> Any:
        rows = array("q", [packed.data_ptr() + m * packed.stride(0) for m in range(len(packed))])
        return kv._call(keys, values, self.block_ids, rows, codec, by)


@functools.lru_cache(maxsize=1)
def source(case: str, layout: str) -> Source:
    return Source(case, layout)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if (why := _native.missing()) is not None:
        pytest.skip(why)
    best = _native.isa()
    wanted = request.param or best
    if (why := _native.isas().get(wanted, "not built for this processor")) != "ready":
        pytest.skip(f"{wanted}: {why}")
    _native.core().choose_isa(wanted)
    yield wanted
    _native.core().choose_isa(best)


def rows() -> Iterator[Any]:
    """case, layout, op, backend, isa (None: the best), threads, call."""
    for threads in (1, 2):
        yield "8x128", "transformers", "memcpy", "cpu", None, threads, "kernel"
    for op in OPS:
        yield "8x128", "transformers", op, "cpu", None, 1, "kernel"
        yield "8x128", "transformers", op, "cpu", None, 2, "kernel"
        yield "8x128", "transformers", op, "cpu", None, 1, "op"
        yield "8x128", "transformers", op, "cpu", "avx2", 1, "kernel"
        yield "8x128", "transformers", op, "cpu", "baseline", 1, "kernel"
        yield "8x128", "transformers", op, "reference", None, 1, "op"
    for op in OPS:
        if " " in op:
            yield "8x128", "paged", op, "cpu", None, 1, "kernel"
    for op in OPS:
        yield "3x64", "transformers", op, "cpu", None, 1, "kernel"


@pytest.mark.parametrize(
    ("case", "layout", "op", "backend", "isa", "threads", "call"), rows(), indirect=["isa"]
)
def test_kernels(
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    layout: str,
    op: str,
    backend: str,
    isa: str,
    threads: int,
    call: str,
) -> None:
    monkeypatch.setenv("MEMOS_THREADS", str(threads))
    data = source(case, layout)
    work = data.work(op)
    run = work.reference if backend == "reference" else getattr(work, call)
    copies_s: list[float] = []

    def copy() -> None:
        start = time.perf_counter()
        data.copy()
        copies_s.append(time.perf_counter() - start)

    eager = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        slow = backend == "reference" and op not in ("gather_blocks", "write_blocks")
        benchmark.pedantic(run, setup=copy, rounds=1 if slow else ROUNDS, warmup_rounds=not slow)
    finally:
        torch.set_num_threads(eager)
    ops_s = benchmark.stats.stats.data
    pairs = zip(copies_s[-len(ops_s) :], ops_s, strict=True)  # less the warm-up's copy
    name, _, codec = op.partition(" ")
    benchmark.extra_info.update(
        op=name,
        case=case,
        layout=layout,
        codec=codec,
        backend=backend,
        isa="" if backend == "reference" else isa,
        threads=threads,
        call=call,
        gb_s=data.bytes / statistics.median(ops_s) / 1e9,
        share_of_copy=statistics.median(copy_s / op_s for copy_s, op_s in pairs),
        copy_gb_s=data.bytes / statistics.median(copies_s) / 1e9,
    )
