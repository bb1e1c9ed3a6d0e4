"""Memories of a store into a .memcube: read in one snapshot, a few megabytes at a time."""

from __future__ import annotations

import array
import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from memos.cube.memcube import MAX_LINE_BYTES, MemberWriter, MemcubeWriter, write_all
from memos.errors import ArgumentError, StoreError
from memos.records.history import kept
from memos.records.links import chunks
from memos.records.schema import CubeRow, cubes, embedders, relations, vectors
from memos.records.scope import DELETED
from memos.records.transfer import (
    PART_BYTES,
    Embedder,
    MemoryInfo,
    Vectors,
    cube_line,
    digest_of_version,
    records_name,
    tensors_name,
    vectors_pieces,
    version_line,
)
from memos.records.trees import ancestors_of, descendants_of

_BATCH, _BATCH_BYTES = 256, 4 << 20  # cubes held at once


@dataclass(frozen=True)
class Chosen:
    """What of a memory is written.

    Args:
        memory: its number.
        seqs:   only these; None: all, deleted ones too.
        check:  called with the relations of every version that has any; raises where one may not
            be told.
    """

    memory: int
    name: str
    kind: str
    description: str
    config: dict[str, Any]
    seqs: frozenset[int] | None = None
    check: Callable[[str], object] | None = None


def with_context(connection: Connection, memory: int, seqs: Sequence[int]) -> frozenset[int]:
    """These cubes of a memory with what they cannot stand without: those above and below them in
    a tree, and the ends of relationships."""
    found = set(seqs)
    for part in chunks(sorted(found)):
        below = descendants_of(connection, part)
        found.update(seq for some in below.values() for seq, _ in some)
        ends = relations.c.source, relations.c.target
        for row in connection.execute(select(*ends).where(relations.c.cube.in_(part))):
            found.update(int(seq) for seq in row)
    for part in chunks(sorted(found)):
        found.update(seq for some in ancestors_of(connection, part).values() for seq in some)
    return frozenset(found)


def export_memory(
    connection: Connection,
    writer: MemcubeWriter,
    number: int,
    chosen: Chosen,
    tell: Callable[[int], object] = lambda cubes: None,
) -> MemoryInfo:
    """Write one memory.

    Args:
        number: of the memory in the file, from 1.
        tell:   called with how many cubes were written since the last call.

    Raises:
        StoreError: a version is not what was stored: the store is damaged.
        ArgumentError: a version is larger than a line may be.

    Cost: reads every cube and version once.
    """
    return _Export(connection, writer, number, chosen, tell).run()


