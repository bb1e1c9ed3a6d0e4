"""The one interface of every policy that says what goes first when a budget is full.

A policy knows keys, what follows what, weights and times. It holds no bytes, does no I/O, and is
called under the lock of whoever holds the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from memos.errors import ArgumentError

K = TypeVar("K", bound=Hashable)


class Policy(Protocol[K]):
    """What goes first. Keys are unique; a chain is a sequence of keys each of which can be used
    only where all before it are held.

    Of one request, what it adds is told first (``on_add``), then what it found (``on_hit``).
    """

    def __len__(self) -> int:
        """How many keys are held."""

    def on_hit(self, keys: Sequence[K], now: float) -> None:
        """A chain of held keys, from its root on, was used. Unknown keys are ignored."""

    def on_add(
        self,
        keys: Sequence[K],
        parent: K | None = None,
        now: float = 0.0,
        *,
        weight: float = 1.0,
        cost: float = 1.0,
    ) -> None:
        """A chain that follows ``parent`` is held from now on.

        Args:
            keys:   of the chain, root first.
            weight: of each key, in the units of the budget: bytes, or 1 for equal blocks.
            cost:   of building one of them again, in any unit that all keys share, times how
                much it matters.
        """

    def on_remove(self, keys: Iterable[K]) -> None:
        """Keys are held no more. Unknown keys are ignored."""

    def victims(self, now: float) -> Iterator[K]:
        """Held keys in the order in which they should go.

        The caller takes a key and then either removes it (``on_remove``) before it asks for the
        next one, or keeps it; nothing else is called meanwhile.
        """

    def evict(self, weight: float, now: float) -> list[K]:
        """Remove keys of at least this weight together; returns those that went."""

    def order(self) -> list[K]:
        """All keys, the least recently used first: what a restart wants to know."""


def make_policy(name: str, capacity: float, **parameters: Any) -> Policy[Any]:
    """A fresh policy.

    Args:
        name:       one of ``policies()``.
        capacity:   the budget in units of weight.
        parameters: of the policy's class.

    Raises:
        ArgumentError: no such policy, with the names there are, or no such capacity.
    """
    made = policies()
    if name not in made:
        raise ArgumentError(f"policy: one of {', '.join(made)} wanted, got {name!r}")
    if not capacity > 0:
        raise ArgumentError(f"capacity: more than 0 wanted, got {capacity}")
    policy: Policy[Any] = made[name](capacity, **parameters)
    return policy


def policies() -> dict[str, Callable[..., Any]]:
    """The policies there are, by name."""
    from memos.scheduler.flat import ARC, LFU, LRU, S3FIFO
    from memos.scheduler.prefix import Memos

    return {"lru": LRU, "lfu": LFU, "s3fifo": S3FIFO, "arc": ARC, "memos": Memos}
