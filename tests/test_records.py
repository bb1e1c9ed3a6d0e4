"""Cubes in records against a dict: versions, duplicates, expiry, relations, full text."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from memos.cube import Relation
from memos.errors import ArgumentError, NotFoundError
from memos.memories.text import GeneralTextMemory
from memos.records.check import check
from memos.records.schema import CubeRow, cubes
from memos.records.store import Records


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(records: Records, name: str = "notes", **more: Any) -> GeneralTextMemory:
    memory = GeneralTextMemory(name, embedder=None, **more)
    memory.bind(records)
    return memory


@pytest.fixture
def notes() -> GeneralTextMemory:
    return opened(Records(None))


def words(memory: GeneralTextMemory, query: str, **more: Any) -> set[str]:
    """Ids of the living cubes that full text finds."""
    scope = memory.scope()
    with memory.records.database.read() as connection:
        seqs, _ = memory.table.fulltext.search(connection, query, 10_000, **more)
        return {cube.id for cube in memory.table.load(connection, seqs.tolist(), scope).values()}


# The contract.


def test_a_cube_reads_back(notes: GeneralTextMemory) -> None:
    cube = notes.add(
        "some text",
        {"a": [1, {"b": None}], "z": "\u00e9"},
        id="mine",
        importance=0.75,
        ttl_s=60,
        acl={"read": ["ann"]},
        source="web",
        creator="bob",
        derived_from=["x", "y"],
    )
    again = notes.get("mine")
    for one in (cube, again):
        assert (one.id, one.kind, one.memory) == ("mine", "text", "notes")
        assert (one.content, one.metadata) == ("some text", {"a": [1, {"b": None}], "z": "\u00e9"})
        assert (one.importance, one.state, one.versions) == (0.75, "CREATED", 1)
        assert (one.acl, one.source, one.creator) == ({"read": ["ann"]}, "web", "bob")
        assert one.derived_from == ("x", "y")
        assert one.expires_at == one.created_at + 60 == one.updated_at + 60
    again.metadata["a"].append(2)
    assert notes.get("mine").metadata == cube.metadata


def test_a_row_of_cubes_has_the_columns_of_the_table() -> None:
    """A bulk insert writes the rows as they are."""
    hints = typing.get_type_hints(CubeRow)
    assert list(hints) == [column.name for column in cubes.columns]
    for column in cubes.columns:
        plain = column.type.python_type
        assert hints[column.name] == (plain | None if column.nullable else plain), column.name


def test_an_update_is_a_version(notes: GeneralTextMemory) -> None:
    notes.add("one", {"a": 1, "b": 2}, id="x", creator="ann")
    notes.update("x", "two", {"b": 3, "c": 4}, author="bob", source="web")
    notes.update("x", importance=0.9)
    notes.delete("x", author="eve")
    history = notes.history("x")
    assert [v.number for v in history] == [1, 2, 3, 4]
    assert [v.content for v in history] == ["one", "two", "two", "two"]
    assert [v.metadata for v in history[:2]] == [{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]
    assert [v.author for v in history] == ["ann", "bob", None, "eve"]
    assert [v.importance for v in history] == [0.5, 0.5, 0.9, 0.9]
    assert [v.state for v in history] == ["CREATED", "CREATED", "CREATED", "DELETED"]
    assert len({v.digest for v in history}) == 4
    assert [v.parents for v in history] == [(), *((v.digest,) for v in history[:-1])]
    for call in (notes.get, notes.update, notes.delete):
        with pytest.raises(NotFoundError, match="memory 'notes': no cube 'x'"):
            call("x")
    with pytest.raises(ArgumentError, match="id: a new one wanted, got 'x'"):
        notes.add("again", id="x")


def test_texts_of_versions_are_stored_once(notes: GeneralTextMemory) -> None:
    notes.add("one", {"a": 1, "b": {"c": 2}}, id="x")
    for content in ("two", None, "one", "two", "three"):
        notes.update("x", content, {"a": 5})
    texts = [version.content for version in notes.history("x")]
    assert texts == ["one", "two", "two", "one", "two", "three"]
    with notes.records.database.read() as connection:
        kept = connection.exec_driver_sql("SELECT text FROM bodies").scalars().all()
    assert sorted(kept) == ["one", "two"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"content": ""}, "content: .* not empty, got ''"),
        ({"content": " \n"}, "content: .* not empty"),
        ({"content": 7}, "content: .* got 7"),
        ({"content": None}, "content: .* got None"),
        ({}, "item: content and of"),
        ({"content": "x", "colour": "red"}, "item: .* got colour, content"),
        ({"content": "x", "metadata": [1]}, "metadata: a dict wanted, got list"),
        ({"content": "x", "importance": 1.5}, "importance: a number from 0 to 1"),
        ({"content": "x", "importance": True}, "importance: a number from 0 to 1"),
        ({"content": "x", "importance": float("nan")}, "importance: a number from 0 to 1"),
        ({"content": "x", "ttl_s": 0}, "ttl_s: seconds above 0"),
        ({"content": "x", "ttl_s": float("nan")}, "ttl_s: seconds above 0"),
        ({"content": "x", "ttl_s": "1"}, "ttl_s: seconds above 0"),
        ({"content": "x", "id": ""}, "id: a string that is not empty"),
        ({"content": "x", "id": 7}, "id: a string that is not empty"),
        ({"content": "x", "source": 7}, "source: a string wanted"),
        ({"content": "x", "derived_from": "abc"}, "derived_from: a list of ids"),
        ({"content": "x", "derived_from": [7]}, "derived_from: a list of ids"),
        ({"content": "x", "parent_id": "y"}, "parent_id: .* use a TreeTextMemory"),
        ({"content": "x", "relations": ["y"]}, "relations: dicts with type and target"),
        ({"content": "x", "relations": [{"type": "a"}]}, "relations: dicts with type"),
        ({"content": "x", "relations": [{"type": "", "target": "y"}]}, r"relation\.type"),
        ({"content": "x", "relations": [{"type": "a", "target": 7}]}, r"relation\.target"),
        (
            {"content": "x", "relations": [{"type": "a", "target": "y", "weight": 0}]},
            r"relation\.weight",
        ),
    ],
)
def test_wrong_items_are_named(
    notes: GeneralTextMemory, item: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        notes.add_many([{"content": "before"}, item])
    assert notes.cubes() == []


def test_a_batch_is_stored_or_not(notes: GeneralTextMemory) -> None:
    told: list[int] = []
    items: list[dict[str, Any]] = [{"content": f"text {i}"} for i in range(2500)]
    items[2200] = {"content": ""}
    with pytest.raises(ArgumentError):
        notes.add_many(items, progress=told.append)
    assert told == [1000, 2000]
    assert len(notes.cubes(limit=None)) == 2000
    with pytest.raises(ArgumentError, match="id: a new one wanted, got 'x'"):
        notes.add_many([{"content": "a", "id": "x"}, {"content": "b", "id": "x"}])
    assert len(notes.cubes(limit=None)) == 2000
    assert check(notes.records) == []


def test_duplicates(notes: GeneralTextMemory) -> None:
    first = notes.add("x", {"a": 1, "b": 2})
    assert notes.add("x", {"b": 2, "a": 1}).id == first.id
    stored = notes.add_many([{"content": c} for c in ("x", "y", "x", "y", "z")])
    assert [cube.content for cube in stored] == ["x", "y", "x", "y", "z"]
    assert (stored[0].id, stored[1].id) == (stored[2].id, stored[3].id)
    assert len({first.id, *(cube.id for cube in stored)}) == 4
    notes.delete(stored[0].id)
    assert notes.add("x").id != stored[0].id
    notes.update(stored[1].id, "changed")
    assert notes.add("y").id != stored[1].id
    assert check(notes.records) == []


def test_a_duplicate_is_not_one_that_expired() -> None:
    clock = Clock()
    notes = opened(Records(None), clock=clock)
    first = notes.add("x", ttl_s=1e-9)
    assert notes.get(first.id).id == first.id  # it lives for a moment at least
    clock.now += 1
    second = notes.add("x")
    assert second.id != first.id
    with pytest.raises(NotFoundError):
        notes.get(first.id)
    clock.now -= 0.5
    assert notes.add("x").id == second.id


def test_edges(notes: GeneralTextMemory) -> None:
    other = opened(notes.records, "other")
    other.add("far", id="far")
    notes.add("a", id="a")
    notes.add(
        "b",
        id="b",
        relations=[{"type": "supports", "target": "a", "weight": 2.0}, Relation("cites", "far")],
    )
    notes.relate("a", "answers", "b", properties={"by": "me"})
    notes.relate("a", "answers", "b", properties={"by": "you"})  # replaces the equal one
    outgoing = Relation("answers", "b", {"by": "you"}, 1.0, True)
    assert notes.get("a").relations == (outgoing, Relation("supports", "b", {}, 2.0, False))
    assert other.get("far").relations == (Relation("cites", "b", {}, 1.0, False),)
    other.delete("far")
    assert [edge.target for edge in notes.get("b").relations] == ["a", "a"]
    with pytest.raises(NotFoundError, match="relation: no cube 'far'"):
        notes.relate("a", "cites", "far")
    with pytest.raises(NotFoundError, match="relation: no cube 'nobody'"):
        notes.add("c", relations=[{"type": "x", "target": "nobody"}])
    assert len(notes.cubes()) == 2
    opened(notes.records, "third").add("x", id="x")
    other.add("x", id="x")
    with pytest.raises(ArgumentError, match="'x' names cubes of several memories: other, third"):
        notes.relate("a", "cites", "x")


def test_a_memory_and_its_name() -> None:
    records = Records(None)
    notes = opened(records)
    with pytest.raises(ArgumentError, match="registered with another MOS"):
        notes.bind(Records(None))
    with pytest.raises(ArgumentError, match="register it first"):
        GeneralTextMemory("new", embedder=None).add("x")

    class Other(GeneralTextMemory):
        kind = "other"

    records._tables.clear()  # as another process sees the file
    with pytest.raises(ArgumentError, match="it is of kind text, not other"):
        Other("notes", embedder=None).bind(records)


def test_transactions_are_whole(notes: GeneralTextMemory) -> None:
    """An error anywhere undoes all of it, also what was nested."""

    def add_and_fail() -> None:
        with notes.records.database.write():
            notes.add("x")
            notes.add("y")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        add_and_fail()
    assert notes.cubes() == []
    assert words(notes, "x") == set()
    assert check(notes.records) == []


# A dict beside it.


class Machine(RuleBasedStateMachine):
    known: Any = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.records, self.clock = Records(None), Clock()
        self.notes = opened(self.records, clock=self.clock)
        self.opened_other = opened(self.records, "other", clock=self.clock)
        self.opened_other.add("zqother w0 w1 w2 w3")
        self.versions: dict[str, list[tuple[str, dict[str, Any], float]]] = {}
        self.expiry: dict[str, float | None] = {}
        self.edges: dict[tuple[str, str, str], float] = {}
        self.dead: set[str] = set()
        self.order: list[str] = []

    def teardown(self) -> None:
        assert check(self.records) == []
        self.records.close()

    def living(self) -> dict[str, tuple[str, dict[str, Any], float]]:
        now = self.clock.now
        return {
            id: versions[-1]
            for id, versions in self.versions.items()
            if id not in self.dead and not ((end := self.expiry[id]) is not None and end <= now)
        }

    texts = st.lists(
        st.sampled_from(["w0", "w1", "w2", "w3"]), min_size=1, max_size=2, unique=True
    ).map(" ".join)
    metadata = st.dictionaries(st.sampled_from("ab"), st.sampled_from([1, 2, "m1", "m2"]))
    ttls = st.none() | st.sampled_from([5.0, 10.0])

    def remember(self, id: str, text: str, metadata: dict[str, Any], ttl: float | None) -> str:
        """What an add of this does to the dict; returns the id of the cube."""
        for other in self.order:
            if other in self.living() and self.living()[other][:2] == (text, metadata):
                return other
        self.order.append(id)
        self.versions[id] = [(text, metadata, 0.5)]
        self.expiry[id] = None if ttl is None else self.clock.now + ttl
        return id

    @rule(target=known, text=texts, metadata=metadata, ttl=ttls)
    def add(self, text: str, metadata: dict[str, Any], ttl: float | None) -> str:
        cube = self.notes.add(text, metadata, ttl_s=ttl)
        assert cube.id == self.remember(cube.id, text, metadata, ttl)
        assert (cube.content, cube.metadata) == (text, metadata)
        return cube.id

    @rule(items=st.lists(st.tuples(texts, metadata, ttls), max_size=6))
    def add_many(self, items: list[tuple[str, dict[str, Any], float | None]]) -> None:
        cubes = self.notes.add_many(
            {"content": text, "metadata": metadata, "ttl_s": ttl} for text, metadata, ttl in items
        )
        for cube, item in zip(cubes, items, strict=True):
            assert cube.id == self.remember(cube.id, *item)

    @rule(id=known, text=st.none() | texts, metadata=st.none() | metadata, ttl=ttls)
    def update(
        self, id: str, text: str | None, metadata: dict[str, Any] | None, ttl: float | None
    ) -> None:
        if id not in self.living():
            with pytest.raises(NotFoundError):
                self.notes.update(id, text, metadata, ttl_s=ttl)
            return
        cube = self.notes.update(id, text, metadata, ttl_s=ttl, importance=0.25)
        old = self.versions[id][-1]
        new = (old[0] if text is None else text, {**old[1], **(metadata or {})}, 0.25)
        self.versions[id].append(new)
        assert (cube.content, cube.metadata, cube.importance) == new
        if ttl is not None:
            self.expiry[id] = self.clock.now + ttl

    @rule(id=known)
    def delete(self, id: str) -> None:
        if id not in self.living():
            with pytest.raises(NotFoundError):
                self.notes.delete(id)
            return
        self.notes.delete(id)
        self.dead.add(id)
        self.versions[id].append(self.versions[id][-1])

    @rule(one=known, other=known, type=st.sampled_from(["x", "y"]), weight=st.floats(0.5, 2))
    def relate(self, one: str, other: str, type: str, weight: float) -> None:
        there = self.living()
        if one not in there or (other in self.dead):
            with pytest.raises(NotFoundError):
                self.notes.relate(one, type, other, weight=weight)
        elif other in there:
            self.notes.relate(one, type, other, weight=weight)
            if self.edges.get((one, type, other)) != weight:
                self.versions[one].append(self.versions[one][-1])
            self.edges[one, type, other] = weight

    @rule(seconds=st.sampled_from([1.0, 4.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        over = self.versions.keys() - self.dead - self.living().keys()
        assert self.notes.expire() == len(over)
        for id in over:
            self.dead.add(id)
            self.versions[id].append(self.versions[id][-1])

    @precondition(lambda self: self.versions)
    @rule(id=known)
    def history(self, id: str) -> None:
        found = self.notes.history(id)
        wanted = self.versions[id]
        assert [(v.content, v.metadata, v.importance) for v in found] == wanted
        assert [v.number for v in found] == list(range(1, len(wanted) + 1))
        assert [v.at for v in found] == sorted(v.at for v in found)
        assert (found[-1].state == "DELETED") == (id in self.dead)
        assert len({v.digest for v in found}) == len(found)
        assert [v.parents for v in found] == [(), *((v.digest,) for v in found[:-1])]

    @rule(word=st.sampled_from(["w0", "w1", "w2", "w3", "m1", "m2"]))
    def search(self, word: str) -> None:
        wanted = {
            id
            for id, (text, metadata, _) in self.living().items()
            if word in text.split() or word in metadata.values()
        }
        assert words(self.notes, word) == wanted

    @invariant()
    def the_same_cubes(self) -> None:
        living = self.living()
        cubes = self.notes.cubes(limit=None)
        assert [cube.id for cube in cubes] == [id for id in reversed(self.order) if id in living]
        for cube in cubes:
            assert (cube.content, cube.metadata, cube.importance) == living[cube.id]
            out = {(e.type, e.target): e.weight for e in cube.relations if e.outgoing}
            assert out == {
                (type, other): weight
                for (one, type, other), weight in self.edges.items()
                if one == cube.id and other in living
            }


Machine.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
test_a_dict_says_the_same = Machine.TestCase


# Full text.

NONSENSE = st.text(st.sampled_from("bcdfgjkqvwxz"), min_size=4, max_size=6)


@settings(max_examples=25)
@given(
    st.lists(st.lists(NONSENSE, min_size=1, max_size=5), min_size=1, max_size=20),
    st.lists(NONSENSE, max_size=3),
    st.data(),
)
def test_full_text_finds_exactly_the_words(
    texts: list[list[str]], others: list[str], data: st.DataObject
) -> None:
    notes = opened(Records(None), on_duplicate="keep")
    marks = st.sampled_from([" ", ", ", "\n", " - ", "/", '"', "(", " * ", "\0 ", "'"])
    for i, some in enumerate(texts):
        text = "".join(word + data.draw(marks) for word in some)
        notes.add(text.upper() if i % 3 == 2 else text, id=str(i))
    gone = {str(i) for i in range(0, len(texts), 4)}
    for id in gone:
        notes.delete(id)
    for word in {word for some in texts for word in some} | set(others):
        wanted = {str(i) for i, some in enumerate(texts) if word in some} - gone
        assert words(notes, word) == wanted
    pair = data.draw(st.lists(st.sampled_from(texts[-1]) | NONSENSE, min_size=2, max_size=3))
    all_of = {str(i) for i, some in enumerate(texts) if set(pair) <= set(some)} - gone
    any_of = {str(i) for i, some in enumerate(texts) if set(pair) & set(some)} - gone
    assert words(notes, " ".join(pair), every_word=True) == all_of
    assert words(notes, " ".join(pair)) == any_of
    notes.records.close()


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("caf\u00e9", "CAFE"),
        ("re\u0301sume\u0301", "r\u00e9sum\u00e9"),
        ("r\u00e9sum\u00e9", "re\u0301sume\u0301"),
        ("\u0130stanbul", "\u0130stanbul"),
        ("\u0130stanbul", "istanbul"),
        ("\u039c\u0391\u0399\u039f\u03a3", "\u039c\u0391\u0399\u039f\u03a3"),
        ("\u4e2d\u6587 words", "\u4e2d\u6587"),
        ("snake_case_name", "snake_case_name"),
        ("snake_case_name", "case"),
        ("a.b@c.example", "a.b@c.example"),
        ('say "NEAR(x, 2)" AND NOT text:*', 'NEAR(x, 2)" AND NOT text:*'),
        ("running dogs", "run dog"),
        ("x", "x"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940"),
    ],
)
def test_words_of_many_kinds(notes: GeneralTextMemory, text: str, query: str) -> None:
    cube = notes.add(text)
    notes.add("something else")
    assert words(notes, query, every_word=True) == {cube.id}


@pytest.mark.parametrize("query", ["", " ", '"', "*", "_", "\0", "\ud800", "()", "\u0301"])
def test_queries_without_words_find_nothing(notes: GeneralTextMemory, query: str) -> None:
    notes.add("some text")
    assert words(notes, query) == words(notes, query, every_word=True) == set()


# Threads and processes.


def test_eight_threads(tmp_path: Path) -> None:
    records = Records(tmp_path)
    notes = opened(records)
    shared = notes.add("shared", id="shared")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                mine = notes.add(f"zq{number}x{i}", {"thread_no": number}, id=f"{number}.{i}")
                assert notes.get(mine.id).content == f"zq{number}x{i}"
                assert words(notes, f"zq{number}x{i}") == {mine.id}
                notes.add("the same for all")
                notes.update("shared", f"by {number} {i}")
                if i % 4 == 0:
                    notes.delete(mine.id)
                assert len(notes.cubes(limit=None, filters={"thread_no": number})) == (
                    i + 1 - i // 4 - 1
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    history = notes.history(shared.id)
    assert [version.number for version in history] == list(range(1, 162))
    assert len({version.content for version in history}) == 161
    assert len(notes.cubes(limit=None)) == 8 * 15 + 2
    assert check(records) == []
    records.close()


WRITER = """
import sys
from memos.memories.text import GeneralTextMemory
from memos.records.store import Records

