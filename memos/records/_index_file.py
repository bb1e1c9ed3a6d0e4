"""The cache file of a vector index: one header, plain arrays, a checksum over everything.

    header | row_keys int64 [total] | alive uint8 [total] | squares float32 [total]
    | vectors [total, dim] | graph: JSON, links, labels, levels, upper | BLAKE3 of all before, 32 B

Every section starts at a multiple of 64 bytes. Numbers are in the byte order of the machine; on
one of the other order the version does not fit, and the file is a miss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from memos.cube.memcube_cipher import OpeningReader, SealingWriter
from memos.errors import StoreError
from memos.records._index_hnsw import Graph, hnswlib
from memos.records._index_rows import DTYPES, METRICS, Chunk, Rows

_MAGIC, _VERSION = b"MEMOSVEC", 1
# magic, version, dim, metric, dtype, total, stamp, longest norm, bytes of the JSON, of the file
_HEADER = struct.Struct("=8sIIHHxxxxQqdQQ")
_ALIGN, _DIGEST = 64, 32
_PIECE = 1 << 20  # bytes read at once
_GRAPH = {"links": np.uint8, "labels": np.int64, "levels": np.int32, "upper": np.uint8}

GraphState = tuple[dict[str, Any], dict[str, NDArray[Any]]]


class Loaded(NamedTuple):
    rows: Rows
    graph: Graph | None
    stamp: int


def write(
    path: Path, rows: Rows, state: GraphState | None, stamp: int, key: bytes | None = None
) -> None:
    """Put the file in the place of ``path``: all of it or nothing.

    Args:
        key: 32 bytes under which it is encrypted; None: it is not.

    Raises:
        StoreError: the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                to: Any = file if key is None else SealingWriter(file, key)
                check = blake3(max_threads=blake3.AUTO)
                for part in _parts(rows, state, stamp):
                    check.update(part)
                    to.write(part)
                to.write(check.digest())
                if key is not None:
                    to.finish()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise StoreError(f"{path}: the index was not saved: {error}") from error


def read(path: Path, dim: int, metric: str, dtype: str, key: bytes | None = None) -> Loaded | None:
    """What ``write`` wrote; None for whatever is not that, to the last bit."""
    try:
        with open(path, "rb") as stored:
            file: Any = stored if key is None else OpeningReader(stored, key)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            magic, version, *fixed, total, stamp, longest, json_bytes, whole = _HEADER.unpack(
                header
            )
            wanted = [dim, METRICS.index(metric), DTYPES.index(dtype)]
            if (magic, version, whole) != (_MAGIC, _VERSION, size) or fixed != wanted:
                return None
            data = np.empty(size, np.uint8)
            file.seek(0)
            at = 0
            while at < size:
                part = file.read(_PIECE)
                if not part:
                    return None
                data[at : at + len(part)] = np.frombuffer(part, np.uint8)
                at += len(part)
    except OSError:  # also where it does not open under the key
        return None
    body = data[:-_DIGEST]
    if blake3(body.data, max_threads=blake3.AUTO).digest() != data[-_DIGEST:].tobytes():
        return None
    cut = _Cutter(body, _HEADER.size)
    row_keys = cut.array(np.int64, total)
    alive = np.flatnonzero(cut.array(np.uint8, total))
    squares = cut.array(np.float32, total)
    vectors = cut.array(np.dtype(dtype), total, dim)
    alive = alive[np.argsort(row_keys[alive])]
    rows = Rows(
        dim, metric, row_keys[alive], alive, row_keys, (Chunk(0, vectors, squares),), longest
    )
    graph = None
    if json_bytes and hnswlib() is not None:
        graph = _graph(rows, cut, json_bytes)
    return Loaded(rows, graph, stamp)


def _graph(rows: Rows, cut: _Cutter, json_bytes: int) -> Graph | None:
    meta = json.loads(cut.array(np.uint8, json_bytes).tobytes())
    arrays = {name: cut.array(kind, *meta["shapes"][name]) for name, kind in _GRAPH.items()}
    labels = arrays["labels"]
    if not len(labels) or labels.min() < 0 or labels.max() >= rows.total:
        return None
    space = "l2" if rows.metric == "l2" else "ip"
    return Graph.restored(rows.dim, space, meta["scalars"], arrays, rows.points)


def _parts(rows: Rows, state: GraphState | None, stamp: int) -> Iterator[Any]:
    """The file from its first byte to the last before its checksum, in pieces."""
    alive = np.zeros(rows.total, np.uint8)
    alive[rows.rows] = 1
    pieces: list[list[NDArray[Any]]] = [
        [rows.row_keys],
        [alive],
        [c.squares[: rows.total - c.start] for c in rows.chunks],
        [c.vectors[: rows.total - c.start] for c in rows.chunks],
    ]
    meta = b""
    if state is not None:
        scalars, arrays = state
        shapes = {name: arrays[name].shape for name in _GRAPH}
        meta = json.dumps({"scalars": scalars, "shapes": shapes}).encode()
        pieces += [[np.frombuffer(meta, np.uint8)], *([arrays[name]] for name in _GRAPH)]
    lengths = [sum(array.nbytes for array in piece) for piece in pieces]
    size = _padded(_HEADER.size) + sum(_padded(length) for length in lengths) + _DIGEST
    kind = DTYPES.index(str(rows.chunks[0].vectors.dtype))
    header = _HEADER.pack(
        *(_MAGIC, _VERSION, rows.dim, METRICS.index(rows.metric), kind),
        *(rows.total, stamp, rows.max_norm, len(meta), size),
    )
    yield header
    yield bytes(_padded(len(header)) - len(header))
    for piece, length in zip(pieces, lengths, strict=True):
        for array in piece:
            if array.nbytes:
                yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield bytes(_padded(length) - length)


def _padded(length: int) -> int:
    return -(-length // _ALIGN) * _ALIGN


@dataclasses.dataclass
class _Cutter:
    """Arrays one behind the other, without a copy."""

    data: NDArray[np.uint8]
    at: int

    def array(self, dtype: Any, *shape: int) -> Any:
        start = _padded(self.at)
        self.at = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.data[start : self.at].view(dtype).reshape(shape)
