"""Keys turned on to other positions on a GPU: all layers and heads of a call in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from memos.triton_kernels.rounding import rounded

_PAIRS = 2048  # of a program: 16 per lane of 128
_MAX_PROGRAMS = 2**31 - 1


@triton.jit
def _turn_kernel(
    table_ptr, layers_ptr, B, H, T, HALF: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program turns TOKENS tokens of one head of one row of one layer.

    layers [L, 4] int64: address and row, head, token strides (in numbers); table [T, 2, HALF]
    float32: cosines, sines; C: HALF as a power of two; grid L * B * H * ceil(T / TOKENS).
    """
    tiles = tl.cdiv(T, TOKENS)
    task = tl.program_id(0) // tiles
    at = layers_ptr + (task // H // B).to(tl.int64) * 4
    base = tl.load(at).to(tl.pointer_type(DTYPE))
    row_stride = tl.load(at + 1)
    head_stride = tl.load(at + 2)
    token_stride = tl.load(at + 3)
    if ALIGNED:  # the host has looked: addresses and strides are multiples of 16 bytes
        ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
        base = tl.multiple_of(base, 16)
        row_stride = tl.multiple_of(row_stride, 16 // ITEM)
        head_stride = tl.multiple_of(head_stride, 16 // ITEM)
        token_stride = tl.multiple_of(token_stride, 16 // ITEM)
    base = base + (task // H % B) * row_stride + (task % H) * head_stride
    t = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, C)
    inside = (t < T)[:, None] & (c < HALF)[None, :]
    t64 = t.to(tl.int64)[:, None]
    angle = table_ptr + t64 * (2 * HALF) + c[None, :]
    cosine = tl.load(angle, mask=inside, other=0.0)
    sine = tl.load(angle + HALF, mask=inside, other=0.0)
    if INTERLEAVED:
        both = tl.arange(0, 2 * C)
        where = base + t64 * token_stride + both[None, :]
        known = (t < T)[:, None] & (both < 2 * HALF)[None, :]
        x = tl.load(where, mask=known, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [TOKENS, C, 2]))
        turned = tl.join(a * cosine - b * sine, b * cosine + a * sine)
        x = tl.reshape(turned, [TOKENS, 2 * C])
        tl.store(where, rounded(x, DTYPE), mask=known)
    else:
        where = base + t64 * token_stride + c[None, :]
        a = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(where + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(where, rounded(a * cosine - b * sine, DTYPE), mask=inside)
        tl.store(where + HALF, rounded(b * cosine + a * sine, DTYPE), mask=inside)


@triton.jit
def turns(c, HALF: tl.constexpr, FIRST: tl.constexpr):
    """Which of the channels ``c`` turn: [FIRST, FIRST + 2 HALF)."""
    return (c >= FIRST) & (c < FIRST + 2 * HALF)


@triton.jit
def turned_keys(x, angles, t, c, P: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
                HALF: tl.constexpr, FIRST: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Rows x [T, C] of float32, turned by angles [P, 2, HALF], the cosines and sines of token t.

    PAIRS: channels (2i, 2i + 1) turn together, else (i, i + HALF); FIRST is the first of them.
    """
    at = c - FIRST
    if PAIRS:
        second = at % 2 == 1
        pair = at // 2
        step = 1
    else:
        second = at >= HALF
        pair = tl.where(second, at - HALF, at)
        step = HALF
    inside = (t < P)[:, None] & turns(c, HALF, FIRST)[None, :]
    angle = angles + t.to(tl.int64)[:, None] * (2 * HALF) + pair[None, :]
    cosine = tl.load(angle, mask=inside, other=0.0)
    sine = tl.load(angle + HALF, mask=inside, other=0.0)
    if PAIRS and FIRST % 2 == 0:
        a, b = tl.split(tl.reshape(x, [T, C // 2, 2]))
        y = tl.reshape(tl.join(b, a), [T, C])
    elif not PAIRS and FIRST == 0 and 2 * HALF == C:
        a, b = tl.split(tl.permute(tl.reshape(x, [T, 2, HALF]), (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(b, a), (0, 2, 1)), [T, C])
    else:
        other = tl.where(second, c - step, c + step)
        other = tl.minimum(tl.maximum(other, 0), C - 1)
        y = tl.gather(x, tl.broadcast_to(other[None, :], [T, C]), 1)
    turned = tl.where(second[None, :], x * cosine + y * sine, x * cosine - y * sine)
    return tl.where(turns(c, HALF, FIRST)[None, :], turned, x)


def sizes_of(T: int, half: int) -> tuple[int, int]:
    """C and TOKENS."""
    C = triton.next_power_of_2(half)
    return C, max(1, min(triton.next_power_of_2(T), _PAIRS // C))


def rotate_positions_(
    keys: Sequence[torch.Tensor],
    table: torch.Tensor,
    half: int,
    aligned: bool,
    interleaved: bool,
) -> None:
    """The contract is the op's, ``memos.kernels.rotate_positions_``; one launch.

    Args:
        table:   float32 on the device: the bits of [L, 4] int64, address and row, head and token
            stride of each layer, then [T, 2, half] cosines and sines.
        half:    pairs of channels that turn.
        aligned: whether addresses, strides and a half are multiples of 16 bytes.
    """
    B, H, T, _ = keys[0].shape
    L = len(keys)
    C, tokens = sizes_of(T, half)
    programs = L * B * H * triton.cdiv(T, tokens)
    assert programs <= _MAX_PROGRAMS
    with torch.cuda.device_of(keys[0]):
        _turn_kernel[(programs,)](
            table[8 * L :], table[: 8 * L].view(torch.int64), B, H, T, half, C, tokens, interleaved,
            DTYPES[keys[0].dtype], aligned, num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
