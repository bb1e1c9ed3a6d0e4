"""KVCacheMemory: conversations whose KV caches survive, compressed and verified."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube, Version
from memos.errors import ArgumentError, NotFoundError
from memos.kernels.codec import Codec
from memos.kv.sessions import LIST, Session
from memos.kv.store import KVStore
from memos.memories import kv_rights
from memos.memories.kv_inside import KVInside, checked
from memos.memories.kv_pieces import KVPieces
from memos.tracing import traced

if TYPE_CHECKING:
    from memos.kv._crypto import Wraps
    from memos.kv.device_pools import PoolOnDemand
    from memos.kv.identity import KVIdentity
    from memos.kv.tenant import Tenant
    from memos.kv.turn import Turn


def _begun(turn: Turn) -> dict[str, Any]:
    """Of a turn, for its span."""
    return {"memos.tokens": len(turn.token_ids), "memos.tokens.reused": turn.reused_tokens}


class KVCacheMemory(KVInside, KVPieces):
    """Activation memory: the KV caches of conversations with one model.

    What a chat application calls, every turn with the whole conversation's ids::

        turn = kv.begin("session-7", token_ids, user="ann")   # longest verified prefix restored
        output = model.generate(**turn.inputs, max_new_tokens=200)
        turn.commit(output)                                   # only the new blocks are stored

    Never wrong, only a miss: a block is used only for the same tokens from the first one on, the
    same weights, adapters, config, dtype and codec, in the same tenant, and when its bytes pass
    every check. Prefixes that sessions share are stored once.

    What it cannot see: a model that computes otherwise with the same weights and config (a
    patched forward, dropout in training mode), and, when only ``model_config`` is given, other
    weights of the same config: so a folder then wants ``revision``.

    Args:
        name, description: of the memory.
        model_config:   a transformers config, or a dict with hidden_size, num_attention_heads,
            num_layers (and num_key_value_heads, head_dim, dtype, vocab_size, sliding_window).
        model:          the model itself: its weights become part of every key, and changed
            weights or adapters make other keys. Wanted for the prefix of one process to be
            valid in another without ``revision``.
        tokenizer:      if given, its vocabulary becomes part of every key.
        path:           a folder; None keeps everything in this process.
        store:          a KVStore to use instead of opening ``path``; not closed by ``close``.
        tenant:         whose blocks: nothing is shared between tenants.
        codec:          how the past is packed: raw, int8, int4, int2, fp8, ... (see Codec).
        cold_codec:     a smaller one for sessions that are hardly used, see ``compress``; a
            scheduler compresses them by it before it drops any. None: no session changes.
        max_cache_size: at most so many tokens of a session are kept, the first ones; the rest
            is computed again. None: all.
        block_tokens, sink_tokens, recent_tokens: as ``MemosCache`` takes them.
        host_bytes, disk_bytes, policy, encryption_key, mode, durable, clock: as ``KVStore``.
        revision:       a name for the weights, part of every key.
        ttl_s:          seconds that a block lives from when it was stored, and a session from its
            last turn.
        device:         where restored caches go; default: the model's device.
        device_bytes:   of that device, for blocks that are restored often.

    Thread-safe, as far as each thread has its own turns and caches.

    Raises:
        ArgumentError: an argument is out of contract, or the model's layers have no K and V.
        StoreError, StoreLockedError: the folder cannot be used.
    """

    kind = "kv_cache"

    def __init__(
        self,
        name: str,
        model_config: Any = None,
        *,
        model: Any = None,
        tokenizer: Any = None,
        description: str = "",
        path: str | os.PathLike[str] | None = None,
        store: KVStore | None = None,
        tenant: str = "default",
        codec: str | Codec = "int4",
        cold_codec: str | Codec | None = None,
        max_cache_size: int | None = None,
        block_tokens: int = 64,
        sink_tokens: int = 2,
        recent_tokens: int = 64,
        host_bytes: int = 1 << 30,
        disk_bytes: int = 16 << 30,
        policy: str = "lru",
        encryption_key: bytes | Wraps | None = None,
        mode: str = "rw",
        durable: bool = True,
        revision: str = "",
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
        device: Any = None,
        device_bytes: int = 0,
    ) -> None:
        from memos.kv.cache import MemosCache
        from memos.kv.device_pools import PoolOnDemand
        from memos.kv.model import shape_of, shape_of_model, tokenizer_digest

        if not isinstance(name, str) or not name:
            raise ArgumentError(f"name: a string that is not empty wanted, got {name!r}")
        if (model is None) == (model_config is None):
            raise ArgumentError("model, model_config: exactly one of them wanted")
        if store is not None and path is not None:
            raise ArgumentError("path, store: at most one of them wanted")
        if max_cache_size is not None and (type(max_cache_size) is not int or max_cache_size < 1):
            raise ArgumentError(
                f"max_cache_size: a number of tokens, at least 1, wanted, got {max_cache_size!r}"
            )
        if ttl_s is not None and ttl_s <= 0:
            raise ArgumentError(f"ttl_s: seconds above 0 wanted, got {ttl_s}")
        kept = path is not None or (store is not None and store.path is not None)
        if model is None and kept and not revision:
            raise ArgumentError(
                "revision: a name for the weights wanted, since model_config alone does not tell "
                "two models of one config apart; or pass model="
            )
        self.name, self.description = name, description
        self.max_cache_size, self.ttl_s = max_cache_size, ttl_s
        self._model, self._config, self._device = model, model_config, device
        self._pools = PoolOnDemand(device_bytes)
        self._shape = shape_of(model_config) if model is None else shape_of_model(model)
        self._recent_tokens, self._clock = recent_tokens, clock
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {
            "codec": Codec.parse(codec),
            "block_tokens": block_tokens,
            "sink_tokens": sink_tokens,
            "tokenizer": tokenizer_digest(tokenizer),
            "revision": revision,
        }
        MemosCache(  # refuses what it cannot hold, before a folder is made
            self._shape,
            codec,
            block_tokens=block_tokens,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        )
        self._lock = threading.Lock()
        self._has_looked = not self._shape.assumed or not kept
        self._cold = None if cold_codec is None else Codec.parse(cold_codec)
        identity = self._identity()
        if (cold := self._cold_of(identity)) is not None:
            from memos.kv.recompress import check_smaller

            check_smaller(identity, cold)
        self._owns_store = store is None
        self.store = store or KVStore(
            None if path is None else os.fspath(path),
            mode=mode,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            policy=policy,
            encryption_key=encryption_key,
            clock=clock,
            durable=durable,
        )
        self._tenant = self.store.tenant(tenant)
        self.observer: Any = None  # told of what is read and written
        self.meter: Any = None  # told of turns and how long what was stored took to come back

    def __enter__(self) -> KVCacheMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # A chat application.

    @traced("memos.kv.begin", _begun)
    def begin(
        self,
        session: str,
        token_ids: Any,
        *,
        batch: int = 1,
        user: str | None = None,
        metadata: dict[str, Any] | None = None,
        acl: Any = None,
    ) -> Turn:
        """Begin a turn: restore the longest verified prefix of the prompt.

        Args:
            session:   id of the conversation; new or known.
            token_ids: the whole prompt, all turns so far: a list, or a tensor [n] or [1, n].
            batch:     rows that generate will run: max(num_beams, num_return_sequences).
            user:      whose session it is, for ``retrieve("user:ID")``; default: the session.
            metadata:  JSON items to keep with the session.
            acl:       of a new session: who has rights on it, as ``mos.add`` takes it.

        Returns:
            A Turn: ``model.generate(**turn.inputs, ...)``, then ``turn.commit(output)``.

        Raises:
            ArgumentError: no tokens, ids outside the vocabulary, or ids that stand for an image
                or sound, whose K and V the ids do not determine.
            AccessError: the principal may not write the session, or the memory for a new one.

        Cost: with 64 blocks of 30 layers restored a few milliseconds, the reading of the blocks
            included; they are unpacked in the forward pass.
        """
        from memos.kv.cache import token_list
        from memos.kv.turn import Turn

        if not isinstance(session, str) or not session:
            raise ArgumentError(f"session: a string that is not empty wanted, got {session!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ArgumentError(f"batch: at least 1 wanted, got {batch!r}")
        ids = token_list(token_ids)
        if not ids:
            raise ArgumentError("token_ids: at least one token wanted, got none")
        self._check_ids(ids)
        known = self._tenant.session(session)
        kv_rights.check(self.name, "write", known)
        items = dict(checked(metadata), **({} if user is None else {"user_id": user}))
        items |= kv_rights.listed(acl) if known is None else {}
        device = self._device_of(token_ids)
        self._tell(session, "begin")
        start = time.perf_counter()
        turn = Turn(self._archive(), session, ids, batch=batch, metadata=items, device=device)
        if self.meter is not None:
            self.meter.begun(turn, time.perf_counter() - start)
        return turn

    # The memory, as every memory.

    def add(
        self,
        content: Any,
        metadata: dict[str, Any] | None = None,
        *,
        id: str | None = None,
        acl: Any = None,
    ) -> MemCube:
        """Store a cache under a new session.

        Args:
            content:  a MemosCache that knows its tokens, or {"token_ids": ids, "cache": cache} with
                any exact transformers cache of one row and the ids it was fed (generate's
                returned sequence), or a Turn (which is committed).
            metadata: JSON; "user_id" makes ``retrieve("user:ID")`` find it.
            id:       of the session; default: a new one.
            acl:      who has rights on it; default: who has them on the memory.

        Returns:
            The cube as ``retrieve`` gives it.

        Raises:
            ArgumentError: a cache without token ids, of another model, or an id that exists.
            AccessError: the principal may not write this memory.
        """
        from memos.kv.turn import Turn

        kv_rights.check(self.name, "write", None)

        if isinstance(content, Turn):
            if id not in (None, content.session):
                raise ArgumentError(f"id: {content.session!r} wanted as the turn has, got {id!r}")
            return self._cube(content.commit(metadata=checked(metadata)))
        if id is not None and self._tenant.session(id) is not None:
            raise ArgumentError(f"id: a new one wanted, got {id!r}, which exists; use update")
        items = {**checked(metadata), **kv_rights.listed(acl)}
        return self._save(id or uuid.uuid4().hex, content, items)

    def retrieve(
        self, query: Any, limit: int = 5, *, filters: dict[str, Any] | None = None
    ) -> list[MemCube]:
        """Sessions with their caches, newest first.

        Args:
            query:   "user:ID", "session:ID", or token ids: what is stored of their beginning.
            limit:   at most so many.
            filters: metadata items that must be equal.

        Returns:
            Cubes whose content is a MemosCache of their own: changing it changes nothing that is
            stored. Continue with ``content.inputs(full_ids)``. Empty on a miss.
        """
        if limit < 0:
            raise ArgumentError(f"limit: at least 0 wanted, got {limit}")
        if not isinstance(query, str):
            return self._prefix(query)[:limit]
        kind, _, name = query.partition(":")
        if kind not in ("user", "session") or not name:
            raise ArgumentError(
                f"query: 'user:ID', 'session:ID' or token ids wanted, got {query!r}"
            )
        wanted = dict(filters or {})
        for key, value in wanted.items():
            if key.startswith("$") or isinstance(value, dict):
                raise ArgumentError(
                    f"filters: memory {self.name!r} compares items for equality, got "
                    f"{key!r}: {value!r}"
                )
        if kind == "user":
            sessions = self._tenant.sessions(**{**wanted, "user_id": name})
        else:
            found = self._tenant.session(name)
            sessions = [found] if found and wanted.items() <= found.metadata.items() else []
        sessions = kv_rights.seen(self.name, sessions)
        cubes: list[MemCube] = []
        for session in sessions:
            if len(cubes) == limit:
                break
            cube = self._cube(session)
            if cube.metadata["tokens"]:
                cubes.append(cube)
        return cubes

    def get(self, memory_id: str) -> MemCube:
        """The session of this id with its cache. Raises NotFoundError."""
        return self._cube(self._session(memory_id))

    def has(self, memory_id: str) -> bool:
        """Whether there is such a session."""
        session = self._tenant.session(memory_id)
        return session is not None and kv_rights.may(self.name, "read", session)

    def shows_any(self) -> bool:
        """Whether there is a session that whoever acts may read."""
        return bool(kv_rights.seen(self.name, self._tenant.sessions()))

    def list_of(self, memory_id: str) -> dict[str, Any] | None:
        """Who has rights on a session; None: who has them on the memory. Raises NotFoundError."""
        session = self._tenant.session(memory_id)
        if session is None:
            raise NotFoundError(f"memory {self.name!r}: no session {memory_id!r}")
        found: dict[str, Any] | None = session.metadata.get(LIST)
        return found

    def history(self, memory_id: str) -> list[Version]:
        """One entry: a cache replaces the one before. Raises NotFoundError."""
        session = self._session(memory_id)
        return [
            Version(
                number=1,
                content=None,
                metadata=kv_rights.without_list(session.metadata),
                state="CREATED",
                importance=0.5,
                author=None,
                source=None,
                at=session.updated_at,
                digest=b"".join(session.keys[-1:]).hex(),
            )
        ]

    def _session(self, memory_id: str) -> Session:
        session = self._tenant.session(memory_id)
        if session is None or not kv_rights.may(self.name, "read", session):
            raise NotFoundError(f"memory {self.name!r}: no session {memory_id!r}")
        return session

    def update(
        self,
        memory_id: str,
        content: Any = None,
        metadata: dict[str, Any] | None = None,
        *,
        acl: Any = None,
        author: str | None = None,
    ) -> MemCube:
        """Replace a session's cache, add metadata items, or change who has rights on it.

        Raises NotFoundError, AccessError. ``author`` is not kept: a cache has no versions.
        """
        session = self._session(memory_id)
        kv_rights.check(self.name, "write" if acl is None else "admin", session)
        items = {**session.metadata, **checked(metadata), **kv_rights.listed(acl)}
        self._tell(memory_id, "write")
        if content is None:
            return self._cube(
                self._tenant.save_session(dataclasses.replace(session, metadata=items))
            )
        return self._save(memory_id, content, items)

    def delete(self, memory_id: str) -> None:
        """Remove a session, and its blocks that no other session uses. Raises NotFoundError."""
        if kv_rights.actor() is not None:
            kv_rights.check(self.name, "write", self._session(memory_id))
        self._tell(memory_id, "delete")
        self._tenant.delete_session(memory_id)

    def compress(self, memory_id: str, *, cancelled: Callable[[], bool] = lambda: False) -> int:
        """Encode a session again by ``cold_codec``. It stays a session as any other, and stays
        compressed: its next turn goes on in that codec.

        Every token can still be reused, with what the smaller codec loses on top of what was
        lost; the exact first and last tokens stay exact. Whenever the process ends meanwhile the
        session is there whole, in the old codec or in the new one. Pinned sessions are compressed
        too: a scheduler leaves them alone.

        Args:
            cancelled: looked at now and then; when it is True the session stays as it was.

        Returns:
            Bytes that are stored less now: 0 where it is compressed already; below 0 where the
            old blocks stay because other sessions use them.

        Raises:
            ArgumentError: the memory has no cold_codec, or the session is of another model.
            NotFoundError, AccessError.
            StoreError, QuotaError: a block is missing or damaged, or there is no room for both
                codecs at once; the session stays as it was.

        Cost: reads, decodes and writes every block of the session once.
        """
        from memos.kv.recompress import compress

        if kv_rights.actor() is not None:
            kv_rights.check(self.name, "write", self._session(memory_id))
        archive = self._archive()
        if archive.cold is None:
            raise ArgumentError(f"memory {self.name!r}: one made with cold_codec= wanted")
        saved = compress(archive.tenant, memory_id, archive.identity, archive.cold, cancelled)
        return saved or 0

    def sessions(self) -> list[str]:
        """Ids of all sessions that may be read, newest first."""
        found = kv_rights.seen(self.name, self._tenant.sessions())
        return [session.id for session in found]

    def clear(self) -> int:
        """Remove every session, all that is activated and every block of the tenant; returns how
        many blocks."""
        return self._tenant.clear() + self.clear_pieces()

    def pin(self, memory_id: str, pinned: bool = True) -> None:
        """While a session is pinned its blocks are never evicted. Raises NotFoundError."""
        if kv_rights.actor() is not None:
            kv_rights.check(self.name, "write", self._session(memory_id))
        self._tenant.pin(memory_id, pinned)

    def stats(self) -> dict[str, Any]:
        """The store's figures; to a principal how many sessions it may read."""
        if kv_rights.actor() is not None:
            return {"sessions": len(kv_rights.seen(self.name, self._tenant.sessions()))}
        return self.store.stats()

    def close(self) -> None:
        """Close the store, unless it was given."""
        if self._owns_store:
            self.store.close()

    # Files.

    @property
    def tenant(self) -> Tenant:
        """Where the sessions and blocks stand."""
        return self._tenant

    @property
    def pools(self) -> PoolOnDemand:
        """What stands on the model's device, and its budget."""
        return self._pools

    @property
    def identity(self) -> KVIdentity:
        """What the blocks of this memory are made for, as of now."""
        return self._archive().identity

    @property
    def cold_identity(self) -> KVIdentity | None:
        """What compressed blocks of this memory are made for; None without ``cold_codec``."""
        return None if self._cold is None else self._archive().cold

    def text_of(self, token_ids: Sequence[int]) -> str | None:
        """What tokens say; None where this memory has no tokenizer that knows."""
        if not hasattr(self._tokenizer, "decode"):
            return None
        return str(self._tokenizer.decode(list(token_ids)))
