"""Which base model an adapter belongs to: digests of config, weights and tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_SAMPLES = 1024  # numbers of each tensor
# What may differ between two loads of one checkpoint.
_OF_NO_WEIGHT = frozenset({
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures",
    "_attn_implementation", "attn_implementation", "quantization_config", "output_attentions",
    "output_hidden_states", "return_dict", "_commit_hash",
})  # fmt: skip


def fingerprint(model: Any, tokenizer: Any = None) -> dict[str, str]:
    """What tells one base model from another, as JSON.

    Of every parameter 1,024 numbers at even distances count, rounded to bfloat16: the same
    checkpoint in float32 and in bfloat16 has one fingerprint, a fine-tuned one has another. A
    change of a few single numbers may go unseen.

    Args:
        model:     of transformers, without adapters of PEFT in it.
        tokenizer: of it; None: its digest is "".

    Returns:
        {"model": class name, "config": ..., "weights": ..., "tokenizer": hex SHA-256}.

    Cost: reads 1,024 numbers per parameter, and the whole vocabulary: 0.1 s.
    """
    return {
        "model": type(model).__name__,
        "config": _digest(_plain(model.config.to_dict())),
        "weights": _weights(model),
        "tokenizer": "" if tokenizer is None else _tokenizer(tokenizer),
    }


def _plain(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _plain(v) for k, v in config.items() if k not in _OF_NO_WEIGHT}
    return config


@torch.no_grad()
def _weights(model: Any) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
        if some.is_floating_point():
            some = some.to(torch.bfloat16)
        whole.update(f"{name}|{list(tensor.shape)}|".encode())
        whole.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    special = getattr(tokenizer, "special_tokens_map", {})
    template = getattr(tokenizer, "chat_template", None)
    return _digest([tokenizer.get_vocab(), special, template])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
