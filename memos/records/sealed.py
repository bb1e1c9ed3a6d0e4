"""Rows at rest: a database in memory whose tables stand sealed in a file.

All SQL works on tables in memory, which are those of any store. When a transaction ends, every row
that it changed is sealed and written, in the same transaction; when one begins, what other
processes wrote is opened and put into memory. So the file holds nothing that can be read but the
names of tables, how many rows they have, how long these are, which cube or memory each belongs to
and which were written together.

What follows from cubes - facts, words of full text - is in no file: it is made from the rows.

The file:

    sealed_head      the id of the master key, the number of the last transaction
    sealed_memories  the key of each memory, wrapped by the master key
    sealed_keys      the key of each cube, and of what else belongs to a memory, wrapped by that
    sealed_tables    the statements that make the tables
    sealed_rows      the rows
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from memos.cube.sealing import pack, seal, unpack, unseal
from memos.errors import StoreError
from memos.records import sealed_indexes
from memos.records.keys import KeyRing, MasterKey, called
from memos.records.sealed_tables import (
    INDEXES,
    MADE,
    Table,
    quoted,
    row_key,
    row_name,
    table_of,
)

FORMAT = 1
DERIVED = {"facts", "graph_facts", "embeddings"}  # tables whose rows are in no file
_BATCH = 2000  # rows sealed at once
_TIDY = 1000  # tombstones that nobody clears away

_SCHEMA = """
CREATE TABLE disk.sealed_head (
    id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, master TEXT NOT NULL,
    generation INTEGER NOT NULL, last INTEGER NOT NULL, floor INTEGER NOT NULL, image BLOB);
CREATE TABLE disk.sealed_memories (memory INTEGER PRIMARY KEY, wrapped BLOB NOT NULL);
CREATE TABLE disk.sealed_keys (
    owner INTEGER PRIMARY KEY, memory INTEGER NOT NULL, wrapped BLOB NOT NULL);
CREATE INDEX disk.sealed_keys_memory ON sealed_keys (memory);
CREATE TABLE disk.sealed_tables (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, stamp INTEGER NOT NULL,
    statements TEXT NOT NULL);
CREATE TABLE disk.sealed_rows (
    id INTEGER PRIMARY KEY, tbl INTEGER NOT NULL, key BLOB NOT NULL, owner INTEGER NOT NULL,
    stamp INTEGER NOT NULL, gone INTEGER NOT NULL, data BLOB NOT NULL);
