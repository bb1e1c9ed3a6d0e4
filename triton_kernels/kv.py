"""KV blocks <-> packed bytes on a GPU: every layer and block of a call in one launch.

A program takes one tile of one head: for K a group of tokens (its scales are per channel), for V
as many tokens as fill 8,192 numbers. The bytes are those of csrc/codec/layout.h.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from memos.triton_kernels.codec import (
    FP8,
    INT2,
    INT4,
    RAW,
    clamped,
    code_of,
    fitted,
    fp16_value,
    group_of,
    rotated,
    stored,
    value_of,
)  # fmt: skip
from memos.triton_kernels.rope import turned_keys, turns
from memos.triton_kernels.rounding import rounded

if TYPE_CHECKING:
    from memos.kernels.codec import Codec, Scheme
    from memos.kernels.rerotation import Rerotation

_TILE = 8192  # numbers of a program: 64 per lane of 128
_MAX_PROGRAMS = 2**31 - 1
_KINDS = {"raw": 0, "int8": 1, "int4": 2, "int2": 3, "fp8": 4}
# Older compilers make tens of thousands of instructions of it, and spill: seen with 3.6.
HALVES = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9))
_FIELDS = 8  # of a layer: address and block, token, head strides (in numbers) of K, then of V


@triton.jit
def _place(layers_ptr, layer, block, h, PART: tl.constexpr, DTYPE: tl.constexpr,
           ALIGNED: tl.constexpr):  # fmt: skip
    """Where the numbers of one head of one block begin, and the token stride."""
    row = layers_ptr + layer * 8 + PART
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    block_stride = tl.load(row + 1)
    token_stride = tl.load(row + 2)
    head_stride = tl.load(row + 3)
    base = tl.load(row).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # the host has looked: addresses and strides are multiples of 16 bytes
        base = tl.multiple_of(base, 16)
        block_stride = tl.multiple_of(block_stride, 16 // ITEM)
        token_stride = tl.multiple_of(token_stride, 16 // ITEM)
        head_stride = tl.multiple_of(head_stride, 16 // ITEM)
    return base + block * block_stride + h * head_stride, token_stride


@triton.jit
def _inside(t, c, P: tl.constexpr, D: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
    return (t < P)[:, None] & (c < D)[None, :]


@triton.jit
def _clear(ptr, FROM: tl.constexpr, TO: tl.constexpr):
    """Zeros for padding of less than 16 bytes."""
    if TO > FROM:
        i = FROM + tl.arange(0, 16)
        tl.store(ptr + i, tl.zeros([16], tl.uint8), mask=i < TO)


@triton.jit
def _words_at(section, START: tl.constexpr, WORD: tl.constexpr):
    return (section + START).to(tl.pointer_type(WORD))


@triton.jit
def _join_codes(codes, T: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr):
    """Codes [T, C] of uint32 -> words [T, C / codes per word], the first code lowest."""
    PER: tl.constexpr = WORD.primitive_bitwidth // BITS
    LOG: tl.constexpr = (PER > 1) + (PER > 2) + (PER > 4) + (PER > 8)
    for i in tl.static_range(LOG):  # neighbours: half as many numbers to move at each step
        low, high = tl.split(tl.reshape(codes, [T, C >> (i + 1), 2]))
        codes = low | (high << (BITS << i))
    return codes.to(WORD)


@triton.jit
def _pairs(x, N: tl.constexpr, FAR: tl.constexpr):
    """The two halves of [N] numbers: the first and the last N / 2 (FAR), or every second."""
    if FAR:
        return tl.split(tl.permute(tl.reshape(x, [2, N // 2]), (1, 0)))
    else:
        return tl.split(tl.reshape(x, [N // 2, 2]))


@triton.jit
def _extremes(low, high, A: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr, SAME: tl.constexpr):
    """The least of each of A rows of N numbers of ``low`` (of N columns, where FAR), and the
    greatest of ``high``; SAME: the greatest twice.

    By halves, so that afterwards each lane has numbers of its own: what is computed of them is not
    computed by every lane that took part.
    """
    if HALVES:
        LOG: tl.constexpr = (N > 1) + (N > 2) + (N > 4) + (N > 8) + (N > 16) + (N > 32)
        for i in tl.static_range(LOG):
            a, b = _pairs(high, A * N >> i, FAR)
            high = tl.maximum(a, b)
            if not SAME:
                a, b = _pairs(low, A * N >> i, FAR)
                low = tl.minimum(a, b)
        high = tl.reshape(high, [A])
        if not SAME:
            low = tl.reshape(low, [A])
    elif FAR:
        high = tl.max(tl.reshape(high, [N, A]), 0)
        if not SAME:
            low = tl.min(tl.reshape(low, [N, A]), 0)
    else:
        high = tl.max(tl.reshape(high, [A, N]), 1)
        if not SAME:
            low = tl.min(tl.reshape(low, [A, N]), 1)
    if SAME:
        low = high
    return low, high


@triton.jit
def _split_codes(words, T: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr):
    PER: tl.constexpr = WORD.primitive_bitwidth // BITS
    shifts = (tl.arange(0, PER) * BITS).to(tl.uint32)
    codes = (words.to(tl.uint32)[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, [T, C])


@triton.jit
def _load_halves(ptr, first, left, N: tl.constexpr, WIDE: tl.constexpr):
    """N fp16 from place ``first`` on as uint32, those from ``left`` on 0; WIDE: two per load."""
    if WIDE:
        i = tl.arange(0, N // 2)
        words = (ptr + first).to(tl.pointer_type(tl.uint32))
        pairs = tl.load(words + i, mask=2 * i < left, other=0)
        return tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), [N])
    else:
        i = tl.arange(0, N)
        return tl.load(ptr + first + i, mask=i < left, other=0).to(tl.uint32)


@triton.jit
def _encode(numbers, token_stride, section, h, tile, KIND: tl.constexpr, CHANNELS: tl.constexpr,
            GROUP: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, P: tl.constexpr,
            D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WORD: tl.constexpr,
            SCALES: tl.constexpr, ZEROS: tl.constexpr):  # fmt: skip
    """One tile [T, C] of one head. CHANNELS: a scale per channel (K), else per token (V)."""
    CHUNKS: tl.constexpr = (D + C - 1) // C
    i = tile // CHUNKS
    c0 = (tile % CHUNKS) * C
    t = i * T + tl.arange(0, T)
    c = c0 + tl.arange(0, C)
    inside = _inside(t, c, P, D, T, C)
    where = numbers + t.to(tl.int64)[:, None] * token_stride + c[None, :]
    if KIND == RAW:
        words = _words_at(section, 0, WORD) + (h * P + t)[:, None] * D + c[None, :]
        raw = where.to(tl.pointer_type(WORD), bitcast=True)
        tl.store(words, tl.load(raw, mask=inside, other=0), mask=inside)
    else:
        x = fitted(tl.load(where, mask=inside, other=0.0).to(tl.float32))
        if ROTATE > 1:
            x = clamped(rotated(x, T, C, ROTATE, NORM))
        scales = _words_at(section, SCALES, tl.uint16)
        zeros = _words_at(section, ZEROS, tl.uint16)
        if KIND == FP8:
            low = tl.abs(x)  # what is outside is 0
            high = low
        elif P % T == 0 and D % C == 0:
            low = x
            high = x
        else:
            low = tl.where(inside, x, float("inf"))
            high = tl.where(inside, x, float("-inf"))
        if CHANNELS:
            lo, hi = _extremes(low, high, C, T, True, KIND == FP8)
            scale, zero, zero_value, inverse = group_of(lo, hi, KIND)
            at = (h * ((P + T - 1) // T) + i) * D + c
            tl.store(scales + at, scale.to(tl.uint16), mask=c < D)
            if KIND != FP8:
                tl.store(zeros + at, zero.to(tl.uint16), mask=c < D)
            codes = code_of(x, zero_value[None, :], inverse[None, :], KIND)
        else:
            G: tl.constexpr = GROUP if GROUP < C else C
            NUM: tl.constexpr = C // G
            REAL: tl.constexpr = (D + G - 1) // G
            grouped = tl.reshape(x, [T, NUM, G])
            lo, hi = _extremes(low, high, T * NUM, G, False, KIND == FP8)
            lo = tl.reshape(lo, [T, NUM])
            hi = tl.reshape(hi, [T, NUM])
            scale, zero, zero_value, inverse = group_of(lo, hi, KIND)
            g = tl.arange(0, NUM)
            at = (h * P + t)[:, None] * REAL + g[None, :]
            known = (t < P)[:, None] & (g < REAL)[None, :]
            tl.store(scales + at, scale.to(tl.uint16), mask=known)
            if KIND != FP8:
                tl.store(zeros + at, zero.to(tl.uint16), mask=known)
            codes = code_of(grouped, zero_value[:, :, None], inverse[:, :, None], KIND)
            codes = tl.reshape(codes, [T, C])
        BITS: tl.constexpr = 4 if KIND == INT4 else 2 if KIND == INT2 else 8
        PER: tl.constexpr = WORD.primitive_bitwidth // BITS
        words = _join_codes(codes, T, C, BITS, WORD)
        w = c0 // PER + tl.arange(0, C // PER)
        tl.store(
            _words_at(section, 0, WORD) + (h * P + t)[:, None] * (D // PER) + w[None, :], words,
            mask=(t < P)[:, None] & (w < D // PER)[None, :],
        )  # fmt: skip


@triton.jit
def _decode(numbers, token_stride, section, h, tile, KIND: tl.constexpr, CHANNELS: tl.constexpr,
            GROUP: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, P: tl.constexpr,
            D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, WORD: tl.constexpr,
            SCALES: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr, angles,
            HALF: tl.constexpr, FIRST: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """The inverse of ``_encode``. HALF > 0: turned, see ``turned_keys``; a tile has whole rows."""
    CHUNKS: tl.constexpr = (D + C - 1) // C
    i = tile // CHUNKS
    c0 = (tile % CHUNKS) * C
    t = i * T + tl.arange(0, T)
    c = c0 + tl.arange(0, C)
    inside = _inside(t, c, P, D, T, C)
    where = numbers + t.to(tl.int64)[:, None] * token_stride + c[None, :]
    if KIND == RAW:
        words = _words_at(section, 0, WORD) + (h * P + t)[:, None] * D + c[None, :]
        raw = where.to(tl.pointer_type(WORD), bitcast=True)
        if HALF > 0:
            stays = inside & ~turns(c, HALF, FIRST)[None, :]
            tl.store(raw, tl.load(words, mask=stays, other=0), mask=stays)
            moves = inside & turns(c, HALF, FIRST)[None, :]
            x = tl.load(words.to(tl.pointer_type(DTYPE), bitcast=True), mask=moves, other=0.0)
            x = turned_keys(x.to(tl.float32), angles, t, c, P, T, C, HALF, FIRST, PAIRS)
            tl.store(where, rounded(x, DTYPE), mask=moves)
        else:
            tl.store(raw, tl.load(words, mask=inside, other=0), mask=inside)
    else:
        BITS: tl.constexpr = 4 if KIND == INT4 else 2 if KIND == INT2 else 8
        PER: tl.constexpr = WORD.primitive_bitwidth // BITS
        w = c0 // PER + tl.arange(0, C // PER)
        words = tl.load(
            _words_at(section, 0, WORD) + (h * P + t)[:, None] * (D // PER) + w[None, :],
            mask=(t < P)[:, None] & (w < D // PER)[None, :], other=0,
        )  # fmt: skip
        codes = _split_codes(words, T, C, BITS, WORD)
        scales = _words_at(section, SCALES, tl.uint16)
        zeros = _words_at(section, ZEROS, tl.uint16)
        if CHANNELS:
            first = (h * ((P + T - 1) // T) + i) * D + c0
            scale = fp16_value(_load_halves(scales, first, D - c0, C, True))
            zero = scale
            if KIND != FP8:
                zero = fp16_value(_load_halves(zeros, first, D - c0, C, True))
            x = value_of(codes, scale[None, :], zero[None, :], KIND)
        else:
            G: tl.constexpr = GROUP if GROUP < C else C
            NUM: tl.constexpr = C // G
            REAL: tl.constexpr = (D + G - 1) // G
            if REAL == NUM:
                WIDE: tl.constexpr = P * NUM % 2 == 0 and T * NUM % 2 == 0
                first = (h * P + i * T) * NUM
                left = (P - i * T) * NUM
                scale = tl.reshape(_load_halves(scales, first, left, T * NUM, WIDE), [T, NUM])
                zero = scale
                if KIND != FP8:
                    zero = tl.reshape(_load_halves(zeros, first, left, T * NUM, WIDE), [T, NUM])
            else:
                g = tl.arange(0, NUM)
                at = (h * P + t)[:, None] * REAL + g[None, :]
                known = (t < P)[:, None] & (g < REAL)[None, :]
                scale = tl.load(scales + at, mask=known, other=0).to(tl.uint32)
                zero = scale
                if KIND != FP8:
                    zero = tl.load(zeros + at, mask=known, other=0).to(tl.uint32)
            scale = fp16_value(scale)
            zero = fp16_value(zero)
            grouped = tl.reshape(codes, [T, NUM, G])
            x = value_of(grouped, scale[:, :, None], zero[:, :, None], KIND)
            x = tl.reshape(x, [T, C])
        if ROTATE > 1:
            x = rotated(x, T, C, ROTATE, NORM)
        if HALF > 0:
            x = turned_keys(x, angles, t, c, P, T, C, HALF, FIRST, PAIRS)
        tl.store(where, stored(x, DTYPE), mask=inside)


@triton.jit
def _kv_kernel(
    layers_ptr, ids_ptr, packed_ptr, rows_ptr, angles_ptr, L, H: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ENCODE: tl.constexpr, APART: tl.constexpr,
    BYTES: tl.constexpr, V_AT: tl.constexpr, K_TILES: tl.constexpr, V_TILES: tl.constexpr,
    K_KIND: tl.constexpr, K_ROTATE: tl.constexpr, K_NORM: tl.constexpr, K_D: tl.constexpr,
    K_T: tl.constexpr, K_C: tl.constexpr, K_WORD: tl.constexpr, K_SCALES: tl.constexpr,
    K_ZEROS: tl.constexpr, K_CODES_END: tl.constexpr, K_END: tl.constexpr,
    V_KIND: tl.constexpr, V_GROUP: tl.constexpr, V_ROTATE: tl.constexpr, V_NORM: tl.constexpr,
    V_D: tl.constexpr, V_T: tl.constexpr, V_C: tl.constexpr, V_WORD: tl.constexpr,
    V_SCALES: tl.constexpr, V_ZEROS: tl.constexpr, V_CODES_END: tl.constexpr, V_END: tl.constexpr,
    HALF: tl.constexpr, FIRST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program encodes (or decodes) one tile of one head of K or V of one layer of one block.

    layers [L, 8] int64: addresses and strides; ids [M] int64; packed [M, L, BYTES] uint8, or, where
    its blocks lie APART, rows [M] int64 addresses of [L, BYTES]. Grid: M * L * H * (K_TILES +
    V_TILES), tiles of K first. Neighbours work on one block, where DRAM has their rows together.
    angles [M, P, 2, HALF] float32: where HALF > 0, keys turn by them while they are decoded.
    """
    TILES: tl.constexpr = H * (K_TILES + V_TILES)
    pid = tl.program_id(0)
    task = pid // TILES
    tile = pid % TILES
    m = task // L
    layer = task % L
    block = tl.load(ids_ptr + m)
    if APART:
        row = tl.load(rows_ptr + m).to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            row = tl.multiple_of(row, 16)
    else:
        row = packed_ptr + m.to(tl.int64) * L * BYTES
    row = row + layer.to(tl.int64) * BYTES
    if tile < H * K_TILES:
        h = tile // K_TILES
        i = tile % K_TILES
        numbers, stride = _place(layers_ptr, layer, block, h, 0, DTYPE, ALIGNED)
        if ENCODE:
            _encode(numbers, stride, row, h, i, K_KIND, True, K_T, K_ROTATE, K_NORM, P, K_D, K_T,
                    K_C, K_WORD, K_SCALES, K_ZEROS)  # fmt: skip
            if tile == 0:
                _clear(row, K_CODES_END, K_SCALES)
                _clear(row, K_END, V_AT)
        else:
            angles = angles_ptr + m.to(tl.int64) * (P * 2 * HALF)
            _decode(numbers, stride, row, h, i, K_KIND, True, K_T, K_ROTATE, K_NORM, P, K_D, K_T,
                    K_C, K_WORD, K_SCALES, K_ZEROS, DTYPE, angles, HALF, FIRST,
                    PAIRS)  # fmt: skip
    else:
        h = (tile - H * K_TILES) // V_TILES
        i = (tile - H * K_TILES) % V_TILES
        section = row + V_AT
        numbers, stride = _place(layers_ptr, layer, block, h, 4, DTYPE, ALIGNED)
        if ENCODE:
            _encode(numbers, stride, section, h, i, V_KIND, False, V_GROUP, V_ROTATE, V_NORM, P,
                    V_D, V_T, V_C, V_WORD, V_SCALES, V_ZEROS)  # fmt: skip
            if tile == H * K_TILES:
                _clear(section, V_CODES_END, V_SCALES)
                _clear(section, V_END, BYTES - V_AT)
        else:
            _decode(numbers, stride, section, h, i, V_KIND, False, V_GROUP, V_ROTATE, V_NORM, P,
                    V_D, V_T, V_C, V_WORD, V_SCALES, V_ZEROS, DTYPE, angles_ptr, 0, 0,
                    False)  # fmt: skip


