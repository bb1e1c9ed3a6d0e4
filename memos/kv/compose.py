"""One cache from memories whose K and V were computed apart, in any order.

What a piece lacks is what its tokens would have read in the pieces before it. Its keys are turned
to where it stands now, and the tokens that miss most are computed anew, each as a query over the
whole composed cache, layer by layer in the model's own forward pass. Computing all of them is a
full prefill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from memos.cube.identity import adapters_of
from memos.errors import ArgumentError
from memos.kernels.kv import PackedRows
from memos.kv.cache import MemosCache, token_list
from memos.kv.pieces import AnyPiece, EnoughError, Peek, Piece, Prefiller, Slots, mask_of

if TYPE_CHECKING:
    from memos.kv.compose_curve import Curve

SHARE = 0.15  # of the pieces' tokens computed anew
# The layer in which tokens are compared with what a prefill computes there. **measured** on SmolLM2
# with 15 % of the tokens computed anew: KL 0.038 by layer 1, 0.040 by 2, 0.041 by 4; by how much
# they deviate in all layers, which nobody knows beforehand, 0.036; the first tokens 0.044.
LOOK_AT_LAYER = 1
_NEVER = 1 << 40  # tokens: such a cache is not packed


@dataclass(frozen=True, eq=False)
class Composed:
    """A prompt whose cache was put together.

    Args:
        cache:      K and V of all tokens but the last.
        token_ids:  system prompt, pieces and question.
        pieces:     where each piece begins and ends.
        recomputed: which tokens of the pieces were computed anew, in order.
        share:      of the tokens of the pieces.
        kl:         what the curve expects of that share, in nats; None without a curve.
    """

    cache: MemosCache
    token_ids: list[int]
    pieces: tuple[tuple[int, int], ...]
    recomputed: tuple[int, ...]
    share: float
    kl: float | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """generate's arguments: input_ids, attention_mask and a copy of the cache, made anew at
        each access. Pass them unchanged."""
        return self.cache.copy().inputs(self.token_ids)


def compose(
    model: torch.nn.Module | Prefiller,
    system: Any,
    memories: Sequence[Any],
    question_tokens: Any = (),
    *,
    share: float | None = None,
    first_tokens: int | None = None,
    max_kl: float | None = None,
    curve: Curve | None = None,
) -> Composed:
    """Build one cache of a system prompt, memories in this order, and a question.

    Args:
        model:           a model, or the Prefiller that made the pieces.
        system:          token ids, or the Piece that ``Prefiller.system`` made of them.
        memories:        token ids, which are prefilled now, or Pieces, which are not.
        question_tokens: what stands behind the memories; its last token is left to ``generate``.
        share:           so many of the memories' tokens are computed anew, 0 to 1: those that
            differ most from what a prefill computes in an early layer. 1 is a full prefill.
            Default: 0.15.
        first_tokens:    instead: exactly the first tokens of each memory.
        max_kl:          instead: the least share whose expected KL divergence to a full prefill is
            at most this, by ``curve``.
        curve:           what KL to expect of a share, see ``compose_curve.calibrate``.

    Returns:
        The prompt and its cache. What is composed is not what a prefill gives, so a KVCacheMemory
        keeps no more of such a cache than the system prompt.

    Raises:
        ArgumentError: the model's keys cannot be moved, or a number is out of range.

    Cost: reads the pieces and writes their K and V once; a forward pass of the tokens that are
        computed anew, and, to choose them, the first layers of one of all tokens.
    Source: computing the first tokens: EPIC (arXiv 2410.15332); those that deviate most:
        CacheBlend (arXiv 2405.16444, section 4).
    """
    maker = model if isinstance(model, Prefiller) else Prefiller(model)
    if sum(x is not None for x in (share, first_tokens, max_kl)) > 1:
        raise ArgumentError("share, first_tokens, max_kl: at most one of them wanted")
    if max_kl is not None:
        if curve is None:
            raise ArgumentError("curve: wanted with max_kl; compose_curve.calibrate measures one")
        share = curve.share_for(max_kl)
    if share is None:
        share = SHARE
    if not 0 <= share <= 1:
        raise ArgumentError(f"share: 0 to 1 wanted, got {share}")
    if first_tokens is not None and first_tokens < 0:
        raise ArgumentError(f"first_tokens: at least 0 wanted, got {first_tokens}")
    question = token_list(question_tokens)
    lead = system if isinstance(system, Piece) else maker.system(token_list(system))
    pieces = [m if isinstance(m, AnyPiece) else maker.piece(lead, token_list(m)) for m in memories]
    bounds, end = [], len(lead)
    for piece in pieces:
        bounds.append((end, end + len(piece)))
        end += len(piece)
    ids = [t for part in (lead, *pieces) for t in part.token_ids] + question
    if not ids:
        raise ArgumentError("system, memories, question_tokens: at least one token wanted")
    maker.check_length(len(ids))
    known = len(ids) - 1 if question else len(ids)  # the last token of a question is left
    inside = end - len(lead)
    count = min(inside, round(share * inside))
    if first_tokens is not None:
        again = [t for a, b in bounds for t in range(a, min(a + first_tokens, b))]
        count = len(again)
    if inside and count == inside:
        cache = _prefilled(maker, ids, known)
        return Composed(cache, ids, tuple(bounds), tuple(range(len(lead), end)), 1.0, 0.0)
    keys, values = _joined(maker, lead, pieces, known)
    if first_tokens is None:
        again = _most_deviating(maker, ids[:end], len(lead), keys, values, count)
    slots = again + list(range(end, known))
    if slots:
        _computed(maker, ids, slots, keys, values)
    cache = _cache_of(maker, keys, values, ids, len(lead) if pieces else None)
    done = len(again) / inside if inside else 0.0
    kl = None if curve is None else curve.kl_at(done)
    return Composed(cache, ids, tuple(bounds), tuple(again), done, kl)


def _prefilled(maker: Prefiller, ids: list[int], known: int) -> MemosCache:
    cache = _empty_cache(maker)
    if known:
        maker.forward(ids[:known], range(known), past_key_values=cache)
    cache.token_ids = list(ids)
    return cache


def _joined(
    maker: Prefiller, lead: Piece, pieces: Sequence[AnyPiece], total: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K and V [1, H, total, D] of every layer: the system prompt, then the pieces, their keys
    turned to where they stand; what follows is not written yet."""
    both: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for out, parts in zip(both, (lead.keys, lead.values), strict=True):
        for part in parts:
            whole = part.new_empty(1, part.shape[1], total, part.shape[3])
            whole[:, :, : len(lead)] = part
            out.append(whole)
    at = len(lead)
    for piece in pieces:
        piece.write_to(*both, at, maker.positions)
        at += len(piece)
    return both


