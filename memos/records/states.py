"""The life of a cube: its states, and the one table of the moves between them.

    CREATED -> ACTIVATED -> MERGED -> ARCHIVED -> FROZEN | DELETED

Who moves cubes, and what is recorded of it, stands in life.py; what a sweep chooses in
memos/lifecycle.
"""

from __future__ import annotations

from dataclasses import dataclass

from memos.errors import ArgumentError

CREATED, ACTIVATED, MERGED = "CREATED", "ACTIVATED", "MERGED"
ARCHIVED, FROZEN, DELETED = "ARCHIVED", "FROZEN", "DELETED"
STATES = (CREATED, ACTIVATED, MERGED, ARCHIVED, FROZEN, DELETED)
HOT = (CREATED, ACTIVATED, FROZEN)  # in the indexes
COLD = (MERGED, ARCHIVED)  # rows only

# What makes a cube move.
USE, AGE, CAPACITY, IMPORTANCE = "use", "age", "capacity", "importance"
TTL, MERGE, UNDO, CALL = "ttl", "merge", "undo", "call"
BRANCH = "branch"  # a branch, merged into this memory, still has it

# What must hold for it: see life.GUARDS.
UNPINNED = "it is not pinned"
NOTHING_LEFT = "nothing in the indexes hangs on it, or that moves too"

# What happens in storage: see life.EFFECTS.
STAYS = "stays where it is"
LEAVES = "leaves full text and vector index, and the fast tiers; its rows stay"
RETURNS = "returns to full text and vector index"
GOES = "leaves every index, its vector is dropped; its versions stay, until a purge"


@dataclass(frozen=True)
class Edge:
    """One move that is legal.

    Args:
        old, new: states.
        triggers: what may make it.
        guards:   what must hold.
        effect:   on storage.
    """

    old: str
    new: str
    triggers: tuple[str, ...]
    guards: tuple[str, ...]
    effect: str


_SWEPT = (AGE, CAPACITY, IMPORTANCE, CALL)

EDGES = (
    Edge(CREATED, ACTIVATED, (USE,), (), STAYS),
    Edge(CREATED, MERGED, (MERGE,), (UNPINNED, NOTHING_LEFT), LEAVES),
    Edge(CREATED, ARCHIVED, _SWEPT, (UNPINNED, NOTHING_LEFT), LEAVES),
    Edge(CREATED, FROZEN, (CALL,), (), STAYS),
    Edge(CREATED, DELETED, (CALL, TTL, UNDO), (), GOES),
    Edge(ACTIVATED, MERGED, (MERGE,), (UNPINNED, NOTHING_LEFT), LEAVES),
    Edge(ACTIVATED, ARCHIVED, _SWEPT, (UNPINNED, NOTHING_LEFT), LEAVES),
    Edge(ACTIVATED, FROZEN, (CALL,), (), STAYS),
    Edge(ACTIVATED, DELETED, (CALL, TTL, UNDO), (), GOES),
    Edge(MERGED, CREATED, (UNDO,), (), RETURNS),
    Edge(MERGED, ACTIVATED, (UNDO,), (), RETURNS),
    Edge(MERGED, ARCHIVED, (AGE, CALL), (), STAYS),
    Edge(MERGED, DELETED, (CALL, TTL), (), GOES),
    Edge(ARCHIVED, ACTIVATED, (USE, CALL), (), RETURNS),
    Edge(ARCHIVED, FROZEN, (CALL,), (), RETURNS),
    Edge(ARCHIVED, DELETED, (AGE, CALL, TTL, UNDO), (), GOES),
    Edge(FROZEN, ACTIVATED, (CALL,), (), STAYS),
    Edge(DELETED, CREATED, (BRANCH,), (), RETURNS),
)
_BY_ENDS = {(edge.old, edge.new): edge for edge in EDGES}


def edge_of(old: str, new: str, trigger: str, what: str = "state") -> Edge:
    """The move from ``old`` to ``new`` by this trigger.

    Raises ArgumentError, which names ``what`` and the moves that are legal.
    """
    edge = _BY_ENDS.get((old, new))
    if edge is not None and trigger in edge.triggers:
        return edge
    raise ArgumentError(f"{what}: {_allowed(old)}; {new} by {trigger} is none of them")


def is_edge(old: str, new: str, trigger: str) -> bool:
    """Whether this move is in the table."""
    edge = _BY_ENDS.get((old, new))
    return edge is not None and trigger in edge.triggers


def _allowed(old: str) -> str:
    ways = [f"{e.new} (by {', '.join(e.triggers)})" for e in EDGES if e.old == old]
    return f"{old}, from where it moves to {' or '.join(ways)}" if ways else f"{old} for good"
