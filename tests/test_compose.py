"""Caches composed of pieces: equal to a prefill where they must be, bound to what they are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models are torch models")
pytest.importorskip("transformers", reason="the models are those of transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from memos import KVCacheMemory, MemCube  # noqa: E402
from memos.errors import ArgumentError  # noqa: E402
from memos.kernels import rotate_positions_  # noqa: E402
from memos.kv.cache import MemosCache  # noqa: E402
from memos.kv.compose import _computed, _joined, compose  # noqa: E402
from memos.kv.compose_curve import Curve, calibrate, kl_of, read_on  # noqa: E402
from memos.kv.pieces import Prefiller, StoredPiece  # noqa: E402

from . import models  # noqa: E402

SYSTEM, FIRST, SECOND, THIRD, QUESTION = (
    models.prompt(n, seed)[0].tolist() for seed, n in enumerate((6, 20, 17, 9, 5), 10)
)
MEMORIES = [FIRST, SECOND, THIRD]
PROMPT = SYSTEM + FIRST + SECOND + THIRD + QUESTION


def prefilled(model: Any, ids: list[int]) -> tuple[Any, Any]:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), past_key_values=cache).logits[0, -1]
    return cache, logits


def last_logits(model: Any, composed: Any) -> Any:
    inputs = composed.inputs
    past = inputs["past_key_values"].get_seq_length()
    with torch.no_grad():
        out = model(inputs["input_ids"][:, past:], past_key_values=inputs["past_key_values"])
    return out.logits[0, -1]


class Counted:
    """How many tokens a model computes."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self._model = model

    def __enter__(self) -> Counted:
        self._hook = self._model.get_input_embeddings().register_forward_hook(self._count)
        return self

    def _count(self, module: Any, args: Any, out: Any) -> None:
        self.tokens += args[0].numel()

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


# Against a prefill


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_all_tokens_anew_is_a_prefill(name: str) -> None:
    model = models.tiny(name)
    composed = compose(model, SYSTEM, MEMORIES, QUESTION, share=1.0)
    want, _ = prefilled(model, PROMPT[:-1])
    for layer, exact in zip(composed.cache.layers, want.layers, strict=True):
        key, value = layer.dense()
        assert torch.equal(key, exact.keys)
        assert torch.equal(value, exact.values)
    assert composed.token_ids == PROMPT
    out = model.generate(**composed.inputs, max_new_tokens=6, do_sample=False)
    plain = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)
    assert out.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_token_through_the_partial_pass(name: str, implementation: str) -> None:
    """The forward pass that computes some tokens anew, given all of them, gives a prefill."""
    model = models.build(name)
    model.set_attn_implementation(implementation)
    maker = Prefiller(model, gap=5)
    lead = maker.system(SYSTEM)
    pieces = [maker.piece(lead, ids) for ids in MEMORIES]
    keys, values = _joined(maker, lead, pieces, len(PROMPT))
    _computed(maker, PROMPT, list(range(len(SYSTEM), len(PROMPT))), keys, values)
    want, _ = prefilled(model, PROMPT)
    for key, value, exact in zip(keys, values, want.layers, strict=True):
        assert torch.allclose(key, exact.keys, rtol=0, atol=2e-5)
        assert torch.allclose(value, exact.values, rtol=0, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=0, max_size=4),
    system=st.integers(0, 9),
    question=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_any_pieces_and_all_tokens(
    lengths: list[int], system: int, question: int, seed: int
) -> None:
    parts = [models.prompt(n, seed + i)[0].tolist() for i, n in enumerate(lengths)]
    lead = models.prompt(system, seed + 50)[0].tolist()
    asked = models.prompt(question, seed + 60)[0].tolist()
    ids = lead + [t for part in parts for t in part] + asked
    if not ids:
        return
    model = models.tiny("llama")
    _, want = prefilled(model, ids)
    whole = compose(model, lead, parts, asked, share=1.0)
    assert torch.allclose(last_logits(model, whole), want, rtol=0, atol=1e-4)
    some = compose(model, lead, parts, asked, share=0.3)
    assert some.token_ids == ids
    assert len(some.recomputed) == round(0.3 * sum(lengths))


def test_one_piece_behind_the_system_prompt_is_a_prefill() -> None:
    model = models.tiny("llama")
    composed = compose(Prefiller(model, gap=0), SYSTEM, [FIRST], QUESTION, share=0.0)
    _, want = prefilled(model, SYSTEM + FIRST + QUESTION)
    assert torch.allclose(last_logits(model, composed), want, rtol=0, atol=2e-5)
    assert composed.recomputed == ()


