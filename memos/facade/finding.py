"""How the verbs of a MOS find memories and cubes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memos.cube import Hit
from memos.errors import ArgumentError, NotFoundError
from memos.memories.declarative import DeclarativeMemory
from memos.memories.tree import TreeTextMemory


class Finding:
    """Part of MOS."""

    def _search(
        self: Any,
        query: str,
        limit: int,
        names: Sequence[str] | None,
        filters: Mapping[str, Any] | None,
        archived: bool = False,
    ) -> list[Hit]:
        from memos.memories.source import MemorySource
        from memos.records.scope import Scope, acting

        if not query.strip():
            raise ArgumentError("query: a text that is not empty wanted")
        if names is None:
            chosen = [
                memory
                for memory in self.memories.values()
                if isinstance(memory, DeclarativeMemory) and memory.in_prompts
            ]
        else:
            chosen = [self._declarative(name) for name in names]
        if not self.records.readonly:
            for memory in chosen:
                memory.expire()
        sources = [MemorySource(memory, archived) for memory in chosen]
        pipeline = self.pipeline
        with self.records.database.snapshot():
            given = {} if filters is None else filters
            scope = Scope(given, self._clock(), archived, rights=acting.get())
            found: list[Hit] = pipeline.run(query, sources, limit, scope)
            return found

    def _with_relatives(
        self: Any, hits: Sequence[Hit], ancestors: bool, siblings: bool, descendants: bool
    ) -> list[Hit]:
        """The hits, those of trees with what stands around them."""
        found = list(hits)
        for name in {hit.memory for hit in hits}:
            memory = self.memory(name)
            if not isinstance(memory, TreeTextMemory):
                continue
            places = [i for i, hit in enumerate(found) if hit.memory == name]
            filled = memory.with_relatives(
                [found[i] for i in places],
                ancestors=ancestors,
                siblings=siblings,
                descendants=descendants,
            )
            for i, hit in zip(places, filled, strict=True):
                found[i] = hit
        return found

    def _declarative(self: Any, name: str) -> DeclarativeMemory:
        memory = self.memory(name)
        if not isinstance(memory, DeclarativeMemory):
            raise ArgumentError(f"memory {name!r}: one that reads text wanted, got {memory.kind}")
        return memory

    def _holder(self: Any, id: str, memory_name: str | None, dead: bool = False) -> Any:
        """The memory that holds a cube."""
        if memory_name is not None:
            return self.memory(memory_name)
        with self.records.database.read() as connection:
            located = self.records.locate(connection, id, dead=dead)
        readable = self._readable(seq for seq, _ in located)
        names = [name for seq, name in located if seq in readable]
        names += [
            name
            for name, memory in self.memories.items()
            if not isinstance(memory, DeclarativeMemory) and memory.has(id)
        ]
        if not names:
            raise NotFoundError(f"id: no cube {id!r} in any memory")
        if len(names) > 1:
            raise ArgumentError(f"id: {id!r} is in {', '.join(names)}; say memory_name")
        return self.memory(names[0])
