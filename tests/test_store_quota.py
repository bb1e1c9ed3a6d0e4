"""The block store: quotas of disk and memory, time to live, pins."""

from __future__ import annotations

from pathlib import Path

import pytest

from memos.errors import ArgumentError, NotFoundError, QuotaError
from memos.kv import KVStore, Session

from .store_help import SMALL, P, check_get, disk_bytes, entries_for, keys_of, segments
from .store_kinds import FRAME, Clock, kind_fixture, open_store  # noqa: F401


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
