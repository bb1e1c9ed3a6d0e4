"""What tests of encrypted stores share: two stores that are told the same, a look at files."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy

from memos import MOS, GeneralTextMemory
from memos.cube import MemCube, Version

MARK = "zqxjkw"  # in every text that the tests store
KEY = bytes(range(100, 132))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Embedder:
    """Vectors that say which letters a text has."""

    identity, dim = "letters", 8

    def embed(self, texts: Any, kind: str = "document", progress: Any = None) -> Any:
        found = numpy.zeros((len(texts), self.dim), numpy.float32)
        for row, text in zip(found, texts, strict=True):
            for letter in text:
                row[ord(letter) % self.dim] += 1 + ord(letter) % 5
        return found + 0.125


def readable(folder: Path, *more: bytes) -> list[str]:
    """Files in which a mark, or one of these bytes, can be read, or whose names hold one."""
    wanted = [MARK.encode(), MARK.encode("utf-16-le"), MARK.encode().hex().encode(), *more]
    return [
        f"{path.relative_to(folder)}: {one!r}"
        for path in sorted(folder.rglob("*"))
        for one in wanted
        if one in str(path).encode() or (path.is_file() and one in path.read_bytes())
    ]


def seen(cube: MemCube) -> dict[str, Any]:
    """All that a cube says, to be compared."""
    found = {name: getattr(cube, name) for name in cube}
    found["relations"] = sorted(map(repr, cube.relations))
    found["content"] = plain(cube.content)
    for name in ("ancestors", "siblings", "descendants", "neighbours"):
        if name in found:
            found[name] = [seen(one) for one in found[name]]
    found.pop("trace", None)  # how long each stage took
    return found


def plain(content: Any) -> Any:
    if isinstance(content, numpy.ndarray):
        return content.tolist()
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    return content


def told(version: Version) -> dict[str, Any]:
    return {**vars(version), "content": plain(version.content)}


def close_all(*stores: MOS) -> None:
    for mos in stores:
        mos.close()


def opened(path: Path, key: Any = KEY, **more: Any) -> MOS:
    mos = MOS(path, key=key, **more)
    if "notes" not in mos.memories:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
    return mos


def filled(path: Path, count: int = 20) -> list[str]:
    with opened(path) as mos:
        return [mos.add("notes", f"{MARK} {i}", {"n": i}).id for i in range(count)]


def contents(mos: MOS) -> set[str]:
    return {cube.content for cube in mos.memory("notes").cubes(None)}


def rows(path: Path, statement: str, *values: Any) -> list[Any]:
    """Of the file itself, in a transaction of its own."""
    db = sqlite3.connect(path / "records.sqlite")
    try:
        with db:
            return db.execute(statement, values).fetchall()
    finally:
        db.close()
