"""Acts on files and folders that have to be whole or not at all. Unix only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from memos.errors import StoreError

TEMP = ".tmp-"  # whatever a killed writer leaves begins so
DELETED = ".deleted-"  # a folder on its way out

Bytes = bytes | bytearray | memoryview

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StoreError that says what failed, where and why."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        why = "the operating system refused"
        if error.errno in _FULL:
            why = "no space left; nothing that was stored before is lost"
        elif error.errno in _READ_ONLY:
            why = "this process may not"
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        raise StoreError(f"{path}: cannot {what}: {why} ({code}: {error.strerror})") from error


def temp_path(folder: Path, kind: str = TEMP) -> Path:
    """A name in ``folder`` that no one else uses."""
    return folder / f"{kind}{os.getpid()}-{secrets.token_hex(6)}"


def publish_folder(path: Path, files: Mapping[str, Iterable[Bytes]], *, durable: bool) -> None:
    """Put a whole folder in place: whoever looks sees all of its files or no folder.

    Args:
        path:    must not exist, or be an empty folder.
        files:   name -> pieces of its bytes.
        durable: it survives a power cut once this returns.

    Raises:
        OSError: the disk failed, or there is something at ``path``; nothing is left behind.
    """
    temp = temp_path(path.parent)
    try:
        temp.mkdir(mode=0o755)
        for name, pieces in files.items():
            _write(temp / name, pieces, durable)
        if durable:
            sync_folder(temp)
        temp.rename(path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    if durable:
        sync_folder(path.parent)


def link_folder(path: Path, source: Path) -> None:
    """Put a folder in place whose files are those of another one: bytes on disk that stand once.

    Raises:
        OSError: as ``publish_folder``; also where the file system has no hard links.
    """
    temp = temp_path(path.parent)
    try:
        temp.mkdir(mode=0o755)
        for file in source.iterdir():
            os.link(file, temp / file.name)
        sync_folder(temp)
        temp.rename(path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    sync_folder(path.parent)


def remove_folder(path: Path, *, durable: bool) -> None:
    """Move a folder out of sight, then remove it: no one sees half of it."""
    gone = temp_path(path.parent, DELETED)
    path.rename(gone)
    if durable:
        sync_folder(path.parent)
    shutil.rmtree(gone)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; only while no one writes there."""
    for name in os.listdir(folder):
        if name.startswith((TEMP, DELETED)):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make renames and removals in this folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the one writer's lock on a file; the kernel releases it when its holder dies."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read_exactly(fd: int, into: memoryview, offset: int, path: Path) -> None:
    """Fill ``into`` from this offset on. Raises StoreError: the file ends before."""
    while into.nbytes:
        got = os.preadv(fd, [into], offset)
        if not got:
            raise StoreError(
                f"{path}: damaged: {into.nbytes} bytes more wanted, but the file was cut off"
            )
        into, offset = into[got:], offset + got


def read_ahead(fd: int) -> None:
    """The file will be read from its beginning to its end: let the system fetch ahead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _write(path: Path, pieces: Iterable[Bytes], durable: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view.nbytes:
                view = view[os.write(fd, view) :]
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
