"""Keys of encrypted stores: where they come from, that they are needed, changed and destroyed."""

from __future__ import annotations

import base64
import pickle
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory
from memos.cube.sealing import cipher, pack, seal, unpack, unseal
from memos.errors import ArgumentError, BackendError, NotFoundError, StoreError
from memos.records.check import check
from memos.records.keys import MasterKey, new_text

from .encryption_help import KEY, MARK, Embedder, contents, filled, opened, readable, rows

OTHER = bytes(range(200, 232))


# Where a master key comes from.


def test_a_key_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = MasterKey.new_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert MasterKey.from_file(path).id == MasterKey.of(f"file:{path}").id == made.id
    with pytest.raises(ArgumentError, match="exists"):
        MasterKey.new_file(path)
    for text in (KEY, KEY.hex().encode(), base64.b64encode(KEY), base64.urlsafe_b64encode(KEY)):
        path.write_bytes(text)
        assert MasterKey.from_file(path).id == MasterKey(KEY).id
    for text in (b"", b"a passphrase of thirty-two bytes", b"x" * 44, KEY[:31], b"g" * 64):
        path.write_bytes(text)
        with pytest.raises(ArgumentError, match="random bytes as base64") as caught:
            MasterKey.from_file(path)
        assert not text or text.decode("latin-1") not in str(caught.value)
    with pytest.raises(NotFoundError, match="nowhere"):
        MasterKey.from_file(tmp_path / "nowhere")


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY.hex())
    assert MasterKey.of("env:MY_KEY").id == MasterKey.from_env("MY_KEY").id == MasterKey(KEY).id
    monkeypatch.setenv("MY_KEY", "hunter2")
    with pytest.raises(ArgumentError, match="MY_KEY") as caught:
        MasterKey.from_env("MY_KEY")
    assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(NotFoundError, match="MY_KEY"):
        MasterKey.from_env("MY_KEY")


def test_a_key_from_the_keyring() -> None:
    keyring = pytest.importorskip("keyring")
    backend = pytest.importorskip("keyring.backend")

    class InMemory(backend.KeyringBackend):  # type: ignore[misc, name-defined]
        priority = 1

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[tuple[str, str], str] = {}

        def get_password(self, service: str, username: str) -> str | None:
            return self.kept.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            self.kept[service, username] = password

    before = keyring.get_keyring()
    keyring.set_keyring(InMemory())
    try:
        with pytest.raises(NotFoundError, match="memos/master"):
            MasterKey.from_keyring()
        made = MasterKey.new_keyring("memos", "work")
        assert MasterKey.of("keyring:memos/work").id == made.id
        with pytest.raises(ArgumentError, match="memos/work"):
            MasterKey.new_keyring("memos", "work")
    finally:
        keyring.set_keyring(before)


def test_a_keyring_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(BackendError, match=r"memos-native\[keyring\]"):
        MasterKey.from_keyring()


@pytest.mark.parametrize("given", ["hunter2", "file:", "env:", 7, b"short", "disk:x", None])
def test_what_is_no_key_is_not_repeated(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"key: ") as caught:
        MasterKey.of(given)
    assert "hunter2" not in str(caught.value)


def test_a_key_is_in_no_repr_and_no_pickle() -> None:
    key = MasterKey(KEY)
    everything = f"{key!r} {key} {vars(key)}"
    for form in (KEY.hex(), base64.b64encode(KEY).decode(), repr(KEY)):
        assert form not in everything
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    assert new_text() != new_text()


# Pieces.


def test_pieces_open_only_as_they_were_sealed() -> None:
    one, other = cipher(KEY), cipher(OTHER)
    sealed = seal(one, b"text", b"name")
    assert unseal(one, sealed, b"name") == b"text"
    assert unseal(other, sealed, b"name") is None
    assert unseal(one, sealed, b"another") is None
    for i in range(len(sealed)):
        changed = bytearray(sealed)
        changed[i] ^= 1
        assert unseal(one, bytes(changed), b"name") is None
        assert unseal(one, sealed[:i], b"name") is None
    assert seal(one, b"text", b"name") != sealed


