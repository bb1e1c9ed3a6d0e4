"""One frame: a header, a payload and zero padding. The bytes are docs/format/kv-frame.md.

Nothing here touches a file. ``seal`` makes a frame; ``parse`` and ``open_payload`` take one apart
and return what is wrong with it as one of ``REASONS``; neither raises for bad data.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from memos.kernels.codec import KINDS, Codec
from memos.kv._crypto import NONCE_BYTES, TAG_BYTES, Buffer, TenantKeys
from memos.kv.identity import KVIdentity

MAGIC = b"MEMOSKVF"
VERSION = 1
ALIGN = 4096
HEADER_BYTES = 512
MAC_AT = 480
TAIL = 1  # flags
ENCRYPTED = 2
ZERO_KEY = bytes(32)
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}

REASONS = {
    "absent": "no block of this key is known",
    "expired": "its time to live is over",
    "identity": "the block belongs to another model, layout or codec",
    "tenant": "the block belongs to another tenant",
    "key": "the frame belongs to another key",
    "tokens": "the block holds other tokens",
    "header": "the header is damaged, forged or of an unknown version",
    "size": "the sizes in the header do not fit each other or the identity",
    "truncated": "the file ends inside the frame",
    "payload": "the payload is damaged or forged",
    "gone": "the frame was removed from disk",
    "io": "the operating system could not read it",
}

# magic, version, header bytes, flags | frame bytes, payload bytes | index, tokens, layers, heads,
# Dk, Dv, P, S | dtype, K kind, group, rotated, V kind, group, rotated, 0 | created, expires | 8
# reserved | key, parent, identity | tenant | nonce, 4 reserved | token digest | payload MAC
_FIELDS = struct.Struct("<8sHHI QQ 8I 8B QQ 8x 32s32s32s 16s 12s4x 32s 32s")
assert _FIELDS.size == 288


class Header(NamedTuple):
    """The fields of a header that ``parse`` found authentic, in the order of the file."""

    magic: bytes
    version: int
    header_bytes: int
    flags: int
    frame_bytes: int
    payload_bytes: int
    block_index: int
    tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    block_tokens: int
    sink_tokens: int
    dtype: int
    key_kind: int
    key_group: int
    key_rotated: int
    value_kind: int
    value_group: int
    value_rotated: int
    reserved: int
    created_ms: int
    expires_ms: int
    key: bytes
    parent: bytes
    identity: bytes
    tenant: bytes
    nonce: bytes
    token_digest: bytes
    payload_mac: bytes

    @property
    def tail(self) -> bool:
        return bool(self.flags & TAIL)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the payload in the file: with its tag, where it is encrypted."""
        return self.payload_bytes + (TAG_BYTES if self.flags & ENCRYPTED else 0)


@dataclass(slots=True)
class Block:
    """What is known of a block besides its bytes. Treated as immutable."""

    tenant: bytes
    key: bytes
    parent: bytes
    identity: bytes
    token_digest: bytes
    payload_bytes: int
    index: int
    tokens: int
    tail: bool
    created_ms: int
    expires_ms: int  # 0: never

    def has_expired(self, now_ms: int) -> bool:
        return 0 < self.expires_ms <= now_ms


def block_of(header: Header) -> Block:
    """The block that an authentic header describes."""
    return Block(
        header.tenant,
        header.key,
        header.parent,
        header.identity,
        header.token_digest,
        header.payload_bytes,
        header.block_index,
        header.tokens,
        header.tail,
        header.created_ms,
        header.expires_ms,
    )


def frame_bytes(payload_bytes: int, encrypted: bool) -> int:
    """Bytes on disk of a frame with this payload."""
    size = HEADER_BYTES + payload_bytes + (TAG_BYTES if encrypted else 0)
    return -(-size // ALIGN) * ALIGN


def seal(block: Block, payload: bytes, identity: KVIdentity, keys: TenantKeys) -> list[bytes]:
    """The frame as pieces to write one after another: header, payload, padding."""
    codec = Codec.parse(identity.codec)
    encrypted = keys.encrypted
    size = frame_bytes(len(payload), encrypted)
    nonce = os.urandom(NONCE_BYTES) if encrypted else bytes(NONCE_BYTES)
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        (TAIL if block.tail else 0) | (ENCRYPTED if encrypted else 0),
        size,
        len(payload),
        block.index,
        block.tokens,
        identity.num_layers,
        identity.num_kv_heads,
        identity.head_dim_k,
        identity.head_dim_v,
        identity.block_tokens,
        identity.sink_tokens,
        DTYPE_CODES[identity.dtype],
        KINDS[codec.key.kind],
        codec.key.group,
        codec.key.rotate,
        KINDS[codec.value.kind],
        codec.value.group,
        codec.value.rotate,
        0,
        block.created_ms,
        block.expires_ms,
        block.key,
        block.parent,
        block.identity,
        block.tenant,
        nonce,
        block.token_digest,
        bytes(32) if encrypted else keys.payload_mac(payload),
    )
    head = fields + bytes(MAC_AT - len(fields))
    body = keys.encrypt(nonce, payload, head) if encrypted else payload
    padding = bytes(size - HEADER_BYTES - len(body))
    return [head + keys.header_mac(head), body, padding]


def parse(data: Buffer, keys: TenantKeys) -> Header | str:
    """The header in the first 512 bytes of ``data``, or the reason why there is none."""
    if len(data) < HEADER_BYTES:
        return "truncated"
    head = bytes(data[:HEADER_BYTES])
    if head[:8] != MAGIC:
        return "gone" if head == bytes(HEADER_BYTES) else "header"
    if not hmac.compare_digest(keys.header_mac(head[:MAC_AT]), head[MAC_AT:]):
        return "header"
    header = Header._make(_FIELDS.unpack_from(head))
    if header.version != VERSION or header.header_bytes != HEADER_BYTES:
        return "header"
    if bool(header.flags & ENCRYPTED) != keys.encrypted:
        return "header"
    if header.tenant != keys.tenant_id:
        return "tenant"
    if header.frame_bytes != frame_bytes(header.payload_bytes, keys.encrypted):
        return "size"
    return header


def open_payload(
    header: Header, data: Buffer, keys: TenantKeys, into: memoryview | None = None
) -> memoryview | str:
    """The verified payload of a frame, or the reason why there is none. Read-only.

    ``data`` is the frame from its first byte on. Without encryption the result is a view of it;
    with it, the plaintext is written to the beginning of ``into`` where that is given.
    """
    stop = HEADER_BYTES + header.stored_bytes
    if len(data) < stop:
        return "truncated"
    body = memoryview(data)[HEADER_BYTES:stop]
    if keys.encrypted:
        out = None if into is None else into[: header.payload_bytes]
        plain = keys.decrypt(header.nonce, body, memoryview(data)[:MAC_AT], out)
        return "payload" if plain is None else memoryview(plain).toreadonly()
    if not hmac.compare_digest(keys.payload_mac(body), header.payload_mac):
        return "payload"
    return body.toreadonly()
