"""What adapters add to the time of a layer, beside PEFT in the same run.

Rows: level, case, dtype, isa, threads, tokens, adapters, base_us, added_us, peft_added_us, ratio,
reference_added_us.

level "kernel": one linear layer, h = 1024, rank 16. ``added_us`` is the time of the layer followed
by the op less that of the layer alone; ``peft_added_us`` that of PEFT's LoRA layer over the same
weights less the same. All alternate in short blocks; the median of the blocks' differences is
reported, so that what slows the machine down hits all of them. ``ratio``: PEFT's added time over
ours. A batch of several adapters goes to PEFT as ``adapter_names``.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")
peft = pytest.importorskip("peft", reason="the comparison is with PEFT")

from memos import kernels, settings  # noqa: E402
from memos.kernels import AdapterTable, _native  # noqa: E402
from memos.kernels.adapters import ALIGNMENT, apply_adapters_  # noqa: E402

H, R, ALPHA = 1024, 16, 32
ROUNDS = 60
BLOCK_S = 0.005  # of calls of one kind before the next kind has its turn
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    tokens: int
    adapters: int

    @property
    def name(self) -> str:
        many = "s" if self.tokens > 1 else ""
        return f"{self.tokens} token{many}, {self.adapters} adapter{'s' * (self.adapters > 1)}"


CASES = {case.name: case for case in (Case(1, 1), Case(8, 8), Case(64, 1), Case(64, 8))}


def slab_of(factors: list[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[Any, Any]:
    """down [R, I], up [O, R] and scale of each module -> slab and offsets of an AdapterTable."""
    flat = [x.contiguous().view(-1).view(torch.uint8) for f in factors for x in (f[0], f[1].T)]
    ends = torch.tensor([-(-len(x) // ALIGNMENT) * ALIGNMENT for x in flat]).cumsum(0).tolist()
    whole = torch.zeros(ends[-1] + ALIGNMENT, dtype=torch.uint8)
    slab = whole[-whole.data_ptr() % ALIGNMENT :][: ends[-1]]
    starts = [0, *ends[:-1]]
    for start, x in zip(starts, flat, strict=True):
        slab[start : start + len(x)] = x
    rows = [
        [*starts[2 * i : 2 * i + 2], len(down), *struct.unpack("=i", struct.pack("=f", scale))]
        for i, (down, _, scale) in enumerate(factors)
    ]
    return slab, torch.tensor(rows)


def under_peft(linear: torch.nn.Linear, adapters: int) -> Any:
    """PEFT's layer with random adapters a0, a1, ... over this linear layer."""
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["linear"])
    model = peft.get_peft_model(torch.nn.ModuleDict({"linear": linear}), config, "a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    layer = model.base_model.model["linear"].to(linear.weight.dtype).eval()
    for up in layer.lora_B.values():
        torch.nn.init.normal_(up.weight, std=0.02)
    return layer


class Layer:
    """One linear layer: alone, with our adapters, with the reference, and under PEFT."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(H, H, bias=False, dtype=dtype).requires_grad_(False)
        self.peft = under_peft(self.linear, case.adapters)
        names = list(self.peft.lora_A)
        self.table = AdapterTable([(H, H)], case.adapters, dtype)
        for slot, name in enumerate(names):
            down, up = self.peft.lora_A[name].weight, self.peft.lora_B[name].weight
            self.table.put(slot, *slab_of([(down.detach(), up.detach(), ALPHA / R)]))
        slots = torch.arange(case.tokens) % case.adapters
        self.plan = kernels.plan_adapters(slots, case.adapters)
        self.x = torch.randn(case.tokens, H).to(dtype)
        self.names = {"adapter_names": [names[s] for s in slots]} if case.adapters > 1 else {}

    def base(self) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.x)
        return y

    def ours(self) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.x)
        apply_adapters_(y, self.x, self.table, 0, self.plan)
        return y

    def reference(self) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.x)
        apply_adapters_.reference(y, self.x, self.table, 0, self.plan)
        return y

    def theirs(self) -> torch.Tensor:
        y: torch.Tensor = self.peft(self.x, **self.names)
        return y


def block_us(run: Callable[[], object], calls: int) -> float:
    """Microseconds for one of so many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e6


def calls_of(run: Callable[[], object]) -> int:
    """How many calls make a block, after a warm-up."""
    run()
    return max(3, round(BLOCK_S / (block_us(run, 5) / 1e6)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_one_layer(benchmark: Any, name: str, dtype: str) -> None:
    if (why := _native.missing()) is not None:
        pytest.skip(why)
    case = CASES[name]
    with torch.no_grad():
        layer = Layer(case, DTYPES[dtype])
        want = layer.theirs()
        size = (want - layer.base()).abs().max()
        assert (layer.ours() - want).abs().max() < 0.1 * size  # the same computation
        runs = {run: getattr(layer, run) for run in ("base", "ours", "theirs", "reference")}
        calls = {run: calls_of(function) for run, function in runs.items()}
        times: dict[str, list[float]] = {run: [] for run in runs}

        def one_round() -> None:
            for run, function in runs.items():
                times[run].append(block_us(function, calls[run]))

        benchmark.pedantic(one_round, rounds=ROUNDS)

    def added(run: str) -> float:
        return statistics.median(
            with_us - base_us for with_us, base_us in zip(times[run], times["base"], strict=True)
        )

    benchmark.extra_info.update(
        level="kernel",
        case=name,
        dtype=dtype,
        isa=_native.isa(),
        threads=settings.num_threads(),
        tokens=case.tokens,
        adapters=case.adapters,
        base_us=statistics.median(times["base"]),
        added_us=added("ours"),
        peft_added_us=added("theirs"),
        ratio=added("theirs") / added("ours"),
        reference_added_us=added("reference"),
    )
