"""Access: what a principal is shown, may do, and can find out, against a model of the rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos import MOS, GeneralTextMemory, GraphMemory, TreeTextMemory
from memos.errors import NotFoundError
from tests.access_model import NAMES, PRINCIPALS, RIGHTS, Clock, Cube, World, embed

WORDS = ("lake", "swim", "garden", "key", "vault", "letter", "winter", "bread")


def filled() -> MOS:
    mos = MOS(clock=Clock())
    mos.register_memory(GeneralTextMemory("notes", embedder=embed, on_duplicate="keep"))
    mos.register_memory(TreeTextMemory("book", embedder=embed, on_duplicate="keep"))
    mos.register_memory(GraphMemory("people", embedder=None))
    return mos


# Random histories.

_name = st.sampled_from(NAMES)
_rights = st.lists(st.sampled_from(RIGHTS), min_size=1, max_size=2, unique=True)
_acl = st.one_of(
    st.none(),
    st.builds(
        lambda lists, inherit: {**lists, "inherit": inherit},
        st.dictionaries(st.sampled_from(RIGHTS), st.lists(_name, max_size=2), max_size=2),
        st.booleans(),
    ),
)
_nth = st.integers(0, 30)
_step = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(("notes", "book", "people")), _acl, _nth),
    st.tuples(st.just("link"), _nth, _nth, _acl),
    st.tuples(st.just("relate"), _nth, _nth),
    st.tuples(st.just("list"), _nth, _acl),
    st.tuples(st.just("grant"), st.sampled_from(("notes", "book", "people", "*")), _name, _rights),
    st.tuples(st.just("revoke"), st.sampled_from(("notes", "book", "people", "*")), _name, _rights),
    st.tuples(st.just("share"), _nth, _name, _rights),
    st.tuples(st.just("unshare"), _nth, _name, _rights),
    st.tuples(st.just("member"), st.sampled_from(NAMES[3:5]), st.sampled_from(NAMES[:5])),
    st.tuples(st.just("leave"), st.sampled_from(NAMES[3:5]), st.sampled_from(NAMES[:5])),
    st.tuples(st.just("delete"), _nth),
    st.tuples(st.just("move"), _nth, _nth),
    st.tuples(st.just("look"), st.sampled_from(PRINCIPALS)),
)


class History:
    """A MOS and a model of it, taken through the same steps."""

    def __init__(self) -> None:
        self.mos, self.world = filled(), World()
        self.edges: set[tuple[str, str]] = set()

    def pick(self, nth: int, *memories: str, nodes: bool = False) -> str | None:
        found = [
            c.id
            for c in self.world.cubes.values()
            if c.alive and (not memories or c.memory in memories) and not (nodes and c.ends)
        ]
        return found[nth % len(found)] if found else None

    def take(self, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(*step[1:])

    def add(self, memory: str, acl: Any, nth: int) -> None:
        id, parent = f"{memory}{len(self.world.cubes)}", None
        content: Any = f"{WORDS[nth % 8]} and {WORDS[nth % 5]} in room {id}"
        if memory == "people":
            content = {"type": "node", "label": "Person", "properties": {"name": id}}
        if memory == "book" and nth % 3:
            parent = self.pick(nth, "book")
        self.mos.add(memory, content, {"kind": "x"}, acl=acl, id=id, parent_id=parent)
        self.world.cubes[id] = Cube(id, memory, acl, parent)

    def link(self, a: int, b: int, acl: Any) -> None:
        ends = [self.pick(a, "people", nodes=True), self.pick(b, "people", nodes=True)]
        if None in ends:
            return
        id = f"edge{len(self.world.cubes)}"
        content = {"type": "relationship", "label": "KNOWS", "properties": {"n": id}}
        content |= {"source_id": ends[0], "target_id": ends[1]}
        self.mos.add("people", content, acl=acl, id=id)
        self.world.cubes[id] = Cube(id, "people", acl, None, (str(ends[0]), str(ends[1])))

    def relate(self, a: int, b: int) -> None:
        one, other = self.pick(a, "notes", "book"), self.pick(b, "notes", "book")
        if one is not None and other is not None and one != other:
            self.mos.relate(one, "supports", other)
            self.edges.add((one, other))

    def list(self, nth: int, acl: Any) -> None:
        id = self.pick(nth)
        if id is not None and acl is not None:
            self.mos.update(self.world.cubes[id].memory, id, acl=acl)
            self.world.cubes[id].acl = acl

    def grant(self, memory: str, name: str, rights: list[str]) -> None:
        self.mos.grant(name, rights, memory)
        self.world.grants.setdefault((memory, name), set()).update(rights)

    def revoke(self, memory: str, name: str, rights: list[str]) -> None:
        self.mos.revoke(name, rights, memory)
        self.world.grants.setdefault((memory, name), set()).difference_update(rights)

    def share(self, nth: int, name: str, rights: list[str]) -> None:
        if (id := self.pick(nth)) is None:
            return
        self.mos.grant(name, rights, id=id)
        acl = dict(self.world.cubes[id].acl or {})
        if self.world.cubes[id].acl is None:
            acl["inherit"] = True
        for right in rights:
            acl[right] = [*acl.get(right, ()), name]
        self.world.cubes[id].acl = acl

    def unshare(self, nth: int, name: str, rights: list[str]) -> None:
        if (id := self.pick(nth)) is None or self.world.cubes[id].acl is None:
            return
        self.mos.revoke(name, rights, id=id)
        acl = dict(self.world.cubes[id].acl or {})
        for right in rights:
            acl[right] = [one for one in acl.get(right, ()) if one != name]
        self.world.cubes[id].acl = acl

    def member(self, group: str, member: str) -> None:
        self.mos.add_member(group, member)
        self.world.members.setdefault(group, set()).add(member)

    def leave(self, group: str, member: str) -> None:
        self.mos.remove_member(group, member)
        self.world.members.setdefault(group, set()).discard(member)

    def delete(self, nth: int) -> None:
        if (id := self.pick(nth)) is None:
            return
        cube = self.world.cubes[id]
        self.mos.delete(cube.memory, id)
        gone = {id, *self.world.below(id)}
        gone |= {c.id for c in self.world.cubes.values() if id in c.ends}
        for one in gone:
            self.world.cubes[one].alive = False

    def move(self, nth: int, to: int) -> None:
        id, parent = self.pick(nth, "book"), self.pick(to, "book")
        if id is None or parent == id or parent in self.world.below(id):
            return
        self.mos.memory("book").move(id, parent)
        self.world.cubes[id].parent = parent

    def look(self, principal: str) -> None:
        """Everything that a principal is shown is what the model says, on every path."""
        view, world = self.mos.as_principal(principal), self.world
        readable = world.readable(principal)
        seen = {
            name
            for name in ("notes", "book", "people")
            if world.on_memory(principal, name) or world.readable(principal, name)
        }
        dead = {c.id for c in world.cubes.values() if not c.alive and world.reads(principal, c.id)}
        seen_dead = {world.cubes[id].memory for id in dead}
        assert seen <= set(view.memories) == set(view.stats()["memories"])
        assert set(view.memories) - seen <= seen_dead
        for name, memory in view.memories.items():
            mine = world.readable(principal, name)
            assert {cube.id for cube in memory.cubes(None)} == mine
            assert view.stats()["memories"][name]["cubes"] == len(mine)
        for id, cube in world.cubes.items():
            self._look_at(view, principal, id, cube)
        hits = view.retrieve(query="room person and in", limit=100)
        assert {hit.id for hit in hits} <= readable
        assert {h.id for h in hits} >= {
            id for id in readable if not id.startswith(("edge", "people"))
        }
        self._trees(view, principal)
        self._graphs(view, principal)

    def _look_at(self, view: Any, principal: str, id: str, cube: Cube) -> None:
        world = self.world
        if not cube.alive or not world.reads(principal, id):
            with pytest.raises(NotFoundError):
                view.get(id)
            with pytest.raises(NotFoundError):
                view.update(cube.memory, id, metadata={"a": 1})
            if cube.alive:
                with pytest.raises(NotFoundError):
                    view.history(id)
            return
        found = view.get(id)
        assert found.parent_id == cube.parent
        near = {b for a, b in self.edges if a == id} | {a for a, b in self.edges if b == id}
        known = {one for one in near if world.cubes[one].alive and world.reads(principal, one)}
        assert {edge.target for edge in found.relations} == known
        versions = view.history(id)
        assert 1 <= len(versions) <= found.versions
        for version in versions:
            assert {edge.target for edge in version.relations} <= world.readable(principal) | {
                one for one in world.cubes if world.reads(principal, one)
            }

    def _trees(self, view: Any, principal: str) -> None:
        mine = self.world.readable(principal, "book")
        if "book" not in view.memories:
            return
        book = view.memory("book")
        roots = {id for id in mine if self.world.cubes[id].parent is None}
        assert {cube.id for cube in book.roots()} == roots
        for id in mine:
            below = self.world.below(id) & mine
            assert {cube.id for cube in book.descendants(id)} == below
            children = {one for one in below if self.world.cubes[one].parent == id}
            assert {cube.id for cube in book.children(id)} == children
            for hit in view.retrieve(
                "book", "room", 50, include_descendants=True, include_siblings=True,
                include_ancestors=True,
            ):  # fmt: skip
                assert {c.id for c in (*hit.descendants, *hit.siblings, *hit.ancestors)} <= mine
                assert {c.id for c in hit.descendants} == self.world.below(hit.id) & mine
            break

    def _graphs(self, view: Any, principal: str) -> None:
        mine = self.world.readable(principal, "people")
        if "people" not in view.memories:
            return
        people = view.memory("people")
        nodes = {id for id in mine if not self.world.cubes[id].ends}
        assert {cube.id for cube in people.nodes(limit=1000)} == nodes
        for id in sorted(nodes)[:4]:
            at = {one for one in mine - nodes if id in self.world.cubes[one].ends}
            assert people.degree(id) == len(at)
            found = people.neighbourhood(id, 1)
            assert {cube.id for cube in found.relationships} <= mine
            assert {cube.id for cube in found.nodes} == {id}.union(
                *(self.world.cubes[one].ends for one in at)
            )


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.lists(_step, min_size=5, max_size=30))
def test_random_rights_against_a_model(steps: list[Any]) -> None:
    history = History()
    with history.mos:
        for step in steps:
            history.take(step)
        for principal in PRINCIPALS:
            history.look(principal)
