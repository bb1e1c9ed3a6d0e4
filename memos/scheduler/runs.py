"""The tree of what is held, in runs: pieces of a path whose blocks were last used together.

A run knows its blocks, what it follows, how many of its blocks are held (the first ones; the rest
is gone and watched), and its columns: last use, class, worth. Only the end of a run that nothing
held follows may go.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy

K = TypeVar("K", bound=Hashable)

TURNS = 5
SIZES = 16


class Runs(Generic[K]):
    """The runs of a policy. Bytes, ranking and learning are its own: ``_used``, ``_push``."""

    def __init__(self) -> None:
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
        self._allocate(256)

    def _used(self, run: int, count: int, now: float) -> None:
        """So many blocks of a run are used."""
        raise NotImplementedError

    def _push(self, run: int, now: float) -> None:
        """The end of a run may go."""
        raise NotImplementedError

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
        size = min(new.bit_length(), SIZES - 1)
        self._blocks[run], self._parent[run] = list(keys), parent
        self._turn[run] = turn
        self._last[run] = now
        self._cls[run] = (part * TURNS + min(turn, TURNS - 1)) * SIZES + size
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
            self._used(run, count, now)
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
            part = int(self._cls[run]) // (TURNS * SIZES)
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
