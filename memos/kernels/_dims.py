"""Shape checks by letter: a letter binds at its first use and must agree afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memos.errors import ArgumentError

if TYPE_CHECKING:
    import torch


class Dims(dict[str, int]):
    """``Dims().tensor("x", x, "T I").tensor("w", w, "I O")`` raises where a letter disagrees."""

    def tensor(
        self, name: str, tensor: torch.Tensor, shape: str, dtypes: Sequence[torch.dtype] = ()
    ) -> Dims:
        if not hasattr(tensor, "data_ptr"):
            raise ArgumentError(f"{name}: a tensor wanted, got {type(tensor).__name__}")
        letters = shape.split()
        if tensor.dim() != len(letters):
            raise ArgumentError(
                f"{name}: shape [{', '.join(letters)}] wanted, got {list(tensor.shape)}"
            )
        for axis, (letter, size) in enumerate(zip(letters, tensor.shape, strict=True)):
            if self.setdefault(letter, size) != size:
                raise ArgumentError(f"{name}: axis {axis} is {size}, but {letter} = {self[letter]}")
        if dtypes and tensor.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ArgumentError(
                f"{name}: {wanted} wanted, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        return self


def contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ArgumentError(f"{name}: contiguous wanted, got strides {list(tensor.stride())}")
