"""Low-rank adapters on a GPU: sorting tokens by adapter, applying, merging.

Tokens of one adapter go 16 at a time (a tile). Each program finds its tile in the plan on the
device, so that the host reads nothing and a captured graph follows the plan and the table.

A row of y does not depend on its batch: the products with ``down`` are added up over 1,024 inputs
in steps, these sums one after the other, then those with ``up`` from the first rank to the last,
in one launch (few tokens) as in two (many).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from memos.triton_kernels.rounding import add_exact_product, add_product, rounded

TILE = 16  # tokens: the rows of one product of the matrix units
SEGMENT = 1024  # inputs added up on their own
# Up to here every program of the one launch computes x @ down anew, from the caches: that takes
# less time than a second launch. Not measured on a GPU.
_ONE_LAUNCH = 16  # tokens
_ANY_RANK = 256  # tokens up to which a captured graph holds for adapters of every rank
_MAX_RANK = 512
MERGE_TILE = 64


@triton.jit
def _tile_of(starts_ptr, num_slots, tile, TILE: tl.constexpr, SLOTS: tl.constexpr):
    """The slot of this tile and its first and last place in the order; beyond the last: none."""
    s = tl.arange(0, SLOTS)
    inside = s < num_slots
    begin = tl.load(starts_ptr + s, mask=inside, other=0).to(tl.int32)
    end = tl.load(starts_ptr + s + 1, mask=inside, other=0).to(tl.int32)
    tiles = (end - begin + TILE - 1) // TILE
    ends = tl.cumsum(tiles, 0)
    slot = tl.sum((ends <= tile).to(tl.int32), 0)
    here = s == slot
    before = tl.sum(tl.where(here, ends - tiles, 0), 0)
    first = tl.sum(tl.where(here, begin, 0), 0) + (tile - before) * TILE
    return slot, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _tokens_of(order_ptr, first, last, T, TILE: tl.constexpr):
    """Places in the order, tokens and which of them are there."""
    at = first + tl.arange(0, TILE)
    there = at < last
    token = tl.load(order_ptr + at, mask=there, other=-1)
    return at, token, there & (token >= 0) & (token < T)


@triton.jit
def _matrix(address, dtype: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _load_x(x_ptr, x_stride, token, there, k, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    where = x_ptr + token[:, None] * x_stride + k[None, :]
    if INPUTS % BLOCK_K == 0:
        return tl.load(where, mask=there[:, None], other=0.0)
    else:
        return tl.load(where, mask=there[:, None] & (k < INPUTS)[None, :], other=0.0)


@triton.jit
def _load_down(down_ptr, r, R, k, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """``down`` [R, INPUTS] as [k, r]."""
    where = down_ptr + r[None, :] * INPUTS + k[:, None]
    if INPUTS % BLOCK_K == 0:
        return tl.load(where, mask=(r < R)[None, :], other=0.0)
    else:
        return tl.load(where, mask=(r < R)[None, :] & (k < INPUTS)[:, None], other=0.0)


@triton.jit
def _load_up(up_ptr, r, R, o, OUTPUTS: tl.constexpr):
    where = up_ptr + r[:, None] * OUTPUTS + o[None, :]
    return tl.load(where, mask=(r < R)[:, None] & (o < OUTPUTS)[None, :], other=0.0)


@triton.jit
def _add_to_y(y_ptr, y_stride, token, there, o, scale, delta, OUTPUTS: tl.constexpr):
    """``y += scale * delta``, rounded once."""
    where = y_ptr + token[:, None] * y_stride + o[None, :]
    inside = there[:, None] & (o < OUTPUTS)[None, :]
    y = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    y = tl.math.fma(tl.broadcast_to(scale, delta.shape), delta, y)
    tl.store(where, rounded(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _apply_kernel(
    y_ptr, y_stride, x_ptr, x_stride, rows_ptr, row_stride, order_ptr, starts_ptr, T, num_slots,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program adds one tile of tokens times BLOCK_O outputs: both products.

    y [T, OUTPUTS], x [T, INPUTS] rows apart; rows [num_slots, row_stride] int64, this module's
    (down, up, R, scale) first; grid (tiles, ceil(OUTPUTS / BLOCK_O)).
    """
    slot, first, last = _tile_of(starts_ptr, num_slots, tl.program_id(0), TILE, SLOTS)
    if slot >= num_slots:
        return
    row = rows_ptr + slot.to(tl.int64) * row_stride
    R = tl.load(row + 2).to(tl.int32)
    if R == 0:
        return
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    down = _matrix(tl.load(row), dtype)
    up = _matrix(tl.load(row + 1), dtype)
    scale = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    _, token, there = _tokens_of(order_ptr, first, last, T, TILE)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    delta = tl.zeros([TILE, BLOCK_O], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        hidden = tl.zeros([TILE, BLOCK_R], tl.float32)
        part = tl.zeros([TILE, BLOCK_R], tl.float32)
        for k0 in range(0, INPUTS, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = _load_x(x_ptr, x_stride, token, there, k, INPUTS, BLOCK_K)
            part = add_product(x, _load_down(down, r, R, k, INPUTS, BLOCK_K), part)
            if INPUTS > SEGMENT:  # else one part is all
                full = (k0 + BLOCK_K) % SEGMENT == 0
                hidden += tl.where(full, part, 0.0)
                part = tl.where(full, 0.0, part)
        if INPUTS <= SEGMENT or INPUTS % SEGMENT != 0:
            hidden += part
        hidden = tl.where((r < R)[None, :], hidden, 0.0)  # not NaN, where x is infinite
        delta = add_exact_product(hidden, _load_up(up, r, R, o, OUTPUTS), delta)
    _add_to_y(y_ptr, y_stride, token, there, o, scale, delta, OUTPUTS)


@triton.jit
def _shrink_kernel(
    parts_ptr, width, count, x_ptr, x_stride, rows_ptr, row_stride, order_ptr, starts_ptr, T,
    num_slots, INPUTS: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program multiplies one tile of tokens with one segment of the inputs of ``down``.

    parts [segments, count, width] float32, by place in the order; grid (tiles, segments).
    """
    slot, first, last = _tile_of(starts_ptr, num_slots, tl.program_id(0), TILE, SLOTS)
    if slot >= num_slots:
        return
    row = rows_ptr + slot.to(tl.int64) * row_stride
    R = tl.minimum(tl.load(row + 2).to(tl.int32), width)
    down = _matrix(tl.load(row), x_ptr.dtype.element_ty)
    at, token, there = _tokens_of(order_ptr, first, last, T, TILE)
    segment = tl.program_id(1)
    end = tl.minimum((segment + 1) * SEGMENT, INPUTS)
    parts = parts_ptr + segment.to(tl.int64) * count * width + at.to(tl.int64)[:, None] * width
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        part = tl.zeros([TILE, BLOCK_R], tl.float32)
        for k0 in range(segment * SEGMENT, end, BLOCK_K):
            k = tl.multiple_of(k0, BLOCK_K) + tl.arange(0, BLOCK_K)
            x = _load_x(x_ptr, x_stride, token, there, k, INPUTS, BLOCK_K)
            part = add_product(x, _load_down(down, r, R, k, INPUTS, BLOCK_K), part)
        tl.store(parts + r[None, :], part, mask=(at < last)[:, None] & (r < width)[None, :])


@triton.jit
def _expand_kernel(
    y_ptr, y_stride, parts_ptr, width, count, rows_ptr, row_stride, order_ptr, starts_ptr, T,
    num_slots, SEGMENTS: tl.constexpr, OUTPUTS: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program adds one tile of tokens times BLOCK_O outputs: the second product.

    Arguments as ``_shrink_kernel``; grid (tiles, ceil(OUTPUTS / BLOCK_O)).
    """
    slot, first, last = _tile_of(starts_ptr, num_slots, tl.program_id(0), TILE, SLOTS)
    if slot >= num_slots:
        return
    row = rows_ptr + slot.to(tl.int64) * row_stride
    R = tl.minimum(tl.load(row + 2).to(tl.int32), width)
    if R == 0:
        return
    up = _matrix(tl.load(row + 1), DTYPE)
    scale = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    at, token, there = _tokens_of(order_ptr, first, last, T, TILE)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    parts = parts_ptr + at.to(tl.int64)[:, None] * width
    delta = tl.zeros([TILE, BLOCK_O], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = there[:, None] & (r < R)[None, :]
        hidden = tl.zeros([TILE, BLOCK_R], tl.float32)
        for segment in range(SEGMENTS):
            where = parts + tl.cast(segment, tl.int64) * count * width + r[None, :]
            hidden += tl.load(where, mask=inside, other=0.0)
        delta = add_exact_product(hidden, _load_up(up, r, R, o, OUTPUTS), delta)
    _add_to_y(y_ptr, y_stride, token, there, o, scale, delta, OUTPUTS)


def apply_sizes(dtype: torch.dtype, max_rank: int) -> tuple[int, int, int]:
    """BLOCK_K and BLOCK_R (inputs and ranks of one step) and warps: what spills no register."""
    ranks = min(max(16, triton.next_power_of_2(max_rank)), 64)
    if dtype == torch.float32:  # no matrix units: less at once, in registers
        return 64, min(ranks, 32), 8
    return (256 if ranks == 16 else 128), ranks, (4 if dtype == torch.bfloat16 else 8)


def apply_adapters_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    module: int,
    max_rank: int,
    order: torch.Tensor,
    starts: torch.Tensor,
    one_launch: bool | None = None,
) -> None:
    """The contract is the op's, ``memos.kernels.apply_adapters_``; here with the parts of table
    and plan.

    One launch for up to 16 tokens, else two, or as ``one_launch`` says; on the current stream, no
    number is read from the device. Can be captured in a graph: up to 256 tokens it then holds for
    adapters of every rank that are put in the table later.
    """
    T, n = len(y), len(order)
    if not n:
        return
    num_slots, modules = rows.shape[:2]
    inputs, outputs = x.shape[1], y.shape[1]
    rows = rows.view(-1)[4 * module :]
    tiles = n // TILE + min(n, num_slots)
    block_k, block_r, warps = apply_sizes(x.dtype, max_rank)
    slots = triton.next_power_of_2(num_slots)
    plan = rows, 4 * modules, order, starts, T, num_slots
    with torch.cuda.device_of(y):
        if T <= _ONE_LAUNCH if one_launch is None else one_launch:
            block_o = min(128, max(16, triton.next_power_of_2(outputs)))
            _apply_kernel[(tiles, triton.cdiv(outputs, block_o))](
                y, y.stride(0), x, x.stride(0), *plan, inputs, outputs, slots, TILE, SEGMENT,
                block_k, block_r, block_o, num_warps=warps, num_stages=3,
            )  # fmt: skip
            return
        segments = triton.cdiv(inputs, SEGMENT)
        width = _MAX_RANK if T <= _ANY_RANK else triton.cdiv(max_rank, block_r) * block_r
        parts = torch.empty(segments, n, width, dtype=torch.float32, device=y.device)
        block_o = min(128 if T <= _ANY_RANK else 256, max(16, triton.next_power_of_2(outputs)))
        _shrink_kernel[(tiles, segments)](
            parts, width, n, x, x.stride(0), *plan, inputs, slots, TILE, SEGMENT, block_k, block_r,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
        _expand_kernel[(tiles, triton.cdiv(outputs, block_o))](
            y, y.stride(0), parts, width, n, *plan, segments, outputs, slots, TILE, block_r,
            block_o, TRITON_DTYPES[y.dtype], num_warps=warps, num_stages=2,
        )  # fmt: skip


TRITON_DTYPES = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}  # fmt: skip


@triton.jit
def _plan_kernel(slots_ptr, order_ptr, starts_ptr, T, num_slots, BLOCK: tl.constexpr):
    """One program places the tokens of one slot, in their order; the last one those of none.

    slots [T], order [T], starts [num_slots + 1], all int64; grid (num_slots + 1,).
    """
    slot = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    start = tl.zeros([BLOCK], tl.int32)
    for t0 in range(0, T, BLOCK):
        t = t0 + lanes
        of = tl.load(slots_ptr + t, mask=t < T, other=num_slots)
        start += ((of >= 0) & (of < slot)).to(tl.int32)
    at = tl.sum(start, 0)
    tl.store(starts_ptr + slot, at.to(tl.int64))
    for t0 in range(0, T, BLOCK):
        t = t0 + lanes
        of = tl.load(slots_ptr + t, mask=t < T, other=num_slots)
        none = (of < 0) | (of >= num_slots)
        mine = (t < T) & tl.where(slot == num_slots, none, of == slot)
        counts = mine.to(tl.int32)
        place = at + tl.cumsum(counts, 0) - counts
        tl.store(order_ptr + place, t.to(tl.int64), mask=mine)
        at += tl.sum(counts, 0)


def plan_adapters(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order [T] and starts [num_slots + 1], without a word to the host: tokens of no slot (and of
    one out of range) stand behind ``starts[num_slots]``. The sort is stable.

    Cost: reads the slots num_slots + 1 times from the caches; one launch.
    """
    T = len(slots)
    order = torch.empty_like(slots)
    starts = slots.new_empty(num_slots + 1)
    block = min(1024, max(16, triton.next_power_of_2(T)))
    with torch.cuda.device_of(slots):
        _plan_kernel[(num_slots + 1,)](slots, order, starts, T, num_slots, block)
    return order, starts


@triton.jit
def _merge_kernel(
    out_ptr, weight_ptr, weight_stride, down_ptr, up_ptr, outputs, inputs, scale,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program makes a tile of ``weight + scale * up @ down``.

    out [outputs, inputs], weight rows weight_stride apart, down [R, inputs], up [outputs, R]; grid
    (ceil(inputs / BLOCK), ceil(outputs / BLOCK)).
    """
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o64 = o.to(tl.int64)
    delta = tl.zeros([BLOCK, BLOCK], tl.float32)
    same: tl.constexpr = down_ptr.dtype.element_ty == up_ptr.dtype.element_ty
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        up_at = up_ptr + o64[:, None] * R + r[None, :]
        down_at = down_ptr + r.to(tl.int64)[:, None] * inputs + i[None, :]
        up = tl.load(up_at, mask=(o < outputs)[:, None] & (r < R)[None, :], other=0.0)
        down = tl.load(down_at, mask=(r < R)[:, None] & (i < inputs)[None, :], other=0.0)
        if same:
            delta = add_product(up, down, delta)
        else:
            delta = add_product(up.to(tl.float32), down.to(tl.float32), delta)
    inside = (o < outputs)[:, None] & (i < inputs)[None, :]
    weight = tl.load(weight_ptr + o64[:, None] * weight_stride + i[None, :], mask=inside, other=0.0)
    scales = tl.full([BLOCK, BLOCK], scale, tl.float32)
    merged = tl.math.fma(scales, delta, weight.to(tl.float32))
    where = out_ptr + o64[:, None] * inputs + i[None, :]
    tl.store(where, rounded(merged, out_ptr.dtype.element_ty), mask=inside)


def merge_adapter(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """The contract is the op's, ``memos.kernels.merge_adapter``; on the current stream."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if not out.numel():
        return out
    outputs, inputs = weight.shape
    if inputs > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    grid = triton.cdiv(inputs, MERGE_TILE), triton.cdiv(outputs, MERGE_TILE)
    down, up = down.contiguous(), up.contiguous()
    block_r = min(64, max(16, triton.next_power_of_2(max(1, down.shape[0]))))
    with torch.cuda.device_of(weight):
        _merge_kernel[grid](
            out, weight, weight.stride(0), down, up, outputs, inputs, float(scale),
            down.shape[0], block_r, MERGE_TILE, num_warps=4,
        )  # fmt: skip
    return out
