"""The policy that uses what only a memory OS knows: chains, turns, sizes, costs.

What one request used is a run: a piece of a path of the tree, whose blocks were last used
together. Runs are what is ranked: by the learnt index of their class at their age (``reuse``),
times what building them again costs, over their weight. Only the end of a run that nothing held
follows may go. What goes is watched on without its bytes, so that the rates are those of all
uses, not of those that the cache happened to serve.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy

from memos.scheduler.reuse import Reuse, bin_of, bins_of
from memos.scheduler.runs import SIZES, TURNS, K, Runs

# What a run is of its request: used before, new, the last block, what many go on from.
FOUND, NEW, LAST, SHARED = 0, 1, 2, 3
_PARTS = 4
_MANY = 3  # from what requests part more often is no session but a prompt that many share
_REFRESH = 64  # requests between two looks at the rates, at first
_GHOSTS = 16384  # that are watched in any case
_EXACT = 256  # so many runs are ranked anew for every eviction


class Memos(Runs[K]):
    """Leaves of the prefix tree, the lowest expected saving per byte and second first.

    The class of a run: what it is of its request (found, new, the last block, which is seldom
    full), the turn of its session, the number of new blocks. A request continues a session
    unless it parts from the others at a block where many did: that is a prompt they share, a run
    of its own, whose class is how many went on from it.

    Args:
        capacity: the budget in units of weight.
        learn:    False: the rates stay as they are.
        ghosts:   keys that are watched after they are gone, for each key held; 16,384 more in any
            case.
        packed:   weight of a block compressed again, over its weight; None: blocks are dropped
            as they are. What has been compressed goes when it is worth less than that.
        loss:     share of its value that a block loses when it is compressed again.
    """

    def __init__(
        self,
        capacity: float,
        *,
        learn: bool = True,
        ghosts: float = 4.0,
        packed: float | None = None,
        loss: float = 0.1,
    ) -> None:
        super().__init__()
        self.capacity, self.learn, self.ghosts = capacity, learn, ghosts
        self.ratio, self.loss = packed, loss
        self.reuse = Reuse((_PARTS, TURNS, SIZES))
        self._requests = 0
        self._next_update = _REFRESH
        self._last_update = 0
        self._added: tuple[K | None, int, int] = (None, 0, 0)
        self._heap: list[tuple[float, int, int]] = []
        self._floor = -1.0  # below this score the heap is complete
        self._ranked = 0
        self._is_evicting = False

    # What is there

    def __len__(self) -> int:
        return self._num_held

    def __contains__(self, key: K) -> bool:
        run = self._run_of.get(key)
        return run is not None and self._blocks[run].index(key) < self._held[run]

    def weighs(self) -> float:
        """Weight of all that is held."""
        return self._weight

    def order(self) -> list[K]:
        found: list[K] = []
        for run in sorted(self._running(), key=lambda run: self._seq_of[run]):
            found += reversed(self._blocks[run][: self._held[run]])
        return found

    def explain(self, key: K, now: float) -> dict[str, Any]:
        """Why a key is held, or is not, in numbers; empty for an unknown one.

        Returns:
            held; part: found, new or last; turn: of its session; age_s; uses_per_s: the learnt
            rate at this age; index: best expected uses per second; value: the index times the
            cost, over the weight; followed: whether what is held follows it.
        """
        run = self._run_of.get(key)
        if run is None:
            return {}
        place = self._blocks[run].index(key)
        age = now - self._last[run]
        rate, index = self.reuse.describe(int(self._cls[run]), age)
        part = int(self._cls[run]) // (TURNS * SIZES)
        return {
            "held": place < self._held[run],
            "part": ("found", "new", "last", "shared")[part],
            "turn": self._turn[run],
            "age_s": float(age),
            "uses_per_s": rate,
            "index": index,
            "value": index * self._value[run] / self._weights[run],
            "followed": bool(self._follows.get(key)) or place + 1 < self._held[run],
        }

    # What happens

    def on_add(
        self,
        keys: Sequence[K],
        parent: K | None = None,
        now: float = 0.0,
        *,
        weight: float = 1.0,
        cost: float = 1.0,
    ) -> None:
        if not keys:
            return
        keys = list(dict.fromkeys(keys))
        above = None if parent is None else self._run_of.get(parent)
        turn = 0
        pieces = self._take(keys, now)
        known = sum(piece[0] for piece in pieces)
        if not self._run_of.keys().isdisjoint(keys[known:]):
            for key in keys[known:]:  # they followed something else before
                run = self._run_of.get(key)
                if run is not None:
                    self._cut_out(run, self._blocks[run].index(key))
        source = pieces[-1][3] + 1 if pieces else None
        if source is None and above is not None:
            # A request that only found blocks was counted as a turn when it did.
            source = self._turn[above] + (not self._is_bare[above])
        deepest = keys[known - 1] if known else parent
        if source is not None and deepest is not None:
            ways = self._ways[deepest] = self._ways.get(deepest, 0) + 1
            turn = source if ways <= _MANY else 0
        new = len(keys) - known
        end = len(keys)
        last = end - 1 if known < end - 1 or (known < end and deepest is not None) else end
        cuts = [(0, known, FOUND), (known, last, NEW), (last, end, LAST)]
        at = parent
        made = []
        for start, stop, part in cuts:
            if start < stop:
                run = self._make(keys[start:stop], at, now, part, turn, new, weight, cost)
                made.append(run)
                at = keys[stop - 1]
        for run in reversed(made):
            self._seq_of[run] = next(self._seq)
        self._free(made[-1], now)
        self._added = (parent, turn, new)

    def on_hit(self, keys: Sequence[K], now: float) -> None:
        keys = list(keys)
        at = self._before(keys[0]) if keys else None
        pieces = self._take(keys, now)
        found = sum(piece[0] for piece in pieces)
        parent, turn, new = self._added
        self._added = (None, 0, 0)
        if found:
            keys = keys[:found]
            is_bare = not new or parent != keys[-1]
            if is_bare:
                turn, new = pieces[-1][3] + 1, 0
            made = []
            start = stop = 0
            for i, (count, *worth, _) in enumerate(pieces):
                stop += count
                ways = self._ways.get(keys[stop - 1], 0)
                if ways <= _MANY and i + 1 < len(pieces) and worth == list(pieces[i + 1][1:3]):
                    continue
                kind = (FOUND, turn, new)
                if ways > _MANY:
                    kind = (SHARED, 0, ways)
                made.append(self._make(keys[start:stop], at, now, *kind, *worth))
                at, start = keys[stop - 1], stop
            for run in reversed(made):
                self._seq_of[run] = next(self._seq)
            self._free(made[-1], now)
        self._requests += 1
        if self.learn and self._requests >= self._next_update:
            self._learn(now)

    def on_remove(self, keys: Iterable[K]) -> None:
        for key in keys:
            run = self._run_of.get(key)
            if run is None:
                continue
            blocks = self._blocks[run]
            place = blocks.index(key)
            if place == self._held[run] - 1 and not self._follows.get(key):
                self._shrink(run, 1)
            else:
                self._cut_out(run, place)

    def victims(self, now: float) -> Iterator[K]:
        scores = self._scores(now)
        heap = [(score, run) for run, score in scores.items()]
        heapq.heapify(heap)
        while heap:
            score, run = heapq.heappop(heap)
            held = self._held[run]
            key, parent = self._blocks[run][held - 1], self._parent[run]
            yield key
            if self._held[run] == held:
                continue
            if self._is_free(run):
                heapq.heappush(heap, (score, run))
            above = None if parent is None else self._run_of.get(parent)
            if not self._held[run] and above is not None and self._is_free(above):
                heapq.heappush(heap, (self._score(above, now), above))

    def evict(self, weight: float, now: float) -> list[K]:
        gone: list[K] = []
        target = self._weight - weight + 1e-9 * weight
        self._ranked -= 1
        if self._ranked < 0:
            self._heap.clear()
            self._floor = -1.0
        self._is_evicting = True
        while self._weight > target and self._num_held:
            if not self._heap or self._heap[0][0] > self._floor:
                self._rank(now)
                if not self._heap:  # what claims to follow one another goes round in circles
                    oldest = min(self._running(), key=lambda run: self._seq_of[run])
                    gone.append(self._blocks[oldest][self._held[oldest] - 1])
                    self._cut_out(oldest, self._held[oldest] - 1)
                    continue
            _, run, seq = heapq.heappop(self._heap)
            if self._seq_of[run] != seq or not self._held[run]:
                continue
            if self.ratio is not None and self._raw[run]:
                self._pack(run)
                self._push(run, now)
            elif self._is_free(run):
                need = -int(-(self._weight - target) // self._weights[run])
                gone += self._shrink(run, max(1, need), now)
            else:
                self._leaf[run] = False
        self._is_evicting = False
        if self._num_gone > self.ghosts * self._num_held + _GHOSTS:
            self._forget(now)
        return gone

    # Ranking

    def _push(self, run: int, now: float) -> None:
        if self._ranked > 0 or self._is_evicting:
            heapq.heappush(self._heap, (self._score(run, now), run, self._seq_of[run]))

    def _score(self, run: int, now: float) -> float:
        index = self.reuse.index[int(self._cls[run]), bin_of(float(now - self._last[run]))]
        score = float(index * self._density[run])
        if self.ratio is not None and self._raw[run]:
            score *= self.loss / (1.0 - self.ratio)
        return score

    def _scores(self, now: float) -> dict[int, float]:
        free = [run for run in numpy.flatnonzero(self._leaf).tolist() if self._is_free(run)]
        runs = numpy.array(free, numpy.int64)
        return dict(zip(runs.tolist(), self._all_scores(runs, now).tolist(), strict=True))

    def _all_scores(self, runs: Any, now: float) -> Any:
        ages = numpy.maximum(now - self._last[runs], 1e-9)
        scores = self.reuse.index[self._cls[runs], bins_of(ages)]
        scores = scores * self._density[runs]
        if self.ratio is not None:
            scores[numpy.array(self._raw)[runs]] *= self.loss / (1.0 - self.ratio)
        return scores

    def _rank(self, now: float) -> None:
        """The lowest scores of all that may go, into the heap."""
        leaf = (
            self._leaf
            if self.ratio is None
            else self._leaf | (numpy.array(self._raw) & (numpy.array(self._held) > 0))
        )
        runs = numpy.flatnonzero(leaf)
        scores = self._all_scores(runs, now)
        count = max(32, len(runs) // 8)
        if count < len(runs):
            lowest = numpy.argpartition(scores, count)
            self._floor = float(scores[lowest[count]])
            runs, scores = runs[lowest[:count]], scores[lowest[:count]]
        else:
            self._floor = float("inf")
        chosen = runs.tolist()
        seqs = [self._seq_of[run] for run in chosen]
        self._heap = list(zip(scores.tolist(), chosen, seqs, strict=True))
        heapq.heapify(self._heap)
        self._ranked = len(self._leaf) // (4 * _EXACT)

    def _pack(self, run: int) -> None:
        assert self.ratio is not None
        held = self._blocks[run][: self._held[run]]
        self.packed.update(held)
        weight = self._weights[run]
        self._weights[run] = weight * self.ratio
        self._density[run] /= self.ratio
        self._weight -= len(held) * weight * (1.0 - self.ratio)
        self._raw[run] = False

    # Learning

    def _used(self, run: int, count: int, now: float) -> None:
        if self.learn:
            self.reuse.end(int(self._cls[run]), float(now - self._last[run]), count, True)

    def _learn(self, now: float) -> None:
        lengths = numpy.array(self._length)
        watched = numpy.flatnonzero(lengths)
        weights = lengths[watched]
        unit = float(weights.mean()) if len(weights) else 1.0
        since = self._requests - self._last_update
        self.reuse.decay(0.5 ** (since / self._memory()))
        self.reuse.update(self._cls[watched], now - self._last[watched], weights, unit)
        self._last_update = self._requests
        self._next_update = self._requests + max(_REFRESH, self._requests // 16)
        self._ranked = 0

    def _memory(self) -> float:
        """Requests after which what was seen counts half: long against the longest wait."""
        return 32768.0

    def _forget(self, now: float) -> None:
        """Watch the oldest of what is gone no more."""
        held = self._held
        gone = [run for run, length in enumerate(self._length) if length and not held[run]]
        spare = self._num_gone - 0.9 * (self.ghosts * self._num_held + _GHOSTS)
        for run in sorted(gone, key=self._seq_of.__getitem__):
            if spare <= 0:
                break
            length = self._length[run]
            if self.learn:
                age = float(now - self._last[run])
                self.reuse.end(int(self._cls[run]), age, length, False)
            for key in self._blocks[run]:
                del self._run_of[key]
                self._ways.pop(key, None)
            self._num_gone -= length
            spare -= length
            self._release(run)
