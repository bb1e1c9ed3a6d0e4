"""Adapters of random numbers, what they add to a layer, and small models to put them into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="adapters are torch tensors")

from memos.adapters.adapter import Adapter, Factors  # noqa: E402

SHAPES = {"a.tall": (24, 40), "a.wide": (48, 20), "b.square": (32, 32)}  # (I, O)


def random_adapter(
    seed: int,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int | Mapping[str, int] = 4,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    **card: Any,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (width, height) in shapes.items():
        R = rank if isinstance(rank, int) else rank[name]
        down = torch.randn(R, width, generator=generator) / math.sqrt(width)
        up = torch.randn(height, R, generator=generator)
        factors[name] = Factors(down.to(dtype), up.to(dtype), scale)
    return Adapter(factors, {"task_type": "CAUSAL_LM"}, card)


def product(factors: Factors) -> torch.Tensor:
    return factors.scale * factors.up.double() @ factors.down.double()


def summed(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> torch.Tensor:
    parts = [
        w * product(a.factors[name])
        for a, w in zip(adapters, weights, strict=True)
        if name in a.factors
    ]
    return torch.stack(parts).sum(0)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def error_of(adapter: Adapter, name: str) -> float:
    return float(adapter.card["recipe"]["error"]["layers"][name])


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from tests import models

    return models.build("llama", dtype=dtype, **changes)


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    """(I, O) of the layers inside the blocks."""
    shapes = {}
    for name, module in model.named_modules():
        if name == "lm_head":
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            shapes[name] = (module.weight.shape[0], module.weight.shape[1])
    return shapes


def in_peft(model: Any, adapters: Sequence[Adapter], tmp_path: Path) -> Any:
    """The model under PEFT, with the adapters "0", "1", ... read from files."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file

    for i, adapter in enumerate(adapters):
        folder = tmp_path / str(i)
        folder.mkdir()
        tensors = {}
        for name, factors in adapter.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = factors.down.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = factors.up.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
        if i:
            model.load_adapter(folder, str(i))
        else:
            model = peft.PeftModel.from_pretrained(model, folder, "0")
    return model
