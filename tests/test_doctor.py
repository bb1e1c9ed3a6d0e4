"""``memos doctor``: it says what runs, and its exit code says whether something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memos
from memos import cli, doctor
from memos.kernels import _native

NATIVE = pytest.mark.skipif(_native.missing() is not None, reason=f"{_native.missing()}")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memos", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"memos {memos.__version__}")


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


@NATIVE
def test_a_healthy_machine(fresh_environment: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert not report["problems"]
    assert report["memos"]["version"] == memos.__version__
    assert report["native"]["core"] == "ready"
    assert report["native"][report["native"]["isa"]] == "ready"
    assert report["ops"]["gather_blocks"]["cpu"] == "ready"
    assert all(backends["reference"] == "ready" for backends in report["ops"].values())


@NATIVE
def test_a_person_reads_all_of_it(
    fresh_environment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    report = doctor.examine()
    for word in (*report.versions, *report.ops, *report.native, report.memos["version"]):
        assert word in shown


def test_an_unknown_instruction_set_is_a_problem() -> None:
    done = run("doctor", "--json", MEMOS_CPU_ISA="abacus")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["environment"]["MEMOS_CPU_ISA"] == "abacus"
    if "_C" not in report["native"]["core"]:
        assert report["native"]["core"].startswith("MEMOS_CPU_ISA=abacus: ")


def test_a_backend_that_ops_lack_is_a_problem(fresh_environment: pytest.MonkeyPatch) -> None:
    fresh_environment.setenv("MEMOS_BACKEND", "abacus")
    report = doctor.examine()
    assert any(problem.startswith("MEMOS_BACKEND=abacus") for problem in report.problems)


def test_another_package_of_this_name_is_a_problem(
    tmp_path: Path, fresh_environment: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "memoryos-2.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: MemoryOS\nVersion: 2.0\n")
    info.joinpath("RECORD").write_text("memos/__init__.py,,\nmemos/api.py,,\n")
    fresh_environment.syspath_prepend(str(tmp_path))
    report = doctor.examine()
    assert [p for p in report.problems if p.startswith("MemoryOS 2.0 also installs")]
    assert not report.ok


def test_without_torch_it_still_reports(fresh_environment: pytest.MonkeyPatch) -> None:
    found = doctor._version
    fresh_environment.setattr(
        doctor, "_version", lambda name: None if name == "torch" else found(name)
    )
    report = doctor.examine()
    assert report.versions["torch"] is None
    assert report.ops == {}
    assert "torch" in report.devices["cuda"]
    assert doctor.render(report)


def test_it_imports_neither_transformers_nor_triton_kernels() -> None:
    code = (
        "import sys; from memos import doctor; doctor.examine(); "
        "print({'transformers', 'memos.triton_kernels'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "set()"
