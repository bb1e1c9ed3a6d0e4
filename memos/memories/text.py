"""GeneralTextMemory: free text, found by its words, its meaning and its metadata."""

from __future__ import annotations

from memos.memories.declarative import DeclarativeMemory


class GeneralTextMemory(DeclarativeMemory):
    """Free text. Thread-safe once registered.

    Args:
        name, description: of the memory.
        embedder:     who makes vectors of texts, for search by meaning: "auto" (the local model,
            where it is installed), None, an Embedder, a callable, or a model's folder.
        on_duplicate: what an exact duplicate (content and metadata) of a living cube does:
            "return" that cube, "keep" both, "error".
        clock:        seconds since 1970.

    Raises:
        ArgumentError: an argument is out of contract.
    """

    kind = "text"
