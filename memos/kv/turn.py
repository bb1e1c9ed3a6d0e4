"""Turns of a conversation: restore the longest verified prefix, generate, store what is new."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from memos.errors import ArgumentError
from memos.kv.cache import MemosCache, MemosLayer, common_prefix, token_list
from memos.kv.device_pools import PoolOnDemand
from memos.kv.frame import ZERO_KEY
from memos.kv.identity import KVIdentity
from memos.kv.model import ModelShape
from memos.kv.payload import block_payloads, check_cache, load_cache, tail_payload
from memos.kv.sessions import LIST, Session
from memos.kv.tenant import Entry, Tenant
from memos.tracing import traced


@dataclass(frozen=True)
class Restored:
    """What the store had of a prompt: a cache that nobody else holds, and its sizes in bytes."""

    cache: MemosCache
    tokens: int
    stored_bytes: int
    from_device: bool = False  # all its blocks were in the pool


@dataclass(frozen=True)
class _Prefix:
    """What is known of a prompt under one identity.

    Args:
        keys:   of its full blocks, and the tail of the session where that goes on with it.
        blocks: how many of them are full; token_ids: the tokens behind the keys.
        tail_tokens: of the tail that are wanted.
    """

    identity: KVIdentity
    keys: list[bytes]
    blocks: int
    token_ids: list[int]
    tail_tokens: int

    def tokens(self, held: int) -> int:
        """How many tokens the first ``held`` keys bring."""
        tail = self.tail_tokens if held > self.blocks else 0
        return min(held, self.blocks) * self.identity.block_tokens + tail


@dataclass(frozen=True)
class Archive:
    """Reads and writes the conversations of one model in one tenant.

    A session stands in blocks of one identity, never of both. What is restored of it has the
    codec of what was stored, and is stored under that again.

    Args:
        shape, identity: of the model.
        recent_tokens: as ``MemosCache`` takes it.
        max_tokens:    at most so many first tokens of a session are kept; None: all.
        ttl_s:         how long blocks live from when they were stored; sessions from their last
            turn. None: until they are evicted or deleted.
        adapters: what says which adapters a forward pass computes with: its caches refuse others
            than those that ``identity`` was made under.
        restorable: how many of these first tokens may be restored; None: all.
        pools: a pool of blocks on the device of the model, for those that are restored often.
            What the store has forgotten is wiped from it before the next is restored.
        cold: the same identity with the codec of sessions that were compressed; None: there are
            none.
    """

    tenant: Tenant
    shape: ModelShape
    identity: KVIdentity
    recent_tokens: int = 64
    max_tokens: int | None = None
    ttl_s: float | None = None
    clock: Callable[[], float] = time.time
    adapters: Callable[[], str] | None = None
    restorable: Callable[[list[int]], int] | None = None
    pools: PoolOnDemand | None = None
    cold: KVIdentity | None = None

    def of_digest(self, digest: bytes) -> KVIdentity | None:
        """The identity of a session, where it is one of these."""
        known = (self.identity,) if self.cold is None else (self.identity, self.cold)
        return next((one for one in known if one.digest == digest), None)

    def of_cache(self, cache: MemosCache) -> KVIdentity:
        """The identity under which a cache is stored: that of its codec."""
        cold = self.cold
        return cold if cold is not None and cache.codec.name == cold.codec else self.identity

    def new_cache(self, identity: KVIdentity | None = None) -> MemosCache:
        """An empty cache whose blocks can be stored, by default in the main codec."""
        identity = identity or self.identity
        cache = MemosCache(
            self.shape,
            identity.codec,
            block_tokens=identity.block_tokens,
            sink_tokens=identity.sink_tokens,
            recent_tokens=self.recent_tokens,
            window_history=True,
        )
        if self.adapters is not None:
            cache.computed_under(self.adapters)
        return cache

    def restore(
        self, ids: list[int], session: Session | None, device: torch.device | str
    ) -> Restored:
        """The longest prefix of ``ids`` that the store holds and that passes every check.

        Whole blocks of anyone in the tenant, then the exact tail of ``session`` as far as its
        tokens agree. Of two identities the one that has more tokens; of equal many that of the
        session, else the main one.
        """
        ids = ids[: self._limit(len(ids))]
        if self.restorable is not None:
            ids = ids[: self.restorable(ids)]
        found = self._prefix(ids, session, self.identity)
        if self.cold is not None:
            other = self._prefix(ids, session, self.cold)
            both = [found, other]
            if session is not None and session.identity == self.cold.digest:
                both.reverse()
            found = max(both, key=lambda one: one.tokens(self.tenant.contains(one.keys)))
        identity, n, P = found.identity, found.blocks, found.identity.block_tokens
        cache = self.new_cache(identity)
        payloads = self.tenant.get(found.keys, identity, found.token_ids)
        tail = payloads[n] if len(payloads) > n else None
        blocks = payloads[:n]
        pool = self.pools(self.identity, device) if self.pools is not None else None
        if pool is not None:
            pool.drop_unless(lambda key: self.tenant.contains([key]) == 1)
        if identity is not self.identity:
            pool = None  # it is for blocks of the main codec: what is hardly used has none
        keys = found.keys[: len(blocks)]
        pooled = pool is not None and 0 < len(blocks) == pool.contains(keys)
        load_cache(cache, blocks, tail, identity, device, pool, keys)
        tail_tokens = 0 if tail is None else found.tail_tokens
        if tail is not None:
            cache.crop(n * P + tail_tokens - cache.get_seq_length())
        cache.token_ids = ids[: cache.get_seq_length()]
        size = sum(len(p) for p in blocks) + identity.tail_bytes(tail_tokens)
        return Restored(cache, cache.get_seq_length(), size, pooled)

    def _prefix(self, ids: list[int], session: Session | None, identity: KVIdentity) -> _Prefix:
        keys, P = self.tenant.block_keys(ids, identity), identity.block_tokens
        if session is not None and session.identity == identity.digest:
            before = len(session.token_ids) // P
            shared = common_prefix(ids, session.token_ids)
            has_tail = len(session.keys) == before + 1
            if has_tail and shared > before * P and self.tenant.contains(keys) <= before:
                tail_tokens = shared - before * P
                return _Prefix(identity, session.keys, before, session.token_ids, tail_tokens)
        return _Prefix(identity, keys, len(keys), ids, 0)

    def store(
        self, session_id: str, cache: MemosCache, metadata: dict[str, Any]
    ) -> tuple[Session, int]:
        """Store the known tokens of a cache of one row under a session.

        Blocks that are stored already are not touched; only tokens with certain ids, and blocks
        that were packed once from exact numbers, are stored.

        Returns:
            The session, and how many blocks were new.

        Raises:
            ArgumentError: the cache is not of this model or codec.
            StoreError, QuotaError: as ``Tenant.put``; the session stays as it was.
        """
        identity, P, tenant = self.of_cache(cache), self.identity.block_tokens, self.tenant
        known = self._limit(cache.known_tokens, cache.get_seq_length())
        ids = cache.token_ids[:known]
        keys, entries, tail = tenant.block_keys(ids, identity), [], []
        if known:
            self.check(cache)
            have = tenant.contains(keys)
            storable = min(layer.storable_tokens(have) for layer in cache.stored_layers)
            n = max(have, min(len(keys), storable // P))
            exact_from = max(layer.num_packed for layer in cache.stored_layers) * P
            with_tail = n == len(keys) and storable >= known > n * P >= exact_from
            for i, payload in enumerate(block_payloads(cache, have, n), start=have):
                parent = keys[i - 1] if i else ZERO_KEY
                entries.append(Entry(keys[i], parent, ids[i * P : (i + 1) * P], i, payload))
            keys = keys[:n]
            ids = ids[: known if with_tail else n * P]
            if rest := ids[n * P :]:
                parent = keys[-1] if keys else ZERO_KEY
                tail = [tenant.tail_key(rest, parent, identity)]
                payload = tail_payload(cache, n * P, len(rest))
                entries.append(Entry(tail[0], parent, rest, n, payload, tail=True))
        before = tenant.session(session_id)
        outdated = self._outdated(before, identity)
        new = tenant.put(entries, identity, ttl_s=self.ttl_s) if entries else 0
        session = tenant.save_session(
            Session(
                id=session_id,
                token_ids=ids,
                identity=identity.digest,
                keys=keys + tail,
                metadata=metadata,
                created_at=before.created_at if before else 0.0,
                expires_at=None if self.ttl_s is None else self.clock() + self.ttl_s,
                pinned=before.pinned if before else False,
            ),
            also=outdated,
        )
        if outdated:
            tenant.give_up(session_id, outdated)
        if before is not None and (old := self._tail_of(before)) and old not in tail:
            tenant.delete([old])
        return session, new

    def check(self, cache: MemosCache) -> None:
        """Raise ArgumentError unless this cache can be stored here."""
        identity = self.of_cache(cache)
        wanted = [identity.codec, identity.block_tokens]
        got = [cache.codec.name, cache.block_tokens]
        if not cache.codec.lossless:
            wanted.append(identity.sink_tokens)
            got.append(cache.sink_tokens)
        if got != wanted:
            raise ArgumentError(
                f"cache: [codec, block_tokens, sink_tokens] {wanted} wanted as in this memory, "
                f"got {got}"
            )
        for i, layer in enumerate(cache.stored_layers):
            if not isinstance(layer, MemosLayer):
                raise ArgumentError(
                    f"cache: window_history=True wanted, got a {type(layer).__name__} in layer "
                    f"{i}, which drops what leaves its window"
                )
        check_cache(cache, identity)

    def stored_bytes(self, session: Session) -> int:
        """Bytes of the payloads of a session's blocks and tail."""
        identity = self.of_digest(session.identity) or self.identity
        P, n = identity.block_tokens, len(session.token_ids)
        blocks = sum(identity.payload_bytes(i) for i in range(n // P))
        return blocks + identity.tail_bytes(n % P)

    def _outdated(self, before: Session | None, identity: KVIdentity) -> set[bytes]:
        """Keys of a session that go when it is stored under ``identity``: all of those of the
        other one, and what a compression left that was cut off."""
        if before is None or self.cold is None:
            return set()
        found = self.tenant.claimed(before)
        if before.identity != identity.digest and self.of_digest(before.identity) is not None:
            found.update(before.keys)
        return found

    def _tail_of(self, session: Session) -> bytes | None:
        n = len(session.token_ids) // self.identity.block_tokens
        return session.keys[n] if len(session.keys) > n else None

    def _limit(self, tokens: int, length: int | None = None) -> int:
        """How many of so many tokens may be stored or restored.

        Where RoPE depends on the length of the sequence, none of a sequence beyond the limit.
        """
        limit = self.shape.max_tokens
        if limit is not None and max(tokens, length or 0) > limit:
            return 0
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)


class Turn:
    """One turn: ``model.generate(**turn.inputs)``, then ``turn.commit(output)``.

    Attributes:
        session:       the session's id.
        token_ids:     the whole prompt.
        reused_tokens: how many of them came from the store.
        stored_bytes, raw_bytes: of the reused tokens: as stored, and as the model makes them;
            after ``commit`` of all tokens that the session keeps.
        from_device:   whether all reused blocks were on the model's device already.
        stored_tokens, new_blocks: after ``commit``: tokens kept, blocks and tails newly written.

    Not thread-safe; different turns are independent.
    """

    def __init__(
        self,
        archive: Archive,
        session: str,
        token_ids: list[int],
        *,
        batch: int = 1,
        metadata: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.session, self.token_ids, self.batch = session, token_ids, batch
        self._archive, self._device = archive, device
        before = archive.tenant.session(session)
        self._metadata = {"user_id": session, **(before.metadata if before else {})}
        self._metadata.update(metadata or {})
        restored = archive.restore(token_ids, before, device)
        self._start = restored.cache
        self._start.inputs(token_ids)  # one token less than the prompt at most
        self.reused_tokens = self._start.get_seq_length()
        self.stored_bytes = restored.stored_bytes
        self.from_device = restored.from_device
        self.raw_bytes = self.reused_tokens * archive.shape.token_bytes()
        self.stored_tokens = self.new_blocks = 0
        self.on_commit: Callable[[Turn], object] | None = None
        self._given: dict[str, Any] | None = None
        self._used: MemosCache | None = None
        self._outputs: dict[tuple[MemosCache, int], list[int]] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """generate's arguments: input_ids and attention_mask [1, n], past_key_values.

        Pass them unchanged, with whatever else generate takes: sampling, prefill_chunk_size, a
        streamer. For num_return_sequences=n or num_beams=n begin with ``batch=n``. After one
        generate the next access makes fresh ones, so that a turn can be tried again.
        """
        if self._given is None or self._is_used(self._given["past_key_values"]):
            if self._given is not None:
                self._used = self._given["past_key_values"]
            cache = self._start.copy()
            inputs = cache.inputs(torch.tensor(self.token_ids, device=self._device))
            if self.batch > 1:
                inputs["past_key_values"] = cache.repeated(self.batch)
            self._given = inputs
        return dict(self._given)

    @property
    def cache(self) -> MemosCache:
        """The cache that the last generate filled, or that the next one will fill."""
        given: MemosCache = (self._given or self.inputs)["past_key_values"]
        return given if self._used is None or self._is_used(given) else self._used

    def _is_used(self, cache: MemosCache) -> bool:
        return bool(cache.get_seq_length() != self.reused_tokens)

    @traced("memos.kv.commit", lambda session: {"memos.tokens": len(session.token_ids)})
    def commit(
        self, output: Any = None, *, row: int = 0, metadata: dict[str, Any] | None = None
    ) -> Session:
        """Store the blocks that are new and make this the session's state.

        Args:
            output: what generate returned: its tensor [batch, n] or its ModelOutput. Without it
                only the prompt is stored. After a beam search only the prompt is stored too: the
                rows of the cache are no longer those of the output.
            row: which of the returned sequences goes on (num_return_sequences).
            metadata: items to add to the session's; JSON.

        Returns:
            The session as it is stored now.

        Raises:
            ArgumentError: the output is not of this turn.
            StoreError, QuotaError: the store cannot take it; the session stays as it was.
        """
        cache = self.cache
        batch = max(cache.batch_size, 1)
        if not 0 <= row < batch:
            raise ArgumentError(f"row: 0 to {batch - 1} wanted, got {row}")
        one = cache.row(row) if batch > 1 else cache.copy()
        if output is not None:
            self._outputs[cache, row] = self._sequence(output, row, cache)
        if not cache.is_mixed and (cache, row) in self._outputs:
            one.set_tokens(self._outputs[cache, row])
        self._metadata.update({k: v for k, v in (metadata or {}).items() if k != LIST})
        archive = self._archive
        session, self.new_blocks = archive.store(self.session, one, self._metadata)
        self.stored_tokens = len(session.token_ids)
        self.stored_bytes = archive.stored_bytes(session)
        self.raw_bytes = self.stored_tokens * archive.shape.token_bytes()
        if self.on_commit is not None:
            self.on_commit(self)
        return session

    def _sequence(self, output: Any, row: int, cache: MemosCache) -> list[int]:
        """The ids of a row of what generate returned, the prompt first."""
        sequences = getattr(output, "sequences", output)
        if hasattr(sequences, "dim") and sequences.dim() == 2:
            if cache.is_mixed:  # beams: the best sequences, of whichever row
                sequences = sequences[0]
            elif len(sequences) != max(cache.batch_size, 1):
                raise ArgumentError(
                    f"output: all {cache.batch_size} rows that generate returned wanted, got "
                    f"{len(sequences)}; choose one with row="
                )
            else:
                sequences = sequences[row]
        ids = token_list(sequences)
        if (same := common_prefix(self.token_ids, ids)) < len(self.token_ids):
            raise ArgumentError(
                "output: the prompt and then the new tokens wanted, as generate returns them; got "
                f"{len(ids)} ids that leave the prompt of {len(self.token_ids)} at {same}"
            )
        return ids
