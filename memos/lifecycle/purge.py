"""Purges: forgetting for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError, NotFoundError
from memos.lifecycle.moves import who_acts
from memos.records.states import CALL, DELETED, FROZEN

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory


@dataclass(frozen=True)
class Purged:
    """What a purge did.

    Args:
        memory:  its name.
        cubes:   how many are tombstones now: the one that was named and all that hung on it.
        derived: (memory, id) of living cubes that were distilled, merged, learnt or cloned from
            them, or stand in a branch, and may still say what they said: purge those too where
            that matters.
    """

    memory: str
    cubes: int
    derived: tuple[tuple[str, str], ...] = ()


def purge(
    memory: DeclarativeMemory, ids: Sequence[str] | None, *, who: str | None = None
) -> Purged:
    """Remove everything that cubes said: contents, versions, words, vectors, files; in one step.

    Args:
        ids: deleted ones too; None: all cubes of the memory.

    Raises:
        NotFoundError: no such cube.
        ArgumentError: one of them, or of what hangs on them, is frozen; nothing is purged then.
        StoreError:    another process reads for long: purged, but the write-ahead log keeps what
            was there until the next purge.

    Cost: rewrites the full text of the memory, and makes its vector index anew when it is asked.
    """
    from memos.records import purge as records

    scope = memory.scope()
    database = memory.records.database
    mirrored = getattr(memory, "storage_backend", "sqlite") != "sqlite"
    if mirrored:  # a server is told what to remove while that is still known
        with database.write() as connection:
            seqs = _named(memory, connection, ids)
            _delete(memory, connection, records.all_below(connection, memory.table, seqs), who)
        memory.synchronise()  # type: ignore[attr-defined]
    with database.write() as connection:
        named = _named(memory, connection, ids)
        scope.check_memory(connection, "admin", memory.name)
        seqs = records.all_below(connection, memory.table, named)
        derived = [
            *records.derived_from(connection, seqs),
            *records.in_branches(connection, memory.table.memory, seqs),
        ]
        contents = list(records.contents_of(connection, seqs))
        memory.embedded.forget(records.texts_of(connection, seqs))
        _delete(memory, connection, seqs, who)
        records.scrub(connection, memory.table, seqs)
        memory.records.hebbian.forget(connection, seqs)
        database.destroy_keys(connection, seqs)
        records.forget_units(connection)

    def clean_up() -> None:
        memory.purged(contents)
        records.empty_log(database)

    database.after_commit(clean_up)
    return Purged(memory.name, len(seqs), tuple(derived))


def _named(
    memory: DeclarativeMemory, connection: Connection, ids: Sequence[str] | None
) -> list[int]:
    if ids is None:
        from sqlalchemy import select

        from memos.records.schema import cubes

        rows = connection.execute(select(cubes.c.seq).where(cubes.c.memory == memory.table.memory))
        return [int(row[0]) for row in rows]
    found = memory.table.ids(connection, list(ids))
    for id in ids:
        if id not in found:
            raise NotFoundError(f"memory {memory.name!r}: no cube {id!r}")
    return list(found.values())


def _delete(
    memory: DeclarativeMemory, connection: Connection, seqs: Sequence[int], who: str | None
) -> None:
    states = memory.table.life.states(connection, seqs)
    if frozen := [seq for seq, state in states.items() if state == FROZEN]:
        id = next(memory.table.rows(connection, frozen[:1])).id
        raise ArgumentError(f"memory {memory.name!r}, cube {id!r}: FROZEN; thaw it first")
    living = [seq for seq, state in states.items() if state != DELETED]
    memory._delete(connection, living, memory.scope().now, who_acts(who), trigger=CALL, why="purge")


def purge_sessions(memory: Any, ids: Sequence[str] | None) -> Purged:
    """As ``purge``, of a KVCacheMemory: sessions with their blocks, whose bytes are overwritten."""
    names = memory.sessions() if ids is None else list(ids)
    for name in names:
        memory.delete(name)
    if ids is None:
        memory.clear()
    return Purged(memory.name, len(names))
