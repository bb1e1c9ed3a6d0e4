"""Versions of cubes, and branches of memories."""

from __future__ import annotations


class Histories:
    """Part of MOS."""
