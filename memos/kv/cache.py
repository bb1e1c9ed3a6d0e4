"""A transformers Cache whose past is packed and shared, and which knows its tokens."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from memos.errors import ArgumentError
from memos.kernels.codec import Codec
from memos.kv.layer import MemosLayer
from memos.kv.model import layer_kinds

__all__ = ["MemosCache", "MemosLayer", "common_prefix", "token_list"]


class MemosCache(Cache):  # type: ignore[misc]
    """KV cache of a decoder-only model: the past packed by a codec, first and last tokens exact.

    A drop-in for ``DynamicCache`` in ``model(...)`` and ``model.generate(...)``: greedy, sampling,
    beams, num_return_sequences, prompt lookup and chunked prefill give the tokens that an exact
    cache of the same values gives. With codec raw those are the tokens of ``DynamicCache``.

    Layers of type full_attention are packed. Sliding layers stay exact: as transformers' own, or,
    with ``window_history``, as packed layers that keep what left the window, so that the cache
    can be stored. Every other type of layer is refused by name.

    It knows its tokens as far as it was told (``inputs``, ``set_tokens``): ``known_tokens`` of
    them are certain. Rows that were repeated, selected or reordered are certain up to there.
    Continue a cache that holds tokens with what ``inputs(full_ids)`` returns: transformers itself
    compares no ids, and answers wrongly and without an error when they do not fit the cache.

    Ownership: ``copy()`` is cheap and shares the packed blocks; ``generate`` changes the cache
    that it is given, so give it a copy of one that you keep. Not thread-safe.

    Args:
        config:        the model's config, a dict with num_layers, or a ModelShape.
        codec:         a codec or its name.
        block_tokens:  P, tokens per packed block.
        sink_tokens:   the first tokens, kept exact; none with a codec that loses nothing.
        recent_tokens: at least so many last tokens stay exact.

    Raises:
        ArgumentError: the model has layers of another type; a number is out of range.
    """

    def __init__(
        self,
        config: Any,
        codec: str | Codec = "int4",
        *,
        block_tokens: int = 64,
        sink_tokens: int = 2,
        recent_tokens: int = 64,
        window_history: bool = False,
    ) -> None:
        self.codec = Codec.parse(codec)
        if block_tokens < 1:
            raise ArgumentError(f"block_tokens: at least 1 wanted, got {block_tokens}")
        if not 0 <= sink_tokens < block_tokens:
            raise ArgumentError(
                f"sink_tokens: 0 to block_tokens - 1 = {block_tokens - 1} wanted, got {sink_tokens}"
            )
        if recent_tokens < 0:
            raise ArgumentError(f"recent_tokens: at least 0 wanted, got {recent_tokens}")
        self.block_tokens, self.sink_tokens = block_tokens, sink_tokens
        layers: list[Any] = []
        for kind, window in layer_kinds(config):
            if kind == "dummy":
                layers.append(DummyLayer())
            elif window is None or window_history:
                layers.append(
                    MemosLayer(self.codec, block_tokens, sink_tokens, recent_tokens, window)
                )
            else:
                layers.append(DynamicSlidingWindowLayer(sliding_window=window))
        super().__init__(layers=layers)
        self._adapters: _Adapters | None = None
        self._forget()

    def _forget(self) -> None:
        self.token_ids: list[int] = []  # of the first tokens; may name tokens still to come
        self._branch: int | None = None  # rows were mixed at this length
        self._awaited: int | None = None  # the length that inputs() prepared

    def computed_under(self, adapters: Callable[[], str]) -> None:
        """Refuse forward passes under other adapters than ``adapters()`` names now."""
        self._adapters = _Adapters(adapters)

    # Tokens.

    @property
    def known_tokens(self) -> int:
        """How many of the first tokens have certain ids."""
        known = min(len(self.token_ids), int(self.get_seq_length()))
        return known if self._branch is None else min(known, self._branch)

    @property
    def is_mixed(self) -> bool:
        """Whether rows were repeated, selected or reordered, as beam search does."""
        return self._branch is not None

    def set_tokens(self, token_ids: Any) -> None:
        """Say which tokens a cache of one row holds: after generate, its returned sequence.

        Args:
            token_ids: at least as many ids as the cache holds tokens; a list or a tensor.

        Raises:
            ArgumentError: they contradict what is known, or are too few, or the cache has rows.
        """
        ids, length = token_list(token_ids), self.get_seq_length()
        if self.batch_size > 1:
            raise ArgumentError(f"cache: one row wanted to set its tokens, got {self.batch_size}")
        if self._branch is not None:
            raise ArgumentError(
                f"cache: rows were mixed at token {self._branch}, so which tokens row 0 holds "
                "behind it is not certain; store the prompt only"
            )
        if len(ids) < length:
            raise ArgumentError(f"token_ids: {length} ids wanted as in the cache, got {len(ids)}")
        known = self.known_tokens
        if (same := common_prefix(self.token_ids[:known], ids)) < known:
            raise ArgumentError(
                f"token_ids: the ids of the cached tokens wanted, got {ids[same]} at position "
                f"{same} where the cache holds {self.token_ids[same]}"
            )
        self.token_ids = ids

    def inputs(self, token_ids: Any) -> dict[str, Any]:
        """generate's arguments to continue this cache with a full prompt.

        Crops the cache to the prefix that it shares with the prompt, at most one token less than
        the prompt, so that generate always has a token to compute. Give generate exactly this:
        the full ids and the full mask. (Only new ids without a full-length mask, or ids that a
        DynamicCache holds already, make transformers answer wrongly without an error.)

        One call of generate per call of ``inputs``; it changes this cache. Assisted decoding and
        prompt lookup feed the whole prompt again (transformers 5.23), so the past is dropped when
        they begin: right, but nothing is saved.

        Args:
            token_ids: the whole prompt of one row, a list or a tensor [n] or [1, n], n >= 1.

        Returns:
            input_ids [1, n], attention_mask [1, n] of ones, past_key_values: this cache.

        Raises:
            ArgumentError: the cache holds tokens whose ids it does not know.
        """
        ids, length = token_list(token_ids), self.get_seq_length()
        if not ids:
            raise ArgumentError("token_ids: at least one token wanted, got none")
        if length and not self.known_tokens:
            raise ArgumentError(
                f"cache: known tokens wanted, got {length} tokens with unknown ids; call "
                "set_tokens(ids) with what was fed to the model"
            )
        keep = min(common_prefix(self.token_ids[: self.known_tokens], ids), len(ids) - 1)
        if keep < length:
            self.crop(keep - length)
        self.token_ids, self._branch, self._awaited = ids, None, len(ids)
        device = token_ids.device if isinstance(token_ids, torch.Tensor) else self._device()
        input_ids = torch.tensor([ids], dtype=torch.long, device=device)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "past_key_values": self,
        }

    # What transformers calls.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
        *args: Any, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if self._awaited is not None:
            self._check_awaited(layer_idx, key_states.shape[-2])
        if self._adapters is not None:
            self._adapters.check()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def _check_awaited(self, layer_idx: int, count: int) -> None:
        assert self._awaited is not None
        past = self.layers[layer_idx].get_seq_length()
        if past + count > self._awaited:
            raise ArgumentError(
                f"input_ids: the {self._awaited - past} tokens behind the cached {past} wanted, as "
                f"inputs() prepared them, got {count}; pass inputs unchanged to generate, and only "
                f"input_ids[:, {past}:] to the model itself"
            )
        if past + count == self._awaited and layer_idx == self._last_layer:
            self._awaited = None

    @property
    def _last_layer(self) -> int:
        return max(i for i, layer in enumerate(self.layers) if not isinstance(layer, DummyLayer))

    def activate_past_recording(self) -> None:
        """Called when assisted decoding begins: see ``inputs``."""
        if self._awaited is not None and self.get_seq_length():
            warnings.warn(
                f"assisted decoding feeds the whole prompt again: {self.get_seq_length()} cached "
                "tokens are not used",
                stacklevel=2,
            )
            super().reset()
        self._awaited = None
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, also out of packed blocks.

        Raises:
            ArgumentError: transformers' own sliding layers have dropped tokens already.
        """
        for layer in self.layers if tokens_to_remove < 0 else ():
            if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
                window = layer.sliding_window
                if layer.is_initialized and layer.get_seq_length() >= window:
                    raise ArgumentError(
                        f"tokens_to_remove: 0 wanted, since sliding layers have dropped all but "
                        f"{window - 1} tokens, got {tokens_to_remove}; make the cache with "
                        "window_history=True"
                    )
        super().crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        length = self.get_seq_length()
        self._awaited = None
        self.token_ids = self.token_ids[:length]
        if self._branch is not None and length <= self._branch:
            self._branch = None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row ``beam_idx[i]``; which tokens rows hold from here on is unknown."""
        super().reorder_cache(beam_idx)
        self._mix()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; the packed blocks are shared."""
        super().batch_repeat_interleave(repeats)
        self._mix()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._mix()

    def _mix(self) -> None:
        length = self.get_seq_length()
        self._branch = length if self._branch is None else min(self._branch, length)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 while the cache is empty."""
        for layer in self.layers:
            if isinstance(layer, MemosLayer):
                if layer.is_initialized:
                    return int(layer.batch_size)
            elif not isinstance(layer, DummyLayer) and layer.is_initialized:
                return int(layer.keys.shape[0])
        return -1

    # Copies and sizes.

    @property
    def stored_layers(self) -> list[Any]:
        """The layers that hold K and V."""
        return [layer for layer in self.layers if not isinstance(layer, DummyLayer)]

    def copy(self) -> MemosCache:
        """A cache of the same tokens that shares every packed block; neither changes the other."""
        other = copy.copy(self)
        other.layers = [
            x.copy() if isinstance(x, MemosLayer) else copy.copy(x) for x in self.layers
        ]
        other.token_ids = list(self.token_ids)
        return other

    def repeated(self, batch: int) -> MemosCache:
        """A copy with its one row ``batch`` times, for num_return_sequences or num_beams.

        Unlike after ``batch_repeat_interleave`` its rows stay known: generate without beams
        returns row i's tokens as sequence i.
        """
        other = self.copy()
        for layer in other.layers:
            layer.batch_repeat_interleave(batch)
        return other

    def row(self, index: int) -> MemosCache:
        """A copy of one row, which keeps what is known of it."""
        other = self.copy()
        for layer in other.layers:
            layer.batch_select_indices(torch.tensor([index]))
        return other

    def dense(self) -> DynamicCache:
        """An exact cache of the same values in fresh memory."""
        result = DynamicCache()
        result.layer_class_to_replicate = None
        for layer in self.layers:
            twin: Any = copy.copy(layer)
            if isinstance(layer, MemosLayer):
                if layer.sliding_window is None:
                    twin = DynamicLayer()
                else:
                    twin = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
                if layer.is_initialized:
                    first, length = layer.get_mask_sizes(0)[1], layer.get_seq_length()
                    twin.update(*layer.dense(first))
                    if layer.is_sliding:
                        twin.cumulative_length = length
            result.layers.append(twin)
        return result

    def packed_bytes(self) -> int:
        """Bytes that this cache holds; a block shared by rows counts once."""
        blocks, total = {}, 0
        for layer in self.stored_layers:
            if isinstance(layer, MemosLayer):
                for row in layer.blocks:
                    blocks.update(dict.fromkeys(row.addresses, row[0].nbytes if row else 0))
                total += layer.exact_bytes()
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total + sum(blocks.values())

    def dense_bytes(self) -> int:
        """Bytes that a DynamicCache of the same tokens holds."""
        total = 0
        for layer in self.stored_layers:
            if isinstance(layer, MemosLayer):
                visible, _ = layer.get_mask_sizes(0)
                for x in layer.tail or ():
                    total += x.shape[0] * x.shape[1] * visible * x.shape[3] * x.element_size()
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    def _device(self) -> torch.device | str:
        for layer in self.stored_layers:
            if layer.is_initialized:
                return torch.device(layer.device)
        return "cpu"

    @classmethod
    def from_cache(
        cls, cache: Any, config: Any, token_ids: Any = None, **options: Any
    ) -> MemosCache:
        """A MemosCache of the values of another exact transformers cache.

        Args:
            cache: DynamicCache or StaticCache, in which no sliding layer has lost tokens.
            config: of its model; token_ids: of its tokens, if one row is to know them.
            options: as the constructor takes them.

        Raises:
            ArgumentError: a layer that does not hold the exact K and V of all its tokens.
        """
        result = cls(config, **options)
        theirs = getattr(cache, "layers", None)
        if theirs is None or len(theirs) != len(result.layers):
            raise ArgumentError(
                f"cache: a transformers Cache of {len(result.layers)} layers wanted, got "
                f"{type(cache).__name__}" + ("" if theirs is None else f" of {len(theirs)}")
            )
        for i, (layer, source) in enumerate(zip(result.layers, theirs, strict=True)):
            if not isinstance(layer, DummyLayer) and source.get_seq_length():
                layer.update(*_exact(source, i))
                layer.composed_from = getattr(source, "composed_from", None)
        if token_ids is not None:
            result.set_tokens(token_ids)
        return result


class _Adapters:
    """The adapters that a cache is made under. Copies of the cache share it."""

    def __init__(self, now: Callable[[], str]) -> None:
        self._now, self._wanted = now, now()

    def check(self) -> None:
        if (got := self._now()) != self._wanted:
            raise ArgumentError(
                f"cache: a forward pass under adapters {self._wanted or 'none'!r} wanted, as its "
                f"K and V were made, got {got or 'none'!r}; begin the turn inside the same use()"
            )

    def __deepcopy__(self, memo: Any) -> _Adapters:
        return self  # it leads to the model

    def __reduce__(self) -> Any:
        return type(None), ()


def _exact(layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = int(layer.get_seq_length())
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        if layer.keys.shape[2] == length:
            return layer.keys, layer.values
    elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
        if length <= layer.keys.shape[2]:
            return layer.keys[:, :, :length], layer.values[:, :, :length]
    elif isinstance(layer, MemosLayer):
        return layer.dense()
    raise ArgumentError(
        f"cache: exact K and V of all {length} tokens wanted, got a {type(layer).__name__} in "
        f"layer {index}, which does not hold them; use MemosCache from the first token on"
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def token_list(token_ids: Any) -> list[int]:
    """Token ids of one row as a list: from a list, or a tensor or array [n] or [1, n].

    Raises:
        ArgumentError: no integers, or more than one row.
    """
    if hasattr(token_ids, "tolist"):
        shape = tuple(token_ids.shape)
        if len(shape) == 2 and shape[0] == 1:
            token_ids = token_ids[0]
        elif len(shape) != 1:
            raise ArgumentError(f"token_ids: shape [n] or [1, n] wanted, got {list(shape)}")
        token_ids = token_ids.tolist()
    if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
        raise ArgumentError(
            f"token_ids: a list or tensor of ints wanted, got {type(token_ids).__name__}"
        )
    ids = list(token_ids)
    if set(map(type, ids)) - {int}:
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise ArgumentError(f"token_ids: ints wanted: {error}") from None
    if ids and min(ids) < 0:
        raise ArgumentError(f"token_ids: ints of at least 0 wanted, got {min(ids)}")
    return ids
