"""What the README and docs/adapters.md say of adapters runs as it stands there."""

from __future__ import annotations

import contextvars
import re
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the folders are PEFT's")

import torch

from memos import MOS, GeneralTextMemory, ParametricMemory

from .peft_adapters import build, save_adapter

ROOT = Path(__file__).parent.parent


def blocks(page: str, words: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if words in code]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has before: a model, its inputs, and a folder of PEFT."""
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "medical", seed=1)
    save_adapter(tmp_path / "path" / "to" / "peft" / "folder", seed=1)
    mos = MOS()
    mos.register_memory(GeneralTextMemory("notes", embedder=None))
    ids = torch.arange(1, 9).view(1, 8)
    model = build("llama")
    model.generation_config.max_new_tokens = 4
    return {
        "mos": mos,
        "model": model,
        "inputs": {"input_ids": ids},
        "two_rows": {"input_ids": ids.repeat(2, 1)},
        "batch": {"input_ids": ids.repeat(3, 1)},
        "contextvars": contextvars,
        "Thread": threading.Thread,
    }


def test_the_readme(names: dict[str, Any]) -> None:
    (code,) = blocks("README.md", "use_batch")
    exec(code, names)
    assert names["skills"].named("medical").metadata["field"] == "medicine"


def test_the_page(names: dict[str, Any]) -> None:
    first, thread, merging, learning = blocks("docs/adapters.md", "skills")
    names["skills"] = names["mos"].register_memory(ParametricMemory("skills"))
    exec(first.partition("skills.attach")[0].replace("support.memos", "store"), names)
    legal = save_adapter(Path("legal"), seed=2)
    names["skills"].add(legal)
    exec("skills.attach" + first.partition("skills.attach")[2].replace("skills.detach", "#"), names)
    started = threading.active_count()
    exec(thread.replace(".start()  # join it in the block", ".run()"), names)
    assert threading.active_count() == started
    exec(merging, names)
    assert names["skills"].named("both").content["rank"] <= 16
    names["skills"].detach()
    assert "skills.learn(" in learning  # tests/test_learning.py learns
