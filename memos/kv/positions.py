"""Which positions a model's keys carry, and how to give them others.

A model with rotary position embeddings turns each key by an angle that grows with its position, so
a key that was computed at one position can be turned on to another (``rotate_positions_``) where
the frequencies do not depend on the position or on the length of the sequence.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from memos.errors import ArgumentError
from memos.kernels.rerotation import Rerotation
from memos.kernels.rope import rotate_positions_
from memos.kv.model import layer_kinds
from memos.kv.weights import canonical

# RoPE types as transformers names them whose frequencies are the same for every position.
ALLOWED = ("default", "linear", "dynamic", "yarn", "llama3", "proportional")
_WHY_NOT = {
    "longrope": "its frequencies change with the length of the sequence",
    "mrope": "its positions have several axes",
}
_PROBE = 7  # the position that a model is asked for: far from 0 for the fast frequencies
_PROBE_TOKEN = 1
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


_Alike = tuple[int, bool, int]


@dataclass(frozen=True, eq=False)
class Turning:
    """How the keys of a layer turn: channels [first, first + 2 R) with frequencies [R] float32,
    in pairs (2i, 2i + 1) if ``interleaved``, else (i, i + R)."""

    inv_freq: torch.Tensor
    interleaved: bool = False
    first: int = 0

    @property
    def alike(self) -> _Alike:
        """Equal where layers turn by the same angles."""
        return id(self.inv_freq), self.interleaved, self.first

    def of(self, key: torch.Tensor) -> torch.Tensor:
        """The channels of a key that turn, a view."""
        return key[..., self.first : self.first + 2 * len(self.inv_freq)]


@dataclass(frozen=True, eq=False)
class Positions:
    """How every layer of a model that has keys turns them; None: a layer without positions.

    Args:
        layers:     in the model's order, layers without a cache left out.
        max_tokens: in longer sequences the frequencies are others (dynamic RoPE); None: no limit.
    """

    layers: tuple[Turning | None, ...]
    max_tokens: int | None = None

    def move_(
        self,
        keys: Sequence[torch.Tensor],
        old: torch.Tensor | int,
        new: torch.Tensor | int,
    ) -> None:
        """Turn keys from their old positions on to new ones, in place.

        Args:
            keys:     one tensor [B, H, T, D] per layer, all on one device.
            old, new: [T] int64 positions, or one position for all tokens.
        """
        if len(keys) != len(self.layers):
            raise ArgumentError(f"keys: {len(self.layers)} layers wanted, got {len(keys)}")
        T = keys[0].shape[2]
        positions = [
            p if isinstance(p, torch.Tensor) else torch.full((T,), p, dtype=torch.int64)
            for p in (old, new)
        ]
        groups: dict[_Alike, tuple[Turning, list[torch.Tensor]]] = {}
        for key, turning in zip(keys, self.layers, strict=True):
            if turning is not None:
                groups.setdefault(turning.alike, (turning, []))[1].append(turning.of(key))
        for turning, parts in groups.values():
            rotate_positions_(
                parts, positions[0], positions[1], turning.inv_freq, turning.interleaved
            )

    def rerotations(self, old: torch.Tensor, new: torch.Tensor) -> list[Rerotation | None]:
        """For ``unpack_kv``, one per layer: those that turn alike share one.

        Args:
            old, new: [M, P] int64, positions of the tokens of M blocks.
        """
        made: dict[_Alike, Rerotation] = {}
        for turning in self.layers:
            if turning is not None and turning.alike not in made:
                made[turning.alike] = Rerotation(
                    old, new, turning.inv_freq, turning.interleaved, turning.first
                )
        return [None if turning is None else made[turning.alike] for turning in self.layers]


_known: weakref.WeakKeyDictionary[Any, tuple[str, Positions]] = weakref.WeakKeyDictionary()


def positions_of(model: torch.nn.Module) -> Positions:
    """How a model turns its keys: read off its config and rotary modules, and checked on it.

    The model computes one token at two positions; in every layer the keys must differ by exactly
    the turn that this says, or else it is refused. Once per model.

    Raises:
        ArgumentError: the model has no rotary embedding, one whose frequencies depend on the
            position, or keys that turn in another way. It is named.

    Cost: the first call one forward pass of two tokens.
    """
    text = canonical(_rope_fields(model.config))
    known = _known.get(model)
    if known is None or known[0] != text:
        known = _known[model] = (text, _found(model))
    return known[1]


def check_types(config: Any) -> None:
    """Raise ArgumentError where a config names a RoPE type that does not allow other positions."""
    name = getattr(config, "model_type", type(config).__name__)
    for rope in _parameters(config.get_text_config(decoder=True)):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if "mrope_section" in rope or kind == "mrope":
            kind = "mrope"
        if kind not in ALLOWED:
            why = _WHY_NOT.get(kind, "how it turns keys is not known here")
            raise ArgumentError(
                f"model: RoPE of type {', '.join(ALLOWED)} wanted, got {kind} in {name}: {why}"
            )


def _rope_fields(config: Any) -> list[Any]:
    text = config.get_text_config(decoder=True)
    return [_plain(rope) for rope in _parameters(text)] + [text.model_type]


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): v if isinstance(v, int | float | str) else repr(v) for k, v in rope.items()}


def _parameters(text: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a config: one dict, or one per type of layer."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    return nested or [rope]


def _found(model: torch.nn.Module) -> Positions:
    from memos.kv.model import shape_of_model

    check_types(model.config)
    name = getattr(model.config, "model_type", type(model).__name__)
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ArgumentError(f"model: rotary positions wanted, got {name}, which takes none")
    kinds = [kind for kind, _ in layer_kinds(model.config)]
    candidates = list(_candidates(model))
    if not candidates:
        raise ArgumentError(f"model: a rotary position embedding wanted, got none in {name}")
    keys = _probed(model, len(kinds))
    layers = []
    for i, (kind, key) in enumerate(zip(kinds, keys, strict=True)):
        if kind == "dummy":
            continue
        if key is None:
            raise ArgumentError(f"model: keys in layer {i} wanted, got none in {name}")
        fits = _fitting(key, candidates)
        if fits is None:
            raise ArgumentError(
                f"model: keys that turn with their position wanted, got others in layer {i} of "
                f"{name}"
            )
        layers.append(fits[0])
    if all(layer is None for layer in layers):
        raise ArgumentError(f"model: a rotary position embedding wanted, got none in {name}")
    return Positions(tuple(layers), shape_of_model(model).max_tokens)


def _candidates(model: torch.nn.Module) -> Iterator[Turning]:
    """Every way in which the rotary modules of a model could turn a key."""
    seen: set[bytes] = set()
    for module in model.modules():
        for frequencies in _frequencies(module):
            data = frequencies.detach().float().cpu().contiguous()
            if data.dim() != 1 or not len(data) or (mark := data.numpy().tobytes()) in seen:
                continue
            seen.add(mark)
            for interleaved in (False, True):
                yield Turning(data, interleaved)
                yield Turning(data, interleaved, -1)  # the last channels


def _frequencies(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    named = dict(module.named_buffers(recurse=False))
    for name, buffer in named.items():
        if not name.endswith("inv_freq") or "original" in name:
            continue
        # What a dynamic embedding starts from; a long sequence may have changed the other.
        prefix = name.removesuffix("inv_freq")
        yield named.get(f"{prefix}original_inv_freq", buffer)


@torch.no_grad()
def _probed(model: torch.nn.Module, num_layers: int) -> list[torch.Tensor | None]:
    """[2, H, D] keys of every layer: of one token alone, at position 0 and at _PROBE."""
    device = getattr(model, "device", "cpu")
    cache = DynamicCache()
    model(
        input_ids=torch.full((2, 1), _PROBE_TOKEN, device=device),
        position_ids=torch.tensor([[0], [_PROBE]], device=device),
        past_key_values=cache,
        use_cache=True,
    )
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    keys += [None] * (num_layers - len(keys))
    return [None if key is None or not key.numel() else key[:, :, 0] for key in keys]


def _fitting(key: torch.Tensor, candidates: Sequence[Turning]) -> tuple[Turning | None] | None:
    """The candidate that turns the first key into the second; (None,) where both are the same."""
    start, want = key.float().cpu()
    room = _TOLERANCE[key.dtype] * float(want.abs().max())
    if float((start - want).abs().max()) <= room:
        return (None,)
    best: tuple[float, Turning] | None = None
    for candidate in candidates:
        width = 2 * len(candidate.inv_freq)
        if width > start.shape[-1]:
            continue
        first = start.shape[-1] - width if candidate.first < 0 else 0
        if candidate.first < 0 and not first:
            continue
        got = start[None, :, None].clone()
        at = torch.tensor([0]), torch.tensor([_PROBE])
        part = got[..., first : first + width]
        rotate_positions_([part], *at, candidate.inv_freq, candidate.interleaved)
        error = float((got[0, :, 0] - want).abs().max())
        if best is None or error < best[0]:
            best = error, dataclasses.replace(candidate, first=first)
    return (best[1],) if best is not None and best[0] <= room else None
