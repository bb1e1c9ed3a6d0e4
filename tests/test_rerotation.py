"""Keys that are turned on to other positions while they are unpacked."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos import kernels  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402
from memos.kernels import Codec, Rerotation  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
table_of_ops: Any = importlib.import_module("test_ops")
isa = table_of_ops.isa
DTYPES = table_of_ops.DTYPES

# Head size, pairs that turn, the first channel of them.
SHAPES = (
    (64, 32, 0),
    (128, 16, 0),
    (80, 40, 0),
    (96, 20, 41),
    (64, 7, 3),
    (8, 4, 0),
    (576, 32, 512),
)
CODECS = ("raw", "int8", "int4-g32-rot", "int4-g64", "int2-g32", "fp8-g64", "fp8-g32-rot")
IDS = torch.tensor([2, 0])


def moved(P: int, R: int, first: int = 0, interleaved: bool = False, seed: int = 0) -> Rerotation:
    """Two blocks of P tokens, each token from anywhere to anywhere."""
    g = torch.Generator().manual_seed(seed)
    old, new = torch.randint(-9, 1 << 17, (2, 2, P), generator=g)
    return Rerotation(old, new, 10000 ** -torch.arange(0, 1, 1 / R)[:R], interleaved, first)


def cases(
    dtype: torch.dtype, codecs: tuple[str, ...] = CODECS
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of unpack_kv."""
    for i, (D, R, first) in enumerate(SHAPES):
        for j, name in enumerate(codecs):
            codec, P = Codec.parse(name), (64, 33, 70)[(i + j) % 3]
            how = "wide" if dtype == torch.float16 and name != "raw" else ""
            keys, values = table_of_ops.cache(dtype, P=P, Dk=D, Dv=24, L=2, seed=i, how=how)
            packed = kernels.pack_kv(keys, values, IDS, codec)
            rows = packed if j % 2 else kernels.PackedRows(packed)
            by = moved(P, R, first, interleaved=bool((i + j) % 2), seed=j)
            target = [torch.full_like(x, 7) for x in keys], [torch.full_like(x, 7) for x in values]
            yield f"{name}, {D}, {R} from {first}, {P} tokens", (*target, IDS, rows, codec, by)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_writes_what_the_reference_writes(dtype: torch.dtype, isa: str) -> None:
    for label, arguments in cases(dtype):
        ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
        kernels.unpack_kv.reference(*theirs)
        with kernels.using("cpu"):
            kernels.unpack_kv(*ours)
        for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
            assert table_of_ops.same(table_of_ops.bytes_of(a), table_of_ops.bytes_of(b)), label
            assert (a[1] == 7).all(), f"{label}: a block was written that was not asked for"


@pytest.mark.parametrize("name", CODECS)
def test_it_is_unpacking_and_then_turning(name: str) -> None:
    """Bit for bit in float32 and for raw; elsewhere with one rounding where two calls have two."""
    for dtype in DTYPES:
        for label, (keys, values, ids, rows, codec, by) in cases(dtype, (name,)):
            fused, apart = ([torch.zeros_like(x) for x in keys] for _ in range(2))
            kernels.unpack_kv(fused, values, ids, rows, codec, by)
            kernels.unpack_kv(apart, values, ids, rows, codec)
            before = [x.float() for x in apart]
            wide = [x.clone() for x in before]
            for some in (apart, wide):
                for m, block in enumerate(ids.tolist()):
                    views = [x[block].transpose(0, 1)[None, ..., by.first :] for x in some]
                    kernels.rotate_positions_(
                        views, by.old[m], by.new[m], by.inv_freq, by.interleaved
                    )
            if dtype == torch.float32 or name == "raw":
                assert all(map(torch.equal, fused, apart)), label
                continue
            for a, b, first in zip(fused, wide, before, strict=True):
                step = 2**-7 if dtype == torch.bfloat16 else 2**-9
                room = step * b.abs().amax(-1, keepdim=True) + 2**-14
                fits = (b.abs() <= 65000) & (first.abs().amax(-1, keepdim=True) <= 65000)
                assert ((a.float() - b).abs() <= room)[fits].all(), label


