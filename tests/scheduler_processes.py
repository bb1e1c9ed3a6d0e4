"""A process that lives off a scheduler with small budgets until it is killed; made by forking, so
that the next one does not import everything anew. Run by test_scheduler_kills."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memos import MOS, GeneralTextMemory, KVCacheMemory
from memos.errors import QuotaError
from memos.scheduler import Rules
from tests import models
from tests.test_activation import NOTES
from tests.test_compose import Words

SESSIONS = 8
WORDS = " ".join(NOTES.values()).split()


def kv_memory(folder: Path) -> KVCacheMemory:
    return KVCacheMemory(
        "chat", model=models.tiny("llama"), tokenizer=Words(), path=folder / "kv", codec="raw",
        block_tokens=8, device_bytes=1, durable=False,
    )  # fmt: skip


def budgets(kv: KVCacheMemory) -> dict[str, int]:
    """Less than what all sessions take, in every tier."""
    block = kv.identity.block_bytes()
    return {"device": 12 * block, "host": 24 * block, "disk": 64 * block}


def schedule(mos: MOS, kv: KVCacheMemory, every_s: float | None) -> Any:
    rules = Rules(archive_rate=3e-4, background=0.01)
    return mos.schedule(
        budgets(kv), every_s=every_s, rules=rules, activator="chat", tune=False
    )  # fmt: skip


def opened(folder: Path) -> tuple[MOS, KVCacheMemory]:
    mos = MOS(folder / "m")
    mos.register_memory(GeneralTextMemory("notes", embedder=None))
    kv = kv_memory(folder)
    mos.register_memory(kv)
    return mos, kv


def prompt(session: int, tokens: int) -> list[int]:
    g = random.Random(session)
    return [g.randrange(1, models.VOCAB) for _ in range(tokens)]


def announced(note: Callable[..., None], move: Callable[..., Any]) -> Callable[..., Any]:
    """The same move; that it begins is noted."""

    def moves(*args: Any) -> Any:
        note("begins", move.__name__)
        return move(*args)

    return moves


def live(folder: Path, seed: int) -> None:
    """Talk, use and add texts, until the end."""
    g = random.Random(seed)
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(journal, (" ".join(map(str, words)) + "\n").encode())

    mos, kv = opened(folder)
    scheduler = schedule(mos, kv, 0.005)
    router = scheduler._router
    for name in ("copy", "discard", "archive"):
        setattr(router, name, announced(note, getattr(router, name)))
    told: set[str] = set()
    while True:
        what = g.random()
        i = min(int(g.expovariate(0.5)), SESSIONS - 1)
        if what < 0.5:
            try:
                turn = kv.begin(f"s{i}", prompt(i, g.randrange(20, 60)))
                turn.commit(kv._model.generate(**turn.inputs, max_new_tokens=2, do_sample=False))
                note("session", f"s{i}")
            except QuotaError:
                note("full", i)  # all that could leave is in use or moves just now
        elif what < 0.55:
            note("delete", f"s{i}")
            if kv.has(f"s{i}"):
                kv.delete(f"s{i}")
        elif what < 0.65:
            text = " ".join(g.choices(WORDS, k=12))
            note("text", mos.add("notes", text).id, text)
        else:
            known = [line.split()[1] for line in lines(folder, "text")]
            for id in known[: 1 + i] if g.random() < 0.7 else known[-2:]:
                mos.use(id)
        new = {o.action.kind for o in scheduler.last_actions(50) if o.state == "done"} - told
        for kind in sorted(new):
            note("move", kind)
        told |= new


def lines(folder: Path, kind: str) -> list[str]:
    """What all processes so far have noted; a line that was cut off is none."""
    if not (folder / "journal").exists():
        return []
    whole = (folder / "journal").read_text().rpartition("\n")[0]
    return [line for line in whole.split("\n") if line.split(" ")[0] == kind]


def main() -> None:
    """For each line, a seed: a new process lives; its number is said, and when it is gone."""
    torch.set_num_threads(1)
    models.tiny("llama")
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                live(folder, int(line))
            finally:
                import traceback

                traceback.print_exc()
                os._exit(1)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        sys.stdout.write("killed\n" if was_killed else "ended by itself\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
