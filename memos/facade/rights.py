"""Who may do what, and what was done."""

from __future__ import annotations


class Rights:
    """Part of MOS."""
