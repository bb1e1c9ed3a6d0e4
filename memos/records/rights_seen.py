"""The cubes of one memory that a principal may read, as numbers, kept up with the store.

Made once for each principal and memory and then brought up to date by what changed: a query of a
principal costs what one without rights costs. What ranking measures cubes against - how many
there are, how long, how near - is kept here too, of these cubes only: a score does not depend on
what may not be read.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy
from sqlalchemy import Connection, bindparam, select

from memos.records.links import chunks
from memos.records.rights import Actor
from memos.records.schema import cubes, memories, relations
from memos.records.states import DELETED
from memos.records.trees import descendants_of

if TYPE_CHECKING:
    from memos.records.database import Database
    from memos.records.rights_vectors import Signs

Array = numpy.ndarray[Any, Any]
_KEPT_BYTES = 128 << 20  # of all principals of a store
_AT_ONCE = 64
_MOST_CHANGES = 20_000  # after more of them everything is read anew


class Token:
    """What is known of one state of a principal's view hangs on this."""


class Readable:
    """One principal's view of one memory. What callers get does not change afterwards.

    Args:
        change:  number of the transaction that it is as of.
        seqs:    int64 [n], ascending: what may be read and is not deleted.
        lengths: int32 [n]: words of each in full text; -1 where it is not indexed.
        hidden:  int64, ascending: what lives and may not be read.
    """

    def __init__(self, change: int, seqs: Array, lengths: Array, hidden: Array) -> None:
        self.change, self.seqs, self.lengths, self.hidden = change, seqs, lengths, hidden
        self.token = Token()
        self.frequencies: dict[str, tuple[int, int]] = {}  # stem: documents, documents in all
        self.sample: tuple[int, Any] = (0, None)
        self.signs: Signs | None = None  # of their vectors
        self.documents = int(numpy.count_nonzero(lengths >= 0))
        self.words = int(lengths.sum()) + len(lengths) - self.documents

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def is_all(self) -> bool:
        """Whether everything that lives may be read."""
        return not len(self.hidden)

    def lengths_of(self, seqs: Array) -> Array:
        """Words [n] of these cubes; -1 for one that may not be read."""
        if not len(self.seqs):
            return numpy.full(len(seqs), -1, numpy.int32)
        at = numpy.minimum(numpy.searchsorted(self.seqs, seqs), len(self.seqs) - 1)
        return numpy.where(self.seqs[at] == seqs, self.lengths[at], -1)

    def those_of(self, seqs: Sequence[int]) -> list[int]:
        """Those of these cubes that may be read."""
        some = numpy.array(seqs, numpy.int64)
        found: list[int] = some[among(some, self.seqs)].tolist()
        return found

    def has_any(self, seqs: Iterable[int]) -> bool:
        """Whether one of these cubes may be read: as few of them are looked at as that needs."""
        rest = iter(seqs)
        while some := list(itertools.islice(rest, _AT_ONCE)):
            if among(numpy.array(some, numpy.int64), self.seqs).any():
                return True
        return False

    def follow(
        self, change: int, changed: Array, seqs: Array, lengths: Array, hidden: Array
    ) -> Readable:
        """The view after a change.

        Args:
            changed: what is looked at anew; of it ``seqs`` and ``hidden`` live now.
        """
        stay = ~among(self.seqs, changed)
        made = Readable(
            change,
            *_merged(self.seqs[stay], seqs, self.lengths[stay], lengths),
            numpy.sort(numpy.concatenate([self.hidden[~among(self.hidden, changed)], hidden])),
        )
        made.token, made.frequencies, made.sample = self.token, self.frequencies, self.sample
        made.signs = None if self.signs is None else self.signs.without(changed)
        return made


