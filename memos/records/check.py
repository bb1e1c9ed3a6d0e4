"""Whether everything derived from the cubes agrees with them: what ``memos doctor`` asks a store.

Nothing is changed. Bits that rotted in a cube itself are found by its digest.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, select

from memos.records.filters import facts_of
from memos.records.fulltext import TOKENIZER
from memos.records.history import faults, kept
from memos.records.life_schema import cold, transitions
from memos.records.schema import cubes, embedders, facts, memories, relations, store, vectors
from memos.records.schema import versions as versions_table
from memos.records.scope import DELETED
from memos.records.states import COLD, HOT
from memos.records.trees import TITLES, context_below, title_of
from memos.records.words import context_of
from memos.records.writes import is_whole

if TYPE_CHECKING:
    from memos.records.store import Records

_BATCH = 1000  # rows tokenized at once
_MOVES = select(transitions.c.seq, transitions.c.new).order_by(transitions.c.id)
_ITEM = {"float32": 4, "float16": 2}  # bytes


@dataclass(frozen=True)
class Problem:
    """One disagreement.

    Args:
        what:   "file", "cube", "version", "fulltext", "facts", "vector", "parent", "relation"
            or "state".
        memory: name of the memory; "" where the whole store is meant.
        seq:    number of the cube; 0 where there is none.
        id:     of the cube.
        text:   what is wrong.
    """

    what: str
    memory: str
    seq: int
    id: str
    text: str

    def __str__(self) -> str:
        if not self.seq:
            return f"{self.what}: {self.text}"
        return f"memory {self.memory!r}, {self.what} of cube {self.id!r}: {self.text}"


def check(
    records: Records,
    progress: Callable[[str], object] | None = None,
    *,
    connection: Connection | None = None,
) -> list[Problem]:
    """Every disagreement between the cubes of a store and what is derived from them.

    Args:
        records:  an open store; others may write to it meanwhile, one state of it is read.
        progress: called with the name of each part before it is looked at.
        connection: of a transaction, to look at what is not committed yet.

    Returns:
        Problems; an empty list: everything agrees.

    Raises:
        StoreError: the file is so damaged that it cannot be read to the end.

    Cost: reads everything once; keeps two numbers for each cube.
    """
    tell = progress or (lambda _: None)
    with contextlib.ExitStack() as stack:
        if connection is None:
            connection = stack.enter_context(records.database.read())
        found = _Check(connection, records.database.path is not None)
        problems: list[Problem] = []
        for name, part in found.parts().items():
            tell(name)
            try:
                problems += part()
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                text = f"its {name} hold values of other types than were stored ({error})"
                problems.append(Problem("file", "", 0, "", text))
        return problems


class _Check:
    def __init__(self, connection: Connection, is_file: bool) -> None:
        self.connection, self.is_file = connection, is_file
        self.memories = {row.id: row for row in connection.execute(select(memories))}
        self.ids: dict[int, tuple[int, str, bool]] = {}  # seq: memory, id, whether it is deleted
        self.damaged: set[int] = set()  # nothing derived from these is looked at

    def parts(self) -> Mapping[str, Callable[[], Iterator[Problem]]]:
        return {
            "file": self._file,
            "cubes": self._cubes,
            "versions": self._versions,
            "fulltext": self._fulltext,
            "facts": self._facts,
            "vectors": self._vectors,
            "trees": self._trees,
            "relations": self._relations,
            "states": self._states,
        }

    def problem(self, what: str, seq: int, text: str) -> Problem:
        memory, id, _ = self.ids.get(seq, (0, "", True))
        name = self.memories[memory].name if memory in self.memories else ""
        return Problem(what, name, seq, id, text)

    def lives(self, seq: int, memory: int | None = None) -> bool:
        known = self.ids.get(seq)
        return known is not None and not known[2] and memory in (None, known[0])

    # The parts.

    def _file(self) -> Iterator[Problem]:
        """SQLite's own check of pages, indexes and keys."""
        for row in self.connection.exec_driver_sql("PRAGMA integrity_check(20)"):
            if row[0] != "ok":
                yield Problem("file", "", 0, "", str(row[0]))
        for table, *_ in self.connection.exec_driver_sql("PRAGMA foreign_key_check"):
            yield Problem("file", "", 0, "", f"a row of {table} names a row that is not there")

    def _cubes(self) -> Iterator[Problem]:
        last = self.connection.execute(select(store.c.change, store.c.seq)).one()
        for row in self._rows():
            self.ids[row.seq] = (row.memory, row.id, row.state == DELETED)
            if not is_whole(row):
                self.damaged.add(row.seq)
                yield self.problem("cube", row.seq, "it is not what was stored: its digest differs")
            if row.memory not in self.memories:
                yield self.problem("cube", row.seq, f"of memory {row.memory}, which is not there")
            if row.seq > last.seq or row.change > last.change:
                yield self.problem("cube", row.seq, "from a transaction that is yet to come")
            if not isinstance(row.importance, float) or not 0 <= row.importance <= 1:
                yield self.problem("cube", row.seq, f"importance {row.importance}")

    def _versions(self) -> Iterator[Problem]:
        """Every history is whole: each version follows the one before it."""
        known: set[int] = set()
        for batch in _batches(self._rows()):
            old: dict[int, list[Row[Any]]] = {}
            for version in kept(self.connection, [row.seq for row in batch]):
                old.setdefault(version.seq, []).append(version)
            for row in batch:
                known.add(row.seq)
                above = self.ids.get(row.parent) if row.parent is not None else None
                parent_id = None if above is None else above[1]
                for text in faults(row, parent_id, old.get(row.seq, [])):
                    yield self.problem("version", row.seq, text)
        for seq in self.connection.execute(select(versions_table.c.seq).distinct()).scalars():
            if seq not in known and seq not in self.damaged:
                yield self.problem("version", seq, "of a cube that is not there")

    def _fulltext(self) -> Iterator[Problem]:
        """The index holds exactly the words of the text and context of every living cube."""
        wanted: dict[int, Counter[int]] = {memory: Counter() for memory in self.memories}
        tokens = _Tokens()
        for batch in _batches(self._rows()):
            alive = [row for row in batch if row.state in HOT]
            for seq, number in tokens.sums([(r.seq, r.text, r.context) for r in alive]).items():
                if (memory := self.ids[seq][0]) in wanted:
                    wanted[memory][seq] = number
        for memory, rows in wanted.items():
            there = self._indexed(memory)
            seqs = (rows.keys() | there.keys()) - self.damaged
            for seq in sorted(seq for seq in seqs if rows[seq] != there[seq]):
                text = "words in the index that it has not" if seq in there else "not in the index"
                yield self.problem("fulltext", seq, text)
        plain = {id for id, memory in self.memories.items() if memory.kind == "text"}
        for row in self._rows():
            if row.memory not in plain or row.state not in HOT:
                continue
            if row.context != context_of(json.loads(row.metadata)):
                yield self.problem("fulltext", row.seq, "its context is not its metadata")

    def _indexed(self, memory: int) -> Counter[int]:
        name = f"check_{memory:d}"
        self.connection.exec_driver_sql(
            f"CREATE VIRTUAL TABLE temp.{name} "
            f"USING fts5vocab('main', 'text_{memory:d}', 'instance')"
        )
        found: Counter[int] = Counter()
        try:
            words = f"SELECT doc, col, term, offset FROM temp.{name}"
            rows = self.connection.exec_driver_sql(words)
            for doc, *token in rows:
                found[doc] += hash(tuple(token))
        finally:
            self.connection.exec_driver_sql(f"DROP TABLE temp.{name}")
        return found

    def _facts(self) -> Iterator[Problem]:
        """Every scalar of the metadata of every living cube, and nothing else."""
        found: Counter[int] = Counter()
        for row in self.connection.execute(select(facts)):
            found[row.seq] += hash((row.memory, row.key, row.type, row.number, row.string))
        for row in self._rows():
            wanted = 0
            if row.state != DELETED:
                named = facts_of(json.loads(row.metadata))
                wanted = sum(hash((row.memory, *fact)) for fact in named)
            if found.pop(row.seq, 0) != wanted:
                yield self.problem("facts", row.seq, "filters see other metadata than it has")
        for seq in found.keys() - self.damaged:
            yield self.problem("facts", seq, "filters see metadata of a cube that is not there")

    def _vectors(self) -> Iterator[Problem]:
        made = {row.memory: row for row in self.connection.execute(select(embedders))}
        last = self.connection.execute(select(store.c.change)).scalar_one()
        for row in self.connection.execute(select(vectors)):
            if row.change > last:
                yield self.problem("vector", row.seq, "from a transaction that is yet to come")
            if row.data is None:
                continue
            if not self.lives(row.seq, row.memory):
                yield self.problem("vector", row.seq, "of a cube that is deleted or not there")
            elif row.memory not in made:
                yield self.problem("vector", row.seq, "nobody knows what made it")
            else:
                maker = made[row.memory]
                wanted = maker.dim * _ITEM.get(maker.dtype, 0)
                if wanted and len(row.data) != wanted:
                    text = f"{len(row.data)} bytes instead of {wanted}"
                    yield self.problem("vector", row.seq, text)

    def _trees(self) -> Iterator[Problem]:
        """Parents live as long as their children, in the same memory, without a cycle."""
        rows = {row.seq: row for row in self._rows() if row.state != DELETED}
        for row in rows.values():
            if row.parent is not None and not self.lives(row.parent, row.memory):
                yield self.problem("parent", row.seq, f"{row.parent} is deleted or not there")
        rounds = _on_cycles(rows)
        for seq in sorted(rounds):
            yield self.problem("parent", seq, "it stands above itself")
        trees = {id for id, memory in self.memories.items() if memory.kind == "tree"}
        tops: dict[int, str] = {}
        for seq, row in rows.items():
            if row.memory not in trees or seq in rounds:
                continue
            above = _above(seq, rows, TITLES)
            titles = [title_of(one.text) for one in reversed(above)]
            if row.context != context_below(json.loads(row.metadata), titles):
                yield self.problem("fulltext", seq, "its context is not its metadata and headings")
            parent = above[0] if above else None
            life = None if parent is None else parent.expires_at
            if life is not None and (row.expires_at is None or row.expires_at > life):
                yield self.problem("parent", seq, f"{row.parent} expires before it")
            if row.thread != self._top(seq, rows, tops):
                yield self.problem("parent", seq, f"its thread is {row.thread}, not its root's id")

    def _top(self, seq: int, rows: Mapping[int, Row[Any]], tops: dict[int, str]) -> str:
        way = []
        while seq not in tops:
            way.append(seq)
            parent = rows[seq].parent
            if parent is None or parent not in rows or len(way) > len(rows):
                tops[seq] = rows[seq].id
            else:
                seq = parent
        tops.update(dict.fromkeys(way, tops[seq]))
        return tops[seq]

    def _relations(self) -> Iterator[Problem]:
        for row in self.connection.execute(select(relations)):
            for end in (row.source, row.target, row.cube):
                if end is not None and end not in self.ids:
                    yield self.problem("relation", row.source, f"{end} is not there")
            if not row.weight > 0:
                yield self.problem("relation", row.source, f"weight {row.weight}")

    def _states(self) -> Iterator[Problem]:
        """What is known of cubes in no index, and their last moves, agree with their states."""
        away = {row.seq: row.memory for row in self.connection.execute(select(cold))}
        last = {row.seq: row.new for row in self.connection.execute(_MOVES)}
        for row in self._rows():
            wanted = row.memory if row.state in COLD else None
            if away.pop(row.seq, None) != wanted:
                yield self.problem("state", row.seq, f"{row.state}, but the indexes do not know")
            told = last.get(row.seq, row.state)
            if told != row.state and DELETED not in (told, row.state):
                yield self.problem("state", row.seq, f"{row.state}, but it last moved to {told}")
        for seq in away.keys() - self.damaged:
            yield self.problem("state", seq, "out of the indexes, but not there")

    def _rows(self) -> Iterator[Row[Any]]:
        statement = select(cubes).order_by(cubes.c.seq).execution_options(yield_per=_BATCH)
        for row in self.connection.execute(statement):
            if row.seq not in self.damaged:
                yield row


