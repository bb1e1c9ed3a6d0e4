"""Encrypted stores that are opened again, damaged, or shared by processes and threads."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory
from memos.cube.memcube_cipher import OpeningReader
from memos.errors import ArgumentError, NotFoundError, StoreError
from memos.records import sealed_image
from memos.records.check import check

from .encryption_help import KEY, MARK, Embedder, contents, filled, opened, readable, rows

# The image of the tables.


def test_an_image_is_taken_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_image, "_LEAST", 10)
    loaded = []
    load = sealed_image.load

    def watched(db: Any, path: Path, key: bytes) -> None:
        load(db, path, key)
        loaded.append(db.execute("SELECT last FROM sealed_seen").fetchone()[0] > 0)

    monkeypatch.setattr(sealed_image, "load", watched)
    store, image = tmp_path / "store", tmp_path / "store" / "records.image"
    filled(store, 40)
    old = (store / "records.sqlite").read_bytes()
    with opened(store) as mos:
        mos.add("notes", "one more")
    has_image = hasattr(sqlite3.Connection, "serialize")
    assert loaded[-1:] == [has_image]
    with opened(store) as mos:
        assert len(contents(mos)) == 41
        assert check(mos.records) == []
        mos.add_many("notes", [{"content": f"new {i}"} for i in range(40)])
    newer = image.read_bytes() if has_image else b""
    # The file as it was before, beside the image of later.
    (store / "records.sqlite").write_bytes(old)
    with opened(store) as mos:
        assert loaded[-1] is False
        assert len(contents(mos)) == 40
        mos.add_many("notes", [{"content": f"other {i}"} for i in range(60)])
    for data in (newer, newer[:-1], bytes([*newer[:500], 1, *newer[501:]]), b"", b"x" * 500):
        image.write_bytes(data)
        with opened(store) as mos:
            assert loaded[-1] is False
            assert len(contents(mos)) == 100
            assert check(mos.records) == []
        image.unlink()


def test_a_purge_takes_the_image_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_image, "_LEAST", 10)
    ids = filled(tmp_path)
    image = tmp_path / "records.image"
    with opened(tmp_path) as mos:
        assert image.exists() == hasattr(sqlite3.Connection, "serialize")
        data = image.read_bytes() if image.exists() else b""
        mos.purge(ids[0])
        assert not image.exists()
        image.write_bytes(data)
        database: Any = mos.records.database
        key = database.file_key(0)
        with database.read():
            pass
    if data:
        with pytest.raises(StoreError):
            OpeningReader(io.BytesIO(data), key)


# Damage.


def test_a_flipped_bit_is_an_error_never_another_answer(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as mos:
        mos.register_memory(GraphMemory("people", embedder=None)).add(
            {"type": "node", "label": "Person", "properties": {"name": "Ann"}}
        )
        one = mos.add("notes", "text", {"n": 1})
        mos.update("notes", one.id, "another")
        mos.add("notes", "two", relations=[{"type": "to", "target": one.id}])
    wanted = {}
    with opened(tmp_path / "store") as mos:
        wanted = {name: repr(m.cubes(None)) for name, m in mos.memories.items()}
    cells = [
        (table, column, row, size)
        for table, columns in (
            ("sealed_rows", ("data", "key", "owner", "tbl", "gone")),
            ("sealed_keys", ("wrapped", "owner", "memory")),
            ("sealed_memories", ("wrapped",)),
        )
        for column in columns
        for row, size in rows(tmp_path / "store", f"SELECT rowid, length({column}) FROM {table}")
    ]
    copy = tmp_path / "copy"
    silent = 0
    for i, (table, column, row, size) in enumerate(cells):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "store", copy)
        (value,) = rows(copy, f"SELECT {column} FROM {table} WHERE rowid = ?", row)[0]
        if isinstance(value, bytes):
            changed = bytearray(value)
            changed[(i * 7) % size] ^= 1 << (i % 8)
            value = bytes(changed)
        else:
            value = value + 1 if column != "gone" else 1 - value
        try:
            rows(copy, f"UPDATE {table} SET {column} = ? WHERE rowid = ?", value, row)
        except sqlite3.IntegrityError:
            continue
        try:
            mos = opened(copy)
        except StoreError:
            continue
        silent += 1
        assert {name: repr(m.cubes(None)) for name, m in mos.memories.items()} == wanted
        mos.close()
    assert silent <= 2, "only what a flip does not reach may open"


# Processes and threads.


_WRITER = """
import sys
from memos import MOS
mos = MOS(sys.argv[1], key="env:MEMOS_TEST_KEY")
for i in range(12):
    mos.add("notes", f"from {sys.argv[2]} {i}", {"by": sys.argv[2]})
