"""MemCube: one unit of memory, plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from memos.errors import NotFoundError


@dataclass(frozen=True)
class Relation:
    """A typed edge to another cube, of this memory or of another one.

    Args:
        type:       what the edge says, such as "supports".
        target:     id of the other cube.
        properties: JSON.
        weight:     how strong it is; retrieval multiplies by it.
        outgoing:   False when the other cube names this one.
    """

    type: str
    target: str
    properties: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    outgoing: bool = True


@dataclass(frozen=True)
class Version:
    """One entry of a cube's history.

    Args:
        number:   from 1; the highest one is the cube as it is.
        content, metadata, state, importance: as they were.
        author:   who made this version.
        source:   where it came from.
        at:       when, in seconds since 1970.
        digest:   of all of it and of ``parents``, in hex: equal digests, equal history.
        parents:  digests of the versions it was made of: the one before it, and after a merge
            that of the other side.
        parent_id, relations, acl, expires_at: as they were; relations are the outgoing ones.
    """

    number: int
    content: Any
    metadata: dict[str, Any]
    state: str
    importance: float
    author: str | None
    source: str | None
    at: float
    digest: str
    parents: tuple[str, ...] = ()
    parent_id: str | None = None
    relations: tuple[Relation, ...] = ()
    acl: Any = None
    expires_at: float | None = None

    @property
    def is_deleted(self) -> bool:
        """Whether this version says that the cube is gone."""
        return self.state == "DELETED"


@dataclass(frozen=True)
class MemCube(Mapping[str, Any]):
    """One unit of memory. Reads both ways: ``cube.id`` and ``cube["id"]``.

    Frozen: an update of a memory makes another cube. ``content`` and ``metadata`` are the
    reader's own: changing them changes nothing that is stored.

    Args:
        id:           UUIDv7, or the name that the application gave; unique in its memory.
        kind:         what it is: "text", "tree", "vector", "node", "relationship", "kv_cache".
        content:      what is remembered.
        metadata:     JSON: whatever the application and the memory know about it.
        relations:    to and from other cubes.
        acl:          who may see it; None: everyone who may see its memory.
        versions:     how many there have been; the last one is this.
        created_at, updated_at: seconds since 1970.
        memory:       name of the memory that holds it.
        parent_id:    the cube above it in a tree.
        importance:   from 0 to 1.
        state:        of its life: CREATED, ..., DELETED.
        source, creator, derived_from: provenance: where it came from, who made it, ids of the
            cubes it was made of.
        expires_at:   seconds since 1970; None: never.
        digest:       of this version, in hex; see ``Version``.
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
    memory: str = ""
    parent_id: str | None = None
    importance: float = 0.5
    state: str = "CREATED"
    source: str | None = None
    creator: str | None = None
    derived_from: tuple[str, ...] = ()
    expires_at: float | None = None
    digest: str = ""

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise NotFoundError(f"cube[{name!r}]: one of {', '.join(self._names())} wanted")
        return getattr(self, name)

    def __getattr__(self, name: str) -> Any:  # only for names that are not there
        raise AttributeError(f"cube.{name}: one of {', '.join(self._names())} wanted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class Hit(MemCube):
    """A cube as retrieval returned it.

    Args:
        score:       higher is better; comparable within one result only.
        trace:       for ``explain``: each stage that saw it, with its signals and their weights.
        ancestors:   parents up to the root, nearest first, where asked for.
        siblings, descendants: where asked for.
        neighbours:  cubes before and after it, and related ones, where asked for.
    """

    score: float = 0.0
    trace: tuple[Any, ...] = ()
    ancestors: tuple[MemCube, ...] = ()
    siblings: tuple[MemCube, ...] = ()
    descendants: tuple[MemCube, ...] = ()
    neighbours: tuple[MemCube, ...] = ()

    @classmethod
    def of(cls, cube: MemCube, **more: Any) -> Hit:
        """A hit with the fields of this cube."""
        fields = {f.name: getattr(cube, f.name) for f in dataclasses.fields(cube)}
        return cls(**{**fields, **more})
