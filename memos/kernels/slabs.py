"""Adapter tensors -> the layout that kernels read: one call for all tensors of an adapter."""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray

from memos.errors import ArgumentError
from memos.kernels import _native
from memos.kernels.kv import DTYPES

JOB_FIELDS = 8
_MAX_SIZE = 1 << 24  # rows or columns: products stay far below 2^63
_MAX_BYTES = 1 << 50


class SlabJobs:
    """What ``fill_slab`` does: matrices, each from one place of a source to one of a slab.

    A job takes [rows, columns] numbers from the source, rounds them once to ``dtype`` (to the
    nearest even), writes them, or their transpose, to the slab, and then zeros up to its end:
    rows of padding and the gap before the next tensor.

    Args:
        table: numpy int64 [J, 8], a job per row: byte of the source where its numbers begin (they
            need not be aligned), their dtype as in ``DTYPES``, rows and columns there, 1 to
            transpose, byte of the slab, rows there with the padding, and byte of the slab up to
            which zeros follow. The ranges they write do not overlap.
        dtype: of the slab: float32, float16 or bfloat16.

    Raises:
        ArgumentError: a number is out of range, or the padded rows do not fit.
    """

    __slots__ = ("dtype", "slab_bytes", "source_bytes", "table")

    def __init__(self, table: NDArray[numpy.int64], dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype: one of {', '.join(map(str, DTYPES))} wanted, got {dtype}")
        if table.dtype != numpy.int64 or table.ndim != 2 or table.shape[1] != JOB_FIELDS:
            raise ArgumentError(f"table: int64 [J, {JOB_FIELDS}] wanted, got {list(table.shape)}")
        self.table, self.dtype = numpy.ascontiguousarray(table), dtype
        start, code, rows, columns, transposed, at, height, end = self.table.T
        if len(table) and (
            table.min() < 0
            or code.max() > max(DTYPES.values())
            or max(rows.max(), columns.max(), height.max()) > _MAX_SIZE
            or max(start.max(), end.max()) > _MAX_BYTES
            or (height < numpy.where(transposed, columns, rows)).any()
            or (at + height * numpy.where(transposed, rows, columns) * dtype.itemsize > end).any()
        ):
            raise ArgumentError("table: jobs whose padded rows fit between their bounds wanted")
        stop = start + rows * columns * numpy.where(code == 0, 4, 2)
        self.source_bytes = int(stop.max(initial=0))
        self.slab_bytes = int(end.max(initial=0))

    def __len__(self) -> int:
        return len(self.table)


def fill_slab(slab: torch.Tensor, source: NDArray[numpy.uint8], jobs: SlabJobs) -> int:
    """Convert, transpose and pad matrices out of one buffer into another, as ``jobs`` say.

    Args:
        slab:   [bytes] uint8, contiguous, on the CPU; at least ``jobs.slab_bytes``.
        source: numpy uint8 [bytes], contiguous; at least ``jobs.source_bytes``.
        jobs:   what goes where.

    Returns:
        How many numbers are NaN or infinite in the slab.

    Raises:
        ArgumentError: a buffer is too short or of another kind.

    Cost: reads the source once and writes the slab once; about as fast as a copy.
    """
    if slab.dtype != torch.uint8 or not slab.is_cpu or not slab.is_contiguous():
        raise ArgumentError("slab: contiguous uint8 on the CPU wanted")
    if source.dtype != numpy.uint8 or source.ndim != 1 or not source.flags.c_contiguous:
        raise ArgumentError("source: contiguous uint8 wanted")
    for name, wanted, got in (
        ("slab", jobs.slab_bytes, slab.numel()),
        ("source", jobs.source_bytes, len(source)),
    ):
        if got < wanted:
            raise ArgumentError(f"{name}: {wanted} bytes wanted, got {got}")
    if _native.missing() is not None:
        return reference_fill(slab, source, jobs)
    places = (source.ctypes.data, slab.data_ptr(), jobs.table.ctypes.data)
    return int(_native.core().cpu_fill_slab(*places, 0, len(jobs), DTYPES[jobs.dtype]))


def reference_fill(slab: torch.Tensor, source: NDArray[numpy.uint8], jobs: SlabJobs) -> int:
    """``fill_slab`` in torch, tensor by tensor."""
    kinds = {code: kind for kind, code in DTYPES.items()}
    bad = 0
    for start, code, rows, columns, transposed, at, _, end in jobs.table.tolist():
        kind = kinds[code]
        data = torch.from_numpy(source[start : start + rows * columns * kind.itemsize].copy())
        x = data.view(kind).view(rows, columns).to(jobs.dtype)
        x = x.T.contiguous() if transposed else x
        bad += int((~x.isfinite()).sum())
        slab[at:end] = 0
        slab[at : at + x.numel() * jobs.dtype.itemsize] = x.view(-1).view(torch.uint8)
    return bad
