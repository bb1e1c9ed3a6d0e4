"""The command line: folders, mistakes in one line, and stored text that is shown literally."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memos import cli
from memos.commands import console

from .cli_help import NASTY, Run, commands, house_fixture, run_fixture  # noqa: F401

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
