"""Two memories of one kind merged: cube by cube, each with what both sides began with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memos.cube.fields import Body, from_fields, to_fields
from memos.cube.merge import (
    DELETED,
    Conflict,
    Fields,
    Merged,
    Policy,
    Side,
    ancestors,
    checked,
    common_ancestor,
    merge,
    same,
)
from memos.errors import ArgumentError
from memos.memories.items import KEPT
from memos.memories.versions import Entry, entries, set_relations, write

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from memos.memories.declarative import DeclarativeMemory


@dataclass(frozen=True)
class Merge:
    """What a merge did, or would have to be told first.

    Args:
        source, into: names of the memories.
        added, changed, deleted: ids of the cubes of ``into``.
        conflicts: decided by the policy; without one, why nothing was written.
        applied:  whether it was written.
    """

    source: str
    into: str
    added: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    applied: bool

    def __str__(self) -> str:
        did = "merged" if self.applied else "not merged"
        counts = (
            f"{len(self.added)} added, {len(self.changed)} changed, {len(self.deleted)} deleted, "
            f"{len(self.conflicts)} conflicts"
        )
        lines = [f"{self.source} -> {self.into}: {did}; {counts}"]
        return "\n".join([*lines, *(f"  {conflict}" for conflict in self.conflicts)])


@dataclass
class _Cube:
    """One cube of the source, and what becomes of it."""

    seq: int
    ours: Entry | None
    theirs: Entry
    merged: Merged
    base: Fields = field(default_factory=dict)

    @property
    def is_gone(self) -> bool:
        return DELETED in self.merged.fields


def merge_memories(
    source: DeclarativeMemory,
    into: DeclarativeMemory,
    policy: Policy = None,
    author: str | None = None,
) -> Merge:
    """Bring what changed in one memory into another; see ``MOS.merge``."""
    checked(policy)
    if source.kind != into.kind or source is into:
        raise ArgumentError(
            f"source, into: two memories of one kind wanted, got {source.name!r} ({source.kind}) "
            f"and {into.name!r} ({into.kind})"
        )
    with into.records.database.write() as connection:
        plan = _Plan(connection, source, into, policy)
        plan.make()
        if plan.conflicts and policy is None:
            return plan.report(False)
        plan.apply(author)
        return plan.report(True)


class _Plan:
    def __init__(
        self,
        connection: Connection,
        source: DeclarativeMemory,
        into: DeclarativeMemory,
        policy: Policy,
    ) -> None:
        self.connection, self.source, self.into, self.policy = connection, source, into, policy
        self.cubes: dict[str, _Cube] = {}  # those that the merge changes
        self.conflicts: list[Conflict] = []
        self.added: list[str] = []
        self.changed: list[str] = []
        self.deleted: list[str] = []
        self.edges: list[tuple[int, Any]] = []  # of added cubes, whose targets come later
        self.ours = self._histories(into)
        self.theirs = self._histories(source)

    def report(self, applied: bool) -> Merge:
        return Merge(
            self.source.name,
            self.into.name,
            tuple(self.added),
            tuple(self.changed),
            tuple(self.deleted),
            tuple(self.conflicts),
            applied,
        )

    def _histories(self, memory: DeclarativeMemory) -> dict[str, tuple[int, list[Entry]]]:
        found = memory.table.all_ids(self.connection)
        history = entries(self.connection, memory, list(found.values()))
        return {id: (seq, history[seq]) for id, seq in found.items()}

    # What becomes of each cube.

    def make(self) -> None:
        for id, (seq, history) in self.theirs.items():
            cube = self._one(id, seq, history)
            if cube is not None:
                self.cubes[id] = cube
        self._keep_what_is_needed()
        self._break_cycles()
        self.conflicts = [c for cube in self.cubes.values() for c in cube.merged.conflicts]

    def _one(self, id: str, seq: int, history: list[Entry]) -> _Cube | None:
        theirs = history[-1]
        if id not in self.ours:
            if theirs.body.is_deleted:
                return None
            return _Cube(seq, None, theirs, Merged(_fields(theirs.body)))
        mine = self.ours[id][1]
        ours = mine[-1]
        if _is_purged(mine):
            return None
        known = {entry.digest: entry for entry in (*mine, *history)}
        parents = {digest: entry.parents for digest, entry in known.items()}
        if theirs.digest in ancestors(ours.digest, parents):
            return None
        times = {digest: entry.at for digest, entry in known.items()}
        begin = common_ancestor(ours.digest, theirs.digest, parents, times)
        base = {} if begin is None else _fields(known[begin].body)
        mine_now, theirs_now = (
            Side(_fields(entry.body), entry.at, entry.digest) for entry in (ours, theirs)
        )
        are_gone = DELETED in mine_now.fields and DELETED in theirs_now.fields
        if are_gone or same(theirs_now.fields, base):
            return None
        merged = merge(id, base, mine_now, theirs_now, self.policy)
        return _Cube(seq, ours, theirs, merged, base)

    def _keep_what_is_needed(self) -> None:
        """What a living cube hangs on is deleted: it is kept, or the cube goes with it."""
        while True:
            lost = self._first_lost()
            if lost is None:
                return
            id, need = lost
            if not self._revive(id, need):
                cube = self.cubes.get(id)
                if cube is None:  # ours alone hangs on what they deleted
                    seq, history = self.ours[id]
                    cube = self.cubes[id] = _Cube(seq, history[-1], history[-1], Merged({}))
                cube.merged = Merged({DELETED: True}, cube.merged.conflicts)

    def _first_lost(self) -> tuple[str, str] | None:
        for id, fields in self._result():
            for need in needs(fields):
                if not self._lives(need):
                    return id, need
        return None

    def _result(self) -> Iterable[tuple[str, Fields]]:
        """Fields of every cube that lives after the merge."""
        for id, cube in self.cubes.items():
            if not cube.is_gone:
                yield id, cube.merged.fields
        if not any(cube.is_gone for cube in self.cubes.values()):
            return
        for id, (_, history) in self.ours.items():
            if id not in self.cubes and not history[-1].body.is_deleted:
                yield id, _fields(history[-1].body)

    def _lives(self, id: str) -> bool:
        if id in self.cubes:
            return not self.cubes[id].is_gone
        return id in self.ours and not self.ours[id][1][-1].body.is_deleted

    def _revive(self, id: str, need: str) -> bool:
        """Whether a deleted cube that another one hangs on is kept."""
        mine, other = self.ours.get(need), self.theirs.get(need)
        ours = mine[1][-1] if mine else None
        theirs = other[1][-1] if other else None
        there = next((e for e in (ours, theirs) if e is not None and not e.body.is_deleted), None)
        conflict = Conflict(need, DELETED, None, ours is None or ours.body.is_deleted,
                            theirs is None or theirs.body.is_deleted)  # fmt: skip
        cube = self.cubes.get(need)
        if cube is None and other is not None:
            assert theirs is not None
            cube = self.cubes[need] = _Cube(other[0], ours, theirs, Merged({DELETED: True}))
        if cube is None:
            return False
        if not any(c.field == DELETED for c in cube.merged.conflicts):
            cube.merged.conflicts.append(conflict)
        if there is None or (mine is not None and _is_purged(mine[1])):
            return False
        if callable(self.policy):
            keeps = self.policy(conflict) is not True
        elif self.policy == "newest":
            gone = theirs if there is ours else ours
            hanging = self.cubes[id].theirs if id in self.cubes else self.ours[id][1][-1]
            keeps = gone is None or hanging.at >= gone.at
        else:
            keeps = self.policy in (None, "both") or (self.policy == "ours") == (there is ours)
        if keeps:
            cube.merged.fields = _fields(there.body)
        return keeps

    def _break_cycles(self) -> None:
        """Moves of both sides that would put a cube above itself: each cube stays where it is."""
        above = {id: fields.get("parent_id") for id, fields in self._result()}
        for id, (_, history) in self.ours.items():
            if id not in self.cubes and not history[-1].body.is_deleted:
                above[id] = history[-1].body.parent_id
        for id, cube in self.cubes.items():
            if cube.is_gone or not _is_on_cycle(id, above):
                continue
            mine = None if cube.ours is None else cube.ours.body.parent_id
            theirs = cube.theirs.body.parent_id
            if cube.ours is None or same(mine, theirs):
                continue
            cube.merged.conflicts.append(
                Conflict(id, "parent_id", cube.base.get("parent_id"), mine, theirs)
            )
            cube.merged.fields["parent_id"] = above[id] = mine

    # Writing.

    def apply(self, author: str | None) -> None:
        self.into._share(self.source, (cube.theirs.body.content for cube in self.cubes.values()))
        said = {"author": author, "source": f"merge of {self.source.name}"}
        new = {id: cube for id, cube in self.cubes.items() if not cube.is_gone}
        order = _ordered({id: cube.merged.fields for id, cube in new.items()})
        for id in order:
            cube = new[id]
            if cube.ours is None:
                self._add(id, cube, cube.merged.fields)
            else:
                self._change(id, cube, said)
        for id in order:
            if (twin := new[id].merged.twin) is not None:
                name = f"{id}~{new[id].theirs.digest[:8]}"
                if name not in self.ours and name not in self.theirs:
                    self._add(name, new[id], twin)
        for seq, edges in self.edges:
            set_relations(self.connection, self.into, seq, (), edges)
        for id, cube in self.cubes.items():
            if not cube.is_gone or cube.ours is None:
                continue
            if cube.ours.body.is_deleted:
                seq, digest = self.ours[id][0], bytes.fromhex(cube.theirs.digest)
                self.into.table.stay_deleted(self.connection, seq, self.into.now(), author, digest)
                continue
            if self._is_there(id):
                self.into.delete(id, author=author)
            self.deleted.append(id)

    def _is_there(self, id: str) -> bool:
        return self.into.table.find(self.connection, id, self.into.scope()) is not None

    def _add(self, id: str, cube: _Cube, fields: Fields) -> None:
        from memos.records.writes import New

        body = from_fields(fields)
        row = next(iter(self.source.table.rows(self.connection, [cube.seq])))
        digest = bytes.fromhex(cube.theirs.digest)
        kept = New(id, row.kind, body.text, {}, 0.0, body.content, parents=digest)
        kept.edges = body.edges
        item = {
            "content": body.text if body.content is None else body.content,
            "metadata": body.metadata,
            "importance": body.importance,
            "id": id,
            "parent_id": body.parent_id,
            "source": row.source,
            "creator": row.creator,
            "derived_from": json.loads(row.derived_from) if row.derived_from else (),
            "thread": row.thread,
            "acl": None if row.acl is None else json.loads(row.acl),
            KEPT: kept,
        }
        self.into._store([{k: v for k, v in item.items() if v is not None}], {})
        self.edges.append((self.into.table.ids(self.connection, [id])[id], body.edges))
        self.added.append(id)

    def _change(self, id: str, cube: _Cube, said: Mapping[str, Any]) -> None:
        assert cube.ours is not None
        seq = self.ours[id][0]
        body = from_fields(cube.merged.fields)
        digest = bytes.fromhex(cube.theirs.digest)
        was_gone = cube.ours.body.is_deleted
        if was_gone:
            self.into.table.revive(self.connection, seq, self.into.now(), said["author"])
        write(self.connection, self.into, seq, body, parents=digest, is_revived=was_gone, **said)
        if body.parent_id != cube.ours.body.parent_id and not cube.ours.body.is_deleted:
            self.into.move(id, body.parent_id, author=said["author"])  # type: ignore[attr-defined]
        self.changed.append(id)


def _is_purged(history: list[Entry]) -> bool:
    """Whether a cube was forgotten for good: no merge brings it back."""
    return len(history) == 1 and history[0].body.is_deleted


def needs(fields: Fields) -> list[str]:
    """Ids of cubes of the same memory without which this one cannot be."""
    found = [fields.get(name) for name in ("parent_id", "content.source_id", "content.target_id")]
    return [id for id in found if isinstance(id, str)]


def _fields(body: Body) -> Fields:
    """What is merged: who may see a cube is not, it stays as it is."""
    fields = to_fields(body)
    fields.pop("acl", None)
    return fields


def _is_on_cycle(id: str, above: Mapping[str, str | None]) -> bool:
    seen = set()
    one = above.get(id)
    while one is not None and one not in seen:
        if one == id:
            return True
        seen.add(one)
        one = above.get(one)
    return False


def _ordered(cubes: Mapping[str, Fields]) -> list[str]:
    """Ids, each after those that it hangs on."""
    done: dict[str, None] = {}

    def visit(id: str, way: tuple[str, ...]) -> None:
        for need in needs(cubes[id]):
            if need in cubes and need not in done and need not in way:
                visit(need, (*way, id))
        done[id] = None

    for id in cubes:
        if id not in done:
            visit(id, (id,))
    return list(done)
