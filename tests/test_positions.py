"""Keys at other positions: against the model's own rotary embedding, and refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="keys are torch tensors")
pytest.importorskip("transformers", reason="the models are those of transformers")

import transformers  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from memos.errors import ArgumentError  # noqa: E402
from memos.kernels import rotate_positions_  # noqa: E402
from memos.kv.positions import positions_of  # noqa: E402

from . import models  # noqa: E402

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
}
_SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def small(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**_SMALL, **changes})
    return getattr(transformers, kind + "ForCausalLM")(config).eval()


def cached(model: Any, ids: torch.Tensor, first: int) -> tuple[list[Any], list[Any]]:
    """Keys and values of tokens whose positions begin at ``first``."""
    cache = transformers.DynamicCache(config=model.config)
    at = torch.arange(first, first + ids.shape[1])[None]
    with torch.no_grad():
        model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def shifted_alike(model: Any, old: int, new: int, tolerance: float) -> None:
    """A prefill at other positions has the values of this one, and its keys turned."""
    ids = models.prompt(23)
    keys, values = cached(model, ids, old)
    want, same = cached(model, ids, new)
    at = torch.arange(ids.shape[1])
    positions_of(model).move_(keys, at + old, at + new)
    for got, key in zip(keys + values, want + same, strict=True):
        assert torch.allclose(got.float(), key.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("shift", [(0, 9), (40, 3), (3, 300)])
def test_prefill_at_shifted_positions(rope: str, shift: tuple[int, int]) -> None:
    shifted_alike(models.build("llama", rope_parameters=ROPES[rope]), *shift, 2e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_architectures(architecture: str) -> None:
    shifted_alike(models.tiny(architecture), 2, 17, 2e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Cohere", {}),  # neighbouring channels are a pair
        ("Glm", {"head_dim": 8, "rope_parameters": {**ROPES["default"],
                                                    "partial_rotary_factor": 0.5}}),
        ("Phi", {"rope_parameters": {**ROPES["default"], "partial_rotary_factor": 0.5}}),
        ("GPTNeoX", {"rope_parameters": {**ROPES["default"], "partial_rotary_factor": 0.5}}),
        ("SmolLM3", {"no_rope_layers": [1, 0]}),  # a layer without positions
        ("Olmo2", {}),
    ],
)  # fmt: skip
def test_layouts(kind: str, changes: dict[str, Any]) -> None:
    """Half of the channels, pairs of neighbours, and layers that turn nothing."""
    shifted_alike(small(kind, **changes), 5, 31, 3e-4)


def test_layouts_are_seen() -> None:
    assert positions_of(small("Cohere")).layers[0].interleaved
    assert not positions_of(models.tiny("llama")).layers[0].interleaved
    assert positions_of(small("SmolLM3", no_rope_layers=[1, 0])).layers[1] is None
    partial = small("Phi", rope_parameters={**ROPES["default"], "partial_rotary_factor": 0.5})
    assert 2 * len(positions_of(partial).layers[0].inv_freq) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: Any) -> None:
    """Off by what the model's own cosines, rounded to the dtype, are off."""
    model = models.build("llama", dtype=dtype)
    ids = models.prompt(1)
    keys, _ = cached(model, ids, 0)
    want, _ = cached(model, ids, 200)
    positions_of(model).move_(keys, 0, 200)
    for got, key in zip(keys, want, strict=True):
        room = 4 * torch.finfo(dtype).eps * float(key.abs().max())
        assert float((got.float() - key.float()).abs().max()) <= room


@pytest.mark.parametrize("position", [4095, 131_071, 999_999])
def test_far_positions(position: int) -> None:
    """As the model's own embedding turns a key, to float32's last digits, out to a million."""
    model = models.build("llama", max_position_embeddings=1 << 20)
    key = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(3))
    at = torch.arange(position - 4, position + 1)
    cos, sin = model.model.rotary_emb(key, at[None])
    half = torch.cat([-key[..., 4:], key[..., :4]], dim=-1)
    want = key * cos + half * sin
    got = key.clone()
    positions_of(model).move_([got, got.clone(), got.clone()], 0, at)
    assert torch.allclose(got, want, rtol=0, atol=2e-6)


