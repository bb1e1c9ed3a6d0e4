"""Audit: what is recorded, what is never recorded, and that no change of a log goes unseen."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos import MOS, GeneralTextMemory, TreeTextMemory, cli
from memos.errors import AccessError, ArgumentError, MemosError, NotFoundError, StoreError
from memos.governance.audit import FOLDER
from memos.governance.log import Head, Log, lines, segments
from memos.governance.verify import verify
from tests.access_model import Clock

SECRET = "quicksilver"


def opened(path: Path, **more: Any) -> MOS:
    mos = MOS(path, audit=True, clock=Clock(), **more)
    if "notes" not in mos.memories:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.register_memory(TreeTextMemory("book", embedder=None))
    return mos


# What is recorded.


def test_one_record_for_each_access_and_change(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as mos:
        mos.add("notes", "the key is under the mat", id="a", source="web")
        mos.add("notes", "the key of the vault", id="b", acl={"read": ["user:eve"]})
        mos.update("notes", "a", "the key is on the shelf")
        mos.grant("user:ann", "read", "notes")
        before = len(mos.audit.records())
        ann = mos.as_principal("user:ann", purpose="ticket 7")
        hits = ann.retrieve(query="key")
        context = ann.context("key")
        ann.get("a")
        ann.history("a")
        with pytest.raises(NotFoundError):
            ann.get("b")
        with pytest.raises(AccessError):
            ann.update("notes", "a", "mine")
        ann.memory("notes").cubes()
        mos.memory("notes").get("b")
        mos.relate("a", "near", "b")
        mos.delete("notes", "b")
        found = mos.audit.records()[before:]
        told = [(r.who, r.what, r.result, [c[:3] for c in r.cubes], r.changed) for r in found]
        a2 = ("notes", "a", 2)
        assert told == [
            ("user:ann", "retrieve", "ok", [a2], ()),
            ("user:ann", "context", "ok", [a2], ()),
            ("user:ann", "get", "ok", [a2], ()),
            ("user:ann", "history", "ok", [a2], ()),
            ("user:ann", "get", "not found", [], ()),
            ("user:ann", "update", "refused", [], ()),
            ("user:ann", "cubes", "ok", [a2], ()),
            ("owner", "read", "ok", [("notes", "b", 1)], ()),
            ("owner", "relate", "ok", [], (("notes", "a", 3, "CREATED"),)),
            ("owner", "delete", "ok", [], (("notes", "b", 2, "DELETED"),)),
        ]
        assert {r.why for r in found if r.who == "user:ann"} == {"ticket 7"}
        assert found[0].cubes[0][3] == pytest.approx(hits[0].score, abs=1e-3)
        assert mos.audit.prompts(context.text) == [found[1]]
        assert mos.audit.records(id="b", what="delete") == [found[-1]]
        assert mos.audit.verify() == []


def test_the_folder_remembers(tmp_path: Path) -> None:
    path = tmp_path / "m"
    opened(path).close()
    with MOS(path) as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.add("notes", "text", id="x")
        mos.get("x")
        head = mos.audit.head
    with MOS(path, readonly=True) as mos:  # reading is recorded, although nothing else is written
        mos.get("x")
        assert mos.audit.head.count == head.count + 1
    with MOS(path, readonly=True, audit=False) as mos:
        mos.get("x")
        with pytest.raises(StoreError, match="audit=True"):
            mos.audit  # noqa: B018
    with pytest.raises(ArgumentError, match="readonly"):
        MOS(path, audit=False)
    with MOS(path) as mos:
        assert mos.audit.head.count == head.count + 1
        assert mos.audit.verify(head) == mos.audit.verify(head.hash) == []
    with pytest.raises(ArgumentError, match="folder"):
        MOS(audit=True)
    with MOS(tmp_path / "other") as mos, pytest.raises(StoreError):
        mos.audit  # noqa: B018


def test_no_content_no_query_no_password_is_recorded(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as mos:
        mos.add("notes", f"the {SECRET} key", {"who": f"{SECRET}1"}, id="a")
        mos.retrieve(query=f"where is {SECRET}", filters={"who": f"{SECRET}1"})
        mos.context(f"where is {SECRET}")
        mos.update("notes", "a", f"more {SECRET}", {"x": SECRET})
        mos.memory("book").add_document(f"# {SECRET}\n\ntext")
        with pytest.raises(MemosError):
            mos.add("notes", "", {"k": SECRET})
        mos.as_principal("user:ann").retrieve(query=SECRET)
        kept = b"".join(path.read_bytes() for _, path in segments(tmp_path / "m" / FOLDER))
        assert SECRET.encode() not in kept
        assert len(mos.audit.records()) >= 6
        # Who has the query can find what was asked with it.
        name = mos.audit.fingerprint(f"where is {SECRET}")
        assert [r.what for r in mos.audit.records() if r.more.get("query") == name] == [
            "retrieve",
            "context",
        ]


def test_every_version_of_the_store_has_a_record(tmp_path: Path) -> None:
    rng = random.Random(3)
    with opened(tmp_path / "m") as mos:
        ids: list[str] = []
        for i in range(120):
            kind = rng.choice(("add", "many", "update", "delete", "below", "fail"))
            if kind == "add" or not ids:
                ids.append(mos.add("notes", f"text {i}").id)
            elif kind == "many":
                ids += [
                    c.id for c in mos.add_many("notes", [{"content": f"{i} {j}"} for j in "ab"])
                ]
            elif kind == "update":
                mos.update("notes", rng.choice(ids), f"new {i}")
            elif kind == "delete":
                mos.delete("notes", ids.pop(rng.randrange(len(ids))))
            elif kind == "below":
                top = mos.add("book", f"heading {i}").id
                mos.add("book", f"below {i}", parent_id=top)
                mos.update("book", top, f"title {i}")
            else:
                with pytest.raises(ArgumentError):
                    mos.add_many("notes", [{"content": f"x{i}"}, {"content": 5}])
        told = {tuple(c[:3]) for r in mos.audit.records() for c in r.changed}
        with mos.records.database.read() as connection:
            rows = connection.exec_driver_sql(
                "SELECT m.name, c.id, c.version FROM cubes c JOIN memories m ON m.id = c.memory "
                "UNION SELECT m.name, c.id, v.version FROM versions v JOIN cubes c USING (seq) "
                "JOIN memories m ON m.id = c.memory"
            ).fetchall()
        assert {tuple(row) for row in rows} <= told
        assert mos.audit.verify() == []


# Traces.


def test_a_cube_is_traced(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as mos:
        mos.add("notes", "one", id="s", source="mail", creator="user:ann")
        mos.add("notes", "two", id="t", derived_from=["s"])
        mos.update("notes", "t", "three", author="agent:tutor", source="chat")
        mos.grant("user:ann", ["read", "write"], "notes")
        ann = mos.as_principal("user:ann")
        ann.get("t")
        mos.get("t")
        trace = mos.trace("t")
        assert (trace.origin.source, trace.origin.derived_from) == (None, ("s",))
        assert [(v.number, v.author) for v in trace.changes] == [(1, None), (2, "agent:tutor")]
        assert [(u.who, u.what) for u in trace.uses] == [
            *(("owner", what) for what in ("add", "update")),
            ("user:ann", "get"),
            ("owner", "get"),
        ]
        assert "agent:tutor" in str(trace)
        assert "made" in str(trace)
        assert [(u.who, u.what) for u in ann.trace("t").uses] == [("user:ann", "get")]
        mos.delete("notes", "t")
        assert mos.trace("t", "notes").changes[-1].state == "DELETED"
        with pytest.raises(NotFoundError):
            mos.trace("nowhere")
        with pytest.raises(ArgumentError):
            mos.trace(7)


def test_a_context_is_traced(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as mos:
        for i in range(6):
            mos.add("notes", f"the key number {i} opens door {i} of the long house", id=f"k{i}")
        context = mos.context("which key opens door 3", 30)
        trace = mos.trace(context)
        cited = {(c.number, c.id, c.version) for c in context.citations}
        assert {(r.number, r.id, r.version) for r in trace.reached if r.number} == cited
        assert {r.id for r in trace.reached if not r.number} == {h.id for h in context.hits} - {
            c.id for c in context.citations
        }
        assert all("score" in r.why for r in trace.reached if r.number)
        assert {r.why for r in trace.reached if not r.number} <= {"does not fit", "repeats another"}
        (use,) = trace.uses
        assert use.what == "context"
        again = mos.trace(context.text)  # all that is left of it is the prompt
        assert {(r.number, r.id, r.version) for r in again.reached if r.number} == cited
        assert mos.as_principal("user:eve").trace(context).uses == ()


# The log.


def bodies(folder: Path) -> list[bytes]:
    return [line.body for line in lines(folder) if b"segment full" not in line.body]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 200)), max_size=40),
    st.integers(300, 2000),
)
def test_several_writers_make_one_chain(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    logs: list[Log | None] = [None, None, None]
    wanted = []
    for i, (who, length) in enumerate(steps):
        log = logs[who]
        if log is None or length % 7 == 0:
            if log is not None:
                log.close()
            log = logs[who] = Log(folder, "g", segment_bytes=size)
        body = json.dumps({"who": who, "i": i, "x": "y" * length}).encode()
        head = log.append(body)
        wanted.append(body)
    for log in logs:
        if log is not None:
            assert log.head() == head
            log.close()
    assert bodies(folder) == wanted
    if wanted:
        report = verify(folder, "g", head)
        assert report.is_whole
        assert not report.notes
        assert not verify(folder, "another store", head).is_whole


def test_every_damage_is_found(tmp_path: Path) -> None:
    """Changed bytes, and lines taken out, put in, doubled and exchanged."""
    folder = tmp_path / "log"
    log = Log(folder, "g", b"k", segment_bytes=2500)
    for i in range(60):
        head = log.append(json.dumps({"who": "owner", "i": i, "x": "z" * (i % 50)}).encode())
    log.close()
    paths = [path for _, path in segments(folder)]
    assert len(paths) > 2
    clean = {path: path.read_bytes() for path in paths}
    rng = random.Random(1)

    def broken(change: Any) -> bool:
        for path in folder.glob("*.log"):
            path.unlink()
        for path, data in clean.items():
            path.write_bytes(data)
        change()
        return not verify(folder, "g", head, key=b"k").is_whole

    for _ in range(150):
        path = rng.choice(paths)
        at = rng.randrange(len(clean[path]))
        bit = 1 << rng.randrange(8)

        def flip(path: Path = path, at: int = at, bit: int = bit) -> None:
            data = bytearray(clean[path])
            data[at] ^= bit
            path.write_bytes(bytes(data))

        assert broken(flip), (path.name, at, bit)
    for _ in range(40):
        path = rng.choice(paths)
        rows = clean[path].splitlines(keepends=True)
        i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
        made = {
            "removed": rows[:i] + rows[i + 1 :],
            "doubled": rows[: i + 1] + rows[i:],
            "inserted": [*rows[:i], rows[j], *rows[i:]],
            "cut": rows[:i],
        }
        swapped = list(rows)
        swapped[i], swapped[j] = rows[j], rows[i]
        if i != j:
            made["moved"] = swapped
        for what, new in made.items():
            assert broken(lambda p=path, new=new: p.write_bytes(b"".join(new))), (what, i, j)
    for path in paths:
        assert broken(path.unlink), path.name
    assert broken(lambda: paths[0].rename(folder / "000009.log"))

    # Whoever has the key, and makes all later hashes anew, is found by the head that was kept.
    def forged() -> None:
        for path in paths:
            path.unlink()
        log = Log(folder, "g", b"k", segment_bytes=2500)
        for i in range(60):
            log.append(
                json.dumps({"who": "owner", "i": i + (i == 7), "x": "z" * (i % 50)}).encode()
            )
        log.close()

    assert broken(forged)
    assert verify(folder, "g", None, key=b"k").is_whole
    assert not verify(folder, "g", None, head.hash, key=b"k").is_whole
    assert not broken(lambda: None)


@pytest.mark.parametrize("part", range(2))
def test_a_crash_in_an_append_is_repaired(tmp_path: Path, part: int) -> None:
    folder = tmp_path / "log"
    log = Log(folder, "g", segment_bytes=1500)
    heads = [log.append(json.dumps({"i": i, "x": "y" * 40}).encode()) for i in range(30)]
    log.close()
    last = segments(folder)[-1][1]
    whole = last.read_bytes()
    before = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(before, len(whole), 1 + part):
        torn = whole[:cut] if part == 0 else whole + whole[before:][: cut - before]
        last.write_bytes(torn + (b"\0" * 100 if cut % 5 == 4 else b""))
        known = heads[-2] if part == 0 else heads[-1]
        report = verify(folder, "g", known)
        assert report.is_whole
        assert len(report.notes) <= 1
        log = Log(folder, "g", segment_bytes=1500)
        assert log.head() == known
        again = log.append(b'{"after":"the crash"}')
        log.close()
        assert again.count == known.count + 1
        report = verify(folder, "g", again)
        assert report.is_whole
        assert not report.notes
        for _, path in segments(folder)[1:]:
            if path > last:
                path.unlink()
        last.write_bytes(whole)


def _append(folder: str, who: int, count: int) -> None:
    log = Log(Path(folder), "g", segment_bytes=20_000)
    for i in range(count):
        log.append(json.dumps({"who": who, "i": i}).encode())
    log.close()


def test_processes_and_threads_share_a_log(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(str(folder), i, 300)) for i in range(2)]
    Log(folder, "g").close()
    for process in processes:
        process.start()
    log = Log(folder, "g", segment_bytes=20_000)
    threads = [
        threading.Thread(
            target=lambda who=who: [
                log.append(json.dumps({"who": who, "i": i}).encode()) for i in range(300)
            ]
        )
        for who in (8, 9)
    ]
    for thread in threads:
        thread.start()
    for worker in (*threads, *processes):
        worker.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found = [json.loads(body) for body in bodies(folder)]
    for who in (0, 1, 8, 9):
        assert [one["i"] for one in found if one["who"] == who] == list(range(300))
    assert verify(folder, "g", log.head()).is_whole
    log.close()


def _change(path: str) -> None:
    mos = MOS(path)
    mos.register_memory(GeneralTextMemory("notes", embedder=None))
    for i in range(100_000):
        mos.add("notes", f"text {i}", id=f"c{i}")
        mos.get(f"c{i}")


def test_a_killed_process_leaves_no_change_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "m"
    opened(path).close()
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        process = context.Process(target=_change, args=(str(path),))
        process.start()
        log = path / FOLDER / "000001.log"
        size = log.stat().st_size if log.exists() else 0
        while process.is_alive() and log.stat().st_size < size + 20_000:
            time.sleep(0.01)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with MOS(path) as mos:
            assert mos.audit.verify() == []
            told = {c[1] for r in mos.audit.records() for c in r.changed}
            stored = {cube.id for cube in mos.memory("notes").cubes(None)}
            assert stored
            assert stored <= told
        path = tmp_path / "n"
        opened(path).close()


def test_a_full_disk_refuses_the_access(tmp_path: Path) -> None:
    """What cannot be recorded does not happen."""
    with opened(tmp_path / "m") as mos:
        mos.add("notes", "text", id="x")
        os.close(mos.audit._log._file)
        read, write = os.pipe()  # a file that nothing can be written to at a place
        mos.audit._log._file = read
        with pytest.raises(StoreError):
            mos.add("notes", "more", id="y")
        with pytest.raises(StoreError):
            mos.get("x")
        os.close(write)
        mos.audit._log._file = os.open(tmp_path / "m" / FOLDER / "000001.log", os.O_RDWR)
        os.close(read)
        with pytest.raises(NotFoundError):
            mos.get("y")


# The command line.


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m"
    with opened(path) as mos:
        mos.add("notes", "text", id="x")
        mos.get("x")
    assert cli.main(["audit", "verify", str(path)]) == 0
    assert "2 records" in capsys.readouterr().out
    assert cli.main(["audit", "head", str(path)]) == 0
    count, hash = capsys.readouterr().out.split()
    assert count == "2"
    assert cli.main(["audit", "verify", str(path), "--head", hash]) == 0
    assert cli.main(["audit", "verify", "--store", str(path), "--head", "0" * 64]) == 1
    capsys.readouterr()
    assert cli.main(["audit", "records", str(path), "--id", "x", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["records"]
    assert [(one["what"], one["who"]) for one in found] == [("add", "owner"), ("get", "owner")]
    assert cli.main(["audit", "records", str(path)]) == 0
    assert "notes/x" in capsys.readouterr().out
    log = path / FOLDER / "000001.log"
    data = log.read_bytes()
    log.write_bytes(data.replace(b'"add"', b'"get"', 1))
    assert cli.main(["audit", "verify", str(path)]) == 1
    assert "record 1" in capsys.readouterr().err
    assert cli.main(["audit", "verify", str(path), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["is_whole"]
    log.write_bytes(data[: data.index(b"\n") + 1])
    assert cli.main(["audit", "verify", str(path)]) == 1
    assert "cut off" in capsys.readouterr().err


def test_heads_compare() -> None:
    assert Head(1, "a") == Head(1, "a")
