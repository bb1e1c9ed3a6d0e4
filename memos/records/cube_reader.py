"""The cubes of one memory as they are read: by id, by number, by age, with versions and relations.

Every path goes through the scope, see scope.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, select

from memos.cube import MemCube, Relation, Version
from memos.errors import NotFoundError, StoreError
from memos.records.database import Database
from memos.records.fulltext import FullText
from memos.records.history import kept, parents_of, relations_of_version
from memos.records.life import Life
from memos.records.links import chunks, relations_of
from memos.records.schema import CubeRow, cubes, vectors
from memos.records.scope import DELETED, Scope, lives
from memos.records.states import FROZEN, MERGED
from memos.records.writes import is_whole


class CubeReader:
    """Holds no state of its own: as thread-safe as the database."""

    def __init__(self, database: Database, memory: int, name: str) -> None:
        self.database, self.memory, self.name = database, memory, name
        self.fulltext = FullText(memory)
        self.life = Life(database, memory, name, self.fulltext)
        self.shown: Callable[[Any], Any] = lambda content: content  # stored content as it is read

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
