"""The block store: sessions, and what their deletion leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memos.errors import ArgumentError, NotFoundError, StoreError
from memos.kv import KVStore, Session

from .store_help import SMALL, P, check_get, entries_for, keys_of, segments
from .store_kinds import FRAME, KEY, Clock, kind_fixture, open_store  # noqa: F401


def test_sessions(kind: str, tmp_path: Path) -> None:
    clock = Clock()
    with open_store(kind, tmp_path, clock=clock) as store:
        tenant = store.tenant("ada")
        assert tenant.sessions() == []
        assert tenant.session("a") is None
        saved = tenant.save_session(Session("a", [1, 2, 3], SMALL.digest, [], {"user": 1}))
        assert saved.created_at == saved.updated_at == 1000.0
        clock.now = 1001.0
        tenant.save_session(Session("b", [4], SMALL.digest, [b"k" * 32], {"user": 2, "x": None}))
        assert tenant.session("a") == saved
        assert [s.id for s in tenant.sessions()] == ["b", "a"]
        assert [s.id for s in tenant.sessions(user=1)] == ["a"]
        assert [s.id for s in tenant.sessions(x=None)] == ["b"]
        assert tenant.sessions(user=3) == []
        clock.now = 1002.0
        saved.token_ids.append(9)
        again = tenant.save_session(saved)
        assert again.created_at == 1000.0
        assert [s.id for s in tenant.sessions()] == ["a", "b"]
        assert tenant.session("a").token_ids == [1, 2, 3, 9]  # type: ignore[union-attr]
        assert store.tenant("bob").sessions() == []
        tenant.delete_session("a")
        assert tenant.session("a") is None
        with pytest.raises(NotFoundError, match="not there"):
            tenant.delete_session("a")
        for bad in (
            Session("", [], SMALL.digest, []),
            Session("x", [-1 << 70], SMALL.digest, []),
            Session("x", [], b"short", []),
            Session("x", [], SMALL.digest, [b"short"]),
            Session("x", [], SMALL.digest, [], {"set": {1}}),
        ):
            with pytest.raises(ArgumentError):
                tenant.save_session(bad)


def test_sessions_expire_with_their_blocks(kind: str, tmp_path: Path) -> None:
    clock = Clock()
    with open_store(kind, tmp_path, clock=clock) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(3 * P))
        tenant.put(entries, SMALL)
        keys = keys_of(entries)
        tenant.save_session(Session("a", [1], SMALL.digest, keys[:2], expires_at=1010.0))
        tenant.save_session(Session("b", [1], SMALL.digest, keys[:1]))
        clock.now = 1010.0
        assert tenant.session("a") is None
        assert [s.id for s in tenant.sessions()] == ["b"]
        assert check_get(tenant, entries) == 3, "still there: nothing has written"
        tenant.put(entries_for(tenant, range(500, 500 + P)), SMALL)
        assert check_get(tenant, entries) == 1
        with pytest.raises(NotFoundError):
            tenant.delete_session("a")


def test_deleting_a_session_leaves_shared_blocks(kind: str, tmp_path: Path) -> None:
    with open_store(kind, tmp_path) as store:
        tenant = store.tenant()
        one = entries_for(tenant, [*range(2 * P), *range(50, 50 + P + 1)])
        two = entries_for(tenant, [*range(2 * P), *range(80, 80 + P + 1)])
        orphan = entries_for(tenant, [*range(2 * P), *range(50, 50 + P), *range(9, 9 + P)])
        for chain in (one, two, orphan):
            tenant.put(chain, SMALL)
        tenant.save_session(Session("one", [1], SMALL.digest, keys_of(one)))
        tenant.save_session(Session("two", [1], SMALL.digest, keys_of(two)))
        assert tenant.delete_session("one") == 3, "its own block, its tail, and what follows them"
        assert check_get(tenant, one) == 2
        assert check_get(tenant, two) == 4
        assert tenant.contains(keys_of(orphan[3:])) == 0
        assert tenant.delete_session("two") == 4
        assert check_get(tenant, two) == 0


def grep(path: Path, needles: list[bytes]) -> list[Path]:
    found = []
    for file in path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            found += [file for needle in needles if needle in data]
    return found


@pytest.mark.parametrize("encryption_key", [None, KEY], ids=["plain", "encrypted"])
def test_deleted_bytes_are_gone(tmp_path: Path, encryption_key: bytes | None) -> None:
    path = tmp_path / "s"
    store = KVStore(path, encryption_key=encryption_key)
    ada, bob = store.tenant("ada"), store.tenant("bob")
    mine, his = entries_for(ada, range(5 * P + 1)), entries_for(bob, range(5 * P))
    token_ids = list(range(70_000, 70_040))
    tokens = b"".join(token.to_bytes(8, "little") for token in token_ids)
    needles = [bytes(entry.payload) for entry in mine] + [tokens, b"a secret note"]
    ada.put(mine, SMALL)
    bob.put(his, SMALL)
    keys = keys_of(mine)
    ada.save_session(Session("s", token_ids, SMALL.digest, keys, {"note": "a secret note"}))
    assert len(grep(path, needles)) >= len(needles) * (encryption_key is None)
    # A damaged frame of the session, whose key is not known any more, goes too.
    if encryption_key is None:
        (segment,) = (p for p in segments(path) if bytes(mine[0].payload) in p.read_bytes())
        with open(segment, "r+b") as file:
            file.seek(2 * FRAME)
            file.write(b"damage!!")
        store.close()
        store = KVStore(path)
        ada, bob = store.tenant("ada"), store.tenant("bob")
        assert check_get(ada, mine) == 2
    ada.delete_session("s")
    assert grep(path, needles) == []
    bob_folder = next(p.parent for p in segments(path))
    store.delete_tenant("bob")
    assert not bob_folder.exists()
    assert grep(path, [bytes(entry.payload) for entry in his]) == []
    assert check_get(bob, his) == 0
    with pytest.raises(NotFoundError, match="deleted"):
        bob.put(his, SMALL)
    with pytest.raises(NotFoundError):
        store.delete_tenant("bob")
    again = store.tenant("bob")
    assert keys_of(entries_for(again, range(5 * P))) != keys_of(his), "a new secret"
    store.close()


def test_damaged_session_rows_are_absent(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "s"
    with KVStore(path, durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(2 * P))
        tenant.put(entries, SMALL)
        for name in ("a", "b", "c"):
            tenant.save_session(Session(name, [1, 2], SMALL.digest, keys_of(entries), {"n": name}))
    database = next(path.rglob("sessions.db"))
    db = sqlite3.connect(database)
    rows = db.execute("SELECT id, meta, body FROM sessions").fetchall()
    db.execute("UPDATE sessions SET body = ? WHERE id = ?", (rows[1][2], rows[0][0]))
    db.execute("UPDATE sessions SET meta = ? WHERE id = ?", (bytes(200), rows[1][0]))
    db.commit()
    db.close()
    with KVStore(path, durable=False) as store:
        tenant = store.tenant()
        assert len(tenant.sessions()) == 1
        assert sum(tenant.session(name) is not None for name in "abc") == 1
        assert store.verify().bad == {"session": 2}
        for name in "abc":
            tenant.delete_session(name)
        assert check_get(tenant, entries) == 0
        assert store.verify().is_clean
    database.write_bytes(b"no database" * 1000)
    with KVStore(path, durable=False) as store:
        tenant = store.tenant()
        with pytest.raises(StoreError, match=r"sessions\.db"):
            tenant.sessions()


def test_many_tenants_keep_few_files_open(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", durable=False) as store:
        for round in range(2):
            for i in range(70):
                tenant = store.tenant(f"user {i}")
                assert len(tenant.sessions()) == round
                tenant.save_session(Session("s", [i], SMALL.digest, []))
        assert len(os.listdir("/proc/self/fd")) < 64 * 3 + 60
        assert store.stats()["tenants"] == 70
        assert all(store.tenant(f"user {i}").session("s") for i in range(70))


def test_a_damaged_session_table_does_not_stop_others(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with KVStore(path, durable=False) as store:
        tenant = store.tenant("ada")
        tenant.put(entries_for(tenant, range(3 * P)), SMALL)
        tenant.save_session(Session("s", [1], SMALL.digest, []))
    next(path.rglob("sessions.db")).write_bytes(b"no database" * 1000)
    with KVStore(path, disk_bytes=4 * FRAME, durable=False) as store:
        assert check_get(store.tenant("ada"), entries_for(store.tenant("ada"), range(3 * P))) == 3
        bob = store.tenant("bob")
        assert bob.put(entries_for(bob, range(4 * P)), SMALL) == 4
        assert bob.sessions() == []
        assert store.verify().bad == {"session": 1}
        with pytest.raises(StoreError, match="not a database"):
            store.tenant("ada").save_session(Session("t", [1], SMALL.digest, []))
