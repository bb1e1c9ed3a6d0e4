"""GraphMemory: nodes and relationships, found by their words and by how they are linked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from memos.cube import MemCube
from memos.errors import ArgumentError, NotFoundError
from memos.memories.graph_content import (
    NODE,
    RELATIONSHIP,
    checked_content,
    name_of,
    node_text,
    relationship_text,
)
from memos.memories.graph_queries import GraphQueries

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.graph import GraphNew
    from memos.records.store import Records
    from memos.records.writes import Change, New

BACKENDS = ("sqlite", "neo4j")


class GraphMemory(GraphQueries):
    """Nodes and relationships with labels and properties. Thread-safe once registered.

    Content: {"type": "node", "label": or "labels":, "properties": {...}} or {"type":
    "relationship", "label":, "source_id":, "target_id":, "properties": {...}}. A relationship
    is a cube too, between two nodes of this memory; deleting a node deletes those at it.

    Args:
        name, description: of the memory.
        storage_backend:   "sqlite": in the store's own file. "neo4j": the structure is also
            kept on a server that speaks Bolt, and asked there; cubes, history and full text
            stay in the store.
        connection_params: of the server: uri, username, password, database.
        embedder, on_duplicate, clock: as every declarative memory. An item with an id of its
            own is never a duplicate: two people may have the same name.

    Raises:
        ArgumentError: an argument is out of contract.
        BackendError:  the package neo4j is not installed.
    """

    kind = "graph"

    def __init__(
        self,
        name: str,
        description: str = "",
        *,
        storage_backend: str = "sqlite",
        connection_params: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(name, description, **more)
        if storage_backend not in BACKENDS:
            raise ArgumentError(
                f"storage_backend: one of {', '.join(BACKENDS)} wanted, got {storage_backend!r}"
            )
        self.storage_backend = storage_backend
        self._server: Any = None
        if storage_backend == "neo4j":
            from memos.records.neo4j import Server

            self._server = Server(connection_params)
        elif connection_params is not None:
            raise ArgumentError("connection_params: storage_backend='neo4j' wanted with them")

    def bind(self, records: Records) -> None:
        """Keep the cubes in this store; a server is sent what it does not have.

        Raises StoreError when the server does not answer.
        """
        from memos.records.graph import SqliteGraph
        from memos.records.neo4j import ServerGraph
        from memos.records.outbox import Mirror, prefix_of, prepare

        if self._server is not None:
            if records.database.is_sealed:
                raise ArgumentError(
                    "storage_backend: 'sqlite' wanted in an encrypted store: a graph server would "
                    "be sent labels and properties as they are"
                )
            self._server.connect()
        super().bind(records)
        memory = self.table.memory
        self._local = self._structure = SqliteGraph(memory)
        if not records.readonly:
            with records.database.write() as connection:
                prepare(connection)
        if self._server is not None:
            with records.database.read() as connection:
                prefix = prefix_of(connection, memory)
            graph = ServerGraph(self._server, self._local, prefix)
            self._structure = graph
            if not records.readonly:
                self._mirror = Mirror(self.table, graph, records.folder)
                self._mirror.attach()

    def config(self) -> dict[str, Any]:
        return {"storage_backend": self.storage_backend}

    def close(self) -> None:
        """Give back connections and caches; the cubes stay in the store."""
        super().close()
        if self._server is not None:
            self._server.close()

    def synchronise(self, *, rebuild: bool = False) -> int:
        """Send to the server what it has not got yet; returns how many changes waited.

        Every call does this by itself.

        Args:
            rebuild: delete what the server has of this memory and send everything, after
                somebody else has changed it there.

        Raises StoreError when the server does not take it. Without a server nothing happens.
        """
        waiting = self.pending()
        if self._mirror is not None:
            self._mirror.rebuild() if rebuild else self._mirror.flush()
        return waiting

    def pending(self) -> int:
        """Cubes that a server still has to be told about."""
        from memos.records.outbox import pending

        with self.records.database.read() as connection:
            return pending(connection, self.table.memory)

    # Changes.

    def set_properties(self, memory_id: str, properties: Mapping[str, Any]) -> MemCube:
        """A new version with these properties added or replaced; the others stay."""
        if not isinstance(properties, Mapping):
            raise ArgumentError(f"properties: a dict wanted, got {type(properties).__name__}")
        with self.records.database.write():
            content = dict(self.get(memory_id).content)
            content["properties"] = {**content["properties"], **properties}
            return self.update(memory_id, content)

    def relate(
        self,
        memory_id: str,
        type: str,
        target: str,
        *,
        properties: Mapping[str, Any] | None = None,
        weight: float = 1.0,
        author: str | None = None,
    ) -> None:
        """Add a relationship to a node of this memory, or an edge to a cube of another one."""
        with self.records.database.write() as connection:
            known = self._graph.ends(connection, [memory_id, target], self.scope())
            if len(known) < len({memory_id, target}):
                super().relate(
                    memory_id, type, target, properties=properties, weight=weight, author=author
                )
                return
            strength = {} if weight == 1.0 else {"weight": weight}
            content = {
                "type": RELATIONSHIP,
                "label": type,
                "source_id": memory_id,
                "target_id": target,
                "properties": {**(properties or {}), **strength},
            }
            self.add(content, creator=author)

    def update(self, memory_id: str, content: Any = None, *args: Any, **more: Any) -> MemCube:
        """A new version: ``content`` replaces, ``metadata`` items are added or replaced.

        A node stays a node; a relationship keeps its type and its ends. Raises NotFoundError,
        ArgumentError.
        """
        if content is not None:
            self._embed_names(memory_id, checked_content(content, self.name))
        return super().update(memory_id, content, *args, **more)

    # What the base asks.

    def _read(self, content: Any) -> tuple[str, Any]:
        found = checked_content(content, self.name)
        if found["type"] == NODE:
            return node_text(found), found
        return relationship_text(found, found["source_id"], found["target_id"]), found

    def _new(self, item: Mapping[str, Any], now: float) -> New:
        from memos.records.graph import GraphNew

        new = super()._new(item, now)
        new.kind = new.content["type"]
        return GraphNew(**vars(new), is_named=item.get("id") is not None)

    def _prepare(self, news: Sequence[New], items: Sequence[Mapping[str, Any]]) -> None:
        with self.records.database.read() as connection:
            ends = self._ends(connection, news)
        for new in news:
            if new.kind == RELATIONSHIP:
                new.text = _text(new.content, ends)
        super()._prepare(news, items)

    def _place_all(
        self,
        connection: Connection,
        news: Sequence[New],
        items: Sequence[Mapping[str, Any]],
        names: Mapping[str, int],
    ) -> None:
        super()._place_all(connection, news, items, names)
        ends = self._ends(connection, news)
        self.wake(connection, [seq for seq, _ in ends.values() if seq], self._clock())
        for new in news:
            if new.kind != RELATIONSHIP:
                continue
            for end in ("source_id", "target_id"):
                if new.content[end] not in ends:
                    raise NotFoundError(
                        f"content.{end}: memory {self.name!r} has no node {new.content[end]!r}"
                    )
            text = _text(new.content, ends)
            if text != new.text:  # an end got another name since it was embedded
                new.text = text
                new.vector, new.tokens = self.embedded.encode([text])[0]
            _graph_new(new).ends = (
                ends[new.content["source_id"]][0],
                ends[new.content["target_id"]][0],
            )

    def _duplicates(self, connection: Connection, news: Sequence[New]) -> list[int | None]:
        nameless = [new for new in news if not _graph_new(new).is_named]
        known = iter(super()._duplicates(connection, nameless))
        return [None if _graph_new(new).is_named else next(known) for new in news]

    def _after_insert(
        self, connection: Connection, seqs: Sequence[int], news: Sequence[New]
    ) -> None:
        stored = dict(zip(seqs, news, strict=True))
        own = {new.id: seq for seq, new in stored.items()}
        self._graph.insert_nodes(
            connection, {seq: new.content for seq, new in stored.items() if new.kind == NODE}
        )
        edges = {}
        for seq, new in stored.items():
            if new.kind == RELATIONSHIP:
                a, b = _graph_new(new).ends
                source, target = new.content["source_id"], new.content["target_id"]
                edges[seq] = (own.get(source, a), own.get(target, b), new.content)
        self._graph.insert_relationships(connection, edges)
        self._tell(connection, {seq: new.kind == NODE for seq, new in stored.items()})

    def _embed_ahead(self, content: Any, change: Change) -> None:
        """Its vector depends on more than the content: see ``_change``."""

    def _change(self, connection: Connection, old: MemCube, content: Any, change: Change) -> None:
        new = checked_content(content, self.name)
        fixed = ("type",) if old.kind == NODE else ("type", "label", "source_id", "target_id")
        for key in fixed:
            if new.get(key) != old.content[key]:
                raise ArgumentError(
                    f"content.{key}: {old.content[key]!r} wanted, which an update cannot change, "
                    f"got {new.get(key)!r}"
                )
        change.text, change.content = node_text(new), new
        if old.kind == RELATIONSHIP:
            ids = (new["source_id"], new["target_id"])
            change.text = _text(new, self._graph.ends(connection, ids, self.scope()))
        change.vector, change.tokens = self.embedded.encode([change.text])[0]
        change.clear_vector = True

    def _restore(
        self, connection: Connection, old: MemCube, text: str, content: Any, change: Change
    ) -> None:
        self._change(connection, old, content, change)

    def _after_copy(self, connection: Connection, seqs: Mapping[str, int], rows: Any) -> None:
        contents = {row.seq: json.loads(row.content) for row in rows}
        nodes = {seq: content for seq, content in contents.items() if content["type"] == NODE}
        edges = {
            seq: (seqs[content["source_id"]], seqs[content["target_id"]], content)
            for seq, content in contents.items()
            if seq not in nodes
        }
        self._graph.insert_nodes(connection, nodes)
        self._graph.insert_relationships(connection, edges)
        self._tell(connection, {row.seq: row.seq in nodes for row in rows})

    def _after_update(self, connection: Connection, seq: int, old: MemCube, change: Change) -> None:
        if change.content is None:
            return
        if old.kind == NODE:
            self._graph.change_node(connection, seq, old.content, change.content)
            if name_of(old.content, old.id) != name_of(change.content, old.id):
                texts = self._texts_at(connection, seq, {})
                vectors = self.embedded.encode(list(texts.values()))
                self._graph.retext(
                    connection,
                    self.table,
                    {s: (t, *v) for (s, t), v in zip(texts.items(), vectors, strict=True)},
                )
        else:
            self._graph.change_relationship(connection, seq, change.content)
        self._tell(connection, {seq: old.kind == NODE})

    def _with_dependents(self, connection: Connection, seq: int) -> list[int]:
        return [seq, *self._graph.touching(connection, seq)]

    def _hang_on(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        return self._graph.hanging_on(connection, seqs)

    def _after_delete(self, connection: Connection, seqs: Sequence[int]) -> None:
        gone = self._graph.stored(connection, seqs)
        self._graph.delete(connection, gone)
        self._tell(connection, {seq: c["type"] == NODE for seq, c in gone.items()})

    # Inside.

    def _tell(self, connection: Connection, seqs: Mapping[int, bool]) -> None:
        """Note for the server what changed, in the transaction that changed it."""
        from memos.records.outbox import enqueue

        enqueue(connection, self.table.memory, seqs)
        if self._mirror is not None:
            self._mirror.later()

    def _ends(
        self, connection: Connection, news: Sequence[New]
    ) -> dict[str, tuple[int, dict[str, Any]]]:
        """id -> (number, content) of the ends of new relationships; 0: a node new with them."""
        edges = [new.content for new in news if new.kind == RELATIONSHIP]
        ids = {edge[end] for edge in edges for end in ("source_id", "target_id")}
        new_nodes = {new.id: (0, new.content) for new in news if new.kind == NODE}
        stored = self._graph.ends(connection, sorted(ids - new_nodes.keys()), self.scope())
        return {**stored, **new_nodes}

    def _texts_at(
        self, connection: Connection, seq: int, changed: Mapping[str, Any]
    ) -> dict[int, str]:
        """Texts of the relationships at a node; ``changed``: contents by id, not stored yet."""
        from memos.records.scope import as_owner

        edges = self._graph.stored(connection, self._graph.touching(connection, seq))
        ids = {edge[end] for edge in edges.values() for end in ("source_id", "target_id")}
        with as_owner():  # what is stored does not depend on who stores it
            ends = self._graph.ends(connection, sorted(ids), self.scope())
        ends |= {id: (0, content) for id, content in changed.items()}
        return {edge: _text(content, ends) for edge, content in edges.items()}

    def _embed_names(self, id: str, content: Mapping[str, Any]) -> None:
        """Before an update gives a node another name: embed the texts that tell of it."""
        if content["type"] != NODE or self.embedded.embedder is None:
            return
        with self.records.database.read() as connection:
            known = self._graph.ends(connection, [id], self.scope())
            if id not in known or name_of(known[id][1], id) == name_of(content, id):
                return
            texts = self._texts_at(connection, known[id][0], {id: content})
        self.embedded.encode([node_text(content), *texts.values()])


def _text(content: Mapping[str, Any], ends: Mapping[str, tuple[int, Mapping[str, Any]]]) -> str:
    names = [
        name_of(ends[id][1], id) if id in ends else id
        for id in (content["source_id"], content["target_id"])
    ]
    return relationship_text(content, *names)


def _graph_new(new: New) -> GraphNew:
    return cast("GraphNew", new)
