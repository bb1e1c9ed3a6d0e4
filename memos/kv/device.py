"""The tier on the device: blocks in the model's own memory, within a budget of bytes.

The same class runs on the CPU (``device="cpu"``): nothing but ``_lanes`` knows streams and events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from memos import kernels
from memos.errors import ArgumentError
from memos.kernels.codec import Codec
from memos.kv._lanes import Lanes
from memos.kv.policy import Policy, make_policy

Caches = Sequence[torch.Tensor]
Evicted = Callable[[list[bytes], torch.Tensor], object]
_MAX_CHUNK = 32  # blocks on their way at once, in each direction


def home_of(device: torch.device) -> torch.device:
    """Where blocks of a model on this device are packed and unpacked: there, if a backend for it
    runs, else on the host."""
    if device.type == "cuda":
        backends = kernels.ops["pack_kv"].backends
        if any(backends[name].missing() is None for name in ("cuda", "triton")):
            return device
    return torch.device("cpu")


def with_index(device: torch.device | str) -> torch.device:
    """As tensors name it: "cuda" alone is the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True)
class BlockShape:
    """What a block holds: L layers of P tokens, H heads of Dk and Dv numbers of one dtype."""

    layers: int
    tokens: int
    heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: torch.dtype

    def layer_bytes(self, codec: Codec) -> int:
        """E: packed bytes of one layer of one block."""
        sizes = self.tokens, self.heads, self.head_dim_k, self.head_dim_v
        return codec.layer_bytes(*sizes, self.dtype.itemsize)


