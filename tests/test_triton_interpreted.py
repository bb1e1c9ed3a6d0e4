"""The Triton kernels in Triton's interpreter: beside the references and the CPU's bytes.

Triton decides when it is imported whether it interprets. test_triton.py runs this file in a process
of its own, with TRITON_INTERPRET=1; elsewhere it is skipped. Interpretation is slow: small shapes.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton.py, in a process that interprets", allow_module_level=True)

import torch

from memos import kernels
from memos.errors import ArgumentError
from memos.kernels import AdapterTable, Codec, _native

sys.path.insert(0, str(Path(__file__).parent))
adapters = importlib.import_module("test_adapter_ops")
golden = importlib.import_module("test_golden")
rerotation = importlib.import_module("test_rerotation")
table_of_ops = importlib.import_module("test_ops")
kernels.load_all()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON = ("gather_blocks", "write_blocks", "pack_kv", "unpack_kv", "rotate_positions_",
          "plan_adapters", "apply_adapters_", "merge_adapter")  # fmt: skip
CPU = "cpu" if _native.missing() is None else "reference"


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_bytes(x: Any) -> list[Any]:
    if isinstance(x, torch.Tensor):
        flat = x.contiguous().view(-1)
        return [x.shape, x.dtype, flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""]
    return [as_bytes(y) for y in x] if isinstance(x, list | tuple) else []


def assert_same(name: str, arguments: tuple[Any, ...], label: str = "") -> None:
    """Result and arguments of the Triton kernel have the bytes of the CPU's."""
    theirs, ours = copy.deepcopy(arguments), copy.deepcopy(arguments)
    with kernels.using(CPU):
        want = kernels.ops[name](*theirs)
    with kernels.using("triton"):
        got = kernels.ops[name](*ours)
    assert as_bytes(got) == as_bytes(want), f"{label}: another result"
    assert as_bytes(list(ours)) == as_bytes(list(theirs)), f"{label}: other arguments"


def test_every_op_is_ready() -> None:
    for name in TRITON:
        assert kernels.available()[name]["triton"] == "ready"


# Copies of blocks