def _most_deviating(
    maker: Prefiller,
    ids: Sequence[int],
    first: int,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    count: int,
) -> list[int]:
    """The tokens from ``first`` on whose K and V differ most from a prefill's in an early layer."""
    if not count:
        return []
    layer = min(LOOK_AT_LAYER, len(keys) - 1)
    peek = Peek(layer)
    with contextlib.suppress(EnoughError):
        maker.forward(ids, range(len(ids)), past_key_values=peek)
    assert peek.found is not None
    score = torch.zeros(len(ids) - first)
    for want, got in zip(peek.found, (keys[layer], values[layer]), strict=True):
        want = want[0, :, first:].float()
        got = got[0, :, first : len(ids)].float()
        size = want.norm(dim=-1).mean()
        score += ((want - got).norm(dim=-1).mean(0) / size).cpu()
    return sorted((score.topk(count).indices + first).tolist())


def _computed(
    maker: Prefiller,
    ids: Sequence[int],
    slots: Sequence[int],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> None:
    """Compute these tokens anew, each over all before it, and write their K and V in place."""
    at = torch.tensor(slots, device=keys[0].device)
    maker.forward(
        [ids[t] for t in slots],
        slots,
        past_key_values=Slots(keys, values, at),
        attention_mask=mask_of(at, keys[0].shape[2], keys[0].dtype),
    )


def _empty_cache(maker: Prefiller) -> MemosCache:
    size = maker.block_tokens
    cache = MemosCache(maker.shape, "raw", block_tokens=size, sink_tokens=0, recent_tokens=_NEVER)
    cache.computed_under(partial(adapters_of, maker.model))
    return cache


def _cache_of(
    maker: Prefiller,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    ids: list[int],
    composed_from: int | None,
) -> MemosCache:
    cache = _empty_cache(maker)
    for layer, key, value in zip(cache.stored_layers, keys, values, strict=True):
        layer.load(PackedRows(), None, (key, value))
        layer.composed_from = composed_from
    cache.token_ids = list(ids)
    return cache
