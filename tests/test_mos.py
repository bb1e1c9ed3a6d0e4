"""MOS: one contract for every memory, through the facade."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

from memos import (
    MOS,
    GeneralTextMemory,
    GraphMemory,
    KVCacheMemory,
    MemCube,
    ParametricMemory,
    TreeTextMemory,
    VectorMemory,
)
from memos.errors import ArgumentError, MemosError, NotFoundError, StoreError
from tests.models import tiny


@dataclass
class Case:
    """How one type of memory is made, filled and asked."""

    make: Callable[[str], Any]
    content: Callable[[int], Any]
    query: Callable[[int], Any]  # finds what content(i) says, first
    says: Callable[[Any], Any]  # of a content as it is read: comparable
    wrong: Any  # a content of another type


def vector(i: int) -> list[float]:
    return numpy.random.default_rng(i).normal(size=8).astype(numpy.float32).tolist()


def kv_content(i: int) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    model = tiny("llama")
    ids = torch.randint(0, 90, (1, 70), generator=torch.Generator().manual_seed(i))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return {"token_ids": ids[0], "cache": cache}


def adapter(i: int) -> Any:
    import torch

    from memos.adapters.adapter import Adapter, Factors

    generator = torch.Generator().manual_seed(i)
    down, up = (torch.randn(size, generator=generator) for size in ((2, 8), (8, 2)))
    return Adapter({f"model.nr{i}": Factors(down, up, 0.5)}, {"peft_type": "LORA"})


def digest_of(content: Any) -> str:
    from memos.adapters.files import digest

    return str(content["digest"]) if isinstance(content, dict) else digest(content)


CASES = {
    "text": Case(
        lambda name: GeneralTextMemory(name, embedder=None),
        lambda i: f"The colour of room {i} is nr{i}.",
        lambda i: f"nr{i}",
        lambda content: content,
        42,
    ),
    "tree": Case(
        lambda name: TreeTextMemory(name, embedder=None),
        lambda i: f"The colour of room {i} is nr{i}.",
        lambda i: f"nr{i}",
        lambda content: content,
        42,
    ),
    "vector": Case(
        lambda name: VectorMemory(name),
        vector,
        vector,
        lambda content: content["vector"].tolist() if isinstance(content, dict) else content,
        "a text without an embedder",
    ),
    "graph": Case(
        lambda name: GraphMemory(name, embedder=None),
        lambda i: {"type": "node", "label": "Room", "properties": {"name": f"nr{i}"}},
        lambda i: {"node": {"label": "Room", "properties": {"name": f"nr{i}"}}},
        lambda content: {k: content[k] for k in ("label", "properties")},
        "no node",
    ),
    "parametric": Case(
        lambda name: ParametricMemory(name, embedder=None),
        adapter,
        lambda i: f"nr{i}",
        digest_of,
        "a folder that is not there",
    ),
    "kv_cache": Case(
        lambda name: KVCacheMemory(name, model=tiny("llama"), codec="raw"),
        kv_content,
        lambda i: f"user:{i}",
        lambda content: list(
            map(int, content["token_ids"] if isinstance(content, dict) else content.token_ids)
        ),
        "no cache",
    ),
}
STORED = [name for name in CASES if name != "kv_cache"]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=["in memory", "in a folder"])
def mos(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MOS]:
    with MOS(None if request.param == "in memory" else tmp_path / "store") as mos:
        yield mos


def test_contract(mos: MOS, case: Case) -> None:
    memory = mos.register_memory(case.make("m"))
    assert mos.register_memory(memory) is memory
    said = [{"n": i, "user_id": str(i), "even": i % 2 == 0} for i in range(4)]
    cubes = [mos.add("m", case.content(i), said[i]) for i in range(4)]
    assert len({cube.id for cube in cubes}) == 4
    for i, cube in enumerate(cubes):
        assert isinstance(cube, MemCube)
        assert cube["id"] == cube.id
        assert cube.memory == "m"
        assert cube.metadata["n"] == i
        hits = mos.retrieve("m", case.query(i), limit=3)
        assert case.says(hits[0].content) == case.says(case.content(i))
        assert case.says(mos.get(cube.id).content) == case.says(case.content(i))
    # A new version; the old one stays known.
    fresh = mos.update("m", cubes[0].id, case.content(9), {"n": 9, "user_id": "9"})
    assert fresh.id == cubes[0].id
    assert fresh.metadata["n"] == 9
    assert fresh.metadata["even"] is True
    assert case.says(mos.retrieve("m", case.query(9), limit=1)[0].content) == case.says(
        case.content(9)
    )
    history = mos.history(cubes[0].id)
    if memory.kind != "kv_cache":  # a cache replaces the one before
        assert [version.number for version in history] == [1, 2]
        assert case.says(history[0].content) == case.says(case.content(0))
    mos.delete("m", cubes[1].id)
    ids = [hit.id for hit in mos.retrieve("m", case.query(1), limit=9)]
    assert cubes[1].id not in ids
    with pytest.raises(NotFoundError, match=cubes[1].id):
        mos.update("m", cubes[1].id, case.content(1))
    with pytest.raises(NotFoundError, match=cubes[1].id):
        mos.delete("m", cubes[1].id)


def test_what_is_not_there(mos: MOS, case: Case) -> None:
    mos.register_memory(case.make("m"))
    calls: list[Callable[[], Any]] = [
        lambda: mos.get("unknown"),
        lambda: mos.update("m", "unknown", metadata={"a": 1}),
        lambda: mos.delete("m", "unknown"),
        lambda: mos.history("unknown"),
        lambda: mos.add("nowhere", case.content(1)),
        lambda: mos.retrieve("nowhere", case.query(1)),
        lambda: mos.update("nowhere", "unknown", case.content(1)),
        lambda: mos.delete("nowhere", "unknown"),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match=r"unknown|nowhere"):
            call()


def test_wrong_arguments(mos: MOS, case: Case) -> None:
    mos.register_memory(case.make("m"))
    calls: list[Callable[[], Any]] = [
        lambda: mos.add("m", case.wrong),
        lambda: mos.add("m", case.content(1), metadata=[1]),  # type: ignore[arg-type]
        lambda: mos.add("m", case.content(1), metadata={1: 2}),  # type: ignore[dict-item]
        lambda: mos.add("m", case.content(1), metadata={"a": float("nan")}),
        lambda: mos.add("m", case.content(1), metadata={"a": object()}),
        lambda: mos.add("m", case.content(1), importance=2),
        lambda: mos.add("m", case.content(1), ttl_s=-1),
        lambda: mos.add("m", case.content(1), parent_id="x"),
        lambda: mos.retrieve("m", None),
        lambda: mos.retrieve("m", case.query(1), limit=-1),
        lambda: mos.retrieve("m", case.query(1), filters={"a": {"$no": 1}}),
        lambda: mos.retrieve(query=["no text and no memory"]),
    ]
    for call in calls:
        with pytest.raises((ArgumentError, NotFoundError)):
            call()
    mos.add("m", case.content(1), id="same")
    with pytest.raises(ArgumentError, match="exists"):
        mos.add("m", case.content(2), id="same")


def test_names_are_unique(mos: MOS, case: Case) -> None:
    mos.register_memory(case.make("m"))
    with pytest.raises(ArgumentError, match=r"'m'.*taken"):
        mos.register_memory(case.make("m"))
    with pytest.raises(ArgumentError, match="memory"):
        mos.register_memory("no memory")


def test_eight_threads(mos: MOS, case: Case) -> None:
    mos.register_memory(case.make("m"))
    contents = [case.content(i) for i in range(24)]
    errors: list[BaseException] = []

    def work(t: int) -> None:
        try:
            for i in range(t, 24, 8):
                cube = mos.add("m", contents[i], {"n": i, "user_id": str(i)})
                assert mos.get(cube.id, "m").metadata["n"] == i
                assert mos.retrieve("m", case.query(i), limit=3)
                if i % 3 == 0:
                    mos.delete("m", cube.id)
                elif i % 3 == 1:
                    mos.update("m", cube.id, metadata={"n": i + 100})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for i in range(24):
        hits = [
            hit
            for hit in mos.retrieve("m", case.query(i), limit=1)
            if case.says(hit.content) == case.says(contents[i])
        ]
        assert len(hits) == (i % 3 != 0), i
        if hits:
            assert hits[0].metadata["n"] == (i + 100 if i % 3 == 1 else i)


@pytest.mark.parametrize("kind", STORED)
def test_a_folder_remembers(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    with MOS(tmp_path) as mos:
        mos.register_memory(case.make("m"))
        cubes = [mos.add("m", case.content(i), {"n": i}) for i in range(3)]
        mos.relate(cubes[0].id, "like", cubes[1].id, weight=0.5)
        mos.update("m", cubes[2].id, metadata={"n": 7}, author="ann")
    with MOS(tmp_path) as mos:  # known without being registered again
        assert set(mos.memories) == {"m"}
        assert mos.memory("m").kind == case.make("x").kind
        hits = mos.retrieve("m", case.query(0), limit=1)
        assert hits[0].id == cubes[0].id
        if kind == "graph":  # there an edge is a relationship, a cube itself
            reached = mos.memory("m").neighbourhood(cubes[0].id, depth=1)
            assert [edge.content["label"] for edge in reached.relationships] == ["like"]
        else:
            (edge,) = [r for r in mos.get(cubes[0].id).relations if r.type == "like"]
            assert (edge.target, edge.weight) == (cubes[1].id, 0.5)
        assert [v.author for v in mos.history(cubes[2].id)] == [None, "ann"]
        mos.register_memory(case.make("m"))  # and may be
        assert mos.get(cubes[1].id).metadata["n"] == 1
    with MOS(tmp_path) as mos:
        other = CASES["text" if kind != "text" else "tree"].make("m")
        with pytest.raises(ArgumentError, match="kind"):
            mos.register_memory(other)
    with MOS(tmp_path, readonly=True) as mos:
        assert mos.retrieve("m", case.query(0), limit=1)[0].id == cubes[0].id
        with pytest.raises(StoreError, match="read-only"):
            mos.add("m", case.content(5))


def _fill(path: str, kind: str, first: int) -> None:
    with MOS(path) as mos:
        mos.register_memory(CASES[kind].make("m"))
        for i in range(first, first + 20):
            mos.add("m", CASES[kind].content(i), {"n": i})


@pytest.mark.parametrize("kind", STORED)
def test_two_processes(kind: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_fill, args=(str(tmp_path), kind, first)) for first in (0, 20)
    ]
    with MOS(tmp_path) as mos:  # this one reads on meanwhile
        mos.register_memory(CASES[kind].make("m"))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        for i in range(40):
            (hit,) = mos.retrieve("m", CASES[kind].query(i), limit=1)
            assert hit.metadata["n"] == i


def test_across_memories() -> None:
    with MOS() as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.register_memory(TreeTextMemory("docs", embedder=None))
        mos.register_memory(GraphMemory("facts", embedder=None))
        note = mos.add("notes", "The zebra sleeps in the barn.", {"user_id": "u1"})
        page = mos.add(
            "docs", "How a zebra is fed.", relations=[{"type": "about", "target": note.id}]
        )
        node = mos.add(
            "facts", {"type": "node", "label": "Animal", "properties": {"name": "zebra"}}
        )
        found = {hit.id: hit.memory for hit in mos.retrieve(query="zebra", limit=9)}
        assert found == {note.id: "notes", page.id: "docs", node.id: "facts"}
        only = mos.retrieve(query="zebra", filters={"user_id": "u1"})
        assert [hit.id for hit in only] == [note.id]
        (edge,) = mos.get(note.id).relations
        assert (edge.type, edge.target, edge.outgoing) == ("about", page.id, False)
        context = mos.context("Where does the zebra sleep?", budget_tokens=100)
        assert "barn" in str(context)
        assert note.id in {citation.id for citation in context.citations}
        assert "text" in str(mos.explain(context))
        assert "text" in str(mos.explain(mos.retrieve(query="zebra")[0]))
        tight = mos.context("zebra", budget_tokens=12)
        assert len(str(tight)) <= 12 * 4


def test_what_expires_is_gone() -> None:
    now = [1000.0]
    with MOS(clock=lambda: now[0]) as mos:
        mos.register_memory(GeneralTextMemory("m", embedder=None, clock=lambda: now[0]))
        cube = mos.add("m", "a short-lived zebra", ttl_s=10)
        kept = mos.add("m", "a zebra that stays")
        assert len(mos.retrieve("m", "zebra")) == 2
        now[0] = 1011.0
        assert [hit.id for hit in mos.retrieve("m", "zebra")] == [kept.id]
        with pytest.raises(NotFoundError):
            mos.get(cube.id)
        assert mos.history(cube.id)[-1].author == "ttl"


def test_errors_are_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MemosError, match="folder"):
        MOS(tmp_path / "file")
    with pytest.raises(StoreError, match="no store"):
        MOS(tmp_path / "nothing", readonly=True)
