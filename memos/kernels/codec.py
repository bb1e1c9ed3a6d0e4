"""Codecs: how a block's numbers become bytes. Names, sizes and layout; no arithmetic, no torch.

A codec is two schemes, one for K and one for V. Its name says all of it and parses back:

    raw                      the source bytes
    int4                     = k:int4-g64-rot,v:int4-g64, the default at 4.5 bits
    int4-g64, int8-g32, int2-g32-rot, fp8-g64
    k:int8-g64,v:int4-g64    K and V differ

``gN``: N numbers share a scale; K along tokens (per channel), V along channels (per token).
``rot``: the head dimension is rotated by a normalised Hadamard matrix before quantising.
The bytes are written down in docs/format/kv-frame.md and in csrc/codec.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from memos.errors import ArgumentError

# The number is stored in frames and passed to the native core: never reuse one.
KINDS = {"raw": 0, "int8": 1, "int4": 2, "int2": 3, "fp8": 4}
BITS = {"raw": 0, "int8": 8, "int4": 4, "int2": 2, "fp8": 8}
# **measured** (SmolLM2-135M, 4.57 bits on disk): KL 0.0038 without rotation, 0.0025 with K rotated,
# 0.0024 with both. Rotating V costs as much time and buys nearly nothing.
_ALIASES = {
    "int8": {"k": "int8-g64", "v": "int8-g64"},
    "int4": {"k": "int4-g64-rot", "v": "int4-g64"},
    "int2": {"k": "int2-g32-rot", "v": "int2-g32-rot"},
    "fp8": {"k": "fp8-g64", "v": "fp8-g64"},
}
_SCHEME = re.compile(r"(int8|int4|int2|fp8)-g(32|64)(-rot)?")


def _align(n: int) -> int:
    return (n + 15) & ~15


@dataclass(frozen=True)
class Scheme:
    """How the K or the V of one head becomes codes and scales."""

    kind: str
    group: int = 0
    rotate: bool = False

    @property
    def name(self) -> str:
        if self.kind == "raw":
            return "raw"
        return f"{self.kind}-g{self.group}{'-rot' if self.rotate else ''}"

    def section_bytes(self, P: int, H: int, D: int, itemsize: int, per_channel: bool) -> int:
        """Bytes of the K section (``per_channel``) or the V section of one layer of one block."""
        codes, params = self.parts(P, H, D, itemsize, per_channel)
        return codes + params

    def parts(self, P: int, H: int, D: int, itemsize: int, per_channel: bool) -> tuple[int, int]:
        """Bytes of the codes and of the scales (and zeros), each a multiple of 16."""
        if self.kind == "raw":
            return _align(P * H * D * itemsize), 0
        groups = -(-P // self.group) * D if per_channel else P * -(-D // self.group)
        params = H * groups * (2 if self.kind == "fp8" else 4)
        return _align(P * H * (D * BITS[self.kind] // 8)), _align(params)


@dataclass(frozen=True)
class Codec:
    """A scheme for keys and one for values."""

    key: Scheme
    value: Scheme

    @staticmethod
    def parse(name: str | Codec) -> Codec:
        """The codec of this name. Raises ArgumentError with the accepted forms."""
        return name if isinstance(name, Codec) else _parse(name)

    @property
    def name(self) -> str:
        if self.key == self.value:
            return self.key.name
        return f"k:{self.key.name},v:{self.value.name}"

    @property
    def lossless(self) -> bool:
        return self.key.kind == self.value.kind == "raw"

    def layer_bytes(self, P: int, H: int, Dk: int, Dv: int, itemsize: int) -> int:
        """Bytes of one layer of one block: the K section, then the V section."""
        return self.key.section_bytes(P, H, Dk, itemsize, True) + self.value.section_bytes(
            P, H, Dv, itemsize, False
        )

    def bits(self, P: int, H: int, Dk: int, Dv: int, itemsize: int) -> float:
        """Bits per number, scales and zeros included."""
        return 8 * self.layer_bytes(P, H, Dk, Dv, itemsize) / (P * H * (Dk + Dv))


@functools.lru_cache(maxsize=256)
def _parse(name: str) -> Codec:
    if ":" not in name:
        return Codec(_scheme("k", name), _scheme("v", name))
    key, comma, value = name.partition(",")
    if not (comma and key.startswith("k:") and value.startswith("v:")):
        raise ArgumentError(f"codec: 'k:SCHEME,v:SCHEME' wanted, got {name!r}")
    return Codec(_scheme("k", key[2:]), _scheme("v", value[2:]))


def _scheme(side: str, name: str) -> Scheme:
    name = _ALIASES.get(name, {}).get(side, name)
    if name == "raw":
        return Scheme("raw")
    if (m := _SCHEME.fullmatch(name)) is None:
        raise ArgumentError(
            f"codec: raw, or int8|int4|int2|fp8 with -g32|-g64 and -rot wanted, got {name!r}"
        )
    return Scheme(m[1], int(m[2]), m[3] is not None)


def check_head_dim(codec: Codec, Dk: int, Dv: int) -> None:
    """Quantised codecs need head dimensions that are a multiple of 8."""
    for what, scheme, D in (("K", codec.key, Dk), ("V", codec.value, Dv)):
        if scheme.kind != "raw" and D % 8:
            raise ArgumentError(
                f"codec {codec.name}: a head dimension that is a multiple of 8 wanted for {what}, "
                f"got {D}; use raw"
            )


def hadamard_size(D: int) -> int:
    """The largest power of two that divides D: the size of the rotated blocks."""
    return D & -D
