"""The life of cubes: the table of moves, what each does to the indexes, and how cubes come back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from memos import MOS, GeneralTextMemory, GraphMemory, MemCube, TreeTextMemory, VectorMemory
from memos.errors import ArgumentError, NotFoundError, StoreError
from memos.lifecycle import EDGES, STATES
from memos.records import life
from memos.records.check import check
from memos.records.cold_text import search_cold
from memos.records.scope import Scope
from memos.records.states import COLD, HOT, edge_of


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


class Letters:
    """An embedder by the letters of a text."""

    identity, dim = "letters", 26

    def embed(self, texts: Any, kind: str = "document", progress: Any = None) -> Any:
        rows = numpy.full((len(texts), 26), 0.01, numpy.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text.lower():
                if "a" <= letter <= "z":
                    row[ord(letter) - 97] += 1
        return rows


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mos(tmp_path: Path, clock: Clock) -> Iterator[MOS]:
    with MOS(tmp_path / "store", clock=clock) as made:
        yield made
        assert check(made.records) == []


def texts(mos: MOS, clock: Clock, embedder: Any = None) -> GeneralTextMemory:
    return mos.register_memory(GeneralTextMemory("notes", embedder=embedder, clock=clock))


def contents(found: list[Any]) -> list[Any]:
    return [cube.content for cube in found]


# The table.


def test_the_table_is_one_of_known_states_with_guards_and_effects() -> None:
    ends = [(edge.old, edge.new) for edge in EDGES]
    assert len(set(ends)) == len(ends)
    assert {state for pair in ends for state in pair} == set(STATES)
    for edge in EDGES:
        assert edge.triggers
        assert set(edge.guards) <= set(life.GUARDS)
        assert edge.effect in life.EFFECTS
        leaves = edge.old in HOT and edge.new in COLD
        assert (edge.effect == life.states.LEAVES) == leaves
        returns = edge.old not in HOT and edge.new in HOT
        assert (edge.effect == life.states.RETURNS) == returns


@pytest.mark.parametrize(("old", "new"), itertools.product(STATES, STATES))
def test_a_move_that_is_not_in_the_table_is_an_error_that_names_those_that_are(
    old: str, new: str
) -> None:
    legal = {edge.new: edge.triggers for edge in EDGES if edge.old == old}
    if new in legal:
        for trigger in legal[new]:
            assert edge_of(old, new, trigger).new == new
    with pytest.raises(ArgumentError) as error:
        edge_of(old, new, "a wish")
    assert all(f"{other} (by " in str(error.value) for other in legal)
    assert f"{new} by a wish is none of them" in str(error.value)


def test_all_of_the_chain(mos: MOS, clock: Clock) -> None:
    texts(mos, clock)
    one = mos.add("notes", "Ada likes tea.")
    two = mos.add("notes", "Ada really likes tea.")
    assert one.state == "CREATED"
    mos.get(one.id)
    assert mos.uses(one.id).count == 1
    assert mos.get(one.id).state == "ACTIVATED"
    (made,) = mos.merge_duplicates("notes")
    assert mos.get(two.id).state == "MERGED"
    mos.archive(made.id)
    mos.freeze(made.id)
    mos.thaw(made.id)
    mos.delete("notes", made.id)
    moves = [(t.new, t.trigger) for t in mos.transitions(made.id)]
    assert moves == [
        ("ARCHIVED", "call"), ("FROZEN", "call"), ("ACTIVATED", "call"), ("DELETED", "call"),
    ]  # fmt: skip


def test_a_move_tells_who_when_and_why(mos: MOS, clock: Clock) -> None:
    texts(mos, clock)
    cube = mos.add("notes", "The key is under the mat.")
    clock.now += 5
    mos.archive(cube.id, why="moved house")
    (told,) = mos.transitions(cube.id)
    assert (told.old, told.new, told.trigger) == ("CREATED", "ARCHIVED", "call")
    assert (told.why, told.at) == ("moved house", clock.now)
    with pytest.raises(NotFoundError):
        mos.transitions("nobody")


# Archived.


def test_archived_cubes_are_found_when_asked_for_and_come_back_by_use(
    mos: MOS, clock: Clock
) -> None:
    memory = texts(mos, clock, Letters())
    kept = mos.add("notes", "The cat sleeps in the kitchen.", {"room": "kitchen"})
    away = mos.add("notes", "The dog sleeps in the garden.", {"room": "garden"})
    assert mos.archive(away.id) == 1
    assert mos.archive(away.id) == 0
    assert contents(mos.retrieve("notes", "dog sleeps")) == [kept.content]
    assert contents(mos.retrieve("notes", "dog", filters={"room": "garden"})) == []
    (hit, _) = mos.retrieve("notes", "dog sleeps", include_archived=True)
    assert (hit.id, hit.state) == (away.id, "ARCHIVED")
    found = mos.retrieve("notes", "dog", filters={"room": "garden"}, include_archived=True)
    assert contents(found) == [away.content]
    assert len(memory.embedded.search_or_none()._index) == 1  # type: ignore[union-attr]
    assert mos.retrieve("notes", "dog sleeps")[0].id == kept.id  # found, but not used
    assert mos.get(away.id).state == "ACTIVATED"
    assert mos.retrieve("notes", "dog sleeps")[0].id == away.id
    assert len(memory.embedded.search_or_none()._index) == 2  # type: ignore[union-attr]


def test_ways_to_use(mos: MOS, clock: Clock) -> None:
    texts(mos, clock)
    for way in ("hit", "id", "context", "update", "relate", "add"):
        cube = mos.add("notes", f"The colour of {way} is blue.")
        mos.archive(cube.id)
        if way == "hit":
            mos.use(*mos.retrieve("notes", f"colour of {way}", 1, include_archived=True))
        elif way == "id":
            mos.use(cube.id)
        elif way == "context":
            mos.context(f"colour of {way}", 200, limit=1)
            assert mos.retrieve("notes", way) == []
            mos.context(f"colour of {way}", 200, limit=1, include_archived=True)
        elif way == "update":
            mos.update("notes", cube.id, metadata={"seen": True})
        elif way == "relate":
            mos.relate(cube.id, "beside", mos.add("notes", "Another one.").id)
        else:
            assert mos.add("notes", cube.content).id == cube.id
        assert mos.retrieve("notes", way)[0].id == cube.id, way
    with pytest.raises(ArgumentError, match="hits, cubes or ids"):
        mos.use(3)


def test_a_store_that_cannot_be_written_shows_archived_cubes_as_they_are(
    tmp_path: Path, clock: Clock
) -> None:
    with MOS(tmp_path / "s", clock=clock) as mos:
        texts(mos, clock)
        cube = mos.add("notes", "The dog sleeps in the garden.")
        mos.archive(cube.id)
    with MOS(tmp_path / "s", readonly=True, clock=clock) as mos:
        assert mos.get(cube.id).state == "ARCHIVED"
        assert len(mos.retrieve("notes", "dog", include_archived=True)) == 1
        assert mos.retrieve("notes", "dog") == []
        with pytest.raises(StoreError):
            mos.freeze(cube.id)


def test_other_processes_and_restarts_see_what_left(tmp_path: Path, clock: Clock) -> None:
    vector = {"query": numpy.eye(8, dtype=numpy.float32)[3]}
    with MOS(tmp_path / "s", clock=clock) as one, MOS(tmp_path / "s", clock=clock) as two:
        for mos in (one, two):
            mos.register_memory(VectorMemory("v", dim=8, clock=clock))
        ids = [one.add("v", row).id for row in numpy.eye(8, dtype=numpy.float32)]
        assert two.retrieve("v", **vector)[0].id == ids[3]
        one.archive(ids[3])
        assert two.retrieve("v", **vector)[0].id != ids[3]
        assert two.retrieve("v", **vector, include_archived=True)[0].id == ids[3]
        two.get(ids[3])
        assert one.retrieve("v", **vector)[0].id == ids[3]
        one.archive(ids[3])
    with MOS(tmp_path / "s", clock=clock) as mos:
        assert mos.retrieve("v", **vector)[0].id != ids[3]
        assert mos.retrieve("v", **vector, include_archived=True)[0].id == ids[3]


def test_cold_text_scores_as_the_index_does(mos: MOS, clock: Clock) -> None:
    memory = texts(mos, clock)
    words = "red blue green cat dog house tree running happily relational ponies naïve Straße"
    rng = numpy.random.default_rng(1)
    some = rng.choice(words.split(), (60, 6))
    cubes = mos.add_many(
        "notes", [{"content": " ".join(row) + f" n{i}"} for i, row in enumerate(some)]
    )
    scope = Scope({}, clock.now, archived=True)
    queries = ["red cats", "happy ponies", "naive strasse", "relate house", "n7", "dogs running"]
    with memory.records.database.read() as connection:
        before = [memory.table.fulltext.search(connection, q, 60) for q in queries]
    for cube in cubes:
        mos.archive(cube.id)
    with memory.records.database.read() as connection:
        for query, (seqs, scores) in zip(queries, before, strict=True):
            found, theirs = search_cold(connection, memory.table.fulltext, query, 60)
            wanted = dict(zip(seqs.tolist(), scores.tolist(), strict=True))
            got = dict(zip(found.tolist(), theirs.tolist(), strict=True))
            assert got == pytest.approx(wanted, rel=0.02, abs=1e-5), query
            few = seqs[: len(seqs) // 2]
            kept, _ = search_cold(
                connection, memory.table.fulltext, query, 60, numpy.sort(few), is_alone=True
            )
            assert set(kept.tolist()) == set(few.tolist())
        assert scope.archived


def test_of_a_tree_a_part_leaves_and_comes_back_with_its_headings(mos: MOS, clock: Clock) -> None:
    tree = mos.register_memory(TreeTextMemory("book", embedder=None, clock=clock))
    root = tree.add_document("# Cats\n\n## Food\n\nFish.\n\n## Sleep\n\nAll day.\n")
    food, sleep = tree.children(root.id)
    assert mos.archive(food.id) == 2
    assert contents(tree.children(root.id)) == ["Sleep"]
    assert contents(mos.retrieve("book", "fish")) == []
    assert mos.archive(root.id) == 3
    hit = mos.retrieve("book", "fish", include_archived=True)[0]
    assert (hit.content, hit.state) == ("Fish.", "ARCHIVED")
    mos.use(hit)
    hit = mos.retrieve("book", "fish", include_ancestors=True)[0]
    assert contents(list(hit.ancestors)) == ["Food", "Cats"]
    assert mos.get(sleep.id).state == "ACTIVATED"  # by its id, and back with that
    mos.freeze(hit.id)
    with pytest.raises(ArgumentError, match="FROZEN"):
        mos.archive(root.id)
    with pytest.raises(ArgumentError, match="FROZEN"):
        mos.delete("book", root.id)


def test_of_a_graph_a_node_leaves_with_its_relationships(mos: MOS, clock: Clock) -> None:
    graph = mos.register_memory(GraphMemory("people", embedder=None, clock=clock))

    def person(name: str) -> MemCube:
        node = {"type": "node", "label": "Person", "properties": {"name": name}}
        return mos.add("people", node)

    ada, bob, eve = (person(name) for name in ("Ada", "Bob", "Eve"))
    graph.relate(ada.id, "KNOWS", bob.id)
    graph.relate(bob.id, "KNOWS", eve.id)
    assert mos.archive(bob.id) == 3
    query = {"node": {"id": ada.id}, "depth": 2}
    (hit,) = mos.retrieve("people", query)
    assert hit.neighbours == ()
    (hit,) = mos.retrieve("people", query, include_archived=True)
    assert len(hit.neighbours) == 4
    mos.use(bob.id)
    (hit,) = mos.retrieve("people", query)
    assert len(hit.neighbours) == 4
    mos.archive(ada.id)
    mos.archive(bob.id)
    graph.relate(eve.id, "LIKES", bob.id)  # Bob is needed, and back
    (hit,) = mos.retrieve("people", {"node": {"id": eve.id}, "depth": 1})
    assert sorted(c.kind for c in hit.neighbours) == ["node", "relationship", "relationship"]
    assert [c.state for c in graph.cubes(None) if c.id == ada.id] == []


# Frozen, pinned.


def test_frozen_cubes_cannot_change_and_are_found(mos: MOS, clock: Clock) -> None:
    texts(mos, clock)
    cube = mos.add("notes", "The treaty was signed in 1992.", ttl_s=10)
    other = mos.add("notes", "Something else.")
    assert mos.freeze(cube.id, why="evidence").state == "FROZEN"
    for change in (
        lambda: mos.update("notes", cube.id, "The treaty was signed in 1993."),
        lambda: mos.update("notes", cube.id, metadata={"a": 1}),
        lambda: mos.delete("notes", cube.id),
        lambda: mos.relate(cube.id, "beside", other.id),
        lambda: mos.archive(cube.id),
        lambda: mos.purge(cube.id),
        lambda: mos.purge(memory="notes"),
    ):
        with pytest.raises(ArgumentError, match="FROZEN"):
            change()
    assert mos.merge_duplicates("notes", [cube.id, other.id], why="asked") == []
    clock.now += 100
    mos.sweep(hot_cubes=0)
    assert contents(mos.retrieve("notes", "treaty")) == [cube.content]
    assert mos.get(cube.id).versions == 1
    mos.relate(other.id, "beside", cube.id)  # what others say of it is not its own
    mos.thaw(cube.id)
    assert mos.retrieve("notes", "treaty") == []  # its time is over
    with pytest.raises(ArgumentError, match="not FROZEN"):
        mos.thaw(other.id)


def test_what_was_learnt_from_a_changed_cube_is_not_marked_while_it_is_frozen(
    mos: MOS, clock: Clock
) -> None:
    texts(mos, clock)
    source = mos.add("notes", "A fact.")
    learner = mos.add("notes", "Learnt.", relations=[{"type": "learnt_from", "target": source.id}])
    mos.freeze(learner.id)
    mos.update("notes", source.id, "Another fact.")
    assert mos.get(learner.id).metadata == {}
    mos.thaw(learner.id)
    mos.update("notes", source.id, "A third fact.")
    assert mos.get(learner.id).metadata == {"stale": [source.id]}


def test_pinned_cubes_stay(mos: MOS, clock: Clock) -> None:
    texts(mos, clock)
    cube = mos.add("notes", "Stays.")
    mos.add("notes", "Leaves.")
    mos.pin(cube.id)
    with pytest.raises(ArgumentError, match="pinned"):
        mos.archive(cube.id)
    (done,) = mos.sweep(hot_cubes=0)
    assert (done.hot, done.over) == (1, 1)
    assert contents(mos.memory("notes").cubes()) == ["Stays."]
    mos.pin(cube.id, False)
    assert mos.archive(cube.id) == 1


def test_a_merged_cube_cannot_change(mos: MOS, clock: Clock) -> None:
    texts(mos, clock)
    one, two = mos.add("notes", "Ada likes tea."), mos.add("notes", "Ada likes tea!")
    mos.merge_duplicates("notes")
    for id in (one.id, two.id):
        with pytest.raises(ArgumentError, match="undo the merge"):
            mos.update("notes", id, "x")
        with pytest.raises(ArgumentError, match="MERGED"):
            mos.freeze(id)
    assert mos.archive(one.id) == 1  # it stands for itself from now on


# Uses.


def test_uses_are_counted_in_memory_and_written_in_batches(tmp_path: Path, clock: Clock) -> None:
    with MOS(tmp_path / "s", clock=clock) as mos:
        texts(mos, clock)
        one, two = mos.add("notes", "The cat sleeps."), mos.add("notes", "The dog sleeps.")
        for _ in range(3):
            mos.retrieve("notes", "cat", 1)
        mos.context("dog", limit=1)
        with mos.records.database.read() as connection:
            assert mos.records.uses.of(connection, [1, 2]) == {}
        clock.now += 7 * 86400
        mos.get(one.id)
    with MOS(tmp_path / "s", clock=clock) as mos:
        use = mos.uses(one.id)
        assert (use.count, use.last, use.heat) == (4, clock.now, pytest.approx(2.5))
        assert use.heat_at(clock.now + 7 * 86400) == pytest.approx(1.25)
        assert mos.uses(two.id).count == 1
        assert {cube.state for cube in mos.memory("notes").cubes()} == {"ACTIVATED"}


def test_uses_are_written_at_a_bound(mos: MOS, clock: Clock) -> None:
    memory = texts(mos, clock)
    mos.records.uses._bound = 4
    cubes = mos.add_many("notes", [{"content": f"Note {i}."} for i in range(10)])
    for cube in cubes:
        memory.get(cube.id)
    assert len(mos.records.uses) == 2
    with mos.records.database.read() as connection:
        assert len(mos.records.uses.of(connection, range(1, 11))) == 8


def test_sessions_have_no_states(mos: MOS) -> None:
    from memos import KVCacheMemory

    config = {"hidden_size": 32, "num_attention_heads": 4, "num_layers": 2}
    mos.register_memory(KVCacheMemory("kv", model_config=config))
    with pytest.raises(ArgumentError, match="keeps its own budget"):
        mos.sweep(hot_cubes=1, memory="kv")
    with pytest.raises(ArgumentError, match="has no states"):
        mos.archive("s", "kv")


def test_the_page_has_the_table() -> None:
    page = Path(__file__).parent.parent / "docs" / "lifecycle.md"
    if not page.exists():
        pytest.skip("the documents are tested in the source tree")
    words = {"a call": "call", "its time": "ttl", "undo of the merge": "undo"}
    told: dict[tuple[str, str], set[str]] = {}
    for line in page.read_text().split("## The moves")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[0] == "from" or cells[0].startswith("---"):
            continue
        old = cells[0].split(", ")
        if cells[0] == "all but FROZEN":
            old = [state for state in STATES if state not in ("FROZEN", "DELETED")]
        by = {part.split(" (")[0] for part in cells[2].split(", ")}
        for one, new in itertools.product(old, cells[1].split(", ")):
            told[one, new] = {words.get(part, part) for part in by}
    table = {(edge.old, edge.new): set(edge.triggers) for edge in EDGES}
    assert told.keys() == table.keys()
    for ends, triggers in table.items():
        assert triggers <= told[ends], ends
