"""The CUDA backend: whether it can run here, and its kernels attached to their ops.

``memos._cuda`` holds its own CUDA runtime and is loaded when an op first asks for this backend.
Addresses cross the boundary, nothing else. Kernels run on torch's current stream, neither
synchronise nor allocate, and read every host table before they return: they can be captured in
CUDA graphs. What the tensors' memory holds is kept until then by torch's allocator, which frees in
the order of the stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memos.errors import ArgumentError, BackendError
from memos.kernels._dims import contiguous
from memos.kernels._module import loaded_once

Caches = Sequence[torch.Tensor]

if TYPE_CHECKING:
    from memos.kernels._op import Op
    from memos.kernels.adapters import AdapterPlan, AdapterTable
    from memos.kernels.codec import Codec
    from memos.kernels.kv import PackedRows
    from memos.kernels.rerotation import Rerotation

_MAX_HEAD_DIM = 1024  # csrc/codec/layout.h
# The adapter kernel reads A again for every 8 tokens and slice of 256 outputs: right for decoding,
# wrong for a long prompt.
_MAX_ADAPTER_TOKENS = 256
_MIN_CAPABILITY = 80
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/codec/layout.h
_HALF = {torch.float16: 1, torch.bfloat16: 2}


def _load() -> tuple[Any, str | None]:
    try:
        from memos import _cuda as module
    except ImportError as error:
        return None, (
            "the CUDA kernels are not built: pip install -C cmake.define.MEMOS_CUDA=ON "
            f"from the source, with nvcc ({error})"
        )
    if why := str(module.why_not()):
        return None, f"no CUDA device is available: {why}"
    if not torch.cuda.is_available():
        return None, "this build of torch sees no CUDA device"
    found = min(int(module.capability(i)) for i in range(torch.cuda.device_count()))
    if found < _MIN_CAPABILITY:
        return None, f"compute capability {_MIN_CAPABILITY / 10} wanted, got {found / 10}"
    return module, None


missing, core = loaded_once(_load)


def built() -> bool:
    """Whether the CUDA kernels were built, whatever runs here."""
    try:
        from memos import _cuda as module
    except ImportError:
        return False
    return module is not None


def _launch(function: Any, device: torch.device, *arguments: int) -> None:
    """Call a launcher on the current stream of ``device``."""
    if torch.cuda.device_count() == 1:
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)
        return
    with torch.cuda.device(device):
        core().set_device(device.index)
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)


def _require(good: bool, op: str, wanted: str) -> None:
    # A forced backend is not asked what it takes: an address that the device cannot read would
    # take the whole process down.
    if not good:
        raise BackendError(f"{op}: backend 'cuda' takes {wanted}")


# Whole blocks


def _takes_blocks(cache: torch.Tensor, block_ids: torch.Tensor, *blocks: torch.Tensor) -> bool:
    return cache.is_cuda and all(t.device == cache.device for t in (block_ids, *blocks))


def register_blocks(
    gather_blocks: Op[[torch.Tensor, torch.Tensor], torch.Tensor],
    write_blocks: Op[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Attach the kernels to the ops of ``memos.kernels.blocks``."""

    @gather_blocks.backend("cuda", accepts=_takes_blocks, missing=missing)
    def _gather_cuda(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        _require(_takes_blocks(cache, block_ids), "gather_blocks", "tensors of one CUDA device")
        out = cache.new_empty(len(block_ids), cache.shape[1])
        row_bytes = cache.shape[1] * cache.element_size()
        where = cache.data_ptr(), block_ids.data_ptr(), len(block_ids), row_bytes, out.data_ptr()
        _launch(core().gather_rows, cache.device, *where)
        return out

    @write_blocks.backend("cuda", accepts=_takes_blocks, missing=missing)
    def _write_cuda(cache: torch.Tensor, block_ids: torch.Tensor, blocks: torch.Tensor) -> None:
        good = _takes_blocks(cache, block_ids, blocks)
        _require(good, "write_blocks", "tensors of one CUDA device")
        row_bytes = cache.shape[1] * cache.element_size()
        where = cache.data_ptr(), block_ids.data_ptr(), len(block_ids), row_bytes
        _launch(core().write_rows, cache.device, *where, blocks.data_ptr())


# Packed blocks


def _takes_kv(keys: Caches, values: Caches, block_ids: torch.Tensor, codec: Codec) -> bool:
    device = keys[0].device
    if device.type != "cuda" or any(t.device != device for t in (*keys, *values, block_ids)):
        return False
    sizes = (keys[0].shape[3], codec.key), (values[0].shape[3], codec.value)
    return all(D <= _MAX_HEAD_DIM or scheme.kind == "raw" for D, scheme in sizes)


def _takes_packed(
    keys: Caches,
    values: Caches,
    block_ids: torch.Tensor,
    packed: torch.Tensor | PackedRows,
    codec: Codec,
    rerotate: Rerotation | None = None,
) -> bool:
    rows = [packed] if isinstance(packed, torch.Tensor) else packed
    device = keys[0].device
    return _takes_kv(keys, values, block_ids, codec) and all(
        row.device == device or (row.is_cpu and row.is_pinned()) for row in rows
    )


def _row_addresses(packed: torch.Tensor | PackedRows) -> array[int]:
    if not isinstance(packed, torch.Tensor):
        return packed.addresses
    M, L, E = packed.shape
    return array("q", [packed.data_ptr() + m * L * E for m in range(M)])


_KV_WANTED = "tensors of one CUDA device, and head dimensions of up to 1024 where it quantises"


def register_kv(
    pack_kv: Op[[Caches, Caches, torch.Tensor, Codec], torch.Tensor],
    unpack_kv: Op[
        [Caches, Caches, torch.Tensor, torch.Tensor | PackedRows, Codec, Rerotation | None], None
    ],
    call_of: Callable[..., tuple[array[int], list[array[int]]]],
) -> None:
    """Attach the kernels to the ops of ``memos.kernels.kv``; ``call_of`` makes their KvCall."""

    @pack_kv.backend("cuda", accepts=_takes_kv, missing=missing)
    def _pack_cuda(
        keys: Caches, values: Caches, block_ids: torch.Tensor, codec: Codec
    ) -> torch.Tensor:
        _require(_takes_kv(keys, values, block_ids, codec), "pack_kv", _KV_WANTED)
        (_, P, H, Dk), Dv = keys[0].shape, values[0].shape[3]
        E = codec.layer_bytes(P, H, Dk, Dv, keys[0].element_size())
        out = keys[0].new_empty((len(block_ids), len(keys), E), dtype=torch.uint8)
        call, tables = call_of(keys, values, block_ids, _row_addresses(out), codec)
        _launch(core().pack_kv, keys[0].device, call.buffer_info()[0])
        del tables
        return out

    @unpack_kv.backend("cuda", accepts=_takes_packed, missing=missing)
    def _unpack_cuda(
        keys: Caches,
        values: Caches,
        block_ids: torch.Tensor,
        packed: torch.Tensor | PackedRows,
        codec: Codec,
        rerotate: Rerotation | None = None,
    ) -> None:
        good = _takes_packed(keys, values, block_ids, packed, codec)
        _require(good, "unpack_kv", _KV_WANTED + "; packed rows there or in pinned memory")
        call, tables = call_of(keys, values, block_ids, _row_addresses(packed), codec, rerotate)
        _launch(core().unpack_kv, keys[0].device, call.buffer_info()[0])
        del tables


# Positions

TurnTable = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def key_views(keys: Caches) -> array[int]:
    """KeyView of each layer (csrc/cuda/kernels.h): address and strides of [B, H, T, D]."""
    views = array("q")
    for key in keys:
        views.extend([key.data_ptr(), *key.stride()[:3]])
    return views


def register_rope(
    rotate_positions_: Op[[Caches, torch.Tensor, torch.Tensor, torch.Tensor, bool], None],
    turn_table: TurnTable,
) -> None:
    """Attach the kernel to the op of ``memos.kernels.rope``.

    The angles are computed on the host in float64, by ``turn_table``, as every backend has them:
    positions that are there already cost no wait for the device.
    """

    def takes(keys: Caches, *rest: object, **more: object) -> bool:
        return all(key.is_cuda and key.device == keys[0].device for key in keys)

    @rotate_positions_.backend("cuda", accepts=takes, missing=missing)
    def _rotate_cuda(
        keys: Caches,
        old: torch.Tensor,
        new: torch.Tensor,
        inv_freq: torch.Tensor,
        interleaved: bool = False,
    ) -> None:
        _require(takes(keys), "rotate_positions_", "keys of one CUDA device")
        B, H, T, _ = keys[0].shape
        if not B * H * T * len(inv_freq):
            return
        table = sent(turn_table(old, new, inv_freq), keys[0].device)
        views = key_views(keys)
        call = array("q", [views.buffer_info()[0], len(keys), B, H, T, DTYPES[keys[0].dtype]])
        call.extend([len(inv_freq), int(interleaved), table.data_ptr()])
        _launch(core().turn_keys, keys[0].device, call.buffer_info()[0])


def sent(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, queued on its current stream, without a wait."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# Adapters


def _takes_adapters(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> bool:
    inputs, outputs = table.shapes[module]
    return (
        table.device.type == "cuda"
        and plan.device == y.device == x.device == table.device
        and table.dtype in _HALF
        and plan.count <= _MAX_ADAPTER_TOKENS
        and inputs % 8 == 0
        and outputs % 2 == 0
        and (x.data_ptr() | x.stride(0) * 2) % 16 == 0
        and (y.data_ptr() | y.stride(0) * 2) % 4 == 0
    )


def register_adapters(
    apply_adapters_: Op[[torch.Tensor, torch.Tensor, AdapterTable, int, AdapterPlan], None],
) -> None:
    """Attach the kernel to the op of ``memos.kernels.adapters``."""

    @apply_adapters_.backend("cuda", accepts=_takes_adapters, missing=missing)
    def _apply_cuda(
        y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
    ) -> None:
        _require(
            _takes_adapters(y, x, table, module, plan),
            "apply_adapters_",
            "16-bit tensors of one CUDA device, up to 256 tokens, a multiple of 8 inputs aligned "
            "to 16 bytes and of 2 outputs aligned to 4",
        )
        shapes = table._flat
        call = array("q", [table.rows.data_ptr(), shapes.buffer_info()[0], table.num_slots])
        call.extend([len(table.shapes), _HALF[table.dtype], table.max_rank, module])
        call.extend([plan.order.data_ptr(), plan.starts.data_ptr(), plan.count])
        call.extend([y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0)])
        _launch(core().apply_adapters, y.device, call.buffer_info()[0])


# Transfers

_HOW = {"": 0, "kernel": 1, "copies": 2}  # csrc/cuda/kernels.h


def move_blocks(
    planes: Sequence[torch.Tensor],
    block_ids: Sequence[int],
    host: torch.Tensor,
    *,
    to_host: bool,
    bytes_per_s: int = 0,
    how: str = "",
) -> None:
    """Copy blocks of many planes out of a device, or back: ``host[m, s] = planes[s][ids[m]]``.

    Blocks under 28 KiB are moved by one kernel on 16 blocks of threads, which reads or writes the
    pinned memory itself; larger ones by the copy engines, in one call. With a rate the kernel
    moves them and keeps to it, so that others have the link too.

    Args:
        planes:      S tensors [N, B] of one dtype and CUDA device, contiguous: the K or V of a
            layer, say.
        block_ids:   M numbers, each in [0, N); no two equal unless ``to_host``.
        host:        [M, S, B], the same dtype, contiguous, in pinned memory.
        to_host:     the direction.
        bytes_per_s: at most so many bytes a second; 0: as fast as it goes.
        how:         "kernel" or "copies" to have one of them; "" chooses.

    Returns:
        None, before the copy is done: it is queued on the current stream, on which ``host`` must
        not be touched before it has passed.

    Raises:
        ArgumentError: a shape, dtype, device, id or rate is out of contract.
        BackendError: the CUDA backend cannot run here.

    Cost: M * S * B * element_size bytes over the link.
    """
    native = core()
    if not len(planes):
        raise ArgumentError("planes: at least one wanted, got none")
    first = planes[0]
    if first.dim() != 2 or not first.is_cuda:
        raise ArgumentError(f"planes[0]: [N, B] on a CUDA device wanted, got {list(first.shape)}")
    for s, plane in enumerate(planes):
        if (plane.shape, plane.dtype, plane.device) != (first.shape, first.dtype, first.device):
            raise ArgumentError(f"planes[{s}]: shape, dtype and device of planes[0] wanted")
        contiguous(f"planes[{s}]", plane)
    N, B = first.shape
    for m, block in enumerate(block_ids):
        if not 0 <= block < N:
            raise ArgumentError(f"block_ids: ids in [0, {N}) wanted, entry {m} is {block}")
    if tuple(host.shape) != (len(block_ids), len(planes), B) or host.dtype != first.dtype:
        raise ArgumentError(
            f"host: {first.dtype} of shape {[len(block_ids), len(planes), B]} wanted, "
            f"got {host.dtype} of {list(host.shape)}"
        )
    contiguous("host", host)
    if not host.is_pinned() and host.numel():
        raise ArgumentError("host: pinned memory wanted: torch.empty(..., pin_memory=True)")
    if bytes_per_s < 0 or how not in _HOW:
        raise ArgumentError(f"bytes_per_s: 0 or more, how: one of {list(_HOW)} wanted")
    block_bytes = B * first.element_size()
    addresses = array("q", [plane.data_ptr() for plane in planes])
    ids = array("q", block_ids)
    call = array("q", [addresses.buffer_info()[0], len(planes), ids.buffer_info()[0], len(ids)])
    call.extend([host.data_ptr(), block_bytes, block_bytes, int(to_host), bytes_per_s, _HOW[how]])
    _launch(native.move_blocks, first.device, call.buffer_info()[0])
