"""KV folders and memories whose key a master key keeps; what an encrypted MOS refuses."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from memos import MOS, GraphMemory, KVCacheMemory, MasterKey, ParametricMemory
from memos.errors import ArgumentError, StoreError
from memos.kv import KVStore, Session

from .encryption_help import KEY, MARK, readable
from .store_help import SMALL, check_get, entries_for

OTHER = bytes(range(200, 232))
CONFIG = {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 1}


def filled(path: Path, key: MasterKey) -> None:
    with KVStore(path, encryption_key=key) as store:
        tenant = store.tenant(MARK)
        entries = entries_for(tenant, range(10))
        tenant.put(entries, SMALL)
        tenant.save_session(Session(MARK, list(range(10)), bytes(32), [e.key for e in entries]))


def test_a_master_key_opens_a_folder(tmp_path: Path) -> None:
    filled(tmp_path, MasterKey(KEY))
    assert readable(tmp_path) == []
    for key, problem in (
        (MasterKey(OTHER), MasterKey(KEY).id),
        (KEY, "another encryption_key"),
        (None, "is encrypted"),
    ):
        with pytest.raises(StoreError, match=problem):
            KVStore(tmp_path, encryption_key=key)
    with KVStore(tmp_path, encryption_key=MasterKey(KEY), mode="r") as store:
        tenant = store.tenant(MARK)
        entries = entries_for(tenant, range(10))
        assert check_get(tenant, entries) == len(entries)


def test_another_master_key_opens_it_from_then_on(tmp_path: Path) -> None:
    filled(tmp_path, MasterKey(KEY))
    with KVStore(tmp_path, encryption_key=MasterKey(KEY)) as store:
        store.change_master_key(MasterKey(OTHER))
    with pytest.raises(StoreError, match=MasterKey(OTHER).id):
        KVStore(tmp_path, encryption_key=MasterKey(KEY))
    with KVStore(tmp_path, encryption_key=MasterKey(OTHER)) as store:
        found = store.tenant(MARK).session(MARK)
        assert found is not None
        assert found.token_ids == list(range(10))


def test_a_damaged_key_is_an_error(tmp_path: Path) -> None:
    filled(tmp_path, MasterKey(KEY))
    path = tmp_path / "FORMAT"
    whole = json.loads(path.read_text())
    for text in ("", "zz", whole["wrapped_key"][:-2], secrets.token_hex(60)):
        path.write_text(json.dumps({**whole, "wrapped_key": text}))
        with pytest.raises(StoreError, match="key"):
            KVStore(tmp_path, encryption_key=MasterKey(KEY))


def test_a_key_of_bytes_is_kept_by_nobody(tmp_path: Path) -> None:
    with KVStore(tmp_path, encryption_key=KEY) as store:
        store.tenant()
        with pytest.raises(ArgumentError, match="MasterKey"):
            store.change_master_key(MasterKey(OTHER))
    with pytest.raises(StoreError, match="not kept under a master key"):
        KVStore(tmp_path, encryption_key=MasterKey(OTHER))


def test_an_encrypted_mos_takes_nothing_that_can_be_read(tmp_path: Path) -> None:
    with MOS(tmp_path / "store", key=KEY) as mos:
        plain = KVCacheMemory("kv", CONFIG, path=tmp_path / "kv", revision="1")
        with pytest.raises(ArgumentError, match="encryption_key"):
            mos.register_memory(plain)
        plain.close()
        master = MasterKey(KEY)
        sealed = KVCacheMemory(
            "kv", CONFIG, path=tmp_path / "sealed", revision="1", encryption_key=master
        )
        mos.register_memory(sealed)
        mos.register_memory(KVCacheMemory("here", CONFIG))
        sealed.close()
        with pytest.raises(ArgumentError, match="encrypted store"):
            mos.register_memory(ParametricMemory("skills"))
        pytest.importorskip("neo4j")
        graph = GraphMemory("graph", storage_backend="neo4j", connection_params={"uri": "bolt://x"})
        with pytest.raises(ArgumentError, match="sqlite"):
            mos.register_memory(graph)
