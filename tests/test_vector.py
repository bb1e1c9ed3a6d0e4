"""VectorMemory: vectors of the application, vectors of texts, and what is near."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos.errors import ArgumentError
from memos.memories.vector import METRICS, VectorMemory
from memos.records.check import check
from memos.records.store import Records

DIM = 6


def vectors_of(texts: list[str]) -> Any:
    digests = [hashlib.sha256(text.encode()).digest()[:DIM] for text in texts]
    return np.array([[byte / 128 - 1 for byte in one] for one in digests], np.float32)


class Asked:
    """A function that embeds, and what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Any:
        self.calls.append(list(texts))
        return vectors_of(texts)


def opened(records: Records | None = None, name: str = "v", **more: Any) -> VectorMemory:
    memory = VectorMemory(name, **more)
    memory.bind(Records(None) if records is None else records)
    return memory


def test_a_vector_reads_back(tmp_path: Path) -> None:
    records = Records(tmp_path)
    memory = opened(records)
    for given in ([1, 2.5, -3], np.array([1, 2.5, -3]), {"vector": [1, 2.5, -3], "text": "words"}):
        cube = memory.add(given)
        for one in (cube, memory.get(cube.id)):
            assert one.content["vector"].tolist() == [1, 2.5, -3]
            assert one.content["vector"].dtype == np.float32
            assert one.content["text"] == ("words" if isinstance(given, dict) else "")
    assert len(memory.cubes()) == 2  # the list and the array are one
    memory.update(cube.id, [0, 1, 0])
    assert memory.get(cube.id).content["vector"].tolist() == [0, 1, 0]
    assert memory.lookup([0, 1, 0], 1, memory.scope())[0].id == cube.id
    assert opened(Records(tmp_path)).dim == 3
    assert check(records) == []


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_are_those_of_all(metric: str) -> None:
    random = np.random.default_rng(1)
    vectors = random.standard_normal((200, DIM)).astype(np.float32)
    memory = opened(metric=metric)
    ids = [cube.id for cube in memory.add_many([{"content": v} for v in vectors])]
    for query in random.standard_normal((5, DIM)).astype(np.float32):
        scores = vectors @ query
        if metric == "cosine":
            scores = scores / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        if metric == "l2":
            scores = -np.square(vectors - query).sum(axis=1)
        best = np.argsort(-scores)[:10]
        hits = memory.lookup(query, 10, memory.scope())
        assert [hit.id for hit in hits] == [ids[i] for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], rtol=1e-4, atol=1e-5)


def test_texts_are_embedded_together() -> None:
    asked = Asked()
    memory = opened(embedder=asked)
    memory.add_many([{"content": "warm up"}])
    asked.calls.clear()
    given = [9.0] * DIM
    contents: list[Any] = ["a", given, {"text": "b"}, "a", {"vector": given, "text": "c"}]
    cubes = memory.add_many([{"content": c, "metadata": {"n": i}} for i, c in enumerate(contents)])
    assert asked.calls == [["a", "b"]]
    want = [*vectors_of(["a"]), given, *vectors_of(["b", "a"]), given]
    np.testing.assert_array_equal([cube.content["vector"] for cube in cubes], want)
    assert [cube.content["text"] for cube in cubes] == ["a", "", "b", "a", "c"]
    memory.add_many([{"content": f"text {i}"} for i in range(2500)])
    assert [len(call) for call in asked.calls[1:]] == [1000, 1000, 500]
    memory.update(cubes[1].id, "d")
    assert asked.calls[4:] == [["d"]]
    np.testing.assert_array_equal(memory.get(cubes[1].id).content["vector"], vectors_of(["d"])[0])
    assert check(memory.records) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a text", "no embedder"),
        ({"vector": [1, 2], "colour": "red"}, "vector and text wanted, got vector, colour"),
        ({"text": 7}, "a text wanted, got int"),
        ({"text": " "}, "a vector, or a text to embed, wanted"),
        ([1, 2, 3], r"shape \[2\] wanted, got \[3\]"),
        ([[1, 2]], r"shape \[2\] wanted, got \[1, 2\]"),
        ([1, float("nan")], "finite numbers wanted"),
        ([0, 0], "not zero wanted under cosine"),
        (["a", "b"], "a vector of numbers wanted, got list"),
    ],
)
def test_wrong_contents_are_named(content: Any, message: str) -> None:
    memory = opened(dim=2)
    with pytest.raises(ArgumentError, match=message):
        memory.add_many([{"content": [1, 2]}, {"content": content}])
    assert memory.cubes() == []


def test_a_text_that_gives_no_vector_stores_nothing() -> None:
    memory = opened(dim=3, embedder=Asked())
    with pytest.raises(ArgumentError, match="UTF-8"):
        memory.add("\ud800")
    with pytest.raises(ArgumentError, match=r"content: shape \[3\] wanted, got \[6\]"):
        memory.add_many([{"content": [1, 2, 3]}, {"content": "a text"}])
    assert memory.cubes() == []
