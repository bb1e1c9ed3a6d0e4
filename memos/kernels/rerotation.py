"""How keys of rotary position embeddings turn from some positions on to others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Rerotation:
    """Positions that keys were computed at, and those that they get while they are unpacked.

    The table of its angles is made once and kept: give one object to the calls of all layers.

    Args:
        old, new:    [M, P] int64: of the P tokens of each of M blocks, of either sign.
        inv_freq:    [R] float32 as the model has them, or float64.
        interleaved: pairs are channels (2i, 2i + 1); else (i, i + R).
        first:       the channels [first, first + 2 R) turn, the others stay.
    """

    old: torch.Tensor
    new: torch.Tensor
    inv_freq: torch.Tensor
    interleaved: bool = False
    first: int = 0

    @cached_property
    def table(self) -> torch.Tensor:
        """[M, P, 2, R] float32, contiguous, on the host: cosines and sines."""
        made = turn_table(self.old.flatten(), self.new.flatten(), self.inv_freq)
        return made.view(*self.old.shape, *made.shape[1:])

    @cached_property
    def _sent(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def table_on(self, device: torch.device) -> torch.Tensor:
        """The table there. The first call for a device waits for the copy."""
        if device.type == "cpu":
            return self.table
        if device not in self._sent:
            self._sent[device] = self.table.to(device)
        return self._sent[device]

    @property
    def channels(self) -> slice:
        """Those that turn."""
        return slice(self.first, self.first + 2 * len(self.inv_freq))


def angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """[T, R] float64 on the host: position * frequency, the product rounded as ``inv_freq`` is.

    With float32 frequencies these are the angles that a model turns its queries by, which
    transformers computes in float32: beyond a few thousand tokens they are no longer the exact
    products, and only the same ones put a key where the model would have put it.
    """
    product = positions.cpu()[:, None].to(inv_freq.dtype) * inv_freq.cpu()
    return product.double()


def turn_table(old: torch.Tensor, new: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """[T, 2, R] float32, contiguous, on the host: cosines and sines of the angles between two
    positions of each token, computed in float64 and rounded once."""
    by = angles(new, inv_freq) - angles(old, inv_freq)
    return torch.stack([by.cos(), by.sin()], dim=1).float()


def turned(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The pairs of the last axis turned, in float32: ``a' = a c - b s``, ``b' = b c + a s``."""
    x, R = x.float(), cosine.shape[-1]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :R], x[..., R:])
    pair = (a * cosine - b * sine, b * cosine + a * sine)
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
