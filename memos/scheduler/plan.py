"""The plan: which copies should be where, and the moves that get there. A pure function.

For each tier, fastest first, units are ranked by the seconds that a copy there saves per second
and byte: expected uses x (seconds from the next best place - seconds from here) / bytes. What fits
stays or comes. A copy is made only where it pays: over the horizon it must save more seconds than
making it takes, and an idle copy stays until its room is wanted.

The moves stand in an order in which each of them leaves a valid state: room is made before it is
used, the slowest tier first, and a last copy that cannot be built again is never given up.

Where a last copy would go it is compressed again instead, if it can be, if there is room for both
for a moment, and if at its smaller size it is worth its place. So are those that are worth least
in a tier that is nearly full: what is written next then evicts nothing. What is worth even less
makes room for that, if nobody builds it again but who uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy

from memos.errors import ArgumentError
from memos.scheduler.units import ADAPTER, KINDS, KV, TEXT, Array, State

PROMOTE, DEMOTE, PREFETCH, DROP = "promote", "demote", "prefetch", "drop"
ARCHIVE, ACTIVATE, CONSOLIDATE = "archive", "activate", "consolidate"
COMPRESS = "compress"

_STAYS = 1.1  # a copy that is there is worth more than an equal one that is not: no see-saw
_PASSED_OVER = 16


@dataclass(frozen=True)
class Action:
    """One move.

    Args:
        kind:      promote, demote, prefetch, drop, archive, activate, consolidate or compress.
        unit:      its id.
        source:    tier that loses the copy (demote, drop) or gives one (promote, prefetch).
        target:    tier that gets one; to compress, the source itself.
        num_bytes: that the target takes, or for a drop that the source gives back.
        reason:    why, in words and numbers.
    """

    kind: str
    unit: str
    source: str | None
    target: str | None
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class Rules:
    """What a plan may assume.

    Args:
        horizon_s:    over which a new copy has to pay for itself.
        limit:        actions of one plan.
        archive_rate: a text of fewer expected uses per second, weighted by importance, is
            archived; 0: none.
        background:   what a second of work in the background weighs against one that someone waits.
        compress_above: share of a tier's budget; where more is taken, or less is left than one
            more unit and its compression want, what is worth least there is compressed again, as
            far as it can be.
        build:        kinds that may be built: kv (activate), adapter (consolidate).
    """

    horizon_s: float = 600.0
    limit: int = 1024
    archive_rate: float = 0.0
    build: tuple[str, ...] = (KV, ADAPTER)
    background: float = 0.5
    compress_above: float = 0.8


class Ranking:
    """What a copy of each unit in each tier is worth, and which ones a plan wants.

    Args of ``wanted``, ``density``: [n, t]; ``price`` [t]: the lowest density that fits a tier.
    """

    def __init__(self, state: State, budgets: Mapping[str, int], now: float, rules: Rules) -> None:
        check_budgets(state, budgets)
        n, tiers = len(state), len(state.tiers)
        self.rate = state.rates(now, rules.horizon_s)
        self.worth = self.rate * (1.0 + numpy.clip(state.importance, 0.0, 1.0))
        self.fixed = state.pinned | state.in_use
        self.density = numpy.full((n, tiers), -numpy.inf)
        self.wanted = numpy.zeros((n, tiers), bool)
        self.price = numpy.zeros(tiers)
        may_build = numpy.isin(state.kind, [KINDS.index(kind) for kind in rules.build])
        if state.buildable is not None:
            may_build &= state.buildable
        nowhere = numpy.where(state.rebuildable, state.rebuild_s, numpy.inf)
        exists = _any(state.copies)
        # Seconds to the first use from where it is now.
        access = numpy.where(state.copies, state.access_s, numpy.inf)
        here = _least(access, nowhere)
        possible = state.num_bytes >= 0
        safe = state.rebuildable.copy()  # units whose last copy may go
        for t in range(tiers):
            other = _least(access[:, t + 1 :], nowhere)
            # What cannot be built again has a copy somewhere slower in any case.
            slower = numpy.where(possible[:, t + 1 :], -state.access_s[:, t + 1 :], numpy.inf)
            fallback = -_least(slower, numpy.full(n, numpy.inf))
            other = numpy.where(numpy.isinf(other), fallback, other)
            saved = numpy.where(numpy.isinf(other), numpy.inf, other - state.access_s[:, t])
            size = numpy.maximum(state.num_bytes[:, t], 1)
            with numpy.errstate(invalid="ignore"):
                density = numpy.nan_to_num(self.worth * saved / size, nan=0.0, posinf=numpy.inf)
            density = numpy.where(numpy.isinf(saved), numpy.inf, density)
            density = numpy.where(possible[:, t], density, -numpy.inf)
            has = state.copies[:, t]
            making = numpy.where(exists, here, state.rebuild_s)
            buildable = exists | (may_build & state.rebuildable)
            with numpy.errstate(invalid="ignore"):
                gain = self.worth * (here - state.access_s[:, t]) * rules.horizon_s
                pays = (gain > rules.background * making) & possible[:, t] & buildable
            # A copy that leaves the tier above and is the last one.
            near = self.wanted[:, :t]
            nearer = _any(near if state.mirror is None else near & ~state.mirror[:, :t])
            leaves = possible[:, t] & ~has & ~nearer & _any(state.copies[:, :t])
            leaves &= ~_any(state.copies[:, t + 1 :])
            with numpy.errstate(invalid="ignore"):
                kept = self.worth * (nowhere - state.access_s[:, t]) * rules.horizon_s
                leaves &= ~safe | (kept > rules.background * state.access_s[:, t])
            density = numpy.where(has & nearer, numpy.minimum(density, 0.0), density)
            chosen = (has | leaves | (pays & ~nearer)) & ~self.fixed
            rank = numpy.where(has, density * _STAYS, density)
            rank = numpy.where(leaves, numpy.maximum(rank, 0.0), rank)
            self.density[:, t] = density
            self.wanted[:, t] = has & self.fixed
            room = budgets[state.tiers[t]] - int(state.num_bytes[self.wanted[:, t], t].sum())
            candidates = numpy.flatnonzero(chosen)
            order = candidates[numpy.argsort(-rank[candidates], kind="stable")]
            chosen_now, first_out = fill(order, state.num_bytes[:, t], room)
            self.wanted[chosen_now, t] = True
            if first_out is not None:
                self.price[t] = max(float(rank[first_out]), 0.0)


def _any(table: Array) -> Array:
    """[n] whether any column is set: numpy reduces long axes fast, and short ones slowly."""
    found = numpy.zeros(len(table), bool)
    for column in table.T:
        found |= column
    return found


def _least(table: Array, start: Array) -> Array:
    """[n] the least of each row and ``start``."""
    for column in table.T:
        start = numpy.minimum(start, column)
    return start


def _least_of(values: Array, count: int) -> Array:
    """Places of the ``count`` least values, the least first."""
    places = numpy.arange(len(values))
    if 0 < count < len(values):  # a million are not sorted for the sake of a thousand
        places = numpy.flatnonzero(values <= numpy.partition(values, count - 1)[count - 1])
    return places[numpy.argsort(values[places], kind="stable")][:count]


def fill(order: Array, sizes: Array, room: int) -> tuple[Array, int | None]:
    """Those that fit, taken in this order, and the first that does not.

    What is too large for the room that is left is passed over, up to sixteen times.
    """
    taken: list[Array] = []
    first_out: int | None = None
    for _ in range(_PASSED_OVER):
        sums = numpy.cumsum(sizes[order])
        count = int(numpy.searchsorted(sums, room, side="right")) if len(order) else 0
        taken.append(order[:count])
        if count == len(order):
            break
        first_out = int(order[count]) if first_out is None else first_out
        room -= int(sums[count - 1]) if count else 0
        order = order[count + 1 :]
        order = order[sizes[order] <= room]
    return numpy.concatenate(taken), first_out


def check_budgets(state: State, budgets: Mapping[str, int]) -> None:
    """Raises ArgumentError where a tier has no budget, or one below 0."""
    for tier in state.tiers:
        if budgets.get(tier, -1) < 0:
            raise ArgumentError(f"budgets: at least 0 bytes for tier {tier!r} wanted")


def plan(
    state: State, budgets: Mapping[str, int], now: float, rules: Rules | None = None
) -> list[Action]:
    """The moves that make the best of these budgets, in the order in which they may be carried out.

    Deterministic. No tier is above its budget after any of the actions unless it was before, and
    then no action adds to it. Pinned and used units keep their copies; no unit that cannot be
    built again loses its last one.

    Args:
        budgets: bytes, for every tier of the state.
        now:     seconds, as in the state.

    Raises:
        ArgumentError: a tier without a budget, or one below 0.

    Cost: a sort of the units per tier; 0.6 s for a million.
    """
    rules = rules or Rules()
    ranking = Ranking(state, budgets, now, rules)
    return list(_Moves(state, budgets, now, rules, ranking).all())


class _Moves:
    def __init__(
        self,
        state: State,
        budgets: Mapping[str, int],
        now: float,
        rules: Rules,
        ranking: Ranking,
    ) -> None:
        self.state, self.now, self.rules, self.ranking = state, now, rules, ranking
        self.budget = [budgets[tier] for tier in state.tiers]
        used = state.used()
        self.used = [used[tier] for tier in state.tiers]
        self.left = rules.limit
        self.changed: dict[tuple[int, int], bool] = {}  # copies that the actions so far changed
        self.compressed: set[int] = set()
        # A million wishes are not looked at when a thousand can be done.
        self.arrivals = [self._arrivals(t) for t in range(len(state.tiers))]

    def all(self) -> Iterator[Action]:
        for t in reversed(range(len(self.state.tiers))):
            yield from self._make_room(t)
            yield from self._squeeze(t)
        for t in range(len(self.state.tiers)):
            yield from self._bring(t)
        yield from self._archive()

    def _arrivals(self, t: int) -> Array:
        """Units that should get a copy, the best first."""
        state, ranking = self.state, self.ranking
        new = numpy.flatnonzero(ranking.wanted[:, t] & ~state.copies[:, t])
        density = ranking.density[new, t]
        return new[numpy.argsort(-density, kind="stable")][: self.rules.limit]

    def _has(self, unit: int, t: int) -> bool:
        return self.changed.get((unit, t), bool(self.state.copies[unit, t]))

    def _has_own(self, unit: int, t: int) -> bool:
        """A copy that needs no other one."""
        mirror = self.state.mirror
        return self._has(unit, t) and (mirror is None or not bool(mirror[unit, t]))

    def _fits(self, unit: int, t: int) -> bool:
        size = int(self.state.num_bytes[unit, t])
        return size >= 0 and self.used[t] + size <= self.budget[t]

    def _put(self, unit: int, t: int, there: bool) -> int:
        size = int(self.state.num_bytes[unit, t])
        self.changed[unit, t] = there
        self.used[t] += size if there else -size
        return size

    def _make_room(self, t: int) -> Iterator[Action]:
        """Copies leave a tier, the least worth first, until what should come fits."""
        state, ranking = self.state, self.ranking
        coming = int(state.num_bytes[self.arrivals[t], t].sum())
        if self.used[t] + coming <= self.budget[t]:
            return
        may_go = state.copies[:, t] & ~ranking.wanted[:, t] & ~ranking.fixed
        units = numpy.flatnonzero(may_go)
        units = units[numpy.argsort(ranking.density[units, t], kind="stable")]
        for unit in units[: 4 * self.rules.limit].tolist():
            if self.left <= 0 or self.used[t] + coming <= self.budget[t]:
                return
            if unit in self.compressed or not self._has(unit, t):
                continue
            action = self._leave(unit, t)
            if action is not None:
                self.left -= 1
                yield action

    def _leave(self, unit: int, t: int) -> Action | None:
        """A copy leaves: to a slower tier that wants it, away where another is, or not at all."""
        state, tiers = self.state, self.state.tiers
        why = self._value_words(unit, t)
        others = [s for s in range(len(tiers)) if s != t and self._has_own(unit, s)]
        if others:
            size = self._put(unit, t, False)
            reason = f"{why}; {tiers[others[0]]} holds a copy"
            return Action(DROP, state.ids[unit], tiers[t], None, size, reason)
        lower = [s for s in range(t + 1, len(tiers)) if self._fits(unit, s)]
        wanted = [s for s in lower if self.ranking.wanted[unit, s]]
        if wanted or (lower and not state.rebuildable[unit]):
            s = (wanted or lower)[0]
            size = self._put(unit, s, True)
            self._put(unit, t, False)
            reason = f"{why}; from {tiers[s]} it takes {state.access_s[unit, s]:.3g} s"
            return Action(DEMOTE, state.ids[unit], tiers[t], tiers[s], size, reason)
        if self._can_shrink(unit, t) and self._density_smaller(unit, t) > self.ranking.price[t]:
            return self._compress(unit, t, f"{why}; instead of dropping it, ")
        if not state.rebuildable[unit]:
            return None
        size = self._put(unit, t, False)
        reason = f"{why}; building it again takes {state.rebuild_s[unit]:.3g} s"
        return Action(DROP, state.ids[unit], tiers[t], None, size, reason)

    def _squeeze(self, t: int) -> Iterator[Action]:
        """In a tier that is nearly full what is kept for good there becomes smaller, the least
        worth first; copies of it in faster tiers go before."""
        state, ranking = self.state, self.ranking
        if state.compressed is None or self.left <= 0:
            return
        sizes, smaller = state.num_bytes[:, t], state.compressed[:, t]
        may = state.copies[:, t] & ~ranking.fixed & ~_any(state.copies[:, t + 1 :])
        units = numpy.flatnonzero(may & (smaller >= 0) & (smaller < sizes))
        if not len(units):
            return
        coming = int(sizes[self.arrivals[t]].sum()) + state.stray.get(state.tiers[t], 0)
        # Another one comes, as large as these are, and then it is compressed beside itself.
        both = float(sizes[units].mean() + smaller[units].mean())
        limit = min(self.rules.compress_above * self.budget[t], self.budget[t] - both)
        if self.used[t] + coming <= limit:
            return
        worth = self._worth_in_the_end(numpy.flatnonzero(may), t)
        going = self._victims(may, worth, t)
        for unit in units[_least_of(worth[units], 4 * self.rules.limit)].tolist():
            if self.left <= 0 or self.used[t] + coming <= limit:
                return
            if self._is_changed(unit):
                continue
            taken = f"{self.used[t] + coming:,} of {self.budget[t]:,} bytes in {state.tiers[t]}"
            why = (
                f"{float(ranking.rate[unit]) * 3600:.3g} uses an hour are worth "
                f"{worth[unit]:.3g} s per s and byte; {taken} are taken or wanted"
            )
            while not self._can_shrink(unit, t) and going and worth[going[-1]] < worth[unit]:
                victim = going.pop()
                if not self._is_changed(victim):
                    less = f"{worth[victim]:.3g} s per s and byte are less than those of"
                    yield from self._gone(
                        victim, t, f"{less} {state.ids[unit]}, which is compressed"
                    )
                    if self.left <= 0:
                        return
            if not self._can_shrink(unit, t):
                continue
            yield from self._gone_nearer(unit, t, f"{why}; it is compressed in {state.tiers[t]}")
            if self.left <= 0:
                return
            self.left -= 1
            yield self._compress(unit, t, f"{why}; ")

    def _worth_in_the_end(self, units: Array, t: int) -> Array:
        """[n] seconds that a last copy of each of ``units`` saves per second and byte, once it is
        as small as it can be; of the others nothing."""
        state = self.state
        assert state.compressed is not None
        lost = numpy.where(state.rebuildable[units], state.rebuild_s[units], numpy.inf)
        lost = numpy.maximum(lost - state.access_s[units, t], 0.0)
        size, smaller = state.num_bytes[units, t], state.compressed[units, t]
        size = numpy.where(smaller >= 0, numpy.minimum(size, smaller), size)
        found = numpy.zeros(len(state))
        with numpy.errstate(invalid="ignore"):
            saved = numpy.nan_to_num(self.ranking.worth[units] * lost, nan=0.0, posinf=numpy.inf)
        found[units] = saved / numpy.maximum(size, 1)
        return found

    def _victims(self, may: Array, worth: Array, t: int) -> list[int]:
        """Units that make room for the compression of others, the least worth last: those that are
        built again only by who uses them."""
        state = self.state
        if state.buildable is None:
            return []
        units = numpy.flatnonzero(may & state.rebuildable & ~state.buildable)
        order = _least_of(worth[units], 4 * self.rules.limit)
        found: list[int] = units[order[::-1]].tolist()
        return found

    def _is_changed(self, unit: int) -> bool:
        tiers = range(len(self.state.tiers))
        return unit in self.compressed or any((unit, t) in self.changed for t in tiers)

    def _gone(self, unit: int, t: int, why: str) -> Iterator[Action]:
        """A unit's copies go, that in ``t`` last."""
        yield from self._gone_nearer(unit, t, why)
        if self.left > 0:
            self.left -= 1
            size = self._put(unit, t, False)
            yield Action(DROP, self.state.ids[unit], self.state.tiers[t], None, size, why)

    def _gone_nearer(self, unit: int, t: int, why: str) -> Iterator[Action]:
        for s in range(t):
            if self._has(unit, s) and self.left > 0:
                self.left -= 1
                size = self._put(unit, s, False)
                tier = self.state.tiers[s]
                yield Action(DROP, self.state.ids[unit], tier, None, size, why)

    def _can_shrink(self, unit: int, t: int) -> bool:
        """Whether a copy can become smaller, with room for both for a moment."""
        if self.state.compressed is None:
            return False
        size = int(self.state.compressed[unit, t])
        fits = self.used[t] + size <= self.budget[t]
        return fits and 0 <= size < int(self.state.num_bytes[unit, t])

    def _density_smaller(self, unit: int, t: int) -> float:
        """What a copy is worth per byte once it is smaller."""
        assert self.state.compressed is not None
        size = max(int(self.state.compressed[unit, t]), 1)
        return float(self.ranking.density[unit, t]) * int(self.state.num_bytes[unit, t]) / size

    def _compress(self, unit: int, t: int, why: str) -> Action:
        assert self.state.compressed is not None
        old, size = int(self.state.num_bytes[unit, t]), int(self.state.compressed[unit, t])
        tier = self.state.tiers[t]
        self.used[t] += size - old
        self.compressed.add(unit)
        reason = f"{why}it takes {size:,} bytes in {tier} instead of {old:,}"
        return Action(COMPRESS, self.state.ids[unit], tier, tier, size, reason)

    def _bring(self, t: int) -> Iterator[Action]:
        for unit in self.arrivals[t].tolist():
            if self.left <= 0:
                return
            if self._has(unit, t) or not self._fits(unit, t) or self.ranking.fixed[unit]:
                continue
            if unit in self.compressed:  # what it takes from now on is not known for certain
                continue
            action = self._arrive(unit, t)
            if action is not None:
                self.left -= 1
                yield action

    def _arrive(self, unit: int, t: int) -> Action | None:
        state, tiers, rules = self.state, self.state.tiers, self.rules
        sources = [s for s in range(len(tiers)) if self._has_own(unit, s)]
        faster = [s for s in sources if s < t]
        if faster:
            return None  # it would only repeat what is nearer
        rate, access = float(self.ranking.rate[unit]), float(state.access_s[unit, t])
        if sources:
            source = min(sources, key=lambda s: (float(state.access_s[unit, s]), s))
            before = float(state.access_s[unit, source])
            due = float(state.next_use[unit]) - self.now
            kind = PREFETCH if due <= rules.horizon_s else PROMOTE
            when = f"wanted in {max(due, 0.0):.3g} s; " if kind == PREFETCH else ""
            where = tiers[source]
        else:
            before, where, when = float(state.rebuild_s[unit]), None, ""
            kind = CONSOLIDATE if KINDS[state.kind[unit]] == ADAPTER else ACTIVATE
        size = self._put(unit, t, True)
        reason = (
            f"{when}{rate * 3600:.3g} uses an hour, each {before:.3g} s now and {access:.3g} s "
            f"from {tiers[t]}"
        )
        return Action(kind, state.ids[unit], where, tiers[t], size, reason)

    def _value_words(self, unit: int, t: int) -> str:
        density, price = float(self.ranking.density[unit, t]), float(self.ranking.price[t])
        return (
            f"{float(self.ranking.rate[unit]) * 3600:.3g} uses an hour are worth {density:.3g} s "
            f"per s and byte in {self.state.tiers[t]}, where {max(price, 0.0):.3g} is needed"
        )

    def _archive(self) -> Iterator[Action]:
        limit = self.rules.archive_rate
        if limit <= 0:
            return
        state, ranking = self.state, self.ranking
        cold = (state.kind == KINDS.index(TEXT)) & ~state.archived & ~ranking.fixed
        cold &= ranking.worth < limit
        units = numpy.flatnonzero(cold)
        units = units[numpy.argsort(ranking.worth[units], kind="stable")]
        for unit in units[: max(self.left, 0)].tolist():
            reason = (
                f"{float(ranking.worth[unit]) * 86400:.3g} uses a day, fewer than "
                f"{limit * 86400:.3g}"
            )
            self.left -= 1
            yield Action(ARCHIVE, state.ids[unit], None, None, 0, reason)
