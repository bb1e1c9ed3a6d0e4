"""What a plan is made from: every unit of memory, in columns, and what its uses cost.

A unit is whatever moves as a whole: the KV of a session or of a text, an adapter, a text. It has
copies in tiers, of which the first is the fastest. A unit without a copy can be built where it is
rebuildable: the KV of a text by a prefill, an adapter by training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy

from memos.errors import ArgumentError

Array: TypeAlias = "numpy.ndarray[Any, Any]"

TEXT, KV, ADAPTER = "text", "kv", "adapter"
KINDS = (TEXT, KV, ADAPTER)
HALF_LIFE_S = 3600.0  # of a use in a unit's heat


@dataclass(frozen=True)
class Unit:
    """One unit.

    Args:
        id:          unique.
        kind:        text, kv or adapter.
        num_bytes:   by tier: what a copy there takes. A tier that is not named cannot hold it.
        copies:      tiers that hold one.
        heat:        uses, each halved for every half-life since, as of ``last``.
        last:        of its last use, seconds.
        importance:  0 to 1; 1 doubles the worth of a use.
        pinned, in_use: its copies stay where they are.
        rebuildable: it can be built from what is kept elsewhere.
        rebuild_s:   seconds of building it.
        access_s:    by tier: seconds from there until it can be used: load and decode.
        next_use:    when it is expected to be wanted, seconds; None: not known.
        archived:    of a text: it is already.
        buildable:   a worker can build it; else only whoever uses it does.
        mirror:      tier whose copy is read through one in a slower tier, and is nothing without.
        compressed_bytes: by tier: what a copy there takes once the unit is compressed again; empty:
            it cannot be.
    """

    id: str
    kind: str = KV
    num_bytes: Mapping[str, int] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    heat: float = 0.0
    last: float = 0.0
    importance: float = 0.0
    pinned: bool = False
    in_use: bool = False
    rebuildable: bool = False
    rebuild_s: float = 0.0
    access_s: Mapping[str, float] = field(default_factory=dict)
    next_use: float | None = None
    archived: bool = False
    buildable: bool = True
    mirror: str | None = None
    compressed_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class State:
    """Units in columns: n units, t tiers.

    Args:
        tiers:     fastest first.
        ids:       [n].
        kind:      [n] int8, a place in ``KINDS``.
        num_bytes: [n, t] int64; a negative number: the tier cannot hold it.
        copies:    [n, t] bool.
        heat, last, importance, rebuild_s, next_use: [n] float64; next_use nan: not known.
        pinned, in_use, rebuildable, archived: [n] bool.
        buildable: [n] bool; None: all are.
        mirror:    [n, t] bool: copies there need another one; None: nowhere.
        stray:     by tier: bytes there that belong to no unit, which go when room is wanted.
        compressed: [n, t] int64, bytes of a copy that is compressed again; negative: it cannot be;
            None: none can.
        access_s:  [n, t] float64.
    """

    tiers: tuple[str, ...]
    ids: Sequence[str]
    kind: Array
    num_bytes: Array
    copies: Array
    heat: Array
    last: Array
    importance: Array
    pinned: Array
    in_use: Array
    rebuildable: Array
    rebuild_s: Array
    access_s: Array
    next_use: Array
    archived: Array
    half_life_s: float = HALF_LIFE_S
    buildable: Array | None = None
    mirror: Array | None = None
    compressed: Array | None = None
    stray: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(
        cls, units: Iterable[Unit], tiers: Sequence[str], half_life_s: float = HALF_LIFE_S
    ) -> State:
        """Columns of these units.

        Raises:
            ArgumentError: two units share an id, or one names a tier or kind that there is not.
        """
        rows = list(units)
        ids = [unit.id for unit in rows]
        if len(set(ids)) != len(ids):
            raise ArgumentError("units: each id once wanted")
        known = set(tiers)
        for unit in rows:
            named = unit.num_bytes.keys() | unit.copies | unit.access_s.keys()
            named |= unit.compressed_bytes.keys()
            if unit.kind not in KINDS or not named <= known:
                raise ArgumentError(
                    f"unit {unit.id!r}: kind of {', '.join(KINDS)} and tiers of "
                    f"{', '.join(tiers)} wanted, got {unit.kind!r} and {sorted(named)}"
                )
            if not unit.copies <= unit.num_bytes.keys():
                raise ArgumentError(f"unit {unit.id!r}: num_bytes of each tier with a copy wanted")

        def column(name: str, dtype: Any = float) -> Array:
            return numpy.array([getattr(unit, name) for unit in rows], dtype)

        def table(read: Any, dtype: Any) -> Array:
            values = [[read(unit, tier) for tier in tiers] for unit in rows]
            return numpy.array(values, dtype).reshape(len(rows), len(tiers))

        smaller = None
        if any(unit.compressed_bytes for unit in rows):
            smaller = table(lambda unit, tier: unit.compressed_bytes.get(tier, -1), numpy.int64)
        nexts = [math.nan if unit.next_use is None else unit.next_use for unit in rows]
        return cls(
            tiers=tuple(tiers),
            ids=ids,
            kind=numpy.array([KINDS.index(unit.kind) for unit in rows], numpy.int8),
            num_bytes=table(lambda unit, tier: unit.num_bytes.get(tier, -1), numpy.int64),
            copies=table(lambda unit, tier: tier in unit.copies, bool),
            heat=column("heat"),
            last=column("last"),
            importance=column("importance"),
            pinned=column("pinned", bool),
            in_use=column("in_use", bool),
            rebuildable=column("rebuildable", bool),
            rebuild_s=column("rebuild_s"),
            access_s=table(lambda unit, tier: unit.access_s.get(tier, 0.0), float),
            next_use=numpy.array(nexts, float),
            archived=column("archived", bool),
            buildable=column("buildable", bool),
            mirror=table(lambda unit, tier: unit.mirror == tier, bool)
            if any(unit.mirror for unit in rows)
            else None,
            half_life_s=half_life_s,
            compressed=smaller,
        )

    def used(self) -> dict[str, int]:
        """Bytes in each tier."""
        held = numpy.where(self.copies, self.num_bytes, 0).sum(axis=0)
        return dict(zip(self.tiers, held.tolist(), strict=True))

    def rates(self, now: float, horizon_s: float) -> Array:
        """[n] expected uses per second over the next ``horizon_s``.

        A unit used h times, older uses counting less, is used h ln 2 / half-life times a second;
        one that is expected within the horizon is used at least once in it.
        """
        cooled = numpy.exp2(-numpy.maximum(now - self.last, 0.0) / self.half_life_s)
        rate = self.heat * cooled * (math.log(2) / self.half_life_s)
        soon = self.next_use - now <= horizon_s  # False for nan
        return numpy.where(soon, numpy.maximum(rate, 1.0 / horizon_s), rate)


class Estimate:
    """A running estimate of what something costs: recent measurements count most.

    Args:
        first: what is assumed before anything was measured.
        share: of a new measurement.
    """

    def __init__(self, first: float, share: float = 0.2) -> None:
        self.value, self.share, self.count = float(first), share, 0

    def add(self, measured: float) -> None:
        """Take a measurement; the first one replaces what was assumed."""
        self.count += 1
        self.value += (measured - self.value) * max(self.share, 1.0 / self.count)


class Costs:
    """Seconds that operations take: a fixed part and one per byte, estimated as they happen."""

    def __init__(self, bytes_per_s: float = 1e9) -> None:
        self._assumed = 1.0 / bytes_per_s
        self._per_byte: dict[tuple[str, str], Estimate] = {}

    def add(self, operation: str, where: str, num_bytes: int, seconds: float) -> None:
        """An operation (load, store, decode, rebuild) at a tier or on a kind took so long."""
        key = operation, where
        estimate = self._per_byte.setdefault(key, Estimate(self._assumed))
        estimate.add(seconds / max(num_bytes, 1))

    def seconds(self, operation: str, where: str, num_bytes: int) -> float:
        """What it is expected to take."""
        known = self._per_byte.get((operation, where))
        return num_bytes * (self._assumed if known is None else known.value)

    def measured(self) -> dict[str, float]:
        """Bytes per second of each operation that was measured."""
        return {f"{o} {w}": 1.0 / max(e.value, 1e-18) for (o, w), e in self._per_byte.items()}
