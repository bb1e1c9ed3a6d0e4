"""The header of a safetensors file: read with every check its format asks for, and written.

8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from memos.errors import ArgumentError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20  # about 100,000 tensors
METADATA = "__metadata__"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
ALL_ITEM_BYTES = {**ITEM_BYTES, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ALIGN = 64  # of the tensors' bytes in the file
_MAX_DIGITS = 1000  # a number of a million digits takes minutes


@dataclass(frozen=True)
class Entry:
    """One tensor: its bytes are ``payload[start:end]``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_bytes(first: bytes, file_bytes: int, where: str) -> int:
    """How many bytes of JSON follow the first eight. Raises ArgumentError: they are not there."""
    if len(first) < LENGTH_BYTES:
        raise ArgumentError(f"{where}: a safetensors file wanted, got {len(first)} bytes")
    n = int.from_bytes(first[:LENGTH_BYTES], "little")
    if not 2 <= n <= MAX_HEADER_BYTES:
        raise ArgumentError(
            f"{where}: a safetensors header of 2 to {MAX_HEADER_BYTES} bytes wanted, got {n}"
        )
    if LENGTH_BYTES + n > file_bytes:
        raise ArgumentError(
            f"{where}: a whole file wanted, but its header ends at byte {LENGTH_BYTES + n} of "
            f"{file_bytes}: cut off"
        )
    return n


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN or endless numbers; ArgumentError otherwise."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise ArgumentError(f"{where}: each name once wanted, got {twice!r} twice")
        return found

    def constant(name: str) -> NoReturn:
        raise ArgumentError(f"{where}: JSON wanted, got {name}")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ArgumentError(f"{where}: integers of at most {_MAX_DIGITS} digits wanted")
        return int(digits)

    try:
        value = json.loads(
            text.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer
        )
    except ArgumentError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where}: JSON wanted: {error}") from None
    if not isinstance(value, dict):
        raise ArgumentError(f"{where}: a JSON object wanted, got {type(value).__name__}")
    return value


def parse_header(
    text: bytes, payload_bytes: int, where: str, dtypes: Mapping[str, int] = ITEM_BYTES
) -> tuple[list[Entry], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata.

    Args:
        text:          the header's JSON.
        payload_bytes: how many bytes follow it in the file.
        where:         names the file in messages.
        dtypes:        those that may come, with the bytes of one number.

    Raises:
        ArgumentError: no JSON, repeated names, other dtypes, shapes that disagree with the
            offsets, tensors that overlap, leave gaps or lie outside the file.
    """
    found = parse_json(text, where)
    metadata = found.pop(METADATA, {})
    if not are_strings(metadata):
        raise ArgumentError(f"{where}: {METADATA} of strings wanted, got {_short(metadata)}")
    entries = [_entry(name, value, where, dtypes) for name, value in found.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    at = 0
    for entry in entries:
        if entry.start != at:
            how = "overlap" if entry.start < at else "leave a gap"
            raise ArgumentError(
                f"{where}: tensors one after another wanted, but those before {entry.name} end at "
                f"{at} and it begins at {entry.start}: they {how}"
            )
        at = entry.end
    if at != payload_bytes:
        raise ArgumentError(
            f"{where}: {at} bytes of tensors wanted as the header says, got {payload_bytes}: the "
            "file is cut off or has bytes too many"
        )
    return entries, metadata


def are_strings(metadata: Any) -> bool:
    """Is this what a header may have as its metadata?"""
    return isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded so that the tensors' bytes begin at a multiple of 64.

    The metadata stands last: files whose tensors have the same names and shapes have the same
    bytes up to there.
    """
    parts = [
        f'{json.dumps(e.name)}:{{"dtype":"{e.dtype}","shape":{_dense(e.shape)},'
        f'"data_offsets":{_dense((e.start, e.end))}}}'
        for e in entries
    ]
    parts.append(f"{json.dumps(METADATA)}:{_dense(dict(metadata))}")
    text = ("{" + ",".join(parts) + "}").encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _ALIGN)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _entry(name: str, value: Any, where: str, dtypes: Mapping[str, int]) -> Entry:
    if not name.isprintable():
        raise ArgumentError(f"{where}: printable names of tensors wanted, got {_short(name)}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ArgumentError(
            f"{where}: dtype, shape and data_offsets of {name} wanted, got {_short(value)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ArgumentError(
            f"{where}: {name}: dtype one of {', '.join(dtypes)} wanted, got {_short(dtype)}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ArgumentError(
            f"{where}: {name}: shape and two data_offsets of integers from 0 wanted, got "
            f"{_short(shape)} and {_short(offsets)}"
        )
    size = math.prod(shape) * dtypes[dtype] if len(shape) <= 8 else -1
    if offsets[1] - offsets[0] != size:
        raise ArgumentError(
            f"{where}: {name}: {_short(shape)} of {dtype} wanted between its offsets, got "
            f"{offsets[0]} to {offsets[1]}"
        )
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _dense(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
