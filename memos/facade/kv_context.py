"""A context whose memories are KV already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memos.kv.compose import Composed
from memos.retrieval import Context


@dataclass(frozen=True)
class KVContext(Context):
    """Text for a prompt, and its cache: system prompt, memories and query are in it.

    Args:
        composed:  the prompt's tokens and cache.
        prefilled: ids of cubes that were not activated, and were prefilled for this.
    """

    composed: Composed | None = None
    prefilled: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        """generate's arguments: ``model.generate(**context.inputs)`` answers the query."""
        assert self.composed is not None
        return self.composed.inputs
