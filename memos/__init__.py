"""memos: a memory operating system for large language models.

Importing this package loads nothing heavy: a public name is imported where it lives at its first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memos.cube import MemCube
    from memos.memories.kv_cache import KVCacheMemory

__version__ = "0.1.0"

_HOME = {
    "KVCacheMemory": "memos.memories.kv_cache",
    "MemCube": "memos.cube",
}

__all__ = ["KVCacheMemory", "MemCube", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
