"""The container of a .memcube: named members with digests, in one stream.

    mimetype            what the file is
    ...                 members: records (lines of JSON), tensors (safetensors), blobs
    manifest.json       format, version, every member with its bytes and digest, and ``info``
    seal.json           digest of the manifest; signature

A zip archive in exactly one spelling (memcube_zip.py), encrypted as a whole where wanted
(memcube_cipher.py). It knows nothing of stores: what the members mean is said in ``info`` by who
writes them. The bytes are docs/format/memcube.md.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from blake3 import blake3

from memos.cube import memcube_zip as layout
from memos.cube.identity import canonical
from memos.cube.memcube_cipher import OpeningReader, SealingWriter, is_sealed
from memos.cube.memcube_seal import check_seal, make_seal
from memos.errors import ArgumentError, StoreError

MIME = b"application/vnd.memos.memcube+zip"
FORMAT, VERSION = "memcube", 1
TYPES = ("records", "tensors", "blob")
MAX_MEMBERS = 65_536
MAX_MANIFEST_BYTES = 32 << 20
MAX_LINE_BYTES = 64 << 20  # of one record
_MIMETYPE, _MANIFEST, _SEAL = "mimetype", "manifest.json", "seal.json"
_OWN = (_MIMETYPE, _MANIFEST, _SEAL)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*(/[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*)*")
_MAX_NAME = 200
_PIECE = 1 << 20  # bytes read at once

Progress = Callable[[int, int], object]  # bytes done, bytes in all


@dataclass(frozen=True)
class Member:
    """One member.

    Args:
        name:      lower-case words with dots, in folders.
        type:      "records", "tensors" or "blob".
        num_bytes: of its data.
        digest:    BLAKE3 of its data, in hex.
    """

    name: str
    type: str
    num_bytes: int
    digest: str


class MemcubeWriter:
    """Writes one .memcube: members one after the other, then ``close``.

    Equal members, info and key of the signature give equal bytes, as long as nothing is encrypted.

    Args:
        stream: where to; written from its position on, never read or moved.
        sign:   an Ed25519 private key, or its 32 bytes; None: not signed.
        secret: a passphrase, or a key of 32 bytes; None: not encrypted.

    Raises:
        ArgumentError: a key is none.
        BackendError: the package cryptography is missing, where a key wants it.
    """

    def __init__(
        self, stream: BinaryIO, *, sign: Any = None, secret: str | bytes | None = None
    ) -> None:
        if sign is not None:
            make_seal(b"", sign)  # refuses the key before anything is written
        self._sign = sign
        self._sealing = None if secret is None else SealingWriter(stream, secret)
        self._stream: Any = self._sealing or stream
        self._entries: list[layout.Entry] = []
        self._members: dict[str, Member] = {}
        self._open = ""
        self._put(_MIMETYPE, MIME)

    @contextmanager
    def member(self, name: str, type: str) -> Iterator[MemberWriter]:
        """One member; what is written inside is its data.

        Raises ArgumentError: a name or type out of contract, one that is there, too many.
        """
        if not _is_name(name) or name in _OWN or name in self._members:
            raise ArgumentError(f"name: a new one of lower-case words wanted, got {name!r}")
        if type not in TYPES:
            raise ArgumentError(f"type: one of {', '.join(TYPES)} wanted, got {type!r}")
        if len(self._members) == MAX_MEMBERS:
            raise ArgumentError(f"member: at most {MAX_MEMBERS:,} wanted")
        if self._open:
            raise ArgumentError(f"member: {self._open!r} is still being written")
        self._open = name
        made = MemberWriter(self._stream, self._begin(name))
        yield made
        self._open = ""
        self._end(name, made)
        self._members[name] = Member(name, type, made.num_bytes, made.hash.hexdigest())

    def close(self, info: Mapping[str, Any]) -> str:
        """Write manifest and seal; returns the digest of the manifest in hex.

        Args:
            info: JSON: what the members are.

        Raises ArgumentError: info is no JSON, or too much.
        """
        members = [
            {"bytes": m.num_bytes, "digest": m.digest, "name": m.name, "type": m.type}
            for m in self._members.values()
        ]
        manifest = {"format": FORMAT, "info": dict(info), "members": members, "version": VERSION}
        text = canonical(manifest, "info").encode()
        if len(text) > MAX_MANIFEST_BYTES:
            raise ArgumentError(f"info: a manifest of {MAX_MANIFEST_BYTES} bytes wanted at most")
        seal = make_seal(text, self._sign)
        self._put(_MANIFEST, text)
        self._put(_SEAL, canonical(seal).encode())
        self._stream.write(layout.index(self._entries))
        if self._sealing is not None:
            self._sealing.finish()
        return str(seal["digest"])

    def _put(self, name: str, data: bytes) -> None:
        made = MemberWriter(self._stream, self._begin(name))
        made.write(data)
        self._end(name, made)

    def _begin(self, name: str) -> int:
        self._stream.write(layout.before(name))
        return self._entries[-1].stop if self._entries else 0

    def _end(self, name: str, made: MemberWriter) -> None:
        self._stream.write(layout.behind(made.crc, made.num_bytes))
        self._entries.append(layout.Entry(name, made.crc, made.num_bytes, made.offset))


class MemberWriter:
    """Data of one member on its way into the archive."""

    def __init__(self, stream: Any, offset: int) -> None:
        self._stream, self.offset = stream, offset
        self.num_bytes, self.crc, self.hash = 0, 0, blake3()

    def write(self, data: Any) -> int:
        """Append bytes; returns how many."""
        size = memoryview(data).nbytes
        self.crc = zlib.crc32(data, self.crc)
        self.hash.update(data)
        self._stream.write(data)
        self.num_bytes += size
        return size


class MemcubeReader:
    """Reads one .memcube. Its manifest is checked when it is opened, its members by ``verify``.

    Args:
        stream:  seekable, from its first byte on; it is the caller's to close.
        secret:  passphrase or key of 32 bytes of an encrypted one.
        trusted: Ed25519 public keys, one of which has to have signed; None: signed or not.

    Attributes:
        members: by name, in the order of the file.
        info:    what the writer said of them.
        digest:  of the manifest, in hex: it stands for the whole content.
        signer:  public key in hex of who signed it; None: nobody.
        is_encrypted: whether it is.

    Raises:
        StoreError: no .memcube, damaged, of another version, signed by somebody else, or the
            wrong secret.
        ArgumentError: encrypted and no secret, or an argument out of contract.
        BackendError: the package cryptography is wanted and missing.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        secret: str | bytes | None = None,
        trusted: Sequence[Any] | None = None,
    ) -> None:
        stream.seek(0)
        self.is_encrypted = is_sealed(stream)
        self._stream: Any = OpeningReader(stream, secret) if self.is_encrypted else stream
        size = self._stream.seek(0, io.SEEK_END)
        offset, num_bytes = layout.parse_end(
            self._read(size - layout.END_BYTES, layout.END_BYTES), size
        )
        entries = layout.parse_index(self._read(offset, num_bytes), offset)
        self._entries = {entry.name: entry for entry in entries}
        names = [entry.name for entry in entries]
        if len(self._entries) < len(names):
            raise StoreError("it has two members of one name")
        if len(names) < len(_OWN) or (names[0], *names[-2:]) != _OWN:
            raise StoreError(f"a .memcube begins with {_MIMETYPE} and ends with {_SEAL}")
        if self._small(_MIMETYPE, len(MIME)) != MIME:
            raise StoreError(f"{_MIMETYPE}: {MIME.decode()} wanted")
        manifest = self._small(_MANIFEST, MAX_MANIFEST_BYTES)
        seal = parse_record(self._small(_SEAL, 4096), _SEAL)
        self.digest, self.signer = check_seal(seal, manifest, trusted)
        self.members, self.info = _parse_manifest(parse_record(manifest, _MANIFEST))
        told = [(member.name, member.num_bytes) for member in self.members.values()]
        if told != [(entry.name, entry.num_bytes) for entry in entries[1:-2]]:
            raise StoreError(f"{_MANIFEST}: exactly the members that are there wanted")

    @property
    def num_bytes(self) -> int:
        """Of all members together."""
        return sum(member.num_bytes for member in self.members.values())

    def verify(self, progress: Progress | None = None) -> None:
        """Read every member and compare it with its digest.

        Args:
            progress: called with (bytes read, bytes in all).

        Raises:
            StoreError: a member is damaged.

        Cost: reads everything once; keeps a megabyte.
        """
        done, total = 0, self.num_bytes
        for name in self.members:
            for piece in self.pieces(name):
                done += len(piece)
                if progress is not None:
                    progress(done, total)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The data of a member, a megabyte at a time.

        What came is confirmed only at the end. Raises StoreError: it is damaged.
        """
        member, entry = self.members[name], self._entries[name]
        yield from self._pieces(entry, member.digest)

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of a member of records, without their ends.

        What came is confirmed only at the end. Raises StoreError: damaged, a line that is too
        long, or the last one without its end.
        """
        rest: list[bytes] = []
        waiting = 0
        for piece in self.pieces(name):
            *whole, tail = piece.split(b"\n")
            if whole:
                whole[0] = b"".join([*rest, whole[0]])
                rest, waiting = [], 0
                yield from whole
            rest.append(tail)
            waiting += len(tail)
            if waiting > MAX_LINE_BYTES:
                raise StoreError(f"member {name}: lines of at most {MAX_LINE_BYTES} bytes wanted")
        if waiting:
            raise StoreError(f"member {name}: its last line has no end")

    def _small(self, name: str, most: int) -> bytes:
        entry = self._entries[name]
        if entry.num_bytes > most:
            raise StoreError(f"{name}: at most {most} bytes wanted, got {entry.num_bytes}")
        return b"".join(self._pieces(entry, None))

    def _pieces(self, entry: layout.Entry, digest: str | None) -> Iterator[bytes]:
        head = layout.before(entry.name)
        if self._read(entry.offset, len(head)) != head:
            raise StoreError(f"member {entry.name}: its header is damaged")
        crc, whole = 0, blake3()
        for at in range(0, entry.num_bytes, _PIECE):
            piece = self._read(entry.start + at, min(_PIECE, entry.num_bytes - at))
            crc = zlib.crc32(piece, crc)
            whole.update(piece)
            yield piece
        tail = self._read(entry.stop - layout.BEHIND_BYTES, layout.BEHIND_BYTES)
        if tail != layout.behind(entry.crc, entry.num_bytes):
            raise StoreError(f"member {entry.name}: what stands behind it is damaged")
        if crc != entry.crc or digest not in (None, whole.hexdigest()):
            raise StoreError(f"member {entry.name}: it was damaged or changed: its digest differs")

    def _read(self, offset: int, num_bytes: int) -> bytes:
        if offset < 0:
            raise StoreError("it is too short for a .memcube")
        self._stream.seek(offset)
        parts = []
        while num_bytes:
            part = self._stream.read(num_bytes)
            if not part:
                raise StoreError("it ends too early: it was cut off")
            parts.append(part)
            num_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def record(value: Mapping[str, Any], what: str) -> bytes:
    """A line of records, with its end. Raises ArgumentError: no JSON, or too long."""
    line = canonical(dict(value), what).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ArgumentError(f"{what}: at most {MAX_LINE_BYTES} bytes wanted, got {len(line)}")
    return line


