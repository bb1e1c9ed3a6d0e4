"""Which folder a command works on, and how it is opened."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError, StoreError

if TYPE_CHECKING:
    from memos.mos import MOS

STORE, EMBEDDER, KEY = "MEMOS_STORE", "MEMOS_EMBEDDER", "MEMOS_KEY"
DEFAULT = "./memory.memos"
EMBEDDERS = ("auto", "none")


def folder_of(options: argparse.Namespace) -> tuple[str, str]:
    """(path, who named it) of the folder: the option, the environment, or the default."""
    if getattr(options, "store", None):
        return options.store, "--store"
    if os.environ.get(STORE):
        return os.environ[STORE], STORE
    return DEFAULT, "the default"


def exists(options: argparse.Namespace) -> bool:
    """Whether there is a store in the folder."""
    return (Path(folder_of(options)[0]) / "records.sqlite").exists()


def key_of(options: argparse.Namespace) -> str | None:
    """Where the master key is: the option or the environment says; None: there is none."""
    given: str | None = getattr(options, "key", None)
    if given is not None:
        return given
    named = os.environ.get(KEY, "")
    if named.startswith(("file:", "keyring:")):
        return named
    return f"env:{KEY}" if named else None


def opened(options: argparse.Namespace, *, readonly: bool = True, new: bool = True) -> MOS:
    """The MOS of the folder; only one that writes makes it where it is not there, if it may.

    Raises StoreError, which says which folder was meant and who named it.
    """
    from memos.mos import MOS

    path, named_by = folder_of(options)
    if (readonly or not new) and not exists(options) and not Path(path).is_file():
        raise StoreError(
            f"no store in {path} ({named_by}); --store PATH or {STORE} names another folder, "
            "memos add and memos import make one"
        )
    mos = MOS(path, readonly=readonly, key=key_of(options))
    if embedder_of(options) is None:
        for row in mos.records.memories():
            if row["name"] in mos.memories:
                mos.register_memory(make(row["kind"], row["name"], None, row))
    return mos


def embedder_of(options: argparse.Namespace) -> str | None:
    """What --embedder or the environment says: "auto", or None for none."""
    wish = getattr(options, "embedder", None) or os.environ.get(EMBEDDER) or "auto"
    if wish not in EMBEDDERS:
        raise ArgumentError(f"{EMBEDDER}: one of {', '.join(EMBEDDERS)} wanted, got {wish!r}")
    return None if wish == "none" else wish


def make(kind: str, name: str, embedder: Any, row: Mapping[str, Any] | None = None) -> Any:
    """A memory of this kind, not registered yet.

    Args:
        row: what the store knows of it: description and config.
    """
    from memos import memories

    kinds = {cls.kind: cls for cls in (getattr(memories, n) for n in memories.DECLARATIVE)}
    known = {} if row is None else row
    config = known.get("config") or {}
    more = {key: config[key] for key in ("dim", "metric", "dtype") if key in config}
    return kinds[kind](name, known.get("description", ""), embedder=embedder, **more)
