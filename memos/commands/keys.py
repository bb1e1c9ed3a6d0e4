"""The master key of an encrypted store: a new one, another one, everything sealed anew."""

from __future__ import annotations

import argparse

from memos.commands import console, folder


def new(options: argparse.Namespace) -> int:
    """Write a random key to a new file."""
    from memos.records.keys import MasterKey

    made = MasterKey.new_file(options.file)
    _show(options, made.id)
    return 0


def change(options: argparse.Namespace) -> int:
    """Have another master key open the store, from now on alone."""
    from memos.records.keys import MasterKey

    master = MasterKey.of(options.to)
    with folder.opened(options, readonly=False, new=False) as mos:
        mos.change_master_key(master)
    _show(options, master.id)
    return 0


def reseal(options: argparse.Namespace) -> int:
    """Seal everything with new keys."""
    with folder.opened(options, readonly=False, new=False) as mos:
        mos.reseal()
    if options.json:
        console.write_json({"resealed": True})
    return 0


def _show(options: argparse.Namespace, id: str) -> None:
    if options.json:
        console.write_json({"id": id})
    else:
        console.write_text(f"{id}\n")
