"""Paged <-> contiguous on a GPU: plain copies of whole blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A lane moves up to 64 bytes in four loads of 16; 128 lanes are 8 KB per program.
_TILE_BYTES = 8192
_LINE = 16  # bytes of the widest load
_WORDS = (torch.int32, torch.int16, torch.uint8)


@triton.jit
def _copy_rows_kernel(
    from_ptr, ids_ptr, to_ptr, lines, LINE: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program copies one tile of one row: from_ptr[ids[m]] to to_ptr[m], or the other way.

    ids [M] int64; both sides have rows of lines * LINE words; grid (M, ceil(words / BLOCK)). That
    a row is a multiple of LINE words is what makes the loads 16 bytes wide.
    """
    row = lines.to(tl.int64) * LINE
    m = tl.program_id(0).to(tl.int64)
    block = tl.load(ids_ptr + m)
    source = m if WRITE else block
    target = block if WRITE else m
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < row
    words = tl.load(from_ptr + source * row + i, mask=inside)
    tl.store(to_ptr + target * row + i, words, mask=inside)


def gather_blocks(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """``out[m] = cache[block_ids[m]]``: the contract is the op's, ``memos.kernels.gather_blocks``.

    Returns before the copy is done; the work is queued on the current stream.
    """
    out = cache.new_empty(len(block_ids), cache.shape[1])
    _copy_rows(cache, block_ids, out, write=False)
    return out


def write_blocks(cache: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
    """``cache[block_ids[m]] = blocks[m]``: the contract is ``memos.kernels.write_blocks``'s.

    Returns before the copy is done; the work is queued on the current stream.
    """
    _copy_rows(blocks, block_ids, cache, write=True)


def _copy_rows(
    source: torch.Tensor, ids: torch.Tensor, target: torch.Tensor, *, write: bool
) -> None:
    if not len(ids) or not source.shape[1]:
        return
    word, line = _widest_word(source, target)
    row = source.shape[1] * source.element_size() // word.itemsize
    block = min(triton.next_power_of_2(row), _TILE_BYTES // word.itemsize)
    with torch.cuda.device_of(source):
        _copy_rows_kernel[(len(ids), triton.cdiv(row, block))](
            source.view(word), ids, target.view(word), row // line, line, write, block
        )


def _widest_word(*sides: torch.Tensor) -> tuple[torch.dtype, int]:
    """The widest integer that divides row and addresses (a view may start anywhere), and how many
    make a line: those of 16 bytes where rows and addresses are a multiple of that, else 1."""
    size = sides[0].element_size()
    places = [sides[0].shape[1] * size]
    for side in sides:
        places += [side.storage_offset() * size, side.data_ptr()]
    if all(place % _LINE == 0 for place in places):
        return torch.int32, _LINE // torch.int32.itemsize
    return next(word for word in _WORDS if all(p % word.itemsize == 0 for p in places)), 1
