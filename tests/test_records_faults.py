"""Records after what goes wrong: killed writers, full disks, damaged and foreign files."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memos.errors import ArgumentError, MemosError, NotFoundError, StoreError
from memos.memories.text import GeneralTextMemory
from memos.memories.tree import TreeTextMemory
from memos.records.check import check
from memos.records.store import Records

DIM = 4


class Notes(GeneralTextMemory):
    """With vectors that say which text they are of."""

    def bind(self, records: Records) -> None:
        super().bind(records)
        if not records.readonly:
            self.embedded.opened(DIM, "four numbers of a text")

    def _prepare(self, news: Sequence[Any], items: Any) -> None:
        for new in news:
            new.vector = vector_of(new.text)


def vector_of(text: str) -> bytes:
    rng = random.Random(text)
    return struct.pack("<4e", *(rng.randrange(8) for _ in range(DIM)))


def opened(folder: Path, **more: Any) -> tuple[Records, Notes, TreeTextMemory]:
    records = Records(folder, **more)
    notes = Notes("notes", embedder=None)
    tree = TreeTextMemory("tree", embedder=None)
    notes.bind(records)
    tree.bind(records)
    return records, notes, tree


def words(memory: GeneralTextMemory, query: str) -> set[str]:
    scope = memory.scope()
    with memory.records.database.read() as connection:
        seqs, _ = memory.table.fulltext.search(connection, query, 10_000)
        return {cube.id for cube in memory.table.load(connection, seqs.tolist(), scope).values()}


# kill -9


def write_until_killed(folder: Path, name: str, pipe: int) -> None:
    """Say what was done, once the call has returned."""
    rng = random.Random(name)
    _, notes, tree = opened(folder, durable=rng.random() < 0.2)
    root = tree.add(f"zqroot{name}", id=name)
    for i in range(100_000):
        id = f"{name}.{i}"
        deed = rng.random()
        if deed < 0.3:
            notes.add_many(
                {"content": first(f"{id}.{j}"), "id": f"{id}.{j}", "metadata": {"j": j, "by": name}}
                for j in range(5)
            )
            lines = [f"add {id}.{j}" for j in range(5)]
        else:
            notes.add(first(id), {"by": name, "i": i}, id=id)
            lines = [f"add {id}"]
            os.write(pipe, f"{lines.pop()}\n".encode())
            if deed < 0.5:
                notes.update(id, second(id), {"more": "zqmore"})
                lines = [f"update {id}"]
            elif deed < 0.6:
                notes.delete(id)
                lines = [f"delete {id}"]
            elif deed < 0.8:
                tree.add(first(id), id=id, parent_id=root.id)
                tree.move(id, None)
            elif deed < 0.9:
                tree.update(name, f"zqroot{name} {i}")
        os.write(pipe, "".join(f"{line}\n" for line in lines).encode())


def first(id: str) -> str:
    return f"zq{id.replace('.', 'x')} " + random.Random(id).randbytes(150).hex()


def second(id: str) -> str:
    return f"zq{id.replace('.', 'x')} changed"


def kill_many(folder: Path, number: int) -> None:
    """Fork writers, three at a time, and kill each at a random moment. Prints what they said."""
    rng = random.Random()
    running: list[tuple[int, int]] = []
    said = []
    for i in range(number):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(folder, f"p{i}", writing)
            except BaseException as error:
                os.write(writing, f"failed {error!r}\n".encode())
            finally:
                os._exit(1)
        os.close(writing)
        running.append((child, reading))
        if len(running) == 3 or i == number - 1:
            for child, reading in running:
                text = os.read(reading, 65536) if rng.random() < 0.9 else b""
                select_for(reading, rng.random() * 0.15, texts := [text])
                os.kill(child, 9)
                os.waitpid(child, 0)
                while more := os.read(reading, 65536):
                    texts.append(more)
                os.close(reading)
                said.append(b"".join(texts).decode().rpartition("\n")[0].split("\n"))
            running = []
    print(json.dumps(said))


def select_for(reading: int, seconds: float, texts: list[bytes]) -> None:
    """Read for so long."""
    import select
    import time

    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            texts.append(os.read(reading, 65536))


@pytest.mark.slow
def test_killed_writers_lose_nothing_they_were_told_is_stored(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "kill", str(tmp_path), "42"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    said = json.loads(done.stdout)
    assert len(said) == 42
    records, notes, _ = opened(tmp_path)
    assert check(records) == []
    changed = words(notes, "zqmore")
    added = 0
    for lines in said:
        state: dict[str, str] = {}
        for line in filter(None, lines):
            what, _, id = line.partition(" ")
            assert what != "failed", line
            state[id] = what
        last = next(reversed(state), "")
        added += len(state)
        for id, what in state.items():
            word = f"zq{id.replace('.', 'x')}"
            if what == "delete" or (id == last and not is_there(notes, id)):
                assert not is_there(notes, id)
                assert notes.history(id)[0].content == first(id)
                assert words(notes, word) == set()
                continue
            cube = notes.get(id)
            contents = {"add": {first(id)}, "update": {second(id)}}[what]
            if id == last:  # it may have gone on by one step that it did not tell
                contents = {first(id), second(id)}
            assert cube.content in contents
            assert words(notes, word) == {id}
            assert (id in changed) == (cube.content == second(id))
    assert added > 100
    records.close()


def is_there(memory: GeneralTextMemory, id: str) -> bool:
    try:
        memory.get(id)
    except NotFoundError:
        return False
    return True


# A full disk.


def fill(folder: Path) -> None:
    """Add until a file may not grow any more; then go on once it may. Prints what happened."""
    import resource

    records, notes, _ = opened(folder)
    notes.add("before", id="before")
    size = sum(file.stat().st_size for file in folder.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 600_000, hard))
    stored = []
    message = ""
    for i in range(10_000):
        try:
            stored.append(notes.add(f"zq{i} " + "x " * 2000, id=str(i)).id)
        except StoreError as error:
            message = str(error)
            break
    still = [cube.id for cube in notes.cubes(limit=None)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    notes.add("after", id="after")
    problems = [str(problem) for problem in check(records)]
    print(json.dumps({"stored": stored, "message": message, "still": still, "bad": problems}))


def test_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "fill", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    said = json.loads(done.stdout)
    assert len(said["stored"]) > 5
    assert "records.sqlite: " in said["message"]
    assert said["message"].endswith("disk I/O error") or "the disk is full" in said["message"]
    assert said["still"] == [*reversed(said["stored"]), "before"]
    assert said["bad"] == []
    records, notes, _ = opened(tmp_path)
    assert {cube.id for cube in notes.cubes(limit=None)} == {*said["still"], "after"}
    assert check(records) == []
    records.close()


def test_no_more_pages(tmp_path: Path) -> None:
    records, notes, _ = opened(tmp_path)
    with records.database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 40}")
    stored = []

    def fill_up() -> None:
        for i in range(10_000):
            stored.append(notes.add(f"zq{i} " + "y " * 2000, id=str(i)).id)

    with pytest.raises(StoreError, match=r"records\.sqlite: the disk is full"):
        fill_up()
    assert {cube.id for cube in notes.cubes(limit=None)} == set(stored)
    assert len(stored) > 3
    with pytest.raises(StoreError, match="the disk is full"):
        notes.add_many({"content": f"{i}" + " z" * 2000} for i in range(50))
    with records.database.write() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 10_000}")
    for id in stored[:3]:
        notes.delete(id)
    assert len(notes.cubes(limit=None)) == len(stored) - 3
    assert check(records) == []
    records.close()


# Files and folders that are something else.


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="path: a folder wanted, got the file"):
        Records(tmp_path / "file")
    with pytest.raises(StoreError, match="the folder cannot be made"):
        Records(tmp_path / "file" / "below")


def test_readonly(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store there"):
        Records(tmp_path, readonly=True)
    assert list(tmp_path.iterdir()) == []
    records, notes, tree = opened(tmp_path)
    notes.add("text", id="x")
    tree.add("root", id="r")
    records.close()
    records, notes, tree = opened(tmp_path, readonly=True)
    for call in (
        lambda: notes.add("y"),
        lambda: notes.update("x", "y"),
        lambda: notes.delete("x"),
        lambda: notes.relate("x", "to", "x"),
        lambda: tree.move("r", None),
        lambda: tree.add_document("# y"),
    ):
        with pytest.raises(StoreError, match="opened read-only, nothing can be changed"):
            call()
    assert notes.get("x").content == "text"
    assert check(records) == []
    with pytest.raises(ArgumentError, match="there is none"):
        Notes("new", embedder=None).bind(records)
    records.close()


def test_a_store_of_another_format(tmp_path: Path) -> None:
    opened(tmp_path)[0].close()
    with sqlite3.connect(tmp_path / "records.sqlite") as database:
        database.execute("UPDATE store SET format = 999")
    database.close()
    for readonly in (False, True):
        with pytest.raises(StoreError, match="format 2 wanted, got 999"):
            Records(tmp_path, readonly=readonly)


def test_a_database_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE songs (name)")
    database.close()
    before = path.read_bytes()
    for readonly in (False, True):
        with pytest.raises(StoreError, match=r"a database of memos wanted, got tables \['songs'\]"):
            Records(tmp_path, readonly=readonly)
    path.write_bytes(b"no database at all" * 1000)
    for readonly in (False, True):
        with pytest.raises(StoreError, match="not a database"):
            Records(tmp_path, readonly=readonly)
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="a store wanted, got an empty database"):
        Records(tmp_path, readonly=True)
    path.write_bytes(before)
    assert path.read_bytes() == before


def test_a_store_after_a_fork(tmp_path: Path) -> None:
    """A child cannot use its parent's connections: a clear error instead of a damaged file."""
    done = subprocess.run(
        [sys.executable, __file__, "fork", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "opened before a fork" in done.stdout
    records, notes, _ = opened(tmp_path)
    assert {cube.id for cube in notes.cubes()} == {"parent", "again"}
    records.close()


def fork(folder: Path) -> None:
    _, notes, _ = opened(folder)
    notes.add("parent", id="parent")
    child = os.fork()
    if child == 0:
        try:
            notes.add("child", id="child")
        except StoreError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    notes.add("again", id="again")


# Damaged files.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """A store's file, and the cubes in it."""
    folder = tmp_path_factory.mktemp("whole")
    records, notes, tree = opened(folder)
    for i in range(60):
        notes.add(f"zq{i} " + f"word{i} " * (i % 40), {"number": i, "tag": f"t{i % 7}"}, id=f"n{i}")
    for i in range(0, 60, 3):
        notes.update(f"n{i}", metadata={"seen": True})
    for i in range(40):
        tree.add(f"node {i}", id=f"t{i}", parent_id=f"t{i // 3}" if i else None)
    for i in range(10, 60, 10):
        notes.relate(f"n{i}", "next", f"n{i - 5}")
    cubes = {cube.id: cube for memory in (notes, tree) for cube in memory.cubes(limit=None)}
    records.close()
    return (folder / "records.sqlite").read_bytes(), cubes


def damage(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(damaged[: rng.randrange(len(damaged))])
    if kind == 1:  # a page that was never written
        page = rng.randrange(len(damaged) // 4096) * 4096
        damaged[page : page + 4096] = bytes(4096)
    elif kind == 2:  # a page that stands in another's place
        pages = len(damaged) // 4096
        one, other = rng.randrange(1, pages) * 4096, rng.randrange(1, pages) * 4096
        damaged[one : one + 4096] = damaged[other : other + 4096]
    else:
        for _ in range(rng.choice((1, 1, 4, 40))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_file_gives_errors_and_no_wrong_cube(
    whole: tuple[bytes, dict[str, Any]], tmp_path: Path, part: int
) -> None:
    data, cubes = whole
    noticed = 0
    for i in range(12):
        folder = tmp_path / str(i)
        folder.mkdir()
        rng = random.Random(1000 * part + i)
        (folder / "records.sqlite").write_bytes(damage(data, rng))
        errors = look(folder, cubes)
        noticed += bool(errors)
        shutil.rmtree(folder)
    assert noticed > 5
    assert all(str(error) for error in errors)


def look(folder: Path, cubes: dict[str, Any]) -> list[MemosError]:
    """Use a damaged store; anything but MemosErrors leaves as it is."""
    errors: list[MemosError] = []

    def attempt(call: Any) -> Any:
        try:
            return call()
        except MemosError as error:
            errors.append(error)
            return None

    store = attempt(lambda: opened(folder))
    if store is None:
        return errors
    records, notes, tree = store
    for memory in (notes, tree):
        for cube in attempt(lambda memory=memory: memory.cubes(limit=None)) or ():
            right(cube, cubes)
        attempt(lambda memory=memory: memory.cubes(filters={"tag": "t1", "number": {"$gt": 2}}))
        attempt(lambda memory=memory: words(memory, "zq1 word7 node"))
    for id in cubes:
        memory = tree if id.startswith("t") else notes
        cube = attempt(lambda id=id, memory=memory: memory.get(id))
        if cube is not None:
            right(cube, cubes)
        attempt(lambda id=id, memory=memory: memory.history(id))
    attempt(lambda: tree.export_text("t0"))
    attempt(lambda: notes.add("new", {"tag": "t1"}))
    attempt(lambda: notes.delete("n7"))
    attempt(lambda: tree.move("t2", "t1"))
    problems = attempt(lambda: check(records))
    errors += [StoreError(str(problem)) for problem in problems or ()]
    attempt(records.close)
    return errors


def right(cube: Any, cubes: dict[str, Any]) -> None:
    wanted = cubes.get(cube.id)
    if wanted is not None:
        assert (cube.content, cube.metadata) == (wanted.content, wanted.metadata)


# The check itself: every kind of disagreement is found.

DISAGREEMENTS = [
    ("UPDATE cubes SET text = 'other' WHERE id = 'n1'", "cube"),
    ("UPDATE cubes SET metadata = '{}' WHERE id = 'n1'", "cube"),
    ("UPDATE cubes SET importance = 7 WHERE id = 'n1'", "cube"),
    ("UPDATE cubes SET change = 1000000 WHERE id = 'n1'", "cube"),
    ("UPDATE store SET seq = 5", "cube"),
    ("UPDATE cubes SET version = 3 WHERE id = 'n1'", "version"),
    ("DELETE FROM versions WHERE seq = (SELECT seq FROM cubes WHERE id = 'n3')", "version"),
    ("INSERT INTO text_1(text_1, rowid, text, context) SELECT 'delete', seq, text, context "
     "FROM cubes WHERE id = 'n1'", "fulltext"),
    ("INSERT INTO text_1(rowid, text, context) VALUES (7, 'ghost', '')", "fulltext"),
    ("UPDATE cubes SET context = 'other' WHERE id = 'n1'", "fulltext"),
    ("UPDATE cubes SET context = 'other' WHERE id = 't1'", "fulltext"),
    ("DELETE FROM facts WHERE string = 't3'", "facts"),
    ("UPDATE facts SET number = 1000 WHERE key = 'number' AND number = 5", "facts"),
    ("INSERT INTO facts VALUES (1, 'k', 2, 1, '', 1000)", "facts"),
    ("UPDATE vectors SET data = x'00' WHERE seq = 3", "vector"),
    ("UPDATE vectors SET memory = 2 WHERE seq = 3", "vector"),
    ("UPDATE vectors SET change = 1000000 WHERE seq = 3", "vector"),
    ("UPDATE cubes SET state = 'DELETED' WHERE id = 'n2'", "vector"),
    ("UPDATE cubes SET state = 'DELETED' WHERE id = 't1'", "parent"),
    ("UPDATE cubes SET parent = (SELECT seq FROM cubes WHERE id = 't4') WHERE id = 't1'", "parent"),
    ("UPDATE cubes SET thread = 'x' WHERE id = 't5'", "parent"),
    ("UPDATE cubes SET expires_at = 1e12 WHERE id = 't1'", "parent"),
    ("UPDATE relations SET weight = 0", "relation"),
    ("PRAGMA foreign_keys = OFF; UPDATE relations SET target = 1000", "relation"),
    ("PRAGMA foreign_keys = OFF; UPDATE relations SET target = 1000", "file"),
]  # fmt: skip


@pytest.mark.parametrize(("statement", "what"), DISAGREEMENTS)
def test_check_finds(
    whole: tuple[bytes, dict[str, Any]], tmp_path: Path, statement: str, what: str
) -> None:
    (tmp_path / "records.sqlite").write_bytes(whole[0])
    told: list[str] = []
    records, _, _ = opened(tmp_path)
    assert check(records, told.append) == []
    assert told[0] == "file"
    records.close()
    database = sqlite3.connect(tmp_path / "records.sqlite")
    database.executescript(statement)
    database.close()
    records, _, _ = opened(tmp_path)
    problems = check(records)
    assert what in {problem.what for problem in problems}
    assert all(str(problem) for problem in problems)
    records.close()


if __name__ == "__main__":
    tasks: dict[str, Any] = {"kill": kill_many, "fill": fill, "fork": fork}
    task, folder, *numbers = sys.argv[1:]
    tasks[task](Path(folder), *map(int, numbers))
