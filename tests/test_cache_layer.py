"""MemosLayer against a dense model of the same operations."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from memos.errors import ArgumentError
from memos.kernels import pack_kv, unpack_kv
from memos.kernels.codec import Codec
from memos.kv.layer import MemosLayer

from .reference import ReferenceLayer

P, S, RECENT = 4, 2, 3
H, D = 2, 8
CODECS = ["raw", "int8-g32", "int4-g32-rot", "fp8-g32", "k:int4-g32,v:raw"]


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, H, tokens, D)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def pair(codec: str, window: int | None = None) -> tuple[MemosLayer, ReferenceLayer]:
    parsed = Codec.parse(codec)
    return (
        MemosLayer(parsed, P, S, RECENT, window),
        ReferenceLayer(parsed, P, S, RECENT, window),
    )


def check(ours: MemosLayer, theirs: ReferenceLayer) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert ours.get_max_length() == theirs.get_max_length()
    if ours.is_initialized:
        torch.testing.assert_close(ours.keys, theirs.full_keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, theirs.full_values, rtol=0, atol=0)


operation = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 11)),
    st.tuples(st.just("crop"), st.integers(0, 14)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("reorder"), st.integers(0, 2**16)),
    st.tuples(st.just("select"), st.integers(0, 2**16)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("copy"), st.just(0)),
)


@settings(max_examples=60)
@given(
    codec=st.sampled_from(CODECS),
    window=st.sampled_from([None, 2, 6, 13]),
    history=st.lists(operation, min_size=1, max_size=14),
)
def test_layer_equals_dense_model(
    codec: str, window: int | None, history: list[tuple[str, int]]
) -> None:
    ours, theirs = pair(codec, window)
    batch, kept = 1, []
    for step, (what, n) in enumerate(history):
        rows = torch.Generator().manual_seed(n)
        if what == "update":
            new = states(batch, n, step)
            torch.testing.assert_close(ours.update(*new), theirs.update(*new), rtol=0, atol=0)
        elif what == "crop":
            ours.crop(-n)
            theirs.crop(-n)
            batch = batch if ours.is_initialized else 1
        elif what == "reset":
            ours.reset()
            theirs.reset()
            batch = 1
        elif what == "copy":
            kept.append((ours.copy(), ours.dense() if ours.is_initialized else None))
        elif ours.is_initialized:
            if what == "repeat" and batch < 4:
                ours.batch_repeat_interleave(n)
                theirs.batch_repeat_interleave(n)
                batch *= n
            elif what == "reorder":
                index = torch.randint(0, batch, (batch,), generator=rows)
                ours.reorder_cache(index)
                theirs.reorder_cache(index)
            elif what == "select":
                index = torch.randint(0, batch, (1 + n % batch,), generator=rows)
                ours.batch_select_indices(index)
                theirs.batch_select_indices(index)
                batch = len(index)
        check(ours, theirs)
    for other, dense in kept:  # what was copied earlier has not changed
        if dense is not None:
            torch.testing.assert_close(other.dense(), dense, rtol=0, atol=0)


@pytest.mark.parametrize("codec", CODECS)
def test_new_tokens_take_part_exactly(codec: str) -> None:
    layer, _ = pair(codec)
    first, second = states(2, 30, 0), states(2, 9, 1)
    layer.update(*first)
    assert layer.num_packed == (30 - RECENT) // P
    got = layer.update(*second)
    torch.testing.assert_close(got[0][:, :, -9:], second[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1][:, :, -9:], second[1], rtol=0, atol=0)
    if not layer.codec.lossless:
        torch.testing.assert_close(got[0][:, :, :S], first[0][:, :, :S], rtol=0, atol=0)


def test_a_window_stays_exact() -> None:
    layer, _ = pair("int4", window=8)
    whole_k, whole_v = states(1, 40, 0)
    for i in range(40):
        got_k, got_v = layer.update(whole_k[:, :, i : i + 1], whole_v[:, :, i : i + 1])
        first = max(i - 7, 0)
        torch.testing.assert_close(got_k, whole_k[:, :, first : i + 1], rtol=0, atol=0)
        torch.testing.assert_close(got_v, whole_v[:, :, first : i + 1], rtol=0, atol=0)
    assert layer.num_packed > 0


def test_packed_bytes_are_never_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(keys: Any, values: Any, ids: Any, codec: Any) -> torch.Tensor:
        seen.extend(key.clone() for key in keys)
        return pack_kv(keys, values, ids, codec)

    monkeypatch.setattr("memos.kv.layer.pack_kv", spy)
    layer, _ = pair("int4-g32")
    layer.sink_tokens = 0
    whole = states(1, 60, 0)
    for i in range(0, 60, 5):
        layer.update(whole[0][:, :, i : i + 5], whole[1][:, :, i : i + 5])
    encoded = torch.cat([x.flatten(0, 1) for x in seen])  # [tokens, H, D]
    want = whole[0][0, :, : len(encoded)].transpose(0, 1)
    torch.testing.assert_close(encoded, want, rtol=0, atol=0)


def test_storable_until_a_cut_block() -> None:
    layer, _ = pair("int4-g32")
    layer.update(*states(1, 20, 0))
    assert (layer.num_packed, layer.storable_tokens()) == (4, 20)
    layer.crop(-10)  # 2 blocks and 2 tokens of the third, decoded
    assert (layer.num_packed, layer.tail_tokens, layer.storable_tokens()) == (2, 2, 8)
    layer.update(*states(1, 12, 1))
    assert (layer.num_packed, layer.storable_tokens()) == (4, 8)
    assert [layer.storable_tokens(first) for first in (2, 3, 5)] == [8, 22, 22]
    layer.crop(-14)  # to 8 tokens: at the edge of a block: all that is left is first-hand again
    assert layer.storable_tokens() == 8 == layer.get_seq_length()
    layer.update(*states(1, 12, 2))
    assert layer.storable_tokens() == 20


def test_lossless_blocks_stay_storable() -> None:
    layer, _ = pair("raw")
    layer.update(*states(1, 20, 0))
    layer.crop(-10)
    layer.update(*states(1, 12, 1))
    assert layer.storable_tokens() == 22


def test_strided_states() -> None:
    layer, _ = pair("int4-g32")
    wide = torch.randn(1, 12, 3 * H * D)
    key, value, _ = (x.view(1, 12, H, D).transpose(1, 2) for x in wide.split(H * D, dim=2))
    got = layer.update(key, value)
    torch.testing.assert_close(got, (key, value), rtol=0, atol=0)
    odd = torch.randn(1, H, D, 9).transpose(2, 3)
    layer.update(odd, odd)
    assert layer.get_seq_length() == 21


def test_decoding_uses_one_call_and_its_contract() -> None:
    """The overlapping windows that address any batch write each block where it belongs."""
    layer, _ = pair("int8-g32")
    layer.update(*states(3, 24, 0))
    one_by_one = []
    for b in range(3):
        keys, values = torch.empty(5, P, H, D), torch.empty(5, P, H, D)
        unpack_kv([keys], [values], torch.arange(5), layer.blocks[b], layer.codec)
        one_by_one.append(keys.permute(2, 0, 1, 3).flatten(1, 2))
    want = torch.stack(one_by_one)
    torch.testing.assert_close(layer.keys[:, :, S : 5 * P], want[:, :, S:], rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 6])
def test_decoding_for_another_device(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the host blocks are unpacked there and copied; the same values arrive."""
    layer, _ = pair("int8-g32", window)
    layer.update(*states(2, 24, 0))
    new = states(2, 3, 1)
    want = layer.copy().update(*new)
    elsewhere = torch.device("cpu", 0)  # another one than "cpu", as torch compares them
    monkeypatch.setattr("memos.kv.layer.home_of", lambda device: elsewhere)
    torch.testing.assert_close(layer.copy().update(*new), want, rtol=0, atol=0)
    layer.crop(-9)
    assert layer.get_seq_length() == 15


