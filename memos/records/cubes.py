"""The cubes of one memory: rows, versions, facts, full text, vectors and relations.

Everything of one call is written in the caller's transaction: together or not at all. Nothing is
overwritten: an update or a deletion keeps what was there as a version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, select

from memos.cube import MemCube, Relation, Version
from memos.cube.identity import canonical, version_digest
from memos.errors import NotFoundError, StoreError
from memos.records.database import Database
from memos.records.filters import facts_of
from memos.records.fulltext import FullText
from memos.records.history import (
    Edge,
    digest_of,
    edges_json,
    keep,
    kept,
    names_of,
    parents_of,
    relations_of_version,
    with_edge,
)
from memos.records.life import Life
from memos.records.life_schema import cold
from memos.records.links import chunks, relate, relations_of
from memos.records.schema import CubeRow, cubes, facts, vectors
from memos.records.scope import DELETED, Scope, lives
from memos.records.states import CALL, CREATED, FROZEN, HOT, MERGE, MERGED
from memos.records.words import context_of
from memos.records.writes import Change, New, as_json, content_digest, is_whole


class CubeTable:
    """The cubes of one memory. Holds no state of its own: as thread-safe as the database."""

    def __init__(self, database: Database, memory: int, name: str) -> None:
        self.database, self.memory, self.name = database, memory, name
        self.fulltext = FullText(memory)
        self.life = Life(database, memory, name, self.fulltext)
        self.shown: Callable[[Any], Any] = lambda content: content  # stored content as it is read

    # Writing.

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

        Its vector is gone: give it content in the same transaction.
        """
        number, _ = self.database.allocate(connection)
        row = self._row(connection, seq)
        keep(connection, row)
        self.life.record(connection, [(seq, row.state)], CREATED, MERGE, author, "merge", at)
        self.fulltext.insert(connection, [(seq, row.text, row.context)])
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

    # Reading.

    def find(self, connection: Connection, id: str, scope: Scope) -> int | None:
        """Number of the cube with this id, if it may be seen; by its id an archived one may be."""
        statement = scope.restrict(_FIND, self.memory)
        named = {"memory": self.memory, "now": scope.now, "id": id}
        found = connection.execute(statement, named).scalar()
        return None if found is None else int(found)

    def seq(self, connection: Connection, id: str, scope: Scope) -> int:
        """Number of the cube with this id. Raises NotFoundError."""
        found = self.find(connection, id, scope)
        if found is None:
            raise NotFoundError(f"memory {self.name!r}: no cube {id!r}")
        return found

    def load(self, connection: Connection, seqs: Iterable[int], scope: Scope) -> dict[int, MemCube]:
        """The cubes that may be seen, by number, with their relations."""
        wanted = list(seqs)
        rows = list(self.rows(connection, wanted, scope))
        if self.database.observer is not None:
            self.database.observer.read(self.name, rows)
        edges = relations_of(connection, [row.seq for row in rows], scope)
        found = {
            row.seq: self.cube(row, tuple(edges.get(row.seq, ())), row.parent_id) for row in rows
        }
        if scope.rights is None:
            return found
        from memos.records.rights_shown import shown

        return shown(connection, scope.rights, self.name, found)

    def one(self, connection: Connection, seq: int, scope: Scope) -> MemCube:
        """The cube with this number, which was just found. Raises StoreError."""
        found = self.load(connection, [seq], replace(scope, archived=True))
        if seq not in found:
            raise StoreError(f"memory {self.name!r}: no cube {seq} behind its id, file damaged")
        return found[seq]

    def cube(
        self,
        row: CubeRow | Row[Any],
        edges: tuple[Relation, ...] = (),
        parent_id: str | None = None,
    ) -> MemCube:
        """The cube that a row is."""
        return MemCube(
            id=row.id,
            kind=row.kind,
            content=self._content(row),
            metadata=json.loads(row.metadata),
            relations=edges,
            acl=None if row.acl is None else json.loads(row.acl),
            versions=row.version,
            created_at=row.created_at,
            updated_at=row.updated_at,
            memory=self.name,
            parent_id=parent_id,
            importance=row.importance,
            state=row.state,
            source=row.source,
            creator=row.creator,
            derived_from=tuple(json.loads(row.derived_from)) if row.derived_from else (),
            expires_at=row.expires_at,
            digest=row.version_digest.hex(),
        )

    def recent(
        self,
        connection: Connection,
        scope: Scope,
        limit: int | None = None,
        newest_first: bool = True,
    ) -> list[int]:
        """Numbers of the cubes that may be seen, by age."""
        order = cubes.c.seq.desc() if newest_first else cubes.c.seq
        statement = select(cubes.c.seq).where(scope.clause(self.memory)).order_by(order)
        return [int(row[0]) for row in connection.execute(statement.limit(limit))]

    def duplicates(
        self, connection: Connection, digests: Sequence[bytes], scope: Scope
    ) -> dict[bytes, int]:
        """The oldest cube of each digest that lives and may be read; filters aside."""
        found: list[tuple[bytes, int]] = []
        for part in chunks(digests):
            marks = ", ".join("?" * len(part))
            rows = connection.exec_driver_sql(
                _DUPLICATES.replace(":digests", marks), (self.memory, scope.now, *part)
            )
            found += [(row[0], int(row[1])) for row in rows]
        if found and scope.rights is not None:
            readable = scope.readable_among(connection, [seq for _, seq in found])
            found = [(digest, seq) for digest, seq in found if seq in readable]
        return dict(found)

    def ids(self, connection: Connection, ids: Sequence[str]) -> dict[str, int]:
        """Which of these ids were ever used."""
        found: dict[str, int] = {}
        for part in chunks(ids):
            rows = connection.execute(
                select(cubes.c.id, cubes.c.seq).where(
                    cubes.c.memory == self.memory, cubes.c.id.in_(part)
                )
            )
            found.update({row[0]: int(row[1]) for row in rows})
        return found

    def all_ids(self, connection: Connection) -> dict[str, int]:
        """id -> number of every cube there ever was, by age; what was purged is not there."""
        rows = connection.execute(
            select(cubes.c.id, cubes.c.seq)
            .where(cubes.c.memory == self.memory)
            .order_by(cubes.c.seq)
        )
        return {row[0]: int(row[1]) for row in rows}

    def history(self, connection: Connection, id: str, scope: Scope) -> list[Version]:
        """Every version that may be read, oldest first, also of a deleted cube.

        Raises NotFoundError.
        """
        seq = self.ids(connection, [id]).get(id)
        if seq is None or not scope.readable_among(connection, [seq]):
            raise NotFoundError(f"memory {self.name!r}: no cube {id!r}")
        row = self._row(connection, seq)
        if self.database.observer is not None:
            self.database.observer.read(self.name, [row])
        found = [(self._version(old, old.at), old.edges) for old in kept(connection, [seq])]
        found.append((self._version(row, row.updated_at), row.edges))
        if scope.rights is None:
            return [version for version, _ in found]
        from memos.records.rights_shown import shown_versions

        return shown_versions(connection, scope.rights, self.memory, self.name, found)

    def stats(self, connection: Connection, scope: Scope) -> dict[str, int]:
        """cubes: how many may be seen; vectors: how many of them, or of the memory's, have one."""
        count = select(func.count()).select_from(cubes).where(scope.clause(self.memory))
        have = select(func.count()).select_from(vectors)
        have = have.where(vectors.c.memory == self.memory, vectors.c.data.is_not(None))
        if scope.rights is not None:
            have = have.join(cubes, cubes.c.seq == vectors.c.seq)
            have = have.where(scope.clause(self.memory))
        return {
            "cubes": connection.execute(count).scalar_one(),
            "vectors": connection.execute(have).scalar_one(),
        }

    def changed(self, connection: Connection, since: int, limit: int) -> list[int] | None:
        """Numbers of the cubes written after this change; None: more than ``limit``."""
        named = {"memory": self.memory, "since": since, "limit": limit + 1}
        rows = connection.execute(_CHANGED, named).all()
        return None if len(rows) > limit else [int(row[0]) for row in rows]

    def expired(self, connection: Connection, now: float) -> list[int]:
        """Numbers of the cubes whose time is over."""
        rows = connection.execute(_EXPIRED, {"memory": self.memory, "now": now})
        return [int(row[0]) for row in rows]

    # Inside.

    def _row(self, connection: Connection, seq: int) -> Row[Any]:
        """The row with this number, and parent_id."""
        return connection.execute(_ROWS, {"seqs": [seq]}).one()

    def visible(self, connection: Connection, seqs: Sequence[int], scope: Scope) -> set[int]:
        """Which of these cubes may be seen."""
        statement = scope.restrict(_VISIBLE, self.memory)
        found: set[int] = set()
        for part in chunks(seqs):
            named = {"memory": self.memory, "now": scope.now, "seqs": part}
            named["archived"] = scope.archived
            found.update(int(row[0]) for row in connection.execute(statement, named))
        return found

    def rows(
        self, connection: Connection, seqs: Sequence[int], scope: Scope | None = None
    ) -> Iterator[Row[Any]]:
        """The rows with these numbers, and parent_id; with a scope, those that may be seen.

        Raises StoreError where a row that may be seen is not what was stored.
        """
        statement = _ROWS if scope is None else scope.restrict(_SEEN, self.memory)
        named: dict[str, Any] = {"memory": self.memory}
        if scope is not None:
            named |= {"now": scope.now, "archived": scope.archived}
        for part in chunks(seqs):
            for row in connection.execute(statement, {**named, "seqs": part}):
                if scope is not None and not is_whole(row):
                    raise StoreError(
                        f"memory {self.name!r}: cube {row.id!r} is not what was stored, the file "
                        "is damaged"
                    )
                yield row

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

    def _content(self, row: CubeRow | Row[Any]) -> Any:
        return row.text if row.content is None else self.shown(json.loads(row.content))

    def _version(self, row: Row[Any], at: float) -> Version:
        texts = (row.text, row.content or "", row.metadata)
        if not isinstance(row.version_digest, bytes) or not all(
            isinstance(text, str) for text in texts
        ):
            raise StoreError(f"memory {self.name!r}: a version that is none, the file is damaged")
        return Version(
            number=row.version,
            content=self._content(row),
            metadata=json.loads(row.metadata),
            state=row.state,
            importance=row.importance,
            author=row.author,
            source=row.source,
            at=at,
            digest=row.version_digest.hex(),
            parents=tuple(digest.hex() for digest in parents_of(row.parents)),
            parent_id=row.parent_id,
            relations=relations_of_version(row.edges),
            acl=None if row.acl is None else json.loads(row.acl),
            expires_at=row.expires_at,
        )

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
_LIVES = lives(bindparam("memory"), bindparam("now"), bindparam("archived"))
_MINE = cubes.c.memory == bindparam("memory")  # the indexes of ids and digests begin with it
_FIND = select(cubes.c.seq).where(
    _MINE, cubes.c.id == bindparam("id"), lives(bindparam("memory"), bindparam("now"), True)
)
_DUPLICATES = (  # asked with every add: what SQLAlchemy does to a list costs more than the query
    f"SELECT digest, seq FROM cubes WHERE memory = ? AND state NOT IN ('{DELETED}', '{MERGED}') "
    f"AND (expires_at IS NULL OR expires_at > ? OR state = '{FROZEN}') AND digest IN (:digests) "
    "ORDER BY seq DESC"
)
_EXPIRED = select(cubes.c.seq).where(
    cubes.c.memory + 0 == bindparam("memory"),
    cubes.c.expires_at <= bindparam("now"),
    cubes.c.state != DELETED,
    cubes.c.state != FROZEN,
)
_CHANGED = (
    select(cubes.c.seq)
    .where(cubes.c.memory == bindparam("memory"), cubes.c.change > bindparam("since"))
    .limit(bindparam("limit"))
)
_PARENTS = cubes.alias("parents")
_ROWS = (
    select(cubes, _PARENTS.c.id.label("parent_id"))
    .outerjoin(_PARENTS, _PARENTS.c.seq == cubes.c.parent)
    .where(cubes.c.seq.in_(bindparam("seqs", expanding=True)))
)
_SEEN = _ROWS.where(_LIVES)
_VISIBLE = select(cubes.c.seq).where(cubes.c.seq.in_(bindparam("seqs", expanding=True)), _LIVES)