def test_without_memories_and_without_a_question() -> None:
    model = models.tiny("llama")
    _, want = prefilled(model, SYSTEM + QUESTION)
    composed = compose(model, SYSTEM, [], QUESTION)
    assert torch.allclose(last_logits(model, composed), want, rtol=0, atol=2e-5)
    _, want = prefilled(model, SYSTEM + FIRST)
    composed = compose(model, SYSTEM, [FIRST], share=1.0)
    assert torch.allclose(last_logits(model, composed), want, rtol=0, atol=2e-5)
    with pytest.raises(ArgumentError, match="at least one token"):
        compose(model, [], [])


# What is computed anew


def test_first_tokens_of_each_piece() -> None:
    composed = compose(models.tiny("llama"), SYSTEM, MEMORIES, QUESTION, first_tokens=10)
    assert composed.pieces == ((6, 26), (26, 43), (43, 52))
    assert composed.recomputed == (*range(6, 16), *range(26, 36), *range(43, 52))
    assert composed.share == 29 / 46


def test_the_tokens_that_deviate_most() -> None:
    """The first layer's keys and values do not depend on other tokens; layer 1's do."""
    model = models.tiny("llama")
    maker = Prefiller(model, gap=0)
    lead = maker.system(SYSTEM)
    pieces = [maker.piece(lead, ids) for ids in MEMORIES]
    composed = compose(maker, lead, pieces, QUESTION, share=0.4)
    keys, values = _joined(maker, lead, pieces, 52)
    want, _ = prefilled(model, PROMPT[:52])
    score = torch.zeros(52)
    for a, b in ((want.layers[1].keys, keys[1]), (want.layers[1].values, values[1])):
        score += (a - b)[0].norm(dim=-1).mean(0) / a[0, :, 6:].norm(dim=-1).mean()
    assert set(composed.recomputed) == set(score.topk(round(0.4 * 46)).indices.tolist())
    assert min(composed.recomputed) >= 26, "the first piece stands where it was prefilled"


def test_pieces_in_any_order() -> None:
    """A piece's values do not depend on its place, and its keys turn with it."""
    model = models.tiny("llama")
    maker = Prefiller(model)
    lead = maker.system(SYSTEM)
    pieces = [maker.piece(lead, ids) for ids in MEMORIES]
    there = compose(maker, lead, pieces, QUESTION, share=0.0)
    back = compose(maker, lead, pieces[::-1], QUESTION, share=0.0)
    (a, b), (c, d) = there.pieces[0], back.pieces[2]
    for one, other in zip(there.cache.layers, back.cache.layers, strict=True):
        (key, value), (turned, same) = one.dense(), other.dense()
        assert torch.equal(value[:, :, a:b], same[:, :, c:d])
        moved = key[:, :, a:b].clone()
        old, new = torch.arange(a, b), torch.arange(c, d)
        rotate_positions_([moved], old, new, maker.positions.layers[0].inv_freq)
        assert torch.allclose(moved, turned[:, :, c:d], rtol=0, atol=5e-6)


def test_numbers_out_of_range() -> None:
    model = models.tiny("llama")
    for options, what in (
        ({"share": 1.5}, "share: 0 to 1"),
        ({"first_tokens": -1}, "first_tokens"),
        ({"share": 0.5, "first_tokens": 3}, "at most one"),
        ({"max_kl": 0.1}, "curve: wanted"),
    ):
        with pytest.raises(ArgumentError, match=what):
            compose(model, SYSTEM, MEMORIES, QUESTION, **options)
    with pytest.raises(ArgumentError, match="at least one token"):
        compose(model, SYSTEM, [[]], QUESTION)


# Models that it cannot handle


def test_models_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="sliding_attention in layer 0 of mistral"):
        compose(models.tiny("mistral"), SYSTEM, MEMORIES)
    model = models.build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ArgumentError, match="got flash_attention_2 in llama"):
        compose(model, SYSTEM, MEMORIES)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    long = models.build("llama", rope_parameters=rope, max_position_embeddings=40)
    assert compose(long, SYSTEM, [FIRST], QUESTION).token_ids
    with pytest.raises(ArgumentError, match="at most 39 wanted"):
        compose(long, SYSTEM, MEMORIES, QUESTION)


# The curve


def test_a_curve() -> None:
    curve = Curve(((0.0, 0.1), (0.05, 0.12), (0.25, 0.04)))
    assert curve.points == ((0.0, 0.1), (0.05, 0.1), (0.25, 0.04), (1.0, 0.0))
    assert curve.kl_at(0.15) == pytest.approx(0.07)
    assert curve.share_for(0.07) == pytest.approx(0.15)
    assert curve.share_for(0.5) == 0.0
    assert curve.share_for(0.0) == 1.0
    for bad in (((0.1, 0.1),), ((0.0, 0.1), (0.0, 0.2)), ((0.0, -1.0),), ()):
        with pytest.raises(ArgumentError, match="points"):
            Curve(bad)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 12))
