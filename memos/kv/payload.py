"""Stored payloads <-> a MemosCache. The bytes are those of docs/format/kv-frame.md.

Block: pack_kv's [L, E] bytes; block 0 of a lossy codec then holds the exact sinks. Sinks and tails
are exact tokens: per layer K [H, n, Dk], then V [H, n, Dv], in the model's dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from memos.errors import ArgumentError
from memos.kernels.codec import Codec
from memos.kernels.kv import PackedRows, pack_kv, unpack_kv
from memos.kv._lanes import stacked
from memos.kv.cache import MemosCache
from memos.kv.device import home_of
from memos.kv.device_pools import BlockPool
from memos.kv.identity import KVIdentity
from memos.kv.layer import MemosLayer, Pair, encode_blocks

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_cache(
    cache: MemosCache,
    payloads: Sequence[memoryview],
    tail: memoryview | None,
    identity: KVIdentity,
    device: torch.device | str,
    pool: BlockPool | None = None,
    keys: Sequence[bytes] = (),
) -> None:
    """Fill an empty cache with stored blocks and a stored tail.

    On the host blocks are not copied: the cache reads the payloads' memory, which must never
    change. To a GPU all blocks and layers go in one copy.

    Args:
        cache:    made for this identity, with ``window_history``.
        payloads: of blocks 0, 1, ...; tail: of the tokens behind them, or None.
        device:   of the model.
        pool:     of blocks on that device, which has some of them perhaps, and gets the others;
            keys: of the payloads.
    """
    layers = cache.stored_layers
    L, block_bytes = len(layers), identity.block_bytes()
    packed = packed_rows(payloads, identity)
    home = home_of(torch.device(device))
    if packed and pool is not None:
        packed = pool.through(keys, packed)
    elif packed and home.type != "cpu":
        packed = list(stacked(packed, home))
    blocks = PackedRows.split_layers(packed, L)
    sinks: Sequence[Pair | None] = [None] * L
    if payloads and identity.sink_bytes():
        sinks = _exact(payloads[0][block_bytes:], identity, device)
    tails = _exact(tail or b"", identity, device)
    for i, layer in enumerate(layers):
        layer.load(blocks[i], sinks[i], tails[i])


def packed_rows(payloads: Sequence[memoryview], identity: KVIdentity) -> list[torch.Tensor]:
    """The packed bytes of full blocks, uint8 [L, E] each, over the payloads' memory."""
    size, L = identity.block_bytes(), identity.num_layers
    return [_shared(payload, size).view(L, -1) for payload in payloads]


def block_payloads(cache: MemosCache, first: int, last: int) -> list[memoryview]:
    """Payloads of blocks [first, last) of a cache of one row.

    Packed bytes are passed on as they are; blocks still in the tails are packed, layers of one
    kind in one call. The caller has checked that these tokens are storable.
    """
    layers = cache.stored_layers
    parts: list[list[torch.Tensor]] = [[] for _ in layers]  # [L][last - first], [1, E] each
    whole: dict[int, torch.Tensor] = {}  # blocks that came out of pack_kv with all layers
    kinds: dict[tuple[int, torch.device], list[int]] = {}
    for i, layer in enumerate(layers):
        parts[i] += _on_host(layer.blocks[0][first:last])
        kinds.setdefault((layer.num_packed, layer.device), []).append(i)
    for (num_packed, _), members in kinds.items():
        start = max(first, num_packed)
        if start >= last:
            continue
        P = cache.block_tokens
        span = slice((start - num_packed) * P, (last - num_packed) * P)
        tails = [layers[i].tail for i in members]
        keys, values = ([t[j][0, :, span] for t in tails] for j in (0, 1))
        packed = encode_blocks(keys, values, P, cache.codec)
        if packed.device.type != "cpu":
            (packed,) = stacked([packed], torch.device("cpu"))
        for j, i in enumerate(members):
            parts[i].extend(packed[:, j : j + 1].unbind(0))
        if len(members) == len(layers):
            whole.update({start + n: block for n, block in enumerate(packed)})
    payloads = []
    for n in range(first, last):
        block = whole.get(n)
        if block is None:
            block = torch.cat([part[n - first] for part in parts])
        if n == 0 and layers[0].sink_tokens:
            sinks_of = [_sinks(layer) for layer in layers]
            block = torch.cat([block.flatten(), _flat(sinks_of)])
        payloads.append(_view(block))
    return payloads


def tail_payload(cache: MemosCache, start: int, count: int) -> memoryview:
    """Payload of the exact tokens [start, start + count) of a cache of one row."""
    pairs = []
    for layer in cache.stored_layers:
        first = start - layer.num_packed * layer.block_tokens
        pairs.append(tuple(x[:, :, first : first + count] for x in layer.tail))
    return _view(_flat(pairs))


