"""Stores of an earlier format become stores of this one, in one transaction."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, text

from memos.cube.identity import version_digest
from memos.records.history import Edge, body_digest, edges_json
from memos.records.schema import FORMAT, bodies, branches, versions
from memos.records.scope import DELETED

_BATCH = 1000  # cubes read at once


def upgrade(connection: Connection, found: int) -> bool:
    """Bring a store of format ``found`` to this one; False where nobody knows how.

    Cost: reads and writes every cube and version once. What is there stays as it is until the
    transaction of ``connection`` is committed.
    """
    if found != 1 or FORMAT != 2:
        return False
    for column in ("edges TEXT", "parents BLOB", "version_digest BLOB NOT NULL DEFAULT x''"):
        connection.execute(text(f"ALTER TABLE cubes ADD COLUMN {column}"))
    connection.execute(text("ALTER TABLE versions RENAME TO versions_1"))
    versions.create(connection)
    bodies.create(connection)
    branches.create(connection)
    last = -1
    while rows := connection.execute(_CUBES, {"last": last, "limit": _BATCH}).all():
        for row in rows:
            _upgrade(connection, row)
        last = rows[-1].seq
    connection.execute(text("DROP TABLE versions_1"))
    connection.execute(text("UPDATE store SET format = 2"))
    return True


def _upgrade(connection: Connection, row: Any) -> None:
    """The digests of one cube's versions: its relations are those of its last version."""
    edges = edges_json(_edges(connection, row.seq))
    parents: bytes | None = None
    for old in connection.execute(_OLD, {"seq": row.seq}):
        mark = version_digest(
            *(row.id, row.kind, old.text, old.content, old.metadata, row.parent_id, None),
            *(row.acl, old.importance, row.creator, row.derived_from, old.author, old.source),
            *(old.at, old.state == DELETED, parents),
        )
        body = body_digest(old.text, old.content)
        connection.execute(_BODY, {"digest": body, "text": old.text, "content": old.content})
        connection.execute(
            versions.insert(),
            {
                **{name: getattr(old, name) for name in _SAME},
                "deleted": int(old.state == DELETED),
                "body": body,
                "parent_id": row.parent_id,
                "acl": row.acl,
                "parents": parents,
                "version_digest": mark,
            },
        )
        parents = mark
    mark = version_digest(
        *(row.id, row.kind, row.text, row.content, row.metadata, row.parent_id, edges, row.acl),
        *(row.importance, row.creator, row.derived_from, row.author, row.source),
        *(row.updated_at, row.state == DELETED, parents),
    )
    new = {"seq": row.seq, "edges": edges, "parents": parents, "mark": mark}
    connection.execute(_UPDATE, new)


def _edges(connection: Connection, seq: int) -> list[Edge]:
    return [
        (row[0], row[1], row[2], row[3], json.loads(row[4]))
        for row in connection.execute(_EDGES, {"seq": seq})
    ]


_SAME = ["seq", "version", "state", "metadata", "importance", "author", "source", "at", "digest"]
_CUBES = text(
    "SELECT cubes.*, above.id AS parent_id FROM cubes LEFT JOIN cubes AS above "
    "ON above.seq = cubes.parent WHERE cubes.seq > :last ORDER BY cubes.seq LIMIT :limit"
)
_OLD = text("SELECT * FROM versions_1 WHERE seq = :seq ORDER BY version")
_BODY = text("INSERT OR IGNORE INTO bodies VALUES (:digest, :text, :content)")
_UPDATE = text(
    "UPDATE cubes SET edges = :edges, parents = :parents, version_digest = :mark WHERE seq = :seq"
)
_EDGES = text(
    "SELECT r.type, CASE t.memory WHEN s.memory THEN '' ELSE m.name END, t.id, r.weight, "
    "r.properties FROM relations AS r "
    "JOIN cubes AS t ON t.seq = r.target JOIN memories AS m ON m.id = t.memory "
    "JOIN cubes AS s ON s.seq = r.source "
    "WHERE r.source = :seq AND r.cube IS NULL"
)
