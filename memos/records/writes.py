"""What is written of a cube: a new one, a change, and the digest that tells whether it rotted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memos.cube import Relation
from memos.cube.identity import canonical, digest


@dataclass
class New:
    """A cube to be stored. ``content`` None: the content is the text."""

    id: str
    kind: str
    text: str
    metadata: dict[str, Any]
    at: float
    content: Any = None
    importance: float = 0.5
    parent: int | None = None
    thread: str | None = None
    source: str | None = None
    creator: str | None = None
    author: str | None = None
    derived_from: Sequence[str] = ()
    acl: Any = None
    expires_at: float | None = None
    vector: bytes | None = None
    tokens: bytes | None = None
    context: str | None = None  # words for full text beside the text; None: the metadata's
    relations: Sequence[tuple[int, Relation]] = ()  # (seq of the other cube, edge)
    parents: bytes | None = None  # digests of versions of other memories that this is made of
    is_copy: bool = False  # of a cube that is there: no duplicate, whatever it says
    edges: Sequence[Any] = ()  # outgoing relations to be made later, as in history.Edge

    @functools.cached_property
    def json(self) -> tuple[str | None, str]:
        """content and metadata as they are stored; neither changes afterwards."""
        return as_json(self.content), canonical(self.metadata, "metadata")

    @functools.cached_property
    def digest(self) -> bytes:
        """Of what it says and where it stands: equal for exact duplicates."""
        return content_digest(self.kind, self.text, *self.json, self.parent)


def content_digest(
    kind: str, text: str, content: str | None, metadata: str, parent: int | None
) -> bytes:
    return digest(kind, text, content or "", metadata, "" if parent is None else str(parent))


def is_whole(row: Any) -> bool:
    """Whether what a row of ``cubes`` says is what was stored: bits on disks rot."""
    parts = (row.kind, row.text, row.content or "", row.metadata)
    if not all(isinstance(part, str) for part in parts):
        return False
    digest = content_digest(row.kind, row.text, row.content, row.metadata, row.parent)
    return bool(digest == row.digest)


@dataclass
class Change:
    """What an update gives; None: stays. ``clear_vector``: the old one no longer fits.

    ``text`` and ``content`` go together: where a text is given, content None means that the
    content is the text. ``move``: ``parent``, ``position`` and ``thread`` count, also None.
    """

    text: str | None = None
    content: Any = None
    metadata: dict[str, Any] | None = None
    importance: float | None = None
    move: bool = False
    parent: int | None = None
    position: int | None = None
    thread: str | None = None
    expires_at: float | None = None
    acl: Any = None
    author: str | None = None
    source: str | None = None
    vector: bytes | None = None
    tokens: bytes | None = None
    context: str | None = None
    clear_vector: bool = field(default=False)
    edges: Sequence[Any] | None = None  # all outgoing relations, as in history.Edge
    parents: bytes = b""  # digests of versions of other cubes that were merged into this one


def as_json(value: Any) -> str | None:
    """Content as it is stored; None stays."""
    return None if value is None else canonical(value, "content")
