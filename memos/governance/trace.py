"""Traces: where a cube comes from and what became of it, and what stood in a prompt and why."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memos.cube import Version
from memos.governance.lists import origin_of, rights_on
from memos.records.rights import ADMIN

if TYPE_CHECKING:
    from memos.governance.audit import Audit, Record
    from memos.records.rights import Actor

_SIGNALS = 3  # named for each memory of a context


@dataclass(frozen=True)
class Origin:
    """Where a cube comes from.

    Args:
        source, creator: as its first version says.
        at:              when it was made, seconds since 1970.
        derived_from:    ids of the cubes it was made of.
    """

    source: str | None
    creator: str | None
    at: float
    derived_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reached:
    """A memory that stood in a prompt, or did not get there.

    Args:
        memory, id, version: of the cube; memory "" and version 0 where nothing says.
        number: of its citation in the text; 0: it is not in it.
        why:    what put it there, the strongest first; or what kept it out.
    """

    memory: str
    id: str
    version: int
    number: int
    why: str


@dataclass(frozen=True)
class Trace:
    """What is known of a cube, or of a context.

    Args:
        id, memory: of the cube; "" for a context.
        origin:   of the cube.
        changes:  its versions, oldest first.
        uses:     audit records that name it, or of the context, oldest first.
        reached:  of a context: every memory that was a candidate, those in the text first.
    """

    id: str = ""
    memory: str = ""
    origin: Origin | None = None
    changes: tuple[Version, ...] = ()
    uses: tuple[Record, ...] = ()
    reached: tuple[Reached, ...] = ()

    def __str__(self) -> str:
        lines = []
        if self.origin is not None:
            by = f" by {self.origin.creator}" if self.origin.creator else ""
            of = f" from {self.origin.source}" if self.origin.source else ""
            lines.append(f"{self.memory}/{self.id}: made {_when(self.origin.at)}{by}{of}")
            if self.origin.derived_from:
                lines.append(f"  of {', '.join(self.origin.derived_from)}")
        lines += [
            f"  version {v.number}  {_when(v.at)}  {v.state}"
            + (f"  {v.author}" if v.author else "")
            for v in self.changes
        ]
        for one in self.reached:
            place = f"[{one.number}]" if one.number else "not in it"
            lines.append(f"  {place:9s} {one.memory}/{one.id} version {one.version}: {one.why}")
        for use in self.uses:
            why = f"  ({use.why})" if use.why else ""
            lines.append(f"  {_when(use.at)}  {use.who}  {use.what}  {use.result}{why}")
        return "\n".join(lines)


def trace_cube(memory: Any, id: str, audit: Audit | None, actor: Actor | None) -> Trace:
    """What is known of one cube. Raises NotFoundError."""
    versions: list[Version] = memory.history(id)
    origin = Origin(*origin_of(memory, id, actor))
    if versions and versions[0].number == 1:
        origin = dataclasses.replace(origin, source=versions[0].source)
    uses = [] if audit is None else [r for r in audit.records(id=id) if r.names(id, memory.name)]
    if actor is not None:
        with actor.database.read() as connection:
            bits = rights_on(connection, memory, id, actor)
        if not bits & ADMIN:
            uses = [record for record in uses if record.who == actor.principal]
        uses = [_about(record, memory.name, id) for record in uses]
    return Trace(id, memory.name, origin, tuple(versions), tuple(uses))


def trace_context(context: Any, told: Sequence[Record], explanation: Any) -> Trace:
    """Which memories reached a prompt, and why.

    Args:
        context:     a Context; None: only the records know of it.
        told:        audit records of it.
        explanation: of the context.
    """
    reached: list[Reached] = []
    if context is not None:
        because = {(e.memory, e.id): _because(e) for e in explanation.hits}
        kept_out = dict(context.left_out)
        cited = {(c.memory, c.id) for c in context.citations}
        for one in context.citations:
            why = because.get((one.memory, one.id), "")
            reached.append(Reached(one.memory, one.id, one.version, one.number, why))
        for hit in context.hits:
            if (hit.memory, hit.id) not in cited:
                why = kept_out.get(hit.id, "left out")
                reached.append(Reached(hit.memory, hit.id, hit.versions, 0, why))
    elif told:
        record = told[-1]
        scores = {tuple(one[:2]): one[3] for one in record.cubes if len(one) > 3}
        for number, (memory, id, version) in enumerate(record.more.get("cited", ()), 1):
            why = f"score {scores[memory, id]:g}" if (memory, id) in scores else ""
            reached.append(Reached(memory, id, version, number, why))
        for id, why in record.more.get("left_out", ()):
            where = next((one for one in record.cubes if one[1] == id), ("", id, 0))
            reached.append(Reached(where[0], id, where[2], 0, why))
    return Trace(uses=tuple(told), reached=tuple(reached))


def _about(record: Record, memory: str, id: str) -> Record:
    """The record without the names of other cubes."""
    mine = [
        tuple(one for one in listed if one[:2] == (memory, id))
        for listed in (record.cubes, record.changed)
    ]
    return dataclasses.replace(record, cubes=mine[0], changed=mine[1], more={})


def _because(explained: Any) -> str:
    signals = ", ".join(f"{s.name} {s.adds:+.2f}" for s in explained.signals[:_SIGNALS])
    return f"score {explained.score:.2f}" + (f" ({signals})" if signals else "")


def _when(seconds: float) -> str:
    try:
        at = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):  # beyond the calendar
        return f"{seconds:g} s after 1970"
    return f"{at:%Y-%m-%d %H:%M:%S}"
