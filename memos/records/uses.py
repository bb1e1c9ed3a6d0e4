"""Uses of cubes: counted in this process, written in batches.

A cube's heat is the number of its uses, each halved for every ``HALF_LIFE_S`` that has passed
since: what a sweep weighs. A process that dies loses the uses of its last batch, and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection, select

from memos.errors import StoreLockedError
from memos.records.life_schema import uses
from memos.records.links import chunks
from memos.records.schema import cubes
from memos.records.states import ACTIVATED, CREATED, USE

if TYPE_CHECKING:
    from memos.records.database import Database
    from memos.records.life import Life

HALF_LIFE_S = 7 * 86400.0
_BOUND = 8192  # cubes whose uses wait


@dataclass
class Use:
    """count: how often a cube was used; last: when, seconds since 1970; heat: as of then."""

    count: int
    last: float
    heat: float

    def heat_at(self, now: float) -> float:
        """Uses by now, older ones counting less."""
        return self.heat * cooled(now - self.last)

    def add(self, at: float, count: int = 1, heat: float | None = None) -> None:
        """Count uses at a time, which may be earlier than the last one."""
        more = float(count) if heat is None else heat
        if at >= self.last:
            self.heat, self.last = self.heat_at(at) + more, at
        else:
            self.heat += more * cooled(self.last - at)
        self.count += count


def cooled(seconds: float) -> float:
    """What is left of a use after so long."""
    return float(0.5 ** (max(seconds, 0.0) / HALF_LIFE_S))


class Uses:
    """The uses of a store's cubes. Thread-safe.

    Args:
        bound: cubes whose uses wait before they are written.
    """

    def __init__(self, database: Database, bound: int = _BOUND) -> None:
        self._database, self._bound = database, bound
        self._waiting: dict[tuple[int, str], Use] = {}
        self._lives: dict[int, Life] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, life: Life, ids: Iterable[str], at: float) -> None:
        """Cubes of a memory were used.

        Cost: half a microsecond each; every ``bound`` cubes one write.
        """
        if self._database.readonly:
            return
        with self._lock:
            self._lives[life.memory] = life
            for id in ids:
                known = self._waiting.get((life.memory, id))
                if known is None:
                    self._waiting[life.memory, id] = Use(1, at, 1.0)
                else:
                    known.add(at)
            is_full = len(self._waiting) >= self._bound
        if is_full:
            try:
                self.write()
            except StoreLockedError:
                # Another process writes for long: whoever asks does not wait for counts, which
                # go with the next batch.
                with self._lock:
                    self._bound *= 2

    def write(self) -> int:
        """Write what was counted; what was CREATED and used is ACTIVATED. Returns how many.

        Raises StoreError; the counts wait for the next time then.
        """
        with self._lock:
            if not self._waiting:
                return 0
            waiting, self._waiting = self._waiting, {}
        try:
            with self._database.write() as connection:
                for memory in sorted({memory for memory, _ in waiting}):
                    mine = {id: use for (m, id), use in waiting.items() if m == memory}
                    self._write(connection, self._lives[memory], mine)
        except BaseException:
            with self._lock:
                for key, use in waiting.items():
                    known = self._waiting.setdefault(key, Use(0, use.last, 0.0))
                    known.add(use.last, use.count, use.heat)
            raise
        return len(waiting)

    def of(self, connection: Connection, seqs: Iterable[int]) -> dict[int, Use]:
        """What is written of these cubes' uses; none of those that never were used."""
        return {
            int(seq): Use(int(count), float(last), float(heat))
            for part in chunks(list(seqs))
            for seq, count, last, heat in connection.execute(
                select(uses).where(uses.c.seq.in_(part))
            )
            # In a damaged file anything may stand there. Counts are no memory: they begin anew.
            if isinstance(count, int) and isinstance(last, float) and isinstance(heat, float)
        }

    def _write(self, connection: Connection, life: Life, mine: Mapping[str, Use]) -> None:
        found: dict[int, Use] = {}
        fresh: dict[float, list[int]] = {}
        for part in chunks(list(mine)):
            rows = connection.execute(
                select(cubes.c.seq, cubes.c.id, cubes.c.state).where(
                    cubes.c.memory == life.memory, cubes.c.id.in_(part)
                )
            )
            for seq, id, state in rows:
                found[int(seq)] = mine[id]
                if state == CREATED:
                    fresh.setdefault(mine[id].last, []).append(int(seq))
        known = self.of(connection, found)
        new = []
        for seq, use in found.items():
            whole = known.get(seq, Use(0, use.last, 0.0))
            whole.add(use.last, use.count, use.heat)
            new.append((seq, whole.count, whole.last, whole.heat))
        if new:
            connection.exec_driver_sql(
                "INSERT OR REPLACE INTO uses(seq, count, last, heat) VALUES (?, ?, ?, ?)", new
            )
        for at, seqs in sorted(fresh.items()):
            life.move(connection, seqs, ACTIVATED, trigger=USE, at=at)
