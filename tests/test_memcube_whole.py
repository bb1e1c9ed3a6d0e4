"""Files and imports are whole or not at all, sealed, within rights, and small in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory
from memos.errors import AccessError, ArgumentError, NotFoundError, StoreError
from memos.facade.files import inspect
from memos.records.rights import ALL, BITS, Actor, set_grant
from memos.records.scope import acting

from .memcube_help import (
    Embedder,
    dump,
    filled,
    memories,
    moved,
    opened,
    parts_of,
    problems,
    state_of,
    vectors_in,
)

KEY = bytes(range(32))


# Whole or not at all.


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    one = filled()
    path = tmp_path / "1.memcube"

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        one.export(path, progress=stop)
    assert list(tmp_path.iterdir()) == []
    one.export(path)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match="overwrite"):
        one.export(path)
    with pytest.raises(RuntimeError, match="enough"):
        one.export(path, overwrite=True, progress=stop)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(StoreError, match="cannot be written"):
        one.export(tmp_path / "no" / "such" / "folder")
    with pytest.raises(ArgumentError, match="new file"):
        one.export(tmp_path, overwrite=True)


@pytest.mark.parametrize("at", [0.01, 0.3, 0.5, 0.6, 0.8, 0.9, 1.0])
def test_an_import_that_stops_has_stored_nothing(tmp_path: Path, at: float) -> None:
    filled(embedder=Embedder()).export(tmp_path / "1")
    two = MOS(tmp_path / "two")
    two.register_memory(GeneralTextMemory("mine", embedder=None))
    two.add("mine", "here before")
    before = dump(two)

    def stop(done: int, total: int) -> None:
        if done >= at * total and done < total:
            raise RuntimeError("enough")

    if at < 1:
        with pytest.raises(RuntimeError, match="enough"):
            two.import_(tmp_path / "1", embedder=None, progress=stop)
        assert dump(two) == before
        assert set(two.memories) == {"mine"}
    two.import_(tmp_path / "1", embedder=None)
    assert set(two.memories) == {"mine", "notes", "docs", "people", "points"}
    two.add("notes", "after it")
    assert problems(two) == []


def test_an_import_that_is_killed_has_stored_nothing(tmp_path: Path) -> None:
    filled().export(tmp_path / "1")
    program = """
import os, sys
from memos import MOS
def stop(done, total):
    if done > 0.9 * total:
        os._exit(9)
