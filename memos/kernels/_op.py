"""Ops and their backends.

The definition of an op is its reference: one function whose signature and docstring are the
contract and whose body is the slow, obvious version. Backends attach to it, best first.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from memos import settings
from memos.errors import BackendError

A = ParamSpec("A")
R = TypeVar("R")

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@dataclass(frozen=True)
class Backend(Generic[A, R]):
    """One implementation of an op: what runs, whether it can run here, what it takes."""

    name: str
    run: Callable[A, R]
    accepts: Callable[..., bool]  # called with the op's arguments
    missing: Callable[[], str | None]  # None: ready; else why it cannot run on this machine


class Op(Generic[A, R]):
    """A callable that checks its arguments and hands them to the best backend that takes them."""

    def __init__(self, reference: Callable[A, R], check: Callable[A, None]) -> None:
        self.reference = reference
        self.check = check
        self.name = reference.__name__
        self.backends: dict[str, Backend[A, R]] = {}
        # The same, taken apart: looking the fields up costs every call 0.05 us.
        self._in_order: tuple[
            tuple[Callable[[], str | None], Callable[..., bool], Callable[A, R]], ...
        ] = ()
        self.in_graph: Callable[A, R] | None = None  # its twin in torch's library (_library.py)
        self.traced: Callable[[], bool] = bool  # whether torch.compile traces; bool(): never
        functools.update_wrapper(self, reference)
        ops[self.name] = self

    def backend(
        self,
        name: str,
        *,
        accepts: Callable[..., bool] | None = None,
        missing: Callable[[], str | None] = lambda: None,
    ) -> Callable[[Callable[A, R]], Callable[A, R]]:
        """Attach a function of the same signature. Order of registration is preference."""

        def attach(run: Callable[A, R]) -> Callable[A, R]:
            self.backends[name] = Backend(name, run, accepts or (lambda *a, **k: True), missing)
            self._in_order = tuple((b.missing, b.accepts, b.run) for b in self.backends.values())
            return run

        return attach

    def __call__(self, *args: A.args, **kwargs: A.kwargs) -> R:
        if self.traced() and self.in_graph is not None:
            return self.in_graph(*args, **kwargs)
        self.check(*args, **kwargs)
        forced = _chosen.get() or settings.forced_backend()
        if forced is not None:
            return self._forced(forced)(*args, **kwargs)
        for missing, accepts, run in self._in_order:
            if missing() is None and accepts(*args, **kwargs):
                return run(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def _forced(self, name: str) -> Callable[A, R]:
        if name == "reference":
            return self.reference
        if name not in self.backends:
            have = ", ".join([*self.backends, "reference"])
            raise BackendError(f"{self.name}: backend {name!r} wanted, but it has {have}")
        if (why := self.backends[name].missing()) is not None:
            raise BackendError(f"{self.name}: backend {name!r} cannot run here: {why}")
        return self.backends[name].run


ops: dict[str, Op[..., Any]] = {}


def op(check: Callable[A, None]) -> Callable[[Callable[A, R]], Op[A, R]]:
    """Make a reference function an op; ``check`` raises ArgumentError on bad arguments."""
    return lambda reference: Op(reference, check)


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Run every op inside the block on this backend ("reference" too), or raise; no fallback."""
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def available() -> dict[str, dict[str, str]]:
    """For each op and backend "ready", or the reason why it cannot run here."""
    return {
        name: {b.name: b.missing() or "ready" for b in op_.backends.values()}
        | {"reference": "ready"}
        for name, op_ in ops.items()
    }
