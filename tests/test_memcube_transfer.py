"""Memories through a file into another store: nothing lost, nothing double, nothing half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos import MOS, TreeTextMemory, VectorMemory
from memos.errors import ArgumentError, NotFoundError

from .memcube_help import (
    Embedder,
    dump,
    filled,
    moved,
    opened,
    problems,
    state_of,
    vectors_in,
)

KEY = bytes(range(32))


# Export, import, export gives equal bytes.


@pytest.mark.parametrize("on_disk", [True, False])
def test_nothing_is_lost(tmp_path: Path, on_disk: bool) -> None:
    one = filled(tmp_path / "a" if on_disk else None)
    first = one.export(tmp_path / "1.memcube")
    two = MOS(tmp_path / "b" if on_disk else None)
    report = two.import_(tmp_path / "1.memcube", embedder=None)
    second = two.export(tmp_path / "2.memcube")
    assert (tmp_path / "1.memcube").read_bytes() == (tmp_path / "2.memcube").read_bytes()
    assert first.digest == second.digest == report.digest
    assert first.memories == second.memories
    assert first.num_bytes == (tmp_path / "1.memcube").stat().st_size
    assert state_of(one) == state_of(two)
    assert problems(two) == []
    told = {name: (r.kind, r.is_new, r.cubes) for name, r in report.memories.items()}
    assert told["notes"] == ("text", True, 3)
    assert told["people"] == ("graph", True, 5)


def test_encrypted_stores(tmp_path: Path) -> None:
    """What comes into one is sealed there; what is exported from one is not, unless it is asked."""
    one = filled(embedder=Embedder())
    one.export(tmp_path / "1")
    with MOS(tmp_path / "two", key=KEY) as two:
        two.import_(tmp_path / "1", embedder=None)
        assert problems(two) == []
    for file in (tmp_path / "two").rglob("*"):
        if file.is_file():
            assert not any(word in file.read_bytes() for word in (b"spare key", b"boiler", b"Ada"))
    with MOS(tmp_path / "two", key=KEY) as two:
        assert state_of(one) == state_of(two)
        two.export(tmp_path / "2")
        two.export(tmp_path / "3", passphrase=KEY)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert b"spare key" not in (tmp_path / "3").read_bytes()


def test_it_is_found_as_before(tmp_path: Path) -> None:
    one = filled(embedder=Embedder())
    two = opened(embedder=Embedder())
    report = moved(one, tmp_path, two)[1]
    assert {r.vectors for r in report.memories.values()} == {"kept"}
    for query in ("key", "boiler cellar", "water", "who does Ada know", "letters"):
        for name in (None, "notes", "docs", "people"):
            a, b = one.retrieve(name, query, 10), two.retrieve(name, query, 10)
            assert [(h.memory, h.id) for h in a] == [(h.memory, h.id) for h in b]
            assert [h.score for h in a] == pytest.approx([h.score for h in b], abs=1e-3)
    near = [[h.id for h in m.retrieve("points", [0.1, 1.0, -2.0])] for m in (one, two)]
    assert near == [["p2", "p1"]] * 2
    around = [m.memory("people").neighbourhood("ada") for m in (one, two)]
    assert [[n.id for n in found.nodes] for found in around] == [["ada", "carl"]] * 2
    root = one.memory("docs").roots()[0].id
    assert one.memory("docs").export_text(root) == two.memory("docs").export_text(root)
    assert one.retrieve("notes", "key", filters={"n": {"$gt": 1}})[0].id == "key"
    assert two.retrieve("notes", "key", filters={"n": {"$gt": 1}})[0].id == "key"


def test_it_goes_on_living(tmp_path: Path) -> None:
    """What came can be changed, related, moved and deleted like what was added."""
    two, _ = moved(filled(), tmp_path)
    two.update("notes", "key", "The key is back.", author="me")
    two.relate("key", "answers", "odd")
    two.memory("docs").move("late", None)
    edge = {"type": "relationship", "label": "LIKES", "source_id": "ada", "target_id": "rome"}
    two.add("people", edge)
    two.add("points", [1.0, 2.0, 3.0])
    two.delete("people", "carl")
    two.add("notes", "new here")
    assert problems(two) == []
    three, _ = moved(two, tmp_path)
    assert state_of(two) == state_of(three)


def test_an_empty_store_and_empty_memories_travel(tmp_path: Path) -> None:
    MOS().export(tmp_path / "none.memcube")
    two = MOS()
    assert two.import_(tmp_path / "none.memcube").memories == {}
    opened().export(tmp_path / "empty.memcube")
    two.import_(tmp_path / "empty.memcube", embedder=None)
    assert {n: m.kind for n, m in two.memories.items()} == {
        **{"notes": "text", "docs": "tree", "people": "graph", "points": "vector"},
    }
    assert two.memory("notes").description == "what was said"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
metadata = st.dictionaries(texts, values, max_size=3)
steps = st.lists(
    st.tuples(
        st.sampled_from(["note", "branch", "node", "edge", "update", "delete", "relate", "move"]),
        st.integers(0, 30), st.integers(0, 30), texts, metadata,
    ),
    min_size=1, max_size=25,
)  # fmt: skip


def play(mos: MOS, history: list[Any]) -> None:
    """A random history; what a memory refuses is left out."""
    ids: list[tuple[str, str]] = []

    def some(number: int, memory: str | None = None) -> str:
        found = [id for name, id in ids if memory in (None, name)]
        return found[number % len(found)] if found else "none"

    for i, (step, a, b, text, items) in enumerate(history):
        id = f"c{i}"
        try:
            match step:
                case "note":
                    mos.add("notes", text, items, id=id, importance=(a % 11) / 10)
                    ids.append(("notes", id))
                case "branch":
                    parent = some(a, "docs") if b % 3 else None
                    ttl = 1e9 + b if a % 4 == 0 else None
                    mos.add("docs", text, items, id=id, parent_id=parent, ttl_s=ttl)
                    ids.append(("docs", id))
                case "node":
                    node = {"type": "node", "label": "N", "properties": {"name": text}}
                    mos.add("people", node, items, id=id)
                    ids.append(("people", id))
                case "edge":
                    ends = {"source_id": some(a, "people"), "target_id": some(b, "people")}
                    mos.add("people", {"type": "relationship", "label": "E", **ends}, id=id)
                case "update":
                    name, one = ids[a % len(ids)]
                    content = text if b % 2 and name != "people" else None
                    mos.update(name, one, content, items, author=text)
                case "delete":
                    mos.delete(*ids[a % len(ids)])
                case "relate":
                    mos.relate(some(a), "r", some(b), properties=items, weight=(b + 1) / 7)
                case "move":
                    mos.memory("docs").move(some(a, "docs"), some(b, "docs"))
        except (ArgumentError, NotFoundError, ZeroDivisionError):
            pass


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_random_histories_travel(tmp_path: Path, history: list[Any]) -> None:
    one, two = opened(), MOS()
    play(one, history)
    first, second = tmp_path / "1.memcube", tmp_path / "2.memcube"
    one.export(first, overwrite=True)
    two.import_(first, embedder=None)
    two.export(second, overwrite=True)
    assert first.read_bytes() == second.read_bytes()
    assert state_of(one) == state_of(two)
    assert problems(two) == []
    again = two.import_(first, on_conflict="skip")
    assert sum(r.cubes for r in again.memories.values()) == 0
    assert state_of(one) == state_of(two)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.lists(st.integers(0, 24), min_size=1, max_size=4))
def test_random_parts_travel(tmp_path: Path, history: list[Any], numbers: list[int]) -> None:
    """Some cubes arrive as they were, with what they need; the rest follows later."""
    one, two = opened(), MOS()
    play(one, history)
    ids = [f"c{n}" for n in numbers]
    part, whole = tmp_path / "part.memcube", tmp_path / "whole.memcube"
    one.export(whole, overwrite=True)
    try:
        one.export(part, ids, overwrite=True)
    except NotFoundError:
        return
    two.import_(part, embedder=None)
    assert problems(two) == []
    there = state_of(two)
    for name, found in state_of(one).items():
        if "/" not in name:
            mine = dict(there.get(name, []))
            assert all(mine.get(id, versions) == versions for id, versions in found)
            assert all(id in mine for id in ids if id in dict(found))
    two.import_(whole, on_conflict="skip", embedder=None)
    assert problems(two) == []
    assert relations_of(one) == relations_of(two)


def relations_of(mos: MOS) -> set[Any]:
    with mos.records.database.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT m.name, s.id, r.type, n.name, t.id, r.weight, r.properties, "
            "r.cube IS NULL FROM relations AS r JOIN cubes AS s ON s.seq = r.source "
            "JOIN cubes AS t ON t.seq = r.target JOIN memories AS m ON m.id = s.memory "
            "JOIN memories AS n ON n.id = t.memory"
        )
        return {tuple(row) for row in rows}


# What is chosen.


def test_some_memories(tmp_path: Path) -> None:
    one = filled()
    assert set(one.export(tmp_path / "1", memory="notes").memories) == {"notes"}
    made = one.export(tmp_path / "2", memory=["notes", "points"])
    assert made.memories == {"notes": 3, "points": 3}
    with pytest.raises(NotFoundError, match="other"):
        one.export(tmp_path / "3", memory="other")


def test_ids_bring_what_they_cannot_stand_without(tmp_path: Path) -> None:
    one = filled()
    assert one.export(tmp_path / "1", ["e1"]).memories == {"people": 3}
    assert one.export(tmp_path / "2", ["key", "p1"]).memories == {"notes": 1, "points": 1}
    assert one.export(tmp_path / "3", ["late"]).memories == {"docs": 2}
    two = MOS()
    two.import_(tmp_path / "3", embedder=None)
    assert two.get("late").parent_id == one.memory("docs").roots()[0].id
    with pytest.raises(NotFoundError, match="nobody"):
        one.export(tmp_path / "4", ["key", "nobody"])
    with pytest.raises(NotFoundError):
        one.export(tmp_path / "5", ["key"], memory="points")
    assert not any(p.name in "45" for p in tmp_path.iterdir())


def test_relations_wait_for_their_other_end(tmp_path: Path) -> None:
    one = filled()
    one.export(tmp_path / "people", memory="people")
    one.export(tmp_path / "notes", memory="notes")
    two = MOS()
    report = two.import_(tmp_path / "people", embedder=None)
    assert report.memories["people"].waiting == 1
    assert two.get("ada").relations == ()
    two.export(tmp_path / "again", memory="people")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "people").read_bytes()
    two.import_(tmp_path / "notes", embedder=None)
    (relation,) = two.get("ada").relations
    assert (relation.type, relation.target) == ("wrote", "odd")
    assert relation.properties == {"when": "today"}
    assert relations_of(two) >= {r for r in relations_of(one) if r[0] == "people"}


# Into a store that has something already.


def test_ids_that_are_there(tmp_path: Path) -> None:
    one = filled()
    one.export(tmp_path / "1", memory="notes")
    two = opened()
    two.add("notes", "Mine, with another id.", id="mine")
    two.import_(tmp_path / "1")
    before = dump(two)
    with pytest.raises(ArgumentError, match="already"):
        two.import_(tmp_path / "1")
    assert dump(two) == before
    report = two.import_(tmp_path / "1", on_conflict="skip").memories["notes"]
    assert (report.cubes, report.skipped) == (0, 3)
    assert [c.id for c in two.memory("notes").cubes()] == ["odd", "key", "mine"]
    two.update("notes", "key", "newer here")
    report = two.import_(tmp_path / "1", on_conflict="skip").memories["notes"]
    assert report.skipped == 3
    assert two.get("key").content == "newer here"
    one.update("notes", "key", "newer there")
    one.export(tmp_path / "2", memory="notes")
    before = dump(two)
    with pytest.raises(ArgumentError, match="history has not the version"):
        two.import_(tmp_path / "2", on_conflict="skip")
    assert dump(two) == before
    with pytest.raises(ArgumentError, match="on_conflict"):
        two.import_(tmp_path / "1", on_conflict="overwrite")


def test_what_is_new_comes_beside_what_is_skipped(tmp_path: Path) -> None:
    one = filled()
    two, _ = moved(one, tmp_path)
    for i in range(3):
        one.add("notes", f"later {i}", id=f"later-{i}")
    one.add("docs", "below late", parent_id="late", id="below")
    report = moved(one, tmp_path, two, on_conflict="skip")[1]
    assert {n: r.cubes for n, r in report.memories.items()} == {
        **{"notes": 3, "docs": 1, "people": 0, "points": 0},
    }
    assert two.get("below").parent_id == "late"
    assert problems(two) == []


def test_a_memory_of_another_kind_is_refused(tmp_path: Path) -> None:
    filled().export(tmp_path / "1", memory="notes")
    two = MOS()
    two.register_memory(TreeTextMemory("notes", embedder=None))
    with pytest.raises(ArgumentError, match="kind"):
        two.import_(tmp_path / "1")
    assert two.stats()["memories"]["notes"]["cubes"] == 0


def test_another_name_beside_one_that_is_there(tmp_path: Path) -> None:
    """What two stores made of one memory is merged, by the versions they have in common."""
    one = filled()
    two, _ = moved(one, tmp_path)
    one.update("notes", "key", None, {"here": 1})
    two.update("notes", "key", "Changed elsewhere.")
    two.add("notes", "New elsewhere.", id="new")
    two.relate("ada", "reads", "new")
    path = tmp_path / "theirs"
    two.export(path, memory=["notes", "people"])
    with pytest.raises(ArgumentError, match="already"):
        one.import_(path)
    names = {"notes": "notes of two", "people": "people of two"}
    report = one.import_(path, names=names, embedder=None)
    assert set(report.memories) == set(names.values())
    assert sum(r.waiting for r in report.memories.values()) == 0
    assert problems(one) == []
    related = one.get("ada", "people of two").relations
    assert {(r.type, r.target) for r in related} == {("wrote", "odd"), ("reads", "new")}
    assert one.history("key", "notes of two")[-1].digest == two.history("key")[-1].digest
    one.merge("notes of two", "notes")
    assert one.get("key", "notes").content == "Changed elsewhere."
    assert one.get("key", "notes").metadata["here"] == 1
    assert one.get("new", "notes").content == "New elsewhere."
    for wrong in ({"other": "x"}, {"notes": ""}, {"notes": "people"}):
        with pytest.raises(ArgumentError, match="names"):
            one.import_(path, names=wrong)


# Vectors.


def test_vectors_of_the_same_embedder_stay(tmp_path: Path) -> None:
    one = filled(embedder=Embedder())
    same = Embedder()
    two = opened(embedder=same)
    moved(one, tmp_path, two)
    assert same.texts == 0
    for name in ("notes", "docs", "people"):
        assert vectors_in(one, name) == vectors_in(two, name) != {}


@pytest.mark.parametrize("on_disk", [True, False])
def test_vectors_of_another_embedder_are_made_again(tmp_path: Path, on_disk: bool) -> None:
    one = filled(embedder=Embedder("one"))
    other = Embedder("two")
    two = opened(tmp_path / "two" if on_disk else None, embedder=other)
    report = moved(one, tmp_path, two)[1]
    assert report.memories["notes"].vectors == "re-embedded"
    assert other.texts > 0
    plain_two = filled(embedder=Embedder("two"))
    for name in ("notes", "docs", "people"):
        assert set(vectors_in(two, name)) == set(vectors_in(one, name))
    assert vectors_in(two, "notes") == vectors_in(plain_two, "notes")
    two.add("notes", "one more")
    assert two.retrieve("notes", "spare key")[0].id == "key"


def test_without_an_embedder_vectors_are_kept_or_dropped(tmp_path: Path) -> None:
    one = filled(embedder=Embedder("one"))
    two, report = moved(one, tmp_path)
    assert report.memories["notes"].vectors == "kept"
    assert vectors_in(one, "notes") == vectors_in(two, "notes")
    two.export(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "moved.memcube").read_bytes()
    # Three have vectors of another one, and nobody makes them here.
    three = opened(tmp_path / "three", embedder=Embedder("two"))
    three.add("notes", "with a vector of two")
    three.close()
    three = opened(tmp_path / "three")
    report = moved(one, tmp_path, three)[1]
    assert report.memories["notes"].vectors == "dropped"
    assert len(vectors_in(three, "notes")) == 1
    assert problems(three) == []
    assert three.retrieve("notes", "spare key")[0].id == "key"


def test_vectors_with_their_tokens(tmp_path: Path) -> None:
    class Tokens(Embedder):
        def embed_with_tokens(self, texts: Any, kind: str) -> Any:
            vectors = self.embed(texts, kind)
            return vectors, [vectors[i : i + 1].repeat(len(t) % 4 + 1, 0) for i, t in
                             enumerate(texts)]  # fmt: skip

    one, two = filled(embedder=Tokens()), opened(embedder=Tokens())
    moved(one, tmp_path, two)
    tables = [dump(mos)["vectors"] for mos in (one, two)]
    tokens = [sorted(row.split(", ")[3] for row in table) for table in tables]
    assert tokens[0].count("None") < len(tokens[0])
    assert [t for t in tokens[0] if t != "None"] == [t for t in tokens[1] if t != "None"]
    moved(two, tmp_path, MOS())


def test_vectors_that_an_application_made_are_content(tmp_path: Path) -> None:
    one = MOS()
    one.register_memory(VectorMemory("points", dim=3, metric="l2", dtype="float16"))
    one.add("points", [0.5, 1.0, 2.0], id="p")
    one.export(tmp_path / "1")
    two = MOS()
    two.import_(tmp_path / "1")
    memory = two.memory("points")
    assert (memory.metric, memory.dtype, memory.dim) == ("l2", "float16", 3)
    assert two.get("p").content["vector"].tolist() == [0.5, 1.0, 2.0]
    three = MOS()
    three.register_memory(VectorMemory("points", metric="cosine"))
    with pytest.raises(ArgumentError, match="l2"):
        three.import_(tmp_path / "1")
    three = MOS()
    three.register_memory(VectorMemory("points", embedder=Embedder("x")))
    three.add("points", "a text")
    with pytest.raises(ArgumentError, match="made by x"):
        three.import_(tmp_path / "1")


def test_states_of_life_travel(tmp_path: Path) -> None:
    one = filled(embedder=Embedder())
    with one.records.database.write() as connection:
        life = one.memory("notes").table.life
        seqs = one.memory("notes").table.ids(connection, ["odd", "key"])
        life.move(connection, [seqs["odd"]], "ARCHIVED", trigger="call", at=5.0)
        life.move(connection, [seqs["key"]], "FROZEN", trigger="call", at=5.0)
    two = opened(embedder=Embedder())
    moved(one, tmp_path, two)
    assert problems(two) == []
    assert two.get("key").state == "FROZEN"
    assert [h.id for h in two.retrieve("notes", "separators quotes")] == [
        h.id for h in one.retrieve("notes", "separators quotes")
    ]
    two.export(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "moved.memcube").read_bytes()
