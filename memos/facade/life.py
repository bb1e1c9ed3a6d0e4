"""The life of cubes: archived, frozen, merged, forgotten."""

from __future__ import annotations


class Lives:
    """Part of MOS."""
