"""Several adapters into one, on the products of their factors; and adapters into their base."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from memos.adapters import _products
from memos.adapters._products import Combined, Term
from memos.adapters.adapter import MAX_RANK, Adapter, Factors
from memos.adapters.into_base import Merged, merge_into_base
from memos.errors import ArgumentError

__all__ = ["MAJORITIES", "METHODS", "Merged", "combine", "merge_into_base"]

METHODS = ("exact", "svd", "ties", "dare", "dare_ties")
MAJORITIES = ("total", "frequency")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str = "exact",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    majority: str = "total",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """One adapter for the weighted sum of the products ``scale * up @ down`` of several.

    "exact" concatenates the factors: the sum itself, of rank the sum of ranks. "svd" is the best
    approximation of that sum by a rank. "ties" keeps of each product the largest entries, elects
    a sign per entry and takes the mean of those that have it. "dare" keeps entries at random and
    divides them by ``density``; "dare_ties" elects among those. These three make [O, I] products
    layer by layer and bring the result to a rank as svd does. A layer that an adapter lacks is zero
    in it.

    The relative Frobenius errors of the product, rounding to ``dtype`` included, are in the card:
    ``card["recipe"]["error"]``, "total" and by layer. Of ties and dare they are those of the
    return to a rank. In float32 exact has 2**-24 at most; in a narrower dtype one factor is
    rounded once, and not at all where the weights times scales are equal or powers of two apart.

    Args:
        adapters: of the same base model, one or more.
        weights:  one per adapter, of either sign. ties elects and takes the mean of weighted
            entries: equal weights w give w times the plain merge.
        method:   one of METHODS.
        rank:     of the result, layers of less stay at theirs; default the highest of the inputs.
            Not for exact.
        density:  the part of entries that is kept, in (0, 1]: ties, dare and dare_ties.
        seed:     of dare: the same seed, layer and factors keep the same entries, in any order.
        majority: what elects a sign: "total", the sum of the entries, or "frequency", of signs.
        dtype:    float32, bfloat16 or float16; default what holds all of the inputs' dtypes.
        progress: called as ``progress(layer, done, layers)`` after each layer.

    Returns:
        An adapter whose config is a PEFT LoRA config and whose card names recipe and parents.

    Raises:
        ArgumentError: an argument is out of contract, layers differ in shape, bases differ, or a
            factor is not finite.

    Cost:
        exact: a copy. svd: O((O + I) R**2 + R**3) per layer of R ranks together. ties and dare:
        about 20 O I bytes, and O(min(O, I)**2 max(O, I)) in float64 per layer.

    Source:
        TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099.
    """
    weights = _products.check_weights(adapters, weights)
    base = _check_bases(adapters)
    if method not in METHODS:
        raise ArgumentError(f"method: one of {', '.join(METHODS)} wanted, got {method!r}")
    if majority not in MAJORITIES:
        raise ArgumentError(f"majority: one of {', '.join(MAJORITIES)} wanted, got {majority!r}")
    if not 0.0 < density <= 1.0:
        raise ArgumentError(f"density: more than 0 and at most 1 wanted, got {density}")
    if rank is not None and (method == "exact" or not 1 <= rank <= MAX_RANK):
        wanted = "none for exact, the ranks add up" if method == "exact" else f"1 to {MAX_RANK}"
        raise ArgumentError(f"rank: {wanted} wanted, got {rank}")
    if rank is None and method != "exact":
        rank = max(1, min(MAX_RANK, max(adapter.rank for adapter in adapters)))
    layers = _layers(adapters, weights, exact=method == "exact")
    dtype = _check_dtype(dtype, layers)

    combined: dict[str, Combined] = {}
    for name, terms in layers.items():
        made = _layer(name, terms, method, rank or 0, density, seed, majority, dtype)
        if not math.isfinite(made.error):
            raise ArgumentError(f"dtype: {dtype} does not hold the factors of {name!r}")
        combined[name] = made
        if progress is not None:
            progress(name, len(combined), len(layers))

    recipe: dict[str, Any] = {"kind": "combine", "method": method, "weights": list(weights)}
    recipe["parents"] = [adapter.card.get("digest") for adapter in adapters]
    if method != "exact":
        recipe["rank"] = rank
    if method in ("ties", "dare", "dare_ties"):
        recipe["density"] = density
    if method.startswith("dare"):
        recipe["seed"] = seed
    if method.endswith("ties"):
        recipe["majority"] = majority
    recipe["error"] = {
        "total": _ratio(
            math.hypot(*(c.error for c in combined.values())),
            math.hypot(*(c.norm for c in combined.values())),
        ),
        "layers": {name: _ratio(c.error, c.norm) for name, c in combined.items()},
    }
    factors = {name: c.factors for name, c in combined.items()}
    card = {"recipe": recipe} if base is None else {"base": base, "recipe": recipe}
    return Adapter(factors, _config(adapters, factors), card)


def _layer(
    name: str,
    terms: list[Term],
    method: str,
    rank: int,
    density: float,
    seed: int,
    majority: str,
    dtype: torch.dtype,
) -> Combined:
    if method == "exact":
        return _products.concatenate(terms, dtype)
    if method == "svd":
        return _products.truncate(terms, rank, dtype)
    trims = method == "ties"
    sparse = _products.trim(density) if trims else _products.drop(density, seed, name)
    if method == "dare":
        return _products.factorize(_products.add(terms, sparse), rank, dtype)
    return _products.factorize(_products.elect(terms, sparse, majority), rank, dtype)


def _check_bases(adapters: Sequence[Adapter]) -> Any:
    """The base that all cards name; cards without one agree with any."""
    named = [(i, a.card["base"]) for i, a in enumerate(adapters) if a.card.get("base") is not None]
    for i, base in named[1:]:
        if base != named[0][1]:
            raise ArgumentError(
                f"adapters: one base model wanted; adapters[{named[0][0]}] is of {named[0][1]!r}, "
                f"adapters[{i}] of {base!r}"
            )
    return named[0][1] if named else None


def _layers(
    adapters: Sequence[Adapter], weights: Sequence[float], exact: bool
) -> dict[str, list[Term]]:
    layers: dict[str, list[Term]] = {}
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for name, factors in adapter.factors.items():
            shape, terms = _products.check_factors(i, name, factors), layers.setdefault(name, [])
            down, up = factors.down, factors.up
            before = (terms[0].up.shape[0], terms[0].down.shape[1]) if terms else shape
            if before != shape:
                raise ArgumentError(
                    f"adapters[{i}]: layer {name!r} has [O, I] = {list(shape)}, in an adapter "
                    f"before it {list(before)}"
                )
            if terms:
                down, up = down.to(terms[0].down.device), up.to(terms[0].down.device)
            terms.append(Term(weight * factors.scale, down, up))
            ranks = sum(t.down.shape[0] for t in terms)
            if exact and ranks > MAX_RANK:
                raise ArgumentError(
                    f"method: 'exact' would give layer {name!r} rank {ranks} or more, {MAX_RANK} "
                    "is the limit; method='svd' takes a rank"
                )
    if not layers:
        raise ArgumentError("adapters: factors of one layer or more wanted, got none")
    return layers


def _check_dtype(dtype: torch.dtype | None, layers: dict[str, list[Term]]) -> torch.dtype:
    if dtype is None:
        used = {
            t.dtype for terms in layers.values() for term in terms for t in (term.down, term.up)
        }
        dtype = used.pop()
        for other in used:
            dtype = torch.promote_types(dtype, other)
        dtype = torch.float32 if dtype not in DTYPES else dtype
    if dtype not in DTYPES:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ArgumentError(f"dtype: one of {wanted} wanted, got {dtype}")
    return dtype


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0


def _config(adapters: Sequence[Adapter], factors: dict[str, Factors]) -> dict[str, Any]:
    """What PEFT loads: layers by their full names, patterns where they are not as most are."""
    config: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "lora_dropout": 0.0}
    config |= {"inference_mode": True, "use_rslora": False, "use_dora": False}
    for key in ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out"):
        said = [a.config[key] for a in adapters if a.config.get(key) is not None]
        if said:
            config[key] = said[0]
    ranks = {name: f.rank for name, f in factors.items()}
    alphas = {name: _alpha(f) for name, f in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config |= {"r": r, "lora_alpha": alpha, "target_modules": sorted(factors)}
    config["rank_pattern"] = {f"^{re.escape(k)}": n for k, n in ranks.items() if n != r}
    config["alpha_pattern"] = {f"^{re.escape(k)}": a for k, a in alphas.items() if a != alpha}
    return config


def _alpha(factors: Factors) -> float:
    """alpha / rank is the scale to the last bit; a whole number where it is one."""
    alpha = factors.scale * factors.rank
    for near in (alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf)):
        if near / factors.rank == factors.scale:
            alpha = near
            break
    return int(alpha) if alpha == int(alpha) else alpha
