"""docs/compose.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the model is a torch model")

from . import models  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "compose.md"


def test_the_page_runs() -> None:
    model, tokenizer = models.smollm2()
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names = {"model": model, "tokenizer": tokenizer}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    context, composed = names["context"], names["composed"]
    assert names["boiler"].id not in context.prefilled
    assert len(context.prefilled) == 1
    assert composed.share == pytest.approx(0.15, abs=0.05)
    assert names["output"].shape[1] > len(composed.token_ids)
    names["mos"].close()
