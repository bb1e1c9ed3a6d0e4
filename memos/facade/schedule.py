"""The scheduler, and the edges that use makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError

if TYPE_CHECKING:
    from memos.records.hebbian import Hebbian
    from memos.scheduler import Rules, Scheduler


class Scheduling:
    """Part of MOS."""

    def schedule(self: Any, budgets: Mapping[str, int], *, rules: Rules | None = None) -> Scheduler:
        """Give every tier a budget; returns the scheduler, which is ``mos.scheduler`` from now on.

        Args:
            budgets: bytes by tier, fastest first, for example
                {"device": 8 << 30, "host": 32 << 30, "disk": 256 << 30}.

        Raises:
            ArgumentError: a budget below 0.
        """
        from memos.scheduler import Scheduler

        with self._lock:
            if "_scheduler" in vars(self):
                self._scheduler.close()
            self._scheduler = Scheduler(budgets, rules=rules, clock=self._clock)
            found: Scheduler = self._scheduler
            return found

    @property
    def scheduler(self: Any) -> Scheduler:
        """Plans, and why units are where they are. Raises ArgumentError before ``schedule``."""
        if "_scheduler" not in vars(self):
            raise ArgumentError("scheduler: budgets wanted first, see schedule")
        found: Scheduler = self._scheduler
        return found

    @property
    def hebbian(self: Any) -> Hebbian:
        """The edges between cubes that were used together."""
        from memos.records.hebbian import Hebbian

        with self._lock:
            if "_hebbian" not in vars(self):
                self._hebbian = Hebbian(self.records.database)
            found: Hebbian = self._hebbian
            return found

    def associations(self: Any, id: str, memory_name: str | None = None) -> list[dict[str, Any]]:
        """What was used together with a cube, the strongest first.

        Returns:
            For each: id, memory, weight (0 to 1, by now), count, last (seconds since 1970). Of
            what may not be seen, nothing.

        Raises NotFoundError.
        """
        from sqlalchemy import select

        from memos.records.schema import cubes, memories

        name = self._holder(id, memory_name).name
        with self.records.database.read() as connection:
            seqs = [s for s, m in self.records.locate(connection, id) if m == name]
            edges = [e for s in seqs for e in self.hebbian.explain(connection, s, self._clock())]
            rows = connection.execute(
                select(cubes.c.seq, cubes.c.id, memories.c.name)
                .join(memories, memories.c.id == cubes.c.memory)
                .where(cubes.c.seq.in_([edge["with"] for edge in edges]))
            ).all()
        readable = self._readable(int(row[0]) for row in rows)
        named = {int(row[0]): (row[1], row[2]) for row in rows if int(row[0]) in readable}
        return [
            {
                "id": named[edge["with"]][0],
                "memory": named[edge["with"]][1],
                "weight": edge["weight"],
                "count": edge["count"],
                "last": edge["last"],
            }
            for edge in edges
            if edge["with"] in named
        ]

    def _associate(self: Any, hits: Iterable[MemCube]) -> None:
        """A context carries these, the best first: they belong together a little more."""
        from memos.memories.declarative import DeclarativeMemory

        if self.records.readonly:
            return
        known = self.memories
        wanted = [h for h in hits if isinstance(known.get(h.memory), DeclarativeMemory)]
        with self.records.database.read() as connection:
            seqs = []
            for hit in wanted:
                found = self.records.locate(connection, hit.id)
                seqs += [seq for seq, name in found if name == hit.memory]
        self.hebbian.used(seqs, self._clock())

    def _close_schedule(self: Any) -> None:
        """Before the records close: the worker stops, and what waits is written."""
        if "_scheduler" in vars(self):
            self._scheduler.close()
        if "_hebbian" in vars(self) and not self.records.readonly:
            self._hebbian.write()
