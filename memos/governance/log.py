"""A file of records that are only ever appended, each chained to the one before it by a hash.

    NUMBER HASH BODY\\n      HASH = BLAKE2b-256(the hash before, NUMBER, BODY), keyed, in hex

Segments follow one another: a full one ends with a record that says so. Whoever changes, adds,
takes out or moves a record must change every hash behind it, for which the key is needed; the last
one is also kept elsewhere.
Processes take turns under a lock on the folder; a record that a crash cut short is taken away by
the next one who appends.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memos.errors import StoreError

SEGMENT_BYTES = 16 << 20
ENDED = b'{"what":"segment full"}'
_TAIL = 1 << 16


@dataclass(frozen=True)
class Head:
    """Where a log ends: how many records there are, and the last one's hash, in hex."""

    count: int
    hash: str


@dataclass(frozen=True)
class Line:
    """One record as it stands in the file."""

    number: int
    hash: str
    body: bytes
    segment: int


class Log:
    """Thread-safe; several processes may append to one folder.

    Args:
        folder:  made where it is not there.
        genesis: which store this log is of; the first record is chained to it.
        key:     of the hashes, at most 64 bytes.
        durable: every record waits for the disk.

    Raises:
        StoreError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        genesis: str,
        key: bytes = b"",
        *,
        durable: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.folder, self.genesis, self.key = folder, genesis, key
        self._durable, self._segment_bytes = durable, segment_bytes
        self._lock = threading.Lock()
        self._segment = self._end = self._file = self._count = 0
        self._hash = first_hash(genesis)
        try:
            folder.mkdir(exist_ok=True)
            self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{folder}: the audit log cannot be written ({error})") from error
        with self._lock:
            self._locked(self._find_end)

    def append(self, body: bytes) -> Head:
        """Add a record; returns the head with it.

        Cost: two system calls for the lock, one to see whether others wrote, and one write.
        """
        if b"\n" in body:
            raise ValueError("body: one line wanted")
        with self._lock:
            try:
                return self._appended(body)
            except OSError as error:
                raise StoreError(f"{self.folder}: no record can be added ({error})") from error

    def head(self) -> Head:
        """Where the log ends now."""
        with self._lock:
            self._locked(self._catch_up)
            return Head(self._count, self._hash.hex())

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for file in (self._file, self._lock_file):
                if file:
                    os.close(file)
            self._file = self._lock_file = 0

    # Inside; under both locks.

    def _appended(self, body: bytes) -> Head:
        import fcntl

        if not self._lock_file:
            raise StoreError(f"{self.folder}: the audit log is closed")
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        try:
            self._catch_up()
            if self._end and self._end + len(body) > self._segment_bytes:
                self._write(ENDED)
                self._open(self._segment + 1)
            self._write(body)
            return Head(self._count, self._hash.hex())
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _locked(self, call: object) -> None:
        import fcntl

        if not self._lock_file:
            raise StoreError(f"{self.folder}: the audit log is closed")
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        try:
            assert callable(call)
            call()
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _write(self, body: bytes) -> None:
        number = self._count + 1
        made = chained(self._hash, number, body, self.key)
        line = b"%d %s %s\n" % (number, made.hex().encode(), body)
        written = os.pwrite(self._file, line, self._end)
        while written < len(line):
            written += os.pwrite(self._file, line[written:], self._end + written)
        if self._durable:
            os.fdatasync(self._file)
        self._count, self._hash, self._end = number, made, self._end + len(line)

    def _catch_up(self) -> None:
        """See what others appended; take away what a crash left unfinished."""
        while True:
            size = os.fstat(self._file).st_size
            if size == self._end:
                return
            if size < self._end:
                raise StoreError(f"{self.folder}: the audit log was cut short by somebody")
            data = os.pread(self._file, size - self._end, self._end)
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.ftruncate(self._file, self._end + whole)
            ended = False
            for line in data[: max(whole - 1, 0)].split(b"\n") if whole else ():
                number, made, body = line.split(b" ", 2)
                self._count, self._hash = int(number), bytes.fromhex(made.decode())
                ended = body == ENDED
            self._end += whole
            if not ended:
                return
            self._open(self._segment + 1)

    def _find_end(self) -> None:
        numbers = [number for number, _ in segments(self.folder)]
        if len(numbers) > 1:  # the hash that the last one begins with stands before it
            last = _last_line(segment_path(self.folder, numbers[-2]))
            if last is not None:
                self._count, self._hash = last.number, bytes.fromhex(last.hash)
        self._open(numbers[-1] if numbers else 1)
        last = _last_line(segment_path(self.folder, self._segment))
        size = os.fstat(self._file).st_size
        if last is None:
            os.ftruncate(self._file, 0)
            return
        self._count, self._hash = last.number, bytes.fromhex(last.hash)
        self._end = _whole_bytes(self._file, size)
        if self._end < size:
            os.ftruncate(self._file, self._end)
        if last.body == ENDED:
            self._open(self._segment + 1)

    def _open(self, segment: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        file = os.open(segment_path(self.folder, segment), flags, 0o600)
        if self._file:
            os.close(self._file)
        self._file, self._segment, self._end = file, segment, 0


# Reading.


def first_hash(genesis: str) -> bytes:
    """What the first record of a store's log is chained to."""
    return hashlib.blake2b(b"memos audit\0" + genesis.encode(), digest_size=32).digest()


def chained(before: bytes, number: int, body: bytes, key: bytes) -> bytes:
    """The hash of a record."""
    data = b"%b%d %b" % (before, number, body)
    return hashlib.blake2b(data, digest_size=32, key=key).digest()


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"


def segments(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of every segment, in order."""
    found = [(int(path.stem), path) for path in folder.glob("*.log") if path.stem.isdigit()]
    return sorted(found)


def lines(folder: Path) -> Iterator[Line]:
    """Every whole record of a log, oldest first, unchecked. Raises StoreError for no record."""
    for number, path in segments(folder):
        with open(path, "rb") as file:
            for raw in file:
                if raw.endswith(b"\n"):
                    yield parsed(raw, number)


def parsed(raw: bytes, segment: int) -> Line:
    """A record from its line. Raises StoreError."""
    number, _, rest = raw.rstrip(b"\n").partition(b" ")
    made, _, body = rest.partition(b" ")
    if not number.isdigit() or len(made) != 64:
        raise StoreError(f"segment {segment}: a record wanted, got {raw[:40]!r}")
    return Line(int(number), made.decode("ascii", "replace"), body, segment)


def _whole_bytes(file: int, size: int) -> int:
    """Bytes up to the end of the last whole line."""
    at = size
    while at > 0:
        start = max(0, at - _TAIL)
        place = os.pread(file, at - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        at = start
    return 0


def _last_line(path: Path) -> Line | None:
    """The last whole record of a segment; None where there is none."""
    if not path.exists():
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        end = _whole_bytes(file, os.fstat(file).st_size)
        if not end:
            return None
        start = _whole_bytes(file, end - 1)
        raw = os.pread(file, end - start, start)
    finally:
        os.close(file)
    return parsed(raw, int(path.stem))
