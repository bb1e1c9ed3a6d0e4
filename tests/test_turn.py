"""kv.begin, generate, commit: what is reused is right, and only what is certain is stored."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from memos.errors import ArgumentError
from memos.memories.kv_cache import KVCacheMemory

from .models import CONFIGS, build, prompt, tiny
from .reference import reference_cache
from .turns import NEW, RECENT, P, S, fill, from_scratch, memory, run


@pytest.mark.parametrize("name", CONFIGS)
def test_conversation_equals_no_reuse(name: str, tmp_path: Path) -> None:
    """Turns in several processes' worth of memories: raw gives the tokens of no cache at all."""
    model, text = tiny(name), prompt(37)
    for turn_number in range(4):
        with memory(model, path=tmp_path) as kv:
            turn = kv.begin("a", text)
            output = run(model, turn)
            assert torch.equal(output, from_scratch(model, text))
            turn.commit(output)
            assert turn.reused_tokens == (text.shape[1] - 6 if turn_number else 0)
            assert turn.stored_tokens == output.shape[1] - 1
        text = torch.cat([output, prompt(5, seed=turn_number)], dim=1)


@pytest.mark.parametrize("codec", ["int8-g32", "int4", "fp8-g32"])
def test_restored_equals_the_live_cache(codec: str, tmp_path: Path) -> None:
    """What comes back from disk is, bit for bit, what the cache of the first process held."""
    model, ids = tiny("llama"), prompt(61)
    with memory(model, codec, path=tmp_path) as kv:
        turn = kv.begin("a", ids)
        output = run(model, turn)
        turn.commit(output)
        live = turn.cache
        longer = torch.cat([output, prompt(7, seed=9)], dim=1)
        live.set_tokens(output)
        want = model.generate(**live.copy().inputs(longer), max_new_tokens=NEW, do_sample=False)
    with memory(model, codec, path=tmp_path) as kv:
        turn = kv.begin("a", longer)
        assert turn.reused_tokens == output.shape[1] - 1
        # recent tokens that are packed in the store but exact in the live cache make a difference
        packed = turn.cache.layers[0].num_packed
        for mine, theirs in zip(turn.cache.layers, live.layers, strict=True):
            n = min(packed, theirs.num_packed) * P
            for x, y in zip(mine.dense(), theirs.dense(), strict=True):
                torch.testing.assert_close(x[:, :, :n], y[:, :, :n], rtol=0, atol=0)
        assert run(model, turn).shape == want.shape


@pytest.mark.parametrize("codec", ["int4", "int8-g32"])
def test_restored_equals_the_reference_cache(codec: str) -> None:
    """All whole blocks of the prefix as decode(encode(...)), the tail and the sinks exact."""
    model, ids = tiny("llama"), prompt(61)
    kv = memory(model, codec)
    output = fill(kv, model, ids)
    turn = kv.begin("a", torch.cat([output, prompt(7, seed=9)], dim=1))
    theirs = reference_cache(model.config, codec, P, S, recent=0)
    live = reference_cache(model.config, codec, P, S, RECENT)
    torch.equal(
        model.generate(ids, past_key_values=live, max_new_tokens=NEW, do_sample=False), output
    )
    for mine, other, seen in zip(turn.cache.layers, theirs.layers, live.layers, strict=True):
        start = seen.num_packed * P
        other.update(seen.keys[:, :, :start], seen.values[:, :, :start])
        other.keys, other.values, other.num_packed = seen.keys, seen.values, seen.num_packed
        while other.num_packed < mine.num_packed:
            other.replace(other.num_packed * P)
            other.num_packed += 1
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=0)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=0)


# The pitfalls of continuing a cache by hand: through begin each of them is right.


@pytest.mark.parametrize(
    ("length", "reused"), [(1, 0), (16, 15), (37, 32), (44, 43), (45, 44), (46, 45), (60, 45)]
)
def test_prefixes_equal_ids_and_longer(length: int, reused: int) -> None:
    """Shorter than what is stored, equal to it, a block's edge, longer: always right."""
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    output = fill(kv, model, ids)  # 45 tokens are stored: 5 blocks and a tail of 5
    text = torch.cat([output, prompt(30, seed=2)], dim=1)[:, :length]
    turn = kv.begin("a", text)
    assert turn.reused_tokens == reused
    assert torch.equal(run(model, turn), from_scratch(model, text))


