"""A version of a cube as fields, and back: what is compared, shown as a difference and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memos.cube.merge import DELETED, Fields

_PROPERTIES = "properties"  # of a node or relationship: each is a field of its own


@dataclass
class Body:
    """What a version says.

    Args:
        text:    the content where ``content`` is None.
        content: JSON.
        edges:   outgoing relations: (type, memory, target, weight, properties).
    """

    text: str
    content: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    importance: float = 0.5
    parent_id: str | None = None
    edges: Sequence[Any] = ()
    acl: Any = None
    is_deleted: bool = False


def to_fields(body: Body) -> Fields:
    """One field for the content - for a node or relationship one for each property -, one for each
    key of the metadata, one for each relation."""
    if body.is_deleted:
        return {DELETED: True}
    fields: Fields = {"importance": body.importance, "parent_id": body.parent_id, "acl": body.acl}
    if body.content is None:
        fields["content"] = body.text
    elif isinstance(body.content, dict) and isinstance(body.content.get(_PROPERTIES), dict):
        for key, value in body.content.items():
            if key != _PROPERTIES:
                fields[f"content.{key}"] = value
        for key, value in body.content[_PROPERTIES].items():
            fields[f"content.{_PROPERTIES}.{key}"] = value
    else:
        fields["content"] = {"text": body.text, "json": body.content}
    for key, value in body.metadata.items():
        fields[f"metadata.{key}"] = value
    for type, memory, target, weight, properties in body.edges:
        fields[f"relations.{type}.{memory}.{target}"] = [
            *(type, memory, target, weight, properties),
        ]
    return fields


def from_fields(fields: Fields) -> Body:
    """The version that these are the fields of."""
    if fields.get(DELETED):
        return Body("", is_deleted=True)
    body = Body("", importance=fields.get("importance", 0.5), parent_id=fields.get("parent_id"))
    body.acl = fields.get("acl")
    content: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    edges = []
    for name, value in fields.items():
        head, _, rest = name.partition(".")
        if head == "metadata":
            body.metadata[rest] = value
        elif head == "relations":
            edges.append(tuple(value))
        elif head == "content" and rest.startswith(f"{_PROPERTIES}."):
            properties[rest.partition(".")[2]] = value
        elif head == "content" and rest:
            content[rest] = value
    body.edges = edges
    whole = fields.get("content")
    if content:
        body.content = {**content, _PROPERTIES: properties}
    elif isinstance(whole, str):
        body.text = whole
    elif whole is not None:
        body.text, body.content = whole["text"], whole["json"]
    return body
