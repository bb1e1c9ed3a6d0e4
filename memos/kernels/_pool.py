"""The threads of this process: for work that releases the GIL."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_lock = threading.Lock()
_MAX_THREADS = 64  # started when first needed
_pool: tuple[int, ThreadPoolExecutor] | None = None  # process id, pool


def _threads() -> ThreadPoolExecutor:
    """The pool of this process: a forked child has none of its parent's threads."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid():
            _pool = (os.getpid(), ThreadPoolExecutor(_MAX_THREADS, "memos"))
        return _pool[1]


def run(work: Callable[[int], object], count: int, threads: int) -> None:
    """Call ``work(i)`` for each i in [0, count) on this thread and up to ``threads - 1`` others.

    Each thread takes the next i when it is free. Another library's threads may hold a processor
    (OpenMP's spin while they wait): then this thread does the work alone instead of waiting for
    its share to be done.

    Raises: what ``work`` raised, after all threads have stopped.
    """
    numbers = itertools.count()

    def drain() -> None:
        while (i := next(numbers)) < count:
            work(i)

    others = []
    if threads > 1 and count > 1:
        pool = _threads()
        others = [pool.submit(drain) for _ in range(min(threads, count, _MAX_THREADS) - 1)]
    try:
        drain()
    finally:  # memory that the others use must outlive them
        errors = [other.exception() for other in others if not other.cancel()]
    for error in errors:
        if error is not None:
            raise error
