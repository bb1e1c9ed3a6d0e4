"""The bench harness: rows are shown, JSON carries its provenance, a part overwrites nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BENCHMARK = """
import pytest

@pytest.mark.parametrize("size", [1, 2])
def test_double(benchmark, size):
    benchmark.pedantic(lambda: size * 2, rounds=3)
    benchmark.extra_info.update(op="double", size=size, share_of_copy=0.5, isa="abacus")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("__init__.py", "conftest.py", "report.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder)
    (folder / "test_double.py").write_text(BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -q\n")
    return tmp_path


def bench(tree: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rows_become_a_table_and_json(tree: Path) -> None:
    shown = bench(tree)
    assert "double: " in shown
    assert shown.count("50.0%") == 2
    result = json.loads((tree / "benchmarks/results/double.json").read_text())
    assert [row["size"] for row in result["rows"]] == [1, 2]
    assert {"cpu", "cores", "isa"} <= set(result["machine"])
    assert {"commit", "dirty", "date", "versions"} <= set(result)
    assert {"python", "torch", "transformers"} <= set(result["versions"])


def test_a_part_overwrites_nothing(tree: Path) -> None:
    bench(tree)
    path = tree / "benchmarks/results/double.json"
    before = path.read_bytes()
    for part in (["-k", "1"], ["benchmarks/test_double.py::test_double[2]"]):
        assert "a part of double ran" in bench(tree, *part)
        assert path.read_bytes() == before


def test_every_question_about_the_documents_has_its_answer() -> None:
    """benchmarks/documents.jsonl follows the pages that it asks about."""
    lines = (ROOT / "benchmarks" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 40
    for question in map(json.loads, lines):
        page = (ROOT / question["document"]).read_text(encoding="utf-8")
        assert " ".join(page.split()).count(question["answer"]) == 1, question


def test_every_kernel_that_is_timed_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between the clock's two looks runs, and leaves the reference's bytes where it
    writes into what is there."""
    torch = pytest.importorskip("torch", reason="the ops work on torch tensors")
    monkeypatch.syspath_prepend(str(ROOT))
    timed = pytest.importorskip("benchmarks.test_kernels")
    if timed._native.missing() is not None:
        pytest.skip("the native core is not built")
    monkeypatch.setattr(timed, "SOURCE_BYTES", 2 << 20)
    for layout in timed.LAYOUTS:
        source = timed.Source("3x64", layout)
        for op in timed.OPS:
            work, found = source.work(op), []
            for run in (work.kernel, work.op, work.reference):
                source.target.copy_(source.flat)
                run()
                found.append(source.target.clone())
            if op.startswith(("write", "unpack", "rotate")):
                assert all(torch.equal(found[-1], other) for other in found), f"{op}, {layout}"
                assert not torch.equal(found[-1], source.flat) or op.endswith("raw"), op
