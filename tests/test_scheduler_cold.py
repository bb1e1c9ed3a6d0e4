"""Texts that nobody has used since the process began: the coldest, and archived all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from memos import MOS, GeneralTextMemory, TreeTextMemory
from memos.errors import NotFoundError
from memos.facade import schedule
from memos.scheduler import Rules

DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def step(mos: MOS) -> None:
    mos.scheduler.step()
    worker = mos.scheduler.worker
    assert worker is not None
    assert worker.wait(30)


def states(mos: MOS, name: str) -> dict[str, str]:
    memory = mos.memory(name)
    with mos.records.database.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT id, state FROM cubes WHERE memory = ?", (memory.table.memory,)
        ).all()
    return {str(row[0]): str(row[1]) for row in rows}


def test_texts_of_another_life_are_archived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some in each step; not what is pinned, frozen, new, or was used lately in any process."""
    monkeypatch.setattr(schedule, "_LOOKED_AT", 7)
    clock = Clock()
    with MOS(tmp_path / "m", clock=clock) as mos:
        mos.register_memory(GeneralTextMemory("other", embedder=None, clock=clock))
        mos.register_memory(GeneralTextMemory("notes", embedder=None, clock=clock))
        ids = [mos.add("notes", f"old note {i}").id for i in range(20)]
        mos.add("other", "of another memory")
        mos.pin(ids[3])
        mos.freeze(ids[4])
        clock.now += 30 * DAY
        for _ in range(4):
            mos.use(ids[5])
        new = mos.add("notes", "a new note").id
    clock.now += 0.2 * DAY
    with MOS(tmp_path / "m", clock=clock) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None, clock=clock))
        rules = Rules(archive_rate=0.5 / DAY)
        mos.schedule({"host": 1000}, every_s=None, rules=rules, tune=False)
        mos.scheduler.half_life_s = DAY
        mos.use(ids[6])
        archived = []
        for _ in range(5):
            step(mos)
            now = states(mos, "notes")
            archived.append(sum(state == "ARCHIVED" for state in now.values()))
        assert archived[0] <= 7, "a bounded number in each step"
        assert archived == sorted(archived)
        kept = {id for id, state in now.items() if state != "ARCHIVED"}
        assert kept == {ids[3], ids[4], ids[5], ids[6], new}
        mos.scheduler.refresh()
        assert len(mos.scheduler) == 1, "what is archived is no unit, nor what is not cold"
        # The walk begins again: what has become cold since is found.
        clock.now += 30 * DAY
        for _ in range(5):
            step(mos)
        kept = {id for id, state in states(mos, "notes").items() if state != "ARCHIVED"}
        assert kept == {ids[3], ids[4]}
        hits = mos.retrieve("notes", "old note", 50, include_archived=True)
        assert set(ids) <= {hit.id for hit in hits}


def test_what_has_something_below_it_waits_for_that(tmp_path: Path) -> None:
    clock = Clock()
    with MOS(tmp_path / "m", clock=clock) as mos:
        tree = mos.register_memory(TreeTextMemory("t", embedder=None, clock=clock))
        root = tree.add_document("# A\n\nOne paragraph.\n\nAnother one.")
        below = [cube.id for cube in tree.descendants(root.id)]
        clock.now += 30 * DAY
        rules = Rules(archive_rate=0.5 / DAY)
        mos.schedule({"host": 1000}, every_s=None, rules=rules, tune=False)
        for _ in range(10):
            mos.use(below[0])
        for _ in range(3):
            step(mos)
        now = states(mos, "t")
        assert now[below[0]] != "ARCHIVED"
        assert now[root.id] != "ARCHIVED", "its parent stays as long as it does"
        assert "ARCHIVED" in now.values()
        clock.now += 30 * DAY
        for _ in range(4):
            step(mos)
        assert set(states(mos, "t").values()) == {"ARCHIVED"}, "from below, level by level"


def test_explain_knows_texts_that_nobody_used(tmp_path: Path) -> None:
    clock = Clock()
    with MOS(tmp_path / "m", clock=clock) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None, clock=clock))
        id = mos.add("notes", "an old note").id
    clock.now += 30 * DAY
    with MOS(tmp_path / "m", clock=clock) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None, clock=clock))
        scheduler = mos.schedule({"host": 1000}, every_s=None, tune=False)
        step(mos)
        assert len(scheduler) == 0, "without a rule of archiving nothing is looked at"
        found = scheduler.explain(f"notes/{id}")
        assert found["copies"] == ["disk"]
        assert found["uses_per_hour"] < 1e-6
        for unknown in ("notes/nothing", "nowhere/x"):
            with pytest.raises(NotFoundError):
                scheduler.explain(unknown)
