"""Moves that somebody asks for: archive, freeze, thaw, pin; and what is known of a cube's life."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from memos.cube import MemCube
from memos.errors import ArgumentError
from memos.records.life import Transition
from memos.records.scope import acting
from memos.records.states import ACTIVATED, ARCHIVED, CALL, COLD, FROZEN
from memos.records.uses import Use

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory


def who_acts(given: str | None = None) -> str | None:
    """Who a move is recorded for: who is named, else the principal of this thread."""
    actor = acting.get()
    return given if actor is None or given is not None else actor.principal


def archive(memory: DeclarativeMemory, id: str, *, who: str | None = None, why: str = "") -> int:
    """Take a cube, and all that hangs on it, out of the indexes.

    Returns:
        How many cubes moved; those that are archived already do not.

    Raises:
        NotFoundError: no such cube.
        ArgumentError: it, or a cube that hangs on it, is frozen or pinned; nothing moved then.
    """
    at = memory.scope().now
    with memory.records.database.write() as connection:
        seq = _writable(memory, connection, id)
        if id in memory.in_use():
            raise ArgumentError(f"memory {memory.name!r}, cube {id!r}: it is in use or pinned")
        states = memory.table.life.states(connection, memory._with_dependents(connection, seq))
        gone = [one for one, state in states.items() if one == seq or state not in COLD]
        moved = memory.table.life.move(
            connection, gone, ARCHIVED, trigger=CALL, at=at, who=who_acts(who), why=why
        )
        memory.left(connection, gone)
    return moved


def freeze(memory: DeclarativeMemory, id: str, *, who: str | None = None, why: str = "") -> MemCube:
    """From now on a cube cannot change: no update, deletion, relation or merge, and its time does
    not run out. An archived one comes back for it. Raises NotFoundError, ArgumentError."""
    return _moved(memory, id, FROZEN, who, why)


def thaw(memory: DeclarativeMemory, id: str, *, who: str | None = None, why: str = "") -> MemCube:
    """A frozen cube may change again. Raises NotFoundError; ArgumentError: it is not frozen."""
    with memory.records.database.write() as connection:
        seq = _writable(memory, connection, id)
        if memory.table.life.states(connection, [seq])[seq] != FROZEN:
            raise ArgumentError(f"memory {memory.name!r}, cube {id!r}: it is not FROZEN")
        return _moved(memory, id, ACTIVATED, who, why)


def pin(memory: DeclarativeMemory, id: str, pinned: bool = True) -> None:
    """While a cube is pinned nothing archives or merges it. Raises NotFoundError."""
    with memory.records.database.write() as connection:
        seq = _writable(memory, connection, id)
        memory.wake(connection, [seq], memory.scope().now)
        memory.table.life.pin(connection, seq, pinned)


def transitions(memory: DeclarativeMemory, id: str) -> list[Transition]:
    """Every move of a cube between states, oldest first; also of a deleted one.

    Raises NotFoundError.
    """
    from memos.errors import NotFoundError

    with memory.records.database.read() as connection:
        seq = memory.table.ids(connection, [id]).get(id)
        if seq is None:
            raise NotFoundError(f"memory {memory.name!r}: no cube {id!r}")
        memory.scope().check_cube(connection, "read", seq, id)
        return memory.table.life.history(connection, seq)


def use_of(memory: DeclarativeMemory, id: str) -> Use:
    """How often a cube was used, and when last. Raises NotFoundError."""
    if not memory.records.readonly:
        memory.records.uses.write()
    with memory.records.database.read() as connection:
        seq = memory.table.seq(connection, id, memory.scope())
        return memory.records.uses.of(connection, [seq]).get(seq, Use(0, 0.0, 0.0))


def _moved(memory: DeclarativeMemory, id: str, new: str, who: str | None, why: str) -> MemCube:
    scope = memory.scope()
    with memory.records.database.write() as connection:
        seq = _writable(memory, connection, id)
        if above := memory.table.life.are_cold(connection, memory._hang_on(connection, [seq])):
            memory.wake(connection, [one for one in above if one != seq], scope.now)
        memory.table.life.move(
            connection, [seq], new, trigger=CALL, at=scope.now, who=who_acts(who), why=why
        )
        # One that is thawed after its time is told once more.
        return memory.table.one(connection, seq, replace(scope, now=0.0))


def _writable(memory: DeclarativeMemory, connection: Connection, id: str) -> int:
    """Number of a cube that whoever acts may change."""
    scope = memory.scope()
    seq = memory.table.seq(connection, id, scope)
    scope.check_cube(connection, "write", seq, id)
    return seq


__all__ = ["archive", "freeze", "pin", "thaw", "transitions", "use_of", "who_acts"]
