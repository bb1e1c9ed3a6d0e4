"""Pieces: memories whose K and V were computed apart, to be put together in any order.

A piece is prefilled behind the system prompt that it will stand behind, a few positions further
on (``GAP``): where the memories before it will stand. Its keys are kept as if every token stood at
position 0, so a piece has no place of its own, and a codec finds channels that do not turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from memos.errors import ArgumentError
from memos.kv.device import home_of
from memos.kv.layer import MemosLayer
from memos.kv.model import layer_kinds, shape_of_model
from memos.kv.positions import Positions, positions_of

# Positions between the system prompt and a piece while it is prefilled.
GAP = 512
_ATTENTION = ("sdpa", "eager")  # those that take a mask of any form

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Piece:
    """K and V of a few tokens, computed behind a system prompt: [1, H, n, D] for every layer.

    ``keys`` stand at position 0, all of them; those of a system prompt at their own positions.
    """

    token_ids: tuple[int, ...]
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]

    def __len__(self) -> int:
        return len(self.token_ids)

    def write_to(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        at: int,
        positions: Positions,
    ) -> None:
        """K and V into the tokens from ``at`` on of [1, H, N, D] tensors, one per layer; the keys
        turned to the positions from there on."""
        span = slice(at, at + len(self))
        for out, own in ((keys, self.keys), (values, self.values)):
            for x, part in zip(out, own, strict=True):
                x[:, :, span] = part
        positions.move_([key[:, :, span] for key in keys], 0, torch.arange(at, at + len(self)))


@dataclass(frozen=True, eq=False)
class StoredPiece:
    """A piece whose blocks are packed, as the store gives them: they are decoded, and their keys
    turned, in one go to where it will stand.

    Args:
        layers: of a restored cache of its tokens, with all of them.
    """

    token_ids: tuple[int, ...]
    layers: Sequence[MemosLayer]

    def __len__(self) -> int:
        return len(self.token_ids)

    def dense(self) -> Piece:
        """The same, decoded."""
        pairs = [layer.dense() for layer in self.layers]
        return Piece(self.token_ids, [key for key, _ in pairs], [value for _, value in pairs])

    def write_to(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        at: int,
        positions: Positions,
    ) -> None:
        """As ``Piece.write_to``."""
        device = keys[0].device
        if home_of(device) != device:
            return self.dense().write_to(keys, values, at, positions)
        first = self.layers[0]
        new = torch.arange(at, at + first.num_packed * first.block_tokens)
        new = new.view(-1, first.block_tokens)
        exact: list[slice] = []
        for i, by in enumerate(positions.rerotations(torch.zeros_like(new), new)):
            span = slice(at, at + len(self))
            exact = self.layers[i].write_to(keys[i][:, :, span], values[i][:, :, span], by)
        for part in exact:
            moved = torch.arange(at + part.start, at + part.stop)
            positions.move_([key[:, :, moved[0] : moved[-1] + 1] for key in keys], 0, moved)
        return None


AnyPiece = Piece | StoredPiece


class Prefiller:
    """Computes pieces with one model.

    Args:
        gap:          positions between the system prompt and a piece. **measured** on SmolLM2 with
            4 pieces of 256 tokens, KL of 0, 5, 15 and 25 % computed anew: gap 0 0.063, 0.052,
            0.040, 0.034; 256 0.052, 0.043, 0.035, 0.029; 512 0.050, 0.043, 0.033, 0.027.
        block_tokens: of the caches that are composed.

    Raises:
        ArgumentError: a model whose keys cannot be moved, with layers that do not attend to all
            tokens before, or with an attention that takes no mask of its own. It is named.
    """

    def __init__(self, model: torch.nn.Module, gap: int = GAP, *, block_tokens: int = 64) -> None:
        self.model: Any = model
        self.name = getattr(model.config, "model_type", type(model).__name__)
        for i, (kind, _) in enumerate(layer_kinds(model.config)):
            if kind != "full_attention":
                raise ArgumentError(
                    f"model: layers of full_attention wanted, got {kind} in layer {i} of "
                    f"{self.name}"
                )
        implementation = getattr(model.config, "_attn_implementation", None)
        if implementation not in _ATTENTION:
            raise ArgumentError(
                f"model: attention {' or '.join(_ATTENTION)} wanted, got {implementation} in "
                f"{self.name}; see model.set_attn_implementation"
            )
        self.shape = shape_of_model(model)
        self.positions: Positions = positions_of(model)
        self.gap, self.block_tokens = gap, block_tokens

    @property
    def device(self) -> Any:
        return getattr(self.model, "device", "cpu")

    def check_length(self, tokens: int) -> None:
        """Raise ArgumentError where so many tokens turn the keys of all tokens differently."""
        limit = self.positions.max_tokens
        if limit is not None and tokens > limit:
            raise ArgumentError(
                f"tokens: at most {limit} wanted, beyond which the RoPE of {self.name} changes its "
                f"frequencies, got {tokens}"
            )

    def system(self, token_ids: Sequence[int]) -> Piece:
        """The system prompt, its keys at positions 0, 1, ...; it may have no tokens."""
        if not token_ids:
            return self._empty()
        cache = DynamicCache()
        self.forward(token_ids, range(len(token_ids)), past_key_values=cache)
        return Piece(tuple(token_ids), *_of(cache, 0))

    def piece(self, system: Piece, token_ids: Sequence[int]) -> Piece:
        """A piece behind the system prompt.

        Cost: a prefill of its tokens.
        """
        if not token_ids:
            raise ArgumentError("memory: at least one token wanted, got none")
        start = self.start(len(system), len(token_ids))
        cache = DynamicCache()
        for i, (key, value) in enumerate(zip(system.keys, system.values, strict=True)):
            if key.shape[2]:
                cache.update(key, value, i)
        at = range(start, start + len(token_ids))
        self.forward(token_ids, at, past_key_values=cache)
        keys, values = _of(cache, len(system))
        self.positions.move_(keys, torch.tensor(at), 0)
        return Piece(tuple(token_ids), keys, values)

    def start(self, system_tokens: int, tokens: int) -> int:
        """The position of a piece's first token while it is prefilled."""
        limit = self.positions.max_tokens
        gap = self.gap if system_tokens else 0
        if limit is not None:
            gap = max(0, min(gap, limit - system_tokens - tokens))
        self.check_length(system_tokens + gap + tokens)
        return system_tokens + gap

    @torch.no_grad()
    def forward(self, token_ids: Sequence[int], at: Sequence[int], **options: Any) -> torch.Tensor:
        """Logits [vocabulary] of the last token of a forward pass at these positions."""
        device = self.device
        out = self.model(
            input_ids=torch.tensor([list(token_ids)], device=device),
            position_ids=torch.tensor([list(at)], device=device),
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def _empty(self) -> Piece:
        def nothing(heads: int, size: int) -> torch.Tensor:
            return torch.empty(1, heads, 0, size, dtype=dtype, device=self.device)

        dtype, layers = getattr(torch, self.shape.dtype), self.shape.stored
        keys = [nothing(layer.num_kv_heads, layer.head_dim_k) for layer in layers]
        return Piece((), keys, [nothing(layer.num_kv_heads, layer.head_dim_v) for layer in layers])


class Slots(Cache):  # type: ignore[misc]
    """K and V of N tokens, of which a forward pass computes some anew, each in its own place.

    Args:
        keys, values: one tensor [1, H, N, D] per layer, changed in place.
        slots: [q] int64: which of them the tokens of the next forward pass are.
    """

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], slots: torch.Tensor
    ) -> None:
        super().__init__(layers=[DynamicLayer() for _ in keys])
        self._keys, self._values, self._slots = keys, values, slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
        *args: Any, **kwargs: Any,
    ) -> Pair:  # fmt: skip
        key, value = self._keys[layer_idx], self._values[layer_idx]
        key.index_copy_(2, self._slots, key_states)
        value.index_copy_(2, self._slots, value_states)
        return key, value


class EnoughError(Exception):
    """A forward pass has gone as far as it has to."""


class Peek(Cache):  # type: ignore[misc]
    """What a forward pass from the first token on computes as K and V of one layer; it ends there.

    The layers before are computed for all tokens, the later ones not at all.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(layer + 1)])
        self._layer = layer
        self.found: Pair | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
        *args: Any, **kwargs: Any,
    ) -> Pair:  # fmt: skip
        if layer_idx == self._layer:
            self.found = key_states, value_states
            raise EnoughError
        return key_states, value_states


def mask_of(slots: torch.Tensor, total: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, q, total] to add to scores: token ``slots[i]`` sees those up to itself."""
    seen = torch.arange(total, device=slots.device) <= slots[:, None]
    lowest = torch.finfo(dtype).min
    return torch.where(seen, 0.0, lowest).to(dtype)[None, None]


def _of(cache: DynamicCache, first: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K and V from token ``first`` on, in memory of their own."""
    layers: Iterator[Any] = iter(cache.layers)
    pairs = [(x.keys[:, :, first:].clone(), x.values[:, :, first:].clone()) for x in layers]
    return [k for k, _ in pairs], [v for _, v in pairs]
