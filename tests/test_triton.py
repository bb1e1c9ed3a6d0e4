"""Triton kernels, run by Triton's interpreter on the CPU and compiled ahead of time for GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="triton is not installed: pip install 'memos-native[triton]'",
)
HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip()


def test_interpreted() -> None:
    """Everything in test_triton_interpreted.py, in a process whose Triton interprets."""
    file = str(HERE / "test_triton_interpreted.py")
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert re.search(r"\d{2} passed", said), said
    assert "skipped" not in said, said


def test_without_a_gpu_the_reason_is_said() -> None:
    code = (
        "import torch; from memos.kernels import _triton; "
        "print('ready' if torch.cuda.is_available() else _triton.missing())"
    )
    said = run("-c", code, TRITON_INTERPRET="0")
    assert said == "ready" or "CUDA" in said


# Ahead of time, for GPUs that are not here


class Made(NamedTuple):
    """What one compiled kernel is."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes: not 0 where registers are spilled
    ptx: str
    sass: str

    def count(self, pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", self.sass))


def tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"triton brings no {name} here")
    return str(path)


def compiled(
    arch: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], folder: Path,
    warps: int = 4, stages: int = 3, fusion: bool = True,
) -> Made:  # fmt: skip
    """The kernel as the just-in-time compiler makes it: addresses and strides multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if name not in constants and (types[name][0] == "*" or "stride" in name):
            hints[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion},
    )
    assert f"sm_{arch}" in made.asm["ptx"]
    cubin = folder / f"{kernel.fn.__name__}.{arch}.cubin"
    cubin.write_bytes(made.asm["cubin"])
    asked = [tool("cuobjdump"), "-res-usage", str(cubin)]
    usage = subprocess.run(asked, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout + usage.stderr
    sass = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True)
    return Made(
        int(found[1]), made.metadata.shared, int(found[2]), made.asm["ptx"], sass.stdout
    )  # fmt: skip


PLAN = {"rows_ptr": "*i64", "row_stride": "i32", "order_ptr": "*i64", "starts_ptr": "*i64",
        "T": "i32", "num_slots": "i32", "x_stride": "i32", "y_stride": "i32",
        "parts_ptr": "*fp32", "width": "i32", "count": "i32"}  # fmt: skip


def apply_spec(name: str, dtype: str, rank: int) -> dict[str, Any]:
    """4096 x 4096, eight slots."""
    import torch
    from memos.triton_kernels import adapters

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    block_k, block_r, warps = adapters.apply_sizes(kind, rank)
    constants = {
        "INPUTS": 4096, "OUTPUTS": 4096, "SLOTS": 8, "TILE": adapters.TILE, "SEGMENTS": 4,
        "SEGMENT": adapters.SEGMENT, "BLOCK_K": block_k, "BLOCK_R": block_r, "BLOCK_O": 128,
        "DTYPE": adapters.TRITON_DTYPES[kind],
    }  # fmt: skip
    kernel = getattr(adapters, name)
    return {
        "kernel": kernel,
        "types": PLAN | {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"},
        "constants": {k: v for k, v in constants.items() if k in kernel.arg_names},
        "warps": warps,
        "stages": 2 if name == "_expand_kernel" else 3,
    }


def copy_spec(write: bool) -> dict[str, Any]:
    from memos.triton_kernels import blocks

    return {
        "kernel": blocks._copy_rows_kernel,
        "types": {"from_ptr": "*i32", "ids_ptr": "*i64", "to_ptr": "*i32", "lines": "i32"},
        "constants": {"LINE": 4, "WRITE": write, "BLOCK": 2048},
    }


def merge_spec(dtype: str) -> dict[str, Any]:
    from memos.triton_kernels import adapters

    pointers = dict.fromkeys(("out_ptr", "weight_ptr", "down_ptr", "up_ptr"), f"*{dtype}")
    sizes = {"outputs": "i32", "scale": "fp32", "weight_stride": "i32"}
    return {
        "kernel": adapters._merge_kernel,
        "types": pointers | sizes,
        "constants": {"R": 16, "BLOCK_R": 16, "BLOCK": adapters.MERGE_TILE, "inputs": 4096},
    }


def plan_spec() -> dict[str, Any]:
    from memos.triton_kernels import adapters

    pointers = dict.fromkeys(("slots_ptr", "order_ptr", "starts_ptr"), "*i64")
    return {
        "kernel": adapters._plan_kernel,
        "types": pointers | {"T": "i32", "num_slots": "i32"},
        "constants": {"BLOCK": 1024},
    }


def kv_spec(codec: str, dtype: str, encode: bool, half: int = 0) -> dict[str, Any]:
    """Blocks of 64 tokens, 8 heads of 128, of which ``half`` pairs of channels turn."""
    import torch
    from memos.triton_kernels import kv

    from memos.kernels import Codec

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    constants, _, warps = kv.constants_of(Codec.parse(codec), 64, 8, 128, 128, kind, half > 0)
    constants |= {"HALF": half, "FIRST": 0, "PAIRS": False}
    return {
        "kernel": kv._kv_kernel,
        "types": {"layers_ptr": "*i64", "ids_ptr": "*i64", "packed_ptr": "*u8", "rows_ptr": "*i64",
                  "angles_ptr": "*fp32", "L": "i32"},
        "constants": {**constants, "ENCODE": encode, "APART": False, "ALIGNED": True},
        "warps": warps,
        "stages": 1,
        "fusion": False,
    }  # fmt: skip


def turn_spec(dtype: str, interleaved: bool) -> dict[str, Any]:
    """Heads of 128."""
    from memos.triton_kernels import rope

    C, tokens = rope.sizes_of(64, 64)
    kind = {"bf16": rope.tl.bfloat16, "fp32": rope.tl.float32}[dtype]
    constants = {"HALF": 64, "C": C, "TOKENS": tokens, "INTERLEAVED": interleaved, "DTYPE": kind}
    return {
        "kernel": rope._turn_kernel,
        "types": {"table_ptr": "*fp32", "layers_ptr": "*i64", "B": "i32", "H": "i32", "T": "i32"},
        "constants": constants | {"ALIGNED": True},
        "stages": 1,
        "fusion": False,
    }


# One table: registers of a thread and bytes of shared memory that a kernel may use, at most, on
# sm_80 and on sm_90, and instructions that it must have. What it may not have, each of them:
# spilled registers, local memory, loads of 1 or 2 bytes.
WIDE = (r"LDG\.E\S*\.128", r"STG\.E\S*\.128")
MATRIX = (r"(HMMA|HGMMA|WGMMA)",)
STAGED = (*MATRIX, r"LDGSTS\.E\S*\.128")
BUDGETS: dict[str, tuple[Callable[[], dict[str, Any]], int, int, tuple[str, ...]]] = {
    "gather": (lambda: copy_spec(False), 40, 0, WIDE),
    "write": (lambda: copy_spec(True), 40, 0, WIDE),
    "pack int4 bf16": (lambda: kv_spec("int4", "bf16", True), 136, 32768, WIDE),
    "pack int4-g64-rot bf16": (lambda: kv_spec("int4-g64-rot", "bf16", True), 136, 32768, WIDE),
    "pack int4 fp32": (lambda: kv_spec("int4", "fp32", True), 168, 32768, WIDE),
    "unpack int4 bf16": (lambda: kv_spec("int4", "bf16", False), 128, 16384, WIDE),
    "unpack int4 fp32": (lambda: kv_spec("int4", "fp32", False), 112, 8192, WIDE),
    "unpack fp8 fp16": (lambda: kv_spec("fp8", "fp16", False), 128, 16384, WIDE),
    "unpack int4 turned bf16": (lambda: kv_spec("int4", "bf16", False, 64), 80, 32768, WIDE),
    "unpack int4 turned fp32": (lambda: kv_spec("int4", "fp32", False, 64), 80, 32768, WIDE),
    "unpack int4 partly turned bf16": (
        lambda: kv_spec("int4", "bf16", False, 32),
        128,
        65536,
        WIDE,
    ),
    "apply bf16": (lambda: apply_spec("_apply_kernel", "bf16", 16), 144, 32768, STAGED),
    "apply fp16": (lambda: apply_spec("_apply_kernel", "fp16", 16), 104, 32768, STAGED),
    "apply fp32": (lambda: apply_spec("_apply_kernel", "fp32", 16), 96, 16384, WIDE),
    "shrink bf16": (lambda: apply_spec("_shrink_kernel", "bf16", 64), 152, 40960, STAGED),
    "expand bf16": (lambda: apply_spec("_expand_kernel", "bf16", 64), 176, 18432, MATRIX + WIDE),
    "merge bf16": (lambda: merge_spec("bf16"), 64, 8192, MATRIX + WIDE),
    "plan": (plan_spec, 72, 4096, ()),
    "turn bf16": (lambda: turn_spec("bf16", False), 128, 16384, WIDE),
    "turn neighbours bf16": (lambda: turn_spec("bf16", True), 128, 16384, WIDE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("triton")
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler on Linux only")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted: no compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("label", list(BUDGETS))
def test_compiled_kernels_keep_their_budget(
    label: str, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    spec, registers, shared, wanted = BUDGETS[label]
    made = compiled(arch, **spec(), folder=folder)
    assert made.registers <= registers, made[:3]
    assert made.shared <= shared, made[:3]
    assert made.stack == 0, made[:3]
    assert made.count(r"(LDL|STL)\b") == 0
    assert made.count(r"LDG\.E\S*\.[US](8|16)\b") == 0
    for instruction in wanted:
        assert made.count(instruction), (instruction, made[:3])
    # A number stored as bfloat16 is rounded to the nearest even: what the interpreter does.
    assert not re.search(r"cvt\.r[^n]\S*\.bf16", made.ptx)
    # No approximate division, no subnormal taken for zero where bytes must be the CPU's.
    if label.startswith(("pack", "unpack", "turn")):
        assert not re.search(r"\bdiv\.(full|approx)|\brcp\.approx|\.ftz\.|\bfma\.", made.ptx)
