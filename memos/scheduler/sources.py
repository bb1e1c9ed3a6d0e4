"""Where the units of a scheduler come from, and how they are moved: one source per memory.

A source knows the units of one memory, what they take in each tier, and how to copy and discard
them. Its engines hold hard quotas; ``Shares`` divides a tier's budget among them, so that all
engines together are never above it, whoever writes to them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from memos.errors import ArgumentError, NotFoundError, QuotaError
from memos.scheduler.plan import Action
from memos.scheduler.units import Unit


@dataclass(frozen=True)
class Engine:
    """What holds bytes of one tier, under a quota of its own.

    Args:
        name:  of the memory.
        used:  bytes that it holds.
        limit: sets its quota; what does not fit goes at once; raises QuotaError where it cannot.
        owner: what holds them; of one that several memories share only the first counts.
        loose: bytes of those that leave by themselves for what comes; None: none do.
    """

    name: str
    tier: str
    used: Callable[[], int]
    limit: Callable[[int], object]
    owner: object = None
    loose: Callable[[], int] | None = None


class Source(Protocol):
    """The units of one memory. Thread-safe."""

    name: str

    def engines(self) -> Sequence[Engine]:
        """What holds its bytes; for ever the same ones while the source is."""

    def changed(self) -> Iterable[Unit | str]:
        """Units that changed since the last call, as they are; the id of one that is gone."""

    def uses(self) -> Iterable[tuple[str, float]]:
        """(unit, when) of every use since the last call."""

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        """As ``Executor.copy``."""

    def discard(self, unit: str, tier: str) -> None:
        """As ``Executor.discard``."""

    def archive(self, unit: str, why: str) -> None:
        """Archive a text."""

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        """As ``Executor.compress``."""

    def look_again(self) -> None:
        """Engines may have moved something by themselves: the next ``changed`` says so."""

    def figures(self) -> Mapping[str, float]:
        """What is shown of it: hit_rate and the like."""

    def close(self) -> None:
        """Listen to the memory no more."""


class Shares:
    """Divides the budget of each tier among the engines that hold bytes of it. Thread-safe.

    The quotas of a tier never add up to more than its budget: what one gets, others have given
    before.
    """

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self.budgets = dict(budgets)
        self._engines: dict[str, list[Engine]] = {tier: [] for tier in budgets}
        self._quotas: dict[str, list[int]] = {tier: [] for tier in budgets}
        self._lock = threading.RLock()

    def add(self, engine: Engine) -> None:
        """An engine takes part. Raises QuotaError where what is pinned is above the budget."""
        if engine.tier not in self.budgets:
            return
        with self._lock:
            others = self._engines[engine.tier]
            if engine.owner is not None and any(o.owner is engine.owner for o in others):
                return
            self._engines[engine.tier].append(engine)
            self._quotas[engine.tier].append(self.budgets[engine.tier])  # until it is set below
            self.divide(engine.tier)

    def remove(self, name: str) -> None:
        """The engines of a memory are gone; what they had is the others'."""
        with self._lock:
            for tier, engines in self._engines.items():
                kept = [i for i, engine in enumerate(engines) if engine.name != name]
                self._quotas[tier] = [self._quotas[tier][i] for i in kept]
                self._engines[tier] = [engines[i] for i in kept]
                self.divide(tier)

    def quotas(self, tier: str) -> dict[str, int]:
        """What each memory may hold of a tier."""
        with self._lock:
            pairs = zip(self._engines.get(tier, ()), self._quotas.get(tier, ()), strict=True)
            return {engine.name: quota for engine, quota in pairs}

    def used(self, tier: str) -> int:
        """Bytes that the engines of a tier hold."""
        with self._lock:
            return sum(engine.used() for engine in self._engines.get(tier, ()))

    def divide(self, tier: str) -> None:
        """Each keeps what it uses, as far as the budget goes, and the rest is divided equally."""
        with self._lock:
            engines = self._engines.get(tier)
            if not engines:
                return
            used = [engine.used() for engine in engines]
            spare = self.budgets[tier] - sum(used)
            if spare >= 0:
                wanted = [num_bytes + spare // len(engines) for num_bytes in used]
            else:
                wanted = [num_bytes * self.budgets[tier] // sum(used) for num_bytes in used]
            self._set(tier, wanted)

    def make(self, name: str, tier: str, num_bytes: int) -> None:
        """Let a memory hold so many bytes more than it does, out of what others do not use.

        Raises QuotaError where they all use what they have.
        """
        with self._lock:
            engines, quotas = self._engines.get(tier, []), self._quotas.get(tier, [])
            place = next((i for i, engine in enumerate(engines) if engine.name == name), None)
            if place is None:
                return
            engine = engines[place]
            loose = 0 if engine.loose is None else engine.loose()
            need = engine.used() - loose + num_bytes - quotas[place]
            if need <= 0:
                return
            wanted = list(quotas)
            free = self.budgets[tier] - sum(quotas)
            for i, engine in enumerate(engines):
                if i != place and free < need:
                    given = min(max(quotas[i] - engine.used(), 0), need - free)
                    wanted[i] -= given
                    free += given
            if free < need:
                raise QuotaError(f"{tier}: {need} bytes more wanted for {name!r}, {free} are free")
            wanted[place] += need
            self._set(tier, wanted)

    def _set(self, tier: str, wanted: Sequence[int]) -> None:
        """Who gets less first, so that the sum is never above the budget."""
        engines, quotas = self._engines[tier], self._quotas[tier]
        order = sorted(range(len(engines)), key=lambda i: wanted[i] - quotas[i])
        for i in order:
            room = self.budgets[tier] - sum(quotas) + quotas[i]
            quota = min(wanted[i], max(room, 0)) if wanted[i] > quotas[i] else wanted[i]
            try:
                engines[i].limit(quota)
            except QuotaError:
                continue  # what is pinned stays, and others get less
            quotas[i] = quota


class Router:
    """The executor of a scheduler: every unit's moves are those of its source."""

    def __init__(self, shares: Shares, size: Callable[[str, str], int]) -> None:
        self.shares, self._size = shares, size
        self._sources: dict[str, Source] = {}
        self._of: dict[str, str] = {}  # unit -> name of its source

    def add(self, source: Source) -> None:
        if source.name in self._sources:
            raise ArgumentError(f"source: {source.name!r} is there already")
        for engine in source.engines():
            self.shares.add(engine)
        self._sources[source.name] = source

    def remove(self, name: str) -> list[str]:
        """Forget a source; returns its units."""
        source = self._sources.pop(name, None)
        if source is not None:
            source.close()
        self.shares.remove(name)
        mine = [unit for unit, of in self._of.items() if of == name]
        for unit in mine:
            del self._of[unit]
        return mine

    def changed(self) -> Iterable[Unit | str]:
        """What changed in all sources."""
        for source in list(self._sources.values()):
            for unit in source.changed():
                if isinstance(unit, str):
                    self._of.pop(unit, None)
                else:
                    self._of[unit.id] = source.name
                yield unit

    def ask(self, unit: str) -> None:
        """A unit that was not told of is wanted, from the sources that know more than they tell."""
        for source in list(self._sources.values()):
            if unit.startswith(f"{source.name}/") and hasattr(source, "ask"):
                source.ask(unit)

    def look_again(self) -> None:
        """Engines may have moved something by themselves."""
        for source in list(self._sources.values()):
            source.look_again()

    def figures(self) -> dict[str, dict[str, float]]:
        """What is shown of each memory."""
        return {name: dict(source.figures()) for name, source in list(self._sources.items())}

    def close(self) -> None:
        for source in list(self._sources.values()):
            source.close()

    def uses(self) -> list[tuple[str, float]]:
        """Every use since the last call, the earliest first."""
        found = [use for source in list(self._sources.values()) for use in source.uses()]
        return sorted(found, key=lambda use: use[1])

    def source(self, unit: str) -> Source:
        name = self._of.get(unit)
        if name is None or name not in self._sources:
            raise NotFoundError(f"scheduler: no memory holds unit {unit!r}")
        return self._sources[name]

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        source = self.source(action.unit)
        if action.target is not None:
            size = self._size(action.unit, action.target)
            self.shares.make(source.name, action.target, size)
        source.copy(action, cancelled)

    def discard(self, unit: str, tier: str) -> None:
        self.source(unit).discard(unit, tier)

    def archive(self, unit: str) -> None:
        self.source(unit).archive(unit, "scheduler")

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        source = self.source(action.unit)
        if action.target is not None:
            with contextlib.suppress(QuotaError):  # what is used least goes, as for what is new
                self.shares.make(source.name, action.target, action.num_bytes)
        return source.compress(action, cancelled)
