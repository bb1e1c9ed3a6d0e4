"""Sixty users who talk to a real model: how long each waits for the first token, and what it takes.

Every request is made in each mode before the next one comes, so that what else the machine does
falls on all of them alike.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import model as real

USERS, REQUESTS = 60, 150
TURN, LONGEST = 64, 960  # tokens that a turn adds, and after which a new conversation begins
EXPONENT = 1.0  # of the users' popularity
BUDGET = 0.25  # of the bytes that all caches need
CODEC = "int4"
PAUSE_S = 20.0  # between two requests


@dataclass
class Mode:
    """ttft_s: of each request; reused: tokens that came from a store."""

    name: str
    memory: Any = None
    mos: Any = None
    ttft_s: list[float] = field(default_factory=list)
    reused: int = 0


def requests(seed: int = 0) -> list[tuple[str, int, int]]:
    """(session, text, tokens) of each request: a session is a text that grows by a turn."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** EXPONENT for rank in range(USERS)]
    lengths = [0] * USERS
    texts = list(range(USERS))
    found = []
    for _ in range(REQUESTS):
        user = rng.choices(range(USERS), weights)[0]
        if lengths[user] + TURN > LONGEST:
            lengths[user], texts[user] = 0, max(texts) + 1
        # The first turn brings what the conversation is about.
        lengths[user] += TURN if lengths[user] else 2 * TURN
        found.append((f"{user}-{texts[user]}", texts[user], lengths[user]))
    return found


def needed(memory: Any, asked: list[tuple[str, int, int]]) -> int:
    """Bytes of the caches of all sessions at their end."""
    final = {session: tokens for session, _, tokens in asked}
    identity = memory.identity
    P = identity.block_tokens
    return sum(
        sum(identity.payload_bytes(i) for i in range(tokens // P)) + identity.tail_bytes(tokens % P)
        for tokens in final.values()
    )


@torch.no_grad()
def run(folder: Path) -> tuple[list[Mode], int, int]:
    """Every request in every mode.

    Returns:
        The modes, the budget, and the bytes that all caches need.
    """
    from memos import MOS, KVCacheMemory
    from memos.scheduler import install

    install()
    model = real.load_model("bfloat16")
    asked = requests()
    count = max(text for _, text, _ in asked) + 1
    texts = real.text_segments(real.load_tokenizer(), count, LONGEST).tolist()
    plain = KVCacheMemory("resident", model=model, codec=CODEC)
    need = needed(plain, asked)
    budget = int(BUDGET * need)
    lru = KVCacheMemory("lru", model=model, codec=CODEC, host_bytes=budget)
    disk = KVCacheMemory(
        "disk", model=model, codec=CODEC, host_bytes=budget, path=folder / "lru", durable=False
    )
    ours = KVCacheMemory(
        "memos", model=model, codec=CODEC, path=folder / "memos", policy="memos", durable=False
    )
    mos = MOS()
    mos.register_memory(ours)
    mos.schedule({"host": budget, "disk": 16 << 30}, every_s=2.0)
    modes = [
        Mode("resident", plain),
        Mode("none"),
        Mode("lru", lru),
        Mode("lru, disk", disk),
        Mode("memos", ours, mos),
    ]
    model(torch.tensor([texts[0][:TURN]]))  # what torch sets up at its first call
    for i, (session, text, tokens) in enumerate(asked):
        ids = texts[text][:tokens]
        order = modes[i % len(modes) :] + modes[: i % len(modes)]
        for mode in order:
            ask(mode, model, session, ids)
            if mode.mos is not None:
                held = mode.memory.store.stats()["host"]
                assert held["bytes"] <= budget
                assert held["quota_bytes"] <= budget
    mos.close()
    return modes, budget, need


class Clock:
    """Stands still but for pauses: which session is cold does not hang on the machine."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


@torch.no_grad()
def run_tight(cold_codec: str | None, share: float) -> dict[str, float]:
    """The same requests in int8, in memory alone, a step of the scheduler after each.

    Returns:
        possible, reused: tokens that were seen before, and those that came from the store;
        compressed: sessions that are in the end; peak_bytes, budget_bytes.
    """
    from memos import MOS, KVCacheMemory

    model, asked, clock = real.load_model("bfloat16"), requests(), Clock()
    count = max(text for _, text, _ in asked) + 1
    texts = real.text_segments(real.load_tokenizer(), count, LONGEST).tolist()
    memory = KVCacheMemory("chat", model=model, codec="int8", cold_codec=cold_codec, clock=clock)
    budget = int(share * needed(memory, asked))
    mos = MOS(clock=clock)
    mos.register_memory(memory)
    scheduler = mos.schedule({"host": budget}, every_s=None)
    seen: dict[str, int] = {}
    mode, possible, peak = Mode("tight", memory), 0, 0
    for session, text, tokens in asked:
        ask(mode, model, session, texts[text][:tokens])
        possible += seen.get(session, 0)
        seen[session] = tokens
        scheduler.step()
        assert scheduler.worker is not None
        assert scheduler.worker.wait(60)
        held = memory.store.held()["host"]
        assert held <= budget
        peak = max(peak, held)
        clock.now += PAUSE_S
    stats = mos.stats()["scheduler"]
    found = {
        "possible_tokens": possible,
        "reused_tokens": mode.reused,
        "reused": mode.reused / possible,
        "compressed": stats["memories"]["chat"].get("compressed", 0),
        "peak_bytes": peak,
        "budget_bytes": budget,
    }
    mos.close()
    return found


def ask(mode: Mode, model: Any, session: str, ids: list[int]) -> None:
    whole = torch.tensor([ids])
    start = time.perf_counter()
    if mode.memory is None:
        model(whole, logits_to_keep=1).logits.argmax()
        mode.ttft_s.append(time.perf_counter() - start)
        return
    turn = mode.memory.begin(session, ids)
    given = turn.inputs
    new = whole[:, turn.reused_tokens :]
    model(new, past_key_values=given["past_key_values"], logits_to_keep=1).logits.argmax()
    mode.ttft_s.append(time.perf_counter() - start)
    mode.reused += turn.reused_tokens
    turn.commit()


def figures(mode: Mode) -> dict[str, float]:
    """p50 and p95 of the times to the first token, in seconds."""
    return {
        "ttft_p50_s": statistics.median(mode.ttft_s),
        "ttft_p95_s": statistics.quantiles(mode.ttft_s, n=20)[-1],
        "ttft_mean_s": statistics.fmean(mode.ttft_s),
    }
