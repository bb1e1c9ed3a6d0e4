"""A process that is killed while the scheduler moves: what was committed is whole, or a miss."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from memos.records.check import check  # noqa: E402

from . import models  # noqa: E402
from .scheduler_processes import budgets, lines, opened, prompt, schedule  # noqa: E402

ROOT = Path(__file__).parent.parent
KILLS = 16


def look(folder: Path) -> int:
    """Open what a killed process left, and look at all of it; how many sessions were whole."""
    mos, kv = opened(folder)
    whole = 0
    with mos, kv:
        assert check(mos.records) == []
        report = kv.store.verify()
        assert report.is_clean, report.places
        limits = budgets(kv)
        held = kv.store.held()
        assert held["disk"] <= limits["disk"], "it was held at the moment of the kill"
        scheduler = schedule(mos, kv, None)
        held = kv.store.held()
        assert held["host"] <= limits["host"]
        assert held["disk"] <= limits["disk"]
        model = models.tiny("llama")
        for session in kv.tenant.sessions():
            ids = session.token_ids
            assert ids[: len(prompt(int(session.id[1:]), 60))][:20] == prompt(
                int(session.id[1:]), 20
            )
            cache = kv.get(session.id).content
            n = cache.get_seq_length()
            has = kv.tenant.contains(session.keys)
            assert n in (len(ids), has * 8), "whole, or as much as is there"
            whole += n == len(ids)
            if n:
                with torch.no_grad():
                    exact = model(torch.tensor([ids[:n]])).past_key_values
                for ours, theirs in zip(cache.dense().layers, exact.layers, strict=True):
                    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-4)
        for line in lines(folder, "text"):
            _, id, text = line.split(" ", 2)
            assert mos.get(id).content == text
        for _ in range(3):
            scheduler.step()
            assert scheduler.worker is None or scheduler.worker.wait(30)
            held = kv.store.held()
            assert held["host"] <= limits["host"]
            assert held["disk"] <= limits["disk"]
            assert kv.pools.held() <= limits["device"]
        if texts := lines(folder, "text"):
            mos.context(texts[0].split(" ", 2)[2], as_kv=True, share=0.0)
        assert kv.store.verify().is_clean
        assert kv.store.stats()["misses"].keys() <= {"absent", "gone"}, "a clean miss"
    return whole


def wait_for(folder: Path, kind: str) -> None:
    """Until one more of these was noted."""
    count, deadline = len(lines(folder, kind)), time.monotonic() + 10
    while len(lines(folder, kind)) == count:
        assert time.monotonic() < deadline, f"no {kind} was noted"
        time.sleep(0.0005)


def test_kills_at_random_moments(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    rng = random.Random(time.time_ns())
    whole = 0
    with subprocess.Popen(
        [sys.executable, "-m", "tests.scheduler_processes", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for seed in range(KILLS):
            parent.stdin.write(f"{seed}\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            is_moving = seed % 2
            wait_for(tmp_path, "session")
            if is_moving:
                wait_for(tmp_path, "begins")
            time.sleep(rng.uniform(0, 0.003 if is_moving else 0.6))
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "killed\n"
            whole += look(tmp_path)
        parent.stdin.close()
    assert whole > KILLS
    kinds = {line.split(" ")[1] for line in lines(tmp_path, "move")}
    assert {"drop", "archive", "activate"} <= kinds
    assert kinds & {"promote", "prefetch"}
