"""Executors: how a worker moves what the engines hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memos.errors import ArgumentError
from memos.scheduler.plan import Action

if TYPE_CHECKING:
    from memos.adapters.pool import AdapterPool


class AdapterExecutor:
    """Adapters between their store, tier "disk", and the slots of a pool, tier "device".

    The unit's id is the adapter's digest. What a request uses or somebody pinned stays: the pool
    refuses to drop it, and the move fails.

    Args:
        consolidate: learns an adapter that is not there, by its id; None: that is refused.
    """

    def __init__(
        self, pool: AdapterPool, consolidate: Callable[[str], object] | None = None
    ) -> None:
        self.pool, self._consolidate = pool, consolidate

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        if action.source is None:
            if self._consolidate is None:
                raise ArgumentError(f"consolidate: no one learns adapter {action.unit!r}")
            self._consolidate(action.unit)
        if action.target == "device" and not cancelled():
            self.pool.release(*self.pool.acquire_all([action.unit]))

    def discard(self, unit: str, tier: str) -> None:
        if tier != "device":
            raise ArgumentError(f"adapter {unit!r}: only its copy on the device may go, not {tier}")
        if unit in self.pool.busy():
            raise ArgumentError(f"adapter {unit!r}: in use or pinned")
        self.pool.drop(unit)

    def archive(self, unit: str) -> None:
        raise ArgumentError(f"adapter {unit!r}: a text wanted, adapters are not archived")

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        raise ArgumentError(f"adapter {action.unit!r}: KV wanted, adapters are not compressed")
