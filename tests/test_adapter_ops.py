"""Adapters on every instruction set: beside the reference, and the same bits in every batch."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import struct
import weakref
from collections.abc import Iterator, Sequence

import hypothesis
import pytest
from hypothesis import strategies

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos import kernels  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402
from memos.kernels import AdapterPlan, AdapterTable, _native  # noqa: E402
from memos.kernels.adapters import ALIGNMENT  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = ("avx512bf16", "avx512", "avx2", "baseline")
MARK = 7.0


@pytest.fixture(params=ISAS if _native.missing() is None else ["native"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if (why := _native.missing()) is not None:
        pytest.skip(why)
    if (why := _native.isas().get(request.param, "not built for this processor")) != "ready":
        pytest.skip(f"{request.param}: {why}")
    before = _native.isa()
    _native.core().choose_isa(request.param)
    yield request.param
    _native.core().choose_isa(before)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(scale: float) -> int:
    return int(struct.unpack("=I", struct.pack("=f", scale))[0])


def aligned(num_bytes: int) -> torch.Tensor:
    whole = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + num_bytes]


def slab_of(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """down [R, I], up [R, O] and scale of each module -> slab and offsets."""
    offsets, parts, at = [], [], 0
    for layer in layers:
        if layer is None:
            offsets.append([0, 0, 0, 0])
            continue
        row = []
        for tensor in layer[:2]:
            data = tensor.contiguous().view(-1).view(torch.uint8)
            parts.append((at, data))
            row.append(at)
            at += -(-len(data) // ALIGNMENT) * ALIGNMENT
        offsets.append([*row, len(layer[0]), bits(layer[2])])
    slab = aligned(at)
    for start, data in parts:
        slab[start : start + len(data)] = data
    return slab, torch.tensor(offsets, dtype=torch.int64).view(-1, 4)


def table_of(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    seed: int = 0,
) -> AdapterTable:
    """A table of random adapters: ``ranks[slot][module]``, 0 where there is none."""
    g = generator(seed)
    table = AdapterTable(shapes, len(ranks), dtype)
    for slot, of_slot in enumerate(ranks):
        layers = []
        for (inputs, outputs), R in zip(shapes, of_slot, strict=True):
            down = torch.randn(R, inputs, generator=g) / max(1, inputs) ** 0.5
            up = torch.randn(R, outputs, generator=g)
            layers.append((down.to(dtype), up.to(dtype), 0.5 + slot / 8) if R else None)
        table.put(slot, *slab_of(layers))
    return table


def tensor(T: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(T, size, generator=generator(seed)).to(dtype)


def magnitudes(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> torch.Tensor:
    """The sum of the magnitudes of all that is added up for each output: [T, O] float32."""
    size = y.float().abs()
    starts = plan.starts.tolist()
    for slot in range(table.num_slots):
        tokens = plan.order[starts[slot] : starts[slot + 1]]
        if len(tokens) and (found := table.factors(slot, module)) is not None:
            down, up, scale = found
            hidden = x[tokens].float().abs() @ down.float().abs().T
            size[tokens] += abs(scale) * (hidden @ up.float().abs())
    return size


def assert_close(
    got: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    table: AdapterTable,
    module: int,
    plan: AdapterPlan,
    label: str = "",
) -> None:
    """``got`` is y after the op, as far as two orders of the same sums agree.

    A float32 sum of n products errs by up to n * 2^-24 of the sum of their magnitudes, here with
    n = I + R + 2 and in two results; two sums that nearly agree may round to neighbours in the
    dtype; and the processor's products of bf16 take subnormal numbers as zero.
    """
    want = y.clone()
    kernels.apply_adapters_.reference(want, x, table, module, plan)
    kind = torch.finfo(table.dtype)
    n = table.shapes[module][0] + table.max_rank + 2
    size = magnitudes(y, x, table, module, plan)
    allowed = 2 * n * 2.0**-24 * size + kind.eps * want.float().abs() + kind.tiny
    off = (got.float() - want.float()).abs() > allowed
    assert not off.any(), f"{label}: {int(off.sum())} of {off.numel()}, first {off.nonzero()[0]}"


# label: (I, O), rank of each slot, slot of each token
CASES: dict[str, tuple[tuple[int, int], list[int], list[int]]] = {
    "one element": ((1, 1), [8], [0]),
    "no tokens": ((16, 16), [8], []),
    "base model alone": ((16, 16), [8], [-1] * 5),
    "odd": ((37, 53), [8, 24], [1, 0, -1, 1, 1]),
    "one past a vector": ((33, 17), [8, 16], [0, 1, 1]),
    "one past a tile": ((65, 129), [16], [0] * 5),
    "tiles of four, two and one": ((130, 260), [16], [0] * 7),
    "one past a chunk": ((48, 24), [8], [0] * 65),
    "one past a chunk of the highest rank": ((48, 24), [512], [0] * 17),
    "every kind of rank": ((40, 72), [8, 16, 24, 64, 200, 512], list(range(6)) * 3),
    "slots without an adapter": ((20, 30), [0, 8, 0, 0], [0, 1, 2, 3, 1, -1]),
    "many slots, few used": ((20, 30), [8] * 300, [299, 0, 17, 299, -1]),
    "narrow in, wide out": ((3, 1100), [8, 8], [0, 1, 0]),
    "wide in, narrow out": ((1100, 3), [8, 8], [0, 1, 0]),
    "a batch": ((256, 512), [16] * 8, [i * 5 % 9 - 1 for i in range(64)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", CASES)
def test_apply_equals_reference(isa: str, label: str, dtype: torch.dtype) -> None:
    shape, ranks, slots = CASES[label]
    table = table_of([(5, 5), shape], [(8, R) for R in ranks], dtype)
    plan = kernels.plan_adapters(torch.tensor(slots, dtype=torch.int64), len(ranks))
    x, y = tensor(len(slots), shape[0], dtype, 1), tensor(len(slots), shape[1], dtype, 2)
    got, x_before = y.clone(), x.clone()
    with kernels.using("cpu"):
        assert kernels.apply_adapters_(got, x, table, 1, plan) is None
    assert torch.equal(x, x_before)
    assert_close(got, y, x, table, 1, plan, label)
    untouched = [t for t, slot in enumerate(slots) if slot < 0 or ranks[slot] == 0]
    assert torch.equal(got[untouched], y[untouched])
    if len(untouched) < len(slots) and shape[1] > 1:
        assert not torch.equal(got, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(isa: str, dtype: torch.dtype) -> None:
    """Where no sum is rounded, nothing but the one rounding into y is left: the same bits."""
    g = generator(3)

    def numbers(rows: int, columns: int, most: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, (rows, columns), generator=g).to(dtype)

    for inputs, outputs, R, T in ((100, 70, 8, 9), (257, 300, 40, 3), (31, 33, 512, 5)):
        layer = numbers(R, inputs, 3), numbers(R, outputs, 3), 0.5
        table = AdapterTable([(inputs, outputs)], 1, dtype)
        table.put(0, *slab_of([layer]))
        x, y = numbers(T, inputs, 3), numbers(T, outputs, 200)
        plan = kernels.uniform_plan(T, 0, 1)
        want, got = y.clone(), y.clone()
        kernels.apply_adapters_.reference(want, x, table, 0, plan)
        kernels.apply_adapters_(got, x, table, 0, plan)
        assert torch.equal(got, want)
        if dtype == torch.bfloat16:  # halves of numbers beyond 2^8: there was something to round
            exact = y.double() + 0.5 * x.double() @ layer[0].double().T @ layer[1].double()
            assert not torch.equal(exact, want.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_batch(isa: str, dtype: torch.dtype) -> None:
    """The same bits alone, in every part of a batch, in another order and beside other adapters."""
    T, inputs, outputs = 90, 603, 211
    table = table_of([(inputs, outputs)], [[8], [40], [512]], dtype)
    x, y = tensor(T, inputs, dtype, 1), tensor(T, outputs, dtype, 2)
    g = generator(4)
    slots = torch.randint(-1, 3, (T,), generator=g)
    slots[:70] = slots[:70].clamp(min=1)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        part = y[tokens].clone()
        plan = kernels.plan_adapters(slots[tokens].clone(), 3)
        kernels.apply_adapters_(part, x[tokens].clone(), table, 0, plan)
        return part

    whole = run(torch.arange(T))
    for t in range(T):
        assert torch.equal(run(torch.tensor([t]))[0], whole[t]), f"token {t} alone"
    for size in (2, 3, 4, 5, 6, 7, 15, 16, 17, 33, 64, 65, 89):
        tokens = torch.randperm(T, generator=g)[:size]
        assert torch.equal(run(tokens), whole[tokens]), f"{size} tokens"


@pytest.mark.parametrize("threads", ["1", "2", "5"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(
    threads: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    T, size = 301, 256
    table = table_of([(size, size)], [[128], [0], [256]], dtype)
    x, y = tensor(T, size, dtype, 1), tensor(T, size, dtype, 2)
    plan = kernels.plan_adapters(torch.randint(-1, 3, (T,), generator=generator(5)), 3)
    monkeypatch.setattr("memos.kernels.adapters._PRODUCTS_PER_BYTE", 1)  # little work pays
    got = {}
    for n in ("1", threads):
        monkeypatch.setenv("MEMOS_THREADS", n)
        got[n] = y.clone()
        kernels.apply_adapters_(got[n], x, table, 0, plan)
    assert torch.equal(got["1"], got[threads])
    assert_close(got[threads], y, x, table, 0, plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_rows_is_written(isa: str, dtype: torch.dtype) -> None:
    """Rows apart, at any element: guards between and around them keep their marks."""
    for inputs, outputs, R, slots in (
        (37, 53, 8, [0, -1, 1, 1]),
        (64, 128, 16, [1] * 9),
        (5, 300, 24, [0, 1]),
    ):
        T = len(slots)
        table = table_of([(inputs, outputs)], [[R], [8]], dtype)
        plan = kernels.plan_adapters(torch.tensor(slots), 2)
        y, x = tensor(T, outputs, dtype, 1), tensor(T, inputs, dtype, 2)
        guarded = torch.full((T + 2, outputs + 7), MARK, dtype=dtype)
        rows = guarded[1:-1, 3 : 3 + outputs]
        rows.copy_(y)
        wide = torch.full((T, inputs + 3), float("nan"), dtype=dtype)
        wide[:, 1 : 1 + inputs] = x
        kernels.apply_adapters_(rows, wide[:, 1 : 1 + inputs], table, 0, plan)
        want = y.clone()
        kernels.apply_adapters_(want, x, table, 0, plan)
        assert torch.equal(rows, want)
        guarded[1:-1, 3 : 3 + outputs] = MARK
        assert (guarded == MARK).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    """NaN and infinity reach what the reference says they reach, and no other row."""
    inputs, outputs, T = 70, 40, 6
    table = table_of([(inputs, outputs)], [[16]], dtype)
    plan = kernels.uniform_plan(T, 0, 1)
    x, y = tensor(T, inputs, dtype, 1), tensor(T, outputs, dtype, 2)
    clean = y.clone()
    kernels.apply_adapters_(clean, x, table, 0, plan)
    most = torch.finfo(dtype).max
    x[1, 3], x[2, 69], x[3, 64] = float("nan"), float("inf"), -float("inf")
    y[4, 0], y[4, 1], y[4, 39] = float("nan"), float("inf"), -float("inf")
    y[4, 2], y[4, 3] = most, -most
    want, got = y.clone(), y.clone()
    kernels.apply_adapters_.reference(want, x, table, 0, plan)
    kernels.apply_adapters_(got, x, table, 0, plan)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[got.isinf()], want[want.isinf()])
    assert torch.equal(got[[0, 5]], clean[[0, 5]])
    assert got[1].isnan().all()
    assert not got[2:4].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_the_range_round_as_torch_rounds(isa: str, dtype: torch.dtype) -> None:
    """To the nearest even, and beyond the range to infinity; the smallest numbers are kept."""
    kind = torch.finfo(dtype)
    y = torch.tensor([[1.0, 1 + kind.eps, -1.0, kind.max, -kind.max, kind.max, 0.0, -0.0, 1024.0]])
    half = kind.eps / 2
    step = 2.0 ** math.floor(math.log2(kind.max)) * half  # half of the last one of all
    delta = [half, half, -half, step, -step, step / 2, kind.tiny, 0.0, -1024.0]
    down, up = torch.zeros(8, 1), torch.zeros(8, y.shape[1])
    down[0] = 1
    up[0] = torch.tensor(delta)
    table = AdapterTable([(1, y.shape[1])], 1, dtype)
    table.put(0, *slab_of([(down.to(dtype), up.to(dtype), 1.0)]))
    x, y = torch.ones(1, 1, dtype=dtype), y.to(dtype)
    want = (y.double() + up[:1].to(dtype).double()).float().to(dtype)
    plan = kernels.uniform_plan(1, 0, 1)
    kernels.apply_adapters_(y, x, table, 0, plan)
    assert torch.equal(y, want), (y, want)
    assert want[0, 3] == -want[0, 4] == float("inf")
    assert want[0, 5].isfinite()


def test_the_op_runs_natively_and_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of([(32, 32)], [[8]], torch.float32)
    plan = kernels.uniform_plan(3, 0, 1)
    x, y = tensor(3, 32, torch.float32, 1), tensor(3, 32, torch.float32, 2)
    results = []
    for backend in ("cpu", "reference", ""):
        monkeypatch.setenv("MEMOS_BACKEND", backend)
        results.append(y.clone())
        kernels.apply_adapters_(results[-1], x, table, 0, plan)
        assert_close(results[-1], y, x, table, 0, plan, backend)
    assert torch.equal(results[0], results[2]) or _native.missing() is not None


# What is refused


def call(**changes: object) -> None:
    table = table_of([(6, 4), (5, 4)], [[8, 0], [8, 8]], torch.float32)
    arguments = {
        "y": torch.zeros(3, 4),
        "x": torch.zeros(3, 6),
        "table": table,
        "module": 0,
        "plan": kernels.uniform_plan(3, 0, 2),
    }
    kernels.apply_adapters_(**{**arguments, **changes})


BAD_CALLS = {
    "y shape": ({"y": torch.zeros(3, 5)}, r"y: axis 1 is 5, but O = 4"),
    "y rows": ({"y": torch.zeros(2, 4)}, r"y: axis 0 is 2, but T = 3"),
    "y axes": ({"y": torch.zeros(12)}, r"y: shape \[T, O\] wanted, got \[12\]"),
    "y type": ({"y": [0.0]}, "y: a tensor wanted, got list"),
    "y dtype": ({"y": torch.zeros(3, 4).half()}, "y: float32 wanted, got float16"),
    "y device": ({"y": torch.zeros(3, 4, device="meta")}, "y: on cpu wanted, got meta"),
    "y stride": ({"y": torch.zeros(4, 3).T}, "y: last axis of stride 1"),
    "y overlap": ({"y": torch.zeros(1, 4).expand(3, 4)}, "y: rows that do not overlap"),
    "y gradient": ({"y": torch.zeros(3, 4, requires_grad=True)}, r"use torch.no_grad\(\)"),
    "x shape": ({"x": torch.zeros(3, 5)}, r"x: axis 1 is 5, but I = 6"),
    "x rows": ({"x": torch.zeros(4, 6)}, r"x: axis 0 is 4, but T = 3"),
    "x dtype": ({"x": torch.zeros(3, 6).bfloat16()}, "x: float32 wanted, got bfloat16"),
    "x stride": ({"x": torch.zeros(6, 3).T}, "x: last axis of stride 1"),
    "module beyond": ({"module": 2}, r"module: in \[0, 2\) wanted, got 2"),
    "module below": ({"module": -1}, r"module: in \[0, 2\) wanted, got -1"),
    "module type": ({"module": "q_proj"}, r"module: in \[0, 2\) wanted, got q_proj"),
    "table": ({"table": None}, "table: AdapterTable wanted, got NoneType"),
    "plan": ({"plan": None}, "plan: AdapterPlan wanted, got NoneType"),
    "plan slots": ({"plan": kernels.uniform_plan(3, 0, 3)}, "num_slots = 2 wanted, got 3"),
    "plan tokens": ({"plan": kernels.uniform_plan(4, 0, 2)}, "axis 0 is 3, but T = 4"),
}


@pytest.mark.parametrize("what", list(BAD_CALLS))
def test_bad_calls_are_named(what: str) -> None:
    changes, message = BAD_CALLS[what]
    with pytest.raises(ArgumentError, match=message):
        call(**changes)


def test_sizes_of_one_may_have_any_stride() -> None:
    table = table_of([(1, 1)], [[8]], torch.float32)
    plan = kernels.uniform_plan(3, 0, 1)
    y, x = torch.zeros(1, 3).T, torch.ones(1, 3).T
    want = torch.zeros(3, 1)
    kernels.apply_adapters_(want, torch.ones(3, 1), table, 0, plan)
    kernels.apply_adapters_(y, x, table, 0, plan)
    assert torch.equal(y, want)
    assert (y != 0).all()


def test_a_plan_with_foreign_tokens_writes_nothing() -> None:
    for T, order in ((3, [0, 3]), (3, [-1, 1]), (1, [1])):
        plan = AdapterPlan(torch.tensor(order), torch.tensor([0, len(order), len(order)]), T)
        y = torch.zeros(T, 4)
        with pytest.raises(ArgumentError, match=f"tokens in \\[0, {T}\\) wanted"):
            call(y=y, x=torch.ones(T, 6), plan=plan)
        assert (y == 0).all()


# Plans


@hypothesis.given(
    slots=strategies.lists(strategies.integers(-1, 5), max_size=40), more=strategies.integers(1, 3)
)
def test_plans_are_stable_sorts(slots: list[int], more: int) -> None:
    num_slots = max([0, *slots]) + more
    order = sorted((t for t, slot in enumerate(slots) if slot >= 0), key=lambda t: slots[t])
    starts = [sum(0 <= slot < s for slot in slots) for s in range(num_slots + 1)]
    given = torch.tensor(slots, dtype=torch.int64)
    for make in (kernels.plan_adapters, kernels.plan_adapters.reference):
        plan = make(given, num_slots)
        assert plan.order.tolist() == order
        assert plan.starts.tolist() == starts
        assert (plan.tokens, plan.count, plan.num_slots) == (len(slots), len(order), num_slots)
    assert given.tolist() == slots


def test_plans_of_one_slot() -> None:
    for T in (0, 1, 5, 5000):
        for slot in (-1, 0, 2):
            ours = kernels.uniform_plan(T, slot, 3)
            theirs = kernels.plan_adapters(torch.full((T,), slot), 3)
            assert torch.equal(ours.order, theirs.order)
            assert torch.equal(ours.starts, theirs.starts)
            assert (ours.tokens, ours.count) == (theirs.tokens, theirs.count)
    assert kernels.uniform_plan(5, 1, 3) is kernels.uniform_plan(5, 1, 3)
    for T, slot, num_slots in ((-1, 0, 1), (1, 1, 1), (1, -2, 1), (1, -1, 0), (9999, 3, 3)):
        with pytest.raises(ArgumentError, match="slot: "):
            kernels.uniform_plan(T, slot, num_slots)


def test_copies_of_a_plan_have_their_own_addresses() -> None:
    table = table_of([(16, 16)], [[8], [8]], torch.float32)
    x, y = tensor(3, 16, torch.float32, 1), tensor(3, 16, torch.float32, 2)
    plan = kernels.plan_adapters(torch.tensor([1, -1, 0]), 2)
    want = y.clone()
    kernels.apply_adapters_(want, x, table, 0, plan)
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin.order.data_ptr() != plan.order.data_ptr()
        got = y.clone()
        kernels.apply_adapters_(got, x, table, 0, twin)
        assert torch.equal(got, want)


BAD_PLANS = {
    "beyond": (lambda: kernels.plan_adapters(torch.tensor([0, 3, 9]), 3), "entry 1 is 3"),
    "below": (lambda: kernels.plan_adapters(torch.tensor([0, 0, -2]), 3), "entry 2 is -2"),
    "int32": (lambda: kernels.plan_adapters(torch.zeros(2).int(), 3), "int64 wanted, got int32"),
    "axes": (lambda: kernels.plan_adapters(torch.zeros(2, 2).long(), 3), r"shape \[T\] wanted"),
    "stride": (lambda: kernels.plan_adapters(torch.zeros(4).long()[::2], 3), "contiguous"),
    "no slots": (lambda: kernels.plan_adapters(torch.zeros(2).long(), 0), "at least 1 wanted"),
    "order": (lambda: AdapterPlan(torch.zeros(2), torch.zeros(2).long(), 2), "order: contiguous"),
    "starts": (lambda: AdapterPlan(torch.zeros(2).long(), torch.zeros(1).long(), 2), "1 and 2"),
    "tokens": (lambda: AdapterPlan(torch.zeros(2).long(), torch.zeros(2).long(), 1), "up to 1"),
}


@pytest.mark.parametrize("what", list(BAD_PLANS))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_plans_are_named(what: str, backend: str) -> None:
    make, message = BAD_PLANS[what]
    if backend == "cpu" and (why := _native.missing()) is not None:
        pytest.skip(why)
    with kernels.using(backend), pytest.raises(ArgumentError, match=message):
        make()


# The table


def layer_of(seed: int, shape: tuple[int, int], R: int, dtype: torch.dtype):
    down, up = tensor(R, shape[0], dtype, seed), tensor(R, shape[1], dtype, seed + 1)
    return (down, up, 1 / (1 + seed)) if R else None


def test_what_is_put_is_there() -> None:
    shapes = [(6, 4), (5, 7)]
    for dtype in DTYPES:
        table = AdapterTable(shapes, 2, dtype)
        layers = [layer_of(1, shapes[0], 24, dtype), None]
        slab, offsets = slab_of(layers)
        table.put(1, slab, offsets)
        assert table.factors(0, 0) is None
        assert table.factors(1, 1) is None
        down, up, scale = table.factors(1, 0)
        assert torch.equal(down, layers[0][0])
        assert torch.equal(up, layers[0][1])
        assert scale == 0.5
        assert down.data_ptr() == slab.data_ptr()  # a view
        assert table.rows[1, 0].tolist() == [down.data_ptr(), up.data_ptr(), 24, bits(0.5)]
        assert (table.rows[0] == 0).all()
        assert (table.rows[1, 1] == 0).all()
        assert table.max_rank == 24
        table.clear(1)
        assert (table.rows == 0).all()
        assert table.factors(1, 0) is None
        assert table.max_rank == 0


def test_the_table_keeps_its_slabs() -> None:
    table = table_of([(64, 64)], [[16]], torch.float32)
    x, y = tensor(1, 64, torch.float32, 1), tensor(1, 64, torch.float32, 2)
    plan, want = kernels.uniform_plan(1, 0, 1), tensor(1, 64, torch.float32, 2)
    slab = weakref.ref(table._slabs[0])
    kernels.apply_adapters_(want, x, table, 0, plan)
    gc.collect()
    noise = [torch.rand(4096) for _ in range(50)]
    kernels.apply_adapters_(y, x, table, 0, plan)
    assert torch.equal(y, want)
    assert slab() is not None
    table.clear(0)
    gc.collect()
    assert slab() is None
    assert noise


def test_a_table_is_not_copied() -> None:
    table = table_of([(6, 4)], [[8]], torch.float32)
    for copier in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="addresses"):
            copier(table)


NAN, INF = bits(float("nan")), bits(float("inf"))
# what: (slot, slab, offsets, message); None: those of a good call
BAD_PUTS = {
    "slot": (2, None, None, r"slot: in \[0, 2\) wanted, got 2"),
    "slot below": (-1, None, None, "slot: in"),
    "slab dtype": (0, aligned(4096).view(torch.int8), None, "slab: uint8 wanted, got int8"),
    "slab axes": (0, aligned(4096).view(2, -1), None, r"slab: shape \[bytes\]"),
    "slab stride": (0, aligned(8192)[::2], None, "slab: contiguous"),
    "slab address": (0, aligned(4096)[8:], None, "multiple of 256"),
    "slab device": (0, torch.zeros(4096, dtype=torch.uint8, device="meta"), None, "on cpu wanted"),
    "offsets dtype": (0, None, torch.zeros(2, 4).int(), "offsets: int64 wanted"),
    "offsets rows": (0, None, torch.zeros(3, 4).long(), "axis 0 is 3, but modules = 2"),
    "offsets columns": (0, None, torch.zeros(2, 5).long(), r"\[modules, 4\]"),
    "rank": (0, None, [0, 256, 12, 0], r"offsets\[1\]: a rank of 0 to 512"),
    "rank below": (0, None, [0, 256, -8, 0], "a rank of 0 to 512"),
    "rank beyond": (0, None, [0, 256, 520, 0], "a rank of 0 to 512"),
    "rank far beyond": (0, None, [0, 256, 2**62, 0], "a rank of 0 to 512"),
    "down aligned": (0, None, [128, 256, 8, 0], "multiples of 256 inside the 4096 bytes"),
    "up aligned": (0, None, [0, 264, 8, 0], "multiples of 256"),
    "down beyond": (0, None, [4096, 256, 8, 0], "multiples of 256"),
    "up beyond": (0, None, [0, 3840, 16, 0], "multiples of 256"),
    "far beyond": (0, None, [0, 2**62, 16, 0], "multiples of 256"),
    "below": (0, None, [-256, 256, 8, 0], "multiples of 256"),
    "scale nan": (0, None, [0, 256, 8, NAN], "a finite scale"),
    "scale infinite": (0, None, [0, 256, 8, INF], "a finite scale"),
}


@pytest.mark.parametrize("what", list(BAD_PUTS))
def test_bad_puts_are_named_and_change_nothing(what: str) -> None:
    slot, slab, offsets, message = BAD_PUTS[what]
    table = table_of([(6, 4), (5, 7)], [[8, 8], [0, 16]], torch.float32)
    before = table.rows.clone()
    if offsets is None or isinstance(offsets, list):
        offsets = torch.tensor([[0, 256, 8, 0], offsets or [512, 1024, 16, 0]])
    with pytest.raises(ArgumentError, match=message):
        table.put(slot, aligned(4096) if slab is None else slab, offsets)
    assert torch.equal(table.rows, before)
    assert table.factors(0, 0) is not None
    assert table.max_rank == 16


def test_bad_tables_are_named() -> None:
    for shapes, num_slots, dtype, message in (
        ([(4, 4)], 0, torch.float32, "num_slots: at least 1 wanted, got 0"),
        ([(4, 4)], 1, torch.float64, "dtype: float32, float16 or bfloat16 wanted"),
        ([(4, 4), (0, 4)], 1, torch.float32, r"shapes\[1\]: sizes of 1 or more wanted"),
    ):
        with pytest.raises(ArgumentError, match=message):
            AdapterTable(shapes, num_slots, dtype)
    table = table_of([(4, 4)], [[8]], torch.float32)
    for slot, module in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(ArgumentError, match="wanted, got"):
            table.factors(slot, module)
    with pytest.raises(ArgumentError, match="slot"):
        table.clear(1)


def test_sign_extended_scales_are_the_same() -> None:
    """The bits of a negative scale, as an int32 gives them."""
    table = table_of([(4, 4)], [[8]], torch.float32)
    slab, offsets = slab_of([layer_of(0, (4, 4), 8, torch.float32)])
    offsets[0, 3] = bits(-2.5) - 2**32
    table.put(0, slab, offsets)
    assert table.factors(0, 0)[2] == -2.5
    x, y = tensor(1, 4, torch.float32, 1), tensor(1, 4, torch.float32, 2)
    got, plan = y.clone(), kernels.uniform_plan(1, 0, 1)
    kernels.apply_adapters_(got, x, table, 0, plan)
    assert_close(got, y, x, table, 0, plan)


SHAPES = [(9, 33), (20, 6)]
_ranks = strategies.sampled_from((0, 8, 16, 40))
_steps = strategies.one_of(
    strategies.tuples(strategies.just("put"), strategies.integers(0, 2), _ranks, _ranks),
    strategies.tuples(strategies.just("clear"), strategies.integers(0, 2)),
    strategies.tuples(
        strategies.just("apply"),
        strategies.integers(0, 1),
        strategies.lists(strategies.integers(-1, 2), max_size=9),
    ),
)


@hypothesis.given(
    steps=strategies.lists(_steps, max_size=12), dtype=strategies.sampled_from(DTYPES)
)
def test_histories_of_a_table(steps: list[tuple], dtype: torch.dtype) -> None:
    """A table beside a dict of factors: what is applied is what was put last."""
    table, model = AdapterTable(SHAPES, 3, dtype), {}
    for number, (what, *values) in enumerate(steps):
        if what == "put":
            slot, *ranks = values
            layers = [
                layer_of(number, shape, R, dtype) for shape, R in zip(SHAPES, ranks, strict=True)
            ]
            table.put(slot, *slab_of(layers))
            model[slot] = layers
        elif what == "clear":
            table.clear(values[0])
            model.pop(values[0], None)
        else:
            module, slots = values
            inputs, outputs = SHAPES[module]
            x, y = (tensor(len(slots), n, dtype, number) for n in (inputs, outputs))
            plan = kernels.plan_adapters(torch.tensor(slots, dtype=torch.int64), 3)
            got = y.clone()
            kernels.apply_adapters_(got, x, table, module, plan)
            for t, slot in enumerate(slots):
                layer = model.get(slot, [None, None])[module]
                want = y[t].double()
                if layer is not None:
                    down, up, scale = layer
                    want = want + scale * (x[t].double() @ down.double().T) @ up.double()
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(got[t].double(), want, rtol=eps, atol=1e-3 * eps + 1e-4)
    for slot in range(3):
        for module in range(2):
            found, layer = table.factors(slot, module), model.get(slot, [None, None])[module]
            assert (found is None) == (layer is None)
            if layer is not None:
                assert all(torch.equal(a, b) for a, b in zip(found[:2], layer[:2], strict=True))


# Merging


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weights(dtype: torch.dtype) -> None:
    """As in float64, rounded once; in pieces of 4 MB; the weight stays as it was."""
    for outputs, inputs, R, kind in (
        (1, 1, 1, dtype),
        (5, 3, 9, torch.float32),
        (1100, 1030, 16, torch.bfloat16),
        (0, 4, 8, dtype),
    ):
        weight = tensor(outputs, inputs, dtype, 1)
        down, up = tensor(R, inputs, kind, 2), tensor(outputs, R, kind, 3)
        before = weight.clone()
        merged = kernels.merge_adapter(weight, down, up, 0.25)
        assert torch.equal(weight, before)
        assert merged.dtype == dtype
        want = weight.double() + 0.25 * up.double() @ down.double()
        # One rounding, and R + 2 of float32 on the magnitudes.
        size = weight.double().abs() + 0.25 * up.double().abs() @ down.double().abs()
        allowed = torch.finfo(dtype).eps / 2 * want.abs() + (R + 2) * 2.0**-24 * size
        assert ((merged.double() - want).abs() <= allowed).all()


def test_bad_merges_are_named() -> None:
    weight, down, up = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(4, 8)
    for arguments, message in (
        ((weight, down[:7], up, 1.0), "up: axis 1 is 8, but R = 7"),
        ((weight, up, down, 1.0), "down: axis 1 is 8, but I = 6"),
        ((weight.double(), down, up, 1.0), "weight: float32 or float16 or bfloat16 wanted"),
        ((weight, down.to("meta"), up, 1.0), "down: on cpu wanted, got meta"),
    ):
        with pytest.raises(ArgumentError, match=message):
            kernels.merge_adapter(*arguments)
