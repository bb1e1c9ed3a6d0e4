"""KV blocks <-> packed bytes. The two ops and their reference; the layout is in codec.py."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import torch

from memos.errors import ArgumentError
from memos.kernels import _cuda, _library, _native, _triton
from memos.kernels._dims import Dims, contiguous
from memos.kernels._memory import empty
from memos.kernels._op import op
from memos.kernels.blocks import check_ids
from memos.kernels.codec import BITS, KINDS, Codec, Scheme, check_head_dim, hadamard_size
from memos.kernels.rerotation import Rerotation, turned

FP16_MAX = 65504.0
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class PackedRows(Sequence[torch.Tensor]):
    """Packed rows [L, E] that lie apart, checked when they are added, not at every use.

    A row must not change its place or shape afterwards. A slice shares the rows.
    """

    __slots__ = ("_addresses", "_owners", "_shape")

    def __init__(self, rows: Iterable[torch.Tensor] = ()) -> None:
        self._owners: list[torch.Tensor] = []  # [m] holds row m, perhaps others beside it
        self._addresses = array("q")
        self._shape: torch.Size | None = None  # of every row
        self.extend(rows)

    @staticmethod
    def split_layers(blocks: Sequence[torch.Tensor], num_layers: int) -> list[PackedRows]:
        """Contiguous blocks [num_layers, E], taken apart into rows [1, E]: one list per layer."""
        for block in blocks:
            _check_row(block, torch.Size((num_layers, blocks[0].shape[-1])))
        first = [block.data_ptr() for block in blocks]
        layers = [PackedRows() for _ in range(num_layers)]
        if blocks:
            E = blocks[0].shape[1]
            for i, layer in enumerate(layers):
                layer._owners, layer._shape = list(blocks), torch.Size((1, E))
                layer._addresses = array("q", [address + i * E for address in first])
        return layers

    def extend(self, rows: Iterable[torch.Tensor]) -> None:
        """Add rows. Raises ArgumentError unless contiguous uint8 [L, E], all of one shape."""
        for row in rows:
            _check_row(row, self._shape)
            self._shape = row.shape
            self._owners.append(row)
            self._addresses.append(row.data_ptr())

    @property
    def addresses(self) -> array[int]:
        """Where each row begins. Valid while this object lives."""
        return self._addresses

    @property
    def device(self) -> torch.device | None:
        """Where the rows are; None while there is none."""
        return self._owners[0].device if self._owners else None

    def __len__(self) -> int:
        return len(self._owners)

    @overload
    def __getitem__(self, i: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, i: slice) -> PackedRows: ...

    def __getitem__(self, i: int | slice) -> torch.Tensor | PackedRows:
        if isinstance(i, int):
            owner = self._owners[i]
            assert self._shape is not None
            start = self._addresses[i] - owner.data_ptr()
            row = owner.view(-1)[start : start + self._shape.numel()]
            return row.view(self._shape)
        part = PackedRows()
        part._owners, part._addresses = self._owners[i], self._addresses[i]
        part._shape = self._shape
        return part

    def __reduce__(self) -> tuple[type[PackedRows], tuple[list[torch.Tensor]]]:
        return PackedRows, ([row.clone() for row in self],)  # a copy has addresses of its own

    def __deepcopy__(self, memo: object) -> PackedRows:
        return PackedRows(row.clone() for row in self)

    def __add__(self, other: PackedRows) -> PackedRows:
        if self._shape is not None and len(other):
            _check_row(other[0], self._shape)
        both = PackedRows()
        both._owners = self._owners + other._owners
        both._addresses = self._addresses + other._addresses
        both._shape = self._shape or other._shape
        return both


def _check_row(row: torch.Tensor, shape: torch.Size | None) -> None:
    fits = row.dtype == torch.uint8 and row.dim() == 2 and row.is_contiguous()
    if not fits or (shape is not None and row.shape != shape):
        wanted = "[L, E]" if shape is None else list(shape)
        raise ArgumentError(
            f"packed: contiguous uint8 rows of shape {wanted} wanted, got {row.dtype} "
            f"{list(row.shape)}"
        )


def _check_cache(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    codec: Codec,
) -> Dims:
    if not isinstance(codec, Codec):
        raise ArgumentError(f"codec: a Codec wanted, got {type(codec).__name__}")
    if len(keys) != len(values) or not len(keys):
        raise ArgumentError(
            f"keys, values: the same number of layers wanted, got {len(keys)} and {len(values)}"
        )
    dims = Dims(L=len(keys)).tensor("block_ids", block_ids, "M", [torch.int64])
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        dims.tensor(f"keys[{layer}]", key, "N P K Dk", list(DTYPES))
        dims.tensor(f"values[{layer}]", value, "N P K Dv", [keys[0].dtype])
        if key.dtype != keys[0].dtype:
            raise ArgumentError(f"keys[{layer}]: {keys[0].dtype} wanted, got {key.dtype}")
        for name, tensor in ((f"keys[{layer}]", key), (f"values[{layer}]", value)):
            if tensor.shape[3] > 1 and tensor.stride(3) != 1:
                raise ArgumentError(f"{name}: stride 1 wanted for axis 3, got {tensor.stride(3)}")
    if not block_ids.is_contiguous():
        raise ArgumentError("block_ids: contiguous wanted")
    check_head_dim(codec, dims["Dk"], dims["Dv"])
    return dims


def _check_pack(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    codec: Codec,
) -> None:
    _check_cache(keys, values, block_ids, codec)


def _check_unpack(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    packed: torch.Tensor | PackedRows,
    codec: Codec,
    rerotate: Rerotation | None = None,
) -> None:
    dims = _check_cache(keys, values, block_ids, codec)
    if rerotate is not None:
        _check_rerotation(rerotate, dims)
    E = layer_bytes(codec, keys[0], values[0])
    if len(packed) != dims["M"]:
        raise ArgumentError(f"packed: M = {dims['M']} rows wanted, got {len(packed)}")
    if not len(packed):
        return
    whole = isinstance(packed, torch.Tensor)
    rows = packed if isinstance(packed, torch.Tensor) else packed[0]
    wanted = (dims["L"], E)
    if rows.dtype != torch.uint8 or tuple(rows.shape[whole:]) != wanted or not rows.is_contiguous():
        raise ArgumentError(
            f"packed: contiguous uint8 rows of shape {list(wanted)} wanted for codec "
            f"{codec.name}, got {rows.dtype} {list(rows.shape[whole:])}"
        )


def _check_rerotation(rerotate: Rerotation, dims: Dims) -> None:
    if not isinstance(rerotate, Rerotation):
        raise ArgumentError(f"rerotate: a Rerotation wanted, got {type(rerotate).__name__}")
    for name, positions in (("old", rerotate.old), ("new", rerotate.new)):
        dims.tensor(f"rerotate.{name}", positions, "M P", [torch.int64])
    dims.tensor("rerotate.inv_freq", rerotate.inv_freq, "R", [torch.float32, torch.float64])
    contiguous("rerotate.inv_freq", rerotate.inv_freq)
    end = rerotate.first + 2 * dims["R"]
    if rerotate.first < 0 or end > dims["Dk"]:
        raise ArgumentError(
            f"rerotate: channels within Dk = {dims['Dk']} wanted, got [{rerotate.first}, {end})"
        )


def layer_bytes(codec: Codec, key: torch.Tensor, value: torch.Tensor) -> int:
    """E: bytes of one layer of one block, from its [N, P, K, D] views."""
    _, P, H, Dk = key.shape
    return codec.layer_bytes(P, H, Dk, value.shape[3], key.element_size())


@op(check=_check_pack)
def pack_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    codec: Codec,
) -> torch.Tensor:
    """Gather blocks of every layer and encode them: gather + layout + (rotate) + quantise + pack.

    Integers: ``q = round_half_even((x - zero) / scale)``, ``zero`` = the group's minimum rounded
    down to fp16, ``scale`` = (maximum - zero) / (2^bits - 1) rounded up to fp16. fp8 (e4m3):
    ``q = e4m3(x / scale)``, ``scale`` = max|x| / 448 rounded up to fp16. Groups are of tokens for
    K (per channel) and of channels for V (per token). A constant group has scale 0. NaN counts as
    0, infinities and numbers beyond fp16 as +-65504. Every backend writes the same bytes.

    Args:
        keys:      L tensors [N, P, K, Dk] fp32, fp16 or bf16, any strides with the last one 1.
        values:    L tensors [N, P, K, Dv], dtype and device of ``keys``.
        block_ids: [M] int64, contiguous. Each in [0, N); may repeat.
        codec:     how; quantised codecs need Dk and Dv to be multiples of 8.

    Returns:
        [M, L, E] uint8, E = codec.layer_bytes(P, K, Dk, Dv, element_size): per layer the K
        section, then the V section; padding bytes are 0.

    Raises:
        ArgumentError: a shape, dtype, stride or id is out of contract.

    Cost: reads M * L * P * K * (Dk + Dv) elements once and writes M * L * E bytes.
    Source: per-channel K and per-token V: KIVI (arXiv 2402.02750, section 3); rotation: QuaRot
    (arXiv 2404.00456, section 4.2).
    """
    check_ids("block_ids", block_ids, len(keys[0]))
    layers = [
        torch.cat(
            [
                _encode(key[block_ids].transpose(1, 2), codec.key, per_channel=True),
                _encode(value[block_ids].transpose(1, 2), codec.value, per_channel=False),
            ],
            dim=1,
        )
        for key, value in zip(keys, values, strict=True)
    ]
    return torch.stack(layers, dim=1)


@op(check=_check_unpack)
def unpack_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    packed: torch.Tensor | PackedRows,
    codec: Codec,
    rerotate: Rerotation | None = None,
) -> None:
    """Decode packed blocks into a cache: the inverse of ``pack_kv``; changes keys and values.

    Integers: ``x = zero + q * scale``; fp8: ``x = q * scale``; rotated back where rotated; the
    keys turned on to other positions with ``rerotate``, as ``rotate_positions_`` does; in fp32,
    then rounded once to the dtype of ``keys`` (fp16 saturates at +-65504; with codec raw numbers
    that turn do not, and the others are copied).

    Args:
        keys, values: as ``pack_kv``; block ``block_ids[m]`` of every layer is overwritten. With
            codec raw the dtype must be the one that was packed.
        block_ids: [M] int64, contiguous, no two equal.
        packed:    [M, L, E] uint8 contiguous, or PackedRows: M blocks that lie apart.
        codec:     the codec they were packed with.
        rerotate:  positions of the tokens of the M blocks, and those that their keys get.

    Raises:
        ArgumentError: a shape, dtype, stride or id is out of contract.

    Cost: reads M * L * E bytes, writes M * L * P * K * (Dk + Dv) elements once; with ``rerotate``
        also reads its table, M * P * 2 R floats, per layer and head.
    """
    check_ids("block_ids", block_ids, len(keys[0]))
    if not len(packed):
        return
    rows = packed if isinstance(packed, torch.Tensor) else torch.stack(list(packed))
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        _, P, H, Dk = key.shape
        split = codec.key.section_bytes(P, H, Dk, key.element_size(), True)
        for data, out, scheme, per_channel in (
            (rows[:, layer, :split], key, codec.key, True),
            (rows[:, layer, split:], value, codec.value, False),
        ):
            x = _decode(data, out, scheme, per_channel)
            if rerotate is not None and per_channel:
                x = _rerotated(x, rerotate)
            if out.dtype == torch.float16 and scheme.kind != "raw":
                x = x.clamp(-FP16_MAX, FP16_MAX)
            out[block_ids] = x.to(out.dtype).transpose(1, 2)


# The reference arithmetic. x: [M, H, P, D]; K groups along P, V groups along D.


def _encode(x: torch.Tensor, scheme: Scheme, per_channel: bool) -> torch.Tensor:
    _, H, P, D = x.shape
    size, param_size = scheme.parts(P, H, D, x.element_size(), per_channel)
    if scheme.kind == "raw":
        return _pad(x.contiguous().view(torch.uint8).flatten(1), size)
    x = _sanitise(x.float())
    if scheme.rotate:
        x = _sanitise(_hadamard(x))
    dim = 2 if per_channel else 3
    groups = x.split(scheme.group, dim=dim)
    codes, scales, zeros = zip(*(_quantise(g, scheme, dim) for g in groups), strict=True)
    packed = _join(torch.cat(codes, dim=dim), BITS[scheme.kind]).flatten(1)
    params = [torch.cat(scales, dim=dim)]
    if scheme.kind != "fp8":
        params.append(torch.cat(zeros, dim=dim))
    data = torch.cat([p.flatten(1).view(torch.uint8) for p in params], dim=1)
    return torch.cat([_pad(packed, size), _pad(data, param_size)], dim=1)


def _decode(
    data: torch.Tensor, out: torch.Tensor, scheme: Scheme, per_channel: bool
) -> torch.Tensor:
    """Float32, or what was packed raw."""
    _, P, H, D = out.shape
    M = len(data)
    size, _ = scheme.parts(P, H, D, out.element_size(), per_channel)
    if scheme.kind == "raw":
        used = P * H * D * out.element_size()
        return data[:, :used].contiguous().view(out.dtype).view(M, H, P, D)
    bits = BITS[scheme.kind]
    codes = _split(data[:, : P * H * D * bits // 8].unflatten(1, (H, P, D * bits // 8)), bits)
    num = -(-P // scheme.group) if per_channel else -(-D // scheme.group)
    shape = (M, H, num, D) if per_channel else (M, H, P, num)
    count = shape[1] * shape[2] * shape[3]
    params = data[:, size:].contiguous().view(torch.float16).float()

    def spread(p: torch.Tensor) -> torch.Tensor:
        dim, length = (2, P) if per_channel else (3, D)
        return p.reshape(shape).repeat_interleave(scheme.group, dim=dim).narrow(dim, 0, length)

    scale = spread(params[:, :count])
    if scheme.kind == "fp8":
        x = codes.view(torch.float8_e4m3fn).float() * scale
    else:
        x = spread(params[:, count : 2 * count]) + codes.float() * scale
    return _hadamard(x) if scheme.rotate else x


def _rerotated(x: torch.Tensor, by: Rerotation) -> torch.Tensor:
    cosine, sine = by.table.to(x.device)[:, None].unbind(3)  # [M, 1, P, R]
    out = x.clone()
    out[..., by.channels] = turned(x[..., by.channels], cosine, sine, by.interleaved).to(x.dtype)
    return out


def _quantise(
    x: torch.Tensor, scheme: Scheme, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if scheme.kind == "fp8":
        scale = _to_fp16(x.abs().amax(dim, keepdim=True) * (1 / 448), up=True)
        y = (x * _inverse(scale)).clamp(-448, 448)
        return y.to(torch.float8_e4m3fn).view(torch.uint8), scale, scale
    zero = _to_fp16(x.amin(dim, keepdim=True) + 0.0, up=False)
    levels = 2 ** BITS[scheme.kind] - 1
    extent = x.amax(dim, keepdim=True) - zero.float() + 0.0
    scale = _to_fp16(extent * torch.tensor(1 / levels, dtype=torch.float32), up=True)
    codes = torch.round((x - zero.float()) * _inverse(scale))
    return codes.to(torch.uint8), scale, zero


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    s = scale.float()
    return torch.where(s > 0, 1.0 / s, torch.zeros_like(s))


def _sanitise(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, nan=0.0).clamp(-FP16_MAX, FP16_MAX)


def _to_fp16(x: torch.Tensor, up: bool) -> torch.Tensor:
    """x rounded to fp16 towards +infinity (``up``) or -infinity; |x| <= 131008 / 3."""
    h = x.to(torch.float16)
    wrong = h.float() < x if up else h.float() > x
    bits = h.view(torch.int16)
    away = (bits < 0) != up  # the step in direction `up` grows the magnitude
    tiny = torch.full_like(bits, 1 if up else -32767)
    step = torch.where(h == 0, tiny, torch.where(away, bits + 1, bits - 1))
    return torch.where(wrong, step, bits).view(torch.float16)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last axis by a normalised Hadamard matrix of its largest power-of-two divisor."""
    n = hadamard_size(x.shape[-1])
    shape, h = x.shape, 1
    while h < n:
        pairs = x.reshape(-1, 2, h)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack([a + b, a - b], dim=1)
        h *= 2
    return x.reshape(shape) * torch.tensor(n**-0.5, dtype=torch.float32)


