"""Processes for test_lifecycle_jobs.py and test_lifecycle_crash.py.

python lifecycle_processes.py TASK FOLDER [ARGUMENT]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from memos import MOS, GeneralTextMemory
from memos.lifecycle.jobs import Kind

UNITS = 40


def counting(mos: MOS, slow_s: float = 0.0) -> None:
    """Teach a kind of job whose units each add one cube: done twice would be seen."""
    memory = mos.memory("notes")

    def prepare(payload: Any) -> str:
        time.sleep(slow_s)
        return f"unit {payload}"

    def apply(connection: Any, payload: Any, prepared: str) -> dict[str, float]:
        memory.add(prepared)
        time.sleep(slow_s)
        return {"sum": payload}

    plan = lambda arguments: [(str(i), i) for i in range(arguments["units"])]  # noqa: E731
    mos.jobs.register("count", Kind(plan, apply, prepare))


def opened(folder: Path) -> MOS:
    mos = MOS(folder)
    mos.register_memory(GeneralTextMemory("notes", embedder=None, on_duplicate="keep"))
    return mos


def work(folder: Path, slow: str = "0.002") -> None:
    """Work on all jobs; the process is killed somewhere in it, or comes to an end."""
    with opened(folder) as mos:
        counting(mos, float(slow))
        os.write(1, b"begin\n")
        mos.jobs.run_until_empty()
    os.write(1, b"end\n")


def move(folder: Path, first: str = "0") -> None:
    """Archive, use, freeze, thaw, merge, sweep, purge in turn, until the process is killed."""
    with opened(folder) as mos:
        os.write(1, b"begin\n")
        for i in range(int(first), int(first) + 100_000):
            one = mos.add("notes", f"Nr {i} is on the mat.", {"i": i})
            two = mos.add("notes", f"Nr {i} is really on the mat.", {"i": i})
            mos.archive(one.id)
            mos.get(one.id)
            mos.freeze(one.id)
            mos.thaw(one.id)
            (made,) = mos.merge_duplicates("notes", [one.id, two.id])
            if i % 3 == 0:
                mos.undo_merge(made.id)
            if i % 5 == 0:
                mos.sweep(hot_cubes=6)
            if i % 7 == 0:
                mos.purge(two.id)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
