"""The Triton backend: whether it can run here, and its kernels attached to their ops.

Triton is imported when an op first asks for this backend, never before. With TRITON_INTERPRET=1 in
the environment of the process its kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from memos.errors import BackendError

if TYPE_CHECKING:
    from memos.kernels._op import Op


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """None when Triton kernels run here, else why not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed: {error}"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device is available, and TRITON_INTERPRET is not 1"
    try:
        importlib.import_module("memos.triton_kernels")
    except ImportError as error:
        return f"memos is not installed, only its source is on the path: {error}"
    return None


def kernels(module: str) -> Any:
    """``memos.triton_kernels.<module>``. Raises BackendError when Triton cannot run here."""
    if (why := missing()) is not None:
        raise BackendError(why)
    return importlib.import_module(f"memos.triton_kernels.{module}")


def takes(tensor: torch.Tensor) -> bool:
    """Whether this backend can read the tensor: on a GPU, or on the CPU when interpreted."""
    return tensor.device.type == ("cpu" if interpreted() else "cuda")


def register(gather_blocks: Op[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Attach the Triton kernels to the ops of ``memos.kernels.blocks``."""

    @gather_blocks.backend("triton", accepts=lambda cache, _: takes(cache), missing=missing)
    def _gather_triton(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kernels("blocks").gather_blocks(cache, block_ids)
        return out
