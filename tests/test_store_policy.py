"""The eviction policy alone, against the obvious slow one."""

from __future__ import annotations

import random

import pytest

from memos.errors import ArgumentError
from memos.kv.policy import LRU, make_policy


class Slow:
    """The same contract by looking at everything each time."""

    def __init__(self) -> None:
        self.used: list[bytes] = []  # the least recently used first
        self.parent: dict[bytes, bytes] = {}

    def admit(self, key: bytes, parent: bytes) -> None:
        self.parent.setdefault(key, parent)
        self.touch(key) if key in self.used else self.used.append(key)

    def touch(self, key: bytes) -> None:
        if key in self.used:
            self.used.remove(key)
            self.used.append(key)

    def remove(self, key: bytes) -> None:
        if key in self.used:
            self.used.remove(key)
            del self.parent[key]

    def first_victim(self, locked: set[bytes]) -> bytes | None:
        followed = set(self.parent.values())
        return next((k for k in self.used if k not in followed and k not in locked), None)


@pytest.mark.parametrize("seed", range(8))
def test_lru_against_the_slow_one(seed: int) -> None:
    rng = random.Random(seed)
    fast, slow = LRU(), Slow()
    keys = [bytes([n]) for n in range(40)]
    for _ in range(2000):
        key = rng.choice(keys)
        act = rng.random()
        if act < 0.35:
            # A parent has a smaller number, and may be unknown.
            parent = bytes([rng.randrange(key[0])]) if key[0] and rng.random() < 0.8 else b"root"
            fast.admit(key, slow.parent.get(key, parent))
            slow.admit(key, parent)
        elif act < 0.7:
            fast.touch(key)
            slow.touch(key)
        elif act < 0.8:
            fast.remove(key)
            slow.remove(key)
        else:
            locked = set(rng.sample(keys, rng.randrange(10)))
            evict = rng.randrange(6)
            for victim in fast.victims():
                if evict == 0:
                    break
                if victim in locked:
                    continue
                assert victim == slow.first_victim(locked)
                fast.remove(victim)
                slow.remove(victim)
                evict -= 1
            else:
                assert slow.first_victim(locked) is None
        assert fast.order() == slow.used
        assert len(fast._heap) <= 2 * len(keys) + 66


def test_a_chain_goes_from_its_end() -> None:
    policy = make_policy("lru")
    chain = [bytes([n]) for n in range(1, 6)]
    for parent, key in zip([b"", *chain], chain, strict=False):
        policy.admit(key, parent)
    policy.admit(b"other", b"")
    for key in chain:
        policy.touch(key)
    gone = []
    for key in policy.victims():
        gone.append(key)
        policy.remove(key)
    assert gone == [b"other", *reversed(chain)]


def test_unknown_policy() -> None:
    with pytest.raises(ArgumentError, match="lru"):
        make_policy("random")
