"""A reader written from docs/format/kv-frame.md alone reads what the store wrote."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from memos.kernels import pack_kv
from memos.kernels.codec import Codec
from memos.kv import KVIdentity, KVStore, Session

from .store_help import SMALL, P, entries_for, keys_of

KEY = bytes(range(32))

# The reader. Nothing of memos below this line, up to the tests.


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    extracted = hmac.new(salt or bytes(32), key, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def aes_gcm(key: bytes, nonce: bytes, data: bytes, associated: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).decrypt(nonce, data, associated)


class Reader:
    """Sections 1 to 4 and 8 of the document."""

    def __init__(self, folder: Path, tenant: str, encryption_key: bytes | None) -> None:
        form = json.loads((folder / "FORMAT").read_text())
        assert (form["format"], form["version"]) == ("memos-kv", 1)
        assert form["encrypted"] == (encryption_key is not None)
        name_key = b"memos.kv"
        if encryption_key is not None:
            check = hkdf(encryption_key, b"", b"memos.kv key check v1")
            assert form["key_check"] == check.hex()
            name_key = hkdf(encryption_key, b"", b"memos.kv tenant names v1")
        self.id = hmac.new(name_key, tenant.encode(), hashlib.sha256).digest()[:16]
        self.folder = folder / "tenants" / self.id.hex()
        data = (self.folder / "key").read_bytes()
        self.root = data[:32]
        if encryption_key is not None:
            self.root = hkdf(encryption_key, self.root, b"memos.kv tenant root v1")
        self.encrypted = encryption_key is not None
        assert len(data) == 64
        assert self.key("key check") == data[32:]

    def key(self, what: str) -> bytes:
        return bytes(blake3(self.root, derive_key_context=f"memos.kv v1 {what}").digest())

    def mac(self, what: str, data: bytes) -> bytes:
        return bytes(blake3(data, key=self.key(what)).digest())

    def frames(self) -> dict[bytes, tuple[dict[str, Any], bytes]]:
        found = {}
        for path in sorted(self.folder.glob("segments/*.kvs"), key=lambda p: int(p.stem)):
            data, at = path.read_bytes(), 0
            while at < len(data):
                header = self.header(data[at : at + 512])
                if header is None or at + header["frame_bytes"] > len(data):
                    at += 4096
                    continue
                payload = self.payload(header, data[at : at + header["frame_bytes"]])
                if payload is not None:
                    found[header["key"]] = (header, payload)
                at += header["frame_bytes"]
        return found

    def header(self, data: bytes) -> dict[str, Any] | None:
        if len(data) < 512 or data[:8] != b"MEMOSKVF":
            return None
        if struct.unpack_from("<HH", data, 8) != (1, 512):
            return None
        if self.mac("header mac", data[:480]) != data[480:512]:
            return None
        names = ["flags", "frame_bytes", "payload_bytes", "index", "tokens"]
        names += ["L", "H", "Dk", "Dv", "P", "S"]
        header: dict[str, Any] = dict(
            zip(names, struct.unpack_from("<IQQ8I", data, 12), strict=True)
        )
        header["dtype"], *codec = struct.unpack_from("<7B", data, 64)
        header["k_codec"], header["v_codec"] = tuple(codec[:3]), tuple(codec[3:])
        header["created"], header["expires"] = struct.unpack_from("<QQ", data, 72)
        for name, at, size in (
            ("key", 96, 32),
            ("parent", 128, 32),
            ("identity", 160, 32),
            ("tenant", 192, 16),
            ("nonce", 208, 12),
            ("token_digest", 224, 32),
            ("payload_mac", 256, 32),
        ):
            header[name] = data[at : at + size]
        assert data[71] == 0
        assert data[88:96] == bytes(8)
        assert data[220:224] == bytes(4)
        assert data[288:480] == bytes(192)
        encrypted = bool(header["flags"] & 2)
        stored = header["payload_bytes"] + 16 * encrypted
        assert header["frame_bytes"] == math.ceil((512 + stored) / 4096) * 4096
        return header if header["tenant"] == self.id and encrypted == self.encrypted else None

    def payload(self, header: dict[str, Any], frame: bytes) -> bytes | None:
        if self.encrypted:
            data = frame[512 : 512 + header["payload_bytes"] + 16]
            assert header["payload_mac"] == bytes(32)
            assert not any(frame[512 + len(data) :])
            return aes_gcm(self.key("aes-256-gcm"), header["nonce"], data, frame[:480])
        data = frame[512 : 512 + header["payload_bytes"]]
        assert header["nonce"] == bytes(12)
        assert not any(frame[512 + len(data) :])
        return data if self.mac("payload mac", data) == header["payload_mac"] else None

    def block_keys(self, tokens: list[int], P: int, identity: bytes) -> list[bytes]:
        keys, parent = [], bytes(32)
        for i in range(0, len(tokens), P):
            part = tokens[i : i + P]
            secret = self.key("block keys" if len(part) == P else "tail keys")
            message = parent + identity + struct.pack(f"<{len(part)}q", *part)
            parent = hmac.new(secret, message, hashlib.sha256).digest()
            keys.append(parent)
        return keys

    def sessions(self) -> list[tuple[dict[str, Any], list[int], list[bytes]]]:
        found = []
        db = sqlite3.connect(self.folder / "sessions.db")
        for id, meta, body, updated_at in db.execute(
            "SELECT id, meta, body, updated_at FROM sessions"
        ):
            data = self.unseal(meta, b"meta" + id)
            fields = json.loads(data)
            name = b"id" + fields["id"].encode()
            assert id == blake3(name, key=self.key("session mac")).digest(16)
            data = self.unseal(body, b"body" + id + struct.pack("<d", updated_at))
            (count,) = struct.unpack_from("<Q", data)
            tokens = list(struct.unpack_from(f"<{count}q", data, 8))
            rest = data[8 + 8 * count :]
            keys = [rest[i : i + 32] for i in range(0, len(rest), 32)]
            found.append((fields, tokens, keys))
        db.close()
        return found

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        if self.encrypted:
            return aes_gcm(self.key("aes-256-gcm"), sealed[:12], sealed[12:], context)
        mac, data = sealed[:32], sealed[32:]
        assert mac == self.mac("session mac", struct.pack("<Q", len(context)) + context + data)
        return data


def identity_digest(fields: dict[str, Any]) -> bytes:
    """Section 6."""
    text = json.dumps({**fields, "format": 1}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).digest()


ITEM = {0: ("<f4", 4), 1: ("<f2", 2), 2: ("<u2", 2)}
BITS = {1: 8, 2: 4, 3: 2, 4: 8}


def as_float(data: bytes, dtype: int) -> np.ndarray:
    """Numbers of the model's dtype; bfloat16 is the upper half of a float32."""
    values = np.frombuffer(data, ITEM[dtype][0])
    if dtype == 2:
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32)


