"""What a scheduler makes of hot texts: their KV, and adapters that have learnt them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memos.errors import ArgumentError

if TYPE_CHECKING:
    from memos.mos import MOS

_LEARN_S = 20.0  # per text, before any was learnt
_PREFILL_S = 1e-3  # per token
_TOKEN_CHARS = 4
JOB = "consolidate"


class Pieces:
    """KV of texts in a KVCacheMemory, as ``mos.activate`` makes it.

    Args:
        kv: its name; it was made with model= and tokenizer=.
    """

    def __init__(self, mos: MOS, kv: str) -> None:
        self._mos, self._kv = mos, kv
        self._memory = mos.memory(kv)
        identity = self._memory.identity
        self._block_bytes, self._block_tokens = identity.payload_bytes(1), identity.block_tokens

    def cost(self, text: str) -> tuple[int, float]:
        tokens = len(text) // _TOKEN_CHARS + 1
        meter = self._memory.meter
        seconds = getattr(getattr(meter, "pace", None), "prompt_s", _PREFILL_S)
        return max(tokens * self._block_bytes // self._block_tokens, 1), tokens * seconds

    def activate(self, memory: str, id: str, cancelled: Callable[[], bool]) -> None:
        if not cancelled():
            self._mos.activate(id, memory, kv=self._kv)

    def deactivate(self, memory: str, id: str) -> None:
        self._mos.deactivate(id, memory, kv=self._kv)


class Learning:
    """Adapters of hot texts, by ``ParametricMemory.learn`` as a job of the store.

    Args:
        into:    the ParametricMemory that gets them.
        model, tokenizer, options: as its ``learn`` takes them.
    """

    def __init__(self, mos: MOS, into: str, model: Any, tokenizer: Any, **options: Any) -> None:
        from memos.lifecycle.jobs import Kind

        self._mos, self._into = mos, into
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._size = 1 << 20
        mos.jobs.register(JOB, Kind(self._plan, self._apply, self._learn))

    def cost(self, num_texts: int) -> tuple[int, float]:
        return self._size, num_texts * _LEARN_S

    def consolidate(self, memory: str, ids: Sequence[str], cancelled: Callable[[], bool]) -> None:
        """Raises ArgumentError where the gate refuses what was learnt."""
        if cancelled():
            return
        jobs = self._mos.jobs
        job = jobs.submit(JOB, memory=memory, ids=sorted(ids))
        jobs.run_until_empty(only=job.id)
        done = jobs.get(job.id)
        if done.error or not done.result.get("learnt"):
            raise ArgumentError(f"consolidate: {done.error or 'the gate refused the adapter'}")

    def _plan(self, arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
        told = "\n".join(arguments["ids"]).encode()
        name = f"{arguments['memory']} {hashlib.sha256(told).hexdigest()[:12]}"
        return [(name, {**arguments, "name": name})]

    def _learn(self, payload: Any) -> Any:
        """Long, and done again after a crash, unless it had come to its end."""
        from memos.errors import NotFoundError

        into = self._mos.memory(self._into)
        try:
            return into.named(payload["name"])
        except NotFoundError:
            pass
        source = self._mos.memory(payload["memory"])
        cubes = []
        for id in payload["ids"]:
            with contextlib.suppress(NotFoundError):  # deleted since it was hot
                cubes.append(source.get(id))
        cube, _ = into.learn(
            cubes, self._model, self._tokenizer, name=payload["name"], **self._options
        )
        return cube

    def _apply(self, connection: Any, payload: Any, prepared: Any) -> dict[str, float]:
        return {"learnt": float(prepared is not None)}
