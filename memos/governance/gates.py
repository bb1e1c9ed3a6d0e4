"""What is asked before a principal's call of a verb that does not ask itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memos.errors import AccessError, ArgumentError, NotFoundError
from memos.memories.declarative import DeclarativeMemory
from memos.records.rights import ADMIN, BITS, EVERY_MEMORY

if TYPE_CHECKING:
    from memos.records.rights import Actor

Given = Mapping[str, Any]


def admin_of(*arguments: str) -> Callable[[Any, Actor, Given], None]:
    """Admin on the memories that these arguments name; on every one where one is None."""

    def gate(mos: Any, actor: Actor, given: Given) -> None:
        with actor.database.read() as connection:
            for argument in arguments:
                name = given.get(argument)
                if name is not None:
                    mos.memory(name)  # not there, to whom nothing of it may be seen
                actor.check_memory(connection, "admin", EVERY_MEMORY if name is None else name)

    return gate


def admin_of_cube(mos: Any, actor: Actor, given: Given) -> None:
    """Admin on the cube with this id, and on all that goes where it goes."""
    id, name = given.get("id"), given.get("memory_name")
    memory = mos._holder(id, name, dead=True)
    with actor.database.read() as connection:
        if not isinstance(memory, DeclarativeMemory):
            if not actor.on_listed(connection, memory.name, memory.list_of(id)) & ADMIN:
                raise AccessError(f"{actor.principal} has no right to admin session {id!r}")
            return
        seq = memory.table.ids(connection, [str(id)]).get(str(id))
        if seq is None or not actor.readable(connection, [seq]):
            raise NotFoundError(f"memory {memory.name!r}: no cube {id!r}")
        for one in memory._with_dependents(connection, seq):
            actor.check_cube(connection, "admin", one, str(id))


def admin_of_what_is_purged(mos: Any, actor: Actor, given: Given) -> None:
    """Admin on the memory, or on the cube, that is to be purged."""
    if given.get("memory") is not None:
        admin_of("memory")(mos, actor, given)
    elif given.get("id") is not None:
        admin_of_cube(mos, actor, given)


def readable_versions(*arguments: str) -> Callable[[Any, Actor, Given], None]:
    """The versions that these arguments number may be read."""

    def gate(mos: Any, actor: Actor, given: Given) -> None:
        memory = mos._holder(given.get("id"), given.get("memory_name"), dead=True)
        numbers = [version.number for version in memory.history(given.get("id"))]
        for argument in arguments:
            wanted = given.get(argument)
            if wanted is not None and wanted not in numbers:
                raise ArgumentError(
                    f"{argument}: one of the versions {numbers} wanted, got {wanted!r}"
                )

    return gate


def shown_difference(mos: Any, actor: Actor, given: Given, found: Any) -> Any:
    """A difference without lists of rights, and without relations to what may not be read."""
    from memos.records.rights_shown import hidden_ids

    memory = mos._holder(given.get("id"), given.get("memory_name"), dead=True)
    names = {key: key.split(".", 3) for key in found if key.startswith("relations.")}
    with actor.database.read() as connection:
        bits = actor.on_memory(connection, memory.name)
        hidden = hidden_ids(
            connection, actor, ((part[2] or memory.name, part[3]) for part in names.values())
        )
    result = dict(found)
    for key, part in names.items():
        if (part[2] or memory.name, part[3]) in hidden:
            del result[key]
    if not bits & (ADMIN | BITS["share"]):
        result.pop("acl", None)
    result.pop("metadata.stale", None)
    return result


def branched(mos: Any, actor: Actor, given: Given, made: Any) -> Any:
    """Who branches a memory has admin on the branch."""
    from memos.governance.views import MemoryView, as_actor

    with as_actor(None):
        mos.grant(actor.principal, "admin", memory=made.name)
    return MemoryView(made, actor, mos._audit)


def read_again(mos: Any, actor: Actor, given: Given, found: Any) -> Any:
    """Cubes that the owner was given, as the principal sees them."""
    if isinstance(found, list):
        return [read_again(mos, actor, given, one) for one in found]
    return mos.memory(found.memory).get(found.id)
