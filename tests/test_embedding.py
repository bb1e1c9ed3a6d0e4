"""Embedders: any function, and what a user may pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memos.errors import ArgumentError
from memos.records.embedding import CallableEmbedder, Embedder, SentenceEmbedder, resolve

from .embedding_help import TEXTS, minilm_fixture, vectors_of  # noqa: F401


def test_a_function_is_an_embedder() -> None:
    embedder = CallableEmbedder(vectors_of)
    assert isinstance(embedder, Embedder)
    assert embedder.identity.endswith("embedding_help.vectors_of")
    assert embedder.dim == 8
    np.testing.assert_array_equal(embedder.embed(TEXTS), vectors_of(TEXTS))
    assert embedder.embed([]).shape == (0, 8)
    kinds = CallableEmbedder(lambda texts, kind: [[len(kind)]] * len(texts), identity="kinds")
    assert kinds.embed(["a", "b"], "query").tolist() == [[5], [5]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[1, 2]], "2 vectors wanted, shape"),
        ([[1, 2], [1]], "unequal length"),
        ([[1], [2]], "of 2 numbers wanted, of 1 came"),
        ([[1, float("inf")], [1, 2]], "finite numbers"),
        ([["a", "b"], ["c", "d"]], "numbers wanted"),
        ([1, 2], "2 vectors wanted"),
        (None, "numbers wanted"),
    ],
)
def test_what_a_function_may_not_return(answer: Any, message: str) -> None:
    embedder = CallableEmbedder(lambda texts: answer, dim=2, identity="f")
    with pytest.raises(ArgumentError, match=f"f: .*{message}"):
        embedder.embed(["a", "b"])


def test_resolve(minilm: SentenceEmbedder) -> None:
    assert resolve(None) is None
    embedder = CallableEmbedder(vectors_of)
    assert resolve(embedder) is embedder
    assert isinstance(resolve(vectors_of), CallableEmbedder)
    found = resolve(str(minilm.folder))
    assert isinstance(found, SentenceEmbedder)
    assert found.identity == minilm.identity
    assert isinstance(resolve(minilm.folder), SentenceEmbedder)
    for wrong in (3, [], CallableEmbedder):
        with pytest.raises(ArgumentError, match="embedder: None, 'auto', a folder"):
            resolve(wrong)


@pytest.mark.parametrize("make", [lambda m: CallableEmbedder(vectors_of), lambda m: m])
def test_mistakes_are_named(minilm: SentenceEmbedder, make: Any) -> None:
    embedder = make(minilm)
    with pytest.raises(ArgumentError, match="texts: a sequence of str wanted, one str came"):
        embedder.embed("one text")
    with pytest.raises(ArgumentError, match=r"texts\[1\]: a str wanted, int came"):
        embedder.embed(["a", 3])
    with pytest.raises(ArgumentError, match="kind: one of document, query wanted, 'ask' came"):
        embedder.embed(["a"], "ask")
