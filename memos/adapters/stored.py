"""A stored adapter that is open for reading: its tensors are checked while they are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from memos.adapters import _disk, files
from memos.adapters.packed import Layer, Packed, begin_digest, finish, hash_leaf, leaves
from memos.errors import StoreError
from memos.kernels import _native

PIECE_BYTES = 1 << 20
_KEPT_SCRATCH = 16 << 20

_scratch = threading.local()


class StoredAdapter:
    """One stored adapter, open for reading; ``close`` it.

    ``layers``, ``config`` and ``card`` are checked when it is opened, the tensors while they are
    read.
    """

    def __init__(self, digest: str, parts: Parts, fd: int, start: int, memory: memoryview) -> None:
        self.digest = digest
        self.layers, self.leaves = parts.shape.layers, parts.shape.leaves
        self.config, self.card = parts.shape.config, parts.card
        self.payload_bytes = parts.shape.payload_bytes
        self._parts, self._fd, self._start, self._memory = parts, fd, start, memory

    def read(self, take: Callable[[int, NDArray[numpy.uint8]], object]) -> None:
        """Call ``take(i, bytes)`` for each leaf i, on several threads where the bytes pay for it.

        The bytes are good until ``take`` returns. What came is confirmed only when this returns.

        Raises:
            StoreError: damaged.
        """
        path = self._parts.path / files.MODEL
        hashes = [b""] * len(self.leaves)

        def work(first: int, last: int) -> None:
            for i in range(first, last):
                start, end = self.leaves[i].ranges[0]
                if self._fd < 0:
                    take(i, numpy.frombuffer(self._memory[start:end], numpy.uint8))
                    continue
                data = _scratch_bytes(end - start)
                with _disk.explained("read the adapter", path):
                    _disk.read_exactly(self._fd, data.data, self._start + start, path)
                hashes[i] = hash_leaf([data])
                take(i, data)

        _native.parallel(work, len(self.leaves), self.payload_bytes)
        if self._fd >= 0:
            self._confirm(hashes)

    def verify(self) -> None:
        """Read everything in pieces of a megabyte, whatever the size of a tensor.

        Raises:
            StoreError: damaged.
        """
        if self._fd < 0:
            return
        path = self._parts.path / files.MODEL
        hashes = [b""] * len(self.leaves)

        def work(first: int, last: int) -> None:
            for i in range(first, last):
                start, end = self.leaves[i].ranges[0]
                hashes[i] = hash_leaf(pieces(start, end))

        def pieces(start: int, end: int) -> Iterator[NDArray[numpy.uint8]]:
            for at in range(start, end, PIECE_BYTES):
                data = _scratch_bytes(min(PIECE_BYTES, end - at))
                with _disk.explained("read the adapter", path):
                    _disk.read_exactly(self._fd, data.data, self._start + at, path)
                yield data

        _native.parallel(work, len(self.leaves), self.payload_bytes)
        self._confirm(hashes)

    def _confirm(self, hashes: Sequence[bytes]) -> None:
        if finish(self._parts.shape.begin, hashes) != self.digest:
            raise StoreError(
                f"{self._parts.path / files.MODEL}: damaged: its contents are not those of digest "
                f"{self.digest}; put the adapter again, or delete it"
            )

    def packed(self) -> Packed:
        """All of it, in memory of its own."""
        payload = numpy.empty(self.payload_bytes, numpy.uint8)

        def take(i: int, data: NDArray[numpy.uint8]) -> None:
            start, end = self.leaves[i].ranges[0]
            payload[start:end] = data

        self.read(take)
        return Packed(self.layers, payload, self.config, self.card)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> StoredAdapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Shape:
    """What adapters of one config, with tensors of the same names and shapes, have in common."""

    def __init__(
        self, layers: tuple[Layer, ...], config: Mapping[str, Any], payload_bytes: int
    ) -> None:
        self.layers, self.config, self.payload_bytes = layers, config, payload_bytes
        self.leaves, self.begin = leaves(layers), begin_digest(layers)


class Parts(NamedTuple):
    """What stands in an adapter's files before its tensors."""

    path: Path
    shape: Shape
    card: Mapping[str, Any]


def _scratch_bytes(num_bytes: int) -> NDArray[numpy.uint8]:
    """Memory of this thread, the same at each call: its pages are there and in the cache."""
    found: NDArray[numpy.uint8] | None = getattr(_scratch, "data", None)
    if found is None or len(found) < num_bytes:
        found = numpy.empty(num_bytes, numpy.uint8)
        if num_bytes <= _KEPT_SCRATCH:
            _scratch.data = found
    return found[:num_bytes]
