"""What the tests of the command line share: runs in this process, and a folder to run in."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory, MemCube, TreeTextMemory, VectorMemory, cli
from memos.commands import console

ROOT = Path(__file__).parent.parent
CUBE = {field.name for field in fields(MemCube)}
NASTY = "esc \x1b[31mred\x1b[0m [bold]x[/bold] \x07 \u202eabc :smile: \x9b5m kettle"
DOCUMENT = """# Handbook

How the house works.

## Heating

The boiler is in the cellar. Turn the red valve to the left.

### Winter

Keep it warm.

## Garden

- water
- weed
"""


@dataclass
class Run:
    """Runs commands in this process; keeps what the last one printed."""

    capture: pytest.CaptureFixture[Any]
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: str, code: int = 0) -> str:
        found = cli.main(arguments)
        self.out, self.err = self.capture.readouterr()
        assert found == code, self.out + self.err
        return self.out

    def json(self, *arguments: str, code: int = 0) -> Any:
        out = self(*arguments, "--json", code=code)
        assert out.isascii()
        return json.loads(out)

    def fails(self, *arguments: str) -> str:
        """The one line of an error."""
        self(*arguments, code=1)
        assert self.out == ""
        assert re.fullmatch(r"memos: error: [^\n]+\n", self.err), self.err
        return self.err


@pytest.fixture(name="run")
def run_fixture(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """In an empty folder, where only words count."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMOS_EMBEDDER", "none")
    monkeypatch.setenv("COLUMNS", "80")
    return Run(capsys)


@pytest.fixture(name="house")
def house_fixture(run: Run) -> Run:
    """A folder with a memory of each kind."""
    with MOS("memory.memos") as mos:
        for cls, name in ((GeneralTextMemory, "notes"), (TreeTextMemory, "docs")):
            mos.register_memory(cls(name, embedder=None))
        mos.register_memory(VectorMemory("points"))
        mos.register_memory(GraphMemory("people", embedder=None))
        mos.add("notes", "The spare key is under the mat.", {"room": "hall"}, id="key-1")
        mos.add("notes", NASTY, {"room": "kitchen", "[red]": "\x1b[2J"}, id="nasty")
        mos.add("notes", "word " * 500, id="long")
        mos.memory("docs").add_document(DOCUMENT)
        mos.add("points", [1.0, 0.0], id="p1")
        mos.add("points", {"vector": [0.0, 1.0], "text": "straight up"}, id="p2")
        for id, label in (("ada", "Person"), ("carl", "Person"), ("rome", "City")):
            node = {"type": "node", "label": label, "properties": {"name": id.title()}}
            mos.add("people", node, id=id)
        for id, label, a, b in (("e1", "KNOWS", "ada", "carl"), ("e2", "LIVES_IN", "carl", "rome")):
            edge = {"type": "relationship", "label": label, "source_id": a, "target_id": b}
            mos.add("people", edge, id=id)
    return run


def process(
    *arguments: str, cwd: Path, input: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMOS_")}
    return subprocess.run(
        [sys.executable, "-m", "memos", *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), "MEMOS_EMBEDDER": "none", **environment},
        cwd=cwd,
        input=input,
        capture_output=True,
        timeout=120,
    )


def plain(cube: MemCube) -> dict[str, Any]:
    """A cube through JSON."""
    return json.loads(json.dumps(console.cube_json(cube), default=console._plain))


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)
