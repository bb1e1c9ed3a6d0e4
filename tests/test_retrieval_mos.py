"""Retrieval over the real memories: what is kept between queries, filters, trees, contexts."""

from __future__ import annotations

import zlib
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos import MOS
from memos.memories import GeneralTextMemory, TreeTextMemory
from memos.memories.source import MemorySource
from memos.retrieval import Expand, Fuse, Pipeline, Rerank, TextSearch, VectorSearch
from memos.retrieval.query import words_of

NOW = 1.7e9
DIM = 32


def embed(texts: list[str]) -> Any:
    """Vectors of the words: equal words, equal direction."""
    rows = []
    for text in texts:
        vector = numpy.full(DIM, 1e-3)
        for word in words_of(text):
            vector += numpy.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIM)
        rows.append(vector / numpy.linalg.norm(vector))
    return numpy.array(rows, numpy.float32)


def opened(*memories: Any) -> MOS:
    mos = MOS(clock=lambda: NOW)
    for memory in memories:
        mos.register_memory(memory)
    return mos


def stages(limit: int) -> list[Any]:
    return [TextSearch(limit), VectorSearch(limit), Fuse(), Expand(seeds=limit), Rerank()]


_LINE = st.sampled_from(
    ["swim in the lake", "do you swim?", "we met in June", "three dogs", "the lake is cold"]
)
_STEP = st.one_of(
    st.tuples(st.just("add"), _LINE, st.sampled_from(["Ada", "Ben"]), st.sampled_from(["a", "b"])),
    st.tuples(st.just("update"), st.integers(0, 9), _LINE),
    st.tuples(st.just("delete"), st.integers(0, 9)),
    st.tuples(st.just("ask"), st.sampled_from(["When did Ada swim?", "how many dogs", "lake"])),
)


@settings(max_examples=40)
@given(st.lists(_STEP, max_size=20), st.sampled_from([2, 200]))
def test_a_pipeline_with_a_past_answers_as_a_new_one(steps: list[Any], limit: int) -> None:
    memory = GeneralTextMemory("m", embedder=embed, on_duplicate="keep")
    with opened(memory) as mos:
        old = Pipeline(stages(limit), clock=lambda: NOW)
        ids: list[str] = []
        for step in [*steps, ("ask", "When did Ada swim?")]:
            if step[0] == "add":
                _, text, who, thread = step
                ids.append(mos.add("m", text, {"speaker": who}, thread=thread).id)
            elif step[0] == "update" and ids:
                mos.update("m", ids[step[1] % len(ids)], step[2])
            elif step[0] == "delete" and ids:
                mos.delete("m", ids.pop(step[1] % len(ids)))
            elif step[0] == "ask":
                new = Pipeline(stages(limit), clock=lambda: NOW)
                got, want = (
                    p.rank(step[1], MemorySource(memory), None, memory.scope()) for p in (old, new)
                )
                assert [c.seq for c in got] == [c.seq for c in want]
                for a, b in zip(got, want, strict=True):
                    assert {n: s.value for n, s in a.signals.items()} == {
                        n: pytest.approx(s.value) for n, s in b.signals.items()
                    }


def test_filters_hold_on_every_path() -> None:
    memory = GeneralTextMemory("m", embedder=embed)
    with opened(memory) as mos:
        cubes = [
            mos.add("m", f"the lake {i}", {"speaker": "Ada", "open": i % 2 == 0}, thread="t")
            for i in range(8)
        ]
        mos.relate(cubes[0].id, "next to", cubes[1].id)
        everything = mos.retrieve("m", "the lake 1", limit=20)
        assert len(everything) == 8
        seen = mos.retrieve("m", "the lake 1", limit=20, filters={"open": True})
        assert {hit.id for hit in seen} == {cube.id for cube in cubes[::2]}


def test_what_is_below_one_heading_belongs_together() -> None:
    memory = TreeTextMemory("docs", embedder=embed)
    with opened(memory) as mos:
        root = mos.add("docs", "Manual")
        for title, lines in (
            ("Boats", ["They float.", "Paint the hull each spring.", "Sails are made of canvas."]),
            ("Trains", ["They roll.", "Oil the wheels each spring.", "Rails are made of steel."]),
        ):
            section = mos.add("docs", title, parent_id=root.id)
            for line in lines:
                mos.add("docs", line, parent_id=section.id)
        hits = mos.retrieve("docs", "what to do with the hull of boats in spring", limit=8)
        assert hits[0].content == "Paint the hull each spring."
        parents = {
            hit.content: stage.signals
            for hit in hits
            for stage in hit.trace
            if stage.stage == "expand"
        }
        value = {
            text: next(s.value for s in signals if s.name == "parent")
            for text, signals in parents.items()
        }
        assert value["They float."] > 0 > value["They roll."]


def test_context_and_explain() -> None:
    with opened(GeneralTextMemory("m", embedder=embed)) as mos:
        for who, line in (("Ada", "I swim in the lake"), ("Ben", "I paint the boat")):
            mos.add("m", line, {"speaker": who, "timestamp": "2023-05-08T10:00"})
        context = mos.context("Where does Ada swim?", 12)
        assert context.text == "[1] Ada, 8 May 2023: I swim in the lake"
        assert context.left_out[0][1] == "does not fit"
        told = mos.explain(context)
        assert [hit.memory for hit in told.hits] == ["m", "m"]
        assert "subject" in {signal.name for signal in told.hits[0].signals}
        assert "left out" in str(told)


def test_a_heading_is_found_by_what_stands_below_it() -> None:
    memory = TreeTextMemory("docs", embedder=None)
    with opened(memory) as mos:
        root = mos.add("docs", "A handbook")
        first, second = (mos.add("docs", f"Chapter {n}", parent_id=root.id) for n in "AB")
        for i in range(4):
            mos.add("docs", f"A lion is fed {i} times.", parent_id=first.id)
            mos.add("docs", f"A zebra is fed {i} times.", parent_id=second.id)
        hits = {hit.id: hit for hit in mos.retrieve("docs", "zebra", limit=20)}
        assert second.id in hits
        assert "children" in str(mos.explain(hits[second.id]))
        assert first.id not in hits or hits[first.id].score < hits[second.id].score
        # And a unit by what stands above it.
        below = mos.retrieve("docs", "chapter b", limit=20)
        zebras = [hit.score for hit in below if "zebra" in hit.content]
        lions = [hit.score for hit in below if "lion" in hit.content]
        assert len(zebras) == 4
        assert min(zebras) > max(lions, default=0.0)
