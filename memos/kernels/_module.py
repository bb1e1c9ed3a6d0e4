"""A native module that is loaded when it is first wanted, or why it cannot run here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from memos.errors import BackendError

Load = Callable[[], tuple[Any, str | None]]


def loaded_once(load: Load) -> tuple[Callable[[], str | None], Callable[[], Any]]:
    """From what gives a module, or None and why not: ``missing``, which says why it does not run
    here (None: it does), and ``core``, which is the module and raises BackendError without it."""
    once = functools.lru_cache(maxsize=1)(load)

    @functools.lru_cache(maxsize=1)
    def missing() -> str | None:
        return once()[1]

    @functools.lru_cache(maxsize=1)
    def core() -> Any:
        module, why = once()
        if why is not None:
            raise BackendError(why)
        return module

    return missing, core
