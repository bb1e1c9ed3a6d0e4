"""What a principal may call: every public verb, and what it asks for before it runs.

A verb that is not here is closed to principals: what is new has to be let in. Most check rights
themselves, through the scope of the memory they ask; the others are checked here, and run as the
owner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from memos.governance import gates

Gate = Callable[[Any, Any, Mapping[str, Any]], Any]  # (mos or memory, actor, arguments)
After = Callable[[Any, Any, Mapping[str, Any], Any], Any]  # the same, and what came back


@dataclass(frozen=True)
class Verb:
    """How a principal may call something.

    Args:
        gate:     raises where it may not; None: the call checks by itself.
        as_owner: the gate has checked everything: the call runs without the principal's rights.
        after:    makes of what the call returned what the principal is given.
        author:   the call takes who makes a version: the principal.
        memory:   argument that names the memory, for the audit record; query: that asks.
        closed:   arguments that a principal cannot give.
        detail:   arguments that stand in the audit record.
    """

    gate: Gate | None = None
    as_owner: bool = False
    after: After | None = None
    author: bool = False
    memory: str | None = None
    query: str | None = None
    closed: tuple[str, ...] = ()
    detail: tuple[str, ...] = ()


OPEN = Verb()

_ADMIN = Verb(gates.admin_of("memory"), memory="memory")
_CUBE = Verb(gates.admin_of_cube, as_owner=True, memory="memory_name", detail=("id",))

# Of MOS.
MOS_VERBS: dict[str, Verb] = {
    "add": Verb(memory="memory_name"),
    "add_many": Verb(memory="memory_name"),
    "get": Verb(memory="memory_name"),
    "update": Verb(memory="memory_name"),
    "delete": Verb(memory="memory_name"),
    "history": Verb(memory="memory_name"),
    "relate": OPEN,
    "retrieve": Verb(memory="memory_name", query="query"),
    "context": Verb(query="query"),
    "explain": OPEN,
    "stats": OPEN,
    "expire": OPEN,
    "memory": OPEN,
    "grant": Verb(memory="memory", detail=("principal", "right", "id")),
    "revoke": Verb(memory="memory", detail=("principal", "right", "id")),
    "trace": OPEN,
    # Versions.
    "diff": Verb(
        gates.readable_versions("a", "b"), after=gates.shown_difference, memory="memory_name"
    ),
    "rollback": Verb(gates.readable_versions("version"), memory="memory_name"),
    "clone": Verb(memory="memory_name"),
    "branch": Verb(gates.admin_of("memory"), as_owner=True, after=gates.branched, memory="memory"),
    "merge": Verb(gates.admin_of("source", "into"), as_owner=True, author=True, memory="into"),
    "at": OPEN,
    # Life.
    "use": OPEN,
    "archive": _CUBE,
    "freeze": replace(_CUBE, after=gates.read_again),
    "thaw": replace(_CUBE, after=gates.read_again),
    "pin": _CUBE,
    "uses": _CUBE,
    "transitions": _CUBE,
    "undo_merge": replace(_CUBE, after=gates.read_again),
    "purge": Verb(gates.admin_of_what_is_purged, as_owner=True, memory="memory", detail=("id",)),
    "sweep": replace(_ADMIN, as_owner=True),
    "find_duplicates": _ADMIN,
    "merge_duplicates": replace(_ADMIN, as_owner=True, after=gates.read_again),
    "settle_facts": replace(_ADMIN, as_owner=True),
    "distil": Verb(gates.admin_of("memory", "into"), as_owner=True, memory="into"),
    # Files check by themselves.
    "export": OPEN,
    "import_": OPEN,
}

_DECLARATIVE = {
    **dict.fromkeys(("add", "add_many", "get", "update", "delete", "history"), OPEN),
    **dict.fromkeys(("cubes", "relate", "expire", "stats"), OPEN),
}
_TREE = {
    **dict.fromkeys(("roots", "children", "ancestors", "path", "siblings"), OPEN),
    **dict.fromkeys(("descendants", "relatives", "move", "add_document"), OPEN),
    "with_relatives": Verb(closed=("scope",)),
    "export_text": OPEN,
}
_GRAPH = {
    **dict.fromkeys(("nodes", "neighbourhood", "shortest_path", "pagerank", "degree"), OPEN),
    "set_properties": OPEN,
}
_PARAMETRIC = {
    **dict.fromkeys(("use", "use_batch", "prefetch", "pin", "adapter", "named"), OPEN),
    **dict.fromkeys(("export", "combine", "merge_into_base", "learn"), OPEN),
}
_KV = {
    "begin": Verb(detail=("session",)),
    "retrieve": Verb(query="query"),
    **dict.fromkeys(("add", "get", "has", "history", "update", "delete"), OPEN),
    **dict.fromkeys(("pin", "compress", "stats", "sessions"), OPEN),
}

# Of memories, by kind.
MEMORY_VERBS: dict[str, dict[str, Verb]] = {
    "text": _DECLARATIVE,
    "vector": _DECLARATIVE,
    "tree": {**_DECLARATIVE, **_TREE},
    "graph": {**_DECLARATIVE, **_GRAPH},
    "parametric": {**_DECLARATIVE, **_PARAMETRIC},
    "kv_cache": _KV,
}
# What may be read of a memory object beside its verbs.
ATTRIBUTES = ("name", "description", "kind", "dim", "metric", "dtype", "storage_backend")
