"""What the tests of the block store share: a small model, entries with known bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memos.kv import Entry, KVIdentity, KVStore, Tenant

if TYPE_CHECKING:
    import pytest

P = 4
# One page per frame: small, so that thousands of faults take seconds.
SMALL = KVIdentity("ab" * 32, 1, 1, 8, 8, "bfloat16", "int8-g32", block_tokens=P, sink_tokens=1)


def payload_for(key: bytes, num_bytes: int) -> bytes:
    """The bytes that a block of this key has in every test: right or wrong is easy to see."""
    return hashlib.shake_128(key).digest(num_bytes)


def entries_for(
    tenant: Tenant, token_ids: Sequence[int], identity: KVIdentity = SMALL
) -> list[Entry]:
    """Full blocks and the tail of these tokens."""
    P = identity.block_tokens
    tokens = list(token_ids)
    entries, parent = [], bytes(32)
    for i, key in enumerate(tenant.block_keys(tokens, identity)):
        payload = payload_for(key, identity.payload_bytes(i))
        entries.append(Entry(key, parent, tokens[i * P : (i + 1) * P], i, payload))
        parent = key
    rest = tokens[len(entries) * P :]
    if rest:
        key = tenant.tail_key(rest, parent, identity)
        payload = payload_for(key, identity.tail_bytes(len(rest)))
        entries.append(Entry(key, parent, rest, len(entries), payload, tail=True))
    return entries


def keys_of(entries: Sequence[Entry]) -> list[bytes]:
    return [entry.key for entry in entries]


def check_get(tenant: Tenant, entries: Sequence[Entry], identity: KVIdentity = SMALL) -> int:
    """Ask for the entries; whatever comes back must be right. Returns how many came back."""
    tokens = [token for entry in entries for token in entry.token_ids]
    got = tenant.get(keys_of(entries), identity, tokens)
    for view, entry in zip(got, entries, strict=False):
        assert bytes(view) == bytes(entry.payload), f"wrong bytes for {entry.key.hex()}"
    return len(got)


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("tenants/*/segments/*.kvs"))


def disk_bytes(path: Path) -> int:
    """What the frames take on disk, unfinished ones included."""
    files = path.glob("tenants/*/segments/*")
    return sum(512 * file.stat().st_blocks for file in files)


def misses(store: KVStore) -> int:
    return sum(store.stats()["misses"].values())


def report(request: pytest.FixtureRequest, line: str) -> None:
    """Show a figure in the output of the run."""
    plugins = request.config.pluginmanager
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        plugins.get_plugin("terminalreporter").write_line(line)
