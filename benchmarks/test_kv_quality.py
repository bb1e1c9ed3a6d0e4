"""What compression costs in quality: a real model reads on, on memory restored from disk.

Each of 10 pieces of real English text has 768 tokens of context and 256 that follow. The context's
KV cache is stored in a folder and restored, then the model reads the 256 tokens on it. Compared
with the exact cache: KL divergence of the next-token distributions (mean over 2,560 positions, in
nats), perplexity, and how often the most likely token is the same.

``bits`` counts everything on disk - codes, scales, exact sinks, frame headers and padding - per
number of the cache; ``ratio`` is to bf16. Beside it transformers' own QuantizedCache: its bits are
codes and scales, as it has no stored form. Arithmetic in fp32, so that rounding does not hide KL.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the model is a torch model")

from benchmarks import model as real  # noqa: E402

SEGMENTS, CONTEXT, LENGTH = 10, 768, 1024
CODECS = ("raw", "int8", "fp8", "int4", "int4-g64", "int4-g32-rot", "int2")
AGAIN = ("int8 to int4", "int8 to int2")  # packed by the one, later compressed by the other


@functools.lru_cache(maxsize=1)
def segments() -> torch.Tensor:
    return real.text_segments(real.load_tokenizer(), SEGMENTS, LENGTH)


@functools.lru_cache(maxsize=SEGMENTS)
@torch.no_grad()
def exact(i: int) -> tuple[Any, torch.Tensor]:
    """The context's cache of segment i, and log-probabilities of the rest on it."""
    from transformers import DynamicCache

    model = real.load_model("float32")
    ids = segments()[i : i + 1]
    cache = DynamicCache(config=model.config)
    model(ids[:, :CONTEXT], past_key_values=cache)
    logits = model(ids[:, CONTEXT:], past_key_values=cache).logits[0]
    cache.crop(CONTEXT - LENGTH)
    return cache, logits.log_softmax(-1)


@torch.no_grad()
def read_on(cache: Any, i: int) -> torch.Tensor:
    model = real.load_model("float32")
    logits = model(segments()[i : i + 1, CONTEXT:], past_key_values=cache).logits[0]
    return logits.log_softmax(-1)


def compare(i: int, got: torch.Tensor) -> torch.Tensor:
    """[KL, top-1 agreement, log-perplexity of exact and of got] of segment i."""
    want = exact(i)[1]
    target = segments()[i, CONTEXT + 1 :, None]
    kl = (want.exp() * (want - got)).sum(-1).mean()
    same = (want.argmax(-1) == got.argmax(-1)).float().mean()
    loss = [-p[:-1].gather(1, target).mean() for p in (want, got)]
    return torch.stack([kl, same, *loss])


def record(benchmark: Any, codec: str, bits: float, figures: list[torch.Tensor]) -> dict[str, Any]:
    kl, top1, want, got = torch.stack(figures).double().mean(0).tolist()
    row = {
        "codec": codec,
        "bits": bits,
        "ratio": 16 / bits,
        "kl": kl,
        "kl_worst_segment": max(float(f[0]) for f in figures),
        "ppl_change": float(torch.tensor(got - want).exp()) - 1,
        "top1": top1,
    }
    benchmark.extra_info.update(row)
    return row


@pytest.mark.parametrize("codec", [*CODECS, *AGAIN])
def test_kv_quality(benchmark: Any, tmp_path: Path, codec: str) -> None:
    if (why := real.missing()) is not None:
        pytest.skip(why)
    from memos import KVCacheMemory

    model = real.load_model("float32")
    first, _, later = codec.partition(" to ")
    codecs = {"codec": first, "cold_codec": later or None}
    with KVCacheMemory("quality", model=model, path=tmp_path, durable=False, **codecs) as kv:
        for i in range(SEGMENTS):
            content = {"token_ids": segments()[i, :CONTEXT], "cache": exact(i)[0]}
            cube = kv.add(content, {"user_id": f"segment-{i}"})
            if later:
                assert kv.compress(cube.id) > 0
        # A bf16 model has bf16 sinks; here they are fp32.
        used = disk_bytes(tmp_path) - SEGMENTS * kv._identity().sink_bytes() // 2
    elements = SEGMENTS * CONTEXT * numbers_per_token(model.config)

    def run() -> list[torch.Tensor]:
        figures = []
        with KVCacheMemory("quality", model=model, path=tmp_path, **codecs) as kv:
            for i in range(SEGMENTS):
                turn = kv.begin(f"segment-{i}", segments()[i].tolist())
                assert turn.reused_tokens == CONTEXT
                figures.append(compare(i, read_on(turn.inputs["past_key_values"], i)))
        return figures

    figures = benchmark.pedantic(run, rounds=1)
    bits = 8 * used / elements
    if codec == "raw":
        bits /= 2  # an fp32 cache here; a bf16 model stores half as much
        for i, f in enumerate(figures):
            assert f[0] == 0, f"segment {i}: the logits on a raw cache are bit-equal"
    record(benchmark, codec, bits, figures)


@pytest.mark.parametrize("nbits", [4, 2])
def test_transformers_quantized_cache(benchmark: Any, nbits: int) -> None:
    """transformers' QuantizedCache at 4.5 and 2.5 bits: groups of 64, bf16 scale and zero."""
    if (why := real.missing()) is not None:
        pytest.skip(why)
    if importlib.util.find_spec("optimum") is None:
        pytest.skip("its backend needs a package: pip install optimum-quanto")
    from transformers import QuantizedCache

    config = real.load_model("float32").config

    def run() -> list[torch.Tensor]:
        figures = []
        for i in range(SEGMENTS):
            cache = QuantizedCache("quanto", config, nbits=nbits, q_group_size=64)
            for layer, exact_layer in enumerate(exact(i)[0].layers):
                cache.update(exact_layer.keys, exact_layer.values, layer)
            figures.append(compare(i, read_on(cache, i)))
        return figures

    figures = benchmark.pedantic(run, rounds=1)
    record(benchmark, f"transformers quanto {nbits} bit", nbits + 0.5, figures)


def disk_bytes(folder: Path) -> int:
    """What the stored frames take, headers and padding included."""
    return sum(f.stat().st_size for f in folder.rglob("segments/*") if f.is_file())


def numbers_per_token(config: Any) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head)
