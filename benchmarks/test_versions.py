"""Versions, branches and merges of text memories in a folder on disk, without vectors.

update    new versions of cubes, each its own transaction
history   a cube with 1,000 versions is read whole
branch    a memory of 10,000 cubes
merge     two branches of 10,000 cubes, each with 1,000 changes; 100 cubes were changed on both
          sides, in different fields
again     the same merge once more: nothing is left to do
as_of     the first query of a memory of 10,000 cubes as it was, and the next one
add       what versions cost at the add: cubes in bulk
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory

CUBES, CHANGES, BOTH, VERSIONS = 10_000, 1_000, 100, 1_000
WORDS = ["meeting", "plan", "tea", "chess", "paris", "train", "green", "house", "letter", "window"]


def text(number: int) -> str:
    return " ".join(WORDS[(number // 10**k) % 10] for k in range(5)) + f" number {number}"


@pytest.fixture
def mos() -> Iterator[MOS]:
    with tempfile.TemporaryDirectory(prefix="memos-bench-") as folder, MOS(folder) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        yield mos


def fill(mos: MOS) -> float:
    items = [{"content": text(i), "metadata": {"n": i}, "id": str(i)} for i in range(CUBES)]
    start = time.perf_counter()
    mos.add_many("notes", items)
    return time.perf_counter() - start


def test_update_and_history(benchmark: Any, mos: MOS) -> None:
    mos.add("notes", text(0), id="0")

    def update() -> None:
        for i in range(1, VERSIONS):
            mos.update("notes", "0", text(i), author="bench")

    start = time.perf_counter()
    benchmark.pedantic(update, rounds=1)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    assert len(mos.history("0")) == VERSIONS
    history = time.perf_counter() - start
    benchmark.extra_info.update(
        case="update", versions_per_s=(VERSIONS - 1) / seconds, history_versions=VERSIONS,
        history_ms=history * 1e3,
    )  # fmt: skip


def test_branch_and_merge(benchmark: Any, mos: MOS) -> None:
    added = fill(mos)
    start = time.perf_counter()
    mos.branch("notes", "draft")
    branch = time.perf_counter() - start
    for i in range(CHANGES):
        mos.update("draft", str(i), text(i) + " changed")
        mos.update("notes", str(i + CHANGES - BOTH), metadata={"seen": i})
    start = time.perf_counter()
    report = benchmark.pedantic(lambda: mos.merge("draft", "notes"), rounds=1)
    merge = time.perf_counter() - start
    assert len(report.changed) == CHANGES
    assert not report.conflicts
    start = time.perf_counter()
    assert mos.merge("draft", "notes").changed == ()
    again = time.perf_counter() - start
    benchmark.extra_info.update(
        case="merge", cubes=CUBES, changes=CHANGES, add_many_per_s=CUBES / added,
        branch_s=branch, merge_s=merge, merge_again_s=again,
    )  # fmt: skip


def test_as_of(benchmark: Any, mos: MOS) -> None:
    fill(mos)
    before = time.time()
    for i in range(CHANGES):
        mos.update("notes", str(i), text(i) + " changed")
    start = time.perf_counter()
    hits = benchmark.pedantic(lambda: mos.retrieve("notes", text(7), as_of=before), rounds=1)
    first = time.perf_counter() - start
    assert hits[0].content == text(7)
    start = time.perf_counter()
    mos.retrieve("notes", text(8), as_of=before)
    benchmark.extra_info.update(
        case="as_of", cubes=CUBES, first_s=first, next_ms=(time.perf_counter() - start) * 1e3
    )
