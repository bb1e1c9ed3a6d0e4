"""The block store: packed KV on disk and in memory, verified, for many tenants in one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from memos.errors import ArgumentError, NotFoundError, QuotaError, StoreError
from memos.kv import _files
from memos.kv._crypto import KEY_BYTES, TenantKeys, Wraps, check_encryption_key
from memos.kv._folder import Folder, folder_key, tenant_id
from memos.kv._state import State
from memos.kv.policy import make_policy
from memos.kv.tenant import Tenant
from memos.kv.tiers import DiskTier, HostTier
from memos.kv.verify import Progress, Report, verify_tenants


class KVStore:
    """KV blocks and sessions in a folder, or in memory only.

    Never wrong, only a miss: every block is verified - header, key, identity, tenant, tokens,
    payload - before a byte of it is returned. One process writes a folder, any number read it.
    Thread-safe. After a fork the child's copy reads and does not write.

    Args:
        path:           the folder, made when missing; None keeps everything in this process.
        mode:           "rw" takes the folder's writer lock, "r" reads beside a writer.
        host_bytes:     quota of the payloads kept in memory.
        disk_bytes:     quota of the frames on disk, those being written included. Sessions and
            the file "recency" are not counted.
        policy:         what goes first when a quota is full: "lru".
        encryption_key: 32 bytes, or a MasterKey that keeps such a key wrapped in the folder:
            payloads and sessions are encrypted with AES-256-GCM.
        clock:          seconds since 1970.
        wait_s:         how long to wait for another writer to leave.
        durable:        a change that returned survives a power cut; else only a killed process.

    Raises:
        ArgumentError: an argument is out of contract.
        StoreLockedError: another process writes the folder.
        StoreError: the folder is no store, of another format or key, or cannot be used.
        BackendError: encryption is asked for and the package cryptography is missing.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        mode: str = "rw",
        host_bytes: int = 1 << 30,
        disk_bytes: int = 16 << 30,
        policy: str = "lru",
        encryption_key: bytes | Wraps | None = None,
        clock: Callable[[], float] = time.time,
        wait_s: float = 0.0,
        durable: bool = True,
    ) -> None:
        if mode not in ("rw", "r"):
            raise ArgumentError(f"mode: 'rw' or 'r' wanted, got {mode!r}")
        for name, value in (("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if value < 0:
                raise ArgumentError(f"{name}: at least 0 wanted, got {value}")
        check_encryption_key(encryption_key)
        self.path = None if path is None else Path(path)
        self._tenants: dict[bytes, Tenant] = {}
        self._damaged: dict[bytes, str] = {}  # tenants without a usable key, and why
        wrapped = None
        if encryption_key is not None and not isinstance(encryption_key, bytes):
            encryption_key, wrapped = folder_key(self.path, encryption_key)
        self._encryption_key = encryption_key
        self._folder: Folder | None = None
        self._folder_lock: _files.FolderLock | None = None
        disk = None
        if self.path is not None:
            self._folder = Folder(self.path, encryption_key, durable, wrapped)
            disk = DiskTier(disk_bytes, make_policy(policy), durable)
        host = HostTier(host_bytes, make_policy(policy))
        writable = mode == "rw" or path is None
        self._state = State(host, disk, writable=writable, durable=durable, clock=clock)
        self._state.pinned = self._pinned_keys
        if self._folder is not None and disk is not None:
            try:
                self._open(self._folder, disk, wait_s)
            except BaseException:
                if self._folder_lock is not None:
                    self._folder_lock.release()
                raise
        _stores.add(self)

    def _open(self, folder: Folder, disk: DiskTier, wait_s: float) -> None:
        if not self._state.writable:
            folder.check_format()
            return
        self._folder_lock = folder.lock(wait_s)
        if (folder.path / "FORMAT").exists():
            folder.check_format()
        folder.prepare()
        with _files.explained("open for writing", folder.path):
            disk.can_punch = _files.can_punch(folder.path)
            for id in folder.tenant_ids():
                self._load_tenant(id, id.hex())
            disk.tidy()
            known = folder.load_recency()
            hinted = set(known)
            records = disk.records.values()
            newer = [r.block for r in records if r.block.key not in hinted]
            for block in sorted(newer, key=lambda b: b.created_ms):
                known.append(block.key)
            for key in known:
                disk.policy.touch(key)
            if disk.used_bytes > disk.quota_bytes:  # it was larger when it was filled
                disk.make_room(0, self._state.with_ancestors(self._pinned_keys()))

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def readonly(self) -> bool:
        """Whether nothing can be stored."""
        return not self._state.writable

    # Tenants

    def tenant(self, name: str = "default") -> Tenant:
        """The tenant of this name; a writer makes it when it is new.

        Raises:
            NotFoundError: it is new, and this store only reads.
            StoreError: its key file is damaged.
        """
        state, folder = self._state, self._folder
        state.check_open()
        id = folder.tenant_id(name) if folder else tenant_id(name)
        tenant = self._tenants.get(id)
        if tenant is not None and (state.writable or tenant.is_current()):
            tenant.name = name
            return tenant
        with state.write_lock:
            if id in self._damaged:
                raise StoreError(self._damaged[id])
            if tenant is not None:
                state.forget_tenant(id)  # another process deleted it, and perhaps made it anew
            tenant = self._tenants.get(id) if state.writable else None
            tenant = tenant or self._load_tenant(id, name)
            if tenant is None:
                if not state.writable:
                    raise NotFoundError(f"tenant {name!r}: not there, and the store only reads")
                with _files.explained("make a tenant", self.path or Path("memory")):
                    tenant = self._make_tenant(id, name)
            tenant.name = name
            return tenant

    def delete_tenant(self, name: str) -> None:
        """Remove a tenant: blocks, sessions and the secret without which neither can be read."""
        state, folder = self._state, self._folder
        id = folder.tenant_id(name) if folder else tenant_id(name)
        with state.write_lock:
            state.check_writable()
            tenant = self._tenants.get(id)
            if tenant is None and id not in self._damaged:
                raise NotFoundError(f"tenant {name!r}: not there")
            # Whatever happens to the folder: if it is still there, tenant() loads it anew.
            self._damaged.pop(id, None)
            self._tenants.pop(id, None)
            state.forget_tenant(id)
            if tenant is not None:
                tenant.mark_deleted()
            if folder is not None:
                with _files.explained("delete a tenant", folder.path):
                    folder.remove_tenant(id)

    def _load_tenant(self, id: bytes, name: str) -> Tenant | None:
        """The tenant in the folder, its segments scanned; None when there is none."""
        folder, disk = self._folder, self._state.disk
        if folder is None or disk is None:
            return None
        try:
            keys = folder.load_keys(id)
        except StoreError as error:
            if not self._state.writable:
                raise
            self._damaged[id] = str(error)
            disk.load_unreadable(folder.tenant_folder(id) / "segments", id)
            if name != id.hex():
                raise
            return None
        if keys is None:
            return None
        self._tenants[id] = tenant = Tenant(self._state, name, folder.tenant_folder(id), keys)
        tenant.load()
        return tenant

    def _make_tenant(self, id: bytes, name: str) -> Tenant:
        if self._folder is None:
            secret = secrets.token_bytes(KEY_BYTES)
            keys = TenantKeys(id, secret, self._encryption_key)
            tenant = Tenant(self._state, name, None, keys)
        else:
            keys = self._folder.make_tenant(id)
            tenant = Tenant(self._state, name, self._folder.tenant_folder(id), keys)
            tenant.load()
        self._tenants[id] = tenant
        return tenant

    def _pinned_keys(self) -> set[bytes]:
        return set().union(*(tenant.pinned_keys() for tenant in self._tenants.values()))

    # The whole store

    def stats(self) -> dict[str, Any]:
        """Figures since the store was opened, and what it holds now."""
        state = self._state
        with state.lock:
            counts, misses = state.counts, dict(state.misses)
            host, disk = state.host, state.disk
            hits = counts["host_hits"] + counts["disk_hits"]
            figures: dict[str, Any] = {
                "tenants": len(self._tenants),
                "hits": hits,
                "asked": counts["asked"],
                "hit_rate": hits / counts["asked"] if counts["asked"] else 0.0,
                "misses": misses,
                "get_bytes": counts["get_bytes"],
                "put_blocks": counts["put_blocks"],
                "put_bytes": counts["put_bytes"],
                "put_existing": counts["put_existing"],
                "put_refused": counts["put_refused"],
                "expired": counts["expired"],
                "open_s": time.monotonic() - state.started_s,
                "host": {
                    "bytes": host.used_bytes,
                    "blocks": len(host.blocks),
                    "quota_bytes": host.quota_bytes,
                    "peak_bytes": host.peak_bytes,
                    "hits": counts["host_hits"],
                    "evictions": host.evictions,
                },
            }
            if disk is not None:
                live = sum(record.frame_bytes for record in disk.records.values())
                figures["disk"] = {
                    "bytes": disk.used_bytes,
                    "blocks": len(disk.records),
                    "quota_bytes": disk.quota_bytes,
                    "hits": counts["disk_hits"],
                    "evictions": disk.evictions,
                    "segments": len(disk.segments),
                    "garbage_bytes": disk.used_bytes - live,
                    "gives_pages_back": disk.can_punch,
                }
            return figures

    def verify(self, progress: Progress | None = None) -> Report:
        """Read and check every frame and session; ``progress(done_bytes, total_bytes)``."""
        self._state.check_open()
        self.refresh()
        tenants = [t.parts() for t in list(self._tenants.values())]
        report = verify_tenants([part for part in tenants if part is not None], progress)
        if self._folder is not None:
            for id in self._damaged:
                report.add_bad(self._folder.tenant_folder(id) / "key", 0, "key file")
        return report

    @property
    def is_encrypted(self) -> bool:
        """Whether nothing on a disk can be read without a key."""
        return self.path is None or self._encryption_key is not None

    def change_master_key(self, master: Wraps) -> None:
        """Keep the key of the folder under another master key, which opens it from then on.

        Raises ArgumentError where the folder has no key that a master key keeps.
        """
        state = self._state
        with state.write_lock:
            state.check_writable()
            if self._folder is None or not self._folder.is_wrapped:
                raise ArgumentError(
                    "master: a folder that was made with encryption_key=MasterKey wanted"
                )
            self._folder.rewrap(master)

    def held(self) -> dict[str, int]:
        """Bytes in memory, "host", and on "disk" where there is one: what the quotas limit."""
        state = self._state
        with state.lock:
            found = {"host": state.host.used_bytes}
            return found if state.disk is None else {**found, "disk": state.disk.used_bytes}

    def set_quotas(self, *, host_bytes: int | None = None, disk_bytes: int | None = None) -> None:
        """Change the quotas; what does not fit any more goes before this returns. None: it stays.

        Raises:
            ArgumentError: one below 0.
            QuotaError: what is pinned takes more; that quota stays then.
        """
        state = self._state
        for name, value in (("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
            if value is not None and value < 0:
                raise ArgumentError(f"{name}: at least 0 wanted, got {value}")
        with state.write_lock, state.lock:
            state.check_open()
            pinned = state.with_ancestors(self._pinned_keys())
            for tier, quota in ((state.host, host_bytes), (state.disk, disk_bytes)):
                if tier is None or quota is None or quota == tier.quota_bytes:
                    continue
                if tier is state.disk and not state.writable:
                    continue  # who writes the folder holds its quota
                old, tier.quota_bytes = tier.quota_bytes, quota
                locked = pinned if tier is state.disk or state.disk is None else ()
                with _files.explained("make room", self.path or Path("memory")):
                    fits = tier.make_room(0, locked)
                if not fits:
                    tier.quota_bytes = old
                    raise QuotaError(f"quota: {quota} bytes wanted, but what is pinned takes more")

    def sweep(self) -> int:
        """Remove blocks and sessions whose time is over; returns how many. ``put`` does it too."""
        state = self._state
        with state.write_lock:
            state.check_writable()
            with _files.explained("remove what expired", self.path or Path("memory")):
                count = state.sweep(state.now_ms())
            return count + sum(t.sweep_sessions() for t in list(self._tenants.values()))

    def refresh(self) -> None:
        """See what another process wrote. ``get`` and ``contains`` do it on a miss."""
        self._state.check_open()
        for tenant in list(self._tenants.values()):
            tenant.refresh()

    def close(self) -> None:
        """Leave the folder to others. Closing twice is fine; payloads handed out stay valid."""
        state = self._state
        with state.write_lock:
            if state.closed:
                return
            state.close()
            try:
                if self._folder is not None and state.disk is not None and state.writable:
                    with contextlib.suppress(OSError):  # neither is needed, both are welcome
                        self._folder.save_recency(state.disk.policy.order())
                        state.disk.reclaim()
                for tenant in self._tenants.values():
                    tenant.close()
            finally:
                if self._folder_lock is not None:
                    self._folder_lock.release()

    def _lock_for_fork(self) -> None:
        self._state.lock.acquire()

    def _unlock_after_fork(self) -> None:
        self._state.lock.release()

    def _become_child(self) -> None:
        self._state.after_fork()
        for tenant in self._tenants.values():
            tenant.after_fork()
        if self._folder_lock is not None:
            self._folder_lock.forget()


_stores: weakref.WeakSet[KVStore] = weakref.WeakSet()
_forking: list[KVStore] = []


def _before_fork() -> None:
    _forking[:] = list(_stores)
    for store in _forking:
        store._lock_for_fork()


def _after_fork_in_parent() -> None:
    for store in _forking:
        store._unlock_after_fork()
    _forking.clear()


def _after_fork_in_child() -> None:
    for store in _forking:
        store._become_child()
    _forking.clear()


# The indexes are whole at a fork, and the child does not take the parent's lock for its own.
os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
