"""Keys of rotary position embeddings at other positions: the op and its reference."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from memos.errors import ArgumentError
from memos.kernels import _cuda, _library, _native, _triton
from memos.kernels._dims import Dims, contiguous
from memos.kernels._op import op
from memos.kernels.kv import DTYPES
from memos.kernels.rerotation import turn_table, turned

_PER_TOKEN_BYTES = 3  # turning a number costs about as much as copying so many times its bytes


def _check_rotate(
    keys: Sequence[torch.Tensor],
    old: torch.Tensor,
    new: torch.Tensor,
    inv_freq: torch.Tensor,
    interleaved: bool = False,
) -> None:
    if not len(keys):
        raise ArgumentError("keys: at least one layer wanted, got none")
    dims = Dims()
    for layer, key in enumerate(keys):
        dims.tensor(f"keys[{layer}]", key, "B H T D", list(DTYPES))
        if key.dtype != keys[0].dtype or key.device != keys[0].device:
            raise ArgumentError(
                f"keys[{layer}]: {keys[0].dtype} on {keys[0].device} wanted, got {key.dtype} on "
                f"{key.device}"
            )
        if key.shape[3] > 1 and key.stride(3) != 1:
            raise ArgumentError(f"keys[{layer}]: stride 1 wanted for axis 3, got {key.stride(3)}")
        for axis in range(3):
            if key.shape[axis] > 1 and key.stride(axis) == 0:
                raise ArgumentError(f"keys[{layer}]: numbers of their own wanted along axis {axis}")
    for name, positions in (("old", old), ("new", new)):
        dims.tensor(name, positions, "T", [torch.int64])
    dims.tensor("inv_freq", inv_freq, "R", [torch.float32, torch.float64])
    contiguous("inv_freq", inv_freq)
    if 2 * dims["R"] > dims["D"]:
        raise ArgumentError(
            f"inv_freq: at most D / 2 = {dims['D'] // 2} frequencies wanted, got {dims['R']}"
        )


@op(check=_check_rotate)
def rotate_positions_(
    keys: Sequence[torch.Tensor],
    old: torch.Tensor,
    new: torch.Tensor,
    inv_freq: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """Turn keys that were computed at some positions on to others, in place.

    A rotary embedding turns the pair of channels (a, b) with frequency f by position * f. So a
    key moves from ``old`` to ``new`` by ``a' = a c - b s``, ``b' = b c + a s`` with the cosine and
    sine of the angle between them. A factor that the model multiplies its keys with (yarn's
    attention scaling) stays in them. Angles are float64, the arithmetic is float32, and each
    number is rounded once to its dtype. Every backend writes the same bytes.

    Args:
        keys:        L tensors [B, H, T, D] fp32, fp16 or bf16, any strides with the last one 1;
            changed.
        old, new:    [T] int64, the positions of the T tokens, of either sign.
        inv_freq:    [R] float32 as the model has them, or float64; R <= D / 2. The first 2 R
            channels turn, the others stay.
        interleaved: pairs are channels (2i, 2i + 1); else (i, i + R).

    Raises:
        ArgumentError: a shape, dtype or stride is out of contract.

    Cost: reads and writes L * B * H * T * 2 R numbers once; T * R sines and cosines.
    Source: RoFormer (arXiv 2104.09864, section 3.2.2).
    """
    R = len(inv_freq)
    cosine, sine = turn_table(old, new, inv_freq).to(keys[0].device).unbind(1)
    for key in keys:
        part = key[..., : 2 * R]
        part.copy_(turned(part, cosine, sine, interleaved))


def _on_cpu(keys: Sequence[torch.Tensor], *rest: object, **more: object) -> bool:
    return keys[0].device.type == "cpu"


@rotate_positions_.backend("cpu", accepts=_on_cpu, missing=_native.missing)
def _rotate_cpu(
    keys: Sequence[torch.Tensor],
    old: torch.Tensor,
    new: torch.Tensor,
    inv_freq: torch.Tensor,
    interleaved: bool = False,
) -> None:
    table = turn_table(old, new, inv_freq)
    layers = array("q")
    for key in keys:
        layers.extend([key.data_ptr(), *key.stride()[:3]])
    B, H, T, _ = keys[0].shape
    call = array("q", [layers.buffer_info()[0], B, H, T, DTYPES[keys[0].dtype], len(inv_freq)])
    call.extend([int(interleaved), table.data_ptr()])
    address, tasks = call.buffer_info()[0], len(keys) * B * H
    size = tasks * T * 2 * len(inv_freq) * keys[0].element_size()
    _native.parallel(
        lambda first, last: _native.core().cpu_turn_keys(address, first, last),
        tasks,
        _PER_TOKEN_BYTES * size,
    )


_cuda.register_rope(rotate_positions_, turn_table)
_triton.register_rope(rotate_positions_, turn_table)
_library.register_rope(rotate_positions_)
