"""Stores that an earlier version of memos wrote."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from memos import MOS, GeneralTextMemory, TreeTextMemory
from memos.errors import StoreError
from memos.records.check import check

# What format 1 had instead of the versions and bodies of format 2.
FORMAT_1 = """
CREATE TABLE versions_1 (seq INTEGER NOT NULL, version INTEGER NOT NULL, state TEXT NOT NULL,
    text TEXT NOT NULL, content TEXT, metadata TEXT NOT NULL, importance FLOAT NOT NULL,
    author TEXT, source TEXT, at FLOAT NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY (seq, version)) WITHOUT ROWID;
INSERT INTO versions_1 SELECT seq, version, state, b.text, b.content, metadata, importance, author,
    source, at, v.digest FROM versions AS v JOIN bodies AS b ON b.digest = v.body;
DROP TABLE versions;
DROP TABLE bodies;
DROP TABLE branches;
ALTER TABLE versions_1 RENAME TO versions;
ALTER TABLE cubes DROP COLUMN edges;
ALTER TABLE cubes DROP COLUMN parents;
ALTER TABLE cubes DROP COLUMN version_digest;
UPDATE store SET format = 1;
"""


def written(folder: Path) -> list[object]:
    with MOS(folder) as mos:
        notes = mos.register_memory(GeneralTextMemory("notes", embedder=None))
        tree = mos.register_memory(TreeTextMemory("tree", embedder=None))
        notes.add("one", {"a": 1}, id="x", creator="ann", source="web")
        notes.update("x", "two", author="bob")
        notes.update("x", metadata={"b": [1, None]}, importance=0.9)
        notes.add("gone", id="y", derived_from=["x"])
        notes.delete("y", author="eve")
        tree.add("root", id="r")
        tree.add("leaf", id="l", parent_id="r", acl={"read": ["all"]})
        notes.relate("x", "about", "l", properties={"why": "test"}, weight=0.5)
        seen(mos)  # to look at a cube is a use, which makes it ACTIVATED
        mos.records.uses.write()
        return seen(mos)


def seen(mos: MOS) -> list[object]:
    found: list[object] = [mos.get("x").relations, mos.get("l").relations]
    for id in "xyrl":
        found += [
            (v.number, v.content, v.metadata, v.state, v.importance, v.author, v.source, v.at)
            for v in mos.history(id)
        ]
    return found


def test_a_store_of_format_1_is_brought_up(tmp_path: Path) -> None:
    before = written(tmp_path)
    with sqlite3.connect(tmp_path / "records.sqlite") as database:
        database.executescript(FORMAT_1)
    database.close()
    with pytest.raises(StoreError, match="format 2 wanted, got 1: open it once for writing"):
        MOS(tmp_path, readonly=True)
    for readonly in (False, True):
        with MOS(tmp_path, readonly=readonly) as mos:
            assert seen(mos) == before
            assert check(mos.records) == []
            assert [v.parents for v in mos.history("x")][1:] == [
                (v.digest,) for v in mos.history("x")[:-1]
            ]
            assert mos.history("l")[0].parent_id == "r"
    with MOS(tmp_path) as mos:
        mos.update("notes", "x", "three")
        assert check(mos.records) == []


def test_an_upgrade_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = written(tmp_path)
    with sqlite3.connect(tmp_path / "records.sqlite") as database:
        database.executescript(FORMAT_1)
        database.execute("CREATE TABLE bodies (a)")  # in the way
    database.close()
    with pytest.raises(StoreError, match="bodies"):
        MOS(tmp_path)
    with sqlite3.connect(tmp_path / "records.sqlite") as database:
        assert database.execute("SELECT format FROM store").fetchone() == (1,)
        database.execute("DROP TABLE bodies")
    database.close()
    with MOS(tmp_path) as mos:
        assert seen(mos) == before
