"""memos audit: whether the audit records of a folder are whole, and what they say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos.commands import console, folder
from memos.errors import ArgumentError, StoreError

if TYPE_CHECKING:
    from memos.governance.verify import Report


def audit(options: argparse.Namespace) -> int:
    """Verify the records, show where they end, or list them."""
    from memos.governance.audit import FOLDER, anchor, genesis_of, key_of, opener_of
    from memos.records.store import Records

    path = options.folder or folder.folder_of(options)[0]
    if options.head is not None and options.action != "verify":
        raise ArgumentError("--head: goes with verify only")
    records = Records(path, readonly=True, key=folder.key_of(options))
    try:
        with records.database.read() as connection:
            known, genesis = anchor(connection), genesis_of(connection)
            key = b"" if known is None else key_of(connection)
            opener = None if known is None else opener_of(records, key)
    finally:
        records.close()
    if known is None:
        raise StoreError(f"{path}: not audited; MOS(path, audit=True) switches it on")
    where = Path(path) / FOLDER
    if options.action == "records":
        return _list(where, opener, options)
    from memos.governance.verify import verify

    return _report(verify(where, genesis, known, options.head, key=key), options)


def _report(report: Report, options: argparse.Namespace) -> int:
    if options.json:
        found = {"records": report.count, "head": report.hash, "is_whole": report.is_whole}
        console.write_json({**found, "problems": report.problems, "notes": report.notes})
        return 0 if report.is_whole else 1
    if options.action == "head" and report.is_whole:
        sys.stdout.write(f"{report.count} {report.hash}\n")
        return 0
    for line in (*report.problems, *report.notes):
        console.complain(line)
    if not report.is_whole:
        return 1
    sys.stdout.write(f"{report.count:,} records, all as they were written\n")
    return 0


def _list(where: Path, opener: Any, options: argparse.Namespace) -> int:
    from memos.governance.audit import records_in

    every = records_in(where, opener)
    found = [one for one in every if options.id is None or one.names(options.id)]
    found = found[max(len(found) - options.limit, 0) :]
    if options.json:
        console.write_json({"records": [one.as_dict() for one in found]})
        return 0
    from rich.table import Table

    table = Table()
    for name in ("nr", "when", "who", "what", "cubes", "result", "why"):
        table.add_column(name, overflow="fold")
    for one in found:
        cubes = [f"{c[0]}/{c[1]} v{c[2]}" for c in (*one.changed, *one.cubes)]
        shown = ", ".join(cubes[:3]) + (", ..." if len(cubes) > 3 else "")
        cells = (str(one.number), console.when(one.at), one.who, one.what, shown, one.result)
        table.add_row(*(console.text(cell) for cell in (*cells, one.why)))
    console.show(table)
    return 0
