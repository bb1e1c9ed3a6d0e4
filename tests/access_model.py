"""What a principal may see and do, in plain Python: what the tests of access compare with."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy

from memos.retrieval.query import words_of

RIGHTS = ("read", "write", "share", "admin")
PRINCIPALS = ("user:ann", "user:bob", "agent:tutor")
GROUPS = ("group:staff", "group:all")
NAMES = (*PRINCIPALS, *GROUPS, "anyone")
DIM = 16


def embed(texts: list[str]) -> Any:
    """Vectors of the words: equal words, equal direction."""
    rows = []
    for text in texts:
        vector = numpy.full(DIM, 1e-3)
        for word in words_of(text):
            vector += numpy.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIM)
        rows.append(vector / numpy.linalg.norm(vector))
    return numpy.array(rows, numpy.float32)


class Clock:
    """Seconds, one more with each look."""

    def __init__(self, start: float = 1.7e9) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 1.0


@dataclass
class Cube:
    id: str
    memory: str
    acl: dict[str, Any] | None = None
    parent: str | None = None
    ends: tuple[str, ...] = ()
    alive: bool = True


@dataclass
class World:
    """Memories, cubes, grants and groups, and who may do what by the rules of docs/governance."""

    cubes: dict[str, Cube] = field(default_factory=dict)
    grants: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # (memory, name)
    members: dict[str, set[str]] = field(default_factory=dict)

    def names(self, principal: str) -> set[str]:
        found = {principal, "anyone"}
        while True:
            more = {g for g, inside in self.members.items() if inside & found} - found
            if not more:
                return found
            found |= more

    def on_memory(self, principal: str, memory: str) -> set[str]:
        names = self.names(principal)
        found = {
            right
            for (where, name), rights in self.grants.items()
            if where in (memory, "*") and name in names
            for right in rights
        }
        return set(RIGHTS) if "admin" in found else found

    def on_cube(self, principal: str, id: str) -> set[str]:
        cube = self.cubes[id]
        memory = self.on_memory(principal, cube.memory)
        if "admin" in memory:
            return set(RIGHTS)
        above = memory if cube.parent is None else self.on_cube(principal, cube.parent)
        if cube.acl is None:
            return above
        names = self.names(principal)
        own = {right for right in RIGHTS if names & set(cube.acl.get(right, ()))}
        if "admin" in own:
            own = set(RIGHTS)
        return own | above if cube.acl.get("inherit") else own

    def reads(self, principal: str, id: str) -> bool:
        cube = self.cubes[id]
        if "admin" in self.on_memory(principal, cube.memory):
            return True
        if "read" not in self.on_cube(principal, id):
            return False
        if cube.parent is not None and not self.reads(principal, cube.parent):
            return False
        return all("read" in self.on_cube(principal, end) for end in cube.ends)

    def readable(self, principal: str, memory: str | None = None) -> set[str]:
        return {
            cube.id
            for cube in self.cubes.values()
            if cube.alive and memory in (None, cube.memory) and self.reads(principal, cube.id)
        }

    def below(self, id: str) -> set[str]:
        found = {c.id for c in self.cubes.values() if c.alive and c.parent == id}
        return found.union(*(self.below(one) for one in found))
