"""memos: a memory operating system for large language models.

Importing this package loads nothing heavy: a public name is imported where it lives at its first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memos.cube import Hit, MemCube
    from memos.memories import (
        GeneralTextMemory,
        GraphMemory,
        KVCacheMemory,
        ParametricMemory,
        TreeTextMemory,
        VectorMemory,
    )
    from memos.mos import MOS
    from memos.records.keys import MasterKey

__version__ = "0.1.0"

_HOME = {
    "GeneralTextMemory": "memos.memories",
    "GraphMemory": "memos.memories",
    "Hit": "memos.cube",
    "KVCacheMemory": "memos.memories",
    "MOS": "memos.mos",
    "MasterKey": "memos.records.keys",
    "MemCube": "memos.cube",
    "ParametricMemory": "memos.memories",
    "TreeTextMemory": "memos.memories",
    "VectorMemory": "memos.memories",
}

__all__ = [
    "MOS",
    "GeneralTextMemory",
    "GraphMemory",
    "Hit",
    "KVCacheMemory",
    "MasterKey",
    "MemCube",
    "ParametricMemory",
    "TreeTextMemory",
    "VectorMemory",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
