"""The policy that uses what only a memory OS knows: chains, turns, sizes, costs.

What one request used is a run: a piece of a path of the tree, whose blocks were last used
together. Runs are what is ranked: by the learnt index of their class at their age (``reuse``),
times what building them again costs, over their weight. Only the end of a run that nothing held
follows may go. What goes is watched on without its bytes, so that the rates are those of all
uses, not of those that the cache happened to serve.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy

from memos.scheduler.reuse import Reuse, bin_of, bins_of

K = TypeVar("K", bound=Hashable)

FOUND, NEW, LAST = 0, 1, 2  # what a run is of its request: used before, new, the last block
_TURNS = 5
_SIZES = 16
_SHARED = 3  # from what requests part more often is no session but a prompt that many share
_REFRESH = 64  # requests between two looks at the rates, at first
_EXACT = 256  # so many runs are ranked anew for every eviction


class Memos(Generic[K]):
    """Leaves of the prefix tree, the lowest expected saving per byte and second first.

    The class of a run: what it is of its request (found, new, the last block, which is seldom
    full), the turn of its session, the number of new blocks. A request continues a session
    unless it parts from the others at a block where many did: that is a prompt they share.

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
        self.capacity, self.learn, self.ghosts = capacity, learn, ghosts
        self.ratio, self.loss = packed, loss
        self.reuse = Reuse((3, _TURNS, _SIZES))
        self.packed: set[K] = set()
        self._run_of: dict[K, int] = {}
        self._blocks: list[list[K]] = []
        self._parent: list[K | None] = []
        self._turn: list[int] = []
        self._held: list[int] = []
        self._length: list[int] = []
        self._seq_of: list[int] = []
        self._weights: list[float] = []
        self._value: list[float] = []
        self._raw: list[bool] = []
        self._is_bare: list[bool] = []  # made by a request that added nothing
        self._free_runs: list[int] = []
        self._ways: dict[K, int] = {}  # block -> how often requests went on with new blocks from it
        self._follows: dict[K, int] = {}  # block -> held runs that begin after it
        self._num_held = 0
        self._num_gone = 0
        self._weight = 0.0
        self._seq = itertools.count(1)
        self._requests = 0
        self._next_update = _REFRESH
        self._last_update = 0
        self._added: tuple[K | None, int, int] = (None, 0, 0)
        self._heap: list[tuple[float, int, int]] = []
        self._floor = -1.0  # below this score the heap is complete
        self._ranked = 0
        self._is_evicting = False
        self._allocate(256)

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
        part = int(self._cls[run]) // (_TURNS * _SIZES)
        return {
            "held": place < self._held[run],
            "part": ("found", "new", "last")[part],
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
        keys = list(keys)
        above = None if parent is None else self._run_of.get(parent)
        turn = 0
        pieces = self._take(keys, now)
        known = sum(piece[0] for piece in pieces)
        if not self._run_of.keys().isdisjoint(keys[known:]):
            self.on_remove([key for key in keys[known:] if key in self._run_of])
        source = pieces[-1][3] + 1 if pieces else None
        if source is None and above is not None:
            # A request that only found blocks was counted as a turn when it did.
            source = self._turn[above] + (not self._is_bare[above])
        deepest = keys[known - 1] if known else parent
        if source is not None and deepest is not None:
            ways = self._ways[deepest] = self._ways.get(deepest, 0) + 1
            turn = source if ways <= _SHARED else 0
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
            start = 0
            for count, together in itertools.groupby(pieces, key=lambda piece: piece[1:3]):
                stop = start + sum(piece[0] for piece in together)
                made.append(self._make(keys[start:stop], at, now, FOUND, turn, new, *count))
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
                if not self._heap:
                    break
            _, run, seq = heapq.heappop(self._heap)
            if self._seq_of[run] != seq or not self._held[run]:
                continue
            if self.ratio is not None and self._raw[run]:
                self._pack(run)
                self._push(run, now)
            elif self._is_free(run):
                need = -int(-(self._weight - target) // self._weights[run])
                gone += self._shrink(run, max(1, need), now)
        self._is_evicting = False
        if self._num_gone > self.ghosts * self._num_held + 16384:
            self._forget(now)
        return gone

    # Runs

    def _allocate(self, size: int) -> None:
        have = len(self._blocks)
        more = size - have
        for name, dtype in (("_last", float), ("_cls", int), ("_density", float), ("_leaf", bool)):
            new = numpy.zeros(size, dtype)
            if have:
                new[:have] = getattr(self, name)
            setattr(self, name, new)
        self._held += [0] * more
        self._length += [0] * more
        self._seq_of += [0] * more
        self._weights += [0.0] * more
        self._value += [0.0] * more
        self._raw += [False] * more
        self._blocks += [[] for _ in range(more)]
        self._parent += [None] * more
        self._turn += [0] * more
        self._is_bare += [False] * more
        self._free_runs += range(size - 1, have - 1, -1)

    _last: Any
    _cls: Any
    _density: Any  # value over weight
    _leaf: Any  # its end may go

    def _running(self) -> list[int]:
        return [run for run, held in enumerate(self._held) if held]

    def _make(
        self,
        keys: Sequence[K],
        parent: K | None,
        now: float,
        part: int,
        turn: int,
        new: int,
        weight: float,
        cost: float,
    ) -> int:
        if not self._free_runs:
            self._allocate(2 * len(self._blocks))
        run = self._free_runs.pop()
        size = min(new.bit_length(), _SIZES - 1)
        self._blocks[run], self._parent[run] = list(keys), parent
        self._turn[run] = turn
        self._last[run] = now
        self._cls[run] = (part * _TURNS + min(turn, _TURNS - 1)) * _SIZES + size
        self._held[run] = self._length[run] = len(keys)
        self._weights[run], self._value[run] = weight, cost
        self._density[run] = cost / weight
        self._raw[run] = keys[0] not in self.packed
        self._leaf[run] = self._is_bare[run] = False
        self._run_of.update(dict.fromkeys(keys, run))
        self._num_held += len(keys)
        self._weight += weight * len(keys)
        if parent is not None:
            self._follows[parent] = self._follows.get(parent, 0) + 1
        return run

    def _take(self, keys: list[K], now: float) -> list[tuple[int, float, float, int]]:
        """Take the known ones at the beginning of a path out of their runs: they were used.

        Returns:
            For each run: how many of its blocks, their weight and cost, and its turn.
        """
        pieces: list[tuple[int, float, float, int]] = []
        i, end = 0, len(keys)
        while i < end:
            run = self._run_of.get(keys[i])
            if run is None:
                break
            blocks = self._blocks[run]
            if blocks[0] != keys[i]:
                if i:
                    break  # it followed something else when it was added
                run = self._split(run, blocks.index(keys[i]))
                blocks = self._blocks[run]
            count = min(len(blocks), end - i)
            if blocks[:count] != keys[i : i + count]:
                count = next(j for j in range(count) if blocks[j] != keys[i + j])
            held = min(count, self._held[run])
            weight = self._weights[run]
            pieces.append((count, weight, self._value[run], self._turn[run]))
            if self.learn:
                age = float(now - self._last[run])
                self.reuse.end(int(self._cls[run]), age, count, True)
            self._num_held -= held
            self._num_gone -= count - held
            self._weight -= weight * held
            if held:
                self._unfollow(self._parent[run])
            self._held[run] -= held
            self._length[run] -= count
            rest = blocks[count:]
            if rest:
                self._blocks[run] = rest
                self._parent[run] = blocks[count - 1]
                if self._held[run]:
                    parent = blocks[count - 1]
                    self._follows[parent] = self._follows.get(parent, 0) + 1
                else:
                    self._leaf[run] = False
            else:
                self._release(run)
            i += count
        return pieces

    def _split(self, run: int, place: int) -> int:
        """Make the blocks of a run from this place on a run of their own."""
        blocks, held = self._blocks[run], self._held[run]
        if not self._free_runs:
            self._allocate(2 * len(self._blocks))
        made = self._free_runs.pop()
        self._blocks[run], self._blocks[made] = blocks[:place], blocks[place:]
        self._parent[made] = blocks[place - 1]
        self._turn[made] = self._turn[run]
        self._is_bare[made] = self._is_bare[run]
        for name in ("_last", "_cls", "_density", "_weights", "_value", "_raw", "_seq_of"):
            column = getattr(self, name)
            column[made] = column[run]
        self._length[run], self._length[made] = place, len(blocks) - place
        self._held[run], self._held[made] = min(held, place), max(held - place, 0)
        if held > place:
            self._follows[blocks[place - 1]] = self._follows.get(blocks[place - 1], 0) + 1
        self._run_of.update(dict.fromkeys(self._blocks[made], made))
        self._leaf[run], self._leaf[made] = self._is_free(run), self._is_free(made)
        return made

    def _before(self, key: K) -> K | None:
        """The block that this one follows; None for a root."""
        run = self._run_of.get(key)
        if run is None:
            return None
        place = self._blocks[run].index(key)
        return self._blocks[run][place - 1] if place else self._parent[run]

    def _unfollow(self, parent: K | None) -> None:
        if parent is None:
            return
        left = self._follows[parent] - 1
        if left:
            self._follows[parent] = left
        else:
            del self._follows[parent]
            above = self._run_of.get(parent)
            if above is not None and self._is_free(above):
                self._leaf[above] = True

    def _release(self, run: int) -> None:
        self._blocks[run], self._parent[run] = [], None
        self._held[run] = self._length[run] = self._seq_of[run] = 0
        self._leaf[run] = False
        self._free_runs.append(run)

    def _is_free(self, run: int) -> bool:
        held = self._held[run]
        return bool(held) and self._blocks[run][held - 1] not in self._follows

    def _free(self, run: int, now: float) -> None:
        """Let a run be ranked if its end may go."""
        self._leaf[run] = self._is_free(run)
        if self._leaf[run]:
            self._push(run, now)

    def _push(self, run: int, now: float) -> None:
        if self._ranked > 0 or self._is_evicting:
            heapq.heappush(self._heap, (self._score(run, now), run, self._seq_of[run]))

    def _shrink(self, run: int, count: int, now: float | None = None) -> list[K]:
        """Let up to ``count`` blocks go from the end of a run, as far as nothing follows them."""
        blocks = self._blocks[run]
        held = stop = self._held[run]
        while count and stop and blocks[stop - 1] not in self._follows:
            stop -= 1
            count -= 1
        gone = blocks[stop:held]
        self.packed.difference_update(gone)
        self._held[run] = stop
        self._num_held -= len(gone)
        self._num_gone += len(gone)
        self._weight -= self._weights[run] * len(gone)
        self._leaf[run] = bool(stop) and blocks[stop - 1] not in self._follows
        if self._leaf[run] and now is not None:
            self._push(run, now)
        parent = self._parent[run]
        if not stop and parent is not None:
            self._unfollow(parent)
            above = self._run_of.get(parent)
            if now is not None and above is not None and self._leaf[above]:
                self._push(above, now)
        return gone[::-1]

    def _cut_out(self, run: int, place: int) -> None:
        """A block goes though others follow it: those cannot be reached, and go first."""
        blocks, held = self._blocks[run], self._held[run]
        rest, gone = blocks[place + 1 :], blocks[place]
        weight = self._weights[run]
        if place:
            self._blocks[run] = blocks[:place]
            self._held[run], self._length[run] = min(held, place), place
        elif held:
            self._unfollow(self._parent[run])
        after = max(held - place - 1, 0)  # held blocks that followed it
        self._num_held -= max(held - place, 0)
        self._num_gone -= len(blocks) - max(held, place)
        self._weight -= weight * max(held - place, 0)
        del self._run_of[gone]
        self._ways.pop(gone, None)
        self.packed.discard(gone)
        for key in rest[after:]:
            del self._run_of[key]
        if after:
            kept = rest[:after]
            part = int(self._cls[run]) // (_TURNS * _SIZES)
            made = self._make(
                kept, gone, float(self._last[run]), part, self._turn[run], 0,
                weight, 0.0,
            )  # fmt: skip
            self._seq_of[made] = next(self._seq)
            self._leaf[made] = self._is_free(made)
        if place:
            self._leaf[run] = self._is_free(run)
        else:
            self._release(run)

    # Ranking

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
        spare = self._num_gone - 0.9 * (self.ghosts * self._num_held + 16384)
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
