"""How likely is something to be used again, and how soon: learnt while it happens.

Everything that is held, or was until lately, belongs to a class and has an age, the time since
its last use. For each class and age the rate of uses is estimated from what was seen, with what
is not used yet counted for as long as it waits. Classes form levels, each finer than the one
before: a rate that few uses support is drawn towards that of the coarser class.

The index of a class at an age is the greatest, over all times one could wait, of the expected
uses per unit of time until it is used or the wait is over. It is what a place in a cache brings
when it is held as long as it pays, and no longer: with independent uses no other ranking brings
more.

Source: Gittins, Bandit processes and dynamic allocation indices, 1979; Beckmann et al., LHD:
improving cache hit rate by maximizing hit density, NSDI 2018, ranks by a related quantity.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy

Array: TypeAlias = "numpy.ndarray[Any, Any]"

BINS = 48
_PER_OCTAVE = 2  # bins of age
_FIRST_S = 1.0  # the first bin ends there, the last one 140 days later
_EVIDENCE = 6.0  # uses of a class that weigh as much as what the coarser class says
_PRIOR = 0.3  # uses per e-fold of age, before anything was seen

_EDGES = numpy.concatenate([[0.0], _FIRST_S * 2.0 ** (numpy.arange(BINS) / _PER_OCTAVE)])
WIDTHS = numpy.diff(_EDGES)
_STARTS = _EDGES[:-1].tolist()


def bin_of(age: float) -> int:
    """The bin of an age in seconds."""
    if age < _FIRST_S:
        return 0
    return min(int(_PER_OCTAVE * math.log2(age / _FIRST_S)) + 1, BINS - 1)


def bins_of(ages: Array) -> Array:
    """The bins of many ages."""
    with numpy.errstate(divide="ignore"):
        found = numpy.floor(_PER_OCTAVE * numpy.log2(ages / _FIRST_S)) + 1
    bins: Array = numpy.clip(found, 0, BINS - 1).astype(numpy.int64)
    return bins


class Reuse:
    """The rates, and the indices that follow from them.

    Args:
        shape: classes per level, coarse to fine: a class is a number in the product of these.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.classes = int(numpy.prod(shape))
        self._hits = numpy.zeros((self.classes, BINS))
        self._ended = numpy.zeros((self.classes, BINS))  # weight whose wait ended in this bin
        self._partial = numpy.zeros((self.classes, BINS))  # seconds of these in that bin
        self.index = numpy.zeros((self.classes, BINS))
        self.rates = numpy.zeros((self.classes, BINS))
        nothing = numpy.zeros(0)
        self.update(nothing, nothing, nothing, 1.0)

    def end(self, cls: int, age: float, weight: float, used: bool) -> None:
        """Something of a class was used at this age, or is watched no more."""
        age = max(age, 0.0)
        where = cls, bin_of(age)
        if used:
            self._hits[where] += weight
        self._ended[where] += weight
        self._partial[where] += weight * (age - _STARTS[where[1]])

    def decay(self, factor: float) -> None:
        """What was seen so far counts less from now on."""
        self._hits *= factor
        self._ended *= factor
        self._partial *= factor

    def update(self, classes: Array, ages: Array, weights: Array, unit: float) -> None:
        """Compute rates and indices anew.

        Args:
            classes, ages, weights: [n] of what is watched now.
            unit: weight of a typical piece: what one use counts for.

        Cost: classes that were seen x 48 x 24 steps; 1 ms for 80 of them.
        """
        ended, partial = self._ended.copy(), self._partial.copy()
        if len(classes):
            ages = numpy.maximum(ages, 0.0)
            bins = bins_of(ages)
            numpy.add.at(ended, (classes, bins), weights)
            numpy.add.at(partial, (classes, bins), weights * (ages - _EDGES[bins]))
        beyond = ended[:, ::-1].cumsum(axis=1)[:, ::-1] - ended
        waited = beyond * WIDTHS + partial
        kappa = _EVIDENCE * unit
        rates = _PRIOR / numpy.maximum(_EDGES[1:], _FIRST_S)[None]
        for level in range(len(self.shape) + 1):
            # Sums over the finer levels; what a class has on top of its parent is a factor, and
            # then a form of its own.
            groups = int(numpy.prod(self.shape[:level]))
            h = self._hits.reshape(groups, -1, BINS).sum(axis=1)
            w = waited.reshape(groups, -1, BINS).sum(axis=1)
            prior = numpy.repeat(rates, groups // len(rates), axis=0)
            if level:
                factor = (h.sum(axis=1) + kappa) / ((w * prior).sum(axis=1) + kappa)
                prior = prior * factor[:, None]
            rates = prior * (smooth(h) + kappa) / (smooth(w * prior) + kappa)
            if level == len(self.shape) - 1:
                coarse = rates
        self.rates = rates
        seen = waited.any(axis=1)
        # Classes of which nothing was seen are as the coarser ones.
        index = index_of(numpy.concatenate([coarse, rates[seen]]))
        self.index[:] = numpy.repeat(index[: len(coarse)], self.classes // len(coarse), axis=0)
        self.index[seen] = index[len(coarse) :]

    def describe(self, cls: int, age: float) -> tuple[float, float]:
        """(uses per second now, index) of a class at an age."""
        b = bin_of(max(age, 0.0))
        return float(self.rates[cls, b]), float(self.index[cls, b])


def smooth(table: Array) -> Array:
    """[n, BINS] with a share of the neighbouring ages: 1 2 3 2 1, and as much as before in all."""
    padded = numpy.pad(table, ((0, 0), (2, 2)))
    parts = (w * padded[:, i : i + BINS] for i, w in enumerate((1, 2, 3, 2, 1)))
    found: Array = sum(parts, numpy.zeros_like(table)) / 9.0
    return found


def index_of(rates: Array) -> Array:
    """[n, BINS] the best expected uses per second over all waits from each age on."""
    mass = rates * WIDTHS
    used = -numpy.expm1(-mass)
    lasts = WIDTHS * numpy.where(mass > 1e-9, used / numpy.maximum(mass, 1e-300), 1.0)
    best = numpy.zeros_like(rates)
    uses, seconds, left = numpy.zeros_like(rates), numpy.zeros_like(rates), numpy.ones_like(rates)
    for ahead in range(BINS):
        n = BINS - ahead
        uses[:, :n] += left[:, :n] * used[:, ahead:]
        seconds[:, :n] += left[:, :n] * lasts[:, ahead:]
        left[:, :n] *= 1.0 - used[:, ahead:]
        numpy.maximum(best[:, :n], uses[:, :n] / seconds[:, :n], out=best[:, :n])
    return best
