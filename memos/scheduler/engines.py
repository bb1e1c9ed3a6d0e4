"""The policies of this package as the engines call them.

An engine below this layer knows the small protocol of its own ``policy`` module: it admits,
touches and removes single keys, and asks for victims. ``BlockPolicy`` and ``AdapterPolicy`` speak
it for any policy of ``memos.scheduler.policy``; ``install`` makes them known by name, so that
``KVStore(policy="memos")`` and ``AdapterPool(policy="memos")`` work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from memos.scheduler.policy import Policy, make_policy, policies

ROOT = bytes(32)  # the parent of a first block


class BlockPolicy:
    """KV blocks: single calls become chains, and only leaves are victims.

    The engine touches or admits a chain root first; a key that does not follow the one before it
    begins another chain. A chain with new blocks is one request of its session: what of it was
    touched is where the new ones hang, and no use beside the one that was counted when it was
    read.
    """

    def __init__(self, policy: Policy[bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self.policy, self._clock = policy, clock
        self._parent: dict[bytes, bytes] = {}
        self._children: dict[bytes, int] = {}
        self._touched: list[bytes] = []
        self._added: list[bytes] = []

    def __len__(self) -> int:
        return len(self._parent)

    def admit(self, key: bytes, parent: bytes) -> None:
        if key in self._parent:
            self.touch(key)
            return
        self._parent[key] = parent
        self._children[parent] = self._children.get(parent, 0) + 1
        chain = self._added or self._touched
        if not chain or chain[-1] != parent:
            self._tell()
        self._added.append(key)

    def touch(self, key: bytes) -> None:
        if key not in self._parent:
            return
        if self._added or (self._touched and self._touched[-1] != self._parent[key]):
            self._tell()
        self._touched.append(key)

    def remove(self, key: bytes) -> None:
        parent = self._parent.get(key)
        if parent is None:
            return
        self._tell()
        del self._parent[key]
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]
        self.policy.on_remove((key,))

    def succeed(self, key: bytes, old: bytes) -> None:
        """What was learnt of a block is of its chain: the new one is a chain of its own."""

    def victims(self) -> Iterator[bytes]:
        self._tell()
        waiting: set[bytes] = set()  # the policy named them before what follows them
        for key in self.policy.victims(self._clock()):
            if key in self._children:
                waiting.add(key)
                continue
            parent = self._parent[key]
            yield key
            while parent in waiting and parent not in self._children:
                waiting.discard(parent)
                key, parent = parent, self._parent[parent]
                yield key

    def order(self) -> list[bytes]:
        self._tell()
        return self.policy.order()

    def _tell(self) -> None:
        """Hand what came together to the policy."""
        touched, added = self._touched, self._added
        self._touched, self._added = [], []
        now = self._clock()
        if added:
            parent = self._parent.get(added[0], ROOT)
            self.policy.on_add(added, None if parent == ROOT else parent, now)
        if touched and not added:
            self.policy.on_hit(touched, now)


class AdapterPolicy:
    """Adapters: single keys that weigh their bytes."""

    def __init__(self, policy: Policy[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.policy, self._clock = policy, clock

    def admit(self, key: str, num_bytes: int) -> None:
        self.policy.on_add((key,), None, self._clock(), weight=max(num_bytes, 1))

    def touch(self, key: str) -> None:
        self.policy.on_hit((key,), self._clock())

    def remove(self, key: str) -> None:
        self.policy.on_remove((key,))

    def victims(self) -> Iterator[str]:
        return self.policy.victims(self._clock())


def install() -> None:
    """Make the policies known to the engines by name, for stores and pools made from now on.

    "lru" stays what the engines bring themselves. Those that need to know how many keys there
    will be (s3fifo, arc) are for replays: a quota counts bytes.
    """
    from memos.adapters import policy as adapters
    from memos.kv import policy as kv

    blocks: dict[str, Any] = kv.POLICIES
    slabs: dict[str, Any] = adapters.POLICIES
    for name in policies():
        if name in ("lfu", "memos"):
            blocks.setdefault(name, partial(_made, BlockPolicy, name))
            slabs.setdefault(name, partial(_made, AdapterPolicy, name))


def _made(wrap: Callable[[Policy[Any]], Any], name: str) -> Any:
    return wrap(make_policy(name, 1.0))
