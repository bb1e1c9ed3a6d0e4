"""The structure of a graph memory in SQLite: labels, properties and ends, each with its index.

A node has a row of ``graph_facts`` for each label and each scalar in its properties; a relationship
has a row of ``relations`` whose ``cube`` is its own number. Every query goes through the scope:
what may not be seen is not there, neither as an end nor on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sqlalchemy import (
    Connection,
    Table,
    func,
    or_,
    select,
)

from memos.cube.identity import canonical
from memos.records import _graph_sql as sql
from memos.records._graph_sql import NODE, RELATIONSHIP
from memos.records.cubes import CubeTable
from memos.records.filters import facts_of
from memos.records.life_schema import cold
from memos.records.links import chunks
from memos.records.schema import cubes, relations
from memos.records.scope import DELETED, Scope
from memos.records.writes import New, content_digest

_PAGE = 256  # candidates read at once


class Edge(NamedTuple):
    """A relationship: its number, those of its ends, and how strong it is."""

    cube: int
    source: int
    type: str
    target: int
    weight: float

    def far(self, seq: int) -> int:
        """The other end."""
        return self.target if seq == self.source else self.source


@dataclass(frozen=True)
class Wanted:
    """Nodes with all of these labels and properties.

    A property matches its equal; a scalar also a list that holds it. 3 equals 3.0, but neither
    "3" nor true.
    """

    labels: tuple[str, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, content: Mapping[str, Any]) -> bool:
        have = content["properties"]
        return set(self.labels) <= set(labels_of(content)) and all(
            key in have and _holds(have[key], value) for key, value in self.properties.items()
        )


class Structure(Protocol):
    """Where the structure is asked: SQLite or a graph server. Both answer alike."""

    def find(
        self, connection: Connection, wanted: Wanted, scope: Scope, limit: int
    ) -> list[int]: ...

    def edges(
        self,
        connection: Connection,
        seqs: Sequence[int],
        types: Sequence[str] | None,
        direction: str,
        scope: Scope,
        limit: int,
        after: int = 0,
    ) -> list[Edge]: ...


def labels_of(content: Mapping[str, Any]) -> list[str]:
    """The labels of a node, the type of a relationship."""
    return [content["label"]] if "label" in content else list(content["labels"])


def weight_of(properties: Mapping[str, Any]) -> float:
    """The property ``weight`` where it is a number above 0, else 1."""
    weight = properties.get("weight")
    if isinstance(weight, int | float) and not isinstance(weight, bool) and weight > 0:
        try:
            return float(weight) if math.isfinite(weight) else 1.0
        except OverflowError:
            return 1.0
    return 1.0


@dataclass
class GraphNew(New):
    """A node or relationship to be stored.

    Args:
        is_named: the application gave its id.
        ends:     numbers of source and target; 0: new in the same transaction.
    """

    is_named: bool = False
    ends: tuple[int, int] = (0, 0)


class SqliteGraph:
    """Holds nothing: as thread-safe as the database."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    # Reading.

    def find(self, connection: Connection, wanted: Wanted, scope: Scope, limit: int) -> list[int]:
        """Numbers of the nodes that fit and may be seen, oldest first."""
        return self.pages(
            connection,
            lambda after, size: self._candidates(connection, wanted, scope, after, size),
            wanted,
            scope,
            limit,
        )

    def pages(
        self,
        connection: Connection,
        candidates: Callable[[int, int], Sequence[int]],
        wanted: Wanted,
        scope: Scope,
        limit: int,
    ) -> list[int]:
        """Of the candidates (after a number, so many; in order) those that do fit."""
        found: list[int] = []
        after = 0
        while len(found) < limit:
            size = max(_PAGE, min(limit, 4 * _PAGE))
            seqs = candidates(after, size)
            contents = self.contents(connection, seqs, scope)
            found += [s for s in seqs if s in contents and wanted.fits(contents[s])]
            if len(seqs) < size:
                break
            after = seqs[-1]
        return found[:limit]

    def contents(
        self, connection: Connection, seqs: Sequence[int], scope: Scope
    ) -> dict[int, dict[str, Any]]:
        """Contents of the nodes that may be seen."""
        statement = sql.filtered(sql.CONTENTS, scope, self.memory)
        named = self._named(scope)
        return {
            int(row[0]): json.loads(row[1])
            for part in chunks(seqs)
            for row in connection.execute(statement, {**named, "seqs": part})
        }

    def ends(self, connection: Connection, ids: Iterable[str], scope: Scope) -> dict[str, Any]:
        """id -> (number, content) of the nodes with these ids that may be seen."""
        statement = sql.filtered(sql.ENDS, scope, self.memory)
        named = {"memory": self.memory, "now": scope.now}
        return {
            row[0]: (int(row[1]), json.loads(row[2]))
            for part in chunks(list(ids))
            for row in connection.execute(statement, {**named, "ids": part})
        }

    def edges(
        self,
        connection: Connection,
        seqs: Sequence[int],
        types: Sequence[str] | None,
        direction: str,
        scope: Scope,
        limit: int,
        after: int = 0,
    ) -> list[Edge]:
        """Relationships at these nodes whose far end may be seen too, oldest first.

        Args:
            seqs:      numbers of nodes that may be seen.
            types:     of the relationships; None: all.
            direction: "out": the nodes are sources; "in": targets; "both".
            limit:     at most so many.
            after:     only relationships with a greater number.
        """
        found: dict[int, Edge] = {}
        for name in ("out", "in"):
            if direction not in (name, "both"):
                continue
            statement = sql.built(scope, self.memory, sql.edges_at, name, types is not None)
            named = {"after": after, "limit": limit, **self._named(scope)}
            if types is not None:
                named["types"] = list(types)
            for part in chunks(seqs):
                for row in connection.execute(statement, {**named, "seqs": part}):
                    found[row[0]] = Edge(*row)
        return [found[cube] for cube in sorted(found)[:limit]]

    def edges_among(
        self, connection: Connection, numbers: Sequence[int], scope: Scope
    ) -> list[Edge]:
        """The relationships with these numbers that may be seen with both ends."""
        statement = sql.built(scope, self.memory, sql.edges_numbered)
        named = self._named(scope)
        found = [
            Edge(*row)
            for part in chunks(numbers)
            for row in connection.execute(statement, {**named, "cubes": part})
        ]
        return sorted(found)

    def touching(self, connection: Connection, seq: int) -> list[int]:
        """Numbers of the relationships at a node, seen or not."""
        at = or_(relations.c.source == seq, relations.c.target == seq)
        mine = select(cubes.c.seq).where(
            cubes.c.seq == relations.c.cube, cubes.c.memory == self.memory, cubes.c.state != DELETED
        )
        rows = connection.execute(select(relations.c.cube).where(at, mine.exists()).distinct())
        return sorted(int(row[0]) for row in rows)

    def hanging_on(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        """What comes back with cubes: the ends of a relationship; of a node its relationships to
        nodes that are there or come back too."""
        edge, found = relations.c, set(seqs)
        for part in chunks(list(seqs)):
            ends = select(edge.source, edge.target).where(edge.cube.in_(part))
            for row in connection.execute(ends):
                found.update((int(row[0]), int(row[1])))
        nodes = sorted(found)
        for part in chunks(nodes):
            at = select(edge.cube, edge.source, edge.target).where(
                or_(edge.source.in_(part), edge.target.in_(part)), edge.cube.is_not(None)
            )
            rows = connection.execute(at).all()
            far = {int(seq) for row in rows for seq in row[1:]} - found
            here = far - set(self._cold(connection, sorted(far)))
            found.update(int(r[0]) for r in rows if {r[1], r[2]} <= here | set(nodes))
        return sorted(found)

    def stored(self, connection: Connection, seqs: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Contents of nodes and relationships, deleted ones too."""
        return {
            int(row[0]): json.loads(row[1])
            for part in chunks(seqs)
            for row in connection.execute(
                select(cubes.c.seq, cubes.c.content).where(cubes.c.seq.in_(part))
            )
        }

    def living(self, connection: Connection) -> list[tuple[int, str]]:
        """(number, kind) of every cube that is not deleted."""
        rows = connection.execute(
            select(cubes.c.seq, cubes.c.kind)
            .where(cubes.c.memory == self.memory, cubes.c.state != DELETED)
            .order_by(cubes.c.seq)
        )
        return [(int(row[0]), row[1]) for row in rows]

    # Writing.

    def insert_nodes(self, connection: Connection, nodes: Mapping[int, Mapping[str, Any]]) -> None:
        """Index new nodes: number -> content."""
        rows = [(self.memory, *fact, seq) for seq, c in nodes.items() for fact in node_facts(c)]
        if rows:
            connection.exec_driver_sql(sql.INSERT_FACT, rows)

    def change_node(
        self, connection: Connection, seq: int, old: Mapping[str, Any], new: Mapping[str, Any]
    ) -> None:
        """Index what an update changed."""
        before, after = node_facts(old), node_facts(new)
        for statement, facts in (
            (sql.DELETE_FACT, before - after),
            (sql.INSERT_FACT, after - before),
        ):
            if facts:
                connection.exec_driver_sql(
                    statement, [(self.memory, *fact, seq) for fact in sorted(facts)]
                )

    def insert_relationships(
        self, connection: Connection, new: Mapping[int, tuple[int, int, Mapping[str, Any]]]
    ) -> None:
        """Index new relationships: number -> (source, target, content)."""
        rows = [
            {
                "source": source,
                "type": labels_of(content)[0],
                "target": target,
                "weight": weight_of(content["properties"]),
                "properties": canonical(content["properties"], "properties"),
                "cube": cube,
            }
            for cube, (source, target, content) in new.items()
        ]
        if rows:
            connection.execute(relations.insert(), rows)

    def change_relationship(
        self, connection: Connection, cube: int, content: Mapping[str, Any]
    ) -> None:
        """Index the properties that an update gave."""
        new = {
            "weight": weight_of(content["properties"]),
            "properties": canonical(content["properties"], "properties"),
        }
        connection.execute(relations.update().where(relations.c.cube == cube).values(new))

    def delete(self, connection: Connection, gone: Mapping[int, Mapping[str, Any]]) -> None:
        """Forget deleted nodes and relationships: number -> content."""
        rows = [
            (self.memory, *fact, seq)
            for seq, content in gone.items()
            if content["type"] == NODE
            for fact in sorted(node_facts(content))
        ]
        if rows:
            connection.exec_driver_sql(sql.DELETE_FACT, rows)
        edges = [seq for seq, content in gone.items() if content["type"] == RELATIONSHIP]
        for part in chunks(edges):
            connection.execute(relations.delete().where(relations.c.cube.in_(part)))

    def retext(
        self,
        connection: Connection,
        table: CubeTable,
        texts: Mapping[int, tuple[str, bytes | None, bytes | None]],
    ) -> None:
        """Give cubes other texts, vectors and token vectors; no new version: the content stays."""
        rows = [row for row in table.rows(connection, list(texts)) if row.text != texts[row.seq][0]]
        if not rows:
            return
        change, _ = table.database.allocate(connection)
        table.fulltext.delete(connection, [(row.seq, row.text, row.context) for row in rows])
        table.fulltext.insert(
            connection, [(row.seq, texts[row.seq][0], row.context) for row in rows]
        )
        new, arrays = [], []
        for row in rows:
            text, vector, tokens = texts[row.seq]
            digest = content_digest(row.kind, text, row.content, row.metadata, row.parent)
            new.append((text, digest, change, row.seq))
            if vector is not None:
                arrays.append((row.seq, self.memory, vector, tokens, change))
        connection.exec_driver_sql(
            "UPDATE cubes SET text = ?, digest = ?, change = ? WHERE seq = ?", new
        )
        if arrays:
            connection.exec_driver_sql(
                "INSERT OR REPLACE INTO vectors(seq, memory, data, tokens, change) "
                "VALUES (?, ?, ?, ?, ?)",
                arrays,
            )

    # Inside.

    def _cold(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        return [
            int(row[0])
            for part in chunks(seqs)
            for row in connection.execute(select(cold.c.seq).where(cold.c.seq.in_(part)))
        ]

    def _candidates(
        self, connection: Connection, wanted: Wanted, scope: Scope, after: int, size: int
    ) -> list[int]:
        """Nodes with the facts that are wanted, in order; each still has to be compared."""
        facts = [
            fact
            for key, value in wanted.properties.items()
            for fact in sorted(facts_of({key: value}))
        ]
        facts += [("", sql.LABEL, 0, label) for label in wanted.labels]
        facts = facts or [("", sql.ANY, 0, "")]
        statement = sql.built(scope, self.memory, sql.candidates, len(facts))
        named = {"after": after, "limit": size, **self._named(scope)}
        for i, (key, kind, number, string) in enumerate(facts):
            named |= {f"key{i}": key, f"type{i}": kind, f"number{i}": number, f"string{i}": string}
        return [int(row[0]) for row in connection.execute(statement, named)]

    def _named(self, scope: Scope) -> dict[str, Any]:
        return {"memory": self.memory, "now": scope.now, "archived": scope.archived}


def prepare(connection: Connection) -> None:
    """Make the tables where they are not there."""
    sql.tables.create_all(connection)


def count(connection: Connection, table: Table, memory: int) -> int:
    """Rows of a memory."""
    rows = select(func.count()).select_from(table).where(table.c.memory == memory)
    return int(connection.execute(rows).scalar_one())


def node_facts(content: Mapping[str, Any]) -> set[tuple[str, int, int | float, str]]:
    """(key, type, number, string) of every label and property of a node, and that it is one."""
    labels = {("", sql.LABEL, 0, label) for label in labels_of(content)}
    return {("", sql.ANY, 0, ""), *labels, *facts_of(content["properties"])}


def _holds(have: Any, wanted: Any) -> bool:
    if same(have, wanted):
        return True
    return (
        isinstance(have, list)
        and not isinstance(wanted, list | dict)
        and any(same(item, wanted) for item in have)
    )


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values: true is no 1, but 1 is 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(type(a) is type(b) or (_number(a) and _number(b))) and bool(a == b)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)
