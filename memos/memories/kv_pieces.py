"""Activated memories: their KV, prefilled once, kept in a KVCacheMemory and composed into prompts.

Pieces stand in a tenant of their own beside that of the conversations: no session lists them, and
their keys are bound to the model, the system prompt they were prefilled behind, their tokens and
the codec. What was activated of a text is used for the same text only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError, NotFoundError, QuotaError, StoreError

if TYPE_CHECKING:
    from memos.kv.compose import Composed
    from memos.kv.compose_curve import Curve
    from memos.kv.pieces import AnyPiece, Piece, Prefiller, StoredPiece
    from memos.kv.store import KVStore
    from memos.kv.tenant import Tenant
    from memos.kv.turn import Archive

_SUFFIX = " (pieces)"  # of the tenant's name
_CURVE = "curve"
_SYSTEMS = 4  # system prompts whose K and V stay at hand


@dataclasses.dataclass(frozen=True)
class Text:
    """A memory to activate or to compose: its tokens, and the cube that says so, if one does."""

    token_ids: tuple[int, ...]
    cube: str | None = None
    memory: str | None = None
    version: int = 0


class KVPieces:
    """Part of KVCacheMemory."""

    name: str
    store: KVStore
    _tenant: Tenant
    _lock: threading.Lock
    _model: Any
    _tokenizer: Any
    _options: dict[str, Any]
    _archive: Any
    _check_ids: Any

    def activate(self, memories: Iterable[Any], *, system: Any = "") -> int:
        """Prefill memories once and keep their KV: ``compose`` then needs no prefill of them.

        The KV of earlier versions of a cube is removed.

        Args:
            memories: cubes, texts, or lists of token ids.
            system:   the prompt they will stand behind: a text or token ids.

        Returns:
            How many had to be prefilled; the others were activated already.

        Raises:
            ArgumentError: this memory was made without model=, or without a tokenizer that makes
                tokens of texts; or the model's keys cannot be moved.
            StoreError, QuotaError: the store cannot take them.
        """
        from memos.kv.pieces import StoredPiece

        texts = [self.text(memory) for memory in memories]
        maker = self._maker()
        lead = self._lead(maker, self.tokens_of(system), not self.store.readonly)
        made = 0
        for text in texts:
            piece = self._piece(maker, lead, text)
            if not isinstance(piece, StoredPiece):
                self._keep(lead.token_ids, text, piece)
                made += 1
        return made

    def is_activated(self, memory: Any, *, system: Any = "") -> bool:
        """Whether ``compose`` finds this memory activated as it is now."""
        text, archive = self.text(memory), self._pieces(self.tokens_of(system))
        if archive is None:
            return False
        session = archive.tenant.session(_id(text, archive))
        return session is not None and archive.tenant.contains(session.keys) == len(session.keys)

    def deactivate(self, cube: str, memory: str | None = None) -> int:
        """Remove the KV of a cube, of all its contents; returns how many pieces there were."""
        tenant = self._pieces_tenant()
        if tenant is None:
            return 0
        wanted = {"cube": cube} if memory is None else {"cube": cube, "memory": memory}
        found = tenant.sessions(**wanted)
        for session in found:
            tenant.delete_session(session.id)
        return len(found)

    def activated(self) -> list[tuple[str, str]]:
        """(memory, cube) of all that is activated."""
        tenant = self._pieces_tenant()
        found = [] if tenant is None else tenant.sessions()
        names = [(s.metadata.get("memory"), s.metadata.get("cube")) for s in found]
        return sorted({(m or "", c) for m, c in names if c is not None})

    def compose(
        self,
        system: Any,
        memories: Sequence[Any],
        question_tokens: Any = (),
        *,
        share: float | None = None,
        first_tokens: int | None = None,
        max_kl: float | None = None,
        store: bool = True,
    ) -> Composed:
        """One cache of a system prompt, memories in this order, and a question.

        Memories that are activated are not prefilled; the others are, once. See
        ``memos.kv.compose.compose`` for what is computed anew, and what that gives.

        Args:
            system:          a text or token ids.
            memories:        cubes, texts, or lists of token ids.
            question_tokens: a text or token ids.
            share, first_tokens, max_kl: how much is computed anew; ``max_kl`` wants a curve, see
                ``calibrate``.
            store:           keep what had to be prefilled.

        Returns:
            ``model.generate(**composed.inputs)`` answers.

        Raises:
            ArgumentError: as ``activate``, or a number is out of range.
        """
        from memos.kv.compose import compose
        from memos.kv.pieces import StoredPiece

        maker = self._maker()
        store = store and not self.store.readonly
        lead = self._lead(maker, self.tokens_of(system), store)
        pieces = []
        for text in map(self.text, memories):
            piece = self._piece(maker, lead, text)
            if store and not isinstance(piece, StoredPiece):
                with contextlib.suppress(QuotaError):  # then it is prefilled again next time
                    self._keep(lead.token_ids, text, piece)
            pieces.append(piece)
        return compose(
            maker,
            lead,
            pieces,
            self.tokens_of(question_tokens, special=False),
            share=share,
            first_tokens=first_tokens,
            max_kl=max_kl,
            curve=self.curve,
        )

    def calibrate(self, documents: Iterable[Any], *, system: Any = "", **options: Any) -> Curve:
        """Measure, once, what composing costs this model; the curve is kept with the pieces.

        Args:
            documents: texts or token ids, see ``memos.kv.compose_curve.calibrate``; options too.
        """
        from memos.kv.compose_curve import calibrate
        from memos.kv.sessions import Session

        maker = self._maker()
        ids = [self.tokens_of(document, special=False) for document in documents]
        curve = calibrate(maker, self.tokens_of(system), ids, **options)
        archive = self._pieces([])
        if archive is not None:
            kept = Session(
                id=f"{_CURVE}/{archive.identity.digest.hex()}",
                token_ids=[],
                identity=archive.identity.digest,
                keys=[],
                metadata={_CURVE: [list(point) for point in curve.points]},
            )
            archive.tenant.save_session(kept)
        return curve

    @property
    def curve(self) -> Curve | None:
        """What KL to expect of a share, as ``calibrate`` measured it for this model; else None."""
        from memos.kv.compose_curve import Curve

        archive = self._pieces([])
        if archive is None:
            return None
        kept = archive.tenant.session(f"{_CURVE}/{archive.identity.digest.hex()}")
        if kept is None:
            return None
        return Curve(tuple((share, kl) for share, kl in kept.metadata[_CURVE]))

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of texts; None where it was not given."""
        return self._tokenizer

    def clear_pieces(self) -> int:
        """Remove all that is activated; returns how many blocks."""
        tenant = self._pieces_tenant()
        return 0 if tenant is None else tenant.clear()

    def text(self, memory: Any) -> Text:
        """A cube, a text or token ids as tokens."""
        if isinstance(memory, Text):
            return memory
        if not isinstance(memory, MemCube):
            return Text(tuple(self.tokens_of(memory, special=False)))
        if not isinstance(memory.content, str):
            raise ArgumentError(
                f"memory: a cube with a text wanted, got {type(memory.content).__name__} in "
                f"{memory.id!r}"
            )
        ids = self.tokens_of(memory.content, special=False)
        return Text(tuple(ids), memory.id, memory.memory, memory.versions)

    def tokens_of(self, text: Any, special: bool = True) -> list[int]:
        """Token ids of a text; token ids as they are.

        Args:
            special: with the tokens that the tokenizer begins a prompt with.
        """
        from memos.kv.cache import token_list

        if isinstance(text, str) and not text:
            return []
        if isinstance(text, str):
            if not callable(self._tokenizer):
                raise ArgumentError(
                    f"memory {self.name!r}: token ids wanted, got a text; pass tokenizer= for texts"
                )
            text = list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        ids = token_list(text)
        if ids:
            self._check_ids(ids)
        return ids

    # Inside.

    def _maker(self) -> Prefiller:
        from memos.kv.pieces import Prefiller

        if self._model is None:
            raise ArgumentError(f"memory {self.name!r}: one made with model= wanted to compose")
        return Prefiller(self._model, block_tokens=self._options["block_tokens"])

    def _pieces_tenant(self) -> Tenant | None:
        try:
            return self.store.tenant(self._tenant.name + _SUFFIX)
        except NotFoundError:  # a store that only reads, in which nothing was activated
            return None

    def _pieces(self, system: Sequence[int]) -> Archive | None:
        """Reads and writes pieces that stand behind this system prompt."""
        from memos.kv.pieces import GAP

        tenant = self._pieces_tenant()
        if tenant is None:
            return None
        archive = self._archive()
        mark = hashlib.sha256(struct.pack(f"<{len(system)}q", *system)).hexdigest()
        identity = dataclasses.replace(archive.identity, layout=f"hf piece {GAP} {mark}")
        found: Archive = dataclasses.replace(
            archive,
            tenant=tenant,
            identity=identity,
            max_tokens=None,
            restorable=None,
            pools=None,
            cold=None,
        )
        return found

    def _lead(self, maker: Prefiller, system: Sequence[int], store: bool = True) -> Piece:
        """The system prompt: at hand, stored, or prefilled."""
        archive = self._pieces(system)
        if archive is None or not system:
            return maker.system(system)
        with self._lock:
            kept: dict[bytes, Piece] = vars(self).setdefault("_leads", {})
            found = kept.pop(archive.identity.digest, None)
        if found is None:
            exact = dataclasses.replace(
                archive, identity=dataclasses.replace(archive.identity, codec="raw")
            )
            text = Text(tuple(system))
            stored = _restored(exact, text, maker)
            found = maker.system(system) if stored is None else stored.dense()
            if stored is None and store:
                with contextlib.suppress(QuotaError):
                    _keep(exact, text, found)
        with self._lock:
            kept[archive.identity.digest] = found
            for old in list(kept)[:-_SYSTEMS]:
                del kept[old]
        return found

    def _piece(self, maker: Prefiller, lead: Piece, text: Text) -> AnyPiece:
        """A piece: as it is stored, or prefilled now."""
        archive = self._pieces(lead.token_ids)
        stored = None if archive is None else _restored(archive, text, maker)
        return maker.piece(lead, text.token_ids) if stored is None else stored

    def _keep(self, system: Sequence[int], text: Text, piece: Piece) -> None:
        archive = self._pieces(system)
        if archive is None or self.store.readonly:
            raise StoreError(f"memory {self.name!r}: its store only reads")
        _keep(archive, text, piece)


