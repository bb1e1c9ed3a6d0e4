"""What a store keeps of embedders: equal texts are embedded once, wrong bytes again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos.errors import ArgumentError
from memos.memories.embedded import Embedded
from memos.records.embedding import CallableEmbedder, SentenceEmbedder
from memos.records.store import Records

from .embedding_help import minilm_fixture, vectors_of  # noqa: F401


def embedded(records: Records, name: str, embedder: Any, **more: Any) -> Embedded:
    found = Embedded(name, embedder, **more)
    found.bind(records, records.register(name, "text").memory)
    return found


def numbers(found: Sequence[tuple[bytes | None, bytes | None]], dtype: str = "<f4") -> Any:
    """Stored vectors as an array."""
    return np.stack([np.frombuffer(vector or b"", dtype) for vector, _ in found])


def test_equal_texts_are_embedded_once() -> None:
    asked: list[list[str]] = []

    def function(texts: list[str], kind: str) -> Any:
        asked.append(list(texts))
        return vectors_of([kind + text for text in texts])

    records = Records(None)
    one = embedded(records, "one", CallableEmbedder(function, 8, "f"), dtype="float32")
    two = embedded(records, "two", CallableEmbedder(function, 8, "f"), dtype="float32")
    texts = ["a", "b", "a", "c", "b"]
    want = vectors_of(["document" + text for text in texts])
    np.testing.assert_array_equal(numbers(one.encode(texts)), want)
    np.testing.assert_array_equal(numbers(two.encode(texts)), want)
    np.testing.assert_array_equal(numbers(two.encode(["d", "a"]))[1], want[0])
    assert asked == [["a", "b", "c"], ["d"]]
    np.testing.assert_array_equal(one.query("a"), vectors_of(["querya"])[0])
    assert asked[2:] == [["a"]]
    assert one.encode([]) == []
    with pytest.raises(ArgumentError, match="UTF-8"):
        one.encode(["\ud800"])
    assert len(asked) == 3


def test_two_functions_of_one_name_share_nothing(tmp_path: Path) -> None:
    """In one store, in two, and in a process that goes on: a name does not tell them apart."""
    first, second = (lambda t: vectors_of(t)), (lambda t: -vectors_of(t))
    assert CallableEmbedder(first).identity == CallableEmbedder(second).identity
    for records in (Records(None), Records(tmp_path)):
        one = embedded(records, "one", first, dtype="float32")
        two = embedded(records, "two", CallableEmbedder(second), dtype="float32")
        for memory, sign in ((one, 1), (two, -1), (one, 1)):
            np.testing.assert_array_equal(numbers(memory.encode(["a"])), sign * vectors_of(["a"]))
            np.testing.assert_array_equal(memory.query("a"), sign * vectors_of(["a"])[0])


class Model:
    """An object that embeds, with its own numbers. All are equal, and none has a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.queries: list[str] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model)

    def embed_texts(self, texts: list[str], kind: str) -> Any:
        self.queries += texts if kind == "query" else []
        return vectors_of(texts) * (1 + id(self) % 1000)

    def __call__(self, texts: list[str], kind: str) -> Any:
        return self.embed_texts(texts, kind)


@pytest.mark.parametrize("part", ["embed_texts", "__call__", "itself"])
def test_one_function_is_asked_once_for_several_memories(part: str) -> None:
    models, records = [Model(), Model()], Records(None)
    for i, model in enumerate(models):
        for name in ("one", "two"):
            function = model if part == "itself" else getattr(model, part)
            memory = embedded(records, f"{name} {i}", function, dtype="float32")
            memory.encode(["a"])
            want = vectors_of(["a"])[0] * (1 + id(model) % 1000)
            np.testing.assert_array_equal(memory.query("a"), want)
    assert [model.queries for model in models] == [["a"], ["a"]]


def test_a_closed_memory_lets_its_function_go() -> None:
    model, records = Model(), Records(None)
    memory = embedded(records, "m", model.embed_texts)
    memory.encode(["a"])
    memory.query("a")
    alive = weakref.ref(model)
    memory.close()
    del model, memory
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("other", [("g", 8, "float32"), ("f", 6, "float32"), ("f", 8, "float16")])
def test_another_embedder_dim_or_dtype_is_kept_apart(other: tuple[str, int, str]) -> None:
    records = Records(None)
    first = embedded(records, "first", CallableEmbedder(vectors_of, 8, "f"), dtype="float32")
    first.encode(["a"])
    name, dim, dtype = other
    function = CallableEmbedder(lambda texts: -vectors_of(texts, dim), dim, name)
    second = embedded(records, "second", function, dtype=dtype)
    kind = "<f4" if dtype == "float32" else "<f2"
    want = -vectors_of(["a"], dim)
    np.testing.assert_array_equal(numbers(second.encode(["a"]), kind), want)
    np.testing.assert_array_equal(numbers(second.encode(["a"]), kind), want)
    np.testing.assert_array_equal(numbers(first.encode(["a"])), vectors_of(["a"]))


def kept(records: Records) -> Any:
    """What the cache holds of its one text."""
    with records.database.read() as connection:
        return connection.exec_driver_sql("SELECT data FROM embeddings").scalar_one()


def damage(records: Records, data: Any) -> None:
    with records.database.write() as connection:
        connection.exec_driver_sql("UPDATE embeddings SET data = ?", (data,))


def test_a_damaged_cache_entry_is_computed_again() -> None:
    calls: list[list[str]] = []

    def function(texts: list[str]) -> Any:
        calls.append(texts)
        return vectors_of(texts)

    records = Records(None)
    memory = embedded(records, "m", CallableEmbedder(function, 8, "f"), dtype="float32")
    memory.encode(["a"])
    whole = kept(records)
    for bad in (b"", b"abc", whole[:-4], whole + b"\0", whole + whole, b"\xff" * 32, "text"):
        damage(records, bad)
        assert memory.encode(["a"]) == [(whole, None)]
        assert kept(records) == whole
        memory.encode(["a"])
    assert len(calls) == 8


def test_token_signs_are_kept_with_the_vector(minilm: SentenceEmbedder) -> None:
    records = Records(None)
    memory = embedded(records, "m", minilm)
    ((vector, signs),) = memory.encode(["one two"])
    (tokens,) = minilm.token_vectors(["one two"])
    assert vector == minilm.embed(["one two"])[0].astype("<f2").tobytes()
    assert signs == np.packbits(tokens > 0, axis=1).tobytes()
    whole = kept(records)
    assert whole == vector + signs
    for bad in (whole[:-1], whole + b"\0", whole[: len(vector) - 2]):
        damage(records, bad)
        assert memory.encode(["one two"]) == [(vector, signs)]
        assert kept(records) == whole
