"""Made-up requests for replays: what a recorded trace may look like, in shapes unlike each other.

A workload is a mix of four kinds of traffic. Sessions: turns of a conversation, each with all that
was said before; the last block of a prompt is seldom full and is another one in the next turn.
Prompts: what sessions begin with, shared by many, with a Zipf popularity. Documents: long pieces
behind the prompt that several sessions ask about. Scans: a batch job whose requests share nothing
but their prompt and never come back. Bursts: minutes in which many times as many sessions begin.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy

from memos.errors import ArgumentError
from memos.scheduler.replay import Request


@dataclass(frozen=True)
class Shape:
    """What a workload is made of.

    Args:
        turns:       of a session, on average (geometric).
        gap_s:       between its turns (median; log-normal with ``gap_spread``).
        gap_spread:  sigma of the logarithm.
        new_blocks:  of a turn, on average (log-normal).
        prompts:     different ones; popularity 1 / rank ** ``zipf``.
        prompt_blocks: of each, at most.
        documents:   different ones; 0: none.
        document_share: of sessions that begin with one.
        document_blocks: of each, on average.
        scan_share:  of all requests.
        scan_blocks: of each request of a scan.
        burst:       times as many sessions begin in a burst, a tenth of the time.
        drift_s:     after which the popularity of prompts and documents is shuffled; 0: never.
        rate:        sessions that begin per second, outside of bursts.
    """

    turns: float = 5.0
    gap_s: float = 60.0
    gap_spread: float = 1.0
    new_blocks: float = 6.0
    prompts: int = 20
    prompt_blocks: int = 12
    zipf: float = 1.1
    documents: int = 0
    document_share: float = 0.0
    document_blocks: float = 40.0
    scan_share: float = 0.0
    scan_blocks: int = 30
    burst: float = 1.0
    drift_s: float = 0.0
    rate: float = 0.5


SHAPES = {
    "chat": Shape(),
    "agents": Shape(turns=25.0, gap_s=4.0, gap_spread=0.6, new_blocks=2.0, prompts=4, rate=0.1),
    "documents": Shape(
        turns=3.0,
        prompts=3,
        documents=400,
        document_share=0.8,
        new_blocks=1.5,
        zipf=0.9,
        drift_s=900.0,
    ),
    "scans": Shape(scan_share=0.4, burst=4.0),
    "slow": Shape(turns=8.0, gap_s=600.0, gap_spread=0.4, new_blocks=4.0, burst=8.0),
    "single": Shape(turns=1.0, prompts=2000, prompt_blocks=30, zipf=0.8, new_blocks=2.0, rate=3.0),
}


def synthetic(shape: Shape | str, num_requests: int, seed: int = 0) -> list[Request]:
    """Requests in order of time; the same arguments make the same ones.

    Args:
        shape: or its name in ``SHAPES``.

    Raises:
        ArgumentError: no shape of this name, or no requests.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ArgumentError(f"shape: one of {', '.join(SHAPES)} wanted, got {shape!r}")
        shape = SHAPES[shape]
    if num_requests < 1:
        raise ArgumentError(f"num_requests: at least 1 wanted, got {num_requests}")
    return _Traffic(shape, seed).requests(num_requests)


class _Traffic:
    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.rng = numpy.random.default_rng(seed)
        self._next = itertools.count()
        self._prompts = [
            self._blocks(int(n))
            for n in self.rng.integers(1, shape.prompt_blocks + 1, shape.prompts)
        ]
        sizes = self.rng.exponential(shape.document_blocks, shape.documents)
        self._sizes = [1 + int(n) for n in sizes]
        self._documents: dict[tuple[int, int], list[int]] = {}  # behind each prompt, others

    def _blocks(self, count: int) -> list[int]:
        return list(itertools.islice(self._next, count))

    def _popular(self, count: int, now: float) -> int:
        """A rank by Zipf, of an order that changes with time."""
        weights = numpy.arange(1, count + 1, dtype=float) ** -self.shape.zipf
        rank = int(self.rng.choice(count, p=weights / weights.sum()))
        if not self.shape.drift_s:
            return rank
        return int(rank + 7 * (now // self.shape.drift_s)) % count

    def requests(self, wanted: int) -> list[Request]:
        shape, rng = self.shape, self.rng
        found: list[Request] = []
        now = 0.0
        scans = 0.0
        # More than wanted: sessions that begin late end after the last one.
        while len(found) < 1.3 * wanted:
            is_burst = (now // 60.0) % 10 == 3
            now += float(rng.exponential(1.0 / (shape.rate * (shape.burst if is_burst else 1.0))))
            session = self._session(now)
            found += session
            scans += len(session) * shape.scan_share / max(1.0 - shape.scan_share, 1e-9)
            if scans >= 200:  # a job that runs for some minutes, one request after another
                prompt = self._prompts[0]
                for i in range(int(scans)):
                    at = now + 0.5 * i
                    found.append(Request(at, [*prompt, *self._blocks(shape.scan_blocks)]))
                scans = 0.0
        found.sort(key=lambda request: request.now)
        return found[:wanted]

    def _session(self, now: float) -> list[Request]:
        shape, rng = self.shape, self.rng
        prompt = self._popular(shape.prompts, now)
        said = list(self._prompts[prompt])
        if shape.documents and rng.random() < shape.document_share:
            document = self._popular(shape.documents, now)
            if (prompt, document) not in self._documents:
                self._documents[prompt, document] = self._blocks(self._sizes[document])
            said += self._documents[prompt, document]
        found = []
        for _ in range(int(rng.geometric(1.0 / shape.turns))):
            said = said + self._blocks(1 + int(rng.lognormal(0, 0.8) * (shape.new_blocks - 1)))
            found.append(Request(now, [*said, next(self._next)]))
            now += shape.gap_s * float(rng.lognormal(0, shape.gap_spread))
        return found
