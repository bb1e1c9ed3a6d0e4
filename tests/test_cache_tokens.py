"""What a MemosCache knows of its tokens, and the mistakes it turns into right answers or errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from memos.errors import ArgumentError
from memos.kv.cache import MemosCache, token_list

from .models import build, config, prompt, tiny

P, S, RECENT, NEW = 8, 2, 5, 9
OPTIONS: dict[str, Any] = {"block_tokens": P, "sink_tokens": S, "recent_tokens": RECENT}


def cache_of(model: Any, ids: torch.Tensor, codec: str = "raw") -> MemosCache:
    """A cache that was fed these tokens and knows it."""
    cache = MemosCache(model.config, codec, **OPTIONS)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.set_tokens(ids)
    return cache


def answer(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> torch.Tensor:
    """What generate answers without reuse."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
        **{"max_new_tokens": NEW, "do_sample": False, **options},
    )  # fmt: skip


@pytest.mark.parametrize("cached", [1, 40, 59, 60])
def test_inputs_continue_a_prefix(cached: int) -> None:
    """Full ids behind a prefix, and ids equal to the cached: the answer from scratch."""
    model, ids = tiny("llama"), prompt(60)
    cache = cache_of(model, ids[:, :cached])
    inputs = cache.inputs(ids)
    assert cache.get_seq_length() == min(cached, 59)
    got = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, answer(model, ids))
    assert cache.get_seq_length() == 60 + NEW - 1


def test_inputs_of_other_tokens() -> None:
    """A shared beginning is kept, the rest is computed; nothing shared: all is computed."""
    model, ids, other = tiny("llama"), prompt(60), prompt(60, seed=2)
    mixed = torch.cat([ids[:, :29], other[:, :31]], dim=1)
    for text, kept in ((mixed, 29), (other, 0)):
        cache = cache_of(model, ids)
        inputs = cache.inputs(text)
        assert (cache.get_seq_length(), cache.known_tokens) == (kept, kept)
        got = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(got, answer(model, text))


def test_new_ids_with_the_full_mask() -> None:
    """The other form that transformers understands: new ids only, but a mask for all tokens."""
    model, ids = tiny("llama"), prompt(60)
    inputs = cache_of(model, ids[:, :40]).inputs(ids)
    inputs["input_ids"] = ids[:, 40:]
    got = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, answer(model, ids)[:, 40:])


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}])
def test_inputs_with_other_ways_to_generate(options: dict[str, Any]) -> None:
    """transformers 5.23 feeds the whole prompt again in assisted decoding (a DynamicCache then
    answers wrongly): the past is dropped, with a warning, and the answer is right."""
    model, ids = tiny("llama"), prompt(60)
    cache = cache_of(model, ids[:, :40])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = model.generate(**cache.inputs(ids), max_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(got, answer(model, ids))
    assert cache.get_seq_length() == 60 + NEW - 1
    dropped = any("40 cached tokens are not used" in str(w.message) for w in caught)
    assert dropped == ("prompt_lookup_num_tokens" in options)
    cache.set_tokens(got)
    assert cache.known_tokens == 60 + NEW - 1


def test_a_dynamic_cache_is_wrong_there() -> None:
    """The bug that the test above guards against. When this fails, transformers has fixed it."""
    model, ids = tiny("llama"), prompt(60)
    exact = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=exact)
    answer(model, ids, exact, prompt_lookup_num_tokens=3)
    assert exact.get_seq_length() > 60 + NEW


@pytest.mark.parametrize(
    "misuse",
    [
        lambda m, c, ids: m(ids, past_key_values=c),  # the whole prompt again
        lambda m, c, ids: m.generate(  # other ids than inputs() was given
            torch.cat([ids, ids], 1), past_key_values=c, max_new_tokens=2
        ),
    ],
)
def test_other_input_than_prepared_is_an_error(misuse: Any) -> None:
    model, ids = tiny("llama"), prompt(60)
    cache = cache_of(model, ids[:, :40])
    cache.inputs(ids)
    with pytest.raises(ArgumentError, match=r"the 20 tokens behind the cached 40 wanted"):
        misuse(model, cache, ids)


