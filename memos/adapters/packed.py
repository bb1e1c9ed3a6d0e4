"""An adapter as a table of layers and one run of bytes: what files, stores and slabs share."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from blake3 import blake3
from numpy.typing import NDArray

from memos.adapters.adapter import MAX_RANK, Adapter, Factors
from memos.cube.safetensors import ITEM_BYTES, Entry
from memos.errors import ArgumentError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PREFIX = "base_model.model."  # PEFT's, before the name of the layer
_EXPONENT = {"F32": (numpy.uint32, 0x7F800000), "F16": (numpy.uint16, 0x7C00),
             "BF16": (numpy.uint16, 0x7F80)}  # fmt: skip
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
LEAF_BYTES = 1 << 20
_MAX_SCALE = float(numpy.finfo(numpy.float32).max)
_MAGIC = b"memos adapter 1\n"


class Layer(NamedTuple):
    """The factors of one linear layer: ``down`` [rank, inputs], then ``up`` [outputs, rank].

    ``down_at`` and ``up_at`` say where their bytes begin; ``dtype`` is F32, F16 or BF16.
    """

    name: str
    rank: int
    inputs: int
    outputs: int
    dtype: str
    scale: float
    down_at: int
    up_at: int

    @property
    def down_bytes(self) -> int:
        return self.rank * self.inputs * ITEM_BYTES[self.dtype]

    @property
    def up_bytes(self) -> int:
        return self.outputs * self.rank * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Packed:
    """An adapter in one run of bytes.

    Args:
        layers:  in canonical order: wider dtypes first, then by name.
        payload: uint8, the tensors one after another; not changed afterwards.
        config:  what stands in adapter_config.json; card: of memos.
    """

    layers: tuple[Layer, ...]
    payload: NDArray[numpy.uint8]
    config: Mapping[str, Any]
    card: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """See ``files.digest``."""
        parts = [
            [self.payload[start:end] for start, end in leaf.ranges] for leaf in leaves(self.layers)
        ]
        return finish(begin_digest(self.layers), [hash_leaf(part) for part in parts])

    def check_finite(self, where: str) -> None:
        """Raise ArgumentError naming the first tensor with a NaN or an infinity."""
        for layer in self.layers:
            for which, start, size in (
                ("lora_A", layer.down_at, layer.down_bytes),
                ("lora_B", layer.up_at, layer.up_bytes),
            ):
                kind, exponent = _EXPONENT[layer.dtype]
                bits = self.payload[start : start + size].view(kind)
                if bool(numpy.any((bits & exponent) == exponent)):
                    raise ArgumentError(
                        f"{where}: finite numbers wanted, got NaN or infinity in {which} of "
                        f"{layer.name}"
                    )

    def adapter(self) -> Adapter:
        """Tensors over the payload's memory."""
        factors = {
            layer.name: Factors(
                self._tensor(layer, layer.down_at, (layer.rank, layer.inputs)),
                self._tensor(layer, layer.up_at, (layer.outputs, layer.rank)),
                layer.scale,
            )
            for layer in sorted(self.layers)
        }
        return Adapter(factors, self.config, self.card)

    def _tensor(self, layer: Layer, start: int, shape: tuple[int, int]) -> torch.Tensor:
        item = ITEM_BYTES[layer.dtype]
        data = self.payload[start : start + math.prod(shape) * item]
        if data.ctypes.data % item:  # another's file need not align its tensors
            data = data.copy()
        return torch.from_numpy(data).view(DTYPES[layer.dtype]).view(shape)


