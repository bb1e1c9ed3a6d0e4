"""Whether an audit log is what was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memos.errors import StoreError
from memos.governance.log import ENDED, Head, Line, chained, first_hash, parsed, segments


@dataclass
class Report:
    """What was found.

    Args:
        count:    records that were read; ``hash``: of the last one that fits.
        problems: in words; none: the log is whole.
        notes:    what is no alarm: an end that a crash cut short.
    """

    count: int = 0
    hash: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not self.problems


def verify(
    folder: Path,
    genesis: str,
    known: Head | None,
    kept: Head | str | None = None,
    *,
    key: bytes = b"",
) -> Report:
    """Read a log through.

    Args:
        genesis: of the store that it should be of.
        known:   the head that the store knows; the log may go on behind it.
        kept:    a head, or its hash, that was kept elsewhere.
        key:     of the hashes.

    Returns:
        The report. Found are: a record that was changed, added, taken out or moved; a segment that
        is missing; a log of another store; and records cut off the end, as far as the store's head
        or the one kept elsewhere knows of them.

    Cost: one hash for each record; 1 s for about 400,000.
    """
    report = Report()
    heads = [head for head in (known, kept) if isinstance(head, Head)]
    chain = _Chain(report, first_hash(genesis), key, {kept, *(head.count for head in heads)})
    found = segments(folder)
    if [number for number, _ in found] != list(range(1, len(found) + 1)):
        names = ", ".join(path.name for _, path in found)
        report.problems.append(
            f"segments from 000001.log on wanted, one after the other, got {names}"
        )
    for number, path in found:
        _segment(path, number, number == len(found), chain)
    chain.finish()
    wanted = kept if isinstance(kept, Head) else None
    for what, head in (("the store", known), ("the head that was kept", wanted)):
        if head is not None and head.count > 0:
            _compare(report, chain, what, head)
    if isinstance(kept, str) and kept not in chain.hashes.values():
        report.problems.append(f"no record has the hash that was kept, {kept}")
    return report


class _Chain:
    def __init__(self, report: Report, first: bytes, key: bytes, wanted: set[Any]) -> None:
        self.report, self.before, self.number = report, first, 0
        self.key = key
        self.wanted = wanted  # numbers, or hashes, of records that are asked for
        self.hashes: dict[int, str] = {}
        self._bad = 0

    def add(self, line: Line) -> None:
        where = f"record {line.number} (segment {line.segment})"
        if line.number != self.number + 1:
            self.problem(f"{where} stands behind record {self.number}: records were taken out, "
                         "added or moved")  # fmt: skip
        elif chained(self.before, line.number, line.body, self.key).hex() != line.hash:
            self.problem(f"{where} is not what was written, or one before it is missing")
        self.before, self.number = bytes.fromhex(line.hash), line.number
        if line.number in self.wanted or line.hash in self.wanted:
            self.hashes[line.number] = line.hash
        self.report.count += 1
        self.report.hash = line.hash

    def problem(self, text: str) -> None:
        self._bad += 1
        if self._bad <= 20:
            self.report.problems.append(text)

    def finish(self) -> None:
        if self._bad > 20:
            self.report.problems.append(f"and {self._bad - 20} more")


def _segment(path: Path, number: int, is_last: bool, chain: _Chain) -> None:
    last = b""
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                if is_last:
                    chain.report.notes.append(
                        f"the last record of {path.name} is unfinished: a crash cut it short; the "
                        "next one who appends takes it away"
                    )
                else:
                    chain.problem(f"{path.name}: its end is cut off")
                return
            try:
                line = parsed(raw, number)
                bytes.fromhex(line.hash)
            except (StoreError, ValueError):
                chain.problem(f"{path.name}: a line that is no record")
                continue
            chain.add(line)
            last = line.body
    if not is_last and last != ENDED:
        chain.problem(f"{path.name}: its last record is missing")


def _compare(report: Report, chain: _Chain, what: str, head: Head) -> None:
    here = chain.hashes.get(head.count)
    if here is None:
        report.problems.append(
            f"{what} knows of {head.count} records, the log has {report.count}: its end was cut off"
        )
    elif here != head.hash:
        report.problems.append(f"record {head.count} has not the hash that {what} knows")
