"""Keys of one tenant, and the three things done with them: authenticate, digest, encrypt."""

from __future__ import annotations

import hmac
import os
from array import array
from collections.abc import Sequence
from typing import Protocol

from blake3 import blake3

from memos.cube.sealing import KEY_BYTES, NONCE_BYTES, TAG_BYTES, cipher, hkdf
from memos.errors import ArgumentError

__all__ = [
    "KEY_BYTES",
    "NONCE_BYTES",
    "TAG_BYTES",
    "TenantKeys",
    "Wraps",
    "check_encryption_key",
    "hkdf",
    "token_bytes",
]
Buffer = bytes | bytearray | memoryview


class Wraps(Protocol):
    """A master key: it keeps the key of a folder wrapped."""

    @property
    def id(self) -> str:
        """Names the master key; says nothing of it."""

    def wrap(self, key: bytes, name: bytes) -> bytes: ...

    def unwrap(self, wrapped: bytes, name: bytes) -> bytes | None: ...


def check_encryption_key(key: bytes | Wraps | None) -> None:
    """Raise ArgumentError unless None, a master key or 32 bytes, BackendError without AES."""
    if key is None or (hasattr(key, "wrap") and hasattr(key, "unwrap")):
        return
    cipher(key, "encryption_key")


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int64."""
    try:
        tokens = array("q", token_ids)
    except (TypeError, OverflowError) as error:
        raise ArgumentError(f"token_ids: integers in [0, 2^63) wanted: {error}") from None
    if array("H", [1]).tobytes() != b"\x01\x00":
        tokens.byteswap()
    return tokens.tobytes()


class TenantKeys:
    """The keys derived from one tenant's secret. Immutable, safe to share between threads.

    Without an encryption key the root is the secret itself: whoever reads the folder can verify
    and forge frames, whoever does not have it can do neither. With one, the root needs both.
    """

    def __init__(self, tenant_id: bytes, secret: bytes, encryption_key: bytes | None) -> None:
        self.tenant_id = tenant_id
        root = secret
        if encryption_key is not None:
            root = hkdf(encryption_key, secret, b"memos.kv tenant root v1")
        self.block_secret = _derive(root, "memos.kv v1 block keys")
        self.tail_secret = _derive(root, "memos.kv v1 tail keys")
        self.check = _derive(root, "memos.kv v1 key check")
        self._header = _derive(root, "memos.kv v1 header mac")
        self._payload = _derive(root, "memos.kv v1 payload mac")
        self._tokens = _derive(root, "memos.kv v1 token digest")
        self._row = _derive(root, "memos.kv v1 session mac")
        self._cipher = None
        if encryption_key is not None:
            self._cipher = cipher(_derive(root, "memos.kv v1 aes-256-gcm"))

    @property
    def encrypted(self) -> bool:
        return self._cipher is not None

    def header_mac(self, header: Buffer) -> bytes:
        return bytes(blake3(header, key=self._header).digest())

    def payload_mac(self, payload: Buffer) -> bytes:
        return bytes(blake3(payload, key=self._payload).digest())

    def token_digest(self, token_ids: Sequence[int]) -> bytes:
        return bytes(blake3(token_bytes(token_ids), key=self._tokens).digest())

    def encrypt(self, nonce: bytes, data: Buffer, header: Buffer) -> bytes:
        """AES-256-GCM: the ciphertext with its 16-byte tag behind it."""
        assert self._cipher is not None
        return bytes(self._cipher.encrypt(nonce, data, bytes(header)))

    def decrypt(
        self, nonce: bytes, data: Buffer, header: Buffer, into: memoryview | None = None
    ) -> Buffer | None:
        """The plaintext, in ``into`` where that is given; None when the tag does not fit."""
        from cryptography.exceptions import InvalidTag

        assert self._cipher is not None
        try:
            if into is None or not hasattr(self._cipher, "decrypt_into"):
                plain: bytes = self._cipher.decrypt(nonce, data, bytes(header))
                return plain
            self._cipher.decrypt_into(nonce, data, bytes(header), into)
            return into
        except InvalidTag:
            return None

    def row_id(self, name: str) -> bytes:
        """The name of a session as its table knows it."""
        return bytes(blake3(b"id" + name.encode(), key=self._row).digest(16))

    def seal(self, data: bytes, context: bytes) -> bytes:
        """Bytes that ``unseal`` gives back only unchanged and under the same context."""
        if self.encrypted:
            nonce = os.urandom(NONCE_BYTES)
            return nonce + self.encrypt(nonce, data, context)
        return self._mac(data, context) + data

    def unseal(self, sealed: bytes, context: bytes) -> bytes | None:
        """The bytes that were sealed, or None when anything does not fit."""
        if self.encrypted:
            if len(sealed) < NONCE_BYTES + TAG_BYTES:
                return None
            plain = self.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
            return None if plain is None else bytes(plain)
        mac, data = sealed[:KEY_BYTES], sealed[KEY_BYTES:]
        return data if hmac.compare_digest(mac, self._mac(data, context)) else None

    def _mac(self, data: bytes, context: bytes) -> bytes:
        size = len(context).to_bytes(8, "little")
        return bytes(blake3(size + context + data, key=self._row).digest())


def _derive(root: bytes, context: str) -> bytes:
    return bytes(blake3(root, derive_key_context=context).digest())
