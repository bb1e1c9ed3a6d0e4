"""Contexts as KV: memories that are prefilled once, and then cost no prefill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from memos.cube import MemCube
from memos.errors import ArgumentError

if TYPE_CHECKING:
    from memos.facade.kv_context import KVContext
    from memos.memories.kv_cache import KVCacheMemory
    from memos.memories.kv_pieces import Text
    from memos.retrieval import Context

SYSTEM = "Answer with the help of these memories."
_HERE = "<<memories>>"  # where the pieces go in a chat template


class Activation:
    """Part of MOS."""

    def activate(
        self: Any,
        ids: str | Iterable[str],
        memory_name: str | None = None,
        *,
        kv: str | None = None,
        system: str = SYSTEM,
    ) -> int:
        """Prefill what cubes say, once, and keep its KV: a context with ``as_kv=True`` that holds
        them then costs no prefill of them. A use: cubes that were CREATED become ACTIVATED.

        Args:
            ids:         of cubes with text.
            memory_name: where they are; None: found by their ids.
            kv:          a KVCacheMemory that was made with model= and tokenizer=; None: the only
                one.
            system:      the system prompt that they will stand behind.

        Returns:
            How many had to be prefilled; the others were activated already.

        Raises:
            NotFoundError: no such cube or memory.
            AccessError: the principal may not write the KVCacheMemory.
            ArgumentError: the model's keys cannot be moved, or there is no one KVCacheMemory.
        """
        from memos.memories import kv_rights

        memory = self._kv_memory(kv)
        kv_rights.check(memory.name, "write", None)
        names = [ids] if isinstance(ids, str) else list(ids)
        cubes = [self._living(id, memory_name).get(id) for id in names]
        self._count(cubes)
        lead, _ = _prompt(memory, system, "")
        made: int = memory.activate([_whole(memory, cube) for cube in cubes], system=lead)
        return made

    def deactivate(
        self: Any, id: str, memory_name: str | None = None, *, kv: str | None = None
    ) -> int:
        """Remove the KV that was made of a cube; returns how many pieces there were."""
        from memos.memories import kv_rights

        memory = self._kv_memory(kv)
        kv_rights.check(memory.name, "write", None)
        gone: int = memory.deactivate(id, self._living(id, memory_name).name)
        return gone

    def _with_kv(
        self: Any,
        context: Context,
        kv: str | None,
        system: str | None,
        share: float | None,
        max_kl: float | None,
    ) -> KVContext:
        """The same context, its pieces as one cache."""
        from memos.facade.kv_context import KVContext
        from memos.memories import kv_rights

        memory = self._kv_memory(kv)
        kv_rights.check(memory.name, "read", None)
        system = SYSTEM if system is None else system
        lead, question = _prompt(memory, system, context.query)
        texts = [
            _piece(memory, context.text[c.start : c.end], c.number, c.id, c.memory, c.version)
            for c in context.citations
        ]
        missing = [text for text in texts if not memory.is_activated(text, system=lead)]
        composed = memory.compose(
            lead,
            texts,
            question,
            share=share,
            max_kl=max_kl,
            store=kv_rights.may(memory.name, "write", None),
        )
        return KVContext(
            text=context.text,
            citations=context.citations,
            tokens=context.tokens,
            left_out=context.left_out,
            query=context.query,
            hits=context.hits,
            composed=composed,
            prefilled=tuple(text.cube or "" for text in missing),
        )

    def _kv_memory(self: Any, name: str | None) -> KVCacheMemory:
        from memos.memories.kv_cache import KVCacheMemory

        if name is not None:
            found = self.memory(name)
            if not isinstance(found, KVCacheMemory):
                raise ArgumentError(f"kv: a KVCacheMemory wanted, got {name!r} of {found.kind}")
            return found
        known = [m for m in self.memories.values() if isinstance(m, KVCacheMemory)]
        if len(known) != 1:
            names = ", ".join(sorted(m.name for m in known)) or "none"
            raise ArgumentError(f"kv: the name of a KVCacheMemory wanted, there are: {names}")
        return known[0]

    def _drop_activated(self: Any) -> None:
        """After a purge: what was made of cubes that are no more goes too."""
        from memos.memories.kv_pieces import KVPieces

        with self._lock:
            known = [m for m in self._memories.values() if isinstance(m, KVPieces)]
        for memory in known:
            pieces = memory.activated()
            with self.records.database.read() as connection:
                gone = [
                    (name, id)
                    for name, id in pieces
                    if name not in {m for _, m in self.records.locate(connection, id)}
                ]
            for name, id in gone:
                memory.deactivate(id, name)


def _whole(memory: KVCacheMemory, cube: MemCube) -> Text:
    """A cube as a context words it that has room for all of it."""
    from memos.retrieval import synthesise

    alone: Any = cube
    context = synthesise("", [alone], 1 << 40)
    return _piece(memory, context.text, 1, cube.id, cube.memory, cube.versions)


def _piece(memory: KVCacheMemory, line: str, number: int, id: str, name: str, version: int) -> Text:
    """A line of a context as a piece. Its number is left out: that depends on the others."""
    from memos.memories.kv_pieces import Text

    ids = memory.tokens_of(line.removeprefix(f"[{number}] ") + "\n", special=False)
    return Text(tuple(ids), id, name, version)


def _prompt(memory: KVCacheMemory, system: str, query: str) -> tuple[list[int], list[int]]:
    """Tokens before the memories, and behind them: by the tokenizer's chat template if it has
    one."""
    tokenizer = memory.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return memory.tokens_of(f"{system}\n\n"), memory.tokens_of(f"\n{query}\n", special=False)
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": f"{_HERE}\n{query}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, _, behind = text.partition(_HERE)
    return memory.tokens_of(before, special=False), memory.tokens_of(behind, special=False)
