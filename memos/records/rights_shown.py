"""What a principal is shown of a cube that it may read: no name of one that it may not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select

from memos.cube import MemCube, Version
from memos.cube.identity import canonical
from memos.records.history import edges_json, edges_of_json, relations_of_version
from memos.records.links import chunks
from memos.records.rights import BITS, Actor
from memos.records.schema import cubes, memories

_LISTS = BITS["share"] | BITS["admin"]  # who has one of these sees who else has rights
_STALE = "stale"  # metadata of what was learnt: ids of sources that changed


def shown(
    connection: Connection, actor: Actor, memory: str, found: Mapping[int, MemCube]
) -> dict[int, MemCube]:
    """Cubes that may be read, by number, as this principal sees them."""
    named = {id for cube in found.values() for id in _ids_in(cube)}
    hidden = hidden_ids(connection, actor, ((None, id) for id in named))
    result, sees_lists = dict(found), _lists(connection, actor, memory)
    for seq, cube in found.items():
        new: dict[str, Any] = {}
        if any((None, id) in hidden for id in cube.derived_from):
            left = [id for id in cube.derived_from if (None, id) not in hidden]
            new["derived_from"] = tuple(left)
        if _STALE in cube.metadata:
            new["metadata"] = _without_stale(cube.metadata, hidden)
        if cube.acl is not None and not sees_lists(cube.acl):
            new["acl"] = None
        if new:
            result[seq] = dataclasses.replace(cube, **new)
    return result


def shown_versions(
    connection: Connection,
    actor: Actor,
    number: int,
    memory: str,
    versions: Sequence[tuple[Version, str | None]],
) -> list[Version]:
    """The versions (and their relations as JSON) of a cube that this principal may read.

    What a version said under a list that keeps the principal out stays closed to it, and so does
    one that stood below a cube that it may not read.
    """
    names: set[tuple[str | None, str]] = {
        (memory, v.parent_id) for v, _ in versions if v.parent_id is not None
    }
    names |= {(m or memory, id) for _, edges in versions for _, m, id, *_ in edges_of_json(edges)}
    names |= {(None, id) for v, _ in versions for id in v.metadata.get(_STALE) or ()}
    hidden = hidden_ids(connection, actor, names)
    sees_lists = _lists(connection, actor, memory)
    admits = actor.admission(connection, number)
    result = []
    for version, edges in versions:
        if (memory, version.parent_id) in hidden:
            continue
        if not admits(version.acl, version.parent_id is None):
            continue
        kept = [e for e in edges_of_json(edges) if (e[1] or memory, e[2]) not in hidden]
        metadata = version.metadata
        if _STALE in metadata:
            metadata = _without_stale(metadata, hidden)
        result.append(
            dataclasses.replace(
                version,
                relations=relations_of_version(edges_json(kept)),
                metadata=metadata,
                acl=version.acl if sees_lists(version.acl) else None,
            )
        )
    return result


def shown_images(
    connection: Connection, actor: Actor, number: int, images: Sequence[Any]
) -> list[Any]:
    """Of images of readable cubes of a memory, as they were, those that a principal may see: with
    what they hung on, and without names of what it may not read."""
    admits = actor.admission(connection, number)
    kept = [
        image
        for image in images
        if admits(
            None if image.row.acl is None else json.loads(image.row.acl), image.parent_id is None
        )
    ]
    while True:
        ids = {image.row.id for image in kept}
        left = [image for image in kept if _needs(image) <= ids]
        if len(left) == len(kept):
            break
        kept = left
    made_of = {image.row.id: _made_of(image) for image in kept}
    wanted = ((None, id) for named in made_of.values() for id in named)
    hidden = hidden_ids(connection, actor, wanted)
    for image in kept:
        derived = [id for id in made_of[image.row.id] if (None, id) not in hidden]
        image.row = image.row._replace(
            acl=None, derived_from=canonical(derived) if derived else None
        )
    return kept


def _needs(image: Any) -> set[str]:
    """Ids of what a cube stands below, or between."""
    if image.row.kind == "relationship":
        content = json.loads(image.row.content)
        return {content["source_id"], content["target_id"]}
    return set() if image.parent_id is None else {image.parent_id}


def _made_of(image: Any) -> list[str]:
    return json.loads(image.row.derived_from) if image.row.derived_from else []


def hidden_ids(
    connection: Connection, actor: Actor, names: Iterable[tuple[str | None, str]]
) -> set[tuple[str | None, str]]:
    """Those of these (memory, or None for any; id) that name only cubes that may not be read.

    An id that names no cube is none of them.
    """
    wanted = list(set(names))
    found: dict[str, list[tuple[str, int]]] = {}
    for part in chunks([id for _, id in wanted]):
        for id, memory, seq in connection.execute(_NAMED, {"ids": part}):
            found.setdefault(id, []).append((memory, int(seq)))
    seqs = {seq for places in found.values() for _, seq in places}
    readable = actor.readable(connection, seqs)
    hidden = set()
    for memory, id in wanted:
        places = [seq for name, seq in found.get(id, ()) if memory in (None, name)]
        if places and readable.isdisjoint(places):
            hidden.add((memory, id))
    return hidden


def _lists(connection: Connection, actor: Actor, memory: str) -> Callable[[Any], bool]:
    """Whether the principal is shown this list: it has share or admin by it, or on the memory."""
    if actor.on_memory(connection, memory) & _LISTS:
        return lambda acl: True
    names = actor.names(connection)

    def sees(acl: Any) -> bool:
        return acl is not None and any(names & set(acl.get(r) or ()) for r in ("share", "admin"))

    return sees


def _ids_in(cube: MemCube) -> Iterable[str]:
    yield from cube.derived_from
    stale = cube.metadata.get(_STALE)
    if isinstance(stale, list):
        yield from (id for id in stale if isinstance(id, str))


def _without_stale(
    metadata: Mapping[str, Any], hidden: set[tuple[str | None, str]]
) -> dict[str, Any]:
    stale = metadata[_STALE]
    if not isinstance(stale, list):
        return dict(metadata)
    left = [id for id in stale if (None, id) not in hidden]
    return {**metadata, _STALE: left}


# From the memories on: the index of ids begins with the memory.
_NAMED = (
    select(cubes.c.id, memories.c.name, cubes.c.seq)
    .select_from(memories)
    .join(cubes, cubes.c.memory == memories.c.id)
    .where(cubes.c.id.in_(bindparam("ids", expanding=True)))
)
