"""The scheduler: how often a cache has what a request wants, and how fast plans are made.

The trace is one hour of a chat service (12,031 requests, 288,500 blocks of 512 tokens, of which
182,790 differ). A block is found only where all blocks before it in the request are. capacity is
the number of equal blocks that are held, as a share of the different ones. first_half and
second_half are the hit rates of the requests before and after the middle: what is learnt is learnt
while it runs, from nothing. "memos, int4" holds blocks in the same bytes and compresses them again
before it drops them, to a share of their bytes; packed is the share of its hits on such blocks.
"clairvoyant" knows when each block is wanted next.

Rows with ttft are of 60 users who talk to SmolLM2-135M in int4 (benchmarks/conversations.py), whose
popularity is Zipf's: seconds to the first token, begin included. "resident" holds every cache in
memory, "none" computes each prompt whole; "lru" has a quarter of the bytes that all caches need and
drops what does not fit, "lru, disk" reads it from disk again; "memos" is a MOS with that host
budget, whose scheduler works meanwhile. peak_bytes: of caches in memory.

Rows with a shape are of made-up workloads (memos.scheduler.workload): hit rates averaged over three
seeds, and what "memos" has above the best of the others where that is least.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

from memos.scheduler.plan import plan  # noqa: E402
from memos.scheduler.policy import make_policy, policies  # noqa: E402
from memos.scheduler.replay import Request, clairvoyant, load_trace, replay  # noqa: E402
from memos.scheduler.units import State  # noqa: E402
from memos.scheduler.workload import SHAPES, synthetic  # noqa: E402

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
INT4 = 0.28  # bytes of a block in int4 with its scales, over those in 16 bits
UNITS = 1_000_000


def path() -> Path:
    root = Path(__file__).parent.parent.parent
    folder = os.environ.get("MEMOS_DATA") or root / "shared" / "data"
    return Path(folder) / "mooncake_conversation_trace.jsonl"


@functools.lru_cache(maxsize=1)
def trace() -> tuple[list[Request], int]:
    """The requests, and how many different blocks they name."""
    if not path().is_file():
        pytest.skip(f"no trace at {path()}")
    requests = load_trace(path())
    return requests, len({key for request in requests for key in request.keys})


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("policy", [*policies(), "memos, int4", "clairvoyant"])
def test_trace(benchmark: Any, policy: str, share: float) -> None:
    requests, different = trace()
    capacity = int(share * different)

    def run() -> Any:
        if policy == "clairvoyant":
            return clairvoyant(requests, capacity)
        if policy == "memos, int4":
            return replay(requests, make_policy("memos", capacity, packed=INT4), capacity)
        return replay(requests, make_policy(policy, capacity), capacity)

    found = benchmark.pedantic(run, rounds=1)
    assert found.peak <= capacity * (1 + 1e-9)  # sums of packed weights are rounded
    benchmark.extra_info.update(
        policy=policy,
        capacity=share,
        hit_rate=round(found.hit_rate, 4),
        first_half=round(found.halves[0], 4),
        second_half=round(found.halves[1], 4),
        decisions_per_s=round(found.decisions_per_s),
    )
    if policy == "memos, int4":
        benchmark.extra_info["packed"] = round(found.packed_hits / max(found.hits, 1), 4)


@pytest.mark.parametrize("share", [0.02, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(benchmark: Any, shape: str, share: float) -> None:
    traces = [synthetic(shape, 4000, seed) for seed in range(3)]

    def run() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in policies()}
        for requests in traces:
            capacity = int(share * len({key for request in requests for key in request.keys}))
            for name, rates in found.items():
                rates.append(replay(requests, make_policy(name, capacity), capacity).hit_rate)
        return found

    found = benchmark.pedantic(run, rounds=1)
    others = [max(rates) for rates in zip(*(found[n] for n in found if n != "memos"), strict=True)]
    above = [ours - best for ours, best in zip(found["memos"], others, strict=True)]
    benchmark.extra_info.update(
        policy="all",
        shape=shape,
        capacity=share,
        **{name: round(sum(rates) / len(rates), 4) for name, rates in found.items()},
        least_above=round(min(above), 4),
    )


def million(n: int = UNITS) -> State:
    """Units of all kinds in three tiers, their uses as unequal as those of a service."""
    rng = np.random.default_rng(0)
    size = rng.lognormal(14, 1, n).astype(np.int64)
    where = rng.integers(-1, 3, n)
    copies = np.zeros((n, 3), bool)
    copies[where >= 0, where[where >= 0]] = True
    return State(
        tiers=("device", "host", "disk"),
        ids=range(n),  # type: ignore[arg-type]
        kind=rng.integers(0, 3, n).astype(np.int8),
        num_bytes=np.stack([size, size, size], axis=1),
        copies=copies,
        heat=rng.pareto(1.1, n),
        last=rng.uniform(-86400, 0, n),
        importance=rng.random(n),
        pinned=rng.random(n) < 0.01,
        in_use=rng.random(n) < 0.001,
        rebuildable=rng.random(n) < 0.7,
        rebuild_s=size * 1e-7,
        access_s=np.stack([size * 1e-12, size * 1e-10, size * 1e-9], axis=1),
        next_use=np.where(rng.random(n) < 0.05, rng.uniform(0, 1200, n), np.nan),
        archived=np.zeros(n, bool),
    )


def test_plan(benchmark: Any) -> None:
    state = million()
    used = state.used()
    budgets = {tier: int(num_bytes * 0.9) for tier, num_bytes in used.items()}
    times = []

    def run() -> Any:
        start = time.perf_counter()
        found = plan(state, budgets, 0.0)
        times.append(time.perf_counter() - start)
        return found

    actions = benchmark.pedantic(run, rounds=3)
    benchmark.extra_info.update(
        policy="plan", units=len(state), actions=len(actions), plan_s=round(min(times), 3)
    )


@functools.lru_cache(maxsize=1)
def talked() -> Any:
    import tempfile

    from benchmarks import conversations
    from benchmarks import model as real

    if (why := real.missing()) is not None:
        pytest.skip(why)
    with tempfile.TemporaryDirectory() as folder:
        modes, budget, need = conversations.run(Path(folder))
    return {mode.name: mode for mode in modes}, budget, need


@pytest.mark.parametrize("policy", ["resident", "none", "lru", "lru, disk", "memos"])
def test_conversations(benchmark: Any, policy: str) -> None:
    pytest.importorskip("torch")
    from benchmarks import conversations

    modes, budget, need = benchmark.pedantic(talked, rounds=1)
    times = {name: conversations.figures(mode) for name, mode in modes.items()}
    mine = times[policy]
    memory = modes[policy].memory
    peak = 0 if memory is None else memory.store.stats()["host"]["peak_bytes"]
    if "lru" in policy or policy == "memos":
        assert peak <= budget
    benchmark.extra_info.update(
        policy=policy,
        capacity=conversations.BUDGET if policy not in ("resident", "none") else None,
        users=conversations.USERS,
        requests=conversations.REQUESTS,
        **mine,
        p50_over_resident=mine["ttft_p50_s"] / times["resident"]["ttft_p50_s"],
        p95_over_none=mine["ttft_p95_s"] / times["none"]["ttft_p95_s"],
        reused_tokens=modes[policy].reused,
        peak_bytes=peak,
        budget_bytes=budget,
        needed_bytes=need,
    )


@pytest.mark.parametrize("share", [0.6, 0.4])
@pytest.mark.parametrize("cold_codec", [None, "int4"])
def test_compression(benchmark: Any, cold_codec: str | None, share: float) -> None:
    """Sessions in int8 that do not all fit: dropped, or compressed again before that."""
    pytest.importorskip("torch")
    from benchmarks import conversations
    from benchmarks import model as real

    if (why := real.missing()) is not None:
        pytest.skip(why)
    row = benchmark.pedantic(conversations.run_tight, (cold_codec, share), rounds=1)
    benchmark.extra_info.update(
        policy=f"int8, then {cold_codec or 'dropped'}", capacity=share, **row
    )
