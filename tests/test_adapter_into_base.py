"""Adapters merged into a base: rounded once, and the base comes back bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="adapters are torch tensors")

from memos.adapters.adapter import Adapter, Factors  # noqa: E402
from memos.adapters.merge import combine, merge_into_base  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402

from .adapter_merge_help import (  # noqa: E402
    gpt2,
    in_peft,
    llama,
    random_adapter,
    shapes_of,
    summed,
)

torch.set_num_threads(1)


def bytes_of(model: Any) -> dict[str, tuple[int, int, bytes]]:
    return {
        name: (id(p), p.data_ptr(), p.detach().contiguous().view(torch.uint8).numpy().tobytes())
        for name, p in model.named_parameters(remove_duplicate=False)
    }


MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once_and_the_base_comes_back(
    kind: str, dtype: torch.dtype
) -> None:
    model = MODELS[kind](dtype)
    shapes = shapes_of(model)
    some = {name: shapes[name] for name in list(shapes)[:5]}
    adapters = [random_adapter(1, shapes, dtype=torch.bfloat16), random_adapter(2, some, rank=3)]
    before = bytes_of(model)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    merged = merge_into_base(model, adapters, [0.5, -2])
    assert set(merged.layers) == set(shapes)
    for name in shapes:
        delta = summed(adapters, [0.5, -2], name)
        want = weights[f"{name}.weight"] + (delta if kind == "llama" else delta.T)
        got = model.get_submodule(name).weight
        assert got.dtype == dtype
        one_rounding = torch.finfo(dtype).eps / 2 * want.abs() + 6e-6
        assert bool(((got.double() - want).abs() <= one_rounding).all())
    assert merged.num_bytes == sum(model.get_submodule(n).weight.nbytes for n in shapes)
    for name, (_, _, data) in before.items():
        if name.removesuffix(".weight") not in shapes:
            assert bytes_of(model)[name][2] == data
    merged.unmerge()
    assert bytes_of(model) == before
    merged.unmerge()
    assert bytes_of(model) == before


def test_the_merged_model_says_what_the_adapter_says(tmp_path: Path) -> None:
    from tests import models

    for kind, build in MODELS.items():
        adapter = combine([random_adapter(4, shapes_of(build()), scale=0.5)], [1])
        config = {**adapter.config, "fan_in_fan_out": kind == "gpt2"}
        (tmp_path / kind).mkdir()
        wrapped = in_peft(build(), [Adapter(adapter.factors, config)], tmp_path / kind)
        model, ids = build(), models.prompt(12)
        with torch.no_grad():
            base, want = model(ids).logits, wrapped(ids).logits
            with merge_into_base(model, adapter) as merged:
                assert merged.active
                got = model(ids).logits
            assert not merged.active
            assert torch.equal(model(ids).logits, base)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert float((got - base).abs().max()) > 0.1


@given(history=st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=14))
@settings(max_examples=25)
def test_any_history_of_merges_comes_back(history: list[int | None]) -> None:
    layers = torch.nn.ModuleDict({"x": torch.nn.Linear(8, 6), "y": torch.nn.Linear(6, 8)})
    layers.to(torch.bfloat16)
    states, stack = [bytes_of(layers)], []
    for step in history:
        if step is not None:
            names = [["x"], ["y"], ["x", "y"]][step % 3]
            adapter = random_adapter(step, {n: ((8, 6) if n == "x" else (6, 8)) for n in names})
            stack.append(merge_into_base(layers, adapter))
            states.append(bytes_of(layers))
        elif stack:
            last = stack.pop()
            for under in stack:
                if set(under.layers) & set(last.layers):
                    with pytest.raises(ArgumentError, match="undo what was merged later"):
                        under.unmerge()
                    assert under.active
            assert bytes_of(layers) == states.pop()
            last.unmerge()
        assert bytes_of(layers) == states[-1]


def test_an_exception_inside_the_block_unmerges() -> None:
    model = llama()
    before = bytes_of(model)

    def fails_while_merged() -> None:
        with merge_into_base(model, random_adapter(1, shapes_of(model))):
            assert bytes_of(model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_while_merged()
    assert bytes_of(model) == before


@pytest.mark.parametrize("layer", ["lm_head", "model.layers.0.self_attn.q_proj"])
def test_a_tied_weight_stays_as_it_is_for_the_other_user(layer: str) -> None:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = bytes_of(model)
    module = model.get_submodule(layer)
    adapter = random_adapter(1, {layer: (module.in_features, module.out_features)})
    merged = merge_into_base(model, adapter)
    assert module.weight is not merged._places[0].base
    assert bytes_of(model)["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]
    merged.unmerge()
    assert bytes_of(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tying_or_moving_meanwhile_is_named() -> None:
    model = llama(tie_word_embeddings=True)
    before = bytes_of(model)
    merged = merge_into_base(model, random_adapter(1, {"lm_head": (32, 97)}))
    placed = model.lm_head.weight
    model.tie_weights()
    with pytest.raises(ArgumentError, match=r"layer 'lm_head' no longer has the merged weight"):
        merged.unmerge()
    model.lm_head.weight = placed
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"merged as torch.float32 on cpu and is now torch.bf"):
        merged.unmerge()
    model.lm_head.to(torch.float32)
    merged.unmerge()
    assert bytes_of(model) == before


class Stubborn(torch.nn.Linear):
    """Takes no other weight once it is locked."""

    locked = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.locked:
            raise RuntimeError("locked")
        super().__setattr__(name, value)


def layer_of(kind: str) -> torch.nn.Module:
    if kind == "int8":
        linear = torch.nn.Linear(32, 32)
        linear.weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), False)
    elif kind == "float8":
        linear = torch.nn.Linear(32, 32)
        data = linear.weight.data.to(torch.float8_e4m3fn)
        linear.weight = torch.nn.Parameter(data, requires_grad=False)
    elif kind == "float64":
        linear = torch.nn.Linear(32, 32, dtype=torch.float64)
    elif kind == "packed":

        class Packed(torch.nn.Parameter):
            pass

        linear = torch.nn.Linear(32, 32)
        linear.weight = Packed(torch.ones(32, 32))
    elif kind == "meta":
        linear = torch.nn.Linear(32, 32, device="meta")
    elif kind == "parametrised":
        linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(32, 32))
    elif kind == "narrow":
        linear = torch.nn.Linear(16, 32)
    elif kind == "embedding":
        linear = torch.nn.Embedding(32, 32)
    elif kind == "locked":
        linear = Stubborn(32, 32)
        linear.locked = True
    return linear


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "int8",
            ArgumentError,
            "'b': a weight of float32, .* wanted, got Parameter of torch.in",
        ),
        ("float64", ArgumentError, "'b': .* of torch.float64"),
        ("float8", ArgumentError, "'b': .* of torch.float8_e4m3fn: a quantised weight"),
        ("packed", ArgumentError, "'b': .* got Packed of torch.float32"),
        ("meta", ArgumentError, "'b': its weight is on the meta device"),
        ("parametrised", ArgumentError, "'b': a plain weight wanted"),
        ("narrow", ArgumentError, r"'b' is of \[O, I\] = \[32, 16\] in the model, of \[32, 32\]"),
        ("embedding", ArgumentError, "'b': Linear or Conv1D wanted, got Embedding"),
        ("locked", RuntimeError, "locked"),
    ],
)
def test_nothing_is_half_merged(kind: str, error: type[Exception], message: str) -> None:
    names = dict.fromkeys("abc", (32, 32))
    layers = torch.nn.ModuleDict({n: torch.nn.Linear(32, 32) for n in "ac"} | {"b": layer_of(kind)})
    before = {n: layers[n].weight for n in "ac"}
    with pytest.raises(error, match=message):
        merge_into_base(layers, random_adapter(1, names))
    assert all(layers[n].weight is weight for n, weight in before.items())


def test_what_does_not_fit_the_model_is_named() -> None:
    shared = torch.nn.Linear(8, 8)
    layers = torch.nn.ModuleDict({"x": shared, "y": shared})
    for adapters, weights, message in [
        (random_adapter(1, {"x": (8, 8), "z": (8, 8)}), None, "'z': the model ModuleDict has none"),
        (random_adapter(1, {"x": (8, 8), "y": (8, 8)}), None, "two of .* are the same"),
        ([random_adapter(1, {"x": (8, 8)})], [1, 2], "weights: one per adapter"),
        ([random_adapter(1, {"x": (8, 8)})], [math.nan], r"weights\[0\]"),
        ([], None, "adapters: one or more"),
        (Adapter({"x": Factors(torch.ones(1, 8), torch.full((8, 1), math.inf), 1.0)}, {}), None,
         "not finite"),
    ]:  # fmt: skip
        before = shared.weight
        with pytest.raises(ArgumentError, match=message):
            merge_into_base(layers, adapters, weights)
        assert shared.weight is before
