"""What of benchmarks/gpu.py runs without a GPU: arguments, cases, the table, and how it ends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from memos.kernels.codec import Codec

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
assert spec is not None
assert spec.loader is not None
gpu = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu
spec.loader.exec_module(gpu)
checks, times = sys.modules["gpu_checks"], sys.modules["gpu_times"]


def test_arguments() -> None:
    found = gpu.parse(["--no-build", "--only", "kv,pool", "--repeats", "3"])
    assert (found.no_build, found.only, found.repeats, found.stage) == (True, "kv,pool", 3, "")
    assert found.out == gpu.RESULTS
    with pytest.raises(SystemExit):
        gpu.parse(["--repeats", "0"])
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "none such"])


def test_cases_cover_every_kind_of_scheme() -> None:
    cases = list(checks.check_cases(False))
    schemes = {s for codec, *_ in cases for s in (Codec.parse(codec).key, Codec.parse(codec).value)}
    assert {s.kind for s in schemes} == {"raw", "int8", "int4", "int2", "fp8"}
    assert {s.rotate for s in schemes} == {True, False}
    assert {s.group for s in schemes} >= {32, 64}
    assert {dtype for *_, dtype, _ in cases} == {"float32", "float16", "bfloat16"}
    small = list(checks.check_cases(True))
    assert 0 < len(small) < len(cases)
    assert all(case in cases for case in small)
    assert all(Codec.parse(name) for name in times.CODECS)


def test_the_check_of_the_pool_runs_on_the_cpu_too() -> None:
    torch = pytest.importorskip("torch", reason="the pool holds torch tensors")
    packed = torch.arange(12 * 2 * 64).view(12, 2, 64).to(torch.uint8)
    assert checks.check_block_pool(packed, "cpu") == 5


def test_table() -> None:
    rows = [
        times.Row("unpack_kv", "int4", "triton", 20.0, 2000.0, 0.5, "copy"),
        times.Row("unpack_kv", "int4", "cuda", 10.0, 4000.0, 0.97, "copy"),
        times.Row("apply_adapters_", "T 64", "cuda", 4.25),
    ]
    lines = times.table(rows).splitlines()
    assert lines[0].split() == ["op", "case", "backend", "us", "GB/s", "share"]
    assert lines[1].split() == ["apply_adapters_", "T", "64", "cuda", "4.2"]
    assert lines[2].endswith("97 % of copy")
    assert lines[3].endswith("50 % of copy")


def test_what_is_ready_is_asked_before_an_op_was_used() -> None:
    """In a process of its own, as a stage begins."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu, gpu_checks; "
        "gpu.find_package(); print([gpu_checks.ready(op) for op in "
        "('pack_kv', 'gather_blocks', 'apply_adapters_', 'rotate_positions_')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if gpu.why_not() is not None:
        assert done.stdout.strip() == "[[], [], [], []]"


@pytest.mark.parametrize("name", ["rates", "pool"])
def test_a_stage_that_fails_says_so_and_nothing_more(name: str) -> None:
    """Each is a process of its own: what it said before is kept, and why it ended."""
    if gpu.why_not() is None:
        pytest.skip("a GPU is here")
    (line,) = gpu.told(name, gpu.parse([]), {"copy": 1.0, "link out": 1.0}, 120)
    assert set(line) == {"failed"}
    assert "Error" in line["failed"]
    (line,) = gpu.told(name, gpu.parse([]), {}, 0.01)
    assert "no end after" in line["failed"]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if gpu.why_not() is None:
        pytest.skip("a GPU is here")
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("gpu: ")
    assert not out.exists()
