"""MOS: the facade over every memory."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from memos.cube import Hit, MemCube
from memos.errors import ArgumentError, NotFoundError
from memos.facade.activation import Activation
from memos.facade.files import Files
from memos.facade.finding import Finding
from memos.facade.history import Histories
from memos.facade.keys import Keys
from memos.facade.life import Lives
from memos.facade.rights import Rights
from memos.facade.schedule import Scheduling
from memos.memories.declarative import DeclarativeMemory
from memos.tracing import traced

if TYPE_CHECKING:
    from memos.records.store import Records
    from memos.retrieval import Context, Explanation, Pipeline

M = TypeVar("M")


class MOS(Histories, Lives, Rights, Files, Keys, Scheduling, Finding, Activation):
    """The memory operating system: memories under one roof, with the same verbs.

    Thread-safe. Several processes may open one folder; writers take turns.

    Args:
        path:     a folder, made where it is not there: everything survives a restart and a
            crash. None: everything in this process, nothing on disk.
        durable:  every write waits for the disk, so that it survives a loss of power too.
        readonly: nothing is written.
        key:      a MasterKey, or where it is: "file:PATH", "env:NAME", "keyring:SERVICE/NAME".
            A folder that is made with one is encrypted, and opens with it only.
        audit:    True: every access and change is recorded, from now on whoever opens the folder;
            None: as the folder remembers; False: not by this object, with ``readonly`` only.
        clock:    seconds since 1970.

    Raises:
        StoreError: the folder cannot be used, or holds something else, or wants another key.
        ArgumentError, NotFoundError: there is no key where ``key`` says.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        durable: bool = False,
        readonly: bool = False,
        key: Any = None,
        audit: bool | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from memos.records.store import Records

        self.path = path
        self.records: Records = Records(path, durable=durable, readonly=readonly, key=key)
        self._clock = clock
        self._lock = threading.RLock()
        self._memories: dict[str, Any] = {}
        self._restored: set[str] = set()
        self._pipeline: Pipeline | None = None
        self._open_audit(audit)
        for row in self.records.memories():
            memory = _restored(row)
            if memory is not None:
                memory.bind(self.records)
                self._memories[row["name"]] = memory
                self._restored.add(row["name"])

    def __enter__(self) -> MOS:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write the caches of the indexes and close the files. The cubes are stored already."""
        self._close_life()
        self._close_schedule()
        with self._lock:
            for memory in self._memories.values():
                if isinstance(memory, DeclarativeMemory):
                    memory.close()
            self._close_audit()
            self.records.close()

    # Memories.

    def register_memory(self, memory: M) -> M:
        """Put a memory under this roof; returns it.

        A memory whose name the folder knows continues what is stored under it.

        Raises:
            ArgumentError: another memory has this name, or the stored one is of another kind.
        """
        name = getattr(memory, "name", None)
        if not isinstance(name, str) or not hasattr(
            memory, "retrieve" if not isinstance(memory, DeclarativeMemory) else "bind"
        ):
            raise ArgumentError(
                f"memory: GeneralTextMemory, TreeTextMemory, VectorMemory, GraphMemory, "
                f"KVCacheMemory or ParametricMemory wanted, got {type(memory).__name__}"
            )
        store = getattr(memory, "store", None)
        if self.records.database.is_sealed and not getattr(store, "is_encrypted", True):
            raise ArgumentError(
                f"memory {name!r}: encryption_key=MasterKey wanted for its folder, since the store "
                "of this MOS is encrypted"
            )
        with self._lock:
            known = self._memories.get(name)
            if known is memory:
                return memory
            if known is not None and name not in self._restored:
                raise ArgumentError(f"memory {name!r}: the name is taken by a {known.kind} memory")
            if isinstance(memory, DeclarativeMemory):
                memory.bind(self.records)
            elif known is not None:
                raise ArgumentError(f"memory {name!r}: the name is taken by a {known.kind} memory")
            if known is not None:
                known.close()
            self._restored.discard(name)
            self._memories[name] = self._watched(memory)
            self._schedule_memory(memory)
        return memory

    @property
    def memories(self) -> dict[str, Any]:
        """Every memory by its name; a copy. To a principal: those of which it may see anything."""
        with self._lock:
            found = dict(self._memories)
        return self._seen(found)

    def memory(self, name: str) -> Any:
        """The memory of this name. Raises NotFoundError, which names those there are."""
        with self._lock:
            if not isinstance(name, str):
                raise ArgumentError(f"memory_name: a string wanted, got {name!r}")
            found = self._memories.get(name)
        if found is None or not self._seen({name: found}):
            there = ", ".join(sorted(self.memories)) or "none"
            raise NotFoundError(f"memory_name: no memory {name!r}; there are: {there}")
        return found

    # The verbs.

    def add(
        self,
        memory_name: str,
        content: Any,
        metadata: Mapping[str, Any] | None = None,
        *,
        parent_id: str | None = None,
        relations: Sequence[Any] = (),
        importance: float | None = None,
        ttl_s: float | None = None,
        acl: Any = None,
        id: str | None = None,
        source: str | None = None,
        creator: str | None = None,
        derived_from: Sequence[str] = (),
        thread: str | None = None,
    ) -> MemCube:
        """Remember something; returns its cube.

        Args:
            memory_name:  a registered memory.
            content:      text; for a GraphMemory a node or relationship; for a VectorMemory a
                vector; for a KVCacheMemory a cache with its token ids; for a ParametricMemory the
                folder of an adapter.
            metadata:     any JSON; filters and full text read it.
            parent_id:    in a TreeTextMemory: the cube above.
            relations:    dicts with type, target (id of a cube of any memory), and optionally
                properties and weight.
            importance:   0 to 1.
            ttl_s:        seconds until it is forgotten.
            acl:          stored with the cube.
            id:           default: a UUIDv7.
            source, creator, derived_from: provenance.
            thread:       conversation or document whose cubes follow one another; default: what
                metadata says under thread, conversation or session.

        Raises:
            NotFoundError: an unknown memory, parent or related cube.
            ArgumentError: an argument is out of contract. Nothing is stored then.
        """
        memory = self.memory(memory_name)
        more = {
            "parent_id": parent_id,
            "relations": relations or None,
            "importance": importance,
            "ttl_s": ttl_s,
            "acl": acl,
            "id": id,
            "source": source,
            "creator": creator,
            "derived_from": derived_from or None,
            "thread": thread,
        }
        given = {name: value for name, value in more.items() if value is not None}
        if not isinstance(memory, DeclarativeMemory) and given.keys() - {"id", "acl"}:
            raise ArgumentError(
                f"{', '.join(sorted(given.keys() - {'id', 'acl'}))}: memory {memory_name!r} of "
                f"kind {memory.kind} does not take this"
            )
        cube: MemCube = memory.add(content, metadata, **given)
        return cube

    def add_many(
        self,
        memory_name: str,
        items: Iterable[Mapping[str, Any]],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> list[MemCube]:
        """Remember many things, a thousand in one transaction: dicts with content and the other
        arguments of ``add``. ``progress`` is called with the number stored so far."""
        found: list[MemCube] = self._declarative(memory_name).add_many(items, progress=progress)
        return found

    def get(self, id: str, memory_name: str | None = None) -> MemCube:
        """The cube with this id. Raises NotFoundError."""
        cube: MemCube = self._holder(id, memory_name).get(id)
        return cube

    def update(
        self,
        memory_name: str,
        memory_id: str,
        content: Any = None,
        metadata: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> MemCube:
        """A new version of a cube; the old one stays in its history.

        Args:
            content:  replaces the content; None: it stays.
            metadata: items to add or replace.
            more:     importance, ttl_s, author, source, acl.

        Raises: NotFoundError, ArgumentError.
        """
        memory = self.memory(memory_name)
        unknown = more.keys() - {"importance", "ttl_s", "author", "source", "acl"}
        if unknown or (more and not isinstance(memory, DeclarativeMemory)):
            names = ", ".join(sorted(unknown or more))
            raise ArgumentError(f"{names}: memory {memory_name!r} does not take this")
        cube: MemCube = memory.update(memory_id, content, metadata, **more)
        return cube

    def delete(self, memory_name: str, memory_id: str) -> None:
        """State DELETED: no query finds it any more, its history stays. Raises NotFoundError."""
        self.memory(memory_name).delete(memory_id)

    def relate(self, id: str, type: str, target: str, **more: Any) -> None:
        """Add a typed edge between two cubes of any memories; properties and weight in more."""
        self._holder(id, None).relate(id, type, target, **more)

    @traced("memos.retrieve", lambda hits: {"memos.hits": len(hits)})
    def retrieve(
        self,
        memory_name: str | None = None,
        query: Any = None,
        limit: int = 5,
        *,
        filters: Mapping[str, Any] | None = None,
        include_ancestors: bool = False,
        include_siblings: bool = False,
        include_descendants: bool = False,
        as_of: Any = None,
        include_archived: bool = False,
    ) -> list[Hit]:
        """What fits a query, best first.

        Args:
            memory_name: one memory; None: all that hold text, ranked together.
            query:       text; a vector for a VectorMemory; a dict with node, relationships and
                depth for a GraphMemory; "user:ID", "session:ID" or token ids for a
                KVCacheMemory.
            limit:       at most so many.
            filters:     conditions on the metadata, see memos.records.filters.
            include_ancestors, include_siblings, include_descendants: of a TreeTextMemory: fill
                these fields of the hits.
            as_of:       the memories as they were then: a time or a Version, see ``at``.
            include_archived: also cubes that are archived, or merged into others; what is
                archived comes back once it is used, see ``use``.

        Raises:
            NotFoundError: an unknown memory.
            ArgumentError: no query, or one that the memory cannot answer.
        """
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise ArgumentError(f"limit: a number of hits, at least 0, wanted, got {limit!r}")
        if query is None:
            raise ArgumentError("query: a text, vector, dict or token ids wanted, got None")
        if as_of is not None:
            from memos.records.scope import as_owner

            past = self.at(as_of, None if memory_name is None else [memory_name])
            with as_owner():  # it holds only what may be read
                return past.retrieve(
                    memory_name,
                    query,
                    limit,
                    filters=filters,
                    include_ancestors=include_ancestors,
                    include_siblings=include_siblings,
                    include_descendants=include_descendants,
                )
        chosen = None if memory_name is None else self.memory(memory_name)
        if chosen is not None and not isinstance(chosen, DeclarativeMemory):
            found: list[Hit] = chosen.retrieve(query, limit, filters=filters)
            return found
        if isinstance(query, str):
            names = None if chosen is None else [chosen.name]
            hits = self._search(query, limit, names, filters, include_archived)
        elif chosen is None:
            raise ArgumentError(
                f"query: text wanted where no memory is named, got {type(query).__name__}"
            )
        else:
            if not self.records.readonly:
                chosen.expire()
            scope = dataclasses.replace(chosen.scope(filters), archived=include_archived)
            hits = chosen.lookup(query, limit, scope)
        self._count(hits)
        self._report_uses(hits)
        if include_ancestors or include_siblings or include_descendants:
            return self._with_relatives(
                hits, include_ancestors, include_siblings, include_descendants
            )
        return hits

    @traced("memos.context", lambda context: {"memos.hits": len(context.hits)})
    def context(
        self,
        query: str,
        budget_tokens: int = 1000,
        memories: Sequence[str] | None = None,
        *,
        limit: int = 20,
        filters: Mapping[str, Any] | None = None,
        count_tokens: Callable[[str], int] | None = None,
        include_archived: bool = False,
        as_kv: bool = False,
        kv: str | None = None,
        system: str | None = None,
        share: float | None = None,
        max_kl: float | None = None,
    ) -> Context:
        """What a prompt should carry for this query: texts in order, each with its citation.

        Args:
            budget_tokens: of the whole text.
            memories:      names; None: all that hold text.
            limit:         hits to choose from.
            count_tokens:  of a text; default: a quarter of its characters.
            include_archived: also archived cubes; those that the context carries come back.
            as_kv:         as one KV cache, with system prompt and query, for
                ``model.generate(**context.inputs)``: memories that are activated cost no prefill,
                the others are prefilled and activated.
            kv, system:    see ``activate``.
            share, max_kl: how much is computed anew, see ``KVCacheMemory.compose``.

        Returns:
            A Context: ``str(context)`` is the text, ``context.citations`` says where each part
            came from. With ``as_kv`` a KVContext.
        """
        if not as_kv and (kv, system, share, max_kl) != (None,) * 4:
            raise ArgumentError("kv, system, share, max_kl: as_kv=True wanted with them")
        from memos.retrieval import synthesise

        hits = self._search(query, limit, memories, filters, include_archived)
        context = synthesise(query, hits, budget_tokens, count_tokens)
        self._carry(context.hits)
        self._report_uses(context.hits)
        self._associate(context.hits)
        if as_kv:
            return self._with_kv(context, kv, system, share, max_kl)
        return context

    def explain(self, result: Any) -> Explanation:
        """Why a hit or a context is as it is: every stage, signal and weight."""
        from memos.retrieval import explain

        return explain(result)

    @property
    def pipeline(self) -> Pipeline:
        """The stages of a query, a list to reorder, replace and inspect."""
        with self._lock:
            if self._pipeline is None:
                from memos.retrieval import default_pipeline

                self._pipeline = default_pipeline()
            return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def expire(self) -> int:
        """Delete what has outlived its time; returns how many. Queries do so by themselves."""
        return sum(m.expire() for m in self.memories.values() if isinstance(m, DeclarativeMemory))

    def stats(self) -> dict[str, Any]:
        """Memories with their kinds, numbers of cubes and of vectors; bytes on disk and, once
        there are budgets, the scheduler's figures, which a principal is not told."""
        from memos.records.scope import acting

        found = {}
        for name, memory in self.memories.items():
            found[name] = {"kind": memory.kind, **memory.stats()}
        if acting.get() is not None:
            return {"memories": found}
        more = {"scheduler": self._scheduler.stats()} if "_scheduler" in vars(self) else {}
        return {"memories": found, "bytes": self.records.file_bytes(), **more}


def _restored(row: Mapping[str, Any]) -> DeclarativeMemory | None:
    """A memory of the store as an object; None for a kind that this version does not know."""
    from memos import memories

    kinds: dict[str, type[DeclarativeMemory]] = {
        cls.kind: cls for name in memories.DECLARATIVE for cls in [getattr(memories, name)]
    }
    cls = kinds.get(row["kind"])
    return None if cls is None else cls.restored(row["name"], row["description"], row["config"])
