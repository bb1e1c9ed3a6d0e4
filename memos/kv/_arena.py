"""Memory for payloads. Fresh pages cost more than reading or checking what goes into them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

ARENA_BYTES = 32 << 20
_HUGE_FROM = 4 << 20  # smaller ones gain nothing from huge pages
_ALIGN = 64


class Arena:
    """One piece of memory that several payloads share; it lives as long as a view of it.

    ``holders`` counts the blocks of the host tier in it: its bytes count against the quota until
    the last one leaves.
    """

    __slots__ = ("buffer", "holders", "num_bytes")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.num_bytes = buffer.nbytes
        self.holders = 0


def allocate(num_bytes: int) -> Arena:
    """Zeroed anonymous memory, in huge pages where it is large and the kernel has them."""
    if num_bytes < _HUGE_FROM:
        return Arena(memoryview(bytearray(num_bytes)))
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return Arena(memoryview(memory))


def slots(sizes: Sequence[int], limit_bytes: int) -> list[tuple[Arena, memoryview]]:
    """One writable range for each size, in arenas of at most ``limit_bytes`` where they fit."""
    groups: list[list[int]] = []
    room = 0
    for size in sizes:
        size = -(-size // _ALIGN) * _ALIGN
        if size > room:
            groups.append([])
            room = max(limit_bytes, size)
        groups[-1].append(size)
        room -= size
    found: list[tuple[Arena, memoryview]] = []
    for group in groups:
        arena, start = allocate(sum(group)), 0
        for size in group:
            found.append((arena, arena.buffer[start : start + sizes[len(found)]]))
            start += size
    return found
