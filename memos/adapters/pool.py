"""Adapters ready for a model under byte budgets: loaded when used, evicted when others want room.

Three tiers: the device's memory (slots of an ``AdapterTable``), host memory behind a GPU, and the
store. On a CPU the first is host memory, and there is no second.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.adapters._host import Device, HostTier, Source, load_checked
from memos.adapters.policy import make_policy
from memos.errors import ArgumentError, QuotaError

if TYPE_CHECKING:
    from memos.kernels.adapters import AdapterTable

_KEPT_ERRORS = 64
_KEPT_SIZES = 4096


@dataclass(eq=False)
class _Entry:
    """An adapter on the device, or on its way there: its slot and bytes are reserved."""

    digest: str
    num_bytes: int
    slot: int
    users: int
    memory: Any = None  # the slab of the table, or until then one of this size to be overwritten
    is_ready: bool = False
    error: BaseException | None = None


class AdapterPool:
    """Which adapters are in which slots of a table. Thread-safe.

    No tier ever holds more than its budget: room is made before an adapter is loaded. What is in
    use or pinned is not evicted. A thread that loads an adapter keeps no one from using others,
    and several that want the same one wait for one load.

    Args:
        table:          of the model; no one else puts or clears its slots.
        source:         what adapters are loaded from: ``StoredSlabs``.
        device_bytes:   of slabs in the table.
        host_bytes:     of slabs kept in host memory behind a device with its own; what goes to the
            device passes through it. It keeps what is on the device too, so what is beyond
            ``device_bytes`` is what it adds. Nothing on a CPU.
        policy:         which adapter goes first, of those that may: "lru".
        prefetch_limit: adapters that may wait to be prefetched.
        staged:         use the host tier; None: unless the device is the CPU.

    Raises:
        ArgumentError: a budget below 0 or an unknown policy.
    """

    def __init__(
        self,
        table: AdapterTable,
        source: Source,
        *,
        device_bytes: int,
        host_bytes: int = 0,
        policy: str = "lru",
        prefetch_limit: int = 16,
        staged: bool | None = None,
    ) -> None:
        for what, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes)):
            if value < 0:
                raise ArgumentError(f"{what}: a number of at least 0 wanted, got {value}")
        self.table, self.source = table, source
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self._changed = threading.Condition()
        self._device = Device(table, staged)
        self._policy = make_policy(policy)
        self._host = None
        if self._device.staged:
            pinned = self._device.is_cuda
            self._host = HostTier(host_bytes, make_policy(policy), self._changed, pinned=pinned)
        self._entries: dict[str, _Entry] = {}
        self._free = list(range(table.num_slots))[::-1]
        self._used = 0
        self._pinned: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._queue: deque[str] = deque()
        self._queue_limit = prefetch_limit
        self._worker: threading.Thread | None = None
        self._errors: OrderedDict[str, BaseException] = OrderedDict()
        self._is_closed = False
        self._counts: Counter[str] = Counter()
        self._load_s = 0.0

    # Use

    def acquire(self, digest: str) -> int:
        """The slot of an adapter, which stays there until ``release``.

        Raises:
            QuotaError: the budget has no room beside what is in use or pinned.
            NotFoundError, StoreError, ArgumentError: it cannot be loaded; also when ``prefetch``
                tried. Nothing of it is left then, and the next call tries again.

        Cost: a lookup when it is ready (about 3 us), else what loading takes.
        """
        return self.acquire_all([digest])[digest]

    def acquire_all(self, digests: Sequence[str]) -> dict[str, int]:
        """The slots of several adapters at once: all of them are ready, or none is acquired.

        Each digest counts once, however often it is named; ``release`` the same ones. Raises as
        ``acquire``.
        """
        wanted = list(dict.fromkeys(digests))
        return {entry.digest: entry.slot for entry in self._bring(wanted)}

    def release(self, *digests: str) -> None:
        """Give back what ``acquire`` or ``acquire_all`` gave, once for each.

        Raises:
            ArgumentError: one of them is not in use; none is released then.
        """
        with self._changed:
            for digest, times in Counter(digests).items():
                entry = self._entries.get(digest)
                if entry is None or entry.users < times:
                    raise ArgumentError(f"release: an adapter in use wanted, got {digest}")
            for digest in digests:
                self._entries[digest].users -= 1
            self._changed.notify_all()

    @contextmanager
    def using(self, digests: Sequence[str]) -> Iterator[dict[str, int]]:
        """``acquire_all`` during a block."""
        slots = self.acquire_all(digests)
        try:
            yield slots
        finally:
            self.release(*slots)

    # What stays

    def pin(self, digest: str, pinned: bool = True) -> None:
        """Load an adapter and keep it until it is unpinned (``pinned=False``) or dropped.

        Pinning twice is pinning once. Raises as ``acquire``.
        """
        if not pinned:
            with self._changed:
                self._pinned.discard(digest)
            return
        with self.using([digest]), self._changed:
            self._pinned.add(digest)

    def prefetch(self, digest: str) -> bool:
        """Load an adapter in the background: a hint. False: too many wait already.

        It evicts as ``acquire`` does, and is forgotten where there is no room. Any other error is
        raised by the next ``acquire`` of this adapter.
        """
        with self._changed:
            self._check_open()
            if digest in self._entries or digest in self._queue:
                return True
            if len(self._queue) >= self._queue_limit:
                self._counts["refused_prefetches"] += 1
                return False
            self._errors.pop(digest, None)
            self._queue.append(digest)
            if self._worker is None:
                self._worker = threading.Thread(target=self._prefetch_all, name="memos-prefetch")
                self._worker.start()
            return True

    def set_budget(self, device_bytes: int) -> None:
        """Change ``device_bytes``; what does not fit any more goes before this returns.

        Raises QuotaError where what is in use or pinned takes more; nothing changes then.
        """
        with self._changed:
            old, self.device_bytes = self.device_bytes, device_bytes
            try:
                while self._make_room((), ()) is None:
                    self._changed.wait()
            except QuotaError:
                self.device_bytes = old
                raise

    def ready(self) -> dict[str, int]:
        """Bytes of every adapter that is on the device."""
        with self._changed:
            return {e.digest: e.num_bytes for e in self._entries.values() if e.is_ready}

    def busy(self) -> set[str]:
        """Digests of the adapters that are in use or pinned."""
        with self._changed:
            used = {entry.digest for entry in self._entries.values() if entry.users}
            return used | self._pinned

    def drop(self, digest: str) -> None:
        """Forget an adapter in all tiers above the store, pinned or not.

        Raises:
            ArgumentError: it is in use.
        """
        with self._changed:
            self._forget_queued(digest)
            self._wait_loaded(digest)
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.users:
                    raise ArgumentError(
                        f"drop: an adapter that no one uses wanted, but {digest} is in use "
                        f"{entry.users} times"
                    )
                self._remove(entry)
            if self._host is not None:
                self._host.drop(digest)
            self._pinned.discard(digest)
            self._errors.pop(digest, None)
            self._sizes.pop(digest, None)
            self._changed.notify_all()

    def wait_prefetched(self) -> None:
        """Return when nothing is being prefetched."""
        with self._changed:
            while self._worker is not None:
                self._changed.wait()

    def close(self) -> None:
        """Clear all slots. Raises ArgumentError while an adapter is in use; then all stays."""
        with self._changed:
            if any(entry.users for entry in self._entries.values()):
                raise ArgumentError("close: no adapter in use wanted")
            self._is_closed = True
            self._queue.clear()
            while self._worker is not None or not all(e.is_ready for e in self._entries.values()):
                self._changed.wait()
            for entry in list(self._entries.values()):
                self._remove(entry)
            if self._host is not None:
                self._host.clear()
            self._pinned.clear()
            self._errors.clear()

    def stats(self) -> dict[str, Any]:
        """What is where, and how it went.

        Returns:
            device, host: {bytes, budget, adapters}; in_use, pinned: adapters; hits: wanted and
            ready; misses; hit_rate; host_hits: misses that host memory had; loads: from the
            source, and load_s: the seconds they took, with the way to the device; evictions: from
            the device; refused_prefetches.
        """
        with self._changed:
            hits, misses = self._counts["hits"], self._counts["misses"]
            entries = self._entries.values()
            host = self._host
            return {
                "device": _tier(self._used, self.device_bytes, len(self._entries)),
                "host": _tier(0, 0, 0)
                if host is None
                else _tier(host.used, host.budget, len(host)),
                "in_use": sum(entry.users > 0 for entry in entries),
                "pinned": len(self._pinned),
                "hits": hits,
                "misses": misses,
                "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
                "host_hits": self._counts["host_hits"],
                "loads": self._counts["loads"],
                "load_s": self._load_s,
                "evictions": self._counts["evictions"],
                "refused_prefetches": self._counts["refused_prefetches"],
            }

    # Inside

    def _bring(self, wanted: Sequence[str]) -> list[_Entry]:
        """Make these adapters ready; one more uses each of them then."""
        held, mine = self._hold(wanted, 1)
        try:
            for i, entry in enumerate(mine):
                try:
                    self._load(entry)
                except BaseException:
                    self._call_off(mine[i + 1 :])
                    raise
            self._wait_for(held)
        except BaseException:
            with self._changed:
                for entry in held:
                    entry.users -= 1
                self._changed.notify_all()
            raise
        return held

    def _hold(self, wanted: Sequence[str], uses: int) -> tuple[list[_Entry], list[_Entry]]:
        """Count the uses (0 for a prefetch) and reserve what is missing, or do neither.

        Returns:
            The entries of all, and those of them that the caller has to load.
        """
        while True:
            with self._changed:
                self._check_open()
                if uses:
                    self._raise_kept(wanted)
                missing = [digest for digest in wanted if digest not in self._entries]
                unsized = [digest for digest in missing if digest not in self._sizes]
                if not unsized:
                    sizes = [self._sizes[digest] for digest in missing]
                    spare = self._make_room(wanted, sizes)
                    if spare is not None:
                        return self._count(wanted, missing, uses, spare)
                    self._changed.wait()
            for digest in unsized:
                size = self.source.num_bytes(digest)
                with self._changed:
                    if len(self._sizes) >= _KEPT_SIZES:
                        self._sizes.clear()
                    self._sizes[digest] = size

    def _count(
        self, wanted: Sequence[str], missing: Sequence[str], uses: int, spare: dict[int, Any]
    ) -> tuple[list[_Entry], list[_Entry]]:
        mine = []
        for digest in missing:
            size = self._sizes[digest]
            entry = _Entry(digest, size, self._free.pop(), 0, spare.pop(size, None))
            self._entries[digest] = entry
            self._used += size
            self._policy.admit(digest, size)
            mine.append(entry)
        held = [self._entries[digest] for digest in wanted]
        for entry in held:
            entry.users += uses
            if uses:
                self._counts["hits" if entry.is_ready else "misses"] += 1
                self._policy.touch(entry.digest)
                if self._host is not None:
                    self._host.touch(entry.digest)
        return held, mine

    def _make_room(self, wanted: Sequence[str], sizes: Sequence[int]) -> dict[int, Any] | None:
        """Evict until the sizes fit. None: they will when what is being prefetched is there.

        Returns:
            Evicted slabs by their size, to be overwritten.

        Raises:
            QuotaError: they cannot; nothing is evicted then.
        """
        need = self._used + sum(sizes) - self.device_bytes  # bytes that have to go
        slots = len(sizes) - len(self._free)
        if need <= 0 and slots <= 0:
            return {}
        kept = {*wanted, *self._pinned}
        idle = [e for e in self._entries.values() if not e.users and e.digest not in kept]
        ready = [entry for entry in idle if entry.is_ready]
        if need > sum(entry.num_bytes for entry in ready) or slots > len(ready):
            if len(ready) < len(idle):
                return None
            self._refuse(wanted, sum(sizes))
        may_go = {entry.digest for entry in ready}
        spare = {}
        for digest in self._policy.victims():
            if need <= 0 and slots <= 0:
                break
            if digest in may_go:
                entry = self._entries[digest]
                spare[entry.num_bytes] = entry.memory
                self._remove(entry)
                self._counts["evictions"] += 1
                need, slots = need - entry.num_bytes, slots - 1
        return spare

    def _refuse(self, wanted: Sequence[str], missing_bytes: int) -> None:
        there = [self._entries[digest] for digest in wanted if digest in self._entries]
        others = [entry for digest, entry in self._entries.items() if digest not in wanted]
        pinned = [entry for entry in others if entry.digest in self._pinned]
        used = [entry for entry in others if entry.users and entry.digest not in self._pinned]
        raise QuotaError(
            f"device_bytes={self.device_bytes}, num_slots={self.table.num_slots}: room for "
            f"{missing_bytes + _sum(there)} bytes of {len(wanted)} adapters wanted, but "
            f"{_sum(pinned)} bytes of {len(pinned)} others are pinned and {_sum(used)} bytes of "
            f"{len(used)} more in use"
        )

    def _load(self, entry: _Entry) -> None:
        """Bring one adapter into its slot. Whatever is raised, nothing of it is left."""
        try:
            self._fetch(entry, time.perf_counter())
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # slabs in them outlive their budget
            with self._changed:
                entry.error = error
                self._remove(entry)
                if not entry.users and not isinstance(error, QuotaError):
                    self._keep_error(entry.digest, error)
                self._changed.notify_all()
            raise

    def _fetch(self, entry: _Entry, start: float) -> None:
        if self._host is None:
            spare, entry.memory = entry.memory, None
            slab, offsets = load_checked(self.source, entry.digest, entry.num_bytes, spare)
            entry.memory = slab
            self._arrive(entry, slab, offsets, start, False)
            return
        with self._host.slab(self.source, entry.digest, entry.num_bytes) as (found, was_here):
            self._arrive(entry, self._device.upload(found[0]), found[1], start, was_here)

    def _arrive(self, entry: _Entry, slab: Any, offsets: Any, start: float, hit: bool) -> None:
        with self._changed:
            with self._device.in_order():
                self.table.put(entry.slot, slab, offsets)
            entry.is_ready = True
            self._counts["host_hits" if hit else "loads"] += 1
            self._load_s += time.perf_counter() - start
            self._changed.notify_all()

    def _call_off(self, entries: Sequence[_Entry]) -> None:
        """After an error: load what others have come to wait for, give back the rest."""
        for entry in entries:
            with self._changed:
                if entry.users <= 1:
                    self._remove(entry)
                    continue
            with contextlib.suppress(Exception):  # the entry keeps it for those who wait
                self._load(entry)

    def _wait_for(self, held: Sequence[_Entry]) -> None:
        with self._changed:
            for entry in held:
                while not entry.is_ready and entry.error is None:
                    self._changed.wait()
                if entry.error is not None:
                    raise entry.error

    def _wait_loaded(self, digest: str) -> None:
        while (entry := self._entries.get(digest)) is not None and not entry.is_ready:
            self._changed.wait()

    def _remove(self, entry: _Entry) -> None:
        entry.memory = None
        if self._entries.get(entry.digest) is not entry:
            return
        if entry.is_ready:
            with self._device.in_order():
                self.table.clear(entry.slot)
        del self._entries[entry.digest]
        self._policy.remove(entry.digest)
        self._free.append(entry.slot)
        self._used -= entry.num_bytes

    def _raise_kept(self, wanted: Sequence[str]) -> None:
        for digest in wanted:
            error = self._errors.pop(digest, None)
            if error is not None and digest not in self._entries:
                raise error

    def _prefetch_all(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._worker = None
                    self._changed.notify_all()
                    return
                digest = self._queue.popleft()
            try:
                _, mine = self._hold([digest], 0)
            except QuotaError:
                with self._changed:
                    self._counts["refused_prefetches"] += 1
                continue
            except Exception as error:
                with self._changed:
                    self._keep_error(digest, error)
                continue
            for entry in mine:
                with contextlib.suppress(Exception):  # kept for the next who wants it
                    self._load(entry)

    def _keep_error(self, digest: str, error: BaseException) -> None:
        self._errors[digest] = error
        while len(self._errors) > _KEPT_ERRORS:
            self._errors.popitem(last=False)

    def _forget_queued(self, digest: str) -> None:
        if digest in self._queue:
            self._queue.remove(digest)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ArgumentError("pool: an open one wanted, got one that was closed")


def _tier(num_bytes: int, budget: int, adapters: int) -> dict[str, int]:
    return {"bytes": num_bytes, "budget": budget, "adapters": adapters}


def _sum(entries: Sequence[_Entry]) -> int:
    return sum(entry.num_bytes for entry in entries)
