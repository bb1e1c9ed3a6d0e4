"""Random histories of a store against a dict."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memos.errors import NotFoundError, QuotaError
from memos.kv import Entry, KVStore, Session

from .store_help import SMALL, P, check_get, disk_bytes, entries_for, keys_of

FRAME = 4096
QUOTA = 9 * FRAME
HOST_QUOTA = 6 * SMALL.payload_bytes(0)
KEY = bytes(32)
NAMES = st.sampled_from(["ada", "bob", "cy"])
# Few tokens, so that chains share prefixes; lengths with and without a tail.
CHAINS = st.lists(st.integers(0, 1), min_size=1, max_size=5).flatmap(
    lambda blocks: st.integers(0, P - 1).map(
        lambda rest: [b for block in blocks for b in [block] * P] + [7] * rest
    )
)


@dataclass
class Kept:
    entry: Entry
    expires_at: float | None


class StoreMachine(RuleBasedStateMachine):
    """``kept`` is what the store must have; under a quota it may have less of it, never more."""

    quota: int | None = None
    on_disk = True
    encryption_key: bytes | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="memos-store-"))
        self.now = 1000.0
        self.kept: dict[bytes, Kept] = {}
        self.sessions: dict[str, Session] = {}
        self.deleted: set[bytes] = set()
        self.open()

    def open(self) -> None:
        options: dict[str, Any] = {"clock": lambda: self.now, "durable": False}
        options["encryption_key"] = self.encryption_key
        if self.quota is not None:
            options |= {"disk_bytes": QUOTA, "host_bytes": HOST_QUOTA}
        self.store = KVStore(self.folder / "s" if self.on_disk else None, **options)
        self.tenant = self.store.tenant("t")

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    # What must be

    def alive(self, key: bytes) -> bool:
        kept = self.kept.get(key)
        return kept is not None and (kept.expires_at is None or kept.expires_at > self.now)

    def current(self) -> dict[str, Session]:
        return {
            name: session
            for name, session in self.sessions.items()
            if session.expires_at is None or session.expires_at > self.now
        }

    def sweep(self) -> None:
        """A change of the store removes what expired."""
        for name in [n for n in self.sessions if n not in self.current()]:
            self.forget_session(name)
        for key in [k for k in self.kept if not self.alive(k)]:
            del self.kept[key]

    def forget_session(self, name: str) -> None:
        keys = set(self.sessions.pop(name).keys)
        used = {k for session in self.sessions.values() for k in session.keys}
        doomed = keys - used
        front = list(doomed)
        while front:
            parent = front.pop()
            for key, kept in self.kept.items():
                if kept.entry.parent == parent and key not in doomed | used:
                    doomed.add(key)
                    front.append(key)
        self.deleted |= doomed
        for key in doomed:
            self.kept.pop(key, None)

    # Rules

    @rule(tokens=CHAINS, ttl_s=st.sampled_from([None, None, 5, 50]))
    def put(self, tokens: list[int], ttl_s: int | None) -> None:
        entries = entries_for(self.tenant, tokens)
        before = self.store.stats()["put_refused"]
        try:
            count = self.tenant.put(entries, SMALL, ttl_s=ttl_s)
        except QuotaError:
            assert self.quota is not None
            self.sweep()
            return
        self.sweep()
        expires = None if ttl_s is None else self.now + ttl_s
        changed = 0
        for entry in entries:
            old = self.kept.get(entry.key)
            if old and (old.expires_at is None or (expires and expires <= old.expires_at)):
                continue
            self.kept[entry.key] = Kept(entry, expires)
            self.deleted.discard(entry.key)
            changed += 1
        if self.quota is None:
            assert count == changed
        elif self.store.stats()["put_refused"] == before:
            assert self.tenant.contains(keys_of(entries)) == len(entries)

    @rule(tokens=CHAINS)
    def get(self, tokens: list[int]) -> None:
        entries = entries_for(self.tenant, tokens)
        want = 0
        while want < len(entries) and self.alive(entries[want].key):
            want += 1
        known = self.tenant.contains(keys_of(entries))
        got = check_get(self.tenant, entries)
        assert got == known
        assert got <= want
        if self.quota is None:
            assert got == want

    @rule(tokens=CHAINS, first=st.integers(0, 5))
    def delete(self, tokens: list[int], first: int) -> None:
        keys = keys_of(entries_for(self.tenant, tokens))[first:]
        self.tenant.delete(keys)
        for key in keys:
            self.kept.pop(key, None)
            self.deleted.add(key)

    @rule(name=NAMES, tokens=CHAINS, ttl_s=st.sampled_from([None, None, 20]), pinned=st.booleans())
    def save(self, name: str, tokens: list[int], ttl_s: int | None, pinned: bool) -> None:
        keys = keys_of(entries_for(self.tenant, tokens))
        expires = None if ttl_s is None else self.now + ttl_s
        session = Session(name, tokens, SMALL.digest, keys, {"n": name}, expires_at=expires)
        session.pinned = pinned
        self.sweep()
        self.sessions[name] = self.tenant.save_session(session)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.sessions:
            self.tenant.pin(name, pinned)
            self.sessions[name].pinned = pinned

    @rule(name=NAMES)
    def delete_session(self, name: str) -> None:
        if name in self.sessions:
            self.tenant.delete_session(name)
            self.forget_session(name)
        else:
            with pytest.raises(NotFoundError):
                self.tenant.delete_session(name)

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep_all(self) -> None:
        self.store.sweep()
        self.sweep()

    @precondition(lambda self: self.on_disk)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @precondition(lambda self: self.on_disk)
    @rule()
    def kill(self) -> None:
        """What the folder holds now is all the next process finds."""
        copy = self.folder / "copy"
        shutil.copytree(self.folder / "s", copy)
        self.store.close()
        shutil.rmtree(self.folder / "s")
        copy.rename(self.folder / "s")
        self.open()

    # Invariants

    @invariant()
    def sessions_are_right(self) -> None:
        want = sorted(self.current().values(), key=lambda s: s.id)
        assert sorted(self.tenant.sessions(), key=lambda s: s.id) == want

    @invariant()
    def quotas_hold(self) -> None:
        if self.quota is not None:
            stats = self.store.stats()
            assert stats["host"]["bytes"] <= HOST_QUOTA
            if self.on_disk:
                assert stats["disk"]["bytes"] <= QUOTA
                assert disk_bytes(self.folder / "s") <= QUOTA

    @invariant()
    def eviction_strands_no_block(self) -> None:
        """A stored block's parent is stored too, unless someone removed the parent by name."""
        for key, kept in self.kept.items():
            parent = kept.entry.parent
            if self.alive(key) and self.tenant.contains([key]) and self.alive(parent):
                assert self.tenant.contains([parent])


class QuotaMachine(StoreMachine):
    quota = QUOTA

    @initialize()
    def pinned(self) -> None:
        """One pinned session stays whole through everything but its own removal."""
        self.base = entries_for(self.tenant, [3] * (2 * P))
        self.tenant.put(self.base, SMALL)
        session = Session("base", [3], SMALL.digest, keys_of(self.base), pinned=True)
        self.sessions["base"] = self.tenant.save_session(session)

    @invariant()
    def pinned_blocks_stay(self) -> None:
        if hasattr(self, "base"):
            assert self.tenant.contains(keys_of(self.base)) == 2


class MemoryMachine(StoreMachine):
    on_disk = False


class MemoryQuotaMachine(QuotaMachine):
    on_disk = False


class EncryptedMachine(StoreMachine):
    encryption_key = KEY


def _as_test(machine: type[RuleBasedStateMachine]) -> Any:
    test = machine.TestCase
    test.settings = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return test


TestStore = _as_test(StoreMachine)
TestQuota = _as_test(QuotaMachine)
TestMemory = _as_test(MemoryMachine)
TestMemoryQuota = _as_test(MemoryQuotaMachine)
TestEncrypted = _as_test(EncryptedMachine)
