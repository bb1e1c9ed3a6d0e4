"""Builds, checks and times the GPU backends: ``python benchmarks/gpu.py``.

Needs a GPU of compute capability 8.0 or newer and torch for CUDA; with nvcc the CUDA kernels are
built and measured beside those in Triton. Nothing is downloaded. Checks that every op leaves the
bytes of the CPU, that a captured graph replays, that our CUDA runtime lives beside torch's, and
that compute-sanitizer finds nothing; times everything; and ends in a short table: each kernel's
share of the copy bandwidth, link or matrix rate measured beside it.

Every stage is a process of its own with a limit, so that a fault in one does not take the others
along; rows are written as they come (gpu.jsonl beside --out), and all of them to --out at the end.

Without a GPU it says so and exits with 2; with a stage that failed it exits with 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_checks import check_bytes, check_graph, check_two_runtimes, ready
from gpu_times import (
    Clock,
    Row,
    rates,
    table,
    time_adapters,
    time_blocks,
    time_decode,
    time_kv,
    time_pool,
    time_transfers,
    time_turn,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SANITIZER = ("memcheck", "racecheck")
# In the order in which they run, and the most seconds each may take: what matters most first.
STAGES = {
    "rates": 40, "check": 150, "kv": 110, "blocks": 50, "adapters": 50, "decode": 70,
    "transfers": 50, "graph": 50, "runtimes": 30, "turn": 40, "pool": 50,
    "memcheck": 60, "racecheck": 60,
}  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-build", action="store_true", help="use what is built already")
    parser.add_argument("--only", default="", help="these stages, with commas between them")
    parser.add_argument("--skip", default="", help="all but these")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no stage after these")
    parser.add_argument("--repeats", type=int, default=30, help="measurements per row (median)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the rows go")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.repeats < 1:
        parser.error("--repeats: at least 1 wanted")
    for name in filter(None, f"{found.only},{found.skip}".split(",")):
        if name not in STAGES:
            parser.error(f"--only, --skip: of {', '.join(STAGES)} wanted, got {name}")
    return found


def why_not() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no GPU is here: nothing was built, checked or timed"
    return None


def build(limit_s: float) -> str:
    """The package with the CUDA kernels for this GPU, into this environment; what came of it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps",
               "--quiet", "--disable-pip-version-check", "--no-index",
               "-C", "cmake.define.MEMOS_CUDA=AUTO",
               "-C", f"cmake.define.MEMOS_CUDA_ARCHITECTURES={major}{minor}-real",
               "-e", str(ROOT)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {limit_s:.0f} s"
    return "built" if done.returncode == 0 else f"failed: {(done.stdout + done.stderr)[-1500:]}"


def find_package() -> None:
    """Have ``memos`` importable: as installed, else from this source tree, with Triton alone."""
    if importlib.util.find_spec("memos") is None:
        sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("memos.triton_kernels") is None:
        folder = ROOT / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            "memos.triton_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)


