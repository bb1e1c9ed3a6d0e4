"""Adapters by the digest of their contents, in a folder of PEFT folders or in memory."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memos.adapters import _disk, files
from memos.adapters.adapter import Adapter
from memos.adapters.packed import is_dense
from memos.adapters.stored import PIECE_BYTES, Parts, Shape, StoredAdapter
from memos.cube.safetensors import (
    LENGTH_BYTES,
    METADATA,
    are_strings,
    header_bytes,
    parse_json,
)
from memos.errors import ArgumentError, NotFoundError, QuotaError, StoreError

_NAME = re.compile(r"[0-9a-f]{64}")
_LOCK = "LOCK"
_BLOCK = 4096  # files take whole blocks of the disk
_KEPT_HEADERS = 64
_METADATA_KEY = f'"{METADATA}":'.encode()


class AdapterStore:
    """Adapters by ``files.digest``. Thread-safe; several processes may share a folder.

    ``<folder>/<digest>/`` is a folder that PEFT loads. An adapter appears whole or not at all, and
    what is damaged is never served: the digest is checked whenever the tensors are read.

    Args:
        folder:     where they live; made when missing. None: in this process's memory.
        disk_bytes: how many bytes they may take together (files rounded up to blocks of 4 KiB);
            None: no limit.
        durable:    what ``put`` stored survives a power cut once it returns.

    Raises:
        StoreError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        *,
        disk_bytes: int | None = None,
        durable: bool = True,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.disk_bytes, self.durable = disk_bytes, durable
        self._memory: dict[str, dict[str, bytes]] = {}
        self._shapes: OrderedDict[tuple[bytes, bytes, int], Shape] = OrderedDict()
        self._lock = threading.RLock()
        self._held = False  # the lock among processes, by the holder of _lock
        if self.folder is not None:
            with _disk.explained("make the folder of adapters", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    # Writing

    def put(self, adapter: Adapter) -> str:
        """Store an adapter; one with the same contents is there once, with its first card.

        A stored adapter that was damaged is put in order.

        Returns:
            The digest.

        Raises:
            ArgumentError: as ``files.write_adapter``.
            QuotaError: ``disk_bytes`` has no room. Nothing is deleted to make some.
            StoreError: the disk failed; nothing is left behind.
        """
        digest, parts = files.encode(adapter)
        with self._writing():
            if digest in self and self.check(digest) is None:
                self._touch(digest)
                return digest
            sizes = {n: sum(memoryview(p).nbytes for p in data) for n, data in parts.items()}
            self._make_room(digest, sizes)
            if self.folder is None:
                pieces = {name: b"".join(data) for name, data in parts.items()}
                self._memory[digest] = pieces
                return digest
            path = self.folder / digest
            with _disk.explained("store the adapter", path):
                if path.exists():
                    _disk.remove_folder(path, durable=self.durable)
                _disk.publish_folder(path, parts, durable=self.durable)
        return digest

    def put_files(
        self, digest: str, pieces: Mapping[str, Iterable[bytes]], num_bytes: Mapping[str, int]
    ) -> bool:
        """Store the files that another store had under this digest, a piece at a time.

        Args:
            pieces:    name -> bytes, one piece after the other, as ``file_pieces`` gives them.
            num_bytes: name -> how many they are together.

        Returns:
            Whether it is new; else nothing of ``pieces`` was read.

        Raises:
            ArgumentError: they are not the files of this digest; nothing is left behind.
            QuotaError, StoreError: as ``put``.
        """
        if not _NAME.fullmatch(digest) or set(pieces) != {files.CONFIG, files.MODEL}:
            raise ArgumentError(f"adapter {digest[:64]!r}: {files.CONFIG}, {files.MODEL} wanted")
        with self._writing():
            if digest in self and self.check(digest) is None:
                return False
            self._make_room(digest, num_bytes)
            if self.folder is None:
                self._memory[digest] = {name: b"".join(data) for name, data in pieces.items()}
            else:
                path = self.folder / digest
                with _disk.explained("store the adapter", path):
                    if path.exists():
                        _disk.remove_folder(path, durable=self.durable)
                    _disk.publish_folder(path, pieces, durable=self.durable)
            try:
                why = self.check(digest)
            except ArgumentError as error:
                why = str(error)
            if why is not None:
                self.delete(digest)
                raise ArgumentError(f"adapter {digest}: its files are not those of it: {why}")
        return True

    def share(self, other: AdapterStore, digest: str) -> None:
        """Have an adapter of another store too. Folders of one file system share its bytes.

        Raises: NotFoundError; QuotaError, StoreError as ``put``.
        """
        with self._writing():
            if digest in self and self.check(digest) is None:
                self._touch(digest)
                return
            pieces = other.file_pieces(digest)
            if self.folder is None and other.folder is None:
                self._memory[digest] = other._memory[digest]
                return
            sizes = other.file_sizes(digest)
            if self.folder is not None and other.folder is not None:
                self._make_room(digest, sizes)
                path = self.folder / digest
                if path.exists():
                    _disk.remove_folder(path, durable=self.durable)
                with contextlib.suppress(OSError):  # no hard links from there to here
                    _disk.link_folder(path, other.folder / digest)
                    return
            self.put_files(digest, pieces, sizes)

    def file_sizes(self, digest: str) -> dict[str, int]:
        """Name -> bytes of an adapter's files. Raises NotFoundError."""
        if digest not in self:
            raise self._unknown(digest)
        if self.folder is None:
            return {name: len(data) for name, data in self._memory[digest].items()}
        path = self.folder / digest
        return {name: (path / name).stat().st_size for name in (files.CONFIG, files.MODEL)}

    def file_pieces(self, digest: str) -> dict[str, Iterator[bytes]]:
        """The files of an adapter, name -> pieces of at most a megabyte, checked before.

        Raises NotFoundError, StoreError: as ``load``.
        """
        why = self.check(digest)
        if why is not None:
            raise StoreError(why)
        return {name: self._file(digest, name) for name in (files.CONFIG, files.MODEL)}

    def _file(self, digest: str, name: str) -> Iterator[bytes]:
        if self.folder is None:
            data = memoryview(self._memory[digest][name])
            yield from (
                bytes(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)
            )
            return
        path = self.folder / digest / name
        with _disk.explained("read the adapter", path), path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def delete(self, digest: str) -> None:
        """Remove an adapter.

        Raises:
            NotFoundError: there is none with this digest.
            StoreError: the disk failed.
        """
        with self._writing():
            if digest not in self:
                raise self._unknown(digest)
            if self.folder is None:
                del self._memory[digest]
                return
            with _disk.explained("delete the adapter", self.folder / digest):
                _disk.remove_folder(self.folder / digest, durable=self.durable)

    def sweep(self, keep: Collection[str], *, older_than_s: float = 0.0) -> list[str]:
        """Remove what no one names, and what killed writers left.

        Args:
            keep:         digests that stay.
            older_than_s: adapters stored less than this long ago stay too: whoever stored one may
                not have written down its digest yet.

        Returns:
            The digests of what was removed.

        Raises:
            StoreError: the disk failed.
        """
        removed = []
        with self._writing():  # no one else writes now: all that looks half-done is dead
            for digest in self.list():
                if digest not in keep and self._age_s(digest) >= older_than_s:
                    self.delete(digest)
                    removed.append(digest)
            self._clear_leftovers()
        return removed

    # Reading

    def load(self, digest: str) -> Adapter:
        """The adapter with this digest, checked against it.

        Raises:
            NotFoundError: there is none.
            StoreError: its files are damaged; the message names which.
        """
        with self.open(digest) as stored:
            return stored.packed().adapter()

    def card(self, digest: str) -> Mapping[str, Any]:
        """The card alone. Raises as ``load``."""
        with self.open(digest) as stored:
            return stored.card

    def open(self, digest: str) -> StoredAdapter:
        """Read all but the tensors of an adapter. Raises as ``load``."""
        if not isinstance(digest, str) or not _NAME.fullmatch(digest):
            raise self._unknown(digest)
        if self.folder is None:
            parts = self._memory.get(digest)
            if parts is None:
                raise self._unknown(digest)
            model = memoryview(parts[files.MODEL])
            n = header_bytes(parts[files.MODEL][:LENGTH_BYTES], len(model), digest)
            body = LENGTH_BYTES + n
            found = self._parse(
                Path(digest), parts[files.CONFIG], bytes(model[LENGTH_BYTES:body]),
                len(model) - body, digest,
            )  # fmt: skip
            return StoredAdapter(digest, found, -1, 0, model[body:])
        path = self.folder / digest
        fd = -1
        try:
            with _disk.explained("read the adapter", path):
                fd = os.open(f"{path}/{files.MODEL}", os.O_RDONLY | os.O_CLOEXEC)
                _disk.read_ahead(fd)
                config = _read_whole(f"{path}/{files.CONFIG}")
                size = os.fstat(fd).st_size
                n = header_bytes(os.read(fd, LENGTH_BYTES), size, files.MODEL)
                header = os.read(fd, n)
            found = self._parse(path, config, header, size - LENGTH_BYTES - n, digest)
            return StoredAdapter(digest, found, fd, LENGTH_BYTES + n, memoryview(b""))
        except (ArgumentError, StoreError) as error:
            if fd >= 0:
                os.close(fd)
            if not path.exists():
                raise self._unknown(digest) from None
            cause, why = error.__cause__, str(error)
            if isinstance(cause, FileNotFoundError):
                why = f"{cause.filename} is missing"
            elif isinstance(error, StoreError):
                raise
            raise StoreError(f"{path}: damaged; put it again, or delete it: {why}") from error

    def check(self, digest: str) -> str | None:
        """Why this adapter cannot be read, or None. Raises NotFoundError where there is none."""
        try:
            with self.open(digest) as stored:
                stored.verify()
        except StoreError as error:
            return str(error)
        return None

    def list(self) -> list[str]:
        """Digests of all adapters, sorted."""
        if self.folder is None:
            return sorted(self._memory)
        with _disk.explained("list the adapters", self.folder):
            return sorted(name for name in os.listdir(self.folder) if _NAME.fullmatch(name))

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, str) or not _NAME.fullmatch(digest):
            return False
        if self.folder is None:
            return digest in self._memory
        return (self.folder / digest).is_dir()

    def num_bytes(self, digest: str | None = None) -> int:
        """What one adapter takes, or all together with what killed writers left."""
        if digest is not None and digest not in self:
            raise self._unknown(digest)
        if self.folder is None:
            found = [self._memory[digest]] if digest else list(self._memory.values())
            return sum(len(data) for parts in found for data in parts.values())
        if digest is not None:
            return _folder_bytes(self.folder / digest)
        with _disk.explained("list the adapters", self.folder):
            return sum(
                _folder_bytes(self.folder / name)
                for name in os.listdir(self.folder)
                if name != _LOCK
            )

    def stats(self) -> dict[str, int | None]:
        """bytes, budget (None: no limit) and adapters."""
        found = self.list()
        return {"bytes": self.num_bytes(), "budget": self.disk_bytes, "adapters": len(found)}

    # Inside

    def _parse(
        self, path: Path, config: bytes, header: bytes, payload_bytes: int, digest: str
    ) -> Parts:
        """Check config, header, card and seal; ArgumentError where one is wrong.

        Adapters of one config and the same shapes have the same bytes up to the metadata: their
        table of layers is made once.
        """
        where = str(path / files.MODEL)
        cut = header.find(_METADATA_KEY)
        key = (header[:cut], config, payload_bytes)
        shape = self._shapes.get(key) if cut > 0 else None
        if shape is None:
            found = files.read_config(config, str(path / files.CONFIG))
            layers, metadata = files.read_header(header, payload_bytes, found, path)
            if not is_dense(layers):
                raise ArgumentError(f"{where}: tensors in the order of a store wanted")
            shape = Shape(layers, found, payload_bytes)
            rest = parse_json(b"{" + header[cut:], where) if cut > 0 else {}
            if rest.keys() == {METADATA}:
                self._keep(key, shape)
        else:
            rest = parse_json(b"{" + header[cut:], where)
            metadata = rest.get(METADATA, {})
            if rest.keys() != {METADATA} or not are_strings(metadata):
                raise ArgumentError(
                    f"{where}: {METADATA} of strings at the end of the header wanted"
                )
        card, seal = files.read_metadata(metadata, where)
        if seal is None or seal["digest"] != digest:
            raise ArgumentError(f"{where}: the seal of {digest} wanted, got {seal}")
        if not files.is_sealed(config, seal):
            raise ArgumentError(f"{path / files.CONFIG}: it was changed since it was stored")
        return Parts(path, shape, card)

    def _keep(self, key: tuple[bytes, bytes, int], shape: Shape) -> None:
        with self._lock:
            self._shapes[key] = shape
            while len(self._shapes) > _KEPT_HEADERS:
                self._shapes.popitem(last=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, in this process and among those that share the folder."""
        with self._lock:
            if self.folder is None or self._held:
                yield
                return
            with contextlib.ExitStack() as stack:
                with _disk.explained("lock the folder of adapters", self.folder):
                    stack.enter_context(_disk.locked(self.folder / _LOCK))
                self._held = True
                try:
                    yield
                finally:
                    self._held = False

    def _make_room(self, digest: str, num_bytes: Mapping[str, int]) -> None:
        if self.disk_bytes is None:
            return
        sizes = num_bytes.values()
        wanted = sum(sizes if self.folder is None else map(_rounded, sizes))
        self._clear_leftovers()
        used = self.num_bytes() - (self.num_bytes(digest) if digest in self else 0)
        if used + wanted > self.disk_bytes:
            raise QuotaError(
                f"disk_bytes={self.disk_bytes}: room for {wanted} bytes wanted, but {used} are "
                f"taken by {len(self.list())} adapters; delete some, or raise it"
            )

    def _clear_leftovers(self) -> None:
        if self.folder is None:
            return
        with _disk.explained("clear away what killed writers left", self.folder):
            _disk.clear_leftovers(self.folder)

    def _touch(self, digest: str) -> None:
        """What is put again is young: a sweep leaves it to who puts it."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                os.utime(self.folder / digest)

    def _age_s(self, digest: str) -> float:
        if self.folder is None:
            return float("inf")
        with contextlib.suppress(FileNotFoundError):
            return time.time() - (self.folder / digest).stat().st_mtime
        return 0.0

    def _unknown(self, digest: object) -> NotFoundError:
        return NotFoundError(f"{digest}: no adapter with this digest is stored")


def _read_whole(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK


def _folder_bytes(path: Path) -> int:
    """Of the files in a folder, rounded up to blocks; 0 where it went meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        for entry in entries:
            total += _rounded(entry.stat(follow_symlinks=False).st_size)
    return total
