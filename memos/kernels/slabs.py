"""Adapter tensors -> the layout that kernels read: one call for all tensors of an adapter."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from memos.errors import ArgumentError
from memos.kernels import _native
from memos.kernels.kv import DTYPES

# Columns of a job: where the numbers begin in the source, their dtype (DTYPES), rows and columns
# there, 1 to transpose, where they go in the slab, rows there with the padding, and up to which
# byte of the slab zeros follow.
JOB_FIELDS = 8
Jobs = NDArray[numpy.int64]


def fill_slab(slab: torch.Tensor, source: Any, jobs: Jobs, dtype: torch.dtype) -> int:
    """Convert, transpose and pad matrices out of one buffer into another, as ``jobs`` say.

    A job takes [rows, columns] numbers from ``source``, rounds them once to ``dtype`` (to the
    nearest even), writes them, or their transpose, to the slab, and then zeros up to its end:
    rows of padding and the gap before the next tensor.

    Args:
        slab:   [bytes] uint8, contiguous, on the CPU.
        source: numpy uint8 [bytes], contiguous; its numbers need not be aligned.
        jobs:   [J, 8] int64; the ranges they write do not overlap.
        dtype:  of the slab: float32, float16 or bfloat16.

    Returns:
        How many numbers are NaN or infinite in ``dtype``.

    Raises:
        ArgumentError: a job reaches outside of the buffers, or a dtype is out of contract.

    Cost: reads the source once and writes the slab once; about as fast as a copy.
    """
    _check(slab, source, jobs, dtype)
    if _native.missing() is None and hasattr(_native.core(), "cpu_fill_slab"):
        fill = _native.core().cpu_fill_slab
        places = (source.ctypes.data, slab.data_ptr(), jobs.ctypes.data)
        return int(fill(*places, 0, len(jobs), DTYPES[dtype]))
    return reference_fill(slab, source, jobs, dtype)


def reference_fill(slab: torch.Tensor, source: Any, jobs: Jobs, dtype: torch.dtype) -> int:
    """``fill_slab`` in torch, tensor by tensor."""
    kinds = {code: kind for kind, code in DTYPES.items()}
    bad = 0
    for start, code, rows, columns, transposed, at, height, end in jobs.tolist():
        kind = kinds[code]
        data = torch.from_numpy(source[start : start + rows * columns * kind.itemsize].copy())
        x = data.view(kind).view(rows, columns).to(dtype)
        x = x.T.contiguous() if transposed else x
        bad += int((~x.isfinite()).sum())
        slab[at:end] = 0
        stop = at + x.numel() * dtype.itemsize
        assert len(x) <= height
        slab[at:stop] = x.view(-1).view(torch.uint8)
    return bad


def _check(slab: torch.Tensor, source: Any, jobs: Jobs, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype: one of {', '.join(map(str, DTYPES))} wanted, got {dtype}")
    if slab.dtype != torch.uint8 or slab.device.type != "cpu" or not slab.is_contiguous():
        raise ArgumentError("slab: contiguous uint8 on the CPU wanted")
    if source.dtype != numpy.uint8 or source.ndim != 1 or not source.flags.c_contiguous:
        raise ArgumentError("source: contiguous uint8 wanted")
    if jobs.dtype != numpy.int64 or jobs.ndim != 2 or jobs.shape[1] != JOB_FIELDS:
        raise ArgumentError(f"jobs: int64 [J, {JOB_FIELDS}] wanted, got {list(jobs.shape)}")
    if not len(jobs):
        return
    start, code, rows, columns, transposed, at, height, end = jobs.T
    item = numpy.where(code == 0, 4, 2)
    stop = start + rows * columns * item
    width = numpy.where(transposed, rows, columns)
    filled = at + height * width * dtype.itemsize
    holds = (
        jobs.min() >= 0
        and code.max() <= 2
        and max(rows.max(), columns.max(), height.max()) < 1 << 31
        and stop.max() <= len(source)
        and (numpy.where(transposed, columns, rows) <= height).all()
        and (filled <= end).all()
        and end.max() <= slab.numel()
        and jobs.flags.c_contiguous
    )
    if not holds:
        raise ArgumentError("jobs: ranges inside of source and slab wanted")
