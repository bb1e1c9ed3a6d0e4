"""The queries of a TreeTextMemory: what stands above, beside and below a cube."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from memos.cube import Hit, MemCube
from memos.errors import ArgumentError
from memos.memories.declarative import DeclarativeMemory

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.scope import Scope

RELATIVES = ("ancestors", "siblings", "descendants")


class TreeQueries(DeclarativeMemory):
    """The half of a TreeTextMemory that reads. Thread-safe once registered."""

    def roots(self, limit: int | None = None) -> list[MemCube]:
        """Cubes with nothing above them, in order."""
        from sqlalchemy import select

        from memos.records.schema import cubes
        from memos.records.trees import ORDER

        scope = self.scope()
        with self.records.database.read() as connection:
            statement = select(cubes.c.seq).where(
                scope.clause(self.table.memory), cubes.c.parent.is_(None)
            )
            rows = connection.execute(statement.order_by(ORDER).limit(limit))
            return self._loaded(connection, [int(row[0]) for row in rows], scope)

    def children(self, memory_id: str) -> list[MemCube]:
        """The cubes directly below one, in order. Raises NotFoundError."""
        from memos.records.trees import children_of

        scope = self.scope()
        with self.records.database.read() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            return self._loaded(connection, children_of(connection, [seq])[seq], scope)

    def ancestors(self, memory_id: str) -> list[MemCube]:
        """The cubes above one, nearest first. Raises NotFoundError."""
        return self.relatives(memory_id, "ancestors")

    def path(self, memory_id: str) -> list[MemCube]:
        """From the root down to the cube itself. Raises NotFoundError."""
        from memos.records.trees import ancestors_of

        scope = self.scope()
        with self.records.database.read() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            above = ancestors_of(connection, [seq])[seq]
            return self._loaded(connection, [*reversed(above), seq], scope)

    def siblings(self, memory_id: str) -> list[MemCube]:
        """The other children of its parent, in order; none for a root. Raises NotFoundError."""
        return self.relatives(memory_id, "siblings")

    def descendants(self, memory_id: str, depth: int | None = None) -> list[MemCube]:
        """All cubes below one, in document order. Raises NotFoundError.

        Args:
            depth: levels; None: all.
        """
        from memos.records.trees import descendants_of

        if depth is not None and (not isinstance(depth, int) or depth < 0):
            raise ArgumentError(f"depth: a number of levels or None wanted, got {depth!r}")
        scope = self.scope()
        with self.records.database.read() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            below = [one for one, _ in descendants_of(connection, [seq], depth)[seq]]
            return self._loaded(connection, below, scope)

    def relatives(self, memory_id: str, which: str) -> list[MemCube]:
        """Its "ancestors" (nearest first), "siblings" or "descendants". Raises NotFoundError."""
        if which not in RELATIVES:
            raise ArgumentError(f"which: one of {', '.join(RELATIVES)} wanted, got {which!r}")
        scope = self.scope()
        with self.records.database.read() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            found = self.relatives_of(connection, [seq], scope, **{which: True})
        return list(found[seq][which])

    def with_relatives(
        self,
        hits: Sequence[Hit],
        *,
        ancestors: bool = False,
        siblings: bool = False,
        descendants: bool = False,
        limit: int | None = 100,
        scope: Scope | None = None,
    ) -> list[Hit]:
        """The hits of this memory with what stands around them; the others as they are.

        Args:
            limit: siblings, and descendants, of one hit at most.
            scope: whose rights count; None: everything that lives may be seen.
        """
        scope = self.scope() if scope is None else scope
        ids = [hit.id for hit in hits if hit.memory == self.name]
        with self.records.database.read() as connection:
            seqs = self.table.ids(connection, ids)
            readable = scope.readable_among(connection, list(seqs.values()))
            seqs = {id: seq for id, seq in seqs.items() if seq in readable}
            found = self.relatives_of(
                connection,
                list(seqs.values()),
                scope,
                ancestors=ancestors,
                siblings=siblings,
                descendants=descendants,
                limit=limit,
            )
        return [
            Hit.of(hit, **found[seqs[hit.id]])
            if hit.memory == self.name and hit.id in seqs
            else hit
            for hit in hits
        ]

    def relatives_of(
        self,
        connection: Connection,
        seqs: Sequence[int],
        scope: Scope,
        *,
        ancestors: bool = False,
        siblings: bool = False,
        descendants: bool = False,
        limit: int | None = None,
    ) -> dict[int, dict[str, tuple[MemCube, ...]]]:
        """What stands around many cubes, by number, under the names of ``Hit``'s fields.

        Args:
            scope: what may be seen of it. A query's filters choose hits, not what stands around
                them: pass a scope without filters.
            limit: siblings, and descendants, of one cube at most.

        Cost: one recursive statement for each kind and 500 cubes, and the cubes that are found.
        """
        from memos.records.trees import ancestors_of, children_of, descendants_of

        wanted: dict[int, dict[str, list[int]]] = {seq: {} for seq in seqs}
        if ancestors:
            for seq, above in ancestors_of(connection, seqs).items():
                wanted[seq]["ancestors"] = above
        if siblings:
            parents = {row.seq: row.parent for row in self.table.rows(connection, seqs)}
            beside = children_of(connection, [seq for seq in parents.values() if seq is not None])
            for seq, parent in parents.items():
                wanted[seq]["siblings"] = [one for one in beside.get(parent, ()) if one != seq]
        if descendants:
            for seq, below in descendants_of(connection, seqs).items():
                wanted[seq]["descendants"] = [other for other, _ in below]
        everything = {seq for lists in wanted.values() for found in lists.values() for seq in found}
        if scope.rights is not None:  # the limit is one of what may be read
            everything = scope.readable_among(connection, list(everything))
        chosen = {
            seq: {
                name: [other for other in found if other in everything][
                    : None if name == "ancestors" else limit
                ]
                for name, found in lists.items()
            }
            for seq, lists in wanted.items()
        }
        load = {seq for lists in chosen.values() for found in lists.values() for seq in found}
        cubes = self.table.load(connection, sorted(load), scope)
        return {
            seq: {
                name: tuple(cubes[other] for other in found if other in cubes)
                for name, found in lists.items()
            }
            for seq, lists in chosen.items()
        }

    def _loaded(self, connection: Connection, seqs: Iterable[int], scope: Scope) -> list[MemCube]:
        order = list(seqs)
        cubes = self.table.load(connection, order, scope)
        return [cubes[seq] for seq in order if seq in cubes]
