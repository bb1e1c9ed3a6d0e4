"""GeneralTextMemory: free text, found by its words, its meaning and its metadata."""

from __future__ import annotations

from memos.memories.declarative import DeclarativeMemory


class GeneralTextMemory(DeclarativeMemory):
    """Free text."""

    kind = "text"
