"""Carries plans out in the background, one move at a time per unit.

A move first makes the new copy and then gives the old one up. Whatever happens in between, the
unit is where it was, or in both places; a half-made copy is discarded. The bytes of a new copy
are reserved before a byte of it is written, so that no tier is above its budget at any moment.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from memos.errors import ArgumentError, MemosError
from memos.scheduler.plan import ARCHIVE, COMPRESS, DEMOTE, DROP, Action

DONE, SKIPPED, FAILED, CANCELLED = "done", "skipped", "failed", "cancelled"
_KEPT = 256  # outcomes that are remembered


class Executor(Protocol):
    """What a worker moves units with. Calls for one unit never overlap."""

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        """Make the copy that the action's target wants, from its source or by building it.

        On return it can be used. Raising leaves no trace of it, or one that ``discard`` removes.
        Looks at ``cancelled`` now and then, and returns early, with or without a copy, if it may.
        """

    def discard(self, unit: str, tier: str) -> None:
        """Remove a unit's copy, or what was half made of one, from a tier; nothing there is fine.

        Raises MemosError where it is in use.
        """

    def archive(self, unit: str) -> None:
        """Archive a text."""

    def compress(self, action: Action, cancelled: Callable[[], bool]) -> bool:
        """Make a unit's only copy smaller where it is: the new one first, then the old one goes.

        Raising, or returning False because it was cancelled, leaves the unit as it was, and
        nothing of the new copy.
        """


class Ledger:
    """Bytes in each tier, those on their way included. Thread-safe.

    Args:
        budgets: bytes by tier.
        used:    bytes that are there already.
    """

    def __init__(self, budgets: Mapping[str, int], used: Mapping[str, int] | None = None) -> None:
        self.budgets = dict(budgets)
        self._used = {tier: (used or {}).get(tier, 0) for tier in budgets}
        self._lock = threading.Lock()
        self.peaks = dict(self._used)

    def reserve(self, tier: str, num_bytes: int) -> bool:
        """Take bytes of a tier's budget; False where they do not fit."""
        with self._lock:
            if self._used[tier] + num_bytes > self.budgets[tier]:
                return False
            self._used[tier] += num_bytes
            self.peaks[tier] = max(self.peaks[tier], self._used[tier])
            return True

    def give_back(self, tier: str, num_bytes: int) -> None:
        """Bytes of a tier are free again."""
        with self._lock:
            if num_bytes > self._used[tier]:
                raise ArgumentError(
                    f"give_back: at most the {self._used[tier]} bytes that {tier} holds wanted, "
                    f"got {num_bytes}"
                )
            self._used[tier] -= num_bytes

    def used(self) -> dict[str, int]:
        with self._lock:
            return dict(self._used)

    def set(self, used: Mapping[str, int]) -> None:
        """What was measured anew, of engines that move bytes by themselves."""
        with self._lock:
            self._used.update({tier: used.get(tier, 0) for tier in self._used})


@dataclass(frozen=True)
class Outcome:
    """What became of an action.

    Args:
        state:         done, skipped, failed or cancelled.
        made, gave_up: whether the target has a copy by it, of a unit that was compressed a smaller
            one, and whether the source has none.
    """

    action: Action
    state: str
    why: str
    made: bool
    gave_up: bool
    seconds: float
    at: float


