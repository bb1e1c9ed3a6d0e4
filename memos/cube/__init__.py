"""The unit of memory."""

from __future__ import annotations

from memos.cube.cube import MemCube

__all__ = ["MemCube"]
