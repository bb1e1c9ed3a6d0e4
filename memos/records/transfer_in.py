"""Memories of a .memcube into a store: every line checked, all in the caller's transaction.

Whatever is wrong raises before that transaction can be committed, and digests are checked while
the members are read, so that nothing of a file that is damaged, or lies, is ever there to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from memos.cube.memcube import MemcubeReader, parse_record
from memos.errors import ArgumentError, StoreError
from memos.records import outbox
from memos.records.cubes import CubeTable
from memos.records.filters import facts_of
from memos.records.graph import SqliteGraph
from memos.records.history import body_digest, parents_of
from memos.records.links import chunks
from memos.records.schema import CubeRow, cubes, embedders, facts, relations, versions
from memos.records.states import COLD, DELETED, HOT
from memos.records.transfer import (
    MAX_TENSORS_BYTES,
    CubeFields,
    Embedder,
    MemoryInfo,
    Vectors,
    VersionFields,
    digest_of_version,
    parse_cube,
    parse_vectors,
    parse_version,
    records_name,
    tensors_name,
)
from memos.records.transfer_trees import grow
from memos.records.words import context_of
from memos.records.writes import content_digest

_BATCH, _BATCH_BYTES = 500, 4 << 20

Encoded = tuple[bytes | None, bytes | None]


@dataclass
class Target:
    """Where the cubes of one memory of a file go.

    Args:
        table:  of the memory, which is registered.
        kind:   of the memory.
        is_new: it has no cubes.
        check:  raises ArgumentError for (kind, text, content) that is none of this memory's.
        vectors: "keep": as the file has them, made by ``maker``; "make": by ``encode``; "drop".
        maker:  where they are made: by what.
        encode: texts to vectors and signs of their tokens, as they are stored.
    """

    table: CubeTable
    kind: str
    is_new: bool
    check: Callable[[str, str, Any], object]
    vectors: str = "keep"
    maker: Embedder | None = None
    encode: Callable[[Sequence[str]], Sequence[Encoded]] | None = None


@dataclass
class Counts:
    """What came of one memory.

    Args:
        cubes, versions: how many were stored.
        skipped:         cubes that were there already, in the same version or a later one.
        vectors:         how many the file had.
    """

    cubes: int = 0
    versions: int = 0
    skipped: int = 0
    vectors: int = 0


@dataclass
class _Batch:
    """Cubes whose lines were read and that are not written yet."""

    rows: list[CubeRow] = field(default_factory=list)
    parent_ids: list[str | None] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    versions: list[tuple[Any, ...]] = field(default_factory=list)
    bodies: list[tuple[bytes, str, str | None]] = field(default_factory=list)
    num_bytes: int = 0


def import_memory(
    connection: Connection,
    reader: MemcubeReader,
    number: int,
    info: MemoryInfo,
    target: Target,
    *,
    skips: bool = False,
    tell: Callable[[int], object] = lambda num_bytes: None,
) -> Counts:
    """Read one memory of a file into a memory of the store; ``link`` follows when all are there.

    Args:
        connection:  in a write transaction, which is undone when this raises.
        number:      of the memory in the file, from 1.
        skips:       a cube that is there stays, where it has the file's version, as its last one
            or in its history; else any that is there is an error.
        tell:        called with how many bytes were read since the last call.

    Raises:
        StoreError: the file is damaged or lies.
        ArgumentError: an id is there already, or an argument is out of contract.
    """
    return _Import(connection, reader, number, info, target, skips, tell).run()


class _Import:
    def __init__(
        self,
        connection: Connection,
        reader: MemcubeReader,
        number: int,
        info: MemoryInfo,
        target: Target,
        skips: bool,
        tell: Callable[[int], object],
    ) -> None:
        self.connection, self.reader, self.number = connection, reader, number
        self.info, self.target, self.tell = info, target, tell
        self.skips = skips
        self.table, self.memory = target.table, target.table.memory
        self.counts = Counts()
        self.is_tree = target.kind == "tree"
        self.graph = SqliteGraph(self.memory) if target.kind == "graph" else None
        self.late: list[tuple[int, str]] = []  # cubes whose parents come after them
        self.orders = -1
        self.positions: set[int] = set()
        self.what = ""
        self.lines = 0  # of versions
        self.batch = _Batch()

    def run(self) -> Counts:
        info = self.info
        if self.graph is not None:
            outbox.prepare(self.connection)
        change, first = self.table.database.allocate(self.connection, info.numbers)
        self.change, self.first = change, first
        maker = info.embedder if self.target.vectors == "keep" else self.target.maker
        if maker is not None:
            self._set_maker(maker)
        read = 0
        for part in range(1, info.parts + 1):
            read += self._part(part)
        if (read, self.lines) != (info.cubes, info.versions):
            raise StoreError(
                f"memory {info.name!r}: {info.cubes} cubes and {info.versions} versions wanted as "
                f"the manifest says, got {read} and {self.lines}"
            )
        self._settle_parents()
        if self.is_tree:
            grow(self.connection, self.table, self.first)
        return self.counts

    # Reading.

    def _part(self, part: int) -> int:
        """Read one part; returns how many cubes it has."""
        name, tensors = records_name(self.number, part), tensors_name(self.number, part)
        member = self.reader.members.get(name)
        if member is None or member.type != "records":
            raise StoreError(f"member {name}: records wanted, but there are none")
        vectors = self._vectors_of(tensors)
        seqs: list[int] = []  # -1: it was there already
        alive: list[bool] = []
        fields: CubeFields | None = None
        version: VersionFields | None = None
        known: int | None = None
        for number, line in enumerate(self.reader.lines(name), 1):
            self.tell(len(line) + 1)
            what = f"{name}:{number}"
            value = parse_record(line, what)
            if fields is None:
                fields, version = parse_cube(value, what), None
                self.what = f"{what}: cube {fields.id[:100]!r}"
                self._check_order(fields)
                known = self._known(fields.id)
                continue
            before, version = version, parse_version(value, version, self.what)
            self._check_version(fields, version, before)
            self.lines += 1
            if version.version < fields.versions:
                if known is None:
                    self._keep(fields, version)
            elif known is None:
                row = self._row(fields, version)
                self.batch.rows.append(row)
                self.batch.parent_ids.append(version.parent_id)
                self.batch.metadata.append(version.metadata_value)
                self.batch.num_bytes += _size(version)
            else:
                self._check_known(fields.id, known, version)
                self.counts.skipped += 1
            if len(self.batch.rows) == _BATCH or self.batch.num_bytes >= _BATCH_BYTES:
                self._flush()
            if version.version == fields.versions:
                seqs.append(-1 if known is not None else self.first + fields.order)
                alive.append(version.state != DELETED)
                fields = None
        if fields is not None:
            raise StoreError(f"{self.what}: {fields.versions} versions wanted")
        self._flush()
        if vectors is not None:
            self._write_vectors(tensors, vectors, seqs, alive)
        return len(seqs)

    def _check_version(
        self, fields: CubeFields, version: VersionFields, before: VersionFields | None
    ) -> None:
        wanted = digest_of_version(
            fields, version, version.at, version.parent_id, version.state == DELETED
        )
        if wanted != version.version_digest:
            raise StoreError(f"{self.what}: version {version.version} is not what its digest says")
        if before is not None and before.version_digest not in parents_of(version.parents):
            raise StoreError(
                f"{self.what}: version {version.version} does not follow the one before it"
            )
        if version.parent_id is not None and not self.is_tree:
            raise StoreError(f"{self.what}: no parent wanted in a memory of kind {self.info.kind}")
        try:
            self.target.check(fields.kind, version.text, version.content_value)
        except ArgumentError as error:
            raise StoreError(f"{self.what}: {error}") from None

    def _check_order(self, fields: CubeFields) -> None:
        numbers = self.info.numbers
        if not self.orders < fields.order < numbers:
            raise StoreError(f"{self.what}: order above that of the cube before wanted")
        self.orders = fields.order
        if fields.position is not None:
            if fields.position >= numbers or fields.position in self.positions:
                raise StoreError(f"{self.what}: a position of its own wanted")
            self.positions.add(fields.position)

    def _known(self, id: str) -> int | None:
        """Number of the cube that has this id already. Raises ArgumentError: that is an error."""
        if self.target.is_new:
            return None
        known = select(cubes.c.seq).where(cubes.c.memory == self.memory, cubes.c.id == id)
        seq = self.connection.execute(known).scalar()
        if seq is not None and not self.skips:
            raise ArgumentError(
                f"on_conflict: memory {self.table.name!r} has a cube {id!r} already; nothing was "
                "imported"
            )
        return None if seq is None or seq >= self.first else int(seq)

    def _check_known(self, id: str, seq: int, last: VersionFields) -> None:
        """Raises ArgumentError where a cube never was what it is in the file."""
        for column in (cubes.c.version_digest, versions.c.version_digest):
            same = select(column.table.c.seq).where(
                column.table.c.seq == seq, column == last.version_digest
            )
            if self.connection.execute(same).first() is not None:
                return
        raise ArgumentError(
            f"on_conflict: memory {self.table.name!r} has a cube {id!r} whose history has not the "
            "version of the file; nothing was imported"
        )

    def _row(self, fields: CubeFields, last: VersionFields) -> CubeRow:
        return CubeRow(
            seq=self.first + fields.order,
            memory=self.memory,
            id=fields.id,
            kind=fields.kind,
            state=last.state,
            version=last.version,
            text=last.text,
            context="" if self.is_tree else context_of(last.metadata_value),
            content=last.content,
            metadata=last.metadata,
            importance=last.importance,
            parent=None,
            position=None if fields.position is None else self.first + fields.position,
            thread=fields.thread,
            source=last.source,
            creator=fields.creator,
            derived_from=fields.derived_from,
            acl=last.acl,
            author=last.author,
            created_at=fields.created_at,
            updated_at=last.at,
            expires_at=last.expires_at,
            digest=content_digest(fields.kind, last.text, last.content, last.metadata, None),
            edges=last.edges,
            parents=last.parents,
            version_digest=last.version_digest,
            change=self.change,
        )

    # Writing.

    def _keep(self, fields: CubeFields, version: VersionFields) -> None:
        """An old version of a cube."""
        body = body_digest(version.text, version.content)
        parts = fields.kind, version.text, version.content, version.metadata, None
        named = {
            **version._asdict(),
            "seq": self.first + fields.order,
            "deleted": int(version.state == DELETED),
            "body": body,
            "digest": content_digest(*parts),
        }
        self.batch.bodies.append((body, version.text, version.content))
        self.batch.versions.append(tuple(named[column] for column in _VERSION_COLUMNS))
        self.batch.num_bytes += _size(version)

    def _flush(self) -> None:
        """Write what was read."""
        batch, self.batch = self.batch, _Batch()
        if batch.versions:
            self.connection.exec_driver_sql(_INSERT_BODIES, batch.bodies)
            self.connection.exec_driver_sql(_INSERT_VERSIONS, batch.versions)
            self.counts.versions += len(batch.versions)
        if batch.rows:
            self._write(self._with_parents(batch), batch.metadata)

    def _write(self, rows: Sequence[CubeRow], metadata: Sequence[dict[str, Any]]) -> None:
        try:
            self.connection.exec_driver_sql(_INSERT_CUBES, [tuple(row) for row in rows])
        except IntegrityError:
            raise StoreError(f"memory {self.info.name!r}: two cubes of one id") from None
        living = [row for row in rows if row.state != DELETED]
        keys = [
            (self.memory, *fact, row.seq)
            for row, items in zip(rows, metadata, strict=True)
            if items and row.state != DELETED
            for fact in facts_of(items)
        ]
        if keys:
            self.connection.exec_driver_sql(_INSERT_FACTS, keys)
        if not self.is_tree:  # words of headings are theirs too: see transfer_trees
            texts = [(row.seq, row.text, row.context) for row in living if row.state in HOT]
            self.table.fulltext.insert(self.connection, texts)
        away = [(row.seq, self.memory, self.change) for row in living if row.state in COLD]
        if away:
            self.connection.exec_driver_sql(_INSERT_COLD, away)
        if self.graph is not None:
            self._write_graph(self.graph, living)
        if self.target.vectors == "make":
            self._make_vectors(living)
        self.counts.cubes += len(rows)
        self.counts.versions += len(rows)

    def _make_vectors(self, living: Sequence[CubeRow]) -> None:
        assert self.target.encode is not None
        made = self.target.encode([row.text for row in living])
        found = [
            (row.seq, self.memory, data, tokens, self.change)
            for row, (data, tokens) in zip(living, made, strict=True)
            if data is not None
        ]
        if found:
            self.connection.exec_driver_sql(_INSERT_VECTORS, found)

    def _with_parents(self, batch: _Batch) -> list[CubeRow]:
        """The rows with their parents, as far as those are there already."""
        wanted = sorted({id for id in batch.parent_ids if id is not None})
        if not wanted:
            return batch.rows
        known = self.table.ids(self.connection, wanted)
        found = []
        for row, id in zip(batch.rows, batch.parent_ids, strict=True):
            if id is not None and id in known:
                row = _below(row, known[id])
            elif id is not None:
                self.late.append((row.seq, id))
            known[row.id] = row.seq
            found.append(row)
        return found

    def _write_graph(self, graph: SqliteGraph, living: Sequence[CubeRow]) -> None:
        contents = {row.seq: json.loads(row.content or "null") for row in living}
        nodes = {row.seq: contents[row.seq] for row in living if row.kind == "node"}
        graph.insert_nodes(self.connection, nodes)
        edges = {seq: content for seq, content in contents.items() if seq not in nodes}
        ids = {edge[end] for edge in edges.values() for end in ("source_id", "target_id")}
        ends = {
            row.id: int(row.seq)
            for part in chunks(sorted(ids))
            for row in self.connection.execute(
                select(cubes.c.id, cubes.c.seq).where(
                    cubes.c.memory == self.memory,
                    cubes.c.id.in_(part),
                    cubes.c.kind == "node",
                    cubes.c.state != DELETED,
                )
            )
        }
        for id in sorted(ids - ends.keys()):
            raise StoreError(f"{self.what}: a relationship at {id!r}, which is no node before it")
        new = {
            seq: (ends[content["source_id"]], ends[content["target_id"]], content)
            for seq, content in edges.items()
        }
        graph.insert_relationships(self.connection, new)
        outbox.enqueue(self.connection, self.memory, {seq: seq in nodes for seq in contents})

    def _vectors_of(self, name: str) -> Vectors | None:
        """What a part has of vectors; they are few enough to be held."""
        member = self.reader.members.get(name)
        if member is None:
            return None
        maker = self.info.embedder
        if member.type != "tensors" or maker is None or member.num_bytes > MAX_TENSORS_BYTES:
            raise StoreError(f"member {name}: tensors of the embedder of the memory wanted")
        data = b"".join(self.reader.pieces(name))
        self.tell(len(data))
        return parse_vectors(data, self.info.cubes, maker.dim, maker.dtype, f"member {name}")

    def _write_vectors(
        self, name: str, vectors: Vectors, seqs: Sequence[int], alive: Sequence[bool]
    ) -> None:
        if vectors.cubes[-1] >= len(seqs) or not all(alive[i] for i in vectors.cubes):
            raise StoreError(f"member {name}: vectors of living cubes of the part wanted")
        self.counts.vectors += len(vectors.cubes)
        if self.target.vectors != "keep":
            return
        rows = [
            (seqs[i], self.memory, data, tokens or None, self.change)
            for i, data, tokens in zip(vectors.cubes, vectors.data, vectors.tokens, strict=True)
            if seqs[i] >= 0
        ]
        if rows:
            self.connection.exec_driver_sql(_INSERT_VECTORS, rows)

    def _set_maker(self, maker: Embedder) -> None:
        known = select(embedders).where(embedders.c.memory == self.memory)
        if self.connection.execute(known).first() is None:
            self.connection.execute(embedders.insert(), {"memory": self.memory, **vars(maker)})

    # Trees.

    def _settle_parents(self) -> None:
        """Parents that came after their children."""
        for part in chunks(self.late):
            known = self.table.ids(self.connection, sorted({id for _, id in part}))
            found = {seq: known[id] for seq, id in part if id in known}
            for seq, id in part:
                if seq not in found:
                    raise StoreError(
                        f"memory {self.info.name!r}: a parent {id[:100]!r} is neither in the file "
                        "nor in the memory"
                    )
            new = [
                (below.parent, below.digest, below.seq)
                for row in self.table.rows(self.connection, list(found))
                for below in [_below(CubeRow(*row[: len(CubeRow._fields)]), found[row.seq])]
            ]
            self.connection.exec_driver_sql(_SET_PARENT, new)


def contents_from(connection: Connection, memory: int, first: int) -> Iterator[Any]:
    """The content of every version of the cubes of a memory from number ``first`` on."""
    for statement in _CONTENTS:
        for (content,) in connection.exec_driver_sql(statement, (memory, first)):
            yield json.loads(content)


def _size(version: VersionFields) -> int:
    """About how many bytes it takes."""
    return len(version.text) + len(version.content or "") + len(version.metadata) + 1000


def _below(row: CubeRow, parent: int) -> CubeRow:
    digest = content_digest(row.kind, row.text, row.content, row.metadata, parent)
    return row._replace(parent=parent, digest=digest)


def _insert(table: Any, columns: Sequence[str], verb: str = "INSERT") -> str:
    marks = ", ".join("?" * len(columns))
    return f"{verb} INTO {table} ({', '.join(columns)}) VALUES ({marks})"


_VERSION_COLUMNS = tuple(column.name for column in versions.columns)
_INSERT_CUBES = _insert("cubes", CubeRow._fields)
_INSERT_VERSIONS = _insert("versions", _VERSION_COLUMNS)
_INSERT_BODIES = _insert("bodies", ("digest", "text", "content"), "INSERT OR IGNORE")
_INSERT_FACTS = _insert("facts", [column.name for column in facts.columns])
_INSERT_VECTORS = _insert("vectors", ("seq", "memory", "data", "tokens", "change"))
_INSERT_COLD = _insert("cold", ("seq", "memory", "change"))
_INSERT_RELATION = _insert(relations.name, ("source", "type", "target", "weight", "properties"))
_CONTENTS = (
    "SELECT content FROM cubes WHERE memory + 0 = ? AND seq >= ? AND content IS NOT NULL",
    "SELECT bodies.content FROM cubes JOIN versions ON versions.seq = cubes.seq JOIN bodies "
    "ON bodies.digest = versions.body WHERE memory + 0 = ? AND cubes.seq >= ? "
    "AND bodies.content IS NOT NULL",
)
_SET_PARENT = "UPDATE cubes SET parent = ?, digest = ? WHERE seq = ?"
