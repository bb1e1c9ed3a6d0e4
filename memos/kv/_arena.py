"""Memory for payloads, several in one piece: large pieces are quicker to fill."""

from __future__ import annotations

from collections.abc import Sequence

from memos.kernels._memory import allocate

ARENA_BYTES = 32 << 20
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
        arena, start = Arena(allocate(sum(group))), 0
        for size in group:
            found.append((arena, arena.buffer[start : start + sizes[len(found)]]))
            start += size
    return found
