"""Weighted sums of low-rank products of one layer: concatenated, truncated, trimmed or dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from memos.adapters.adapter import Adapter, Factors
from memos.errors import ArgumentError

_MAX_CONDITION = 1e4
_size = torch.linalg.vector_norm


@dataclass(frozen=True)
class Term:
    """One adapter's part of a layer: ``coefficient * up @ down``."""

    coefficient: float
    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Combined:
    """The factors of a layer, with Frobenius norms of what was wanted and of what they miss."""

    factors: Factors
    norm: float
    error: float


def check_weights(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[float, ...]:
    """Raise unless there is a finite weight for each adapter, and each is products of factors."""
    if not adapters:
        raise ArgumentError("adapters: one or more wanted, got none")
    if len(weights) != len(adapters):
        raise ArgumentError(
            f"weights: one per adapter wanted, got {len(weights)} for {len(adapters)} adapters"
        )
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        if not math.isfinite(weight):
            raise ArgumentError(f"weights[{i}]: a finite number wanted, got {weight}")
        for key in ("use_dora", "lora_bias", "alora_invocation_tokens"):
            if adapter.config.get(key):
                raise ArgumentError(f"adapters[{i}]: {key} is more than products of factors")
    return tuple(float(weight) for weight in weights)


def check_factors(i: int, name: str, factors: Factors) -> tuple[int, int]:
    """(O, I) of a layer. Raise unless its factors fit each other and are finite."""
    down, up = factors.down, factors.up
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0] or not len(down):
        raise ArgumentError(
            f"adapters[{i}]: layer {name!r}: down [R, I] and up [O, R] wanted, got "
            f"{list(down.shape)} and {list(up.shape)}"
        )
    ends = (*down.aminmax(), *up.aminmax())  # ten times as quick as isfinite().all()
    if not math.isfinite(factors.scale) or not all(math.isfinite(float(end)) for end in ends):
        raise ArgumentError(f"adapters[{i}]: layer {name!r} has values that are not finite")
    return up.shape[0], down.shape[1]


def concatenate(terms: Sequence[Term], dtype: torch.dtype) -> Combined:
    """All ranks side by side. The largest coefficient becomes the scale, so that terms with equal
    coefficients, or ones a power of two apart, keep every bit; the others are rounded once."""
    scale = max(abs(t.coefficient) for t in terms) or 1.0
    down = torch.cat([t.down.double() for t in terms])
    up = torch.cat([t.up.double() * (t.coefficient / scale) for t in terms], dim=1)
    made = Factors(down.to(dtype), up.to(dtype), scale)
    return Combined(made, scale * _norm(up, down), scale * _rounding(up, down, made))


def truncate(terms: Sequence[Term], rank: int, dtype: torch.dtype) -> Combined:
    """The best product of this rank: both sides orthogonalised, and the small core between them
    decomposed, in float64.

    With G = up.T @ up and down @ down.T = L @ L.T, the eigenvalues of L.T @ G @ L are the squares
    of the product's singular values. That errs by float64's eps times the square of the condition
    of ``down``; where this is more than 2e-8, QR of both sides and SVD of the core do not.
    """
    up = torch.cat([t.up.double() * t.coefficient for t in terms], dim=1)
    down = torch.cat([t.down.double() for t in terms])
    rank = min(rank, up.shape[0], down.shape[1])
    L, failed = torch.linalg.cholesky_ex(down @ down.T)
    inverse = torch.linalg.solve_triangular(L, torch.eye(L.shape[0]).to(L), upper=False)
    if failed or not float(_size(L) * _size(inverse)) < _MAX_CONDITION:
        return _truncate_by_qr(up, down, rank, dtype)
    squares, V = torch.linalg.eigh(L.T @ (up.T @ up) @ L)
    squares, V = squares.clamp(min=0.0).flip(0), V.flip(1)[:, :rank]
    S = squares.sqrt()
    root = S[:rank].sqrt()
    up = up @ (L @ V * torch.where(root > 0, 1 / root, 0.0))
    down = (V * root).T @ inverse @ down
    return _truncated(up, down, S, dtype)


def _truncate_by_qr(
    up: torch.Tensor, down: torch.Tensor, rank: int, dtype: torch.dtype
) -> Combined:
    left, up = torch.linalg.qr(up)
    right, down = torch.linalg.qr(down.T)
    U, S, Vh = torch.linalg.svd(up @ down.T, full_matrices=False)
    root = S[:rank].sqrt()
    return _truncated(left @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ right.T, S, dtype)


def _truncated(
    up: torch.Tensor, down: torch.Tensor, S: torch.Tensor, dtype: torch.dtype
) -> Combined:
    """Round factors that share the singular values S between them, and say what that costs."""
    made = Factors(down.to(dtype), up.to(dtype), 1.0)
    root = S[: made.rank].sqrt()
    # Columns of up are orthogonal, and rows of down: rounding one changes the product by this.
    # The two changes are taken as orthogonal to each other, as random ones nearly are.
    up_error = _size(_size(made.up - up, dim=0) * root)
    down_error = _size(_size(made.down - down, dim=1) * root)
    error = math.hypot(float(_size(S[made.rank :])), float(up_error), float(down_error))
    return Combined(made, float(_size(S)), error)


