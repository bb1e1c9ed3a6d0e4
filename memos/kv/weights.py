"""Digests of a model's weights, and of which of its adapters count."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from memos.errors import ArgumentError

Prints = list[tuple[int, int, bytes]]

_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Prints, str, str]]
_known = weakref.WeakKeyDictionary()


def digest(model: torch.nn.Module, config: str, rewritten: str = "") -> tuple[str, str]:
    """Hex digests of the weights with the config, and of the adapters' state ("" without any).

    The weights are hashed once; later calls compare a fingerprint of every tensor.

    Args:
        config:    canonical text of everything else that determines the model's numbers.
        rewritten: buffers whose names end so are left out, since every forward pass rewrites
            them (dynamic RoPE); the config determines them.
    """
    prints, adapters = _fingerprint(model, rewritten)
    with _lock:
        known = _known.get(model)
        if known is None or known[0] != prints or known[2] != config:
            head = f"{type(model).__qualname__}\n{config}"
            known = (prints, _hash_weights(model, head, rewritten), config)
            _known[model] = known
    return known[1], adapters


def forget(model: torch.nn.Module) -> None:
    """Hash this model's weights again at the next use."""
    with _lock:
        _known.pop(model, None)


def _fingerprint(model: torch.nn.Module, rewritten: str) -> tuple[Prints, str]:
    """Address, version and a sample of every tensor; the digest of the adapters' state."""
    prints: Prints = []
    adapters = []
    stack = [model]
    while stack:
        fields = stack.pop().__dict__
        stack += [child for child in fields["_modules"].values() if child is not None]
        for group in (fields["_parameters"], fields["_buffers"]):
            for name, tensor in group.items():
                if tensor is None or (rewritten and name.endswith(rewritten)):
                    continue
                address, sample = tensor.data_ptr(), b""
                if address and tensor.is_cpu and tensor.is_contiguous():
                    size = tensor.nbytes
                    sample = ctypes.string_at(address + size // 2 // 64 * 64, min(size, 64))
                version = -1 if tensor.is_inference() else tensor._version
                prints.append((address, version, sample))
        if "_disable_adapters" in fields:  # PEFT: which adapters count is no parameter
            names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
            adapters.append([repr(fields.get(name)) for name in names])
    return prints, sha(canonical(adapters))[:32] if adapters else ""


def _hash_weights(model: torch.nn.Module, head: str, rewritten: str) -> str:
    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        part = hashlib.sha256(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        try:
            data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ArgumentError(
                f"model: parameters that can be read wanted, got {name} of "
                f"{type(tensor).__name__} on {tensor.device} ({error}); pass model_config and "
                "revision instead of model"
            ) from None
        part.update(data)
        return part.digest()

    tensors = [
        item
        for group in (model.named_parameters(), model.named_buffers())
        for item in group
        if not (rewritten and item[0].endswith(rewritten))
    ]
    whole = hashlib.sha256(head.encode())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "memos-digest") as pool:
        for part in pool.map(one, tensors):
            whole.update(part)
    return whole.hexdigest()


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)


def sha(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
