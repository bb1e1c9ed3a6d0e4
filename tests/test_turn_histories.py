"""Random histories of conversations: every turn computes what it computes without reuse."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from memos.memories.kv_cache import KVCacheMemory

from .models import build

P = 8


@functools.lru_cache(maxsize=2)
def model(name: str) -> Any:
    return build(name)


step = st.fixed_dictionaries(
    {
        "session": st.sampled_from("abc"),
        "keep": st.floats(0, 1),  # how much of the session's text goes on
        "new": st.integers(1, 25),
        "answer": st.integers(0, 12),  # tokens fed behind the prompt, as generate feeds them
        "commit": st.sampled_from(["output", "prompt", "no"]),
        "then": st.sampled_from(["", "", "", "reopen", "delete", "fork"]),
    }
)


@settings(max_examples=12)
@given(
    name=st.sampled_from(["llama", "gemma3"]),
    steps=st.lists(step, min_size=2, max_size=7),
    limit=st.sampled_from([None, None, 20]),
)
def test_every_turn_equals_no_reuse(name: str, steps: list[dict[str, Any]], limit: Any) -> None:
    texts: dict[str, list[int]] = {s: [] for s in "abc"}
    seed = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:  # few different ones, so that prefixes meet
        return torch.randint(1, 4, (count,), generator=seed).tolist()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def open_memory() -> KVCacheMemory:
            return KVCacheMemory(
                "chat", model=model(name), path=folder, codec="raw", block_tokens=P,
                recent_tokens=3, max_cache_size=limit, durable=False,
            )  # fmt: skip

        kv = open_memory()
        for one in steps:
            session = one["session"]
            text = texts[session]
            prompt = text[: int(len(text) * one["keep"])] + tokens(one["new"])
            turn = kv.begin(session, prompt)
            assert turn.reused_tokens < len(prompt)
            fed = torch.tensor([prompt[turn.reused_tokens :]])
            got = model(name)(fed, past_key_values=turn.cache).logits[0, -1]
            want = model(name)(torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)  # fp32, other shapes
            answer = tokens(one["answer"])
            for token in answer:
                model(name)(torch.tensor([[token]]), past_key_values=turn.cache)
            if one["commit"] == "output":
                turn.commit([*prompt, *answer, 5])
                if limit is None:
                    assert turn.stored_tokens == len(prompt) + len(answer)
                texts[session] = [*prompt, *answer, 5]
            elif one["commit"] == "prompt":
                turn.commit()
                texts[session] = prompt
            if one["then"] == "reopen":
                kv.close()
                kv = open_memory()
            elif one["then"] == "delete" and kv.retrieve(f"session:{session}"):
                kv.delete(session)
            elif one["then"] == "fork":
                texts["abc"["cab".index(session)]] = texts[session]
        kv.close()
