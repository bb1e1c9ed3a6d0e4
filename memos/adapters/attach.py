"""Adapters under a model: its linear layers add what the adapters in use say."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from memos.cube.identity import ADAPTERS
from memos.errors import ArgumentError, BackendError
from memos.kernels.adapters import AdapterPlan, AdapterTable, apply_adapters_, plan_adapters

_linear = torch.nn.functional.linear
_PLANS = 16  # kept per use: one for each number of tokens
_numbers = itertools.count()
_NOTHING: Mapping[int, Use] = MappingProxyType({})
# By attachment: threads and tasks choose for themselves.
_uses: contextvars.ContextVar[Mapping[int, Use]] = contextvars.ContextVar("uses", default=_NOTHING)


def linear_layers(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(input, output) features of every linear layer by name: torch's, the classes derived from
    it (quantised ones too), and GPT-2's Conv1D."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            found[name] = (int(module.weight.shape[0]), int(module.nf))
    return found


class Use:
    """What computes in one ``with`` block: for each row of the batch a slot, or none.

    Args:
        slots:      of the table, one for each row; -1: the base model alone.
        identities: of the adapters in them, "" for the base model.
    """

    def __init__(self, slots: Sequence[int], identities: Sequence[str], num_slots: int) -> None:
        self.is_open = True
        self.is_base = all(slot < 0 for slot in slots)
        same = len(set(identities)) == 1
        self.identity = identities[0] if same else ",".join(identities)
        self._slots = torch.tensor(slots[:1] if same else slots, dtype=torch.int64)
        self._rows, self._num_slots = len(self._slots), num_slots
        self.is_one = self._rows == 1  # all tokens have the same adapter
        self.plans: dict[int, AdapterPlan] = {}  # by number of tokens

    def plan(self, name: str, x: torch.Tensor, T: int) -> AdapterPlan:
        """Which of the T tokens of ``x`` [batch, ..., I] goes to which slot."""
        rows = self._rows
        if rows > 1:
            if x.dim() < 3:
                raise ArgumentError(
                    f"{name}: an input of shape [batch, tokens, features] wanted where rows have "
                    f"different adapters, got {list(x.shape)}: whose tokens these are is not known"
                )
            if len(x) % rows:
                raise ArgumentError(
                    f"use_batch: as many adapters as rows wanted, got {rows} for {len(x)} rows"
                )
        plan = self.plans.get(T)
        if plan is None:
            # Beams and returned sequences repeat each row before the next.
            slots = self._slots.repeat_interleave(T // rows) if T else self._slots[:0]
            plan = plan_adapters(slots, self._num_slots)
            if len(self.plans) >= _PLANS:
                self.plans.clear()
            self.plans[T] = plan
        return plan


class _Layer:
    """The forward of one linear layer under an attachment: its method ``run``.

    A decode step runs it for every layer of the model, so that its Python counts: there are no
    calls in it that can be done without.
    """

    __slots__ = ("attachment", "base", "before", "forward", "index", "inputs", "module", "name",
                 "number", "outputs", "parameters", "table")  # fmt: skip

    def __init__(self, attachment: Attachment, index: int, name: str, module: Any) -> None:
        self.attachment, self.index, self.name, self.module = attachment, index, name, module
        self.before = module.__dict__.get("forward")  # accelerate's hooks stand there
        self.base = module.forward
        self.number, self.table = attachment.number, attachment.table
        self.inputs, self.outputs = attachment.shapes[name]
        self.parameters = module._parameters
        is_plain = type(module) is torch.nn.Linear and self.before is None
        self.forward = self.run_linear if is_plain else self.run

    def run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.add(self.base(x, *args, **kwargs), x)

    def run_linear(self, input: torch.Tensor) -> torch.Tensor:
        """What torch.nn.Linear does, without the way there."""
        parameters = self.parameters
        try:
            y = _linear(input, parameters["weight"], parameters["bias"])
        except KeyError:  # parametrised since
            y = self.base(input)
        return self.add(y, input)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``y`` and what the adapters in use add to it; y is changed where that is allowed."""
        use = _uses.get().get(self.number)
        if use is None or use.is_base or not use.is_open:
            self.attachment.check(use)
            return y
        T = x.numel() // self.inputs
        plan = use.plans.get(T) if use.is_one else None
        if plan is None:
            plan = use.plan(self.name, x, T)
        if y.requires_grad:
            return self.attachment.differentiable(self.index, y, x, plan)
        rows = y.view(T, self.outputs)
        apply_adapters_(rows, x.reshape(T, self.inputs), self.table, self.index, plan)
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            "model: one without attached adapters wanted to copy or pickle; detach them first"
        )


