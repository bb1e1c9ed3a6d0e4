"""Slabs in host memory behind a device with memory of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memos.adapters.policy import Policy
from memos.adapters.slab import Slab, empty_slab
from memos.errors import ArgumentError, QuotaError


class Source(Protocol):
    """What a pool loads from (``StoredSlabs``). Called by several threads."""

    def num_bytes(self, digest: str) -> int:
        """Of the slab, before it is loaded."""

    def load(self, digest: str, into: torch.Tensor | None = None) -> Slab:
        """A slab in host memory, which is the pool's from then on, and its offsets.

        It may be ``into``, a slab of this size that the pool needs no more.
        """


def load_checked(
    source: Source, digest: str, num_bytes: int, into: torch.Tensor | None = None
) -> Slab:
    """``source.load``, of the size that was reserved. Raises ArgumentError where it is not."""
    slab, offsets = source.load(digest, into)
    if slab.numel() != num_bytes:
        raise ArgumentError(
            f"source: a slab of {num_bytes} bytes wanted for {digest}, as num_bytes says, got "
            f"{slab.numel()}"
        )
    return slab, offsets


@dataclass(eq=False)
class _Kept:
    cost: int
    users: int  # who copies from it, or loads it
    slab: Slab | None = None  # None while it is loaded


class HostTier:
    """Slabs that were loaded, kept for the next time the device wants them.

    A slab stays after it went to the device: adapters do not change, so nothing has to come back
    when the device evicts it. Its bytes count before they are loaded.

    Args:
        budget: bytes; what is loaded passes through here, so it must hold the largest slab.
        lock:   of the pool; every method but ``slab`` is called under it.
        pinned: slabs are page-locked: torch then takes whole powers of two.
    """

    def __init__(
        self, budget: int, policy: Policy, lock: threading.Condition, *, pinned: bool
    ) -> None:
        self.budget, self.used = budget, 0
        self.hits = 0
        self._policy, self._changed, self._pinned = policy, lock, pinned
        self._kept: dict[str, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @contextmanager
    def slab(self, source: Source, digest: str, num_bytes: int) -> Iterator[tuple[Slab, bool]]:
        """The slab, and whether it was here; loaded otherwise. It stays during the block.

        Raises:
            QuotaError: the budget cannot hold it.
        """
        with self._changed:
            kept = self._kept.get(digest)
            was_here = kept is not None
            if kept is None:
                kept = self._reserve(digest, num_bytes)
            else:
                kept.users += 1
                self._policy.touch(digest)
        try:
            if kept.slab is None:  # one thread loads a digest at a time: the pool sees to that
                kept.slab = load_checked(source, digest, num_bytes)
            yield kept.slab, was_here
        finally:
            with self._changed:
                kept.users -= 1
                if kept.slab is None:
                    self._remove(digest)
                self._changed.notify_all()

    def touch(self, digest: str) -> None:
        """The device uses it: what it evicts next was used later than what it evicted before."""
        self._policy.touch(digest)

    def drop(self, digest: str) -> None:
        """Forget a slab that no one copies from."""
        if digest in self._kept:
            self._remove(digest)

    def clear(self) -> None:
        for digest in list(self._kept):
            self._remove(digest)

    def _reserve(self, digest: str, num_bytes: int) -> _Kept:
        cost = 1 << (num_bytes - 1).bit_length() if self._pinned else num_bytes
        while not self._make_room(cost):
            if cost > self.budget or not any(kept.users for kept in self._kept.values()):
                raise QuotaError(
                    f"host_bytes={self.budget}: {cost} bytes wanted to bring an adapter to the "
                    "device through host memory; raise it"
                )
            self._changed.wait()  # for those that are on their way to the device
        kept = self._kept[digest] = _Kept(cost, 1)
        self.used += cost
        self._policy.admit(digest, cost)
        return kept

    def _make_room(self, cost: int) -> bool:
        for digest in self._policy.victims():
            if self.used + cost <= self.budget:
                break
            if not self._kept[digest].users:
                self._remove(digest)
        return self.used + cost <= self.budget

    def _remove(self, digest: str) -> None:
        self.used -= self._kept.pop(digest).cost
        self._policy.remove(digest)


class Device:
    """How slabs come to the table's device. Where that is host memory they are there already."""

    def __init__(self, table: Any, staged: bool | None) -> None:
        self.device = torch.device(table.device)
        self.is_cuda = self.device.type == "cuda"
        self.staged = self.device.type != "cpu" if staged is None else staged
        # Work that reads the slabs is queued on the stream of whoever makes the pool.
        self._stream = torch.cuda.current_stream(self.device) if self.is_cuda else None
        self._copies = torch.cuda.Stream(self.device) if self.is_cuda else None

    def upload(self, slab: torch.Tensor) -> torch.Tensor:
        """A copy on the device; complete when this returns."""
        if self._stream is None or self._copies is None:
            if self.device.type == "cpu":
                return empty_slab(slab.numel()).copy_(slab)
            return slab.to(self.device)
        with torch.cuda.stream(self._stream):
            there = torch.empty(slab.numel(), dtype=torch.uint8, device=self.device)
        self._copies.wait_stream(self._stream)  # the memory may still be read under its old name
        with torch.cuda.stream(self._copies):
            there.copy_(slab, non_blocking=True)
        self._copies.synchronize()
        return there

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """What is queued in this block comes after what reads the slabs now."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield
