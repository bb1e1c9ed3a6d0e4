"""Merges of adapters against full matrices in float64; merges into a base leave no trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="adapters are torch tensors")

from memos.adapters import _products  # noqa: E402
from memos.adapters.adapter import MAX_RANK, Adapter, Factors  # noqa: E402
from memos.adapters.merge import METHODS, combine  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402

from .adapter_merge_help import (  # noqa: E402
    SHAPES,
    distance,
    error_of,
    in_peft,
    llama,
    product,
    random_adapter,
    shapes_of,
    summed,
)

torch.set_num_threads(1)

DENSE = ("ties", "dare", "dare_ties")

WEIGHTS = st.floats(-3, 3).filter(lambda w: abs(w) > 0.01)


@given(
    parts=st.lists(
        st.tuples(
            st.integers(0, 1 << 30),
            st.integers(1, 9),
            st.sampled_from([0.5, 2.0, 0.37]),
            WEIGHTS,
            st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
        ),
        min_size=1,
        max_size=4,
    ),
    method=st.sampled_from(["exact", "svd"]),
)
@settings(max_examples=40)
def test_sums_are_those_of_the_products(parts: list[Any], method: str) -> None:
    adapters = [
        random_adapter(seed, {n: SHAPES[n] for n in sorted(names)}, rank, scale)
        for seed, rank, scale, _, names in parts
    ]
    weights = [part[3] for part in parts]
    options = {} if method == "exact" else {"rank": 64}  # more than any layer has
    made = combine(adapters, weights, method, **options)
    assert set(made.factors) == {name for part in parts for name in part[4]}
    for name, factors in made.factors.items():
        size = sum(
            abs(w) * float(product(a.factors[name]).norm())
            for a, w in zip(adapters, weights, strict=True)
            if name in a.factors
        )
        missed = float((product(factors) - summed(adapters, weights, name)).norm())
        assert missed < 1e-6 * size


@given(seeds=st.permutations([1, 2, 3]), weights=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS))
@settings(max_examples=15)
def test_exact_is_linear_and_knows_no_order(seeds: list[int], weights: tuple[float, ...]) -> None:
    by_seed = {seed: random_adapter(seed, rank=2 + seed) for seed in seeds}
    in_order = combine([by_seed[s] for s in seeds], [weights[s - 1] for s in seeds])
    ordered = combine([by_seed[s] for s in (1, 2, 3)], weights)
    doubled = combine([by_seed[s] for s in (1, 2, 3)], [2 * w for w in weights])
    steps = combine([combine([by_seed[1], by_seed[2]], weights[:2]), by_seed[3]], [1, weights[2]])
    for name in SHAPES:
        want = product(ordered.factors[name])
        size = 1e-6 * sum(map(abs, weights)) * 40
        for other in (in_order, steps):
            assert float((product(other.factors[name]) - want).norm()) < size
        assert float((product(doubled.factors[name]) - 2 * want).norm()) < size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_of_weight_one_is_itself(dtype: torch.dtype) -> None:
    adapter = random_adapter(1, scale=0.3, dtype=dtype)
    made = combine([adapter], [1.0])
    for name, factors in made.factors.items():
        assert torch.equal(factors.down, adapter.factors[name].down)
        assert torch.equal(factors.up, adapter.factors[name].up)
        assert factors.scale == adapter.factors[name].scale
        assert factors.down.dtype == dtype
    assert made.card["recipe"]["error"]["total"] == 0


def test_exact_keeps_every_bit_of_bfloat16_where_coefficients_are_powers_of_two_apart() -> None:
    adapters = [random_adapter(s, dtype=torch.bfloat16, scale=0.7) for s in (1, 2, 3)]
    made = combine(adapters, [0.3, -0.15, 0.075])
    for name, factors in made.factors.items():
        assert distance(product(factors), summed(adapters, [0.3, -0.15, 0.075], name)) < 1e-15
    assert made.card["recipe"]["error"]["total"] == 0
    assert made.rank == 12


@pytest.mark.parametrize("method", ["exact", "svd", "ties"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_in_the_card_has_the_rounding_in_it(method: str, dtype: torch.dtype) -> None:
    adapters = [random_adapter(s) for s in (1, 2)]
    options = {} if method == "exact" else {"rank": 20}  # all there is of a sum, not of ties
    made = combine(adapters, [1.0, 0.3], method, dtype=dtype, **options)
    fine = combine(adapters, [1.0, 0.3], method, **({**options, "rank": 40} if options else {}))
    for name, factors in made.factors.items():
        assert factors.up.dtype == factors.down.dtype == dtype
        missed = distance(product(factors), product(fine.factors[name]))
        assert missed > 1e-5
        assert error_of(made, name) == pytest.approx(missed, rel=0.1)


@pytest.mark.parametrize("rank", [1, 3, 8, 9, 30])
def test_svd_is_the_truncated_svd_of_the_full_matrix(rank: int) -> None:
    adapters = [random_adapter(1, rank=6), random_adapter(2, rank=3, scale=0.4)]
    weights = [0.8, -1.7]
    made = combine(adapters, weights, "svd", rank=rank)
    wanted_squares = missed_squares = 0.0
    for name, factors in made.factors.items():
        want = summed(adapters, weights, name)
        U, S, Vh = torch.linalg.svd(want, full_matrices=False)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert distance(product(factors), best) < 1e-5
        assert error_of(made, name) == pytest.approx(distance(best, want), rel=1e-3, abs=1e-6)
        assert factors.rank == min(rank, 9)
        wanted_squares += float(want.square().sum())
        missed_squares += float((product(factors) - want).square().sum())
        sizes = factors.up.norm(dim=0), factors.down.norm(dim=1)  # shared by both sides
        torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-3)
    total = made.card["recipe"]["error"]["total"]
    assert total == pytest.approx(math.sqrt(missed_squares / wanted_squares), rel=1e-3, abs=1e-6)


def test_svd_takes_the_highest_rank_where_none_is_given() -> None:
    made = combine([random_adapter(1, rank=3), random_adapter(2, rank=5)], [1, 1], "svd")
    assert {f.rank for f in made.factors.values()} == {5}


def test_svd_sees_a_small_difference_of_large_products() -> None:
    one = random_adapter(1)
    shift = random_adapter(2)
    other = Adapter(
        {
            name: Factors(f.down, f.up + 1e-4 * shift.factors[name].up, f.scale)
            for name, f in one.factors.items()
        },
        {},
    )
    made = combine([other, one], [1, -1], "svd", rank=4)
    for name, factors in made.factors.items():
        assert distance(product(factors), summed([other, one], [1, -1], name)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_zeros_and_weights_of_zero(method: str) -> None:
    fresh = random_adapter(1)
    fresh = Adapter(
        {n: Factors(f.down, torch.zeros_like(f.up), f.scale) for n, f in fresh.factors.items()}, {}
    )
    for adapters, weights in (([fresh], [1.0]), ([random_adapter(2), fresh], [0.0, 1.0])):
        made = combine(adapters, weights, method)
        assert all(float(product(f).abs().max()) == 0 for f in made.factors.values())
        assert made.card["recipe"]["error"]["total"] == 0


def test_more_ranks_than_the_layer_has_rows() -> None:
    adapters = [random_adapter(s, rank=15) for s in (1, 2, 3)]
    made = combine(adapters, [1, 1, 1], "svd", rank=200)
    for name, factors in made.factors.items():
        assert factors.rank == min(SHAPES[name])
        assert distance(product(factors), summed(adapters, [1, 1, 1], name)) < 1e-5


def reference_ties(parts: list[torch.Tensor], density: float, majority: str) -> torch.Tensor:
    trimmed = []
    for part in parts:
        keep = part.abs().flatten().topk(max(1, int(density * part.numel()))).indices
        mask = torch.zeros(part.numel(), dtype=torch.bool)
        mask[keep] = True
        trimmed.append(part * mask.view_as(part))
    stack = torch.stack(trimmed)
    elected = (stack if majority == "total" else stack.sign()).sum(0).sign()
    agrees = (stack.sign() == elected) & (elected != 0)
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(
    ("weights", "density"), [([1, 1, 1], 0.2), ([0.5, -2, 1], 0.6), ([1] * 3, 1)]
)
def test_ties_is_that_of_full_matrices(weights: list[float], density: float, majority: str) -> None:
    adapters = [random_adapter(s, rank=s) for s in (2, 3, 4)]
    full = combine(adapters, weights, "ties", rank=48, density=density, majority=majority)
    low = combine(adapters, weights, "ties", rank=5, density=density, majority=majority)
    for name in SHAPES:
        parts = [w * product(a.factors[name]) for a, w in zip(adapters, weights, strict=True)]
        want = reference_ties(parts, density, majority)
        assert distance(product(full.factors[name]), want) < 1e-5
        U, S, Vh = torch.linalg.svd(want)
        best = float(S[5:].norm() / S.norm())
        assert distance(product(low.factors[name]), want) == pytest.approx(best, rel=1e-6)
        assert error_of(low, name) == pytest.approx(best, rel=1e-6)
        assert distance(product(low.factors[name]), U[:, :5] * S[:5] @ Vh[:5]) < 1e-5


def test_ties_by_hand() -> None:
    def row(*values: float) -> Adapter:
        return Adapter({"x": Factors(torch.tensor([values]), torch.ones(1, 1), 1.0)}, {})

    adapters = [row(4, -3, 1, 2, 0.5), row(2, 5, 1, 0.1, -3), row(-1, 1, -6, 0.1, 0.2)]
    made = combine(adapters, [1, 1, 1], "ties", density=0.4, rank=1)
    # Kept: 4 -3; 5 -3; of the third -6 and, as large as each other, -1 and 1.
    # Elected: + + - none -.
    wanted = torch.tensor([[4.0, (5 + 1) / 2, -6, 0, -3]], dtype=torch.float64)
    assert distance(product(made.factors["x"]), wanted) < 1e-6


def test_ties_of_entries_as_large_as_each_other_keeps_them() -> None:
    flat = Adapter({"x": Factors(torch.ones(1, 8), torch.ones(6, 1), 1.0)}, {})
    made = combine([flat], [1], "ties", density=0.3, rank=1)
    assert distance(product(made.factors["x"]), torch.ones(6, 8).double()) < 1e-6


def test_dare_keeps_a_part_and_divides_by_it() -> None:
    shapes = {"x": (200, 150)}
    adapters = [random_adapter(s, shapes) for s in (1, 2)]
    one = combine(adapters[:1], [0.5], "dare", density=0.25, rank=150)
    got, want = product(one.factors["x"]), 0.5 * product(adapters[0].factors["x"])
    kept = (got - 4 * want).abs() < 1e-4
    dropped = got.abs() < 1e-4
    assert bool((kept | dropped).all())
    assert float((kept & ~dropped).double().mean()) == pytest.approx(0.25, abs=0.01)
    other = combine(adapters[1:], [-1], "dare", density=0.25, rank=150)
    both = combine(adapters, [0.5, -1], "dare", density=0.25, rank=150)
    assert distance(product(both.factors["x"]), got + product(other.factors["x"])) < 1e-5
    all_kept = combine(adapters, [0.5, -1], "dare", density=1, rank=8)
    assert distance(product(all_kept.factors["x"]), summed(adapters, [0.5, -1], "x")) < 1e-5


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_depends_on_seed_and_layer_and_on_no_order(method: str) -> None:
    adapters = [random_adapter(s) for s in (1, 2)]
    backwards = [Adapter(dict(reversed(a.factors.items())), {}) for a in reversed(adapters)]
    alone = [Adapter({"b.square": a.factors["b.square"]}, {}) for a in adapters]
    first = combine(adapters, [1, 2], method, rank=32, seed=5)
    again = combine(adapters, [1, 2], method, rank=32, seed=5)
    for name, factors in first.factors.items():
        assert torch.equal(factors.up, again.factors[name].up)
        assert torch.equal(factors.down, again.factors[name].down)
    for same in (combine(backwards, [2, 1], method, rank=32, seed=5),
                 combine(alone, [1, 2], method, rank=32, seed=5)):  # fmt: skip
        for name, factors in same.factors.items():
            assert distance(product(factors), product(first.factors[name])) < 1e-5
    other = combine(adapters, [1, 2], method, rank=32, seed=6)
    names = {"p": (32, 32), "q": (32, 32)}
    twins = random_adapter(3, names)
    twins = Adapter(dict.fromkeys(names, twins.factors["p"]), {})
    two = combine([twins], [1], method, rank=32)
    assert distance(product(other.factors["b.square"]), product(first.factors["b.square"])) > 0.1
    assert distance(product(two.factors["p"]), product(two.factors["q"])) > 0.1


def test_dare_ties_elects_among_what_is_kept() -> None:
    adapters = [random_adapter(s) for s in (1, 2, 3)]
    made = combine(adapters, [1, 1, 1], "dare_ties", density=0.5, rank=48)
    for name in SHAPES:
        single = [
            product(combine([a], [1], "dare", density=0.5, rank=48).factors[name]) for a in adapters
        ]
        single = [torch.where(p.abs() < 1e-5, 0.0, p) for p in single]
        want = reference_ties(single, 1.0, "total")
        assert distance(product(made.factors[name]), want) < 1e-4


def test_a_layer_that_an_adapter_lacks_is_zero_in_it() -> None:
    small = random_adapter(1, {"a.tall": SHAPES["a.tall"]})
    for method in METHODS:
        made = combine([small, random_adapter(2)], [1, 1], method)
        alone = combine([random_adapter(2)], [1], method)
        assert set(made.factors) == set(SHAPES)
        assert distance(product(made.factors["a.wide"]), product(alone.factors["a.wide"])) < 1e-6


def test_the_card_says_what_was_done() -> None:
    adapters = [random_adapter(1, digest="d1", base={"sha": 1}), random_adapter(2)]
    made = combine(adapters, [1, -0.5], "dare_ties", rank=3, density=0.4, seed=9)
    recipe = dict(made.card["recipe"])
    error = recipe.pop("error")
    assert recipe == {
        "kind": "combine", "method": "dare_ties", "weights": [1.0, -0.5], "parents": ["d1", None],
        "rank": 3, "density": 0.4, "seed": 9, "majority": "total",
    }  # fmt: skip
    assert made.card["base"] == {"sha": 1}
    assert set(error["layers"]) == set(SHAPES)
    json.dumps([made.config, made.card])
    assert "base" not in combine(adapters[1:], [1]).card


def test_progress_is_told_after_each_layer() -> None:
    calls: list[tuple[str, int, int]] = []
    combine([random_adapter(1)], [1], "svd", progress=lambda *call: calls.append(call))
    assert calls == [(name, i + 1, 3) for i, name in enumerate(SHAPES)]


def broken(**changes: Any) -> Adapter:
    adapter = random_adapter(1)
    factors = adapter.factors["a.wide"]
    values = {"down": factors.down, "up": factors.up, "scale": 2.0, **changes}
    return Adapter({**adapter.factors, "a.wide": Factors(**values)}, {})


A, B = random_adapter(1), random_adapter(2)


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "message"),
    [
        ([], [], {}, "adapters: one or more"),
        ([A, B], [1], {}, "weights: one per adapter wanted, got 1 for 2"),
        ([A, B], [1, math.nan], {}, r"weights\[1\]: a finite number"),
        ([A], [math.inf], {}, r"weights\[0\]"),
        ([A], [1], {"method": "linear"}, "exact, svd, ties, dare, dare_ties wanted, got 'linear'"),
        ([A], [1], {"method": "svd", "rank": 0}, "rank: 1 to 512"),
        ([A], [1], {"method": "ties", "rank": MAX_RANK + 1}, "rank: 1 to 512"),
        ([A], [1], {"rank": 4}, "rank: none for exact"),
        ([A], [1], {"method": "ties", "density": 0.0}, "density: more than 0"),
        ([A], [1], {"method": "dare", "density": 1.01}, "density"),
        ([A], [1], {"method": "dare", "density": math.nan}, "density"),
        ([A], [1], {"majority": "most"}, "total, frequency wanted, got 'most'"),
        ([A], [1], {"dtype": torch.int8}, "dtype: one of float32"),
        ([broken(up=torch.full((20, 4), 1e6))], [1], {"dtype": torch.float16}, "a.wide"),
        ([A, broken(down=torch.ones(4, 7))], [1, 1], {}, r"adapters\[1\]: layer 'a.wide' has"),
        ([A, broken(down=torch.ones(5, 48))], [1, 1], {}, r"down \[R, I\] and up \[O, R\] wanted"),
        ([broken(up=torch.full((20, 4), math.nan))], [1], {}, "'a.wide' has values that are not"),
        ([broken(down=torch.full((4, 48), -math.inf))], [1], {"method": "svd"}, "not finite"),
        ([broken(scale=math.nan)], [1], {"method": "ties"}, "not finite"),
        ([Adapter({}, {})], [1], {}, "factors of one layer"),
        ([random_adapter(1, base="x"), A, random_adapter(2, base="y")], [1] * 3, {},
         r"adapters\[0\] is of 'x', adapters\[2\] of 'y'"),
        ([A, Adapter(B.factors, {"use_dora": True})], [1, 1], {}, r"adapters\[1\]: use_dora"),
        ([A, Adapter(B.factors, {"alora_invocation_tokens": [1]})], [1, 1], {}, "alora"),
        ([random_adapter(s, {"x": (300, 300)}, 200) for s in range(3)], [1] * 3, {},
         "rank 600 or more, 512 is the limit; method='svd'"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_named(
    adapters: Any, weights: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        combine(adapters, weights, **options)


# PEFT


def peft_product(model: Any, layer: str, adapter: str) -> torch.Tensor:
    module = model.base_model.model.get_submodule(layer)
    up, down = module.lora_B[adapter].weight.detach(), module.lora_A[adapter].weight.detach()
    return module.scaling[adapter] * up.double() @ down.double()


def test_peft_reads_what_was_combined_and_its_cat_agrees(tmp_path: Path) -> None:
    model = llama()
    shapes = shapes_of(model)
    part = {n: s for n, s in shapes.items() if "q_proj" in n or "down" in n}
    ranks = {n: 2 + i % 3 for i, n in enumerate(part)}
    adapters = [combine([random_adapter(s, shapes)], [1]) for s in (1, 2)]
    uneven = combine([random_adapter(3, part, ranks, scale=0.3), adapters[0]], [1, 1.3])
    assert len(set(uneven.config["rank_pattern"].values())) > 1
    assert uneven.config["alpha_pattern"]
    wrapped = in_peft(model, [*adapters, uneven], tmp_path)
    for name, factors in uneven.factors.items():
        assert distance(peft_product(wrapped, name, "2"), product(factors)) < 1e-12
    wrapped.add_weighted_adapter(["0", "1"], [0.7, -0.4], "cat", combination_type="cat")
    wrapped.add_weighted_adapter(["0", "1"], [0.7, -0.4], "svd", combination_type="svd")
    for method, theirs in (("exact", "cat"), ("svd", "svd")):
        ours = combine(adapters, [0.7, -0.4], method)
        for name, factors in ours.factors.items():
            assert distance(product(factors), peft_product(wrapped, name, theirs)) < 1e-5


def test_factorize_keeps_what_a_gram_matrix_can_tell_apart() -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 6).double())[0] for n in (50, 70))
    sizes = torch.tensor([1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5]).double()
    dense = (left * sizes @ right.T).float()
    for matrix in (dense, dense.T):
        for rank in (2, 4, 5):
            made = _products.factorize(matrix, rank, torch.float32)
            missed = float((product(made.factors) - matrix.double()).norm())
            assert missed == pytest.approx(float(sizes[rank:].norm()), rel=0.02)


@pytest.mark.parametrize("condition", [1.0, 5e3, 2e4, 1e7, math.inf])
@pytest.mark.parametrize("cancels", [False, True])
def test_svd_of_rows_that_are_nearly_the_same(condition: float, cancels: bool) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 6).double())[0].T
    near = basis[:3] + basis[3:] / condition  # the rows of one adapter beside those of another
    downs = basis[:3].float(), (basis[3:] if condition == 1 else near).float()
    ups = [torch.randn(30, 3) for _ in downs]
    if cancels:
        ups[1] = ups[0] + 1e-3 * ups[1]
    adapters = [Adapter({"x": Factors(d, u, 1.0)}, {}) for d, u in zip(downs, ups, strict=True)]
    made = combine(adapters, [1, -1], "svd", rank=2)
    want = summed(adapters, [1, -1], "x")
    U, S, Vh = torch.linalg.svd(want, full_matrices=False)
    assert distance(product(made.factors["x"]), U[:, :2] * S[:2] @ Vh[:2]) < 1e-5
    assert error_of(made, "x") == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-5)
