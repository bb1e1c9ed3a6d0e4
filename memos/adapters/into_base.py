"""Adapters merged into the weights of their base, so that unmerging gives back the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

import torch

from memos.adapters._products import check_factors, check_weights
from memos.adapters.adapter import Adapter
from memos.errors import ArgumentError
from memos.kernels.adapters import merge_adapter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Merged:
    """A model whose layers have merged weights, until ``unmerge``; leaving ``with`` unmerges.

    While it stands, do not move the model, tie its weights anew or run it in another thread that
    calls ``unmerge``. Merging once more on top is allowed; the last merge is undone first.
    """

    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = tuple(places)
        self._active = False

    @property
    def active(self) -> bool:
        """Whether the model has the merged weights."""
        return self._active

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that were merged."""
        return tuple(place.name for place in self._places)

    @property
    def num_bytes(self) -> int:
        """What the merged weights take, beside those of the base that are kept."""
        return sum(place.fresh.nbytes for place in self._places)

    def unmerge(self) -> None:
        """Put back the base's own parameters: the same objects, so the same bytes.

        A second call does nothing.

        Raises:
            ArgumentError: a layer no longer has the weight that was put there: another merge
                stands on it, or the model was moved or tied meanwhile. Nothing is changed.
        """
        if not self._active:
            return
        for place in self._places:
            place.check()
        _swap([(place, place.base) for place in self._places])
        self._active = False

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unmerge()


class _Place:
    """One layer: its parameter and the fresh one."""

    def __init__(self, name: str, module: torch.nn.Module, fresh: torch.Tensor) -> None:
        self.name = name
        self.module = module
        self.base = _weight(module)
        self.fresh = torch.nn.Parameter(fresh, requires_grad=self.base.requires_grad)
        self._state = (fresh.device, fresh.dtype)

    def check(self) -> None:
        if self.module._parameters.get("weight") is not self.fresh:
            raise ArgumentError(
                f"layer {self.name!r} no longer has the merged weight: undo what was merged later "
                "first; if its weight was set or tied otherwise, set the merged one again"
            )
        if (self.fresh.device, self.fresh.dtype) != self._state:
            raise ArgumentError(
                f"layer {self.name!r} was merged as {self._state[1]} on {self._state[0]} and is "
                f"now {self.fresh.dtype} on {self.fresh.device}: move the model back first"
            )


@torch.no_grad()
def merge_into_base(
    model: torch.nn.Module,
    adapters: Adapter | Sequence[Adapter],
    weights: Sequence[float] | None = None,
) -> Merged:
    """Give the layers of a model fresh weights ``base + sum(weight * scale * up @ down)``.

    The sum is made in float32 and rounded once to the weight's dtype. The base's parameters are
    kept aside untouched: ``unmerge`` puts back the same objects. A weight that is tied to another
    layer's becomes the merged layer's own meanwhile; the other layer keeps the base's.

    Args:
        model:    the bare transformers model; its layers nn.Linear or Conv1D of transformers.
        adapters: one or more for this model.
        weights:  one per adapter; default 1 each.

    Returns:
        The handle that unmerges, also as a context manager.

    Raises:
        ArgumentError: a layer is missing, of another kind or shape, quantised, parametrised or on
            the meta device, or a number is not finite. The model is as before.

    Cost:
        O(O I R) per layer, and a second copy of the merged layers' weights while merged.
    """
    chosen = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    weights = check_weights(chosen, [1.0] * len(chosen) if weights is None else weights)

    modules: dict[str, torch.nn.Module] = {}
    for i, adapter in enumerate(chosen):
        for name, factors in adapter.factors.items():
            shape = check_factors(i, name, factors)
            module = modules.setdefault(name, _module(model, name))
            wanted = tuple(_weight(module).shape)
            wanted = wanted if isinstance(module, torch.nn.Linear) else wanted[::-1]
            if shape != wanted:
                raise ArgumentError(
                    f"adapters[{i}]: layer {name!r} is of [O, I] = {list(wanted)} in the model, "
                    f"of {list(shape)} in the adapter"
                )
    if len({id(module) for module in modules.values()}) != len(modules):
        raise ArgumentError(f"layers: different ones wanted, two of {sorted(modules)} are the same")

    places = []
    for name, module in modules.items():
        terms = [
            (weight * adapter.factors[name].scale, adapter.factors[name])
            for weight, adapter in zip(weights, chosen, strict=True)
            if name in adapter.factors
        ]
        base = _weight(module)
        up = torch.cat([f.up.to(base.device, torch.float32) * scale for scale, f in terms], dim=1)
        down = torch.cat([f.down.to(base.device, torch.float32) for _, f in terms])
        if not isinstance(module, torch.nn.Linear):
            up, down = down.T, up.T  # Conv1D keeps [I, O]
        places.append(_Place(name, module, merge_adapter(base, down, up, 1.0)))
    merged = Merged(places)
    _swap([(place, place.fresh) for place in places])
    merged._active = True
    return merged


def _swap(changes: Sequence[tuple[_Place, torch.nn.Parameter]]) -> None:
    """Set all weights, or none where one cannot be set."""
    before = [(place.module, _weight(place.module)) for place, _ in changes]
    try:
        for place, parameter in changes:
            place.module.weight = parameter
    except BaseException:
        for module, parameter in before:
            module._parameters["weight"] = parameter
        raise


def _module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ArgumentError(f"layer {name!r}: the model {type(model).__name__} has none") from None
    transformers = sys.modules.get("transformers.pytorch_utils")
    kinds = (torch.nn.Linear,) if transformers is None else (torch.nn.Linear, transformers.Conv1D)
    if not isinstance(module, kinds):
        raise ArgumentError(f"layer {name!r}: Linear or Conv1D wanted, got {type(module).__name__}")
    weight = module._parameters.get("weight")
    if weight is None:
        raise ArgumentError(
            f"layer {name!r}: a plain weight wanted, got a parametrised one or none"
        )
    if type(weight) is not torch.nn.Parameter or weight.dtype not in DTYPES or weight.dim() != 2:
        raise ArgumentError(
            f"layer {name!r}: a weight of float32, bfloat16 or float16 wanted, got "
            f"{type(weight).__name__} of {weight.dtype}: a quantised weight cannot take a merge"
        )
    if weight.is_meta:
        raise ArgumentError(f"layer {name!r}: its weight is on the meta device, without values")
    return module


def _weight(module: torch.nn.Module) -> torch.nn.Parameter:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight
