"""Edges that use makes: cubes that were retrieved together and then used belong together.

Each time a pair is used its weight moves a share of the way to the cap; since the last time it was
halved for every half-life that has passed. The edges stand in a table of their own, which is no
part of the cubes: no version, digest or export knows of them. A process that dies loses the pairs
of its last batch, and nothing else.

Every principal has edges of its own, and so has the owner: what one may not read can neither make
an edge that one sees nor take the place of one.

Source: Hebb, The organization of behavior, 1949; the bounded form is Oja's, 1982, in its simplest
case.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import (
    Column,
    Float,
    Integer,
    MetaData,
    Table,
    Text,
    and_,
    bindparam,
    inspect,
    or_,
    select,
)

from memos.errors import ArgumentError, StoreLockedError
from memos.records.links import chunks

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.database import Database
    from memos.records.scope import Scope

USED_WITH = "used_with"  # the type of these edges
Pair: TypeAlias = tuple[str, int, int]  # whose, and seq of both cubes
HALF_LIFE_S = 30 * 86400.0
_BOUND = 512  # pairs that wait
_FAINT = 0.01  # of the cap: what is weaker is forgotten

_own = MetaData()
hebbian = Table(
    "hebbian",
    _own,
    Column("actor", Text, primary_key=True),  # the principal; "": the owner
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
        self._waiting: dict[Pair, tuple[int, float]] = {}  # count, last
        self._lock = threading.Lock()
        self._is_made = False

    def __len__(self) -> int:
        """Pairs that wait to be written."""
        return len(self._waiting)

    def used(self, seqs: Iterable[int], at: float, actor: str = "") -> None:
        """These cubes, which one query of a principal found, were used together.

        Cost: 20 us for eight cubes; every ``bound`` pairs one write.
        """
        if self._database.readonly:
            return
        chosen = sorted(list(dict.fromkeys(seqs))[: self._together])
        with self._lock:
            for low, high in itertools.combinations(chosen, 2):
                pair = actor, low, high
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
            scope: whose edges, and whose rights count, at both ends.
        """
        if not seqs or not self._exists(connection):
            return []
        found: dict[tuple[int, int], float] = {}
        for part in chunks(list(seqs)):
            rows = connection.execute(_AT, {"seqs": part, "actor": _whose(scope)})
            for _, low, high, weight, last, _ in rows:
                value = self._cooled(weight, last, now)
                if value >= _FAINT * self.cap:
                    found[int(low), int(high)] = value
        if scope is not None and scope.rights is not None:
            ends = list({seq for pair in found for seq in pair})
            readable: Collection[int] = scope.readable_among(connection, ends)
            found = {pair: w for pair, w in found.items() if set(pair) <= set(readable)}
        return [(low, USED_WITH, high, w) for (low, high), w in sorted(found.items())]

    def explain(
        self, connection: Connection, seq: int, now: float, scope: Scope | None = None
    ) -> list[dict[str, float]]:
        """The edges of a cube, heaviest first: with (a seq), weight, count, last."""
        if not self._exists(connection):
            return []
        rows = connection.execute(_AT, {"seqs": [seq], "actor": _whose(scope)}).all()
        found = [
            {
                "with": int(high if low == seq else low),
                "weight": self._cooled(weight, last, now),
                "count": int(count),
                "last": last,
            }
            for _, low, high, weight, last, count in rows
        ]
        return sorted(found, key=lambda edge: (-edge["weight"], edge["with"]))

    def forget(self, connection: Connection, seqs: Iterable[int]) -> None:
        """Cubes are purged: their edges go."""
        gone = set(seqs)
        with self._lock:
            kept = {p: v for p, v in self._waiting.items() if not gone.intersection(p[1:])}
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

    def _write(self, connection: Connection, waiting: Mapping[Pair, tuple[int, float]]) -> None:
        for actor in sorted({pair[0] for pair in waiting}):
            mine = {pair: uses for pair, uses in waiting.items() if pair[0] == actor}
            self._write_of(connection, actor, mine)

    def _write_of(
        self, connection: Connection, actor: str, waiting: Mapping[Pair, tuple[int, float]]
    ) -> None:
        ends = sorted({seq for pair in waiting for seq in pair[1:]})
        known: dict[Pair, tuple[float, float, int]] = {}
        for part in chunks(ends):
            rows = connection.execute(_AT, {"seqs": part, "actor": actor}).all()
            known.update(
                {(whose, low, high): (w, last, n) for whose, low, high, w, last, n in rows}
            )
        changed = {}
        for pair, (count, last) in waiting.items():
            weight, before, times = known.get(pair, (0.0, last, 0))
            at = max(last, before)
            weight = self._cooled(weight, before, at)
            weight = self.cap - (self.cap - weight) * (1.0 - self.rate) ** count
            changed[pair] = known[pair] = min(weight, self.cap), at, times + count
        gone = self._too_many(known, ends)
        kept = [(*pair, *values) for pair, values in changed.items() if pair not in gone]
        if kept:
            connection.exec_driver_sql(
                "INSERT OR REPLACE INTO hebbian(actor, low, high, weight, last, count) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                kept,
            )
        if gone:
            connection.exec_driver_sql(
                "DELETE FROM hebbian WHERE actor = ? AND low = ? AND high = ?", sorted(gone)
            )

    def _too_many(
        self, known: Mapping[Pair, tuple[float, float, int]], ends: Sequence[int]
    ) -> set[Pair]:
        """Pairs that one of these cubes has no room for, and those that are faint."""
        now = max(last for _, last, _ in known.values())
        by_end: dict[int, list[tuple[float, Pair]]] = {seq: [] for seq in ends}
        gone = set()
        for pair, (weight, last, _) in known.items():
            weight = self._cooled(weight, last, now)
            if weight < _FAINT * self.cap:
                gone.add(pair)
                continue
            for seq in pair[1:]:
                if seq in by_end:
                    by_end[seq].append((-weight, pair))
        for edges in by_end.values():
            gone.update(pair for _, pair in sorted(edges)[self.per_cube :])
        return gone


def _whose(scope: Scope | None) -> str:
    return "" if scope is None or scope.rights is None else scope.rights.principal


_AT = select(hebbian).where(
    and_(
        hebbian.c.actor == bindparam("actor"),
        or_(
            hebbian.c.low.in_(bindparam("seqs", expanding=True)),
            hebbian.c.high.in_(bindparam("seqs", expanding=True)),
        ),
    )
)