def factorize(dense: torch.Tensor, rank: int, dtype: torch.dtype) -> Combined:
    """The best product of this rank for a dense [O, I]: eigenvectors of its Gram matrix.

    The Gram matrix is of the shorter side and in float64: singular values down to 1e-8 of the
    largest one are told apart, at half the time of a float32 SVD.
    """
    wide = dense.shape[0] <= dense.shape[1]
    short = dense if wide else dense.T
    gram = torch.zeros(2 * short.shape[:1], dtype=torch.float64, device=dense.device)
    for columns in short.split(1024, dim=1):
        block = columns.double()
        gram.addmm_(block, block.T)
    basis = torch.linalg.eigh(gram)[1][:, -rank:].flip(1).contiguous()
    image = torch.cat([basis.T @ columns.double() for columns in short.split(1024, dim=1)], dim=1)
    sizes = _size(image, dim=1)
    root = sizes.sqrt()
    basis = basis * root
    image = image / torch.where(root > 0, root, 1.0)[:, None]
    up, down = (basis, image) if wide else (image.T, basis.T)
    dropped = (gram.trace() - sizes.square().sum()).clamp(min=0.0).sqrt()
    return _truncated(up.contiguous(), down.contiguous(), torch.cat([sizes, dropped[None]]), dtype)


def trim(density: float) -> Callable[[Term], torch.Tensor]:
    """Keep the ``density`` of the entries of a product that are largest in magnitude.

    All entries as large as the last of them stay too.
    """

    def trimmed(term: Term) -> torch.Tensor:
        product = _product(term)
        smallest = _kth(product.abs().flatten(), max(1, int(density * product.numel())))
        return product.masked_fill_(product.abs() < smallest, 0.0)

    return trimmed


def drop(density: float, seed: int, layer: str) -> Callable[[Term], torch.Tensor]:
    """Keep each entry of a product with probability ``density``, divided by it.

    What is kept depends on the seed, the layer's name and the factors themselves, not on the place
    of an adapter among the others nor on the layers done before.
    """

    def dropped(term: Term) -> torch.Tensor:
        product = _product(term)
        generator = torch.Generator().manual_seed(_seed(seed, layer, term))
        kept = torch.empty(product.shape, dtype=torch.bool).bernoulli_(density, generator=generator)
        return product.mul_(kept.to(product.device)).div_(density)

    return dropped


def add(terms: Sequence[Term], sparse: Callable[[Term], torch.Tensor]) -> torch.Tensor:
    """The sum of the sparse products, [O, I] float32."""
    total = sparse(terms[0])
    for term in terms[1:]:
        total += sparse(term)
    return total


def elect(
    terms: Sequence[Term], sparse: Callable[[Term], torch.Tensor], majority: str
) -> torch.Tensor:
    """Of every entry the mean over the terms that have the elected sign, [O, I] float32.

    Products are made twice, so that their number does not matter to the memory needed.
    """
    votes = sparse(terms[0])
    if majority == "frequency":
        votes.sign_()
    for term in terms[1:]:
        ballot = sparse(term)
        votes += ballot.sign_() if majority == "frequency" else ballot
        del ballot  # room for the next
    elected = votes.sign_().to(torch.int8)
    count = torch.zeros_like(elected, dtype=torch.int16)
    total = votes.zero_()
    for term in terms:
        value = sparse(term)
        agrees = value.sign().to(torch.int8) == elected
        count += agrees
        total += value.mul_(agrees)
        del value, agrees
    return total.div_(count.clamp_(min=1))


def _kth(values: torch.Tensor, k: int) -> torch.Tensor | float:
    """The k-th largest of values that may be overwritten."""
    k = values.numel() - k
    if values.device.type != "cpu":
        return values.kthvalue(k + 1).values
    found = values.numpy()  # three times as quick as kthvalue, in place
    found.partition(k)
    return float(found[k])


def _product(term: Term) -> torch.Tensor:
    return (term.up.float() * term.coefficient) @ term.down.float()


def _seed(seed: int, layer: str, term: Term) -> int:
    content = blake3(f"{seed} {layer} ".encode())
    for tensor in (term.down, term.up):
        content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(content.digest(8), "little")


def _norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """The Frobenius norm of up @ down, without the product."""
    return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))


def _rounding(up: torch.Tensor, down: torch.Tensor, made: Factors) -> float:
    """The Frobenius norm of what the rounding of the factors changes in their product."""
    up_error, down_error = made.up - up, made.down - down
    if down_error.any():
        up_error = torch.cat([up_error, up], dim=1)
        return _norm(up_error, torch.cat([made.down.double(), down_error]))
    return _norm(up_error, down) if up_error.any() else 0.0
