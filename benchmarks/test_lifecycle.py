"""The life of 100,000 cubes: sweeps, a day of use, the way out of the indexes and back.

Texts and vectors are those of the benchmark of the record store. Everything is in a folder on disk.
  sweep, all hot     100,000 cubes in the indexes; a budget of 20,000: the others leave
  sweep, 1 % leaves  as many in the indexes; the least valuable hundredth leaves
  sweep, in budget   nothing is too much: reading and weighing alone
  a day              96 steps of 15 simulated minutes: 100 cubes are added, 400 are used, some of
                     them archived ones, who come back; then a sweep. The number in the indexes is
                     counted before and after each sweep, and no cube may be lost
  count a use        of a hit or a cube that was read, the writing of the batch included
  text, vector       one query each, p50: all cubes hot; 19,000 hot; among the archived ones too
  come back          one archived cube, read by its id
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from benchmarks.test_records import Topics, items
from memos import MOS, GeneralTextMemory
from memos.lifecycle import Policy, sweep
from memos.memories.source import MemorySource
from memos.records.scope import Scope

CUBES, BUDGET, STEPS, ADDS, USES = 100_000, 20_000, 96, 100, 400
POLICY = Policy(hot_cubes=BUDGET, headroom=0.05)
QUERIES = 30


class Store:
    """A folder whose clock is set by the benchmark."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memos-bench-"))
        self.now = 1e9
        self.mos = MOS(self.folder, clock=lambda: self.now)
        self.memory = GeneralTextMemory("m", embedder=Topics(), clock=lambda: self.now)
        self.mos.register_memory(self.memory)
        self.ids: list[str] = []
        self.add(CUBES)
        self.now += 3600.0

    def add(self, count: int) -> None:
        some = list(items(len(self.ids), count))
        self.ids += [cube.id for cube in self.mos.add_many("m", some)]

    def states(self) -> dict[str, int]:
        with self.mos.records.database.read() as connection:
            return self.memory.table.life.count(connection)

    def hot(self) -> int:
        states = self.states()
        return sum(states.get(state, 0) for state in ("CREATED", "ACTIVATED", "FROZEN"))


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.mos.close()
    shutil.rmtree(made.folder)


def timed(run: Callable[[int], object], count: int = QUERIES) -> float:
    """Median milliseconds."""
    run(0)
    times = []
    for i in range(count):
        start = time.perf_counter()
        run(i)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def queries(store: Store, archived: bool) -> dict[str, float]:
    source = MemorySource(store.memory, archived)
    asked = [" ".join(item["content"].split()[:7]) for item in items(10**9, QUERIES)]
    vectors = Topics().embed(asked)

    def scope() -> Scope:
        return Scope({}, store.now, archived)

    return {
        "text_ms": timed(lambda i: source.search_text(asked[i], 10, scope())),
        "vector_ms": timed(lambda i: source.search_vector(vectors[i], 10, scope())),
    }


def swept(store: Store, policy: Policy) -> dict[str, Any]:
    before = store.hot()
    start = time.perf_counter()
    done = sweep(store.memory, policy)
    took = time.perf_counter() - start
    assert done.hot == store.hot()
    return {"hot": before, "left": before - done.hot, "sweep_s": took}


def use(store: Store) -> dict[str, float]:
    some = store.ids[:50_000]
    life, uses = store.memory.table.life, store.mos.records.uses
    start = time.perf_counter()
    for begin in range(0, len(some), 10):  # as a query counts its hits
        uses.count(life, some[begin : begin + 10], store.now)
    uses.write()
    return {"count_us": 1e6 * (time.perf_counter() - start) / len(some)}


def day(store: Store) -> dict[str, Any]:
    rng = numpy.random.default_rng(0)
    ranks = rng.permutation(CUBES + STEPS * ADDS)  # who is used often is nobody's neighbour
    most = within = 0
    times = []
    for _ in range(STEPS):
        store.now += 900.0
        store.add(ADDS)
        for rank in rng.zipf(1.3, USES):
            store.memory.get(store.ids[ranks[rank % len(ranks)] % len(store.ids)])
        before = store.hot()
        start = time.perf_counter()
        done = sweep(store.memory, POLICY)
        times.append(time.perf_counter() - start)
        after = store.hot()
        most = max(most, before, after)
        within += before <= BUDGET and after == done.hot <= BUDGET
    states = store.states()
    assert within == STEPS
    assert sum(states.values()) == len(store.ids)
    assert states.get("DELETED", 0) == 0
    return {
        "steps_within_budget": within,
        "hot": most,
        "lost": len(store.ids) - sum(states.values()),
        "sweep_p50_s": statistics.median(times),
        "sweep_s": max(times),
    }


def come_back(store: Store) -> dict[str, float]:
    away = store.mos.memory("m").table
    with store.mos.records.database.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT id FROM cubes WHERE state = 'ARCHIVED' AND memory = ? LIMIT 100",
            (away.memory,),
        ).all()
    return {"back_ms": timed(lambda i: store.memory.get(rows[i][0]), 100)}


KINDS: dict[str, Callable[[Store], dict[str, Any]]] = {
    "sweep, in budget": lambda store: swept(store, Policy(hot_cubes=2 * CUBES)),
    "queries, all hot": lambda store: queries(store, False),
    "count a use": use,
    "sweep, 1 % leaves": lambda store: swept(store, Policy(hot_cubes=99_000, headroom=0.0)),
    "sweep, all hot": lambda store: swept(store, POLICY),
    "queries, 19,000 hot": lambda store: queries(store, False),
    "queries, archived too": lambda store: queries(store, True),
    "come back": come_back,
    "a day": day,
}


@pytest.mark.parametrize("kind", KINDS)
def test_lifecycle(benchmark: Any, store: Store, kind: str) -> None:
    figures = benchmark.pedantic(lambda: KINDS[kind](store), rounds=1)
    benchmark.extra_info.update(units=len(store.ids), kind=kind, **figures)
