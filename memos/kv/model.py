"""What a model is to its KV cache: the shape of each layer, and the identity of its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from memos.cube.identity import adapters_of
from memos.errors import ArgumentError
from memos.kernels.codec import Codec
from memos.kv.identity import KVIdentity
from memos.kv.weights import canonical, digest, sha

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
_DICT_KEYS = {
    "hidden_size", "num_attention_heads", "num_layers", "num_hidden_layers", "num_key_value_heads",
    "head_dim", "head_dim_k", "head_dim_v", "dtype", "vocab_size", "sliding_window",
}  # fmt: skip
# Config fields that never change K or V.
_VOLATILE = {
    "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "architectures", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "tokenizer_class",
}  # fmt: skip
# Ids of these config fields stand for something that the ids themselves do not determine.
_FOREIGN = [
    f"{what}_token_{end}" for what in ("image", "video", "audio") for end in ("id", "index")
]


@dataclass(frozen=True)
class LayerShape:
    """One layer: its type as transformers names it, its K and V, its window.

    ``kind`` "dummy" is a layer without a cache of its own (shared KV, or no attention).
    """

    kind: str
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    sliding_window: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """What the cache of a model looks like.

    Args:
        name: the model's type, for messages.
        layers: one entry per layer of the model.
        dtype: of K and V: "bfloat16", "float16" or "float32".
        vocab_size: ids are below it; None when unknown.
        max_tokens: longer sequences change the keys of earlier tokens (dynamic RoPE): such
            sequences are neither stored nor restored. None: no such limit.
        foreign_ids: ids that stand for an image, video or sound.
        assumed: fields that were not said and may be learnt from a cache ("num_kv_heads",
            "head_dim_k", "head_dim_v", "dtype").
    """

    name: str
    layers: tuple[LayerShape, ...]
    dtype: str
    vocab_size: int | None = None
    max_tokens: int | None = None
    foreign_ids: frozenset[int] = frozenset()
    assumed: frozenset[str] = frozenset()

    @property
    def stored(self) -> tuple[LayerShape, ...]:
        """The layers that have K and V of their own."""
        return tuple(layer for layer in self.layers if layer.kind != "dummy")

    def uniform(self) -> LayerShape:
        """The one shape of all stored layers. Raises ArgumentError where they differ."""
        first = self.stored[0]
        for i, layer in enumerate(self.stored):
            for field in ("num_kv_heads", "head_dim_k", "head_dim_v"):
                if getattr(layer, field) != getattr(first, field):
                    raise ArgumentError(
                        f"{self.name}: blocks of layers with one {field} can be stored, got "
                        f"{getattr(first, field)} in layer 0 and {getattr(layer, field)} in {i}"
                    )
        return first

    def with_fields(self, fields: Mapping[str, Any]) -> ModelShape:
        """This shape with what was only assumed replaced by what ``fields`` say."""
        known = {k: v for k, v in fields.items() if k in self.assumed}
        dtype = _dtype_name(known.pop("dtype", self.dtype))
        layers = tuple(dataclasses.replace(layer, **known) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, dtype=dtype)

    def token_bytes(self) -> int:
        """Bytes of the K and V of one token, as the model makes them."""
        one = self.uniform()
        width = one.head_dim_k + one.head_dim_v
        return len(self.stored) * one.num_kv_heads * width * (4 if self.dtype == "float32" else 2)


def layer_kinds(config: Any) -> list[tuple[str, int | None]]:
    """(type, window) of every layer of a transformers config, a dict or a ModelShape.

    Raises:
        ArgumentError: a layer of a type whose state is not K and V per token; an
            encoder-decoder or a model with cross-attention.
    """
    if isinstance(config, ModelShape):
        return [(layer.kind, layer.sliding_window) for layer in config.layers]
    if isinstance(config, Mapping):
        window = config.get("sliding_window")
        kind = "full_attention" if window is None else "sliding_attention"
        return [(kind, window)] * _number(config, "num_layers", "num_hidden_layers")
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ArgumentError(f"config: a decoder-only model wanted, got encoder-decoder {name}")
    text = config.get_text_config(decoder=True)
    if getattr(text, "cross_attention_layers", None):
        raise ArgumentError(f"config: self-attention wanted, got {name} with cross-attention")
    types, options = get_layer_types_and_kwargs(text)
    for i, kind in enumerate(types):
        if kind not in (*ATTENTION, "dummy"):
            raise ArgumentError(
                f"config: layers of type {', '.join(ATTENTION)} wanted, "
                f"got {kind} in layer {i} of {name}"
            )
    return [(kind, o.get("sliding_window")) for kind, o in zip(types, options, strict=True)]


def shape_of(config: Any, dtype: Any = None) -> ModelShape:
    """The shape of a model from its transformers config, or from a dict with hidden_size,
    num_attention_heads and num_layers (optional: num_key_value_heads, head_dim or head_dim_k and
    head_dim_v, dtype, vocab_size, sliding_window).

    Raises:
        ArgumentError: a field is missing, or the model's KV cannot be addressed by token ids.
    """
    if isinstance(config, Mapping):
        return _shape_of_dict(config, dtype)
    kinds = layer_kinds(config)
    text = config.get_text_config(decoder=True)
    name = getattr(config, "model_type", type(config).__name__)
    both_ways = getattr(text, "use_bidirectional_attention", None)
    if both_ways or getattr(text, "is_causal", True) is False:
        raise ArgumentError(f"config: causal attention wanted, got {name}, which looks ahead")
    layers = []
    for (kind, window), one in zip(kinds, text.per_layer_config, strict=True):
        heads, key, value = _dims(one)
        layers.append(LayerShape(kind, heads, key, value, window))
    if not any(layer.kind != "dummy" for layer in layers):
        raise ArgumentError(f"config: at least one attention layer wanted, got none in {name}")
    foreign = {getattr(c, f, None) for c in (config, text) for f in _FOREIGN}
    return ModelShape(
        name=name,
        layers=tuple(layers),
        dtype=_dtype_name(dtype or getattr(text, "dtype", None) or "float32"),
        vocab_size=getattr(text, "vocab_size", None),
        max_tokens=_max_tokens(text),
        foreign_ids=frozenset(i for i in foreign if isinstance(i, int)),
        assumed=frozenset(() if dtype else ("dtype",)),
    )


def _shape_of_dict(config: Mapping[str, Any], dtype: Any) -> ModelShape:
    unknown = sorted(set(config) - _DICT_KEYS)
    if unknown:
        raise ArgumentError(
            f"model_config: keys of {', '.join(sorted(_DICT_KEYS))} wanted, "
            f"got {', '.join(unknown)}"
        )
    heads = _number(config, "num_attention_heads")
    if "head_dim" in config or "head_dim_k" in config:
        key = _number(config, "head_dim_k", "head_dim")
    else:
        key, rest = divmod(_number(config, "hidden_size"), heads)
        if rest:
            raise ArgumentError(
                f"model_config: hidden_size divisible by num_attention_heads = {heads} wanted, "
                f"got {config['hidden_size']}; or pass head_dim"
            )
    value = key
    if "head_dim_v" in config or "head_dim" in config:
        value = _number(config, "head_dim_v", "head_dim")
    kv_heads = _number(config, "num_key_value_heads") if "num_key_value_heads" in config else heads
    layers = tuple(LayerShape(kind, kv_heads, key, value, w) for kind, w in layer_kinds(config))
    name = _dtype_name(dtype or config.get("dtype") or "float32")
    said = {"num_kv_heads": "num_key_value_heads", "dtype": "dtype"}
    said |= {f: f if f in config else "head_dim" for f in ("head_dim_k", "head_dim_v")}
    assumed = frozenset(field for field, key in said.items() if key not in config)
    return ModelShape("model_config", layers, name, config.get("vocab_size"), assumed=assumed)


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if name in config:
            value = config[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"model_config: {name}: a number above 0 wanted, got {value!r}")
            return value
    have = ", ".join(config) or "nothing"
    raise ArgumentError(f"model_config: {' or '.join(names)} wanted, got {have}")


def _dims(config: Any) -> tuple[int, int, int]:
    """KV heads and head sizes of K and V of one layer."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None) is not None:  # MLA, cached after its up-projection
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is None:
        kv_heads = 1 if getattr(config, "multi_query", False) else heads
    return kv_heads, size, size


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ArgumentError(f"dtype: float32, float16 or bfloat16 wanted, got {name}")
    return name


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _max_tokens(config: Any) -> int | None:
    rope = _rope(config)
    limits = []
    for part in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            given = (part.get("original_max_position_embeddings"), config.max_position_embeddings)
            limits.append(min(n for n in given if n) - 1)
    return min(limits, default=None)