class _Export:
    def __init__(
        self,
        connection: Connection,
        writer: MemcubeWriter,
        number: int,
        chosen: Chosen,
        tell: Callable[[int], object],
    ) -> None:
        self.connection, self.writer, self.number = connection, writer, number
        self.chosen, self.tell = chosen, tell
        self.places = _Places(connection, self._where(), chosen.seqs)
        self.maker = self._maker()
        self.cubes = self.versions = self.parts = 0
        self.with_vectors = False

    def run(self) -> MemoryInfo:
        rows = self._rows()
        waiting = next(rows, None)
        while waiting is not None:
            self.parts += 1
            vectors, first = Vectors(), self.cubes
            name = records_name(self.number, self.parts)
            with self.writer.member(name, "records") as member:
                while waiting is not None:
                    row, parent_id, old, vector = waiting
                    if vector is not None:
                        vectors.append(self.cubes - first, vector[0], vector[1] or b"")
                    self._write(member, row, parent_id, old)
                    waiting = next(rows, None)
                    if max(member.num_bytes, vectors.num_bytes) >= PART_BYTES:
                        break
            if vectors.cubes:
                assert self.maker is not None
                self.with_vectors = True
                pieces = vectors_pieces(vectors, self.maker.dim, self.maker.dtype)
                with self.writer.member(tensors_name(self.number, self.parts), "tensors") as member:
                    write_all(member, pieces)
        chosen = self.chosen
        return MemoryInfo(
            name=chosen.name,
            kind=chosen.kind,
            description=chosen.description,
            config=chosen.config,
            embedder=self.maker if self.with_vectors else None,
            cubes=self.cubes,
            versions=self.versions,
            numbers=self.cubes + len(self.places.moved),
            parts=self.parts,
        )

    def _write(
        self, member: MemberWriter, row: CubeRow, parent_id: str | None, old: Iterator[Any]
    ) -> None:
        place = self.places.of(row.seq, self.cubes)
        position = None if row.position is None else self.places.position(row.position)
        member.write(cube_line(row, place, position, row.version))
        before: tuple[str, str | None] | None = None
        for number in range(1, row.version):
            version = next(old, None)
            if version is None or (version.seq, version.version) != (row.seq, number):
                raise self._damaged(row, f"version {number} is missing")
            wanted = digest_of_version(
                row, version, version.at, version.parent_id, version.state == DELETED
            )
            if wanted != version.version_digest:
                raise self._damaged(row, f"version {number} is not what was stored")
            body = version.text, version.content
            line = version_line(version, version.at, version.parent_id, same_body=body == before)
            self._line(member, row, line, version.edges)
            before = body
        deleted = row.state == DELETED
        wanted = digest_of_version(row, row, row.updated_at, parent_id, deleted)
        if wanted != row.version_digest:
            raise self._damaged(row, "it is not what was stored")
        body = row.text, row.content
        line = version_line(row, row.updated_at, parent_id, same_body=body == before)
        self._line(member, row, line, row.edges)
        self.versions += row.version
        self.cubes += 1
        self.tell(1)

    def _line(self, member: MemberWriter, row: Any, line: bytes, edges: str | None) -> None:
        if edges is not None and self.chosen.check is not None:
            self.chosen.check(edges)
        if len(line) > MAX_LINE_BYTES:
            raise ArgumentError(
                f"memory {self.chosen.name!r}, cube {row.id!r}: a version of at most "
                f"{MAX_LINE_BYTES} bytes wanted, got {len(line)}"
            )
        member.write(line)

    def _rows(self) -> Iterator[tuple[CubeRow, str | None, Iterator[Any], Any]]:
        """(row of ``cubes``, id of its parent, its old versions, its vector) by number."""
        for batch in self._batches():
            old = kept(self.connection, [row.seq for row, _ in batch if row.version > 1])
            made = self._vectors([row.seq for row, _ in batch])
            for row, parent_id in batch:
                yield row, parent_id, old, made.get(row.seq)

    def _batches(self) -> Iterator[list[tuple[CubeRow, str | None]]]:
        above = cubes.alias("above")
        statement = (
            select(cubes, above.c.id.label("parent_id"))
            .outerjoin(above, above.c.seq == cubes.c.parent)
            .where(self._where())
            .order_by(cubes.c.seq)
        )
        batch: list[tuple[CubeRow, str | None]] = []
        size = 0
        for rows in self._pages(statement):
            for row in rows:
                # Its fields are read in a fifth of the time that those of the row take.
                cube = CubeRow._make(row[:-1])
                batch.append((cube, row[-1]))
                size += len(cube.text) + len(cube.content or "") + len(cube.metadata)
                if len(batch) == _BATCH or size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _pages(self, statement: Any) -> Iterator[Any]:
        if self.chosen.seqs is None:
            yield self.connection.execute(statement)
            return
        for part in chunks(sorted(self.chosen.seqs)):
            yield self.connection.execute(statement.where(cubes.c.seq.in_(part)))

    def _vectors(self, seqs: Sequence[int]) -> dict[int, tuple[bytes, bytes | None]]:
        if self.maker is None:
            return {}
        columns = vectors.c.seq, vectors.c.data, vectors.c.tokens
        rows = self.connection.execute(
            select(*columns).where(vectors.c.seq.in_(seqs), vectors.c.data.is_not(None))
        )
        return {int(row[0]): (row[1], row[2]) for row in rows}

    def _maker(self) -> Embedder | None:
        known = select(embedders).where(embedders.c.memory == self.chosen.memory)
        row = self.connection.execute(known).first()
        return None if row is None else Embedder(row.identity, row.dim, row.metric, row.dtype)

    def _where(self) -> ColumnElement[bool]:
        return cubes.c.memory + 0 == self.chosen.memory

    def _damaged(self, row: Any, why: str) -> StoreError:
        return StoreError(
            f"memory {self.chosen.name!r}, cube {row.id!r}: {why}; the store is damaged, memos "
            "doctor says more"
        )


class _Places:
    """Numbers of cubes, and those that moved ones pretend to have, without their gaps."""

    def __init__(
        self,
        connection: Connection,
        where: ColumnElement[bool],
        seqs: frozenset[int] | None,
    ) -> None:
        statement = select(cubes.c.seq, cubes.c.position).where(where)
        rows = connection.execute(statement.where(cubes.c.position.is_not(None)))
        found = [(int(row[0]), int(row[1])) for row in rows]
        self.moved = sorted(at for seq, at in found if seqs is None or seq in seqs)
        self._seqs = array.array("q")
        if self.moved:
            everything = connection.execute(select(cubes.c.seq).where(where).order_by(cubes.c.seq))
            self._seqs.extend(int(s) for (s,) in everything if seqs is None or s in seqs)

    def of(self, seq: int, before: int) -> int:
        """Of a cube that follows so many."""
        return before + bisect.bisect_left(self.moved, seq)

    def position(self, at: int) -> int:
        """Of the number that a moved cube pretends to have."""
        return bisect.bisect_left(self._seqs, at) + bisect.bisect_left(self.moved, at)


def count_of(connection: Connection, chosen: Chosen) -> int:
    """How many cubes are written."""
    if chosen.seqs is not None:
        return len(chosen.seqs)
    mine = cubes.c.memory + 0 == chosen.memory
    return int(connection.execute(select(func.count()).select_from(cubes).where(mine)).scalar_one())