class Views:
    """The views of all principals of one store. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = weakref.ref(database)
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()

    def get(self, connection: Connection, actor: Actor, memory: int) -> Readable:
        """What this principal may read of a memory, in the state that the connection sees.

        Cost: nothing where nothing changed; else the cubes that changed; the first time, and
        after a grant or a revocation, every cube of the memory.
        """
        with self._lock:
            key = (actor.key, memory)
            entry = self._entries.setdefault(key, _Entry(memory))
            self._entries.move_to_end(key)
        with entry.lock:
            before = entry.num_bytes
            found = entry.at(connection, actor, self._database())
        if entry.num_bytes > before:
            self._shrink()
        return found

    def _shrink(self) -> None:
        with self._lock:
            total = 0
            for key, entry in reversed(list(self._entries.items())):
                total += entry.num_bytes
                if total > _KEPT_BYTES and entry is not next(reversed(self._entries.values())):
                    del self._entries[key]


class _Entry:
    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.lock = threading.Lock()
        self.num_bytes = 0
        self._kind: str | None = None
        self._known: Readable | None = None
        self._rights = -1  # number of the transaction whose grants these are

    def at(self, connection: Connection, actor: Actor, database: Database | None) -> Readable:
        change, rights = actor.stamps(connection)
        known = self._known
        if known is not None and rights == self._rights:
            if known.change == change:
                return known
            if known.change < change and (found := self._follow(connection, actor, known, change)):
                return self._keep(found, rights, database)
        found = self._read(connection, actor, change)
        if known is not None and known.change > change:  # an older state than the one kept
            return found
        return self._keep(found, rights, database)

    def _keep(self, found: Readable, rights: int, database: Database | None) -> Readable:
        # What a transaction sees that may still be undone is not kept.
        if database is not None and not database.is_writing():
            self._known, self._rights = found, rights
            self.num_bytes = found.seqs.nbytes + found.lengths.nbytes + found.hidden.nbytes
        return found

    def _read(self, connection: Connection, actor: Actor, change: int) -> Readable:
        mine = (cubes.c.memory == self.memory, cubes.c.state != DELETED)
        every = _numbers(connection.execute(select(cubes.c.seq).where(*mine)))
        seqs = _numbers(connection.execute(select(cubes.c.seq).where(*mine, actor.clause())))
        return Readable(
            change,
            seqs,
            lengths_of(connection, self.memory, seqs, is_most=2 * len(seqs) > len(every)),
            every[~among(every, seqs)],
        )

    def _follow(
        self, connection: Connection, actor: Actor, known: Readable, change: int
    ) -> Readable | None:
        """The view now; None: it has to be read anew."""
        named = {"memory": self.memory, "since": known.change}
        changed = _numbers(connection.execute(_CHANGED.limit(_MOST_CHANGES + 1), named))
        if len(changed) > _MOST_CHANGES:
            return None
        if not len(changed):
            made = known.follow(change, changed, changed, changed.astype(numpy.int32), changed)
            return made
        more = self._with_it(connection, changed.tolist())
        wanted = numpy.unique(numpy.concatenate([changed, more])) if len(more) else changed
        living = _numbers_of(connection, _LIVING, wanted.tolist())
        readable = actor.readable(connection, living.tolist())
        is_seen = numpy.fromiter((int(seq) in readable for seq in living), numpy.bool_, len(living))
        seqs = living[is_seen]
        lengths = lengths_of(connection, self.memory, seqs)
        found = known.follow(change, wanted, seqs, lengths, living[~is_seen])
        # Of what did not change itself nobody else is told that it came or went.
        before, after = among(more, known.seqs), among(more, found.seqs)
        if (before != after).any():
            found.token = Token()
        return found

    def _with_it(self, connection: Connection, changed: Sequence[int]) -> Array:
        """What may be read or not because of these: cubes below them, relationships at them."""
        if self._kind is None:
            row = connection.execute(select(memories.c.kind).where(memories.c.id == self.memory))
            self._kind = str(row.scalar())
        found: set[int] = set()
        if self._kind == "tree":
            below = descendants_of(connection, changed)
            found.update(seq for pairs in below.values() for seq, _ in pairs)
        elif self._kind == "graph":
            for part in chunks(changed):
                rows = connection.execute(_AT, {"seqs": part})
                found.update(int(row[0]) for row in rows)
        return numpy.array(sorted(found - set(changed)), numpy.int64)


def lengths_of(connection: Connection, memory: int, seqs: Array, *, is_most: bool = False) -> Array:
    """Words of these cubes in full text, text and context together, int32 [n]; -1: not indexed.

    Args:
        is_most: of the memory's: read in passing.
    """
    sizes = f"SELECT id, sz FROM text_{memory:d}_docsize"
    rows: list[Any] = []
    if is_most:
        rows = list(connection.exec_driver_sql(sizes))
    else:
        for part in chunks(seqs.tolist()):
            marks = ", ".join("?" * len(part))
            rows += connection.exec_driver_sql(f"{sizes} WHERE id IN ({marks})", tuple(part))
    ids = numpy.fromiter((row[0] for row in rows), numpy.int64, len(rows))
    sums = numpy.fromiter((sum_of_varints(row[1]) for row in rows), numpy.int32, len(rows))
    found = numpy.full(len(seqs), -1, numpy.int32)
    if len(seqs) and len(ids):
        at = numpy.minimum(numpy.searchsorted(seqs, ids), len(seqs) - 1)
        here = seqs[at] == ids
        found[at[here]] = sums[here]
    return found


def varints(data: bytes) -> list[int]:
    """The numbers in a record of FTS5: seven bits a byte, the highest first."""
    found, number = [], 0
    for byte in data:
        number = number << 7 | byte & 0x7F
        if not byte & 0x80:
            found.append(number)
            number = 0
    return found


def sum_of_varints(data: bytes) -> int:
    """Sum of the numbers in a row of FTS5's table of sizes."""
    if len(data) == 2 and not (data[0] | data[1]) & 0x80:
        return data[0] + data[1]
    return sum(varints(data))


