"""Views: a MOS, and its memories, with the rights of a principal.

A view keeps honest code to a principal's rights: an agent is given the view, and whatever it asks
of it is answered for that principal. It is no wall inside a process: code that is hostile can
reach the objects behind any Python object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from memos.errors import AccessError
from memos.governance.verbs import ATTRIBUTES, MEMORY_VERBS, Verb
from memos.records.scope import acting

if TYPE_CHECKING:
    from memos.governance.audit import Audit
    from memos.records.rights import Actor


@contextmanager
def as_actor(actor: Actor | None) -> Iterator[None]:
    """In this block the principal acts; None: the owner."""
    token = acting.set(actor)
    try:
        yield
    finally:
        acting.reset(token)


class _View:
    """What a principal may call of an object."""

    def __init__(
        self, target: Any, actor: Actor, audit: Audit | None, verbs: Mapping[str, Verb]
    ) -> None:
        self._target, self._actor, self._audit, self._verbs = target, actor, audit, verbs

    def __getattr__(self, name: str) -> Any:
        verb = self.__dict__.get("_verbs", {}).get(name)
        if verb is not None:
            return self._bound(name, verb)
        if name.startswith("_") or not hasattr(type(self._target), name):
            if name in ATTRIBUTES and hasattr(self._target, name):
                return getattr(self._target, name)
            raise AttributeError(f"{self!r} has no {name!r}")
        if name in ATTRIBUTES:
            return getattr(self._target, name)
        raise AccessError(f"{self._actor.principal} has no right to use {name!r} of {self!r}")

    def __dir__(self) -> list[str]:
        return sorted({*self._verbs, *(n for n in ATTRIBUTES if hasattr(self._target, n))})

    @property
    def principal(self) -> str:
        """Who acts."""
        return self._actor.principal

    def _bound(self, name: str, verb: Verb) -> Callable[..., Any]:
        call = getattr(self._target, name)
        cls: Any = type(self._target)
        signature = _signature(cls, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = _arguments(signature, args, kwargs)
            for closed in verb.closed:
                if given.get(closed) is not None:
                    raise AccessError(
                        f"{closed}: {self._actor.principal} has no right to give one to {name}"
                    )
            with as_actor(self._actor), self._recorded(name, verb, given) as done:
                if verb.gate is not None:
                    verb.gate(self._target, self._actor, given)
                if verb.author:
                    kwargs["author"] = self._actor.principal
                with as_actor(None) if verb.as_owner else nullcontext():
                    result = call(*args, **kwargs)
                if verb.after is not None:
                    result = verb.after(self._target, self._actor, given, result)
                if done is not None:
                    done.result = result
            if isinstance(result, AbstractContextManager) and hasattr(result, "gen"):
                return _Entered(
                    result, self._actor, self._audit, name, self._memory_of(verb, given)
                )
            return result

        run.__name__, run.__doc__ = name, call.__doc__
        return run

    def _recorded(self, name: str, verb: Verb, given: Mapping[str, Any]) -> Any:
        if self._audit is None:
            return nullcontext()
        query = None if verb.query is None else given.get(verb.query)
        detail = {key: given.get(key) for key in verb.detail}
        return self._audit.doing(name, self._memory_of(verb, given), query, detail)

    def _memory_of(self, verb: Verb, given: Mapping[str, Any]) -> str | None:
        name = None if verb.memory is None else given.get(verb.memory)
        return name if isinstance(name, str) else None


class MemoryView(_View):
    """A memory with the rights of a principal: its verbs, as far as those go."""

    def __init__(self, memory: Any, actor: Actor, audit: Audit | None) -> None:
        super().__init__(memory, actor, audit, MEMORY_VERBS.get(memory.kind, {}))

    def __repr__(self) -> str:
        return f"memory {self._target.name!r} as {self._actor.principal}"

    def _memory_of(self, verb: Verb, given: Mapping[str, Any]) -> str | None:
        return str(self._target.name)


class View(_View):
    """A MOS with the rights of a principal; see ``MOS.as_principal``.

    Args:
        mos:   whose memories.
        verbs: what principals may call.
    """

    def __repr__(self) -> str:
        return f"MOS as {self._actor.principal}"

    def memory(self, name: str) -> MemoryView:
        """The memory of this name. Raises NotFoundError where nothing of it may be seen."""
        with as_actor(self._actor):
            return MemoryView(self._target.memory(name), self._actor, self._audit)

    @property
    def memories(self) -> dict[str, MemoryView]:
        """Every memory of which something may be seen, by its name."""
        with as_actor(self._actor):
            found = self._target.memories
        return {
            name: MemoryView(memory, self._actor, self._audit) for name, memory in found.items()
        }

    def __enter__(self) -> View:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """A view holds nothing: the MOS stays open."""


class _Entered(AbstractContextManager[Any]):
    """A verb that is a context manager: it begins and ends as the principal; what stands in its
    block does not."""

    def __init__(
        self,
        inner: AbstractContextManager[Any],
        actor: Actor,
        audit: Audit | None,
        name: str,
        memory: str | None,
    ) -> None:
        self._inner, self._actor, self._audit = inner, actor, audit
        self._name, self._memory = name, memory

    def __enter__(self) -> Any:
        told = nullcontext() if self._audit is None else self._audit.doing(self._name, self._memory)
        with as_actor(self._actor), told:
            return self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._inner.__exit__(*error)


@functools.lru_cache(maxsize=1024)
def _signature(cls: type, name: str) -> inspect.Signature:
    """Of a method, without self."""
    signature = inspect.signature(getattr(cls, name))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by name; what does not fit is the call's to refuse."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
