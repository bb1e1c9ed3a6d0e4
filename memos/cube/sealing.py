"""AES-256-GCM as the whole package uses it, and rows of numbers, texts and bytes as one piece.

A sealed piece is a fresh nonce, the ciphertext and its tag. It opens only under the same key and
beside the same name: a name says which place the piece belongs to, so that one that was moved
does not open.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Sequence
from typing import Any

from memos.errors import ArgumentError, BackendError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD = NONCE_BYTES + TAG_BYTES  # bytes that a sealed piece is longer


def cipher(key: bytes, what: str = "key") -> Any:
    """What seals and opens under a key of 32 bytes.

    Raises:
        ArgumentError: it is no such key; the message names ``what`` and never the key.
        BackendError: the package cryptography is missing.

    Cost: 1.3 us.
    """
    check_key(key, what)
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise BackendError(
            f"{what}: the package 'cryptography' is not installed; "
            "pip install 'memos-native[crypto]'"
        ) from error
    return AESGCM(key)


def check_key(key: Any, what: str = "key") -> None:
    """Raise ArgumentError unless it is 32 bytes."""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        got = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise ArgumentError(f"{what}: {KEY_BYTES} bytes wanted, got {got}")


def seal(cipher: Any, data: bytes, name: bytes) -> bytes:
    """The sealed piece. Cost: 1.2 us and 1 ns a byte."""
    nonce = os.urandom(NONCE_BYTES)
    sealed: bytes = nonce + cipher.encrypt(nonce, data, name)
    return sealed


def unseal(cipher: Any, sealed: Any, name: bytes) -> bytes | None:
    """What was sealed; None where a bit, the key or the name is another one."""
    from cryptography.exceptions import InvalidTag

    if not isinstance(sealed, bytes) or len(sealed) < OVERHEAD:
        return None
    try:
        data: bytes = cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name)
    except InvalidTag:
        return None
    return data


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes from a key, for one purpose.

    Source: RFC 5869 with SHA-256, one round.
    """
    return hmac.digest(hmac.digest(salt, key, "sha256"), info + b"\x01", "sha256")


def pack(values: Sequence[Any]) -> bytes:
    """Values of a row - None, int, float, str, bytes - as one piece."""
    blobs = [value for value in values if isinstance(value, bytes)]
    if blobs:
        values = [[len(value)] if isinstance(value, bytes) else value for value in values]
    text = _encode(list(values)).encode("utf-8", "surrogatepass")
    return b"".join((len(text).to_bytes(4, "little"), text, *blobs))


def unpack(data: bytes) -> list[Any]:
    """What ``pack`` packed. Raises ValueError for anything else."""
    at = 4 + int.from_bytes(data[:4], "little")
    values = json.loads(data[4:at].decode("utf-8", "surrogatepass"))
    if not isinstance(values, list):
        raise ValueError("no row")
    if at < len(data) or [0] in values:
        for i, value in enumerate(values):
            if type(value) is list:
                values[i], at = data[at : at + value[0]], at + value[0]
    if at != len(data):
        raise ValueError("a row of another length")
    return values


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
