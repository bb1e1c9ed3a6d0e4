"""What a KVCacheMemory does inside: identities, cubes of sessions, caches that can be stored."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.cube.identity import adapters_of, canonical
from memos.errors import ArgumentError
from memos.kv.sessions import LEARNT, LIST, Session
from memos.memories import kv_rights

if TYPE_CHECKING:
    from memos.kernels.codec import Codec
    from memos.kv.cache import MemosCache
    from memos.kv.device_pools import BlockPool, PoolOnDemand
    from memos.kv.identity import KVIdentity
    from memos.kv.tenant import Tenant
    from memos.kv.turn import Archive

ON_CUBES = ("tokens", "stored_bytes", "raw_bytes")  # figures that a reader gets with the metadata


class KVInside:
    """Part of KVCacheMemory."""

    kind: str
    name: str
    max_cache_size: int | None
    ttl_s: float | None
    observer: Any
    _clock: Callable[[], float]
    _cold: Codec | None
    _config: Any
    _device: Any
    _has_looked: bool
    _lock: threading.Lock
    _model: Any
    _options: dict[str, Any]
    _pools: PoolOnDemand
    _recent_tokens: int
    _shape: Any
    _tenant: Tenant

    def _current_config(self) -> Any:
        return self._config if self._model is None else self._model.config

    def _device_of(self, token_ids: Any = None) -> Any:
        if self._device is not None:
            return self._device
        return getattr(self._model, "device", None) or getattr(token_ids, "device", None) or "cpu"

    def _identity(self) -> Any:
        from memos.kv.model import identity_of, identity_of_config

        if self._model is not None:
            return identity_of(self._model, **self._options)
        return identity_of_config(self._config, self._shape, **self._options)

    def _archive(self) -> Archive:
        from memos.kv.model import shape_of_model
        from memos.kv.turn import Archive

        with self._lock:
            if not self._has_looked:
                self._has_looked = True
                for session in self._tenant.sessions():
                    if LEARNT in session.metadata:
                        self._shape = self._shape.with_fields(session.metadata[LEARNT])
                        break
            identity = self._identity()
            return Archive(
                tenant=self._tenant,
                shape=self._shape if self._model is None else shape_of_model(self._model),
                identity=identity,
                recent_tokens=self._recent_tokens,
                max_tokens=self.max_cache_size,
                ttl_s=self.ttl_s,
                clock=self._clock,
                adapters=None if self._model is None else partial(adapters_of, self._model),
                restorable=None
                if kv_rights.actor() is None
                else partial(kv_rights.restorable, self.name, self._tenant),
                pools=self._pools,
                cold=self._cold_of(identity),
            )

    def _cold_of(self, identity: KVIdentity) -> KVIdentity | None:
        if self._cold is None:
            return None
        return dataclasses.replace(identity, codec=self._cold.name)

    def device_pool(self, identity: Any) -> BlockPool | None:
        """Where blocks of this identity stand on the model's device; None: nowhere."""
        device = self._device or getattr(self._model, "device", None)
        if device is None:
            made = self._pools.pool
            device = "cpu" if made is None else made.device
        return self._pools(identity, device)

    def _tell(self, id: str, what: str = "read") -> None:
        if self.observer is not None:
            self.observer.used(self.name, {id: 1}, what)

    def _check_ids(self, ids: list[int]) -> None:
        vocab, foreign = self._shape.vocab_size, self._shape.foreign_ids
        if vocab is not None and max(ids) >= vocab:
            raise ArgumentError(f"token_ids: ids below {vocab} wanted, got {max(ids)}")
        if foreign and not foreign.isdisjoint(ids):
            bad = sorted(foreign.intersection(ids))[0]
            raise ArgumentError(
                f"token_ids: text wanted, got {bad}, which stands for an image, video or sound"
            )

    def _prefix(self, token_ids: Any) -> list[MemCube]:
        from memos.kv.cache import token_list

        ids, archive = token_list(token_ids), self._archive()
        restored = archive.restore(ids, None, self._device_of(token_ids))
        if not restored.tokens:
            return []
        self._tell("prefix")
        identity = archive.of_cache(restored.cache)
        key = archive.tenant.block_keys(restored.cache.token_ids, identity)[-1]
        return [self._made(f"prefix:{key.hex()[:16]}", restored, {}, archive)]

    def _cube(self, session: Session) -> MemCube:
        archive = self._archive()
        self._tell(session.id)
        restored = archive.restore(session.token_ids, session, self._device_of())
        return self._made(
            session.id,
            restored,
            {k: v for k, v in session.metadata.items() if k not in (LEARNT, LIST)},
            archive,
            acl=kv_rights.shown_list(self.name, session),
            created_at=session.created_at,
            updated_at=session.updated_at,
        )

    def _made(
        self, id: str, restored: Any, metadata: dict[str, Any], archive: Archive, **fields: Any
    ) -> MemCube:
        figures = (
            restored.tokens,
            restored.stored_bytes,
            restored.tokens * archive.shape.token_bytes(),
        )
        metadata = {**metadata, **dict(zip(ON_CUBES, figures, strict=True))}
        return MemCube(
            id=id,
            kind=self.kind,
            content=restored.cache,
            metadata=metadata,
            memory=self.name,
            **fields,
        )

    def _save(self, id: str, content: Any, metadata: dict[str, Any]) -> MemCube:
        cache = self._cache_of(content)
        if self._shape.assumed:
            metadata[LEARNT] = self._learn(cache)
        session, _ = self._archive().store(id, cache, metadata)
        return self._cube(session)

    def _learn(self, cache: MemosCache) -> dict[str, Any]:
        """Take what was only assumed of the model from a cache of it."""
        from memos.kv.payload import dims_of

        heads, key, value, dtype = dims_of(cache.stored_layers[0])
        fields = {"num_kv_heads": heads, "head_dim_k": key, "head_dim_v": value}
        fields["dtype"] = str(dtype)
        with self._lock:
            self._shape = self._shape.with_fields(fields)
        return {k: v for k, v in fields.items() if k in self._shape.assumed}

    def _cache_of(self, content: Any) -> MemosCache:
        """A cache of one row that knows its tokens and can be stored."""
        from memos.kv.cache import MemosCache, token_list

        ids = None
        if isinstance(content, Mapping):
            if set(content) != {"token_ids", "cache"}:
                raise ArgumentError(
                    f"content: {{'token_ids': ids, 'cache': cache}} wanted, got {sorted(content)}"
                )
            ids, content = token_list(content["token_ids"]), content["cache"]
            self._check_ids(ids or [0])
        if not hasattr(content, "layers"):
            raise ArgumentError(f"content: a Cache wanted, got {type(content).__name__}")
        if ids is None and not (isinstance(content, MemosCache) and content.known_tokens):
            raise ArgumentError(
                f"content: a cache that knows its tokens wanted, got a {type(content).__name__} "
                "without token ids; pass {'token_ids': ids, 'cache': cache}, where ids is the "
                "sequence that generate returned"
            )
        if isinstance(content, MemosCache):
            if content.batch_size > 1:
                raise ArgumentError(f"content: a cache of one row wanted, got {content.batch_size}")
            own: MemosCache = content.copy()
            if ids is not None:
                own.set_tokens(ids)
            if not own.codec.lossless or self._options["codec"].lossless:
                return own
            content, ids = own, own.token_ids
        archive = self._archive()
        made = MemosCache.from_cache(
            content,
            self._current_config(),
            ids,
            codec=archive.identity.codec,
            block_tokens=archive.identity.block_tokens,
            sink_tokens=archive.identity.sink_tokens,
            recent_tokens=self._recent_tokens,
            window_history=True,
        )
        if made.batch_size != 1:
            raise ArgumentError(f"content: a cache of one row wanted, got {made.batch_size}")
        return made


RESERVED = (*ON_CUBES, LEARNT, LIST)


def checked(metadata: dict[str, Any] | None) -> dict[str, Any]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ArgumentError(f"metadata: a dict wanted, got {type(metadata).__name__}")
    canonical(dict(metadata or {}), "metadata")
    return {k: v for k, v in (metadata or {}).items() if k not in RESERVED}