def test_the_least_share_for_a_budget(kls: list[float], budget: float) -> None:
    curve = Curve(tuple((i / 7, kl) for i, kl in enumerate(kls)))
    share = curve.share_for(budget)
    assert curve.kl_at(share) <= budget + 1e-9
    assert share == 0 or curve.kl_at(share * 0.999) >= budget - 1e-9


def test_calibrated_on_the_model() -> None:
    model = models.tiny("llama")
    documents = [models.prompt(50, seed)[0].tolist() for seed in range(2)]
    maker = Prefiller(model)
    curve = calibrate(
        maker, SYSTEM, documents, piece_tokens=10, num_pieces=4, next_tokens=8, shares=(0.0, 0.5)
    )
    assert [share for share, _ in curve.points] == [0.0, 0.5, 1.0]
    assert curve.points[0][1] > 0
    composed = compose(maker, SYSTEM, MEMORIES, QUESTION, max_kl=curve.points[0][1], curve=curve)
    assert composed.share == 0.0
    assert composed.kl == curve.points[0][1]
    with pytest.raises(ArgumentError, match="48 tokens each"):
        calibrate(maker, SYSTEM, [FIRST], piece_tokens=10, num_pieces=4, next_tokens=8)


# Kept in a memory


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[KVCacheMemory]:
    with memory(tmp_path) as found:
        yield found


def memory(path: Path, **options: Any) -> KVCacheMemory:
    return KVCacheMemory(
        "kv",
        model=models.tiny("llama"),
        path=path,
        **{"codec": "raw", "block_tokens": 8, **options},
    )


def test_activated_memories_cost_no_prefill(tmp_path: Path) -> None:
    model = models.tiny("llama")
    with memory(tmp_path) as kv:
        assert kv.activate(MEMORIES[:2], system=SYSTEM) == 2
        assert kv.activate(MEMORIES, system=SYSTEM) == 1
        first = kv.compose(SYSTEM, MEMORIES, QUESTION, share=0.0)
    with memory(tmp_path) as kv, Counted(model) as counted:  # another process, as it were
        again = kv.compose(SYSTEM, MEMORIES[::-1], QUESTION, share=0.0)
        assert counted.tokens == len(QUESTION) - 1 + 0
        same = kv.compose(SYSTEM, MEMORIES, QUESTION, share=0.0)
        for one, other in zip(first.cache.layers, same.cache.layers, strict=True):
            for a, b in zip(one.dense(), other.dense(), strict=True):
                assert torch.equal(a, b)
    assert again.token_ids == SYSTEM + THIRD + SECOND + FIRST + QUESTION


def test_a_piece_is_bound_to_what_it_is_of(kv: KVCacheMemory, tmp_path: Path) -> None:
    kv.activate([FIRST], system=SYSTEM)
    assert kv.is_activated(FIRST, system=SYSTEM)
    assert not kv.is_activated(FIRST, system=SYSTEM[:-1])
    assert not kv.is_activated(FIRST)
    assert not kv.is_activated(FIRST[:-1], system=SYSTEM)
    other = models.build("llama", seed=1)
    with KVCacheMemory("kv", model=other, store=kv.store, codec="raw", block_tokens=8) as second:
        assert not second.is_activated(FIRST, system=SYSTEM)
    with KVCacheMemory(
        "kv", model=models.tiny("llama"), store=kv.store, codec="int8", block_tokens=8
    ) as third:
        assert not third.is_activated(FIRST, system=SYSTEM)


def test_pieces_are_no_sessions(kv: KVCacheMemory) -> None:
    kv.activate(MEMORIES, system=SYSTEM)
    assert kv.sessions() == []
    assert kv.retrieve(FIRST) == []
    turn = kv.begin("s", FIRST + SECOND)
    assert turn.reused_tokens == 0


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_packed_pieces(tmp_path: Path, codec: str) -> None:
    """Packed pieces answer nearly as exact ones do."""
    model = models.tiny("llama")
    exact = compose(model, SYSTEM, MEMORIES, QUESTION, share=0.0)
    with memory(tmp_path, codec=codec, recent_tokens=0) as kv:
        kv.activate(MEMORIES, system=SYSTEM)
        packed = kv.compose(SYSTEM, MEMORIES, QUESTION, share=0.0)
    for layer, other in zip(exact.cache.layers, packed.cache.layers, strict=True):
        for a, b in zip(layer.dense(), other.dense(), strict=True):
            error = float((a - b).abs().max() / a.abs().max())
            assert 0 < error < (0.02 if codec == "int8" else 0.3)


