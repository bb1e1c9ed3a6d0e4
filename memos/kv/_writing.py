"""``put``: check, make room, write a segment, publish it, then tell the index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memos.errors import ArgumentError, QuotaError
from memos.kernels.hashing import hash_blocks
from memos.kv._arena import Arena
from memos.kv._crypto import KEY_BYTES, Buffer, TenantKeys
from memos.kv._state import State
from memos.kv.frame import ZERO_KEY, Block, frame_bytes, seal
from memos.kv.identity import KVIdentity
from memos.kv.segment import Record, Segment, SegmentWriter, segment_path
from memos.kv.tiers import HostBlock

SEGMENT_BYTES = 256 << 20


class Source(Protocol):
    """What ``put`` needs of an entry."""

    @property
    def key(self) -> bytes: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def index(self) -> int: ...
    @property
    def payload(self) -> Buffer: ...
    @property
    def tail(self) -> bool: ...


@dataclass(slots=True)
class Item:
    """A block to store, checked."""

    block: Block
    payload: memoryview


def check_entry(
    name: str, entry: Source, identity: KVIdentity, keys: TenantKeys, now_ms: int, expires_ms: int
) -> Item:
    """Check an entry against its contract and its own key; raises ArgumentError."""
    P, num_tokens = identity.block_tokens, len(entry.token_ids)
    for part in ("key", "parent"):
        value = getattr(entry, part)
        if not isinstance(value, bytes) or len(value) != KEY_BYTES:
            raise ArgumentError(f"{name}.{part}: {KEY_BYTES} bytes wanted, got {value!r}")
    if entry.tail and not 1 <= num_tokens < P:
        raise ArgumentError(
            f"{name}.token_ids: 1 to {P - 1} tokens wanted for a tail, got {num_tokens}"
        )
    if not entry.tail and num_tokens != P:
        raise ArgumentError(f"{name}.token_ids: {P} tokens wanted, got {num_tokens}")
    if not 0 <= entry.index < 2**32 or (entry.index == 0) != (entry.parent == ZERO_KEY):
        raise ArgumentError(
            f"{name}.index: 0 without a parent and more with one wanted, got {entry.index} "
            f"and parent {entry.parent.hex()[:16]}..."
        )
    secret = keys.tail_secret if entry.tail else keys.block_secret
    if hash_blocks(entry.token_ids, num_tokens, secret, entry.parent, identity.digest) != [
        entry.key
    ]:
        raise ArgumentError(
            f"{name}.key: the key of its tokens, parent and identity wanted "
            f"(Tenant.{'tail_key' if entry.tail else 'block_keys'}), "
            f"got {entry.key.hex()[:16]}..."
        )
    payload = memoryview(entry.payload)
    if not payload.contiguous:
        raise ArgumentError(f"{name}.payload: a contiguous buffer wanted")
    payload = payload.cast("B")
    wanted = identity.tail_bytes(num_tokens) if entry.tail else identity.payload_bytes(entry.index)
    if len(payload) != wanted:
        raise ArgumentError(f"{name}.payload: {wanted} bytes wanted, got {len(payload)}")
    block = Block(
        keys.tenant_id,
        entry.key,
        entry.parent,
        identity.digest,
        keys.token_digest(entry.token_ids),
        wanted,
        entry.index,
        num_tokens,
        entry.tail,
        now_ms,
        expires_ms,
    )
    return Item(block, payload)


def write_blocks(
    state: State,
    folder: Path | None,
    items: Sequence[Item],
    identity: KVIdentity,
    keys: TenantKeys,
    keep: Collection[bytes] = (),
    background: bool = False,
) -> int:
    """Store those that are new, in order, as many as fit; returns how many.

    The caller holds the write lock. ``folder`` is where the segments go, None: memory only.
    What ``keep`` names is not evicted; what is written in the background is on disk only.

    Raises:
        QuotaError: not one of the new blocks fits beside what must stay.
        OSError: the disk refused; nothing stored before is lost.
    """
    with state.lock:
        new: dict[bytes, Item] = {}
        for item in items:
            if _is_kept(state.find(item.block.key), item.block):
                state.touch(item.block.key)
                state.counts["put_existing"] += 1
            else:
                new.setdefault(item.block.key, item)
        if not new:
            return 0
        batch, locked = _make_room(state, items, list(new.values()), keys.encrypted, keep)
        state.counts["put_refused"] += len(new) - len(batch)
        if state.disk is None or folder is None:
            for item in batch:
                payload = memoryview(bytes(item.payload))
                state.host.put(HostBlock(item.block, payload, Arena(payload)), locked)
    if state.disk is not None and folder is not None:
        _write_segments(state, folder, batch, identity, keys, background)
    with state.lock:
        for item in batch:
            state.note_expiry(item.block)
            state.counts["put_blocks"] += 1
            state.counts["put_bytes"] += len(item.payload)
    return len(batch)


def _is_kept(old: Block | None, new: Block) -> bool:
    """Is what is stored already at least as long-lived?"""
    if old is None or old.tenant != new.tenant or old.has_expired(new.created_ms):
        return False
    return old.expires_ms == 0 or 0 < new.expires_ms <= old.expires_ms


def _make_room(
    state: State,
    items: Sequence[Item],
    new: list[Item],
    encrypted: bool,
    keep: Collection[bytes],
) -> tuple[list[Item], Collection[bytes]]:
    """The leading new items that fit, after evicting; on disk their bytes are reserved."""
    tier = state.host if state.disk is None else state.disk
    sizes = [len(item.payload) for item in new]
    if state.disk is not None:
        sizes = [frame_bytes(size, encrypted) for size in sizes]
    if sizes[0] > tier.quota_bytes:
        raise QuotaError(
            f"put: a block of at most the quota of {tier.quota_bytes} bytes wanted, "
            f"got one of {sizes[0]}"
        )
    locked: set[bytes] = set()
    count, total = len(new), sum(sizes)
    if tier.used_bytes + total > tier.quota_bytes:
        keys = {key for item in items for key in (item.block.key, item.block.parent)}
        locked = state.with_ancestors(keys | state.pinned() | set(keep))
        capacity = tier.quota_bytes - tier.locked_bytes(locked)
        while count and total > capacity:
            count -= 1
            total -= sizes[count]
    if not count or not tier.make_room(total, locked):
        raise QuotaError(
            f"put: room for a block of {sizes[0]} bytes wanted, but pinned sessions and the "
            f"blocks it follows hold {tier.locked_bytes(locked)} of {tier.quota_bytes} bytes"
        )
    if state.disk is not None:
        state.disk.used_bytes += total
    return new[:count], locked


def _write_segments(
    state: State,
    folder: Path,
    batch: list[Item],
    identity: KVIdentity,
    keys: TenantKeys,
    background: bool,
) -> None:
    """Write the batch as one segment or several; a failure takes back only what is unpublished."""
    assert state.disk is not None
    disk = state.disk
    reserved = sum(frame_bytes(len(item.payload), keys.encrypted) for item in batch)
    limit = SEGMENT_BYTES if disk.can_punch else min(SEGMENT_BYTES, disk.quota_bytes // 8)
    waiting = iter(batch)
    item = next(waiting, None)
    try:
        while item is not None:
            writer = SegmentWriter(folder, state.durable)
            done: list[tuple[Item, memoryview | None, int, int, int]] = []
            try:
                while item is not None and (not done or writer.size < limit):
                    payload = bytes(item.payload)
                    pieces = seal(item.block, payload, identity, keys)
                    offset = writer.append(pieces)
                    stays = not background and len(payload) <= state.host.quota_bytes
                    kept = memoryview(payload) if stays else None
                    stored = len(pieces[1])
                    done.append((item, kept, offset, writer.size - offset, stored))
                    item = next(waiting, None)
                number = disk.next_number(keys.tenant_id)
                path = segment_path(folder, number)
                stamp = writer.publish(path)
            finally:
                writer.abort()
            with state.lock:
                segment = Segment(path, keys.tenant_id, stamp)
                segment.allocated_bytes = writer.size
                reserved -= writer.size
                disk.add_segment(segment, number)
                for written, kept, offset, size, stored in done:
                    disk.add(Record(written.block, segment, offset, size, stored))
                    if kept is not None:
                        state.host.put(HostBlock(written.block, kept, Arena(kept)))
    finally:
        with state.lock:
            disk.used_bytes -= reserved