def _merged(seqs: Array, new: Array, values: Array, theirs: Array) -> tuple[Array, Array]:
    if not len(new):
        return seqs, values
    at = numpy.searchsorted(seqs, new)
    return numpy.insert(seqs, at, new), numpy.insert(values, at, theirs)


def among(some: Array, sorted_others: Array) -> Array:
    """Which of these numbers are among the others, which ascend: bool [n]."""
    if not len(sorted_others) or not len(some):
        return numpy.zeros(len(some), numpy.bool_)
    at = numpy.minimum(numpy.searchsorted(sorted_others, some), len(sorted_others) - 1)
    found: Array = sorted_others[at] == some
    return found


def intersected(one: Array, other: Array) -> Array:
    """Numbers in both, which ascend and are unique."""
    return one[among(one, other)]


def _numbers(rows: Iterable[Any]) -> Array:
    found = [int(row[0]) for row in rows]
    return numpy.unique(numpy.array(found, numpy.int64))


def _numbers_of(connection: Connection, statement: Any, seqs: Sequence[int]) -> Array:
    found = [
        int(row[0])
        for part in chunks(seqs)
        for row in connection.execute(statement, {"seqs": part})
    ]
    return numpy.unique(numpy.array(found, numpy.int64))


_views: weakref.WeakKeyDictionary[Database, Views] = weakref.WeakKeyDictionary()
_views_lock = threading.Lock()


def views_of(database: Database) -> Views:
    """The views of a store's principals, kept as long as it is open."""
    with _views_lock:
        found = _views.get(database)
        if found is None:
            found = _views[database] = Views(database)
        return found


_CHANGED = select(cubes.c.seq).where(
    cubes.c.memory == bindparam("memory"), cubes.c.change > bindparam("since")
)
_LIVING = select(cubes.c.seq).where(
    cubes.c.seq.in_(bindparam("seqs", expanding=True)), cubes.c.state != DELETED
)
_AT = select(relations.c.cube).where(
    relations.c.cube.is_not(None),
    relations.c.source.in_(bindparam("seqs", expanding=True))
    | relations.c.target.in_(bindparam("seqs", expanding=True)),
)
