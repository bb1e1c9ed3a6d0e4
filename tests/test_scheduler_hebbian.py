"""Edges that use makes: against a plain model, and in a store that is opened again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos import MOS, GeneralTextMemory
from memos.errors import ArgumentError
from memos.records.hebbian import USED_WITH, Hebbian
from memos.records.rights import Actor
from memos.records.scope import Scope
from memos.records.store import Records

events = st.lists(
    st.tuples(st.lists(st.integers(1, 9), max_size=5), st.floats(0, 500), st.booleans()),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(events)
def test_weights_are_those_of_a_plain_model(life: Any) -> None:
    records = Records(None)
    edges = Hebbian(records.database, rate=0.3, cap=0.8, half_life_s=100.0, per_cube=99)
    model: dict[tuple[int, int], tuple[float, float]] = {}
    now = 1000.0
    for seqs, gap, forgets in life:
        now += gap
        edges.used(seqs, now)
        for pair in itertools.combinations(sorted(set(seqs)), 2):
            weight, last = model.get(pair, (0.0, now))
            weight *= 0.5 ** ((now - last) / 100.0)
            model[pair] = weight + 0.3 * (0.8 - weight), now
        edges.write()
        if forgets and seqs:
            with records.database.write() as connection:
                edges.forget(connection, seqs[:1])
            model = {pair: v for pair, v in model.items() if seqs[0] not in pair}
        with records.database.read() as connection:
            found = {(a, b): w for a, t, b, w in edges.edges(connection, range(1, 10), now)}
        wanted = {pair: w * 0.5 ** ((now - last) / 100.0) for pair, (w, last) in model.items()}
        for pair, weight in wanted.items():
            # What is faint when it is written is forgotten, and begins anew.
            assert found.get(pair, 0.0) == pytest.approx(weight, abs=0.0081)
        assert found.keys() <= wanted.keys()
        assert all(0 < weight <= 0.8 for weight in found.values())
    records.close()


def test_a_cube_keeps_its_heaviest_edges() -> None:
    records = Records(None)
    edges = Hebbian(records.database, per_cube=3)
    for other in range(2, 9):
        for _ in range(other):
            edges.used([1, other], 0.0)
    edges.write()
    with records.database.read() as connection:
        found = edges.explain(connection, 1, 0.0)
    assert [edge["with"] for edge in found] == [8, 7, 6]
    assert found[0]["count"] == 8
    edges.used([1, 8], 1.0)
    edges.write()
    with records.database.read() as connection:
        assert edges.explain(connection, 1, 1.0)[0]["count"] == 9
    records.close()


def test_whoever_acts_has_edges_of_its_own() -> None:
    records = Records(None)
    edges = Hebbian(records.database, per_cube=2)
    scopes = {name: Scope(rights=Actor(records.database, name)) for name in ("ann", "ben")}
    edges.used([1, 2], 0.0)
    edges.used([1, 3], 0.0, "ann")
    edges.write()
    for other in range(4, 9):  # none of which ann sees, and which take no place of hers
        for _ in range(3):
            edges.used([1, other], 0.0, "ben")
    edges.write()
    with records.database.read() as connection:
        assert [e["with"] for e in edges.explain(connection, 1, 0.0)] == [2]
        assert [e["with"] for e in edges.explain(connection, 1, 0.0, scopes["ann"])] == [3]
        assert len(edges.explain(connection, 1, 0.0, scopes["ben"])) == 2
        assert edges.edges(connection, [1], 0.0, scopes["ann"]) == [], "it may read neither"
    records.close()


def test_edges_survive_and_are_no_version(tmp_path: Path) -> None:
    records = Records(tmp_path / "a")
    edges = Hebbian(records.database)
    with records.database.read() as connection:
        assert edges.edges(connection, [1, 2], 0.0) == [], "there is no table yet"
    edges.used([2, 1, 2], 0.0)
    edges.used([1, 2], 5.0)
    assert len(edges) == 1
    assert edges.write() == 1
    change = records.database.last_change()
    records.close()
    records = Records(tmp_path / "a")
    assert records.database.last_change() == change
    edges = Hebbian(records.database)
    with records.database.read() as connection:
        [(low, kind, high, weight)] = edges.edges(connection, [2], 5.0)
    assert (low, kind, high) == (1, USED_WITH, 2)
    assert weight == pytest.approx(0.36, abs=1e-3)
    records.close()


def test_readers_write_nothing(tmp_path: Path) -> None:
    Records(tmp_path / "a").close()
    records = Records(tmp_path / "a", readonly=True)
    edges = Hebbian(records.database)
    edges.used([1, 2], 0.0)
    assert edges.write() == 0
    records.close()


def test_many_wait_only_so_long() -> None:
    records = Records(None)
    edges = Hebbian(records.database, bound=10)
    edges.used(range(1, 100), 0.0)  # eight of them are paired: 28
    assert len(edges) == 0
    records.close()


def test_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="rate and cap"):
        Hebbian(None, rate=0)  # type: ignore[arg-type]


def test_scores_tell_nothing_of_what_is_hidden() -> None:
    """With and without cubes that Ann may not read, and whatever others use, she gets the same."""
    shown = ("the kettle is red", "a kettle whistles", "the moon is far", "red wine in a kettle")
    hidden = [f"the kettle of Eve hides number {i}" for i in range(6)]
    answers = []
    for with_hidden in (True, False):
        mos = MOS(clock=lambda: 1e9)
        memory = GeneralTextMemory("notes", embedder=None, on_duplicate="keep", clock=lambda: 1e9)
        mos.register_memory(memory)
        mos.grant("user:ann", "read", "*")
        for i, text in enumerate(shown):
            mos.add("notes", text, id=f"s{i}")
        if with_hidden:
            for i, text in enumerate(hidden):
                mos.add("notes", text, id=f"h{i}", acl={"read": ["user:eve"], "inherit": False})
        ann = mos.as_principal("user:ann")
        for _ in range(3):
            if with_hidden:  # the owner uses everything together, hidden and shown
                assert len(mos.context("kettle red Eve number").hits) > 4
            ann.context("red kettle")
        mos.hebbian.write()
        hits = ann.retrieve("notes", "kettle", limit=9)
        answers.append([(hit.id, pytest.approx(hit.score, rel=1e-12)) for hit in hits])
        assert any(hit.id.startswith("s") for hit in hits)
        with mos.records.database.read() as connection:
            rows = connection.exec_driver_sql(
                "SELECT actor, count(*) FROM hebbian GROUP BY 1"
            ).all()
        assert dict(map(tuple, rows)).keys() == ({"", "user:ann"} if with_hidden else {"user:ann"})
        mos.purge("s0", "notes")
        with mos.records.database.read() as connection:
            seqs = [s for s, _ in mos.records.locate(connection, "s0", dead=True)]
            assert mos.hebbian.edges(connection, seqs, 1e9) == []
        mos.close()
    with_it, without = answers
    assert [id for id, _ in with_it] == [id for id, _ in without]
    assert [s.expected for _, s in with_it] == [s for _, s in without]
