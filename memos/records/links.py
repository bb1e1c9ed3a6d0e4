"""Edges between cubes, and what stands beside a cube in its thread."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, and_, bindparam, or_, select, true

from memos.cube import Relation
from memos.cube.identity import canonical
from memos.records.schema import cubes, relations
from memos.records.scope import DELETED, Scope
from memos.records.states import FROZEN

if TYPE_CHECKING:
    from memos.records.rights import Actor

LEARNT_FROM = "learnt_from"  # from what was trained on a cube to that cube
_CHUNK = 500  # rows looked up in one statement


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The items in pieces that fit into one statement."""
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def relate(
    connection: Connection,
    source: int,
    target: int,
    relation: Relation,
    cube: int | None = None,
) -> None:
    """Add an edge between two cubes, of any memories; an equal one is replaced.

    ``cube`` is the number of a relationship that is a cube itself.
    """
    same = and_(
        relations.c.source == source,
        relations.c.type == relation.type,
        relations.c.target == target,
        relations.c.cube.is_(None) if cube is None else relations.c.cube == cube,
    )
    connection.execute(relations.delete().where(same))
    row = {
        "source": source,
        "type": relation.type,
        "target": target,
        "weight": relation.weight,
        "properties": canonical(relation.properties, "relation.properties"),
        "cube": cube,
    }
    connection.execute(relations.insert(), row)


def unrelate(connection: Connection, source: int, type: str, target: int) -> None:
    """Take away an edge between two cubes; relationships that are cubes stay."""
    edge = relations.c
    connection.execute(
        relations.delete().where(
            edge.source == source, edge.type == type, edge.target == target, edge.cube.is_(None)
        )
    )


def relations_of(
    connection: Connection, seqs: Sequence[int], scope: Scope
) -> dict[int, list[Relation]]:
    """Edges between these cubes and living ones that may be seen, of any memory, both ways;
    relationships that are cubes aside."""
    found: dict[int, list[Relation]] = {}
    for outgoing, statement in _RELATIONS.items():
        if scope.rights is not None:
            statement = scope.rights.restrict(statement)
        for part in chunks(seqs):
            for row in connection.execute(statement, {"seqs": part, "now": scope.now}):
                one = Relation(row[1], row[2], json.loads(row[3]), row[4], outgoing)
                found.setdefault(int(row[0]), []).append(one)
    return found


def _relations(near: Any, far: Any) -> Any:
    edge = relations.c
    return (
        select(near, edge.type, cubes.c.id, edge.properties, edge.weight)
        .join(cubes, cubes.c.seq == far)
        .where(
            near.in_(bindparam("seqs", expanding=True)),
            edge.cube.is_(None),
            cubes.c.state != DELETED,
            or_(cubes.c.expires_at.is_(None), cubes.c.expires_at > bindparam("now")),
        )
        .order_by(edge.id)
    )


_RELATIONS = {
    True: _relations(relations.c.source, relations.c.target),
    False: _relations(relations.c.target, relations.c.source),
}


def edges_of(
    connection: Connection, seqs: Sequence[int], scope: Scope | None = None
) -> list[tuple[int, str, int, float]]:
    """(source, type, target, weight) of every edge at one of these cubes.

    Args:
        scope: whose rights count: at both ends, and for a relationship that is a cube.
    """
    found: dict[int, Any] = {}
    for statement in _EDGES:
        for part in chunks(seqs):
            for row in connection.execute(statement, {"seqs": part}):
                found[row.id] = row
    if scope is not None and scope.rights is not None:
        cubes_of = {id: {row.source, row.target, row.cube} - {None} for id, row in found.items()}
        readable = scope.readable_among(connection, list(set().union(*cubes_of.values())))
        found = {id: row for id, row in found.items() if cubes_of[id] <= readable}
    rows = (found[id] for id in sorted(found))
    return [(row.source, row.type, row.target, row.weight) for row in rows]


_EDGES = [
    select(relations).where(end.in_(bindparam("seqs", expanding=True)))
    for end in (relations.c.source, relations.c.target)
]


def learners_of(
    connection: Connection, seqs: Sequence[int], now: float
) -> list[tuple[int, int, str]]:
    """(memory, seq of a living cube, id of a source) for what was learnt from these cubes."""
    return [
        (int(row[0]), int(row[1]), row[2])
        for part in chunks(seqs)
        for row in connection.execute(_LEARNERS, {"seqs": part, "now": now})
    ]


_source = cubes.alias("source")
_LEARNERS = (
    select(cubes.c.memory, cubes.c.seq, _source.c.id)
    .select_from(relations)
    .join(cubes, cubes.c.seq == relations.c.source)
    .join(_source, _source.c.seq == relations.c.target)
    .where(
        relations.c.target.in_(bindparam("seqs", expanding=True)),
        relations.c.type == LEARNT_FROM,
        cubes.c.state != DELETED,
        cubes.c.state != FROZEN,  # it cannot change
        or_(cubes.c.expires_at.is_(None), cubes.c.expires_at > bindparam("now")),
    )
    .order_by(cubes.c.seq, _source.c.id)
)


def neighbours_of(
    connection: Connection, seqs: Sequence[int], scope: Scope, reach: int
) -> dict[int, tuple[list[int], list[int]]]:
    """For each cube the ``reach`` ones before it (nearest first) and after it in its thread that
    the scope's principal may read.

    Cost: 2 * reach index lookups for each cube, in one statement for 500 of them.
    """
    rights = scope.rights
    if rights is None:
        statement = _neighbours(reach)
    else:
        made = functools.partial(_make_neighbours, reach, rights)
        statement = rights.built(("neighbours", reach), made)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for part in chunks(seqs):
        for row in connection.execute(statement, {"seqs": part, "now": scope.now}):
            before = [int(seq) for seq in row[1 : 1 + reach] if seq is not None]
            after = [int(seq) for seq in row[1 + reach :] if seq is not None]
            found[int(row[0])] = (before, after)
    return found


@functools.lru_cache(maxsize=16)
def _neighbours(reach: int) -> Any:
    return _make_neighbours(reach, None)


def _make_neighbours(reach: int, rights: Actor | None) -> Any:
    near = cubes.alias("near")
    columns = []
    for back in (True, False):
        for i in range(reach):
            name = f"{'before' if back else 'after'}{i}"
            other = cubes.alias(name)
            columns.append(
                select(other.c.seq)
                .where(
                    true() if rights is None else rights.clause(name),
                    other.c.memory == near.c.memory,
                    other.c.thread == near.c.thread,
                    other.c.seq < near.c.seq if back else other.c.seq > near.c.seq,
                    other.c.state != DELETED,
                    or_(other.c.expires_at.is_(None), other.c.expires_at > bindparam("now")),
                )
                .order_by(other.c.seq.desc() if back else other.c.seq)
                .limit(1)
                .offset(i)
                .scalar_subquery()
            )
    return select(near.c.seq, *columns).where(
        near.c.seq.in_(bindparam("seqs", expanding=True)), near.c.thread.is_not(None)
    )