class DevicePool:
    """Blocks by key on one device; the least recently used leave to the host, packed.

    A block stands in a slot of one slab, in the form ``resident``: "raw", the model's own numbers,
    which leave packed by ``codec`` and are unpacked when they come back, or ``codec`` itself,
    which is moved as it is. Both ways many blocks and layers go in one call of an op and one copy.

    Never more than ``budget_bytes`` of the device: slots, and packed blocks on their way. Work is
    queued on the caller's current stream; copies go on streams of their own, ordered by events.
    Thread-safe.

    Args:
        shape:        of every block.
        codec:        a codec or its name: of what comes from the host and goes there.
        budget_bytes: of the device's memory; enough for one block and its way in and out.
        device:       "cuda", "cuda:1" or "cpu".
        resident:     "raw" or "packed": how blocks stand in the slab.
        policy:       what goes first: a name, or a ``Policy``.
        evicted:      called with keys and uint8 [M, L, E] in host memory of their own, for what had
            to leave, in order; when their bytes have arrived, at the latest in ``flush``. It must
            not call the pool.

    Raises:
        ArgumentError: the budget holds no block, or a name is unknown.
    """

    def __init__(
        self,
        shape: BlockShape,
        codec: str | Codec,
        budget_bytes: int,
        device: torch.device | str,
        *,
        resident: str = "packed",
        policy: str | Policy = "lru",
        evicted: Evicted | None = None,
    ) -> None:
        if resident not in ("raw", "packed"):
            raise ArgumentError(f"resident: 'raw' or 'packed' wanted, got {resident!r}")
        self.shape, self.codec = shape, Codec.parse(codec)
        self.device, self.budget_bytes = with_index(device), budget_bytes
        self._form = Codec.parse("raw") if resident == "raw" else self.codec
        self._moved_bytes = shape.layers * shape.layer_bytes(self.codec)
        self._slot_bytes = shape.layers * shape.layer_bytes(self._form)
        self.chunk, self.num_slots = self._divided(budget_bytes)
        self._policy = make_policy(policy) if isinstance(policy, str) else policy
        self._evicted = evicted
        self._lock = threading.RLock()
        self._slab: torch.Tensor | None = None  # [num_slots, L, E of the form], from the first put
        self._lanes = Lanes(self.device, self.chunk * self._moved_bytes)
        self._slots: dict[bytes, int] = {}
        self._users: dict[bytes, int] = {}
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._leaving: list[bytes] = []  # whose bytes are on their way to the host
        self.evictions = self.loads = self.hits = 0

    def _divided(self, budget: int) -> tuple[int, int]:
        """Blocks of a chunk and slots: the slab, a chunk each on its way in and out, and one that
        ``store`` has packed."""
        each = 2 * self._moved_bytes + self._slot_bytes
        most = budget // self._slot_bytes if budget > 0 else 0
        chunk = min(_MAX_CHUNK, max(1, most // 16))
        slots = (budget - chunk * each) // self._slot_bytes
        if slots < 1:
            least = self._slot_bytes + each
            raise ArgumentError(
                f"budget_bytes: at least {least} wanted, one block and its way in and out, "
                f"got {budget}"
            )
        return chunk, slots

    # What is there

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def used_bytes(self) -> int:
        """Of the device: the slab, once it is made, and what is on its way."""
        with self._lock:
            slab = 0 if self._slab is None else self._slab.nbytes
            return slab + self._lanes.device_bytes

    def contains(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are here."""
        with self._lock:
            return self._leading(keys)

    def _leading(self, keys: Sequence[bytes]) -> int:
        n = 0
        while n < len(keys) and keys[n] in self._slots:
            n += 1
        return n

    def stats(self) -> dict[str, int]:
        """Blocks, bytes, and how often blocks were found, loaded and evicted."""
        with self._lock:
            return {
                "blocks": len(self._slots),
                "slots": self.num_slots,
                "bytes": self.used_bytes,
                "budget_bytes": self.budget_bytes,
                "in_use": len(self._users),
                "hits": self.hits,
                "loads": self.loads,
                "evictions": self.evictions,
            }

    # In

    def load(self, keys: Sequence[bytes], parents: Sequence[bytes], packed: torch.Tensor) -> int:
        """Bring blocks in: ``packed[m]`` becomes the block ``keys[m]``.

        Args:
            keys:    no two equal; those that are here already count as used and are not moved.
            parents: the block that each follows.
            packed:  [M, L, E] uint8 contiguous, as ``pack_kv`` with ``codec`` wrote them, on the
                host or on the device.

        Returns:
            How many of the leading ones are here now: fewer than M where those in use leave no
            room.

        Raises:
            ArgumentError: a shape, dtype or device is out of contract.
        """
        return self._load(keys, parents, packed, set(keys))

    def _load(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        packed: torch.Tensor,
        ours: set[bytes],
    ) -> int:
        wanted = (len(keys), self.shape.layers, self.shape.layer_bytes(self.codec))
        if tuple(packed.shape) != wanted or packed.dtype != torch.uint8:
            raise ArgumentError(
                f"packed: uint8 {list(wanted)} wanted, got {packed.dtype} {list(packed.shape)}"
            )
        if packed.device.type not in ("cpu", self.device.type) or not packed.is_contiguous():
            raise ArgumentError(f"packed: contiguous, on the host or {self.device} wanted")

        def place(chosen: list[int], slots: torch.Tensor) -> None:
            rows = packed if len(chosen) == len(packed) else packed[chosen]
            there = self._lanes.bring(rows) if packed.device != self.device else rows
            self._place(there, slots)

        return self._admit(keys, parents, place, ours)

    def store(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        keys_of: Caches,
        values_of: Caches,
        block_ids: Sequence[int],
    ) -> int:
        """Take blocks out of a cache on the device: block ``block_ids[m]`` becomes ``keys[m]``.

        Args:
            keys_of, values_of: L tensors [N, P, H, D] each, as ``pack_kv`` takes them.

        Returns, raises: as ``load``.
        """
        if len(block_ids) != len(keys):
            raise ArgumentError(f"block_ids: {len(keys)} ids wanted, got {len(block_ids)}")
        if any(x.device != self.device for x in (*keys_of, *values_of)):
            raise ArgumentError(f"keys_of, values_of: on {self.device} wanted")

        def place(chosen: list[int], slots: torch.Tensor) -> None:
            ids = self._lanes.numbers([block_ids[i] for i in chosen])
            rows = kernels.pack_kv(keys_of, values_of, ids, self._form)
            kernels.write_blocks(self._rows(), slots, rows.view(len(chosen), -1))

        return self._admit(keys, parents, place, set(keys))

    def _place(self, packed: torch.Tensor, slots: torch.Tensor) -> None:
        if self._form.name == self.codec.name:
            kernels.write_blocks(self._rows(), slots, packed.view(len(packed), -1))
        else:
            kernels.unpack_kv(*self.caches(), slots, packed, self.codec)

    def _admit(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        place: Callable[[list[int], torch.Tensor], None],
        ours: set[bytes],
    ) -> int:
        """``ours`` stay, whatever room is wanted."""
        if len(parents) != len(keys) or len(set(keys)) != len(keys):
            raise ArgumentError("keys, parents: as many, and no key twice, wanted")
        with self._lock:
            done = 0
            for first in range(0, len(keys), self.chunk):
                part = range(first, min(first + self.chunk, len(keys)))
                for i in part:
                    self._policy.touch(keys[i])
                new = [i for i in part if keys[i] not in self._slots]
                room = self._make_room(len(new), ours)
                stays = new[:room]
                slots = [self._free.pop() for _ in stays]
                if stays:
                    place(stays, self._lanes.numbers(slots))
                    self._lanes.wrote()
                for i, slot in zip(stays, slots, strict=True):
                    self._slots[keys[i]] = slot
                    self._policy.admit(keys[i], parents[i])
                self.loads += len(stays)
                done = part.stop if room == len(new) else new[room]
                if done < part.stop:
                    break
            return done

    def _make_room(self, count: int, ours: set[bytes]) -> int:
        """Evict until ``count`` slots are free, or what can go is gone; returns what is free."""
        going: list[bytes] = []
        need = count - len(self._free)
        if need > 0:
            for key in self._policy.victims():
                if key in self._users or key in ours:
                    continue
                self._policy.remove(key)
                going.append(key)
                if len(going) == need:
                    break
        for first in range(0, len(going), self.chunk):
            self._leave(going[first : first + self.chunk])
        return min(count, len(self._free))

    # Out

    def _leave(self, keys: list[bytes]) -> None:
        """Free the slots of at most a chunk of blocks; their bytes go to the host."""
        slots = [self._slots.pop(key) for key in keys]
        self.evictions += len(keys)
        if self._evicted is not None:
            self._deliver()  # one chunk on its way at a time
            self._lanes.send(self._packed(slots))
            self._leaving = keys
        # Whoever writes a slot next is queued behind what reads it here.
        self._free.extend(reversed(slots))

    def _packed(self, slots: Sequence[int]) -> torch.Tensor:
        """[M, L, E] of slots, in ``codec``, in fresh memory of the device."""
        ids = self._lanes.numbers(slots)
        if self._form.name == self.codec.name:
            rows = kernels.gather_blocks(self._rows(), ids)
            return rows.view(len(slots), self.shape.layers, -1)
        return kernels.pack_kv(*self.caches(), ids, self.codec)

    def _deliver(self) -> None:
        if self._leaving and self._evicted is not None:
            keys, self._leaving = self._leaving, []
            self._evicted(keys, self._lanes.arrived())

    def flush(self) -> None:
        """Hand over what is on its way to the host."""
        with self._lock:
            self._deliver()

    def evict(self, keys: Sequence[bytes]) -> int:
        """Send these blocks to the host now; returns how many went. Those in use stay, and so do
        those that a block here follows."""
        with self._lock:
            wanted = {key for key in keys if key in self._slots and key not in self._users}
            going: list[bytes] = []
            for key in self._policy.victims():
                if key in wanted:
                    self._policy.remove(key)
                    going.append(key)
                if len(going) == len(wanted):
                    break
            for first in range(0, len(going), self.chunk):
                self._leave(going[first : first + self.chunk])
            return len(going)

    def drop(self, keys: Sequence[bytes]) -> int:
        """Forget these blocks without sending them; zeros take their place. Returns how many.

        Raises ArgumentError: one of them is in use.
        """
        with self._lock:
            here = [key for key in keys if key in self._slots]
            if busy := [key for key in here if key in self._users]:
                raise ArgumentError(f"keys: blocks that nobody uses wanted, {len(busy)} are in use")
            self._lanes.begin()
            for key in here:
                slot = self._slots.pop(key)
                self._policy.remove(key)
                self._rows()[slot].zero_()
                self._free.append(slot)
            self._lanes.wrote()
            return len(here)

    # Use

    @contextmanager
    def using(self, keys: Sequence[bytes]) -> Iterator[list[int]]:
        """The slots of the leading keys that are here; they stay until the block ends.

        Work that reads them may be queued on any stream inside the block: what takes a slot later
        waits for it.
        """
        with self._lock:
            held = list(keys[: self._leading(keys)])
            self.hits += len(held)
            for key in held:
                self._policy.touch(key)
                self._users[key] = self._users.get(key, 0) + 1
            slots = [self._slots[key] for key in held]
            self._lanes.wait_for_writes()
        try:
            yield slots
        finally:
            with self._lock:
                self._lanes.read()
                for key in held:
                    self._users[key] -= 1
                    if not self._users[key]:
                        del self._users[key]

    def read(self, keys: Sequence[bytes]) -> torch.Tensor:
        """The leading blocks that are here, uint8 [n, L, E] in ``codec``, in fresh memory of the
        device."""
        with self._lock, self.using(keys) as slots:
            if not slots:
                E = self.shape.layer_bytes(self.codec)
                shape = (0, self.shape.layers, E)
                return torch.empty(shape, dtype=torch.uint8, device=self.device)
            return self._packed(slots)

    def read_into(
        self, keys: Sequence[bytes], keys_of: Caches, values_of: Caches, block_ids: Sequence[int]
    ) -> int:
        """Unpack the leading blocks that are here into blocks of a cache on the device.

        Returns:
            How many: block ``block_ids[m]`` of every layer holds ``keys[m]`` then.
        """
        with self._lock, self.using(keys) as slots:
            if slots:
                rows = kernels.gather_blocks(self._rows(), self._lanes.numbers(slots))
                ids = self._lanes.numbers(block_ids[: len(slots)])
                packed = rows.view(len(slots), self.shape.layers, -1)
                kernels.unpack_kv(keys_of, values_of, ids, packed, self._form)
            return len(slots)

    def caches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """With resident="raw": the slab as L caches of K and L of V, [slots, P, H, D] each, for
        attention over pages; block ids are the slots of ``using``."""
        if not self._form.lossless:
            raise ArgumentError("caches: a pool with resident='raw' wanted")
        shape, item = self.shape, self.shape.dtype.itemsize
        flat = self._rows().view(shape.dtype)
        E, step = shape.layer_bytes(self._form) // item, self._slot_bytes // item
        split = self._form.key.section_bytes(
            shape.tokens, shape.heads, shape.head_dim_k, item, True
        ) // item  # fmt: skip
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for layer in range(shape.layers):
            for into, D, at in ((0, shape.head_dim_k, 0), (1, shape.head_dim_v, split)):
                size = (self.num_slots, shape.tokens, shape.heads, D)
                strides = (step, D, shape.tokens * D, 1)
                found[into].append(flat.as_strided(size, strides, layer * E + at))
        return found

    def _rows(self) -> Any:
        """The slab, [slots, bytes]."""
        if self._slab is None:
            self._slab = torch.zeros(
                self.num_slots, self._slot_bytes, dtype=torch.uint8, device=self.device
            )
        return self._slab