folder, name = sys.argv[1:]
notes = GeneralTextMemory("notes", embedder=None)
notes.bind(Records(folder))
for i in range(200):
    text = f"zq{name}{i} " + f"{name}{i} " * 50
    notes.add(text, {"by": name, "number": i}, id=f"{name}{i}")
    print(i, flush=True)
"""


def test_two_processes_write_and_one_reads(tmp_path: Path) -> None:
    """No cube is lost, none is ever seen by half, and none vanishes again."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    records = Records(tmp_path)
    notes = opened(records)
    seen: set[str] = set()
    looks = 0
    try:
        while any(writer.poll() is None for writer in writers):
            cubes = notes.cubes(limit=None)
            assert seen <= {cube.id for cube in cubes}
            for cube in cubes:
                assert cube.content.split() == [f"zq{cube.id}", *[cube.id] * 50]
                assert f"{cube.metadata['by']}{cube.metadata['number']}" == cube.id
                if cube.id not in seen:
                    assert words(notes, f"zq{cube.id}") == {cube.id}
            with records.database.read() as connection:  # one state: rows and words agree
                rows = notes.table.recent(connection, notes.scope())
                found, _ = notes.table.fulltext.search(connection, "a0 b0", 500)
                alive = notes.table.load(connection, rows, notes.scope())
                both = {cube.id for cube in alive.values()} & {"a0", "b0"}
                assert {alive[seq].id for seq in found.tolist()} == both
            seen |= {cube.id for cube in cubes}
            looks += 1
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            said = writer.stdout.read().split()
            writer.stdout.close()
            assert said == [str(i) for i in range(200)]
    assert looks > 3
    assert {cube.id for cube in notes.cubes(limit=None)} == {
        f"{name}{i}" for name in "ab" for i in range(200)
    }
    assert check(records) == []
    records.close()


def test_a_store_reopens(tmp_path: Path) -> None:
    records = Records(tmp_path)
    notes = opened(records)
    notes.add("text", {"a": 1}, id="x")
    notes.update("x", "changed")
    records.close()
    for readonly in (False, True):
        records = Records(tmp_path, readonly=readonly)
        notes = opened(records)
        assert (notes.get("x").content, notes.get("x").versions) == ("changed", 2)
        assert words(notes, "changed") == {"x"}
        assert json.dumps(notes.get("x").metadata) == '{"a": 1}'
        assert check(records) == []
        records.close()
