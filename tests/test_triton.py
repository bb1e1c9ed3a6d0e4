"""Triton kernels, run by Triton's interpreter on the CPU and compiled ahead of time for GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="triton is not installed: pip install 'memos-native[triton]'",
)

INTERPRET = """
import torch
from memos.errors import MemosError
from memos.kernels import _triton, blocks, using
from memos.kernels._op import available

op = blocks.gather_blocks
if "triton" not in op.backends:
    _triton.register(op)
assert available()["gather_blocks"]["triton"] == "ready", available()

def check(cache, ids):
    want = op.reference(cache, ids)
    with using("triton"):
        got = op(cache, ids)
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    as_bytes = lambda t: t.contiguous().view(torch.uint8) if t.numel() else t
    assert torch.equal(as_bytes(got), as_bytes(want)), (cache.dtype, tuple(cache.shape))

generator = torch.Generator().manual_seed(7)
ids = torch.tensor([3, 0, 3, 6], dtype=torch.int64)
dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool,
          torch.float8_e4m3fn, torch.complex64)
# One element, odd widths, one short of a tile, a tile, one past it (of 1024 words).
for dtype in dtypes:
    for B in (1, 2, 3, 7, 8, 1023, 1024, 1025, 8193):
        cache = torch.randint(0, 100, (7, B), generator=generator).to(dtype)
        check(cache, ids)
for M, B in ((0, 5), (4, 0), (0, 0), (1, 1)):
    check(torch.ones(7, B), ids[:M].contiguous())

# A view may start anywhere: at an odd byte no wider word may be used.
whole = torch.randint(-100, 100, (1 + 7 * 24,), generator=generator, dtype=torch.int8)
check(whole[1:].view(7, 24), ids)

for bad in (torch.zeros(7), torch.zeros(7, 4).T):
    try:
        with using("triton"):
            op(bad, ids)
    except MemosError:
        continue
    raise AssertionError("a bad argument was taken")
print("equal")
"""
AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from memos.triton_kernels import blocks

for arch in (80, 90):
    for word in ("i8", "i16", "i32", "i64"):
        signature = {"cache_ptr": f"*{word}", "ids_ptr": "*i64", "out_ptr": f"*{word}",
                     "row": "i64", "BLOCK": "constexpr"}
        source = ASTSource(blocks._gather_blocks_kernel, signature, constexprs={"BLOCK": 1024})
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert f"sm_{arch}" in made.asm["ptx"] and len(made.asm["cubin"]) > 0
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_gather_blocks_interpreted_equals_the_reference() -> None:
    assert run(INTERPRET, TRITON_INTERPRET="1") == "equal"


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler on Linux only")
def test_kernels_compile_for_sm_80_and_sm_90(tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert run(AHEAD_OF_TIME, **environment) == "compiled"


def test_without_a_gpu_the_reason_is_said() -> None:
    code = (
        "import torch; from memos.kernels import _triton; "
        "print('ready' if torch.cuda.is_available() else _triton.missing())"
    )
    said = run(code, TRITON_INTERPRET="0")
    assert said == "ready" or "CUDA" in said
