"""A second model over the same weights, for PEFT to put its layers into: the first never changes.

PEFT replaces modules and freezes parameters in the model that it is given. Here it is given a copy
of the module tree whose parameters are the original's own memory.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from typing import Any

import torch

from memos.adapters.adapter import MAX_RANK, Adapter, Factors
from memos.cube.identity import ADAPTERS
from memos.errors import ArgumentError, BackendError

# What others put into one module object: a forward of their own. The copy computes the bare model.
_PUT_THERE = ("forward", "_old_forward", "_hf_hook", ADAPTERS)


def shared_copy(model: torch.nn.Module) -> Any:
    """A model with modules, config and hooks of its own over the same weights.

    Cost: no weight is copied; a few milliseconds.
    """
    made: dict[int, Any] = {}
    config: Any = model.config
    own_config = copy.deepcopy(config)

    def parameter(tensor: torch.nn.Parameter) -> torch.nn.Parameter:
        if type(tensor) is not torch.nn.Parameter:
            return tensor  # packed weights carry more than their numbers
        if id(tensor) not in made:
            made[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
        kept: torch.nn.Parameter = made[id(tensor)]
        return kept

    def module(original: torch.nn.Module) -> torch.nn.Module:
        if id(original) in made:
            known: torch.nn.Module = made[id(original)]
            return known
        twin = object.__new__(type(original))
        made[id(original)] = twin
        fields = {}
        for name, value in original.__dict__.items():
            if name in _PUT_THERE:
                continue
            if name == "_parameters":
                value = {k: None if v is None else parameter(v) for k, v in value.items()}
            elif name == "_modules":
                value = {k: None if v is None else module(v) for k, v in value.items()}
            elif name.endswith("_hooks") and isinstance(value, dict):
                value = OrderedDict()
            elif value is config:
                value = own_config
            elif isinstance(value, (dict, set)):
                value = copy.copy(value)
            fields[name] = value
        twin.__dict__.update(fields)
        return twin

    view: Any = module(model)
    own_config._attn_implementation = _attention(config, next(model.parameters()).is_cpu)
    return view.eval()


def _attention(config: Any, is_cpu: bool) -> str:
    """Of the two that take a mask of any form: on a CPU the plain one is quicker, with a mask, and
    where scores are capped it alone is right."""
    is_eager = getattr(config, "_attn_implementation", None) == "eager"
    is_capped = bool(getattr(config, "attn_logit_softcapping", None))
    return "eager" if is_cpu or is_eager or is_capped else "sdpa"


class LoraView:
    """A model with fresh LoRA factors on all its linear layers, over the weights of another.

    Args:
        model: of transformers, bare: without PEFT's layers.
        rank:  of every layer, 1 to 512.
        alpha: the scale is alpha / rank.
        seed:  of the factors' beginning.

    Raises:
        ArgumentError: no such model, or one spread over several devices.
        BackendError: peft is missing.
    """

    def __init__(self, model: Any, rank: int, alpha: float, seed: int) -> None:
        try:
            import peft
        except ImportError:
            raise BackendError(
                "learning needs peft: pip install 'memos-native[adapters]'"
            ) from None
        check_model(model)
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise ArgumentError(f"rank: a whole number from 1 to {MAX_RANK} wanted, got {rank!r}")
        self.model = shared_copy(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            # Factors of float16 would lose small gradients.
            self.peft = peft.get_peft_model(
                self.model, self.config, autocast_adapter_dtype=self.dtype == torch.float16
            )
        self.peft.eval()
        self.layers: dict[str, Any] = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The factors that are trained, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def base(self) -> Any:
        """A ``with`` block in which the model computes without its factors."""
        return self.peft.disable_adapter()

    @torch.no_grad()
    def round(self) -> None:
        """The factors become what the adapter stores: numbers of the model's dtype."""
        for tensor in self.parameters().values():
            tensor.copy_(tensor.to(self.dtype))

    def adapter(self, card: dict[str, Any]) -> Adapter:
        """The factors in the model's dtype, on the CPU."""
        factors = {}
        for name, layer in self.layers.items():
            down, up = (
                side["default"].weight.detach().to("cpu", self.dtype, copy=True)
                for side in (layer.lora_A, layer.lora_B)
            )
            factors[name] = Factors(down, up, float(layer.scaling["default"]))
        return Adapter(factors, self._config(), card)

    def _config(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

        found: dict[str, Any] = json.loads(json.dumps(self.config.to_dict(), default=plain))
        found["inference_mode"] = True
        return found


def check_model(model: Any) -> None:
    """Raise ArgumentError unless this is one bare causal language model on one device."""
    wanted = "model: a causal language model of transformers wanted, "
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"{wanted}got {type(model).__name__}")
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise ArgumentError(f"{wanted}got {type(model).__name__}")
    if hasattr(model, "peft_config") or any(
        hasattr(module, "lora_A") for module in model.modules()
    ):
        raise ArgumentError(f"{wanted}bare; got one with PEFT's layers: unload them first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or devices.pop().type == "meta":
        raise ArgumentError(f"{wanted}on one device; got one that is spread out or offloaded")
