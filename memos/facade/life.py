"""The life of cubes: archived, frozen, merged, forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError
from memos.memories.declarative import DeclarativeMemory

if TYPE_CHECKING:
    from memos.lifecycle import Policy, Swept, Transition
    from memos.lifecycle.duplicates import Pair
    from memos.lifecycle.extract import Extractor
    from memos.lifecycle.jobs import Jobs
    from memos.lifecycle.purge import Purged
    from memos.records.jobs import Job
    from memos.records.uses import Use


class Lives:
    """Part of MOS."""

    # Moves.

    def archive(self: Any, id: str, memory_name: str | None = None, *, why: str = "") -> int:
        """Take a cube, and all that hangs on it, out of the indexes and fast tiers.

        It is found with ``include_archived=True``, by its id always, and comes back when it is
        used. Returns how many cubes moved.

        Raises:
            NotFoundError: no such cube.
            ArgumentError: it is frozen, pinned or in use, or what hangs on it is.
        """
        from memos.lifecycle import moves

        return moves.archive(self._living(id, memory_name), id, why=why)

    def freeze(self: Any, id: str, memory_name: str | None = None, *, why: str = "") -> MemCube:
        """From now on a cube cannot change, be deleted or run out; it is found as before."""
        from memos.lifecycle import moves

        return moves.freeze(self._living(id, memory_name), id, why=why)

    def thaw(self: Any, id: str, memory_name: str | None = None, *, why: str = "") -> MemCube:
        """A frozen cube may change again. Raises ArgumentError where it is not frozen."""
        from memos.lifecycle import moves

        return moves.thaw(self._living(id, memory_name), id, why=why)

    def pin(self: Any, id: str, pinned: bool = True, memory_name: str | None = None) -> None:
        """While a cube is pinned nothing archives or merges it."""
        memory = self._holder(id, memory_name)
        if not isinstance(memory, DeclarativeMemory):
            memory.pin(id, pinned)
            return
        from memos.lifecycle import moves

        moves.pin(memory, id, pinned)

    def use(self: Any, *used: Any) -> None:
        """Say that hits, cubes or ids were used: archived ones come back to the indexes.

        Hits of a query and cubes by id count by themselves; a hit that was archived comes back
        once it is used: by this, by ``get``, or because a context carries it.
        """
        for one in used:
            if not isinstance(one, str | MemCube):
                raise ArgumentError(f"use: hits, cubes or ids wanted, got {type(one).__name__}")
            id, name = (one, None) if isinstance(one, str) else (one.id, one.memory)
            self._report_uses([self._living(id, name).get(id)])

    def transitions(self: Any, id: str, memory_name: str | None = None) -> list[Transition]:
        """Every move of a cube between the states of its life, oldest first."""
        from memos.lifecycle import moves

        return moves.transitions(self._holder(id, memory_name, dead=True), id)

    def uses(self: Any, id: str, memory_name: str | None = None) -> Use:
        """How often a cube was used, when last, and how much that still counts."""
        from memos.lifecycle import moves

        return moves.use_of(self._living(id, memory_name), id)

    # Forgetting.

    def purge(
        self: Any,
        id: str | None = None,
        memory_name: str | None = None,
        *,
        memory: str | None = None,
    ) -> Purged:
        """Remove for good what a cube, or all cubes of a memory, ever said.

        Contents, versions, words, vectors, files, KV blocks and adapters go; a tombstone with id
        and times stays. A deleted cube can be purged too.

        Args:
            id:     of a cube; what hangs on it goes with it.
            memory: instead: all cubes of this memory, which stays, empty.

        Raises:
            NotFoundError: no such cube.
            ArgumentError: neither or both are given; or one of them is frozen.
        """
        from memos.lifecycle.purge import purge, purge_sessions

        if (id is None) == (memory is None):
            raise ArgumentError("purge: the id of a cube, or memory=, wanted")
        named = id is not None
        found = self._holder(id, memory_name, dead=True) if named else self.memory(memory)
        ids = None if id is None else [id]
        if not isinstance(found, DeclarativeMemory):
            return purge_sessions(found, ids)
        purged = purge(found, ids)
        self._drop_activated()
        return purged

    def sweep(
        self: Any,
        policy: Policy | Mapping[str, Policy] | None = None,
        memory: str | None = None,
        **options: Any,
    ) -> list[Swept]:
        """Archive what is old, unimportant or too much, and forget what has outlived its time.

        Args:
            policy:  for every memory, or one for each by its name; None: made of ``options``.
            memory:  only this one; None: all whose cubes stand in the store.
            options: of a Policy: hot_cubes, hot_bytes, archive_after_s, least_importance, ...
        """
        from memos.lifecycle import sweep

        return [
            sweep(self._living_memory(n), p) for n, p in self._policies(policy, memory, options)
        ]

    # Near-duplicates and insights.

    def find_duplicates(self: Any, memory: str, ids: Iterable[str] | None = None) -> list[Pair]:
        """Pairs of cubes that say the same in almost the same words.

        Args:
            ids: only pairs with one of these cubes.
        """
        from memos.lifecycle.duplicates import pairs_of

        found = self._living_memory(memory)
        with self.records.database.read() as connection:
            if ids is None:
                seqs = found.table.recent(connection, found.scope(), newest_first=False)
            else:
                seqs = [found.table.seq(connection, id, found.scope()) for id in ids]
            return pairs_of(found, connection, seqs)

    def merge_duplicates(
        self: Any, memory: str, ids: Sequence[str] | None = None, *, why: str | None = None
    ) -> list[MemCube]:
        """Make one cube of those that say the same; they become MERGED.

        Args:
            ids: None: all that ``find_duplicates`` finds; else these, which have to say the same
                by its rules, unless ``why`` says why they are one.

        Returns:
            The cubes that were made. ``undo_merge`` takes one back.
        """
        from memos.lifecycle.work import merge_all, merge_these

        found = self._living_memory(memory)
        if ids is None:
            return merge_all(found)
        return merge_these(found, ids, why)

    def undo_merge(self: Any, id: str, memory_name: str | None = None) -> list[MemCube]:
        """Take a merge back: its sources are as they were, the merged cube is deleted.

        Raises ArgumentError where the cube was not made by a merge, or has changed since.
        """
        from memos.lifecycle.merging import undo_merge

        return undo_merge(self._living(id, memory_name), id)

    def settle_facts(self: Any, memory: str) -> int:
        """Give facts that others took the place of - "lives in Paris", then "moved to Berlin" -
        the time in which they hold: metadata valid_from and valid_to. Returns how many changed."""
        from memos.lifecycle.facts import settle

        found = self._living_memory(memory)
        with self.records.database.write() as connection:
            return settle(found, connection)

    def distil(
        self: Any,
        memory: str,
        into: str,
        *,
        extract: Extractor | None = None,
        again: bool = False,
    ) -> Job:
        """Keep what a memory's texts say for long: as cubes of another memory, each with a
        relation "distilled_from" to those that say so.

        Args:
            memory:  whose texts; those that were distilled before, and are the same, are left out.
            into:    a memory of texts.
            extract: from cubes to Insights; None: rules that work offline, ``extract.by_rules``.
                ``extract.by_model`` asks a language model.
            again:   also what was distilled before.

        Returns:
            The job, done: ``result`` counts the insights that are new, and those seen again.
        """
        name = "rules"
        if extract is not None:
            name = self._life().name_of(extract)
        job = self.jobs.submit("distil", memory=memory, into=into, extract=name, again=again)
        self.jobs.run_until_empty(only=job.id)
        done: Job = self.jobs.get(job.id)
        return done

    @property
    def jobs(self: Any) -> Jobs:
        """Long work in units that survive a restart: sweeps, distillation, merging. No thread
        runs before ``jobs.start()``."""
        found: Jobs = self._life().jobs
        return found

    # Inside.

    def _life(self: Any) -> Any:
        from memos.lifecycle.work import Work

        with self._lock:
            if "_work" not in vars(self):
                self._work = Work(self.records, self.memory, self._clock)
            return self._work

    def _close_life(self: Any) -> None:
        """Before the memories close: the worker ends its unit."""
        if "_work" in vars(self):
            self._work.jobs.stop()

    def _count(self: Any, cubes: Iterable[MemCube]) -> None:
        """These were returned to somebody who asked: they were used."""
        by_memory: dict[str, list[str]] = {}
        for cube in cubes:
            by_memory.setdefault(cube.memory, []).append(cube.id)
        now = self._clock()
        for name, ids in by_memory.items():
            memory = self.memories.get(name)
            if isinstance(memory, DeclarativeMemory):
                self.records.uses.count(memory.table.life, ids, now)

    def _carry(self: Any, hits: Iterable[MemCube]) -> None:
        """A context carries these: they were used, and archived ones come back."""
        hits = list(hits)
        self._count(hits)
        if not self.records.readonly:
            self.use(*(hit for hit in hits if hit.state == "ARCHIVED"))

    def _living(self: Any, id: str, memory_name: str | None) -> DeclarativeMemory:
        memory = self._holder(id, memory_name)
        if not isinstance(memory, DeclarativeMemory):
            raise ArgumentError(
                f"memory {memory.name!r} of kind {memory.kind} has no states: delete or purge "
                "its sessions, or pin them"
            )
        return memory

    def _living_memory(self: Any, name: str) -> DeclarativeMemory:
        memory = self.memory(name)
        if not isinstance(memory, DeclarativeMemory):
            raise ArgumentError(f"memory {name!r}: of kind {memory.kind}, it keeps its own budget")
        return memory

    def _policies(
        self: Any, policy: Any, memory: str | None, options: Mapping[str, Any]
    ) -> list[tuple[str, Policy]]:
        from memos.lifecycle import Policy

        if policy is None:
            policy = Policy(**options)
        elif options:
            raise ArgumentError(f"policy: a Policy, or {', '.join(sorted(options))}; got both")
        if isinstance(policy, Mapping):
            chosen = dict(policy)
        elif isinstance(policy, Policy):
            names = [name for name, m in self.memories.items() if isinstance(m, DeclarativeMemory)]
            chosen = dict.fromkeys(names if memory is None else [memory], policy)
        else:
            raise ArgumentError(f"policy: a Policy wanted, got {type(policy).__name__}")
        for one in chosen.values():
            if not isinstance(one, Policy):
                raise ArgumentError(f"policy: a Policy wanted, got {type(one).__name__}")
        return sorted(chosen.items())