@pytest.mark.parametrize("codec", ["raw", "int8", "int4-g32-rot"])
@pytest.mark.parametrize("tokens", [5, 16, 40, 64])
def test_a_stored_piece_is_decoded_where_it_stands(codec: str, tokens: int) -> None:
    """Bit for bit what decoding, copying and turning give: sinks, blocks and tail."""
    model = models.tiny("llama")
    maker = Prefiller(model, block_tokens=16)
    ids = [1 + i % 90 for i in range(tokens)]
    made, dense = maker.piece(maker.system(SYSTEM), ids), DynamicCache()
    for i, (key, value) in enumerate(zip(made.keys, made.values, strict=True)):
        dense.update(key, value, i)
    cache = MemosCache.from_cache(dense, maker.shape, codec=codec, block_tokens=16, recent_tokens=0)
    stored = StoredPiece(tuple(ids), cache.layers)
    found = []
    for piece in (stored, stored.dense()):
        keys, values = (
            [torch.full((1, x.shape[1], 99, x.shape[3]), 7.0) for x in part]
            for part in (made.keys, made.values)
        )
        piece.write_to(keys, values, 30, maker.positions)
        found.append([*keys, *values])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert (a[:, :, :30] == 7).all()
        assert (a[:, :, 30 + tokens :] == 7).all()
        assert (a[:, :, 30 : 30 + tokens] != 7).any()


def test_cubes_and_their_versions(kv: KVCacheMemory) -> None:
    kv._tokenizer = Words()
    cube = MemCube(id="a", kind="text", content="one two three", memory="notes")
    newer = MemCube(id="a", kind="text", content="one two four", memory="notes", versions=2)
    assert kv.activate([cube], system="be brief") == 1
    assert kv.activated() == [("notes", "a")]
    assert not kv.is_activated(newer, system="be brief")
    assert kv.activate([newer], system="be brief") == 1
    assert not kv.is_activated(cube, system="be brief"), "the earlier version is gone"
    assert kv.deactivate("a") == 1
    assert kv.activated() == []
    with pytest.raises(ArgumentError, match="a cube with a text"):
        kv.activate([MemCube(id="b", kind="graph", content={"x": 1}, memory="g")])


class Words:
    """A tokenizer: a word is a token."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + sum(map(ord, word)) % 90 for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def test_what_was_composed_is_not_stored(kv: KVCacheMemory) -> None:
    """A conversation that goes on from a composed cache keeps the system prompt only."""
    composed = kv.compose(SYSTEM * 3, MEMORIES, QUESTION, share=0.3)
    cube = kv.add(composed.cache, {"user_id": "ann"})
    assert cube.metadata["tokens"] == 16
    turn = kv.begin("s", composed.token_ids)
    assert turn.reused_tokens == 16
    whole = kv.compose(SYSTEM * 3, MEMORIES, QUESTION, share=1.0)
    assert kv.add(whole.cache).metadata["tokens"] == len(whole.token_ids) - 1


def test_a_curve_is_kept(kv: KVCacheMemory) -> None:
    assert kv.curve is None
    documents = [models.prompt(50, seed)[0].tolist() for seed in range(2)]
    curve = kv.calibrate(
        documents, system=SYSTEM, piece_tokens=10, num_pieces=4, next_tokens=8, shares=(0.0, 0.5)
    )
    assert kv.curve == curve
    composed = kv.compose(SYSTEM, MEMORIES, QUESTION, max_kl=1e-9)
    assert composed.share > 0.99


def test_a_full_store_still_composes(tmp_path: Path) -> None:
    model = models.tiny("llama")
    want = compose(model, SYSTEM, MEMORIES, QUESTION, share=0.0)
    with memory(tmp_path, disk_bytes=16, host_bytes=16) as kv:
        got = kv.compose(SYSTEM, MEMORIES, QUESTION, share=0.0)
    want_rows, got_rows = (read_on(Prefiller(model), c.cache, QUESTION) for c in (want, got))
    assert kl_of(want_rows, got_rows) == 0.0


def test_without_a_model_or_a_tokenizer(tmp_path: Path) -> None:
    config = models.config("llama")
    with KVCacheMemory("kv", config) as kv, pytest.raises(ArgumentError, match="model="):
        kv.activate([FIRST])
    with memory(tmp_path) as kv, pytest.raises(ArgumentError, match="tokenizer="):
        kv.activate(["a text"])