def test_a_cache_of_one_row_is_no_cache_of_three() -> None:
    model, ids = tiny("llama"), prompt(60)
    cache = cache_of(model, ids[:, :40])
    with pytest.raises(ArgumentError, match=r"batch 1 wanted as in the cache, got 3"):
        answer(model, ids, cache, num_beams=3)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_repeated(options: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(60)
    cache = cache_of(model, ids[:, :40])
    inputs = cache.inputs(ids)
    rows = cache.repeated(3)
    torch.manual_seed(3)
    got = answer(model, ids, **options)
    torch.manual_seed(3)
    inputs["past_key_values"] = rows
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=NEW, **{"do_sample": False, **options}), got
    )
    assert (cache.get_seq_length(), cache.batch_size, rows.batch_size) == (40, 1, 3)
    beams = "num_beams" in options
    assert rows.known_tokens == 60  # beams were reordered behind the prompt
    if beams:
        with pytest.raises(ArgumentError, match="rows were mixed at token 60"):
            rows.row(0).set_tokens(got[0])
    else:
        one = rows.row(1)
        one.set_tokens(got[1])
        assert one.known_tokens == 60 + NEW - 1


def test_rows_are_trusted_up_to_the_branch() -> None:
    model, ids = tiny("llama"), prompt(40)
    cache = cache_of(model, ids)
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert (cache.get_seq_length(), cache.known_tokens) == (41, 40)
    with pytest.raises(ArgumentError, match="rows were mixed at token 40"):
        cache.set_tokens([*ids[0].tolist(), 5])
    cache.crop(-3)
    assert cache.known_tokens == 38
    cache.set_tokens(ids)  # what was mixed is gone


