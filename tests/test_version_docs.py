"""What docs/versions.md shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "versions.md"


def test_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "{'content': ('Meet in Paris.', 'Meet in Rome.')}",
        "Meet in Paris.",
        "draft -> notes: merged; 0 added, 1 changed, 0 deleted, 0 conflicts",
        "Meet in Oslo. {'day': 'Friday'}",
    ]
