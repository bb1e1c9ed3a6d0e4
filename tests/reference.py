"""The slow obvious version of a packed cache: dense tensors, old blocks replaced in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from memos.kernels import pack_kv, unpack_kv
from memos.kernels.codec import Codec
from memos.kv.model import layer_kinds


class ReferenceLayer(DynamicLayer):
    """Keeps every token dense; replaces old blocks by ``decode(encode(block))`` once, at the
    moments at which MemosLayer packs them, and shows the window only, if there is one."""

    def __init__(
        self, codec: Codec, P: int, sinks: int, recent: int, window: int | None = None
    ) -> None:
        super().__init__()
        self.codec, self.P = codec, P
        self.num_sinks = 0 if codec.lossless else sinks
        self.window, self.is_sliding = window, window is not None
        self.recent = max(recent, (window or 1) - 1)
        self.num_packed = 0

    @property
    def full_keys(self) -> torch.Tensor:
        return self.keys

    @property
    def full_values(self) -> torch.Tensor:
        return self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.get_mask_sizes(0)[1]
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = keys.clone(), values.clone()
        while self.keys.shape[2] - self.num_packed * self.P >= self.recent + self.P:
            self.replace(self.num_packed * self.P)
            self.num_packed += 1
        return keys[:, :, first:], values[:, :, first:]

    def replace(self, start: int) -> None:
        spare = slice(start + (self.num_sinks if start == 0 else 0), start + self.P)
        for b in range(self.keys.shape[0]):
            key, value = (
                x[b, :, start : start + self.P].transpose(0, 1).clone()[None]
                for x in (self.keys, self.values)
            )
            zero = torch.zeros(1, dtype=torch.int64)
            packed = pack_kv([key], [value], zero, self.codec)
            unpack_kv([key], [value], zero, packed, self.codec)
            offset = spare.start - start
            self.keys[b, :, spare] = key[0, offset:].transpose(0, 1)
            self.values[b, :, spare] = value[0, offset:].transpose(0, 1)

    def crop(self, tokens_to_remove: int) -> None:
        length = max(self.get_seq_length() + tokens_to_remove, 0)
        if length == 0:
            self.reset()
        elif self.is_initialized:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
            self.num_packed = min(self.num_packed, length // self.P)

    def reset(self) -> None:
        super().reset()
        self.num_packed = 0

    def get_seq_length(self) -> int:
        return 0 if not self.is_initialized or self.keys.dim() < 4 else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.get_seq_length()
        first = 0 if self.window is None else max(length - self.window + 1, 0)
        return length - first + query_length, first

    def get_max_length(self) -> int:
        return self.window or -1


def reference_cache(
    config: Any, codec: str, P: int, sinks: int, recent: int, history: bool = False
) -> Cache:
    """What MemosCache is meant to equal, bit for bit."""
    layers: list[Any] = []
    for _, window in layer_kinds(config):
        if window is None or history:
            layers.append(ReferenceLayer(Codec.parse(codec), P, sinks, recent, window))
        else:
            layers.append(DynamicSlidingWindowLayer(sliding_window=window))
    return Cache(layers=layers)
