"""Rows of figures with their provenance: a table for people, JSON for programs."""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "numpy", "triton")

Row = dict[str, Any]


def provenance() -> dict[str, Any]:
    """Where and from what the figures come: without it a figure is no figure."""
    from memos.kernels import _native

    core = _native.missing()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": _num_cores(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "isa": core or _native.isa(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


def write(name: str, rows: list[Row], origin: dict[str, Any]) -> Path:
    """``benchmarks/results/<name>.json``: the provenance and every row."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"name": name, **origin, "rows": rows}, indent=1) + "\n")
    return path


def render(name: str, rows: list[Row], origin: dict[str, Any], width: int) -> str:
    """One table of all rows; a column where any row has a figure."""
    machine = origin["machine"]
    dirty = " + changes" if origin["dirty"] else ""
    table = Table(
        title=f"{name}: {machine['cpu']}, {machine['cores']} cores, {machine['isa']}; "
        f"commit {str(origin['commit'])[:10]}{dirty}",
        title_justify="left",
    )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        numbers = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(shown(column, row.get(column)) for column in columns))
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=False).print(table)
    return text.getvalue()


def shown(column: str, value: object) -> str:
    """A figure as a person reads it; the JSON keeps all its digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
    if column.startswith("share") or column in ("cut", "top1"):
        return f"{value:.1%}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty() -> bool:
    """Whether a tracked file other than a result differs from the commit."""
    changes = _git("status", "--porcelain", "--untracked-files=no") or ""
    return any("benchmarks/results/" not in line for line in changes.splitlines())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
