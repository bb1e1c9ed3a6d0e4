"""The block store: round trips, quotas, time to live, pins, sessions, tenants."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from pathlib import Path

import pytest

from memos.errors import ArgumentError, BackendError, NotFoundError, QuotaError, StoreError
from memos.kv import Entry, KVIdentity, KVStore, Session

from .store_help import SMALL, P, check_get, disk_bytes, entries_for, keys_of, segments

KEY = bytes(range(32))
REAL = KVIdentity("cd" * 32, 3, 2, 64, 64, "bfloat16", "int4")
FRAME = 4096


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["disk", "encrypted", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_store(kind: str, path: Path, **options: object) -> KVStore:
    options.setdefault("durable", False)
    if kind == "memory":
        options.pop("disk_bytes", None)
        return KVStore(None, **options)  # type: ignore[arg-type]
    key = KEY if kind == "encrypted" else None
    return KVStore(path / "store", encryption_key=key, **options)  # type: ignore[arg-type]


def test_no_torch() -> None:
    code = "import memos.kv, sys; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize("identity", [SMALL, REAL], ids=["small", "real"])
def test_round_trip(kind: str, tmp_path: Path, identity: KVIdentity) -> None:
    with open_store(kind, tmp_path) as store:
        tenant = store.tenant("ada")
        entries = entries_for(tenant, range(3 * identity.block_tokens + 2), identity)
        assert [entry.tail for entry in entries] == [False, False, False, True]
        assert tenant.contains(keys_of(entries)) == 0
        assert tenant.put(entries, identity) == 4
        assert tenant.put(entries, identity) == 0
        assert tenant.contains(keys_of(entries)) == 4
        assert check_get(tenant, entries, identity) == 4
        view = tenant.get(keys_of(entries), identity)[0]
        assert view.readonly
        assert view.nbytes == identity.payload_bytes(0)
        assert tenant.delete(keys_of(entries[3:])) == 1
        assert check_get(tenant, entries, identity) == 3
        stats = store.stats()
        assert stats["misses"] == {"absent": 1}
        assert stats["put_blocks"] == 4
    assert bytes(view) == entries[0].payload, "a view outlives the store"


@pytest.mark.parametrize("encryption_key", [None, KEY], ids=["plain", "encrypted"])
def test_survives_a_restart(tmp_path: Path, encryption_key: bytes | None) -> None:
    for round in range(3):
        with KVStore(tmp_path / "s", encryption_key=encryption_key) as store:
            tenant = store.tenant("ada")
            entries = entries_for(tenant, range(4 * P + 3))
            assert check_get(tenant, entries) == (5 if round else 0)
            assert tenant.put(entries, SMALL) == (0 if round else 5)
            assert store.verify().is_clean
    for entry in entries:
        whole = b"".join(path.read_bytes() for path in segments(tmp_path / "s"))
        assert (bytes(entry.payload) in whole) == (encryption_key is None)


def test_the_longest_prefix_and_no_more(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(6 * P))
        tenant.put(entries[:2] + entries[3:], SMALL)
        assert tenant.contains(keys_of(entries)) == 2
        assert check_get(tenant, entries) == 2
        assert check_get(tenant, entries[3:]) == 3
        assert tenant.get([], SMALL) == []


def test_other_identity_tokens_tenant_are_misses(kind: str, tmp_path: Path) -> None:
    with open_store(kind, tmp_path) as store:
        tenant, other = store.tenant("ada"), store.tenant("bob")
        entries = entries_for(tenant, range(2 * P))
        keys = keys_of(entries)
        tenant.put(entries, SMALL)
        for change in ({"revision": "2"}, {"codec": "int8-g64"}, {"model": "ff"}, {"adapter": "x"}):
            changed = dataclasses.replace(SMALL, **change)
            assert changed.digest != SMALL.digest
            assert tenant.block_keys(range(2 * P), changed) != keys
            assert tenant.get(keys, changed) == []
        assert tenant.get(keys, SMALL, [9] * 8) == []
        assert tenant.get(keys, SMALL, range(P)) != []
        assert len(tenant.get(keys, SMALL, range(P))) == 1, "only as far as the tokens go"
        assert other.block_keys(range(2 * P), SMALL) != keys
        assert other.get(keys, SMALL) == []
        assert other.contains(keys) == 0
        assert other.delete(keys) == 0
        assert store.stats()["misses"] == {"identity": 4, "tokens": 3, "tenant": 1}
        assert check_get(tenant, entries) == 2, "a wrong question takes nothing away"


def test_entries_are_checked(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", durable=False) as store:
        tenant = store.tenant()
        first, second, tail = entries_for(tenant, range(2 * P + 1))
        wrong = [
            Entry(second.key, first.parent, first.token_ids, 0, first.payload),
            Entry(first.key, first.parent, [7] * P, 0, first.payload),
            Entry(first.key, first.parent, first.token_ids, 1, first.payload),
            Entry(first.key, first.parent, first.token_ids, 0, bytes(first.payload)[:-1]),
            Entry(first.key[:9], first.parent, first.token_ids, 0, first.payload),
            Entry(first.key, first.parent, list(first.token_ids)[:-1], 0, first.payload),
            Entry(tail.key, tail.parent, tail.token_ids, 2, tail.payload),
            Entry(first.key, first.parent, first.token_ids, 0, first.payload, tail=True),
        ]
        for entry in wrong:
            with pytest.raises(ArgumentError, match="wanted"):
                tenant.put([second, entry], SMALL)
        assert store.stats()["put_blocks"] == 0
        with pytest.raises(ArgumentError, match="tail"):
            tenant.tail_key(range(P), first.key, SMALL)
        with pytest.raises(ArgumentError):
            tenant.tail_key([], first.key, SMALL)


def test_identity_is_checked() -> None:
    for change in (
        {"num_layers": 0},
        {"head_dim_k": 2.5},
        {"dtype": "int8"},
        {"codec": "int5"},
        {"sink_tokens": P + 1},
        {"model": None},
        {"head_dim_v": 12},
    ):
        with pytest.raises(ArgumentError):
            dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    assert KVIdentity("m", 1, 1, 8, 8, "float32", "int4").codec == "k:int4-g64-rot,v:int4-g64"
    raw = KVIdentity("m", 2, 3, 8, 16, "float32", "raw")
    assert raw.sink_bytes() == 0
    assert raw.payload_bytes(0) == raw.tail_bytes(64) == 2 * 3 * 64 * 24 * 4


def test_disk_quota_is_hard_and_leaves_go_first(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with KVStore(path, disk_bytes=10 * FRAME, durable=False) as store:
        tenant = store.tenant()
        chains = [entries_for(tenant, range(1000 * c, 1000 * c + 4 * P)) for c in range(4)]
        for chain in chains:
            assert tenant.put(chain, SMALL) == 4
            assert disk_bytes(path) <= 10 * FRAME
            assert store.stats()["disk"]["bytes"] <= 10 * FRAME
        held = [tenant.contains(keys_of(chain)) for chain in chains]
        assert held == [0, 0, 4, 4] or held == [0, 2, 4, 4]
        assert sum(held) * FRAME <= 10 * FRAME
        check_get(tenant, chains[2])
        tenant.put(entries_for(tenant, range(9000, 9000 + 6 * P)), SMALL)
        assert tenant.contains(keys_of(chains[2])) == 4, "it was used after the other one"
        assert tenant.contains(keys_of(chains[3])) == 0
        assert store.stats()["disk"]["evictions"] > 0


def test_a_put_never_evicts_what_it_follows(kind: str, tmp_path: Path) -> None:
    size = SMALL.payload_bytes(1)
    with open_store(kind, tmp_path, disk_bytes=4 * FRAME, host_bytes=5 * size) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(8 * P))
        assert tenant.put(entries[:2], SMALL) == 2
        stored = tenant.put(entries[2:], SMALL)
        assert 0 < stored < 6
        assert tenant.contains(keys_of(entries)) == 2 + stored
        assert check_get(tenant, entries) == 2 + stored
        assert store.stats()["put_refused"] == 6 - stored
        with pytest.raises(QuotaError, match="room for a block"):
            tenant.put(entries, SMALL)
        assert check_get(tenant, entries) == 2 + stored, "nothing was lost"


def test_quota_smaller_than_one_block(kind: str, tmp_path: Path) -> None:
    with open_store(kind, tmp_path, disk_bytes=FRAME - 1, host_bytes=16) as store:
        tenant = store.tenant()
        with pytest.raises(QuotaError, match="at most the quota"):
            tenant.put(entries_for(tenant, range(P)), SMALL)


def test_host_quota_is_hard(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", host_bytes=5000, durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(60 * P))
        tenant.put(entries, SMALL)
        for start in range(0, 60, 7):
            assert check_get(tenant, entries[start : start + 7]) == len(entries[start : start + 7])
            assert store.stats()["host"]["bytes"] <= 5000
        assert store.stats()["host"]["evictions"] > 0
        assert store.stats()["host"]["hits"] < store.stats()["hits"]


def test_no_host_tier(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", host_bytes=0, durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(5 * P))
        tenant.put(entries, SMALL)
        assert check_get(tenant, entries) == 5
        assert store.stats()["host"]["bytes"] == 0
        assert store.stats()["disk"]["hits"] == 5


def test_filesystem_without_holes(tmp_path: Path) -> None:
    """Whole segments go instead; the quota still holds, and deleted bytes are overwritten."""
    path = tmp_path / "s"
    with KVStore(path, disk_bytes=12 * FRAME, durable=False) as store:
        disk = store._state.disk
        assert disk is not None
        disk.can_punch = False
        tenant = store.tenant()
        chains = [entries_for(tenant, range(1000 * c, 1000 * c + 3 * P)) for c in range(9)]
        for chain in chains:
            assert tenant.put(chain, SMALL) == 3
            assert disk_bytes(path) <= 12 * FRAME
        assert tenant.contains(keys_of(chains[-1])) == 3
        tenant.delete(keys_of(chains[-1])[1:])
        whole = b"".join(file.read_bytes() for file in segments(path))
        assert bytes(chains[-1][0].payload) in whole
        assert bytes(chains[-1][1].payload) not in whole
        assert check_get(tenant, chains[-1]) == 1
        locked = entries_for(tenant, range(8000, 8000 + 40 * P))
        assert 0 < tenant.put(locked, SMALL) <= 12
        with pytest.raises(QuotaError, match="room for a block"):
            tenant.put(locked, SMALL)
    with KVStore(path, disk_bytes=12 * FRAME, durable=False) as store:
        assert check_get(store.tenant(), locked) > 0
        assert store.verify().is_clean


def test_recency_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with KVStore(path, disk_bytes=6 * FRAME, durable=False) as store:
        tenant = store.tenant()
        old, new = entries_for(tenant, range(P)), entries_for(tenant, range(900, 900 + P))
        tenant.put(old, SMALL)
        tenant.put(new, SMALL)
        check_get(tenant, old)
    for damage in (False, True):
        if damage:
            data = bytearray((path / "recency").read_bytes())
            data[20] ^= 1
            (path / "recency").write_bytes(data)
        with KVStore(path, disk_bytes=6 * FRAME, durable=False) as store:
            disk = store._state.disk
            assert disk is not None
            order = disk.policy.order()
            assert order == keys_of(old + new if damage else new + old)


def test_a_smaller_quota_at_the_next_opening(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with KVStore(path, durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(20 * P))
        tenant.put(entries, SMALL)
    with KVStore(path, disk_bytes=7 * FRAME, durable=False) as store:
        assert disk_bytes(path) <= 7 * FRAME
        assert check_get(store.tenant(), entries) == 7


def test_time_to_live(kind: str, tmp_path: Path) -> None:
    clock = Clock()
    with open_store(kind, tmp_path, clock=clock) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(3 * P))
        assert tenant.put(entries, SMALL, ttl_s=10) == 3
        assert tenant.put(entries[:1], SMALL, ttl_s=5) == 0, "it lives longer already"
        assert tenant.put(entries[:1], SMALL, ttl_s=20) == 1
        assert tenant.put(entries[2:], SMALL) == 1
        clock.now += 9.999
        assert check_get(tenant, entries) == 3
        clock.now += 0.001
        assert check_get(tenant, entries) == 1
        assert tenant.contains(keys_of(entries)) == 1
        assert store.stats()["misses"] == {"expired": 1}
        assert store.sweep() == 1
        assert check_get(tenant, entries[2:]) == 1
        clock.now += 10
        assert tenant.put(entries[:2], SMALL) == 2
        assert check_get(tenant, entries) == 3


def test_pinned_blocks_stay(kind: str, tmp_path: Path) -> None:
    size = SMALL.payload_bytes(1)
    options = {"disk_bytes": 6 * FRAME, "host_bytes": 7 * size}
    with open_store(kind, tmp_path, **options) as store:
        tenant = store.tenant()
        kept = entries_for(tenant, range(4 * P))
        tenant.put(kept, SMALL)
        tenant.save_session(Session("kept", list(range(4 * P)), SMALL.digest, keys_of(kept)))
        tenant.pin("kept")
        assert tenant.session("kept").pinned  # type: ignore[union-attr]
        for c in range(1, 9):
            chain = entries_for(tenant, range(1000 * c, 1000 * c + 5 * P))
            assert tenant.put(chain, SMALL) >= 2
            assert check_get(tenant, kept) == 4
        more = entries_for(tenant, range(7 * P))
        tenant.put(more, SMALL)
        tenant.save_session(Session("kept", list(range(7 * P)), SMALL.digest, keys_of(more)))
        tenant.pin("kept")
        held = tenant.contains(keys_of(more))
        assert held >= 6
        with pytest.raises(QuotaError, match="pinned"):
            tenant.put(entries_for(tenant, range(70_000, 70_000 + P)), SMALL)
        tenant.pin("kept", False)
        assert tenant.put(entries_for(tenant, range(70_000, 70_000 + P)), SMALL) == 1
        assert tenant.contains(keys_of(more)) < held
        with pytest.raises(NotFoundError):
            tenant.pin("nobody")


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


def test_opening(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="a store wanted"):
        KVStore(tmp_path / "none", mode="r")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="empty folder wanted"):
        KVStore(tmp_path / "home")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["letter.txt"]
    for options in ({"mode": "w"}, {"host_bytes": -1}, {"encryption_key": b"x"}, {"policy": "?"}):
        with pytest.raises(ArgumentError):
            KVStore(tmp_path / "s", **options)  # type: ignore[arg-type]
    KVStore(tmp_path / "s").close()
    with pytest.raises(StoreError, match="not encrypted"):
        KVStore(tmp_path / "s", encryption_key=KEY)
    KVStore(tmp_path / "e", encryption_key=KEY).close()
    with pytest.raises(StoreError, match="is encrypted"):
        KVStore(tmp_path / "e")
    with pytest.raises(StoreError, match="another encryption_key"):
        KVStore(tmp_path / "e", encryption_key=bytes(32))
    (tmp_path / "s" / "FORMAT").write_text('{"format": "memos-kv", "version": 2}')
    for mode in ("r", "rw"):
        with pytest.raises(StoreError, match="version 1 wanted"):
            KVStore(tmp_path / "s", mode=mode)
    store = KVStore(None)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.tenant()
    with pytest.raises(ArgumentError), KVStore(None) as store:
        store.tenant("")


def test_damaged_tenant_key(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with KVStore(path, durable=False) as store:
        for name in ("ada", "bob"):
            tenant = store.tenant(name)
            tenant.put(entries_for(tenant, range(3 * P)), SMALL)
        key = path / "tenants" / tenant.id.hex() / "key"
    data = bytearray(key.read_bytes())
    data[3] ^= 4
    key.write_bytes(data)
    with KVStore(path, durable=False) as store:
        with pytest.raises(StoreError, match="key is damaged"):
            store.tenant("bob")
        assert check_get(store.tenant("ada"), entries_for(store.tenant("ada"), range(3 * P))) == 3
        assert store.verify().bad == {"key file": 1}
        assert store.stats()["disk"]["bytes"] == 6 * FRAME
        store.delete_tenant("bob")
        assert store.stats()["disk"]["bytes"] == 3 * FRAME
        assert store.tenant("bob").sessions() == []


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


def test_threads(tmp_path: Path) -> None:
    path = tmp_path / "s"
    failed: list[BaseException] = []
    with KVStore(path, disk_bytes=40 * FRAME, host_bytes=9000, durable=False) as store:
        tenant = store.tenant()
        chains = [entries_for(tenant, range(1000 * c, 1000 * c + 5 * P)) for c in range(16)]

        def work(seed: int) -> None:
            try:
                for step in range(60):
                    chain = chains[(seed * 7 + step * 5) % len(chains)]
                    if step % 3 == 0:
                        tenant.put(chain, SMALL)
                    elif step % 17 == 1:
                        tenant.delete(keys_of(chain[2:]))
                    check_get(tenant, chain)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert disk_bytes(path) <= 40 * FRAME
        assert store.stats()["host"]["bytes"] <= 9000
        assert store.verify().is_clean
        bad = {"absent", "gone", "header", "key"}
        assert set(store.stats()["misses"]) <= bad, "a frame may vanish between look-up and read"


@pytest.mark.parametrize("encryption_key", [None, KEY], ids=["plain", "encrypted"])
def test_large_blocks_on_threads(
    tmp_path: Path, encryption_key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path with huge pages and several threads, with one bad frame among good ones."""
    monkeypatch.setenv("MEMOS_THREADS", "3")
    identity = KVIdentity("m", 8, 4, 64, 64, "bfloat16", "int8-g64")
    with KVStore(tmp_path / "s", encryption_key=encryption_key, durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(40 * 64 + 5), identity)
        assert tenant.put(entries, identity) == 41
        offset = 30 * (store.stats()["disk"]["bytes"] // 41)
    for host_bytes in (1 << 30, 12 << 20, 1 << 20, 0):
        with KVStore(
            tmp_path / "s", mode="r", host_bytes=host_bytes, encryption_key=encryption_key
        ) as store:
            tenant = store.tenant()
            for _ in range(3):
                assert check_get(tenant, entries, identity) == 41
                assert store.stats()["host"]["bytes"] <= host_bytes
            assert (store.stats()["host"]["hits"] > 0) == (host_bytes > 0)
    (path,) = segments(tmp_path / "s")
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    with KVStore(tmp_path / "s", encryption_key=encryption_key, durable=False) as store:
        tenant = store.tenant()
        assert 25 <= check_get(tenant, entries, identity) < 35
        assert store.verify().bad.total() == 1
        assert sum(store.stats()["misses"].values()) == 1
        assert tenant.put(entries, identity) == 1
        assert check_get(tenant, entries, identity) == 41


def test_the_same_block_twice_in_one_put(kind: str, tmp_path: Path) -> None:
    with open_store(kind, tmp_path) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(2 * P))
        assert tenant.put([*entries, *entries], SMALL) == 2
        assert tenant.put([], SMALL) == 0
        assert check_get(tenant, entries) == 2