def test_layers_follow_their_states_to_a_device() -> None:
    """A restored cache does not know where each layer of a spread model runs."""
    layer, _ = pair("raw")
    layer.update(*states(1, 4, 0))
    layer.update(*(x.to("meta") for x in states(1, 1, 1)))
    assert layer.device.type == "meta"


def test_memory_is_freed() -> None:
    """A long prompt leaves no view behind that keeps its dense K and V alive."""
    layer, _ = pair("int4-g32")
    layer.update(*states(1, 400, 0))
    assert layer.tail is not None
    assert layer.tail[0].untyped_storage().nbytes() == layer.tail[0].nbytes
    assert layer.sinks is not None
    assert layer.sinks[0].untyped_storage().nbytes() == layer.sinks[0].nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.crop(3), "tokens_to_remove: zero or a negative number"),
        (lambda layer: layer.update(*states(2, 1, 0)), "batch 1 wanted as in the cache, got 2"),
        (
            lambda layer: layer.update(*(x.half() for x in states(1, 1, 0))),
            "float32 wanted as in the cache, got torch.float16",
        ),
    ],
)
def test_errors(change: Any, message: str) -> None:
    layer, _ = pair("int4-g32")
    layer.update(*states(1, 9, 0))
    with pytest.raises(ArgumentError, match=message):
        change(layer)


def test_refuses_what_no_codec_takes() -> None:
    layer, _ = pair("int4-g32")
    with pytest.raises(ArgumentError, match="bfloat16 wanted"):
        layer.update(*(x.double() for x in states(1, 1, 0)))
    with pytest.raises(ArgumentError, match="multiple of 8"):
        layer.update(torch.zeros(1, 1, 1, 12), torch.zeros(1, 1, 1, 12))