MOS(sys.argv[1]).import_(sys.argv[2], embedder=None, progress=stop)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "two"), str(tmp_path / "1")]
    assert subprocess.run(command).returncode == 9
    two = MOS(tmp_path / "two")
    assert two.memories == {}
    assert dump(two)["cubes"] == []
    two.import_(tmp_path / "1", embedder=None)
    assert problems(two) == []


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    one = filled()
    one.export(tmp_path / "1", progress=lambda *at: seen.append(at))
    assert seen[-1] == (len(seen), len(seen))
    seen.clear()
    MOS().import_(tmp_path / "1", progress=lambda *at: seen.append(at), embedder=None)
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_damage_in_the_store_is_not_exported(tmp_path: Path) -> None:
    for statement in (
        "UPDATE cubes SET text = 'rotten' WHERE id = 'key'",
        "UPDATE versions SET metadata = '{}' WHERE version = 2",
        "DELETE FROM versions WHERE version = 1",
        "UPDATE cubes SET importance = 0.25 WHERE id = 'odd'",
    ):
        one = filled()
        with one.records.database.write() as connection:
            connection.exec_driver_sql(statement)
        with pytest.raises(StoreError, match="damaged"):
            one.export(tmp_path / "1")
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported_read_only(tmp_path: Path) -> None:
    filled(tmp_path / "a").export(tmp_path / "1")
    with MOS(tmp_path / "a", readonly=True) as mos:
        with pytest.raises(StoreError, match="read-only"):
            mos.import_(tmp_path / "1")
        mos.export(tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


# Seals.


def test_signed_and_encrypted(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    one = filled()
    path = tmp_path / "1"
    one.export(path, sign=private, passphrase=KEY)
    assert b"spare key" not in path.read_bytes()
    before = dump(MOS())
    two = MOS()
    for options, error in (
        ({}, ArgumentError),
        ({"passphrase": bytes(32)}, StoreError),
        ({"passphrase": KEY, "trusted": [bytes(32)]}, StoreError),
    ):
        with pytest.raises(error) as caught:
            two.import_(path, **options)  # type: ignore[arg-type]
        assert KEY.hex() not in str(caught.value)
    assert {k: v for k, v in dump(two).items() if k != "store"} == {
        k: v for k, v in before.items() if k != "store"
    }
    report = two.import_(path, passphrase=KEY, trusted=[public], embedder=None)
    assert report.signer == public.public_bytes_raw().hex()
    assert state_of(one) == state_of(two)
    found = inspect(path, passphrase=KEY, trusted=[public])
    assert found.is_encrypted
    assert found.signer == report.signer
    assert found.digest == report.digest


def test_inspect(tmp_path: Path) -> None:
    made = filled(embedder=Embedder()).export(tmp_path / "1")
    found = inspect(tmp_path / "1")
    assert (found.num_bytes, found.digest, found.signer) == (made.num_bytes, made.digest, None)
    assert {m["name"]: m["cubes"] for m in found.memories} == made.memories
    assert found.memories[1]["embedder"]["identity"] == "one"
    assert sum(size for *_, size, _ in found.members) < made.num_bytes
    with pytest.raises(NotFoundError):
        inspect(tmp_path / "not there")
    (tmp_path / "2").write_bytes(b"something else")
    with pytest.raises(StoreError, match="2: "):
        inspect(tmp_path / "2")


# Rights.


def test_a_principal_needs_admin(tmp_path: Path) -> None:
    one = filled()
    actor = Actor(one.records.database, "user:eve")
    with one.records.database.write() as connection:
        set_grant(one.records.database, connection, "docs", "user:eve", BITS["read"])
        set_grant(one.records.database, connection, "points", "user:eve", ALL)
        set_grant(one.records.database, connection, "people", "user:eve", ALL)
    token = acting.set(actor)
    try:
        for name in ("notes", "docs"):
            with pytest.raises((AccessError, NotFoundError)):
                one.export(tmp_path / "1", memory=name)
        with pytest.raises(AccessError, match="relations") as caught:
            one.export(tmp_path / "1", memory="people")  # ada wrote odd, which is of notes
        assert "odd" not in str(caught.value)
        assert one.export(tmp_path / "2", memory="points").memories == {"points": 3}
    finally:
        acting.reset(token)
    one.export(tmp_path / "all", memory=["notes", "points"])
    two = opened()
    with two.records.database.write() as connection:
        set_grant(two.records.database, connection, "points", "user:eve", ALL)
    token = acting.set(Actor(two.records.database, "user:eve"))
    try:
        before = dump(two)
        with pytest.raises((AccessError, NotFoundError)):
            two.import_(tmp_path / "all")
        assert dump(two) == before
        assert two.import_(tmp_path / "2").memories["points"].cubes == 3
    finally:
        acting.reset(token)


# How much memory it takes.


def test_memory_stays_small(tmp_path: Path) -> None:
    """60 MB of cubes with long histories: a fraction of it is held."""
    program = """
import resource, sys
from memos import MOS, GeneralTextMemory
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
what, folder, path = sys.argv[1:]
mos = MOS(folder)
mos.register_memory(GeneralTextMemory("notes", embedder=None))
if what == "fill":
    for i in range(30):
        text = "".join(chr(97 + (i * j * j) % 23) for j in range(1000)) * 1000
        mos.add("notes", text, id=f"c{i}")
        mos.update("notes", f"c{i}", text + str(i))
    mos.close()
    sys.exit()
warm = MOS()
warm.register_memory(GeneralTextMemory("x", embedder=None))
warm.add("x", "to load what is loaded late")
base = peak()
mos.export(path) if what == "export" else mos.import_(path, embedder=None)
print(peak() - base)
"""
    path = tmp_path / "big.memcube"

    def run(what: str, folder: str) -> str:
        arguments = [what, str(tmp_path / folder), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True, text=True, check=True, env=environment,
        ).stdout  # fmt: skip

    run("fill", "a")
    exported = int(run("export", "a"))
    assert path.stat().st_size > 56 << 20
    imported = int(run("import", "b"))
    assert exported < 45, exported
    assert imported < 110, imported


def test_parts_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import memos.records.transfer_out as out

    monkeypatch.setattr(out, "PART_BYTES", 2000)
    one = filled(embedder=Embedder())
    for i in range(50):
        one.add("notes", f"number {i} " * 10, {"i": i})
    path = tmp_path / "moved.memcube"
    two = opened(embedder=Embedder())
    moved(one, tmp_path, two)
    assert len(parts_of(path.read_bytes())[0]) > 12
    assert state_of(one) == state_of(two)
    assert vectors_in(one, "notes") == vectors_in(two, "notes")
    before = path.read_bytes()
    two.export(path, overwrite=True)
    assert path.read_bytes() == before


def test_the_memories_of_a_file_are_known_after_a_restart(tmp_path: Path) -> None:
    filled().export(tmp_path / "1")
    with MOS(tmp_path / "two") as two:
        two.import_(tmp_path / "1", embedder=None)
    with MOS(tmp_path / "two") as two:
        assert set(two.memories) == {memory.name for memory in memories()}
        assert isinstance(two.memory("people"), GraphMemory)
        assert two.get("odd").derived_from == ("key",)
