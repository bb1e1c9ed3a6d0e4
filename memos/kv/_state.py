"""What the tenants of one store share: tiers, locks, clock, counters, threads."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from memos import settings
from memos.errors import StoreError, StoreLockedError
from memos.kernels import _pool
from memos.kv.frame import ZERO_KEY, Block
from memos.kv.segment import Record
from memos.kv.sessions import OpenTables
from memos.kv.tiers import DiskTier, HostTier

T = TypeVar("T")
R = TypeVar("R")
_MAX_THREADS = 8


class State:
    """Shared by a store and its tenants.

    ``write_lock`` is held through a whole change (put, delete, eviction) and taken first;
    ``lock`` guards the indexes and counters and is held for moments only, never while writing.
    """

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier | None,
        *,
        writable: bool,
        durable: bool,
        clock: Callable[[], float],
    ) -> None:
        self.host = host
        self.disk = disk
        if disk is not None:
            disk.on_evict = host.remove  # memory only repeats what is on disk
        self.writable = writable
        self.durable = durable
        self.clock = clock
        self.lock = threading.RLock()
        self.write_lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.started_s = time.monotonic()
        self.pinned: Callable[[], set[bytes]] = set  # the store sets it: keys never to evict
        self.closed = False
        self.tables = OpenTables()
        self._refusal: type[StoreError] = StoreError
        self._read_only_because = "it was opened with mode='r'"
        self._expiring: list[tuple[int, bytes]] = []

    # Checks

    def check_open(self) -> None:
        if self.closed:
            raise StoreError("store: an open store wanted, but it is closed")

    def check_writable(self) -> None:
        self.check_open()
        if not self.writable:
            raise self._refusal(f"store: a writable store wanted, but {self._read_only_because}")

    # Blocks, wherever they are

    def now_ms(self) -> int:
        return int(self.clock() * 1000)

    def find(self, key: bytes) -> Block | None:
        """The block of this key where it is kept for good: on disk, or in memory without one."""
        if self.disk is None:
            item = self.host.blocks.get(key)
            return item.block if item else None
        record = self.disk.records.get(key)
        return record.block if record else None

    def blocks(self) -> Iterable[Block]:
        """All blocks kept for good."""
        if self.disk is None:
            return [item.block for item in self.host.blocks.values()]
        return [record.block for record in self.disk.records.values()]

    def touch(self, key: bytes) -> None:
        """A block was used."""
        self.host.policy.touch(key)
        if self.disk is not None:
            self.disk.policy.touch(key)

    def succeed(self, key: bytes, old: bytes) -> None:
        """A block stands for another one: it was used when that was."""
        self.host.policy.succeed(key, old)
        if self.disk is not None:
            self.disk.policy.succeed(key, old)

    def drop(self, key: bytes, record: Record | None) -> None:
        """A frame failed its checks: out of the index, and out of memory."""
        self.host.remove(key)
        if self.disk is not None and record is not None:
            self.disk.discard(record)

    def destroy(self, keys: Iterable[bytes], *, wipe: bool = False) -> int:
        """Remove blocks from every tier; returns how many there were."""
        keys = list(keys)
        with self.lock:
            removed = sum(self.find(key) is not None for key in keys)
            for key in keys:
                self.host.remove(key)
            if self.disk is not None:
                records = self.disk.records
                self.disk.destroy([records[k] for k in keys if k in records], wipe=wipe)
        return removed

    def forget_tenant(self, tenant: bytes) -> None:
        """Take all of a tenant's blocks out of the indexes; its files are gone already."""
        with self.lock:
            for key in [k for k, i in self.host.blocks.items() if i.block.tenant == tenant]:
                self.host.remove(key)
            if self.disk is not None:
                for segment in [s for s in self.disk.segments.values() if s.tenant == tenant]:
                    self.disk.forget_segment(segment)

    def with_ancestors(self, keys: Iterable[bytes]) -> set[bytes]:
        """These keys and those of all blocks they follow."""
        found: set[bytes] = set()
        for start in keys:
            key = start
            while key not in found and key != ZERO_KEY:
                found.add(key)
                block = self.find(key)
                if block is None:
                    break
                key = block.parent
        return found

    # Time to live

    def note_expiry(self, block: Block) -> None:
        if block.expires_ms:
            heapq.heappush(self._expiring, (block.expires_ms, block.key))

    def sweep(self, now_ms: int) -> int:
        """Destroy the blocks whose time is over; returns how many."""
        over = []
        with self.lock:
            while self._expiring and self._expiring[0][0] <= now_ms:
                _, key = heapq.heappop(self._expiring)
                block = self.find(key)
                if block is not None and block.has_expired(now_ms):
                    over.append(key)
            self.counts["expired"] += len(over)
        return self.destroy(over, wipe=True) if over else 0

    # Threads and forks

    def map(self, run: Callable[[T], R], items: Sequence[T], num_bytes: int) -> list[R]:
        """``run`` over the items, on a few threads when there are many bytes to work on."""
        workers = min(settings.num_threads(), _MAX_THREADS, len(items))
        if workers < 2 or num_bytes < 4 << 20:
            return [run(item) for item in items]
        results: dict[int, R] = {}

        def one(i: int) -> None:
            results[i] = run(items[i])

        _pool.run(one, len(items), workers)
        return [results[i] for i in range(len(items))]

    def after_fork(self) -> None:
        """In a child: the parent keeps the folder's lock and its threads."""
        self.lock = threading.RLock()
        self.write_lock = threading.RLock()
        self.tables = OpenTables()
        if self.disk is not None and self.writable:
            self.writable = False
            self._refusal = StoreLockedError
            self._read_only_because = (
                f"process {os.getppid()} opened it and this is a fork; open it anew here"
            )

    def close(self) -> None:
        self.closed = True