# Identity.


def identity_of(
    model: torch.nn.Module,
    codec: str | Codec,
    *,
    tokenizer: Any = None,
    block_tokens: int = 64,
    sink_tokens: int = 2,
    revision: str = "",
) -> KVIdentity:
    """The identity of a model's KV: every parameter and buffer, the config, the codec.

    The digest covers name, dtype, shape and bytes of all parameters and buffers, the class and
    the config without fields that never change K or V. PEFT adapters are parameters of the
    wrapped model and so part of it; which of them are active, merged or disabled is part too, and
    so are the adapters of a ParametricMemory that this thread has in use.
    It is computed once; later calls compare a fingerprint: address, version and 64 bytes of every
    tensor. PyTorch does not count what is written through ``.data``: that is noticed when it
    changes any of those bytes (as a merged adapter does), on a GPU, where none are read, not at
    all; call ``memos.kv.weights.forget(model)`` then.

    Cost: the first call hashes all weights (about 1 s per 2 GB and core), later ones < 1 ms.
    """
    text = canonical(_config_fields(model.config))
    shape = _shape_of_model(model, text)
    rewritten = "" if shape.max_tokens is None else "inv_freq"
    weights, adapter = digest(model, text, rewritten)
    if attached := adapters_of(model):
        adapter = sha(canonical([adapter, attached]))[:32]
    return _identity(shape, weights, codec, tokenizer, block_tokens, sink_tokens, revision, adapter)


