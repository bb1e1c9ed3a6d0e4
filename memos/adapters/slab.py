"""Adapters as slabs: one aligned buffer, of which kernels read every tensor in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray

from memos.adapters.adapter import Adapter
from memos.adapters.packed import DTYPES, Layer, Packed, is_dense, leaves, pack, scale_bits
from memos.adapters.store import AdapterStore
from memos.errors import ArgumentError
from memos.kernels import _memory
from memos.kernels.adapters import ALIGNMENT, RANK_STEP
from memos.kernels.kv import DTYPES as DTYPE_NUMBERS
from memos.kernels.slabs import SlabJobs, fill_slab

_KEPT_PLANS = 64
_NAMED = 3  # in messages

Slab = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SlabPlan:
    """How the payload of adapters of one shape becomes a slab.

    Args:
        num_bytes: of the slab.
        offsets:   int64 [modules, 4]: byte offset of down, of up, padded rank, bits of the scale
            as float32; a row of zeros for a module without factors. Never changed.
        jobs:      of ``fill_slab``, from the whole payload.
        by_leaf:   the jobs of each leaf (``packed.leaves``), from its bytes alone; none where the
            payload is not in canonical order.
    """

    num_bytes: int
    offsets: torch.Tensor
    jobs: SlabJobs
    by_leaf: tuple[SlabJobs, ...]


class SlabLayout:
    """Where the modules of one model stand in a slab. Thread-safe.

    Per module with factors: ``down`` [R, I], then ``up`` transposed [R, O], both in ``dtype``, R
    padded with zeros to a multiple of 8, each at a multiple of 256 bytes, zeros between them.

    Args:
        modules: (name, input features, output features) in the order of the table's columns.
        dtype:   of the table: float32, float16 or bfloat16.

    Raises:
        ArgumentError: no modules, a name twice, sizes below 1 or another dtype.
    """

    def __init__(self, modules: Sequence[tuple[str, int, int]], dtype: torch.dtype) -> None:
        if dtype not in DTYPE_NUMBERS:
            raise ArgumentError(f"dtype: float32, float16 or bfloat16 wanted, got {dtype}")
        self.modules = tuple((name, int(i), int(o)) for name, i, o in modules)
        self.dtype = dtype
        self._index = {name: (k, i, o) for k, (name, i, o) in enumerate(self.modules)}
        if not self.modules or len(self._index) < len(self.modules):
            raise ArgumentError("modules: at least one, each name once, wanted")
        if any(i < 1 or o < 1 for _, i, o in self.modules):
            raise ArgumentError("modules: input and output features of at least 1 wanted")
        self._plans: OrderedDict[tuple[Layer, ...], SlabPlan] = OrderedDict()

    def num_bytes(self, layers: tuple[Layer, ...]) -> int:
        """Of the slab of an adapter with these layers. Raises ArgumentError as ``plan`` does."""
        return self.plan(layers).num_bytes

    def plan(self, layers: tuple[Layer, ...]) -> SlabPlan:
        """How an adapter with these layers becomes a slab.

        Raises:
            ArgumentError: layers that the model lacks, or has in other sizes: named.

        Cost: about 2 us a layer, once for all adapters of these shapes and scales.
        """
        found = self._plans.get(layers)
        if found is None:
            self._check(layers)
            found = self._plans[layers] = self._make_plan(layers)
            while len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return found

    def make(self, adapter: Adapter | Packed, *, pin: bool = False) -> Slab:
        """The slab of an adapter in memory, and its offsets (``SlabPlan.offsets``).

        Args:
            adapter: as it was read or made.
            pin:     put the slab into memory that a GPU copies from.

        Raises:
            ArgumentError: as ``plan``; or numbers beyond the range of the dtype.
        """
        packed = adapter if isinstance(adapter, Packed) else pack(adapter)
        plan = self.plan(packed.layers)
        slab = empty_slab(plan.num_bytes, pin)
        if bad := fill_slab(slab, packed.payload, plan.jobs):
            raise ArgumentError(f"adapter: {self._beyond(bad)}")
        return slab, plan.offsets

    def load(
        self,
        store: AdapterStore,
        digest: str,
        *,
        pin: bool = False,
        into: torch.Tensor | None = None,
    ) -> Slab:
        """``make`` of a stored adapter, checked against its digest on the way.

        Args:
            into: a slab that no one reads any more: overwritten and returned where it has the
                right size. Fresh memory costs as much again as filling it.

        Raises:
            NotFoundError: no such adapter.
            StoreError: its files are damaged. Nothing of them is returned.
            ArgumentError: as ``make``.

        Cost: reads the file once in pieces that stay in the cache while they are hashed and
        converted; the slab is written once.
        """
        with store.open(digest) as stored:
            plan = self.plan(stored.layers)
            if into is None or into.numel() != plan.num_bytes:
                into = empty_slab(plan.num_bytes, pin)
            slab, bad = into, [0] * len(plan.by_leaf)

            def take(i: int, data: NDArray[numpy.uint8]) -> None:
                bad[i] = fill_slab(slab, data, plan.by_leaf[i])

            stored.read(take)
            if any(bad):
                raise ArgumentError(f"{digest}: {self._beyond(sum(bad))}")
        return slab, plan.offsets

    def _beyond(self, bad: int) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"numbers that {name} can hold wanted, got {bad} that become NaN or infinity in it"

    def _check(self, layers: Sequence[Layer]) -> None:
        missing = [layer.name for layer in layers if layer.name not in self._index]
        if missing:
            raise ArgumentError(
                f"adapter: layers of the model wanted, got {_named(missing)}, which it lacks: the "
                "adapter belongs to another base model"
            )
        wrong = []
        for layer in layers:
            _, inputs, outputs = self._index[layer.name]
            if (layer.inputs, layer.outputs) != (inputs, outputs):
                wrong.append(
                    f"{layer.name} {layer.inputs} -> {layer.outputs} (the model has {inputs} -> "
                    f"{outputs})"
                )
        if wrong:
            raise ArgumentError(
                f"adapter: the sizes of the model's layers wanted, got {_named(wrong)}: the "
                "adapter belongs to another base model"
            )

    def _make_plan(self, layers: tuple[Layer, ...]) -> SlabPlan:
        item = self.dtype.itemsize
        offsets = numpy.zeros((len(self.modules), 4), numpy.int64)
        at = 0
        jobs_of: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for layer in sorted(layers, key=lambda layer: self._index[layer.name][0]):
            index, inputs, outputs = self._index[layer.name]
            rank = -(-layer.rank // RANK_STEP) * RANK_STEP
            up_at = _aligned(at + rank * inputs * item)
            end = _aligned(up_at + rank * outputs * item)
            code = DTYPE_NUMBERS[DTYPES[layer.dtype]]
            offsets[index] = at, up_at, rank, scale_bits(layer.scale)
            jobs_of[layer.name] = (
                (layer.down_at, code, layer.rank, inputs, 0, at, rank, up_at),
                (layer.up_at, code, outputs, layer.rank, 1, up_at, rank, end),
            )
            at = end
        table = numpy.array([job for layer in layers for job in jobs_of[layer.name]], numpy.int64)
        by_leaf = []
        for leaf in leaves(layers) if is_dense(layers) else ():
            part = table[2 * leaf.first : 2 * leaf.last].copy()
            part[:, 0] -= leaf.ranges[0][0]
            by_leaf.append(SlabJobs(part, self.dtype))
        jobs = SlabJobs(table, self.dtype)
        return SlabPlan(at, torch.from_numpy(offsets), jobs, tuple(by_leaf))


class StoredSlabs:
    """What a pool loads from: the slabs of the adapters in a store."""

    def __init__(self, store: AdapterStore, layout: SlabLayout, *, pin: bool = False) -> None:
        self.store, self.layout, self.pin = store, layout, pin

    def num_bytes(self, digest: str) -> int:
        """Of the slab. Raises as ``SlabLayout.load``. Cost: reads the header of the file."""
        with self.store.open(digest) as stored:
            return self.layout.num_bytes(stored.layers)

    def load(self, digest: str, into: torch.Tensor | None = None) -> Slab:
        """See ``SlabLayout.load``."""
        return self.layout.load(self.store, digest, pin=self.pin, into=into)


def empty_slab(num_bytes: int, pin: bool = False) -> torch.Tensor:
    """Memory for a slab: uint8 [num_bytes] on the CPU, aligned to 256 bytes."""
    if pin:  # whole pages
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    whole = _memory.empty((num_bytes + ALIGNMENT,), torch.uint8)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + num_bytes]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _named(items: Sequence[str]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more
