"""Paged <-> contiguous on a GPU: plain copies of whole blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Eight bytes per lane are enough for full bandwidth; 1024 lanes are 8 KB per program.
_TILE = 1024
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _gather_blocks_kernel(cache_ptr, ids_ptr, out_ptr, row, BLOCK: tl.constexpr):
    """One program copies one tile of one output row.

    cache [N, row], ids [M] int64, out [M, row]; grid (M, ceil(row / BLOCK)).
    """
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < row
    block = tl.load(ids_ptr + m)
    words = tl.load(cache_ptr + block * row + i, mask=inside)
    tl.store(out_ptr + m * row + i, words, mask=inside)


def gather_blocks(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """``out[m] = cache[block_ids[m]]``: the contract is the op's, ``memos.kernels.gather_blocks``.

    Returns before the copy is done; the work is queued on the current stream.
    """
    out = cache.new_empty(len(block_ids), cache.shape[1])
    if not out.numel():
        return out
    word = _widest_word(cache)
    source, target = cache.view(word), out.view(word)
    row = source.shape[1]
    with torch.cuda.device_of(cache):
        _gather_blocks_kernel[(len(block_ids), triton.cdiv(row, _TILE))](
            source, block_ids, target, row, BLOCK=_TILE
        )
    return out


def _widest_word(rows: torch.Tensor) -> torch.dtype:
    """The widest integer that divides row, offset and address: a view may start anywhere."""
    size = rows.element_size()
    places = (rows.shape[1] * size, rows.storage_offset() * size, rows.data_ptr())
    return next(word for word in _WORDS if all(place % word.itemsize == 0 for place in places))
