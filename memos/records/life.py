"""Cubes on the move: the table of states.py carried out, with a record of every move.

A move, its effect on the indexes and its record are written in the caller's transaction: after a
crash a cube is in its old state or in the new one, and its indexes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, select

from memos.errors import ArgumentError
from memos.records import states
from memos.records.database import Database
from memos.records.fulltext import FullText
from memos.records.life_schema import cold, pins, transitions
from memos.records.links import chunks
from memos.records.schema import cubes, vectors
from memos.records.states import HOT, edge_of, is_edge

_Row = tuple[int, str, str]  # number, id and state of a cube
_REBUILD = 8  # words of so many cubes are indexed in the time in which those of one are taken out


@dataclass(frozen=True)
class Transition:
    """One move of a cube.

    Args:
        old, new: states.
        trigger:  use, age, capacity, importance, ttl, merge, undo or call.
        who:      principal or author; None: nobody said.
        why:      in words.
        at:       seconds since 1970.
    """

    old: str
    new: str
    trigger: str
    who: str | None
    why: str
    at: float


class Life:
    """Moves the cubes of one memory. Holds no state of its own: as thread-safe as the database."""

    def __init__(self, database: Database, memory: int, name: str, fulltext: FullText) -> None:
        self.database, self.memory, self.name, self.fulltext = database, memory, name, fulltext

    def move(
        self,
        connection: Connection,
        seqs: Iterable[int],
        new: str,
        *,
        trigger: str,
        at: float,
        who: str | None = None,
        why: str = "",
        lenient: bool = False,
    ) -> int:
        """Move cubes to a state; those that are there already stay as they are.

        Args:
            seqs:    of this memory, each once.
            lenient: what may not move stays, instead of an error.

        Returns:
            How many moved.

        Raises:
            ArgumentError: a move that is not in the table, or a guard that does not hold. Nothing
                has moved then.

        Cost: an update and a record for each cube; cubes that leave full text take their words
            out, or the words of those that stay are indexed anew, whatever is less.
        """
        rows = [row for row in self._states(connection, list(seqs)) if row[2] != new]
        if lenient:
            rows = [row for row in rows if is_edge(row[2], new, trigger)]
        while True:
            plan, refused = self._planned(connection, rows, new, trigger)
            if not refused:
                break
            if not lenient:
                id, guard = next(iter(refused.values()))
                raise ArgumentError(f"{self._called(id)}: for {new} wanted: {guard}")
            rows = [row for row in rows if row[0] not in refused]
        if not rows:
            return 0
        change = None
        if set(plan) != {states.STAYS} or trigger != states.USE:
            change, _ = self.database.allocate(connection)
        moved = [row[0] for row in rows]
        if change is None:  # nothing that anyone keeps depends on it
            connection.exec_driver_sql(_SET_STATE, [(new, seq) for seq in moved])
        else:
            connection.exec_driver_sql(_MOVE, [(new, change, seq) for seq in moved])
        for effect, some_seqs in plan.items():
            EFFECTS[effect](connection, self, some_seqs, change or 0)
        self.record(connection, [(r[0], r[2]) for r in rows], new, trigger, who, why, at)
        return len(rows)

    def _planned(
        self, connection: Connection, rows: Sequence[_Row], new: str, trigger: str
    ) -> tuple[dict[str, list[int]], dict[int, tuple[str, str]]]:
        """Effect -> numbers; number -> (id, guard that does not hold)."""
        plan: dict[str, list[int]] = {}
        refused: dict[int, tuple[str, str]] = {}
        for state in dict.fromkeys(row[2] for row in rows):
            some = [row for row in rows if row[2] == state]
            edge = edge_of(state, new, trigger, self._called(some[0][1]))
            for guard in edge.guards:
                for seq, id in GUARDS[guard](connection, self, some, rows).items():
                    refused.setdefault(seq, (id, guard))
            plan.setdefault(edge.effect, []).extend(row[0] for row in some)
        return plan, refused

    def wake(self, connection: Connection, seqs: Iterable[int], at: float) -> int:
        """Those of these cubes that are ARCHIVED are used: they become ACTIVATED."""
        rows = self._states(connection, list(dict.fromkeys(seqs)))
        away = [row[0] for row in rows if row[2] == states.ARCHIVED]
        return self.move(connection, away, states.ACTIVATED, trigger=states.USE, at=at)

    def states(self, connection: Connection, seqs: Iterable[int]) -> dict[int, str]:
        """The state of each of these cubes."""
        return {row[0]: row[2] for row in self._states(connection, list(seqs))}

    def frozen(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        """Those of these cubes that are FROZEN."""
        return [row[0] for row in self._states(connection, seqs) if row[2] == states.FROZEN]

    def record(
        self,
        connection: Connection,
        moved: Sequence[tuple[int, str]],
        new: str,
        trigger: str,
        who: str | None,
        why: str,
        at: float,
    ) -> None:
        """Write down moves: (seq, state before)."""
        if moved:
            rows = [(seq, old, new, trigger, who, why, at) for seq, old in moved]
            connection.exec_driver_sql(_RECORD, rows)

    def check_gone(self, rows: Sequence[Any], trigger: str) -> None:
        """Before rows of ``cubes`` are deleted. Raises ArgumentError, which names a frozen one."""
        for row in rows:
            if row.state != states.DELETED:
                edge_of(row.state, states.DELETED, trigger, self._called(row.id))

    def check_change(self, row: Any) -> None:
        """Before a row of ``cubes`` gets a new version. Raises ArgumentError where it cannot."""
        if row.state == states.FROZEN:
            raise ArgumentError(f"{self._called(row.id)}: FROZEN, so it cannot change; thaw it")
        if row.state == states.MERGED:
            raise ArgumentError(
                f"{self._called(row.id)}: MERGED into another one, so it cannot change; change "
                "that one, or undo the merge"
            )

    def history(self, connection: Connection, seq: int) -> list[Transition]:
        """Every move of a cube, oldest first."""
        t = transitions.c
        rows = connection.execute(
            select(t.old, t.new, t.trigger, t.who, t.why, t.at).where(t.seq == seq).order_by(t.id)
        )
        return [Transition(*row) for row in rows]

    def last(self, connection: Connection, seqs: Sequence[int], new: str) -> dict[int, str]:
        """The state that each cube had before its last move to ``new``."""
        t = transitions.c
        found: dict[int, str] = {}
        for part in chunks(list(seqs)):
            rows = connection.execute(
                select(t.seq, t.old).where(t.seq.in_(part), t.new == new).order_by(t.id)
            )
            found.update({int(row[0]): row[1] for row in rows})
        return found

    def count(self, connection: Connection) -> dict[str, int]:
        """State -> how many cubes are in it; states without cubes are left out."""
        rows = connection.execute(
            select(cubes.c.state, func.count())
            .where(cubes.c.memory == self.memory)
            .group_by(cubes.c.state)
        )
        return {row[0]: int(row[1]) for row in rows}

    def count_cold(self, connection: Connection) -> int:
        """How many cubes are in no index."""
        mine = select(func.count()).select_from(cold).where(cold.c.memory == self.memory)
        return int(connection.execute(mine).scalar_one())

    def pin(self, connection: Connection, seq: int, pinned: bool) -> None:
        """While a cube is pinned nothing archives or merges it."""
        connection.execute(pins.delete().where(pins.c.seq == seq))
        if pinned:
            connection.execute(pins.insert(), {"seq": seq})

    def pinned(self, connection: Connection) -> set[int]:
        """Numbers of the pinned cubes."""
        rows = connection.execute(
            select(pins.c.seq)
            .join(cubes, cubes.c.seq == pins.c.seq)
            .where(cubes.c.memory == self.memory)
        )
        return {int(row[0]) for row in rows}

    def are_cold(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        """Those of these cubes that are in no index."""
        return [
            int(row[0])
            for part in chunks(list(seqs))
            for row in connection.execute(_ARE_COLD, {"seqs": part})
        ]

    # Inside.

    def _called(self, id: str) -> str:
        return f"memory {self.name!r}, cube {id!r}"

    def _states(self, connection: Connection, seqs: Sequence[int]) -> list[tuple[int, str, str]]:
        rows = connection.exec_driver_sql(
            "SELECT seq, id, state FROM cubes WHERE seq IN (SELECT value FROM json_each(?))",
            (str(list(seqs)),),
        )
        return [(int(row[0]), row[1], row[2]) for row in rows]


# Guards: (connection, life, rows that need it, all rows that move) -> {number: id} that fail.


def _unpinned(connection: Connection, life: Life, rows: Sequence[_Row], _: Any) -> dict[int, str]:
    held = life.pinned(connection)
    return {row[0]: row[1] for row in rows if row[0] in held} if held else {}


def _nothing_left(
    connection: Connection, life: Life, rows: Sequence[_Row], moving: Sequence[_Row]
) -> dict[int, str]:
    ids = {row[0]: row[1] for row in rows}
    going = {row[0] for row in moving}
    found = {}
    listed = str(sorted(ids))
    for statement in (_BELOW, _AT_SOURCE, _AT_TARGET):
        for near, far in connection.exec_driver_sql(statement, (listed,)):
            if far not in going:
                found[near] = ids[near]
    return found


# Effects: (connection, life, seqs, number of the change).


def _stay(connection: Connection, life: Life, seqs: Sequence[int], change: int) -> None: ...


def _leave(connection: Connection, life: Life, seqs: Sequence[int], change: int) -> None:
    connection.exec_driver_sql(
        "INSERT OR REPLACE INTO cold(seq, memory, change) VALUES (?, ?, ?)",
        [(seq, life.memory, change) for seq in seqs],
    )
    few = _REBUILD * len(seqs) <= life.fulltext.rows(connection)
    if few:
        life.fulltext.delete(connection, _texts(connection, seqs))
        life.fulltext.forget()
    else:
        life.fulltext.refill(connection, HOT)


def _return(connection: Connection, life: Life, seqs: Sequence[int], change: int) -> None:
    life.fulltext.insert(connection, _texts(connection, seqs))
    life.fulltext.forget()
    for part in chunks(seqs):
        connection.execute(cold.delete().where(cold.c.seq.in_(part)))
        connection.execute(
            vectors.update()
            .where(vectors.c.seq.in_(part), vectors.c.data.is_not(None))
            .values(change=change)
        )


def _go(connection: Connection, life: Life, seqs: Sequence[int], change: int) -> None:
    raise AssertionError("CubeTable.delete carries this out")


def _texts(connection: Connection, seqs: Sequence[int]) -> list[tuple[int, str, str]]:
    columns = (cubes.c.seq, cubes.c.text, cubes.c.context)
    return [
        (int(row[0]), row[1], row[2])
        for part in chunks(list(seqs))
        for row in connection.execute(select(*columns).where(cubes.c.seq.in_(part)))
    ]


_Guard = Callable[[Connection, Life, Sequence[_Row], Sequence[_Row]], dict[int, str]]
GUARDS: dict[str, _Guard] = {
    states.UNPINNED: _unpinned,
    states.NOTHING_LEFT: _nothing_left,
}
EFFECTS: dict[str, Callable[[Connection, Life, Sequence[int], int], None]] = {
    states.STAYS: _stay,
    states.LEAVES: _leave,
    states.RETURNS: _return,
    states.GOES: _go,
}

_SET_STATE = "UPDATE cubes SET state = ? WHERE seq = ?"
_MOVE = "UPDATE cubes SET state = ?, change = ? WHERE seq = ?"
_RECORD = (
    "INSERT INTO transitions(seq, old, new, trigger, who, why, at) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_ARE_COLD = select(cold.c.seq).where(cold.c.seq.in_(bindparam("seqs", expanding=True)))
_HOT = ", ".join(f"'{state}'" for state in HOT)
_BELOW = (
    "SELECT parent, seq FROM cubes WHERE parent IN (SELECT value FROM json_each(?)) "
    f"AND state IN ({_HOT})"
)
_AT_SOURCE = (
    "SELECT relations.source, seq FROM relations JOIN cubes ON cubes.seq = relations.cube "
    f"WHERE relations.source IN (SELECT value FROM json_each(?)) AND state IN ({_HOT})"
)
_AT_TARGET = _AT_SOURCE.replace("relations.source", "relations.target")
