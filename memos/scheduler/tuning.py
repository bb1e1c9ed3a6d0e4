"""How long a use counts: chosen while it happens, by what would have foretold uses best.

Several half-lives are tried in the shadow, each with a heat of its own per unit. When a unit is
used again, every candidate has said at which rate; the one whose rates make the gaps that were
seen the most likely is the one that plans use. The candidates are the bounds; nothing else is
learnt here, and with one candidate nothing is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from memos.errors import ArgumentError

HALF_LIVES_S = (900.0, 3600.0, 4 * 3600.0, 86400.0)
_FADES = 0.998  # of a score with every use
_BOUND = 65536  # units that are followed
_MARGIN = 4.0  # of likelihood, in nats, before another one is chosen: no see-saw


class Tuner:
    """Chooses the half-life of a use. Called under the scheduler's lock.

    Args:
        candidates: half-lives in seconds.
        start:      the one to begin with.

    Raises:
        ArgumentError: no candidates, one that is not above 0, or ``start`` is none of them.
    """

    def __init__(
        self, candidates: Sequence[float] = HALF_LIVES_S, start: float = HALF_LIVES_S[1]
    ) -> None:
        if not candidates or min(candidates) <= 0 or start not in candidates:
            raise ArgumentError(f"half-lives: some above 0 with {start} among them wanted")
        self.candidates = tuple(candidates)
        self.chosen = self.candidates.index(start)
        self.scores = [0.0] * len(candidates)
        self.count = 0
        self._units: OrderedDict[str, tuple[float, list[float]]] = OrderedDict()

    @property
    def half_life_s(self) -> float:
        return self.candidates[self.chosen]

    def used(self, id: str, at: float) -> bool:
        """A unit is used; True where another half-life is chosen by that."""
        known = self._units.pop(id, None)
        heats = [1.0] * len(self.candidates)
        if known is not None:
            last, before = known
            gap = max(at - last, 1e-3)
            for i, half_life in enumerate(self.candidates):
                rate = before[i] * math.log(2) / half_life
                score = math.log(rate) - rate * gap  # of an exponential gap
                self.scores[i] = _FADES * self.scores[i] + (1 - _FADES) * score
                heats[i] += before[i] * 0.5 ** (gap / half_life)
            self.count += 1
        self._units[id] = max(at, known[0] if known else at), heats
        if len(self._units) > _BOUND:
            self._units.popitem(last=False)
        best = max(range(len(self.scores)), key=self.scores.__getitem__)
        enough = _MARGIN * (1 - _FADES)
        if best != self.chosen and self.scores[best] > self.scores[self.chosen] + enough:
            self.chosen = best
            return True
        return False

    def heat(self, id: str, at: float) -> float | None:
        """A unit's uses by the chosen half-life; None for an unknown one."""
        known = self._units.get(id)
        if known is None:
            return None
        age = max(at - known[0], 0.0)
        return known[1][self.chosen] * math.pow(2.0, -age / self.half_life_s)

    def forget(self, id: str) -> None:
        self._units.pop(id, None)

    def stats(self) -> dict[str, Any]:
        """half_life_s: the chosen one; scores: mean log likelihood by half-life; uses: judged."""
        total = 1.0 - _FADES**self.count
        means = [score / total if total else 0.0 for score in self.scores]
        pairs = zip(self.candidates, means, strict=True)
        return {
            "half_life_s": self.half_life_s,
            "scores": {f"{half_life:g}": score for half_life, score in pairs},
            "uses": self.count,
        }
