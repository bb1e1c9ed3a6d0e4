""".memcube files: how fast they are written, verified and read, and how much memory that takes.

Each case is a process of its own, so that its peak of resident memory is its own too; base is what
the process had before. A byte is a byte of the file.
  notes      100,000 texts of 25 words with metadata and vectors of 384 numbers, as in test_records
  documents  2,000 texts of 20 kB, each in three versions, without vectors
  adapters   16 adapters of 16 MB
  one cube   an adapter of 5 GB
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.test_records import Topics, items
from memos import MOS, GeneralTextMemory, ParametricMemory

KEY = bytes(range(32))
CONTENTS = ("notes", "documents", "adapters", "one cube")
STEPS = ("export", "inspect", "import")


def opened(content: str, folder: Path) -> MOS:
    mos = MOS(folder)
    if content == "notes":
        mos.register_memory(GeneralTextMemory("notes", embedder=Topics()))
    return mos


def fill(content: str, mos: MOS) -> None:
    if content == "notes":
        mos.add_many("notes", items(0, 100_000))
        return
    if content == "documents":
        memory = mos.register_memory(GeneralTextMemory("documents", embedder=None))
        words = " ".join(item["content"] for item in items(10**8, 3_000))
        for start in range(0, 2_000, 500):
            news = [words[(at * 7_919) % 400_000 :][:20_000] for at in range(start, start + 500)]
            for cube in memory.add_many({"content": text} for text in news):
                memory.update(cube.id, cube.content + " once", author="a")
                memory.update(cube.id, cube.content + " twice", author="b")
        return
    import torch

    from memos.adapters.adapter import Adapter, Factors

    skills = mos.register_memory(ParametricMemory("skills", embedder=None))
    torch.manual_seed(0)
    if content == "one cube":
        name = "model.layers.{}.mlp.up_proj"
        wide = {name.format(i): Factors(*wide_factors(i), 1.0) for i in range(38)}
        skills.add(Adapter(wide, {}), {"name": "wide"})
        return
    for number in range(16):
        one = Factors(torch.randn(512, 4096), torch.randn(4096, 512), 1.0)
        skills.add(Adapter({"model.layers.0.q_proj": one}, {}), {"name": f"skill {number}"})


def wide_factors(seed: int) -> Any:
    """Factors of 134 MB."""
    import torch

    torch.manual_seed(seed)
    return torch.randn(512, 32_768), torch.randn(32_768, 512)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="memos-bench-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def stores(folder: Path) -> dict[str, Path]:
    for content in CONTENTS:
        with opened(content, folder / content) as mos:
            fill(content, mos)
    return {content: folder / content for content in CONTENTS}


CASES = [(c, s, sealed) for c in CONTENTS for sealed in (False, True) for s in STEPS]


@pytest.mark.parametrize(("content", "step", "sealed"), CASES)
def test_memcube(
    benchmark: Any, stores: dict[str, Path], folder: Path, content: str, step: str, sealed: bool
) -> None:
    path = folder / f"{content}-{sealed}.memcube"
    into = folder / f"{content}-{sealed}-new"

    def run() -> dict[str, float]:
        where = into if step == "import" else stores[content]
        arguments = [step, content, str(where), str(path), "sealed" if sealed else "plain"]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.test_memcube", *arguments],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    figures = benchmark.pedantic(run, rounds=1)
    size = path.stat().st_size
    benchmark.extra_info.update(
        content=content,
        step=step,
        encrypted=sealed,
        file_bytes=size,
        mb_per_s=size / 1e6 / figures["seconds"],
        peak_mb=figures["peak_mb"],
        base_mb=figures["base_mb"],
    )
    if step == "import":
        shutil.rmtree(into)
        path.unlink()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(step: str, content: str, folder: Path, path: Path, secret: bytes | None) -> Any:
    from memos.facade.files import inspect

    if content in ("adapters", "one cube"):
        import torch  # noqa: F401 - it is in memory before the clock runs
    with opened(content, folder) as mos:
        before = peak_mb()
        start = time.perf_counter()
        if step == "export":
            mos.export(path, passphrase=secret, overwrite=True)
        elif step == "inspect":
            inspect(path, passphrase=secret)
        else:
            mos.import_(path, passphrase=secret)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": peak_mb(), "base_mb": before}


if __name__ == "__main__":
    step, content, where, path, how = sys.argv[1:]
    secret = KEY if how == "sealed" else None
    print(json.dumps(timed(step, content, Path(where), Path(path), secret)))
