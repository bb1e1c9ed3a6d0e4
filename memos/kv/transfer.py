"""Sessions of a tenant into a .memcube and back: their tokens, and the packed blocks as they are.

Keys of blocks are secrets of a tenant, so they do not travel: they are made again from the tokens.
What says whether the blocks fit is the identity of the model, which stands beside them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memos.cube.memcube import MemcubeReader, MemcubeWriter, parse_record, record, write_all
from memos.errors import ArgumentError, StoreError
from memos.kv.frame import ZERO_KEY
from memos.kv.identity import KVIdentity
from memos.kv.sessions import LEARNT, Session
from memos.kv.tenant import Entry, Tenant

PART_BYTES = 16 << 20  # a part ends with the session that fills it
_SLICE = 16  # blocks held at once
_KEYS = {
    *("blocks", "created_at", "expires_at", "identity", "metadata", "pinned", "session", "tail"),
    *("text", "token_ids", "updated_at"),
}
_IDENTITY = {f.name: int if f.type == "int" else str for f in dataclasses.fields(KVIdentity)}


@dataclass(frozen=True)
class Stored:
    """A session of a file.

    Args:
        session: without keys.
        blocks:  full blocks that the file has.
        tail:    tokens after them that it has too.
        text:    what the tokens say; None: nobody knew.
    """

    session: Session
    blocks: int
    tail: int
    text: str | None


def names(memory: int, part: int) -> tuple[str, str]:
    """The members with the sessions of a part, and with their blocks."""
    return f"records/{memory:04d}-{part:06d}.jsonl", f"blobs/{memory:04d}-{part:06d}.kv"


def export_sessions(
    writer: MemcubeWriter,
    number: int,
    tenant: Tenant,
    identity: KVIdentity,
    sessions: Iterable[Session],
    text_of: Callable[[Sequence[int]], str | None],
    tell: Callable[[int], object] = lambda sessions: None,
    cold: KVIdentity | None = None,
) -> tuple[int, int]:
    """Write sessions, with those of their blocks that are there and pass every check.

    Args:
        number:  of the memory in the file, from 1.
        cold:    of sessions that were compressed.
        text_of: what tokens say.
        tell:    called with how many sessions were written since the last call.

    Returns:
        How many sessions and parts there are.

    Raises StoreError: a block was evicted meanwhile.

    Cost: reads every block twice; holds 16 of one session.
    """
    count, parts = 0, 0
    waiting = sorted(sessions, key=lambda session: (session.created_at, session.id))
    while waiting:
        parts += 1
        lines, blobs = names(number, parts)
        part: list[tuple[Session, int, int]] = []
        size = 0
        with writer.member(lines, "records") as member:
            while waiting and size < PART_BYTES:
                session = waiting.pop(0)
                made_for = _of_digest(session.identity, identity, cold)
                blocks, tail = (0, 0) if made_for is None else _found(tenant, made_for, session)
                part.append((session, blocks, tail))
                member.write(_line(session, blocks, tail, text_of(session.token_ids)))
                size += _num_bytes(made_for or identity, blocks, tail)
        if size:
            with writer.member(blobs, "blob") as member:
                for session, blocks, tail in part:
                    before = member.num_bytes
                    made_for = _of_digest(session.identity, identity, cold) or identity
                    write_all(member, _payloads(tenant, made_for, session, blocks, tail))
                    if member.num_bytes - before != _num_bytes(made_for, blocks, tail):
                        raise StoreError(f"session {session.id!r}: a block went while it was read")
        tell(len(part))
        count += len(part)
    return count, parts


def read_sessions(
    reader: MemcubeReader,
    number: int,
    parts: int,
    identity: KVIdentity,
    cold: KVIdentity | None = None,
) -> Iterator[tuple[Stored, Iterator[bytes]]]:
    """The sessions of a memory of a file, each with the payloads of its blocks, a tail last.

    The payloads of one have to be taken before the next one is asked for. Those of sessions that
    were compressed are of ``cold``.

    Raises StoreError: the file is damaged or lies.
    """
    for part in range(1, parts + 1):
        lines, blobs = names(number, part)
        for name, type in ((lines, "records"), (blobs, "blob")):
            if name in reader.members and reader.members[name].type != type:
                raise StoreError(f"member {name}: {type} wanted")
        if lines not in reader.members:
            raise StoreError(f"member {lines}: records wanted, but there are none")
        data = _Pieces(reader.pieces(blobs) if blobs in reader.members else iter(()), blobs)
        for i, line in enumerate(reader.lines(lines), 1):
            stored = _parse(parse_record(line, f"{lines}:{i}"), f"{lines}:{i}", identity, cold)
            made_for = _of_digest(stored.session.identity, identity, cold) or identity
            sizes = [made_for.payload_bytes(index) for index in range(stored.blocks)]
            if stored.tail:
                sizes.append(made_for.tail_bytes(stored.tail))
            payloads = data.each(sizes)
            yield stored, payloads
            for _ in payloads:  # those that nobody wanted
                pass
        data.finish()


def store_session(
    tenant: Tenant, identity: KVIdentity, stored: Stored, payloads: Iterator[bytes]
) -> Session:
    """Put a session and its blocks into a tenant.

    Raises:
        ArgumentError, QuotaError, StoreError: as ``Tenant.put``; nothing of it is left.
    """
    session, P = stored.session, identity.block_tokens
    tokens = session.token_ids
    keys = tenant.block_keys(tokens, identity)
    if rest := tokens[len(keys) * P :]:
        keys.append(tenant.tail_key(rest, keys[-1] if keys else ZERO_KEY, identity))
    ttl_s = None
    if session.expires_at is not None:
        ttl_s = max(session.expires_at - tenant.now(), 1.0)
    whole = dataclasses.replace(session, keys=keys)
    batch: list[Entry] = []
    try:
        for i, payload in enumerate(payloads):
            parent = keys[i - 1] if i else ZERO_KEY
            own = tokens[i * P : (i + 1) * P]
            batch.append(Entry(keys[i], parent, own, i, payload, tail=len(own) < P))
            if len(batch) == _SLICE:
                tenant.put(batch, identity, ttl_s=ttl_s)
                batch = []
        if batch:
            tenant.put(batch, identity, ttl_s=ttl_s)
        wanted = stored.blocks + bool(stored.tail)
        if tenant.contains(keys[:wanted]) < wanted:
            raise StoreError(f"session {session.id!r}: no room for all of its blocks")
        return tenant.save_session(whole, keep_times=True)
    except BaseException:
        # As a session's, so that blocks that others use too stay.
        tenant.save_session(whole, keep_times=True)
        tenant.delete_session(session.id)
        raise


def parse_identity(value: Any) -> KVIdentity:
    """The identity of a manifest. Raises StoreError."""
    if not isinstance(value, dict) or value.keys() != _IDENTITY.keys():
        raise StoreError(f"manifest.json: identity: {', '.join(_IDENTITY)} wanted")
    for name, kind in _IDENTITY.items():
        if type(value[name]) is not kind:
            raise StoreError(f"manifest.json: identity: {name}: {kind.__name__} wanted")
    try:
        found = KVIdentity(**value)
    except ArgumentError as error:
        raise StoreError(f"manifest.json: identity: {error}") from None
    if dataclasses.asdict(found) != value:
        raise StoreError("manifest.json: identity: a codec by its full name wanted")
    return found


def _of_digest(digest: bytes, identity: KVIdentity, cold: KVIdentity | None) -> KVIdentity | None:
    known = (identity,) if cold is None else (identity, cold)
    return next((one for one in known if one.digest == digest), None)


def parse_cold(value: Any, identity: KVIdentity) -> KVIdentity:
    """The identity of compressed sessions, of a manifest. Raises StoreError."""
    cold = parse_identity(value)
    if dataclasses.replace(cold, codec=identity.codec) != identity or cold == identity:
        raise StoreError("manifest.json: cold: the identity with another codec wanted")
    return cold


def _found(tenant: Tenant, identity: KVIdentity, session: Session) -> tuple[int, int]:
    """How many full blocks of a session are there, and tokens of its tail."""
    wanted = len(session.token_ids) // identity.block_tokens
    found = sum(1 for _ in _payloads(tenant, identity, session, wanted, 1))
    if found <= wanted:
        return found, 0
    return wanted, len(session.token_ids) % identity.block_tokens


def _payloads(
    tenant: Tenant, identity: KVIdentity, session: Session, blocks: int, tail: int
) -> Iterator[memoryview]:
    """The payloads of the leading blocks of a session that pass every check."""
    P = identity.block_tokens
    full = len(session.token_ids) // P
    keys = session.keys[: full + 1 if tail and blocks == full else blocks]
    for at in range(0, len(keys), _SLICE):
        part = keys[at : at + _SLICE]
        got = tenant.get(part, identity, session.token_ids[at * P :])
        yield from got
        if len(got) < len(part):
            return


def _num_bytes(identity: KVIdentity, blocks: int, tail: int) -> int:
    size = sum(identity.payload_bytes(i) for i in range(min(blocks, 1)))
    size += max(blocks - 1, 0) * identity.block_bytes()
    return size + (identity.tail_bytes(tail) if tail else 0)


def _line(session: Session, blocks: int, tail: int, text: str | None) -> bytes:
    value = {
        "blocks": blocks,
        "created_at": float(session.created_at),
        "expires_at": None if session.expires_at is None else float(session.expires_at),
        "identity": session.identity.hex(),
        "metadata": session.metadata,
        "pinned": bool(session.pinned),
        "session": session.id,
        "tail": tail,
        "text": text,
        "token_ids": list(session.token_ids),
        "updated_at": float(session.updated_at),
    }
    return record(value, f"session {session.id!r}")


def _parse(
    line: Mapping[str, Any], what: str, identity: KVIdentity, cold: KVIdentity | None
) -> Stored:
    if line.keys() != _KEYS:
        raise StoreError(f"{what}: a session with {', '.join(sorted(_KEYS))} wanted")
    tokens, blocks, tail = line["token_ids"], line["blocks"], line["tail"]
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 1 << 63 for t in tokens):
        raise StoreError(f"{what}: token_ids: ids from 0 wanted")
    P = identity.block_tokens
    if type(blocks) is not int or type(tail) is not int or not 0 <= blocks <= len(tokens) // P:
        raise StoreError(f"{what}: blocks of its tokens wanted")
    if tail and (blocks != len(tokens) // P or tail != len(tokens) % P):
        raise StoreError(f"{what}: a tail of the tokens after its blocks wanted")
    times = [line["created_at"], line["updated_at"]]
    times += [] if line["expires_at"] is None else [line["expires_at"]]
    if not all(type(at) is float and math.isfinite(at) for at in times):
        raise StoreError(f"{what}: seconds since 1970 wanted")
    for name, kind in (("session", str), ("metadata", dict), ("pinned", bool), ("identity", str)):
        if type(line[name]) is not kind or line[name] == "":
            raise StoreError(f"{what}: {name}: {kind.__name__} wanted")
    learnt = line["metadata"].get(LEARNT, {})
    if not isinstance(learnt, dict) or any(
        name not in _IDENTITY or getattr(identity, name) != value for name, value in learnt.items()
    ):
        raise StoreError(f"{what}: metadata: what was learnt of the model is not its identity")
    if line["text"] is not None and not isinstance(line["text"], str):
        raise StoreError(f"{what}: text: a string or null wanted")
    try:
        made_for = bytes.fromhex(line["identity"])
    except ValueError:
        made_for = b""
    known = _of_digest(made_for, identity, cold)
    if len(made_for) != 32 or (known is None and (blocks or tail)):
        raise StoreError(f"{what}: blocks of the identity of the memory wanted")
    session = Session(
        id=line["session"],
        token_ids=tokens,
        identity=made_for,
        keys=[],
        metadata=line["metadata"],
        created_at=line["created_at"],
        updated_at=line["updated_at"],
        expires_at=line["expires_at"],
        pinned=line["pinned"],
    )
    return Stored(session, blocks, tail, line["text"])


class _Pieces:
    """Bytes that come in pieces of one size, given out in pieces of others."""

    def __init__(self, pieces: Iterator[bytes], name: str) -> None:
        self._pieces, self._name, self._rest = pieces, name, b""

    def each(self, sizes: Sequence[int]) -> Iterator[bytes]:
        for size in sizes:
            parts, have = [self._rest], len(self._rest)
            while have < size:
                piece = next(self._pieces, None)
                if piece is None:
                    raise StoreError(f"member {self._name}: more bytes wanted: blocks are missing")
                parts.append(piece)
                have += len(piece)
            whole = b"".join(parts)
            self._rest = whole[size:]
            yield whole[:size]

    def finish(self) -> None:
        """Raises StoreError where there is more."""
        if self._rest or next(self._pieces, None) is not None:
            raise StoreError(f"member {self._name}: bytes that belong to no block")