@pytest.mark.parametrize(
    "values",
    [
        [],
        [None, 1, -(2**63), 1.5, float("inf"), "", "a\u00e9\0\U0001f600", b"", b"\xff" * 3, True],
        [b"a", b"", "[1]"],
    ],
)
def test_rows_come_back_as_they_were(values: list[Any]) -> None:
    again = unpack(pack(values))
    assert again == values
    assert [type(value) for value in again] == [type(value) for value in values]


# The key of a store.


def test_without_the_key_nothing_opens(tmp_path: Path) -> None:
    filled(tmp_path)
    wanted = MasterKey(KEY).id
    for key in (None, OTHER):
        for readonly in (False, True):
            before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
            with pytest.raises(StoreError, match=wanted):
                MOS(tmp_path, key=key, readonly=readonly)
            after = {p: p.read_bytes() for p in tmp_path.rglob("*.sqlite") if p.is_file()}
            assert after == {p: before[p] for p in after}
    with opened(tmp_path, readonly=True) as mos:
        assert len(contents(mos)) == 20
        with pytest.raises(StoreError, match="read-only"):
            mos.add("notes", "more")


def test_a_store_that_is_not_encrypted_wants_no_key(tmp_path: Path) -> None:
    with opened(tmp_path, None) as mos:
        mos.add("notes", "text")
    with pytest.raises(StoreError, match="not encrypted"):
        MOS(tmp_path, key=KEY)
    with opened(tmp_path, None) as mos:
        assert contents(mos) == {"text"}
    with pytest.raises(ArgumentError, match="path"):
        MOS(None, key=KEY)


def test_ids_of_memories_and_cubes_are_not_readable(tmp_path: Path) -> None:
    with MOS(tmp_path, key=KEY) as mos:
        memory = GeneralTextMemory(f"{MARK}name", MARK, embedder=Embedder())
        mos.register_memory(memory)
        memory.add("text", id=f"{MARK}@mail")
        memory.add("text two", relations=[{"type": MARK, "target": f"{MARK}@mail"}])
        vector = memory.embedded.embedder.embed(["text"])[0].astype("<f2").tobytes()
    assert readable(tmp_path, vector) == []
    with MOS(tmp_path, key=KEY) as mos:
        assert mos.memory(f"{MARK}name").description == MARK
        assert mos.get(f"{MARK}@mail").content == "text"


def test_equal_texts_are_not_seen_to_be_equal(tmp_path: Path) -> None:
    with opened(tmp_path) as mos:
        for i in range(2):
            mos.register_memory(GeneralTextMemory(f"m{i}", embedder=None)).add("the same text")
            mos.update(f"m{i}", mos.memory(f"m{i}").cubes()[0].id, "another text")
    blobs = [row[0] for row in rows(tmp_path, "SELECT data FROM sealed_rows")]
    assert len(set(blobs)) == len(blobs)
    digests = [row[0] for row in rows(tmp_path, "SELECT key FROM sealed_rows")]
    from memos.records.history import body_digest

    assert not any(body_digest("the same text", None)[:8] in digest for digest in digests)


def test_no_vector_index_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memos.records.vectors._SAVE_FROM", 10)
    for _ in range(2):
        with MOS(tmp_path, key=KEY) as mos:
            memory = mos.register_memory(GeneralTextMemory("notes", embedder=Embedder()))
            memory.add_many([{"content": f"{MARK} {chr(97 + i)}"} for i in range(20)])
            vector = memory.embedded.embedder.embed([f"{MARK} c"])[0].astype("<f2").tobytes()
            hits = [hit.content for hit in mos.retrieve("notes", f"{MARK} c", 3)]
        assert list((tmp_path / "indexes").iterdir())
        assert readable(tmp_path, vector) == []
        assert hits[0] == f"{MARK} c"


def test_audit_records_are_not_readable(tmp_path: Path) -> None:
    with MOS(tmp_path, key=KEY, audit=True) as mos:
        mos.register_memory(GeneralTextMemory(f"{MARK}name", embedder=None))
        mos.add(f"{MARK}name", MARK, id=f"{MARK}id")
        mos.retrieve(f"{MARK}name", MARK)
        assert len(mos.audit.records(id=f"{MARK}id")) == 2
    assert list((tmp_path / "audit").iterdir())
    assert readable(tmp_path) == []
    with MOS(tmp_path, key=KEY) as mos:
        mos.reseal()
        assert [r.what for r in mos.audit.records(id=f"{MARK}id")] == ["add", "retrieve"]
        assert mos.audit.verify() == []


