"""The seal of a .memcube: the digest of its manifest, and who signed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blake3 import blake3

from memos.errors import ArgumentError, BackendError, StoreError

_CONTEXT = b"memcube v1 signature\0"
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64


def make_seal(manifest: bytes, sign: Any = None) -> dict[str, Any]:
    """What seal.json says of a manifest.

    Args:
        sign: an Ed25519 private key: 32 bytes, or cryptography's object; None: nobody signs.

    Raises:
        ArgumentError: it is neither.
        BackendError: the package cryptography is missing.
    """
    digest = blake3(manifest).digest()
    seal: dict[str, Any] = {"digest": digest.hex(), "signature": None}
    if sign is not None:
        key = private_key(sign)
        seal["signature"] = {
            "algorithm": "Ed25519",
            "key": _raw(key.public_key()).hex(),
            "value": key.sign(_CONTEXT + digest).hex(),
        }
    return seal


def check_seal(seal: Any, manifest: bytes, trusted: Sequence[Any] | None) -> tuple[str, str | None]:
    """(digest of the manifest, public key of who signed it or None), both in hex.

    Args:
        seal:    what seal.json says.
        trusted: Ed25519 public keys (32 bytes, hex, or cryptography's objects), one of which has
            to have signed; None: anybody or nobody.

    Raises:
        StoreError: the digest or the signature is wrong, or nobody who is trusted signed.
        ArgumentError: a trusted key is none.
        BackendError: it is signed and the package cryptography is missing.
    """
    wanted = None if trusted is None else {public_key(key).hex() for key in trusted}
    digest = blake3(manifest).digest()
    if not isinstance(seal, dict) or set(seal) != {"digest", "signature"}:
        raise StoreError("seal.json: digest and signature wanted")
    if seal["digest"] != digest.hex():
        raise StoreError("its manifest was damaged or changed: its digest differs")
    signature = seal["signature"]
    signer = None if signature is None else _signer(signature, digest)
    if wanted is not None and signer not in wanted:
        got = "nobody's" if signer is None else f"that of {signer}"
        raise StoreError(f"the signature of a trusted key wanted, got {got}")
    return digest.hex(), signer


def private_key(key: Any) -> Any:
    """An Ed25519 private key from 32 bytes or from itself."""
    ed = _ed25519()
    if isinstance(key, ed.Ed25519PrivateKey):
        return key
    if isinstance(key, bytes) and len(key) == _KEY_BYTES:
        return ed.Ed25519PrivateKey.from_private_bytes(key)
    raise ArgumentError(
        f"sign: an Ed25519 private key, or its {_KEY_BYTES} bytes, wanted, got "
        f"{type(key).__name__}"  # never the key itself
    )


def public_key(key: Any) -> bytes:
    """The 32 bytes of an Ed25519 public key given as bytes, hex or an object."""
    if isinstance(key, bytes) and len(key) == _KEY_BYTES:
        return key
    if isinstance(key, str):
        found = _unhex(key)
        if found is not None and len(found) == _KEY_BYTES:
            return found
    elif isinstance(key, _ed25519().Ed25519PublicKey):
        return _raw(key)
    raise ArgumentError(
        f"trusted: Ed25519 public keys, their {_KEY_BYTES} bytes or hex wanted, got {key!r}"
    )


def _signer(signature: Any, digest: bytes) -> str:
    fields = {"algorithm", "key", "value"}
    if not isinstance(signature, dict) or set(signature) != fields:
        raise StoreError("seal.json: a signature with algorithm, key and value wanted")
    key, value = _unhex(signature["key"]), _unhex(signature["value"])
    if (
        signature["algorithm"] != "Ed25519"
        or key is None
        or value is None
        or (len(key), len(value)) != (_KEY_BYTES, _SIGNATURE_BYTES)
    ):
        raise StoreError("seal.json: an Ed25519 signature wanted")
    ed = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        ed.Ed25519PublicKey.from_public_bytes(key).verify(value, _CONTEXT + digest)
    except (InvalidSignature, ValueError):
        raise StoreError("its signature is wrong") from None
    return key.hex()


def _unhex(text: Any) -> bytes | None:
    """The bytes that lower-case hex digits stand for."""
    try:
        found = bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
    return found if found.hex() == text else None


def _raw(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise BackendError(
            "a signature wants the package 'cryptography', which is not installed; "
            "pip install 'memos-native[crypto]'"
        ) from error
    return ed25519
