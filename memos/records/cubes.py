"""The cubes of one memory: rows, versions, facts, full text, vectors and relations.

Everything of one call is written in the caller's transaction: together or not at all. Nothing is
overwritten: an update or a deletion keeps what was there as a version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from memos.cube import Relation
from memos.cube.identity import canonical, version_digest
from memos.records.cube_reader import CubeReader
from memos.records.filters import facts_of
from memos.records.history import (
    Edge,
    digest_of,
    edges_json,
    keep,
    names_of,
    with_edge,
)
from memos.records.life_schema import cold
from memos.records.links import chunks, relate
from memos.records.schema import CubeRow, cubes, facts, vectors
from memos.records.scope import DELETED
from memos.records.states import BRANCH, CALL, CREATED, HOT
from memos.records.words import context_of
from memos.records.writes import Change, New, as_json, content_digest


class CubeTable(CubeReader):
    """The cubes of one memory, to be read and written."""

    def insert(self, connection: Connection, news: Sequence[New]) -> list[CubeRow]:
        """Store new cubes; returns their rows, in order."""
        if not news:
            return []
        change, first = self.database.allocate(connection, len(news))
        rows, keys, texts, edges, arrays = [], [], [], [], []
        names = self._names(connection, news, first)
        for seq, new in enumerate(news, first):
            row = self._new_row(new, seq, change, names)
            rows.append(row)
            keys += [(self.memory, *fact, seq) for fact in facts_of(new.metadata)]
            texts.append((seq, row.text, row.context))
            edges += [(seq, other, relation) for other, relation in new.relations]
            if new.vector is not None:
                arrays.append((seq, self.memory, new.vector, new.tokens, change))
        # sqlite3 takes plain tuples in two thirds of the time.
        connection.exec_driver_sql(_INSERT_CUBES, [tuple(row) for row in rows])
        if keys:
            connection.exec_driver_sql(_INSERT_FACTS, keys)
        self.fulltext.insert(connection, texts)
        if arrays:
            connection.exec_driver_sql(_INSERT_VECTORS, arrays)
        for seq, other, relation in edges:
            relate(connection, seq, other, relation)
        return rows

    def update(self, connection: Connection, seq: int, change: Change, at: float) -> None:
        """Make a new version of a cube; the old one stays in the history."""
        number, _ = self.database.allocate(connection)
        old = self._row(connection, seq)
        self.life.check_change(old)
        keep(connection, old)
        text = old.text if change.text is None else change.text
        content = old.content
        if change.text is not None or change.content is not None:
            content = as_json(change.content)
        metadata, context = old.metadata, old.context
        if change.metadata is not None:
            metadata = canonical(change.metadata, "metadata")
            context = context_of(change.metadata)
            self._change_facts(connection, seq, json.loads(old.metadata), change.metadata)
        context = context if change.context is None else change.context
        if (text, context) != (old.text, old.context) and old.state in HOT:
            self.fulltext.delete(connection, [(seq, old.text, old.context)])
            self.fulltext.insert(connection, [(seq, text, context)])
        parent, parent_id = old.parent, old.parent_id
        if change.move:
            parent = change.parent
            parent_id = None if parent is None else names_of(connection, [parent])[parent][1]
        new = {
            "text": text,
            "context": context,
            "content": content,
            "metadata": metadata,
            "parent": parent,
            "version": old.version + 1,
            "author": change.author,
            "updated_at": at,
            "change": number,
            "digest": content_digest(old.kind, text, content, metadata, parent),
            "parents": old.version_digest + change.parents,
        }
        if change.move:
            new |= {"position": change.position, "thread": change.thread}
        for name in ("importance", "expires_at", "source"):
            if (value := getattr(change, name)) is not None:
                new[name] = value
        if change.acl is not None:
            new["acl"] = as_json(change.acl)
        if change.edges is not None:
            new["edges"] = edges_json(change.edges)
        new["version_digest"] = digest_of(old, parent_id, **new)
        connection.execute(cubes.update().where(cubes.c.seq == seq).values(new))
        if change.vector is not None:
            connection.exec_driver_sql(
                _INSERT_VECTORS, [(seq, self.memory, change.vector, change.tokens, number)]
            )
        elif change.clear_vector:
            self._drop_vectors(connection, [seq], number)

    def relate(
        self, connection: Connection, seq: int, other: int, relation: Relation, change: Change,
        at: float,
    ) -> None:  # fmt: skip
        """Add an edge to another cube, of any memory; an equal one is replaced. A new version."""
        memory, id = self._own(names_of(connection, [other]))[other]
        edge: Edge = (relation.type, memory, id, relation.weight, relation.properties)
        old = self._row(connection, seq).edges
        edges = with_edge(old, edge)
        self.life.check_change(self._row(connection, seq))
        if edges != old:
            change.edges = json.loads(edges or "[]")
            self.update(connection, seq, change, at)
        relate(connection, seq, other, relation)

    def reword(self, connection: Connection, contexts: Mapping[int, str]) -> None:
        """Give cubes other words for full text; no new version, the content is what it was."""
        rows = [
            row
            for row in self.rows(connection, list(contexts))
            if row.state != DELETED and row.context != contexts[row.seq]
        ]
        if not rows:
            return
        number, _ = self.database.allocate(connection)
        found = [row for row in rows if row.state in HOT]
        self.fulltext.delete(connection, [(row.seq, row.text, row.context) for row in found])
        self.fulltext.insert(connection, [(row.seq, row.text, contexts[row.seq]) for row in found])
        connection.exec_driver_sql(
            "UPDATE cubes SET context = ?, change = ? WHERE seq = ?",
            [(contexts[row.seq], number, row.seq) for row in rows],
        )

    def delete(
        self, connection: Connection, seqs: Sequence[int], at: float, author: str | None = None,
        *, trigger: str = CALL, why: str = "",
    ) -> None:  # fmt: skip
        """State DELETED: gone from every index and query; the versions stay.

        Raises ArgumentError, with nothing deleted, where one of them is FROZEN.
        """
        if not seqs:
            return
        number, _ = self.database.allocate(connection)
        rows = list(self.rows(connection, seqs))
        self.life.check_gone(rows, trigger)
        moved = [(row.seq, row.state) for row in rows]
        self.life.record(connection, moved, DELETED, trigger, author, why, at)
        for row in rows:
            keep(connection, row)
            if row.state in HOT:
                self.fulltext.delete(connection, [(row.seq, row.text, row.context)])
            self._change_facts(connection, row.seq, json.loads(row.metadata), {})
            new = {
                "state": DELETED,
                "version": row.version + 1,
                "author": author,
                "updated_at": at,
                "change": number,
                "parents": row.version_digest,
            }
            new["version_digest"] = digest_of(row, row.parent_id, **new)
            connection.execute(cubes.update().where(cubes.c.seq == row.seq).values(new))
        self._drop_vectors(connection, seqs, number)
        for part in chunks(seqs):
            connection.execute(cold.delete().where(cold.c.seq.in_(part)))

    def revive(self, connection: Connection, seq: int, at: float, author: str | None) -> None:
        """A deleted cube lives again, as its last version says: a new version. A merge does this.

        Its vector is gone, and so is what a subclass of memories keeps beside it: give it content
        in the same transaction.
        """
        number, _ = self.database.allocate(connection)
        row = self._row(connection, seq)
        keep(connection, row)
        self.life.move(
            connection,
            [seq],
            CREATED,
            trigger=BRANCH,
            at=at,
            who=author,
            why="a branch has it",
        )
        self._change_facts(connection, seq, {}, json.loads(row.metadata))
        new = {
            "state": CREATED,
            "version": row.version + 1,
            "author": author,
            "updated_at": at,
            "expires_at": None,
            "change": number,
            "parents": row.version_digest,
        }
        new["version_digest"] = digest_of(row, row.parent_id, **new)
        connection.execute(cubes.update().where(cubes.c.seq == seq).values(new))

    def stay_deleted(
        self, connection: Connection, seq: int, at: float, author: str | None, parents: bytes
    ) -> None:
        """A new version of a deleted cube that is deleted still, after a merge with others."""
        number, _ = self.database.allocate(connection)
        row = self._row(connection, seq)
        keep(connection, row)
        new = {
            "version": row.version + 1,
            "author": author,
            "updated_at": at,
            "change": number,
            "parents": row.version_digest + parents,
        }
        new["version_digest"] = digest_of(row, row.parent_id, **new)
        connection.execute(cubes.update().where(cubes.c.seq == seq).values(new))

    # Inside.

    def _change_facts(
        self, connection: Connection, seq: int, old: Mapping[str, Any], new: Mapping[str, Any]
    ) -> None:
        before, after = facts_of(old), facts_of(new)
        gone = [(self.memory, *fact, seq) for fact in before - after]
        come = [(self.memory, *fact, seq) for fact in after - before]
        if gone:
            connection.exec_driver_sql(_DELETE_FACTS, gone)
        if come:
            connection.exec_driver_sql(_INSERT_FACTS, come)

    def _drop_vectors(self, connection: Connection, seqs: Sequence[int], change: int) -> None:
        gone = {"data": None, "tokens": None, "change": change}
        for part in chunks(seqs):
            connection.execute(vectors.update().where(vectors.c.seq.in_(part)).values(gone))

    def _names(
        self, connection: Connection, news: Sequence[New], first: int
    ) -> dict[int, tuple[str, str]]:
        """(memory, id) of the parents and related cubes of new ones; "" is this memory."""
        wanted = {new.parent for new in news if new.parent is not None}
        wanted.update(other for new in news for other, _ in new.relations)
        found = {seq: ("", news[seq - first].id) for seq in wanted if seq >= first}
        return found | self._own(names_of(connection, [seq for seq in wanted if seq < first]))

    def _own(self, names: Mapping[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
        """The names with "" for this memory: what it is called elsewhere changes no digest."""
        return {
            seq: ("" if memory == self.name else memory, id) for seq, (memory, id) in names.items()
        }

    def _new_row(
        self, new: New, seq: int, change: int, names: Mapping[int, tuple[str, str]]
    ) -> CubeRow:
        content, metadata = new.json
        derived = canonical(list(new.derived_from)) if new.derived_from else None
        acl = as_json(new.acl)
        edges = edges_json(new.edges)
        if new.relations:
            unique: dict[Any, Edge] = {}
            for other, edge in new.relations:
                unique[edge.type, other] = (edge.type, *names[other], edge.weight, edge.properties)
            edges = edges_json(list(unique.values()))
        return CubeRow(  # by place: names take four times as long
            seq,
            self.memory,
            new.id,
            new.kind,
            "CREATED",
            1,
            new.text,
            context_of(new.metadata) if new.context is None else new.context,
            content,
            metadata,
            new.importance,
            new.parent,
            None,
            new.thread,
            new.source,
            new.creator,
            derived,
            acl,
            new.author,
            new.at,
            new.at,
            new.expires_at,
            new.digest,
            edges,
            new.parents,
            version_digest(
                new.id,
                new.kind,
                new.text,
                content,
                metadata,
                None if new.parent is None else names[new.parent][1],
                edges,
                acl,
                new.importance,
                new.creator,
                derived,
                new.author,
                new.source,
                new.at,
                False,
                new.parents,
            ),
            change,
        )


def insert_into(table: Any, columns: Sequence[str], verb: str = "INSERT") -> str:
    """SQL that writes rows given by place."""
    marks = ", ".join("?" * len(columns))
    return f"{verb} INTO {table.name} ({', '.join(columns)}) VALUES ({marks})"


_INSERT_CUBES = insert_into(cubes, CubeRow._fields)
_INSERT_FACTS = insert_into(facts, [c.name for c in facts.columns])
_INSERT_VECTORS = insert_into(vectors, [c.name for c in vectors.columns], "INSERT OR REPLACE")
_DELETE_FACTS = (
    "DELETE FROM facts WHERE memory = ? AND key = ? AND type = ? AND number = ? AND string = ? "
    "AND seq = ?"
)
