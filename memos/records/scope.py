"""Which cubes a call may see: the one place for states, expiry, filters and rights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, and_, or_

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

    @property
    def is_open(self) -> bool:
        """Whether everything that lives may be seen."""
        return not self.filters

    def clause(self, memory: int) -> ColumnElement[bool]:
        """SQL over ``cubes`` that is true for what may be seen of a memory."""
        return and_(self.lives(memory), compile_filter(self.filters, memory))

    def lives(self, memory: int) -> ColumnElement[bool]:
        """SQL that is true for what is neither deleted nor expired, filters aside."""
        return lives(memory, self.now)


def lives(memory: Any, now: Any) -> ColumnElement[bool]:
    """SQL over ``cubes``, from values or bound parameters."""
    return and_(
        cubes.c.memory == memory,
        cubes.c.state != DELETED,
        or_(cubes.c.expires_at.is_(None), cubes.c.expires_at > now),
    )
