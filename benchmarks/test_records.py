"""The record store by its size: adding, asking, opening, bytes.

Texts are 25 words drawn as words are in a language (rank-frequency, 50,000 different ones), with
three metadata items; the embedder is a function of the text, since encoding is not measured here:
384 numbers that are near for texts of one topic. Everything is in a folder on disk.
  add_one     units added one by one, each its own transaction; durable also waits for the disk
  add_many    in bulk, with vectors that were embedded before; "text": without vectors
  text, vector, filter, hybrid   one query each; hybrid is ``mos.retrieve`` with all its stages
  open        a new process: MOS(folder) and the first query by vector
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from memos import MOS, GeneralTextMemory
from memos.memories.source import MemorySource

DIM, TOPICS, WORDS = 384, 500, 50_000
SIZES = [1_000, 10_000, 100_000, 300_000]
QUERIES = 200


class Topics:
    """An embedder that costs nothing: a text lies near its topic's centre."""

    identity, dim = "benchmark topics", DIM

    def __init__(self) -> None:
        rng = numpy.random.default_rng(0)
        self._centres = rng.normal(size=(TOPICS, DIM)).astype(numpy.float32)

    def embed(self, texts: Any, kind: str = "document", progress: Any = None) -> Any:
        rows = numpy.empty((len(texts), DIM), numpy.float32)
        for row, text in zip(rows, texts, strict=True):
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
            topic = int(text.split()[0][5:]) % TOPICS  # the first word is topicN
            noise = numpy.random.default_rng(seed).standard_normal(DIM, dtype=numpy.float32)
            row[:] = self._centres[topic] + noise
        return rows


def items(first: int, count: int) -> Iterator[dict[str, Any]]:
    rng = numpy.random.default_rng(first)
    # Zipf's law cut at WORDS: P(rank) ~ 1 / (rank + 2.7)
    weights = 1 / (numpy.arange(WORDS) + 2.7)
    table = numpy.cumsum(weights / weights.sum())
    for start in range(first, first + count, 1000):
        ranks = numpy.searchsorted(table, rng.random((1000, 25)))
        topics = rng.integers(0, TOPICS, 1000)
        for i in range(min(1000, first + count - start)):
            words = " ".join(f"w{rank}" for rank in ranks[i])
            metadata = {"user_id": f"user-{(start + i) % 100}", "n": start + i}
            metadata["tag"] = f"tag-{topics[i] % 7}"
            yield {"content": f"topic{topics[i]} {words}", "metadata": metadata}


