"""The bytes of a zip archive in one spelling: equal members make equal archives.

Every member is stored as it is, dated 1980-01-01, in zip64, with its sizes behind it so that it
can be written to a stream. There is one way to write each header, so a reader compares instead of
interpreting: nothing in an archive that passes can mean two things to two programs.

Source: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from memos.errors import StoreError

_LOCAL = struct.Struct("<4sHHHHHIIIHHHHQQ")
_BEHIND = struct.Struct("<4sIQQ")
_CENTRAL = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_CENTRAL_EXTRA = struct.Struct("<HHQQQ")
_END = struct.Struct("<4sQHHIIQQQQ4sIQI4sHHHHIIH")
_UNKNOWN, _MANY = 0xFFFFFFFF, 0xFFFF
_VERSION = 45  # the first with zip64
_FLAGS = 0x0808  # sizes stand behind the data; names are UTF-8
_DATE = 0x0021  # 1980-01-01
_MODE = 0o100644 << 16

BEHIND_BYTES, END_BYTES = _BEHIND.size, _END.size
MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One member of an archive: its checksum, its size and where its header begins."""

    name: str
    crc: int
    num_bytes: int
    offset: int

    @property
    def start(self) -> int:
        """Where its data begins."""
        return self.offset + _LOCAL.size + len(self.name)

    @property
    def stop(self) -> int:
        """Where what follows it begins."""
        return self.start + self.num_bytes + BEHIND_BYTES


def before(name: str) -> bytes:
    """What stands in front of a member's data. The name is ASCII."""
    fields = (b"PK\3\4", _VERSION, _FLAGS, 0, 0, _DATE, 0, _UNKNOWN, _UNKNOWN, len(name), 20)
    extra = (1, 16, 0, 0)
    # The name stands between the fields and the extra field.
    packed = _LOCAL.pack(*fields, *extra)
    return packed[:30] + name.encode("ascii") + packed[30:]


def behind(crc: int, num_bytes: int) -> bytes:
    """What stands behind a member's data."""
    return _BEHIND.pack(b"PK\7\x08", crc, num_bytes, num_bytes)


def index(entries: Sequence[Entry]) -> bytes:
    """The end of an archive: its central directory, and the records that find it."""
    parts = [_central(entry) for entry in entries]
    size = sum(map(len, parts))
    return b"".join([*parts, _end(len(entries), size, entries[-1].stop if entries else 0)])


def parse_end(tail: bytes, file_bytes: int) -> tuple[int, int]:
    """(offset, bytes) of the central directory from the last ``END_BYTES`` of an archive.

    Raises StoreError: they are not the end of such an archive.
    """
    if len(tail) == END_BYTES and file_bytes >= END_BYTES:
        fields = _END.unpack(tail)
        count, size, offset = fields[7], fields[8], fields[9]
        if (
            size <= MAX_INDEX_BYTES
            and offset + size + END_BYTES == file_bytes
            and _end(count, size, offset) == tail
        ):
            return offset, size
    raise StoreError("its end is not that of a .memcube: cut off, or something else")


def parse_index(data: bytes, stop: int) -> list[Entry]:
    """The members of a central directory, whose data fills the archive up to ``stop``.

    Raises StoreError: it is spelled in any other way, members overlap, or leave gaps.
    """
    found: list[Entry] = []
    at = offset = 0
    while at < len(data):
        size = len(data) - at
        if size < _CENTRAL.size:
            raise StoreError("its index is cut off")
        length = _CENTRAL.unpack_from(data, at)[11]
        whole = _CENTRAL.size + length + _CENTRAL_EXTRA.size
        if size < whole:
            raise StoreError("its index is cut off")
        name = data[at + _CENTRAL.size : at + _CENTRAL.size + length]
        crc = _CENTRAL.unpack_from(data, at)[8]
        num_bytes = _CENTRAL_EXTRA.unpack_from(data, at + whole - _CENTRAL_EXTRA.size)[2]
        if not name.isascii():
            raise StoreError("names of members in ASCII wanted")
        entry = Entry(name.decode("ascii"), crc, num_bytes, offset)
        if entry.stop > stop or _central(entry) != data[at : at + whole]:
            raise StoreError(
                f"member {entry.name[:100]!r}: stored as a .memcube stores it wanted, right behind "
                "the one before"
            )
        found.append(entry)
        at, offset = at + whole, entry.stop
    if offset != stop:
        raise StoreError("there are bytes between its members and its index")
    return found


def _central(entry: Entry) -> bytes:
    extra = _CENTRAL_EXTRA.pack(1, 24, entry.num_bytes, entry.num_bytes, entry.offset)
    head = _CENTRAL.pack(
        *(b"PK\1\2", _VERSION, 3, _VERSION, _FLAGS, 0, 0, _DATE, entry.crc),
        *(_UNKNOWN, _UNKNOWN, len(entry.name), len(extra), 0, 0, 0, _MODE, _UNKNOWN),
    )
    return head + entry.name.encode("ascii") + extra


def _end(count: int, size: int, offset: int) -> bytes:
    return _END.pack(
        *(b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, size, offset),
        *(b"PK\6\7", 0, offset + size, 1),
        *(b"PK\5\6", 0, 0, _MANY, _MANY, _UNKNOWN, _UNKNOWN, 0),
    )