def parse_record(line: bytes, what: str) -> dict[str, Any]:
    """A JSON object in its one spelling.

    Raises StoreError, which names ``what``: no JSON, another spelling of it, or no object.
    """

    try:
        found = _DECODER.decode(line.decode())
        if line.count(b"[") + line.count(b"{") > _LEVELS:
            canonical(found)  # more levels than are allowed, perhaps
        same = encode(found).encode() == line
    except (ValueError, RecursionError, ArgumentError) as error:
        raise StoreError(f"{what}: JSON wanted ({error})") from None
    if not same:
        raise StoreError(f"{what}: JSON with sorted keys, each once, and without spaces wanted")
    if not isinstance(found, dict):
        raise StoreError(f"{what}: a JSON object wanted, got {type(found).__name__}")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


_LEVELS = 100  # of JSON, see identity.canonical
_DECODER = json.JSONDecoder(parse_constant=_refuse)  # made once: that is half of the time
# Of what was parsed, or is stored: as identity.canonical, without its checks.
encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def write_all(member: MemberWriter, pieces: Iterable[Any]) -> None:
    """Append pieces one after the other."""
    for piece in pieces:
        member.write(piece)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= _MAX_NAME and bool(_NAME.fullmatch(name))


def _parse_manifest(manifest: dict[str, Any]) -> tuple[dict[str, Member], dict[str, Any]]:
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise StoreError(
            f"{_MANIFEST}: format {FORMAT!r}, version {VERSION} wanted, got "
            f"{str(manifest.get('format'))[:40]!r}, version {str(manifest.get('version'))[:40]}"
        )
    members, info = manifest.get("members"), manifest.get("info")
    if len(manifest) != 4 or not isinstance(members, list) or not isinstance(info, dict):
        raise StoreError(f"{_MANIFEST}: format, info, members and version wanted")
    if len(members) > MAX_MEMBERS:
        raise StoreError(f"{_MANIFEST}: at most {MAX_MEMBERS:,} members wanted")
    found: dict[str, Member] = {}
    for one in members:
        if not isinstance(one, dict) or set(one) != {"bytes", "digest", "name", "type"}:
            raise StoreError(f"{_MANIFEST}: members with bytes, digest, name and type wanted")
        name, size, digest = one["name"], one["bytes"], one["digest"]
        if not _is_name(name) or name in _OWN or name in found:
            raise StoreError(f"{_MANIFEST}: each member by a name of its own wanted")
        if type(size) is not int or size < 0 or one["type"] not in TYPES:
            raise StoreError(f"{_MANIFEST}: member {name}: a size and a type wanted")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise StoreError(f"{_MANIFEST}: member {name}: a BLAKE3 digest wanted")
        found[name] = Member(name, one["type"], size, digest)
    return found, info