class Worker:
    """A thread that carries actions out in order. Thread-safe.

    Args:
        executor: does the moves.
        ledger:   of the tiers; whoever else puts copies there reserves there too.
        sizes:    bytes of a unit's copy in a tier: (unit, tier) -> bytes.
        moved:    told what became of every action, before the next one begins.
        clock:    seconds.
    """

    def __init__(
        self,
        executor: Executor,
        ledger: Ledger,
        sizes: Callable[[str, str], int],
        *,
        moved: Callable[[Outcome], object] = lambda outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor, self.ledger = executor, ledger
        self._sizes, self._moved, self._clock = sizes, moved, clock
        self._changed = threading.Condition()
        self._queue: deque[Action] = deque()
        self._users: Counter[str] = Counter()
        self._running: Action | None = None
        self._cancelled = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._outcomes: deque[Outcome] = deque(maxlen=_KEPT)
        self.counts: Counter[str] = Counter()

    def submit(self, actions: Iterable[Action]) -> None:
        """Replace what waits by these actions; the move in progress goes on.

        Raises ArgumentError where the worker is closed.
        """
        with self._changed:
            if self._is_closed:
                raise ArgumentError("submit: an open worker wanted, got one that was closed")
            self._queue = deque(actions)
            if self._queue and self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="memos-scheduler", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, unit: str | None = None) -> None:
        """Give up what waits for a unit, or for all; the move in progress stops when it can."""
        with self._changed:
            kept = [a for a in self._queue if unit is not None and a.unit != unit]
            self.counts[CANCELLED] += len(self._queue) - len(kept)
            self._queue = deque(kept)
            if self._running is not None and unit in (None, self._running.unit):
                self._cancelled = True

    @contextmanager
    def using(self, unit: str) -> Iterator[None]:
        """While a request uses a unit none of its copies is given up, unless that has begun.

        Never waits.
        """
        with self._changed:
            self._users[unit] += 1
        try:
            yield
        finally:
            with self._changed:
                self._users[unit] -= 1
                if not self._users[unit]:
                    del self._users[unit]

    def in_use(self) -> set[str]:
        """Units that requests use."""
        with self._changed:
            return set(self._users)

    def is_idle(self) -> bool:
        """Whether nothing waits or moves."""
        with self._changed:
            return self._thread is None and self._running is None and not self._queue

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return when nothing waits or moves; False where that takes longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._thread is None and self._running is None, timeout_s
            )

    def close(self) -> None:
        """Cancel everything and wait for the move in progress."""
        with self._changed:
            self._is_closed = True
        self.cancel()
        self.wait()

    def outcomes(self) -> list[Outcome]:
        """The last few hundred, oldest first."""
        with self._changed:
            return list(self._outcomes)

    # Inside

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._running, self._cancelled = self._queue.popleft(), False
                action = self._running
            start = self._clock()
            move = _Move()
            try:
                state, why = self._carry_out(action, move)
            except Exception as error:
                # Whatever an executor raises belongs to this action; the next one is tried.
                state, why = FAILED, f"{type(error).__name__}: {error}"
            end = self._clock()
            outcome = Outcome(action, state, why, move.made, move.gave_up, end - start, end)
            self._moved(outcome)
            with self._changed:
                self._running = None
                self.counts[state] += 1
                self._outcomes.append(outcome)
                self._changed.notify_all()

    def _carry_out(self, action: Action, move: _Move) -> tuple[str, str]:
        if action.kind == ARCHIVE:
            self._executor.archive(action.unit)
            return DONE, action.reason
        if action.kind == COMPRESS and action.source is not None:
            return self._compress(action, action.source, move)
        gives_up = action.kind in (DROP, DEMOTE)
        if gives_up and self._is_used(action.unit):
            return SKIPPED, "in use"
        if action.target is not None:
            size = self._sizes(action.unit, action.target)
            if not self.ledger.reserve(action.target, size):
                return SKIPPED, f"no room for {size} bytes in {action.target}"
            try:
                self._executor.copy(action, self._is_cancelled)
                if self._is_cancelled():
                    self._undo(action.unit, action.target, size)
                    return CANCELLED, "cancelled"
            except BaseException:
                self._undo(action.unit, action.target, size)
                raise
            move.made = True
        if gives_up and action.source is not None:
            if self._is_used(action.unit):
                return SKIPPED, "came into use; it stays in both places"
            size = self._sizes(action.unit, action.source)
            self._executor.discard(action.unit, action.source)
            move.gave_up = True
            self.ledger.give_back(action.source, size)
        return DONE, action.reason

    def _compress(self, action: Action, tier: str, move: _Move) -> tuple[str, str]:
        if self._is_used(action.unit):
            return SKIPPED, "in use"
        old = self._sizes(action.unit, tier)
        if not self.ledger.reserve(tier, action.num_bytes):
            return SKIPPED, f"no room for {action.num_bytes} bytes more in {tier}"
        try:
            move.made = self._executor.compress(action, self._is_cancelled)
        finally:
            self.ledger.give_back(tier, old if move.made else action.num_bytes)
        return (DONE, action.reason) if move.made else (CANCELLED, "cancelled")

    def _undo(self, unit: str, tier: str, size: int) -> None:
        """A copy that is not to be: its bytes count until it is gone for certain."""
        try:
            self._executor.discard(unit, tier)
        except MemosError:
            return
        self.ledger.give_back(tier, size)

    def _is_used(self, unit: str) -> bool:
        with self._changed:
            return unit in self._users

    def _is_cancelled(self) -> bool:
        with self._changed:
            return self._cancelled


@dataclass
class _Move:
    made: bool = False
    gave_up: bool = False
