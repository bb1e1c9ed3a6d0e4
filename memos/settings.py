"""What the environment may set. Read at each call, so that a test or a shell can change it."""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """``MEMOS_BACKEND``: run every op on this backend or fail."""
    return os.environ.get("MEMOS_BACKEND") or None


def forced_isa() -> str | None:
    """``MEMOS_CPU_ISA``: baseline, avx2 or avx512. Read once, when the native core is loaded."""
    return os.environ.get("MEMOS_CPU_ISA") or None


def num_threads() -> int:
    """``MEMOS_THREADS``: threads for one kernel call; default: the processors of this process."""
    value = os.environ.get("MEMOS_THREADS")
    if value:
        return max(1, int(value))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
