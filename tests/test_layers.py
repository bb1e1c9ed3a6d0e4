"""The house of ARCHITECTURE: a file imports from its own layer or from layers below it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import memos

ROOT = Path(__file__).parent.parent

# Top to bottom. A package stands for all modules in it.
LAYERS = {
    "surfaces": [
        "memos.__main__",
        "memos.cli",
        "memos.commands",
        "memos.doctor",
        "memos.server",
        "memos.integrations",
    ],
    "facade": ["memos.mos", "memos.facade"],
    "policy": ["memos.retrieval", "memos.scheduler", "memos.lifecycle", "memos.governance"],
    "memories": ["memos.memories"],
    "engines": ["memos.records", "memos.kv", "memos.adapters"],
    "the unit": ["memos.cube"],
    "kernels": ["memos.kernels"],
    "native": ["memos._C", "memos.triton_kernels"],
}
APART = ("engines", "policy")  # packages of these layers do not import one another
# All may import them; they import nothing of memos.
BESIDE = ("memos.errors", "memos.settings", "memos.tracing")
FRONT = "memos"  # memos/__init__.py: names only, each imported where it lives at its first use

# Folder of csrc -> folders whose headers it may include.
NATIVE = {
    "codec": {"codec"},
    "cpu": {"codec", "cpu"},
    "cuda": {"codec", "cuda"},
    "bindings": {"codec", "cpu", "cuda", "bindings"},
}


def place(module: str) -> tuple[int, str, str] | None:
    """Layer number from the bottom, layer and package of a module; None beside the layers."""
    for depth, (layer, packages) in enumerate(reversed(LAYERS.items())):
        for package in packages:
            if module == package or module.startswith(package + "."):
                return depth, layer, package
    assert module in (FRONT, *BESIDE), f"{module} stands in no layer: add it to LAYERS"
    return None


def imports_of(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The modules of memos that this source imports, at module level and inside functions."""
    tree = ast.parse(source)
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            names = [resolve(base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [ast.unparse(argument).strip("f'\"") for argument in node.args[:1]]
        if id(node) in skipped and module.startswith((f"{FRONT}.triton_kernels", "memos.__")):
            continue  # for types alone
        if id(node) in skipped and module == FRONT:
            continue
        yield from (name for name in names if name == FRONT or name.startswith("memos."))


def resolve(base: str, name: str) -> str:
    """What ``from base import name`` loads: the home of a public name, a module, or base itself."""
    if base == FRONT and name in memos._HOME:
        return memos._HOME[name]
    return f"{base}.{name}" if is_module(f"{base}.{name}") else base


def is_module(module: str) -> bool:
    if any(module in packages for packages in LAYERS.values()):
        return True
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def sources() -> dict[str, Path]:
    found = {}
    for folder, package in (("memos", "memos"), ("triton_kernels", "memos.triton_kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def violations(module: str, imported: set[str]) -> Iterator[str]:
    here = place(module)
    for other in sorted(imported):
        there = place(other)
        if module in BESIDE:
            yield f"{module} imports {other}; it stands beside all layers and imports none"
        elif here is None or there is None:
            continue
        elif there[0] > here[0]:
            yield f"{module} ({here[1]}) imports {other} from above ({there[1]})"
        elif here[1] == there[1] and here[2] != there[2] and here[1] in APART:
            yield f"{module} imports {other}: two {here[1]} do not import one another"


@pytest.mark.parametrize("module", sources())
def test_imports_go_down(module: str) -> None:
    path = sources()[module]
    imported = set(imports_of(path.read_text(), module, path.name == "__init__.py"))
    assert not list(violations(module, imported))


def test_the_front_imports_nothing_at_import() -> None:
    tree = ast.parse((ROOT / "memos/__init__.py").read_text())
    names = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert set(names) <= {"__future__", "importlib", "typing"}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("memos.kernels.kv", "import memos.kv", "from above"),
        ("memos.kernels.kv", "def f():\n    from memos.kv import store", "from above"),
        ("memos.kernels.kv", "from memos import KVCacheMemory", "from above"),
        ("memos.kernels.kv", "from ..kv import store", "from above"),
        ("memos.cube", "import importlib\nimportlib.import_module('memos.mos')", "from above"),
        ("memos.kv.store", "from memos.records import rows", "do not import one another"),
        ("memos.scheduler.plan", "import memos.retrieval", "do not import one another"),
        ("memos.errors", "from memos import settings", "beside all"),
        ("memos.kv.store", "from memos.kv import blocks\nfrom memos import errors, kernels", ""),
        ("memos.doctor", "import memos\nfrom memos import __version__, cli", ""),
    ],
)
def test_this_test_finds_violations(module: str, source: str, message: str) -> None:
    found = list(violations(module, set(imports_of(source, module, module.count(".") == 1))))
    assert message in found[0] if message else not found


@pytest.mark.parametrize(
    "path", [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()], ids=lambda p: p.name
)
def test_native_includes_go_down(path: Path) -> None:
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        beside = path.parent / included
        target = folder if beside.exists() else Path(included).parts[0]
        assert target in NATIVE[folder], f"csrc/{folder} includes {included}"


def test_only_the_seam_knows_python_and_nothing_knows_torch() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            included = re.findall(
                r"^\s*#\s*include\s+[<\"]([^>\"]+)", path.read_text(), re.MULTILINE
            )
            python = [i for i in included if i.startswith(("pybind11", "Python.h"))]
            assert not python or path.parent.name == "bindings", f"{path.name} includes {python}"
            assert not [i for i in included if i.startswith(("torch", "ATen", "c10"))], path.name
