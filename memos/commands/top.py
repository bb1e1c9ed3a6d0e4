"""memos top: the scheduler of the process that works on a folder, as it last told."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.commands import console, folder
from memos.errors import ArgumentError, StoreError

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR = 20
_STALE_S = 60.0


def top(options: argparse.Namespace) -> int:
    """Show frames until it is interrupted, or one."""
    if not options.every > 0:
        raise ArgumentError("--every: seconds above 0 wanted")
    path, named_by = folder.folder_of(options)
    shown = _read(Path(path), named_by)
    if options.json:
        console.write_json(shown)
        return 0
    if options.once:
        console.show(frame(shown, options.limit))
        return 0
    from rich.live import Live

    with Live(frame(shown, options.limit), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(options.every)
            live.update(frame(_read(Path(path), named_by), options.limit), refresh=True)


def _read(path: Path, named_by: str) -> dict[str, Any]:
    from memos.scheduler import snapshot

    found = snapshot.read(path)
    if found is None:
        raise StoreError(
            f"no scheduler has told anything in {path} ({named_by}): mos.schedule(budgets) starts "
            "one; that of an encrypted folder tells nothing"
        )
    return found


def frame(shown: dict[str, Any], limit: int) -> RenderableType:
    """One picture of tiers, memories, the hottest units and the last moves."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    stats = shown["stats"]
    age = max(time.time() - shown["at"], 0.0)
    head = (
        f"process {shown['pid']}, {age:.0f} s ago{' (it may be gone)' if age > _STALE_S else ''}; "
        f"{stats['units']} units, {stats['plans']} plans, "
        f"the last in {stats['plan_s'] * 1e3:.1f} ms; "
        f"a use counts half after {stats['tuning']['half_life_s']:g} s"
    )
    tiers = Table("tier", "", "bytes", "budget", "units", title_justify="left")
    for name, one in stats["tiers"].items():
        share = min(one["bytes"] / one["budget"], 1.0) if one["budget"] else 0.0
        bar = "#" * round(_BAR * share) + "." * (_BAR - round(_BAR * share))
        budget = "none" if one["budget"] >= 1 << 62 else _size(one["budget"])
        tiers.add_row(name, bar, _size(one["bytes"]), budget, f"{one['units']:,}")
    parts: list[RenderableType] = [Text(head), tiers]
    if stats["memories"]:
        memories = Table("memory", "hit rate", "figures")
        for name, figures in stats["memories"].items():
            rate = figures.get("hit_rate")
            rest = ", ".join(f"{k} {v:,}" for k, v in figures.items() if k != "hit_rate")
            memories.add_row(name, "" if rate is None else f"{rate:.1%}", rest)
        parts.append(memories)
    hottest = Table("hottest", "uses an hour", "in")
    for row in shown["hottest"][:limit]:
        uses = f"{row['uses_per_hour']:.3g}"
        hottest.add_row(Text(row["unit"]), uses, ", ".join(row["copies"]) or "nowhere")
    moves = Table("move", "unit", "to", "state", "why")
    for row in shown["actions"][:limit]:
        why = row["reason"] if row["state"] == "done" else row["why"]
        moves.add_row(row["kind"], Text(row["unit"]), row["target"] or "", row["state"], Text(why))
    parts += [hottest, moves]
    if stats["error"]:
        parts.append(Text(f"last error: {stats['error']}"))
    return Group(*parts)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
