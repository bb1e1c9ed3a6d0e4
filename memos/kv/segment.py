"""Segments: files of frames that appear whole and are never appended to.

Only the one writer of a folder writes, punches and unlinks; any process may read. A reader opens
a segment for each call and reads with pread, so a segment or a frame that vanishes underneath is
an error value here, never a signal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memos.kv import _files
from memos.kv._crypto import TenantKeys
from memos.kv.frame import ALIGN, HEADER_BYTES, MAGIC, Block, Header, parse

SUFFIX = ".kvs"
_CHUNK = 1 << 20


@dataclass(slots=True, eq=False)
class Segment:
    """What this process knows of one segment file."""

    path: Path
    tenant: bytes
    stamp: tuple[int, int, int]  # of the file: inode, size, time of change
    allocated_bytes: int = 0  # live frames and garbage
    live: dict[bytes, Record] = field(default_factory=dict)
    garbage: list[tuple[int, int]] = field(default_factory=list)  # damaged, doubled, evicted


@dataclass(slots=True, eq=False)
class Record:
    """Where one frame lies on disk, and the block in it."""

    block: Block
    segment: Segment
    offset: int
    frame_bytes: int
    stored_bytes: int


def stamp_of(stat: os.stat_result) -> tuple[int, int, int]:
    """Another one means that the file is another one, or was punched."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def segment_number(name: str) -> int | None:
    """The number in a segment's file name, None for any other file."""
    stem, suffix = os.path.splitext(name)
    ours = suffix == SUFFIX and len(stem) >= 8 and stem.isascii() and stem.isdigit()
    return int(stem) if ours else None


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}{SUFFIX}"


class SegmentWriter:
    """Writes one segment under a temporary name; ``publish`` makes it visible, whole.

    After ``abort`` the temporary file is gone and nothing has changed.
    """

    def __init__(self, folder: Path, durable: bool) -> None:
        self._folder = folder
        self._durable = durable
        self._temp = _files.temp_path(folder)
        self._fd = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.size = 0

    def append(self, pieces: list[bytes]) -> int:
        """Write one frame; returns its offset."""
        offset = self.size
        num_bytes = sum(map(len, pieces))
        written = os.writev(self._fd, pieces)
        if written < num_bytes:  # rare: a signal, or the disk is full and the next call says so
            _files.write_all(self._fd, memoryview(b"".join(pieces))[written:])
        self.size += num_bytes
        return offset

    def publish(self, path: Path) -> tuple[int, int, int]:
        """Put the segment in place; returns its stamp."""
        if self._durable:
            _files.sync_data(self._fd)
        stamp = stamp_of(os.fstat(self._fd))
        os.rename(self._temp, path)
        try:
            if self._durable:
                _files.sync_folder(self._folder)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.abort()
        return stamp

    def abort(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._temp.unlink(missing_ok=True)


def read_at(fd: int, data: bytearray | memoryview, offset: int) -> int | None:
    """Fill ``data``; returns how much the file had, None where the system could not read it."""
    done, view = 0, memoryview(data)
    try:
        while done < len(view):
            num_bytes = os.preadv(fd, [view[done:]], offset + done)
            if not num_bytes:
                break
            done += num_bytes
    except OSError:
        return None
    return done


def scan(fd: int, size: int, keys: TenantKeys) -> Iterator[tuple[int, int, Header | str]]:
    """Walk the frames of a segment: (offset, bytes, header, or the reason why it has none).

    After a bad header the walk goes on at the next multiple of 4096 that begins with the magic;
    the bytes up to there are reported as one bad range, "gone" when they are zeros. Holes are
    skipped and not reported.
    """
    offset = 0
    while (offset := _next_data(fd, offset, size)) < size:
        header = parse(os.pread(fd, HEADER_BYTES, offset), keys)
        if isinstance(header, Header):
            if offset + header.frame_bytes <= size:
                yield offset, header.frame_bytes, header
                offset += header.frame_bytes
                continue
            header = "truncated"
        stop, blank = _resync(fd, offset, size)
        if blank:
            header = "gone"  # removed, but the pages are still there
        elif header == "gone":
            header = "header"
        yield offset, stop - offset, header
        offset = stop


def _next_data(fd: int, offset: int, size: int) -> int:
    """The first frame boundary at or after ``offset`` that is not in a hole."""
    try:
        found = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset  # nothing but a hole follows
    return max(offset, found // ALIGN * ALIGN)


def _resync(fd: int, offset: int, size: int) -> tuple[int, bool]:
    """The next boundary after ``offset`` with a magic, or ``size``; is all before it zeros?"""
    blank, start = True, offset
    while offset < size:
        data = os.pread(fd, min(_CHUNK, size - offset), offset)
        if not data:
            break
        for at in range(0, len(data), ALIGN):
            if offset + at > start and data.startswith(MAGIC, at):
                return offset + at, blank
            if blank and data.count(0, at, at + ALIGN) != len(data[at : at + ALIGN]):
                blank = False
        offset += len(data)
    return size, blank
