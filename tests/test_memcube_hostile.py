"""Files that lie, with every digest right: refused, or taken as something a store may hold.

Whatever comes, an import either raises StoreError or ArgumentError and has written nothing, or it
leaves a store that agrees with itself and whose export is read again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memos import MOS
from memos.cube.identity import canonical
from memos.errors import ArgumentError, StoreError
from memos.records.transfer import digest_of_version, parse_cube, parse_version

from .memcube_help import (
    Embedder,
    changed,
    dump,
    filled,
    joined,
    opened,
    parts_of,
    problems,
    state_of,
)
from .test_memcube import mutations


@pytest.fixture(name="tmp_path")
def fast_path_fixture(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: ten thousand files are written."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hostile") / "whole"
    filled(embedder=Embedder()).export(path)
    return path.read_bytes()


def target() -> MOS:
    mos = opened()
    mos.add("notes", "here before", id="mine")
    return mos


def outcome(mos: MOS, data: bytes, path: Path) -> str:
    """Why a file is refused, having written nothing; "" where it was taken, and rightly so."""
    path.write_bytes(data)
    before, change = dump(mos), mos.records.database.last_change()
    names = set(mos.memories)
    try:
        mos.import_(path, embedder=None)
    except (StoreError, ArgumentError) as error:
        assert mos.records.database.last_change() == change
        assert dump(mos) == before
        assert set(mos.memories) == names
        return str(error)
    assert problems(mos) == []
    state_of(mos)
    mos.retrieve(None, "key boiler Ada late")
    mos.export(path, overwrite=True)
    MOS().import_(path, embedder=None)
    return ""


def lines_of(data: bytes, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in parts_of(data)[0][name][1].splitlines()]


def text_of(lines: list[Any]) -> bytes:
    return b"".join(canonical(line).encode() + b"\n" for line in lines)


def with_digests(lines: list[Any]) -> list[Any]:
    """The lines with the digests that what they say has; as far as they can be read."""
    cube, before, made, renamed = None, None, copy.deepcopy(lines), {}
    for line in made:
        try:
            if "cube" in line:
                cube, before = parse_cube(line, "it"), None
                continue
            line["parents"] = [renamed.get(one, one) for one in line["parents"]]
            before = parse_version(line, before, "it")
            mark = digest_of_version(
                cube, before, before.at, before.parent_id, before.state == "DELETED"
            )
            renamed[line["digest"]] = line["digest"] = mark.hex()
        except (StoreError, TypeError, KeyError, AttributeError, ArgumentError):
            return made
    return made


def test_the_helpers_make_good_files(whole: bytes, tmp_path: Path) -> None:
    members, info = parts_of(whole)
    assert joined(members, info) == whole
    for name, (type, data) in members.items():
        if type == "records":
            assert text_of(lines_of(whole, name)) == data
            assert with_digests(lines_of(whole, name)) == lines_of(whole, name)
    assert outcome(target(), whole, tmp_path / "f") == ""


# Ten thousand files with something wrong in their bytes.


def test_ten_thousand_mutated_files(whole: bytes, tmp_path: Path) -> None:
    mos, path = target(), tmp_path / "f"
    before = dump(mos)
    count = 0
    for wrong in mutations(whole, 10_400, 7):
        path.write_bytes(wrong)
        with pytest.raises((StoreError, ArgumentError)):
            mos.import_(path, embedder=None)
        count += 1
    assert count > 10_000
    assert dump(mos) == before
    assert set(mos.memories) == {"notes", "docs", "people", "points"}


# Records that say something else, under the right digests.

WRONG: list[Any] = [
    None, True, 0, 1, -1, 5, 2**70, 0.5, -0.5, 1.5, 1e300, "", "x", "key", "DELETED", "ARCHIVED",
    "root", "0" * 64, [], ["key"], [5], [["r", "", "key", 1.0, {}]], [["r", "", "nobody", 1.0, {}]],
    {}, {"a": 1}, {"name": "x"}, {"read": ["user:ann"]}, "\u0000", "a\nb", [None], 10**400,
]  # fmt: skip


def mutated(lines: list[Any], rng: random.Random) -> list[Any]:
    """One or two fields that are something else, or lines that are gone, doubled or swapped."""
    made = copy.deepcopy(lines)
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(made))
        line = made[at]
        match rng.randrange(10):
            case 0:
                del made[at]
            case 1:
                made.insert(rng.randrange(len(made)), copy.deepcopy(line))
            case 2:
                other = rng.randrange(len(made))
                made[at], made[other] = made[other], made[at]
            case 3:
                line.pop(rng.choice(sorted(line)))
            case 4:
                line["more"] = rng.choice(WRONG)
            case 5 if isinstance(line.get("content"), dict):
                line["content"][rng.choice(sorted(line["content"]))] = rng.choice(WRONG)
            case 6:
                other = made[rng.randrange(len(made))]
                key = rng.choice(sorted(line))
                line[key] = copy.deepcopy(other.get(key))
            case _:
                line[rng.choice(sorted(line))] = rng.choice(WRONG)
        if not made:
            return copy.deepcopy(lines)
    return made


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_records_that_lie(whole: bytes, tmp_path: Path, number: int) -> None:
    name = f"records/{number:04d}-000001.jsonl"
    lines = lines_of(whole, name)
    rng = random.Random(number)
    mos = target()
    refused = taken = 0
    for i in range(50):
        made = mutated(lines, rng)
        if i % 3:
            made = with_digests(made)
        if made == lines:
            continue
        why = outcome(mos, changed(whole, name, lambda _, made=made: text_of(made)), tmp_path / "f")
        if why:
            refused += 1
        else:
            taken += 1
            mos = target()
    assert refused > 25
    assert taken < 25


def test_a_version_that_is_not_what_its_digest_says(whole: bytes, tmp_path: Path) -> None:
    name = "records/0002-000001.jsonl"
    for key in ("text", "metadata", "author", "at", "importance", "acl", "source", "parents"):
        lines = lines_of(whole, name)
        line = next(one for one in lines if one.get("text", "").startswith("Line"))
        value = line[key]
        line[key] = {"text": "other", "metadata": {}, "at": 1.0, "importance": 0.1}.get(
            key, {"read": []} if key == "acl" else ["0" * 64] if key == "parents" else "other"
        )
        assert line[key] != value
        assert "digest" in outcome(
            target(), changed(whole, name, lambda _, made=lines: text_of(made)), tmp_path / "f"
        )


def refused_change(
    whole: bytes, tmp_path: Path, name: str, change: Callable[[list[Any]], object]
) -> str:
    lines = lines_of(whole, name)
    change(lines)
    made = with_digests(lines)
    return outcome(target(), changed(whole, name, lambda _: text_of(made)), tmp_path / "f")


def at(lines: list[Any], id: str) -> int:
    return next(i for i, line in enumerate(lines) if line.get("cube") == id)


def test_trees_that_are_none(whole: bytes, tmp_path: Path) -> None:
    docs = "records/0001-000001.jsonl"

    def parent(id: str | None, of: int) -> Callable[[list[Any]], object]:
        def change(lines: list[Any]) -> None:
            cubes = [i for i, line in enumerate(lines) if "cube" in line]
            last = cubes[of] + lines[cubes[of]]["versions"]
            lines[last]["parent_id"] = lines[cubes[-2]]["cube"] if id == "last" else id

        return change

    assert "above itself" in refused_change(whole, tmp_path, docs, parent("last", 0))
    assert "neither in the file" in refused_change(whole, tmp_path, docs, parent("nobody", 1))
    assert "thread" in refused_change(whole, tmp_path, docs, parent(None, 1))

    def forever(lines: list[Any]) -> None:
        lines[1]["expires_at"] = 1.0

    assert "lives longer" in refused_change(whole, tmp_path, docs, forever)

    def deleted(lines: list[Any]) -> None:
        lines[1]["state"] = "DELETED"

    filled().export(tmp_path / "words")
    words = (tmp_path / "words").read_bytes()
    assert "below one that is deleted" in refused_change(words, tmp_path, docs, deleted)
    notes = "records/0002-000001.jsonl"

    def with_parent(lines: list[Any]) -> None:
        lines[at(lines, "odd") + 1]["parent_id"] = "key"

    assert "no parent" in refused_change(whole, tmp_path, notes, with_parent)


def test_graphs_that_are_none(whole: bytes, tmp_path: Path) -> None:
    people = "records/0003-000001.jsonl"

    def end(id: str) -> Callable[[list[Any]], object]:
        def change(lines: list[Any]) -> None:
            lines[at(lines, "e1") + 1]["content"]["target_id"] = id

        return change

    for id in ("nobody", "e1", "e2"):
        assert "no node" in refused_change(whole, tmp_path, people, end(id))
    for content in (
        *(None, 5, "node", {}, {"type": "node"}, {"type": "node", "label": "x"}),
        *({"type": "node", "label": "a b", "properties": {}}, {"type": "edge", "properties": {}}),
        {"type": "node", "label": "x", "properties": {}, "more": 1},
        {"type": "node", "labels": ["x"], "properties": {}},
    ):

        def change(lines: list[Any], content: Any = content) -> None:
            lines[at(lines, "carl") + 1]["content"] = content

        assert refused_change(whole, tmp_path, people, change), content


def test_manifests_that_lie(whole: bytes, tmp_path: Path) -> None:
    members, info = parts_of(whole)
    rng = random.Random(5)
    mos, refused = target(), 0
    keys = [(i, key) for i, memory in enumerate(info["memories"]) for key in memory]
    for i in range(90):
        made = copy.deepcopy(info)
        number, key = rng.choice(keys)
        memory = made["memories"][number]
        match i % 6:
            case 0:
                memory.pop(key)
            case 1 if memory["embedder"]:
                memory["embedder"][rng.choice(sorted(memory["embedder"]))] = rng.choice(WRONG)
            case 2:
                made[rng.choice(["adapters", "memories", "more"])] = rng.choice(WRONG)
            case 3:
                rng.shuffle(made["memories"])
            case 4 if memory["kind"] == "vector":
                memory["config"][rng.choice(sorted(memory["config"]))] = rng.choice(WRONG)
            case _:
                memory[key] = rng.choice([*WRONG, "text", "graph", "kv_cache", "program"])
        if made == info:
            continue
        try:
            data = joined(members, made)
        except ArgumentError:
            continue
        if outcome(mos, data, tmp_path / "f"):
            refused += 1
        else:
            mos = target()
    assert refused > 60


def test_tensors_that_lie(whole: bytes, tmp_path: Path) -> None:
    members, _ = parts_of(whole)
    names = [name for name, (type, _) in members.items() if type == "tensors"]
    assert len(names) == 4
    rng = random.Random(3)
    mos, refused = target(), 0
    for i in range(60):
        name = names[i % 4]
        data = bytearray(members[name][1])
        place = rng.randrange(8 + int.from_bytes(data[:8], "little") + 40)
        match i % 5:
            case 0:
                del data[place:]
            case 1:
                data += b"\0" * rng.randrange(1, 9)
            case 2:
                data = bytearray(b"")
            case _:
                data[place] ^= 1 << rng.randrange(8)
        wrong = changed(whole, name, lambda _, data=data: bytes(data))
        if outcome(mos, wrong, tmp_path / "f"):
            refused += 1
        else:
            mos = target()
    assert refused > 35


def test_members_that_belong_to_nothing_are_refused(whole: bytes, tmp_path: Path) -> None:
    members, info = parts_of(whole)
    for name, type in (
        *(("program.sh", "blob"), ("records/0009-000001.jsonl", "records")),
        *(("records/0001-000002.jsonl", "records"), ("tensors/0001-000002.safetensors", "tensors")),
        (f"adapters/{'0' * 64}/adapter_config.json", "blob"),
    ):
        more = {**members, name: (type, b"")}
        assert "belongs to no memory" in outcome(target(), joined(more, info), tmp_path / "f")
    for name in members:
        fewer = {one: member for one, member in members.items() if one != name}
        if not name.startswith("tensors"):
            assert outcome(target(), joined(fewer, info), tmp_path / "f")
        other = {**members, name: ("blob", members[name][1])}
        assert outcome(target(), joined(other, info), tmp_path / "f")


def test_lines_that_are_no_records(whole: bytes, tmp_path: Path) -> None:
    name = "records/0002-000001.jsonl"
    for wrong in (
        *(b"", b"\n", b"{}\n", b"[]\n", b"5\n", b"not json\n", b'{"cube":"x"}\n', b"\xff\n"),
        *(
            b"[" * 100_000 + b"\n",
            b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n",
            b"9" * 5000 + b"\n",
        ),
        b'{"cube":NaN}\n',
    ):
        assert outcome(target(), changed(whole, name, lambda _, w=wrong: w), tmp_path / "f")
        assert outcome(
            target(), changed(whole, name, lambda d, w=wrong: d + w), tmp_path / "f"
        ) or (wrong == b"")


def test_a_huge_number_of_numbers_is_refused(whole: bytes, tmp_path: Path) -> None:
    members, info = parts_of(whole)
    for key, value in (("numbers", 2**52), ("cubes", 2**52), ("parts", 2**40), ("versions", 2**60)):
        made = copy.deepcopy(info)
        made["memories"][0][key] = value
        assert outcome(target(), joined(members, made), tmp_path / "f")