def e4m3fn(codes: np.ndarray) -> np.ndarray:
    codes = codes.astype(np.int64)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    return np.where(codes & 128, -value, value).astype(np.float32)


def sylvester(n: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(n)).astype(np.float32)


def padded(n: int) -> int:
    return (n + 15) // 16 * 16


def unpack_section(
    data: bytes, codec: tuple[int, ...], H: int, P: int, D: int, dtype: int, is_key: bool
) -> tuple[np.ndarray, int]:
    """Section 5: numbers [H, P, D] before the last rounding, and the bytes they took."""
    kind, group, rotated = codec
    if kind == 0:
        size = H * P * D * ITEM[dtype][1]
        return as_float(data[:size], dtype).reshape(H, P, D), padded(size)
    bits = BITS[kind]
    row = D * bits // 8
    rows = np.frombuffer(data[: H * P * row], np.uint8).reshape(H, P, row)
    codes = np.zeros((H, P, D), np.uint8)
    n = 8 // bits
    for j in range(row):
        for k in range(n):
            codes[:, :, j * n + k] = rows[:, :, j] >> (bits * k) & (2**bits - 1)
    start = padded(H * P * row)
    shape = (H, -(-P // group), D) if is_key else (H, P, -(-D // group))
    count = math.prod(shape)
    sizes = 2 * count * (1 if kind == 4 else 2)
    params = np.frombuffer(data[start : start + sizes], "<f2").astype(np.float32)
    p, d = np.arange(P)[:, None], np.arange(D)[None, :]
    index = (p // group, d + 0 * p) if is_key else (p + 0 * d, d // group)
    scale = params[:count].reshape(shape)[:, index[0], index[1]]
    if kind == 4:
        y = e4m3fn(codes) * scale
    else:
        y = params[count:].reshape(shape)[:, index[0], index[1]] + codes * scale
    if rotated:
        size = D & -D
        y = (y.reshape(H, P, D // size, size) @ sylvester(size)).reshape(H, P, D)
    return y, start + padded(sizes)


def unpack(header: dict[str, Any], payload: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """K and V of every layer, sinks in place."""
    H, P, dtype = header["H"], header["P"], header["dtype"]
    at, layers = 0, []
    for _ in range(header["L"]):
        parts = []
        for codec, D, is_key in (
            (header["k_codec"], header["Dk"], True),
            (header["v_codec"], header["Dv"], False),
        ):
            x, size = unpack_section(payload[at:], codec, H, P, D, dtype, is_key)
            parts.append(x.copy())
            at += size
        layers.append((parts[0], parts[1]))
    exact = header["k_codec"][0] == header["v_codec"][0] == 0
    if header["index"] == 0 and not exact:
        for layer in layers:
            for x in layer:
                S, D = header["S"], x.shape[2]
                size = H * S * D * ITEM[dtype][1]
                x[:, :S] = as_float(payload[at : at + size], dtype).reshape(H, S, D)
                at += size
    assert at == len(payload)
    return layers


# The tests.


@pytest.mark.parametrize("encryption_key", [None, KEY], ids=["plain", "encrypted"])
def test_another_reader_reads_a_store(tmp_path: Path, encryption_key: bytes | None) -> None:
    tokens = list(range(5 * P + 2))
    with KVStore(tmp_path / "s", encryption_key=encryption_key, clock=lambda: 1e6) as store:
        tenant = store.tenant("ada")
        entries = entries_for(tenant, tokens)
        tenant.put(entries[:3], SMALL)
        tenant.put(entries[3:], SMALL, ttl_s=60)
        tenant.delete([entries[2].key])
        other = store.tenant("bob")
        other.put(entries_for(other, tokens), SMALL)
        tenant.save_session(Session("s", tokens, SMALL.digest, keys_of(entries), {"a": [1]}))
    reader = Reader(tmp_path / "s", "ada", encryption_key)
    fields = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    assert identity_digest(fields) == SMALL.digest
    assert reader.block_keys(tokens, P, SMALL.digest) == keys_of(entries)
    frames = reader.frames()
    assert set(frames) == set(keys_of(entries)) - {entries[2].key}
    for entry in entries[:2] + entries[3:]:
        header, payload = frames[entry.key]
        assert payload == entry.payload
        assert header["parent"] == entry.parent
        assert header["index"] == entry.index
        assert header["tokens"] == len(entry.token_ids)
        assert header["flags"] == entry.tail + 2 * (encryption_key is not None)
        assert header["identity"] == SMALL.digest
        tokens_data = struct.pack(f"<{header['tokens']}q", *entry.token_ids)
        assert header["token_digest"] == reader.mac("token digest", tokens_data)
        assert header["created"] == 10**9
        assert header["expires"] == (0 if entry.index < 3 else 10**9 + 60_000)
        shape = [header[name] for name in ["L", "H", "Dk", "Dv", "P", "S", "dtype"]]
        assert shape == [1, 1, 8, 8, P, 1, 2]
        assert header["k_codec"] == header["v_codec"] == (1, 32, 0)
    ((meta, session_tokens, keys),) = reader.sessions()
    assert (meta["id"], meta["metadata"], meta["pinned"]) == ("s", {"a": [1]}, False)
    assert (session_tokens, keys) == (tokens, keys_of(entries))


CODECS = ["raw", "int8-g32", "int4-g64", "int4-g32-rot", "int2-g32-rot", "fp8-g64-rot"]


@pytest.mark.parametrize("codec", [*CODECS, "k:int8-g64,v:int4-g32", "k:raw,v:int2-g32"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_reader_unpacks_payloads(tmp_path: Path, codec: str, dtype: str) -> None:
    L, H, P, S, Dk, Dv = 2, 2, 40, 3, 48, 32
    identity = KVIdentity("m", L, H, Dk, Dv, dtype, codec, block_tokens=P, sink_tokens=S)
    torch.manual_seed(7)
    scheme, kind = Codec.parse(codec), getattr(torch, dtype)
    keys = [torch.randn(2, P, H, Dk).to(kind) for _ in range(L)]
    values = [torch.randn(2, P, H, Dv).to(kind) for _ in range(L)]
    packed = pack_kv(keys, values, torch.arange(2), scheme)
    sinks = b""
    if not scheme.lossless:
        for key, value in zip(keys, values, strict=True):
            for x in (key, value):
                exact = x[0, :S].transpose(0, 1).contiguous()
                sinks += exact.view(torch.uint8).numpy().tobytes()
    payloads = [packed[0].numpy().tobytes() + sinks, packed[1].numpy().tobytes()]
    with KVStore(tmp_path / "s", durable=False) as store:
        tenant = store.tenant("t")
        entries = [
            type(entry)(entry.key, entry.parent, entry.token_ids, entry.index, payload)
            for entry, payload in zip(
                entries_for(tenant, range(2 * P), identity), payloads, strict=True
            )
        ]
        assert tenant.put(entries, identity) == 2
    frames = Reader(tmp_path / "s", "t", None).frames()
    bits = {"raw": 30, "int8": 8, "fp8": 4, "int4": 4, "int2": 2}
    for m, entry in enumerate(entries):
        layers = unpack(*frames[entry.key])
        for layer, (key, value) in enumerate(layers):
            for got, source, part in (
                (key, keys[layer][m], scheme.key),
                (value, values[layer][m], scheme.value),
            ):
                want = source.transpose(0, 1).float().numpy()
                if part.kind == "raw":
                    assert np.array_equal(got, want)
                if m == 0:
                    assert np.array_equal(got[:, :S], want[:, :S]), "sinks are exact"
                worst = np.abs(got - want).max() / np.abs(want).max()
                assert worst <= 2.5 * 2.0 ** -bits[part.kind]


@pytest.mark.parametrize("codec", CODECS)
def test_the_reader_agrees_with_unpack_kv(codec: str) -> None:
    """The same arithmetic, not only about the same numbers."""
    from memos.kernels import unpack_kv

    H, P, Dk, Dv = 3, 24, 64, 40
    scheme = Codec.parse(codec)
    torch.manual_seed(8)
    keys, values = [torch.randn(1, P, H, Dk)], [torch.randn(1, P, H, Dv)]
    packed = pack_kv(keys, values, torch.arange(1), scheme)
    unpack_kv(keys, values, torch.arange(1), packed, scheme)
    kinds = {"raw": 0, "int8": 1, "int4": 2, "int2": 3, "fp8": 4}
    part = (kinds[scheme.key.kind], scheme.key.group, int(scheme.key.rotate))
    header = {"H": H, "P": P, "L": 1, "Dk": Dk, "Dv": Dv, "dtype": 0, "index": 1, "S": 0}
    header |= {"k_codec": part, "v_codec": part}
    ((key, value),) = unpack(header, packed[0].numpy().tobytes())
    for got, want in ((key, keys[0][0]), (value, values[0][0])):
        np.testing.assert_allclose(got, want.transpose(0, 1).numpy(), rtol=0, atol=2e-6)
