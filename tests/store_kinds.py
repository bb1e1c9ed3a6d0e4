"""Block stores of every kind: on disk, encrypted, in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from memos.kv import KVStore

KEY = bytes(range(32))
FRAME = 4096  # bytes on disk of a block of SMALL


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(name="kind", params=["disk", "encrypted", "memory"])
def kind_fixture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_store(kind: str, path: Path, **options: object) -> KVStore:
    options.setdefault("durable", False)
    if kind == "memory":
        options.pop("disk_bytes", None)
        return KVStore(None, **options)  # type: ignore[arg-type]
    key = KEY if kind == "encrypted" else None
    return KVStore(path / "store", encryption_key=key, **options)  # type: ignore[arg-type]