# Changing keys.


def test_another_master_key(tmp_path: Path) -> None:
    filled(tmp_path)
    old = tmp_path.parent / "old"
    shutil.copytree(tmp_path, old)
    with opened(tmp_path) as mos:
        mos.change_master_key(OTHER)
        mos.add("notes", "after")
        mos.register_memory(GeneralTextMemory("more", embedder=None)).add("text")
    with pytest.raises(StoreError, match=MasterKey(OTHER).id):
        MOS(tmp_path, key=KEY)
    with opened(tmp_path, OTHER) as mos:
        assert "after" in contents(mos)
        assert check(mos.records) == []
    with opened(old) as mos:  # a copy from before wants the key from before
        assert len(contents(mos)) == 20


def test_new_keys_for_a_memory_and_for_everything(tmp_path: Path) -> None:
    filled(tmp_path)
    before = rows(tmp_path, "SELECT wrapped FROM sealed_keys") + rows(
        tmp_path, "SELECT wrapped FROM sealed_memories"
    )
    data = rows(tmp_path, "SELECT data FROM sealed_rows")
    with opened(tmp_path) as mos, opened(tmp_path) as other:
        mos.change_memory_key("notes")
        other.add("notes", "by another process")
        assert "by another process" in contents(mos)
        mos.reseal()
        other.add("notes", "after that")
        assert contents(mos) == contents(other)
        assert check(other.records) == []
    after = rows(tmp_path, "SELECT wrapped FROM sealed_keys") + rows(
        tmp_path, "SELECT wrapped FROM sealed_memories"
    )
    assert not set(before) & set(after)
    assert not set(data) & set(rows(tmp_path, "SELECT data FROM sealed_rows"))
    with opened(tmp_path) as mos:
        assert len(contents(mos)) == 22


def test_a_process_with_the_old_master_key_says_so(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path) as mos, opened(tmp_path) as other:
        mos.change_master_key(OTHER)
        with pytest.raises(StoreError, match=MasterKey(OTHER).id):
            other.add("notes", "text")
        assert len(contents(mos)) == 20


_CRASH = """
import os, sys
import memos.records.sealed_database as sealed
from memos import MOS
what, left = sys.argv[1], None
class Dying(sealed.sqlite3.Connection):
    def __getattribute__(self, name):
        global left
        if name in ("execute", "executemany", "commit") and left is not None:
            left -= 1
            if not left:
                os._exit(9)
        return super().__getattribute__(name)
connect = sealed.sqlite3.connect
sealed.sqlite3.connect = lambda *a, **k: connect(*a, factory=Dying, **k)
for path in sys.argv[2:]:
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
        continue
    mos = MOS(path, key=bytes(range(100, 132)))
    left = int(os.path.basename(path))
    if what == "master":
        mos.change_master_key(bytes(range(200, 232)))
    elif what == "memory":
        mos.change_memory_key("notes")
    else:
        mos.reseal()
    os._exit(0)
"""


@pytest.mark.parametrize("what", ["master", "memory", "reseal"])
def test_a_crash_while_keys_change(tmp_path: Path, what: str) -> None:
    """Wherever the process dies, the store opens with the old key or with the new one."""
    filled(tmp_path / "store", 5)
    copies = [tmp_path / str(point) for point in (1, 4, 7, 10, 14, 20, 30, 90)]
    for copy in copies:
        shutil.copytree(tmp_path / "store", copy)
    subprocess.run([sys.executable, "-c", _CRASH, what, *map(str, copies)], check=True)
    found = {opening(copy) for copy in copies}
    assert found == ({"old", "new"} if what == "master" else {"old"})


def opening(path: Path) -> str:
    """Which key opens a store that is whole."""
    for name, key in (("old", KEY), ("new", OTHER)):
        try:
            mos = opened(path, key)
        except StoreError:
            continue
        with mos:
            assert len(contents(mos)) == 5
            assert check(mos.records) == []
        return name
    raise AssertionError(f"{path} opens with neither key")


