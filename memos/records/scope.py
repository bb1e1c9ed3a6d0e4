"""Which cubes a call may see: the one place for states, expiry, filters and rights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Select, and_, false, or_, select, true

from memos.errors import ArgumentError
from memos.records.filters import compile_filter
from memos.records.schema import cubes
from memos.records.states import ARCHIVED, DELETED, FROZEN, MERGED

if TYPE_CHECKING:
    from memos.records.rights import Actor
    from memos.records.rights_seen import Readable

__all__ = ["DELETED", "Scope", "acting", "as_owner", "lives"]

# Who acts in this thread or task; None: the owner, who may do everything.
acting: ContextVar[Actor | None] = ContextVar("memos_acting", default=None)


@contextmanager
def as_owner() -> Iterator[None]:
    """In this block nobody's rights count: for what a call does beside what it was asked."""
    token = acting.set(None)
    try:
        yield
    finally:
        acting.reset(token)


@dataclass(frozen=True)
class Scope:
    """Passed down to every path of a query - text, vector, graph - before anything is ranked.

    Args:
        filters: as in filters.py.
        now:     seconds since 1970; what has expired by then is not seen.
        archived: whether cubes that are ARCHIVED, or MERGED into others, are seen too.
        rights:   of the principal who asks; None: the owner's, everything.
    """

    filters: Mapping[str, Any] = field(default_factory=dict)
    now: float = field(default_factory=time.time)
    archived: bool = False
    rights: Actor | None = None
    _allowed: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.filters, Mapping):
            raise ArgumentError(f"filters: a dict wanted, got {self.filters!r}")

    @property
    def is_open(self) -> bool:
        """Whether everything that lives may be seen."""
        return not self.filters and self.rights is None

    def clause(self, memory: int) -> ColumnElement[bool]:
        """SQL over ``cubes`` that is true for what may be seen of a memory."""
        return and_(self.lives(memory), self.restriction(memory))

    def restriction(self, memory: int) -> ColumnElement[bool]:
        """As ``clause``, without asking whether it lives: filters and rights."""
        found = compile_filter(self.filters, memory)
        return found if self.rights is None else and_(found, self.rights.clause())

    def restrict(self, statement: Select[Any], memory: int) -> Select[Any]:
        """A statement over ``cubes``, which stands in a module, for what passes filters and
        rights."""
        if self.is_open:
            return statement
        if self.rights is not None and not self.filters:
            return self.rights.restrict(statement)
        return statement.where(self.restriction(memory))

    def allowed(self, connection: Connection, memory: int) -> Any:
        """Numbers of what may be seen, [n] int64, ascending; None: everything in the indexes.

        Looked up once for all paths of one query. What is deleted is in no index, and what has
        expired since the last sweep falls out when it is loaded.
        """
        if self.is_open:
            return None
        if memory not in self._allowed:
            self._allowed[memory] = self._look_up(connection, memory)
        return self._allowed[memory]

    def readable(self, connection: Connection, memory: int) -> Readable | None:
        """What the principal may read of a memory, filters aside; None: the owner asks."""
        if self.rights is None:
            return None
        from memos.records.rights_seen import views_of

        return views_of(self.rights.database).get(connection, self.rights, memory)

    def _look_up(self, connection: Connection, memory: int) -> Any:
        import numpy

        view = self.readable(connection, memory)
        if not self.filters and view is not None:
            return None if view.is_all else view.seqs
        filtered = and_(self.lives(memory), compile_filter(self.filters, memory))
        rows = connection.execute(select(cubes.c.seq).where(filtered)).fetchall()
        found = numpy.sort(numpy.fromiter((row[0] for row in rows), numpy.int64, len(rows)))
        if view is None or view.is_all:
            return found
        from memos.records.rights_seen import intersected

        return intersected(found, view.seqs)

    # Of any memory, for what one cube says of another.

    def readable_among(self, connection: Connection, seqs: Sequence[int]) -> set[int]:
        """Which of these cubes, of any memory and in any state, the principal may read."""
        return set(seqs) if self.rights is None else self.rights.readable(connection, seqs)

    def check_memory(self, connection: Connection, right: str, memory: str) -> None:
        """Raise AccessError where the principal has no such right on a memory."""
        if self.rights is not None:
            self.rights.check_memory(connection, right, memory)

    def check_cube(self, connection: Connection, right: str, seq: int, id: str) -> None:
        """Raise AccessError where the principal has no such right on a cube that it may see."""
        if self.rights is not None:
            self.rights.check_cube(connection, right, seq, id)

    def lives(self, memory: int) -> ColumnElement[bool]:
        """SQL that is true for what is neither deleted nor expired, filters aside."""
        return lives(memory, self.now, self.archived)


def lives(memory: Any, now: Any, archived: Any) -> ColumnElement[bool]:
    """SQL over ``cubes``, from values or bound parameters.

    The memory is compared as memory + 0, which no index answers: numbers, ids, digests or times
    lead to the rows, and SQLite without statistics would rather read the whole memory.
    """
    return and_(
        cubes.c.memory + 0 == memory,
        cubes.c.state != DELETED,
        or_(_flag(archived), and_(cubes.c.state != ARCHIVED, cubes.c.state != MERGED)),
        or_(cubes.c.expires_at.is_(None), cubes.c.expires_at > now, cubes.c.state == FROZEN),
    )


def _flag(value: Any) -> ColumnElement[bool]:
    return (true() if value else false()) if isinstance(value, bool) else value == 1