class _Tokens:
    """What the full-text index holds of a row, as one number."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.execute(
            f"CREATE VIRTUAL TABLE texts USING fts5(text, context, tokenize='{TOKENIZER}')"
        )
        self._db.execute("CREATE VIRTUAL TABLE words USING fts5vocab('texts', 'instance')")

    def sums(self, rows: list[tuple[int, str, str]]) -> Counter[int]:
        found: Counter[int] = Counter()
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO texts(rowid, text, context) VALUES (?, ?, ?)", rows)
        for doc, *token in self._db.execute("SELECT doc, col, term, offset FROM words"):
            found[doc] += hash(tuple(token))
        self._db.execute("ROLLBACK")
        return found


def _batches(rows: Iterator[Row[Any]]) -> Iterator[list[Row[Any]]]:
    batch: list[Row[Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _above(seq: int, rows: Mapping[int, Row[Any]], depth: int) -> list[Row[Any]]:
    found: list[Row[Any]] = []
    parent = rows[seq].parent
    while parent in rows and len(found) < depth:
        found.append(rows[parent])
        parent = rows[parent].parent
    return found


def _on_cycles(rows: Mapping[int, Row[Any]]) -> set[int]:
    found: set[int] = set()
    done: set[int] = set()
    for start in rows:
        seq = start
        way: dict[int, int] = {}
        while seq in rows and seq not in done and seq not in way:
            way[seq] = len(way)
            seq = rows[seq].parent
        if seq in way:
            found |= set(list(way)[way[seq] :])
        done |= way.keys()
    return found
