"""memos export, import of a .memcube, inspect."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memos import MOS, cli

from .cli_help import ROOT, Run, house_fixture, run_fixture  # noqa: F401
from .memcube_help import state_of


def pem(folder: Path) -> tuple[str, str, str]:
    """Files with a private and its public key, and the public key in hex."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = Ed25519PrivateKey.generate()
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return str(private), str(public), key.public_key().public_bytes_raw().hex()


def test_a_house_moves(house: Run) -> None:
    made = house.json("export", "house.memcube")
    assert made["memories"] == {"docs": 8, "notes": 3, "people": 5, "points": 2}
    told = house.json("import", "house.memcube", "--store", "other.memos")
    (one,) = told["files"]
    assert one["digest"] == made["digest"]
    assert {n: m["cubes"] for n, m in one["memories"].items()} == made["memories"]
    assert one["rebuild"] == []
    with MOS("memory.memos") as a, MOS("other.memos") as b:
        assert state_of(a) == state_of(b)
    again = house.json("export", "again.memcube", "--store", "other.memos")
    assert again["digest"] == made["digest"]
    assert Path("house.memcube").read_bytes() == Path("again.memcube").read_bytes()
    found = house.json("inspect", "house.memcube")
    assert (found["digest"], found["bytes"]) == (made["digest"], made["bytes"])
    assert {m["name"]: m["cubes"] for m in found["memories"]} == made["memories"]
    assert found["members"][0]["type"] == "records"


def test_parts_and_conflicts(house: Run) -> None:
    house("export", "some.memcube", "--id", "key-1", "--id", "e1")
    house("export", "notes.memcube", "--memory", "notes")
    assert "already" in house.fails("import", "some.memcube")
    assert "key-1" in house.fails("import", "some.memcube")
    told = house.json("import", "some.memcube", "notes.memcube", "--on-conflict", "skip")
    assert [f["memories"]["notes"]["skipped"] for f in told["files"]] == [1, 3]
    assert "overwrite" in house.fails("export", "some.memcube")
    house("export", "some.memcube", "--force", "--memory", "points")
    assert "nobody" in house.fails("export", "x.memcube", "--id", "nobody")
    assert "other" in house.fails("export", "x.memcube", "--memory", "other")
    assert not Path("x.memcube").exists()


def test_tables_are_safe(house: Run) -> None:
    for command in (
        *(("export", "a.memcube"), ("inspect", "a.memcube")),
        ("import", "a.memcube", "--store", "b.memos"),
    ):
        out = house(*command)
        assert "notes" in out
        assert "\x1b" not in out


def test_arguments_that_do_not_fit(house: Run) -> None:
    house("export", "a.memcube")
    assert "says its memories itself" in house.fails("import", "notes", "a.memcube")
    assert "of one kind" in house.fails("import", "a.memcube", "b.md")
    assert "no file" in house.fails("import", "b.memcube", "--store", "new.memos")
    assert not Path("new.memos").exists()
    assert "only for documents" in house.fails("import", "a.memcube", "--format", "text")
    assert "only for documents" in house.fails("import", "a.memcube", "--metadata", "a=1")
    house("import", "notes", code=2)
    assert "FILE wanted" in house.err
    Path("c.memcube").write_text("something else")
    assert "c.memcube: " in house.fails("import", "c.memcube", "--store", "new.memos")
    assert "c.memcube: " in house.fails("inspect", "c.memcube")


def test_signatures(house: Run, tmp_path: Path) -> None:
    private, public, digits = pem(tmp_path)
    house("export", "a.memcube", "--sign", private)
    assert house.json("inspect", "a.memcube")["signer"] == digits
    for trusted in (public, digits):
        house("inspect", "a.memcube", "--trusted", trusted)
        house("import", "a.memcube", "--trusted", trusted, "--store", f"{trusted[-4:]}.memos")
    wrong = "00" * 32
    assert "trusted" in house.fails("inspect", "a.memcube", "--trusted", wrong)
    house.fails("import", "a.memcube", "--trusted", wrong, "--on-conflict", "skip")
    assert "PEM" in house.fails("export", "b.memcube", "--sign", public)
    assert "PEM" in house.fails("inspect", "a.memcube", "--trusted", private)
    assert "cannot be read" in house.fails("export", "b.memcube", "--sign", "not there")
    assert not Path("b.memcube").exists()


def test_passphrases(house: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert "MEMOS_PASSPHRASE" in house.fails("export", "a.memcube", "--encrypt")
    monkeypatch.setenv("MEMOS_PASSPHRASE", "four words of mine")
    house("export", "a.memcube", "--encrypt")
    assert b"spare key" not in Path("a.memcube").read_bytes()
    assert house.json("inspect", "a.memcube")["is_encrypted"]
    house("import", "a.memcube", "--store", "b.memos")
    monkeypatch.setenv("MEMOS_PASSPHRASE", "other words")
    for command in (("inspect", "a.memcube"), ("import", "a.memcube", "--store", "c.memos")):
        error = house.fails(*command)
        assert "the one that the file was encrypted with" in error
        assert "words" not in error


def test_a_passphrase_is_asked_for_on_a_terminal(house: Run) -> None:
    """Nothing of it is shown there."""
    leader, follower = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k != "MEMOS_PASSPHRASE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "memos", "export", "a.memcube", "--encrypt", "--json"],
        stdin=follower, stderr=follower, stdout=subprocess.PIPE, start_new_session=True,
        env={**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    shown = ""
    for prompt in ("passphrase: ", "once more: "):
        while prompt not in shown:
            shown += os.read(leader, 1 << 16).decode()
        os.write(leader, b"s3cret phrase\n")
    out, _ = process.communicate(timeout=60)
    with contextlib.suppress(OSError):  # nobody is at the other end any more
        shown += os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert process.returncode == 0, shown
    assert json.loads(out)["memories"]["notes"] == 3
    assert "s3cret" not in shown
    with MOS() as mos:
        mos.import_("a.memcube", passphrase="s3cret phrase", embedder=None)


def test_help_names_the_suffix(run: Run, capsys: Any) -> None:
    assert cli.main(["import", "--help"]) == 0
    assert ".memcube" in capsys.readouterr().out