POSITION = st.integers(0, 1_000_000)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 4),) * 4),
    rotary=st.integers(1, 20),
    more=st.integers(0, 5),
    a=POSITION,
    b=POSITION,
    interleaved=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_complex_numbers(
    shape: tuple[int, int, int, int], rotary: int, more: int, a: int, b: int, interleaved: bool,
    seed: int,
) -> None:  # fmt: skip
    """A pair is a complex number, times e^(i angle): on Python's floats; and there and back."""
    L, B, H, T = shape
    g = torch.Generator().manual_seed(seed)
    D = 2 * rotary + more
    keys = [torch.randn(B, H, T, D, generator=g) for _ in range(L)]
    frequencies = torch.rand(rotary, generator=g, dtype=torch.float64)
    old, new = torch.arange(T) + a, torch.arange(T) + b
    moved = [key.clone() for key in keys]
    rotate_positions_(moved, old, new, frequencies, interleaved)
    t, r = T - 1, rotary - 1
    i, j = (2 * r, 2 * r + 1) if interleaved else (r, r + rotary)
    angle = float(new[t]) * float(frequencies[r]) - float(old[t]) * float(frequencies[r])
    before = complex(keys[-1][-1, -1, t, i], keys[-1][-1, -1, t, j])
    after = before * complex(math.cos(angle), math.sin(angle))
    assert abs(complex(moved[-1][-1, -1, t, i], moved[-1][-1, -1, t, j]) - after) < 2e-6
    assert torch.equal(moved[0][..., 2 * rotary :], keys[0][..., 2 * rotary :])
    rotate_positions_(moved, new, old, frequencies, interleaved)
    for back, key in zip(moved, keys, strict=True):
        assert torch.allclose(back, key, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rope", "name"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
          "original_max_position_embeddings": 128, "rope_theta": 1e4, "factor": 4.0}, "longrope"),
        ({**ROPES["default"], "mrope_section": [2, 1, 1]}, "mrope"),
    ],
)  # fmt: skip
def test_types_that_do_not_allow_it(rope: dict[str, Any], name: str) -> None:
    model = models.build("llama")
    model.config.rope_parameters = rope
    with pytest.raises(ArgumentError, match=f"got {name} in llama"):
        positions_of(model)


def test_models_without_rotary_positions() -> None:
    small_gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97)
    with pytest.raises(ArgumentError, match="none in gpt2"):
        positions_of(transformers.GPT2LMHeadModel(small_gpt2).eval())
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    with pytest.raises(ArgumentError, match="bloom"):
        positions_of(transformers.BloomForCausalLM(bloom).eval())


def test_keys_that_turn_otherwise_are_refused() -> None:
    """The model is asked, not only its config."""
    model = models.build("llama")
    model.model.rotary_emb.original_inv_freq = model.model.rotary_emb.inv_freq * 3
    with pytest.raises(ArgumentError, match="got others in layer 0 of llama"):
        positions_of(model)


def test_contract() -> None:
    key, at, freq = torch.zeros(1, 2, 3, 8), torch.arange(3), torch.ones(4)
    for args, what in (
        (([], at, at, freq), "at least one layer"),
        (([key], at[:2], at, freq), "old"),
        (([key], at, at.int(), freq), "new"),
        (([key], at, at, torch.ones(5)), "inv_freq: at most D / 2 = 4"),
        (([key, key.half()], at, at, freq), r"keys\[1\]"),
        (([key.transpose(2, 3)], torch.arange(8), torch.arange(8), freq[:1]), "stride 1"),
        (([key[:, :1].expand(1, 2, 3, 8)], at, at, freq), "numbers of their own"),
    ):
        with pytest.raises(ArgumentError, match=what):
            rotate_positions_(*args)
