"""The types of memory. Each holds MemCubes; importing this package loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memos.memories.graph import GraphMemory
    from memos.memories.kv_cache import KVCacheMemory
    from memos.memories.parametric import ParametricMemory
    from memos.memories.text import GeneralTextMemory
    from memos.memories.tree import TreeTextMemory
    from memos.memories.vector import VectorMemory

_HOME = {
    "GeneralTextMemory": "memos.memories.text",
    "GraphMemory": "memos.memories.graph",
    "KVCacheMemory": "memos.memories.kv_cache",
    "ParametricMemory": "memos.memories.parametric",
    "TreeTextMemory": "memos.memories.tree",
    "VectorMemory": "memos.memories.vector",
}
# Those whose cubes stand in records: a MOS makes them again when it opens a folder.
DECLARATIVE = (
    *("GeneralTextMemory", "GraphMemory", "ParametricMemory", "TreeTextMemory", "VectorMemory"),
)

__all__ = [
    "GeneralTextMemory",
    "GraphMemory",
    "KVCacheMemory",
    "ParametricMemory",
    "TreeTextMemory",
    "VectorMemory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
