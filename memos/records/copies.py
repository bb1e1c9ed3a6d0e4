"""Whole memories copied: a branch in the same store, or what a memory was at some time.

A copied cube keeps its id, its version and that version's digest: two memories with the same
digest have the same version, and a merge finds what both began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from memos.cube import Relation
from memos.records.cubes import CubeTable, insert_into
from memos.records.filters import facts_of
from memos.records.history import Edge, edges_of_json, kept
from memos.records.life_schema import cold
from memos.records.links import chunks, relate
from memos.records.schema import CubeRow, cubes, facts, vectors, versions
from memos.records.scope import DELETED, Scope
from memos.records.states import COLD
from memos.records.trees import TITLES, context_below, title_of
from memos.records.words import context_of
from memos.records.writes import content_digest

Vector = tuple[bytes | None, bytes | None]


@dataclass
class Image:
    """A cube as it is, or as it was.

    Args:
        row:    as in ``cubes`` of the memory that it is of.
        is_now: it is the last version.
    """

    row: CubeRow
    is_now: bool = True
    parent_id: str | None = None
    vector: Vector = (None, None)


@dataclass
class Copy:
    """Where the cubes of one copy stand.

    Args:
        seqs:    number before -> number now.
        rows:    as they were written.
        pending: (number, edge) of relations to cubes of other memories.
    """

    seqs: dict[int, int] = field(default_factory=dict)
    rows: list[CubeRow] = field(default_factory=list)
    pending: list[tuple[int, Edge]] = field(default_factory=list)


def images(
    connection: Connection,
    table: CubeTable,
    scope: Scope,
    at: float | None = None,
    *,
    is_tree: bool = False,
) -> list[Image]:
    """The cubes of a memory that live.

    Args:
        scope: what has expired by its time, and what its principal may not read, is left out.
        at:  the cubes as they were then. None: as they are.
        is_tree: headings and roots are looked up for cubes as they were.

    Cost: reads every row; with ``at`` also the old versions of cubes that have changed since.
    """
    seqs = [
        int(row[0])
        for row in connection.execute(
            select(cubes.c.seq).where(cubes.c.memory == table.memory).order_by(cubes.c.seq)
        )
    ]
    found: list[Image] = []
    for part in chunks(seqs):
        readable = scope.readable_among(connection, part)
        rows = [row for row in table.rows(connection, part) if row.seq in readable]
        changed = [row.seq for row in rows if at is not None and row.updated_at > at]
        old: dict[int, Any] = {}
        for version in kept(connection, changed):
            if at is not None and version.at <= at:
                old[version.seq] = version
        for row in rows:
            image = Image(CubeRow(*(getattr(row, n) for n in CubeRow._fields)), True, row.parent_id)
            if row.seq in changed:
                if row.seq not in old or old[row.seq].deleted:
                    continue
                image = _as_of(image.row, old[row.seq])
            elif row.state == DELETED:
                continue
            if image.row.expires_at is None or image.row.expires_at > (
                scope.now if at is None else at
            ):
                found.append(image)
    if scope.rights is not None:
        from memos.records.rights_shown import shown_images

        found = shown_images(connection, scope.rights, table.memory, found)
    if at is not None and is_tree:
        _place(found)
    return found


def with_vectors(connection: Connection, found: Sequence[Image]) -> list[Image]:
    """Fill in the stored vectors; returns those that are images of old versions."""
    by_seq = {image.row.seq: image for image in found if image.is_now}
    for part in chunks(list(by_seq)):
        columns = (vectors.c.seq, vectors.c.data, vectors.c.tokens)
        for seq, data, tokens in connection.execute(
            select(*columns).where(vectors.c.seq.in_(part))
        ):
            by_seq[seq].vector = (data, tokens)
    return [image for image in found if not image.is_now]


def put(connection: Connection, table: CubeTable, found: Sequence[Image]) -> Copy:
    """Write images into a memory that is empty, with all that is derived from them."""
    copy = Copy()
    if not found:
        return copy
    change, first = table.database.allocate(connection, len(found))
    copy.seqs = {image.row.seq: seq for seq, image in enumerate(found, first)}
    ids = {image.row.id: copy.seqs[image.row.seq] for image in found}
    keys, texts, arrays, colds = [], [], [], []
    for image in found:
        old = image.row
        seq = copy.seqs[old.seq]
        parent = None if old.parent is None else copy.seqs.get(old.parent)
        row = old._replace(
            seq=seq,
            memory=table.memory,
            parent=parent,
            # Among siblings they stay in order: all that is added later has a greater number.
            position=old.seq if old.position is None else old.position,
            digest=content_digest(old.kind, old.text, old.content, old.metadata, parent),
            change=change,
        )
        copy.rows.append(row)
        keys += [(table.memory, *fact, seq) for fact in facts_of(json.loads(row.metadata))]
        if row.state in COLD:
            colds.append({"seq": seq, "memory": table.memory, "change": change})
        else:
            texts.append((seq, row.text, row.context))
        data, tokens = image.vector
        if data is not None:
            arrays.append((seq, table.memory, data, tokens, change))
    connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")  # parents may come later
    connection.exec_driver_sql(_CUBES, [tuple(row) for row in copy.rows])
    for statement, rows in ((_FACTS, keys), (_VECTORS, arrays)):
        if rows:
            connection.exec_driver_sql(statement, rows)
    if colds:
        connection.execute(cold.insert(), colds)
    table.fulltext.insert(connection, texts)
    for row in copy.rows:
        for edge in edges_of_json(row.edges):
            if edge[1] == "" and edge[2] in ids:
                _relate(connection, row.seq, ids[edge[2]], edge)
            elif edge[1] != "":
                copy.pending.append((row.seq, edge))
    return copy


def put_versions(connection: Connection, seqs: Mapping[int, int]) -> None:
    """Copy the old versions of cubes of this store (number before -> number now)."""
    names = [column.name for column in versions.columns if column.name != "seq"]
    for part in chunks(list(seqs)):
        rows = connection.execute(select(versions).where(versions.c.seq.in_(part))).all()
        if rows:
            new = [(seqs[row.seq], *(getattr(row, name) for name in names)) for row in rows]
            connection.exec_driver_sql(insert_into(versions, ["seq", *names]), new)


def link(
    connection: Connection, pending: Sequence[tuple[int, Edge]], ids: Mapping[tuple[str, str], int]
) -> list[tuple[int, Edge]]:
    """Relate cubes to those of other memories ((memory, id) -> number); returns what is left."""
    left = []
    for seq, edge in pending:
        target = ids.get((edge[1], edge[2]))
        if target is None:
            left.append((seq, edge))
        else:
            _relate(connection, seq, target, edge)
    return left


def _relate(connection: Connection, seq: int, target: int, edge: Edge) -> None:
    relate(connection, seq, target, Relation(edge[0], edge[2], edge[4], edge[3]))


def _as_of(row: CubeRow, version: Any) -> Image:
    """A row as one of its versions was; where it stood is filled in by ``_place``."""
    old = row._replace(
        version=version.version,
        state=version.state,
        text=version.text,
        content=version.content,
        metadata=version.metadata,
        context=context_of(json.loads(version.metadata)),
        importance=version.importance,
        acl=version.acl,
        author=version.author,
        source=version.source,
        updated_at=version.at,
        expires_at=version.expires_at,
        edges=version.edges,
        parents=version.parents,
        version_digest=version.version_digest,
    )
    return Image(old, False, version.parent_id)


def _place(found: Sequence[Image]) -> None:
    """Fill in parents, roots and headings as of one time."""
    by_id = {image.row.id: image for image in found}
    for image in found:
        above = [by_id[id] for id in _ids_above(image, by_id)]
        titles = [title_of(up.row.text) for up in reversed(above[:TITLES])]
        image.row = image.row._replace(
            parent=above[0].row.seq if above else None,
            thread=above[-1].row.id if above else image.row.id,
            context=context_below(json.loads(image.row.metadata), titles),
        )


def _ids_above(image: Image, by_id: Mapping[str, Image]) -> list[str]:
    """Ids above a cube, nearest first."""
    found: list[str] = []
    above = image.parent_id
    while above is not None and above in by_id and above not in found:
        found.append(above)
        above = by_id[above].parent_id
    return found


_CUBES = insert_into(cubes, CubeRow._fields)
_FACTS = insert_into(facts, [column.name for column in facts.columns])
_VECTORS = insert_into(vectors, [column.name for column in vectors.columns])