def test_copy_shares_blocks_and_is_independent() -> None:
    model, ids = tiny("llama"), prompt(60)
    cache = cache_of(model, ids[:, :40], "int4-g32")
    before = cache.dense()
    other = cache.copy()
    got = model.generate(**other.inputs(ids), max_new_tokens=NEW, do_sample=False)
    assert (cache.get_seq_length(), cache.known_tokens) == (40, 40)
    for mine, then in zip(cache.dense().layers, before.layers, strict=True):
        torch.testing.assert_close(mine.keys, then.keys, rtol=0, atol=0)
    mine, theirs = cache.layers[0].blocks[0], other.layers[0].blocks[0]
    assert [b.data_ptr() for b in mine] == [b.data_ptr() for b in theirs[: len(mine)]]
    again = model.generate(**cache.copy().inputs(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(again, got)
    deep = copy.deepcopy(cache)
    assert deep.layers[0].blocks[0][0].data_ptr() != mine[0].data_ptr()


def test_crop_reset_and_batch_size() -> None:
    model, ids = tiny("llama"), prompt(40)
    cache = MemosCache(model.config, "int4-g32", **OPTIONS)
    assert (cache.batch_size, cache.get_seq_length(), cache.known_tokens) == (-1, 0, 0)
    assert cache.is_croppable
    assert not cache.is_compileable
    cache = cache_of(model, ids, "int4-g32")
    cache.crop(-17)
    assert (cache.known_tokens, len(cache.token_ids), cache.batch_size) == (23, 23, 1)
    cache.crop(-100)
    assert (cache.get_seq_length(), cache.known_tokens) == (0, 0)
    got = model.generate(**cache.inputs(ids), max_new_tokens=NEW, do_sample=False)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.token_ids) == (-1, 0, [])
    again = model.generate(**cache.inputs(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(again, got)


def test_bytes() -> None:
    model, ids = build("llama", dtype=torch.bfloat16, head_dim=64), prompt(400)
    cache = MemosCache(model.config, "int4")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.dense_bytes() == 3 * 400 * 2 * (64 + 64) * 2
    assert 0.28 < cache.packed_bytes() / cache.dense_bytes() < 0.55
    one = cache.packed_bytes()
    exact = sum(layer.exact_bytes() for layer in cache.layers)
    cache.batch_repeat_interleave(3)
    assert cache.packed_bytes() == one + 2 * exact  # blocks are shared
    assert cache.dense_bytes() == 3 * 3 * 400 * 2 * (64 + 64) * 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_from_cache(name: str) -> None:
    model, ids = tiny(name), prompt(20)
    exact = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=24)
    for theirs in (exact, static):
        with torch.no_grad():
            model(ids, past_key_values=theirs)
        ours = MemosCache.from_cache(theirs, model.config, ids, codec="raw", block_tokens=P)
        assert ours.known_tokens == 20
        got = model.generate(**ours.inputs(prompt(20)), max_new_tokens=3, do_sample=False)
        assert torch.equal(got, answer(model, ids, max_new_tokens=3))


def test_from_cache_refuses_what_is_not_exact() -> None:
    model, ids = tiny("gemma3"), prompt(60)
    exact = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=exact)
    with pytest.raises(ArgumentError, match=r"DynamicSlidingWindowLayer in layer 0"):
        MemosCache.from_cache(exact, model.config)
    with pytest.raises(ArgumentError, match=r"a transformers Cache of 3 layers wanted, got tuple"):
        MemosCache.from_cache((), model.config)
    quantised = transformers.QuantizedCache("fp8", config=tiny("llama").config)
    with torch.no_grad():
        tiny("llama")(ids, past_key_values=quantised)
    with pytest.raises(ArgumentError, match=r"Fp8QuantizedLayer in layer 0"):
        MemosCache.from_cache(quantised, tiny("llama").config)


def test_cropping_a_full_window() -> None:
    """transformers' own sliding layers cannot go back; with window_history they can."""
    model, ids = tiny("gemma3"), prompt(60)
    plain = cache_of(model, ids)
    with pytest.raises(ArgumentError, match="window_history=True"):
        plain.crop(-1)
    assert plain.get_seq_length() == 60
    kept = MemosCache(model.config, "raw", **OPTIONS, window_history=True)
    with torch.no_grad():
        model(ids, past_key_values=kept)
    kept.set_tokens(ids)
    text = torch.cat([ids[:, :31], prompt(20, seed=5)], dim=1)
    got = model.generate(**kept.inputs(text), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, answer(model, text))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.Qwen3NextConfig(num_hidden_layers=4), "linear_attention in layer 0"),
        (lambda: transformers.T5Config(), "got encoder-decoder t5"),
        (lambda: transformers.MambaConfig(num_hidden_layers=2), "of mamba"),
        (
            lambda: transformers.Lfm2Config(
                num_hidden_layers=2, layer_types=["full_attention", "conv"]
            ),
            "got conv in layer 1 of lfm2",
        ),
        (lambda: {"hidden_size": 8}, "num_layers or num_hidden_layers wanted"),
    ],
)
def test_refuses_models_by_name(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MemosCache(make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "int5"}, "codec: raw, or"),
        ({"block_tokens": 0}, "block_tokens: at least 1 wanted, got 0"),
        ({"sink_tokens": 64}, "sink_tokens: 0 to block_tokens - 1 = 63 wanted, got 64"),
        ({"recent_tokens": -1}, "recent_tokens: at least 0 wanted, got -1"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MemosCache(config("llama"), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, ids: c.set_tokens(ids[:, :39]), "40 ids wanted as in the cache, got 39"),
        (lambda c, ids: c.set_tokens(ids.roll(1)), "at position 0 where the cache holds"),
        (lambda c, ids: c.inputs([]), "at least one token wanted"),
        (
            lambda c, ids: c.inputs(ids.repeat(2, 1)),
            r"shape \[n\] or \[1, n\] wanted, got \[2, 40\]",
        ),
        (lambda c, ids: c.inputs("hello"), "a list or tensor of ints wanted, got str"),
        (lambda c, ids: c.inputs([1, -1]), "ints of at least 0 wanted, got -1"),
        (lambda c, ids: c.inputs([1, 0.5]), "ints wanted"),
    ],
)
def test_refuses_tokens(call: Any, message: str) -> None:
    cache = cache_of(tiny("llama"), prompt(40))
    with pytest.raises(ArgumentError, match=message):
        call(cache, prompt(40))


def test_unknown_tokens() -> None:
    model, ids = tiny("llama"), prompt(40)
    cache = MemosCache(model.config, **OPTIONS)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ArgumentError, match="got 40 tokens with unknown ids; call set_tokens"):
        cache.inputs(ids)
    cache.set_tokens(np.asarray(ids))
    assert cache.inputs([*ids[0].tolist(), 4])["input_ids"].shape == (1, 41)


def test_token_list() -> None:
    for form in ([1, 2], (1, 2), torch.tensor([[1, 2]]), np.array([1, 2]), [np.int64(1), 2]):
        assert token_list(form) == [1, 2]
