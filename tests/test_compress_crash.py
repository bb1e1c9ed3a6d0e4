"""Processes that compress sessions are killed: every session is whole, in one of two codecs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="caches are of torch models")
pytest.importorskip("transformers", reason="caches are of transformers models")

SCRIPT = Path(__file__).with_name("compress_processes.py")
KILLS = 120


def test_kill_9(tmp_path: Path) -> None:
    """At random moments, and before each step that changes something on the disk."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "kv"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["killed"] > KILLS * 0.6
    assert figures["half way"] > 10