def sanitize(tool: str) -> str:
    """The verdict of compute-sanitizer on the small checks."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        return "not run: compute-sanitizer is not found"
    command = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5",
               sys.executable, __file__, "--stage", "check", "--small"]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=STAGES[tool] - 5, check=False
        )
    except subprocess.TimeoutExpired:
        return "not finished in time"
    if done.returncode == 0:
        return "clean"
    said = done.stdout[-1500:] + done.stderr[-500:]
    refused = "Device not supported" in said or "not supported" in said
    return f"not run: {said[-300:]}" if refused else f"FAULTS: {said}"


def machine() -> dict[str, str]:
    import torch

    def said(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"

    return {
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "commit": said("git", "rev-parse", "HEAD"),
        "changed": said("git", "status", "--porcelain", "--untracked-files=no"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def stage(
    name: str, wanted: argparse.Namespace, rate: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """The lines of one stage: rows, and what it found."""
    clock = Clock(wanted.repeats)
    timed: dict[str, Callable[[], Iterator[Row]]] = {
        "kv": lambda: time_kv(clock, rate["copy"]),
        "blocks": lambda: time_blocks(clock, rate["copy"]),
        "adapters": lambda: time_adapters(clock),
        "decode": lambda: time_decode(clock),
        "transfers": lambda: time_transfers(clock, rate),
        "turn": lambda: time_turn(clock, rate["copy"]),
        "pool": lambda: time_pool(clock, rate),
    }
    if name in timed:
        for row in timed[name]():
            yield {"row": asdict(row)}
    elif name == "rates":
        yield {"rates": rates(clock)}
        yield {"backends": {op: ready(op) for op in ("pack_kv", "apply_adapters_")}}
    elif name == "check":
        yield {"compared": check_bytes(wanted.small)}
    elif name == "graph":
        check_graph()
        yield {"graph replay": "right"}
    elif name == "runtimes":
        check_two_runtimes()
        yield {"two CUDA runtimes": "right"}
    else:
        yield {name: sanitize(name)}


def run_stage(wanted: argparse.Namespace) -> int:
    """One stage, in this process: a line of JSON for all it finds, as it finds it."""
    find_package()
    rate = json.loads(sys.stdin.readline() or "{}") if not wanted.small else {}
    try:
        for line in stage(wanted.stage, wanted, rate):
            print(json.dumps(line), flush=True)
    except Exception:
        print(json.dumps({"failed": traceback.format_exc()[-3000:]}), flush=True)
        return 1
    return 0


def told(
    name: str, wanted: argparse.Namespace, rate: dict[str, float], limit_s: float
) -> list[Any]:
    """What a stage said before it ended, failed, or was ended."""
    command = [sys.executable, __file__, "--stage", name, "--repeats", str(wanted.repeats)]
    lines: list[Any] = []
    try:
        done = subprocess.run(
            command, input=json.dumps(rate) + "\n", capture_output=True, text=True,
            timeout=limit_s, check=False,
        )  # fmt: skip
        said, errors, rc = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        said, errors, rc = _text(late.stdout), f"no end after {limit_s:.0f} s", 1
    for line in said.splitlines():
        if line.startswith("{"):
            lines.append(json.loads(line))
    if rc and not any("failed" in line for line in lines):
        lines.append({"failed": errors[-2000:] or f"ended with {rc}"})
    return lines


def _text(out: str | bytes | None) -> str:
    return out.decode(errors="replace") if isinstance(out, bytes) else out or ""


def main(arguments: Sequence[str] | None = None) -> int:
    wanted = parse(arguments)
    if wanted.stage:
        return run_stage(wanted)
    if (why := why_not()) is not None:
        print(f"gpu: {why}")
        return 2
    began = time.monotonic()
    until = began + 60 * wanted.minutes
    found: dict[str, Any] = {"machine": machine()}
    rows: list[Row] = []
    failed: dict[str, str] = {}
    rate: dict[str, float] = {}
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    with wanted.out.with_suffix(".jsonl").open("w", encoding="utf-8") as log:

        def note(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()

        if not wanted.no_build:
            found["build"] = build(min(240.0, until - time.monotonic()))
            print(f"build: {found['build']} ({time.monotonic() - began:.0f} s)", flush=True)
        note(dict(found))
        only = wanted.only.split(",") if wanted.only else list(STAGES)
        for name, limit_s in STAGES.items():
            if (name not in only and name != "rates") or name in wanted.skip.split(","):
                continue
            left = until - time.monotonic()
            if left < 15:
                failed[name] = "no time was left"
                continue
            start = time.monotonic()
            for line in told(name, wanted, rate, min(limit_s, left)):
                note({"stage": name, **line})
                if "row" in line:
                    rows.append(Row(**line["row"]))
                elif "failed" in line:
                    failed[name] = line["failed"]
                else:
                    found |= line
            rate = found.get("rates", {})
            last = failed.get(name, "").strip().splitlines()
            print(f"{name}: {last[-1] if last else 'done'} ({time.monotonic() - start:.0f} s)",
                  flush=True)  # fmt: skip
            if name == "rates" and not rate:
                print("gpu: nothing can be timed on this machine")
                break
    found["failed"] = failed
    rows_out = [asdict(row) for row in rows]
    wanted.out.write_text(json.dumps({**found, "rows": rows_out}, indent=1) + "\n")
    for name in ("compared", "graph replay", "two CUDA runtimes", *SANITIZER):
        if name in found:
            print(f"{name}: {found[name]}")
    print(", ".join(f"{name} {value:.0f}" for name, value in rate.items()), "(GB/s, TFLOP/s)")
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
