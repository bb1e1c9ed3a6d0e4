"""The kinds of jobs: sweep, distil and duplicates, over the memories of a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError
from memos.lifecycle import distil
from memos.lifecycle.duplicates import check_kind, groups_of, pairs_of
from memos.lifecycle.extract import Extractor, by_rules
from memos.lifecycle.facts import settle
from memos.lifecycle.jobs import Jobs, Kind
from memos.lifecycle.merging import merge
from memos.lifecycle.sweep import Policy, sweep

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory
    from memos.records.store import Records

_CHUNK = 100  # cubes whose duplicates are one unit


class Work:
    """What a store's jobs do. ``extractors``: by the name that a job gives.

    Args:
        memory: from a name to the memory.
    """

    def __init__(
        self, records: Records, memory: Callable[[str], Any], clock: Callable[[], float]
    ) -> None:
        self._memory = memory
        self._records = records
        self.extractors: dict[str, Extractor] = {"rules": by_rules}
        kinds = {
            "sweep": Kind(self._plan_sweep, self._sweep),
            "distil": Kind(self._plan_distil, self._keep, self._extract),
            "duplicates": Kind(self._plan_duplicates, self._merge, self._pairs),
            "facts": Kind(self._plan_facts, self._settle),
        }
        self.jobs = Jobs(records, kinds, clock)

    def name_of(self, extract: Extractor) -> str:
        """Under which a job of this process finds an extractor again."""
        name = f"given {id(extract)}"
        self.extractors[name] = extract
        return name

    # Sweeps: one unit for each memory.

    def _plan_sweep(self, arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
        Policy(**arguments.get("policy", {}))
        names = arguments.get("memories")
        if not isinstance(names, list):
            raise ArgumentError("memories: a list of names wanted")
        return [(name, {"memory": name, "policy": arguments["policy"]}) for name in names]

    def _sweep(self, connection: Connection, payload: Any, _: Any) -> dict[str, float]:
        done = sweep(self._memory(payload["memory"]), Policy(**payload["policy"]))
        found = {"archived": float(sum(done.archived.values())), "expired": float(done.expired)}
        return {**found, "deleted": float(done.deleted)}

    # Distillation: a conversation, or a part of it, is a unit.

    def _plan_distil(self, arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
        memory, into = self._memory(arguments["memory"]), self._memory(arguments["into"])
        check_kind(into)
        if arguments["extract"] not in self.extractors:
            raise ArgumentError("extract: its function is gone with the process that gave it")
        with self._records.database.read() as connection:
            units = distil.units_of(
                memory, connection, into.name, "distil", bool(arguments.get("again"))
            )
        for _, payload in units:
            payload["extract"] = arguments["extract"]
        return units

    def _extract(self, payload: Any) -> Any:
        extract = self.extractors.get(payload["extract"])
        if extract is None:
            raise ArgumentError("extract: its function is gone with the process that gave it")
        found = distil.extracted(self._memory(payload["memory"]), payload["ids"], extract)
        # Embedding takes long: what is kept is found in the cache then.
        self._memory(payload["into"]).embedded.encode([insight.text for insight, _ in found])
        return found

    def _keep(self, connection: Connection, payload: Any, prepared: Any) -> dict[str, float]:
        into = self._memory(payload["into"])
        return distil.keep(into, connection, prepared, payload["memory"])

    # Duplicates: some cubes are a unit.

    def _plan_duplicates(self, arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
        memory = self._memory(arguments["memory"])
        check_kind(memory)
        with self._records.database.read() as connection:
            seqs = memory.table.recent(connection, memory.scope(), newest_first=False)
        return [
            (
                f"{memory.name}/{start}",
                {"memory": memory.name, "seqs": seqs[start : start + _CHUNK]},
            )
            for start in range(0, len(seqs), _CHUNK)
        ]

    def _pairs(self, payload: Any) -> Any:
        memory = self._memory(payload["memory"])
        with self._records.database.read() as connection:
            return pairs_of(memory, connection, payload["seqs"])

    def _merge(self, connection: Connection, payload: Any, prepared: Any) -> dict[str, float]:
        made = _merged(self._memory(payload["memory"]), connection, prepared)
        return {"merged": float(len(made))}

    # Facts: a memory is a unit.

    def _plan_facts(self, arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(arguments["memory"], {"memory": arguments["memory"]})]

    def _settle(self, connection: Connection, payload: Any, _: Any) -> dict[str, float]:
        return {"changed": float(settle(self._memory(payload["memory"]), connection))}


def sweep_arguments(policy: Policy, memories: Sequence[str]) -> dict[str, Any]:
    """What a job of kind "sweep" is submitted with."""
    return {"policy": dataclasses.asdict(policy), "memories": list(memories)}


def merge_all(memory: DeclarativeMemory) -> list[MemCube]:
    """Merge all near-duplicates of a memory; returns the cubes that were made."""
    database = memory.records.database
    with database.read() as connection:
        seqs = memory.table.recent(connection, memory.scope(), newest_first=False)
        pairs = pairs_of(memory, connection, seqs)
    with database.write() as connection:
        return _merged(memory, connection, pairs)


def merge_these(memory: DeclarativeMemory, ids: Sequence[str], why: str | None) -> list[MemCube]:
    """Merge cubes that say the same by the rules, or because the caller says why."""
    with memory.records.database.write() as connection:
        made = merge(memory, connection, ids, why=why)
        return [] if made is None else [made]


def _merged(
    memory: DeclarativeMemory, connection: Connection, pairs: Sequence[Any]
) -> list[MemCube]:
    near = {(pair.first, pair.second): pair.similarity for pair in pairs}
    made = []
    for ids in groups_of(pairs):
        living = [id for id in ids if memory.table.find(connection, id, memory.scope())]
        similar = [near[key] for key in near if set(key) <= set(ids) and near[key] is not None]
        least = min((one for one in similar if one is not None), default=None)
        cube = merge(memory, connection, living, similarity=least)
        if cube is not None:
            made.append(cube)
    return made
