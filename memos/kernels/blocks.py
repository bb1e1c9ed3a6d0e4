"""Paged <-> contiguous: plain copies of whole blocks."""

from __future__ import annotations

import torch

from memos.errors import ArgumentError
from memos.kernels import _cuda, _library, _native, _triton
from memos.kernels._dims import Dims, contiguous
from memos.kernels._memory import empty
from memos.kernels._op import op


def check_ids(name: str, ids: torch.Tensor, N: int) -> None:
    """Raise unless every id is in [0, N). For references: native loops check where they read."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= N):
        raise ArgumentError(
            f"{name}: ids in [0, {N}) wanted, got {int(ids.min())} to {int(ids.max())}"
        )


def _check_gather(cache: torch.Tensor, block_ids: torch.Tensor) -> None:
    Dims().tensor("cache", cache, "N B").tensor("block_ids", block_ids, "M", [torch.int64])
    contiguous("cache", cache)
    contiguous("block_ids", block_ids)


@op(check=_check_gather)
def gather_blocks(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Copy blocks out of a paged cache: ``out[m] = cache[block_ids[m]]``.

    Args:
        cache:     [N, B] any dtype, contiguous. N blocks of B elements.
        block_ids: [M] int64, same device. Each in [0, N); may repeat.

    Returns:
        [M, B], dtype and device of ``cache``, freshly allocated.

    Raises:
        ArgumentError: a shape, dtype or device is out of contract; on the CPU also an id.
            On a GPU an id out of range is undefined: checking it would synchronise.

    Cost: reads and writes M * B * element_size bytes once.
    """
    check_ids("block_ids", block_ids, len(cache))
    return cache.index_select(0, block_ids)


def _check_write(cache: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
    dims = Dims().tensor("cache", cache, "N B").tensor("block_ids", block_ids, "M", [torch.int64])
    dims.tensor("blocks", blocks, "M B", [cache.dtype])
    for name, tensor in (("cache", cache), ("block_ids", block_ids), ("blocks", blocks)):
        contiguous(name, tensor)


@op(check=_check_write)
def write_blocks(cache: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
    """Copy blocks into a paged cache: ``cache[block_ids[m]] = blocks[m]``.

    Args:
        cache:     [N, B] any dtype, contiguous; changed.
        block_ids: [M] int64, same device. Each in [0, N), no two equal (the result is then
            undefined: one of the blocks).
        blocks:    [M, B], dtype and device of ``cache``.

    Raises:
        ArgumentError: as ``gather_blocks``. On the CPU nothing is written then.

    Cost: reads and writes M * B * element_size bytes once.
    """
    check_ids("block_ids", block_ids, len(cache))
    cache.index_copy_(0, block_ids, blocks)


def _on_cpu(cache: torch.Tensor, *others: torch.Tensor) -> bool:
    return cache.device.type == "cpu"


@gather_blocks.backend("cpu", accepts=_on_cpu, missing=_native.missing)
def _gather_cpu(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    out = empty((len(block_ids), cache.shape[1]), cache.dtype)
    row_bytes = cache.shape[1] * cache.element_size()
    src, ids, dst = cache.data_ptr(), block_ids.data_ptr(), out.data_ptr()
    M, N = len(block_ids), len(cache)
    _native.check_rows(ids, M, N)
    _native.parallel(
        lambda first, last: _native.core().cpu_gather_rows(src, ids, first, last, row_bytes, dst),
        M,
        M * row_bytes,
    )
    return out


@write_blocks.backend("cpu", accepts=_on_cpu, missing=_native.missing)
def _write_cpu(cache: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
    row_bytes = cache.shape[1] * cache.element_size()
    dst, ids, src = cache.data_ptr(), block_ids.data_ptr(), blocks.data_ptr()
    M, N = len(block_ids), len(cache)
    _native.check_rows(ids, M, N)
    _native.parallel(
        lambda first, last: _native.core().cpu_write_rows(dst, ids, first, last, row_bytes, src),
        M,
        M * row_bytes,
    )


_cuda.register_blocks(gather_blocks, write_blocks)
_triton.register_blocks(gather_blocks, write_blocks)
_library.register_blocks(gather_blocks, write_blocks)