def canonical(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Layers in the order that digests and our own files have."""
    return tuple(sorted(layers, key=lambda layer: (-ITEM_BYTES[layer.dtype], layer.name)))


class Leaf(NamedTuple):
    """Neighbouring layers, hashed on their own: ``layers[first:last]``, whose bytes lie in
    ``ranges`` (one range where the payload is in canonical order)."""

    first: int
    last: int
    ranges: tuple[tuple[int, int], ...]


def leaves(layers: Sequence[Layer]) -> list[Leaf]:
    """Cut layers in canonical order where they reach 1 MiB: what one thread reads and hashes."""
    found: list[Leaf] = []
    first, size = 0, 0
    for i, layer in enumerate(layers):
        size += layer.down_bytes + layer.up_bytes
        if size >= LEAF_BYTES or i + 1 == len(layers):
            found.append(Leaf(first, i + 1, _ranges(layers[first : i + 1])))
            first, size = i + 1, 0
    return found


def _ranges(layers: Sequence[Layer]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for layer in layers:
        for start, size in ((layer.down_at, layer.down_bytes), (layer.up_at, layer.up_bytes)):
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], start + size)
            else:
                found.append((start, start + size))
    return tuple(found)


def is_dense(layers: Sequence[Layer]) -> bool:
    """Do the bytes of these layers lie one after another, in this order, from 0 on?"""
    found = _ranges(layers)
    return len(found) == 1 and found[0][0] == 0


def begin_digest(layers: Sequence[Layer]) -> bytes:
    """What a digest takes in before the leaves: everything but the tensors' bytes."""
    table = [
        [layer.name, layer.rank, layer.inputs, layer.outputs, layer.dtype, scale_bits(layer.scale)]
        for layer in layers
    ]
    text = json.dumps(table, separators=(",", ":")).encode()
    return _MAGIC + struct.pack("<Q", len(text)) + text


def hash_leaf(pieces: Iterable[NDArray[numpy.uint8]]) -> bytes:
    """BLAKE3 of the bytes of a leaf."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece.data)
    return bytes(hasher.digest())


def finish(begin: bytes, hashes: Sequence[bytes]) -> str:
    """The digest of ``begin_digest`` and all leaves."""
    return str(blake3(begin + b"".join(hashes)).hexdigest())


def scale_bits(scale: float) -> int:
    """The bits of the float32 nearest to a scale."""
    return int(numpy.float32(scale).view(numpy.uint32))


def pack(adapter: Adapter) -> Packed:
    """Copy an adapter's tensors into one run of bytes, in canonical order.

    Raises:
        ArgumentError: no layers, shapes, dtypes or ranks out of contract, NaN or infinities.
    """
    if not adapter.factors:
        raise ArgumentError("adapter: factors of at least one layer wanted, got none")
    layers = []
    for name, factors in adapter.factors.items():
        _check_factors(name, factors)
        (rank, inputs), outputs = factors.down.shape, factors.up.shape[0]
        dtype, scale = CODES[factors.down.dtype], float(factors.scale)
        layers.append(Layer(name, rank, inputs, outputs, dtype, scale, 0, 0))
    placed, at = [], 0
    for layer in canonical(layers):
        up_at = at + layer.down_bytes
        placed.append(layer._replace(down_at=at, up_at=up_at))
        at = up_at + layer.up_bytes
    payload = numpy.empty(at, numpy.uint8)
    for layer in placed:
        factors = adapter.factors[layer.name]
        for tensor, start in ((factors.down, layer.down_at), (factors.up, layer.up_at)):
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            payload[start : start + len(data)] = data
    packed = Packed(tuple(placed), payload, dict(adapter.config), dict(adapter.card))
    packed.check_finite("adapter")
    return packed


def _check_factors(name: str, factors: Factors) -> None:
    check_name(name, "adapter")
    down, up = factors.down, factors.up
    if down.dtype not in CODES or up.dtype != down.dtype:
        raise ArgumentError(
            f"{name}: down and up of one dtype, float32, float16 or bfloat16, wanted, got "
            f"{down.dtype} and {up.dtype}"
        )
    check_shapes(name, tuple(down.shape), tuple(up.shape), "adapter")
    if not abs(factors.scale) <= _MAX_SCALE:
        raise ArgumentError(f"{name}: a finite scale wanted, got {factors.scale}")


def check_name(name: str, where: str) -> None:
    """Raise ArgumentError unless this can be the name of a linear layer."""
    if not name or not name.isprintable() or name.startswith(PREFIX):
        raise ArgumentError(
            f"{where}: names of layers as model.named_modules() says them wanted, got {name!r}"
        )
    if _EXPERTS.search(name):
        raise ArgumentError(f"{where}: layers that every token passes wanted, got expert {name!r}")


def check_shapes(name: str, down: tuple[int, ...], up: tuple[int, ...], where: str) -> None:
    """Raise ArgumentError unless down is [R, I] and up [O, R] with R from 1 to MAX_RANK."""
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in down or 0 in up:
        raise ArgumentError(
            f"{where}: {name}: lora_A [R, I] and lora_B [O, R] of one rank R wanted, got "
            f"{list(down)} and {list(up)}"
        )
    if down[0] > MAX_RANK:
        raise ArgumentError(f"{where}: {name}: a rank of at most {MAX_RANK} wanted, got {down[0]}")


_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(?:\.(?P<name>[^.]+))?\.weight")


def layers_of(entries: Sequence[Entry], where: str) -> dict[str, tuple[Entry, Entry]]:
    """Pair up lora_A and lora_B by the name of their layer.

    Raises:
        ArgumentError: a tensor that is neither, one without the other, names of several adapters,
            shapes or dtypes that disagree; and by name DoRA's magnitudes, embeddings, biases.
    """
    found: dict[str, dict[str, Entry]] = {}
    names = set()
    for entry in entries:
        match = _TENSOR.fullmatch(entry.name)
        if match is None:
            raise ArgumentError(
                f"{where}: tensors LAYER.lora_A.weight and LAYER.lora_B.weight wanted, got "
                f"{entry.name}{_known(entry.name)}"
            )
        layer = match["layer"].removeprefix(PREFIX)
        names.add(match["name"])
        if ".base_layer" in f".{layer}":
            raise ArgumentError(
                f"{where}: layers wanted, got {entry.name} (factors of a bare parameter)"
            )
        check_name(layer, where)
        pair = found.setdefault(layer, {})
        if match["which"] in pair:
            raise ArgumentError(
                f"{where}: each tensor once wanted, got {pair[match['which']].name} and "
                f"{entry.name}"
            )
        pair[match["which"]] = entry
    if not found:
        raise ArgumentError(f"{where}: factors of at least one layer wanted, got no tensor")
    if len(names) > 1:
        raise ArgumentError(
            f"{where}: one adapter wanted, got {', '.join(sorted(map(repr, names)))}"
        )
    paired = {}
    for layer, pair in found.items():
        if len(pair) < 2:
            have = next(iter(pair))
            lacks = "B" if have == "A" else "A"
            raise ArgumentError(f"{where}: lora_{lacks} of {layer} wanted, got lora_{have} alone")
        down, up = pair["A"], pair["B"]
        check_shapes(layer, down.shape, up.shape, where)
        if down.dtype != up.dtype:
            raise ArgumentError(
                f"{where}: {layer}: one dtype wanted, got {down.dtype} and {up.dtype}"
            )
        paired[layer] = (down, up)
    return paired


def _known(name: str) -> str:
    for part, meaning in (
        ("lora_magnitude_vector", "DoRA"),
        ("lora_embedding_", "an embedding"),
        ("modules_to_save", "a whole layer"),
        (".bias", "a bias"),
        ("lora_diag", "KaSA"),
    ):
        if part in name:
            return f" ({meaning})"
    return ""