@pytest.mark.parametrize("shared", [0, 3, 8, 13, 40, 42])
def test_other_tokens(shared: int) -> None:
    """Whatever differs is computed: in block 0, at a block's edge, inside a block, in the tail."""
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    output = fill(kv, model, ids)
    other = torch.cat([output[:, :shared], prompt(46 - shared, seed=3)], dim=1)
    other[0, shared] = output[0, shared] % 90 + 1
    turn = kv.begin("a", other)
    assert turn.reused_tokens == (shared if shared >= 40 else shared // P * P)
    assert torch.equal(run(model, turn), from_scratch(model, other))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_rows(options: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    text = torch.cat([fill(kv, model, ids), prompt(5, seed=2)], dim=1)
    batch = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    turn = kv.begin("a", text, batch=batch)
    assert turn.reused_tokens == 45
    torch.manual_seed(5)
    got = run(model, turn, **options)
    torch.manual_seed(5)
    assert torch.equal(got, from_scratch(model, text, **options))


def test_rows_without_batch_is_an_error() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    fill(kv, model, ids)
    with pytest.raises(ArgumentError, match="begin with batch=n"):
        run(model, kv.begin("a", ids), num_beams=2)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3}])
def test_chunked_prefill_and_prompt_lookup(options: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    text = torch.cat([fill(kv, model, ids), prompt(5, seed=2)], dim=1)
    turn = kv.begin("a", text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = run(model, turn, **options)
    assert torch.equal(got, from_scratch(model, text))
    turn.commit(got)
    assert turn.stored_tokens == got.shape[1] - 1


def test_generate_changes_nothing_that_is_stored() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model, "int4")
    output = fill(kv, model, ids)
    turns = [kv.begin("a", output) for _ in range(3)]
    before = [layer.dense() for layer in turns[0].cache.layers]
    answers = [run(model, turns[1]), run(model, turns[2], do_sample=True)]
    for layer, dense in zip(turns[0].cache.layers, before, strict=True):
        torch.testing.assert_close(layer.dense(), dense, rtol=0, atol=0)
    assert torch.equal(run(model, turns[0]), answers[0])
    again = kv.begin("a", output)
    for layer, dense in zip(again.cache.layers, before, strict=True):
        torch.testing.assert_close(layer.dense(), dense, rtol=0, atol=0)


def test_one_turn_can_be_tried_again() -> None:
    """Reading ``inputs`` after generate gives fresh ones; commit takes the cache that was used."""
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids)
    first = run(model, turn)
    assert torch.equal(run(model, turn), first)
    assert turn.inputs["input_ids"].shape == (1, 37)
    assert turn.cache.get_seq_length() == 37 + NEW - 1
    turn.commit(first)
    assert turn.stored_tokens == 37 + NEW - 1


# What is stored.


def test_only_new_blocks_are_written() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids)
    output = run(model, turn)
    turn.commit(output)
    assert (turn.new_blocks, kv.stats()["host"]["blocks"]) == (6, 6)  # 5 blocks and a tail
    turn = kv.begin("a", torch.cat([output, prompt(3, seed=2)], dim=1))
    assert turn.reused_tokens == 45
    turn.commit(run(model, turn))  # 57 tokens: 7 blocks and a tail of 1; the old tail is gone
    assert (turn.new_blocks, turn.stored_tokens) == (3, 57)
    assert kv.stats()["host"]["blocks"] == 8
    assert kv.stats()["put_blocks"] == 9


def test_bytes_of_a_turn() -> None:
    model, ids = build("llama", dtype=torch.bfloat16, head_dim=64), prompt(300)
    kv = KVCacheMemory("chat", model=model)
    turn = kv.begin("a", ids)
    assert (turn.reused_tokens, turn.stored_bytes, turn.raw_bytes) == (0, 0, 0)
    turn.commit(run(model, turn))
    assert turn.stored_tokens == 308
    assert turn.raw_bytes == 308 * 3 * 2 * (64 + 64) * 2
    assert turn.stored_bytes == kv.stats()["host"]["bytes"]
    assert turn.stored_bytes < 0.5 * turn.raw_bytes
    again = kv.begin("a", torch.cat([ids, ids], dim=1))
    assert again.reused_tokens == 300
    assert again.raw_bytes == 300 * 3 * 2 * (64 + 64) * 2


def test_commit_without_output_stores_the_prompt() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids)
    with torch.no_grad():
        model(**turn.inputs)
    turn.commit()
    assert turn.stored_tokens == 37
    turn = kv.begin("b", ids)
    run(model, turn)  # 45 tokens: the block that holds token 36 holds tokens of the answer too
    turn.commit()
    assert turn.stored_tokens == 32
    turn = kv.begin("c", ids)
    run(model, turn, max_new_tokens=2)  # no block was packed behind the prompt
    turn.commit()
    assert turn.stored_tokens == 37


def test_commit_again_keeps_the_answer() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids)
    turn.commit(run(model, turn))
    turn.commit(metadata={"title": "greeting"})
    assert turn.stored_tokens == 45
    assert kv.retrieve("session:a")[0].metadata["title"] == "greeting"


