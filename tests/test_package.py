"""What a user installs: the names, a light import, and a wheel that needs nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import memos

ROOT = Path(__file__).parent.parent
DISTRIBUTION = "memos-native"
HEAVY = ("numpy", "torch", "transformers", "triton", "rich", "cryptography")
# C and C++ runtimes that every Linux has; nothing else may be linked.
SYSTEM_LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "linux-vdso.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def python(code: str, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Names and version


def test_version_has_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert not re.search(r"^version\s*=", text, re.MULTILINE)
    try:
        installed = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == memos.__version__


def test_the_changelog_knows_the_version() -> None:
    titles = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "Unreleased"


@pytest.mark.parametrize("name", memos.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(memos, name) is getattr(memos, name)
    assert name in dir(memos)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'memos' has no attribute 'Abacus'"):
        memos.Abacus  # noqa: B018


# Import


def test_import_is_light() -> None:
    code = f"import sys, memos; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


def test_import_takes_less_than_a_fifth_of_a_second() -> None:
    code = "import time; t = time.perf_counter(); import memos; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.2


def test_the_triton_folder_is_not_openais_package() -> None:
    code = (
        "import sys\n"
        "try:\n    import triton_kernels\n"
        "except ImportError as error:\n    print(error, 'triton_kernels' in sys.modules)"
    )
    said = python(code, cwd=ROOT)
    assert said == "this folder is memos.triton_kernels, not OpenAI's triton_kernels False"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree with the build tools of this environment."""
    for tool in ("scikit_build_core", "pybind11", "cmake", "ninja"):
        pytest.importorskip(tool, reason=f"building the wheel needs {tool}: the extra 'test'")
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*build, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(folder), str(wheel)], check=True, timeout=120)
    return folder


def elsewhere(installed: Path, folder: Path) -> dict[str, object]:
    """To run Python with the wheel, this environment's packages, and nothing of this tree.

    -S leaves out .pth files, so an editable install does not stand before the wheel; PATH is
    empty, so there is no compiler.
    """
    packages = sysconfig.get_paths()["purelib"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
    path = {"PYTHONPATH": os.pathsep.join([str(installed), packages]), "PATH": str(folder)}
    return {"cwd": folder, "env": {**environment, **path}, "capture_output": True, "text": True}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"memos_native-{memos.__version__}.dist-info/"
    assert {n.split("/")[0] + "/" for n in names} == {"memos/", info}
    code = {n for n in names if n.startswith("memos/")}
    native = [n for n in code if re.fullmatch(r"memos/_C\.[\w-]+\.(so|pyd)", n)]
    assert len(native) == 1
    ours = {f"memos/{p.relative_to(ROOT / 'memos')}" for p in (ROOT / "memos").rglob("*.py")}
    theirs = {f"memos/{p.relative_to(ROOT)}" for p in (ROOT / "triton_kernels").rglob("*.py")}
    assert code == {*ours, *theirs, *native, "memos/py.typed"}
    assert any(re.fullmatch(re.escape(info) + r"(licenses/)?LICENSE", n) for n in names)
    metadata = zipfile.ZipFile(wheel).read(info + "METADATA").decode()
    assert f"\nVersion: {memos.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


@pytest.mark.slow
def test_the_wheel_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    code = (
        "import memos, sys, shutil\n"
        "from memos import _C, cli\n"
        f"assert memos.__file__.startswith({str(installed)!r}), memos.__file__\n"
        f"assert {str(ROOT)!r} not in sys.path and not shutil.which('g++')\n"
        "import importlib.util as u; assert u.find_spec('memos.triton_kernels')\n"
        "assert u.find_spec('triton_kernels') is None\n"
        "sys.exit(cli.main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], timeout=120, **elsewhere(installed, tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"core": "ready"' in done.stdout


@pytest.mark.slow
def test_the_wheel_passes_the_op_tests(installed: Path, tmp_path: Path) -> None:
    tests = ("test_ops.py", "test_adapter_ops.py")
    for name in ("conftest.py", *tests):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -q\n")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pytest", "-p", "no:cacheprovider", *tests],
        timeout=600,
        **elsewhere(installed, tmp_path),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@linux
def test_the_native_core_links_only_the_system(installed: Path) -> None:
    (core,) = (installed / "memos").glob("_C*.so")
    listed = subprocess.run(["ldd", core], capture_output=True, text=True, check=True).stdout
    linked = {Path(line.split()[0]).name for line in listed.splitlines()}
    assert linked <= SYSTEM_LIBRARIES, linked - SYSTEM_LIBRARIES


@pytest.mark.slow
@linux
def test_objects_of_an_instruction_set_export_nothing_weak(wheel: Path) -> None:
    """A weak symbol compiled for AVX-512 may replace the one that an older processor runs."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    objects = list((ROOT / "build").glob("cp*/**/avx*.o"))
    if not objects:
        pytest.skip("no object files: the wheel was built elsewhere, or not for x86-64")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^\S* [WVu] .*", symbols, re.MULTILINE), path
