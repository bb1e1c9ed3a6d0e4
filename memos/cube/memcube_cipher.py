"""Encrypted streams: a header, then chunks that are each sealed with AES-256-GCM.

A chunk is bound to its place and to whether it is the last one, so chunks that are changed,
swapped, left out or cut off are found before a byte of them is given out, and any part can be read
without the rest.

Source: the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizar, "Online Authenticated-
Encryption and its Nonce-Reuse Misuse-Resistance" (2015), with a key of its own for every stream.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import struct
import unicodedata
from typing import Any, BinaryIO

from memos.errors import ArgumentError, BackendError, StoreError

MAGIC = b"MEMCUBEX"
KEY_BYTES = 32
CHUNK_BYTES = 1 << 18
_TAG_BYTES = 16
_HEADER = struct.Struct("<8sHB5x32s16s")  # magic, version, kind of key, salt, check
_VERSION = 1
_RAW, _SCRYPT = 0, 1
_COST = {"n": 1 << 16, "r": 8, "p": 2}  # 64 MiB, about 0.3 s


class SealingWriter(io.RawIOBase):
    """Encrypts what is written to it and passes it on; ``finish`` writes the last chunk.

    Args:
        stream: where to; written from its position on, never read.
        secret: a passphrase, or a key of 32 bytes.

    Raises:
        ArgumentError: the secret is neither.
        BackendError: the package cryptography is missing.
    """

    def __init__(self, stream: BinaryIO, secret: str | bytes) -> None:
        self._stream = stream
        salt = os.urandom(32)
        kind = _kind_of(secret)
        key, check = _derive(kind, secret, salt)
        self._header = _HEADER.pack(MAGIC, _VERSION, kind, salt, check)
        self._cipher = _aes(key)
        self._buffer = bytearray()
        self._count = 0
        stream.write(self._header)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._buffer += view
        # A whole chunk waits until more comes: it may be the last one.
        if len(self._buffer) > CHUNK_BYTES:
            whole = (len(self._buffer) - 1) // CHUNK_BYTES * CHUNK_BYTES
            with memoryview(self._buffer) as waiting:
                for at in range(0, whole, CHUNK_BYTES):
                    self._seal(waiting[at : at + CHUNK_BYTES], last=False)
            del self._buffer[:whole]
        return len(view)

    def finish(self) -> None:
        """Write what is left. Without this the stream is one that was cut off."""
        self._seal(self._buffer, last=True)

    def _seal(self, data: Any, *, last: bool) -> None:
        nonce = _nonce(self._count, last)
        self._stream.write(self._cipher.encrypt(nonce, bytes(data), self._header))
        self._count += 1


class OpeningReader(io.RawIOBase):
    """Reads what a ``SealingWriter`` wrote, from any place on. Every byte given out is authentic.

    Args:
        stream: seekable; begins with the header.
        secret: a passphrase, or a key of 32 bytes.

    Raises:
        ArgumentError: no secret, or one that is neither.
        StoreError: the wrong secret, another version, or a damaged header.
        BackendError: the package cryptography is missing.
    """

    def __init__(self, stream: BinaryIO, secret: str | bytes | None) -> None:
        self._stream = stream
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        self._header = stream.read(_HEADER.size)
        if len(self._header) < _HEADER.size:
            raise StoreError("its header is cut off")
        magic, version, kind, salt, check = _HEADER.unpack(self._header)
        if magic != MAGIC or version != _VERSION or kind not in (_RAW, _SCRYPT):
            raise StoreError(f"encrypted as in version {_VERSION} wanted, got something else")
        wanted = "a passphrase" if kind == _SCRYPT else f"a key of {KEY_BYTES} bytes"
        if secret is None:
            raise ArgumentError(f"passphrase: the file is encrypted, {wanted} wanted")
        if _kind_of(secret) != kind:
            raise ArgumentError(f"passphrase: the file was encrypted with {wanted}")
        key, known = _derive(kind, secret, salt)
        if not hmac.compare_digest(check, known) or any(self._header[11:16]):
            raise StoreError(
                f"{'passphrase' if kind == _SCRYPT else 'key'}: the one that the file was "
                "encrypted with wanted; or its header is damaged"
            )
        self._cipher = _aes(key)
        whole = CHUNK_BYTES + _TAG_BYTES
        body = size - _HEADER.size
        self._chunks = -(-body // whole)
        self._size = body - self._chunks * _TAG_BYTES
        if self._size < 0 or body - (self._chunks - 1) * whole < _TAG_BYTES:
            raise StoreError("it was cut off")
        self._at = 0
        self._kept: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Raises StoreError where a chunk is not what was written."""
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        parts = []
        while size:
            number, start = divmod(self._at, CHUNK_BYTES)
            part = self._chunk(number)[start : start + size]
            parts.append(part)
            self._at += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, number: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        if self._kept[0] != number:
            self._stream.seek(_HEADER.size + number * (CHUNK_BYTES + _TAG_BYTES))
            data = self._stream.read(CHUNK_BYTES + _TAG_BYTES)
            nonce = _nonce(number, number == self._chunks - 1)
            try:
                self._kept = number, self._cipher.decrypt(nonce, data, self._header)
            except (InvalidTag, ValueError):
                raise StoreError("it is damaged, changed or cut off: its seal is broken") from None
        return self._kept[1]


def is_sealed(stream: BinaryIO) -> bool:
    """Whether an encrypted stream begins here; its position stays."""
    at = stream.tell()
    found = stream.read(len(MAGIC)) == MAGIC
    stream.seek(at)
    return found


def _kind_of(secret: Any) -> int:
    if isinstance(secret, str) and secret:
        return _SCRYPT
    if isinstance(secret, bytes) and len(secret) == KEY_BYTES:
        return _RAW
    got = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(secret).__name__
    got = "an empty string" if secret == "" else got
    raise ArgumentError(f"passphrase: a text, or a key of {KEY_BYTES} bytes, wanted, got {got}")


def _derive(kind: int, secret: str | bytes, salt: bytes) -> tuple[bytes, bytes]:
    """Key of this stream, and what tells that it is the right one."""
    if isinstance(secret, str):
        try:
            # One passphrase whatever keyboard composed its accents.
            given = unicodedata.normalize("NFC", secret).encode()
        except UnicodeEncodeError:
            raise ArgumentError("passphrase: a text that UTF-8 can hold wanted") from None
        secret = hashlib.scrypt(given, salt=salt, dklen=KEY_BYTES, maxmem=1 << 27, **_COST)
    root = hmac.digest(salt, bytes([kind]) + secret, "sha256")
    return (
        hmac.digest(root, b"memcube v1 aes-256-gcm\x01", "sha256"),
        hmac.digest(root, b"memcube v1 key check\x01", "sha256")[:16],
    )


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _aes(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise BackendError(
            "passphrase: the package 'cryptography' is not installed; "
            "pip install 'memos-native[crypto]'"
        ) from error
    return AESGCM(key)
