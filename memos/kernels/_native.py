"""The native core: whether it is there, and its thread pool.

Addresses cross this boundary, nothing else. Callers keep every tensor in a local variable until
the call returns. Native functions are single-threaded and release the GIL; work is split here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memos import settings
from memos.errors import ArgumentError
from memos.kernels import _pool
from memos.kernels._module import loaded_once

# Below this many bytes a second thread costs more than it saves (about 20 us to wake one).
_BYTES_PER_THREAD = 512 * 1024


def _load() -> tuple[Any, str | None]:
    try:
        from memos import _C
    except ImportError as error:
        return None, f"the native core is not built: {error}"
    wanted = settings.forced_isa()
    try:
        _C.choose_isa(wanted or "")
    except ValueError as error:
        return None, f"MEMOS_CPU_ISA={wanted}: {error}"
    return _C, None


missing, core = loaded_once(_load)


def isa() -> str:
    """The instruction set in use: baseline, avx2, avx512 or avx512bf16."""
    return str(core().isa())


def isas() -> dict[str, str]:
    """Every instruction set built in, with "ready" or why this processor cannot run it."""
    return dict(core().isas())


def parallel(work: Callable[[int, int], object], count: int, total_bytes: int) -> None:
    """Run ``work(first, last)`` over [0, count), split over threads when the bytes pay for it."""
    n = min(count, 1 + total_bytes // _BYTES_PER_THREAD)
    if n > 1:  # asking for the threads costs 2 us
        n = min(n, settings.num_threads())
    if n <= 1:
        if count:
            work(0, count)
        return
    pieces = min(count, 4 * n)  # several for each thread, so that none waits long for another
    bounds = [count * i // pieces for i in range(pieces + 1)]
    _pool.run(lambda i: work(bounds[i], bounds[i + 1]), pieces, n)


def check_rows(ids: int, count: int, N: int) -> None:
    """Raise ArgumentError unless the ``count`` int64 ids at this address are in [0, N)."""
    bad = core().first_out_of_range(ids, count, N)
    if bad >= 0:
        raise ArgumentError(f"block_ids: ids in [0, {N}) wanted, entry {bad} is out of range")
