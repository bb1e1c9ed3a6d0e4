"""Which adapter goes first when a budget is full.

A policy knows keys and sizes; it holds no bytes. It is called under the lock of its pool and needs
none of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from memos.errors import ArgumentError


class Policy(Protocol):
    """The interface of an eviction policy. Keys are unique."""

    def admit(self, key: str, num_bytes: int) -> None:
        """An adapter is there; it counts as used now."""

    def touch(self, key: str) -> None:
        """An adapter is used. Unknown keys are ignored."""

    def remove(self, key: str) -> None:
        """An adapter is gone. Unknown keys are ignored."""

    def victims(self) -> Iterator[str]:
        """Keys in the order in which they should go.

        The caller may remove keys that it was given before it asks for the next one, or keep them.
        """


class LRU:
    """Least recently used. Admitting, touching and removing cost O(1)."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()

    def admit(self, key: str, num_bytes: int) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def touch(self, key: str) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)

    def remove(self, key: str) -> None:
        self._keys.pop(key, None)

    def victims(self) -> Iterator[str]:
        return iter(list(self._keys))


POLICIES = {"lru": LRU}


def make_policy(name: str) -> Policy:
    """A fresh policy of this name. Raises ArgumentError with the names there are."""
    if name not in POLICIES:
        raise ArgumentError(f"policy: one of {', '.join(POLICIES)} wanted, got {name!r}")
    return POLICIES[name]()
