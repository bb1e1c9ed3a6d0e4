"""Which block goes first when a quota is full.

A policy knows keys and who follows whom; it holds no bytes and does no I/O. It is called under
the lock of its tier and needs none of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol

from memos.errors import ArgumentError


class Policy(Protocol):
    """The interface of an eviction policy. Keys are unique; a parent may be unknown."""

    def admit(self, key: bytes, parent: bytes) -> None:
        """A block is stored; it counts as used now."""

    def touch(self, key: bytes) -> None:
        """A block is used. Unknown keys are ignored."""

    def remove(self, key: bytes) -> None:
        """A block is gone. Unknown keys are ignored."""

    def succeed(self, key: bytes, old: bytes) -> None:
        """A block stands for another one from now on: it is as recently used as that was."""

    def victims(self) -> Iterator[bytes]:
        """Keys in the order in which they should go, each after all blocks that follow it.

        The caller takes a key and then either removes it (``remove``) before it asks for the next
        one, or keeps it, and with it all blocks it follows.
        """

    def order(self) -> list[bytes]:
        """All keys, the least recently used first: what a restart wants to know."""


class LRU:
    """Least recently used, leaves first.

    A block is offered only when no stored block names it as its parent: without its parents a
    block cannot be reached, so a chain shrinks from its end. Admitting, touching and removing
    cost O(log n).
    """

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}
        self._parent: dict[bytes, bytes] = {}
        self._children: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []
        self._tick = 0

    def __len__(self) -> int:
        return len(self._last)

    def admit(self, key: bytes, parent: bytes) -> None:
        if key not in self._last:
            self._parent[key] = parent
            self._children[parent] = self._children.get(parent, 0) + 1
            self._last[key] = 0
        self.touch(key)

    def touch(self, key: bytes) -> None:
        if key not in self._last:
            return
        self._tick += 1
        self._last[key] = self._tick
        if key not in self._children:
            self._push(key)

    def remove(self, key: bytes) -> None:
        if self._last.pop(key, None) is None:
            return
        parent = self._parent.pop(key)
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]
            if parent in self._last:
                self._push(parent)

    def succeed(self, key: bytes, old: bytes) -> None:
        if key in self._last and old in self._last:
            self._last[key] = self._last[old]
            if key not in self._children:
                self._push(key)

    def victims(self) -> Iterator[bytes]:
        kept = []
        try:
            while self._heap:
                tick, key = heapq.heappop(self._heap)
                if self._last.get(key) != tick or key in self._children:
                    continue  # used, removed or followed since it was pushed
                kept.append((tick, key))
                yield key
                if key not in self._last:
                    kept.pop()
        finally:
            for entry in kept:
                heapq.heappush(self._heap, entry)

    def order(self) -> list[bytes]:
        return sorted(self._last, key=self._last.__getitem__)

    def _push(self, key: bytes) -> None:
        heapq.heappush(self._heap, (self._last[key], key))
        if len(self._heap) > 2 * len(self._last) + 64:
            self._heap = [
                (tick, key) for key, tick in self._last.items() if key not in self._children
            ]
            heapq.heapify(self._heap)


POLICIES = {"lru": LRU}


def make_policy(name: str) -> Policy:
    """A fresh policy of this name. Raises ArgumentError with the names there are."""
    if name not in POLICIES:
        raise ArgumentError(f"policy: one of {', '.join(POLICIES)} wanted, got {name!r}")
    return POLICIES[name]()
