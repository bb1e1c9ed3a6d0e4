"""What a memory does with versions of its cubes: go back, clone, branch, be as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.cube.fields import Body, to_fields
from memos.cube.merge import diff
from memos.errors import ArgumentError, NotFoundError
from memos.records.scope import DELETED

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory
    from memos.records.copies import Image
    from memos.records.history import Edge
    from memos.records.store import Records


CLONED_FROM = "cloned_from"  # from a clone to its original


@dataclass(frozen=True)
class Entry:
    """One version with its texts as they are stored."""

    number: int
    at: float
    digest: str
    parents: tuple[str, ...]
    author: str | None
    body: Body


def entries(connection: Connection, memory: DeclarativeMemory, seqs: Sequence[int]) -> Any:
    """Number of a cube -> its versions, oldest first."""
    from memos.records.history import edges_of_json, kept, parents_of

    def entry(row: Any, at: float, deleted: bool) -> Entry:
        body = Body(
            row.text,
            None if row.content is None else json.loads(row.content),
            json.loads(row.metadata),
            row.importance,
            row.parent_id,
            edges_of_json(row.edges),
            None if row.acl is None else json.loads(row.acl),
            deleted,
        )
        parents = tuple(digest.hex() for digest in parents_of(row.parents))
        return Entry(row.version, at, row.version_digest.hex(), parents, row.author, body)

    found: dict[int, list[Entry]] = {seq: [] for seq in seqs}
    for row in kept(connection, seqs):
        found[row.seq].append(entry(row, row.at, bool(row.deleted)))
    for row in memory.table.rows(connection, list(seqs)):
        found[row.seq].append(entry(row, row.updated_at, row.state == DELETED))
    return found


def one_history(memory: DeclarativeMemory, id: str) -> list[Entry]:
    """The versions of one cube. Raises NotFoundError."""
    with memory.records.database.read() as connection:
        seq = memory.table.ids(connection, [id]).get(id)
        if seq is None or seq not in memory.scope().readable_among(connection, [seq]):
            raise NotFoundError(f"memory {memory.name!r}: no cube {id!r}")
        found: list[Entry] = entries(connection, memory, [seq])[seq]
        return found


def version_of(history: Sequence[Entry], id: str, version: int) -> Entry:
    """The version of this number. Raises ArgumentError, which says which there are."""
    if type(version) is not int or not 1 <= version <= len(history):
        raise ArgumentError(
            f"version: a number from 1 to {len(history)} wanted for cube {id!r}, got {version!r}"
        )
    return history[version - 1]


def differences(
    memory: DeclarativeMemory, id: str, a: int, b: int | None
) -> dict[str, tuple[Any, Any]]:
    """Field -> (in version a, in version b) of all that differ; b None: the last version."""
    history = one_history(memory, id)
    old = version_of(history, id, a)
    new = version_of(history, id, len(history) if b is None else b)
    return diff(to_fields(old.body), to_fields(new.body))


def rollback(
    memory: DeclarativeMemory, id: str, version: int, author: str | None = None
) -> MemCube:
    """A new version with content, metadata, importance and relations of an old one.

    Where a cube stands in a tree and who may see it stay as they are.
    """
    wanted = version_of(one_history(memory, id), id, version)
    if wanted.body.is_deleted:
        raise ArgumentError(f"version: one of a living cube wanted, got {version}, the deletion")
    with memory.records.database.write() as connection:
        scope = memory.scope()
        seq = memory.table.seq(connection, id, scope)
        scope.check_cube(connection, "write", seq, id)
        memory.wake(connection, [seq], scope.now)
        write(connection, memory, seq, wanted.body, author=author, source=f"version {version}")
        return memory.table.one(connection, seq, scope)


def write(
    connection: Connection,
    memory: DeclarativeMemory,
    seq: int,
    body: Body,
    *,
    author: str | None = None,
    source: str | None = None,
    parents: bytes = b"",
    is_revived: bool = False,
) -> None:
    """Make this body the last version of a cube; parent and rights aside.

    ``is_revived``: it was deleted until now, and nothing is derived from its content.
    """
    from memos.memories.items import author_of
    from memos.records.scope import Scope
    from memos.records.writes import Change

    now = memory.now()
    old = memory.table.one(connection, seq, Scope({}, now))
    last: Entry = entries(connection, memory, [seq])[seq][-1]
    change = Change(author=author_of(author), source=source, parents=parents)
    is_new = is_revived or (body.text, body.content) != (last.body.text, last.body.content)
    if is_new:
        memory._restore(connection, old, body.text, body.content, change)
    change.metadata, change.importance, change.edges = body.metadata, body.importance, body.edges
    memory.table.update(connection, seq, change, now)
    if is_new:
        memory.records.outdate(connection, [seq], now)
    memory._after_update(connection, seq, old, change)
    if is_revived:
        row = next(memory.table.rows(connection, [seq]))
        memory._after_copy(connection, memory.table.all_ids(connection), [row])
    set_relations(connection, memory, seq, last.body.edges, body.edges)


def set_relations(
    connection: Connection,
    memory: DeclarativeMemory,
    seq: int,
    old: Sequence[Any],
    new: Sequence[Any],
) -> None:
    """Rows of relations as a version lists them; those to cubes that are gone are left out."""
    from memos.cube import Relation
    from memos.records.links import relate, unrelate

    kept = {tuple(edge[:3]) for edge in new}
    for edge in old:
        if tuple(edge[:3]) not in kept:
            for other in targets(connection, memory, edge):
                unrelate(connection, seq, edge[0], other)
    for edge in new:
        for other in targets(connection, memory, edge):
            relate(connection, seq, other, Relation(edge[0], edge[2], edge[4], edge[3]))


def targets(connection: Connection, memory: DeclarativeMemory, edge: Any) -> list[int]:
    """Number of the cube at the far end of an edge, if it is there."""
    wanted = edge[1] or memory.name
    found = memory.records.locate(connection, edge[2])
    return [seq for seq, name in found if name == wanted]


def clone(
    memory: DeclarativeMemory,
    id: str,
    into: DeclarativeMemory,
    new_id: str | None = None,
    author: str | None = None,
) -> MemCube:
    """A cube that begins with the last version of another one; see ``MOS.clone``."""
    from memos.cube.identity import new_id as unused_id
    from memos.memories.items import KEPT
    from memos.records.writes import New

    if memory.kind != into.kind:
        raise ArgumentError(f"into: a {memory.kind} memory wanted, got {into.name!r} ({into.kind})")
    with memory.records.database.write() as connection:
        seq = memory.table.seq(connection, id, memory.scope())
        last: Entry = entries(connection, memory, [seq])[seq][-1]
        body, name = last.body, new_id or unused_id()
        if into is not memory:  # what was the own memory is another one there
            body.parent_id = None
            body.edges = [(e[0], e[1] or memory.name, *e[2:]) for e in body.edges]
            body.edges = [(e[0], "" if e[1] == into.name else e[1], *e[2:]) for e in body.edges]
        home = "" if into is memory else memory.name
        body.edges = [*body.edges, (CLONED_FROM, home, id, 1.0, {})]
        kept = New(name, memory.kind, body.text, {}, 0.0, body.content)
        kept.parents, kept.edges = bytes.fromhex(last.digest), body.edges
        item = {
            "content": body.text if body.content is None else body.content,
            "metadata": body.metadata,
            "importance": body.importance,
            "id": name,
            "parent_id": body.parent_id,
            "creator": author,
            "acl": body.acl,
            "derived_from": [id],
            KEPT: kept,
        }
        into._share(memory, [body.content])
        into._store([{k: v for k, v in item.items() if v is not None}], {})
        seq = into.table.ids(connection, [name])[name]
        set_relations(connection, into, seq, (), body.edges)
        return into.table.one(connection, seq, into.scope())


# Branches, and what was.


def branch(memory: DeclarativeMemory, name: str, author: str | None = None) -> DeclarativeMemory:
    """A memory of this name whose cubes are those of another one, with their histories.

    Cost: a row for each cube and version; texts of old versions, KV blocks and adapters are not
    copied.
    """
    from memos.records import copies
    from memos.records.schema import branches

    records = memory.records
    new = twin(memory, name)
    if any(row["name"] == name for row in records.memories()):
        raise ArgumentError(f"name: one that no memory has wanted, got {name!r}")
    with records.database.write() as connection:
        try:
            new.bind(records)
            found = copies.images(connection, memory.table, memory.scope())
            fill(connection, memory, new, found, same_store=True)
            made = {"memory": new.table.memory, "source": memory.table.memory, "at": memory.now()}
            connection.execute(branches.insert(), made)
        except BaseException:
            records.forget(name)
            raise
    return new


def twin(memory: DeclarativeMemory, name: str) -> DeclarativeMemory:
    """A memory like this one, without cubes; its structure is kept in the store alone."""
    new = type(memory).restored(name, memory.description, memory.config())
    new.embedded.like(memory.embedded)
    new.on_duplicate, new._clock = memory.on_duplicate, memory._clock
    return new


def fill(
    connection: Connection,
    memory: DeclarativeMemory,
    new: DeclarativeMemory,
    found: list[Image],
    *,
    same_store: bool,
    reading: Connection | None = None,
) -> list[tuple[int, Edge]]:
    """Put images of a memory's cubes into a new one; returns relations to other memories.

    Args:
        connection: writes to the new one's store.
        reading:    of the old one's store, where that is another one.
    """
    from memos.records import copies

    others = copies.with_vectors(reading or connection, found)
    embed_all(memory, others)
    embedders = memory.records.copy_embedder
    embedders(reading or connection, memory.table.memory, connection, new.table.memory)
    copy = copies.put(connection, new.table, found)
    if same_store:
        copies.put_versions(connection, copy.seqs)
        new._share(memory, (content for _, content in memory.records.contents(memory.table.memory)))
    new._after_copy(connection, {row.id: row.seq for row in copy.rows}, copy.rows)
    if not same_store:
        return copy.pending
    ids = {
        (edge[1], edge[2]): seq
        for _, edge in copy.pending
        for seq, name in memory.records.locate(connection, edge[2])
        if name == edge[1]
    }
    return copies.link(connection, copy.pending, ids)


def embed_all(memory: DeclarativeMemory, found: Sequence[Image]) -> None:
    """Vectors of images of old versions: of texts that were embedded once, from the cache."""
    if not found or memory.embedded.search_or_none() is None:
        return
    if memory.kind == "vector":
        for image in found:
            content: Mapping[str, Any] = json.loads(image.row.content or "{}")
            image.vector = (memory._stored(content), None)  # type: ignore[attr-defined]
        return
    vectors = memory.embedded.encode([image.row.text for image in found])
    for image, vector in zip(found, vectors, strict=True):
        image.vector = vector


@dataclass
class Past:
    """Memories as they were at one time, in a store of their own; read when they are asked for.

    Args:
        at: seconds since 1970.
    """

    at: float
    records: Records
    memories: dict[str, DeclarativeMemory] = field(default_factory=dict)
    pending: list[tuple[int, Any]] = field(default_factory=list)

    def add(self, memory: DeclarativeMemory) -> DeclarativeMemory:
        """This memory as it was."""
        from memos.records import copies

        if memory.name in self.memories:
            return self.memories[memory.name]
        if memory.kind not in KINDS:
            raise ArgumentError(
                f"as_of: a memory of kind {', '.join(KINDS)} wanted, got {memory.name!r} of kind "
                f"{memory.kind}"
            )
        from memos.records.scope import as_owner

        new = twin(memory, memory.name)
        new._clock = lambda: self.at
        with as_owner():
            new.bind(self.records)
        with memory.records.database.read() as reading:
            found = copies.images(
                reading, memory.table, memory.scope(), self.at, is_tree=memory.kind == "tree"
            )
            with as_owner(), self.records.database.write() as connection:
                pending = fill(connection, memory, new, found, same_store=False, reading=reading)
                ids = {
                    (name, id): seq
                    for _, edge in [*self.pending, *pending]
                    for id in [edge[2]]
                    for seq, name in self.records.locate(connection, id)
                }
                self.pending = copies.link(connection, [*self.pending, *pending], ids)
        self.memories[memory.name] = new
        return new


KINDS = ("text", "tree", "vector", "graph")
