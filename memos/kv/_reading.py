"""``get``: find, read, verify. Whatever does not fit is a miss with a reason, never an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memos.kv._arena import ARENA_BYTES, Arena, slots
from memos.kv._crypto import TenantKeys
from memos.kv._state import State
from memos.kv.frame import HEADER_BYTES, Block, block_of, open_payload, parse
from memos.kv.identity import KVIdentity
from memos.kv.segment import Record, read_at
from memos.kv.tiers import HostBlock

# With these the frame itself is authentic and only the question was another one.
_FRAME_IS_GOOD = {"identity", "tenant", "tokens", "io"}


class Question:
    """What a caller asks for: keys under one identity, and perhaps the tokens behind them.

    In the background nothing counts as used, and nothing comes into memory.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        identity: KVIdentity,
        token_ids: Sequence[int] | None,
        tenant: TenantKeys,
        now_ms: int,
        background: bool = False,
    ) -> None:
        self.keys = keys
        self.identity = identity
        self.token_ids = token_ids
        self.tenant = tenant
        self.now_ms = now_ms
        self.background = background
        self._digests: dict[tuple[int, int], bytes | None] = {}

    def refuse(self, i: int, block: Block) -> str | None:
        """Why this block does not answer key ``i``; None when it does."""
        identity = self.identity
        if block.key != self.keys[i]:
            return "key"
        if block.tenant != self.tenant.tenant_id:
            return "tenant"
        if block.identity != identity.digest:
            return "identity"
        if block.has_expired(self.now_ms):
            return "expired"
        if block.tail:
            fits = block.payload_bytes == identity.tail_bytes(block.tokens)
        else:
            fits = block.tokens == identity.block_tokens
            fits = fits and block.payload_bytes == identity.payload_bytes(block.index)
        if not fits:
            return "size"
        if self.token_ids is not None and self._digest(i, block.tokens) != block.token_digest:
            return "tokens"
        return None

    def _digest(self, i: int, num_tokens: int) -> bytes | None:
        """Digest of the caller's tokens for key ``i``; None when there are too few."""
        assert self.token_ids is not None
        if (i, num_tokens) not in self._digests:
            start = i * self.identity.block_tokens
            tokens = self.token_ids[start : start + num_tokens]
            fits = len(tokens) == num_tokens
            self._digests[i, num_tokens] = self.tenant.token_digest(tokens) if fits else None
        return self._digests[i, num_tokens]


@dataclass(slots=True)
class _Job:
    """Key ``i`` of the question is answered by a frame, or by what is in memory, or by both."""

    i: int
    record: Record | None
    held: HostBlock | None
    fd: int = -1
    slot: tuple[Arena, memoryview] | None = None


def read_blocks(state: State, question: Question) -> list[memoryview]:
    """Payloads of the longest verified prefix; why it ends is counted."""
    jobs, reason = _find(state, question)
    payloads: list[memoryview] = []
    answers = _read(state, question, jobs)
    with state.lock:
        for job, answer in zip(jobs, answers, strict=True):
            key = question.keys[job.i]
            if isinstance(answer, str):
                reason = answer
                if answer not in _FRAME_IS_GOOD:
                    state.drop(key, job.record)
                break
            payloads.append(answer.payload)
            state.counts["host_hits" if answer is job.held else "disk_hits"] += 1
            state.counts["get_bytes"] += len(answer.payload)
            if question.background:
                continue
            if answer is not job.held and state.find(key) is not None:  # not deleted meanwhile
                state.host.put(answer)
            state.touch(key)
        state.counts["asked"] += len(question.keys)
        if reason is not None:
            state.misses[reason] += 1
    return payloads


def _find(state: State, question: Question) -> tuple[list[_Job], str | None]:
    """Where the blocks of the longest known prefix are; nothing is read."""
    jobs: list[_Job] = []
    with state.lock:
        for i, key in enumerate(question.keys):
            held = state.host.blocks.get(key)
            record = None if state.disk is None else state.disk.records.get(key)
            if record is not None:
                block = record.block
                if held is not None and held.block != block:  # stored anew by another process
                    held = None
            elif held is not None and state.disk is None:
                block = held.block
            else:
                state.host.remove(key)
                return jobs, "absent"
            reason = question.refuse(i, block)
            if reason is not None:
                return jobs, reason
            jobs.append(_Job(i, record, held))
    return jobs, None


def _read(state: State, question: Question, jobs: list[_Job]) -> list[HostBlock | str]:
    """Read and verify; one answer per job, in order."""
    files: dict[Path, int] = {}
    # Only the writer removes frames: what it holds in memory still stands.
    trusted = state.writable
    to_read = [job for job in jobs if job.record and not (job.held and trusted)]
    fresh = [job for job in to_read if not job.held]
    try:
        for job in to_read:
            assert job.record is not None
            path = job.record.segment.path
            if path not in files:
                try:
                    files[path] = os.open(path, os.O_RDONLY)
                except OSError:
                    files[path] = -1
            job.fd = files[path]
        sizes = [HEADER_BYTES + job.record.stored_bytes for job in fresh if job.record]
        limit = min(ARENA_BYTES, state.host.quota_bytes // 4)
        for job, slot in zip(fresh, slots(sizes, limit), strict=True):
            job.slot = slot
        scratch = threading.local()
        return state.map(lambda job: _answer(question, job, trusted, scratch), jobs, sum(sizes))
    finally:
        for fd in files.values():
            if fd >= 0:
                os.close(fd)


def _answer(
    question: Question, job: _Job, trusted: bool, scratch: threading.local
) -> HostBlock | str:
    """Check a frame whole; of one whose payload is in memory, only whether it still stands."""
    record, held = job.record, job.held
    if record is None or (held is not None and trusted):
        assert held is not None
        return held
    if job.fd < 0:
        return "gone"
    data = bytearray(HEADER_BYTES) if job.slot is None else job.slot[1]
    encrypted = question.tenant.encrypted and held is None
    if encrypted:  # the slot is for the plaintext
        data = _scratch(scratch, len(data))
    size = read_at(job.fd, data, record.offset)
    if size is None:
        return "io"
    data = memoryview(data)[:size]
    header = parse(data, question.tenant)
    if isinstance(header, str):
        return header
    block = block_of(header)
    reason = question.refuse(job.i, block)
    if reason is not None:
        return reason
    if header.stored_bytes != record.stored_bytes:
        return "size"
    if job.slot is None:
        assert held is not None
        return held if block == held.block else "gone"
    arena, into = job.slot
    payload = open_payload(header, data, question.tenant, into if encrypted else None)
    if isinstance(payload, str):
        return payload
    return HostBlock(block, payload, arena)


def _scratch(local: threading.local, num_bytes: int) -> memoryview:
    """Memory of this thread that is written over again and again."""
    have: memoryview | None = getattr(local, "data", None)
    if have is None or len(have) < num_bytes:
        have = local.data = memoryview(bytearray(num_bytes))
    return have[:num_bytes]
