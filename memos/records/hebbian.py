"""Edges that use makes: cubes that were retrieved together and then used belong together.

Each time a pair is used its weight moves a share of the way to the cap; since the last time it was
halved for every half-life that has passed. The edges stand in a table of their own, which is no
part of the cubes: no version, digest or export knows of them. A process that dies loses the pairs
of its last batch, and nothing else.

Source: Hebb, The organization of behavior, 1949; the bounded form is Oja's, 1982, in its simplest
case.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Column, Float, Integer, MetaData, Table, bindparam, inspect, or_, select

from memos.errors import ArgumentError, StoreLockedError
from memos.records.links import chunks

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.database import Database
    from memos.records.scope import Scope

USED_WITH = "used_with"  # the type of these edges
HALF_LIFE_S = 30 * 86400.0
_BOUND = 4096  # pairs that wait
_FAINT = 0.01  # of the cap: what is weaker is forgotten

_own = MetaData()
hebbian = Table(
    "hebbian",
    _own,
    Column("low", Integer, primary_key=True),  # seq of one cube, the smaller one
    Column("high", Integer, primary_key=True),
    Column("weight", Float(53), nullable=False),  # as of ``last``
    Column("last", Float(53), nullable=False),  # seconds since 1970
    Column("count", Integer, nullable=False),
    sqlite_with_rowid=False,
)


class Hebbian:
    """The edges of a store that use made. Thread-safe.

    Args:
        rate:        share of the way to the cap that one use takes.
        cap:         of a weight.
        half_life_s: of a weight that is not refreshed.
        per_cube:    edges that a cube keeps, the heaviest ones.
        together:    of one use at most so many cubes are paired, the first ones.
        bound:       pairs that wait before they are written.

    Raises:
        ArgumentError: rate or cap are out of (0, 1].
    """

    def __init__(
        self,
        database: Database,
        *,
        rate: float = 0.2,
        cap: float = 1.0,
        half_life_s: float = HALF_LIFE_S,
        per_cube: int = 32,
        together: int = 8,
        bound: int = _BOUND,
    ) -> None:
        if not (0 < rate <= 1 and 0 < cap <= 1 and half_life_s > 0 and per_cube > 0):
            raise ArgumentError(
                f"hebbian: rate and cap in (0, 1], half_life_s and per_cube above 0 wanted, got "
                f"{rate}, {cap}, {half_life_s}, {per_cube}"
            )
        self._database = database
        self.rate, self.cap, self.half_life_s, self.per_cube = rate, cap, half_life_s, per_cube
        self._together, self._bound = together, bound
        self._waiting: dict[tuple[int, int], tuple[int, float]] = {}  # pair -> count, last
        self._lock = threading.Lock()
        self._is_made = False

    def __len__(self) -> int:
        """Pairs that wait to be written."""
        return len(self._waiting)

    def used(self, seqs: Iterable[int], at: float) -> None:
        """These cubes, which one query found, were used together.

        Cost: 20 us for eight cubes; every ``bound`` pairs one write.
        """
        if self._database.readonly:
            return
        chosen = sorted(list(dict.fromkeys(seqs))[: self._together])
        with self._lock:
            for pair in itertools.combinations(chosen, 2):
                count, last = self._waiting.get(pair, (0, at))
                self._waiting[pair] = count + 1, max(last, at)
            is_full = len(self._waiting) >= self._bound
        if is_full:
            try:
                self.write()
            except StoreLockedError:
                with self._lock:
                    self._bound *= 2  # whoever asks does not wait: they go with the next batch

    def write(self) -> int:
        """Write what waits; returns how many pairs. Raises StoreError; they wait on then."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        if not waiting:
            return 0
        try:
            with self._database.write() as connection:
                _own.create_all(connection)
                self._write(connection, waiting)
        except BaseException:
            with self._lock:
                for pair, (count, last) in waiting.items():
                    more, later = self._waiting.get(pair, (0, last))
                    self._waiting[pair] = count + more, max(last, later)
            raise
        self._is_made = True
        return len(waiting)

    def edges(
        self, connection: Connection, seqs: Sequence[int], now: float, scope: Scope | None = None
    ) -> list[tuple[int, str, int, float]]:
        """(low, "used_with", high, weight by now) of every edge at one of these cubes.

        Args:
            scope: whose rights count, at both ends.
        """
        if not seqs or not self._exists(connection):
            return []
        found: dict[tuple[int, int], float] = {}
        for part in chunks(list(seqs)):
            for low, high, weight, last, _ in connection.execute(_AT, {"seqs": part}):
                value = self._cooled(weight, last, now)
                if value >= _FAINT * self.cap:
                    found[int(low), int(high)] = value
        if scope is not None and scope.rights is not None:
            ends = list({seq for pair in found for seq in pair})
            readable: Collection[int] = scope.readable_among(connection, ends)
            found = {pair: w for pair, w in found.items() if set(pair) <= set(readable)}
        return [(low, USED_WITH, high, w) for (low, high), w in sorted(found.items())]

    def explain(self, connection: Connection, seq: int, now: float) -> list[dict[str, float]]:
        """The edges of a cube, heaviest first: with (a seq), weight, count, last."""
        if not self._exists(connection):
            return []
        rows = connection.execute(_AT, {"seqs": [seq]}).all()
        found = [
            {
                "with": int(high if low == seq else low),
                "weight": self._cooled(weight, last, now),
                "count": int(count),
                "last": last,
            }
            for low, high, weight, last, count in rows
        ]
        return sorted(found, key=lambda edge: (-edge["weight"], edge["with"]))

    def forget(self, connection: Connection, seqs: Iterable[int]) -> None:
        """Cubes are purged: their edges go."""
        gone = set(seqs)
        with self._lock:
            kept = {p: v for p, v in self._waiting.items() if not gone.intersection(p)}
            self._waiting = kept
        if self._exists(connection):
            for part in chunks(list(gone)):
                connection.execute(
                    hebbian.delete().where(or_(hebbian.c.low.in_(part), hebbian.c.high.in_(part)))
                )

    def _cooled(self, weight: float, last: float, now: float) -> float:
        return float(weight * 0.5 ** (max(now - last, 0.0) / self.half_life_s))

    def _exists(self, connection: Connection) -> bool:
        if not self._is_made:
            self._is_made = inspect(connection).has_table("hebbian")
        return self._is_made

    def _write(
        self, connection: Connection, waiting: Mapping[tuple[int, int], tuple[int, float]]
    ) -> None:
        ends = sorted({seq for pair in waiting for seq in pair})
        known: dict[tuple[int, int], tuple[float, float, int]] = {}
        for part in chunks(ends):
            for low, high, weight, last, count in connection.execute(_AT, {"seqs": part}):
                known[low, high] = weight, last, count
        changed = {}
        for pair, (count, last) in waiting.items():
            weight, before, times = known.get(pair, (0.0, last, 0))
            at = max(last, before)
            weight = self._cooled(weight, before, at)
            weight = self.cap - (self.cap - weight) * (1.0 - self.rate) ** count
            changed[pair] = known[pair] = min(weight, self.cap), at, times + count
        gone = self._too_many(known, ends)
        rows = [(*pair, *values) for pair, values in changed.items() if pair not in gone]
        if rows:
            connection.exec_driver_sql(
                "INSERT OR REPLACE INTO hebbian(low, high, weight, last, count) "
                "VALUES (?, ?, ?, ?, ?)",
                rows,
            )
        stored = [pair for pair in sorted(gone) if pair not in waiting or pair in known]
        if stored:
            connection.exec_driver_sql("DELETE FROM hebbian WHERE low = ? AND high = ?", stored)

    def _too_many(
        self, known: Mapping[tuple[int, int], tuple[float, float, int]], ends: Sequence[int]
    ) -> set[tuple[int, int]]:
        """Pairs that one of these cubes has no room for, and those that are faint."""
        now = max(last for _, last, _ in known.values())
        by_end: dict[int, list[tuple[float, tuple[int, int]]]] = {seq: [] for seq in ends}
        gone = set()
        for pair, (weight, last, _) in known.items():
            weight = self._cooled(weight, last, now)
            if weight < _FAINT * self.cap:
                gone.add(pair)
                continue
            for seq in pair:
                if seq in by_end:
                    by_end[seq].append((-weight, pair))
        for edges in by_end.values():
            gone.update(pair for _, pair in sorted(edges)[self.per_cube :])
        return gone


_AT = select(hebbian).where(
    or_(
        hebbian.c.low.in_(bindparam("seqs", expanding=True)),
        hebbian.c.high.in_(bindparam("seqs", expanding=True)),
    )
)
