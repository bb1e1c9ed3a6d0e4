"""Content addresses of KV blocks."""

from __future__ import annotations

import hmac
from array import array
from collections.abc import Sequence

from memos.errors import ArgumentError
from memos.kernels._op import op

KEY_BYTES = 32


def _check_hash(
    token_ids: Sequence[int], P: int, secret: bytes, parent: bytes, identity: bytes
) -> None:
    if P < 1:
        raise ArgumentError(f"P: at least 1 token per block wanted, got {P}")
    for name, value in (("secret", secret), ("parent", parent), ("identity", identity)):
        if len(value) != KEY_BYTES:
            raise ArgumentError(f"{name}: {KEY_BYTES} bytes wanted, got {len(value)}")


@op(check=_check_hash)
def hash_blocks(
    token_ids: Sequence[int], P: int, secret: bytes, parent: bytes, identity: bytes
) -> list[bytes]:
    """Chained keys of full blocks: ``key[m] = HMAC-SHA256(secret, parent | identity | tokens)``.

    ``parent`` is the key before (for block 0 the argument), so equal keys mean equal tokens from
    the very first one on, under one secret and one identity. Tokens are hashed as little-endian
    int64. The last ``len(token_ids) % P`` tokens get no key.

    Args:
        token_ids: T token ids, each in [0, 2^63).
        P:         tokens in a block.
        secret:    [32 bytes] the tenant's key: without it no key can be guessed or checked.
        parent:    [32 bytes] key of the block before; 32 zero bytes at the start.
        identity:  [32 bytes] digest of everything else that makes the numbers valid.

    Returns:
        T // P keys of 32 bytes.

    Raises:
        ArgumentError: a length is out of contract, or an id is negative or no integer.

    Cost: one HMAC over 64 + 8 * P bytes per block, about 2 us at P = 64.
    Source: RFC 2104, FIPS 180-4.
    """
    try:
        tokens = array("q", token_ids)
    except (TypeError, OverflowError) as error:
        raise ArgumentError(f"token_ids: integers in [0, 2^63) wanted: {error}") from None
    if tokens and min(tokens) < 0:
        raise ArgumentError(f"token_ids: integers in [0, 2^63) wanted, got {min(tokens)}")
    if array("H", [1]).tobytes() != b"\x01\x00":
        tokens.byteswap()
    data = memoryview(tokens).cast("B")
    keys = []
    for start in range(0, len(tokens) // P * P, P):
        block = data[8 * start : 8 * (start + P)]
        parent = hmac.digest(secret, b"".join((parent, identity, block)), "sha256")
        keys.append(parent)
    return keys


# The body above runs in OpenSSL, with the processor's SHA instructions: it is the CPU backend too.
hash_blocks.backend("cpu")(hash_blocks.reference)
