"""What a GraphMemory takes as content and as query, checked, and the words that find it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memos.cube.identity import canonical
from memos.cube.utf8 import check_utf8
from memos.errors import ArgumentError

NODE, RELATIONSHIP = "node", "relationship"
DIRECTIONS = ("out", "in", "both")
_LABEL = re.compile(r"\w{1,100}")
_RESERVED = ("MemosNode", "MemosGraph")  # on a graph server
_KEYS = {
    NODE: ("type", "label", "labels", "properties"),
    RELATIONSHIP: ("type", "label", "source_id", "target_id", "properties"),
}
_NAMES = ("name", "title", "label", "id")  # properties that name a node, the best one first
_SPLIT = re.compile(r"_+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_QUERY = ("node", "relationships", "depth", "direction", "max_nodes")
_MATCH = ("id", "label", "labels", "properties")
MAX_DEPTH, MAX_NODES = 10, 1000


@dataclass(frozen=True)
class Query:
    """A structured query, checked. ``types`` None: all."""

    id: str | None
    labels: tuple[str, ...]
    properties: dict[str, Any]
    types: tuple[str, ...] | None
    depth: int
    direction: str
    max_nodes: int


def checked_content(content: Any, memory: str) -> dict[str, Any]:
    """A node or a relationship in its stored form: labels and properties there, nothing else."""
    if not isinstance(content, Mapping) or content.get("type") not in _KEYS:
        raise ArgumentError(
            f"content: memory {memory!r} wants a dict with type 'node' or 'relationship', got "
            f"{_shown(content)}"
        )
    kind = content["type"]
    unknown = [key for key in content if key not in _KEYS[kind]]
    if unknown:
        raise ArgumentError(
            f"content: a {kind} has {', '.join(_KEYS[kind])}, got {unknown[0]!r} as well"
        )
    found: dict[str, Any] = {"type": kind}
    if kind == NODE:
        labels = _labels(content, "content")
        if not labels:
            raise ArgumentError("content: a node wants a label, or labels, a list; got neither")
        found |= {"label": labels[0]} if len(labels) == 1 else {"labels": labels}
    else:
        if "label" not in content:
            raise ArgumentError("content: a relationship wants a label, its type")
        found["label"] = checked_label(content["label"], "content.label")
        for end in ("source_id", "target_id"):
            if not isinstance(content.get(end), str) or not content[end]:
                raise ArgumentError(
                    f"content.{end}: the id of a node wanted, got {_shown(content.get(end))}"
                )
            found[end] = content[end]
    found["properties"] = _properties(content.get("properties"), "content.properties")
    return found


def checked_label(label: Any, what: str) -> str:
    """A label or type: letters, digits and underscores."""
    if not isinstance(label, str) or not _LABEL.fullmatch(label) or label in _RESERVED:
        raise ArgumentError(
            f"{what}: 1 to 100 letters, digits and underscores wanted, but neither of "
            f"{', '.join(_RESERVED)}; got {_shown(label)}"
        )
    return label


def checked_types(types: Any, what: str) -> tuple[str, ...] | None:
    """Types of relationships; None: all."""
    if types is None:
        return None
    if isinstance(types, str):
        types = [types]
    if not isinstance(types, list | tuple | set | frozenset) or not types:
        raise ArgumentError(
            f"{what}: a list of types wanted, left out for all; got {_shown(types)}"
        )
    return tuple(dict.fromkeys(checked_label(name, what) for name in types))


def checked_direction(direction: Any) -> str:
    if direction not in DIRECTIONS:
        raise ArgumentError(
            f"direction: one of {', '.join(DIRECTIONS)} wanted, got {_shown(direction)}"
        )
    return str(direction)


def checked_count(what: str, value: Any, least: int, most: int | None = None) -> int:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ArgumentError(f"{what}: a number {span} wanted, got {_shown(value)}")
    return value


def checked_match(label: Any, properties: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Labels and properties that nodes are looked up by."""
    labels = _labels({} if label is None else {"label": label}, "label")
    return tuple(labels), _properties(properties, "properties")


def checked_query(query: Any, memory: str) -> Query:
    """The parts of a structured query, with what is left out filled in."""
    if not isinstance(query, Mapping) or not isinstance(query.get("node"), Mapping):
        raise ArgumentError(
            f"query: memory {memory!r} wants text, or a dict with node, a dict of "
            f"{', '.join(_MATCH)}; got {_shown(query)}"
        )
    node = query["node"]
    for given, known, what in ((query, _QUERY, "query"), (node, _MATCH, "query.node")):
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ArgumentError(f"{what}: {', '.join(known)} wanted, got {unknown[0]!r} as well")
    id = node.get("id")
    if id is not None and not isinstance(id, str):
        raise ArgumentError(f"query.node.id: the id of a node wanted, got {_shown(id)}")
    walks = any(query.get(key) is not None for key in ("relationships", "direction"))
    depth = query.get("depth")
    max_nodes = query.get("max_nodes")
    return Query(
        id=id,
        labels=tuple(_labels(node, "query.node")),
        properties=_properties(node.get("properties"), "query.node.properties"),
        types=checked_types(query.get("relationships"), "query.relationships"),
        depth=int(walks) if depth is None else checked_count("query.depth", depth, 0, MAX_DEPTH),
        direction=checked_direction(query.get("direction") or "both"),
        max_nodes=MAX_NODES
        if max_nodes is None
        else checked_count("query.max_nodes", max_nodes, 1),
    )


def name_of(content: Mapping[str, Any], id: str) -> str:
    """What a person calls a node."""
    properties = content["properties"]
    strings = {k: v for k, v in properties.items() if isinstance(v, str) and v.strip()}
    for key in (*_NAMES, *strings):
        if key in strings:
            return strings[key].strip()[:200]
    return id


def node_text(content: Mapping[str, Any]) -> str:
    """Label words and property values, the name first."""
    labels = [content["label"]] if "label" in content else content["labels"]
    properties = content["properties"]
    order = sorted(properties, key=lambda key: _NAMES.index(key) if key in _NAMES else len(_NAMES))
    return _sentence(", ".join(map(_spaced, labels)), (properties[key] for key in order))


def relationship_text(content: Mapping[str, Any], source: str, target: str) -> str:
    """The names of its ends around the words of its type, then the property values."""
    verb = _spaced(content["label"]).lower()
    return _sentence(f"{source} {verb} {target}", content["properties"].values())


def _sentence(head: str, values: Iterable[Any]) -> str:
    words = [word for value in values if (word := ", ".join(_words(value)))]
    return f"{head}: {'; '.join(words)}" if words else head


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _spaced(label: str) -> str:
    """HeartDisease -> Heart Disease; EXHIBITS_SYMPTOM -> EXHIBITS SYMPTOM."""
    return " ".join(part for part in _SPLIT.split(label) if part) or label


def _labels(given: Mapping[str, Any], what: str) -> list[str]:
    label, labels = given.get("label"), given.get("labels")
    if label is not None and labels is not None:
        raise ArgumentError(f"{what}: label or labels wanted, got both")
    if label is not None:
        return [checked_label(label, f"{what}.label" if what != "label" else what)]
    if labels is None:
        return []
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ArgumentError(f"{what}.labels: a list of labels wanted, got {_shown(labels)}")
    return list(dict.fromkeys(checked_label(name, f"{what}.labels") for name in labels))


def _properties(given: Any, what: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{what}: a dict wanted, got {_shown(given)}")
    text = canonical(dict(given), what)
    check_utf8(text, what)
    found: dict[str, Any] = json.loads(text)  # in one order, so that equal ones have equal texts
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
