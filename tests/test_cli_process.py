"""The command line as a process: locales, pipes, terminals, and what it loads."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, GeneralTextMemory
from memos.errors import ArgumentError

from .cli_help import ROOT, Run, house_fixture, process, run_fixture  # noqa: F401


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
