"""Blocks on the model's device that are restored often, within a budget that may change.

Each block has memory of its own there: a budget that shrinks gives memory back at once, and no
block is moved for it. ``memos.kv.device.DevicePool`` is the other kind, a slab for paged caches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from memos.errors import ArgumentError
from memos.kv._lanes import Lanes, stacked
from memos.kv.device import home_of, with_index
from memos.kv.identity import KVIdentity
from memos.kv.policy import make_policy


class BlockPool:
    """Packed blocks by key on one device; what the policy names leaves first. Thread-safe.

    It holds copies of what a store has: what leaves is dropped. What a caller gets are copies too,
    so whatever leaves, nothing changes for who reads. Work is queued on the caller's current
    stream, and ordered by events where those differ.

    Args:
        block_shape:  (L, E), of the uint8 bytes of every block.
        budget_bytes: of blocks on the device.
        device:       where.
        policy:       what leaves first.
    """

    def __init__(
        self,
        block_shape: tuple[int, int],
        budget_bytes: int,
        device: torch.device | str,
        policy: str = "lru",
    ) -> None:
        self.block_shape, self.device = block_shape, with_index(device)
        self.block_bytes = block_shape[0] * block_shape[1]
        self.budget_bytes = budget_bytes
        self._policy = make_policy(policy)
        self._lock = threading.RLock()
        self._blocks: dict[bytes, torch.Tensor] = {}
        self._lanes = Lanes(self.device, 0)
        self.peak_bytes = self.hits = self.loads = self.evictions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def held(self) -> int:
        """Bytes of the device."""
        return len(self._blocks) * self.block_bytes

    def contains(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are here."""
        with self._lock:
            return next((n for n, key in enumerate(keys) if key not in self._blocks), len(keys))

    def held_keys(self) -> list[bytes]:
        """Of all blocks."""
        with self._lock:
            return list(self._blocks)

    def stats(self) -> dict[str, int]:
        """Blocks, bytes, and how often blocks were found, loaded and evicted."""
        with self._lock:
            return {
                "blocks": len(self._blocks),
                "bytes": self.held(),
                "peak_bytes": self.peak_bytes,
                "budget_bytes": self.budget_bytes,
                "hits": self.hits,
                "loads": self.loads,
                "evictions": self.evictions,
            }

    def set_budget(self, num_bytes: int) -> None:
        """Change the budget; what does not fit any more is gone when this returns."""
        with self._lock:
            self.budget_bytes = num_bytes
            self._make_room(0, set())

    def load(
        self, keys: Sequence[bytes], parents: Sequence[bytes], rows: Sequence[torch.Tensor]
    ) -> int:
        """Bring blocks in, in this order, as far as there is room beside them.

        Args:
            keys:    no two equal; those that are here count as used and are not moved.
            parents: the block that each follows.
            rows:    [L, E] uint8 each, on the host.

        Returns:
            How many of the leading ones are here now.

        Raises:
            ArgumentError: a shape or dtype is out of contract.
        """
        if not len(keys) == len(parents) == len(rows) or len(set(keys)) != len(keys):
            raise ArgumentError("keys, parents, rows: as many, and no key twice, wanted")
        for row in rows:
            if tuple(row.shape) != self.block_shape or row.dtype != torch.uint8:
                raise ArgumentError(
                    f"rows: uint8 {list(self.block_shape)} wanted, got {row.dtype} "
                    f"{list(row.shape)}"
                )
        with self._lock:
            for key in keys:
                self._policy.touch(key)
            new = [i for i, key in enumerate(keys) if key not in self._blocks]
            room = self._make_room(len(new), set(keys))
            stays = new[:room]
            for i, block in zip(stays, self._brought([rows[i] for i in stays]), strict=True):
                self._blocks[keys[i]] = block
                self._policy.admit(keys[i], parents[i])
            self.loads += len(stays)
            self.peak_bytes = max(self.peak_bytes, self.held())
            return len(keys) if room == len(new) else new[room]

    def through(self, keys: Sequence[bytes], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Blocks [L, E] on the device, from here where they are here, else from the host and kept.

        Args:
            keys: of one chain, from its first block on.
            rows: the same blocks on the host.
        """
        with self._lock:
            self.hits += self.contains(keys)
            have = self.load(keys, [b"", *keys][: len(keys)], rows)
            found = list(self._read(keys[:have]))
        if left := rows[have:]:
            found += list(stacked(left, self.device))
        return found

    def drop(self, keys: Sequence[bytes]) -> int:
        """Forget these blocks; zeros take their place. Returns how many."""
        with self._lock:
            gone = [key for key in keys if key in self._blocks]
            if gone:
                self._lanes.begin()
                for key in gone:
                    self._policy.remove(key)
                    self._used(self._blocks.pop(key).zero_())
                self._lanes.wrote()
            return len(gone)

    def drop_unless(self, known: Callable[[bytes], bool]) -> int:
        """Forget the blocks that the store does not know any more. Returns how many."""
        gone = [key for key in self.held_keys() if not known(key)]
        return self.drop(gone)

    # Inside

    def _make_room(self, count: int, ours: set[bytes]) -> int:
        """Evict until ``count`` blocks fit, or what can go is gone; returns how many fit."""
        most = max(self.budget_bytes // self.block_bytes, 0)
        need = len(self._blocks) + count - most
        if need > 0:
            for key in self._policy.victims():
                if key in ours:
                    continue
                self._policy.remove(key)
                del self._blocks[key]
                self.evictions += 1
                need -= 1
                if need == 0:
                    break
        return max(min(count, most - len(self._blocks)), 0)

    def _brought(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the device, in memory of their own each."""
        if not rows or self.device.type == "cpu":
            return [row.clone() for row in rows]
        self._lanes.begin()
        host = torch.empty((len(rows), *self.block_shape), dtype=torch.uint8, pin_memory=True)
        torch.stack(list(rows), out=host)
        blocks = [row.to(self.device, non_blocking=True) for row in host]
        self._lanes.wrote()
        return blocks

    def _read(self, keys: Sequence[bytes]) -> torch.Tensor:
        """[n, L, E] in fresh memory of the device."""
        if not keys:
            return torch.empty((0, *self.block_shape), dtype=torch.uint8, device=self.device)
        self._lanes.wait_for_writes()
        found = torch.stack([self._used(self._blocks[key]) for key in keys])
        self._lanes.read()
        return found

    def _used(self, block: torch.Tensor) -> torch.Tensor:
        """Its memory is not given to others before what is queued now has used it."""
        if block.device.type == "cuda":
            block.record_stream(torch.cuda.current_stream(block.device))
        return block


class PoolOnDemand:
    """A pool within ``budget_bytes``, made when the device and the shape of blocks are known.

    Another device or shape makes another pool in its place: a memory has one model. For a model
    on the CPU, where it saves nothing, there is one only if a budget was given here. Thread-safe.
    """

    def __init__(self, budget_bytes: int, policy: str = "lru") -> None:
        if budget_bytes < 0:
            raise ArgumentError(f"device_bytes: at least 0 wanted, got {budget_bytes}")
        make_policy(policy)
        self._budget, self._policy = budget_bytes, policy
        self._on_cpu = budget_bytes > 0
        self._lock = threading.Lock()
        self._pool: BlockPool | None = None

    def __call__(self, identity: KVIdentity, device: torch.device | str) -> BlockPool | None:
        """The pool for these blocks; None where there is none to have."""
        device = with_index(device)
        if not self._has_one(identity, device):
            return None
        layers = identity.num_layers
        shape = layers, identity.block_bytes() // layers
        with self._lock:
            if self._budget < identity.block_bytes():
                return None
            pool = self._pool
            if pool is None or (pool.block_shape, pool.device) != (shape, device):
                if pool is not None:  # who still has it cannot add to it
                    pool.set_budget(0)
                pool = self._pool = BlockPool(shape, self._budget, device, self._policy)
            return pool

    def _has_one(self, identity: KVIdentity, device: torch.device) -> bool:
        if self._budget < identity.block_bytes() or home_of(device).type != device.type:
            return False
        return self._on_cpu or device.type != "cpu"

    @property
    def budget_bytes(self) -> int:
        return self._budget

    @property
    def pool(self) -> BlockPool | None:
        """The one that was made last, if any."""
        return self._pool

    def held(self) -> int:
        """Bytes of the device."""
        pool = self._pool
        return 0 if pool is None else pool.held()

    def set_budget(self, num_bytes: int) -> None:
        """Change the budget; what does not fit any more is gone when this returns."""
        if num_bytes < 0:
            raise ArgumentError(f"device_bytes: at least 0 wanted, got {num_bytes}")
        with self._lock:
            self._budget = num_bytes
            if self._pool is not None:
                self._pool.set_budget(num_bytes)

    def stats(self) -> dict[str, int]:
        """Of the pool; empty where there is none."""
        pool = self._pool
        return {} if pool is None else pool.stats()
