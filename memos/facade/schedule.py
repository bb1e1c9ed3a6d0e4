"""The scheduler, and the edges that use makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError, NotFoundError

if TYPE_CHECKING:
    from memos.records.cold_rows import ColdRow
    from memos.records.hebbian import Hebbian
    from memos.scheduler import Rules, Scheduler
    from memos.scheduler.sources import Source
    from memos.scheduler.sources_text import Activator, Consolidator

_LOOKED_AT = 1000  # cubes of a store that one step looks at, for each memory
_PAIRED = 8  # cubes of a context that are paired, the best ones


class Scheduling:
    """Part of MOS."""

    def schedule(
        self: Any,
        budgets: Mapping[str, int],
        *,
        rules: Rules | None = None,
        every_s: float | None = 10.0,
        tune: bool = True,
        activator: Activator | str | None = None,
        consolidator: Consolidator | None = None,
    ) -> Scheduler:
        """Give every tier a budget; returns the scheduler, which is ``mos.scheduler`` from now on.

        The quotas of all memories are cut so that together they never exceed it. Sessions of
        KVCacheMemory, adapters of ParametricMemory and the texts that are used become units;
        memories that are registered later take part too. Moves happen in the background and stop
        with ``close``.

        Args:
            budgets: bytes by tier, fastest first, for example
                {"device": 8 << 30, "host": 32 << 30, "disk": 256 << 30}. A disk that is not named
                is without limit, but for the memories' own.
            rules:   of the plans.
            every_s: seconds between two plans; None: only ``mos.scheduler.step()`` makes one.
            tune:    False: what is learnt from use about how long uses count is left aside.
            activator:    makes KV of hot texts, for ``context(as_kv=True)``: the name of a
                KVCacheMemory with model= and tokenizer=; None: texts stay texts.
            consolidator: makes adapters of hot texts, as ``memos.facade.makers.Learning`` does.

        Raises:
            ArgumentError: a budget below 0.
            QuotaError: what is pinned takes more.
        """
        from memos.scheduler import Rules, Scheduler
        from memos.scheduler.scheduler import UNLIMITED

        tiers = dict(budgets)
        tiers.setdefault("disk", UNLIMITED)
        self._stop_schedule()  # not under the lock, which a move in progress may want
        with self._lock:
            found = Scheduler(tiers, rules=rules or Rules(), clock=self._clock, tune=tune)
            found.notes = self._notes
            found.shows = self._show_schedule
            if isinstance(activator, str):
                from memos.facade.makers import Pieces

                activator = Pieces(self, activator)
            self._makers = activator, consolidator
            self._sources: dict[str, Source] = {}
            self._scheduler: Scheduler = found
            for memory in list(self._memories.values()):
                self._schedule_memory(memory)
            if every_s is not None:
                found.start(every_s)
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
        found: Hebbian = self.records.hebbian
        return found

    def associations(self: Any, id: str, memory_name: str | None = None) -> list[dict[str, Any]]:
        """What was used together with a cube, the strongest first.

        Returns:
            For each: id, memory, weight (0 to 1, by now), count, last (seconds since 1970). To a
            principal: of its own uses, and of what it may read.

        Raises NotFoundError.
        """
        from sqlalchemy import select

        from memos.records.schema import cubes, memories
        from memos.records.scope import Scope, acting

        name = self._holder(id, memory_name).name
        scope = Scope(rights=acting.get())
        with self.records.database.read() as connection:
            seqs = [s for s, m in self.records.locate(connection, id) if m == name]
            edges = [
                e for s in seqs for e in self.hebbian.explain(connection, s, self._clock(), scope)
            ]
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
        from memos.records.scope import acting

        if self.records.readonly:
            return
        known = self.memories
        wanted = [h for h in hits if isinstance(known.get(h.memory), DeclarativeMemory)][:_PAIRED]
        if len(wanted) < 2:
            return
        with self.records.database.read() as connection:
            seqs = []
            for hit in wanted:
                found = self.records.locate(connection, hit.id)
                seqs += [seq for seq, name in found if name == hit.memory]
        actor = acting.get()
        self.hebbian.used(seqs, self._clock(), "" if actor is None else actor.principal)

    # Units

    def _schedule_memory(self: Any, memory: Any) -> None:
        """A memory takes part in the budgets, where there are any."""
        from memos.memories.declarative import DeclarativeMemory

        if "_scheduler" not in vars(self):
            return
        if memory.name in self._sources:
            self._scheduler.remove_source(memory.name)
            del self._sources[memory.name]
        source: Any = None
        if memory.kind == "kv_cache":
            from memos.scheduler.sources_kv import KVSource

            source = KVSource(memory, clock=self._clock)
        elif memory.kind == "parametric":
            from memos.scheduler.sources_adapters import AdapterSource

            source = AdapterSource(memory, clock=self._clock)
        elif isinstance(memory, DeclarativeMemory):
            from memos.scheduler.sources_text import TextSource

            activator, consolidator = self._makers
            name = memory.name
            source = TextSource(
                name,
                archives=lambda id, why: self.archive(id, name, why=why),
                activator=activator if memory.in_prompts else None,
                consolidator=consolidator if memory.in_prompts else None,
                walk=self._cold_of(memory),
                find=self._finder_of(memory),
            )
        if source is not None:
            self._sources[memory.name] = source
            self._scheduler.add_source(source)

    def _cold_of(self: Any, memory: Any) -> Callable[[int], tuple[list[ColdRow], int]] | None:
        """Looks at the next texts of a memory: which of them does the rule of archiving mean?

        None where there is no such rule, and for graphs, whose nodes hang together.
        """
        scheduler = self._scheduler
        limit = scheduler.rules.archive_rate
        if limit <= 0 or memory.kind == "graph" or self.records.readonly:
            return None

        def is_cold(row: ColdRow) -> bool:
            half_life_s = scheduler.half_life_s
            age = max(self._clock() - row.last, 0.0)
            rate = row.heat * 0.5 ** (age / half_life_s) * math.log(2) / half_life_s
            return bool(rate * (1.0 + min(max(row.importance, 0.0), 1.0)) < limit)

        def walk(after: int) -> tuple[list[ColdRow], int]:
            from memos.records import cold_rows

            number, life = memory.table.memory, memory.table.life
            with memory.records.database.read() as connection:
                stays = life.pinned(connection)
                found, place = cold_rows.walk(connection, number, after, _LOOKED_AT, stays)
            return [row for row in found if is_cold(row)], place

        return walk

    def _finder_of(self: Any, memory: Any) -> Callable[[str], ColdRow | None]:
        def find(id: str) -> ColdRow | None:
            from memos.records import cold_rows

            with memory.records.database.read() as connection:
                return cold_rows.find(connection, memory.table.memory, id)

        return find

    def _report_uses(self: Any, cubes: Iterable[MemCube]) -> None:
        """Texts were used: what is hot follows from that."""
        if "_scheduler" not in vars(self):
            return
        by_memory: dict[str, list[MemCube]] = {}
        for cube in cubes:
            by_memory.setdefault(cube.memory, []).append(cube)
        now = self._clock()
        for name, used in by_memory.items():
            source = self._sources.get(name)
            if hasattr(source, "used_texts"):
                source.used_texts(used, now)

    def _notes(self: Any, unit: str) -> dict[str, Any]:
        """What ``scheduler.explain`` says of a text beside its figures: what it belongs to."""
        name, _, id = unit.partition("/")
        if not hasattr(self._sources.get(name), "used_texts"):
            return {}
        try:
            return {"associations": self.associations(id, name)}
        except NotFoundError:
            return {}

    def _show_schedule(self: Any, scheduler: Scheduler) -> None:
        """For ``memos top``; names of sessions are no secret only where the folder keeps none."""
        from memos.errors import StoreError
        from memos.scheduler import snapshot

        if self.path is None or self.records.readonly or self.records.database.is_sealed:
            return
        try:
            snapshot.write(Path(self.path), snapshot.snapshot(scheduler))
        except OSError as error:
            raise StoreError(f"{self.path}: what memos top shows: {error}") from error

    def _stop_schedule(self: Any) -> None:
        if "_scheduler" in vars(self):
            self._scheduler.close()
            del self._scheduler

    def _close_schedule(self: Any) -> None:
        """Before the memories close: planning and moving stop."""
        self._stop_schedule()
