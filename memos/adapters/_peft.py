"""PEFT's adapter_config.json: what memos takes, what it refuses, and the scale of each layer."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from memos.adapters.adapter import MAX_RANK, Factors
from memos.errors import ArgumentError

# Keys whose truth means more than low-rank factors beside unchanged weights, and what they mean.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers stored beside the factors",
    "lora_bias": "a bias on lora_B",
    "trainable_token_indices": "trained rows of the embedding",
    "target_parameters": "factors per expert or per bare parameter",
    "alora_invocation_tokens": "activated LoRA: factors from an invocation on",
    "layer_replication": "repeated layers",
    "use_qalora": "QALoRA: pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow: routing among adapters",
    "kasa_config": "KaSA: a truncated base weight",
    "monteclora_config": "sampled factors",
    "megatron_config": "layers of Megatron",
}
# Initialisations that change the base weights: the factors alone do not say what was learnt.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Keys that begin with use_ or end with _config and change nothing here.
_HARMLESS = {
    "use_rslora",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "runtime_config",
    "velora_config",
}
_NARROWED = ("exclude_modules", "layers_to_transform", "layers_pattern")
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # PEFT's own, where the file is silent


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ArgumentError unless these are plain low-rank factors over unchanged weights."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise ArgumentError(f"{where}: peft_type 'LORA' wanted, got {kind!r}")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise ArgumentError(f"{where}: low-rank factors alone wanted, got {key} ({meaning})")
    bias = config.get("bias", "none")
    if bias != "none":
        raise ArgumentError(f"{where}: bias 'none' wanted, got {bias!r}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ArgumentError(
            f"{where}: factors over the base model's own weights wanted, got init_lora_weights "
            f"{init!r}, which changes them; convert it with PEFT's "
            "path_initial_model_for_weight_conversion and save it again"
        )
    for key, value in config.items():
        is_variant = key.startswith("use_") or key.endswith("_config")
        if value and is_variant and key not in _HARMLESS and key not in _REFUSED:
            raise ArgumentError(f"{where}: keys of LoRA wanted, got {key!r}, which is unknown here")


class Scaling:
    """Rank and scale of each layer by the rules of PEFT 0.21 (``get_pattern_key``).

    The first key of rank_pattern (of alpha_pattern) that matches the end of the layer's name as a
    regular expression counts, else ``r`` (``lora_alpha``).
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._rank = self._checked("r", config.get("r", _DEFAULT_RANK), _is_rank)
        alpha = config.get("lora_alpha", _DEFAULT_ALPHA)
        self._alpha = self._checked("lora_alpha", alpha, _is_number)
        self._rooted = config.get("use_rslora") or False
        if self._rooted not in (False, True):
            raise ArgumentError(f"{where}: use_rslora: true or false wanted, got {self._rooted!r}")
        self._ranks = self._patterns("rank_pattern", config, _is_rank)
        self._alphas = self._patterns("alpha_pattern", config, _is_number)

    def of(self, name: str) -> tuple[int, float]:
        """(rank, scale) of this layer."""
        rank = _match(self._ranks, name, self._rank)
        alpha = _match(self._alphas, name, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._rooted else rank)

    def _patterns(
        self, key: str, config: Mapping[str, Any], fits: Callable[[Any], bool]
    ) -> list[tuple[re.Pattern[str], Any]]:
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise ArgumentError(f"{self._where}: {key}: an object wanted, got {found!r}")
        patterns = []
        for text, value in found.items():
            self._checked(f"{key}[{text!r}]", value, fits)
            try:
                patterns.append((re.compile(rf"(.*\.)?({text})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ArgumentError(
                    f"{self._where}: {key}: regular expressions wanted, got {text!r}: {error}"
                ) from None
        return patterns

    def _checked(self, key: str, value: Any, fits: Callable[[Any], bool]) -> Any:
        if not fits(value):
            wanted = f"a rank from 1 to {MAX_RANK}" if fits is _is_rank else "a finite number"
            raise ArgumentError(f"{self._where}: {key}: {wanted} wanted, got {value!r}")
        return value


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _match(patterns: list[tuple[re.Pattern[str], Any]], name: str, default: Any) -> Any:
    for pattern, value in patterns:
        if pattern.match(name):
            return value
    return default


def complete_config(config: Mapping[str, Any], factors: Mapping[str, Factors]) -> dict[str, Any]:
    """A config under which PEFT gives every layer the rank and scale that its factors have.

    What ``config`` says is kept where it is true; ranks, alphas and targets that are missing or
    wrong are written out layer by layer.
    """
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        **config,
    }
    check_config(found, "config")
    if not _are_scaled(found, factors):
        found["use_rslora"] = False
        found["r"] = Counter(f.rank for f in factors.values()).most_common(1)[0][0]
        alphas = {name: _alpha(f) for name, f in factors.items()}
        found["lora_alpha"] = Counter(alphas.values()).most_common(1)[0][0]
        found["rank_pattern"] = {
            f"^{re.escape(n)}": f.rank for n, f in factors.items() if f.rank != found["r"]
        }
        found["alpha_pattern"] = {
            f"^{re.escape(n)}": a for n, a in alphas.items() if a != found["lora_alpha"]
        }
    if not _are_targets(found, factors):
        for key in _NARROWED:
            found.pop(key, None)
        found["target_modules"] = sorted(factors)
    return found


def _are_scaled(config: Mapping[str, Any], factors_of: Mapping[str, Factors]) -> bool:
    if not {"r", "lora_alpha"} <= config.keys():
        return False
    try:
        scaling = Scaling(config, "config")
    except ArgumentError:
        return False
    for name, factors in factors_of.items():
        rank, scale = scaling.of(name)
        if rank != factors.rank or _single(scale) != _single(factors.scale):
            return False
    return True


def _alpha(factors: Factors) -> float:
    """What divided by the rank gives the scale back, to the last bit of a float32."""
    whole = round(factors.scale * factors.rank)
    if abs(whole) < 2**53 and _single(whole / factors.rank) == _single(factors.scale):
        return whole
    return _single(factors.scale) * factors.rank  # exact: 24 bits times at most 10


def _single(value: float) -> float:
    """The float32 nearest to it: what a table holds."""
    import numpy

    return float(numpy.float32(value))


def _are_targets(config: Mapping[str, Any], factors: Mapping[str, Factors]) -> bool:
    """Does PEFT put factors on all of these layers?"""
    targets = config.get("target_modules")
    if any(config.get(key) not in (None, []) for key in _NARROWED):
        return False
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except (re.error, RecursionError, OverflowError):
            return False
        return targets == "all-linear" or all(pattern.fullmatch(name) for name in factors)
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        return False
    return all(any(name == t or name.endswith(f".{t}") for t in targets) for name in factors)


def dump(value: Any, what: str) -> str:
    """JSON, or ArgumentError where it is none."""
    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what}: JSON wanted: {error}") from None