def test_beams_store_the_prompt_and_nothing_uncertain() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids, batch=3)
    output = run(model, turn, num_beams=3)
    turn.commit(output)
    assert turn.stored_tokens == 32  # the block that holds token 36 holds beams too
    text = torch.cat([output, prompt(5, seed=2)], dim=1)
    again = kv.begin("a", text)
    assert again.reused_tokens == 32
    assert torch.equal(run(model, again), from_scratch(model, text))


@pytest.mark.parametrize("row", [0, 2])
def test_a_chosen_sequence_goes_on(row: int) -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids, batch=3)
    output = run(model, turn, do_sample=True, num_return_sequences=3, return_dict_in_generate=True)
    turn.commit(output, row=row)
    assert turn.stored_tokens == 45
    text = torch.cat([output.sequences[row : row + 1], prompt(5, seed=2)], dim=1)
    again = kv.begin("a", text)
    assert again.reused_tokens == 45
    assert torch.equal(run(model, again), from_scratch(model, text))


def test_a_cut_block_is_never_stored_again() -> None:
    """All of a prompt of whole blocks is cached: its last block is cut and decoded for one token.
    What is packed again later never takes the place of what is stored."""
    model, ids = tiny("llama"), prompt(40)
    kv = memory(model, "int4")
    with torch.no_grad():
        turn = kv.begin("a", ids)
        model(**turn.inputs)
        turn.commit()
    stored = kv.retrieve("session:a")[0].content
    turn = kv.begin("a", ids)
    assert turn.reused_tokens == 39
    output = run(model, turn, max_new_tokens=40)
    assert turn.cache.layers[0].storable_tokens() == 32
    turn.commit(output)
    assert turn.stored_tokens == 79
    for mine, before in zip(kv.retrieve("session:a")[0].content.layers, stored.layers, strict=True):
        for x, y in zip(mine.dense(), before.dense(), strict=True):
            torch.testing.assert_close(x[:, :, :40], y, rtol=0, atol=0)
    kv.store.tenant().delete(kv.store.tenant().session("a").keys)
    turn = kv.begin("a", ids)  # and where it is gone, it is a miss and not stored second-hand
    assert turn.reused_tokens == 0


def test_second_hand_blocks_stay_out() -> None:
    model, ids = tiny("llama"), prompt(40)
    kv = memory(model, "int4")
    turn = kv.begin("a", ids)
    output = run(model, turn, max_new_tokens=20)  # packed: 6 blocks
    turn.cache.crop(40 - 4 - turn.cache.get_seq_length())  # 4 tokens of the fifth are decoded
    with torch.no_grad():
        model(output[:, 36:59], past_key_values=turn.cache)
    turn.commit(output)
    assert turn.stored_tokens == 32


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda t, out: t.commit(out[:, 37:]), "the prompt and then the new tokens wanted"),
        (lambda t, out: t.commit(out.roll(1)), "that leave the prompt of 37 at 0"),
        (lambda t, out: t.commit(out[:, :40]), "45 ids wanted as in the cache, got 40"),
        (lambda t, out: t.commit(out, row=1), "row: 0 to 0 wanted, got 1"),
        (lambda t, out: t.commit(out.repeat(2, 1)), "all 1 rows that generate returned"),
        (lambda t, out: t.commit("yes"), "a list or tensor of ints wanted"),
    ],
)
def test_commit_refuses(misuse: Any, message: str) -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model)
    turn = kv.begin("a", ids)
    output = run(model, turn)
    with pytest.raises(ArgumentError, match=message):
        misuse(turn, output)
    assert not kv.retrieve("session:a")
    assert turn.commit(output[0].tolist()).token_ids == output[0, :-1].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kv: kv.begin("a", []), "token_ids: at least one token wanted"),
        (lambda kv: kv.begin("a", [97]), "token_ids: ids below 97 wanted, got 97"),
        (lambda kv: kv.begin("a", [[1], [2]]), "token_ids: ints wanted"),
        (lambda kv: kv.begin("", [1]), "session: a string that is not empty wanted"),
        (lambda kv: kv.begin("a", [1], batch=0), "batch: at least 1 wanted, got 0"),
        (lambda kv: kv.begin("a", [1], metadata=[1]), "metadata: a dict wanted, got list"),
    ],
)
def test_begin_refuses(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(memory(tiny("llama")))


def test_images_are_refused() -> None:
    """Equal ids do not mean equal K and V where an id stands for an image."""
    model = build("llama")
    model.config.image_token_id = 90
    with pytest.raises(ArgumentError, match="got 90, which stands for an image"):
        memory(model).begin("a", [1, 90, 2])
