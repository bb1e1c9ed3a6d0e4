"""Low-rank adapters: which token has which, applied to a layer's output, merged into a weight.

An adapter lives in one slab of bytes; a table holds, for each slot and module, where its factors
are. Changing the adapter of a slot is one copy into a slab and one write of a table row.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from memos.errors import ArgumentError
from memos.kernels import _cuda, _library, _native, _triton
from memos.kernels._dims import Dims, contiguous
from memos.kernels._op import op

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/codec/layout.h
MAX_RANK = 512
RANK_STEP = 8  # ranks are padded to a multiple of this with zeros
ALIGNMENT = 256  # bytes, of a slab and of each tensor in it
_EXPONENT = 0x7F800000  # of a float32: all ones where it is infinite or NaN
# A second thread pays from 1 ms of work on: the layer's own product has just left the threads of
# OpenMP spinning on every core. **measured** on 2 cores: an adapter added 63 ms to 512 tokens
# through 84 layers of h = 512 on two threads of ours, 34 ms on one.
_PRODUCTS_PER_BYTE = 128
_MERGE_BYTES = 4 << 20  # of the float32 rows of merge_adapter


class AdapterTable:
    """Slots x modules of one model on one device: where the factors of each adapter are.

    ``rows`` [num_slots, modules, 4] int64 holds the address of ``down`` [R, I], the address of
    ``up`` [R, O] (transposed: its outputs are neighbours), R, and the bits of the float32 scale;
    all zero where a module stays as it is. Read it, change it with ``put`` and ``clear`` only.

    Keeps the slab of each slot alive until the slot is put or cleared again. One thread at a time
    may put and clear, while others compute with other slots.

    Args:
        shapes:    (I, O) of each module: input and output features.
        num_slots: adapters that can be there at once.
        dtype:     of the factors and of what they are applied to: float32, float16 or bfloat16.
        device:    where the slabs are.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_slots < 1:
            raise ArgumentError(f"num_slots: at least 1 wanted, got {num_slots}")
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype: float32, float16 or bfloat16 wanted, got {dtype}")
        self.shapes = tuple((int(inputs), int(outputs)) for inputs, outputs in shapes)
        for module, shape in enumerate(self.shapes):
            if min(shape) < 1:
                raise ArgumentError(f"shapes[{module}]: sizes of 1 or more wanted, got {shape}")
        self.num_slots = num_slots
        self.dtype = dtype
        self.rows = torch.zeros(num_slots, len(self.shapes), 4, dtype=torch.int64, device=device)
        self.device = self.rows.device
        self._sizes = torch.tensor(self.shapes, dtype=torch.int64).view(-1, 2) * dtype.itemsize
        self._slabs: list[torch.Tensor | None] = [None] * num_slots
        self._offsets: list[torch.Tensor | None] = [None] * num_slots
        self._ranks = [0] * num_slots  # the highest of each slot
        self.max_rank = 0
        # The native AdapterTable (csrc/cpu/kernels.h), and the shapes that it points to.
        self._flat = array("q", [size for shape in self.shapes for size in shape])
        self._native = array("q", [self.rows.data_ptr(), self._flat.buffer_info()[0]])
        self._native.extend([num_slots, len(self.shapes), DTYPES[dtype]])
        self._address = self._native.buffer_info()[0]
        self._on_cpu = self.device.type == "cpu"

    def put(self, slot: int, slab: torch.Tensor, offsets: torch.Tensor) -> None:
        """Make ``slot`` the adapter in ``slab``: one write of its row.

        Args:
            slot:    in [0, num_slots).
            slab:    [bytes] uint8 on the device of the table, its address a multiple of 256; must
                     not change while it is in the table.
            offsets: [modules, 4] int64 on the CPU, as ``rows`` with offsets into the slab instead
                     of addresses, multiples of 256. R is a multiple of 8 up to 512; 0: the module
                     stays as it is.

        Raises:
            ArgumentError: anything of that is not so, or a scale is not finite. The slot is as it
                was then.
        """
        self._check_slot(slot)
        Dims().tensor("slab", slab, "bytes", [torch.uint8])
        contiguous("slab", slab)
        if slab.device != self.device:
            raise ArgumentError(f"slab: on {self.device} wanted, got {slab.device}")
        if slab.data_ptr() % ALIGNMENT:
            raise ArgumentError(f"slab: an address that is a multiple of {ALIGNMENT} wanted")
        offsets = self._checked(offsets, slab.numel())
        rows = offsets.clone()
        rows[:, :2] += slab.data_ptr()
        rows[offsets[:, 2] == 0] = 0
        self.rows[slot].copy_(rows)
        self._keep(slot, slab, offsets, int(offsets[:, 2].max()) if len(offsets) else 0)

    def clear(self, slot: int) -> None:
        """Leave ``slot`` without an adapter and let go of its slab.

        Raises:
            ArgumentError: the slot is not in [0, num_slots).
        """
        self._check_slot(slot)
        self.rows[slot].zero_()
        self._keep(slot, None, None, 0)

    def factors(self, slot: int, module: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """``down`` [R, I], ``up`` [R, O] and the scale; None where the module stays as it is.

        Returns:
            Views of the slab, R with its padding.

        Raises:
            ArgumentError: the slot or the module is out of range.
        """
        self._check_slot(slot)
        if not 0 <= module < len(self.shapes):
            raise ArgumentError(f"module: in [0, {len(self.shapes)}) wanted, got {module}")
        slab, offsets = self._slabs[slot], self._offsets[slot]
        if slab is None or offsets is None:
            return None
        down_at, up_at, R, bits = offsets[module].tolist()
        if R == 0:
            return None
        (scale,) = struct.unpack("=f", struct.pack("=I", bits))
        views = (
            slab[at : at + R * size * self.dtype.itemsize].view(self.dtype).view(R, size)
            for at, size in zip((down_at, up_at), self.shapes[module], strict=True)
        )
        return next(views), next(views), scale

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterTable holds addresses of this process: make a new one")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise ArgumentError(f"slot: in [0, {self.num_slots}) wanted, got {slot}")

    def _checked(self, offsets: torch.Tensor, slab_bytes: int) -> torch.Tensor:
        """A copy of the offsets with clean scales, after all checks."""
        Dims(modules=len(self.shapes)).tensor("offsets", offsets, "modules 4", [torch.int64])
        if offsets.shape[1] != 4 or offsets.device.type != "cpu":
            raise ArgumentError(
                f"offsets: [modules, 4] on the CPU wanted, got {list(offsets.shape)} "
                f"on {offsets.device}"
            )
        offsets = offsets.clone()
        offsets[:, 3] &= 0xFFFFFFFF
        at, R, scale = offsets[:, :2], offsets[:, 2], offsets[:, 3]
        unused = R == 0
        ranks = (R >= 0) & (R <= MAX_RANK) & (R % RANK_STEP == 0)
        inside = (at >= 0) & (at % ALIGNMENT == 0) & (at <= slab_bytes - R[:, None] * self._sizes)
        for good, wanted in (
            (ranks, f"a rank of 0 to {MAX_RANK} that is a multiple of {RANK_STEP}"),
            (inside.all(1), f"multiples of {ALIGNMENT} inside the {slab_bytes} bytes of the slab"),
            (scale & _EXPONENT != _EXPONENT, "a finite scale"),
        ):
            if not (good | unused).all():
                module = int((~(good | unused)).nonzero()[0])
                raise ArgumentError(
                    f"offsets[{module}]: {wanted} wanted, got {offsets[module].tolist()}"
                )
        return offsets

    def _keep(
        self, slot: int, slab: torch.Tensor | None, offsets: torch.Tensor | None, rank: int
    ) -> None:
        self._slabs[slot], self._offsets[slot], self._ranks[slot] = slab, offsets, rank
        self.max_rank = max(self._ranks)


class AdapterRows(AdapterTable):
    """What an op in a graph knows of a table: its ``rows``. Keeps no slab alive.

    Args:
        rows:     [num_slots, modules, 4] int64, contiguous: ``AdapterTable.rows``.
        shape:    (I, O) of the module that it is asked for.
        dtype:    of the table.
        max_rank: of the table.
    """

    def __init__(
        self, rows: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, max_rank: int
    ) -> None:
        Dims().tensor("rows", rows, "num_slots modules fields", [torch.int64])
        contiguous("rows", rows)
        self.num_slots, modules, fields = rows.shape
        if self.num_slots < 1 or fields != 4:
            raise ArgumentError(f"rows: [num_slots, modules, 4] wanted, got {list(rows.shape)}")
        self.rows, self.device, self.dtype, self.max_rank = rows, rows.device, dtype, max_rank
        self.shapes = (shape,) * modules
        self._on_cpu = rows.is_cpu
        self._flat = array("q", shape * modules)
        self._native = array("q", [rows.data_ptr(), self._flat.buffer_info()[0]])
        self._native.extend([self.num_slots, modules, DTYPES[dtype]])
        self._address = self._native.buffer_info()[0]

    def factors(self, slot: int, module: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        down_at, up_at, R, bits = self.rows[slot, module].tolist()
        if R == 0:
            return None
        (scale,) = struct.unpack("=f", struct.pack("=I", bits))
        views = (
            torch.frombuffer(
                (ctypes.c_char * (R * size * self.dtype.itemsize)).from_address(at),
                dtype=self.dtype,
            ).view(R, size)
            for at, size in zip((down_at, up_at), self.shapes[module], strict=True)
        )
        return next(views), next(views), scale


class AdapterPlan:
    """Which tokens of a batch have which slot's adapter; made once, used for every module.

    Args:
        order:  [n] int64, the tokens that have an adapter, sorted by slot; no two are equal. On a
            GPU others may follow behind ``starts[num_slots]``: nothing reads them.
        starts: [num_slots + 1] int64, same device: slot s has ``order[starts[s] : starts[s + 1]]``.
        tokens: T, of the batch.
    """

    __slots__ = (
        "_address", "_native", "_on_cpu", "count", "num_slots", "order", "starts", "tokens"
    )  # fmt: skip

    def __init__(self, order: torch.Tensor, starts: torch.Tensor, tokens: int) -> None:
        for name, tensor in (("order", order), ("starts", starts)):
            if tensor.dim() != 1 or tensor.dtype != torch.int64 or not tensor.is_contiguous():
                raise ArgumentError(f"{name}: contiguous int64 of one axis wanted")
        if len(starts) < 2 or len(order) > tokens:
            raise ArgumentError(
                f"starts: num_slots + 1 numbers, order: up to {tokens} tokens wanted, "
                f"got {len(starts)} and {len(order)}"
            )
        self.order, self.starts, self.tokens = order, starts, tokens
        self.count, self.num_slots = len(order), len(starts) - 1
        # The native AdapterPlan (csrc/cpu/kernels.h).
        self._native = array("q", [order.data_ptr(), starts.data_ptr(), tokens])
        self._address = self._native.buffer_info()[0]
        self._on_cpu = order.is_cpu and starts.is_cpu

    @property
    def device(self) -> torch.device:
        return self.order.device

    def __reduce__(self) -> Any:
        return AdapterPlan, (self.order, self.starts, self.tokens)


def uniform_plan(
    T: int, slot: int, num_slots: int, device: torch.device | str = "cpu"
) -> AdapterPlan:
    """The plan of T tokens that all have the same slot; -1: none has one.

    Returns:
        What ``plan_adapters`` returns for T equal slots; small ones are kept and returned again.

    Raises:
        ArgumentError: T is negative, num_slots less than 1, or the slot not in [-1, num_slots).
    """
    if T > 4096:
        return _uniform_plan.__wrapped__(T, slot, num_slots, device)
    return _uniform_plan(T, slot, num_slots, device)


@functools.lru_cache(maxsize=128)
def _uniform_plan(T: int, slot: int, num_slots: int, device: torch.device | str) -> AdapterPlan:
    if T < 0 or num_slots < 1 or not -1 <= slot < num_slots:
        raise ArgumentError(
            f"slot: T >= 0 tokens and a slot in [-1, num_slots) wanted, "
            f"got T = {T}, slot {slot}, num_slots = {num_slots}"
        )
    n = T if slot >= 0 else 0
    starts = torch.tensor([n if 0 <= slot < s else 0 for s in range(num_slots + 1)])
    return AdapterPlan(torch.arange(n, device=device), starts.to(device), T)


def _check_plan(slots: torch.Tensor, num_slots: int) -> None:
    Dims().tensor("slots", slots, "T", [torch.int64])
    contiguous("slots", slots)
    if num_slots < 1:
        raise ArgumentError(f"num_slots: at least 1 wanted, got {num_slots}")


@op(check=_check_plan)
def plan_adapters(slots: torch.Tensor, num_slots: int) -> AdapterPlan:
    """Sort the tokens of a batch by adapter, stably; tokens of slot -1 are left out.

    Args:
        slots:     [T] int64, contiguous: the slot of each token, -1 for the base model alone.
        num_slots: of the table that the plan is for.

    Returns:
        order [n] and starts [num_slots + 1], int64 on the device of ``slots``. On a GPU order
        is [T], with the tokens of no adapter at its end: how many have one is not known here.

    Raises:
        ArgumentError: a shape or dtype is out of contract, or a slot is not in [-1, num_slots).
            On a GPU a slot out of range counts as -1: checking it would synchronise.

    Cost: O(T + num_slots), a counting sort.
    """
    bad = ((slots < -1) | (slots >= num_slots)).nonzero()
    if len(bad):
        _refuse_slot(int(bad[0]), slots, num_slots)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots[slots >= 0], minlength=num_slots)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return AdapterPlan(order[len(slots) - int(starts[-1]) :], starts, len(slots))


def _refuse_slot(t: int, slots: torch.Tensor, num_slots: int) -> NoReturn:
    raise ArgumentError(f"slots: in [-1, {num_slots}) wanted, entry {t} is {int(slots[t])}")


@plan_adapters.backend(
    "cpu", accepts=lambda slots, num_slots: slots.is_cpu, missing=_native.missing
)
def _plan_cpu(slots: torch.Tensor, num_slots: int) -> AdapterPlan:
    T = len(slots)
    order = torch.empty(T, dtype=torch.int64)
    starts = torch.empty(num_slots + 1, dtype=torch.int64)
    n = _native.core().cpu_plan_adapters(
        slots.data_ptr(), T, num_slots, order.data_ptr(), starts.data_ptr()
    )
    if n < 0:
        _refuse_slot(-1 - n, slots, num_slots)
    return AdapterPlan(order if n == T else order[:n], starts, T)


def _check_apply(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> None:
    # Once per module and token of a model: what nearly every call is takes one expression.
    try:
        inputs, outputs = table.shapes[module]
        T = plan.tokens
        good = (
            module >= 0
            and y.shape == (T, outputs)
            and x.shape == (T, inputs)
            and y.dtype is x.dtype is table.dtype
            and plan.num_slots == table.num_slots
            and y.is_contiguous()
            and x.is_contiguous()
            and not y.requires_grad
            and (
                (table._on_cpu and plan._on_cpu and y.is_cpu and x.is_cpu)
                or table.device == plan.device == y.device == x.device == plan.starts.device
            )
        )
    except (AttributeError, IndexError, TypeError):
        good = False
    if not good:
        _check_apply_slowly(y, x, table, module, plan)


def _check_apply_slowly(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> None:
    """All of it, with a message for each."""
    for name, value, kind in (("table", table, AdapterTable), ("plan", plan, AdapterPlan)):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name}: {kind.__name__} wanted, got {type(value).__name__}")
    if not isinstance(module, int) or not 0 <= module < len(table.shapes):
        raise ArgumentError(f"module: in [0, {len(table.shapes)}) wanted, got {module}")
    inputs, outputs = table.shapes[module]
    dims = Dims(T=plan.tokens, I=inputs, O=outputs)
    for name, tensor, shape in (("y", y, "T O"), ("x", x, "T I")):
        dims.tensor(name, tensor, shape, [table.dtype])
        if tensor.device != table.device:
            raise ArgumentError(f"{name}: on {table.device} wanted, got {tensor.device}")
        T, size = tensor.shape
        if size > 1 and tensor.stride(1) != 1:
            raise ArgumentError(f"{name}: last axis of stride 1 wanted, got {tensor.stride()}")
        if name == "y" and T > 1 and tensor.stride(0) < size:
            raise ArgumentError(f"y: rows that do not overlap wanted, got {tensor.stride()}")
    if plan.device != table.device or plan.starts.device != table.device:
        raise ArgumentError(f"plan: on {table.device} wanted, got {plan.device}")
    if plan.num_slots != table.num_slots:
        raise ArgumentError(
            f"plan: made for num_slots = {table.num_slots} wanted, got {plan.num_slots}"
        )
    if y.requires_grad:
        raise ArgumentError(
            "y: a tensor without gradient wanted, none passes through here: use torch.no_grad()"
        )


@op(check=_check_apply)
def apply_adapters_(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> None:
    """Add to a layer's output: ``y[t] += scale * (x[t] @ down.T) @ up``, each token its adapter.

    Products are added up in float32 and rounded once, into ``y``. On the CPU a row of ``y`` has
    the same bits whatever else is in the batch. No gradient passes.

    Args:
        y:      [T, O] dtype of the table; changed where a token has an adapter. Rows may be apart,
                the last axis is contiguous.
        x:      [T, I], the layer's input, the same.
        table:  the adapters; ``shapes[module]`` is (I, O).
        module: in [0, modules).
        plan:   of ``plan_adapters`` for these T tokens and the slots of the table.

    Raises:
        ArgumentError: a shape, dtype, device or the plan is out of contract, or y has a gradient.

    Cost: n * R * (I + O) products, R the rank of each token's own adapter; reads the factors of
        each slot once per 64 tokens, reads x, reads and writes y once.
    Source: Hu et al., "LoRA" (arXiv:2106.09685), section 4.1; Chen et al., "Punica"
        (arXiv:2310.18547), for tokens of several adapters in one batch.
    """
    starts = plan.starts.tolist()
    for slot in range(table.num_slots):
        tokens = plan.order[starts[slot] : starts[slot + 1]]
        found = table.factors(slot, module)
        if len(tokens) and found is not None:
            down, up, scale = found
            delta = (x[tokens].float() @ down.float().T) @ up.float()
            y[tokens] = (y[tokens].float() + scale * delta).to(y.dtype)


def _takes_apply(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> bool:
    return table._on_cpu


@apply_adapters_.backend("cpu", accepts=_takes_apply, missing=_native.missing)
def _apply_cpu(
    y: torch.Tensor, x: torch.Tensor, table: AdapterTable, module: int, plan: AdapterPlan
) -> None:
    n = plan.count
    if n == 0:
        return
    run = _native.core().cpu_apply_adapters
    where = table._address, module, plan._address
    if plan.tokens == 1:
        if run(*where, y.data_ptr(), 0, x.data_ptr(), 0, 0, 1) >= 0:
            _refuse_order(0, plan)
        return
    at = (*where, y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0))

    def part(first: int, last: int) -> None:
        if (refused := run(*at, first, last)) >= 0:
            _refuse_order(refused, plan)

    products = n * table.max_rank * sum(table.shapes[module])
    _native.parallel(part, n, products // _PRODUCTS_PER_BYTE)


def _refuse_order(i: int, plan: AdapterPlan) -> NoReturn:
    raise ArgumentError(
        f"plan: tokens in [0, {plan.tokens}) wanted, order[{i}] is {int(plan.order[i])}"
    )


def _check_merge(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    dims = Dims().tensor("weight", weight, "O I", list(DTYPES))
    dims.tensor("down", down, "R I", list(DTYPES)).tensor("up", up, "O R", list(DTYPES))
    for name, tensor in (("down", down), ("up", up)):
        if tensor.device != weight.device:
            raise ArgumentError(f"{name}: on {weight.device} wanted, got {tensor.device}")


@op(check=_check_merge)
def merge_adapter(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """A weight with an adapter inside: ``weight + scale * up @ down``, in float32, rounded once.

    Args:
        weight: [O, I] float32, float16 or bfloat16.
        down:   [R, I] any of these dtypes, PEFT's lora_A.
        up:     [O, R] any of these dtypes, PEFT's lora_B.
        scale:  factor of the product.

    Returns:
        [O, I], dtype and device of ``weight``, freshly allocated: to take the adapter out again,
        keep the weight (adding and subtracting in bfloat16 does not come back).

    Raises:
        ArgumentError: a shape, dtype or device is out of contract.

    Cost: O * I * R products; 4 MB of float32 at a time.
    """
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    down = down.float()
    step = max(1, _MERGE_BYTES // max(1, 4 * weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        out[rows] = weight[rows].float() + scale * (up[rows].float() @ down)
    return out


# The body above runs in the matrix products of torch: it is the CPU backend too.
merge_adapter.backend("cpu")(merge_adapter.reference)


_cuda.register_adapters(apply_adapters_)
_triton.register_adapters(plan_adapters, apply_adapters_, merge_adapter, AdapterPlan)
_library.register_adapters(apply_adapters_, merge_adapter, AdapterPlan, AdapterRows)
