"""The block store: round trips, checks, opening, threads, damage that verify finds."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from pathlib import Path

import pytest

from memos.errors import ArgumentError, BackendError, StoreError
from memos.kv import Entry, KVIdentity, KVStore

from .store_help import SMALL, P, check_get, disk_bytes, entries_for, keys_of, segments
from .store_kinds import FRAME, KEY, kind_fixture, open_store  # noqa: F401

REAL = KVIdentity("cd" * 32, 3, 2, 64, 64, "bfloat16", "int4")


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
