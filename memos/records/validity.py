"""When a fact holds: metadata valid_from and valid_to, in seconds since 1970.

A fact without valid_from has always held, one without valid_to still holds; at valid_to it does
not hold any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

VALID_FROM, VALID_TO = "valid_from", "valid_to"


def holds_at(metadata: Mapping[str, Any], at: float) -> bool:
    """Whether what a cube with this metadata says holds at a time."""
    start, end = interval_of(metadata)
    return start <= at < end


def interval_of(metadata: Mapping[str, Any]) -> tuple[float, float]:
    """From when, and until when, what a cube says holds."""
    return (
        _seconds(metadata.get(VALID_FROM), -math.inf),
        _seconds(metadata.get(VALID_TO), math.inf),
    )


def holding(at: float) -> dict[str, Any]:
    """A filter for the cubes whose facts hold at a time: for ``filters`` of any query."""
    return {
        "$and": [
            {"$not": {VALID_FROM: {"$gt": at}}},
            {"$not": {VALID_TO: {"$lte": at}}},
        ]
    }


def _seconds(value: Any, default: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and value == value else default
