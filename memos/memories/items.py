"""What an item to be added is made of: its arguments, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from memos.cube import Relation
from memos.errors import ArgumentError

KEPT = "_kept"  # of an item: New, text and content as they are stored, and the version's parents
_BATCH = 1000  # cubes of one transaction of add_many
# Metadata that names the conversation or document whose cubes follow one another.
_THREAD_KEYS = ("thread", "thread_id", "conversation_id", "conversation", "session_id", "session")
ITEM_KEYS = {
    *("content", "metadata", "parent_id", "relations", "importance", "ttl_s", "acl", "id"),
    *("source", "creator", "derived_from", "thread", KEPT),
}


def batches_of(items: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Items by the thousand."""
    batch: list[Mapping[str, Any]] = []
    for item in items:
        if not isinstance(item, Mapping):
            raise ArgumentError(f"items: dicts with content wanted, got {type(item).__name__}")
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def author_of(given: str | None) -> str | None:
    """Who makes a version: the principal who acts, whatever the caller says."""
    from memos.records.scope import acting

    actor = acting.get()
    return given if actor is None else actor.principal


def acl_of(value: Any) -> Any:
    """An access list in its normal form."""
    from memos.records.rights import checked_acl

    return None if value is None else checked_acl(value)


def metadata_of(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dict of its own; {} for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ArgumentError(f"metadata: a dict wanted, got {type(value).__name__}")
    return dict(value)


def importance_of(value: Any) -> float:
    """From 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ArgumentError(f"importance: a number from 0 to 1 wanted, got {value!r}")
    return float(value)


def expiry_of(ttl_s: Any, now: float) -> float | None:
    """Seconds since 1970, for a time to live."""
    if ttl_s is None:
        return None
    if not isinstance(ttl_s, int | float) or isinstance(ttl_s, bool) or not ttl_s > 0:
        raise ArgumentError(f"ttl_s: seconds above 0 wanted, got {ttl_s!r}")
    return max(now + ttl_s, math.nextafter(now, math.inf))  # a tiny one is lost in the sum


def thread_of(given: Any, metadata: Mapping[str, Any]) -> str | None:
    """What was given, else what the metadata names."""
    for value in (given, *(metadata.get(key) for key in _THREAD_KEYS)):
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value)
    return None


def name_of(what: str, given: Any, metadata: Mapping[str, Any]) -> str | None:
    """A string that was given, else the metadata's."""
    value = metadata.get(what) if given is None else given
    if given is not None and not isinstance(given, str):
        raise ArgumentError(f"{what}: a string wanted, got {given!r}")
    return value if isinstance(value, str) else None


def names_of(value: Any) -> tuple[str, ...]:
    """Ids."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ArgumentError(f"derived_from: a list of ids wanted, got {value!r}")
    return tuple(value)


def relation_of(edge: Any) -> Relation:
    """An edge from a dict."""
    if isinstance(edge, Relation):
        edge = {
            "type": edge.type,
            "target": edge.target,
            "properties": edge.properties,
            "weight": edge.weight,
        }
    if not isinstance(edge, Mapping) or not {"type", "target"} <= set(edge):
        raise ArgumentError(f"relations: dicts with type and target wanted, got {edge!r}")
    type_, target, weight = edge["type"], edge["target"], edge.get("weight", 1.0)
    if not isinstance(type_, str) or not type_:
        raise ArgumentError(f"relation.type: a string that is not empty wanted, got {type_!r}")
    if not isinstance(target, str):
        raise ArgumentError(f"relation.target: the id of a cube wanted, got {target!r}")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight > 0:
        raise ArgumentError(f"relation.weight: a number above 0 wanted, got {weight!r}")
    return Relation(type_, target, metadata_of(edge.get("properties")), float(weight))
