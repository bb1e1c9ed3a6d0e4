"""Policies that look at single keys: what is known about caches of anything.

They count every key as one: weights, costs and what follows what are left aside. Of a chain the
leaves count as the older ones, so that LRU takes a chain from its end.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Flat(Generic[K]):
    """What the policies of this file share.

    Args:
        capacity: keys that will be held.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = max(1, int(capacity))
        self._tick = 0
        self._used: dict[K, int] = {}  # key -> when it was last used

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, key: object) -> bool:
        return key in self._used

    def on_hit(self, keys: Sequence[K], now: float) -> None:
        for key in reversed(keys):
            if key in self._used:
                self._use(key)
                self._hit(key)

    def on_add(
        self,
        keys: Sequence[K],
        parent: K | None = None,
        now: float = 0.0,
        *,
        weight: float = 1.0,
        cost: float = 1.0,
    ) -> None:
        for key in reversed(keys):
            known = key in self._used
            self._use(key)
            if known:
                self._hit(key)
            else:
                self._add(key)

    def on_remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            if self._used.pop(key, None) is not None:
                self._remove(key)

    def victims(self, now: float) -> Iterator[K]:
        kept: list[K] = []
        try:
            while len(kept) < len(self._used):
                key = self._next()
                yield key
                if key in self._used:
                    kept.append(key)
                    self._hide(key)
        finally:
            for key in reversed(kept):
                if key in self._used:
                    self._put_back(key)

    def evict(self, weight: float, now: float) -> list[K]:
        gone: list[K] = []
        while len(gone) < weight and self._used:
            key = self._next()
            del self._used[key]
            self._remove(key)
            gone.append(key)
        return gone

    def order(self) -> list[K]:
        return sorted(self._used, key=self._used.__getitem__)

    def _use(self, key: K) -> None:
        self._tick += 1
        self._used[key] = self._tick

    # What each policy says of one key

    def _hit(self, key: K) -> None:
        raise NotImplementedError

    def _add(self, key: K) -> None:
        raise NotImplementedError

    def _next(self) -> K:
        """The key that should go first; called with at least one that is not hidden."""
        raise NotImplementedError

    def _remove(self, key: K) -> None:
        """The key, which may be hidden, is gone."""
        raise NotImplementedError

    def _hide(self, key: K) -> None:
        """``_next`` gave this key; give others until it is put back."""
        raise NotImplementedError

    def _put_back(self, key: K) -> None:
        raise NotImplementedError


class LRU(Flat[K]):
    """Least recently used."""

    def __init__(self, capacity: float) -> None:
        super().__init__(capacity)
        self._queue: OrderedDict[K, None] = OrderedDict()

    def _hit(self, key: K) -> None:
        self._queue.move_to_end(key)

    def _add(self, key: K) -> None:
        self._queue[key] = None

    def _next(self) -> K:
        return next(iter(self._queue))

    def _remove(self, key: K) -> None:
        self._queue.pop(key, None)

    def _hide(self, key: K) -> None:
        del self._queue[key]

    def _put_back(self, key: K) -> None:
        self._queue[key] = None
        self._queue.move_to_end(key, last=False)


class LFU(Flat[K]):
    """Least frequently used, with aging: a key that is used outranks what was evicted last.

    Source: Arlitt et al., Evaluating content management techniques for Web proxy caches, 2000
    (LFU with dynamic aging).
    """

    def __init__(self, capacity: float) -> None:
        super().__init__(capacity)
        self._rank: dict[K, tuple[int, int]] = {}  # rank, tick
        self._count: dict[K, int] = {}
        self._heap: list[tuple[int, int, K]] = []
        self._age = 0
        self._hidden: set[K] = set()

    def _hit(self, key: K) -> None:
        self._count[key] = self._count.get(key, 0) + 1
        rank, tick = self._count[key] + self._age, self._used[key]
        self._rank[key] = rank, tick
        if len(self._heap) > 2 * len(self._rank) + 64:
            self._heap = [(r, t, k) for k, (r, t) in self._rank.items() if k not in self._hidden]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (rank, tick, key))

    _add = _hit

    def _next(self) -> K:
        while True:
            rank, tick, key = self._heap[0]
            if self._rank.get(key) == (rank, tick) and key not in self._hidden:
                return key
            heapq.heappop(self._heap)

    def _remove(self, key: K) -> None:
        self._age = max(self._age, self._rank.pop(key)[0])
        del self._count[key]
        self._hidden.discard(key)

    def _hide(self, key: K) -> None:
        self._hidden.add(key)

    def _put_back(self, key: K) -> None:
        self._hidden.discard(key)
        rank, tick = self._rank[key]
        heapq.heappush(self._heap, (rank, tick, key))


