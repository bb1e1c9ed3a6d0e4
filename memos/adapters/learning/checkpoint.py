"""Where training stands, in one file that is replaced whole: a crash leaves the one before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from memos.errors import ArgumentError, StoreError

NAME = "learning.safetensors"


def save(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Publish tensors and JSON state as the folder's checkpoint.

    Raises:
        StoreError: the folder cannot be written.
    """
    from safetensors.torch import save as serialize

    data = serialize(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"memos": json.dumps(state)},
    )
    path = folder / NAME
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StoreError(f"checkpoint: {folder} cannot be written ({error})") from None


def load(folder: Path, recipe: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The folder's checkpoint; None where it has none.

    Raises:
        ArgumentError: it is of other memories, another model or another recipe.
        StoreError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})["memos"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"checkpoint: {path} cannot be read ({error}); remove it") from None
    if state.get("recipe") != recipe:
        raise ArgumentError(
            f"checkpoint: {path} is of other memories, another model or other settings; remove it "
            "or name another folder"
        )
    return tensors, state


def forget(folder: Path) -> None:
    """Remove the folder's checkpoint: what it led to is stored."""
    (folder / NAME).unlink(missing_ok=True)
