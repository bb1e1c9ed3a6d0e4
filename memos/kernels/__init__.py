"""Ops: one definition = one contract = one reference; backends attach to it.

Importing this package loads torch. ``memos.kernels.codec`` and ``memos.kernels.hashing`` alone
do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from memos.kernels._op import available, ops, using

if TYPE_CHECKING:
    from memos.kernels.adapters import (
        AdapterPlan,
        AdapterTable,
        apply_adapters_,
        merge_adapter,
        plan_adapters,
        uniform_plan,
    )
    from memos.kernels.blocks import gather_blocks, write_blocks
    from memos.kernels.codec import Codec
    from memos.kernels.hashing import hash_blocks
    from memos.kernels.kv import PackedRows, pack_kv, unpack_kv
    from memos.kernels.rerotation import Rerotation
    from memos.kernels.rope import rotate_positions_

_HOME = {
    "gather_blocks": "blocks",
    "write_blocks": "blocks",
    "pack_kv": "kv",
    "unpack_kv": "kv",
    "PackedRows": "kv",
    "Rerotation": "rerotation",
    "rotate_positions_": "rope",
    "hash_blocks": "hashing",
    "Codec": "codec",
    "AdapterPlan": "adapters",
    "AdapterTable": "adapters",
    "plan_adapters": "adapters",
    "uniform_plan": "adapters",
    "apply_adapters_": "adapters",
    "merge_adapter": "adapters",
}

__all__ = [
    "AdapterPlan",
    "AdapterTable",
    "Codec",
    "PackedRows",
    "Rerotation",
    "apply_adapters_",
    "available",
    "gather_blocks",
    "hash_blocks",
    "load_all",
    "merge_adapter",
    "ops",
    "pack_kv",
    "plan_adapters",
    "rotate_positions_",
    "uniform_plan",
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
    value = getattr(importlib.import_module(f"memos.kernels.{_HOME[name]}"), name)
    globals()[name] = value  # found without coming here from now on: saves 1 us
    return value