KINDS = (*DTYPES, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_blocks_are_copied(dtype: torch.dtype) -> None:
    """One element, odd widths, one short of a tile (of 8192 bytes), a tile, one past it."""
    g = torch.Generator().manual_seed(7)
    ids = torch.tensor([3, 0, 6], dtype=torch.int64)
    tile = 8192 // dtype.itemsize
    for B in (1, 2, 3, 7, 8, 24, tile - 1, tile, tile + 1):
        cache = torch.randint(0, 100, (7, B), generator=g).to(dtype)
        assert_same("gather_blocks", (cache, torch.tensor([3, 0, 3, 6])), f"{B}")
        assert_same("write_blocks", (cache, ids, cache[:3].clone()), f"{B}")


def test_no_blocks_and_no_elements() -> None:
    ids = torch.tensor([3, 0], dtype=torch.int64)
    for M, B in ((0, 5), (2, 0), (0, 0)):
        cache, some = torch.ones(7, B), ids[:M].contiguous()
        assert_same("gather_blocks", (cache, some))
        assert_same("write_blocks", (cache, some, torch.zeros(M, B)))


def test_a_view_may_start_at_any_byte() -> None:
    """No word wider than its place allows, and nothing beside the blocks is written."""
    for start in (1, 2, 4, 8, 16):
        whole = torch.arange(16 + 7 * 48, dtype=torch.int64).to(torch.uint8)
        cache, ids = whole[start : start + 7 * 48].view(7, 48), torch.tensor([5, 1])
        before = whole.clone()
        with kernels.using("triton"):
            got = kernels.gather_blocks(cache, ids)
            assert torch.equal(got, cache[ids])
            kernels.write_blocks(cache, ids, 255 - got)
        want = before.clone()
        want[start : start + 7 * 48].view(7, 48)[ids] = 255 - got
        assert torch.equal(whole, want)


# KV


def kv_cases(dtype: torch.dtype) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Label, codec and what test_ops.cache is asked for; all dtypes together: every codec with
    every shape and trouble that may break it."""
    n = DTYPES.index(dtype)
    usual = {"L": 1, "N": 2, "P": 32, "H": 1, "Dk": 64, "Dv": 64}
    for i, codec in enumerate(table_of_ops.CODECS):
        if dtype == torch.bfloat16 or i % 2 == n:
            yield "usual", codec, usual
    cases = (
        ("many", "int4", {**usual, "L": 2, "N": 3, "H": 2}),
        ("one token", "int4", {"P": 1, "H": 1, "L": 1, "Dk": 16, "Dv": 8}),
        ("one token", "fp8-g32-rot", {"P": 1, "H": 1, "L": 1, "Dk": 8, "Dv": 8}),
        ("odd", "int4-g32-rot", {"P": 37, "H": 3, "Dk": 80, "Dv": 96, "L": 1, "N": 2}),
        ("odd", "int2-g64-rot", {"P": 65, "H": 1, "Dk": 40, "Dv": 24, "L": 1, "N": 2}),
        ("odd", "fp8-g64", {"P": 33, "H": 1, "Dk": 24, "Dv": 192, "L": 1, "N": 2}),
        ("odd", "k:int8-g32,v:int2-g64", {"P": 70, "H": 1, "Dk": 8, "Dv": 16, "L": 1, "N": 2}),
        ("padding", "int2-g32", {"P": 3, "H": 1, "L": 1, "Dk": 8, "Dv": 8, "N": 2}),
        ("padding", "raw", {"P": 3, "H": 1, "L": 2, "Dk": 7, "Dv": 5, "N": 2}),
        ("wide", "int4-g64-rot", {"P": 16, "H": 1, "Dk": 256, "Dv": 256, "L": 1, "N": 2}),
        ("wide", "int8-g32-rot", {"P": 9, "H": 1, "Dk": 576, "Dv": 512, "L": 1, "N": 2}),
        ("wide", "fp8-g32-rot", {"P": 5, "H": 1, "Dk": 1024, "Dv": 1024, "L": 1, "N": 2}),
        ("transformers", "int4", {**usual, "H": 2, "layout": "transformers"}),
        ("transformers", "raw", {**usual, "H": 3, "Dk": 7, "layout": "transformers"}),
    )
    for i, case in enumerate(cases):
        if i % 3 == n or case[0] in ("padding", "transformers"):
            yield case
    kinds = ("int8-g64", "int4-g32-rot", "int2-g32", "fp8-g64", "fp8-g32-rot")
    for i, how in enumerate(("specials", "constant", "tiny", "all nan", "wide", "outliers")):
        for j, codec in enumerate(kinds):
            if how == "specials" or (i + j) % 3 == n:
                yield how, codec, {"P": 20, "H": 1, "L": 1, "N": 2, "Dk": 40, "Dv": 64, "how": how}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_bytes_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """What is packed, and what is unpacked again: from one tensor, and from rows apart."""
    for seed, (label, codec, spec) in enumerate(kv_cases(dtype)):
        keys, values = table_of_ops.cache(dtype, seed=seed, **spec)
        ids, parsed = torch.tensor([len(keys[0]) - 1, 0]), Codec.parse(codec)
        label = f"{label}, {codec}, {dtype}"
        assert_same("pack_kv", (keys, values, ids, parsed), label)
        with kernels.using(CPU):
            packed = kernels.pack_kv(keys, values, ids, parsed)
        target = [torch.zeros_like(t) for t in keys], [torch.zeros_like(t) for t in values]
        rows = kernels.PackedRows(packed) if seed % 3 == 0 else packed
        assert_same("unpack_kv", (*target, ids, rows, parsed), label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_turn_as_on_the_cpu_while_they_are_unpacked(dtype: torch.dtype) -> None:
    for label, arguments in rerotation.cases(dtype, ("raw", "int4-g32-rot", "fp8-g64")):
        assert_same("unpack_kv", arguments, label)


@pytest.mark.parametrize("codec", golden.CODECS)
def test_golden_bytes(codec: str) -> None:
    kept = json.loads(golden.GOLDEN.read_text())
    with kernels.using("triton"):
        for dtype in golden.DTYPES:
            assert golden.entry("small", dtype, codec) == kept[f"small {dtype} {codec}"]


def test_every_code_and_every_scale_decodes_as_on_the_cpu() -> None:
    """Packed bytes are whatever a file holds: all 256 codes, scales and zeros of any 16 bits."""
    g = torch.Generator().manual_seed(11)
    for codec in ("int8-g32", "int4-g32", "int2-g32-rot", "fp8-g32"):
        parsed = Codec.parse(codec)
        E = parsed.layer_bytes(32, 1, 32, 32, 4)
        packed = torch.randint(0, 256, (4, 1, E), generator=g).to(torch.uint8)
        packed[0, 0, :256] = torch.arange(256).to(torch.uint8)[: min(256, E)]
        for dtype in DTYPES[:1]:
            target = [torch.zeros(4, 32, 1, 32, dtype=dtype) for _ in range(2)]
            arguments = ([target[0]], [target[1]], torch.arange(4), packed, parsed)
            assert_same("unpack_kv", arguments, codec)


def test_nothing_outside_the_blocks_is_written() -> None:
    """Guard tokens between the heads keep their marks."""
    keys, values = table_of_ops.cache(torch.bfloat16, L=1, N=2, P=33, H=2, Dk=72, Dv=40)
    for name in ("raw", "int4", "fp8-g32-rot"):
        codec, ids = Codec.parse(name), torch.tensor([0, 1])
        packed = kernels.pack_kv(keys, values, ids, codec)
        guarded = [torch.full((2, 35, 3, D), 7.0, dtype=torch.bfloat16) for D in (72, 40)]
        with kernels.using("triton"):
            kernels.unpack_kv(*[[g[:, 1:34, :2]] for g in guarded], ids, packed, codec)
        for g in guarded:
            assert (g[:, 0] == 7).all()
            assert (g[:, 34] == 7).all()
            assert (g[:, :, 2] == 7).all()


def test_zeros_of_both_signs_make_one_scale() -> None:
    """A group of minus zeros alone has scale +0, as on the CPU."""
    zeros = torch.zeros(1, 40, 1, 64, dtype=torch.float16)
    zeros.view(-1)[::3] = -0.0
    zeros[..., 5:9] = -0.0
    zeros[:, 7:9] = -0.0
    for codec in ("int4-g64", "int8-g32-rot", "fp8-g32"):
        assert_same("pack_kv", ([zeros], [zeros], torch.tensor([0]), Codec.parse(codec)), codec)


# Positions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_turned_as_on_the_cpu(dtype: torch.dtype) -> None:
    """Both pairings, part of the channels, odd sizes, strides of a cache, heads apart."""
    g = torch.Generator().manual_seed(5)
    for L, B, H, T, D, half, neighbours in (
        (2, 1, 2, 37, 64, 32, False), (1, 2, 1, 5, 80, 40, True), (2, 1, 1, 1, 24, 5, False),
        (1, 1, 3, 9, 16, 3, True), (3, 1, 1, 70, 8, 4, False), (1, 1, 1, 0, 8, 4, False),
    ):  # fmt: skip
        wide = [numbers(B, T, H + 1, D + 8, dtype=dtype, seed=i) for i in range(L)]
        keys = [x.transpose(1, 2)[:, :H, :, :D] for x in wide]
        old = torch.randint(0, 1 << 20, (T,), generator=g)
        new = torch.randint(0, 1 << 20, (T,), generator=g)
        inv_freq = 10000.0 ** -(torch.arange(half) / max(half, 1))
        label = f"{L, B, H, T, D, half, neighbours}, {dtype}"
        assert_same("rotate_positions_", (keys, old, new, inv_freq, neighbours), label)


# Adapters


def launch(y: Any, x: Any, table: Any, module: int, plan: Any, one: bool) -> torch.Tensor:
    """y after ``apply_adapters_`` in one launch, or in two."""
    from memos.triton_kernels import adapters as kernel

    out: torch.Tensor = y.clone()
    where = table.rows, module, table.max_rank
    kernel.apply_adapters_(out, x, *where, plan.order, plan.starts, one_launch=one)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_equals_reference_in_one_launch_and_in_two(dtype: torch.dtype) -> None:
    for i, (label, (shape, ranks, slots)) in enumerate(adapters.CASES.items()):
        if dtype != torch.bfloat16 and i % 2 != DTYPES.index(dtype):
            continue
        table = adapters.table_of([(5, 5), shape], [(8, R) for R in ranks], dtype)
        with kernels.using("triton"):  # the plan of a device: longer, the same adapters
            plan = kernels.plan_adapters(torch.tensor(slots, dtype=torch.int64), len(ranks))
        x = numbers(len(slots), shape[0], dtype=dtype, seed=1)
        y = numbers(len(slots), shape[1], dtype=dtype, seed=2)
        one, two = (launch(y, x, table, 1, plan, one) for one in (True, False))
        assert as_bytes(one) == as_bytes(two), label
        adapters.assert_close(one, y, x, table, 1, plan, label)
        bare = [t for t, slot in enumerate(slots) if slot < 0 or ranks[slot] == 0]
        assert torch.equal(one[bare], y[bare])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """The same bits alone, in parts of a batch, in another order, in one launch and in two."""
    T, inputs, outputs = 40, 1203, 67
    table = adapters.table_of([(inputs, outputs)], [[8], [40], [72]], dtype)
    x, y = (numbers(T, size, dtype=dtype, seed=size) for size in (inputs, outputs))
    g = torch.Generator().manual_seed(4)
    slots = torch.randint(-1, 3, (T,), generator=g)
    slots[:24] = 1

    def run(tokens: torch.Tensor) -> torch.Tensor:
        part = y[tokens].clone()
        with kernels.using("triton"):
            plan = kernels.plan_adapters(slots[tokens].clone(), 3)
            kernels.apply_adapters_(part, x[tokens].clone(), table, 0, plan)
        return part

    whole = run(torch.arange(T))
    for size in (1, 1, 2, 3, 15, 17, 33):
        tokens = torch.randperm(T, generator=g)[:size]
        assert torch.equal(run(tokens), whole[tokens]), f"{size} tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    """Where no sum is rounded, nothing but the one rounding into y is left: the same bits."""
    g = torch.Generator().manual_seed(3)

    def whole(rows: int, columns: int, most: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, (rows, columns), generator=g).to(dtype)

    for inputs, outputs, R, T in ((100, 70, 8, 9), (257, 300, 40, 3), (31, 33, 512, 5)):
        table = AdapterTable([(inputs, outputs)], 1, dtype)
        table.put(0, *adapters.slab_of([(whole(R, inputs, 3), whole(R, outputs, 3), 0.5)]))
        x, y = whole(T, inputs, 3), whole(T, outputs, 200)
        plan = kernels.uniform_plan(T, 0, 1)
        want = y.clone()
        kernels.apply_adapters_.reference(want, x, table, 0, plan)
        assert torch.equal(launch(y, x, table, 0, plan, True), want)
        assert torch.equal(launch(y, x, table, 0, plan, False), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    inputs, outputs, T = 70, 40, 6
    table = adapters.table_of([(inputs, outputs)], [[16]], dtype)
    plan = kernels.uniform_plan(T, 0, 1)
    x, y = numbers(T, inputs, dtype=dtype, seed=1), numbers(T, outputs, dtype=dtype, seed=2)
    clean = launch(y, x, table, 0, plan, True)
    x[1, 3], x[2, 69], x[3, 64] = float("nan"), float("inf"), -float("inf")
    y[4, 0], y[4, 1], y[4, 39] = float("nan"), float("inf"), -float("inf")
    want = y.clone()
    kernels.apply_adapters_.reference(want, x, table, 0, plan)
    for one in (True, False):
        got = launch(y, x, table, 0, plan, one)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        assert torch.equal(got[[0, 5]], clean[[0, 5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_apart_and_nothing_beside_them_is_written(dtype: torch.dtype) -> None:
    inputs, outputs, slots = 37, 53, [0, -1, 1, 1]
    T = len(slots)
    table = adapters.table_of([(inputs, outputs)], [[8], [24]], dtype)
    plan = kernels.plan_adapters(torch.tensor(slots), 2)
    y, x = numbers(T, outputs, dtype=dtype, seed=1), numbers(T, inputs, dtype=dtype, seed=2)
    for one in (True, False):
        guarded = torch.full((T + 2, outputs + 7), 7.0, dtype=dtype)
        rows = guarded[1:-1, 3 : 3 + outputs]
        rows.copy_(y)
        wide = torch.full((T, inputs + 3), float("nan"), dtype=dtype)
        wide[:, 1 : 1 + inputs] = x
        from memos.triton_kernels import adapters as kernel

        where = table.rows, 0, table.max_rank, plan.order, plan.starts
        kernel.apply_adapters_(rows, wide[:, 1 : 1 + inputs], *where, one_launch=one)
        assert torch.equal(rows, launch(y, x, table, 0, plan, one))
        rows.fill_(7.0)
        assert (guarded == 7).all()


def test_tokens_that_are_not_there_are_left_alone() -> None:
    """A plan that lies (on a GPU nobody looks) writes nowhere but into y."""
    table = adapters.table_of([(16, 16)], [[8]], torch.float32)
    y, x = torch.zeros(3, 16), torch.ones(3, 16)
    plan = kernels.AdapterPlan(torch.tensor([1, -1, 9]), torch.tensor([0, 3]), 3)
    for one in (True, False):
        got = launch(y, x, table, 0, plan, one)
        assert got[1].abs().sum() > 0
        assert (got[[0, 2]] == 0).all()


@pytest.mark.parametrize("T", [0, 1, 15, 1024, 1025, 2100])
def test_plans(T: int) -> None:
    """Stable, with the tokens of no adapter (and those out of range) behind all others."""
    slots = torch.randint(-1, 4, (T,), generator=torch.Generator().manual_seed(T))
    with kernels.using("reference"):
        want = kernels.plan_adapters(slots, 4)
    for spoilt in (slots, torch.where(slots < 0, 4 + 10**6, slots)):
        with kernels.using("triton"):
            got = kernels.plan_adapters(spoilt, 4)
        assert torch.equal(got.starts, want.starts)
        assert torch.equal(got.order[: len(want.order)], want.order)
        assert torch.equal(got.order.sort().values, torch.arange(T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weights(dtype: torch.dtype) -> None:
    """As in float64, rounded once; any strides; the weight stays as it was."""
    for outputs, inputs, R, kind in (
        (1, 1, 1, dtype), (5, 3, 9, torch.float32), (70, 130, 80, torch.bfloat16), (0, 4, 8, dtype)
    ):  # fmt: skip
        weight = numbers(inputs, outputs, dtype=dtype, seed=1).T
        down = numbers(R, inputs, dtype=kind, seed=2)
        up = numbers(R, outputs, dtype=kind, seed=3).T
        before = weight.clone()
        with kernels.using("triton"):
            merged = kernels.merge_adapter(weight, down, up, 0.25)
        assert torch.equal(weight, before)
        assert merged.dtype == dtype
        assert merged.is_contiguous()
        want = weight.double() + 0.25 * up.double() @ down.double()
        size = weight.double().abs() + 0.25 * up.double().abs() @ down.double().abs()
        allowed = torch.finfo(dtype).eps / 2 * want.abs() + (R + 2) * 2.0**-24 * size
        assert ((merged.double() - want).abs() <= allowed).all()


def test_bad_arguments_are_refused() -> None:
    ids = torch.tensor([0])
    with kernels.using("triton"):
        for bad in (torch.zeros(7), torch.zeros(7, 4).T):
            with pytest.raises(ArgumentError):
                kernels.gather_blocks(bad, ids)
        with pytest.raises(ArgumentError, match="block_ids: on cpu wanted, got meta"):
            kernels.gather_blocks(torch.zeros(2, 4), ids.to("meta"))
        keys = [torch.zeros(1, 4, 1, 8)]
        with pytest.raises(ArgumentError, match=r"values\[0\]: on cpu wanted, got meta"):
            kernels.pack_kv(keys, [keys[0].to("meta")], ids, Codec.parse("int4"))
