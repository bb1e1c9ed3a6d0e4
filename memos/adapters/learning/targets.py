"""What a teacher said, cached: the likeliest tokens of each place, and the KL divergence to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memos.adapters.learning.batch import Batch, Item

_TOKENS = 1024  # of one batch that is only read
_SMALLEST = 1e-9


@dataclass(frozen=True)
class Targets:
    """Of n places: the K likeliest tokens, and how likely all others are together.

    Args:
        ids:  [n, K] int64.
        logp: [n, K] float32.
        rest: [n] float32, log of the probability of all other tokens.
    """

    ids: torch.Tensor
    logp: torch.Tensor
    rest: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, K: int) -> Targets:
        logp, ids = logits.log_softmax(-1).topk(min(K, logits.shape[-1]))
        return Targets(ids, logp, _rest(logp))

    def divergence(self, logp: torch.Tensor) -> torch.Tensor:
        """[n] KL(these || student); all tokens beyond the K count as one.

        Args:
            logp: [n, vocabulary] float32, the student's log-probabilities.
        """
        student = logp.gather(1, self.ids)
        found = (self.logp.exp() * (self.logp - student)).sum(-1)
        return found + self.rest.exp() * (self.rest - _rest(student))


def cat(parts: Sequence[Targets]) -> Targets:
    """The places of all parts, in order."""
    ids, logp, rest = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logp", "rest")
    )
    return Targets(ids, logp, rest)


def _rest(logp: torch.Tensor) -> torch.Tensor:
    return (1 - logp.exp().sum(-1)).clamp_min(_SMALLEST).log()


def batches(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of items in batches of about 1,024 tokens."""
    found: list[list[int]] = []
    room = 0
    for i, item in enumerate(items):
        if not found or room < len(item.ids):
            found.append([])
            room = _TOKENS
        found[-1].append(i)
        room -= len(item.ids)
    return found


@torch.no_grad()
def teach(model: Any, items: Sequence[Item], device: Any, dtype: torch.dtype,
          K: int) -> list[Targets]:  # fmt: skip
    """What the model says at the targets of each item.

    Cost: one forward pass over all items; 12 * K bytes per target.
    """
    found = []
    for numbers in batches(items):
        batch = Batch([items[i] for i in numbers], device, dtype)
        for part in batch.logits(model).split(batch.lengths):
            found.append(Targets.of(part, K))
    return found