def _side(
    scheme: Scheme, P: int, H: int, D: int, itemsize: int, *, keys: bool, turns: bool = False
) -> tuple[dict[str, Any], int]:
    """The constants of K or V for the kernel, and the tiles of one head."""
    codes, params = scheme.parts(P, H, D, itemsize, keys)
    bits = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}.get(scheme.kind, 0)
    rotate = D & -D if scheme.rotate else 0
    width = triton.next_power_of_2(D)
    if scheme.kind == "raw":
        word = {2: tl.uint16, 4: tl.uint32}[itemsize]
        C = width
        T = max(1, min(triton.next_power_of_2(P), _TILE // C))
        groups = 0
    else:
        word = tl.uint32 if D * bits % 32 == 0 else tl.uint16
        if keys:  # channels may go apart: whole blocks of the rotation, few beyond the last
            C = width if turns else min(width, 64 if -(-D // 64) * 64 < -(-D // 128) * 128 else 128)
            C, T = max(C, rotate), scheme.group
            groups = -(-P // T) * D
        else:
            C = width
            T = max(1, min(triton.next_power_of_2(P), _TILE // C))
            groups = P * -(-D // scheme.group)
    sizes = {
        "KIND": _KINDS[scheme.kind],
        "ROTATE": rotate,
        "NORM": float(rotate) ** -0.5 if rotate else 1.0,
        "D": D,
        "T": T,
        "C": C,
        "WORD": word,
        "SCALES": codes,
        "ZEROS": codes + 2 * H * groups,
        "CODES_END": P * H * (D * bits // 8 if bits else D * itemsize),
        "END": codes + H * groups * (0 if not bits else 2 if scheme.kind == "fp8" else 4),
    }
    if not keys:
        sizes["GROUP"] = scheme.group
    assert codes + params >= sizes["END"]
    return sizes, -(-P // T) * -(-D // C)


@functools.lru_cache(maxsize=64)
def constants_of(
    codec: Codec, P: int, H: int, Dk: int, Dv: int, dtype: torch.dtype, turns: bool = False
) -> tuple[dict[str, Any], int, int]:
    """What the kernel is compiled for, programs of one layer of one block, and warps."""
    itemsize = dtype.itemsize
    k, k_tiles = _side(codec.key, P, H, Dk, itemsize, keys=True, turns=turns)
    v, v_tiles = _side(codec.value, P, H, Dv, itemsize, keys=False)
    constants: dict[str, Any] = {
        "H": H,
        "P": P,
        "DTYPE": DTYPES[dtype],
        "BYTES": codec.layer_bytes(P, H, Dk, Dv, itemsize),
        "V_AT": codec.key.section_bytes(P, H, Dk, itemsize, True),
        "K_TILES": k_tiles,
        "V_TILES": v_tiles,
    }
    for letter, side in (("K", k), ("V", v)):
        constants |= {f"{letter}_{name}": value for name, value in side.items()}
    most = max(k["T"] * k["C"], v["T"] * v["C"])
    # Keys that turn hold their pairs and angles too: with 64 numbers a lane, registers spill.
    warps = min(16, max(1, most // (512 if turns else 2048)))
    return constants, H * (k_tiles + v_tiles), warps


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


_captured: dict[bytes, torch.Tensor] = {}  # tables of captured graphs, which outlive every call


@functools.lru_cache(maxsize=256)
def _kept_on_device(numbers: bytes, device: torch.device) -> torch.Tensor:
    # Waits for the copy, once: later calls may come on other streams.
    return _sent(numbers, device, non_blocking=False)


def _table_on_device(numbers: bytes, device: torch.device) -> torch.Tensor:
    """int64 numbers on the device, kept: a captured call copies nothing from the host."""
    table = _kept_on_device(numbers, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[numbers] = table
    return table


def _sent(numbers: bytes, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
    host = torch.frombuffer(bytearray(numbers), dtype=torch.int64)
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=non_blocking)


def _run(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    codec: Codec,
    packed: torch.Tensor | None,
    addresses: array[int] | None,
    rerotate: Rerotation | None = None,
    *,
    encode: bool,
) -> None:
    key, value = keys[0], values[0]
    _, P, H, Dk = key.shape
    half = 0 if rerotate is None else len(rerotate.inv_freq)
    constants, tiles, warps = constants_of(codec, P, H, Dk, value.shape[3], key.dtype, half > 0)
    M, L = len(block_ids), len(keys)
    if not M * tiles:
        return
    assert M * L * tiles <= _MAX_PROGRAMS
    table, item, places = array("q"), key.element_size(), 0
    for tensors in zip(keys, values, strict=True):
        for tensor in tensors:
            address, strides = tensor.data_ptr(), tensor.stride()[:3]
            table.append(address)
            table.extend(strides)
            places |= address | (strides[0] | strides[1] | strides[2]) * item
    if addresses is not None:
        for address in addresses:
            places |= address
        rows = _sent(addresses.tobytes(), key.device, non_blocking=True)
    else:
        assert packed is not None
        places |= packed.data_ptr()
        rows = block_ids  # not read
    angles, first, pairs = block_ids, 0, False
    if rerotate is not None and half:
        angles = rerotate.table_on(key.device)
        first, pairs = rerotate.first, rerotate.interleaved
    with torch.cuda.device_of(key):
        _kv_kernel[(M * L * tiles,)](
            _table_on_device(table.tobytes(), key.device), block_ids,
            block_ids if packed is None else packed, rows, angles, L, ALIGNED=places % 16 == 0,
            ENCODE=encode, APART=packed is None, **constants, HALF=half, FIRST=first, PAIRS=pairs,
            num_warps=warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def pack_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    codec: Codec,
) -> torch.Tensor:
    """The contract is the op's, ``memos.kernels.pack_kv``; one launch on the current stream.

    The first call for a set of caches copies their addresses to the device; later ones (and a
    captured graph, which wants such a first call before it) read nothing from the host.
    """
    _, P, H, Dk = keys[0].shape
    E = codec.layer_bytes(P, H, Dk, values[0].shape[3], keys[0].element_size())
    out = torch.empty(len(block_ids), len(keys), E, dtype=torch.uint8, device=keys[0].device)
    _run(keys, values, block_ids, codec, out, None, encode=True)
    return out


def unpack_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    packed: torch.Tensor | array[int],
    codec: Codec,
    rerotate: Rerotation | None = None,
) -> None:
    """The contract is the op's, ``memos.kernels.unpack_kv``; one launch on the current stream.

    Args:
        packed: [M, L, E] uint8, or the addresses of M blocks that lie apart on the device (they are
            copied there at each call: not for a captured graph).
    """
    if isinstance(packed, torch.Tensor):
        _run(keys, values, block_ids, codec, packed, None, rerotate, encode=False)
    else:
        _run(keys, values, block_ids, codec, None, packed, rerotate, encode=False)
