"""What all embedders check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memos.errors import ArgumentError

Floats = NDArray[np.float32]
Progress = Callable[[int, int], object]

KINDS = ("document", "query")


def check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ArgumentError("texts: a sequence of str wanted, one str came")
    wanted = list(texts)
    for i, text in enumerate(wanted):
        if not isinstance(text, str):
            raise ArgumentError(f"texts[{i}]: a str wanted, {type(text).__name__} came")
    return wanted


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ArgumentError(f"kind: one of {', '.join(KINDS)} wanted, {kind!r} came")


def checked(vectors: Any, count: int, dim: int | None) -> Floats:
    """Vectors of others as float32 [count, dim]; ValueError says what they are instead."""
    try:
        array = np.asarray(vectors)
    except ValueError:
        raise ValueError("vectors of unequal length came") from None
    if array.dtype.kind not in "fiu":
        raise ValueError(f"numbers wanted, {array.dtype} came")
    if array.ndim != 2 or array.shape[0] != count or not array.shape[1]:
        raise ValueError(f"{count} vectors wanted, shape {array.shape} came")
    if dim is not None and array.shape[1] != dim:
        raise ValueError(f"vectors of {dim} numbers wanted, of {array.shape[1]} came")
    with np.errstate(over="ignore"):  # said below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("finite numbers wanted, others came")
    return array
