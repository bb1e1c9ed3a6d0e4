"""What a scheduler shows to others: a small file beside the store, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memos.scheduler.scheduler import Scheduler

NAME = "scheduler.json"
_ROWS = 32


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """Everything ``memos top`` shows, as JSON.

    Returns:
        at: seconds since 1970; pid; stats; hottest: [{unit, uses_per_hour, copies}]; actions:
        [{kind, unit, source, target, num_bytes, reason, state, why, seconds, at}], newest first.
    """
    hottest = []
    for id, rate in scheduler.hottest(_ROWS):
        unit = scheduler.find(id)
        if unit is not None:
            hottest.append({"unit": id, "uses_per_hour": rate, "copies": sorted(unit.copies)})
    actions = [
        {
            **dataclasses.asdict(outcome.action),
            "state": outcome.state,
            "why": outcome.why,
            "seconds": outcome.seconds,
            "at": outcome.at,
        }
        for outcome in scheduler.last_actions(_ROWS)
    ]
    return {
        "at": scheduler.clock(),
        "pid": os.getpid(),
        "stats": scheduler.stats(),
        "hottest": hottest,
        "actions": actions,
    }


def write(folder: Path, shown: dict[str, Any]) -> None:
    """Put it into a folder, where only its owner reads it. Raises OSError."""
    number, name = tempfile.mkstemp(prefix=f".{NAME}.", dir=folder)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(shown, file)
        os.replace(name, folder / NAME)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read(folder: Path) -> dict[str, Any] | None:
    """What was written last; None: nothing that can be read."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