def _id(text: Text, archive: Archive) -> str:
    """Of the session that keeps a piece."""
    said = hashlib.sha256(struct.pack(f"<{len(text.token_ids)}q", *text.token_ids))
    said.update(archive.identity.digest)
    return f"{text.memory or ''}/{text.cube or ''}/{said.hexdigest()}"


def _restored(archive: Archive, text: Text, maker: Prefiller) -> StoredPiece | None:
    """The piece of these tokens, whole, as it is stored; None where any of it is missing."""
    from memos.kv.pieces import StoredPiece

    ids = list(text.token_ids)
    session = archive.tenant.session(_id(text, archive))
    if session is None or session.token_ids != ids:
        return None
    restored = archive.restore(ids, session, maker.device)
    if restored.tokens != len(ids):
        return None
    return StoredPiece(tuple(ids), restored.cache.stored_layers)


def _keep(archive: Archive, text: Text, piece: Piece) -> None:
    """Store a piece, and remove those of earlier versions of its cube."""
    from transformers.cache_utils import DynamicCache

    from memos.kv.cache import MemosCache

    dense = DynamicCache()
    for i, (key, value) in enumerate(zip(piece.keys, piece.values, strict=True)):
        dense.update(key, value, i)
    identity = archive.identity
    cache = MemosCache.from_cache(
        dense,
        archive.shape,
        list(piece.token_ids),
        codec=identity.codec,
        block_tokens=identity.block_tokens,
        sink_tokens=identity.sink_tokens,
        recent_tokens=archive.recent_tokens,
        window_history=True,
    )
    id = _id(text, archive)
    of_cube = {} if text.cube is None else {"cube": text.cube, "memory": text.memory}
    archive.store(id, cache, {**of_cube, "version": text.version})
    for other in archive.tenant.sessions(**of_cube) if of_cube else ():
        if other.metadata.get("version", 0) < text.version:
            archive.tenant.delete_session(other.id)
