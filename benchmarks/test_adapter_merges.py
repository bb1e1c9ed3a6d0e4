"""Merges of adapters beside PEFT's ``add_weighted_adapter``, on the same tensors in the same run.

A Llama of 12 layers, hidden size 512, intermediate size 1376: 84 linear layers. Random adapters of
rank 16, weights 1, 0.7 and 0.4. ``ms``: the median of 5 merges; ``peft_ms``: one merge, which for
svd takes seconds. ``rel_error``, ``peft_rel_error``: Frobenius norm of what the merged factors'
product misses over that of what was wanted, together over all layers (svd: over those of layer 0)
in float64. Wanted is

exact: the weighted sum of products.
svd:   its best approximation of rank 16, by the full SVD of the sum in float64.
ties:  TIES on full matrices with these weights. The result has rank 16, which its error shows.
dare:  the sum, which DARE gives on average. The result has rank 16.

The rows of a merge into bfloat16 weights: another random adapter merged and unmerged each time, the
share of weights whose bits are then no longer those of the base, and the norm of the drift over
that of the weights (rel_error, peft_rel_error). ms and peft_ms are of one merge and unmerge.
``delta``: norm of one adapter's product over that of the weights.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="adapters are torch tensors")
peft = pytest.importorskip("peft", reason="the merges stand beside PEFT's")

from memos.adapters.adapter import Adapter, Factors  # noqa: E402
from memos.adapters.merge import combine, merge_into_base  # noqa: E402

LAYERS, RANK, ROUNDS = 12, 16, 5
WEIGHTS = (1.0, 0.7, 0.4)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ("a", "b", "c")


@functools.lru_cache(maxsize=1)
def wrapped(layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> Any:
    """The model under PEFT, with three random adapters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    model = peft.get_peft_model(model, lora, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def modules(model: Any) -> dict[str, Any]:
    bare = model.base_model.model
    return {n: m for n, m in bare.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def of_peft(model: Any, name: str) -> Adapter:
    """An adapter of PEFT's over the same tensors."""
    factors = {
        layer: Factors(
            module.lora_A[name].weight.detach(),
            module.lora_B[name].weight.detach(),
            module.scaling[name],
        )
        for layer, module in modules(model).items()
    }
    return Adapter(factors, {})


def product(factors: Factors) -> torch.Tensor:
    return factors.scale * factors.up.double() @ factors.down.double()


def peft_merge(model: Any, num: int, kind: str, **options: Any) -> tuple[Adapter, float]:
    """PEFT's merged adapter and its milliseconds."""
    start = time.perf_counter()
    model.add_weighted_adapter(
        list(NAMES[:num]), list(WEIGHTS[:num]), "merged", combination_type=kind, **options
    )
    took = (time.perf_counter() - start) * 1e3
    found = of_peft(model, "merged")
    model.delete_adapter("merged")
    return found, took


def timed(benchmark: Any, function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the median of its milliseconds."""
    times = []

    def once() -> Any:
        start = time.perf_counter()
        done = function()
        times.append((time.perf_counter() - start) * 1e3)
        return done

    return benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1), statistics.median(times[1:])


class Misses:
    """Frobenius norms over all layers."""

    def __init__(self) -> None:
        self.wanted = self.ours = self.theirs = 0.0

    def add(self, wanted: torch.Tensor, ours: Factors, theirs: Factors) -> None:
        self.wanted += float(wanted.square().sum())
        self.ours += float((product(ours) - wanted).square().sum())
        self.theirs += float((product(theirs) - wanted).square().sum())

    def row(self) -> dict[str, float]:
        return {
            "rel_error": math.sqrt(self.ours / self.wanted),
            "peft_rel_error": math.sqrt(self.theirs / self.wanted),
        }


def total(adapters: list[Adapter], layer: str) -> torch.Tensor:
    return sum(
        (w * product(a.factors[layer]) for a, w in zip(adapters, WEIGHTS, strict=False)),
        start=torch.zeros((), dtype=torch.float64),
    )


@functools.lru_cache(maxsize=64)
def best(num: int, layer: str) -> torch.Tensor:
    adapters = [of_peft(wrapped(), name) for name in NAMES[:num]]
    U, S, Vh = torch.linalg.svd(total(adapters, layer), full_matrices=False)
    return U[:, :RANK] * S[:RANK] @ Vh[:RANK]


def compare(
    benchmark: Any,
    case: str,
    num: int,
    method: str,
    kind: str,
    want: Callable[[list[Adapter], str], torch.Tensor],
    layers: int = LAYERS,
    checked: str = "",
    theirs: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    model = wrapped(layers)
    adapters = [of_peft(model, name) for name in NAMES[:num]]
    made, ms = timed(benchmark, lambda: combine(adapters, WEIGHTS[:num], method, **options))
    peft_made, peft_ms = peft_merge(model, num, kind, **(theirs or {}))
    misses = Misses()
    for layer in (name for name in made.factors if re.search(checked, name)):
        misses.add(want(adapters, layer), made.factors[layer], peft_made.factors[layer])
    benchmark.extra_info.update(
        case=case,
        adapters=num,
        modules=len(made.factors),
        method=method,
        peft=kind,
        threads=torch.get_num_threads(),
        ms=ms,
        peft_ms=peft_ms,
        ratio=peft_ms / ms,
        **misses.row(),
    )


@torch.no_grad()
@pytest.mark.parametrize("num", [2, 3])
def test_exact(benchmark: Any, num: int) -> None:
    compare(benchmark, "sum of products", num, "exact", "cat", total)


@torch.no_grad()
@pytest.mark.parametrize("num", [2, 3])
def test_linear_of_factors(benchmark: Any, num: int) -> None:
    compare(benchmark, "sum of products", num, "exact", "linear", total)


@torch.no_grad()
@pytest.mark.parametrize(("num", "full"), [(2, True), (3, True), (2, False)])
def test_svd(benchmark: Any, num: int, full: bool) -> None:
    kind = "full matrices, its default" if full else "reduced matrices"
    compare(
        benchmark,
        f"best of rank 16; PEFT: {kind}",
        num,
        "svd",
        "svd",
        lambda adapters, layer: best(num, layer),
        checked=r"layers\.0\.",
        theirs={"svd_full_matrices": full},
        rank=RANK,
    )


def ties(adapters: list[Adapter], layer: str, density: float = 0.5) -> torch.Tensor:
    """TIES written out on full matrices."""
    parts = []
    for adapter, weight in zip(adapters, WEIGHTS, strict=False):
        part = weight * product(adapter.factors[layer])
        kept = part.abs().flatten().topk(int(density * part.numel())).indices
        mask = torch.zeros(part.numel(), dtype=torch.bool)
        mask[kept] = True
        parts.append(part * mask.view_as(part))
    stack = torch.stack(parts)
    agrees = stack.sign() == stack.sum(0).sign()
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_ties(benchmark: Any, kind: str) -> None:
    where = "factors" if kind == "ties" else "products, elected without the weights"
    compare(
        benchmark,
        f"TIES; PEFT: on {where}",
        2,
        "ties",
        kind,
        ties,
        layers=1,
        theirs={"density": 0.5},
        rank=RANK,
        density=0.5,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dare_linear", "dare_linear_svd"])
def test_dare(benchmark: Any, kind: str) -> None:
    where = "factors" if kind == "dare_linear" else "products"
    compare(
        benchmark,
        f"DARE beside the sum; PEFT: on {where}",
        2,
        "dare",
        kind,
        total,
        layers=1,
        theirs={"density": 0.5},
        rank=RANK,
        density=0.5,
    )


def changed(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> dict[str, float]:
    num = differ = drift = norm = 0.0
    for name, weight in before.items():
        num += weight.numel()
        differ += float((weight.view(torch.int16) != now[name].view(torch.int16)).sum())
        drift += float((now[name].double() - weight.double()).square().sum())
        norm += float(weight.double().square().sum())
    return {"percent": 100 * differ / num, "drift": math.sqrt(drift / norm)}


def without_peft(layers: dict[str, Any]) -> Any:
    """These layers by their names."""
    root = torch.nn.Module()
    for name, layer in layers.items():
        at, (*path, last) = root, name.split(".")
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, layer)
    return root


@torch.no_grad()
@pytest.mark.parametrize("up", [0.005, 0.02])
@pytest.mark.parametrize("cycles", [1, 10])
def test_merge_and_unmerge(benchmark: Any, cycles: int, up: float) -> None:
    model = wrapped(LAYERS, torch.bfloat16)
    layers = {n: m.get_base_layer() for n, m in modules(model).items()}
    bare = without_peft(layers)
    adapter = of_peft(model, "a")
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def ours() -> None:
        merge_into_base(bare, adapter).unmerge()

    def theirs() -> None:
        model.merge_adapter(["a"])
        model.unmerge_adapter()

    def run(once: Callable[[], None]) -> tuple[float, dict[str, float]]:
        """Milliseconds, and what is no longer as it was; the weights are set back."""
        generator, took = torch.Generator().manual_seed(1), []
        for _ in range(cycles):
            for factors in adapter.factors.values():
                factors.up.normal_(0, up, generator=generator)
            start = time.perf_counter()
            once()
            took.append((time.perf_counter() - start) * 1e3)
        after = {name: layer.weight.detach() for name, layer in layers.items()}
        differences = changed(before, after)
        for name, weight in before.items():
            layers[name].weight.copy_(weight)
        return statistics.median(took), differences

    run(theirs)
    ms, mine = benchmark.pedantic(lambda: run(ours), rounds=1, warmup_rounds=1)
    peft_ms, of_theirs = run(theirs)
    norm = sum(float(w.double().square().sum()) for w in before.values())
    delta = sum(float(product(f).square().sum()) for f in adapter.factors.values())
    benchmark.extra_info.update(
        case=f"bfloat16, merged and unmerged {cycles}x",
        modules=len(layers),
        threads=torch.get_num_threads(),
        delta=math.sqrt(delta / norm),
        ms=ms,
        peft_ms=peft_ms,
        ratio=peft_ms / ms,
        rel_error=mine["drift"],
        peft_rel_error=of_theirs["drift"],
        changed_percent=mine["percent"],
        peft_changed_percent=of_theirs["percent"],
    )
