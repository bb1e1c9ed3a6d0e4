"""Where blocks live: in this process's memory, and in the segments of a folder.

Both tiers hold a hard quota. Neither locks: the store calls them under its own locks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from memos.kv import _files
from memos.kv._arena import Arena
from memos.kv._crypto import TenantKeys
from memos.kv.frame import ALIGN, Block, Header, block_of
from memos.kv.policy import Policy
from memos.kv.segment import Record, Segment, scan, segment_number, stamp_of


@dataclass(slots=True, eq=False)
class HostBlock:
    """A verified payload in memory. The bytes never change."""

    block: Block
    payload: memoryview
    arena: Arena  # the memory behind the payload


class HostTier:
    """Payloads in memory, at most ``quota_bytes`` of them."""

    def __init__(self, quota_bytes: int, policy: Policy) -> None:
        self.quota_bytes = quota_bytes
        self.used_bytes = self.peak_bytes = 0
        self.policy = policy
        self.blocks: dict[bytes, HostBlock] = {}
        self.evictions = 0

    def put(self, item: HostBlock, locked: Collection[bytes] = ()) -> bool:
        """Take a block, evicting others that are not ``locked``. False: there is no room."""
        key = item.block.key
        self.remove(key)
        if not item.arena.holders:
            if not self.make_room(item.arena.num_bytes, locked):
                return False
            self.used_bytes += item.arena.num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        item.arena.holders += 1
        self.blocks[key] = item
        self.policy.admit(key, item.block.parent)
        return True

    def locked_bytes(self, locked: Collection[bytes]) -> int:
        """Bytes that eviction cannot free while these keys stay."""
        return sum(self.blocks[key].arena.num_bytes for key in locked if key in self.blocks)

    def make_room(self, num_bytes: int, locked: Collection[bytes] = ()) -> bool:
        """Evict until ``num_bytes`` fit; False when they cannot."""
        if num_bytes > self.quota_bytes:
            return False
        if self.used_bytes + num_bytes <= self.quota_bytes:
            return True
        for key in self.policy.victims():
            if key in locked:
                continue
            self.remove(key)
            self.evictions += 1
            if self.used_bytes + num_bytes <= self.quota_bytes:
                return True
        return False

    def remove(self, key: bytes) -> bool:
        item = self.blocks.pop(key, None)
        if item is None:
            return False
        item.arena.holders -= 1
        if not item.arena.holders:
            self.used_bytes -= item.arena.num_bytes
        self.policy.remove(key)
        return True


class DiskTier:
    """The index of all segments, the bytes they take on disk, and their removal.

    ``used_bytes`` counts live frames, garbage, frames whose pages could not be given back, and
    what a running ``put`` has reserved: it never exceeds ``quota_bytes`` through a put.
    """

    def __init__(self, quota_bytes: int, policy: Policy, durable: bool) -> None:
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self.policy = policy
        self.durable = durable
        self.records: dict[bytes, Record] = {}
        self.segments: dict[Path, Segment] = {}
        self._last_numbers: dict[bytes, int] = {}  # of a tenant's segments; never used again
        self.can_punch = True
        self.evictions = 0
        self.on_evict: Callable[[bytes], object] = lambda key: None

    # Loading

    def load(self, folder: Path, keys: TenantKeys) -> list[Record]:
        """Bring the index up to date with a tenant's segment folder; returns what is new."""
        found: list[Record] = []
        present = set()
        for number, path in list_segments(folder):
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError:
                continue  # it vanished; a segment that cannot be opened holds only misses
            try:
                stat = os.fstat(fd)
                present.add(path)
                known = self.segments.get(path)
                if known is not None:
                    if known.stamp == stamp_of(stat):
                        continue
                    self.forget_segment(known)
                segment = Segment(path, keys.tenant_id, stamp_of(stat))
                self.add_segment(segment, number)
                found += self._scan(fd, segment, keys)
            finally:
                os.close(fd)
        for segment in [s for s in self.segments.values() if s.tenant == keys.tenant_id]:
            if segment.path not in present:
                self.forget_segment(segment)
        return [r for r in found if self.records.get(r.block.key) is r]

    def _scan(self, fd: int, segment: Segment, keys: TenantKeys) -> list[Record]:
        found = []
        try:
            for offset, num_bytes, header in scan(fd, segment.stamp[1], keys):
                size = -(-num_bytes // ALIGN) * ALIGN
                segment.allocated_bytes += size
                self.used_bytes += size
                if isinstance(header, Header):
                    record = Record(
                        block_of(header), segment, offset, num_bytes, header.stored_bytes
                    )
                    self.add(record)
                    found.append(record)
                else:
                    segment.garbage.append((offset, size))
        except OSError:
            pass  # what cannot be read is not in the index: a miss
        return found

    def load_unreadable(self, folder: Path, tenant: bytes) -> None:
        """Count the bytes of segments whose key is lost; they go only with their tenant."""
        for number, path in list_segments(folder):
            stat = path.stat()
            segment = Segment(path, tenant, stamp_of(stat))
            segment.allocated_bytes = 512 * stat.st_blocks
            self.used_bytes += segment.allocated_bytes
            self.add_segment(segment, number)

    def add_segment(self, segment: Segment, number: int) -> None:
        self.segments[segment.path] = segment
        last = self._last_numbers.get(segment.tenant, 0)
        self._last_numbers[segment.tenant] = max(last, number)

    def next_number(self, tenant: bytes) -> int:
        """The number of a tenant's next segment."""
        return self._last_numbers.get(tenant, 0) + 1

    def tidy(self) -> None:
        """Unlink segments of which nothing is left."""
        for segment in list(self.segments.values()):
            if not segment.allocated_bytes:
                self.unlink(segment)

    def add(self, record: Record) -> None:
        """Put a frame into the index; an older frame of the same key becomes garbage."""
        key = record.block.key
        old = self.records.get(key)
        if old is not None:
            self.discard(old)
        self.records[key] = record
        record.segment.live[key] = record
        self.policy.admit(key, record.block.parent)

    def discard(self, record: Record) -> None:
        """Take a frame out of the index; its bytes stay as garbage until room is needed."""
        if self._drop(record):
            record.segment.garbage.append((record.offset, record.frame_bytes))

    def _drop(self, record: Record) -> bool:
        key = record.block.key
        if self.records.get(key) is not record:
            return False
        del self.records[key]
        del record.segment.live[key]
        self.policy.remove(key)
        return True

    def forget_segment(self, segment: Segment) -> None:
        """Drop a segment from the index, whatever became of its file."""
        for record in list(segment.live.values()):
            self._drop(record)
        if self.segments.pop(segment.path, None) is not None:
            self.used_bytes -= segment.allocated_bytes

    # Removal

    def destroy(self, records: Iterable[Record], *, wipe: bool = False) -> None:
        """Remove frames and give their pages back.

        Where the filesystem cannot punch holes the bytes stay until their segment goes; with
        ``wipe`` they are at least overwritten with zeros. A segment without live frames goes.

        Raises:
            OSError: the disk failed; the frames are out of the index all the same.
        """
        ranges: dict[Path, list[tuple[int, int]]] = {}
        for record in records:
            if self._drop(record):
                ranges.setdefault(record.segment.path, []).append(
                    (record.offset, record.frame_bytes)
                )
                record.segment.garbage.append((record.offset, record.frame_bytes))
        for path, freed in ranges.items():
            self._free(self.segments[path], freed, wipe)

    def reclaim(self, tenant: bytes | None = None, *, wipe: bool = False) -> None:
        """Free all garbage, or that of one tenant."""
        for segment in list(self.segments.values()):
            if segment.garbage and tenant in (None, segment.tenant):
                self._free(segment, list(segment.garbage), wipe)

    def _free(self, segment: Segment, ranges: list[tuple[int, int]], wipe: bool) -> None:
        if not segment.live:
            self.unlink(segment)
            return
        if not self.can_punch and not wipe:
            return
        try:
            fd = os.open(segment.path, os.O_RDWR)
        except FileNotFoundError:  # removed by hand
            self.forget_segment(segment)
            return
        try:
            for offset, num_bytes in ranges:
                if self.can_punch and not _files.punch_hole(fd, offset, num_bytes):
                    self.can_punch = False
                if self.can_punch:
                    segment.allocated_bytes -= num_bytes
                    self.used_bytes -= num_bytes
                elif wipe:
                    _files.write_zeros(fd, offset, num_bytes)
                else:
                    continue
                segment.garbage.remove((offset, num_bytes))
            if wipe and self.durable:
                _files.sync_data(fd)
        finally:
            os.close(fd)

    def unlink(self, segment: Segment) -> None:
        """Remove a segment's file. A reader may hold it open: cut it, so that the bytes go now."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(segment.path, 0)
            segment.path.unlink()
            if self.durable:
                _files.sync_folder(segment.path.parent)
        self.forget_segment(segment)

    # Quota

    def locked_bytes(self, locked: Collection[bytes]) -> int:
        """Bytes that eviction cannot free while these keys stay."""
        records = [self.records[key] for key in locked if key in self.records]
        if self.can_punch:
            return sum(record.frame_bytes for record in records)
        return sum(segment.allocated_bytes for segment in {record.segment for record in records})

    def make_room(self, num_bytes: int, locked: Collection[bytes]) -> bool:
        """Free garbage, then evict, until ``num_bytes`` fit; False when they cannot."""
        if self._fits(num_bytes):
            return True
        self.reclaim()
        if self.can_punch and not self._fits(num_bytes):
            self._evict_frames(num_bytes, locked)
        if not self.can_punch and not self._fits(num_bytes):
            self._evict_segments(num_bytes, locked)
        return self._fits(num_bytes)

    def _fits(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.quota_bytes

    def _evict_frames(self, num_bytes: int, locked: Collection[bytes]) -> None:
        need = self.used_bytes + num_bytes - self.quota_bytes
        chosen: list[Record] = []
        for key in self.policy.victims():
            if need <= 0:
                break
            if key in locked:
                continue
            record = self.records[key]
            chosen.append(record)
            need -= record.frame_bytes
            self.discard(record)
            self.on_evict(key)
        self.evictions += len(chosen)
        self.reclaim()

    def _evict_segments(self, num_bytes: int, locked: Collection[bytes]) -> None:
        kept = {self.records[key].segment for key in locked if key in self.records}
        for key in self.policy.victims():
            if self._fits(num_bytes):
                break
            segment = self.records[key].segment
            if segment not in kept:
                self.evictions += len(segment.live)
                for other in list(segment.live):
                    self.on_evict(other)
                self.unlink(segment)


def list_segments(folder: Path) -> list[tuple[int, Path]]:
    """The segments of a folder, oldest first; none when there is no such folder."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    numbers = ((segment_number(name), name) for name in names)
    return sorted((number, folder / name) for number, name in numbers if number is not None)
