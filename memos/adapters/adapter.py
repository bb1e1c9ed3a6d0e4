"""What an adapter is: low-rank factors by the name of the linear layer they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_RANK = 512


@dataclass(frozen=True)
class Factors:
    """Of one linear layer: ``y += scale * (x @ down.T) @ up.T``.

    Args:
        down:  [R, I], PEFT's lora_A.
        up:    [O, R], PEFT's lora_B; dtype and device of ``down``.
        scale: alpha / R, or alpha / sqrt(R) where the adapter is rank-stabilised.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Adapter:
    """Low-rank factors for the layers of one model.

    Args:
        factors: by name of the layer, as ``model.named_modules()`` of the bare model says it.
        config:  what stands in PEFT's adapter_config.json.
        card:    JSON of memos: base (fingerprint of the model), recipe, evaluation, sources.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, Any]
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The highest rank of all layers."""
        return max((f.rank for f in self.factors.values()), default=0)