def _join(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The code of channel c stands at bit c * bits of its row, little-endian."""
    E = 8 // bits
    parts = codes.unflatten(-1, (codes.shape[-1] // E, E)).int()
    joined: torch.Tensor = (parts << torch.arange(E).mul(bits)).sum(-1)
    return joined.to(torch.uint8)


def _split(data: torch.Tensor, bits: int) -> torch.Tensor:
    shifted: torch.Tensor = data.int().unsqueeze(-1) >> torch.arange(8 // bits).mul(bits)
    codes: torch.Tensor = shifted & (2**bits - 1)
    return codes.flatten(-2).to(torch.uint8)


def _pad(data: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(data, (0, size - data.shape[1]))


# The CPU backend: one struct of int64 (csrc/cpu/kernels.h, KvCall) crosses the boundary.


def _on_cpu(keys: Sequence[torch.Tensor], *rest: object, **more: object) -> bool:
    return keys[0].device.type == "cpu"


def _call(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    table: array[int],
    codec: Codec,
    rerotate: Rerotation | None = None,
) -> tuple[array[int], list[array[int]]]:
    """The KvCall struct, and the tables that it points to (keep them alive during the call)."""
    layers = array("q")
    for key, value in zip(keys, values, strict=True):
        layers.extend([key.data_ptr(), *key.stride()[:3], value.data_ptr(), *value.stride()[:3]])
    N, P, H, Dk = keys[0].shape
    Dv = values[0].shape[3]
    itemsize = keys[0].element_size()
    call = array("q", [layers.buffer_info()[0], len(keys), block_ids.data_ptr(), len(block_ids)])
    call.extend([table.buffer_info()[0], N, P, H, Dk, Dv, DTYPES[keys[0].dtype]])
    for scheme in (codec.key, codec.value):
        call.extend([KINDS[scheme.kind], scheme.group, int(scheme.rotate)])
    call.append(codec.layer_bytes(P, H, Dk, Dv, itemsize))
    if rerotate is None or not len(rerotate.inv_freq):
        call.extend([0, 0, 0, 0])
    else:
        angles = rerotate.table_on(keys[0].device)
        half, first = len(rerotate.inv_freq), rerotate.first
        call.extend([angles.data_ptr(), half, first, int(rerotate.interleaved)])
    return call, [layers, table]


@pack_kv.backend("cpu", accepts=_on_cpu, missing=_native.missing)
def _pack_cpu(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    codec: Codec,
) -> torch.Tensor:
    M, L, E = len(block_ids), len(keys), layer_bytes(codec, keys[0], values[0])
    out = empty((M, L, E), torch.uint8)
    _native.check_rows(block_ids.data_ptr(), M, len(keys[0]))
    rows = array("q", [out.data_ptr() + m * L * E for m in range(M)])
    call, tables = _call(keys, values, block_ids, rows, codec)
    address = call.buffer_info()[0]
    source_bytes = M * L * (keys[0][0].numel() + values[0][0].numel()) * keys[0].element_size()
    _native.parallel(
        lambda first, last: _native.core().cpu_pack_kv(address, first, last), M * L, source_bytes
    )
    del tables
    return out


@unpack_kv.backend("cpu", accepts=_on_cpu, missing=_native.missing)
def _unpack_cpu(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: torch.Tensor,
    packed: torch.Tensor | PackedRows,
    codec: Codec,
    rerotate: Rerotation | None = None,
) -> None:
    M, L = len(block_ids), len(keys)
    if not M:
        return
    _native.check_rows(block_ids.data_ptr(), M, len(keys[0]))
    if isinstance(packed, torch.Tensor):
        size = packed[0].numel()
        rows = array("q", range(packed.data_ptr(), packed.data_ptr() + M * size, size))
    else:
        rows = packed.addresses
    call, tables = _call(keys, values, block_ids, rows, codec, rerotate)
    address = call.buffer_info()[0]
    out_bytes = M * L * (keys[0][0].numel() + values[0][0].numel()) * keys[0].element_size()
    _native.parallel(
        lambda first, last: _native.core().cpu_unpack_kv(address, first, last), M * L, out_bytes
    )
    del tables


_cuda.register_kv(pack_kv, unpack_kv, _call)
_triton.register_kv(pack_kv, unpack_kv)
_library.register_kv(pack_kv, unpack_kv)
