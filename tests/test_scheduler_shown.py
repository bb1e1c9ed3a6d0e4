"""What a scheduler shows: to OpenTelemetry, and to ``memos top``."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, cli
from memos.scheduler import Rules, Scheduler, Unit, snapshot
from memos.scheduler.plan import Action


class Shelf:
    """Copies that are names in sets."""

    def copy(self, action: Action, cancelled: Callable[[], bool]) -> None:
        if "broken" in action.unit:
            raise OSError("the disk is gone")

    def discard(self, unit: str, tier: str) -> None:
        pass

    def archive(self, unit: str) -> None:
        pass


def busy(scheduler: Scheduler) -> None:
    scheduler.attach(Shelf())
    for name in ("hot", "broken"):
        scheduler.put(
            Unit(
                name,
                num_bytes={"host": 40, "disk": 40},
                copies=frozenset({"disk"}),
                rebuildable=True,
                rebuild_s=9.0,
                access_s={"disk": 1.0},
            )
        )
        for _ in range(30):
            scheduler.use(name)
    scheduler.step()
    assert scheduler.worker is not None
    assert scheduler.worker.wait(10)


def test_figures_reach_an_exporter() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader]))
    scheduler = Scheduler({"host": 100, "disk": 1000})
    busy(scheduler)
    found: dict[str, list[Any]] = {}
    data: Any = reader.get_metrics_data()
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                points = metric.data.data_points
                found[metric.name] = [
                    p for p in points if p.attributes["memos.scheduler"] == scheduler.number
                ]
    by_tier = {p.attributes["memos.tier"]: p.value for p in found["memos.tier.bytes"]}
    assert by_tier == {"host": 40, "disk": 80}
    assert {p.value for p in found["memos.tier.budget"]} == {100, 1000}
    states = {p.attributes["memos.state"]: p.value for p in found["memos.moves"]}
    assert states == {"done": 1, "failed": 1}
    assert found["memos.plan.seconds"][0].count == 1
    ended = spans.get_finished_spans()
    assert [span.name for span in ended].count("memos.plan") == 1
    moves = [span for span in ended if span.name == "memos.move"]
    units = {span.attributes["memos.unit"] for span in moves if span.attributes}
    assert units == {"hot", "broken"}
    assert all((span.end_time or 0) >= (span.start_time or 0) for span in moves)
    spans.clear()
    with MOS() as mos:
        mos.register_memory(GeneralTextMemory("notes"))
        for text in ("the cat eats at seven", "the dog sleeps"):
            mos.add("notes", text)
        mos.retrieve("notes", "cat", limit=1)
        assert mos.context("when does the cat eat?").hits
    ended = spans.get_finished_spans()
    requests = [span for span in ended if span.name in ("memos.retrieve", "memos.context")]
    assert [dict(span.attributes or {})["memos.hits"] for span in requests] == [1, 2]
    stages = [span for span in ended if span.name == "memos.stage"]
    parents = {span.context.span_id for span in requests if span.context}
    assert stages
    assert all(span.parent and span.parent.span_id in parents for span in stages)
    assert {dict(span.attributes or {})["memos.memory"] for span in stages} == {"notes"}
    assert not any("cat" in str(span.attributes) for span in ended)
    scheduler.close()


def test_nothing_is_wanted_without_the_package() -> None:
    code = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
from memos.scheduler import Scheduler, Unit
s = Scheduler({"host": 10})
s.put(Unit("a", num_bytes={"host": 5}, rebuildable=True))
assert s.plan() == []
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def told(folder: Path) -> MOS:
    mos = MOS(folder)
    mos.register_memory(GeneralTextMemory("notes"))
    cubes = [mos.add("notes", text) for text in ("the [red] kettle", "a moon")]
    scheduler = mos.schedule({"host": 1000}, every_s=None, rules=Rules(archive_rate=1.0))
    for _ in range(3):
        mos.use(cubes[0])
    scheduler.step()
    assert scheduler.worker is not None
    assert scheduler.worker.wait(10)
    scheduler.step()
    return mos


def test_top_shows_what_a_process_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a.memos"
    assert cli.main(["top", "--once", "--store", str(folder)]) == 1
    assert "mos.schedule" in capsys.readouterr().err
    mos = told(folder)
    mode = (folder / snapshot.NAME).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert cli.main(["top", "--once", "--store", str(folder)]) == 0
    out = capsys.readouterr().out
    for word in ("host", "1000 B", "none", "notes", "archive", "done", "process", "hottest"):
        assert word in out, word
    assert cli.main(["top", "--json", "--store", str(folder)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["actions"][0]["kind"] == "archive"
    assert shown["stats"]["tiers"]["host"]["budget"] == 1000
    assert list(folder.glob(".scheduler*")) == []
    mos.close()
    assert cli.main(["top", "--once", "--every", "0", "--store", str(folder)]) == 1
    capsys.readouterr()
    (folder / snapshot.NAME).write_text("{")
    assert snapshot.read(folder) is None


def test_stats_of_a_mos(tmp_path: Path) -> None:
    mos = told(tmp_path / "b.memos")
    stats = mos.stats()["scheduler"]
    assert stats["plans"] == 2
    assert stats["uses"] == 3
    assert stats["memories"]["notes"]["texts"] == 0, "it was archived"
    assert stats["tuning"]["half_life_s"] > 0
    mos.grant("user:ann", "read", "*")
    assert "scheduler" not in mos.as_principal("user:ann").stats()
    mos.close()
