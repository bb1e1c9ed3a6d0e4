"""What the declarative memories share: cubes in records, and the verbs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.cube import Hit, MemCube, Version
from memos.cube.identity import new_id
from memos.errors import ArgumentError, NotFoundError
from memos.memories.embedded import Embedded
from memos.memories.items import (
    ITEM_KEYS,
    KEPT,
    acl_of,
    author_of,
    batches_of,
    expiry_of,
    importance_of,
    metadata_of,
    name_of,
    names_of,
    relation_of,
    thread_of,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.records.cubes import CubeTable
    from memos.records.scope import Scope
    from memos.records.store import Records
    from memos.records.writes import Change, New


class DeclarativeMemory:
    """Base of the memories whose cubes stand in records. Thread-safe once registered.

    A subclass says what its content is (``_read``) and how a structured query is answered
    (``lookup``); everything else is here.
    """

    kind = "declarative"
    in_prompts = True  # whether a query that names no memory asks this one

    def __init__(
        self,
        name: str,
        description: str = "",
        *,
        embedder: Any = "auto",
        on_duplicate: str = "return",
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"name: a string that is not empty wanted, got {name!r}")
        if on_duplicate not in ("return", "keep", "error"):
            raise ArgumentError(
                f"on_duplicate: 'return', 'keep' or 'error' wanted, got {on_duplicate!r}"
            )
        self.name, self.description = name, description
        self.on_duplicate = on_duplicate
        self.embedded = Embedded(name, embedder)
        self._clock = clock
        self._records: Records | None = None
        self._table: CubeTable | None = None
        self._bind_lock = threading.Lock()

    # Registration.

    def bind(self, records: Records) -> None:
        """Keep the cubes in this store; called by ``MOS.register_memory``."""
        with self._bind_lock:
            if self._records is records:
                return
            if self._records is not None:
                raise ArgumentError(f"memory {self.name!r}: it is registered with another MOS")
            self._table = records.register(self.name, self.kind, self.description, self.config())
            self.embedded.bind(records, self._table.memory)
            self._records = records

    def config(self) -> dict[str, Any]:
        """JSON that is stored with the memory: what its indexes depend on."""
        return {}

    def close(self) -> None:
        """Give back what this memory holds; its cubes stay in the store."""
        self.embedded.close()

    @property
    def records(self) -> Records:
        if self._records is None:
            raise ArgumentError(f"memory {self.name!r}: register it first, mos.register_memory")
        return self._records

    @property
    def table(self) -> CubeTable:
        self.records  # noqa: B018 - says what is missing
        assert self._table is not None
        return self._table

    @classmethod
    def restored(cls, name: str, description: str, config: Mapping[str, Any]) -> DeclarativeMemory:
        """The memory that a store knows by this name."""
        return cls(name, description)

    def stats(self) -> dict[str, Any]:
        """cubes: how many live; vectors: how many of them have one."""
        with self.records.database.read() as connection:
            return self.table.stats(connection, self.scope())

    # The verbs.

    def add(self, content: Any, metadata: Mapping[str, Any] | None = None, **more: Any) -> MemCube:
        """Store one cube; see ``add_many`` for the arguments. Returns it."""
        return self.add_many([{"content": content, "metadata": metadata, **more}])[0]

    def add_many(
        self,
        items: Iterable[Mapping[str, Any]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[MemCube]:
        """Store many cubes, a thousand in one transaction.

        Args:
            items:    dicts with content, and optionally metadata, parent_id, relations,
                importance (0 to 1), ttl_s, acl, id, source, creator, derived_from, thread.
            progress: called with the number of cubes stored so far.

        Returns:
            The cubes, in order. An exact duplicate (content, metadata and parent) of a living
            cube is that cube, unless ``on_duplicate`` says otherwise.

        Raises:
            ArgumentError: names the item; its transaction is undone, earlier ones are stored.
        """
        stored: list[MemCube] = []
        names: dict[str, int] = {}
        for batch in batches_of(items):
            stored += self._store(batch, names)
            if progress is not None:
                progress(len(stored))
        return stored

    def get(self, memory_id: str) -> MemCube:
        """The cube with this id; an archived one is back in the indexes. Raises NotFoundError."""
        scope = self.scope()
        with self.records.database.read() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            cube = self.table.one(connection, seq, scope)
        if cube.state == "ARCHIVED" and not self.records.readonly:
            with self.records.database.write() as connection:
                self.wake(connection, [seq], scope.now)
                cube = self.table.one(connection, seq, scope)
        self.records.uses.count(self.table.life, [cube.id], scope.now)
        return cube

    def update(
        self,
        memory_id: str,
        content: Any = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        importance: float | None = None,
        ttl_s: float | None = None,
        author: str | None = None,
        source: str | None = None,
        acl: Any = None,
    ) -> MemCube:
        """A new version: ``content`` replaces, ``metadata`` items are added or replaced.

        Raises NotFoundError, ArgumentError.
        """
        from memos.records.scope import Scope
        from memos.records.writes import Change

        now, scope = self._clock(), self.scope()
        change = Change(author=author_of(author), source=source, acl=acl_of(acl))
        change.importance = None if importance is None else importance_of(importance)
        change.expires_at = expiry_of(ttl_s, now)
        if content is not None:
            self._embed_ahead(content, change)
        with self.records.database.write() as connection:
            seq = self.table.seq(connection, memory_id, scope)
            scope.check_cube(connection, "write", seq, memory_id)
            if acl is not None:
                scope.check_cube(connection, "admin", seq, memory_id)
            self.wake(connection, [seq], now)
            old = self.table.one(connection, seq, Scope({}, now))
            if metadata is not None:
                change.metadata = {**old.metadata, **metadata_of(metadata)}
            if content is not None:
                self._change(connection, old, content, change)
            self.table.update(connection, seq, change, now)
            if content is not None:
                self.records.outdate(connection, [seq], now)
            self._after_update(connection, seq, old, change)
            return self._written(connection, seq, scope)

    def delete(self, memory_id: str, *, author: str | None = None) -> None:
        """State DELETED: no query finds it any more, its history stays. Raises NotFoundError."""
        with self.records.database.write() as connection:
            scope = self.scope()
            seq = self.table.seq(connection, memory_id, scope)
            gone = self._with_dependents(connection, seq)
            for one in gone:
                scope.check_cube(connection, "write", one, memory_id)
            self._delete(connection, gone, scope.now, author_of(author))

    def history(self, memory_id: str) -> list[Version]:
        """Every version, oldest first. Raises NotFoundError."""
        with self.records.database.read() as connection:
            return self.table.history(connection, memory_id, self.scope())

    def cubes(
        self, limit: int | None = 100, *, filters: Mapping[str, Any] | None = None
    ) -> list[MemCube]:
        """Cubes, newest first."""
        scope = self.scope(filters)
        with self.records.database.read() as connection:
            seqs = self.table.recent(connection, scope, limit)
            cubes = self.table.load(connection, seqs, scope)
        return [cubes[seq] for seq in seqs if seq in cubes]

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
        """Add a typed edge to another cube, of any memory: a new version of this one.

        Raises NotFoundError.
        """
        from memos.records.writes import Change

        edge = relation_of({"type": type, "target": target, "weight": weight})
        edge.properties.update(metadata_of(properties))
        with self.records.database.write() as connection:
            scope = self.scope()
            seq = self.table.seq(connection, memory_id, scope)
            scope.check_cube(connection, "write", seq, memory_id)
            self.wake(connection, [seq], self._clock())
            other = self._other(connection, edge.target)
            change = Change(author=author_of(author))
            self.table.relate(connection, seq, other, edge, change, self._clock())

    def expire(self) -> int:
        """Delete what has outlived its time, and what goes with it; returns how many of them the
        caller could see."""
        now = self._clock()
        with self.records.database.read() as connection:
            if not self.table.expired(connection, now):
                return 0
        with self.records.database.write() as connection:
            seqs: dict[int, None] = {}
            for seq in self.table.expired(connection, now):
                gone = self._with_dependents(connection, seq)
                if not self.table.life.frozen(connection, gone):  # what is frozen stays, as it is
                    seqs.update(dict.fromkeys(gone))
            seen = self.scope().readable_among(connection, list(seqs))
            self._delete(connection, list(seqs), now, "ttl", trigger="ttl")
        return len(seen)

    def wake(self, connection: Connection, seqs: Sequence[int], at: float) -> None:
        """Bring back those of these cubes that are archived, and what they hang on."""
        life = self.table.life
        if cold := life.are_cold(connection, seqs):
            life.wake(connection, [*cold, *self._hang_on(connection, cold)], at)

    def lookup(self, query: Any, limit: int, scope: Scope) -> list[Hit]:
        """Answer a query that is no text. Raises ArgumentError for what this memory cannot."""
        raise ArgumentError(
            f"query: memory {self.name!r} of kind {self.kind} wants text, got "
            f"{type(query).__name__}"
        )

    # What a subclass says.

    def _read(self, content: Any) -> tuple[str, Any]:
        """(text that is searched, JSON content or None where the text is all). Checks it."""
        if not isinstance(content, str) or not content.strip():
            raise ArgumentError(
                f"content: memory {self.name!r} wants a text that is not empty, got {content!r}"
            )
        return content, None

    def _prepare(self, news: Sequence[New], items: Sequence[Mapping[str, Any]]) -> None:
        """Before the transaction: what takes long."""
        vectors = self.embedded.encode([new.text for new in news])
        for new, (vector, tokens) in zip(news, vectors, strict=True):
            new.vector, new.tokens = vector, tokens

    def _place_all(
        self,
        connection: Connection,
        news: Sequence[New],
        items: Sequence[Mapping[str, Any]],
        names: Mapping[str, int],
    ) -> None:
        """Inside the transaction: where new cubes stand.

        ``names``: ids that were given to exact duplicates in this call, and the numbers of the
        cubes that they repeat.
        """
        for new, item in zip(news, items, strict=True):
            self._place(connection, new, item)

    def _place(self, connection: Connection, new: New, item: Mapping[str, Any]) -> None:
        """Inside the transaction: where a new cube stands."""
        if item.get("parent_id") is not None:
            raise ArgumentError(
                f"parent_id: memory {self.name!r} of kind {self.kind} has no parents; "
                "use a TreeTextMemory"
            )

    def _after_insert(
        self, connection: Connection, seqs: Sequence[int], news: Sequence[New]
    ) -> None:
        """Inside the transaction: what a subclass stores beside the cubes."""

    def _change(self, connection: Connection, old: MemCube, content: Any, change: Change) -> None:
        """Put new content into an update."""
        change.clear_vector = True

    def _embed_ahead(self, content: Any, change: Change) -> None:
        """Before the transaction of an update: what takes long."""
        change.text, change.content = self._read(content)
        change.vector, change.tokens = self.embedded.encode([change.text])[0]

    def _restore(
        self, connection: Connection, old: MemCube, text: str, content: Any, change: Change
    ) -> None:
        """Put text and content, as they were stored once, into an update."""
        change.text, change.content = text, content
        change.vector, change.tokens = self.embedded.encode([text])[0]
        change.clear_vector = True

    def _after_copy(self, connection: Connection, seqs: Mapping[str, int], rows: Any) -> None:
        """Inside the transaction that copied rows into this memory: what stands beside them."""

    def _share(self, source: DeclarativeMemory, contents: Iterable[Any]) -> None:
        """Before cubes of another memory come with these contents: what they name elsewhere."""

    def _after_update(
        self, connection: Connection, seq: int, old: MemCube, change: Change
    ) -> None: ...

    def _with_dependents(self, connection: Connection, seq: int) -> list[int]:
        """Cubes that go when this one goes."""
        return [seq]

    def _after_delete(self, connection: Connection, seqs: Sequence[int]) -> None: ...

    def _hang_on(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        """Cubes that come back when these do."""
        return []

    def left(self, connection: Connection, seqs: Sequence[int]) -> None:
        """Inside the transaction that archives cubes: give their places in fast tiers back."""

    def purged(self, contents: Sequence[Any]) -> None:
        """After a purge: remove what is kept of these contents beside the rows."""
        search = self.embedded.search_or_none()
        if search is not None:
            search.forget()

    def in_use(self) -> set[str]:
        """Ids of cubes that nothing may archive now."""
        return set()

    # Inside.

    def _delete(
        self, connection: Connection, seqs: Sequence[int], at: float, author: str | None,
        **more: str,
    ) -> None:  # fmt: skip
        self.table.delete(connection, seqs, at, author, **more)
        self.records.outdate(connection, seqs, at)
        self._after_delete(connection, seqs)

    def now(self) -> float:
        """Seconds since 1970, by this memory's clock."""
        return self._clock()

    def scope(self, filters: Mapping[str, Any] | None = None) -> Scope:
        """What a call with these filters may see now."""
        from memos.records.scope import Scope, acting

        given = {} if filters is None else filters
        return Scope(given, self._clock(), rights=acting.get())

    def _store(self, items: Sequence[Mapping[str, Any]], names: dict[str, int]) -> list[MemCube]:
        """Store cubes in one transaction, which also reads them."""
        scope = self.scope()
        now = scope.now
        news = [self._new(item, now) for item in items]
        self._prepare(news, items)
        with self.records.database.write() as connection:
            if any(item.get("parent_id") is None for item in items):
                scope.check_memory(connection, "write", self.name)
            self._check_ids(connection, [i["id"] for i in items if i.get("id") is not None])
            self._place_all(connection, news, items, names)
            for new, item in zip(news, items, strict=True):
                edges = [relation_of(edge) for edge in item.get("relations") or ()]
                new.relations = [(self._other(connection, e.target), e) for e in edges]
            known = self._duplicates(connection, news)
            self.wake(connection, [seq for seq in known if seq], now)
            if self.on_duplicate == "error" and any(seq is not None for seq in known):
                i = next(i for i, seq in enumerate(known) if seq is not None)
                raise ArgumentError(f"memory {self.name!r}: item {i} is there already")
            fresh = [new for new, seq in zip(news, known, strict=True) if seq is None]
            rows = self.table.insert(connection, fresh)
            seqs = [row.seq for row in rows]
            self._after_insert(connection, seqs, fresh)
            by_id = dict(zip((new.id for new in fresh), seqs, strict=True))
            by_digest = {new.digest: by_id[new.id] for new in fresh} if 0 in known else {}
            found = []
            for new, seq in zip(news, known, strict=True):
                again = by_digest[new.digest] if seq == 0 else seq
                found.append(by_id[new.id] if again is None else again)
                if again is not None:
                    names[new.id] = again
            cubes = {  # one without edges or a parent is what its row says
                row.seq: self.table.cube(row)
                for row, new in zip(rows, fresh, strict=True)
                if new.parent is None and not new.relations
            }
            others = [seq for seq in found if seq not in cubes]
            if others:
                cubes |= self.table.load(connection, others, scope)
            return [
                cubes[seq] if seq in cubes else self._written(connection, seq, scope)
                for seq in found
            ]

    def _written(self, connection: Connection, seq: int, scope: Scope) -> MemCube:
        """A cube as its writer sees it, who may have no right to read it."""
        from dataclasses import replace

        found = self.table.load(connection, [seq], replace(scope, archived=True))
        if seq in found:
            return found[seq]
        return self.table.cube(next(self.table.rows(connection, [seq])))

    def _duplicates(self, connection: Connection, news: Sequence[New]) -> list[int | None]:
        """For each new cube the living one that it repeats, 0 for one of this batch, or None."""
        if self._keeps_all(news):
            return [None] * len(news)
        digests = [new.digest for new in news]
        stored = self.table.duplicates(connection, digests, self.scope())
        seen: set[bytes] = set()
        found: list[int | None] = []
        for digest in digests:
            again = 0 if digest in seen else None
            found.append(stored.get(digest, again))
            seen.add(digest)
        return found

    def _keeps_all(self, news: Sequence[New]) -> bool:
        """Whether also what is there already is stored again."""
        return self.on_duplicate == "keep" or any(new.is_copy for new in news)

    def _new(self, item: Mapping[str, Any], now: float) -> New:
        from memos.records.writes import New

        unknown = set(item) - ITEM_KEYS
        if unknown or "content" not in item:
            names = sorted(ITEM_KEYS - {"content", KEPT})
            raise ArgumentError(
                f"item: content and of {', '.join(names)} wanted, got "
                f"{', '.join(sorted(map(str, item)))}"
            )
        metadata = metadata_of(item.get("metadata"))
        kept: New | None = item.get(KEPT)
        text, content = (kept.text, kept.content) if kept else self._read(item["content"])
        importance = item.get("importance")
        given = item.get("id")
        if given is not None and (not isinstance(given, str) or not given):
            raise ArgumentError(f"id: a string that is not empty wanted, got {given!r}")
        return New(
            id=given or new_id(),
            kind=self.kind,
            text=text,
            content=content,
            metadata=metadata,
            at=now,
            importance=0.5 if importance is None else importance_of(importance),
            thread=thread_of(item.get("thread"), metadata),
            source=name_of("source", item.get("source"), metadata),
            creator=name_of("creator", item.get("creator"), metadata) or author_of(None),
            author=author_of(name_of("creator", item.get("creator"), metadata)),
            derived_from=names_of(item.get("derived_from") or ()),
            acl=acl_of(item.get("acl")),
            expires_at=expiry_of(item.get("ttl_s"), now),
            parents=kept.parents if kept else None,
            edges=kept.edges if kept else (),
            is_copy=kept is not None,
        )

    def _check_ids(self, connection: Connection, ids: Sequence[str]) -> None:
        known = self.table.ids(connection, ids) if ids else {}
        if len(set(ids)) < len(ids) or known:
            twice = next(iter(known), None) or next(id for id in ids if ids.count(id) > 1)
            raise ArgumentError(f"id: a new one wanted, got {twice!r}, which exists; use update")

    def _other(self, connection: Connection, id: str) -> int:
        """Number of a cube of any memory. An id of this memory comes first."""
        located = self.records.locate(connection, id)
        readable = self.scope().readable_among(connection, [seq for seq, _ in located])
        found = [(seq, name) for seq, name in located if seq in readable]
        mine = [seq for seq, name in found if name == self.name]
        if mine or len(found) == 1:
            return mine[0] if mine else found[0][0]
        if not found:
            raise NotFoundError(f"relation: no cube {id!r}")
        names = ", ".join(sorted(name for _, name in found))
        raise ArgumentError(f"relation: {id!r} names cubes of several memories: {names}")