mos.close()
"""


def test_processes_write_and_one_reads(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    env = {**os.environ, "MEMOS_TEST_KEY": KEY.hex()}
    run = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with opened(tmp_path) as mos:
        writers = [subprocess.Popen([*run, name], env=env) for name in ("one", "two")]
        seen = 0
        while any(writer.poll() is None for writer in writers):
            found = len(contents(mos))
            assert found >= seen
            seen = found
            time.sleep(0.05)
        assert [writer.returncode for writer in writers] == [0, 0]
        assert len(contents(mos)) == 25
        for name in ("one", "two"):
            assert len(mos.memory("notes").cubes(None, filters={"by": name})) == 12
        assert mos.retrieve("notes", "from two 11", 1)[0].content == "from two 11"
        assert check(mos.records) == []


def test_threads(tmp_path: Path) -> None:
    """They wait for one another, and never in a ring."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            own = mos.register_memory(GeneralTextMemory(f"of {number}", embedder=Embedder()))
            for i in range(12):
                mos.add("notes", f"{MARK} {number} {i}")
                own.add(f"{MARK} {i}")
                assert mos.retrieve(None, f"{MARK} {number} {i}", 1)
                assert mos.stats()
        except BaseException as error:  # handed to the test
            errors.append(error)

    with opened(tmp_path) as mos:
        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(contents(mos)) == 48
        assert check(mos.records) == []
    assert readable(tmp_path) == []


def test_a_write_inside_a_read(tmp_path: Path) -> None:
    with opened(tmp_path) as mos, opened(tmp_path) as other:
        with mos.records.database.snapshot():
            before = contents(mos)
            other.add("notes", "theirs")
            assert contents(mos) == before == set()
            mos.add("notes", "mine")
            with pytest.raises(ArgumentError, match="content"):
                mos.add("notes", "")
            assert contents(other) == contents(mos) == {"mine", "theirs"}
        assert contents(mos) == {"mine", "theirs"}


def make_a_table_and_fail(mos: MOS) -> None:
    with mos.records.database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE passing (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO passing VALUES (1)")
        raise ZeroDivisionError


def test_what_is_undone_is_not_there(tmp_path: Path) -> None:
    with opened(tmp_path) as mos:
        mos.add("notes", "first")
        with pytest.raises(NotFoundError):
            mos.add("notes", "second", relations=[{"type": "to", "target": "nowhere"}])
        with pytest.raises(ZeroDivisionError):
            make_a_table_and_fail(mos)
        mos.add("notes", "third")
        with mos.records.database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE lasting (name TEXT PRIMARY KEY, n REAL)")
            connection.exec_driver_sql("INSERT INTO lasting VALUES (?, 1.5)", (MARK,))
    assert readable(tmp_path) == []
    with opened(tmp_path) as mos:
        assert contents(mos) == {"first", "third"}
        assert mos.retrieve("notes", "third", 1)[0].content == "third"
        with mos.records.database.read() as connection:
            assert connection.exec_driver_sql("SELECT * FROM lasting").all() == [(MARK, 1.5)]
