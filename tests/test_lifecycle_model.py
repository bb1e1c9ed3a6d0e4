"""Random lives of cubes, in a memory of texts and in a tree, against a plain-Python model."""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memos import MOS, GeneralTextMemory, TreeTextMemory
from memos.errors import ArgumentError, NotFoundError
from memos.lifecycle import EDGES
from memos.records.check import check
from memos.records.uses import HALF_LIFE_S

HOT = ("CREATED", "ACTIVATED", "FROZEN")
COLD = ("ARCHIVED", "MERGED")


@dataclass
class Cube:
    """What the model knows of a cube."""

    number: int
    text: str
    importance: float
    written: float
    parent: str | None = None
    expires_at: float | None = None
    state: str = "CREATED"
    is_pinned: bool = False
    uses: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)  # uses that are not written yet
    sources: tuple[str, ...] = ()
    before: str = ""  # the state before a merge
    moves: int = 0


class Lives(RuleBasedStateMachine):
    kind = "text"

    def __init__(self) -> None:
        super().__init__()
        self.now = 1e9
        self.folder = tempfile.TemporaryDirectory()
        self.open()
        self.cubes: dict[str, Cube] = {}
        self.count = 0

    def open(self) -> None:
        self.mos = MOS(Path(self.folder.name) / "store", clock=lambda: self.now)
        cls: Any = GeneralTextMemory if self.kind == "text" else TreeTextMemory
        self.memory = self.mos.register_memory(cls("m", embedder=None, clock=lambda: self.now))

    def teardown(self) -> None:
        self.the_store_is_whole()
        self.every_move_is_recorded()
        self.mos.close()
        self.folder.cleanup()

    # The model.

    def seen(self, cube: Cube) -> bool:
        """Whether it can be named."""
        over = cube.expires_at is not None and cube.expires_at <= self.now
        return cube.state != "DELETED" and (not over or cube.state == "FROZEN")

    def move(self, id: str, state: str) -> None:
        if self.cubes[id].state != state:
            self.cubes[id].state = state
            self.cubes[id].moves += 1

    def below(self, id: str) -> list[str]:
        """It and all below it that are not deleted."""
        found = [id]
        for one in found:
            found += [
                other
                for other, cube in self.cubes.items()
                if cube.parent == one and cube.state != "DELETED"
            ]
        return found

    def above(self, id: str) -> list[str]:
        found = []
        parent = self.cubes[id].parent
        while parent is not None:
            found.append(parent)
            parent = self.cubes[parent].parent
        return found

    def wake(self, id: str) -> None:
        if self.cubes[id].state in COLD:
            for one in [id, *self.above(id)]:
                if self.cubes[one].state == "ARCHIVED":
                    self.move(one, "ACTIVATED")

    def expire(self) -> None:
        doomed: set[str] = set()
        for id, cube in self.cubes.items():
            over = cube.expires_at is not None and cube.expires_at <= self.now
            if over and cube.state not in ("DELETED", "FROZEN"):
                gone = self.below(id)
                if not any(self.cubes[one].state == "FROZEN" for one in gone):
                    doomed.update(gone)
        for id in doomed:
            self.move(id, "DELETED")

    def write_uses(self) -> None:
        for id, cube in self.cubes.items():
            if cube.waiting and cube.state == "CREATED":
                self.move(id, "ACTIVATED")
            cube.uses += cube.waiting
            cube.waiting = []

    def value(self, cube: Cube) -> float:
        heat = sum(0.5 ** ((self.now - at) / HALF_LIFE_S) for at in cube.uses)
        last = max([cube.written, *cube.uses])
        return cube.importance + 0.5 * math.log2(1 + heat) + 0.5 ** ((self.now - last) / 604800.0)

    def any_id(self, number: int) -> str:
        ids = list(self.cubes)
        return ids[number % len(ids)]

    # What is done.

    @initialize(shape=st.lists(st.integers(0, 4), min_size=3, max_size=5))
    def begin(self, shape: list[int]) -> None:
        """A few cubes to begin with; in a tree they stand below one another."""
        for parent in shape:
            self.add(parent=parent, child=True, importance=0.5, ttl=None)

    @rule(
        parent=st.integers(0, 11), child=st.booleans(), importance=st.sampled_from([0.1, 0.5, 0.9]),
        ttl=st.sampled_from([None, None, None, 50.0, 5000.0]),
    )  # fmt: skip
    def add(self, parent: int, child: bool, importance: float, ttl: float | None) -> None:
        self.count += 1
        text = f"thing number{self.count}"
        above = None
        more: dict[str, Any] = {"importance": importance, "ttl_s": ttl}
        if self.kind == "tree" and child and self.cubes:
            above = self.any_id(parent)
            more["parent_id"] = above
            if not self.seen(self.cubes[above]):
                with pytest.raises(NotFoundError):
                    self.mos.add("m", text, **more)
                return
        made = self.mos.add("m", text, **more)
        expires = None if ttl is None else self.now + ttl
        if above is not None:
            self.wake(above)
            inherited = self.cubes[above].expires_at
            if inherited is not None:
                expires = inherited if expires is None else min(expires, inherited)
        self.cubes[made.id] = Cube(self.count, text, importance, self.now, above, expires)

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def get(self, number: int) -> None:
        id = self.any_id(number)
        cube = self.cubes[id]
        if not self.seen(cube):
            with pytest.raises(NotFoundError):
                self.mos.get(id)
            return
        self.wake(id)
        found = self.mos.get(id)
        cube.waiting.append(self.now)
        assert (found.content, found.state) == (cube.text, cube.state)

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def update(self, number: int) -> None:
        id = self.any_id(number)
        cube = self.cubes[id]
        if not self.seen(cube):
            with pytest.raises(NotFoundError):
                self.mos.update("m", id, "thing other")
        elif cube.state in ("FROZEN", "MERGED"):
            with pytest.raises(ArgumentError, match=cube.state):
                self.mos.update("m", id, "thing other")
        else:
            self.count += 1
            self.wake(id)
            cube.text, cube.written = f"thing number{self.count}", self.now
            self.mos.update("m", id, cube.text)
            if cube.sources:
                cube.before = "changed"

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def delete(self, number: int) -> None:
        id = self.any_id(number)
        if not self.seen(self.cubes[id]):
            with pytest.raises(NotFoundError):
                self.mos.delete("m", id)
            return
        gone = self.below(id)
        if any(self.cubes[one].state == "FROZEN" for one in gone):
            with pytest.raises(ArgumentError, match="FROZEN"):
                self.mos.delete("m", id)
            return
        self.mos.delete("m", id)
        for one in gone:
            self.move(one, "DELETED")

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def archive(self, number: int) -> None:
        id = self.any_id(number)
        if not self.seen(self.cubes[id]):
            with pytest.raises(NotFoundError):
                self.mos.archive(id)
            return
        gone = [one for one in self.below(id) if one == id or self.cubes[one].state in HOT]
        stuck = [
            one
            for one in gone
            if self.cubes[one].state == "FROZEN"
            or (self.cubes[one].is_pinned and self.cubes[one].state != "ARCHIVED")
        ]
        if stuck:
            with pytest.raises(ArgumentError, match=r"FROZEN|pinned"):
                self.mos.archive(id)
            return
        moving = [one for one in gone if self.cubes[one].state != "ARCHIVED"]
        assert self.mos.archive(id, why="asked") == len(moving)
        for one in moving:
            self.move(one, "ARCHIVED")

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def freeze(self, number: int) -> None:
        id = self.any_id(number)
        cube = self.cubes[id]
        if not self.seen(cube):
            with pytest.raises(NotFoundError):
                self.mos.freeze(id)
        elif cube.state == "MERGED":
            with pytest.raises(ArgumentError, match="MERGED"):
                self.mos.freeze(id)
        else:
            for one in self.above(id):
                self.wake(one)
            assert self.mos.freeze(id).state == "FROZEN"
            self.move(id, "FROZEN")

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def thaw(self, number: int) -> None:
        id = self.any_id(number)
        cube = self.cubes[id]
        if cube.state != "FROZEN":
            with pytest.raises((NotFoundError, ArgumentError)):
                self.mos.thaw(id)
            return
        self.move(id, "ACTIVATED")
        assert self.mos.thaw(id).state == "ACTIVATED"

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11), pinned=st.booleans())
    def pin(self, number: int, pinned: bool) -> None:
        id = self.any_id(number)
        if not self.seen(self.cubes[id]):
            with pytest.raises(NotFoundError):
                self.mos.pin(id, pinned)
            return
        self.mos.pin(id, pinned)
        self.wake(id)
        self.cubes[id].is_pinned = pinned

    @precondition(lambda self: self.cubes)
    @rule(numbers=st.lists(st.integers(0, 11), min_size=2, max_size=3))
    def merge(self, numbers: list[int]) -> None:
        ids = list(dict.fromkeys(self.any_id(number) for number in numbers))
        if self.kind != "text":
            with pytest.raises(ArgumentError, match="kind text"):
                self.mos.merge_duplicates("m", ids, why="asked")
            return
        if not all(self.seen(self.cubes[id]) for id in ids):
            with pytest.raises(NotFoundError):
                self.mos.merge_duplicates("m", ids, why="asked")
            return
        may = sorted(
            (
                id
                for id in ids
                if self.cubes[id].state in ("CREATED", "ACTIVATED") and not self.cubes[id].is_pinned
            ),
            key=lambda id: list(self.cubes).index(id),
        )
        made = self.mos.merge_duplicates("m", ids, why="asked")
        if len(may) < 2:
            assert made == []
            return
        (cube,) = made
        assert cube.derived_from == tuple(may)
        for id in may:
            self.cubes[id].before = self.cubes[id].state
            self.move(id, "MERGED")
        chosen = max(may, key=lambda id: (len(self.cubes[id].text), list(self.cubes).index(id)))
        assert cube.content == self.cubes[chosen].text
        importance = max(self.cubes[id].importance for id in may)
        new = Cube(0, cube.content, importance, self.now)
        new.sources = tuple(may)
        self.cubes[cube.id] = new

    @precondition(lambda self: self.cubes)
    @rule(number=st.integers(0, 11))
    def undo(self, number: int) -> None:
        id = self.any_id(number)
        cube = self.cubes[id]
        fits = (
            self.seen(cube)
            and cube.sources
            and cube.before != "changed"
            and cube.state in ("CREATED", "ACTIVATED", "ARCHIVED")
            and all(
                self.cubes[one].state == "MERGED" and self.seen(self.cubes[one])
                for one in cube.sources
            )
        )
        if not fits:
            with pytest.raises((NotFoundError, ArgumentError)):
                self.mos.undo_merge(id)
            return
        found = self.mos.undo_merge(id)
        assert [one.id for one in found] == list(cube.sources)
        self.move(id, "DELETED")
        for one in cube.sources:
            self.move(one, self.cubes[one].before)

    @rule(archived=st.booleans())
    def retrieve(self, archived: bool) -> None:
        self.expire()
        hits = self.mos.retrieve("m", "thing", 100, include_archived=archived)
        wanted = {
            id
            for id, cube in self.cubes.items()
            if self.seen(cube) and (archived or cube.state in HOT)
        }
        assert {hit.id for hit in hits} == wanted
        for id in wanted:
            self.cubes[id].waiting.append(self.now)

    @rule(budget=st.integers(0, 12))
    def sweep(self, budget: int) -> None:
        self.write_uses()
        self.expire()
        hot = [id for id, cube in self.cubes.items() if cube.state in HOT]
        stays = {
            one
            for id in hot
            if self.cubes[id].is_pinned or self.cubes[id].state == "FROZEN"
            for one in [id, *self.above(id)]
        }
        values = {id: self.value(self.cubes[id]) for id in hot}
        depth = {id: len(self.above(id)) for id in hot}
        for id in sorted(hot, key=lambda id: -depth[id]):
            parent = self.cubes[id].parent
            if parent is not None:
                values[parent] = max(values[parent], values[id])
        order = list(self.cubes)
        may = sorted(
            (id for id in hot if id not in stays),
            key=lambda id: (round(values[id], 9), -depth[id], order.index(id)),
        )
        gone = may[: max(0, len(hot) - budget)]
        (done,) = self.mos.sweep(hot_cubes=budget, headroom=0.0)
        for id in gone:
            self.move(id, "ARCHIVED")
        assert done.hot == len(hot) - len(gone)
        assert done.over == max(0, done.hot - budget)
        assert sum(done.archived.values()) == len(gone)

    @rule(seconds=st.sampled_from([1.0, 60.0, 86400.0, 700000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def reopen(self) -> None:
        self.the_store_is_whole()
        self.mos.close()
        self.write_uses()
        self.open()

    # What always holds.

    @invariant()
    def states_agree(self) -> None:
        with self.memory.records.database.read() as connection:
            rows = connection.exec_driver_sql("SELECT id, state FROM cubes").all()
        stored = {row[0]: row[1] for row in rows}
        waiting = {id for id, cube in self.cubes.items() if cube.waiting}
        for id, cube in self.cubes.items():
            has = stored[id]
            if has != cube.state and id in waiting and (cube.state, has) == (
                "CREATED", "ACTIVATED",
            ):  # fmt: skip
                self.write_uses()
            assert stored[id] == cube.state, (id, cube)
        assert len(stored) == len(self.cubes)

    @invariant()
    def what_is_found_stands_on_what_is_found(self) -> None:
        for cube in self.cubes.values():
            if cube.state in HOT and cube.parent is not None:
                assert self.cubes[cube.parent].state in HOT

    # What holds at the end; looking at it costs more than a step.

    def the_store_is_whole(self) -> None:
        assert check(self.memory.records) == []

    def every_move_is_recorded(self) -> None:
        legal = {(edge.old, edge.new) for edge in EDGES}
        for id, cube in self.cubes.items():
            told = self.mos.transitions(id)
            assert len(told) == cube.moves
            assert all((one.old, one.new) in legal for one in told)
            assert (told[-1].new if told else "CREATED") == cube.state
            assert all(a.new == b.old for a, b in itertools.pairwise(told))


class Trees(Lives):
    kind = "tree"


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
Trees.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_texts = Lives.TestCase
test_trees = Trees.TestCase