def test_positions_that_stay_change_nothing() -> None:
    keys, values = table_of_ops.cache(torch.bfloat16)
    packed = kernels.pack_kv(keys, values, IDS, Codec.parse("int4"))
    at = torch.arange(128).view(2, 64)
    found = []
    for by in (None, Rerotation(at, at, torch.rand(32)), Rerotation(at, at + 5, torch.zeros(0))):
        out = [torch.zeros_like(x) for x in keys]
        kernels.unpack_kv(out, values, IDS, packed, Codec.parse("int4"), by)
        found.append(out)
    for out in found[1:]:
        assert all(map(torch.equal, out, found[0]))


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_threads_do_not_change_bytes(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough blocks for several threads and for stores past the caches."""
    monkeypatch.setenv("MEMOS_THREADS", threads)
    keys, values = table_of_ops.cache(torch.bfloat16, L=3, N=40, H=4, Dk=128, Dv=128)
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    at = torch.arange(40 * 64).view(40, 64)
    by = Rerotation(at, at + 999, 10000 ** -torch.arange(0, 1, 1 / 64))
    for name in ("int4", "raw"):
        codec = Codec.parse(name)
        packed = kernels.pack_kv(keys, values, ids, codec)
        ours, theirs = ([torch.zeros_like(x) for x in keys] for _ in range(2))
        kernels.unpack_kv(ours, values, ids, packed, codec, by)
        kernels.unpack_kv.reference(theirs, values, ids, packed, codec, by)
        assert all(map(torch.equal, ours, theirs)), name


def test_nothing_outside_the_blocks_is_written(isa: str) -> None:
    keys, values = table_of_ops.cache(torch.bfloat16, L=1, N=2, P=33, H=2, Dk=72, Dv=40)
    ids = torch.tensor([0, 1])
    for name in CODECS:
        codec = Codec.parse(name)
        packed = kernels.pack_kv(keys, values, ids, codec)
        guarded = [torch.full((2, 35, 3, D), 7.0, dtype=torch.bfloat16) for D in (72, 40)]
        kernels.unpack_kv(*[[g[:, 1:34, :2]] for g in guarded], ids, packed, codec, moved(33, 36))
        for g in guarded:
            assert (g[:, 0] == 7).all()
            assert (g[:, 34] == 7).all()
            assert (g[:, :, 2] == 7).all()


def test_the_table_of_angles_is_made_once() -> None:
    by = moved(64, 32)
    assert by.table is by.table_on(torch.device("cpu"))
    assert by.table.shape == (2, 64, 2, 32)
    assert by.table.dtype == torch.float32
    from memos.kernels.rerotation import turn_table

    assert torch.equal(by.table[1], turn_table(by.old[1], by.new[1], by.inv_freq))


SOME, WRONG, FEW = torch.zeros(2, 64).long(), torch.zeros(3, 64).long(), torch.ones(4)
BAD = {
    "no object": (5, "a Rerotation wanted, got int"),
    "blocks": (Rerotation(WRONG, WRONG, FEW), "M = 2"),
    "tokens": (Rerotation(SOME[:, :9], SOME, FEW), "P = 64"),
    "dtype": (Rerotation(SOME.float(), SOME, FEW), "int64"),
    "frequencies": (Rerotation(SOME, SOME, FEW.half()), "float32"),
    "channels": (moved(64, 33), r"got \[0, 66\)"),
    "beyond": (moved(64, 8, 50), r"got \[50, 66\)"),
    "negative": (moved(64, 8, -1), r"got \[-1, 15\)"),
}


@pytest.mark.parametrize("label", list(BAD))
def test_bad_arguments_are_named(label: str) -> None:
    by, said = BAD[label]
    keys, values = table_of_ops.cache(torch.float32)
    packed = kernels.pack_kv(keys, values, IDS, Codec.parse("int8"))
    with pytest.raises(ArgumentError, match=said):
        kernels.unpack_kv(keys, values, IDS, packed, Codec.parse("int8"), by)
