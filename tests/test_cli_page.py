"""The page of the command line: every command, every option, and examples that run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from memos import cli

from .cli_help import ROOT, Run, commands, run_fixture  # noqa: F401


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
    text = re.sub(r"\b[0-9a-f]{32}([0-9a-f]{32})?\b", "DIGEST", text)
    text = re.sub(r"\b[0-9a-f]{16}\b", "KEY", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\d+\.\d+", "N", text)
    return re.sub(r"[\s\u2500\u2501]+", " ", text).strip()
