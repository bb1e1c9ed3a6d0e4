"""Turns of a chat as the tests make them."""

from __future__ import annotations

from typing import Any

import torch

from memos.memories.kv_cache import KVCacheMemory

P, S, RECENT, NEW = 8, 2, 5, 9
OPTIONS: dict[str, Any] = {"block_tokens": P, "sink_tokens": S, "recent_tokens": RECENT}


def memory(model: Any, codec: str = "raw", **options: Any) -> KVCacheMemory:
    return KVCacheMemory("chat", model=model, codec=codec, **{**OPTIONS, **options})


def run(model: Any, turn: Any, **options: Any) -> Any:
    return model.generate(**turn.inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


def from_scratch(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Without reuse; with a mask, since transformers masks ids equal to the pad token otherwise."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def fill(kv: KVCacheMemory, model: Any, ids: torch.Tensor, session: str = "a") -> Any:
    """A turn with this prompt, committed with its answer."""
    turn = kv.begin(session, ids)
    output = run(model, turn)
    turn.commit(output)
    return output