def test_payloads_are_any_buffer_and_are_copied(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(3 * P))
        buffers = [bytearray(entry.payload) for entry in entries]
        views = [memoryview(buffer) for buffer in buffers]
        wide = memoryview(bytes(entries[1].payload)).cast("B", [7, 16])
        given = [
            dataclasses.replace(entries[0], payload=buffers[0]),
            dataclasses.replace(entries[1], payload=wide),
            dataclasses.replace(entries[2], payload=views[2]),
        ]
        assert tenant.put(given, SMALL) == 3
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
        assert check_get(tenant, entries) == 3
        strided = memoryview(bytes(2 * len(buffers[1])))[::2]
        with pytest.raises(ArgumentError, match="contiguous"):
            tenant.put([dataclasses.replace(entries[1], payload=strided)], SMALL)


def test_encryption_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(BackendError, match=r"memos-native\[crypto\]"):
        KVStore(tmp_path / "s", encryption_key=KEY)
    KVStore(tmp_path / "s").close()


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


def test_verify_reports_progress_and_places(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", durable=False) as store:
        tenant = store.tenant()
        entries = entries_for(tenant, range(5 * P))
        tenant.put(entries, SMALL)
        (path,) = segments(tmp_path / "s")
        with open(path, "r+b") as file:
            file.seek(2 * FRAME + 600)
            file.write(b"!")
            file.seek(4 * FRAME)
            file.write(b"!")
        seen: list[tuple[int, int]] = []
        found = store.verify(lambda done, total: seen.append((done, total)))
        assert found.ok == 3
        assert found.bad == {"payload": 1, "header": 1}
        assert found.places == [(str(path), 2 * FRAME, "payload"), (str(path), 4 * FRAME, "header")]
        assert seen == sorted(seen)
        assert seen[-1] == (5 * FRAME, 5 * FRAME)


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


def test_memory_holds_nothing_that_left_the_disk(tmp_path: Path) -> None:
    with KVStore(tmp_path / "s", disk_bytes=5 * FRAME, durable=False) as store:
        tenant = store.tenant()
        for c in range(6):
            tenant.put(entries_for(tenant, range(1000 * c, 1000 * c + 3 * P)), SMALL)
            stats = store.stats()
            assert stats["host"]["blocks"] == stats["disk"]["blocks"]


def test_ttl_is_checked(tmp_path: Path) -> None:
    with KVStore(None) as store:
        tenant = store.tenant()
        for ttl_s in (0, -1, float("nan"), float("inf"), 1e15):
            with pytest.raises(ArgumentError, match="ttl_s"):
                tenant.put(entries_for(tenant, range(P)), SMALL, ttl_s=ttl_s)
