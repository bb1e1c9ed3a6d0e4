"""Ids and digests of cubes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from typing import Any

from memos.errors import ArgumentError

# Under this name a model keeps what says which adapters compute with it: ``identity() -> str``.
ADAPTERS = "_memos_adapters"

_DEEPEST = 100  # levels of JSON: what reads them again is recursive
_lock = threading.Lock()
_last_ms = 0
_count = 0


def new_id() -> str:
    """A UUIDv7: ids of one process sort in the order they were made.

    Source: RFC 9562, section 5.7; the 12 bits after the milliseconds count, method 1 of 6.2.
    """
    global _last_ms, _count
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last_ms:
            _last_ms, _count = now, int.from_bytes(os.urandom(1), "big")
        else:
            _count += 1
            if _count == 0x1000:
                _last_ms, _count = _last_ms + 1, 0
        ms, count = _last_ms, _count
    low = int.from_bytes(os.urandom(8), "big") >> 2
    return str(uuid.UUID(int=ms << 80 | 0x7 << 76 | count << 64 | 0b10 << 62 | low))


def canonical(value: Any, what: str = "value") -> str:
    """JSON text that is equal for equal values.

    Raises ArgumentError, which names ``what``, for what JSON cannot hold: other types, keys that
    are no strings, NaN and infinities; and for more than 100 levels.
    """
    _check(value, what)
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what}: JSON wanted ({error})") from None


def digest(*parts: str) -> bytes:
    """BLAKE2b-128 over the parts, each with its length in front."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.digest()


def version_digest(
    id: str,
    kind: str,
    text: str,
    content: str | None,
    metadata: str,
    parent_id: str | None,
    edges: str | None,
    acl: str | None,
    importance: float,
    creator: str | None,
    derived_from: str | None,
    author: str | None,
    source: str | None,
    at: float,
    deleted: bool,
    parents: bytes | None,
) -> bytes:
    """BLAKE2b-256 over a version of a cube: the same in every store, and of no other version.

    Args:
        text:    counts where there is no content: else it is made of it.
        content, metadata, edges, acl, derived_from: canonical JSON texts.
        edges:   outgoing relations, [type, memory, target, weight, properties], sorted.
        parents: digests of the versions that this one was made of, one after the other.

    State and expiry belong to a cube's life, not to a version: they change without one.
    """
    parts = (
        *(id, kind, text if content is None else None, content, metadata, parent_id, edges, acl),
        float(importance),
        *(creator, derived_from, author, source, float(at), deleted),
        "" if parents is None else parents.hex(),
    )
    whole = json.dumps(parts, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def adapters_of(model: Any) -> str:
    """Identity of the adapters that a forward pass of this thread computes with; "" for none."""
    source = getattr(model, ADAPTERS, None)
    return "" if source is None else str(source.identity())


def _check(value: Any, what: str) -> None:
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > _DEEPEST:
            raise ArgumentError(f"{what}: at most {_DEEPEST} lists and dicts in one another wanted")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise ArgumentError(f"{what}: keys that are strings wanted, got {key!r}")
            stack.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list | tuple):
            stack.extend((inner, depth + 1) for inner in item)
