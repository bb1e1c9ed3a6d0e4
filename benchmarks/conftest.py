"""Collects the figures of every benchmark: one row each, what it put into ``benchmark.extra_info``.

At the end a table per file is printed and benchmarks/results/<file without test_>.json is written.
A run of a part (-k, -m, one test by name, a failure) prints its rows and leaves the JSON alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report as figures

_rows: dict[str, list[figures.Row]] = {}
_incomplete: set[str] = set()


@pytest.fixture(autouse=True)
def _collect(request: pytest.FixtureRequest) -> Iterator[None]:
    if "benchmark" not in request.fixturenames:
        yield
        return
    benchmark = request.getfixturevalue("benchmark")
    yield
    if benchmark.extra_info:
        _rows.setdefault(_name_of(request.node), []).append(dict(benchmark.extra_info))


def _name_of(item: Any) -> str:
    return str(item.path.stem).removeprefix("test_")


def pytest_deselected(items: list[Any]) -> None:
    _incomplete.update(_name_of(item) for item in items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed or (report.skipped and report.when == "setup"):
        _incomplete.add(Path(report.location[0]).stem.removeprefix("test_"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    by_name = any("::" in argument for argument in config.args)
    origin = figures.provenance() if _rows else {}
    width = shutil.get_terminal_size((140, 24)).columns
    for name, rows in _rows.items():
        terminalreporter.write_line("")
        terminalreporter.write(figures.render(name, rows, origin, width))
        if by_name or name in _incomplete:
            terminalreporter.write_line(f"a part of {name} ran: its JSON stays as it was")
        else:
            path = figures.write(name, rows, origin)
            terminalreporter.write_line(f"written: {path.relative_to(figures.ROOT)}")