# Destroying keys.


def test_the_key_of_a_cube_is_destroyed(tmp_path: Path) -> None:
    ids = filled(tmp_path)
    everything = rows(tmp_path, "SELECT tbl, key, owner, gone, data FROM sealed_rows")
    with opened(tmp_path) as mos:
        table = mos.memory("notes").table
        database: Any = mos.records.database
        with database.write() as connection:
            seq = table.ids(connection, [ids[3]])[ids[3]]
            owned = [row for row in everything if row[2] == seq]
            connection.exec_driver_sql("UPDATE cubes SET importance = 0.25 WHERE seq = ?", (seq,))
            database.destroy_keys(connection, [seq])
        assert mos.get(ids[3]).importance == 0.25
    assert owned
    file = (tmp_path / "records.sqlite").read_bytes()
    assert not any(row[4] in file for row in owned)
    # Not even with every key that is left: what was sealed does not open any more.
    from memos.records.keys import KeyRing
    from memos.records.sealed_tables import row_name

    db = sqlite3.connect(tmp_path / "records.sqlite")
    ring = KeyRing(tmp_path, MasterKey(KEY))
    ring.read(db)
    left = db.execute("SELECT owner, memory, wrapped FROM sealed_keys").fetchall()
    db.close()
    for owner, memory, wrapped in left:
        one = ring.open(owner, memory, wrapped)
        for number, key, _, gone, data in owned:
            assert unseal(one, data, row_name(number, key, owner, gone)) is None
    with opened(tmp_path) as mos:
        assert len(contents(mos)) == 20
        assert mos.get(ids[3]).importance == 0.25


def test_a_purge_destroys_the_keys(tmp_path: Path) -> None:
    with opened(tmp_path) as mos:
        people = mos.register_memory(GraphMemory("people", embedder=Embedder()))
        node = {"type": "node", "label": "Person", "properties": {"name": "Ann"}}
        gone = [mos.add("notes", "text", {"n": 1}, id="gone"), people.add(node)]
        mos.update("notes", "gone", "text two")
        mos.add("notes", "stays", id="stays")
    wrapped = dict(rows(tmp_path, "SELECT owner, wrapped FROM sealed_keys"))
    data = rows(tmp_path, "SELECT owner, data FROM sealed_rows WHERE owner > 0")
    with opened(tmp_path) as mos:
        for cube in gone:
            mos.purge(cube.id)
        assert contents(mos) == {"stays"}
        assert check(mos.records) == []
        files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
        stays = mos.memory("notes").table
        with mos.records.database.read() as connection:
            kept = stays.ids(connection, ["stays"])["stays"]
    for owner, blob in data:
        assert (blob in files) == (owner == kept)
    for owner, key in wrapped.items():
        # Those of files that may say the same go, too.
        assert (key in files) == (-1000 < owner <= 0 or owner == kept)
    with opened(tmp_path) as mos:
        assert contents(mos) == {"stays"}
        assert check(mos.records) == []


def test_the_key_of_a_memory_is_destroyed(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path) as mos:
        gone = mos.register_memory(GeneralTextMemory("gone", embedder=None))
        gone.add("text")
        database: Any = mos.records.database
        memory = gone.table.memory
        with database.write() as connection:
            for name in ("cubes", "versions"):
                connection.exec_driver_sql(
                    f"DELETE FROM {name} WHERE seq IN (SELECT seq FROM cubes WHERE memory = ?)",
                    (memory,),
                )
            database.destroy_memory_key(connection, memory)
        assert len(contents(mos)) == 20
    assert rows(
        tmp_path, "SELECT count(*) FROM sealed_keys WHERE memory = ? AND owner > 0", memory
    )[0] == (0,)
    with opened(tmp_path) as mos:
        assert len(contents(mos)) == 20
        assert mos.memory("gone").cubes() == []


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "encryption.md"
    if not page.exists():
        pytest.skip("the documents are tested in the source tree")
    code = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    hits = names["mos"].retrieve("notes", "allergic", filters={"patient": "ann"})
    assert [hit.content for hit in hits] == ["Ann is allergic to penicillin."]
    names["mos"].close()
    assert b"penicillin" not in b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
