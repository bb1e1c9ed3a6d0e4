"""Sessions that are hardly used, encoded again by a smaller codec instead of being given up.

A codec is part of the identity of a block, so the same tokens stand under other keys then. The
new blocks are written beside the old ones, the session's row changes from the ones to the others
in one transaction, and the old ones go: at every moment the row names blocks that are all there.
What is written and not yet named by the row, or named no more and not yet gone, is claimed by the
session, so that it goes with it whenever the process ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from memos.errors import ArgumentError, MemosError, NotFoundError, StoreError
from memos.kv.frame import ZERO_KEY
from memos.kv.identity import KVIdentity
from memos.kv.payload import recoded
from memos.kv.sessions import Session
from memos.kv.tenant import Entry, Tenant

_AT_ONCE = 64 << 20  # bytes of decoded numbers


def check_smaller(identity: KVIdentity, cold: KVIdentity) -> None:
    """Raise ArgumentError unless blocks of ``cold`` are smaller."""
    small, large = cold.block_bytes(), identity.block_bytes()
    if small >= large:
        raise ArgumentError(
            f"cold_codec: one that makes blocks smaller than the {large} bytes of "
            f"{identity.codec!r} wanted, got {cold.codec!r}, which makes {small}"
        )


def compress(
    tenant: Tenant,
    session_id: str,
    identity: KVIdentity,
    cold: KVIdentity,
    cancelled: Callable[[], bool] = lambda: False,
) -> int | None:
    """Encode the blocks of a session by the codec of ``cold``; sinks and tail stay exact.

    Blocks that other sessions use stay beside the new ones. Times, metadata and pin of the
    session and the time to live of each block are kept. It counts as no use of it.

    Args:
        identity:  what the session's blocks are made for.
        cold:      the same with another codec.
        cancelled: looked at now and then.

    Returns:
        How many bytes of payloads are stored less now: below 0 where others use the old blocks;
        0 where it is compressed already; None where it was cancelled.

    Raises:
        NotFoundError: no such session.
        ArgumentError: its blocks are made for another model.
        StoreError, QuotaError: a block is missing or damaged, the session changed meanwhile, or
            there is no room for both at once; it is as it was then, and nothing new is left.

    Cost: reads and writes every block once; holds 64 MiB of decoded numbers at most.
    """
    session = tenant.session(session_id)
    if session is None:
        raise NotFoundError(f"session {session_id!r}: not there")
    if session.identity == cold.digest:
        if left := tenant.claimed(session):  # of a process that was killed
            tenant.give_up(session_id, left)
        return 0
    if session.identity != identity.digest:
        raise ArgumentError(f"session {session_id!r}: made for another model")
    if not session.keys:
        return 0
    keys = keys_under(tenant, session, cold)
    sizes, new_sizes = payload_sizes(session, identity), payload_sizes(session, cold)
    known = tenant.expiries(keys)
    try:
        tenant.claim(session_id, keys)
        if not _write(tenant, session, keys, identity, cold, cancelled):
            tenant.give_up(session_id, keys)
            return None
        gone = tenant.exchange(session, cold.digest, keys)
    except BaseException:
        # What the store says of the failure counts, not what it says of the cleaning.
        with contextlib.suppress(MemosError):
            tenant.give_up(session_id, keys)
        raise
    freed = sum(size for key, size in zip(session.keys, sizes, strict=True) if key in gone)
    return freed - sum(s for key, s in zip(keys, new_sizes, strict=True) if key not in known)


def keys_under(tenant: Tenant, session: Session, identity: KVIdentity) -> list[bytes]:
    """Keys of as many blocks as the session has, a tail last, under another identity."""
    P, tokens = identity.block_tokens, session.token_ids
    keys = tenant.block_keys(tokens, identity)[: len(session.keys)]
    if len(session.keys) > len(keys):
        parent = keys[-1] if keys else ZERO_KEY
        keys.append(tenant.tail_key(tokens[len(keys) * P :], parent, identity))
    return keys


def payload_sizes(session: Session, identity: KVIdentity) -> list[int]:
    """Bytes of the payload of each of a session's blocks under an identity."""
    full, rest = divmod(len(session.token_ids), identity.block_tokens)
    sizes = [identity.payload_bytes(i) for i in range(min(full, len(session.keys)))]
    return sizes + [identity.tail_bytes(rest)] * (len(session.keys) - len(sizes))


def _write(
    tenant: Tenant,
    session: Session,
    keys: list[bytes],
    identity: KVIdentity,
    cold: KVIdentity,
    cancelled: Callable[[], bool],
) -> bool:
    """Store the session's blocks under ``keys`` of ``cold``; False: cancelled."""
    P, tokens = identity.block_tokens, session.token_ids
    full = len(tokens) // P
    step = max(_AT_ONCE // identity.tail_bytes(P), 1)
    for start in range(0, len(keys), step):
        if cancelled():
            return False
        old = session.keys[start : start + step]
        over = tenant.expiries(old)
        payloads = tenant.get(old, identity, tokens[start * P :], background=True)
        if len(payloads) < len(old):
            raise StoreError(
                f"session {session.id!r}: block {start + len(payloads)} is missing or damaged"
            )
        blocks = payloads[: max(full - start, 0)]
        made = [
            *(recoded(blocks, start, identity, cold) if blocks else ()),
            *payloads[len(blocks) :],
        ]
        entries = []
        for i, payload in enumerate(made, start):
            parent, own = keys[i - 1] if i else ZERO_KEY, tokens[i * P : (i + 1) * P]
            ends = over.get(session.keys[i], 0)
            entries.append(Entry(keys[i], parent, own, i, payload, i >= full, ends))
        tenant.put(entries, cold, keep=session.keys, background=True)
    return True
