"""Three-way merges of cubes, as plain data.

A version is a dict of fields; two sides that began with the same version are merged field by field.
A field that only one side changed is that side's; one that both changed to different values is a
conflict, which a policy decides or nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memos.cube.identity import canonical
from memos.errors import ArgumentError

Fields = dict[str, Any]
DELETED = "deleted"  # the field that says that a cube is gone
POLICIES = ("ours", "theirs", "newest", "both")


class _Absent:
    """A field that is not there."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Side(NamedTuple):
    """One side of a cube: its last version.

    Args:
        at:     seconds since 1970.
        digest: of the version.
    """

    fields: Fields
    at: float
    digest: str


@dataclass(frozen=True)
class Conflict:
    """A field that both sides changed to different values.

    Args:
        id:    of the cube.
        field: "content", "metadata.KEY", "importance", "parent_id", "deleted", ...
        base, ours, theirs: its values; ``ABSENT`` where it is not there.
    """

    id: str
    field: str
    base: Any
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return (
            f"{self.id}: {self.field} was {self.base!r}, ours {self.ours!r}, theirs {self.theirs!r}"
        )


Decide = Callable[[Conflict], Any]
Policy = str | Decide | None


@dataclass
class Merged:
    """What became of one cube.

    Args:
        fields:    merged; fields in conflict that nobody decided are ours.
        conflicts: all of them, decided or not.
        twin:      fields of a second cube that keeps their side, under the policy "both".
    """

    fields: Fields
    conflicts: list[Conflict] = field(default_factory=list)
    twin: Fields | None = None


def checked(policy: Policy) -> Policy:
    """The policy. Raises ArgumentError for one that is none."""
    if policy is not None and not callable(policy) and policy not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise ArgumentError(f"policy: one of {names}, a callable or None wanted, got {policy!r}")
    return policy


def merge(id: str, base: Fields, ours: Side, theirs: Side, policy: Policy = None) -> Merged:
    """Merge two sides of a cube that began with the same fields.

    Args:
        base:   {} where they have nothing in common.
        policy: "ours", "theirs"; "newest": of the side that was changed last; "both": ours, and a
            second cube that keeps theirs; or what gives the value of a conflict. None: conflicts
            stay undecided.
    """
    if (DELETED in ours.fields) != (DELETED in theirs.fields):
        return _one_gone(id, base, ours, theirs, policy)
    conflicts: list[Conflict] = []
    found: Fields = {}
    for name in sorted({*base, *ours.fields, *theirs.fields}):
        was, mine, other = (x.get(name, ABSENT) for x in (base, ours.fields, theirs.fields))
        value = other if same(was, mine) else mine
        if not (same(mine, other) or same(was, other) or same(was, mine)):
            conflicts.append(Conflict(id, name, was, mine, other))
        if value is not ABSENT:
            found[name] = value
    if not conflicts or policy is None:
        return Merged(found, conflicts)
    if policy == "both":
        return Merged(found, conflicts, dict(theirs.fields))
    return Merged(_decided(found, conflicts, _decider(policy, ours, theirs)), conflicts)


def _one_gone(id: str, base: Fields, ours: Side, theirs: Side, policy: Policy) -> Merged:
    """Deleted on one side: a conflict where the other one has changed it."""
    is_ours = DELETED in ours.fields
    gone, there = (ours, theirs) if is_ours else (theirs, ours)
    if same(there.fields, base):
        return Merged(dict(gone.fields))
    if same(gone.fields, base):  # it came back on the other side
        return Merged(dict(there.fields))
    mine, other = (x.fields.get(DELETED, ABSENT) for x in (ours, theirs))
    conflict = Conflict(id, DELETED, ABSENT, mine, other)
    if policy is None:
        return Merged(dict(ours.fields), [conflict])
    if policy == "both":  # what is there is kept
        return Merged(dict(there.fields), [conflict])
    if callable(policy):
        goes = policy(conflict) is True
    else:
        goes = _takes_ours(str(policy), ours, theirs) == is_ours
    return Merged(dict((gone if goes else there).fields), [conflict])


def _decided(found: Fields, conflicts: Iterable[Conflict], decide: Decide) -> Fields:
    fields = dict(found)
    for conflict in conflicts:
        value = decide(conflict)
        if value is ABSENT:
            fields.pop(conflict.field, None)
        else:
            fields[conflict.field] = value
    return fields


def _decider(policy: Policy, ours: Side, theirs: Side) -> Decide:
    if callable(policy):
        return policy
    takes_ours = _takes_ours(str(policy), ours, theirs)
    return lambda conflict: conflict.ours if takes_ours else conflict.theirs


def _takes_ours(policy: str, ours: Side, theirs: Side) -> bool:
    if policy == "newest":  # of two at the same moment both sides choose the same one
        return (ours.at, ours.digest) >= (theirs.at, theirs.digest)
    return policy == "ours"


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 is not true, and 1.0 not 1."""
    if one is ABSENT or other is ABSENT:
        return one is other
    return canonical(one) == canonical(other)


def diff(old: Fields, new: Fields) -> dict[str, tuple[Any, Any]]:
    """Field -> (before, after) of all that differ."""
    return {
        name: (old.get(name, ABSENT), new.get(name, ABSENT))
        for name in sorted({*old, *new})
        if not same(old.get(name, ABSENT), new.get(name, ABSENT))
    }


def ancestors(digest: str, parents: Mapping[str, Sequence[str]]) -> set[str]:
    """The version itself and all that it was made of."""
    found: set[str] = set()
    stack = [digest]
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack += parents.get(one, ())
    return found


def common_ancestor(
    ours: str, theirs: str, parents: Mapping[str, Sequence[str]], at: Mapping[str, float]
) -> str | None:
    """The last version that both sides were made of; None: they have nothing in common.

    Args:
        parents: of every known version.
        at:      when each was made; of several last ones the newest is taken, then that of the
            greater digest.
    """
    both = ancestors(ours, parents) & ancestors(theirs, parents) & at.keys()
    older: set[str] = set()
    for one in both:
        for parent in parents.get(one, ()):
            older |= ancestors(parent, parents)
    last = both - older
    return max(last, key=lambda one: (at[one], one)) if last else None
