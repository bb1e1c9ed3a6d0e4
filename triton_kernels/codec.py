"""The arithmetic of the codecs (csrc/codec/arith.h) on a GPU: the same bytes as on the CPU.

Only operations that are rounded on their own, and integers where Triton's interpreter rounds in
another way than the hardware (fp8, bf16) or where bits are any. Kernels that use this are compiled
with ``enable_fp_fusion=False``: a fused multiply and add rounds once where the CPU rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from memos.triton_kernels.rounding import rounded

RAW, INT8, INT4, INT2, FP8 = (tl.constexpr(i) for i in range(5))  # memos.kernels.codec.KINDS
_TOP = tl.constexpr(65504.0)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest even integer


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _float(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def clamped(x):
    """What is beyond fp16 to +-65504."""
    return tl.minimum(tl.maximum(x, -_TOP), _TOP)


@triton.jit
def fitted(x):
    """NaN to 0, what is beyond fp16 to +-65504."""
    return clamped(tl.where(x == x, x, 0.0))


@triton.jit
def fp16_toward(x, UP: tl.constexpr):
    """fp16 bits of a finite x up to 65504, rounded towards +infinity (UP) or -infinity: the
    nearest, then one step where that lies on the wrong side."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.uint16, bitcast=True).to(tl.uint32)
    near = nearest.to(tl.float32)
    wrong = near < x if UP else near > x
    grows = (bits < 0x8000) if UP else (bits >= 0x8000)  # the step grows the magnitude
    return tl.where(wrong, tl.where(grows, bits + 1, bits - 1), bits)


@triton.jit
def fp16_number(bits):
    """The number of finite fp16 bits."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fp16_value(h):
    """The number of fp16 bits in the low half; no bits mean infinity or NaN."""
    h = h.to(tl.uint32)
    magnitude = h & 0x7FFF
    normal = _float((magnitude << 13) + (112 << 23))
    small = magnitude.to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    value = tl.where(magnitude >= 0x400, normal, small)
    return _float(_bits(value) | ((h & 0x8000) << 16))


@triton.jit
def e4m3_nearest(x):
    """e4m3 bits of x in [-448, 448], rounded to the nearest even."""
    bits = _bits(x)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = _bits(_float(magnitude) + 16384.0) - 0x46800000  # the bits of 16384.0
    return ((bits >> 24) & 0x80) | tl.where(magnitude >= (121 << 23), normal, small)


@triton.jit
def e4m3_value(c):
    magnitude = c & 0x7F
    normal = _float((magnitude << 20) + (120 << 23))
    small = magnitude.to(tl.float32) * 0.001953125  # 2^-9
    value = tl.where(magnitude >= 8, normal, small)
    return _float(_bits(value) | ((c & 0x80) << 24))


@triton.jit
def group_of(lo, hi, KIND: tl.constexpr):
    """What a group in [lo, hi] is coded with (fp8: magnitudes up to hi): the bits of scale and
    zero, the zero and the inverse of the scale."""
    if KIND == FP8:
        zero = tl.zeros_like(_bits(hi))
        scale = fp16_toward(hi * (1.0 / 448.0), True)
    else:
        LEVELS: tl.constexpr = 255.0 if KIND == INT8 else 15.0 if KIND == INT4 else 3.0
        zero = fp16_toward(lo + 0.0, False)  # -0 + 0 = +0
        extent = hi - fp16_number(zero) + 0.0
        scale = fp16_toward(extent * (1.0 / LEVELS), True)
    step = fp16_number(scale)
    inverse = tl.where(step > 0.0, tl.div_rn(1.0, tl.where(step > 0.0, step, 1.0)), 0.0)
    return scale, zero, fp16_number(zero), inverse


@triton.jit
def code_of(x, zero, inverse, KIND: tl.constexpr):
    """The code, in the low bits of a uint32."""
    if KIND == FP8:
        return e4m3_nearest(tl.minimum(tl.maximum(x * inverse, -448.0), 448.0))
    else:
        MASK: tl.constexpr = 255 if KIND == INT8 else 15 if KIND == INT4 else 3
        return _bits((x - zero) * inverse + _MAGIC) & MASK


@triton.jit
def value_of(code, scale, zero, KIND: tl.constexpr):
    """The number of a code, from the numbers of its group's scale and zero."""
    if KIND == FP8:
        return e4m3_value(code) * scale
    else:
        number = _float(code | 0x4B000000) - 8388608.0  # 2^23 + code, without a conversion
        return zero + number * scale


@triton.jit
def rotated(x, T: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr):
    """Rows [T, C] times the normalised Hadamard matrix of SIZE, by blocks of SIZE channels.

    The order of the steps is the format's: neighbours first.
    """
    LOG: tl.constexpr = (SIZE > 1) + (SIZE > 2) + (SIZE > 4) + (SIZE > 8) + (SIZE > 16) + (
        SIZE > 32) + (SIZE > 64) + (SIZE > 128) + (SIZE > 256) + (SIZE > 512)  # fmt: skip
    for i in tl.static_range(LOG):
        pairs = tl.reshape(x, [T * C // (2 << i), 2, 1 << i])
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        pairs = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
        x = tl.reshape(pairs, [T, C])
    return x * NORM


@triton.jit
def stored(x, dtype: tl.constexpr):
    """float32 to what is stored, to the nearest even; fp16 saturates."""
    if dtype == tl.float16:
        x = clamped(x)
    return rounded(x, dtype)
