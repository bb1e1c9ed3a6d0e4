"""Sweeps: which cubes stay in the indexes, and which are archived or forgotten.

    value = importance * I + use * log2(1 + heat) + recency * 2 ** (-age / half_life_s)

I is the cube's importance from 0 to 1, heat its uses with decay (memos.records.uses), age the
time since it was used or written last. The least valuable cubes leave first. What is frozen,
pinned or in use stays; so does a cube of a tree as long as one below it stays, and a relationship
of a graph goes when the first of its ends goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError
from memos.records.states import AGE, ARCHIVED, CAPACITY, FROZEN, HOT, IMPORTANCE
from memos.records.uses import HALF_LIFE_S

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory

_BATCH = 4096  # cubes of one transaction
_BULK = 1 << 20  # of one where the rest is indexed anew
_DAY_S = 86400.0


@dataclass(frozen=True)
class Policy:
    """What a sweep does to one memory. None: not for this reason.

    Args:
        hot_cubes:  at most so many cubes in the indexes.
        hot_bytes:  at most so many bytes of their texts, contents, metadata and vectors.
        archive_after_s: cubes that were neither used nor written for so long are archived ...
        keep_importance: ... except those of at least this importance.
        least_importance: cubes of less importance are archived once they are ``settle_s`` old.
        settle_s:   how long a new cube, or one just used, is safe from age and importance.
        delete_after_s: archived cubes are deleted after so long.
        headroom:   share of a budget that a sweep leaves free: as long as no more than that is
            added and comes back until the next sweep, the budget holds at every moment.
        importance, use, recency, half_life_s: of the value, see above.

    Raises:
        ArgumentError: an argument is out of contract.
    """

    hot_cubes: int | None = None
    hot_bytes: int | None = None
    archive_after_s: float | None = None
    keep_importance: float = 1.0
    least_importance: float | None = None
    settle_s: float = _DAY_S
    delete_after_s: float | None = None
    headroom: float = 0.05
    importance: float = 1.0
    use: float = 0.5
    recency: float = 1.0
    half_life_s: float = HALF_LIFE_S

    def __post_init__(self) -> None:
        for name in ("hot_cubes", "hot_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ArgumentError(f"{name}: a number of at least 0 wanted, got {value!r}")
        for name in ("archive_after_s", "settle_s", "delete_after_s", "half_life_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and value >= 0):
                raise ArgumentError(f"{name}: seconds of at least 0 wanted, got {value!r}")
        for name in ("keep_importance", "least_importance", "headroom"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 <= value <= 1):
                raise ArgumentError(f"{name}: a number from 0 to 1 wanted, got {value!r}")
        if not self.half_life_s:
            raise ArgumentError("half_life_s: seconds above 0 wanted, got 0")


@dataclass
class Swept:
    """What a sweep did to one memory.

    Args:
        memory:   its name.
        hot:      cubes in the indexes afterwards; ``hot_bytes``: theirs, where there is a budget.
        expired:  deleted because their time was over.
        archived: trigger -> how many.
        deleted:  archived ones that were deleted.
        over:     cubes, or bytes, above the budget that could not leave: frozen, pinned, in use.
    """

    memory: str
    hot: int = 0
    hot_bytes: int | None = None
    expired: int = 0
    archived: dict[str, int] = field(default_factory=dict)
    deleted: int = 0
    over: int = 0


def sweep(
    memory: DeclarativeMemory,
    policy: Policy,
    *,
    who: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Swept:
    """Carry out a policy on a memory.

    Args:
        progress: called with the number of cubes that were archived so far.

    Returns:
        What was done. A sweep that dies has done a part of it: each cube as a whole or not.

    Cost: reads a few numbers of every cube in the indexes; what leaves costs as ``Life.move``.
    """
    records, now = memory.records, memory.scope().now
    records.uses.write()
    done = Swept(memory.name, expired=memory.expire())
    with records.database.read() as connection:
        plan = _Plan(connection, memory, policy, now)
    moved = 0
    for trigger, why, seqs in plan.leaving():
        # Taking words out one by one pays for few; else the rest is indexed anew, once.
        size = _BULK if 8 * len(seqs) > plan.hot else _BATCH
        for start in range(0, len(seqs), size):
            some = seqs[start : start + size]
            with records.database.write() as connection:
                left = memory.table.life.move(
                    connection, some, ARCHIVED, trigger=trigger, at=now, who=who, why=why,
                    lenient=True,
                )  # fmt: skip
                memory.left(connection, some)
            done.archived[trigger] = done.archived.get(trigger, 0) + left
            moved += left
            if progress is not None:
                progress(moved)
    done.hot = plan.hot - moved
    done.over = plan.over
    if policy.hot_bytes is not None:
        done.hot_bytes = plan.bytes_left
    if policy.delete_after_s is not None:
        done.deleted = _delete_old(memory, now - policy.delete_after_s, now, who)
    return done


class _Plan:
    """What leaves a memory, and why.

    Args:
        now: seconds since 1970.
    """

    def __init__(
        self, connection: Connection, memory: DeclarativeMemory, policy: Policy, now: float
    ) -> None:
        import numpy

        self.policy, self.over = policy, 0
        columns = _read(connection, memory, policy.hot_bytes is not None)
        self.seqs, self.bytes = columns["seq"], columns["bytes"]
        self.hot = len(self.seqs)
        heat = columns["heat"] * numpy.exp2(-numpy.maximum(now - columns["last"], 0) / HALF_LIFE_S)
        self.age = numpy.maximum(now - numpy.maximum(columns["last"], columns["written"]), 0)
        self.importance = columns["importance"]
        self.value = (
            policy.importance * self.importance
            + policy.use * numpy.log2(1 + heat)
            + policy.recency * numpy.exp2(-self.age / policy.half_life_s)
        )
        held = memory.table.life.pinned(connection)
        busy = memory.in_use()
        held |= set(memory.table.ids(connection, sorted(busy)).values()) if busy else set()
        stays = columns["frozen"] | numpy.isin(self.seqs, numpy.array(sorted(held), numpy.int64))
        self.stays, self.order = stays, numpy.arange(self.hot)
        rank = numpy.zeros(self.hot, numpy.int64)  # of equal value the lower ones go first
        parents = columns["parent"]
        if (parents >= 0).any():
            rank = self._raise_parents(parents)
        if memory.kind == "graph":
            rank = self._lower_relationships(connection)
        self.order = numpy.lexsort((self.seqs, rank, self.value))
        self.bytes_left = int(self.bytes.sum())

    def leaving(self) -> list[tuple[str, str, list[int]]]:
        """(trigger, why, numbers) in the order in which they leave."""
        import numpy

        policy = self.policy
        gone = numpy.zeros(self.hot, bool)
        found = []
        old = self.age >= policy.settle_s
        if policy.archive_after_s is not None:
            wanted = (self.age >= policy.archive_after_s) & (
                self.importance < policy.keep_importance
            )
            wanted = self._with_all_below(wanted & old)
            found.append((AGE, f"not used for {policy.archive_after_s:g} s", wanted))
        if policy.least_importance is not None:
            wanted = self._with_all_below((self.importance < policy.least_importance) & old)
            found.append((IMPORTANCE, f"importance below {policy.least_importance:g}", wanted))
        chosen = []
        for trigger, why, wanted in found:
            fresh = wanted & ~gone
            gone |= fresh
            chosen.append((trigger, why, self._listed(fresh)))
        for budget, size, what in (
            (policy.hot_cubes, numpy.ones(self.hot, numpy.int64), "cubes"),
            (policy.hot_bytes, self.bytes, "bytes"),
        ):
            if budget is None:
                continue
            excess = int(size[~gone].sum()) - budget + int(budget * policy.headroom)
            if excess > 0:
                wanted = self._least(size, excess, gone)
                gone |= wanted
                self.over = max(self.over, int(size[~gone].sum()) - budget)
                chosen.append((CAPACITY, f"more than {budget} {what}", self._listed(wanted)))
        self.bytes_left = int(self.bytes[~gone].sum())
        return [(trigger, why, seqs) for trigger, why, seqs in chosen if seqs]

    def _listed(self, wanted: Any) -> list[int]:
        listed: list[int] = self.seqs[self.order[wanted[self.order]]].tolist()
        return listed

    def _least(self, size: Any, excess: int, gone: Any) -> Any:
        """The least valuable ones that may leave, as many as are too many."""
        import numpy

        may = self.order[~(gone | self.stays)[self.order]]
        enough = int(numpy.searchsorted(numpy.cumsum(size[may]), excess)) + 1
        wanted = numpy.zeros(self.hot, bool)
        wanted[may[:enough]] = True
        return wanted

    def _with_all_below(self, wanted: Any) -> Any:
        """Those of them whose dependents go too: a value that stays keeps what is above it."""
        wanted = wanted & ~self.stays
        for lower, upper in self._levels:
            kept = ~wanted[lower]
            wanted[upper[kept]] = False
        return wanted

    # Of each level, deepest first: (places of cubes, places of those that they hang on).
    _levels: Sequence[tuple[Any, Any]] = ()

    def _raise_parents(self, parents: Any) -> Any:
        """A cube is worth what the best one below it is worth; returns minus its depth."""
        import numpy

        places = numpy.searchsorted(self.seqs, parents)
        places = numpy.minimum(places, self.hot - 1)
        above = numpy.where((parents >= 0) & (self.seqs[places] == parents), places, -1)
        depth = numpy.zeros(self.hot, numpy.int64)
        up = above.copy()
        while (up >= 0).any():
            depth += up >= 0
            up = numpy.where(up >= 0, above[up], -1)
        levels = []
        for level in range(int(depth.max()), 0, -1):
            lower = numpy.flatnonzero(depth == level)
            levels.append((lower, above[lower]))
            numpy.maximum.at(self.value, above[lower], self.value[lower])
            numpy.logical_or.at(self.stays, above[lower], self.stays[lower])
        self._levels = levels
        return -depth

    def _lower_relationships(self, connection: Connection) -> Any:
        """A relationship is worth what its lesser end is worth, and goes before it."""
        import numpy
        from sqlalchemy import select

        from memos.records.schema import relations

        edge = relations.c
        rows = connection.execute(
            select(edge.cube, edge.source, edge.target).where(edge.cube.is_not(None))
        ).all()
        ends = numpy.array([tuple(row) for row in rows], numpy.int64).reshape(-1, 3)
        places = numpy.minimum(numpy.searchsorted(self.seqs, ends), self.hot - 1)
        here = (self.seqs[places] == ends).all(axis=1) if self.hot else numpy.zeros(0, bool)
        cube, source, target = places[here].T
        for end in (source, target):
            numpy.logical_or.at(self.stays, end, self.stays[cube])
        self.value[cube] = numpy.minimum(self.value[source], self.value[target])
        self._levels = [(cube, source), (cube, target)]
        rank = numpy.zeros(self.hot, numpy.int64)
        rank[cube] = -1
        return rank


def _read(connection: Connection, memory: DeclarativeMemory, with_bytes: bool) -> dict[str, Any]:
    """Columns [n] of the cubes in the indexes, by their numbers."""
    import numpy

    size, join = "0", ""
    if with_bytes:
        size = (
            "length(c.text) + coalesce(length(c.content), 0) + length(c.metadata) "
            "+ coalesce(length(v.data), 0) + coalesce(length(v.tokens), 0)"
        )
        join = "LEFT JOIN vectors AS v ON v.seq = c.seq"
    marks = ", ".join("?" * len(HOT))
    rows = connection.exec_driver_sql(
        f"SELECT c.seq, c.state = ?, c.importance, max(c.created_at, c.updated_at), "
        f"coalesce(c.parent, -1), coalesce(u.heat, 0.0), coalesce(u.last, -1e18), {size} "
        f"FROM cubes AS c LEFT JOIN uses AS u ON u.seq = c.seq {join} "
        f"WHERE c.memory = ? AND c.state IN ({marks}) ORDER BY c.seq",
        (FROZEN, memory.table.memory, *HOT),
    ).fetchall()
    names = ("seq", "frozen", "importance", "written", "parent", "heat", "last", "bytes")
    kinds = (
        numpy.int64, bool, numpy.float64, numpy.float64, numpy.int64, numpy.float64,
        numpy.float64, numpy.int64,
    )  # fmt: skip
    parts: Any = zip(*rows, strict=True) if rows else [()] * len(names)
    return {
        name: numpy.array(part, dtype=kind)
        for name, kind, part in zip(names, kinds, parts, strict=True)
    }


def _delete_old(memory: DeclarativeMemory, before: float, now: float, who: str | None) -> int:
    """Delete what was archived before a time, and has not come back."""
    with memory.records.database.write() as connection:
        rows = connection.exec_driver_sql(
            "SELECT c.seq FROM cubes AS c JOIN transitions AS t ON t.seq = c.seq "
            "WHERE c.memory = ? AND c.state = ? GROUP BY c.seq HAVING max(t.at) < ?",
            (memory.table.memory, ARCHIVED, before),
        )
        gone: dict[int, None] = {}
        for row in rows.fetchall():
            below = memory._with_dependents(connection, int(row[0]))
            states = memory.table.life.states(connection, below)
            if all(state == ARCHIVED for state in states.values()):
                gone.update(dict.fromkeys(below))
        memory._delete(connection, list(gone), now, who or "sweep", trigger=AGE)
    return len(gone)
