"""What a graph server still has to be told, kept in the transaction that changed it.

The outbox names cubes, not operations: what is sent is their state now, so sending twice, or
after a crash between two commits, ends in the same graph. One sender at a time, across processes,
reads, sends and then crosses out what did not change meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Index, Integer, Row, Table, Text, select

from memos.errors import StoreError
from memos.records._graph_sql import NODE, tables
from memos.records.cubes import CubeTable
from memos.records.graph import count, labels_of
from memos.records.graph import prepare as prepare_tables
from memos.records.links import chunks
from memos.records.neo4j import ServerGraph
from memos.records.schema import store
from memos.records.scope import DELETED

_BATCH = 1000

graph_servers = Table(  # which server a memory's graph is sent to
    "graph_servers",
    tables,
    Column("memory", Integer, primary_key=True),
    Column("target", Text, nullable=False),
    Column("wipe", Integer, nullable=False),  # 1: delete what it has before anything is sent
)

graph_outbox = Table(
    "graph_outbox",
    tables,
    Column("id", Integer, primary_key=True),
    Column("memory", Integer, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("is_node", Integer, nullable=False),
    Index("graph_outbox_cube", "memory", "seq", unique=True),
    Index("graph_outbox_order", "memory", "is_node", "id"),
    sqlite_autoincrement=True,
)


def prepare(connection: Connection) -> None:
    """Make the tables of graphs where they are not there."""
    prepare_tables(connection)


def enqueue(connection: Connection, memory: int, seqs: Mapping[int, bool]) -> None:
    """Note that cubes changed (number -> whether it is a node), where a server is told."""
    if seqs and _target(connection, memory) is not None:
        connection.exec_driver_sql(
            "INSERT OR REPLACE INTO graph_outbox(memory, seq, is_node) VALUES (?, ?, ?)",
            [(memory, seq, int(is_node)) for seq, is_node in seqs.items()],
        )


def pending(connection: Connection, memory: int) -> int:
    """Cubes that a server still has to be told about."""
    return count(connection, graph_outbox, memory)


def prefix_of(connection: Connection, memory: int) -> str:
    """Names this store and this memory among all that share a server."""
    uuid = connection.execute(select(store.c.uuid)).scalar_one()
    return f"{uuid}/{memory:d}/"


class Mirror:
    """Keeps a server in step with the records of one memory. Thread-safe.

    Args:
        table:  the memory's cubes.
        graph:  the server's side.
        folder: of the store, for the lock that processes share; None: in memory.
    """

    def __init__(self, table: CubeTable, graph: ServerGraph, folder: Path | None) -> None:
        self.table, self.graph = table, graph
        self._database, self._memory = table.database, table.memory
        self._lock = threading.Lock()
        self._lock_file = None if folder is None else folder / f"graph-{table.memory:d}.lock"

    def attach(self) -> None:
        """Send to this server from now on; all of it where the server does not have it."""
        target, known = self.graph.server.target, self.graph.is_known()
        with self._database.write() as connection:
            if _target(connection, self._memory) != target or not known:
                self._mark_all(connection)
        self.flush()

    def rebuild(self) -> None:
        """Delete what the server has of this memory, and send everything."""
        with self._database.write() as connection:
            self._mark_all(connection)
        self.flush()

    def later(self) -> None:
        """Flush after the transaction of this thread, or now where there is none."""
        self._database.after_commit(self.flush)

    def flush(self) -> None:
        """Send what is pending.

        Raises StoreError when the server does not take it: it is still pending then.
        """
        if self._database.readonly:
            return
        with self._database.read() as connection:
            if not self._due(connection):
                return
        try:
            with self._lock, self._across_processes():
                self._send()
        except StoreError as error:
            with self._database.read() as connection:
                waiting = pending(connection, self._memory)
            raise StoreError(
                f"memory {self.table.name!r}: {error}. {waiting} changes are stored in records, "
                "and are sent with the next call once the server takes them"
            ) from error

    # Inside.

    def _due(self, connection: Connection) -> bool:
        rows = select(graph_outbox.c.id).where(graph_outbox.c.memory == self._memory).limit(1)
        wipes = select(graph_servers.c.wipe).where(graph_servers.c.memory == self._memory)
        return (
            connection.execute(rows).first() is not None or connection.execute(wipes).scalar() == 1
        )

    def _send(self) -> None:
        mine = graph_servers.c.memory == self._memory
        with self._database.read() as connection:
            row = connection.execute(select(graph_servers).where(mine)).first()
        if row is None or row.target != self.graph.server.target:
            return  # another object of this memory sends it elsewhere
        if row.wipe:
            self.graph.wipe()
            self.graph.prepare(self.table.name)
            with self._database.write() as connection:
                connection.execute(graph_servers.update().where(mine).values(wipe=0))
        while True:
            with self._database.read() as connection:
                # Relationships only where no node waits: both ends are there then.
                batch = self._batch(connection, True) or self._batch(connection, False)
                rows = {row.seq: row for row in self.table.rows(connection, [b[1] for b in batch])}
                ends = self._ends(connection, rows)
            if not batch:
                return
            if batch[0][2]:
                self._send_nodes([seq for _, seq, _ in batch], rows)
            else:
                self._send_relationships(rows, ends)
            with self._database.write() as connection:
                for part in chunks([number for number, _, _ in batch]):
                    connection.execute(graph_outbox.delete().where(graph_outbox.c.id.in_(part)))

    def _batch(self, connection: Connection, is_node: bool) -> list[tuple[int, int, int]]:
        """(number, cube, whether it is a node), oldest first."""
        own = graph_outbox.c
        rows = connection.execute(
            select(own.id, own.seq, own.is_node)
            .where(own.memory == self._memory, own.is_node == int(is_node))
            .order_by(own.id)
            .limit(_BATCH)
        )
        return [(int(row[0]), int(row[1]), int(row[2])) for row in rows]

    def _ends(
        self, connection: Connection, rows: Mapping[int, Row[Any]]
    ) -> dict[int, tuple[int, int]]:
        """Source and target of relationships, deleted ones too, while the store knows both."""
        wanted = {}
        for seq, row in rows.items():
            if row.kind != NODE and row.content is not None:
                content = json.loads(row.content)
                wanted[seq] = (content["source_id"], content["target_id"])
        ids = self.table.ids(connection, list({id for ends in wanted.values() for id in ends}))
        return {seq: (ids[a], ids[b]) for seq, (a, b) in wanted.items() if a in ids and b in ids}

    def _send_nodes(self, seqs: Sequence[int], rows: Mapping[int, Row[Any]]) -> None:
        living = {}
        for seq, row in rows.items():
            if row.state != DELETED:
                content = json.loads(row.content)
                living[seq] = (row.id, labels_of(content), content["properties"])
        gone = [seq for seq in seqs if seq not in living]
        if living:
            self.graph.put_nodes(living)
        if gone:
            self.graph.delete_nodes(gone)

    def _send_relationships(
        self, rows: Mapping[int, Row[Any]], ends: Mapping[int, tuple[int, int]]
    ) -> None:
        # Where an end is unknown the store has purged it: it took its relationships along.
        living, gone = {}, {}
        for seq, (source, target) in ends.items():
            content = json.loads(rows[seq].content)
            type_ = labels_of(content)[0]
            if rows[seq].state == DELETED:
                gone[seq] = (type_, source, target)
            else:
                properties = content["properties"]
                living[seq] = (rows[seq].id, type_, source, target, properties)
        if living:
            self.graph.put_relationships(living)
        if gone:
            self.graph.delete_relationships(gone)

    def _mark_all(self, connection: Connection) -> None:
        row = {"memory": self._memory, "target": self.graph.server.target, "wipe": 1}
        connection.execute(graph_servers.delete().where(graph_servers.c.memory == self._memory))
        connection.execute(graph_servers.insert(), row)
        living = self.graph.local.living(connection)
        enqueue(connection, self._memory, {seq: kind == NODE for seq, kind in living})

    @contextlib.contextmanager
    def _across_processes(self) -> Iterator[None]:
        """The processes that share a folder take turns; one that dies gives its turn up."""
        if self._lock_file is None:
            yield
            return
        import fcntl

        with open(self._lock_file, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _target(connection: Connection, memory: int) -> str | None:
    row = select(graph_servers.c.target).where(graph_servers.c.memory == memory)
    found = connection.execute(row).scalar()
    return None if found is None else str(found)