class S3FIFO(Flat[K]):
    """Three queues: a small one for what is new, a main one, and one of what is gone.

    Source: Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023.
    """

    def __init__(self, capacity: float) -> None:
        super().__init__(capacity)
        self._small_size = max(1, self.capacity // 10)
        self._ghost_size = max(1, self.capacity - self._small_size)
        self._small: OrderedDict[K, int] = OrderedDict()  # key -> uses since it came, at most 3
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghost: OrderedDict[K, None] = OrderedDict()
        self._hidden: dict[K, tuple[OrderedDict[K, int], int]] = {}

    def _hit(self, key: K) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(3, queue.get(key, 0) + 1)

    def _add(self, key: K) -> None:
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def _next(self) -> K:
        while True:
            if self._small and (len(self._small) >= self._small_size or not self._main):
                key, uses = next(iter(self._small.items()))
                if uses <= 1:
                    return key
                del self._small[key]
                self._main[key] = 0
            else:
                key, uses = next(iter(self._main.items()))
                if not uses:
                    return key
                self._main[key] = uses - 1
                self._main.move_to_end(key)

    def _remove(self, key: K) -> None:
        queue, _ = self._hidden.pop(key, (self._main, 0))
        if self._small.pop(key, None) is not None or queue is self._small:
            self._ghost[key] = None
            if len(self._ghost) > self._ghost_size:
                self._ghost.popitem(last=False)
        else:
            self._main.pop(key, None)

    def _hide(self, key: K) -> None:
        queue = self._small if key in self._small else self._main
        self._hidden[key] = queue, queue.pop(key)

    def _put_back(self, key: K) -> None:
        queue, uses = self._hidden.pop(key)
        queue[key] = uses
        queue.move_to_end(key, last=False)


class ARC(Flat[K]):
    """Recency and frequency, their shares adapted to what is asked for after it is gone.

    Source: Megiddo and Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003.
    """

    def __init__(self, capacity: float) -> None:
        super().__init__(capacity)
        self._once: OrderedDict[K, None] = OrderedDict()
        self._often: OrderedDict[K, None] = OrderedDict()
        self._once_gone: OrderedDict[K, None] = OrderedDict()
        self._often_gone: OrderedDict[K, None] = OrderedDict()
        self._target = 0.0  # of ``once``
        self._hidden: dict[K, OrderedDict[K, None]] = {}

    def _hit(self, key: K) -> None:
        self._once.pop(key, None)
        self._often[key] = None
        self._often.move_to_end(key)

    def _add(self, key: K) -> None:
        once, often = len(self._once_gone), len(self._often_gone)
        if key in self._once_gone:
            self._target = min(self.capacity, self._target + max(1.0, often / once))
            del self._once_gone[key]
            self._often[key] = None
        elif key in self._often_gone:
            self._target = max(0.0, self._target - max(1.0, once / often))
            del self._often_gone[key]
            self._often[key] = None
        else:
            self._once[key] = None

    def _next(self) -> K:
        if self._once and (len(self._once) > self._target or not self._often):
            return next(iter(self._once))
        return next(iter(self._often))

    def _remove(self, key: K) -> None:
        queue = self._hidden.pop(key, self._once if key in self._once else self._often)
        queue.pop(key, None)
        gone = self._once_gone if queue is self._once else self._often_gone
        gone[key] = None
        while self._once_gone and len(self._once) + len(self._once_gone) > self.capacity:
            self._once_gone.popitem(last=False)
        while len(self._used) + len(self._once_gone) + len(self._often_gone) > 2 * self.capacity:
            gone = self._often_gone or self._once_gone
            if not gone:
                break
            gone.popitem(last=False)

    def _hide(self, key: K) -> None:
        queue = self._once if key in self._once else self._often
        del queue[key]
        self._hidden[key] = queue

    def _put_back(self, key: K) -> None:
        queue = self._hidden.pop(key)
        queue[key] = None
        queue.move_to_end(key, last=False)
