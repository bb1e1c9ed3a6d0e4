"""What the structure of a graph is in SQLite: its table, and the statements that ask it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    ColumnElement,
    MetaData,
    Select,
    Table,
    and_,
    bindparam,
    exists,
    select,
    true,
)

from memos.records.schema import cubes, fact_columns, relations
from memos.records.scope import Scope, lives

NODE, RELATIONSHIP = "node", "relationship"

tables = MetaData()

graph_facts = Table("graph_facts", tables, *fact_columns(), sqlite_with_rowid=False)
LABEL, ANY = -1, -2  # in ``type``: a label in ``string``; every node

# Statements. Named values: memory, now and archived; seqs, ids, types, after and limit where they
# say so.

_LIVES = lives(bindparam("memory"), bindparam("now"), bindparam("archived"))
CONTENTS = select(cubes.c.seq, cubes.c.content).where(
    cubes.c.seq.in_(bindparam("seqs", expanding=True)), cubes.c.kind == NODE, _LIVES
)
ENDS = select(cubes.c.id, cubes.c.seq, cubes.c.content).where(
    cubes.c.memory == bindparam("memory"),
    cubes.c.id.in_(bindparam("ids", expanding=True)),
    cubes.c.kind == NODE,
    lives(bindparam("memory"), bindparam("now"), True),
)
INSERT_FACT = "INSERT OR IGNORE INTO graph_facts VALUES (?, ?, ?, ?, ?, ?)"
DELETE_FACT = (
    "DELETE FROM graph_facts WHERE memory = ? AND key = ? AND type = ? AND number = ? "
    "AND string = ? AND seq = ?"
)


def filtered(statement: Select[Any], scope: Scope, memory: int) -> Select[Any]:
    """A statement over cubes, for those that the scope lets through."""
    return scope.restrict(statement, memory)


def built(scope: Scope, memory: int, build: Callable[..., Select[Any]], *given: Any) -> Select[Any]:
    """What ``build`` makes of the scope; made once where it is open."""
    if scope.is_open:
        return _open(build, *given)
    return build(scope.restriction(memory), *given)


@functools.lru_cache(maxsize=64)
def _open(build: Callable[..., Select[Any]], *given: Any) -> Select[Any]:
    return build(true(), *given)


def _visible(column: ColumnElement[Any], filters: ColumnElement[bool]) -> ColumnElement[bool]:
    return select(cubes.c.seq).where(cubes.c.seq == column, _LIVES, filters).exists()


def _edges(filters: ColumnElement[bool], *seen: ColumnElement[Any]) -> Select[Any]:
    edge = relations.c
    return select(edge.cube, edge.source, edge.type, edge.target, edge.weight).where(
        edge.cube.is_not(None), *(_visible(column, filters) for column in seen)
    )


def edges_at(filters: ColumnElement[bool], direction: str, is_typed: bool) -> Select[Any]:
    """Relationships at nodes, whose far end may be seen."""
    near, far = relations.c.source, relations.c.target
    if direction == "in":
        near, far = far, near
    statement = _edges(filters, relations.c.cube, far).where(
        near.in_(bindparam("seqs", expanding=True)), relations.c.cube > bindparam("after")
    )
    if is_typed:
        statement = statement.where(relations.c.type.in_(bindparam("types", expanding=True)))
    return statement.order_by(relations.c.cube).limit(bindparam("limit"))


def edges_numbered(filters: ColumnElement[bool]) -> Select[Any]:
    """Relationships by their numbers, whose ends may both be seen."""
    edge = relations.c
    statement = _edges(filters, edge.cube, edge.source, edge.target)
    return statement.where(edge.cube.in_(bindparam("cubes", expanding=True)))


def candidates(filters: ColumnElement[bool], facts: int) -> Select[Any]:
    """Nodes with so many facts."""
    statement = select(graph_facts.c.seq).where(
        _fact(graph_facts, 0), graph_facts.c.seq > bindparam("after")
    )
    for i in range(1, facts):
        more = graph_facts.alias()
        same = more.c.seq == graph_facts.c.seq
        statement = statement.where(exists().where(_fact(more, i), same))
    statement = statement.where(_visible(graph_facts.c.seq, filters))
    return statement.order_by(graph_facts.c.seq).limit(bindparam("limit"))


def _fact(table: Any, i: int) -> ColumnElement[bool]:
    return and_(
        table.c.memory == bindparam("memory"),
        *(table.c[name] == bindparam(f"{name}{i}") for name in ("key", "type", "number", "string")),
    )
