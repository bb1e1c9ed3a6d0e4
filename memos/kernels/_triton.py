"""The Triton backend: whether it can run here, and its kernels attached to their ops.

Triton is imported when an op first asks for this backend, never before. With TRITON_INTERPRET=1 in
the environment of the process its kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memos.errors import ArgumentError, BackendError
from memos.kernels import _cuda

if TYPE_CHECKING:
    from memos.kernels._op import Op
    from memos.kernels.adapters import AdapterPlan, AdapterTable
    from memos.kernels.codec import Codec
    from memos.kernels.kv import PackedRows
    from memos.kernels.rerotation import Rerotation

_MAX_HEAD_DIM = 1024  # csrc/codec/layout.h


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """None when Triton kernels run here, else why not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed: {error}"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device is available, and TRITON_INTERPRET is not 1"
    if not interpreted() and torch.cuda.get_device_capability() < (8, 0):
        return f"sm_80 or newer wanted, got sm_{''.join(map(str, _capability()))}"
    try:
        importlib.import_module("memos.triton_kernels")
    except ImportError as error:
        return f"memos is not installed, only its source is on the path: {error}"
    return None


def _capability() -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


@functools.lru_cache(maxsize=8)
def kernels(module: str) -> Any:
    """``memos.triton_kernels.<module>``. Raises BackendError when Triton cannot run here."""
    if (why := missing()) is not None:
        raise BackendError(why)
    return importlib.import_module(f"memos.triton_kernels.{module}")


def takes(tensor: torch.Tensor) -> bool:
    """Whether this backend can read the tensor: on a GPU, or on the CPU when interpreted."""
    return tensor.device.type == ("cpu" if interpreted() else "cuda")


def _together(device: torch.device, **others: torch.Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != device:
            raise ArgumentError(f"{name}: on {device} wanted, got {tensor.device}")


def register_blocks(
    gather_blocks: Op[[torch.Tensor, torch.Tensor], torch.Tensor],
    write_blocks: Op[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Attach the Triton kernels to the ops of ``memos.kernels.blocks``."""

    @gather_blocks.backend("triton", accepts=lambda cache, _: takes(cache), missing=missing)
    def _gather_triton(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        _together(cache.device, block_ids=block_ids)
        out: torch.Tensor = kernels("blocks").gather_blocks(cache, block_ids)
        return out

    @write_blocks.backend("triton", accepts=lambda cache, *_: takes(cache), missing=missing)
    def _write_triton(cache: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
        _together(cache.device, block_ids=block_ids, blocks=blocks)
        kernels("blocks").write_blocks(cache, block_ids, blocks)


Caches = Sequence[torch.Tensor]


def register_kv(
    pack_kv: Op[[Caches, Caches, torch.Tensor, Codec], torch.Tensor],
    unpack_kv: Op[
        [Caches, Caches, torch.Tensor, torch.Tensor | PackedRows, Codec, Rerotation | None], None
    ],
) -> None:
    """Attach the Triton kernels to the ops of ``memos.kernels.kv``."""

    def accepts(keys: Caches, values: Caches, *rest: object, **more: object) -> bool:
        return takes(keys[0]) and max(keys[0].shape[3], values[0].shape[3]) <= _MAX_HEAD_DIM

    def check(keys: Caches, values: Caches, **others: torch.Tensor) -> None:
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            for name, tensor in zip(("keys", "values"), pair, strict=True):
                if tensor.device != keys[0].device:
                    _together(keys[0].device, **{f"{name}[{layer}]": tensor})
        _together(keys[0].device, **others)

    @pack_kv.backend("triton", accepts=accepts, missing=missing)
    def _pack_triton(
        keys: Caches, values: Caches, block_ids: torch.Tensor, codec: Codec
    ) -> torch.Tensor:
        check(keys, values, block_ids=block_ids)
        out: torch.Tensor = kernels("kv").pack_kv(keys, values, block_ids, codec)
        return out

    @unpack_kv.backend("triton", accepts=accepts, missing=missing)
    def _unpack_triton(
        keys: Caches,
        values: Caches,
        block_ids: torch.Tensor,
        packed: torch.Tensor | PackedRows,
        codec: Codec,
        rerotate: Rerotation | None = None,
    ) -> None:
        if not len(packed):
            return
        first = packed if isinstance(packed, torch.Tensor) else packed[0]
        check(keys, values, block_ids=block_ids, packed=first)
        places = packed if isinstance(packed, torch.Tensor) else packed.addresses
        kernels("kv").unpack_kv(keys, values, block_ids, places, codec, rerotate)


def register_rope(
    rotate_positions_: Op[[Caches, torch.Tensor, torch.Tensor, torch.Tensor, bool], None],
    turn_table: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Attach the Triton kernel to the op of ``memos.kernels.rope``; angles come from the host."""

    @rotate_positions_.backend("triton", accepts=lambda keys, *_, **__: takes(keys[0]),
                               missing=missing)  # fmt: skip
    def _rotate_triton(
        keys: Caches,
        old: torch.Tensor,
        new: torch.Tensor,
        inv_freq: torch.Tensor,
        interleaved: bool = False,
    ) -> None:
        run = kernels("rope").rotate_positions_
        B, H, T, _ = keys[0].shape
        half, item = len(inv_freq), keys[0].element_size()
        if not B * H * T * half:
            return
        views = _cuda.key_views(keys)
        places = half * item
        for i, number in enumerate(views):
            places |= number if i % 4 == 0 else number * item
        # Addresses and angles in one copy.
        rows = torch.frombuffer(views, dtype=torch.int64).view(torch.float32)
        table = torch.cat([rows, turn_table(old, new, inv_freq).view(-1)])
        run(keys, _cuda.sent(table, keys[0].device), half, places % 16 == 0, interleaved)


def register_adapters(
    plan_adapters: Op[[torch.Tensor, int], AdapterPlan],
    apply_adapters_: Op[[torch.Tensor, torch.Tensor, AdapterTable, int, AdapterPlan], None],
    merge_adapter: Op[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor],
    plan_of: type[AdapterPlan],
) -> None:
    """Attach the Triton kernels to the ops of ``memos.kernels.adapters``."""

    @plan_adapters.backend("triton", accepts=lambda slots, _: takes(slots), missing=missing)
    def _plan_triton(slots: torch.Tensor, num_slots: int) -> AdapterPlan:
        order, starts = kernels("adapters").plan_adapters(slots, num_slots)
        return plan_of(order, starts, len(slots))

    @apply_adapters_.backend("triton", accepts=lambda y, *_: takes(y), missing=missing)
    def _apply_triton(
        y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
    ) -> None:
        kernels("adapters").apply_adapters_(
            y, x, table.rows, module, table.max_rank, plan.order, plan.starts
        )

    @merge_adapter.backend("triton", accepts=lambda weight, *_: takes(weight), missing=missing)
    def _merge_triton(
        weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out: torch.Tensor = kernels("adapters").merge_adapter(weight, down, up, scale)
        return out
