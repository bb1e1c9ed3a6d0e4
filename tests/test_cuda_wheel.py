"""A wheel with the CUDA kernels inside, as ``make wheel CUDA=ON`` leaves it in dist/: imported and
used where neither a driver nor a GPU is. Without such a wheel it skips.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the ops work on torch tensors")
ROOT = Path(__file__).parent.parent


def newest() -> Path | None:
    """The last wheel for this Python that holds memos._cuda."""
    tag = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    found = [p for p in ROOT.glob("dist/*.whl") if tag in p.name]
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        if any(n.startswith("memos/_cuda.") for n in zipfile.ZipFile(path).namelist()):
            return path
    return None


WHEEL = newest()

USE = """
import torch
from memos import kernels
import memos._cuda as module
assert module.__file__.startswith({folder!r}), module.__file__
kernels.load_all()
said = kernels.available()["pack_kv"]["cuda"]
assert said == "ready" or "CUDA" in said or "cudaError" in said, said
codec = kernels.Codec.parse("int4")
x = [torch.randn(2, 64, 2, 64)]
kernels.pack_kv(x, x, torch.arange(2), codec)
try:
    with kernels.using("cuda"):
        kernels.pack_kv(x, x, torch.arange(2), codec)
except Exception as error:
    assert "cuda" in str(error), error
else:
    raise AssertionError("tensors of the CPU were taken")
print("imported with", module.ARCHITECTURES, "inside:", said)
"""


@pytest.mark.skipif(WHEEL is None, reason="no wheel with CUDA inside: make wheel CUDA=ON")
def test_it_imports_without_a_driver(tmp_path: Path) -> None:
    assert WHEEL is not None
    folder = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(folder), str(WHEEL)], check=True, timeout=120)
    # -S leaves out .pth files, so that an editable install does not stand before the wheel.
    packages = [str(folder), sysconfig.get_paths()["purelib"], *filter(None, sys.path[1:])]
    path = os.pathsep.join(p for p in packages if Path(p).resolve() != ROOT)
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE.format(folder=str(folder))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("imported with"), done.stdout
