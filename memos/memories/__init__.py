"""The types of memory. Each holds MemCubes; importing this package loads nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memos.memories.kv_cache import KVCacheMemory

__all__ = ["KVCacheMemory"]


def __getattr__(name: str) -> Any:
    if name != "KVCacheMemory":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memos.memories.kv_cache import KVCacheMemory

    return KVCacheMemory
