"""What a compressed session must hold, computed the long way."""

from __future__ import annotations

from typing import Any

import torch

from memos.kernels.codec import Codec
from memos.kernels.kv import pack_kv, unpack_kv

Layers = list[tuple[torch.Tensor, torch.Tensor]]


def dense(cache: Any) -> Layers:
    """K and V of every layer as attention reads them, [1, H, n, D] each."""
    return [layer.dense() for layer in cache.stored_layers]


def once_more(layers: Layers, codec: str, P: int, sinks: int) -> Layers:
    """The same after whole blocks were encoded by a codec; the first tokens and the tail exact."""
    found = []
    for pair in layers:
        out = tuple(x.clone() for x in pair)
        for i in range(pair[0].shape[2] // P):
            span = slice(i * P, (i + 1) * P)
            k, v = ([x[:, :, span].transpose(1, 2).contiguous()] for x in pair)
            k_out, v_out = [torch.empty_like(k[0])], [torch.empty_like(v[0])]
            one = torch.zeros(1, dtype=torch.int64)
            unpack_kv(k_out, v_out, one, pack_kv(k, v, one, Codec.parse(codec)), Codec.parse(codec))
            for x, new in zip(out, (k_out[0], v_out[0]), strict=True):
                x[:, :, span] = new.transpose(1, 2)
        for x, exact in zip(out, pair, strict=True):
            if x.shape[2] >= P:
                x[:, :, :sinks] = exact[:, :, :sinks]
        found.append((out[0], out[1]))
    return found


def same(a: Layers, b: Layers) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )
