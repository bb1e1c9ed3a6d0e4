"""Adapters of PEFT for the tiny models of the tests, and tiny models with fused layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from . import models

peft = pytest.importorskip("peft", reason="adapters are compared with PEFT's own")

FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "phi3": (
        "Phi3",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random model: of tests/models.py, or one with fused layers."""
    if name not in FUSED:
        return models.build(name, seed=seed, dtype=dtype)
    kind, options = FUSED[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=models.VOCAB, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, **options,
    )  # fmt: skip
    class_name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, class_name)(config).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def save_adapter(
    path: Path, name: str = "llama", *, seed: int = 1, as_dtype: Any = None, **options: Any
) -> Path:
    """A random adapter as PEFT saves it, in float32; ``options`` of its LoraConfig.

    ``as_dtype``: its numbers are those that this dtype has.
    """
    torch.manual_seed(seed)
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **wanted)
    model = peft.get_peft_model(build(name), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.3)
            if as_dtype is not None:
                parameter.data = parameter.data.to(as_dtype).float()
    model.save_pretrained(path)
    return path


def peft_logits(path: Path, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What PEFT computes with this adapter; the model is given back without it."""
    wrapped = peft.PeftModel.from_pretrained(model, path).eval()
    with torch.no_grad():
        logits = wrapped(ids).logits
    wrapped.unload()
    return logits
