"""``get``: find, read, verify. Whatever does not fit is a miss with a reason, never an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memos.kv._crypto import TenantKeys
from memos.kv._state import State
from memos.kv.frame import Block, block_of, open_payload, parse
from memos.kv.identity import KVIdentity
from memos.kv.segment import Record, read_frame
from memos.kv.tiers import HostBlock

# With these the frame itself is authentic and only the question was another one.
_FRAME_IS_GOOD = {"identity", "tenant", "tokens", "io"}


class Question:
    """What a caller asks for: keys under one identity, and perhaps the tokens behind them."""

    def __init__(
        self,
        keys: Sequence[bytes],
        identity: KVIdentity,
        token_ids: Sequence[int] | None,
        tenant: TenantKeys,
        now_ms: int,
    ) -> None:
        self.keys = keys
        self.identity = identity
        self.token_ids = token_ids
        self.tenant = tenant
        self.now_ms = now_ms

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
        if self.token_ids is not None:
            start = i * identity.block_tokens
            tokens = self.token_ids[start : start + block.tokens]
            if len(tokens) != block.tokens:
                return "tokens"
            if self.tenant.token_digest(tokens) != block.token_digest:
                return "tokens"
        return None


@dataclass(slots=True)
class _Job:
    """Key ``i`` of the question is answered by a frame, or by what is in memory, or by both."""

    i: int
    record: Record | None
    held: HostBlock | None


def read_blocks(state: State, question: Question) -> tuple[list[memoryview], str | None]:
    """Payloads of the longest verified prefix, and why it ends; None when it is complete."""
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
            if answer is not job.held and state.find(key) is not None:  # not deleted meanwhile
                state.host.put(answer)
            state.touch(key)
        state.counts["asked"] += len(question.keys)
        if reason is not None:
            state.misses[reason] += 1
    return payloads, reason


def _find(state: State, question: Question) -> tuple[list[_Job], str | None]:
    """Where the blocks of the longest known prefix are; nothing is read."""
    jobs: list[_Job] = []
    with state.lock:
        for i, key in enumerate(question.keys):
            held = state.host.blocks.get(key)
            record = None if state.disk is None else state.disk.records.get(key)
            if record is not None:
                block = record.block
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
    num_bytes = 0

    def answer(job: _Job) -> HostBlock | str:
        if job.record is None or (job.held is not None and state.writable):
            assert job.held is not None
            return job.held  # verified when it came to memory, and no one else can remove it
        fd = files[job.record.segment.path]
        if fd < 0:
            return "gone"
        return _verified(fd, question, job.i, job.record, job.held)

    try:
        for job in jobs:
            if job.record is None or (job.held is not None and state.writable):
                continue
            path = job.record.segment.path
            if path not in files:
                try:
                    files[path] = os.open(path, os.O_RDONLY)
                except OSError:
                    files[path] = -1
            num_bytes += 0 if job.held is not None else job.record.stored_bytes
        return state.map(answer, jobs, num_bytes)
    finally:
        for fd in files.values():
            if fd >= 0:
                os.close(fd)


def _verified(
    fd: int, question: Question, i: int, record: Record, held: HostBlock | None
) -> HostBlock | str:
    """Read a frame and check all of it; of one that is in memory, only whether it still stands."""
    data = read_frame(fd, record, header_only=held is not None)
    if data is None:
        return "io"
    header = parse(data, question.tenant)
    if isinstance(header, str):
        return header
    block = block_of(header)
    reason = question.refuse(i, block)
    if reason is not None:
        return reason
    if header.stored_bytes != record.stored_bytes:
        return "size"
    if held is not None and block == held.block:
        return held
    payload = open_payload(header, data, question.tenant)
    if isinstance(payload, str):
        return payload
    return HostBlock(block, payload, max(len(payload), len(data)))
