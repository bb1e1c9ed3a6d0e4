"""MemCube: one unit of memory, plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memos.errors import NotFoundError


@dataclass(frozen=True)
class MemCube(Mapping[str, Any]):
    """One unit of memory. Reads both ways: ``cube.id`` and ``cube["id"]``.

    Frozen: an update of a memory makes another cube. ``content`` and ``metadata`` are the
    reader's own: changing them changes nothing that is stored.

    Args:
        id:         unique in its memory.
        kind:       the type of memory it came from, such as "kv_cache".
        content:    what is remembered.
        metadata:   JSON: whatever the application and the memory know about it.
        relations:  to other cubes.
        acl:        who may see it; None: everyone who may see its memory.
        versions:   how many there have been; the last one is this.
        created_at, updated_at: seconds since 1970.
    """

    id: str
    kind: str
    content: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    relations: tuple[Any, ...] = ()
    acl: Any = None
    versions: int = 1
    created_at: float = 0.0
    updated_at: float = 0.0

    def __getitem__(self, name: str) -> Any:
        if name not in _NAMES:
            raise NotFoundError(f"cube[{name!r}]: one of {', '.join(_NAMES)} wanted")
        return getattr(self, name)

    def __getattr__(self, name: str) -> Any:  # only for names that are not there
        raise AttributeError(f"cube.{name}: one of {', '.join(_NAMES)} wanted")

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


_NAMES = tuple(f.name for f in dataclasses.fields(MemCube))
