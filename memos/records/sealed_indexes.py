"""What follows from the cubes of an encrypted store: words of full text and facts, in memory only.

They are made from the rows as the memories make them when they write: full text has the cubes in
the indexes, facts and labels all that are not deleted.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from memos.records.filters import facts_of
from memos.records.states import DELETED, HOT

_BATCH = 500
_MANY = 3  # where more than one in so many changed, everything is made again
_ROW = "seq, memory, state, kind, text, context, metadata, content"


class Indexes:
    """Brings them up to the cubes, around a change of rows that was made elsewhere.

    Args:
        whole: everything is new.
    """

    def __init__(self, db: sqlite3.Connection, *, whole: bool) -> None:
        self._db, self._whole = db, whole
        self._old: dict[int, Any] = {}
        self._changed: set[int] = set()
        tables = {row[0] for row in db.execute("SELECT name FROM main.sqlite_master")}
        self._graphs = "graph_facts" in tables
        self._texts = {int(m[1]) for name in tables if (m := re.fullmatch(r"text_(\d+)", name))}

    def before(self, seqs: Sequence[int]) -> None:
        """Before these cubes change: keep what they are."""
        if self._whole:
            return
        new = [seq for seq in seqs if seq not in self._changed]
        self._changed.update(new)
        self._old.update((row[0], row) for row in self._rows(new))

    def refresh(self) -> None:
        """After all of them changed."""
        if not self._whole:
            count = self._db.execute("SELECT count(*) FROM cubes").fetchone()[0]
            self._whole = len(self._changed) > _BATCH and len(self._changed) * _MANY > count
        if not self._whole:
            self._change()
            return
        for name in ["facts", "graph_facts"][: 1 + self._graphs]:
            self._db.execute(f"DELETE FROM main.{name}")
        for memory in self._texts:
            self._db.execute(f"INSERT INTO text_{memory}(text_{memory}) VALUES ('delete-all')")
            self._db.execute(
                f"INSERT INTO text_{memory}(rowid, text, context) SELECT seq, text, context "
                f"FROM cubes WHERE memory = ? AND state IN ({', '.join('?' * len(HOT))}) "
                "ORDER BY seq",
                (memory, *HOT),
            )
        cursor = self._db.execute(f"SELECT {_ROW} FROM cubes WHERE state <> ?", (DELETED,))
        while rows := cursor.fetchmany(_BATCH):
            self._insert_facts(rows)

    def _change(self) -> None:
        new = list(self._rows(sorted(self._changed)))
        old = list(self._old.values())
        for name, facts in (("facts", _facts), ("graph_facts", _labels)):
            gone = [(row[1], *fact, row[0]) for row in old for fact in facts(row)]
            if gone:
                self._db.executemany(
                    f"DELETE FROM main.{name} WHERE memory = ? AND key = ? AND type = ? AND "
                    "number = ? AND string = ? AND seq = ?",
                    gone,
                )
        self._insert_facts(new)
        for verb, rows in (("'delete'", old), ("", new)):
            for memory in {row[1] for row in rows} & self._texts:
                mine = [
                    (row[0], row[4], row[5]) for row in rows if row[1] == memory and row[2] in HOT
                ]
                name = f"text_{memory}"
                first = (f"{name}, ", f"{verb}, ") if verb else ("", "")
                self._db.executemany(
                    f"INSERT INTO {name}({first[0]}rowid, text, context) "
                    f"VALUES ({first[1]}?, ?, ?)",
                    mine,
                )

    def _insert_facts(self, rows: Iterable[Any]) -> None:
        for name, facts in (("facts", _facts), ("graph_facts", _labels)):
            come = [(row[1], *fact, row[0]) for row in rows for fact in facts(row)]
            if come:
                self._db.executemany(
                    f"INSERT OR IGNORE INTO main.{name} VALUES (?, ?, ?, ?, ?, ?)", come
                )

    def _rows(self, seqs: Sequence[int]) -> Iterator[Any]:
        for start in range(0, len(seqs), _BATCH):
            part = list(seqs[start : start + _BATCH])
            marks = ", ".join("?" * len(part))
            yield from self._db.execute(
                f"SELECT {_ROW} FROM main.cubes WHERE seq IN ({marks})", part
            ).fetchall()


def _facts(row: Any) -> Iterable[tuple[Any, ...]]:
    return () if row[2] == DELETED else facts_of(json.loads(row[6]))


def _labels(row: Any) -> Iterable[tuple[Any, ...]]:
    if row[2] == DELETED or row[3] != "node" or row[7] is None:
        return ()
    from memos.records.graph import node_facts

    return node_facts(json.loads(row[7]))
