"""TreeTextMemory against a plain tree, with threads, processes and deep documents."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from memos.cube import Hit, MemCube
from memos.errors import ArgumentError, NotFoundError
from memos.memories.tree import TreeTextMemory
from memos.records.check import check
from memos.records.store import Records


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tree() -> TreeTextMemory:
    return opened(Records(None))


def opened(records: Records, **more: Any) -> TreeTextMemory:
    memory = TreeTextMemory("tree", embedder=None, **more)
    memory.bind(records)
    return memory


def ids(cubes: list[MemCube] | tuple[MemCube, ...]) -> list[str]:
    return [cube.id for cube in cubes]


def made(tree: TreeTextMemory) -> None:
    """r: a (a1, a2), b."""
    for id, parent in (("r", None), ("a", "r"), ("b", "r"), ("a1", "a"), ("a2", "a")):
        tree.add(f"text {id}", id=id, parent_id=parent)


# The contract.


def test_where_cubes_stand(tree: TreeTextMemory) -> None:
    made(tree)
    assert ids(tree.roots()) == ["r"]
    assert ids(tree.children("r")) == ["a", "b"]
    assert ids(tree.path("a2")) == ["r", "a", "a2"]
    assert ids(tree.ancestors("a2")) == ["a", "r"]
    assert ids(tree.descendants("r")) == ["a", "a1", "a2", "b"]
    assert ids(tree.descendants("r", depth=1)) == ["a", "b"]
    assert tree.descendants("r", depth=0) == []
    assert ids(tree.siblings("a1")) == ["a2"]
    assert tree.siblings("r") == []
    assert tree.get("a1").parent_id == "a"
    assert tree.get("r").parent_id is None
    assert ids(tree.cubes(filters={"@thread": "r"})) == ["a2", "a1", "b", "a", "r"]


def test_missing_cubes_are_named(tree: TreeTextMemory) -> None:
    made(tree)
    with pytest.raises(NotFoundError, match=r"parent_id: .* 'nobody'"):
        tree.add("x", parent_id="nobody")
    with pytest.raises(NotFoundError, match=r"new_parent_id: .* 'nobody'"):
        tree.move("a", "nobody")
    for call in (tree.children, tree.path, tree.ancestors, tree.siblings, tree.descendants):
        with pytest.raises(NotFoundError, match="'nobody'"):
            call("nobody")
    with pytest.raises(NotFoundError, match="'nobody'"):
        tree.move("nobody", "a")
    with pytest.raises(ArgumentError, match="parent_id: the id of a cube wanted, got 7"):
        tree.add("x", parent_id=7)
    with pytest.raises(ArgumentError, match="depth: a number"):
        tree.descendants("r", depth=-1)
    with pytest.raises(ArgumentError, match="which: one of"):
        tree.relatives("r", "cousins")


def test_a_parent_of_another_memory_is_none(tree: TreeTextMemory) -> None:
    other = TreeTextMemory("other", embedder=None)
    other.bind(tree.records)
    other.add("x", id="x")
    with pytest.raises(NotFoundError, match="'x'"):
        tree.add("y", parent_id="x")


@pytest.mark.parametrize("below", ["a", "a1"])
def test_cycles_are_refused(tree: TreeTextMemory, below: str) -> None:
    made(tree)
    with pytest.raises(ArgumentError, match=f"new_parent_id: .* got '{below}'"):
        tree.move("a", below)
    assert ids(tree.path("a1")) == ["r", "a", "a1"]
    assert tree.get("a").versions == 1


def test_a_move_is_a_version_and_goes_last(tree: TreeTextMemory) -> None:
    made(tree)
    moved = tree.move("a", "r", author="me")
    assert (moved.versions, moved.parent_id) == (2, "r")
    assert tree.history("a")[-1].author == "me"
    assert ids(tree.children("r")) == ["b", "a"]
    tree.add("c", id="c", parent_id="r")
    assert ids(tree.children("r")) == ["b", "a", "c"]
    tree.move("b", None)
    tree.add("s", id="s")
    tree.move("r", None)
    assert ids(tree.roots()) == ["b", "s", "r"]
    tree.move("a", "b")
    assert ids(tree.cubes(filters={"@thread": "b"})) == ["a2", "a1", "b", "a"]
    assert check(tree.records) == []


def test_a_subtree_goes_with_its_root(tree: TreeTextMemory) -> None:
    made(tree)
    tree.delete("a")
    for gone in ("a", "a1", "a2"):
        with pytest.raises(NotFoundError):
            tree.get(gone)
        assert [version.state for version in tree.history(gone)] == ["CREATED", "DELETED"]
    assert ids(tree.descendants("r")) == ["b"]
    with pytest.raises(NotFoundError):
        tree.add("x", parent_id="a")


def test_many_in_one_call(tree: TreeTextMemory) -> None:
    made(tree)
    items: list[dict[str, Any]] = [{"content": "top", "id": "top", "parent_id": "b"}]
    items += [{"content": f"{i}", "id": f"{i}", "parent_id": "top"} for i in range(2500)]
    items += [{"content": "deep", "id": "deep", "parent_id": "7"}]
    cubes = tree.add_many(items)
    assert ids(tree.children("top")) == [str(i) for i in range(2500)]
    assert ids(tree.path("deep")) == ["r", "b", "top", "7", "deep"]
    assert cubes[-1].parent_id == "7"
    with pytest.raises(NotFoundError, match="'later'"):  # only earlier items may be named
        tree.add_many([{"content": "x", "parent_id": "later"}, {"content": "y", "id": "later"}])
    assert check(tree.records) == []


def test_duplicates_stand_in_one_place(tree: TreeTextMemory) -> None:
    made(tree)
    assert tree.add("text a1", parent_id="a").id == "a1"
    assert tree.add("text a1", parent_id="b").id != "a1"
    items = [
        {"content": "text a", "id": "again", "parent_id": "r"},  # a
        {"content": "text a1", "id": "below", "parent_id": "again"},  # a1
        {"content": "new", "id": "new", "parent_id": "below"},
        {"content": "new", "id": "twice", "parent_id": "a1"},  # new
        {"content": "leaf", "id": "leaf", "parent_id": "twice"},
    ]
    filler = [{"content": f"filler {i}", "parent_id": "b"} for i in range(1000)]
    last = {"content": "last", "id": "last", "parent_id": "below"}  # in the next transaction
    stored = tree.add_many([*items, *filler, last])
    assert ids(stored[:5]) == ["a", "a1", "new", "new", "leaf"]
    assert ids(tree.path("leaf")) == ["r", "a", "a1", "new", "leaf"]
    assert ids(tree.path("last")) == ["r", "a", "a1", "last"]
    assert check(tree.records) == []


@pytest.mark.parametrize("on_duplicate", ["keep", "error"])
def test_other_ways_with_duplicates(on_duplicate: str) -> None:
    tree = opened(Records(None), on_duplicate=on_duplicate)
    items = [
        {"content": "a", "id": "a"},
        {"content": "b", "id": "b", "parent_id": "a"},
        {"content": "b", "id": "c", "parent_id": "a"},
    ]
    if on_duplicate == "error":
        with pytest.raises(ArgumentError, match="item 2 is there already"):
            tree.add_many(items)
        assert tree.cubes() == []
    else:
        tree.add_many(items)
        assert ids(tree.children("a")) == ["b", "c"]


def test_nothing_outlives_what_is_above_it() -> None:
    clock = Clock()
    tree = opened(Records(None), clock=clock)
    tree.add("r", id="r", ttl_s=100)
    tree.add("a", id="a", parent_id="r", ttl_s=500)
    tree.add("b", id="b", parent_id="r", ttl_s=50)
    tree.add("c", id="c")
    tree.add("d", id="d", parent_id="c")
    assert [tree.get(id).expires_at for id in "rabcd"] == [1100, 1100, 1050, None, None]
    assert tree.update("d", ttl_s=300).expires_at == 1300
    tree.update("c", ttl_s=200)
    assert tree.get("d").expires_at == 1200
    tree.move("c", "r")
    assert [tree.get(id).expires_at for id in "cd"] == [1100, 1100]
    assert check(tree.records) == []
    clock.now = 1060.0
    assert ids(tree.descendants("r")) == ["a", "c", "d"]
    assert tree.expire() == 1
    clock.now = 1100.0
    assert tree.roots() == []
    assert tree.expire() == 4
    assert check(tree.records) == []


def test_what_stands_around_hits(tree: TreeTextMemory) -> None:
    made(tree)
    other = Hit.of(tree.get("b"), score=0.5)
    foreign = Hit.of(MemCube("x", "text", "x", {}, memory="notes"))
    hits = tree.with_relatives(
        [Hit.of(tree.get("a1"), score=0.9), other, foreign, Hit.of(tree.get("r"))],
        ancestors=True,
        siblings=True,
        descendants=True,
    )
    assert [ids(hit.ancestors) for hit in hits] == [["a", "r"], ["r"], [], []]
    assert [ids(hit.siblings) for hit in hits] == [["a2"], ["a"], [], []]
    assert [ids(hit.descendants) for hit in hits] == [[], [], [], ["a", "a1", "a2", "b"]]
    assert (hits[0].score, hits[1].score, hits[2]) == (0.9, 0.5, foreign)
    few = tree.with_relatives([Hit.of(tree.get("r"))], descendants=True, limit=2)[0]
    assert (ids(few.descendants), few.ancestors) == (["a", "a1"], ())
    hidden = tree.scope({"@id": {"$ne": "a"}})
    part = tree.with_relatives([Hit.of(tree.get("a1"))], ancestors=True, scope=hidden)[0]
    assert ids(part.ancestors) == ["r"]


def test_a_deep_tree(tree: TreeTextMemory) -> None:
    depth = 2000
    items = [
        {"content": f"level{i}", "id": str(i), "parent_id": str(i - 1) if i else None}
        for i in range(depth)
    ]
    tree.add_many(items)
    assert ids(tree.path(str(depth - 1))) == [str(i) for i in range(depth)]
    assert len(tree.descendants("0")) == depth - 1
    assert tree.export_text("0").count("level") == depth
    assert words(tree, "level1000") == {str(i) for i in range(1000, 1009)}  # eight levels below
    with pytest.raises(ArgumentError, match="not below"):
        tree.move("0", str(depth - 1))
    tree.move("1000", None)
    assert len(tree.descendants("0")) == 999
    assert words(tree, "level999") == {"999"}
    tree.delete("1000")
    assert len(tree.cubes(limit=None)) == 1000
    assert check(tree.records) == []


def words(tree: TreeTextMemory, query: str) -> set[str]:
    scope = tree.scope()
    with tree.records.database.read() as connection:
        seqs, _ = tree.table.fulltext.search(connection, query, 10_000, every_word=True)
        return {cube.id for cube in tree.table.load(connection, seqs.tolist(), scope).values()}


# A plain tree beside it.


class TreeHistory(RuleBasedStateMachine):
    nodes: Any = Bundle("nodes")

    def __init__(self) -> None:
        super().__init__()
        self.records = Records(None)
        self.tree = opened(self.records, on_duplicate="keep")
        self.text: dict[str, str] = {}
        self.parent: dict[str, str | None] = {}
        self.order: dict[str | None, list[str]] = {None: []}
        self.versions: dict[str, int] = {}
        self.count = 0

    def teardown(self) -> None:
        assert check(self.records) == []
        self.records.close()

    def below(self, id: str) -> list[str]:
        return [one for child in self.order[id] for one in (child, *self.below(child))]

    def above(self, id: str) -> list[str]:
        parent = self.parent[id]
        return [] if parent is None else [parent, *self.above(parent)]

    def put(self, id: str, parent: str | None) -> None:
        self.parent[id] = parent
        self.order[parent].append(id)

    @rule(target=nodes)
    def add(self) -> str:
        self.count += 1
        id = f"n{self.count}"
        self.tree.add(f"word{id}", id=id)
        self.text[id], self.versions[id], self.order[id] = f"word{id}", 1, []
        self.put(id, None)
        return id

    @rule(target=nodes, parent=nodes, number=st.integers(1, 3))
    def add_below(self, parent: str, number: int) -> str:
        """A chain below a node, in one call."""
        chain = [f"n{self.count + 1 + i}" for i in range(number)]
        self.count += number
        items = [
            {"content": f"word{id}", "id": id, "parent_id": above}
            for id, above in zip(chain, [parent, *chain], strict=False)
        ]
        if parent not in self.text:
            with pytest.raises(NotFoundError):
                self.tree.add_many(items)
            return parent
        self.tree.add_many(items)
        for id, above in zip(chain, [parent, *chain], strict=False):
            self.text[id], self.versions[id], self.order[id] = f"word{id}", 1, []
            self.put(id, above)
        return chain[-1]

    @rule(id=nodes, parent=nodes | st.none())
    def move(self, id: str, parent: str | None) -> None:
        missing = {id, parent} - {None, *self.text}
        if missing or (parent is not None and id in (parent, *self.above(parent))):
            with pytest.raises(NotFoundError if missing else ArgumentError):
                self.tree.move(id, parent)
            return
        self.tree.move(id, parent)
        self.order[self.parent[id]].remove(id)
        self.put(id, parent)
        self.versions[id] += 1

    @rule(id=consumes(nodes))
    def delete(self, id: str) -> None:
        if id not in self.text:
            with pytest.raises(NotFoundError):
                self.tree.delete(id)
            return
        self.tree.delete(id)
        gone = [id, *self.below(id)]
        self.order[self.parent[id]].remove(id)
        for one in gone:
            del self.text[one], self.parent[one], self.order[one]

    @rule(id=nodes, long=st.booleans())
    def update(self, id: str, long: bool) -> None:
        self.count += 1
        text = f"changed{self.count}" + " and on" * 40 * long
        if id not in self.text:
            with pytest.raises(NotFoundError):
                self.tree.update(id, text)
            return
        self.tree.update(id, text)
        self.text[id] = text
        self.versions[id] += 1

    @rule(id=nodes)
    def look(self, id: str) -> None:
        if id not in self.text:
            with pytest.raises(NotFoundError):
                self.tree.children(id)
            return
        above, parent = self.above(id), self.parent[id]
        assert ids(self.tree.ancestors(id)) == above
        assert ids(self.tree.path(id)) == [*reversed(above), id]
        assert ids(self.tree.descendants(id)) == self.below(id)
        assert ids(self.tree.children(id)) == self.order[id]
        siblings = [] if parent is None else [one for one in self.order[parent] if one != id]
        assert ids(self.tree.siblings(id)) == siblings
        cube = self.tree.get(id)
        assert (cube.content, cube.parent_id, cube.versions) == (
            self.text[id],
            parent,
            self.versions[id],
        )
        name = self.text[id].split()[0]
        below = {one for one in self.below(id) if self.above(one).index(id) < 8}
        headed = below if len(self.text[id]) <= 120 else set()
        assert words(self.tree, name) == {id, *headed}

    @invariant()
    def the_same_tree(self) -> None:
        assert ids(self.tree.roots()) == self.order[None]
        assert {cube.id for cube in self.tree.cubes(limit=None)} == self.text.keys()


TreeHistory.TestCase.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
test_a_plain_tree_says_the_same = TreeHistory.TestCase


# Threads and processes.


def test_no_orphan_is_left(tmp_path: Path) -> None:
    """8 threads add under one parent while another deletes it, again and again."""
    records = Records(tmp_path)
    tree = opened(records)
    failures: list[BaseException] = []

    def adding(number: int) -> None:
        try:
            for i in range(1000):
                try:
                    one = tree.add(f"{number}.{i}", parent_id=current[0])
                    tree.add(f"{number}.{i} below", parent_id=one.id)
                except NotFoundError:
                    pass
                if done.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    current = [tree.add("parent 0").id]
    done = threading.Event()
    threads = [threading.Thread(target=adding, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for i in range(1, 15):
        while not tree.children(current[0]):
            pass
        last, current[0] = current[0], tree.add(f"parent {i}").id
        tree.delete(last)
    tree.delete(current[0])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert tree.cubes() == []
    assert check(records) == []
    records.close()


WRITER = """
import sys
from memos.errors import NotFoundError
from memos.memories.tree import TreeTextMemory
from memos.records.store import Records

