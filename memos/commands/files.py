"""memos export, inspect, and the import of .memcube files."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memos.commands import console, folder
from memos.errors import ArgumentError, BackendError, StoreError

PASSPHRASE = "MEMOS_PASSPHRASE"
SUFFIX = ".memcube"
CONFLICTS = ("error", "skip")  # as memos.facade.files, which a parser does not load


def export(options: argparse.Namespace) -> int:
    """Memories into one file."""
    sign = None if options.sign is None else _private_key(Path(options.sign))
    secret = _passphrase(twice=True) if options.encrypt else None
    with folder.opened(options) as mos, _progress("cubes") as tell:
        made = mos.export(
            options.file,
            options.id or None,
            options.memory or None,
            sign=sign,
            passphrase=secret,
            overwrite=options.force,
            progress=tell,
        )
    if options.json:
        found = {"file": str(made.path), "bytes": made.num_bytes, "digest": made.digest}
        console.write_json({**found, "memories": made.memories})
        return 0
    table = _table("memory", "cubes")
    for name, count in made.memories.items():
        table.add_row(console.text(name), f"{count:,}")
    console.show(table)
    sys.stdout.write(f"{console.safe(str(made.path))}: {_size(made.num_bytes)}\n{made.digest}\n")
    return 0


def is_import(options: argparse.Namespace) -> bool:
    """Whether ``memos import`` was given .memcube files."""
    return str(options.memory).endswith(SUFFIX)


def import_(options: argparse.Namespace) -> int:
    """Files that ``memos export`` wrote; each one whole or not at all."""
    paths = [options.memory, *options.files]
    for path in paths:
        if not path.endswith(SUFFIX):
            raise ArgumentError(f"FILE: files of one kind wanted, got {path} beside {paths[0]}")
        if not Path(path).is_file():  # before anything is made
            raise ArgumentError(f"FILE: no file {path}")
    for name in ("format", "metadata"):
        if getattr(options, name):
            raise ArgumentError(f"--{name}: only for documents; a {SUFFIX} says all of its own")
    secrets = {path: _passphrase() if _is_encrypted(path) else None for path in paths}
    done: list[dict[str, Any]] = []
    with folder.opened(options, readonly=False) as mos:
        for path in paths:
            with _progress(Path(path).name, 1 << 20) as tell:
                made = mos.import_(
                    path,
                    on_conflict=options.on_conflict,
                    passphrase=secrets[path],
                    trusted=_trusted(options),
                    embedder=folder.embedder_of(options),
                    names=_names(options),
                    progress=tell,
                )
            done.append({"file": path, **dataclasses.asdict(made)})
    if options.json:
        console.write_json({"files": done})
        return 0
    table = _table("file", "memory", "cubes", "skipped", "vectors")
    for one in done:
        for name, report in one["memories"].items():
            counts = f"{report['cubes']:,}", f"{report['skipped']:,}", report["vectors"]
            table.add_row(console.text(one["file"]), console.text(name), *counts)
    console.show(table)
    for one in done:
        for rebuild in one["rebuild"]:
            console.complain(
                f"{rebuild['memory']}, {rebuild['id']}: {rebuild['why']}: to be made anew from "
                f"{'its text' if rebuild['kind'] == 'kv_cache' else 'its sources'}"
            )
    return 0


def inspect(options: argparse.Namespace) -> int:
    """What is in a file."""
    from memos.facade.files import inspect

    secret = _passphrase() if _is_encrypted(options.file) else None
    with _progress(Path(options.file).name, 1 << 20) as tell:
        found = inspect(options.file, passphrase=secret, trusted=_trusted(options), progress=tell)
    if options.json:
        members = [dict(zip(_MEMBER, one, strict=True)) for one in found.members]
        fields = {**dataclasses.asdict(found), "members": members}
        fields["bytes"] = fields.pop("num_bytes")
        console.write_json({"file": options.file, **fields})
        return 0
    table = _table("memory", "kind", "cubes", "versions", "made for")
    for one in found.memories:
        table.add_row(
            console.text(str(one.get("name"))),
            console.text(str(one.get("kind"))),
            f"{one.get('cubes', one.get('sessions', 0)):,}",
            f"{one['versions']:,}" if "versions" in one else "",
            console.text(console.one_line(_made_for(one), 60)),
        )
    console.show(table)
    lines = [
        ("file", f"{options.file}: {_size(found.num_bytes)} in {len(found.members):,} + 3 members"),
        ("digest", found.digest),
        ("signed by", found.signer or "nobody"),
        ("encrypted", "yes" if found.is_encrypted else "no"),
    ]
    lines += [("adapter", digest) for digest in found.adapters]
    for name, value in lines:
        sys.stdout.write(f"{name}: {console.safe(value)}\n")
    return 0


def _names(options: argparse.Namespace) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in options.rename or ():
        old, equals, new = one.partition("=")
        if not equals or not old or not new:
            raise ArgumentError(f"--rename: OLD=NEW wanted, got {one!r}")
        found[old] = new
    return found


_MEMBER = ("name", "type", "bytes", "digest")


def _made_for(memory: Mapping[str, Any]) -> str:
    """What vectors or caches of a memory belong to."""
    embedder, identity = memory.get("embedder"), memory.get("identity")
    if isinstance(embedder, dict):
        return f"embedder {embedder.get('identity')}"
    if isinstance(identity, dict):
        return f"model {identity.get('model')}"
    return ""


def _is_encrypted(path: str) -> bool:
    from memos.cube.memcube_cipher import is_sealed

    with Path(path).open("rb") as stream:
        return is_sealed(stream)


def _passphrase(*, twice: bool = False) -> str:
    """From the environment, or asked for; never from an argument, which every process can see."""
    given = os.environ.get(PASSPHRASE)
    if given:
        return given
    if not sys.stdin.isatty():
        raise ArgumentError(f"passphrase: the variable {PASSPHRASE}, or a terminal to ask, wanted")
    given = getpass.getpass("passphrase: ")
    if twice and getpass.getpass("once more: ") != given:
        raise ArgumentError("passphrase: the same one twice wanted")
    return given


def _private_key(path: Path) -> Any:
    """An Ed25519 key in PEM, as ``openssl genpkey -algorithm ed25519`` writes it."""
    return _loaded(path, "--sign", "load_pem_private_key", {"password": None})


def _trusted(options: argparse.Namespace) -> list[Any] | None:
    """Public keys, each as hex digits or as a file in PEM."""
    if not options.trusted:
        return None
    return [
        _loaded(Path(one), "--trusted", "load_pem_public_key", {}) if Path(one).is_file() else one
        for one in options.trusted
    ]


def _loaded(path: Path, what: str, load: str, more: Mapping[str, Any]) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise BackendError(
            f"{what}: the package 'cryptography' is not installed; "
            "pip install 'memos-native[crypto]'"
        ) from error
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{what}: {path} cannot be read ({error.strerror})") from error
    try:
        return getattr(serialization, load)(data, **more)
    except (ValueError, TypeError):
        raise ArgumentError(f"{what}: an Ed25519 key in PEM wanted in {path}") from None


@contextmanager
def _progress(what: str, unit: int = 1) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; its total is known at the first call."""
    with console.progress(what, None) as tell:

        def update(done: int, total: int) -> None:
            tell(-(-done // unit), -(-total // unit))

        yield update


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
