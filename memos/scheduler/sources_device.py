"""Sessions of a KVCacheMemory on the model's device: copies that are read through the store's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from memos.errors import ArgumentError, StoreError
from memos.scheduler.sources import Engine

if TYPE_CHECKING:
    from memos.kv.device_pools import BlockPool
    from memos.kv.identity import KVIdentity
    from memos.kv.sessions import Session
    from memos.memories.kv_cache import KVCacheMemory

Here: TypeAlias = "tuple[BlockPool, KVIdentity] | None"

DEVICE = "device"
_CHUNK = 16  # blocks between two looks at whether a move is cancelled


class DeviceTier:
    """The blocks that a memory keeps on its model's device, for a ``KVSource``. Thread-safe.

    What the store does not know is no copy: it is wiped with every ``look_again``, and never
    served. Tails of sessions, exact tokens behind the last full block, come from the store.

    Args:
        memory: whose pool.
        whole:  keys of the blocks of the sessions that are told to be here.
    """

    def __init__(self, memory: KVCacheMemory, whole: Callable[[], set[bytes]]) -> None:
        self._memory, self._whole = memory, whole
        self._pools = memory.pools

    def engine(self) -> Engine:
        pools = self._pools
        return Engine(
            self._memory.name, DEVICE, pools.held, pools.set_budget, pools, loose=self._loose_bytes
        )

    def here(self) -> Here:
        """The pool, and what its blocks are made for; None where there is none to have."""
        if not self._pools.budget_bytes:
            return None
        identity = self._memory.identity
        pool = self._memory.device_pool(identity)
        return None if pool is None else (pool, identity)

    def load(self, session: Session, cancelled: Callable[[], bool]) -> None:
        """Bring all full blocks of a session in, through the checks of every read.

        Raises:
            ArgumentError: there is no pool, or the session was made for another model.
            StoreError: the store does not have them all, or they do not fit.
        """
        found, name = self.here(), f"session {session.id!r}"
        if found is None:
            raise ArgumentError(f"{name}: memory {self._memory.name!r} has no room on a device")
        pool, identity = found
        if identity.digest != session.identity:
            raise ArgumentError(f"{name}: made for another model")
        from memos.kv.payload import packed_rows

        P, tenant = identity.block_tokens, self._memory.tenant
        keys = session.keys[: len(session.token_ids) // P]
        self._tidy(pool, keys)
        for start in range(0, len(keys), _CHUNK):
            if cancelled():
                return
            part = keys[start : start + _CHUNK]
            payloads = tenant.get(part, identity, session.token_ids[start * P :])
            if len(payloads) < len(part):
                raise StoreError(f"{name}: the store does not have all of it")
            parents = keys[start - 1 : start - 1 + len(part)] if start else [b"", *part[:-1]]
            pool.load(part, parents, packed_rows(payloads, identity))
        self.forget(keys)  # what was deleted meanwhile
        if pool.contains(keys) < len(keys):
            raise StoreError(f"{name}: {DEVICE} does not hold all of it")

    def drop(self, keys: Sequence[bytes]) -> int:
        """Blocks leave the device."""
        pool = self._pools.pool
        return 0 if pool is None else pool.drop(keys)

    def forget(self, keys: Iterable[bytes] | None = None) -> None:
        """Wipe what the store has forgotten, of these blocks or of all."""
        pool, tenant = self._pools.pool, self._memory.tenant
        if pool is not None and len(pool):
            known = pool.held_keys() if keys is None else keys
            pool.drop([key for key in known if not tenant.contains([key])])

    def _loose(self, pool: BlockPool) -> list[bytes]:
        """Blocks that make no session whole."""
        whole = self._whole()
        return [key for key in pool.held_keys() if key not in whole]

    def _loose_bytes(self) -> int:
        pool = self._pools.pool
        return 0 if pool is None else len(self._loose(pool)) * pool.block_bytes

    def _tidy(self, pool: BlockPool, keys: Sequence[bytes]) -> None:
        """Where there is no room for these, blocks that make no session whole go first."""
        coming = sum(pool.contains([key]) == 0 for key in keys)
        if pool.held() + coming * pool.block_bytes > pool.budget_bytes:
            pool.drop([key for key in self._loose(pool) if key not in set(keys)])
