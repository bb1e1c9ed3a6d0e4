"""What ``mos.export`` does: memories in the order of their names, then adapters, then sessions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from memos.cube.memcube import MemcubeWriter, write_all
from memos.errors import AccessError, ArgumentError, NotFoundError
from memos.memories.declarative import DeclarativeMemory
from memos.records.scope import acting
from memos.records.transfer_out import Chosen, count_of, export_memory, with_context

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.facade.files import Progress
    from memos.records.scope import Scope
    from memos.records.store import Records

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"  # in PEFT's layout


def adapter_name(digest: str, file: str) -> str:
    """The member with a file of an adapter."""
    return f"adapters/{digest}/{file}"


def export(
    records: Records,
    memories: Mapping[str, Any],
    stream: BinaryIO,
    ids: Sequence[str] | None,
    *,
    named: bool,
    sign: Any,
    secret: str | bytes | None,
    progress: Progress | None,
) -> tuple[str, dict[str, int]]:
    """Write memories; returns the digest, and how much of each there is.

    Args:
        named: somebody asked for these; else those that may not be told are left out.
    """
    writer = MemcubeWriter(stream, sign=sign, secret=secret)
    declared = {n: memories[n] for n in sorted(memories) if _is_declarative(memories[n])}
    caches = {n: memories[n] for n in sorted(memories) if n not in declared}
    if not named and acting.get() is not None:
        caches = {}
    with records.database.snapshot(), records.database.read() as connection:
        if not named:
            declared = {n: m for n, m in declared.items() if _may(connection, m)}
        return _Export(records, connection, writer, ids, progress).run(declared, caches)


def _is_declarative(memory: Any) -> bool:
    return isinstance(memory, DeclarativeMemory)


def _may(connection: Connection, memory: DeclarativeMemory) -> bool:
    try:
        memory.scope().check_memory(connection, "admin", memory.name)
    except (AccessError, NotFoundError):
        return False
    return True


class _Export:
    def __init__(
        self,
        records: Records,
        connection: Connection,
        writer: MemcubeWriter,
        ids: Sequence[str] | None,
        progress: Progress | None,
    ) -> None:
        self.records, self.connection, self.writer = records, connection, writer
        self.ids = None if ids is None else list(dict.fromkeys(ids))
        self.progress = progress
        self.done = self.total = 0
        self.written: set[str] = set()  # digests of adapters

    def run(
        self, declared: Mapping[str, DeclarativeMemory], caches: Mapping[str, Any]
    ) -> tuple[str, dict[str, int]]:
        chosen = self._chosen(declared)
        sessions = {name: self._sessions(memory) for name, memory in caches.items()}
        self._check_ids(declared, sessions)
        self.total = sum(count_of(self.connection, one) for one in chosen)
        self.total += sum(map(len, sessions.values()))
        infos: list[dict[str, Any]] = []
        counts: dict[str, int] = {}
        for number, one in enumerate(chosen, 1):
            info = export_memory(self.connection, self.writer, number, one, self._tell)
            infos.append(info.as_json())
            counts[one.name] = info.cubes
            if one.kind == "parametric":
                self._adapters(one, declared[one.name])
        for name, memory in caches.items():
            if self.ids is not None and not sessions[name]:
                continue
            infos.append(self._cache(len(infos) + 1, name, memory, sessions[name]))
            counts[name] = len(sessions[name])
        return self.writer.close({"adapters": sorted(self.written), "memories": infos}), counts

    def _tell(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _chosen(self, memories: Mapping[str, DeclarativeMemory]) -> list[Chosen]:
        stored = {row["name"]: row for row in self.records.memories()}
        found = []
        for name, memory in memories.items():
            number, scope = memory.table.memory, memory.scope()
            # Who has it may read every version of every cube there.
            scope.check_memory(self.connection, "admin", name)
            seqs = None
            if self.ids is not None:
                numbers = memory.table.ids(self.connection, self.ids)
                seqs = with_context(self.connection, number, list(numbers.values()))
                if not seqs:
                    continue
            row = stored[name]
            found.append(
                Chosen(
                    memory=number,
                    name=name,
                    kind=row["kind"],
                    description=row["description"],
                    config=row["config"],
                    seqs=seqs,
                    check=None if acting.get() is None else partial(self._check_edges, name, scope),
                )
            )
        return found

    def _check_edges(self, name: str, scope: Scope, edges: str) -> None:
        """Raise AccessError for a relation to a cube that the principal may not read."""
        for _, memory, target, _, _ in json.loads(edges):
            there = self.records.locate(self.connection, target, dead=True)
            seqs = [seq for seq, where in there if where == (memory or name)]
            if len(scope.readable_among(self.connection, seqs)) < len(seqs):
                raise AccessError(
                    f"memory {name!r}: it has relations to cubes that may not be read here"
                )

    def _check_ids(
        self, declared: Mapping[str, DeclarativeMemory], sessions: Mapping[str, list[Any]]
    ) -> None:
        """Raise NotFoundError for an id that no memory has."""
        if self.ids is None:
            return
        missing = set(self.ids) - {one.id for some in sessions.values() for one in some}
        for memory in declared.values():
            known = memory.table.ids(self.connection, sorted(missing))
            missing -= known.keys()
        if missing:
            raise NotFoundError(f"ids: no cube {min(missing)!r} in {', '.join(declared) or 'none'}")

    def _adapters(self, chosen: Chosen, memory: Any) -> None:
        """Write the adapters that any version of the cubes names."""
        named = self.records.contents(chosen.memory)
        seqs = chosen.seqs
        wanted = {content["digest"] for seq, content in named if seqs is None or seq in seqs}
        for digest in sorted(wanted - self.written):  # two memories may share one
            for file, pieces in memory.files.file_pieces(digest).items():
                type = "tensors" if file == MODEL else "blob"
                with self.writer.member(adapter_name(digest, file), type) as member:
                    write_all(member, pieces)
        self.written |= wanted

    def _sessions(self, memory: Any) -> list[Any]:
        if acting.get() is not None:
            raise AccessError(
                f"memory {memory.name!r}: sessions have no rights of their own; the owner of the "
                "store exports them"
            )
        if memory.kind != "kv_cache":
            raise ArgumentError(f"memory {memory.name!r}: kind {memory.kind} cannot be exported")
        found = memory.tenant.sessions()
        return [one for one in found if self.ids is None or one.id in self.ids]

    def _cache(
        self, number: int, name: str, memory: Any, sessions: Sequence[Any]
    ) -> dict[str, Any]:
        from memos.kv.transfer import export_sessions

        identity, cold = memory.identity, memory.cold_identity
        if cold is not None and all(one.identity != cold.digest for one in sessions):
            cold = None  # a file without compressed sessions says nothing of them
        count, parts = export_sessions(
            self.writer, number, memory.tenant, identity, sessions, memory.text_of, self._tell, cold
        )
        return {
            **({} if cold is None else {"cold": dataclasses.asdict(cold)}),
            "description": memory.description,
            "identity": dataclasses.asdict(identity),
            "kind": memory.kind,
            "name": name,
            "parts": parts,
            "sessions": count,
        }
