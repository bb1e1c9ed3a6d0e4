"""The CUDA backend on a machine without a GPU: it says why not, and refuses what it cannot read."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos import kernels  # noqa: E402
from memos.errors import ArgumentError, BackendError  # noqa: E402
from memos.kernels import _cuda  # noqa: E402

kernels.load_all()

OPS = (
    "gather_blocks", "write_blocks", "pack_kv", "unpack_kv", "rotate_positions_", "apply_adapters_"
)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_the_backend_and_says_whether_it_runs(name: str) -> None:
    said = kernels.available()[name]["cuda"]
    assert said == (_cuda.missing() or "ready")
    if not _cuda.built():
        assert "MEMOS_CUDA=ON" in said


def test_forced_it_runs_or_raises() -> None:
    """Also where a GPU is: addresses of the CPU are refused, not handed over."""
    cache, ids = torch.zeros(3, 8), torch.tensor([0])
    with kernels.using("cuda"), pytest.raises(BackendError, match="cuda"):
        kernels.gather_blocks(cache, ids)
    with kernels.using("cuda"), pytest.raises(BackendError, match="cuda"):
        kernels.write_blocks(cache, ids, torch.zeros(1, 8))
    keys = [torch.zeros(2, 4, 1, 8)]
    codec = kernels.Codec.parse("int4")
    packed = kernels.pack_kv(keys, keys, ids, codec)
    with kernels.using("cuda"), pytest.raises(BackendError, match="cuda"):
        kernels.pack_kv(keys, keys, ids, codec)
    with kernels.using("cuda"), pytest.raises(BackendError, match="cuda"):
        kernels.unpack_kv(keys, keys, ids, packed, codec)
    at = torch.arange(1)
    with kernels.using("cuda"), pytest.raises(BackendError, match="cuda"):
        kernels.rotate_positions_([torch.zeros(1, 1, 1, 8)], at, at + 1, torch.ones(4))


def test_tensors_of_the_cpu_are_not_taken() -> None:
    cache, ids = torch.zeros(3, 8), torch.tensor([0])
    backends = kernels.ops["gather_blocks"].backends
    assert not backends["cuda"].accepts(cache, ids)
    keys = [torch.zeros(2, 4, 1, 8)]
    codec = kernels.Codec.parse("int4")
    assert not kernels.ops["pack_kv"].backends["cuda"].accepts(keys, keys, ids, codec)


def test_moving_blocks_wants_a_device() -> None:
    planes, host = [torch.zeros(3, 8)], torch.zeros(1, 1, 8)
    with pytest.raises((BackendError, ArgumentError)):
        _cuda.move_blocks(planes, [0], host, to_host=True)


def test_zeros_of_both_signs_make_one_scale() -> None:
    """Which of them is the highest depends on the order of comparison: no backend may show it."""
    zeros = torch.zeros(1, 64, 2, 64)
    zeros.view(-1)[::3] = -0.0
    zeros[..., 5:9] = -0.0
    codecs = ("int4-g64", "int4-g32-rot", "int8-g64", "fp8-g64")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, ids = [zeros.to(dtype)], torch.tensor([0])
        for codec in map(kernels.Codec.parse, codecs):
            want = kernels.pack_kv.reference(x, x, ids, codec)
            assert torch.equal(kernels.pack_kv(x, x, ids, codec), want), codec.name
            assert not (codec.key.kind == "int4" and want.any())
