"""generate() with a MemosCache gives the tokens that an exact cache of the same values gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from memos.kv.cache import MemosCache

from .models import CONFIGS, SLIDING, build, prompt, tiny
from .reference import reference_cache

P, S, RECENT = 8, 2, 5
NEW = 14

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams_sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "chunked": {"do_sample": False, "prefill_chunk_size": 7},
}
CODECS = ["int8-g32", "int4-g32-rot", "fp8-g32", "int2-g32"]


def generate(model: Any, cache: Any, ids: torch.Tensor, call: str) -> Any:
    options = CALLS[call]
    torch.manual_seed(7)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for got, want in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def rows(call: str) -> int:
    return max(CALLS[call].get("num_beams", 1), CALLS[call].get("num_return_sequences", 1))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_raw_equals_dynamic_cache(name: str, call: str) -> None:
    model, ids = tiny(name), prompt(45)
    ours = MemosCache(model.config, "raw", block_tokens=P, recent_tokens=RECENT)
    got = generate(model, ours, ids, call)
    want = generate(model, DynamicCache(config=model.config), ids, call)
    same(got, want)
    assert ours.get_seq_length() == want.past_key_values.get_seq_length()
    theirs = want.past_key_values
    for mine, other in zip(ours.dense().layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=0)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_equal_the_reference_cache(codec: str, call: str) -> None:
    model, ids = tiny("llama"), prompt(45)
    ours = MemosCache(model.config, codec, block_tokens=P, sink_tokens=S, recent_tokens=RECENT)
    theirs = reference_cache(model.config, codec, P, S, RECENT)
    same(generate(model, ours, ids, call), generate(model, theirs, ids, call))
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("call", ["greedy", "beams", "prompt_lookup", "chunked"])
@pytest.mark.parametrize(
    ("name", "history"),
    [(n, h) for n in CONFIGS if n != "llama" for h in (False, True) if n in SLIDING or not h],
)
def test_architectures_equal_the_reference_cache(name: str, history: bool, call: str) -> None:
    model, ids = tiny(name), prompt(45)
    ours = MemosCache(
        model.config, "int4-g32-rot", block_tokens=P, sink_tokens=S, recent_tokens=RECENT,
        window_history=history,
    )  # fmt: skip
    theirs = reference_cache(model.config, "int4-g32-rot", P, S, RECENT, history)
    same(generate(model, ours, ids, call), generate(model, theirs, ids, call))


@pytest.mark.parametrize("name", SLIDING)
def test_window_history_changes_no_token(name: str) -> None:
    """Sliding layers stay exact: packing what left the window changes nothing that is seen."""
    model, ids = tiny(name), prompt(45)
    options: dict[str, Any] = {"block_tokens": P, "sink_tokens": S, "recent_tokens": RECENT}
    plain = MemosCache(model.config, "int4-g32", **options)
    kept = MemosCache(model.config, "int4-g32", **options, window_history=True)
    same(generate(model, kept, ids, "greedy"), generate(model, plain, ids, "greedy"))
    assert kept.is_sliding == plain.is_sliding == DynamicCache(config=model.config).is_sliding


def test_left_padded_batch() -> None:
    model = tiny("llama")
    ids = torch.cat([prompt(45, seed=s) for s in (1, 2, 3)])
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 13, 30)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    options: dict[str, Any] = {
        "attention_mask": mask, "do_sample": False, "max_new_tokens": NEW,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    raw = MemosCache(model.config, "raw", block_tokens=P, recent_tokens=RECENT)
    exact = DynamicCache(config=model.config)
    same(
        model.generate(ids, past_key_values=raw, **options),
        model.generate(ids, past_key_values=exact, **options),
    )
    ours = MemosCache(model.config, "int4", block_tokens=P, sink_tokens=S, recent_tokens=RECENT)
    theirs = reference_cache(model.config, "int4", P, S, RECENT)
    same(
        model.generate(ids, past_key_values=ours, **options),
        model.generate(ids, past_key_values=theirs, **options),
    )


def test_assistant_model() -> None:
    model, ids = tiny("llama"), prompt(45)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    want = model.generate(ids, **options)
    ours = MemosCache(model.config, "raw", block_tokens=P, recent_tokens=RECENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.generate(ids, past_key_values=ours, assistant_model=model, **options)
    assert torch.equal(got, want)


def test_continuing_by_hand_equals_dynamic_cache() -> None:
    """Several forward passes with masks of a padded batch and crops between them."""
    model = tiny("qwen3")
    ids = torch.cat([prompt(60, seed=s) for s in (1, 2)])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ours = MemosCache(model.config, "raw", block_tokens=P, recent_tokens=0)
    theirs = DynamicCache(config=model.config)
    length = 0
    with torch.no_grad():
        for count, crop in ((31, 0), (1, 0), (8, -20), (3, -1), (30, 0)):
            new = ids[:, length : length + count]
            seen = mask[:, : length + count]
            got = model(new, attention_mask=seen, past_key_values=ours).logits
            want = model(new, attention_mask=seen, past_key_values=theirs).logits
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            ours.crop(crop)
            theirs.crop(crop)
            length += count + crop
            assert ours.get_seq_length() == theirs.get_seq_length() == length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids = build("llama", dtype=dtype), prompt(45)
    raw = MemosCache(model.config, "raw", block_tokens=P, recent_tokens=RECENT)
    same(
        generate(model, raw, ids, "greedy"),
        generate(model, DynamicCache(config=model.config), ids, "greedy"),
    )
    ours = MemosCache(model.config, "int4", block_tokens=P, sink_tokens=S, recent_tokens=RECENT)
    theirs = reference_cache(model.config, "int4", P, S, RECENT)
    same(generate(model, ours, ids, "greedy"), generate(model, theirs, ids, "greedy"))
