"""The adapters of a ParametricMemory as units: on disk, and ready for the attached model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from memos.errors import ArgumentError
from memos.scheduler.plan import Action
from memos.scheduler.sources import Engine
from memos.scheduler.units import ADAPTER, Unit

if TYPE_CHECKING:
    from memos.memories.parametric import ParametricMemory

_LOAD_S = 1e-9  # seconds per byte, before any load was measured


class AdapterSource:
    """Adapters: a unit each, "memory/digest". The copy on disk stays.

    The other tier is "device", or "host" while the attached model is on the CPU or none is.
    """

    def __init__(self, memory: ParametricMemory, *, clock: Callable[[], float]) -> None:
        self.name, self.memory, self._clock = memory.name, memory, clock
        self._uses: deque[tuple[str, float]] = deque()
        self._limits: dict[str, int] = {}
        self._known: dict[str, Unit] = {}
        memory.meter = self

    def close(self) -> None:
        """Listen no more."""
        if self.memory.meter is self:
            self.memory.meter = None

    def attached(self) -> None:
        """The memory has a pool now, with nothing in it."""
        pool = self.memory.pool
        if pool is not None:
            pool.set_budget(self._limits.get(self.tier, pool.device_bytes))

    def used(self, digests: Iterable[str]) -> None:
        """A request computes with these."""
        now = self._clock()
        self._uses.extend((self.id(digest), now) for digest in digests)

    def id(self, digest: str) -> str:
        return f"{self.name}/{digest}"

    @property
    def tier(self) -> str:
        pool = self.memory.pool
        return "device" if pool is not None and pool.table.device.type != "cpu" else "host"

    def engines(self) -> Sequence[Engine]:
        """One for each tier in which the model may stand; the other one holds nothing."""
        memory = self.memory

        def engine(tier: str) -> Engine:
            def used() -> int:
                pool = memory.pool
                is_here = pool is not None and self.tier == tier
                return int(pool.stats()["device"]["bytes"]) if pool and is_here else 0

            def limit(num_bytes: int) -> None:
                if memory.pool is not None and self.tier == tier:
                    memory.pool.set_budget(num_bytes)
                self._limits[tier] = num_bytes

            return Engine(self.name, tier, used, limit)

        return [engine("device"), engine("host")]

    def uses(self) -> Iterator[tuple[str, float]]:
        while self._uses:
            yield self._uses.popleft()

    def changed(self) -> Iterator[Unit | str]:
        found = {unit.id: unit for unit in self._units()}
        gone = self._known.keys() - found.keys()
        yield from sorted(gone)
        yield from (unit for id, unit in found.items() if self._known.get(id) != unit)
        self._known = found

    def look_again(self) -> None:
        """Units are looked at every time."""

    def figures(self) -> dict[str, float]:
        """hit_rate: of adapters that were ready when wanted; loads."""
        pool = self.memory.pool
        stats = None if pool is None else pool.stats()
        return {} if stats is None else {name: stats[name] for name in ("hit_rate", "loads")}

    def _units(self) -> Iterator[Unit]:
        pool, files = self.memory.pool, self.memory.files
        ready = {} if pool is None else pool.ready()
        busy = set() if pool is None else pool.busy()
        load_s = _LOAD_S
        if pool is not None:
            stats = pool.stats()
            loaded = stats["loads"] * max(sum(ready.values()) / max(len(ready), 1), 1.0)
            load_s = stats["load_s"] / loaded if stats["loads"] else _LOAD_S
        for cube in self.memory.cubes(None):
            digest = cube.content["digest"]
            if digest not in files:
                continue
            stored = files.num_bytes(digest)
            size = ready.get(digest)
            if size is None and pool is not None:
                size = pool.source.num_bytes(digest)
            sizes = {"disk": stored} if size is None else {self.tier: size, "disk": stored}
            yield Unit(
                self.id(digest),
                ADAPTER,
                num_bytes=sizes,
                copies=frozenset({"disk", *([self.tier] if digest in ready else [])}),
                importance=cube.importance,
                in_use=digest in busy,
                access_s={"disk": stored * load_s},
                buildable=False,
            )

    def _digest(self, unit: str) -> str:
        return unit[len(self.name) + 1 :]

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        pool, digest = self.memory.pool, self._digest(action.unit)
        if action.source is None or action.target != self.tier:
            raise ArgumentError(f"adapter {digest}: from disk to {self.tier} wanted")
        if pool is None:
            raise ArgumentError(f"memory {self.name!r}: it is attached to no model")
        if not cancelled():
            pool.release(*pool.acquire_all([digest]))

    def discard(self, unit: str, tier: str) -> None:
        pool, digest = self.memory.pool, self._digest(unit)
        if tier != self.tier:
            raise ArgumentError(f"adapter {digest}: its copy on {tier} stays")
        if pool is None:
            return
        if digest in pool.busy():
            raise ArgumentError(f"adapter {digest}: in use or pinned")
        pool.drop(digest)

    def archive(self, unit: str, why: str) -> None:
        raise ArgumentError(f"unit {unit!r}: a text wanted, adapters are not archived")

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        raise ArgumentError(f"unit {action.unit!r}: KV wanted, adapters are not compressed")