class Attachment:
    """A table of adapters under the linear layers of one model, whose weights stay as they are.

    The forward of each linear layer is replaced in that one object; ``detach`` puts back what was
    there. Outside ``use`` the model computes as before, bit for bit.

    Thread-safe: what is in use belongs to the thread (or task) that said so. While any block of
    ``use`` is open, a forward pass in a thread that never said which adapter it wants is refused:
    a thread that generates in the background of such a block would else silently run the base
    model. ``use(None)`` says that the base model is meant.

    Args:
        model:     of transformers, or any module with linear layers, on one device.
        num_slots: how many adapters can be ready at once.

    Raises:
        ArgumentError: no linear layers, several dtypes or devices, adapters of PEFT in the model,
            or another attachment.
    """

    def __init__(self, model: torch.nn.Module, num_slots: int = 256) -> None:
        if hasattr(model, "peft_config"):
            raise ArgumentError(
                f"model: one without PEFT's layers wanted, got a {type(model).__name__}; use "
                "peft_model.unload() and add its folder to the memory"
            )
        if hasattr(model, ADAPTERS):
            raise ArgumentError("model: one without adapters of memos wanted; detach them first")
        self.model = model
        self.shapes = linear_layers(model)
        if not self.shapes:
            raise ArgumentError(f"model: linear layers wanted, got none in {type(model).__name__}")
        self.dtype, self.device = _place(model)
        self.table = AdapterTable(list(self.shapes.values()), num_slots, self.dtype, self.device)
        self.number = next(_numbers)
        self._held = self._open = 0
        self._is_detached = False
        self._lock = threading.Lock()
        self._layers = [
            _Layer(self, i, name, model.get_submodule(name)) for i, name in enumerate(self.shapes)
        ]
        for layer in self._layers:
            layer.module.forward = layer.forward
        setattr(model, ADAPTERS, self)

    def detach(self) -> None:
        """Give the model back as it was.

        Raises ArgumentError, and changes nothing, while adapters are in use or where something
        else has replaced a forward since.
        """
        for layer in self._layers:
            if layer.module.__dict__.get("forward") is not layer.forward:
                raise ArgumentError(
                    f"model: {layer.name} got another forward after the adapters were attached; "
                    "take that away first"
                )
        with self._lock:
            if self._held or self._open:
                raise ArgumentError(
                    f"detach: no adapter in use wanted, got {max(self._held, self._open)} uses"
                )
            self._is_detached = True
        for layer in self._layers:
            del layer.module.forward
            if layer.before is not None:
                layer.module.forward = layer.before
        delattr(self.model, ADAPTERS)

    @contextmanager
    def held(self) -> Iterator[None]:
        """In this block the model is not detached. Raises ArgumentError where it is already."""
        with self._lock:
            if self._is_detached:
                raise ArgumentError("use: the model was detached")
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    @contextmanager
    def use(self, slots: Sequence[int], identities: Sequence[str]) -> Iterator[Use]:
        """In this block row i of a batch computes with ``slots[i]``; one slot: all rows."""
        use = Use(slots, identities, self.table.num_slots)
        token = _uses.set({**_uses.get(), self.number: use})
        with self._lock:
            self._open += 1
        try:
            yield use
        finally:
            use.is_open = False
            _uses.reset(token)
            with self._lock:
                self._open -= 1

    def identity(self) -> str:
        """Of the adapters that a forward pass of this thread computes with; "" for none.

        Raises ArgumentError where that is not known, as a forward pass does.
        """
        use = _uses.get().get(self.number)
        self.check(use)
        return "" if use is None else use.identity

    def check(self, use: Use | None) -> None:
        """Raise ArgumentError where a forward pass would not compute what the caller means."""
        if use is None and self._open:
            raise ArgumentError(
                "use: this thread has not said which adapter it wants while another has one in "
                "use; say use(None) for the base model, or run the thread in "
                "contextvars.copy_context() of the block"
            )
        if use is not None and not use.is_open:
            raise ArgumentError("use: the block in which this adapter was in use has ended")

    def differentiable(
        self, index: int, y: torch.Tensor, x: torch.Tensor, plan: AdapterPlan
    ) -> torch.Tensor:
        """As ``apply_adapters_`` by torch's own operations, for gradients with respect to x."""
        inputs, outputs = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        starts = plan.starts.tolist()
        for slot, (first, last) in enumerate(itertools.pairwise(starts)):
            factors = self.table.factors(slot, index) if first < last else None
            if factors is None:
                continue
            down, up, scale = factors
            rows = plan.order[first:last]
            delta = scale * (inputs[rows].float() @ down.float().T) @ up.float()
            outputs = outputs.index_add(0, rows, delta.to(y.dtype))
        return outputs.view(y.shape)


def _place(model: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype that the linear layers compute in, and their device."""
    dtypes, devices = set(), set()
    for name in linear_layers(model):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            devices.add(parameter.device)
            if parameter.is_floating_point():
                dtypes.add(parameter.dtype)
    if len(devices) != 1 or devices == {torch.device("meta")}:
        raise BackendError(
            f"model: all linear layers on one device wanted, got {sorted(map(str, devices))}"
        )
    if not dtypes:  # quantised weights; torch computes with what goes in
        dtypes = {getattr(model, "dtype", torch.float32)}
    if len(dtypes) != 1:
        raise ArgumentError(
            f"model: linear layers of one dtype wanted, got {sorted(map(str, dtypes))}"
        )
    return dtypes.pop(), devices.pop()
