"""Documents into trees and back: nothing is lost, headings are headings, code is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos.errors import ArgumentError, NotFoundError
from memos.memories.documents import parse, render, sentences
from memos.memories.tree import TreeTextMemory
from memos.records.store import Records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def docs() -> TreeTextMemory:
    memory = TreeTextMemory("docs", embedder=None)
    memory.bind(Records(None))
    return memory


def shape(memory: TreeTextMemory, id: str) -> list[tuple[int, str]]:
    """(depth below the root, first line) of all that stands below a cube, in document order."""
    below = memory.descendants(id)
    return [(len(memory.path(cube.id)) - 1, cube.content.split("\n")[0]) for cube in below]


def headings(text: str, format: str = "markdown") -> list[tuple[int, str]]:
    found = parse(text, format, title="t").nodes
    return [(n.metadata["level"], n.content) for n in found if n.metadata["type"] == "section"]


# What a tree looks like.

GUIDE = """\
---
title: "Guide"
tags: [a, b]
stars: 4
draft: false
nested:
  deep: 1
authors:
  - Ann
  - Bob
---
# Guide

First words.

Setup
-----

1. one

   more of one
2. two

```sh
# no heading

echo ok
```

### Deep ###

| a | b |
|---|---|
| 1 | 2 |

## Use
Right below.
"""


def test_the_tree_of_a_document(docs: TreeTextMemory) -> None:
    root = docs.add_document(GUIDE, metadata={"lang": "en"})
    assert root.content == "Guide"
    assert root.metadata["tags"] == ["a", "b"]
    assert root.metadata["stars"] == 4
    assert root.metadata["draft"] is False
    assert root.metadata["authors"] == ["Ann", "Bob"]
    assert root.metadata["lang"] == "en"
    assert "nested" not in root.metadata
    assert shape(docs, root.id) == [
        (1, "First words."),
        (1, "Setup"),
        (2, "1. one"),
        (2, "```sh"),
        (2, "Deep"),
        (3, "| a | b |"),
        (1, "Use"),
        (2, "Right below."),
    ]
    deep = next(cube for cube in docs.descendants(root.id) if cube.content == "Deep")
    assert deep.metadata["type"] == "section"
    assert (deep.metadata["level"], deep.metadata["line"]) == (3, 30)
    text = docs.children(deep.id)[0]
    assert (text.metadata["type"], text.metadata["line"]) == ("text", 32)
    assert docs.export_text(root.id) == GUIDE


def test_a_section_is_exported_alone(docs: TreeTextMemory) -> None:
    root = docs.add_document(GUIDE)
    use = docs.children(root.id)[-1]
    assert docs.export_text(use.id) == "## Use\nRight below.\n"


def test_changes_are_exported(docs: TreeTextMemory) -> None:
    root = docs.add_document("Title\n=====\n\nOne.\n\nTwo.\n\nThree.\n")
    one, two, three = docs.children(root.id)
    docs.update(root.id, "Other title")
    docs.delete(two.id)
    docs.move(one.id, root.id)
    docs.add("Four.", parent_id=root.id)
    docs.update(three.id, "3.")
    assert docs.export_text(root.id) == "# Other title\n\n3.\n\nOne.\n\nFour.\n"


def test_a_tree_made_by_hand_is_exported(docs: TreeTextMemory) -> None:
    root = docs.add("MemOS API Reference", {"type": "document"})
    core = docs.add("MOS Core API", {"type": "section"}, parent_id=root.id)
    docs.add("retrieve(query): finds", {"type": "method"}, parent_id=core.id)
    wanted = "# MemOS API Reference\n\n## MOS Core API\n\nretrieve(query): finds\n"
    assert docs.export_text(root.id) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "```\n# not\n```",
        "~~~\n# not\n```\n# not\n~~~",
        "````\n```\n# not\n````",
        "```\n# not, unclosed",
        "    # not: indented code",
        "#not",
        "#",
        "####### not",
        "- item\n\n  # part of the item",
        "- item\n  ```\n# not\n  ```",
        "<!--\n\n# not\n-->",
        "<pre>\n\n# not\n\n</pre>",
        "<div>\n# not\n---\n</div>",
        "> quote\n---",
        "---",
        "***",
        "- - -",
        "| a |\n|---|",
    ],
)
def test_what_is_no_heading(text: str) -> None:
    assert headings(f"before\n\n{text}") == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("# a", (1, "a")),
        ("   ###### a b ##", (6, "a b")),
        ("## a#", (2, "a#")),
        ("##\ta", (2, "a")),
        ("a\n=", (1, "a")),
        ("a\nb\n---", (2, "a b")),
        ("```\n```\n# a", (1, "a")),
        ("- item\n# a", (1, "a")),
        ("words\n# a", (1, "a")),
        ("<!-- note -->\n# a", (1, "a")),
    ],
)
def test_what_is_a_heading(text: str, wanted: tuple[int, str]) -> None:
    assert headings(f"before\n\n{text}") == [wanted]


@pytest.mark.parametrize(
    "block",
    [
        "- a\n- b\n\n- c\n\n  more of c\n\n      code\n- d",
        "Words before:\n1. a\n\n   b\n2. c",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "    code\n\n\n    code",
        "```\na\n\n\nb\n```",
        "<details>\n<summary>s</summary>\n</details>",
        "> a\n> b\nlazy",
        "[a]: https://a.example\n[b]: https://b.example",
    ],
)
def test_a_block_stays_whole(block: str) -> None:
    assert [node.content for node in parse(f"x\n\n{block}\n\n\ny").nodes] == ["x", block, "y"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "1. Introduction\n\nText.\n\n1.1 Aims\n\nText.",
            [(1, "1. Introduction"), (2, "1.1 Aims")],
        ),
        ("Title\n=====\n\nText.\n\nPart\n----\n\nText.", [(1, "Title"), (2, "Part")]),
        ("INTRODUCTION\n\nText.", [(1, "INTRODUCTION")]),
        ("1. Buy milk\n\n2. Buy eggs\n\n3. Go home", []),
        ("He said:\n\nHELLO!\n\nText.", []),
        ("3.5 Percent of all.\n\nText.", []),
        ("NASA\nis no heading here.\n\nText.", []),
        ("Text.\n\nTHE END", []),
        ("Title\n==============================\n\nText.", []),
        ("# no\n\nText.", []),
    ],
)
def test_headings_of_plain_text(text: str, wanted: list[tuple[int, str]]) -> None:
    assert headings(text, "text") == wanted


# Titles, formats, files.


@pytest.mark.parametrize(
    ("text", "title", "wanted"),
    [
        ("# A\n\nx", None, "A"),
        ("# A\n\nx", "A", "A"),
        ("# A\n\nx", "B", "B"),
        ("# A\n\nx\n\n# B", None, "A"),
        ("x y\nz\n\n# A", None, "x y z"),
        ("---\ntitle: F\n---\n\n# A", None, "F"),
        ("---\ntitle: F\n---\n", None, "F"),
    ],
)
def test_title(docs: TreeTextMemory, text: str, title: str | None, wanted: str) -> None:
    root = docs.add_document(text, title=title)
    assert root.content == wanted
    assert docs.export_text(root.id) == text.rstrip("\n") + "\n"


def test_files(docs: TreeTextMemory, tmp_path: Path) -> None:
    (tmp_path / "note.md").write_bytes(b"\xef\xbb\xbfone\r\n\r\n# two\r\n")
    note = docs.add_document(tmp_path / "note.md")
    assert (note.content, docs.export_text(note.id)) == ("note", "one\n\n# two\n")
    (tmp_path / "note.txt").write_text("# one\n\ntwo\n")
    assert shape(docs, docs.add_document(tmp_path / "note.txt").id) == [(1, "# one"), (1, "two")]
    (tmp_path / "note.bin").write_bytes(b"ok")
    with pytest.raises(ArgumentError, match=r"format: .*\.bin"):
        docs.add_document(tmp_path / "note.bin")
    (tmp_path / "note.bin").write_bytes(b"ok \xff")
    with pytest.raises(ArgumentError, match=r"not UTF-8 \(byte 3"):
        docs.add_document(tmp_path / "note.bin", format="text")
    with pytest.raises(NotFoundError, match="no file"):
        docs.add_document(tmp_path / "missing.md")
    with pytest.raises(ArgumentError, match="cannot be read"):
        docs.add_document(tmp_path, format="text")


def test_a_string_is_never_a_path(docs: TreeTextMemory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("unread")
    path = str(tmp_path / "secret")
    assert docs.export_text(docs.add_document(path).id) == f"{path}\n"
    with pytest.raises(ArgumentError, match=r"pathlib\.Path"):
        docs.add_document("README.md")


def test_wrong_arguments(docs: TreeTextMemory) -> None:
    for text in ("", " \n\t\n"):
        with pytest.raises(ArgumentError, match="text: a document that is not empty"):
            docs.add_document(text)
    with pytest.raises(ArgumentError, match="format: one of"):
        docs.add_document("x", format="pdf")
    with pytest.raises(ArgumentError, match="title: a text"):
        docs.add_document("x", title=" ")
    with pytest.raises(ArgumentError, match="metadata: a dict"):
        docs.add_document("x", metadata=[1])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="got bytes"):
        docs.add_document(b"x")  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match=r"parent_id: .* 'nobody'"):
        docs.add_document("x", parent_id="nobody")
    assert docs.roots() == []


def test_the_same_document_is_that_one(docs: TreeTextMemory) -> None:
    told: list[int] = []
    first = docs.add_document(GUIDE, progress=told.append)
    assert told == [9]
    docs.delete(docs.children(first.id)[0].id)
    assert docs.add_document(GUIDE).id == first.id
    assert len(docs.descendants(first.id)) == 7  # as it is now
    other = docs.add_document(GUIDE + "\nOne more.\n")
    assert other.id != first.id
    assert len(docs.descendants(other.id)) == 9
    below = docs.add_document(GUIDE, parent_id=other.id)
    assert [cube.content for cube in docs.path(below.id)] == ["Guide", "Guide"]


def test_a_refused_document_leaves_nothing(docs: TreeTextMemory) -> None:
    docs.on_duplicate = "error"
    docs.add_document(GUIDE)
    with pytest.raises(ArgumentError, match="there already"):
        docs.add_document(GUIDE)
    assert len(docs.cubes(limit=None)) == 9


def test_words_of_a_heading_find_the_text_below(docs: TreeTextMemory) -> None:
    root = docs.add_document("# Zebra\n\n## Quagga\n\nstripes\n\n## Okapi\n\nforest\n")

    def found(words: str) -> set[str]:
        with docs.records.database.read() as connection:
            seqs, _ = docs.table.fulltext.search(connection, words, 50, every_word=True)
            cubes = docs.table.load(connection, seqs.tolist(), docs.scope())
        return {cube.content for cube in cubes.values()}

    assert found("quagga stripes") == {"stripes"}
    assert found("zebra forest") == {"forest"}
    quagga, okapi = docs.children(root.id)
    docs.update(quagga.id, "Tapir")
    assert found("quagga") == set()
    assert found("tapir") == {"Tapir", "stripes"}
    docs.move(docs.children(quagga.id)[0].id, okapi.id)
    assert found("tapir") == {"Tapir"}
    assert found("okapi stripes") == {"stripes"}
    docs.update(docs.children(okapi.id)[0].id, metadata={"tag": "leaf"})
    assert found("okapi leaf") == {"forest"}
    docs.move(okapi.id, None)
    assert found("zebra") == {"Zebra", "Tapir"}


# Nothing is lost.

WORDS = st.text(st.sampled_from("abc xyz.,*_`1#>|-=\t\u00e9\u4e2d"), min_size=1, max_size=30)


def is_text(text: str) -> bool:
    return bool(text.strip())


@settings(max_examples=300)
@given(st.lists(WORDS | st.just(""), max_size=12), st.sampled_from(["markdown", "text"]))
def test_any_lines_come_back(lines: list[str], format: str) -> None:
    """Whatever it is read as: no line is lost or changed, and a second time changes nothing."""
    text = "\n".join(lines)
    if not text.strip():
        return
    out = written_again(text, format)
    assert [line for line in out.split("\n") if is_text(line)] == list(filter(is_text, lines))
    assert written_again(out, format) == out
    if "\n\n\n" not in out:  # blank lines inside blocks stay
        assert re.sub(r"\n{3,}", "\n\n", "\n".join(map(trimmed, lines)).strip("\n")) + "\n" == out


def written_again(text: str, format: str) -> str:
    document = parse(text, format, title="t")
    depths = {-1: 0}
    nodes = [(0, document.title, {**document.front, **document.layout})]
    for i, node in enumerate(document.nodes):
        depths[i] = depths[node.parent] + 1
        nodes.append((depths[i], node.content, node.metadata))
    return render(nodes, format)


def trimmed(line: str) -> str:
    return line if is_text(line) else ""


LINE = st.from_regex(r"[A-Za-z][a-z]{0,8}( [a-z]{1,8}){0,6}[.!?]?", fullmatch=True)
BLOCKS = st.one_of(
    LINE,
    st.lists(LINE, min_size=2, max_size=4).map("\n".join),
    st.builds(lambda level, line: f"{'#' * level} {line}", st.integers(1, 6), LINE),
    st.builds(lambda line, mark: f"{line}\n{mark * 4}", LINE, st.sampled_from("=-")),
    st.lists(LINE, min_size=1, max_size=4).map(lambda items: "\n\n".join(f"- {i}" for i in items)),
    st.lists(LINE, min_size=1, max_size=3).map(
        lambda items: "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    ),
    st.lists(LINE | st.just("") | st.just("# no"), max_size=5).map(
        lambda lines: "\n".join(["```", *lines, "```"])
    ),
    st.lists(LINE, min_size=1, max_size=3).map(lambda lines: "\n".join(f"> {i}" for i in lines)),
    st.lists(LINE, min_size=1, max_size=3).map(
        lambda cells: "\n".join(["| a |", "|---|", *(f"| {cell} |" for cell in cells)])
    ),
    st.integers(50, 80).map(lambda n: " ".join(f"Sentence {i} of {n}." for i in range(n))),
)
NOT_LISTS = BLOCKS.filter(lambda block: not re.match(r"- |1\. ", block))


@settings(max_examples=60)
@given(st.lists(st.tuples(NOT_LISTS, BLOCKS), min_size=1, max_size=6), st.data())
def test_made_documents_come_back(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    """Blocks that are known: the same document, whatever the number of blank lines between."""
    blocks = [block for pair in pairs for block in pair]
    gaps = data.draw(st.lists(st.integers(2, 5), min_size=len(blocks), max_size=len(blocks)))
    text = "".join(block + "\n" * gap for block, gap in zip(blocks, gaps, strict=True))
    assert written_again(text, "markdown") == "\n\n".join(blocks) + "\n"
    lines = text.split("\n")
    for node in parse(text, title="t").nodes:
        assert node.content.split("\n")[0] in lines[node.metadata["line"] - 1]
    assert headings(text) == headings_of(blocks)


def headings_of(blocks: list[str]) -> list[tuple[int, str]]:
    found = []
    for block in blocks:
        first, last = block.split("\n")[0], block.split("\n")[-1]
        if first.startswith("#"):
            found.append((first.count("#"), first.lstrip("#").strip()))
        elif last in ("====", "----"):
            found.append((1 if last == "====" else 2, first))
    return found


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda p: p.name
)
def test_our_own_documents_come_back(docs: TreeTextMemory, path: Path) -> None:
    text = path.read_text()
    root = docs.add_document(path)
    out = docs.export_text(root.id)
    if not re.search(r"\n\n\n", text):
        assert out == text
    again = docs.add_document(out, title=root.content)
    assert docs.export_text(again.id) == out
    fences = text.count("\n```")
    assert sum(cube.content.count("\n```") for cube in docs.descendants(root.id)) <= fences
    assert any(cube.metadata["type"] == "section" for cube in docs.descendants(root.id))


@settings(max_examples=200)
@given(st.lists(st.from_regex(r"[a-z]{1,9}[.!?\u3002]?[ \n]{0,2}", fullmatch=True), max_size=200))
def test_pieces_of_a_long_text(words: list[str]) -> None:
    text = "x" + "".join(words).strip()
    pieces = sentences(text, near=100)
    assert "".join(space + piece for space, piece in pieces) == text
    assert all(piece == piece.strip() and piece for _, piece in pieces)
    for _, piece in pieces[:-1]:
        assert len(piece) <= 200
        if re.search(r"[.!?](?=\s)", piece[:100]):
            assert piece[-1] in ".!?\u3002"
