"""Versions of cubes: what a version is, how an old one is kept, and whether a history is whole.

A version's digest covers all of it and the digests of the versions it was made of, so that no
version of a history can be changed, taken out or put in without changing every later digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select

from memos.cube import Relation
from memos.cube.identity import canonical, version_digest
from memos.records.links import chunks
from memos.records.schema import bodies, cubes, memories, versions
from memos.records.scope import DELETED

SIZE = 32  # bytes of a version's digest
# type, memory ("": the cube's own), target, weight, properties
Edge = tuple[str, str, str, float, dict[str, Any]]


def edges_json(edges: Sequence[Edge]) -> str | None:
    """Outgoing relations as a version keeps them; None for none."""
    if not edges:
        return None
    return canonical(sorted(([*edge[:4], edge[4]] for edge in edges), key=canonical), "relations")


def edges_of_json(edges: str | None) -> list[Edge]:
    """What ``edges_json`` wrote."""
    return [] if edges is None else [tuple(edge) for edge in json.loads(edges)]


def with_edge(edges: str | None, edge: Edge) -> str | None:
    """The relations with one more; one of the same type to the same target is replaced."""
    kept = [one for one in edges_of_json(edges) if one[:3] != edge[:3]]
    return edges_json([*kept, edge])


def names_of(connection: Connection, seqs: Sequence[int]) -> dict[int, tuple[str, str]]:
    """(name of its memory, id) of cubes of any memories."""
    found: dict[int, tuple[str, str]] = {}
    statement = select(cubes.c.seq, memories.c.name, cubes.c.id).join(
        memories, memories.c.id == cubes.c.memory
    )
    for part in chunks(list(seqs)):
        for seq, memory, id in connection.execute(statement.where(cubes.c.seq.in_(part))):
            found[int(seq)] = (memory, id)
    return found


def digest_of(row: Any, parent_id: str | None, **changed: Any) -> bytes:
    """The digest of the version that a row of ``cubes`` is, with some columns changed."""

    def get(name: str) -> Any:
        return changed[name] if name in changed else getattr(row, name)

    return version_digest(
        get("id"),
        get("kind"),
        get("text"),
        get("content"),
        get("metadata"),
        parent_id,
        get("edges"),
        get("acl"),
        get("importance"),
        get("creator"),
        get("derived_from"),
        get("author"),
        get("source"),
        get("updated_at"),
        get("state") == DELETED,
        get("parents"),
    )


def body_digest(text: str, content: str | None) -> bytes:
    """Under which a text and its content stand in ``bodies``."""
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in (text, content):
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        whole.update(b"\0" if part is None else b"\1" + len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.digest()


def keep(connection: Connection, row: Any) -> None:
    """Copy a row of ``cubes``, with its parent_id, into the history."""
    body = body_digest(row.text, row.content)
    connection.exec_driver_sql(_INSERT_BODY, (body, row.text, row.content))
    connection.exec_driver_sql(
        _INSERT_VERSION,
        (
            *(row.seq, row.version, int(row.state == DELETED), row.state, body, row.metadata),
            *(row.importance, row.parent_id, row.edges, row.acl, row.author, row.source),
            *(row.updated_at, row.expires_at, row.digest, row.parents, row.version_digest),
        ),
    )


def kept(connection: Connection, seqs: Sequence[int]) -> Iterator[Row[Any]]:
    """The old versions of cubes with their texts, by cube, oldest first."""
    for part in chunks(list(seqs)):
        yield from connection.execute(_KEPT, {"seqs": part})


def relations_of_version(edges: str | None) -> tuple[Relation, ...]:
    """The outgoing relations that a version had."""
    return tuple(
        Relation(type, target, properties, weight)
        for type, _, target, weight, properties in edges_of_json(edges)
    )


def parents_of(parents: bytes | None) -> tuple[bytes, ...]:
    """The digests of a column of parents."""
    data = parents or b""
    return tuple(data[i : i + SIZE] for i in range(0, len(data), SIZE))


def faults(row: Any, parent_id: str | None, old: Sequence[Any]) -> Iterator[str]:
    """What is wrong with the history of one cube.

    Args:
        row: of ``cubes``.
        old: its rows of ``versions`` with their bodies, oldest first.
    """
    last: bytes | None = None
    for number, version in enumerate(old, 1):
        wanted = version_digest(
            *(row.id, row.kind, version.text, version.content, version.metadata),
            *(version.parent_id, version.edges, version.acl, version.importance),
            *(row.creator, row.derived_from, version.author, version.source),
            *(version.at, bool(version.deleted), version.parents),
        )
        if version.version != number:
            yield f"version {version.version} stands at {number}"
        if version.version_digest != wanted:
            yield f"version {version.version} is not what was stored: its digest differs"
        if last is not None and last not in parents_of(version.parents):
            yield f"version {version.version} does not follow the one before it"
        last = version.version_digest
    if row.version != len(old) + 1:
        yield f"{len(old)} old ones, but it is version {row.version}"
    if row.version_digest != digest_of(row, parent_id):
        yield "the last version is not what was stored: its digest differs"
    if last is not None and last not in parents_of(row.parents):
        yield "the last version does not follow the one before it"


_INSERT_BODY = "INSERT OR IGNORE INTO bodies(digest, text, content) VALUES (?, ?, ?)"
_COLUMNS = (
    *("seq", "version", "deleted", "state", "body", "metadata", "importance", "parent_id"),
    *("edges", "acl", "author", "source", "at", "expires_at", "digest", "parents"),
    "version_digest",
)
_INSERT_VERSION = (
    f"INSERT INTO versions({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
)
_KEPT = (
    select(versions, bodies.c.text, bodies.c.content)
    .outerjoin(bodies, bodies.c.digest == versions.c.body)
    .where(versions.c.seq.in_(bindparam("seqs", expanding=True)))
    .order_by(versions.c.seq, versions.c.version)
)