folder, name = sys.argv[1:]
tree = TreeTextMemory("tree", embedder=None)
tree.bind(Records(folder))
tree.add(name, id=name, parent_id="root")
for i in range(60):
    tree.add(f"{name} {i}", id=f"{name}{i}", parent_id=name)
    if i % 3 == 0:
        tree.move(f"{name}{i}", "root")
    if i % 5 == 0:
        tree.delete(f"{name}{i}")
"""


def test_two_processes(tmp_path: Path) -> None:
    records = Records(tmp_path)
    tree = opened(records)
    tree.add("root", id="root")
    with running(tmp_path, "x") as first, running(tmp_path, "y") as second:
        assert (first.wait(60), second.wait(60)) == (0, 0)
    for name in ("x", "y"):
        stayed = [f"{name}{i}" for i in range(60) if i % 3 and i % 5]
        assert ids(tree.children(name)) == stayed
    moved = [id for id in ids(tree.children("root")) if len(id) > 1]
    assert sorted(moved) == sorted(
        f"{name}{i}" for name in "xy" for i in range(60) if i % 3 == 0 and i % 5
    )
    assert check(records) == []
    records.close()


class running:  # noqa: N801 - reads as a statement
    """A writing process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.command = [sys.executable, "-c", WRITER, str(folder), name]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self.command)
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
