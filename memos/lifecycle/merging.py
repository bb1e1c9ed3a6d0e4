"""Merging near-duplicates into one cube, which keeps its sources, and taking that back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube, Relation
from memos.errors import ArgumentError
from memos.lifecycle.duplicates import check_kind, same_circumstances, same_statement
from memos.lifecycle.moves import who_acts
from memos.records.states import COLD, FROZEN, MERGE, MERGED, UNDO

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory

MERGED_FROM = "merged_from"  # relation from the cube that was made to each of its sources


@dataclass(frozen=True)
class _Source:
    seq: int
    cube: MemCube


def merge(
    memory: DeclarativeMemory,
    connection: Connection,
    ids: Sequence[str],
    *,
    why: str | None = None,
    similarity: float | None = None,
    who: str | None = None,
) -> MemCube | None:
    """Make one cube of several that say the same; they become MERGED, out of the indexes.

    The new cube has the longest of their texts, the metadata of the newest, the greatest
    importance, and a relation "merged_from" to each, which says why.

    Args:
        ids: of cubes in the indexes.
        why: None: they have to say the same by the rules; those that do not, any more, are left
            out. Else: because the caller says so.

    Returns:
        The cube; None where fewer than two are left that may be merged.
    """
    check_kind(memory)
    scope = memory.scope()
    table = memory.table
    seqs = [table.seq(connection, id, scope) for id in dict.fromkeys(ids)]
    cubes = table.load(connection, seqs, scope)
    pinned = table.life.pinned(connection)
    sources = [
        _Source(seq, cubes[seq])
        for seq in sorted(cubes)
        if cubes[seq].state not in (*COLD, FROZEN) and seq not in pinned
    ]
    if why is None:
        sources = _alike(sources)
    if len(sources) > 1:
        equal = _equal(memory, connection, sources)
        if any(one.cube.state == FROZEN for one in equal):
            return None  # what they say is there, and cannot be merged
        sources += equal
    if len(sources) < 2:
        return None
    reason = why or same_statement(str(sources[0].cube.content), str(sources[1].cube.content))
    for source in sources:
        scope.check_cube(connection, "write", source.seq, source.cube.id)
    content, newest = _said(sources)
    properties: dict[str, Any] = {"why": reason}
    if similarity is not None:
        properties["similarity"] = similarity
    relations = [Relation(MERGED_FROM, one.cube.id, properties) for one in sources]
    names = {one.cube.id for one in sources}
    for one in sources:
        relations += [
            edge
            for edge in one.cube.relations
            if edge.outgoing and edge.target not in names and edge.type != MERGED_FROM
        ]
    unique = {(edge.type, edge.target): edge for edge in reversed(relations)}
    # First the sources leave: what is equal to one of them is not taken for that one.
    table.life.move(
        connection, [one.seq for one in sources], MERGED, trigger=MERGE, at=scope.now,
        who=who_acts(who), why=str(reason),
    )  # fmt: skip
    made = memory.add(
        content,
        newest.metadata,
        importance=max(one.cube.importance for one in sources),
        relations=list(reversed(unique.values())),
        derived_from=[one.cube.id for one in sources],
        acl=newest.acl,
        source="merge",
        creator=who_acts(who) or "memos",
    )
    return made


def undo_merge(memory: DeclarativeMemory, id: str, *, who: str | None = None) -> list[MemCube]:
    """Take a merge back: the sources are as they were, the merged cube is deleted.

    Returns:
        The sources.

    Raises:
        NotFoundError: no such cube.
        ArgumentError: it was not made by a merge, has changed since, or a source has moved on.
    """
    scope, table = memory.scope(), memory.table
    with memory.records.database.write() as connection:
        seq = table.seq(connection, id, scope)
        scope.check_cube(connection, "write", seq, id)
        cube = table.one(connection, seq, scope)
        sources = sources_of(cube)
        if not sources:
            raise ArgumentError(f"memory {memory.name!r}, cube {id!r}: made by a merge wanted")
        if cube.versions > 1:
            raise ArgumentError(
                f"memory {memory.name!r}, cube {id!r}: it has changed since the merge; what it "
                "says now would be lost"
            )
        seqs = table.ids(connection, sources)
        states = table.life.states(connection, seqs.values())
        for source in sources:
            state = states.get(seqs.get(source, -1))
            if state != MERGED:
                raise ArgumentError(
                    f"memory {memory.name!r}, cube {source!r}: MERGED wanted, it is {state}"
                )
        memory._delete(
            connection, [seq], scope.now, who_acts(who), trigger=UNDO, why="the merge is undone"
        )
        before = table.life.last(connection, list(seqs.values()), MERGED)
        for state in sorted(set(before.values())):
            back = [one for one, old in before.items() if old == state]
            table.life.move(
                connection, back, state, trigger=UNDO, at=scope.now, who=who_acts(who),
                why=f"the merge into {id} is undone",
            )  # fmt: skip
        found = table.load(connection, sorted(seqs.values()), scope)
        return [found[one] for one in sorted(found)]


def sources_of(cube: MemCube) -> list[str]:
    """Ids of the cubes that one was merged from."""
    return [edge.target for edge in cube.relations if edge.outgoing and edge.type == MERGED_FROM]


def _said(sources: Sequence[_Source]) -> tuple[str, MemCube]:
    """The text of the merged cube, and the cube that gives its metadata."""
    longest = max(sources, key=lambda one: (len(str(one.cube.content)), one.seq))
    newest = max(sources, key=lambda one: (one.cube.updated_at, one.seq))
    return str(longest.cube.content), newest.cube


def _equal(
    memory: DeclarativeMemory, connection: Connection, sources: Sequence[_Source]
) -> list[_Source]:
    """A cube in the memory that is what the merged one would be: it is merged as well."""
    content, newest = _said(sources)
    scope = memory.scope()
    new = memory._new({"content": content, "metadata": newest.metadata}, scope.now)
    known = memory.table.duplicates(connection, [new.digest], scope)
    others = set(known.values()) - {one.seq for one in sources}
    memory.wake(connection, sorted(others), scope.now)
    found = memory.table.load(connection, sorted(others), scope)
    return [_Source(seq, cube) for seq, cube in found.items()]


def _alike(sources: Sequence[_Source]) -> list[_Source]:
    """Those that say the same as the first one that any other says."""
    for i, first in enumerate(sources):
        same = [
            other
            for other in sources[i + 1 :]
            if same_circumstances(first.cube, other.cube)
            and same_statement(str(first.cube.content), str(other.cube.content)) is not None
        ]
        if same:
            return [first, *same]
    return []