class Store:
    """A folder that grows from size to size."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memos-bench-"))
        self.embedder = Topics()
        self.size = 0
        self.bulk_per_s = 0.0
        self.open()

    def open(self) -> None:
        self.mos = MOS(self.folder)
        self.memory = GeneralTextMemory("m", embedder=self.embedder)
        self.mos.register_memory(self.memory)
        self.source = MemorySource(self.memory)

    def grow(self, size: int) -> None:
        """Bulk adds, embedding not counted: it is done before the clock runs."""
        batch, took = 10_000, 0.0
        added = size - self.size
        while self.size < size:
            some = list(items(self.size, min(batch, size - self.size)))
            self.memory.embedded.encode([item["content"] for item in some])
            start = time.perf_counter()
            self.mos.add_many("m", some)
            took += time.perf_counter() - start
            self.size += len(some)
        if added:
            self.bulk_per_s = added / took
        with self.memory.records.database.read() as connection:
            search = self.memory.embedded.search_or_none()
            assert search is not None
            search.index(connection).build()

    def add_texts(self) -> dict[str, float]:
        """In bulk, without vectors, beside the units that are there."""
        some = list(items(2 * 10**7, 20_000))
        self.mos.register_memory(GeneralTextMemory("texts", embedder=None))
        start = time.perf_counter()
        self.mos.add_many("texts", some)
        return {"adds_per_s": len(some) / (time.perf_counter() - start)}

    def add_one(self, durable: bool) -> dict[str, float]:
        """Singles, without vectors, beside the units that are there."""
        some = list(items(10**7 + 10**6 * durable, 3000))
        with MOS(self.folder, durable=durable) as mos:
            mos.register_memory(GeneralTextMemory("singles", embedder=None))
            start = time.perf_counter()
            for item in some:
                mos.add("singles", **item)
            return {"adds_per_s": len(some) / (time.perf_counter() - start)}

    def ask(self, kind: str) -> dict[str, float]:
        """QUERIES queries of one kind; the query's vector is there before the clock runs."""
        asked = [item["content"] for item in items(10**9, QUERIES)]
        questions = [" ".join(text.split()[:7]) for text in asked]
        vectors = self.embedder.embed(questions)
        for text in questions:
            self.memory.embedded.query(text)
        source, scope = self.source, self.memory.scope
        runs: dict[str, Callable[[int], Any]] = {
            "text": lambda i: source.search_text(questions[i], 10, scope()),
            "vector": lambda i: source.search_vector(vectors[i], 10, scope()),
            "vector, 1 % allowed": lambda i: source.search_vector(
                vectors[i], 10, scope({"user_id": f"user-{i % 100}"})
            ),
            "filter": lambda i: self.memory.cubes(10, filters={"user_id": f"user-{i % 100}"}),
            "hybrid": lambda i: self.mos.retrieve("m", questions[i], limit=10),
        }
        run = runs[kind]
        run(0)
        times = []
        for i in range(QUERIES):
            start = time.perf_counter()
            run(i)
            times.append(1e3 * (time.perf_counter() - start))
        return {"p50_ms": statistics.median(times), "p95_ms": statistics.quantiles(times, n=20)[18]}

    def reopen(self) -> dict[str, float]:
        """What a fresh process needs for the folder and its first query."""
        self.mos.close()
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.test_records", str(self.folder)],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        self.open()
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {
            "open_s": figures["open_s"],
            "bytes_per_unit": figures["resident_bytes"] / self.size,
            "disk_bytes_per_unit": size / self.size,
        }


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.mos.close()
    shutil.rmtree(made.folder)


def timed(run: Callable[[int], object]) -> dict[str, float]:
    run(0)
    times = []
    for i in range(QUERIES):
        start = time.perf_counter()
        run(i)
        times.append(1e3 * (time.perf_counter() - start))
    found = statistics.quantiles(times, n=20)
    return {"p50_ms": statistics.median(times), "p95_ms": found[18]}


KINDS = ("add_many", "text", "vector", "vector, 1 % allowed", "filter", "hybrid", "open")
ALONE = [(100_000, kind) for kind in ("add_many, text", "add_one, NORMAL", "add_one, FULL")]
CASES = [(units, kind) for units in SIZES for kind in KINDS]
CASES[CASES.index((100_000, "text")) : CASES.index((100_000, "text"))] = ALONE


@pytest.mark.parametrize(("units", "kind"), CASES)
def test_records(benchmark: Any, store: Store, units: int, kind: str) -> None:
    store.grow(units)
    if kind == "add_many":
        figures: dict[str, float] = {"adds_per_s": store.bulk_per_s}
        benchmark.pedantic(lambda: None, rounds=1)
    elif kind == "add_many, text":
        figures = benchmark.pedantic(store.add_texts, rounds=1)
    elif kind.startswith("add_one"):
        figures = benchmark.pedantic(lambda: store.add_one(kind.endswith("FULL")), rounds=1)
    elif kind == "open":
        figures = benchmark.pedantic(store.reopen, rounds=1)
    else:
        figures = benchmark.pedantic(lambda: store.ask(kind), rounds=1)
    benchmark.extra_info.update(units=units, kind=kind, **figures)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_and_ask(folder: str) -> dict[str, float]:
    embedder = Topics()
    before = resident_bytes()
    start = time.perf_counter()
    mos = MOS(folder)
    memory = mos.register_memory(GeneralTextMemory("m", embedder=embedder))
    vector = embedder.embed(["topic7 w9"])[0]
    MemorySource(memory).search_vector(vector, 10, memory.scope())
    took = time.perf_counter() - start
    resident = resident_bytes() - before
    mos.close()
    return {"open_s": took, "resident_bytes": resident}


if __name__ == "__main__":
    print(json.dumps(open_and_ask(sys.argv[1])))
