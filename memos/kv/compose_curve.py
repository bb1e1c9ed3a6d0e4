"""What composing costs in quality, measured on a model once: KL divergence by share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memos.errors import ArgumentError

if TYPE_CHECKING:
    from memos.kv.cache import MemosCache
    from memos.kv.pieces import Prefiller

SHARES = (0.0, 0.05, 0.15, 0.25, 0.4, 0.7)


@dataclass(frozen=True)
class Curve:
    """Mean KL divergence to a full prefill, in nats, by the share of tokens computed anew.

    Args:
        points: (share, KL), shares rising from 0; (1, 0) is added where it is missing.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = tuple((float(share), float(kl)) for share, kl in self.points)
        shares = [share for share, _ in points]
        if not points or shares[0] != 0 or any(a >= b for a, b in itertools.pairwise(shares)):
            raise ArgumentError(f"points: shares rising from 0 wanted, got {shares}")
        if shares[-1] > 1 or min(kl for _, kl in points) < 0:
            raise ArgumentError("points: shares up to 1 and KL of at least 0 wanted")
        # What is computed anew never makes it worse: a point above the one before is noise.
        falling = itertools.accumulate((kl for _, kl in points), min)
        points = tuple(zip(shares, falling, strict=True))
        if points[-1][0] < 1:
            points += ((1.0, 0.0),)
        object.__setattr__(self, "points", points)

    def kl_at(self, share: float) -> float:
        """The KL expected of a share, by a straight line between two points."""
        for (a, high), (b, low) in itertools.pairwise(self.points):
            if share <= b:
                return high + (low - high) * (share - a) / (b - a)
        return self.points[-1][1]

    def share_for(self, max_kl: float) -> float:
        """The least share whose expected KL is at most ``max_kl``."""
        if not max_kl >= 0:
            raise ArgumentError(f"max_kl: at least 0 wanted, got {max_kl}")
        if max_kl >= self.points[0][1]:
            return 0.0
        for (a, high), (b, low) in itertools.pairwise(self.points):
            if low <= max_kl:
                return a + (b - a) * (high - max_kl) / (high - low)
        return 1.0


def calibrate(
    maker: Prefiller,
    system: Sequence[int],
    documents: Iterable[Sequence[int]],
    *,
    piece_tokens: int = 256,
    num_pieces: int = 4,
    next_tokens: int = 96,
    shares: Sequence[float] = SHARES,
) -> Curve:
    """Measure the curve of a model: documents are cut into pieces, shuffled, composed, and read on.

    Args:
        documents: token ids, each of at least num_pieces * piece_tokens + next_tokens.

    Returns:
        The mean over documents and over the ``next_tokens`` behind each.

    Cost: of a document one full prefill, one of its pieces, and per share its part of one.
    """
    from memos.kv.compose import compose

    sums, count = [0.0] * len(shares), 0
    order = random.Random(0)
    lead = maker.system(list(system))
    inside = piece_tokens * num_pieces
    for document in documents:
        if len(document) < inside + next_tokens:
            raise ArgumentError(
                f"documents: {inside + next_tokens} tokens each wanted, got {len(document)}"
            )
        cuts = [list(document[i : i + piece_tokens]) for i in range(0, inside, piece_tokens)]
        order.shuffle(cuts)
        behind = list(document[inside : inside + next_tokens])
        pieces = [maker.piece(lead, ids) for ids in cuts]
        want = read_on(maker, compose(maker, lead, pieces, share=1.0).cache, behind)
        for i, share in enumerate(shares):
            got = read_on(maker, compose(maker, lead, pieces, share=share).cache, behind)
            sums[i] += kl_of(want, got)
        count += 1
    if not count:
        raise ArgumentError("documents: at least one wanted, got none")
    return Curve(tuple((share, total / count) for share, total in zip(shares, sums, strict=True)))


@torch.no_grad()
def read_on(maker: Prefiller, cache: MemosCache, token_ids: Sequence[int]) -> torch.Tensor:
    """[n, vocabulary] log-probabilities behind each of these tokens, read on a copy of a cache."""
    own: Any = cache.copy()
    ids = torch.tensor([list(token_ids)], device=maker.device)
    logits = maker.model(input_ids=ids, past_key_values=own, use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), -1)


def kl_of(want: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL divergence of rows of log-probabilities, in nats."""
    return max(0.0, float((want.exp() * (want - got)).sum(-1).mean()))
