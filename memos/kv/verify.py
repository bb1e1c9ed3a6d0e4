"""Walk every frame of a store with all checks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memos.errors import StoreError
from memos.kv._crypto import TenantKeys
from memos.kv.frame import HEADER_BYTES, Header, open_payload, parse
from memos.kv.segment import scan
from memos.kv.sessions import SessionTable
from memos.kv.tiers import list_segments


@dataclass
class Report:
    """What ``KVStore.verify`` found. ``places`` are (file, offset, reason), at most 1,000."""

    ok: int = 0
    ok_bytes: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.bad

    def add_bad(self, path: Path, offset: int, reason: str) -> None:
        self.bad[reason] += 1
        if len(self.places) < _KEPT_PLACES:
            self.places.append((str(path), offset, reason))


Progress = Callable[[int, int], object]
_KEPT_PLACES = 1000


def verify_tenants(
    tenants: Sequence[tuple[Path, TenantKeys, SessionTable]], progress: Progress | None
) -> Report:
    """Read and check all segments and sessions; calls ``progress(done_bytes, total_bytes)``."""
    report = Report()
    work = [
        (path, keys)
        for folder, keys, _ in tenants
        for _, path in list_segments(folder / "segments")
    ]
    total = sum(_size(path) for path, _ in work)
    done = 0
    for path, keys in work:
        for num_bytes in _verify_segment(path, keys, report):
            if progress is not None:
                progress(done + num_bytes, total)
        done += _size(path)
    for folder, _, sessions in tenants:
        try:
            damaged = sessions.check()
        except StoreError:
            damaged = 1
        for _ in range(damaged):
            report.add_bad(folder / "sessions.db", 0, "session")
    if progress is not None:
        progress(total, total)
    return report


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _verify_segment(path: Path, keys: TenantKeys, report: Report) -> Iterator[int]:
    """Check one segment; yields how far it has come, in bytes."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return  # evicted meanwhile
    except OSError:
        report.add_bad(path, 0, "io")
        return
    try:
        for offset, num_bytes, header in scan(fd, os.fstat(fd).st_size, keys):
            reason = header if isinstance(header, str) else _check(fd, offset, header, keys)
            if reason is None:
                report.ok += 1
                report.ok_bytes += header.payload_bytes if isinstance(header, Header) else 0
            elif reason != "gone":
                report.add_bad(path, offset, reason)
            yield offset + num_bytes
    except OSError:
        report.add_bad(path, 0, "io")
    finally:
        os.close(fd)


def _check(fd: int, offset: int, header: Header, keys: TenantKeys) -> str | None:
    data = os.pread(fd, HEADER_BYTES + header.stored_bytes, offset)
    again = parse(data, keys)
    if isinstance(again, str):
        return again  # evicted while this ran, or the disk changes its mind
    payload = open_payload(header, data, keys)
    return payload if isinstance(payload, str) else None