CREATE UNIQUE INDEX disk.sealed_rows_key ON sealed_rows (tbl, key);
CREATE INDEX disk.sealed_rows_stamp ON sealed_rows (stamp);
CREATE INDEX disk.sealed_rows_owner ON sealed_rows (owner, stamp);
"""
_PUT = (
    "INSERT INTO sealed_rows(tbl, key, owner, stamp, gone, data) VALUES (?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (tbl, key) DO UPDATE SET owner = excluded.owner, stamp = excluded.stamp, "
    "gone = excluded.gone, data = excluded.data"
)
_CHANGED = (
    "SELECT r.tbl, r.key, r.owner, r.gone, r.data, k.memory, k.wrapped FROM sealed_rows r "
    "LEFT JOIN sealed_keys k ON k.owner = r.owner WHERE r.stamp > ? ORDER BY r.owner"
)


class Replica:
    """One connection's tables in memory, and their file. Not thread-safe.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path, master: MasterKey) -> None:
        self.path = path
        self.keys = KeyRing(path, master)
        self._tables: dict[int, Table] = {}
        self._schema = -1  # of the tables in memory as they were last looked at

    # Opening.

    def attach(self, db: sqlite3.Connection, *, readonly: bool, durable: bool) -> None:
        """Put the file beside the database in memory."""
        mode = "ro" if readonly else "rwc"
        db.execute("ATTACH ? AS disk", (f"{self.path.absolute().as_uri()}?mode={mode}",))
        pragmas = ["recursive_triggers=ON"]
        if not readonly:
            pragmas += ["disk.journal_mode=WAL", "disk.secure_delete=ON"]
            pragmas += ["disk.wal_autocheckpoint=16384"]
            pragmas += [f"disk.synchronous={'FULL' if durable else 'NORMAL'}"]
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")
        db.execute("CREATE TEMP TABLE sealed_seen (last INTEGER NOT NULL)")
        db.execute("INSERT INTO sealed_seen VALUES (0)")
        db.execute("CREATE TEMP TABLE sealed_dirty (number INTEGER PRIMARY KEY)")

    def prepare(self, db: sqlite3.Connection, *, readonly: bool) -> None:
        """Make the file's tables where it is new, in a transaction; check the key.

        Raises StoreError for another key, another format, or a file that is not encrypted.
        """
        names = {row[0] for row in db.execute("SELECT name FROM disk.sqlite_master")}
        if "sealed_head" in names:
            (found,) = db.execute("SELECT format FROM sealed_head").fetchone()
            if found != FORMAT:
                raise StoreError(f"{self.path}: format {FORMAT} of sealing wanted, got {found}")
            self.keys.read(db)
            return
        if "store" in names:
            raise StoreError(
                f"{self.path}: the store is not encrypted, but a key was given; what is in it goes "
                "into an encrypted store by export and import"
            )
        if names:
            raise StoreError(
                f"{self.path}: a database of memos wanted, got tables {sorted(names)[:3]}"
            )
        if readonly:
            raise StoreError(f"{self.path}: a store wanted, got an empty database")
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                db.execute(statement)
        master = self.keys.master.id
        db.execute("INSERT INTO sealed_head VALUES (1, ?, ?, 0, 0, 0, NULL)", (FORMAT, master))
        self.keys.read(db)

    # A transaction.

    def follow(self, db: sqlite3.Connection) -> None:
        """At its beginning: put into memory what others wrote.

        Raises:
            StoreError: a row is not what was stored, or the master key was changed.

        Cost: 6 us where nothing was written, else about 30 us for each row of a cube.
        """
        last, floor, generation = db.execute(
            "SELECT last, floor, generation FROM sealed_head"
        ).fetchone()
        if generation != self.keys.generation:
            self.keys.read(db)
        (seen,) = db.execute("SELECT last FROM sealed_seen").fetchone()
        if seen == last:
            return
        if seen < floor:
            self._clear(db)
            seen = 0
        db.execute("PRAGMA defer_foreign_keys=ON")
        self._make_tables(db, seen)
        indexes = sealed_indexes.Indexes(db, whole=seen == 0)
        try:
            self._take(db, seen, indexes)
            indexes.refresh()
        except (ValueError, KeyError, TypeError, sqlite3.IntegrityError) as error:
            raise StoreError(f"{self.path}: damaged, its rows do not fit ({error})") from error
        self._learn(db)
        self._forget_dirty(db)
        db.execute("UPDATE sealed_seen SET last = ?", (last,))

    def flush(self, db: sqlite3.Connection) -> None:
        """At its end: seal what it changed, into the same transaction."""
        (last,) = db.execute("SELECT last FROM sealed_head").fetchone()
        stamp = last + 1
        self._learn(db, stamp)
        numbers = [row[0] for row in db.execute("SELECT number FROM sealed_dirty")]
        if not numbers:
            return
        for number in numbers:
            self._seal(db, self._tables[number], stamp)
        self._forget_dirty(db)
        db.execute("UPDATE sealed_head SET last = ?", (stamp,))
        db.execute("UPDATE sealed_seen SET last = ?", (stamp,))

    def undone(self) -> None:
        """After a transaction that was rolled back."""
        self._schema = -1
        self.keys.forget()

    # Keys.

    def destroy(self, db: sqlite3.Connection, owners: Sequence[int]) -> None:
        """Delete keys, with whatever they sealed; rows that are still there get new ones."""
        self._learn(db)
        for start in range(0, len(owners), 500):
            part = list(owners[start : start + 500])
            marks = ", ".join("?" * len(part))
            rows = db.execute(
                "SELECT r.tbl, r.key, r.owner, r.gone, r.data, k.memory, k.wrapped "
                "FROM sealed_rows r LEFT JOIN sealed_keys k ON k.owner = r.owner "
                f"WHERE r.owner IN ({marks}) ORDER BY r.owner",
                part,
            ).fetchall()
            for number, _, _, values in self._opened(rows):
                self._note(db, self._tables[number], [values])
            self.keys.destroy(db, part)

    def reseal(self, db: sqlite3.Connection) -> None:
        """New keys for everything, and every row sealed anew."""
        (last,) = db.execute("SELECT last FROM sealed_head").fetchone()
        for name in ("sealed_rows", "sealed_keys", "sealed_memories"):
            db.execute(f"DELETE FROM disk.{name}")
        db.execute("UPDATE sealed_head SET floor = ?, generation = generation + 1", (last + 1,))
        self.keys.forget()
        self.keys.read(db)
        for table in self._tables.values():
            if table.name not in DERIVED:
                self._note_all(db, table)

    def tidy(self, db: sqlite3.Connection) -> None:
        """Forget what rows are gone, where these are many; who has not seen it reads all anew."""
        (gone,) = db.execute("SELECT count(*) FROM sealed_rows WHERE gone").fetchone()
        if gone > _TIDY:
            db.execute("DELETE FROM sealed_rows WHERE gone")
            db.execute("UPDATE sealed_head SET floor = last")

    # Inside: the tables.

    def _make_tables(self, db: sqlite3.Connection, seen: int) -> None:
        rows = db.execute(
            "SELECT name, statements FROM sealed_tables WHERE stamp > ? ORDER BY id", (seen,)
        ).fetchall()
        there = {row[0]: row[1] for row in db.execute(MADE)}
        for name, statements in rows:
            made = json.loads(statements)
            if name not in there:
                for statement in made:
                    db.execute(statement)
            elif there[name] != made[0]:
                raise StoreError(
                    f"{self.path}: another version of memos changed the table {name!r}; close the "
                    "store and open it again"
                )

    def _learn(self, db: sqlite3.Connection, stamp: int | None = None) -> None:
        """See which tables there are in memory.

        Args:
            stamp: of this transaction; new and changed tables are written with it.
        """
        (version,) = db.execute("PRAGMA main.schema_version").fetchone()
        if version == self._schema:
            return
        known = {
            name: (number, json.loads(statements))
            for number, name, statements in db.execute(
                "SELECT id, name, statements FROM sealed_tables"
            )
        }
        found: dict[str, list[str]] = {}
        for name, statement in db.execute(MADE):
            found[name] = [statement]
        for name, statement in db.execute(INDEXES):
            found[name].append(statement)
        if stamp is not None:
            for name in known.keys() - found.keys():
                self._drop(db, name, known[name][0], stamp)
            for name, statements in found.items():
                if known.get(name, (0, []))[1] != statements:
                    db.execute(
                        "INSERT INTO sealed_tables(name, stamp, statements) VALUES (?, ?, ?) "
                        "ON CONFLICT (name) DO UPDATE SET stamp = excluded.stamp, "
                        "statements = excluded.statements",
                        (name, stamp, json.dumps(statements)),
                    )
        numbers = {row[1]: row[0] for row in db.execute("SELECT id, name FROM sealed_tables")}
        marked = {row[0] for row in db.execute("SELECT name FROM sqlite_temp_master")}
        self._tables = {}
        for name, statements in found.items():
            if name not in numbers or statements[0].startswith("CREATE VIRTUAL"):
                continue
            table = table_of(db, name, numbers[name])
            self._tables[table.number] = table
            if name in DERIVED:
                continue
            if table.mark not in marked:
                for statement in table.triggers():
                    db.execute(statement)
            if stamp is not None and known.get(name, (0, [""]))[1][0] != statements[0]:
                self._note_all(db, table)
        if stamp is not None and known.keys() ^ found.keys():
            # What others have to hear of, though no row changed.
            store = next((t for t in self._tables.values() if t.name == "store"), None)
            if store is not None:
                self._note_all(db, store)
        # Without a stamp nothing was written: the next end of a transaction looks again.
        if stamp is not None or known.keys() == found.keys():
            self._schema = version

    def _drop(self, db: sqlite3.Connection, name: str, number: int, stamp: int) -> None:
        db.execute("DELETE FROM sealed_rows WHERE tbl = ?", (number,))
        db.execute("DELETE FROM sealed_tables WHERE name = ?", (name,))
        db.execute(f"DROP TABLE IF EXISTS temp.sealed_dirty_{number}")
        db.execute("DELETE FROM sealed_dirty WHERE number = ?", (number,))
        db.execute("UPDATE sealed_head SET floor = ?", (stamp,))

    def _clear(self, db: sqlite3.Connection) -> None:
        """Empty the tables in memory."""
        db.execute("PRAGMA defer_foreign_keys=ON")
        for name, statement in db.execute(MADE).fetchall():
            if not statement.startswith("CREATE VIRTUAL"):
                db.execute(f"DELETE FROM main.{quoted(name)}")
            elif "fts5vocab" not in statement:
                db.execute(f"INSERT INTO {quoted(name)}({quoted(name)}) VALUES ('delete-all')")
        self._forget_dirty(db)

    def _note(self, db: sqlite3.Connection, table: Table, rows: Iterable[Sequence[Any]]) -> None:
        """Have these rows sealed again at the end of the transaction."""
        marks = ", ".join("?" * len(table.key))
        db.executemany(
            f"INSERT OR IGNORE INTO temp.{table.mark} VALUES ({marks})",
            [tuple(row[i] for i in table.key) for row in rows],
        )
        db.execute("INSERT OR IGNORE INTO sealed_dirty VALUES (?)", (table.number,))

    def _note_all(self, db: sqlite3.Connection, table: Table) -> None:
        keys = ", ".join(quoted(table.columns[i]) for i in table.key)
        db.execute(
            f"INSERT OR IGNORE INTO temp.{table.mark} SELECT {keys} FROM main.{quoted(table.name)}"
        )
        db.execute("INSERT OR IGNORE INTO sealed_dirty VALUES (?)", (table.number,))

    def _forget_dirty(self, db: sqlite3.Connection) -> None:
        for (number,) in db.execute("SELECT number FROM sealed_dirty").fetchall():
            db.execute(f"DELETE FROM temp.sealed_dirty_{number}")
        db.execute("DELETE FROM sealed_dirty")

    # Inside: sealing.

    def _seal(self, db: sqlite3.Connection, table: Table, stamp: int) -> None:
        hidden = self.keys.hidden(db)
        width = len(table.key)
        cursor = db.execute(table.dirty)
        while rows := cursor.fetchmany(_BATCH):
            there = [row[width:] for row in rows if row[width + table.key[0]] is not None]
            gone = [row[:width] for row in rows if row[width + table.key[0]] is None]
            owners = self._owners(db, table, there)
            memories = self._memories(db, set(owners))
            ciphers = self.keys.ciphers(db, {**memories, 0: 0}, make=True)
            sealed = []
            for row, owner in zip(there, owners, strict=True):
                if owner not in memories:
                    owner = 0  # of a cube that is not there any more
                key = row_key(hidden, table.number, [row[i] for i in table.key])
                name = row_name(table.number, key, owner, 0)
                data = seal(ciphers[owner], pack(row), name)
                sealed.append((table.number, key, owner, stamp, 0, data))
            for values in gone:
                key = row_key(hidden, table.number, values)
                data = seal(ciphers[0], pack(values), row_name(table.number, key, 0, 1))
                sealed.append((table.number, key, 0, stamp, 1, data))
            db.executemany(_PUT, sealed)

    def _owners(
        self, db: sqlite3.Connection, table: Table, rows: Sequence[Sequence[Any]]
    ) -> list[int]:
        if table.name == "bodies":
            return [self._owner_of_body(db, row[0]) for row in rows]
        if table.owner is None:
            return [0] * len(rows)
        return [table.sign * int(row[table.owner] or 0) for row in rows]

    def _owner_of_body(self, db: sqlite3.Connection, digest: bytes) -> int:
        """The cube whose versions have this text; where there are several their memory."""
        found = db.execute(
            "SELECT DISTINCT v.seq, c.memory FROM versions v JOIN cubes c ON c.seq = v.seq "
            "WHERE v.body = ? LIMIT 100",
            (digest,),
        ).fetchall()
        if len(found) == 1:
            return int(found[0][0])
        memories = {row[1] for row in found}
        return -int(memories.pop()) if len(memories) == 1 and len(found) < 100 else 0

    def _memories(self, db: sqlite3.Connection, owners: Iterable[int]) -> dict[int, int]:
        """owner -> number of its memory, for those that are there."""
        found = {owner: -owner for owner in owners if owner <= 0}
        cubes = sorted(owner for owner in owners if owner > 0)
        for start in range(0, len(cubes), 500):
            part = cubes[start : start + 500]
            marks = ", ".join("?" * len(part))
            found.update(
                db.execute(f"SELECT seq, memory FROM cubes WHERE seq IN ({marks})", part).fetchall()
            )
        return found

    # Inside: opening.

    def _take(self, db: sqlite3.Connection, seen: int, indexes: sealed_indexes.Indexes) -> None:
        numbers = {row[0]: row[1] for row in db.execute("SELECT id, name FROM sealed_tables")}
        tables = {
            number: table_of(db, name, number)
            for number, name in numbers.items()
            if name not in DERIVED
        }
        waiting: dict[tuple[int, bool], list[Any]] = {}

        def put(number: int, gone: bool) -> None:
            rows = waiting.pop((number, gone), [])
            table = tables[number]
            if rows and table.name == "cubes":
                indexes.before([row[0] for row in rows])
            if rows:
                db.executemany(table.delete if gone else table.insert, rows)

        cursor = db.execute(_CHANGED, (seen,))
        while rows := cursor.fetchmany(_BATCH):
            for number, _, gone, values in self._opened(rows):
                if number not in tables:
                    raise StoreError(f"{self.path}: damaged, a row of table {number}")
                same = waiting.setdefault((number, gone), [])
                same.append(values)
                if len(same) >= _BATCH:
                    put(number, gone)
        for number, gone in sorted(waiting, key=lambda one: not one[1]):
            put(number, gone)

    def _opened(self, rows: Sequence[Any]) -> Iterator[tuple[int, bytes, bool, list[Any]]]:
        """(number of the table, key, whether it is gone, values) of rows by owner."""
        by_owner: Callable[[Any], Any] = lambda row: (row[2], row[5], row[6])  # noqa: E731
        for (owner, memory, wrapped), mine in groupby(rows, by_owner):
            if wrapped is None:
                raise StoreError(f"{self.path}: damaged, the key of {called(owner)} is missing")
            opened = self.keys.open(owner, memory, wrapped)
            for number, key, _, gone, data, _, _ in mine:
                packed = unseal(opened, data, row_name(number, key, owner, gone))
                if packed is None:
                    name = self._tables[number].name if number in self._tables else number
                    raise StoreError(
                        f"{self.path}: damaged, a row of {name} of {called(owner)} is not what "
                        "was stored"
                    )
                yield number, key, bool(gone), unpack(packed)