def identity_of_config(
    config: Any,
    shape: ModelShape,
    codec: str | Codec,
    *,
    tokenizer: Any = None,
    block_tokens: int = 64,
    sink_tokens: int = 2,
    revision: str = "",
) -> KVIdentity:
    """The identity of a model of which only a config (or dict) is known, and ``revision``: the
    caller's name for its weights. Two models of one config and one revision look the same."""
    fields = dict(config) if isinstance(config, Mapping) else _config_fields(config)
    name = "config:" + sha(canonical(fields))
    return _identity(shape, name, codec, tokenizer, block_tokens, sink_tokens, revision, "")


def _identity(
    shape: ModelShape,
    model: str,
    codec: str | Codec,
    tokenizer: Any,
    block_tokens: int,
    sink_tokens: int,
    revision: str,
    adapter: str,
) -> KVIdentity:
    one = shape.uniform()
    return KVIdentity(
        model=model,
        num_layers=len(shape.stored),
        num_kv_heads=one.num_kv_heads,
        head_dim_k=one.head_dim_k,
        head_dim_v=one.head_dim_v,
        dtype=shape.dtype,
        codec=Codec.parse(codec).name,
        block_tokens=block_tokens,
        sink_tokens=sink_tokens,
        tokenizer=tokenizer_digest(tokenizer),
        revision=revision,
        adapter=adapter,
    )


def shape_of_model(model: torch.nn.Module) -> ModelShape:
    """``shape_of`` its config and the dtype that it runs in; kept per config."""
    return _shape_of_model(model, canonical(_config_fields(model.config)))


def _shape_of_model(model: torch.nn.Module, text: str) -> ModelShape:
    dtype = _dtype(model)
    key = f"{dtype}|{text}"
    if key not in _shapes:
        _shapes[key] = shape_of(model.config, dtype)
    return _shapes[key]


_shapes: dict[str, ModelShape] = {}


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary; a string stays as it is, None is ""."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer or ""
    return sha(canonical(tokenizer.get_vocab()))[:32]


def _dtype(model: torch.nn.Module) -> torch.dtype:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return getattr(model, "dtype", None) or parameter.dtype
    raise ArgumentError("model: floating-point parameters wanted, got none")


def _config_fields(config: Any) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): clean(v) for k, v in value.items() if k not in _VOLATILE}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)

    return dict(clean(config.to_dict()))
