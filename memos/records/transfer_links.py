"""Relations of cubes that came with a file: made when both ends are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from memos.cube.identity import canonical
from memos.records.cubes import CubeTable
from memos.records.links import chunks
from memos.records.schema import cubes


def link(
    connection: Connection, table: CubeTable, first: int, names: Mapping[str, str] | None = None
) -> int:
    """Make the relations of the cubes of a memory from ``first`` on, after all memories came.

    Args:
        names: what memories of the file are called here, where that is something else.

    Returns:
        How many name a cube that is not in this store: they wait until it comes.
    """
    connection.exec_driver_sql(_MAKE_WAITING)
    last, waiting = first - 1, 0
    while rows := connection.exec_driver_sql(_EDGED, (table.memory, last)).all():
        last = rows[-1][0]
        found = [(seq, json.loads(text)) for seq, text in rows]
        waiting += _relate(connection, table.name, found, names or {})
    return waiting


def link_waiting(connection: Connection, table: CubeTable, first: int) -> int:
    """Make the relations that waited for cubes of a memory from ``first`` on; how many."""
    connection.exec_driver_sql(_MAKE_WAITING)
    rows = connection.exec_driver_sql(_ARRIVED, (table.memory, table.name, first)).all()
    for seq, source, name, found in rows:
        edges = [
            (source, type, seq, weight, canonical(properties))
            for type, memory, target, weight, properties in json.loads(found or "[]")
            if (memory or name, target) == (table.name, _id_of(connection, seq))
        ]
        if edges:
            connection.exec_driver_sql(_INSERT_RELATION, edges)
        connection.exec_driver_sql(_DROP_WAITING, (table.name, _id_of(connection, seq), source))
    return len(rows)


def _relate(
    connection: Connection, name: str, found: Sequence[tuple[int, Any]], names: Mapping[str, str]
) -> int:
    """Make the relations of cubes, (seq, edges), of a memory; returns how many have to wait."""
    wanted: dict[str, set[str]] = {}
    for _, edges in found:
        for _, memory, target, _, _ in edges:
            wanted.setdefault(names.get(memory, memory) or name, set()).add(target)
    seqs: dict[tuple[str, str], int] = {}
    for memory, ids in wanted.items():
        for part in chunks(sorted(ids)):
            statement = f"{_BY_NAME} ({', '.join('?' * len(part))})"
            rows = connection.exec_driver_sql(statement, (memory, *part))
            seqs |= {(memory, row[0]): int(row[1]) for row in rows}
    here, waiting = [], []
    for source, edges in found:
        for type, memory, target, weight, properties in edges:
            seq = seqs.get((names.get(memory, memory) or name, target))
            if seq is None:
                waiting.append((memory or name, target, source))
            else:
                here.append((source, type, seq, weight, canonical(properties)))
    if here:
        connection.exec_driver_sql(_INSERT_RELATION, here)
    if waiting:
        connection.exec_driver_sql(_INSERT_WAITING, waiting)
    return len(waiting)


def _id_of(connection: Connection, seq: int) -> str:
    return str(connection.execute(select(cubes.c.id).where(cubes.c.seq == seq)).scalar_one())


_INSERT_RELATION = (
    "INSERT INTO relations (source, type, target, weight, properties) VALUES (?, ?, ?, ?, ?)"
)
_EDGED = (
    "SELECT seq, edges FROM cubes WHERE memory + 0 = ? AND seq > ? AND edges IS NOT NULL "
    "ORDER BY seq LIMIT 200"
)
_BY_NAME = (
    "SELECT c.id, c.seq FROM cubes AS c JOIN memories AS m ON m.id = c.memory "
    "WHERE m.name = ? AND c.id IN "
)
# Relations whose other end was never here; what they say stands in the edges of their source.
_MAKE_WAITING = (
    "CREATE TABLE IF NOT EXISTS memcube_waiting(memory TEXT NOT NULL, target TEXT NOT NULL, "
    "source INTEGER NOT NULL, PRIMARY KEY (memory, target, source)) WITHOUT ROWID"
)
_INSERT_WAITING = "INSERT OR REPLACE INTO memcube_waiting VALUES (?, ?, ?)"
_DROP_WAITING = "DELETE FROM memcube_waiting WHERE memory = ? AND target = ? AND source = ?"
_ARRIVED = (
    "SELECT c.seq, s.seq, m.name, s.edges FROM memcube_waiting AS w "
    "JOIN cubes AS c ON c.memory = ? AND c.id = w.target "
    "JOIN cubes AS s ON s.seq = w.source JOIN memories AS m ON m.id = s.memory "
    "WHERE w.memory = ? AND c.seq >= ?"
)
