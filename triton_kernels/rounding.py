"""What the kernels share: rounding to a dtype, and products with float32 sums.

Triton's interpreter truncates float32 to bfloat16 and makes garbage of products of bfloat16. Where
it runs, integers do the one and float32 the other; the results are those of the hardware.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to the nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x == x, nearest, bits | 0x00400000)
        return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def add_product(a, b, total):
    """``total + a @ b`` in float32, of two matrices of one dtype: no product is rounded."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _upper(x, MASK: tl.constexpr):
    return (x.to(tl.uint32, bitcast=True) & MASK).to(tl.float32, bitcast=True)


@triton.jit
def add_exact_product(a, b, total):
    """``total + a @ b`` for a of float32 and b of any dtype: a in parts that b's units take.

    A float32 is the sum of three numbers of 8 bits (bfloat16); two of 11 bits (the matrix units'
    view of float32, which holds every float16) leave 2^-22 of it.
    """
    if b.dtype == tl.float32:
        return add_product(a, b, total)
    else:
        MASK: tl.constexpr = 0xFFFF0000 if b.dtype == tl.bfloat16 else 0xFFFFE000
        finite = (a.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
        high = _upper(a, MASK)
        rest = tl.where(finite, a - high, 0.0)
        middle = _upper(rest, MASK)
        low = rest - middle
        if INTERPRETED:
            wide = b.to(tl.float32)
            if b.dtype == tl.bfloat16:
                total += tl.dot(low, wide, input_precision="ieee")
            total += tl.dot(middle, wide, input_precision="ieee")
            return total + tl.dot(high, wide, input_precision="ieee")
        elif b.dtype == tl.bfloat16:
            total = tl.dot(low.to(tl.bfloat16), b, total)
            total = tl.dot(middle.to(tl.bfloat16), b, total)
            return tl.dot(high.to(tl.bfloat16), b, total)
        else:
            wide = b.to(tl.float32)
            total = tl.dot(middle, wide, total, input_precision="tf32")
            return tl.dot(high, wide, total, input_precision="tf32")
