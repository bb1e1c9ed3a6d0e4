"""Cubes as files that another store opens."""

from __future__ import annotations


class Files:
    """Part of MOS."""
