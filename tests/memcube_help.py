"""What the tests of files share: stores with something of everything, and forged files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memos import MOS, GeneralTextMemory, GraphMemory, TreeTextMemory, VectorMemory
from memos.cube.memcube import MemcubeReader, MemcubeWriter
from memos.records.check import check

from .embedding_help import vectors_of

DOCUMENT = """# Handbook

How the house works.

## Heating

The boiler is in the cellar.

## Garden

- water
- weed
"""


class Embedder:
    """Any text has its own vector, which another identity makes differently."""

    dim = 8

    def __init__(self, identity: str = "one") -> None:
        self.identity = identity
        self.texts = 0

    def embed(self, texts: Sequence[str], kind: str = "document", progress: Any = None) -> Any:
        self.texts += len(texts)
        return vectors_of([self.identity + text for text in texts], self.dim)


def memories(embedder: Any = None) -> list[Any]:
    return [
        GeneralTextMemory("notes", "what was said", embedder=embedder),
        TreeTextMemory("docs", embedder=embedder),
        GraphMemory("people", embedder=embedder),
        VectorMemory("points"),
    ]


def opened(path: Path | None = None, embedder: Any = None, **options: Any) -> MOS:
    """A store with a memory of each kind of records."""
    mos = MOS(path, **options)
    for memory in memories(embedder):
        mos.register_memory(memory)
    return mos


def filled(path: Path | None = None, embedder: Any = None) -> MOS:
    """A store with something of everything."""
    mos = opened(path, embedder)
    mos.add("notes", "The spare key is under the mat.", {"room": "hall", "n": 1.5}, id="key")
    mos.add(
        "notes", "Line\u2028separators, \u00e9, \U0001f511 and \"quotes\".", {"a": {"b": [1]}},
        id="odd", relations=[{"type": "supports", "target": "key", "weight": 0.5}],
        importance=0.9, source="chat", creator="user:ann", derived_from=["key"],
        acl={"read": ["user:ann"]}, thread="t1",
    )  # fmt: skip
    mos.add("notes", "gone soon", id="gone", ttl_s=1e9)
    mos.update("notes", "key", "The spare key is gone.", {"valid_from": 5.0}, author="user:bob")
    mos.update("notes", "key", None, {"more": True}, source="letter")
    mos.delete("notes", "gone")
    docs = mos.memory("docs")
    root = docs.add_document(DOCUMENT)
    first, *_, last = docs.children(root.id)
    docs.move(first.id, last.id)
    docs.add("late", parent_id=root.id, ttl_s=1e9, id="late")
    for id, label in (("ada", "Person"), ("carl", "Person"), ("rome", "City")):
        node = {"type": "node", "label": label, "properties": {"name": id.title()}}
        mos.add("people", node, id=id)
    for id, label, a, b in (("e1", "KNOWS", "ada", "carl"), ("e2", "LIVES_IN", "carl", "rome")):
        edge = {"type": "relationship", "label": label, "source_id": a, "target_id": b}
        mos.add("people", edge, id=id)
    mos.relate("ada", "wrote", "odd", properties={"when": "today"})
    node = {"type": "node", "label": "Person", "properties": {"name": "Ada L."}}
    mos.update("people", "ada", node)
    mos.delete("people", "e2")
    mos.add("points", [1.0, 0.0, 0.25], id="p1")
    mos.add("points", {"vector": [0.0, 1.0, -2.5], "text": "straight up"}, id="p2")
    mos.add("points", [9.0, 9.0, 9.0], id="p3")
    mos.delete("points", "p3")
    return mos


def state_of(mos: MOS) -> dict[str, Any]:
    """All that can be read of every cube, deleted ones too, but what a store makes by itself."""
    found: dict[str, Any] = {}
    for name, memory in mos.memories.items():
        with mos.records.database.read() as connection:
            rows = connection.exec_driver_sql(
                "SELECT id FROM cubes WHERE memory = ? ORDER BY seq", (memory.table.memory,)
            ).all()
        found[name] = [(id, [plain(v) for v in memory.history(id)]) for (id,) in rows]
        for cube in memory.cubes(None):
            fields = {key: plain(value) for key, value in cube.items()}
            fields["relations"] = sorted(map(repr, cube.relations))
            found[f"{name}/{cube.id}"] = fields
    return found


def plain(value: Any) -> Any:
    """Arrays compare by their numbers."""
    if hasattr(value, "content") and isinstance(value.content, dict):
        return {**vars(value), "content": plain(value.content)}
    if isinstance(value, dict) and "vector" in value:
        return {**value, "vector": value["vector"].tolist()}
    return value


def dump(mos: MOS) -> dict[str, list[Any]]:
    """Every row of every table: what is written, and by whomever."""
    with mos.records.database.read() as connection:
        names = connection.exec_driver_sql(
            "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        ).scalars()
        return {
            name: sorted(map(repr, connection.exec_driver_sql(f'SELECT * FROM "{name}"')))
            for name in list(names)
        }


def problems(mos: MOS) -> list[str]:
    return [str(problem) for problem in check(mos.records)]


def parts_of(data: bytes) -> tuple[dict[str, tuple[str, bytes]], dict[str, Any]]:
    """Members and info of a file."""
    reader = MemcubeReader(io.BytesIO(data))
    reader.verify()
    members = {m.name: (m.type, b"".join(reader.pieces(m.name))) for m in reader.members.values()}
    return members, reader.info


def joined(members: dict[str, tuple[str, bytes]], info: dict[str, Any]) -> bytes:
    """A file of these members, whatever they are, with the right digests."""
    stream = io.BytesIO()
    writer = MemcubeWriter(stream)
    for name, (type, data) in members.items():
        with writer.member(name, type) as member:
            member.write(data)
    writer.close(info)
    return stream.getvalue()


def changed(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """A file with another member, and the digests of it."""
    members, info = parts_of(data)
    members[name] = (members[name][0], change(members[name][1]))
    return joined(members, info)


def moved(mos: MOS, folder: Path, into: MOS | None = None, **options: Any) -> tuple[MOS, Any]:
    """Everything of a store in another one; what it reported."""
    path = folder / "moved.memcube"
    mos.export(path, overwrite=True)
    target = into or MOS()
    return target, target.import_(path, embedder=None, **options)


def vectors_in(mos: MOS, name: str) -> dict[str, bytes]:
    with mos.records.database.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT c.id, v.data FROM vectors AS v JOIN cubes AS c ON c.seq = v.seq "
            "WHERE c.memory = ? AND v.data IS NOT NULL",
            (mos.memory(name).table.memory,),
        )
        return {row[0]: row[1] for row in rows}