def recoded(
    payloads: Sequence[memoryview], first: int, identity: KVIdentity, other: KVIdentity
) -> list[memoryview]:
    """Payloads of blocks first, first + 1, ... decoded, and encoded by the codec of ``other``.

    Exact sinks stay as they are, bit by bit, and are what is encoded in their place.

    Cost: reads and writes every block once; holds them decoded.
    """
    L, P, H, n = identity.num_layers, identity.block_tokens, identity.num_kv_heads, len(payloads)
    dtype, block_bytes = _DTYPES[identity.dtype], identity.block_bytes()
    widths = (identity.head_dim_k, identity.head_dim_v)
    keys, values = ([torch.empty(n, P, H, D, dtype=dtype) for _ in range(L)] for D in widths)
    rows = PackedRows(_shared(p, block_bytes).view(L, -1) for p in payloads)
    ids = torch.arange(n)
    unpack_kv(keys, values, ids, rows, Codec.parse(identity.codec))
    sinks: list[torch.Tensor] = []
    if first == 0 and other.sink_bytes():
        S = other.sink_tokens
        if identity.sink_bytes():
            exact = _exact(payloads[0][block_bytes:], identity, "cpu")
            for layer, pair in enumerate(exact):
                keys[layer][0, :S], values[layer][0, :S] = (x[0].transpose(0, 1) for x in pair)
        pairs = [(k[0, :S], v[0, :S]) for k, v in zip(keys, values, strict=True)]
        sinks = [_flat([[x.transpose(0, 1) for x in pair] for pair in pairs])]
    packed = pack_kv(keys, values, ids, Codec.parse(other.codec))
    return [
        _view(torch.cat([row.flatten(), *sinks]) if sinks and not i else row)
        for i, row in enumerate(packed)
    ]


def check_cache(cache: MemosCache, identity: KVIdentity) -> None:
    """Raise ArgumentError unless the K and V of this cache are of this identity."""
    layers = cache.stored_layers
    if len(layers) != identity.num_layers:
        raise ArgumentError(f"cache: {identity.num_layers} layers wanted, got {len(layers)}")
    wanted = [
        identity.num_kv_heads,
        identity.head_dim_k,
        identity.head_dim_v,
        _DTYPES[identity.dtype],
    ]
    for i, layer in enumerate(layers):
        got = dims_of(layer)
        if got != wanted:
            raise ArgumentError(
                f"cache: [KV heads, head_dim of K, of V, dtype] {wanted} wanted as the memory was "
                f"made for, got {got} in layer {i}; pass model= or say it in model_config"
            )


def dims_of(layer: MemosLayer) -> list[object]:
    """[KV heads, head size of K, of V, dtype] of what a layer holds."""
    assert layer.tail is not None
    key, value = layer.tail
    return [key.shape[1], key.shape[3], value.shape[3], key.dtype]


def _on_host(rows: PackedRows) -> list[torch.Tensor]:
    """The rows, in one copy where they are on a device."""
    if rows.device not in (None, torch.device("cpu")):
        return list(stacked(rows, torch.device("cpu")))
    return list(rows)


def _sinks(layer: MemosLayer) -> Pair:
    pair = layer.sinks or layer.tail
    assert pair is not None
    return pair[0][:, :, : layer.sink_tokens], pair[1][:, :, : layer.sink_tokens]


def _exact(
    data: memoryview | bytes, identity: KVIdentity, device: torch.device | str
) -> list[Pair]:
    """Exact tokens of every layer, [1, H, n, D] each, in memory of their own."""
    L, H = identity.num_layers, identity.num_kv_heads
    Dk, Dv = identity.head_dim_k, identity.head_dim_v
    whole = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )
    if data and torch.device(device).type == "cuda":
        whole = whole.pin_memory()
    rows = whole.view(_DTYPES[identity.dtype]).to(device, non_blocking=True).view(L, -1)
    n = rows.shape[1] // (H * (Dk + Dv))
    split = H * n * Dk
    return [(row[:split].view(1, H, n, Dk), row[split:].view(1, H, n, Dv)) for row in rows]


def _flat(pairs: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """The bytes of K, V, K, V, ... as one uint8 tensor on the host."""
    flat = torch.cat([x.detach().reshape(-1) for pair in pairs for x in pair])
    return flat.cpu().view(torch.uint8)


def _shared(payload: memoryview, size: int) -> torch.Tensor:
    """The first ``size`` bytes as a tensor over the same memory, which it keeps alive.

    torch.frombuffer warns about read-only memory, so it gets the address as ctypes sees it.
    """
    array: Any = (ctypes.c_ubyte * size).from_address(_address(payload))
    array.owner = payload
    return torch.frombuffer(array, dtype=torch.uint8)


def _address(payload: memoryview) -> int:
    address: int = numpy.frombuffer(payload, numpy.uint8).ctypes.data
    return address


def _view(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.detach().contiguous().view(-1).numpy()
    return memoryview(data)
