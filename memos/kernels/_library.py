"""The ops in torch's library, as ``torch.ops.memos``: for graphs, beside the calls of eager code.

While torch traces (torch.compile, torch.export), a call of an op becomes a call of its twin here:
one node with a schema, whose result torch knows without running it. When the graph runs, the twin
calls the op as eager code does. Nothing here links to libtorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memos.errors import ArgumentError
from memos.kernels.codec import Codec
from memos.kernels.rerotation import Rerotation

if TYPE_CHECKING:
    from memos.kernels._op import Op
    from memos.kernels.adapters import AdapterPlan, AdapterRows, AdapterTable
    from memos.kernels.kv import PackedRows

_library = torch.library.Library("memos", "FRAGMENT")
Caches = Sequence[torch.Tensor]


def _register(
    op: Op[..., Any], schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Define ``memos::<op>``; ``run`` computes, ``fake`` tells the result. Returns the twin."""
    _library.define(op.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memos::{op.name}", fake, lib=_library)
    op.traced = torch.compiler.is_dynamo_compiling
    return getattr(torch.ops.memos, op.name).default


def _nothing(*args: object) -> None:
    """The fake of an op that returns nothing."""


def register_blocks(
    gather_blocks: Op[[torch.Tensor, torch.Tensor], torch.Tensor],
    write_blocks: Op[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Define the ops of ``memos.kernels.blocks``."""

    def gathered(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        return cache.new_empty(block_ids.shape[0], cache.shape[1])

    gather_blocks.in_graph = _register(
        gather_blocks,
        "(Tensor cache, Tensor block_ids) -> Tensor",
        lambda cache, block_ids: gather_blocks(cache, block_ids),
        gathered,
    )
    write_blocks.in_graph = _register(
        write_blocks,
        "(Tensor(a!) cache, Tensor block_ids, Tensor blocks) -> ()",
        lambda cache, block_ids, blocks: write_blocks(cache, block_ids, blocks),
        _nothing,
    )


def register_kv(
    pack_kv: Op[[Caches, Caches, torch.Tensor, Codec], torch.Tensor],
    unpack_kv: Op[
        [Caches, Caches, torch.Tensor, torch.Tensor | PackedRows, Codec, Rerotation | None], None
    ],
) -> None:
    """Define the ops of ``memos.kernels.kv``; the codec goes by its name."""

    def packed(keys: Caches, values: Caches, block_ids: torch.Tensor, codec: str) -> torch.Tensor:
        _, P, H, Dk = keys[0].shape
        E = Codec.parse(codec).layer_bytes(P, H, Dk, values[0].shape[3], keys[0].element_size())
        return keys[0].new_empty(block_ids.shape[0], len(keys), E, dtype=torch.uint8)

    def run_unpack(
        keys: Caches,
        values: Caches,
        block_ids: torch.Tensor,
        packed: torch.Tensor,
        codec: str,
        old: torch.Tensor | None = None,
        new: torch.Tensor | None = None,
        inv_freq: torch.Tensor | None = None,
        interleaved: bool = False,
        first: int = 0,
    ) -> None:
        by = None
        if old is not None and new is not None and inv_freq is not None:
            by = Rerotation(old, new, inv_freq, interleaved, first)
        unpack_kv(keys, values, block_ids, packed, Codec.parse(codec), by)

    pack = _register(
        pack_kv,
        "(Tensor[] keys, Tensor[] values, Tensor block_ids, str codec) -> Tensor",
        lambda keys, values, ids, codec: pack_kv(keys, values, ids, Codec.parse(codec)),
        packed,
    )
    unpack = _register(
        unpack_kv,
        "(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor block_ids, Tensor packed, str codec,"
        " Tensor? old=None, Tensor? new=None, Tensor? inv_freq=None, bool interleaved=False,"
        " SymInt first=0) -> ()",
        run_unpack,
        _nothing,
    )

    def pack_in_graph(
        keys: Caches, values: Caches, block_ids: torch.Tensor, codec: Codec
    ) -> torch.Tensor:
        out: torch.Tensor = pack(list(keys), list(values), block_ids, codec.name)
        return out

    def unpack_in_graph(
        keys: Caches,
        values: Caches,
        block_ids: torch.Tensor,
        packed: torch.Tensor | PackedRows,
        codec: Codec,
        rerotate: Rerotation | None = None,
    ) -> None:
        if not isinstance(packed, torch.Tensor):
            raise ArgumentError("packed: one tensor wanted in a graph, got rows that lie apart")
        by: tuple[Any, ...] = ()
        if rerotate is not None:
            by = (
                rerotate.old,
                rerotate.new,
                rerotate.inv_freq,
                rerotate.interleaved,
                rerotate.first,
            )
        unpack(list(keys), list(values), block_ids, packed, codec.name, *by)

    pack_kv.in_graph, unpack_kv.in_graph = pack_in_graph, unpack_in_graph


def register_rope(
    rotate_positions_: Op[[Caches, torch.Tensor, torch.Tensor, torch.Tensor, bool], None],
) -> None:
    """Define the op of ``memos.kernels.rope``."""
    rotate = _register(
        rotate_positions_,
        "(Tensor(a!)[] keys, Tensor old, Tensor new, Tensor inv_freq, bool interleaved) -> ()",
        lambda keys, old, new, inv_freq, interleaved: rotate_positions_(
            keys, old, new, inv_freq, interleaved
        ),
        _nothing,
    )

    def rotate_in_graph(
        keys: Caches,
        old: torch.Tensor,
        new: torch.Tensor,
        inv_freq: torch.Tensor,
        interleaved: bool = False,
    ) -> None:
        rotate(list(keys), old, new, inv_freq, interleaved)

    rotate_positions_.in_graph = rotate_in_graph


def register_adapters(
    apply_adapters_: Op[[torch.Tensor, torch.Tensor, AdapterTable, int, AdapterPlan], None],
    merge_adapter: Op[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor],
    plan_of: type[AdapterPlan],
    rows_of: type[AdapterRows],
) -> None:
    """Define the ops of ``memos.kernels.adapters``; table and plan go by their tensors."""

    def run(
        y: torch.Tensor,
        x: torch.Tensor,
        rows: torch.Tensor,
        order: torch.Tensor,
        starts: torch.Tensor,
        module: int,
        max_rank: int,
    ) -> None:
        table = rows_of(rows, (x.shape[1], y.shape[1]), y.dtype, max_rank)
        apply_adapters_(y, x, table, module, plan_of(order, starts, y.shape[0]))

    apply = _register(
        apply_adapters_,
        "(Tensor(a!) y, Tensor x, Tensor rows, Tensor order, Tensor starts, SymInt module,"
        " SymInt max_rank) -> ()",
        run,
        _nothing,
    )

    def apply_in_graph(
        y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
    ) -> None:
        apply(y, x, table.rows, plan.order, plan.starts, module, table.max_rank)

    apply_adapters_.in_graph = apply_in_graph

    merge_adapter.in_graph = _register(
        merge_adapter,
        "(Tensor weight, Tensor down, Tensor up, float scale) -> Tensor",
        lambda weight, down, up, scale: merge_adapter(weight, down, up, scale),
        lambda weight, down, up, scale: torch.empty(
            weight.shape, dtype=weight.dtype, device=weight.device
        ),
    )
