"""Trees that came with a file: checked, and given the words of the headings above each cube."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select, text

from memos.errors import StoreError
from memos.records.cubes import CubeTable
from memos.records.links import chunks
from memos.records.schema import cubes
from memos.records.states import HOT
from memos.records.trees import TITLES, ancestors_of, context_below, title_of

_BATCH_BYTES = 4 << 20


def grow(connection: Connection, table: CubeTable, first: int) -> None:
    """Index the cubes of a tree memory from number ``first`` on, whose rows and parents are there.

    Raises StoreError: a cube stands above itself, lives longer than the one above it, or has not
    the id of its root as its thread.
    """
    named = {"memory": table.memory, "first": first}
    reached, there = connection.execute(_COUNTS, named).one()
    if reached != there:
        raise StoreError(f"memory {table.name!r}: a cube stands above itself")
    for statement, wanted in _CHECKS:
        row = connection.execute(statement, named).first()
        if row is not None:
            raise StoreError(f"memory {table.name!r}, cube {row[0][:100]!r}: {wanted}")
    last = first - 1
    while rows := connection.execute(_NEXT, {**named, "last": last}).all():
        last = rows[-1].seq
        _reword(connection, table, [row.seq for row in rows])


def _reword(connection: Connection, table: CubeTable, seqs: Sequence[int]) -> None:
    above = ancestors_of(connection, seqs, TITLES)
    titles = {
        int(row[0]): title_of(row[1])
        for part in chunks(sorted({seq for found in above.values() for seq in found}))
        for row in connection.execute(_TEXTS, {"seqs": part})
    }
    texts: list[tuple[int, str, str]] = []
    contexts: list[tuple[str, int]] = []
    size = 0
    for row in table.rows(connection, seqs):
        way = [titles[seq] for seq in reversed(above[row.seq])]
        context = context_below(json.loads(row.metadata), way)
        contexts.append((context, row.seq))
        if row.state in HOT:
            texts.append((row.seq, row.text, context))
        size += len(row.text)
        if size >= _BATCH_BYTES:
            _write(connection, table, texts, contexts)
            texts, contexts, size = [], [], 0
    _write(connection, table, texts, contexts)


def _write(
    connection: Connection, table: CubeTable, texts: Sequence[Any], contexts: Sequence[Any]
) -> None:
    if contexts:
        connection.exec_driver_sql(_SET_CONTEXT, list(contexts))
    table.fulltext.insert(connection, texts)


_SET_CONTEXT = "UPDATE cubes SET context = ? WHERE seq = ?"
_TEXTS = select(cubes.c.seq, cubes.c.text).where(cubes.c.seq.in_(bindparam("seqs", expanding=True)))
_NEXT = text(
    "SELECT seq FROM cubes WHERE memory + 0 = :memory AND seq > :last AND seq >= :first "
    "AND state <> 'DELETED' ORDER BY seq LIMIT 200"
)
# From roots, and from what hangs on cubes that were there, every new cube is reached once.
_COUNTS = text("""
WITH RECURSIVE down(seq) AS (
    SELECT seq FROM cubes
    WHERE memory + 0 = :memory AND seq >= :first AND (parent IS NULL OR parent < :first)
    UNION ALL
    SELECT below.seq FROM down JOIN cubes AS below ON below.parent = down.seq
    WHERE below.memory + 0 = :memory AND below.seq >= :first)
SELECT (SELECT count(*) FROM down),
    (SELECT count(*) FROM cubes WHERE memory + 0 = :memory AND seq >= :first)
""")
_CHILDREN = """
SELECT c.id FROM cubes AS c LEFT JOIN cubes AS p ON p.seq = c.parent
WHERE c.memory + 0 = :memory AND c.seq >= :first AND c.state <> 'DELETED' AND ({}) LIMIT 1
"""
_CHECKS = (
    (
        text(_CHILDREN.format("p.state = 'DELETED' OR p.memory <> c.memory")),
        "it stands below one that is deleted",
    ),
    (
        text(
            _CHILDREN.format(
                "p.expires_at IS NOT NULL AND (c.expires_at IS NULL OR c.expires_at > p.expires_at)"
            )
        ),
        "it lives longer than the cube above it",
    ),
    (
        text(
            _CHILDREN.format("c.thread IS NOT CASE WHEN p.seq IS NULL THEN c.id ELSE p.thread END")
        ),
        "the id of its root wanted as its thread",
    ),
)
