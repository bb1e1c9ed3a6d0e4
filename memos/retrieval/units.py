"""What ranking reads of a source's units, kept between queries."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy

from memos.records.validity import interval_of
from memos.retrieval.query import SPEAKER_KEYS, Pair, has_number
from memos.retrieval.source import Array, Scope, Source, Unit
from memos.retrieval.times import mentions_time, time_of

_KEPT = 200_000  # units; some hundred bytes each
_CHUNK = 4096
_DAY_S = 86400
_MOST_CHANGES = 1000  # after more of them everything is read anew
_COLUMNS = (
    ("seq", numpy.int64),
    ("previous", numpy.int64),
    ("next", numpy.int64),
    ("group", numpy.int64),
    ("parent", numpy.int64),
    ("at", numpy.float64),
    ("importance", numpy.float64),
    ("ends", numpy.float64),  # from when it does not hold any more
    ("is_question", numpy.bool_),
    ("has_time", numpy.bool_),
    ("has_number", numpy.bool_),
)


class Units:
    """Columns of numbers for the units of one memory. Thread-safe.

    A text is read once, and again when the source says that it changed. What is kept is not under
    any scope: callers ask only about units that a scoped call returned.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stamp = 0
        self._clear()

    def __len__(self) -> int:
        return len(self._rows)

    def columns(
        self, source: Source, scope: Scope, seqs: Array, names: Iterable[str]
    ) -> tuple[Array, dict[str, Array]]:
        """(which of these units exist: bool [n], columns [n] of those that do)."""
        with self._lock:
            rows = self._find(source, scope, seqs)
            found = rows >= 0
            rows = rows[found]
            return found, {name: self._columns[name][rows] for name in names}

    def having(self, source: Source, scope: Scope, seqs: Array, pairs: Iterable[Pair]) -> Array:
        """Which of these units have one of these (key, value) in their metadata: bool [n]."""
        with self._lock:
            rows = self._find(source, scope, seqs)
            has = numpy.zeros(self._used + 1, numpy.bool_)  # the last one is for "not there", -1
            for pair in pairs:
                has[list(self._holders.get(pair, ()))] = True
            return has[rows]

    def refresh(self, source: Source, scope: Scope) -> None:
        """Forget what changed in the source, and what stood or stands beside it."""
        with self._lock:
            stamp, changed = source.changes(self._stamp)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            if changed is None or len(self._rows) > _KEPT or len(changed) > _MOST_CHANGES:
                self._clear()
            elif self._rows and changed:
                gone = set(changed)
                used = slice(0, self._used)
                for name in ("previous", "next"):
                    touched = numpy.isin(self._columns[name][used], list(changed))
                    gone.update(self._columns["seq"][used][touched].tolist())
                for before, after in source.neighbours(changed, scope).values():
                    gone.update(before)
                    gone.update(after)
                for seq in gone:
                    self._forget(seq)

    def _find(self, source: Source, scope: Scope, seqs: Array) -> Array:
        wanted = seqs.tolist()
        rows = self._rows
        missing = [seq for seq in wanted if seq not in rows]
        if missing:
            near = source.neighbours(missing, scope)
            for seq, unit in source.load(missing, scope).items():
                before, after = near.get(seq, ((), ()))
                self._read(unit, before, after)
        return numpy.fromiter((rows.get(seq, -1) for seq in wanted), numpy.int64, len(wanted))

    def _read(self, unit: Unit, before: Sequence[int], after: Sequence[int]) -> None:
        row = self._free.pop() if self._free else self._used
        if row == self._used:
            self._used += 1
            if row >= len(self._columns["at"]):
                for name, column in self._columns.items():
                    more = numpy.zeros(max(_CHUNK, len(column)), column.dtype)
                    self._columns[name] = numpy.concatenate([column, more])
        time = time_of(unit.metadata)
        at = unit.created_at if time is None else time
        is_spoken = any(key.lower() in SPEAKER_KEYS for key in unit.metadata)
        values = {
            "seq": unit.seq,
            "previous": before[0] if before else -1,
            "next": after[0] if after else -1,
            "group": self._group(unit, at),
            "parent": -1 if unit.parent is None else unit.parent,
            "at": at,
            "importance": unit.importance,
            "ends": interval_of(unit.metadata)[1],
            "is_question": is_spoken and asks(unit.text),
            "has_time": (is_spoken or time is not None) and mentions_time(unit.text),
            "has_number": has_number(unit.text),
        }
        for name, value in values.items():
            self._columns[name][row] = value
        self._rows[unit.seq] = row
        self._pairs[row] = tuple(pairs_of(unit.metadata))
        for pair in self._pairs[row]:
            self._holders.setdefault(pair, set()).add(row)

    def _group(self, unit: Unit, at: float) -> int:
        """Number of the section, or of the day of a conversation; -1: it stands alone."""
        key: tuple[Any, ...]
        if unit.parent is not None:
            key = ("parent", unit.parent)
        elif unit.thread is not None:
            key = ("thread", unit.thread, at // _DAY_S)
        else:
            return -1
        return self._groups.setdefault(key, len(self._groups))

    def _forget(self, seq: int) -> None:
        row = self._rows.pop(seq, None)
        if row is None:
            return
        self._free.append(row)
        for pair in self._pairs.pop(row):
            self._holders[pair].discard(row)

    def _clear(self) -> None:
        self._rows: dict[int, int] = {}
        self._pairs: dict[int, tuple[Pair, ...]] = {}
        self._holders: dict[Pair, set[int]] = {}
        self._groups: dict[tuple[Any, ...], int] = {}
        self._free: list[int] = []
        self._used = 0
        self._columns = {name: numpy.zeros(_CHUNK, dtype) for name, dtype in _COLUMNS}


def asks(text: str) -> bool:
    """Whether a text ends with a question; a remark in brackets after it does not count."""
    text = text.rstrip()
    if text.endswith("]"):
        text = text[: text.rfind("[")].rstrip()
    return text.endswith("?")


def pairs_of(metadata: Mapping[str, Any]) -> Iterator[Pair]:
    """(key, value) of the strings in the metadata, also of those in lists."""
    for key, value in metadata.items():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str) and len(item) <= 64:
                yield key, item
