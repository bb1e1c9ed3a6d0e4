"""Blocks on the device under a budget that changes, run on the CPU, against a plain dict."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch", reason="blocks are torch tensors")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from memos.errors import ArgumentError  # noqa: E402
from memos.kv.device_pools import BlockPool, PoolOnDemand  # noqa: E402

BLOCKS, CHAIN = 24, 6
SHAPE = (2, 48)
SIZE = 96
ROWS = torch.randint(0, 256, (BLOCKS, *SHAPE), generator=torch.Generator().manual_seed(1)).byte()


def name(i: int) -> bytes:
    return b"block %02d" % i


class Model:
    """Chains of six; the least recently used that nothing follows leaves first."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.last: OrderedDict[int, None] = OrderedDict()

    def _follows(self, i: int) -> bool:
        return (i + 1) % CHAIN != 0 and i + 1 in self.last

    def shrink(self, most: int, ours: set[int]) -> None:
        while len(self.last) > most:
            gone = next((i for i in self.last if i not in ours and not self._follows(i)), None)
            if gone is None:
                return
            del self.last[gone]

    def load(self, wanted: list[int]) -> int:
        for i in wanted:
            if i in self.last:
                self.last.move_to_end(i)
        new = [i for i in wanted if i not in self.last]
        self.shrink(max(self.room - len(new), 0), set(wanted))
        fit = new[: max(self.room - len(self.last), 0)]
        for i in fit:
            self.last[i] = None
        return len(wanted) if len(fit) == len(new) else wanted.index(new[len(fit)])


STEP = st.tuples(
    st.sampled_from(["load", "through", "drop", "unless", "resize"]),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 6),
)


@settings(max_examples=150, deadline=None)
@given(room=st.integers(0, 9), steps=st.lists(STEP, max_size=40))
def test_histories(room: int, steps: list[tuple[str, int, int]]) -> None:
    pool, model = BlockPool(SHAPE, room * SIZE + 5, "cpu"), Model(room)
    for what, first, count in steps:
        last = min(first // CHAIN * CHAIN + CHAIN, first + count)
        if what == "through":
            first = first // CHAIN * CHAIN
        wanted = list(range(first, last))
        keys, rows = [name(i) for i in wanted], list(ROWS[first:last])
        if what == "load":
            parents = [name(i - 1) if i % CHAIN else b"" for i in wanted]
            assert pool.load(keys, parents, rows) == model.load(wanted)
        elif what == "through":
            model.load(wanted)
            for ours, row in zip(pool.through(keys, rows), rows, strict=True):
                assert torch.equal(ours, row)
                ours.zero_()  # the caller's own: what stands in the pool stays
        elif what == "drop":
            stood = [pool._blocks[key] for key in keys if key in pool._blocks]
            assert pool.drop(keys) == len(stood) == len(set(wanted) & model.last.keys())
            assert not any(block.any() for block in stood)
            for i in wanted:
                model.last.pop(i, None)
        elif what == "unless":
            pool.drop_unless(lambda key, gone=first: int(key[-2:]) % 5 != gone % 5)
            for i in [i for i in model.last if i % 5 == first % 5]:
                del model.last[i]
        else:
            model.room = first % 10
            pool.set_budget(model.room * SIZE + first % SIZE)
            model.shrink(model.room, set())
        assert pool.held() <= pool.budget_bytes
        assert {int(key[-2:]) for key in pool.held_keys()} == model.last.keys()
        for key, block in pool._blocks.items():
            assert torch.equal(block, ROWS[int(key[-2:])])
    assert pool.held() == len(model.last) * SIZE


def test_budgets_change_while_others_read() -> None:
    pool = BlockPool(SHAPE, 20 * SIZE, "cpu")
    wrong: list[int] = []
    done = threading.Event()

    def reads(chain: int) -> None:
        first = chain * CHAIN
        keys, rows = [name(i) for i in range(first, first + CHAIN)], ROWS[first : first + CHAIN]
        while not done.is_set():
            for i, block in enumerate(pool.through(keys, list(rows))):
                if not torch.equal(block, rows[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=reads, args=(chain,)) for chain in range(4)]
    for thread in threads:
        thread.start()
    for i in range(400):
        budget = i * 7 % 21 * SIZE
        pool.set_budget(budget)
        assert pool.held() <= budget
        pool.drop([name(i % BLOCKS)])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.peak_bytes <= 20 * SIZE
    assert pool.stats()["bytes"] <= pool.stats()["budget_bytes"]


def test_bad_arguments_are_refused() -> None:
    pool = BlockPool(SHAPE, 9 * SIZE, "cpu")
    with pytest.raises(ArgumentError, match="rows: uint8"):
        pool.load([name(0)], [b""], [ROWS[0].view(-1)])
    with pytest.raises(ArgumentError, match="no key twice"):
        pool.load([name(0)] * 2, [b""] * 2, list(ROWS[:2]))
    for wrong in (lambda: PoolOnDemand(-1), lambda: PoolOnDemand(5).set_budget(-1)):
        with pytest.raises(ArgumentError, match="device_bytes"):
            wrong()
