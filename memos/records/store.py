"""Records: the store of all declarative memories of a MOS."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select, true

from memos.cube.identity import canonical
from memos.errors import ArgumentError
from memos.records.cubes import CubeTable
from memos.records.database import Database, open_database
from memos.records.hebbian import Hebbian
from memos.records.links import chunks, learners_of
from memos.records.schema import bodies, cubes, embedders, memories, versions
from memos.records.scope import DELETED, Scope
from memos.records.uses import Uses
from memos.records.writes import Change

if TYPE_CHECKING:
    from memos.records.vectors import VectorSearch


class EmbeddingCache:
    """Digest -> bytes, in the store's own file. Who reads them checks them: they are a cache."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get_many(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with self._database.read() as connection:
            for part in chunks(digests):
                marks = ", ".join("?" * len(part))
                rows = connection.exec_driver_sql(
                    f"SELECT digest, data FROM embeddings WHERE digest IN ({marks})", tuple(part)
                )
                found.update({row[0]: row[1] for row in rows if isinstance(row[1], bytes)})
        return found

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        if self._database.readonly or not items:
            return
        rows = list(items.items())
        with self._database.write() as connection:
            connection.exec_driver_sql("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)

    def drop_many(self, digests: Sequence[bytes]) -> None:
        if not digests:
            return
        with self._database.write() as connection:
            connection.exec_driver_sql(
                "DELETE FROM embeddings WHERE digest = ?", [(digest,) for digest in digests]
            )


class RecentEmbeddings:
    """As ``EmbeddingCache``, in this process only: of an encrypted store. Thread-safe.

    Args:
        bound: texts whose vectors are kept.
    """

    def __init__(self, bound: int = 4096) -> None:
        self._bound = bound
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get_many(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        with self._lock:
            return {digest: self._kept[digest] for digest in digests if digest in self._kept}

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        with self._lock:
            self._kept.update(items)
            while len(self._kept) > self._bound:
                self._kept.popitem(last=False)

    def drop_many(self, digests: Sequence[bytes]) -> None:
        with self._lock:
            for digest in digests:
                self._kept.pop(digest, None)


class Records:
    """One SQLite file in a folder, and what is derived from it.

    Thread-safe; several processes may open one folder, also for writing.

    Args:
        path:     a folder; None: in memory.
        durable:  every commit waits for the disk, so that it survives a loss of power.
        readonly: nothing is written.
        key:      the master key of an encrypted store, or where it is: see
            ``memos.records.keys.MasterKey``.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        durable: bool = False,
        readonly: bool = False,
        key: Any = None,
    ) -> None:
        self.database = open_database(path, durable=durable, readonly=readonly, key=key)
        self._recent = RecentEmbeddings()
        self.uses = Uses(self.database)
        self.hebbian = Hebbian(self.database)
        self.folder = None if path is None else Path(path)
        self.readonly = readonly
        self._lock = threading.Lock()
        self._tables: dict[str, tuple[str, CubeTable]] = {}
        self._embedders: dict[int, tuple[str, int]] = {}

    def close(self) -> None:
        """Write the uses that were counted and the edges they make, and close the file.

        Raises StoreError where they cannot be written; the file is closed then too.
        """
        try:
            self.uses.write()
            self.hebbian.write()
        finally:
            self.database.close()

    def register(
        self, name: str, kind: str, description: str = "", config: dict[str, Any] | None = None
    ) -> CubeTable:
        """The cubes of a memory; the memory is made where it is new.

        Raises ArgumentError when a memory of another kind has this name.
        """
        with self._lock:
            found = self._tables.get(name)
        if found is None or found[0] != kind:
            # Not under the lock: others may wait for it inside of their transactions.
            made = (kind, self._register(name, kind, description, config or {}))
            with self._lock:
                found = self._tables.get(name)
                if found is None or found[0] != kind:
                    found = self._tables[name] = made
        return found[1]

    def memories(self) -> list[dict[str, Any]]:
        """name, kind, description, config and number of living cubes of every memory."""
        with self.database.read() as connection:
            rows = connection.execute(select(memories).order_by(memories.c.id)).all()
            return [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "description": row.description,
                    "config": json.loads(row.config),
                    "created_at": row.created_at,
                }
                for row in rows
            ]

    def file_bytes(self) -> int:
        """Bytes of the store on disk, indexes and write-ahead log included; 0 in memory."""
        if self.folder is None:
            return 0
        files = [*self.folder.glob("records.*"), *self.folder.glob("indexes/*")]
        return sum(file.stat().st_size for file in files)

    def locate(
        self, connection: Connection, id: str, *, dead: bool = False
    ) -> list[tuple[int, str]]:
        """(seq, name of its memory) of every cube with this id; deleted ones where ``dead``."""
        rows = connection.execute(
            select(cubes.c.seq, memories.c.name)
            .join(memories, memories.c.id == cubes.c.memory)
            .where(cubes.c.id == id, true() if dead else cubes.c.state != DELETED)
        )
        return [(int(row[0]), row[1]) for row in rows]

    def contents(self, memory: int) -> Iterator[tuple[int, Any]]:
        """(seq, content) of every version of every cube of a memory, of deleted ones too."""
        with self.database.read() as connection:
            for column in (cubes.c.content, bodies.c.content):
                statement = select(cubes.c.seq, column).where(
                    cubes.c.memory == memory, column.is_not(None)
                )
                if column.table is bodies:
                    old = versions.join(bodies, bodies.c.digest == versions.c.body)
                    statement = statement.join(old, versions.c.seq == cubes.c.seq)
                for seq, content in connection.execute(statement):
                    yield int(seq), json.loads(content)

    def outdate(self, connection: Connection, seqs: Sequence[int], at: float) -> None:
        """Mark what was learnt from these cubes, which have changed or gone: a new version whose
        metadata lists their ids under "stale"."""
        changed: dict[tuple[int, int], list[str]] = {}
        for memory, seq, source in learners_of(connection, seqs, at):
            changed.setdefault((memory, seq), []).append(source)
        for (memory, seq), sources in changed.items():
            table = CubeTable(self.database, memory, "")
            metadata = table.one(connection, seq, Scope({}, at)).metadata
            stale = sorted({*metadata.get("stale", ()), *sources})
            if stale != metadata.get("stale"):
                change = Change(metadata={**metadata, "stale": stale}, author="memos")
                table.update(connection, seq, change, at)

    def forget(self, name: str) -> None:
        """A memory whose registration was undone."""
        with self._lock:
            self._tables.pop(name, None)

    # Vectors.

    def embedder_of(self, memory: int) -> tuple[str, int]:
        """Identity and dim of what made a memory's vectors; ("", 0) where there are none."""
        known = self._embedders.get(memory)
        if known is None:
            with self.database.read() as connection:
                row = connection.execute(
                    select(embedders).where(embedders.c.memory == memory)
                ).first()
            if row is None:
                return "", 0
            known = self._embedders[memory] = (row.identity, row.dim)
        return known

    def copy_embedder(
        self, reading: Connection, memory: int, connection: Connection, new: int
    ) -> None:
        """Vectors of a new memory, of any store, are made by what makes those of this one."""
        row = reading.execute(select(embedders).where(embedders.c.memory == memory)).first()
        if row is not None:
            connection.execute(embedders.insert(), {**row._mapping, "memory": new})

    def vector_search(
        self,
        memory: int,
        *,
        identity: str | None = None,
        dim: int = 0,
        metric: str = "cosine",
        dtype: str = "float32",
    ) -> VectorSearch | None:
        """The vectors of a memory; made where they are new and an identity is given."""
        from memos.records.vectors import VectorSearch

        known = select(embedders).where(embedders.c.memory == memory)
        with self.database.read() as connection:
            row = connection.execute(known).first()
        if row is None and identity is None:
            return None
        if row is None:
            new = {"memory": memory, "identity": identity, "dim": dim}
            with self.database.write() as connection:
                row = connection.execute(known).first()
                if row is None:
                    new |= {"metric": metric, "dtype": dtype}
                    connection.execute(embedders.insert(), new)
                    row = connection.execute(known).one()
        return VectorSearch(
            self.database,
            memory,
            row.dim,
            metric=row.metric,
            dtype=row.dtype,
            folder=None if self.folder is None else self.folder / "indexes",
            key=functools.partial(self.database.file_key, memory),
        )

    @property
    def embedding_cache(self) -> EmbeddingCache | RecentEmbeddings:
        """Vectors of texts that were embedded before."""
        return self._recent if self.database.is_sealed else EmbeddingCache(self.database)

    def _register(
        self, name: str, kind: str, description: str, config: dict[str, Any]
    ) -> CubeTable:
        known = select(memories.c.id, memories.c.kind).where(memories.c.name == name)
        with self.database.read() as connection:
            row = connection.execute(known).first()
        if row is None and not self.readonly:
            with self.database.write() as connection:
                row = connection.execute(known).first()  # another process may have been quicker
                if row is None:
                    new = {
                        "name": name,
                        "kind": kind,
                        "description": description,
                        "config": canonical(config, "config"),
                        "created_at": time.time(),
                    }
                    statement = memories.insert().returning(memories.c.id)
                    number = connection.execute(statement, new).scalar_one()
                    table = CubeTable(self.database, number, name)
                    table.fulltext.create(connection)
                    return table
        if row is None:
            raise ArgumentError(f"memory {name!r}: a memory of the store wanted, there is none")
        if row.kind != kind:
            raise ArgumentError(f"memory {name!r}: it is of kind {row.kind}, not {kind}")
        return CubeTable(self.database, row.id, name)
