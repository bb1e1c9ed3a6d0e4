"""Replays recorded requests: how often would a cache of a given size have had what was wanted?

A request names its blocks, root first; a block is found only where all before it are.
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from memos.errors import ArgumentError


@dataclass(frozen=True)
class Request:
    """now: seconds; keys: of its blocks, root first."""

    now: float
    keys: Sequence[Any]


@dataclass(frozen=True)
class Replay:
    """What a policy reached.

    Args:
        hits, blocks:    found, and asked for.
        halves:          hit rate in the first and in the second half of the requests.
        decisions_per_s: blocks asked for, over the seconds of processor time that it took.
        packed_hits:     of the hits, those on blocks that had been compressed again.
        peak:            greatest weight that was held after a request.
    """

    hits: int
    blocks: int
    halves: tuple[float, float]
    decisions_per_s: float
    packed_hits: int = 0
    peak: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.blocks if self.blocks else 0.0


def load_trace(path: str | os.PathLike[str]) -> list[Request]:
    """Requests of a file of JSON lines: ``timestamp`` in milliseconds and ``hash_ids``.

    Without timestamps a request takes a second.

    Raises:
        ArgumentError: a line is something else.
    """
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                now = row.get("timestamp", 1000.0 * number) / 1000.0
                found.append(Request(float(now), list(row["hash_ids"])))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ArgumentError(
                    f"{os.fspath(path)}, line {number}: JSON with timestamp and hash_ids wanted"
                ) from error
    return found


def replay(requests: Sequence[Request], policy: Any, capacity: float) -> Replay:
    """Let a policy decide about every block of these requests.

    A request's blocks are all added, then the policy says what goes until the rest weighs at most
    ``capacity``: what goes at once was never admitted.
    """
    held: set[Hashable] = set()
    packed: set[Hashable] = getattr(policy, "packed", set())
    hits = blocks = packed_hits = 0
    halves: list[tuple[int, int]] = []
    peak = 0.0
    weighs = getattr(policy, "weighs", None)
    start = time.process_time()
    for i, request in enumerate(requests):
        if i == len(requests) // 2:
            halves.append((hits, blocks))
        keys, now = request.keys, request.now
        found = 0
        for key in keys:
            if key not in held:
                break
            found += 1
        hits += found
        blocks += len(keys)
        if packed:
            packed_hits += sum(key in packed for key in keys[:found])
        if found < len(keys):
            policy.on_add(keys[found:], keys[found - 1] if found else None, now)
            held.update(keys[found:])
        policy.on_hit(keys[:found], now)
        over = (weighs() if weighs else len(held)) - capacity
        if over > 0:
            held.difference_update(policy.evict(over, now))
            over = (weighs() if weighs else len(held)) - capacity
        peak = max(peak, capacity + over)
    elapsed = time.process_time() - start
    halves.append((hits, blocks))
    first, second = halves[0], (hits - halves[0][0], blocks - halves[0][1])
    rates = tuple(h / n if n else 0.0 for h, n in (first, second))
    return Replay(
        hits, blocks, (rates[0], rates[1]), blocks / max(elapsed, 1e-9), packed_hits, peak
    )


def clairvoyant(requests: Sequence[Request], capacity: int) -> Replay:
    """What a cache reaches that knows the future: the block that is wanted last goes first.

    Source: Belady, A study of replacement algorithms, 1966, for single blocks: with chains it is
    a good bound, not the exact one.
    """
    start = time.process_time()
    never = len(requests)
    next_use: dict[Hashable, int] = {}
    follows: list[list[int]] = [[]] * never
    for i in range(never - 1, -1, -1):
        keys = requests[i].keys
        follows[i] = [next_use.get(key, never) for key in keys]
        next_use.update(dict.fromkeys(keys, i))
    held: dict[Hashable, int] = {}
    heap: list[tuple[int, int, Hashable]] = []
    hits = blocks = 0
    half = (0, 0)
    for i, request in enumerate(requests):
        if i == never // 2:
            half = hits, blocks
        keys = request.keys
        found = 0
        while found < len(keys) and keys[found] in held:
            found += 1
        hits += found
        blocks += len(keys)
        for depth, (key, use) in enumerate(zip(keys, follows[i], strict=True)):
            held[key] = use
            heapq.heappush(heap, (-use, -depth, key))
        while len(held) > capacity:
            use, _, key = heapq.heappop(heap)
            if held.get(key) == -use:
                del held[key]
    elapsed = time.process_time() - start
    rates = tuple(h / n if n else 0.0 for h, n in (half, (hits - half[0], blocks - half[1])))
    return Replay(hits, blocks, (rates[0], rates[1]), blocks / max(elapsed, 1e-9), 0, len(held))
