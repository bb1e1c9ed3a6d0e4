"""Whether what comes from elsewhere is what a memory stores: text and content of a version."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from memos.errors import ArgumentError
from memos.memories.graph_content import NODE, RELATIONSHIP, checked_content

_DIGEST = re.compile(r"[0-9a-f]{64}")

Check = Callable[[str, str, Any], None]


def checker(kind: str, dim: int | None = None) -> Check:
    """What raises ArgumentError for (kind, text, content) that no memory of this kind stores.

    Args:
        kind: of the memory.
        dim:  numbers of the vectors of a VectorMemory; None: those of the first that comes.
    """
    if kind == "vector":
        return _Vectors(dim)
    found = {"text": _text, "tree": _text, "graph": _graph, "parametric": _adapter}.get(kind)
    if found is None:
        raise ArgumentError(f"kind: of a memory of records wanted, got {kind!r}")
    return found


def _text(kind: str, text: str, content: Any) -> None:
    if kind not in ("text", "tree") or content is not None or not text.strip():
        raise ArgumentError("content: a text that is not empty wanted")


def _graph(kind: str, text: str, content: Any) -> None:
    if kind not in (NODE, RELATIONSHIP) or checked_content(content, "of the file") != content:
        raise ArgumentError("content: a node or a relationship as it is stored wanted")
    if content["type"] != kind:
        raise ArgumentError(f"kind: {content['type']!r} wanted as its content says, got {kind!r}")


def _adapter(kind: str, text: str, content: Any) -> None:
    if kind != "parametric" or not isinstance(content, Mapping):
        raise ArgumentError("content: what is known of an adapter wanted")
    if not isinstance(content.get("digest"), str) or not _DIGEST.fullmatch(content["digest"]):
        raise ArgumentError("content.digest: of an adapter wanted")
    if not isinstance(content.get("base") or {}, Mapping):
        raise ArgumentError("content.base: what is known of a model wanted")


class _Vectors:
    def __init__(self, dim: int | None) -> None:
        self._dim = dim

    def __call__(self, kind: str, text: str, content: Any) -> None:
        import numpy

        if (
            kind != "vector"
            or not isinstance(content, Mapping)
            or set(content)
            != {
                "vector",
                "text",
            }
        ):
            raise ArgumentError("content: vector and text wanted")
        try:
            data = base64.b85decode(content["vector"])
        except (TypeError, ValueError):
            raise ArgumentError("content.vector: numbers in base 85 wanted") from None
        if base64.b85encode(data).decode() != content["vector"] or len(data) % 4 or not data:
            raise ArgumentError("content.vector: numbers in base 85 wanted")
        if not numpy.isfinite(numpy.frombuffer(data, "<f4")).all():
            raise ArgumentError("content.vector: finite numbers wanted, got NaN or infinity")
        self._dim = self._dim or len(data) // 4
        if len(data) != 4 * self._dim:
            raise ArgumentError(f"content.vector: {self._dim} numbers wanted, got {len(data) // 4}")
        if content["text"] != text:
            raise ArgumentError("content.text: the text of the cube wanted")
