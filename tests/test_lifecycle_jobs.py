"""Jobs: units that are done once, whatever dies, in whatever process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory
from memos.errors import ArgumentError, NotFoundError, QuotaError
from memos.lifecycle import Policy
from memos.lifecycle.jobs import Kind
from memos.lifecycle.work import sweep_arguments
from memos.records.check import check
from tests.lifecycle_processes import UNITS, counting, opened

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "lifecycle_processes.py"


def begin(task: str, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a task; returns once it works."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), task, str(folder), *arguments],
        stdout=subprocess.PIPE,
        bufsize=0,  # what is read beyond the first line would be lost to communicate()
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begin\n"
    return process


@pytest.fixture
def mos(tmp_path: Path) -> Iterator[MOS]:
    with opened(tmp_path / "s") as made:
        counting(made)
        yield made


def done(mos: MOS) -> list[str]:
    return sorted(cube.content for cube in mos.memory("notes").cubes(None))


def test_units_are_done_in_order_and_reported(mos: MOS) -> None:
    job = mos.jobs.submit("count", units=5)
    assert (job.state, job.is_over, job.arguments) == ("QUEUED", False, {"units": 5})
    assert mos.jobs.submit("count", units=5).id == job.id  # it waits already
    seen: list[tuple[int, int]] = []
    assert mos.jobs.run_until_empty(progress=lambda j: seen.append((j.done, j.units))) == 5
    assert seen == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    job = mos.jobs.get(job.id)
    assert (job.state, job.result, job.is_over) == ("DONE", {"sum": 10}, True)
    assert done(mos) == [f"unit {i}" for i in range(5)]
    assert mos.jobs.submit("count", units=5).id != job.id
    assert "1 wait, no thread works" in repr(mos.jobs)


def test_a_job_without_units_is_done(mos: MOS) -> None:
    job = mos.jobs.submit("count", units=0)
    mos.jobs.run_until_empty()
    assert mos.jobs.get(job.id).state == "DONE"


def test_the_queue_is_bounded(mos: MOS) -> None:
    mos.jobs.limit = 3
    for units in range(3):
        mos.jobs.submit("count", units=units)
    with pytest.raises(QuotaError, match="at most 3 may wait"):
        mos.jobs.submit("count", units=9)
    mos.jobs.run_until_empty()
    mos.jobs.submit("count", units=9)
    with pytest.raises(ArgumentError, match="one of count, distil, duplicates, facts, sweep"):
        mos.jobs.submit("dance")


def test_units_that_fail_are_tried_again_and_given_up(mos: MOS) -> None:
    tries: list[int] = []

    def apply(connection: Any, payload: int, _: Any) -> dict[str, float]:
        mos.memory("notes").add(f"half of {payload}")
        tries.append(payload)
        if payload == 1:
            raise RuntimeError("no luck")
        return {"ok": 1}

    mos.jobs.register("luck", Kind(lambda arguments: [(str(i), i) for i in range(3)], apply))
    job = mos.jobs.submit("luck")
    mos.jobs.run_until_empty()
    job = mos.jobs.get(job.id)
    assert (job.state, job.done, job.failed) == ("FAILED", 2, 1)
    assert job.error == "RuntimeError: no luck"
    assert sorted(tries) == [0, 1, 1, 1, 2]
    assert done(mos) == ["half of 0", "half of 2"]  # what failed left nothing behind
    with pytest.raises(ArgumentError, match="is over"):
        mos.jobs.cancel(job.id)
    mos.jobs.register("luck", Kind(lambda arguments: [], lambda c, p, _: {"ok": 1}))
    mos.jobs.retry(job.id)
    mos.jobs.run_until_empty()
    assert (mos.jobs.get(job.id).state, mos.jobs.get(job.id).result) == ("DONE", {"ok": 3})
    with pytest.raises(ArgumentError, match="FAILED wanted"):
        mos.jobs.retry(job.id)


def test_a_plan_that_fails_ends_the_job(mos: MOS) -> None:
    job = mos.jobs.submit("sweep", memories="notes")
    mos.jobs.run_until_empty()
    assert (mos.jobs.get(job.id).state, mos.jobs.get(job.id).error) == (
        "FAILED", "memories: a list of names wanted",
    )  # fmt: skip
    with pytest.raises(NotFoundError):
        mos.jobs.get(99)


def test_a_cancelled_job_is_left(mos: MOS) -> None:
    job = mos.jobs.submit("count", units=10)

    def stop(one: Any) -> None:
        if one.done == 3:
            assert mos.jobs.cancel(one.id).state == "CANCELLED"

    mos.jobs.run_until_empty(progress=stop)
    assert mos.jobs.get(job.id).done == 3
    assert len(done(mos)) == 3


def test_a_thread_works_when_it_is_asked_to(mos: MOS) -> None:
    before = threading.active_count()
    mos.jobs.submit("count", units=3)
    assert threading.active_count() == before
    mos.jobs.start()
    with pytest.raises(ArgumentError, match="already"):
        mos.jobs.start()
    last = mos.jobs.submit("count", units=4)
    deadline = time.monotonic() + 60
    while not mos.jobs.get(last.id).is_over and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mos.jobs.get(last.id).state == "DONE"
    mos.jobs.stop()
    assert threading.active_count() == before
    mos.jobs.submit("count", units=5)
    assert len(done(mos)) == 7


def test_the_thread_ends_with_the_mos(tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(tmp_path / "s") as mos:
        counting(mos, 0.01)
        mos.jobs.submit("count", units=1000)
        mos.jobs.start()
    assert threading.active_count() == before
    with opened(tmp_path / "s") as mos:
        (job,) = mos.jobs.list()
        assert not job.is_over
        assert len(done(mos)) == job.done


def test_jobs_survive_kills_and_each_unit_is_done_once(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with opened(folder) as mos:
        counting(mos)
        id = mos.jobs.submit("count", units=UNITS).id
    rng = random.Random(1)
    for _ in range(4):
        process = begin("work", folder)
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with opened(folder) as mos:
            job = mos.jobs.get(id)
            assert len(done(mos)) == job.done
            assert check(mos.records) == []
    # Two share what is left.
    workers = [begin("work", folder) for _ in range(2)]
    for process in workers:
        out, _ = process.communicate(timeout=120)
        assert (out, process.returncode) == (b"end\n", 0)
    with opened(folder) as mos:
        job = mos.jobs.get(id)
        assert (job.state, job.done) == ("DONE", UNITS)
        assert job.result == {"sum": sum(range(UNITS))}
        assert done(mos) == sorted(f"unit {i}" for i in range(UNITS))


def test_a_unit_that_another_worker_did_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as one, opened(tmp_path / "s") as two:
        counting(two)
        counting(one)
        kind = one.jobs._kinds["count"]

        def prepare(payload: Any) -> str:
            if payload == 3:
                two.jobs.run_until_empty()
            return str(kind.prepare(payload))

        one.jobs.register("count", Kind(kind.plan, kind.apply, prepare))
        job = one.jobs.submit("count", units=8)
        assert one.jobs.run_until_empty() == 3
        assert one.jobs.get(job.id).result == {"sum": 28}
        assert done(one) == [f"unit {i}" for i in range(8)]


def test_sweeps_duplicates_and_facts_as_jobs(tmp_path: Path) -> None:
    with MOS(tmp_path / "s") as mos:
        for name in ("a", "b"):
            memory = mos.register_memory(GeneralTextMemory(name, embedder=None))
            memory.add_many([{"content": f"Note {i}."} for i in range(20)])
        mos.add("a", "Note 7!")
        mos.add("b", "Ada lives in Paris.")
        mos.add("b", "Ada lives in Rome.")
        ids = [
            mos.jobs.submit("duplicates", memory="a").id,
            mos.jobs.submit("facts", memory="b").id,
            mos.jobs.submit("sweep", **sweep_arguments(Policy(hot_cubes=5), ["a", "b"])).id,
        ]
        mos.jobs.run_until_empty()
        results = [dict(mos.jobs.get(id).result) for id in ids]
        assert results[0] == {"merged": 1}
        assert results[1] == {"changed": 2}
        assert results[2]["archived"] == 15 + 17
        assert check(mos.records) == []


def test_a_distillation_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    with MOS(tmp_path / "s") as mos:
        for name in ("chat", "long"):
            mos.register_memory(GeneralTextMemory(name, embedder=None))
        items = [{"content": f"Nr{i} lives in Town{i}."} for i in range(60)]
        mos.memory("chat").add_many(items)
        job = mos.jobs.submit("distil", memory="chat", into="long", extract="rules", again=False)

        class CutError(Exception):
            pass

        def cut(one: Any) -> None:
            if one.done == 1:
                raise CutError

        with pytest.raises(CutError):
            mos.jobs.run_until_empty(progress=cut)
        assert len(mos.memory("long").cubes(None)) == 20
    with MOS(tmp_path / "s") as mos:
        mos.jobs.run_until_empty()
        assert mos.jobs.get(job.id).state == "DONE"
        assert len(mos.memory("long").cubes(None)) == 60
