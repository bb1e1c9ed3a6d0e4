"""What ``mos.import_`` does: verify the whole file, then store all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from sqlalchemy import select

from memos import memories as kinds
from memos.cube.memcube import MemcubeReader
from memos.errors import AccessError, ArgumentError, StoreError
from memos.facade.files import Imported, MemoryReport, Rebuild, only
from memos.facade.files_out import CONFIG, MODEL, adapter_name
from memos.memories.declarative import DeclarativeMemory
from memos.memories.embedded import Embedded
from memos.memories.stored import checker
from memos.records.schema import cubes, embedders
from memos.records.scope import Scope, acting
from memos.records.transfer import Embedder, MemoryInfo, parse_infos
from memos.records.transfer_in import Counts, Target, contents_from, import_memory
from memos.records.transfer_links import link, link_waiting

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.facade.files import Progress
    from memos.records.store import Records

_CACHE_KEYS = ("description", "identity", "kind", "name", "parts", "sessions")


class Import:
    """One import. ``made`` are the memories that it made, once ``run`` has returned."""

    def __init__(
        self,
        records: Records,
        memories: Mapping[str, Any],
        restored: frozenset[str],
        stream: BinaryIO,
        *,
        on_conflict: str,
        secret: str | bytes | None,
        trusted: Sequence[Any] | None,
        embedder: Any,
        names: Mapping[str, str] | None,
        progress: Progress | None,
    ) -> None:
        self.records, self.memories, self.restored = records, memories, restored
        self.names = dict(names or {})
        self.on_conflict, self.embedder, self.progress = on_conflict, embedder, progress
        self.reader = MemcubeReader(stream, secret=secret, trusted=trusted)
        self.made: dict[str, DeclarativeMemory] = {}
        self.undo: list[Callable[[], object]] = []
        self.done, self.total = 0, 2 * self.reader.num_bytes

    def run(self) -> Imported:
        """Do it. Raises as ``mos.import_``; nothing has changed then."""
        reader = self.reader
        only(reader.info, ("adapters", "memories"), "manifest.json: info")
        infos, caches = self._infos(reader.info["memories"])
        self._check_names([info.name for info in infos] + [one["name"] for one in caches])
        infos = [replace(info, name=self.names.get(info.name, info.name)) for info in infos]
        caches = [{**one, "name": self.names.get(one["name"], one["name"])} for one in caches]
        adapters = self._adapters(reader.info["adapters"])
        self._check_members(infos, caches, adapters)
        before = 0

        def verified(done: int, total: int) -> None:
            nonlocal before
            self._tell(done - before)
            before = done

        reader.verify(verified)
        report = Imported(reader.digest, reader.signer)
        try:
            with self.records.database.write() as connection:
                self._declarative(connection, infos, adapters, report)
                for number, info in enumerate(caches, len(infos) + 1):
                    self._cache(number, info, report)
        except BaseException:
            for call in reversed(self.undo):
                call()
            for name, made in self.made.items():
                made.close()
                self.records.forget(name)
            self.made.clear()
            raise
        for one in infos:
            self._settle(self.made.get(one.name) or self.memories[one.name], one)
        if self.progress is not None:
            self.progress(self.total, self.total)
        return report

    def _settle(self, memory: Any, info: MemoryInfo) -> None:
        """After the commit: what a memory object knows of its cubes."""
        if info.kind == "vector" and memory.dim is None and info.embedder is not None:
            memory.dim = info.embedder.dim
        if getattr(memory, "storage_backend", "") == "neo4j":
            memory.synchronise()

    def _tell(self, num_bytes: int) -> None:
        self.done += num_bytes
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)

    # The manifest.

    def _infos(self, value: Any) -> tuple[list[MemoryInfo], list[dict[str, Any]]]:
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise StoreError("manifest.json: memories: a list of objects wanted")
        caches = [one for one in value if one.get("kind") == "kv_cache"]
        infos = parse_infos(value[: len(value) - len(caches)])
        names = [info.name for info in infos]
        for one in caches:
            keys = ("cold", *_CACHE_KEYS) if "cold" in one else _CACHE_KEYS
            only(one, keys, "manifest.json: memory")
            sizes = one["parts"], one["sessions"]
            if not isinstance(one["name"], str) or not one["name"] or one["name"] in names:
                raise StoreError("manifest.json: memories: each by a name of its own wanted")
            if not all(type(size) is int and size >= 0 for size in sizes):
                raise StoreError("manifest.json: memory: sessions and parts wanted")
            names.append(one["name"])
        return infos, caches

    def _check_names(self, names: Sequence[str]) -> None:
        """Raise ArgumentError where memories cannot be called as is wished."""
        for old, new in self.names.items():
            if old not in names or not isinstance(new, str) or not new:
                raise ArgumentError(
                    f"names: of {', '.join(names) or 'none'} to others wanted, got {old!r}: {new!r}"
                )
        if len({self.names.get(name, name) for name in names}) < len(names):
            raise ArgumentError("names: another one for each memory wanted")

    def _adapters(self, value: Any) -> list[str]:
        """Digests of the adapters in the file."""
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise StoreError("manifest.json: adapters: digests wanted")
        if value != sorted(set(value)):
            raise StoreError("manifest.json: adapters: digests in order, each once, wanted")
        for digest in value:
            for file, type in ((CONFIG, "blob"), (MODEL, "tensors")):
                member = self.reader.members.get(adapter_name(digest, file))
                if member is None or member.type != type:
                    raise StoreError(f"adapter {digest[:64]}: {file} wanted, but there is none")
        return value

    def _check_members(
        self, infos: Sequence[MemoryInfo], caches: Sequence[Mapping[str, Any]], adapters: list[str]
    ) -> None:
        """Raise StoreError for a member that belongs to nothing."""
        known = {adapter_name(digest, file) for digest in adapters for file in (CONFIG, MODEL)}
        parts = [info.parts for info in infos] + [one["parts"] for one in caches]
        if sum(parts) > len(self.reader.members):
            raise StoreError("manifest.json: parts that are there wanted")
        for number, count in enumerate(parts, 1):
            for part in range(1, count + 1):
                for folder, suffix in (("records", "jsonl"), ("tensors", "safetensors"),
                                       ("blobs", "kv")):  # fmt: skip
                    known.add(f"{folder}/{number:04d}-{part:06d}.{suffix}")
        for name in self.reader.members.keys() - known:
            raise StoreError(f"member {name}: it belongs to no memory of the file")

    # Memories of records.

    def _declarative(
        self,
        connection: Connection,
        infos: Sequence[MemoryInfo],
        adapters: Sequence[str],
        report: Imported,
    ) -> None:
        targets: list[tuple[MemoryInfo, Target, int]] = []
        for number, info in enumerate(infos, 1):
            memory = self._memory(connection, info)
            target = self._target(connection, memory, info)
            first = self._next(connection)
            targets.append((info, target, first))
            counts = import_memory(
                connection,
                self.reader,
                number,
                info,
                target,
                skips=self.on_conflict == "skip",
                tell=self._tell,
            )
            report.memories[info.name] = self._report(info, target, counts)
        for info, target, first in targets:
            report.memories[info.name].waiting = link(connection, target.table, first, self.names)
        for _, target, first in targets:
            link_waiting(connection, target.table, first)
        for info, target, first in targets:
            if info.kind == "parametric":
                self._parametric(connection, info, target, first, set(adapters), report)

    def _next(self, connection: Connection) -> int:
        from memos.records.trees import next_seq

        return next_seq(connection)

    def _memory(self, connection: Connection, info: MemoryInfo) -> DeclarativeMemory:
        """The memory that takes the cubes of one of the file; made where there is none."""
        Scope(rights=acting.get()).check_memory(connection, "admin", info.name)
        memory = self.memories.get(info.name)
        if memory is None:
            return self._new(info)
        if memory.kind != info.kind:
            raise ArgumentError(
                f"memory {info.name!r}: it is of kind {memory.kind}, that of the file "
                f"of {info.kind}"
            )
        assert isinstance(memory, DeclarativeMemory)
        return memory

    def _new(self, info: MemoryInfo) -> DeclarativeMemory:
        known = {cls.kind: cls for cls in (getattr(kinds, n) for n in kinds.DECLARATIVE)}
        if info.kind not in known:
            raise StoreError(
                f"memory {info.name!r}: a kind of {', '.join(known)} wanted, got {info.kind[:40]!r}"
            )
        try:
            memory = known[info.kind].restored(info.name, info.description, info.config)
            assert isinstance(memory, DeclarativeMemory)
            if self.embedder is None:
                was = memory.embedded
                memory.embedded = Embedded(was.name, None, metric=was.metric, dtype=was.dtype)
            self.made[info.name] = memory
            memory.bind(self.records)
        except (ArgumentError, TypeError, ValueError) as error:
            raise StoreError(f"memory {info.name!r}: {error}") from None
        return memory

    def _target(
        self, connection: Connection, memory: DeclarativeMemory, info: MemoryInfo
    ) -> Target:
        some = select(cubes.c.seq).where(cubes.c.memory == memory.table.memory).limit(1)
        row = connection.execute(
            select(embedders).where(embedders.c.memory == memory.table.memory)
        ).first()
        maker = None
        if row is not None:
            maker = Embedder(row.identity, row.dim, row.metric, row.dtype)
        target = Target(
            table=memory.table,
            kind=info.kind,
            is_new=connection.execute(some).first() is None,
            check=checker(info.kind, getattr(memory, "dim", None)),
            encode=memory.embedded.made,
        )
        target.vectors = self._vectors(memory, info, maker)
        if target.vectors == "make" and maker is None:
            target.maker = _local(memory)
        return target

    def _vectors(self, memory: DeclarativeMemory, info: MemoryInfo, maker: Embedder | None) -> str:
        """What becomes of the vectors: "keep", "make" or "drop"."""
        if info.kind == "vector":
            _check_vectors(memory, info, maker)
            return "keep"
        file, local = info.embedder, _local(memory)
        if maker is not None:
            if file == maker:
                return "keep"
            return "make" if local == maker else "drop"
        if file is None:
            # A memory without vectors stays one, unless somebody said who makes them.
            given = info.name not in self.restored and info.name not in self.made
            return "make" if given and local is not None else "keep"
        return "keep" if local in (None, file) else "make"

    def _report(self, info: MemoryInfo, target: Target, counts: Counts) -> MemoryReport:
        told = {"keep": "kept", "make": "re-embedded", "drop": "dropped"}[target.vectors]
        if not counts.vectors and target.vectors != "make":
            told = "none"
        return MemoryReport(
            kind=info.kind,
            is_new=info.name in self.made,
            cubes=counts.cubes,
            versions=counts.versions,
            skipped=counts.skipped,
            vectors=told,
        )

    # Adapters.

    def _parametric(
        self,
        connection: Connection,
        info: MemoryInfo,
        target: Target,
        first: int,
        adapters: set[str],
        report: Imported,
    ) -> None:
        memory = self.made.get(info.name) or self.memories[info.name]
        wanted: set[str] = set()
        for content in contents_from(connection, target.table.memory, first):
            wanted.add(content["digest"])
        for digest in sorted(wanted):
            if digest not in adapters:
                raise StoreError(f"adapter {digest}: its files wanted, but there are none")
            self._put(memory, digest)
        report.rebuild += _foreign(connection, memory, first)

    def _put(self, memory: Any, digest: str) -> None:
        names = {file: adapter_name(digest, file) for file in (CONFIG, MODEL)}
        pieces = {file: self._told(name) for file, name in names.items()}
        sizes = {file: self.reader.members[name].num_bytes for file, name in names.items()}
        try:
            is_new = memory.files.put_files(digest, pieces, sizes)
        except ArgumentError as error:
            raise StoreError(str(error)) from None
        if is_new:
            self.undo.append(lambda: memory.files.delete(digest))

    def _told(self, name: str) -> Any:
        for piece in self.reader.pieces(name):
            self._tell(len(piece))
            yield piece

    # Sessions.

    def _cache(self, number: int, info: Mapping[str, Any], report: Imported) -> None:
        from memos.kv.transfer import parse_cold, parse_identity, read_sessions, store_session

        name, identity = info["name"], parse_identity(info["identity"])
        cold = parse_cold(info["cold"], identity) if "cold" in info else None
        in_file = {one.digest: one for one in (identity, cold) if one is not None}
        memory = self.memories.get(name)
        if acting.get() is not None:
            raise AccessError(f"memory {name!r}: the owner of the store imports sessions")
        if memory is not None and memory.kind != "kv_cache":
            raise ArgumentError(
                f"memory {name!r}: it is of kind {memory.kind}, that of the file of kv_cache"
            )
        why = dict.fromkeys(in_file, "no KVCacheMemory of this name is registered")
        if memory is not None:
            here = [memory.identity, memory.cold_identity]
            taken = {one.digest for one in here if one is not None}
            why = {
                digest: "" if digest in taken else _difference(one, memory.identity)
                for digest, one in in_file.items()
            }
        one = report.memories[name] = MemoryReport(kind="kv_cache")
        count = 0
        for stored, payloads in read_sessions(self.reader, number, info["parts"], identity, cold):
            count += 1
            session = stored.session
            made_for = in_file.get(session.identity, identity)
            refused = why[made_for.digest]
            if not refused and session.identity not in in_file:
                refused = "of an older model"
            if refused:
                report.rebuild.append(
                    Rebuild(
                        memory=name,
                        id=session.id,
                        kind="kv_cache",
                        why=refused,
                        made_for=asdict(made_for),
                        text=stored.text,
                        token_ids=tuple(session.token_ids),
                    )
                )
                continue
            assert memory is not None
            known = memory.tenant.session(session.id)
            if known is not None:
                if self.on_conflict != "skip" or known.token_ids != session.token_ids:
                    raise ArgumentError(
                        f"on_conflict: memory {name!r} has a session {session.id!r} already; "
                        "nothing was imported"
                    )
                one.skipped += 1
                continue
            store_session(memory.tenant, made_for, stored, payloads)
            self.undo.append(_deletion(memory.tenant, session.id))
            one.cubes += 1
        if count != info["sessions"]:
            raise StoreError(f"memory {name!r}: {info['sessions']} sessions wanted, got {count}")


def _deletion(tenant: Any, id: str) -> Callable[[], object]:
    return lambda: tenant.delete_session(id)


def _local(memory: DeclarativeMemory) -> Embedder | None:
    """What makes the vectors of a memory here."""
    embedded = memory.embedded
    if embedded.embedder is None:
        return None
    maker = embedded.embedder
    return Embedder(maker.identity, maker.dim, embedded.metric, embedded.dtype)


def _check_vectors(memory: Any, info: MemoryInfo, maker: Embedder | None) -> None:
    """Raise ArgumentError where vectors of a VectorMemory, its content, do not fit another."""
    file = info.embedder
    if file is None:
        return
    wanted = maker or Embedder(file.identity, memory.dim or file.dim, memory.metric, memory.dtype)
    if file != wanted:
        raise ArgumentError(
            f"memory {info.name!r}: vectors made by {wanted.identity} ({wanted.dim} numbers, "
            f"{wanted.metric}, {wanted.dtype}) wanted, the file has {file.identity} ({file.dim}, "
            f"{file.metric}, {file.dtype}); import it into a store without this memory"
        )


def _difference(file: Any, here: Any) -> str:
    """In words why KV of one identity is none of another; "" where it is."""
    if file.digest == here.digest:
        return ""
    other = [name for name in vars(here) if getattr(file, name, None) != getattr(here, name)]
    return f"made for another model or layout: {', '.join(n for n in other if n != 'digest')}"


def _foreign(connection: Connection, memory: Any, first: int) -> list[Rebuild]:
    """Adapters of new cubes whose base is not the model that the memory is attached to.

    Raises StoreError, ArgumentError: one without a name, or with one that another has.
    """
    found = []
    table, scope = memory.table, memory.scope()
    seqs = [s for s in table.recent(connection, scope, newest_first=False) if s >= first]
    loaded = table.load(connection, seqs, scope)
    for cube in (loaded[seq] for seq in seqs if seq in loaded):
        name = cube.metadata.get("name")
        if not isinstance(name, str) or not name:
            raise StoreError(f"memory {memory.name!r}, adapter {cube.id!r}: a name wanted")
        if len(table.recent(connection, memory.scope({"name": name}), 2)) > 1:
            raise ArgumentError(f"memory {memory.name!r}: it has an adapter {name!r} already")
        base = cube.content.get("base")
        if not base:
            continue
        fits = memory.fits(base)
        if fits:
            continue
        why = "made for another base model" if fits is False else "no model is attached to say"
        found.append(
            Rebuild(
                memory=memory.name,
                id=cube.id,
                kind="parametric",
                why=why,
                made_for=dict(base),
                sources=tuple(cube.derived_from),
            )
        )
    return found
