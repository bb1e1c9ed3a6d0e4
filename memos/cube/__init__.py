"""The unit of memory."""

from __future__ import annotations

from memos.cube.cube import Hit, MemCube, Relation, Version

__all__ = ["Hit", "MemCube", "Relation", "Version"]
