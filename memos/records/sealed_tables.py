"""The tables of an encrypted store: what stands in memory, and how the file names it."""

from __future__ import annotations

import re
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from memos.cube.sealing import pack


@dataclass(frozen=True)
class Table:
    """A table in memory.

    Args:
        number:  in the file.
        columns: all, by name; key: places of those that name a row.
        owner:   place of the column with the number of a cube or memory; None: the store's.
        sign:    1: the owner is a cube, -1: a memory.
    """

    name: str
    number: int
    columns: tuple[str, ...]
    key: tuple[int, ...]
    owner: int | None
    sign: int

    @property
    def names(self) -> str:
        return ", ".join(map(quoted, self.columns))

    @property
    def insert(self) -> str:
        marks = ", ".join("?" * len(self.columns))
        return f"INSERT OR REPLACE INTO main.{quoted(self.name)}({self.names}) VALUES ({marks})"

    @property
    def delete(self) -> str:
        wanted = " AND ".join(f"{quoted(self.columns[i])} = ?" for i in self.key)
        return f"DELETE FROM main.{quoted(self.name)} WHERE {wanted}"

    @property
    def dirty(self) -> str:
        """The rows that this transaction changed: their keys, then what they are now."""
        keys = [f"d.k{i}" for i in range(len(self.key))]
        same = " AND ".join(
            f"t.{quoted(self.columns[place])} = {key}"
            for place, key in zip(self.key, keys, strict=True)
        )
        columns = ", ".join(f"t.{quoted(column)}" for column in self.columns)
        return (
            f"SELECT {', '.join(keys)}, {columns} FROM temp.{self.mark} d "
            f"LEFT JOIN main.{quoted(self.name)} t ON {same}"
        )

    @property
    def mark(self) -> str:
        return f"sealed_dirty_{self.number}"

    def triggers(self) -> Iterator[str]:
        """The statements that note which rows change."""
        keys = [f"k{i}" for i in range(len(self.key))]
        yield (
            f"CREATE TEMP TABLE {self.mark} ({', '.join(keys)}, PRIMARY KEY ({', '.join(keys)})) "
            "WITHOUT ROWID"
        )
        for event, rows in (("INSERT", ["NEW"]), ("DELETE", ["OLD"]), ("UPDATE", ["OLD", "NEW"])):
            notes = "".join(
                f"INSERT OR IGNORE INTO {self.mark} VALUES "
                f"({', '.join(f'{row}.{quoted(self.columns[i])}' for i in self.key)}); "
                for row in rows
            )
            yield (
                f"CREATE TEMP TRIGGER sealed_{event}_{self.number} AFTER {event} ON "
                f"main.{quoted(self.name)} BEGIN "
                f"INSERT OR IGNORE INTO sealed_dirty VALUES ({self.number}); {notes} END"
            )


MADE = (
    "SELECT name, sql FROM main.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' "
    "ESCAPE '\\' AND NOT EXISTS (SELECT 1 FROM main.sqlite_master v WHERE v.sql LIKE "
    "'CREATE VIRTUAL%' AND sqlite_master.name IN (v.name || '_data', v.name || '_idx', "
    "v.name || '_content', v.name || '_docsize', v.name || '_config')) ORDER BY rowid"
)
INDEXES = (
    "SELECT tbl_name, sql FROM main.sqlite_master WHERE type = 'index' AND sql IS NOT NULL "
    "ORDER BY rowid"
)
# Tables whose rows belong to the cube that a column without a foreign key names.
_OF_CUBES = {"cubes", "versions", "vectors", "cold", "pins", "transitions", "uses"}


def table_of(db: sqlite3.Connection, name: str, number: int) -> Table:
    info = db.execute(f"PRAGMA main.table_info({quoted(name)})").fetchall()
    columns = [row[1] for row in info]
    key = [row[0] for row in sorted(info, key=lambda row: row[5]) if row[5]]
    if not key:
        columns, key = ["rowid", *columns], [0]
    owner, sign = None, 1
    foreign = db.execute(f"PRAGMA main.foreign_key_list({quoted(name)})").fetchall()
    of_cubes = [columns.index(row[3]) for row in foreign if row[2:5:2] == ("cubes", "seq")]
    if name in _OF_CUBES:
        owner = columns.index("seq")
    elif of_cubes:
        owner = min(of_cubes)
    elif name == "memories":
        owner, sign = columns.index("id"), -1
    elif any(row[1:3] == ("memory", "INTEGER") for row in info):
        owner, sign = columns.index("memory"), -1
    return Table(name, number, tuple(columns), tuple(key), owner, sign)


def row_key(hidden: bytes, number: int, values: Sequence[Any]) -> bytes:
    """What a row is found by: its numbers; where there is more to its name, a digest of it."""
    if all(type(value) is int for value in values):
        return struct.pack(f">{len(values)}q", *values)
    text = struct.pack(">q", number) + pack(values)
    return b"\xff" + blake2b(text, key=hidden, digest_size=16).digest()


def row_name(number: int, key: bytes, owner: int, gone: int) -> bytes:
    return b"memos row v1" + struct.pack("<qqb", number, owner, gone) + key


def quoted(name: str) -> str:
    """A name in SQL."""
    return name if re.fullmatch(r"[a-z_0-9]+", name) else '"' + name.replace('"', '""') + '"'
