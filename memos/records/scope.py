"""Which cubes a call may see: the one place for states, expiry, filters and rights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, or_, select

from memos.errors import ArgumentError
from memos.records.filters import compile_filter
from memos.records.schema import cubes

DELETED = "DELETED"


@dataclass(frozen=True)
class Scope:
    """Passed down to every path of a query - text, vector, graph - before anything is ranked.

    Args:
        filters: as in filters.py.
        now:     seconds since 1970; what has expired by then is not seen.
    """

    filters: Mapping[str, Any] = field(default_factory=dict)
    now: float = field(default_factory=time.time)
    _allowed: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.filters, Mapping):
            raise ArgumentError(f"filters: a dict wanted, got {self.filters!r}")

    @property
    def is_open(self) -> bool:
        """Whether everything that lives may be seen."""
        return not self.filters

    def clause(self, memory: int) -> ColumnElement[bool]:
        """SQL over ``cubes`` that is true for what may be seen of a memory."""
        return and_(self.lives(memory), compile_filter(self.filters, memory))

    def allowed(self, connection: Connection, memory: int) -> Any:
        """Numbers of what may be seen, [n] int64, ascending; None: everything in the indexes.

        Looked up once for all paths of one query. What is deleted is in no index, and what has
        expired since the last sweep falls out when it is loaded.
        """
        if self.is_open:
            return None
        if memory not in self._allowed:
            import numpy

            statement = select(cubes.c.seq).where(self.clause(memory))
            rows = connection.execute(statement).fetchall()
            found = numpy.fromiter((row[0] for row in rows), numpy.int64, len(rows))
            self._allowed[memory] = numpy.sort(found)
        return self._allowed[memory]

    def lives(self, memory: int) -> ColumnElement[bool]:
        """SQL that is true for what is neither deleted nor expired, filters aside."""
        return lives(memory, self.now)


def lives(memory: Any, now: Any) -> ColumnElement[bool]:
    """SQL over ``cubes``, from values or bound parameters.

    The memory is compared as memory + 0, which no index answers: numbers, ids, digests or times
    lead to the rows, and SQLite without statistics would rather read the whole memory.
    """
    return and_(
        cubes.c.memory + 0 == memory,
        cubes.c.state != DELETED,
        or_(cubes.c.expires_at.is_(None), cubes.c.expires_at > now),
    )
