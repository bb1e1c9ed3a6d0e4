"""Distillation: what transient memories say, kept as long-term cubes that name their sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from memos.cube import MemCube, Relation
from memos.lifecycle.duplicates import check_kind, same_statement
from memos.lifecycle.extract import Extractor, Insight, checked
from memos.lifecycle.facts import fact_of_cube, settle, since
from memos.lifecycle.words import content_of, words
from memos.records.jobs import done_before
from memos.records.schema import cubes
from memos.records.states import COLD, DELETED
from memos.records.writes import Change

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory

DISTILLED_FROM = "distilled_from"  # relation from an insight to each cube that says so
_GROUP = 20  # cubes that an extractor sees at once
_NEAR = 20  # cubes that may say what an insight says, or what it ends
# Metadata of the sources that an insight keeps where all of them agree.
_KEPT = words("user user_id user_name speaker author sender tenant project topic language lang")


def units_of(
    memory: DeclarativeMemory, connection: Connection, into: str, kind: str, is_all: bool = False
) -> list[tuple[str, Any]]:
    """What is to be distilled of a memory, cut into (key, payload): cubes of one conversation and
    one access list, in order. What was distilled before, in this version, is left out."""
    rows = connection.execute(
        select(cubes.c.id, cubes.c.thread, cubes.c.acl, cubes.c.version_digest)
        .where(
            cubes.c.memory == memory.table.memory,
            cubes.c.state.not_in((DELETED, *COLD)),
        )
        .order_by(cubes.c.seq)
    ).all()
    groups: dict[tuple[str | None, str | None], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.thread, row.acl), []).append(row)
    units = []
    for group in groups.values():
        for start in range(0, len(group), _GROUP):
            some = group[start : start + _GROUP]
            whole = hashlib.blake2b(digest_size=16)
            for part in (memory.name, into, *(row.version_digest.hex() for row in some)):
                whole.update(part.encode() + b"\0")
            units.append(
                (
                    whole.hexdigest(),
                    {"memory": memory.name, "into": into, "ids": [row.id for row in some]},
                )
            )
    known = set() if is_all else done_before(connection, kind, [key for key, _ in units])
    return [(key, payload) for key, payload in units if key not in known]


def extracted(
    memory: DeclarativeMemory, ids: Sequence[str], extract: Extractor
) -> list[tuple[Insight, dict[str, Any]]]:
    """The insights of these cubes, each with what it takes from its sources."""
    scope = memory.scope()
    with memory.records.database.read() as connection:
        seqs = memory.table.ids(connection, ids)
        loaded = memory.table.load(connection, list(seqs.values()), scope)
    found = [loaded[seqs[id]] for id in ids if seqs.get(id) in loaded]
    if not found:
        return []
    by_id = {cube.id: cube for cube in found}
    return [
        (insight, _inherited([by_id[id] for id in insight.sources]))
        for insight in checked(extract(found), found)
    ]


def keep(
    memory: DeclarativeMemory,
    connection: Connection,
    insights: Sequence[tuple[Insight, Mapping[str, Any]]],
    source: str,
    *,
    who: str | None = None,
) -> dict[str, float]:
    """Store insights in a memory; one that it has already gets the new sources.

    Args:
        source: name of the memory that the sources are in.

    Returns:
        new: cubes made; again: that said so already; ended: facts that others took the place of.
    """
    check_kind(memory)
    counts = {"new": 0.0, "again": 0.0, "ended": 0.0}
    for insight, inherited in insights:
        edges = [Relation(DISTILLED_FROM, id, {"memory": source}) for id in insight.sources]
        near = _near(memory, connection, insight.text)
        known = next((c for c in near.values() if _says(c, insight, inherited)), None)
        if known is not None:
            counts["again"] += _add_sources(memory, connection, known, insight, edges)
            continue
        metadata = {**inherited["metadata"], **insight.metadata, "insight": insight.kind}
        made = memory.add(
            insight.text,
            metadata,
            importance=insight.importance,
            relations=edges,
            derived_from=list(insight.sources),
            acl=inherited["acl"],
            source="distil",
            creator=who or "memos",
        )
        counts["new"] += 1
        if fact_of_cube(made) is not None:
            seqs = [*near, memory.table.seq(connection, made.id, memory.scope())]
            seqs += _about(memory, connection, made)
            counts["ended"] += settle(memory, connection, dict.fromkeys(seqs))
    return counts


def _inherited(sources: Sequence[MemCube]) -> dict[str, Any]:
    """Metadata on which the sources agree, when they were said, and their access list."""
    first = sources[0].metadata
    metadata = {
        key: first[key]
        for key in sorted(_KEPT & first.keys())
        if all(cube.metadata.get(key) == first[key] for cube in sources)
    }
    metadata["said_at"] = min(since(cube) for cube in sources)
    return {"metadata": metadata, "acl": sources[0].acl}


def _near(memory: DeclarativeMemory, connection: Connection, text: str) -> dict[int, MemCube]:
    scope = memory.scope()
    allowed = scope.allowed(connection, memory.table.memory)
    said = " ".join(content_of(text))
    seqs, _ = memory.table.fulltext.search(connection, said, _NEAR, allowed)
    return memory.table.load(connection, seqs.tolist(), scope)


def _about(memory: DeclarativeMemory, connection: Connection, cube: MemCube) -> list[int]:
    """Numbers of cubes that name what a fact is about, in whatever words."""
    fact = fact_of_cube(cube)
    allowed = memory.scope().allowed(connection, memory.table.memory)
    named = "" if fact is None else fact.subject
    seqs, _ = memory.table.fulltext.search(connection, named, 10 * _NEAR, allowed, every_word=True)
    found: list[int] = seqs.tolist()
    return found


def _says(cube: MemCube, insight: Insight, inherited: Mapping[str, Any]) -> bool:
    """Whether a cube says what an insight says, of the same one, to the same readers."""
    wanted = inherited["metadata"]
    return (
        isinstance(cube.content, str)
        and cube.acl == inherited["acl"]
        and all(cube.metadata.get(k) == v for k, v in wanted.items() if k != "said_at")
        and "valid_to" not in cube.metadata
        and (cube.content == insight.text or same_statement(cube.content, insight.text) is not None)
    )


def _add_sources(
    memory: DeclarativeMemory,
    connection: Connection,
    known: MemCube,
    insight: Insight,
    edges: Sequence[Relation],
) -> int:
    has = {edge.target for edge in known.relations if edge.type == DISTILLED_FROM}
    fresh = [edge for edge in edges if edge.target not in has]
    if not fresh or known.state == "FROZEN":
        return 0
    at = memory.scope().now
    seq = memory.table.seq(connection, known.id, memory.scope())
    for edge in fresh:
        other = memory._other(connection, edge.target)
        memory.table.relate(connection, seq, other, edge, Change(author="memos"), at)
    importance = min(1.0, max(known.importance, insight.importance) + 0.05 * len(fresh))
    memory.table.update(connection, seq, Change(importance=importance, author="memos"), at)
    return 1
