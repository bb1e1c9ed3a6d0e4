"""Access lists of cubes and sessions, and where they come from, whatever the kind of memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from memos.errors import NotFoundError
from memos.memories.declarative import DeclarativeMemory

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.rights import Actor

Origin = tuple[str | None, str | None, float, tuple[str, ...]]


def list_of(connection: Connection, memory: Any, id: str) -> dict[str, Any] | None:
    """The access list of a cube as it is stored; None: it inherits. Raises NotFoundError."""
    if not isinstance(memory, DeclarativeMemory):
        found: dict[str, Any] | None = memory.list_of(id)
        return found
    row = _row(connection, memory, id)
    return None if row.acl is None else json.loads(row.acl)


def rights_on(connection: Connection, memory: Any, id: str, actor: Actor) -> int:
    """Rights of a principal on a cube that it may read, as bits. Raises NotFoundError."""
    if not isinstance(memory, DeclarativeMemory):
        bits = actor.on_listed(connection, memory.name, memory.list_of(id))
        if not actor.reads(bits):
            raise NotFoundError(f"memory {memory.name!r}: no session {id!r}")
        return bits
    row = _row(connection, memory, id)
    if not actor.readable(connection, [row.seq]):
        raise NotFoundError(f"memory {memory.name!r}: no cube {id!r}")
    return actor.on_cube(connection, row.seq)


def origin_of(memory: Any, id: str, actor: Actor | None) -> Origin:
    """(source, creator, when it was made, ids of what it was made of) of a cube."""
    if not isinstance(memory, DeclarativeMemory):
        return None, None, float(memory.history(id)[0].at), ()
    from memos.records.rights_shown import hidden_ids

    with memory.records.database.read() as connection:
        row = _row(connection, memory, id)
        made_of = tuple(json.loads(row.derived_from)) if row.derived_from else ()
        if actor is not None:
            hidden = hidden_ids(connection, actor, ((None, one) for one in made_of))
            made_of = tuple(one for one in made_of if (None, one) not in hidden)
    return row.source, row.creator, float(row.created_at), made_of


def _row(connection: Connection, memory: DeclarativeMemory, id: str) -> Any:
    seq = memory.table.ids(connection, [id]).get(id)
    if seq is None:
        raise NotFoundError(f"memory {memory.name!r}: no cube {id!r}")
    return next(iter(memory.table.rows(connection, [seq])))
