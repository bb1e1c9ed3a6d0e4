"""Versions of cubes, and branches of memories."""

from __future__ import annotations

import datetime
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube, Version
from memos.errors import ArgumentError
from memos.memories.declarative import DeclarativeMemory

if TYPE_CHECKING:
    from memos.cube.merge import Policy
    from memos.memories.merging import Merge
    from memos.mos import MOS

_PASTS = 4  # times that are kept


class Histories:
    """Part of MOS."""

    def history(self: Any, id: str, memory_name: str | None = None) -> list[Version]:
        """Every version of a cube, oldest first, with authors and sources."""
        found: list[Version] = self._holder(id, memory_name, dead=True).history(id)
        return found

    def diff(
        self: Any, id: str, a: int, b: int | None = None, memory_name: str | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """What differs between two versions of a cube: field -> (in a, in b).

        Args:
            a, b: numbers of versions; b None: the last one.

        Raises: NotFoundError; ArgumentError for a version that there is not.
        """
        from memos.memories.versions import differences

        return differences(self._versioned(id, memory_name), id, a, b)

    def rollback(
        self: Any,
        id: str,
        version: int,
        memory_name: str | None = None,
        *,
        author: str | None = None,
    ) -> MemCube:
        """Make an old version the last one again: a new version, which the history shows.

        Content, metadata, importance and relations come back; its place in a tree and the rights
        to it stay.

        Raises: NotFoundError; ArgumentError for a version that there is not, or a deletion.
        """
        from memos.memories.versions import rollback

        return rollback(self._versioned(id, memory_name), id, version, author)

    def clone(
        self: Any,
        id: str,
        memory_name: str | None = None,
        *,
        into: str | None = None,
        new_id: str | None = None,
        author: str | None = None,
    ) -> MemCube:
        """Another cube with the content, metadata and relations of this one, and its own history.

        Args:
            into:   name of a memory of the same kind; None: the cube's own.
            new_id: None: a UUIDv7.

        Its first version follows the last one of the original, which it names in derived_from.
        Texts of old versions, KV blocks and adapters are not copied.
        """
        from memos.memories.versions import clone

        memory = self._versioned(id, memory_name)
        other = memory if into is None else self._declarative(into)
        return clone(memory, id, other, new_id, author)

    def branch(self: Any, memory: str, name: str) -> DeclarativeMemory:
        """A new memory with the cubes of another one, to be changed apart and merged later.

        The cubes keep their ids and histories. Only rows are copied: texts of old versions, KV
        blocks and adapters stand once.

        Args:
            memory: the name of a memory of texts, trees, vectors, graphs or adapters.
            name:   of the branch.

        Raises: NotFoundError; ArgumentError where the name is taken.

        Cost: about 0.1 ms for each cube and version.
        """
        from memos.memories.versions import branch

        with self._lock:
            if name in self._memories:
                raise ArgumentError(f"name: one that no memory has wanted, got {name!r}")
            new = branch(self._declarative(memory), name)
            self._memories[name] = new
            return new

    def merge(
        self: Any,
        source: str,
        into: str,
        policy: Policy = None,
        *,
        author: str | None = None,
    ) -> Merge:
        """Bring what changed in one memory into another that it was branched from, or the reverse.

        Each cube is compared with the last version that both sides have in common: what one side
        changed is taken, field by field - content, each key of the metadata, each property of a
        node, each relation, the place in a tree. A field that both changed is a conflict.

        Args:
            source, into: names of two memories of one kind. ``into`` is changed.
            policy: for conflicts. None: they are listed, and nothing at all is written. "ours":
                ``into`` wins; "theirs"; "newest": the side whose cube was changed last; "both":
                ours, and a second cube named ID~DIGEST with theirs. A callable is given each
                ``Conflict`` and returns the value.

        Returns:
            What was added, changed and deleted, and the conflicts. Merging again does nothing.

        Raises: NotFoundError, ArgumentError.

        Rights are not merged. Written in one transaction.
        """
        from memos.memories.merging import merge_memories

        return merge_memories(self._declarative(source), self._declarative(into), policy, author)

    def at(self: Any, time: Any, memories: Any = None) -> MOS:
        """The memories as they were at a time: a MOS of its own, in this process.

        What is changed there changes nothing here.

        Args:
            time:     seconds since 1970, a datetime with a timezone, ISO 8601 text with one, or a
                Version: the moment it was made.
            memories: names; None: all of texts, trees, vectors and graphs.

        Raises: ArgumentError for another time or kind of memory; NotFoundError.

        Cost: memories are read whole and indexed again, about 0.2 ms a cube; the last four times
        are kept while nothing changes here.
        """
        from memos.memories.versions import KINDS

        at = seconds(time)
        if memories is None:
            memories = [n for n, m in self.memories.items() if getattr(m, "kind", None) in KINDS]
        with self._lock:
            if not hasattr(self, "_pasts"):
                self._pasts = _Pasts()
        past: MOS = self._pasts.mos(self, at, [self._declarative(name) for name in memories])
        return past

    # Inside.

    def _versioned(self: Any, id: str, memory_name: str | None) -> DeclarativeMemory:
        memory = self._holder(id, memory_name, dead=True)
        if not isinstance(memory, DeclarativeMemory):
            raise ArgumentError(
                f"memory {memory.name!r}: versions of a {memory.kind} memory are the tokens it "
                "holds, there is no other one to go to"
            )
        return memory


class _Pasts:
    """The times that were asked for last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def mos(self, mos: Any, at: float, memories: list[DeclarativeMemory]) -> Any:
        from memos.memories.versions import Past
        from memos.mos import MOS
        from memos.records.scope import acting

        # What a principal may read of it is another past.
        actor = acting.get()
        key = (at, mos.records.database.last_change(), None if actor is None else actor.key)
        with self._lock:
            if key not in self._kept:
                view = MOS(clock=lambda: at)
                self._kept[key] = (view, Past(at, view.records))
                while len(self._kept) > _PASTS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            view, past = self._kept[key]
            for memory in memories:
                view._memories[memory.name] = past.add(memory)
            return view


def seconds(time: Any) -> float:
    """A time as seconds since 1970. Raises ArgumentError for what is none."""
    if isinstance(time, Version):
        return time.at
    if isinstance(time, str):
        try:
            time = datetime.datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            raise ArgumentError(f"time: ISO 8601 wanted, got {time!r}") from None
    if isinstance(time, datetime.datetime):
        if time.tzinfo is None:
            raise ArgumentError(f"time: one with a timezone wanted, got {time.isoformat()}")
        return time.timestamp()
    if isinstance(time, int | float) and not isinstance(time, bool) and time >= 0:
        return float(time)
    raise ArgumentError(
        f"time: seconds since 1970, a datetime, ISO 8601 or a Version wanted, got {time!r}"
    )
