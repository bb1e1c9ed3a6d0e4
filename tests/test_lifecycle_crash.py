"""A process that dies in the middle of a move leaves each cube in its old or its new state."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, TreeTextMemory
from memos.errors import MemosError
from memos.records import life, purge
from memos.records.check import check
from memos.records.states import EDGES
from tests.lifecycle_processes import opened
from tests.test_lifecycle_jobs import begin


class CutError(Exception):
    """The lights go out."""


def everything(folder: Path) -> dict[str, list[Any]]:
    """Every row that a move may touch, and the words of full text."""
    found = {}
    with sqlite3.connect(folder / "records.sqlite") as db:
        for name in ("cubes", "cold", "transitions", "versions", "bodies", "vectors", "facts"):
            found[name] = db.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3").fetchall()
        found["words"] = db.execute("SELECT term, doc, cnt FROM words_1").fetchall()
    db.close()
    return found


def moves(mos: MOS, ids: list[str]) -> dict[str, Any]:
    return {
        "archive": lambda: mos.archive(ids[0]),
        "freeze": lambda: mos.freeze(ids[1]),
        "merge": lambda: mos.merge_duplicates("m"),
        "sweep": lambda: mos.sweep(hot_cubes=2),
        "delete": lambda: mos.delete("m", ids[0]),
        "purge": lambda: mos.purge(ids[0]),
        "wake": lambda: mos.get(ids[-1]),
    }


@pytest.mark.parametrize("name", ["archive", "freeze", "merge", "sweep", "delete", "purge", "wake"])
def test_a_move_that_is_cut_off_anywhere_has_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the first, second, ... statement that writes, until the move comes to its end."""
    cut_off = 0
    for step in range(200):
        folder = tmp_path / str(step)
        with MOS(folder) as mos:
            mos.register_memory(GeneralTextMemory("m", embedder=None))
            texts = ["The cat sleeps.", "The dog barks.", "The dog really barks.", "Fish swim."]
            ids = [mos.add("m", text, {"i": 1}).id for text in texts]
            mos.archive(ids[-1])
        before = everything(folder)
        mos = MOS(folder)
        mos.register_memory(GeneralTextMemory("m", embedder=None))
        count = 0

        def counted(number: int = step) -> None:
            nonlocal count
            count += 1
            if count > number:
                raise CutError

        for module, attributes in (
            (life, ("_texts",)),
            (life.Life, ("record", "_states")),
            (purge, ("_bury", "_drop_bodies", "texts_of")),
            (type(mos.memory("m").table.fulltext), ("insert", "delete", "refill", "forget")),
        ):
            for attribute in attributes:
                original = getattr(module, attribute)

                def wrapped(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                    counted()
                    result = _original(*args, **kwargs)
                    counted()
                    return result

                monkeypatch.setattr(module, attribute, wrapped)
        was_cut = False
        try:
            moves(mos, ids)[name]()
        except CutError:
            was_cut = True
        finally:
            monkeypatch.undo()
        mos.records.database.close()  # as a process that dies: nothing is written at its end
        after = everything(folder)
        with MOS(folder, readonly=True) as again:
            assert check(again.records) == []
        if was_cut:
            assert after == before
            cut_off += 1
        else:
            assert after != before
            break
    assert cut_off > 2


def test_kills_at_random_moments(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    rng = random.Random(2)
    legal = {(edge.old, edge.new) for edge in EDGES}
    for round_ in range(5):
        process = begin("move", folder, str(1000 * round_))
        time.sleep(rng.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with opened(folder) as mos:
            assert check(mos.records) == []
            with mos.records.database.read() as connection:
                rows = connection.exec_driver_sql("SELECT seq, id, state FROM cubes").all()
            for seq, id, state in rows:
                told = mos.transitions(id)
                assert all((one.old, one.new) in legal for one in told)
                assert (told[-1].new if told else "CREATED") == state, seq
            for cube in mos.memory("notes").cubes(None):
                found = mos.retrieve("notes", cube.content, 50)
                assert cube.id in {hit.id for hit in found}


def test_a_tree_is_archived_as_a_whole_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MOS(tmp_path / "s") as mos:
        tree = mos.register_memory(TreeTextMemory("t", embedder=None))
        root = tree.add_document("# A\n\n" + "\n\n".join(f"Paragraph {i}." for i in range(30)))
        monkeypatch.setattr(life.Life, "record", lambda *_, **__: (_ for _ in ()).throw(CutError))
        with pytest.raises(CutError):
            mos.archive(root.id)
        monkeypatch.undo()
        assert len(tree.descendants(root.id)) == 30
        assert mos.archive(root.id) == 31
        assert check(mos.records) == []
        with pytest.raises(MemosError):
            mos.thaw(root.id)
