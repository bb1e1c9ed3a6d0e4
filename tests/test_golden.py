"""Bytes written once stay readable: the codecs' output on fixed numbers, kept in the tree.

``python tests/test_golden.py`` writes tests/golden/codecs.json anew: that is a new format version.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the ops work on torch tensors")

from memos.kernels import Codec, pack_kv, unpack_kv, using  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "codecs.json"
CODECS = ("raw", "int8-g64", "int8-g32-rot", "int4-g64", "int4-g64-rot", "int4-g32-rot",
          "int2-g32", "int2-g32-rot", "fp8-g64", "fp8-g32-rot")  # fmt: skip
SHAPES = {"small": (3, 1, 16, 8), "odd": (37, 2, 80, 96), "usual": (64, 3, 64, 64)}  # P, H, Dk, Dv
DTYPES = ("float32", "float16", "bfloat16")


def numbers(*shape: int) -> torch.Tensor:
    """The same numbers everywhere, exact in bf16: a linear congruence, no library's generator."""
    count, x, out = torch.Size(shape).numel(), 12345, []
    for _ in range(count):
        x = (1103515245 * x + 12345) % 2**31
        out.append(((x >> 16) % 255 - 127) * 2.0 ** ((x >> 24) % 7 - 8))
    return torch.tensor(out).view(1, *shape)


def case(shape: str, dtype: str, codec: str) -> tuple[Any, ...]:
    P, H, Dk, Dv = SHAPES[shape]
    keys = [numbers(P, H, Dk).to(getattr(torch, dtype))]
    values = [numbers(P, H, Dv).flip(1).contiguous().to(getattr(torch, dtype))]
    return keys, values, torch.tensor([0]), Codec.parse(codec)


def packed(shape: str, dtype: str, codec: str) -> bytes:
    return pack_kv(*case(shape, dtype, codec)).numpy().tobytes()


def decoded(shape: str, dtype: str, codec: str, data: bytes) -> bytes:
    keys, values, ids, parsed = case(shape, dtype, codec)
    out = [torch.zeros_like(keys[0])], [torch.zeros_like(values[0])]
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(1, 1, -1)
    unpack_kv(*out, ids, rows, parsed)
    return b"".join(t.view(torch.uint8).numpy().tobytes() for (t,) in out)


def entry(shape: str, dtype: str, codec: str) -> dict[str, str]:
    data = packed(shape, dtype, codec)
    plain = decoded(shape, dtype, codec, data)
    found = {"packed": digest(data), "decoded": digest(plain)}
    if shape == "small" and dtype == "bfloat16":
        found |= {"packed_bytes": data.hex(), "decoded_bytes": plain.hex()}
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_write_and_read_the_golden_bytes(codec: str, backend: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    with using(backend):
        for shape in SHAPES:
            for dtype in DTYPES:
                name = f"{shape} {dtype} {codec}"
                assert entry(shape, dtype, codec) == golden[name], name


if __name__ == "__main__":
    every = {f"{s} {d} {c}": entry(s, d, c) for s in SHAPES for d in DTYPES for c in CODECS}
    GOLDEN.write_text(json.dumps(every, indent=1) + "\n")
