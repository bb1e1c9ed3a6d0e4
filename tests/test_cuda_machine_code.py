"""The module that ``make cuda`` builds: loads without a driver, and what nvcc made of the kernels.

Nothing here needs a GPU. Without a build, or without cuobjdump, it skips.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Kernel, template arguments -> most registers of a thread on sm_80, sm_90 and sm_100, bytes of
# dynamic shared memory that its launcher asks for with K rotated, D = 128, P = 64 and int4 (R = 16
# for adapters), and blocks of threads that a multiprocessor of 228 KB and 64 K registers then
# holds.
BUDGETS = {
    ("pack_kernel", "f32"): (128, 44164, 4),
    ("pack_kernel", "f16"): (128, 44164, 4),
    ("pack_kernel", "bf16"): (128, 44164, 4),
    ("unpack_kernel", "f32"): (80, 34944, 6),
    ("unpack_kernel", "f16"): (80, 34944, 6),
    ("unpack_kernel", "bf16"): (80, 34944, 6),
    ("unpack_kernel", "f32, turned"): (96, 34944, 5),
    ("unpack_kernel", "f16, turned"): (96, 34944, 5),
    ("unpack_kernel", "bf16, turned"): (96, 34944, 5),
    ("copy_kernel", "16 bytes"): (40, 0, 6),
    ("transfer_kernel", "16 bytes"): (40, 0, 6),
    ("turn_kernel", "f32"): (48, 0, 5),
    ("turn_kernel", "f16"): (48, 0, 5),
    ("turn_kernel", "bf16"): (48, 0, 5),
    ("adapter_kernel", "f16"): (80, 4608, 3),
    ("adapter_kernel", "bf16"): (80, 4608, 3),
}
# Where nvcc 13.0 wants more registers than the table has: registers, blocks.
MORE = {("pack_kernel", "sm_100"): (168, 3)}
THREADS = {"copy_kernel": 256, "turn_kernel": 256, "transfer_kernel": 256, "adapter_kernel": 256}
DTYPES = ("f32", "f16", "bf16")
TENSOR_CORES = ("adapter_kernel",)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

NAME = re.compile(
    r"\d(unpack_kernel|pack_kernel|copy_kernel|transfer_kernel|turn_kernel|adapter_kernel)"
    r"I(.+?)EEv"
)
# A global load of one or two bytes, and local memory, in whatever spelling.
NARROW_LOAD = re.compile(r"\bLD(G|GSTS)?\.E(\.\w+)*?\.[SU](8|16)\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")


def built() -> Path | None:
    """The module under test: the last one built here, or the one that is installed."""
    found = sorted(ROOT.glob("build/cuda*/_cuda*.so"), key=lambda p: p.stat().st_mtime)
    if found:
        return found[-1]
    spec = importlib.util.find_spec("memos._cuda")
    return Path(spec.origin) if spec is not None and spec.origin else None


MODULE = built()
needs_module = pytest.mark.skipif(
    MODULE is None, reason="the CUDA kernels are not built: make cuda, with nvcc"
)


@functools.lru_cache(maxsize=1)
def cuobjdump() -> str | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    places = [shutil.which("cuobjdump"), str(Path(nvcc).with_name("cuobjdump"))]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((p for p in places if p and Path(p).exists()), None)


def kernel_of(mangled: str) -> tuple[str, str] | None:
    """("pack_kernel", "bf16") of a mangled name; None where it is not in the table."""
    if (m := NAME.search(mangled)) is None:
        return None
    numbers = re.findall(r"L[lb](\d)", m[2])
    if m[1] in ("pack_kernel", "unpack_kernel", "turn_kernel"):
        turned = ", turned" if numbers[2:] == ["1"] else ""
        return (m[1], DTYPES[int(numbers[0])] + turned) if numbers[1] == "1" else None  # aligned
    if m[1] == "adapter_kernel":
        return m[1], DTYPES[int(numbers[0])]
    return (m[1], "16 bytes") if "uint4" in m[2] else None


@functools.lru_cache(maxsize=8)
def dump(arch: str, what: str) -> str:
    if cuobjdump() is None:
        pytest.skip("cuobjdump is found neither beside nvcc nor in triton")
    done = subprocess.run(
        [cuobjdump(), what, "-arch", arch, str(MODULE)], capture_output=True, text=True, timeout=300
    )
    if done.returncode or not done.stdout.strip():
        pytest.skip(f"{MODULE} holds no code for {arch}: {done.stderr.strip()[:200]}")
    return done.stdout


def resources(arch: str) -> dict[tuple[str, str], dict[str, int]]:
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", dump(arch, "-res-usage")):
        if (kernel := kernel_of(name)) is not None:
            found[kernel] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def code(arch: str) -> dict[tuple[str, str], str]:
    found = {}
    for part in dump(arch, "-sass").split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        if (kernel := kernel_of(name)) is not None:
            found[kernel] = text
    return found


@needs_module
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_and_memory_keep_to_the_table(arch: str) -> None:
    found = resources(arch)
    assert set(found) == set(BUDGETS)
    for kernel, (registers, shared, blocks) in BUDGETS.items():
        used = found[kernel]
        registers, blocks = MORE.get((kernel[0], arch), (registers, blocks))
        assert used["REG"] <= registers, (kernel, used)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)
        threads = THREADS.get(kernel[0], 128)
        each = -(-used["REG"] // 8) * 8 * threads
        fit = min(65536 // each, (228 << 10) // (shared + 1024), 2048 // threads)
        assert fit >= blocks, (kernel, used, fit)


@needs_module
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code(arch: str) -> None:
    found = code(arch)
    assert set(found) == set(BUDGETS)
    for kernel, text in found.items():
        assert not LOCAL.search(text), kernel
        assert not (narrow := NARROW_LOAD.search(text)), (kernel, narrow[0])
        assert re.search(r"\bLDG\.E\S*\.128\b", text), kernel
        assert ("HMMA" in text) == (kernel[0] in TENSOR_CORES), kernel


def test_the_table_tells_narrow_loads_from_wide_ones() -> None:
    for line in ("LDG.E.U16 R1, [R2]", "LDG.E.EF.U8 R1", "LDG.E.U8.CONSTANT R3", "LDG.E.S16 R1"):
        assert NARROW_LOAD.search(line), line
    for line in (
        "LDG.E.128 R4, [R2]",
        "LDG.E R4",
        "STG.E.U16 [R2], R1",
        "LDS.U16 R1",
        "LDG.E.64 R1",
    ):
        assert not NARROW_LOAD.search(line), line
    assert kernel_of("_ZN5memos4cuda3_GL11pack_kernelILl2ELb1EEEvNS1_6KvPartE") == (
        "pack_kernel",
        "bf16",
    )
    for last, name in (("0", "f32"), ("1", "f32, turned")):
        mangled = f"_ZN5memos13unpack_kernelILl0ELb1ELb{last}EEEvNS1_6KvPartE"
        assert kernel_of(mangled) == ("unpack_kernel", name)
    assert kernel_of("_ZN5memos11pack_kernelILl2ELb0EEEvNS1_6KvPartE") is None
    assert kernel_of("_ZN5memos11copy_kernelI5uint4EEvNS1_7RowCopyE") == ("copy_kernel", "16 bytes")
    assert kernel_of("_ZN5memos14adapter_kernelILl1EEEvNS1_11AdapterPartE") == (
        "adapter_kernel",
        "f16",
    )


LOADS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
why = module.why_not()
print(why or "ready")
if why:
    for call in (lambda: module.set_device(0), lambda: module.gather_rows(16, 16, 1, 16, 16, 0)):
        try:
            call()
        except RuntimeError as error:
            assert "cuda" in str(error), error
        else:
            raise AssertionError("a launch without a device passed")
"""


@needs_module
def test_the_module_loads_without_a_driver() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(MODULE)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(("ready", "cudaError"))


@needs_module
@pytest.mark.skipif(shutil.which("ldd") is None, reason="ldd is not here")
def test_the_module_links_neither_the_driver_nor_torch() -> None:
    listed = subprocess.run(["ldd", str(MODULE)], capture_output=True, text=True, check=True).stdout
    linked = {Path(line.split()[0]).name for line in listed.splitlines()}
    system = {"linux-vdso.so.1", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6",
              "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libdl.so.2", "librt.so.1",
              "libpthread.so.0"}  # fmt: skip
    assert linked <= system, linked - system
