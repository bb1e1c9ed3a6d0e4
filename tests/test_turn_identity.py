"""Whose blocks may be reused: what makes another identity, limits of size and time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from memos.errors import QuotaError
from memos.kv.cache import MemosCache

from .models import build, prompt, tiny
from .turns import fill, from_scratch, memory, run


def test_changed_weights_are_a_miss() -> None:
    model, ids = build("llama"), prompt(37)
    kv = memory(model)
    fill(kv, model, ids)
    assert kv.begin("a", ids).reused_tokens == 32
    changes = [
        lambda: torch.no_grad()(model.lm_head.weight.mul_)(1.5),
        lambda: model.model.layers[1].mlp.down_proj.weight.data.add_(1),
        lambda: setattr(model.model.layers[0].mlp, "up_proj", torch.nn.Linear(32, 48, bias=False)),
        lambda: model.config.rope_parameters.update(rope_theta=77.0),
    ]
    for change in changes:
        change()
        assert kv.begin("a", ids).reused_tokens == 0
        output = fill(kv, model, ids)
        assert kv.begin("a", output).reused_tokens == 45


def test_adapters_count() -> None:
    """PEFT: which adapter is active or merged is no parameter, and still changes every number."""
    model, ids = build("llama"), prompt(37)
    kv = memory(model)
    projection = model.model.layers[0].self_attn.q_proj
    states: list[dict[str, Any]] = [
        {"_disable_adapters": False, "_active_adapter": ["a"], "merged_adapters": []},
        {"_disable_adapters": False, "_active_adapter": ["b"], "merged_adapters": []},
        {"_disable_adapters": True, "_active_adapter": ["b"], "merged_adapters": []},
        {"_disable_adapters": False, "_active_adapter": ["b"], "merged_adapters": ["b"]},
    ]
    for state in states:
        projection.__dict__.update(state)
        assert kv.begin("a", ids).reused_tokens == 0
        fill(kv, model, ids)
        assert kv.begin("a", ids).reused_tokens == 32


def test_identities_differ() -> None:
    """Anything that changes the numbers, or how they are stored, makes other keys."""

    def one(
        name: str = "llama", seed: int = 0, dtype: Any = torch.float32, **options: Any
    ) -> bytes:
        model = build(name, seed, dtype)
        return bytes(memory(model, **{"codec": "int4", **options})._archive().identity.digest)

    digests = [
        one(), one(seed=1), one("qwen2"), one(dtype=torch.bfloat16), one(codec="int8"),
        one(revision="b"), one(tokenizer="t"), one(block_tokens=16), one(sink_tokens=3),
    ]  # fmt: skip
    for a, b in itertools.combinations(digests, 2):
        assert a != b
    assert one() == digests[0]


def test_dynamic_rope_is_not_stored_where_it_changes_keys() -> None:
    """Beyond the trained length dynamic RoPE changes the keys of all tokens."""
    model = build(
        "llama", max_position_embeddings=50, rope_parameters={"rope_type": "dynamic", "factor": 2.0}
    )
    kv = memory(model)
    ids = prompt(37)
    output = fill(kv, model, ids)
    assert kv.begin("a", output).reused_tokens == 45
    longer = torch.cat([output, prompt(20, seed=2)], dim=1)
    turn = kv.begin("a", longer)
    assert turn.reused_tokens == 0
    turn = kv.begin("a", ids)
    turn.commit(run(model, turn, max_new_tokens=30))
    assert turn.stored_tokens == 0


def test_max_cache_size_keeps_the_first_tokens() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model, max_cache_size=20)
    output = fill(kv, model, ids)
    turn = kv.begin("a", output)
    assert turn.reused_tokens == 16  # 20 tokens end inside a block that is packed
    assert torch.equal(run(model, turn), from_scratch(model, output))
    assert kv.begin("b", ids[:, :9]).reused_tokens == 8


def test_a_quota_below_one_block_is_an_error() -> None:
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model, host_bytes=100)
    turn = kv.begin("a", ids)
    output = run(model, turn)
    with pytest.raises(QuotaError):
        turn.commit(output)
    assert kv.retrieve("session:a") == []


def test_time_to_live() -> None:
    now = [1000.0]
    model, ids = tiny("llama"), prompt(37)
    kv = memory(model, ttl_s=60, clock=lambda: now[0])
    fill(kv, model, ids)
    now[0] += 59
    assert kv.begin("a", ids).reused_tokens == 32
    now[0] += 2
    assert kv.begin("a", ids).reused_tokens == 0
    assert kv.retrieve("session:a") == []


def test_a_reader_reads_and_does_not_write(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(37)
    with memory(model, path=tmp_path) as kv, memory(model, path=tmp_path, mode="r") as other:
        output = fill(kv, model, ids)
        turn = other.begin("a", output)
        assert turn.reused_tokens == 45
        with pytest.raises(OSError, match="writable store wanted"):
            turn.commit(run(model, turn))


def test_an_empty_session_begins_anywhere() -> None:
    """The cache of a first turn can be any MemosCache's equal: nothing restored, all computed."""
    model = tiny("llama")
    turn = memory(model).begin("a", [5])
    assert isinstance(turn.cache, MemosCache)
    assert turn.reused_tokens == 0
    assert torch.equal(run(model, turn), from_scratch(model, torch.tensor([[5]])))
