"""Ops: one definition = one contract = one reference; backends attach to it.

Importing this package loads torch. ``memos.kernels.codec`` and ``memos.kernels.hashing`` alone
do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from memos.kernels._op import available, ops, using

if TYPE_CHECKING:
    from memos.kernels.blocks import gather_blocks, write_blocks
    from memos.kernels.codec import Codec
    from memos.kernels.hashing import hash_blocks
    from memos.kernels.kv import PackedRows, pack_kv, unpack_kv

_HOME = {
    "gather_blocks": "blocks",
    "write_blocks": "blocks",
    "pack_kv": "kv",
    "unpack_kv": "kv",
    "PackedRows": "kv",
    "hash_blocks": "hashing",
    "Codec": "codec",
}

__all__ = [
    "Codec",
    "PackedRows",
    "available",
    "gather_blocks",
    "hash_blocks",
    "load_all",
    "ops",
    "pack_kv",
    "unpack_kv",
    "using",
    "write_blocks",
]


def load_all() -> None:
    """Import every op and its backends, so that ``ops`` and ``available()`` are complete."""
    for module in set(_HOME.values()):
        importlib.import_module(f"memos.kernels.{module}")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"memos.kernels.{_HOME[name]}"), name)
