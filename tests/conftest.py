"""What all tests share."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import hypothesis
import pytest

# OpenMP's threads sleep while they wait: where other work wants the same processors, their spinning
# makes small torch operations four times slower. Before torch is imported; children inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Random histories are the same in every CI run, and other ones on every desk.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("desk", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_report_header() -> str:
    from memos.kernels import _native

    core = _native.missing() or f"native core {_native.isa()}"
    packages = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "transformers", "triton", "numpy")
    )
    return f"memos: {core}; {packages}; {platform.machine()}, {os.cpu_count()} processors"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@pytest.fixture
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No MEMOS_ variable is set."""
    for name in [n for n in os.environ if n.startswith("MEMOS_")]:
        monkeypatch.delenv(name)
    return monkeypatch
